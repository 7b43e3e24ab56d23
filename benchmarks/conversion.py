"""
What the conversion of videos costs, against decoding them and nothing else.

    python -m benchmarks.conversion

makes an archive like the UCF101 subset (320x240, 186 frames, 25 a second, XVID in avi, 530 kB a
video: real photographs that move) and prints, as medians of the rounds with their range,

    CPU time per video    decoding alone (PyAV, one thread), `convert_video` of phi3v,
                        the script with one and with two workers, and the textbook way: all frames
                        to RGB images, 8 of them to JPEG
    wall time per video   the same
    gain of a second    two processes against one: what the script's workers gain, and what the
                        machine gives to two processes that share nothing and only decode

Decoding and `convert_video` take turns video by video, in one process. `convert_ucf101.py` is run
as a user runs it, so its times include the start of Python, the imports and the extraction of the
archive; the others do not. All ways must give the same pixels. 930 MB of temporary files and some
ten minutes with the defaults; two workers need two cores that are idle.

    python -m benchmarks.conversion --long

prints what it saves to decode no more than leads to the wanted frames: the CPU time of
`read_frames` beside that of decoding all, for a video of 3 minutes (1280x720, 25 frames a second,
H.264 of libx264's preset ultrafast: a photograph that moves), clips of 7 s in H.264, and those of
above, in which `read_frames` decodes all. Both ways must give the same frames. Two minutes.
"""

import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from benchmarks.side_by_side import in_turns, make_parser, ratios, report, spread
from phi3v.data.frame_folder import Video, convert_video
from phi3v.data.sampling import Sampling
from phi3v.data.video import decode, read_frames

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

FLOOR, STEADY, TEXTBOOK = "decoding alone", "convert_video", "textbook way"
FLOOR_TWO = "decoding alone, 2 processes"
ONE, TWO = "convert_ucf101.py, 1 worker", "convert_ucf101.py, 2 workers"

ALL, PART = "decoding all", "read_frames"

T = TypeVar("T")


class Cost(NamedTuple):
    """Seconds."""

    cpu: float
    wall: float


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


def write_h264(path: Path, num_frames: int, size: tuple[int, int], gop: int) -> None:
    """A window that wanders over a photograph."""
    width, height = size
    photo = Image.fromarray(load_sample_images().images[0]).resize((2 * width, 2 * height))
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "x264-params": f"keyint={gop}:scenecut=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            left, top = (round(side / 2 * (1 + np.sin(i / 70))) for side in size)
            window = photo.crop((left, top, left + width, top + height))
            container.mux(stream.encode(av.VideoFrame.from_image(window)))
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
    """What there is to decode in a clip."""
    for path in videos:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for _ in container.decode(stream):
                pass


def take_turns(paths: list[Path], out: Path) -> dict[str, Cost]:
    """The costs of FLOOR and STEADY. Each video is decoded, then converted into `out`."""
    shutil.rmtree(out, ignore_errors=True)  # what is there would be kept
    costs: dict[str, list[Cost]] = {FLOOR: [], STEADY: []}
    for path in paths:
        label = path.parent.name
        video = Video(path.stem, "train", f"train/{label}/{path.stem}", label, path)
        convert = partial(convert_video, video, {}, out, Sampling(CHOSEN), max_gb=1)
        costs[FLOOR].append(timed(partial(decode_alone, [path])))
        costs[STEADY].append(timed(convert))
    return {way: Cost(*map(sum, zip(*each, strict=True))) for way, each in costs.items()}


def read_both(path: Path, sampling: Sampling) -> dict[str, float]:
    """CPU seconds of ALL and PART. In ALL, which frames are wanted is known without asking."""
    frames, cost = {}, {}

    def read_all() -> None:
        kept, _, _ = decode(path, set(wanted))
        frames[ALL] = [kept[i] for i in wanted]

    def read_part() -> None:
        frames[PART], _ = read_frames(path, sampling)

    _, times, _ = decode(path, set())
    wanted = sampling.choose(times)
    for way, read in ((ALL, read_all), (PART, read_part)):
        cost[way] = timed(read).cpu
    for one, other in zip(frames[ALL], frames[PART], strict=True):
        assert np.array_equal(one.to_ndarray(), other.to_ndarray())
    return cost


def measure_long(folder: Path, seconds: int, num_rounds: int) -> list[list[str]]:
    """The rows of the table of --long."""
    long, often, seldom, clip = (folder / name for name in ("0.mp4", "1.mp4", "2.mp4", "3.avi"))
    write_h264(long, FPS * seconds, (1280, 720), 250)
    write_h264(often, NUM_FRAMES, SIZE, 12)
    write_h264(seldom, NUM_FRAMES, SIZE, 250)
    write_clip(clip, 0)
    eight, by_time = Sampling(CHOSEN), Sampling(fps=Fraction(1, 10), max_frames=32)
    cases = {
        f"{seconds} s of 720p, key frame every 250": (long, eight),
        f"{seconds} s of 720p, --fps 1/10": (long, by_time),
        "clip in H.264, key frame every 12": (often, eight),
        "clip in H.264, one key frame": (seldom, eight),
        "clip in XVID, as UCF-101's": (clip, eight),
    }
    costs = in_turns({name: partial(read_both, *case) for name, case in cases.items()}, num_rounds)
    rows = []
    for name, each in costs.items():
        whole, part = ([1000 * cost[way] for cost in each] for way in (ALL, PART))
        rows.append([name, spread(whole, 1), spread(part, 1), ratios(part, whole)])
    return rows


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


