"""
Turn a video dataset into frames and jsonl for finetune_hf_trainer_ucf101.py.

    # the UCF101 subset from the hub (10 classes, about 400 videos)
    python convert_ucf101.py --out_dir /path/to/converted_ucf101
    # the same archive, already on disk (a tar, plain or compressed)
    python convert_ucf101.py --out_dir /path/to/converted_ucf101 --archive UCF101_subset.tar.gz
    # your own videos: my_videos/{train,val,test}/<class>/<video>.mp4
    python convert_ucf101.py --out_dir /path/to/converted --video_dir my_videos

gives

    out_dir/images/{train,val,test}/<class>/<video>.<0..7>.jpg     8 frames a video
    out_dir/ucf101_{train,val,test}.jsonl                          1 line a video

Splits   At least one of train, val, test. A split without videos gets no jsonl. The classes in
         the prompt are those of all splits together. Hidden files and other files are ignored.
Ids      <split>-<number>. The number is the video's place among all videos, sorted by split
         (train, val, test), class, name. It runs on: after 300 training videos val starts at 300.
Frames   floor(i * n / 8), i = 0..7, of the n frames that really decode; RGB JPEG of quality 95
         in the video's own size, as stored (a rotation flag is not applied). Damaged parts are
         skipped, as ffmpeg does, with a warning. The bytes are the same on every run.
Failures A video of which nothing decodes is named in the summary and leaves no files and no
         record. Its number stays unused, so that the other ids do not depend on it.
Jsonl    Those of an earlier run are removed at the start and written when all is done: where
         there is a jsonl, all its images are there.

Exit code: 0 all videos converted, 1 some failed, 2 wrong arguments, source or output folder.
"""

import argparse
import io
import json
import lzma
import multiprocessing
import os
import shlex
import signal
import sys
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
from PIL import Image
from tqdm import tqdm

HUB_REPO, HUB_FILE = "sayakpaul/ucf101-subset", "UCF101_subset.tar.gz"
SPLITS = ("train", "val", "test")
SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
LAYOUT = f"{{train,val,test}}/<class>/<video> with a video in {' '.join(SUFFIXES)}"
JPEG_QUALITY = 95
# How far the number of packets may be from that of frames before a video is decoded twice.
GUESS_SLACK = 2


class SourceError(Exception):
    """There are no usable videos. The message says why and what to do."""


class Video(NamedTuple):
    id: str  # "val-0000000300"
    split: str
    label: str  # the class
    path: Path

    @property
    def name(self) -> str:
        return f"{self.split}/{self.label}/{self.path.name}"

    def image_names(self, num_frames: int) -> list[str]:
        """Paths of the frames, relative to out_dir/images."""
        return [f"{self.split}/{self.label}/{self.path.stem}.{i}.jpg" for i in range(num_frames)]


class Outcome(NamedTuple):
    num_damaged: int = 0  # packets that the decoder refused
    error: str | None = None  # why there is nothing of this video


# ---- The source: an archive or a folder -> a list of videos ----


def download_archive() -> Path:
    # Imported here: it is slow, and neither the workers nor the other sources need it.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id=HUB_REPO, filename=HUB_FILE, repo_type="dataset"))
    except Exception as error:  # offline, proxy, full disk, ...: the ways out are the same
        raise SourceError(
            f"cannot download {HUB_FILE} of the hub dataset {HUB_REPO}: {error}\n"
            "Give the file with --archive FILE, or a folder of videos with --video_dir DIR."
        ) from error


def extract_archive(archive: Path, folder: Path) -> None:
    """Extract a tar into an empty folder, after a check of all members."""
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar.getmembers():
                # The filter would only strip the root, but no honest archive has such a path.
                if member.name.startswith(("/", os.sep)):
                    raise SourceError(f"{archive} is refused: {member.name!r} is absolute")
                tarfile.data_filter(member, str(folder))
            # Filtered again: only now is it known where the links of the archive lead.
            tar.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise SourceError(f"{archive} is refused: {error}") from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise SourceError(f"{archive} cannot be extracted: {error}") from error


@contextmanager
def video_root(args: argparse.Namespace) -> Iterator[Path]:
    """The folder that holds the splits. What had to be extracted is removed at the end."""
    if args.video_dir:
        # Absolute, or ffmpeg would take a colon in the first folder's name for a protocol.
        yield args.video_dir.absolute()
        return
    archive = args.archive or download_archive()
    args.tmp_dir.mkdir(parents=True, exist_ok=True)
    # A fresh folder: nothing that another run left may become part of this dataset.
    with tempfile.TemporaryDirectory(
        prefix=f"{archive.name}.", dir=args.tmp_dir.absolute()
    ) as temporary:
        folder = Path(temporary)
        extract_archive(archive, folder)
        # The archive may have folders of its own above the splits.
        roots = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
        roots.sort(key=lambda path: len(path.parts))
        yield next((root for root in roots if list_videos(root)), folder)


