"""
What the conversion of videos costs, against decoding them and nothing else.

    python -m benchmarks.conversion --json conversion.json

makes an archive like the UCF101 subset (320x240, 186 frames, 25 a second, XVID in avi, 530 kB a
video: real photographs that move) and prints, as medians of the rounds with their range,

    CPU time a video    decoding alone (PyAV, one thread), convert_ucf101.py with one worker, and
                        the textbook way: all frames to RGB images, 8 of them to JPEG
    wall time a video   the same, and convert_ucf101.py with two workers

`convert_ucf101.py` is run as a user runs it, so its times include the start of Python, the imports
and the extraction of the archive; those of decoding and of the textbook way do not. A round runs
all of them, every other one in reverse, and a ratio compares runs of the same round: the speed of
a machine that others use as well drifts. Both ways must give the same pixels. 700 MB of temporary
files and some ten minutes with the defaults; two workers need two cores that are idle.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import PIL
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

CONVERTER = Path(__file__).resolve().parent.parent / "convert_ucf101.py"
# On a disk the state of the file system would be measured as well: ext4 here took 0.4 ms, not 0.02,
# for a new file where many had just been deleted, as this script does.
MEMORY_DISK = Path("/dev/shm")
SIZE = (320, 240)
NUM_FRAMES, FPS, BIT_RATE = 186, 25, 550_000  # means of UCF-101
CLIPS = 8  # different ones; the archive repeats them under other names
CLASSES = 10
CHOSEN = 8  # frames of a video that become images
JPEG_QUALITY = 95

FLOOR, TEXTBOOK = "decoding alone", "textbook way"
ONE, TWO = "convert_ucf101.py, 1 worker", "convert_ucf101.py, 2 workers"
Cost = tuple[float, float]  # seconds of CPU time, of wall time


# ---- The videos ----


def draw_frames(seed: int) -> Iterator[np.ndarray]:
    """A camera that pans and zooms over a photograph, with an oval of another one moving in front.

    uint8 frames (240, 320, 3). The photographs come with scikit-learn.
    """
    rng = np.random.default_rng(seed)
    first, second = (Image.fromarray(image) for image in load_sample_images().images)
    back, front = (first, second) if seed % 2 else (second, first)
    oval = Image.new("L", (110, 140))
    ImageDraw.Draw(oval).ellipse((0, 0, 109, 139), fill=255)
    actor = front.crop((200, 120, 310, 260))
    phase, speed = rng.uniform(0, 2 * np.pi, 5), np.array([0.02, 0.015, 0.01, 0.11, 0.07])
    for time_step in range(NUM_FRAMES):
        x, y, zoom, left, top = np.sin(phase + speed * time_step)
        width, height = (side * (1.15 + 0.1 * zoom) for side in SIZE)
        x, y = (back.width - width) / 2 * (1 + x), (back.height - height) / 2 * (1 + y)
        frame = back.resize(SIZE, Image.Resampling.BILINEAR, (x, y, x + width, y + height))
        frame.paste(actor, (round(105 + 105 * left), round(50 + 50 * top)), oval)
        noise = rng.normal(0, 2, (*SIZE[::-1], 1))  # that of a sensor
        yield np.clip(np.asarray(frame) + noise, 0, 255).astype(np.uint8)


def write_clip(path: Path, seed: int) -> None:
    """MPEG-4 part 2 with B-frames and the XVID tag in an .avi, as UCF-101 is."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height = SIZE
        stream.pix_fmt, stream.bit_rate = "yuv420p", BIT_RATE
        stream.codec_context.codec_tag = "XVID"
        stream.codec_context.max_b_frames = 2
        stream.codec_context.thread_count = 1
        for frame in draw_frames(seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def make_videos(folder: Path, count: int) -> list[Path]:
    """Write `count` videos below folder/videos, and folder/videos.tar with the same."""
    clips = [folder / f"{seed}.avi" for seed in range(min(count, CLIPS))]
    for seed, clip in enumerate(clips):
        write_clip(clip, seed)
    videos = []
    for i in range(count):
        videos.append(folder / f"videos/train/Class{i % CLASSES}/v_{i:05d}.avi")
        videos[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clips[i % len(clips)], videos[-1])
    with tarfile.open(folder / "videos.tar", "w") as tar:
        tar.add(folder / "videos", "UCF101_subset")
    return videos


# ---- What is measured ----


def decode_alone(videos: list[Path]) -> None:
    """The floor: every way to choose frames by their exact number decodes all of them."""
    for path in videos:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for _ in container.decode(stream):
                pass


def convert_textbook(videos: list[Path], out: Path) -> None:
    """All frames as RGB images in memory, and 8 of them, evenly spaced, saved."""
    for path in videos:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            images = [frame.to_image() for frame in container.decode(video=0)]
        folder = out / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(CHOSEN):
            image = images[i * len(images) // CHOSEN]
            image.save(folder / f"{path.stem}.{i}.jpg", quality=JPEG_QUALITY)


def timed(work: Callable[[], None]) -> Cost:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(work: Callable[[], None]) -> Cost:
    """The cost of a function in a process of its own: none inherits another's memory or caches."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(timed, work).result()


def measure_converter(folder: Path, num_workers: int) -> Cost:
    """The cost of the whole command, with all its processes, into an empty folder/converted."""
    out = folder / "converted"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, CONVERTER, "--archive", folder / "videos.tar", "--out_dir", out]
    command += ["--tmp_dir", folder / "tmp", "--num_workers", str(num_workers), "--no-tqdm"]
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - wall
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def check_pixels(converted: Path, textbook: Path) -> None:
    """Both ways must have written the same images."""
    names = sorted(path.relative_to(textbook) for path in textbook.rglob("*.jpg"))
    assert names == sorted(path.relative_to(converted) for path in converted.rglob("*.jpg"))
    for name in names:
        with Image.open(converted / name) as ours, Image.open(textbook / name) as theirs:
            assert np.array_equal(ours, theirs), name


def measure_all(folder: Path, num_videos: int, num_rounds: int) -> dict[str, list[Cost]]:
    """Every way's costs, one a round."""
    videos = make_videos(folder, num_videos)
    ways = {
        FLOOR: lambda: measure(partial(decode_alone, videos)),
        ONE: lambda: measure_converter(folder, 1),
        TWO: lambda: measure_converter(folder, 2),
        TEXTBOOK: lambda: measure(partial(convert_textbook, videos, folder / "textbook")),
    }
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    for i in range(num_rounds):
        print(f"round {i + 1} of {num_rounds}", file=sys.stderr)
        for way in list(ways)[:: -1 if i % 2 else 1]:
            costs[way].append(ways[way]())
    check_pixels(folder / "converted/images/train", folder / "textbook")
    return costs


# ---- The table ----


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def ratios(costs: dict[str, list[Cost]], way: str, base: str, kind: int) -> list[float]:
    """Round by round; kind 0 compares CPU times, 1 wall times."""
    return [a[kind] / b[kind] for a, b in zip(costs[way], costs[base], strict=True)]


def print_table(costs: dict[str, list[Cost]], num_videos: int) -> None:
    row = "{:30}{:>24}{:>20}{:>24}".format
    print(row("", "CPU ms a video", "of decoding", "wall ms a video"))
    for way, seconds in costs.items():
        cpu, wall = ([1000 * s / num_videos for s in kind] for kind in zip(*seconds, strict=True))
        share = spread(ratios(costs, way, FLOOR, 0), 2)
        print(row(way, spread(cpu, 1), share, spread(wall, 1)))
    print(f"2 workers are {spread(ratios(costs, ONE, TWO, 1), 2)} times as fast as 1")
    print(f"1 worker is {spread(ratios(costs, TEXTBOOK, ONE, 1), 2)} times as fast as the textbook")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--videos", type=int, default=400, help="videos in the archive (default: %(default)s)")
    add("--rounds", type=int, default=3, help="times that each is run (default: %(default)s)")
    add(
        "--tmp_dir",
        type=Path,
        default=MEMORY_DISK if MEMORY_DISK.is_dir() else tempfile.gettempdir(),
        help="for all files (default: %(default)s)",
    )
    add("--json", type=Path, help="write all measured times to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.tmp_dir) as folder:
        costs = measure_all(Path(folder), args.videos, args.rounds)
    print_table(costs, args.videos)
    if args.json:
        report = {
            "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
            "versions": {"av": av.__version__, "pillow": PIL.__version__},
            "videos": args.videos,
            "frames_a_video": NUM_FRAMES,
            "seconds_cpu_wall": costs,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