def decode_in_two(videos: list[Path]) -> Cost:
    """As `decode_alone`, by two processes that have half of the videos each."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(2, spawn, initializer=spawn.Barrier(2).wait) as pool:
        halves = [partial(decode_alone, videos[first::2]) for first in range(2)]
        costs = list(pool.map(timed, halves))
    return Cost(sum(cost.cpu for cost in costs), max(cost.wall for cost in costs))


def timed(work: Callable[[], None]) -> Cost:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall)


def in_own_process(work: Callable[[], T]) -> T:
    """What a function returns in a new process, which inherits no other's memory or caches."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work).result()


def measure_converter(folder: Path, num_workers: int) -> Cost:
    """The cost of the whole command, with all its processes, into an empty folder/converted."""
    out = folder / "converted"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, CONVERTER, "--archive", folder / "videos.tar", "--out_dir", out]
    command += ["--tmp_dir", folder / "tmp", "--num_workers", str(num_workers), "--no-tqdm"]
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - wall
    return Cost(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall)


def check_pixels(converted: Path, textbook: Path) -> None:
    """Both ways must have written the same images."""
    names = sorted(path.relative_to(textbook) for path in textbook.rglob("*.jpg"))
    assert names == sorted(path.relative_to(converted) for path in converted.rglob("*.jpg"))
    for name in names:
        with Image.open(converted / name) as ours, Image.open(textbook / name) as theirs:
            assert np.array_equal(ours, theirs), name


def measure_all(folder: Path, num_videos: int, num_rounds: int) -> dict[str, list[Cost]]:
    """Every way's costs, one a round. Those of FLOOR and STEADY come out of one process."""
    videos = make_videos(folder, num_videos)
    textbook = partial(timed, partial(convert_textbook, videos, folder / "textbook"))
    ways = {
        "in turns": lambda: in_own_process(partial(take_turns, videos, folder / "steady")),
        FLOOR_TWO: lambda: decode_in_two(videos),
        ONE: lambda: measure_converter(folder, 1),
        TWO: lambda: measure_converter(folder, 2),
        TEXTBOOK: lambda: in_own_process(textbook),
    }
    # Every process starts anew: there is nothing to warm up.
    costs = in_turns(ways, num_rounds, warm_up=0)
    check_pixels(folder / "converted/images/train", folder / "textbook")
    check_pixels(folder / "steady/images/train", folder / "textbook")
    turns = costs.pop("in turns")
    return {way: [each[way] for each in turns] for way in (FLOOR, STEADY)} | costs


# ---- The table ----


def make_rows(costs: dict[str, list[Cost]], num_videos: int) -> list[list[str]]:
    """A row for every way: CPU time beside that of decoding, wall time beside one process's."""
    cpu = {way: [1000 * cost.cpu / num_videos for cost in each] for way, each in costs.items()}
    wall = {way: [1000 * cost.wall / num_videos for cost in each] for way, each in costs.items()}
    gain = {
        two: ratios(wall[one], wall[two]) + "x" for two, one in ((FLOOR_TWO, FLOOR), (TWO, ONE))
    }
    return [
        [
            *(way, spread(cpu[way], 1), ratios(cpu[way], cpu[FLOOR])),
            *(spread(wall[way], 1), gain.get(way, "-")),
        ]
        for way in costs
    ]


def main():
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--videos", type=int, default=400, help="videos in the archive (400)")
    default = MEMORY_DISK if MEMORY_DISK.is_dir() else Path(tempfile.gettempdir())
    parser.add_argument("--tmp_dir", type=Path, default=default, help=f"for all files ({default})")
    parser.add_argument(
        "--long", type=int, nargs="?", const=180, help="measure seeking, in a video of 180 seconds"
    )
    args = parser.parse_args()
    if args.long:
        with tempfile.TemporaryDirectory(dir=args.tmp_dir) as folder:
            rows = measure_long(Path(folder), args.long, args.rounds)
        header = ["video", "all decoded, CPU ms", "read_frames, CPU ms", "of decoding all"]
        report("Frames of long and short videos", header, rows, args.save, "long")
        return
    with tempfile.TemporaryDirectory(dir=args.tmp_dir) as folder:
        costs = measure_all(Path(folder), args.videos, args.rounds)
    header = ["way", "CPU ms a video", "of decoding alone", "wall ms a video", "gain of a second"]
    name = f"Conversion of {args.videos} videos of {NUM_FRAMES} frames"
    report(name, header, make_rows(costs, args.videos), args.save)


if __name__ == "__main__":
    main()