def list_videos(root: Path) -> list[Video]:
    """All videos below root, in the order of the ids."""
    videos: list[Video] = []
    for split in SPLITS:
        folders = [path for path in (root / split).glob("*") if path.is_dir()]
        for folder in sorted(folders, key=lambda path: path.name):
            for path in sorted(folder.iterdir(), key=lambda path: (path.stem, path.suffix)):
                is_video = path.suffix.lower() in SUFFIXES and path.is_file()
                if is_video and not path.name.startswith("."):
                    id = f"{split}-{len(videos):010d}"
                    videos.append(Video(id, split, folder.name, path))
    return videos


def check_videos(videos: list[Video], root: Path) -> None:
    """Stop before the work starts if the videos cannot become a dataset."""
    if not videos:
        found = sorted(str(p.relative_to(root)) for g in ("*", "*/*") for p in root.glob(g))
        shown = ", ".join(found[:12] + ["..."] * (len(found) > 12)) or "nothing"
        shown = shown if root.is_dir() else "no such folder"
        raise SourceError(f"no videos in {root}\nExpected: {LAYOUT}\nFound: {shown}")
    owners: dict[str, Video] = {}
    for video in videos:
        other = owners.setdefault(video.image_names(1)[0], video)
        if other is not video:
            raise SourceError(
                f"{other.name} and {video.name} would write the same images: rename one of them"
            )


# ---- One video -> its frames ----


def frame_indices(count: int, num_frames: int) -> list[int]:
    """The frames to take of a video of `count` frames, (num_frames,); a short one repeats."""
    return [i * count // num_frames for i in range(num_frames)]


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("no video stream that can be decoded")
        # The workers share the cores; threads inside one decoder do not pay.
        stream.codec_context.thread_count = 1
        yield container, stream


def count_packets(path: Path) -> int:
    """Number of packets, nearly always that of the frames, at 5 % of the cost of decoding."""
    with open_video(path) as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


def decode(path: Path, keep: set[int]) -> tuple[dict[int, av.VideoFrame], int, int]:
    """Decode a video to its end. A damaged packet is skipped.

    Returns the frames whose index is in `keep`, the number of all frames, that of skipped packets.
    """
    frames: dict[int, av.VideoFrame] = {}
    count = num_damaged = 0
    with open_video(path) as (container, stream):
        # An empty packet ends the decoding, so one in mid-file must not reach the decoder.
        packets = (packet for packet in container.demux(stream) if packet.size > 0)
        for packet in chain(packets, [None]):  # None: give out the frames still held back
            try:
                decoded = stream.codec_context.decode(packet)
            except av.FFmpegError:
                num_damaged += 1
                continue
            for frame in decoded:
                if count in keep:
                    frames[count] = frame
                count += 1
    return frames, count, num_damaged


def pick_frames(path: Path, num_frames: int) -> tuple[list[av.VideoFrame], int]:
    """The frames to save, (num_frames,), not yet RGB, and the number of damaged packets.

    Which ones they are is known only when the last one has been decoded. So their number is
    guessed, the frames for every number near the guess are kept, and only a guess that was far
    off costs a second decoding. The result is the same either way.
    """
    guess = count_packets(path)
    near = range(guess - GUESS_SLACK, guess + GUESS_SLACK + 1)
    keep = {i for count in near for i in frame_indices(count, num_frames)}
    frames, count, num_damaged = decode(path, keep)
    if count == 0:
        raise ValueError("no frame can be decoded")
    wanted = frame_indices(count, num_frames)
    if not keep.issuperset(wanted):
        frames, _, _ = decode(path, set(wanted))
    return [frames[i] for i in wanted], num_damaged


def to_jpeg(frame: av.VideoFrame) -> bytes:
    # frame.to_image() gives the same image, but copies it row by row in Python.
    rgb = frame.reformat(format="rgb24", threads=1)
    plane, size = rgb.planes[0], (rgb.width, rgb.height)
    image = Image.frombuffer("RGB", size, bytes(plane), "raw", "RGB", plane.line_size, 1)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def write_file(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: what has its final name is complete."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def convert_video(video: Video, images_dir: Path, num_frames: int) -> Outcome:
    """Write the frames of one video. Does not raise: the other videos go on."""
    paths = [images_dir / name for name in video.image_names(num_frames)]
    try:
        frames, num_damaged = pick_frames(video.path, num_frames)
        jpegs = [to_jpeg(frame) for frame in frames]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, jpeg in zip(paths, jpegs, strict=True):
            write_file(path, jpeg)
        return Outcome(num_damaged)
    except Exception as error:
        return Outcome(error=getattr(error, "strerror", None) or str(error) or repr(error))


# ---- All videos ----


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent ends, even if it was killed."""

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow_parent, daemon=True).start()


def convert_in_processes(
    convert: Callable[[Video], Outcome], videos: list[Video], num_workers: int
) -> Iterator[tuple[Video, Outcome]]:
    """Yield the videos with their outcomes as they get done, in any order."""
    lost = dict.fromkeys(videos)
    spawn = multiprocessing.get_context("spawn")  # the same on every platform
    pool = ProcessPoolExecutor(min(num_workers, len(videos)), spawn, start_worker)
    try:
        futures = {}
        with suppress(BrokenProcessPool):
            for video in videos:
                futures[pool.submit(convert, video)] = video
        for future in as_completed(futures):
            with suppress(BrokenProcessPool):
                outcome = future.result()
                del lost[futures[future]]
                yield futures[future], outcome
    finally:
        pool.shutdown(cancel_futures=True)

    # A worker that dies (a crash in a decoder, no memory) takes the whole pool with it. Videos
    # start in order, so it is one of the first of the lost: those get a process each.
    if len(videos) == 1:
        yield from ((video, Outcome(error="its worker process died")) for video in lost)
    else:
        suspects, rest = list(lost)[: 2 * num_workers], list(lost)[2 * num_workers :]
        for batch in filter(None, [*([video] for video in suspects), rest]):
            yield from convert_in_processes(convert, batch, num_workers)


def convert_all(videos: list[Video], args: argparse.Namespace) -> dict[Video, Outcome]:
    """Convert the videos; the outcomes have their order. A failed one keeps no files."""
    convert = partial(convert_video, images_dir=args.out_dir / "images", num_frames=args.num_frames)
    if args.num_workers == 1:
        done = ((video, convert(video)) for video in videos)
    else:
        done = convert_in_processes(convert, videos, args.num_workers)
    outcomes = dict(tqdm(done, total=len(videos), unit="video", disable=args.no_tqdm))
    for video, outcome in outcomes.items():
        if outcome.error:  # here, because a worker that dies cannot clear up
            for name in video.image_names(args.num_frames):
                with suppress(OSError):
                    (args.out_dir / "images" / name).unlink()
    return {video: outcomes[video] for video in videos}


def jsonl_path(out_dir: Path, split: str) -> Path:
    return out_dir / f"ucf101_{split}.jsonl"


def write_jsonl(outcomes: dict[Video, Outcome], args: argparse.Namespace) -> None:
    """One record for each converted video; no file for a split without any."""
    classes = ", ".join(sorted({video.label for video in outcomes}))
    user = f"Classify the video into one of the following classes: {classes}."
    lines: dict[str, list[str]] = {}
    for video, outcome in outcomes.items():
        if outcome.error is None:
            images = video.image_names(args.num_frames)
            turn = {"images": images, "user": user, "assistant": video.label}
            record = {"id": video.id, "source": "ucf101", "conversations": [turn]}
            lines.setdefault(video.split, []).append(json.dumps(record) + "\n")
    for split, records in lines.items():
        write_file(jsonl_path(args.out_dir, split), "".join(records).encode())


def print_summary(outcomes: dict[Video, Outcome], args: argparse.Namespace) -> None:
    for video, (num_damaged, error) in outcomes.items():
        if error is not None:
            print(f"failed: {video.name}: {error}", file=sys.stderr)
        elif num_damaged > 0:
            print(f"warning: {video.name}: {num_damaged} damaged packets skipped", file=sys.stderr)
    for split in SPLITS:
        errors = [outcome.error for video, outcome in outcomes.items() if video.split == split]
        done = errors.count(None)
        counts = f"{done} videos, {done * args.num_frames} frames, {len(errors) - done} failed"
        print(f"{split}: {counts} -> {jsonl_path(args.out_dir, split) if done else 'no jsonl'}")
    out_dir = shlex.quote(str(args.out_dir))
    print("Next: torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir", out_dir)


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    add(
        "--out_dir",
        type=Path,
        default="./ucf101",
        help="gets images/ and jsonl (default: %(default)s)",
    )
    add("--tmp_dir", type=Path, default="/tmp/ucf101", help="extract here (default: %(default)s)")
    source.add_argument(
        "--archive", type=Path, help=f"tar on disk in place of the hub's {HUB_FILE}"
    )
    source.add_argument("--video_dir", type=Path, help=f"folder with {LAYOUT}")
    add("--num_frames", type=positive_int, default=8, help="frames a video (default: %(default)s)")
    add(
        "--num_workers",
        type=positive_int,
        default=os.cpu_count(),
        help="default: all CPUs",
    )
    add("--no-tqdm", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        with video_root(args) as root:
            videos = list_videos(root)
            check_videos(videos, root)
            args.out_dir.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:  # from here to the end out_dir is not a dataset
                jsonl_path(args.out_dir, split).unlink(missing_ok=True)
            outcomes = convert_all(videos, args)
            write_jsonl(outcomes, args)
    except (SourceError, OSError) as error:
        print(f"convert_ucf101.py: error: {error}", file=sys.stderr)
        return 2
    print_summary(outcomes, args)
    return int(any(outcome.error for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
