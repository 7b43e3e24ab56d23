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
         the prompt are those of all splits together. Hidden folders are none.
Ids      <split>-<number>. The number is the video's place among all videos, sorted by split
         (train, val, test), class, name. It runs on: after 300 training videos val starts at 300.
Frames   floor(i * n / 8), i = 0..7, of the n frames that really decode; RGB JPEG of quality 95
         in the video's own size, as stored (a rotation flag is not applied). Damaged parts are
         skipped, as ffmpeg does, with a warning. The bytes are the same on every run.
Listed   failed:  nothing of the video decodes. It leaves no files and no record. Its number
                  stays unused, so that the other ids do not depend on it. Tried again next time.
         warning: converted, but damaged, cut off, or with too few frames, which then repeat.
         ignored: a file below a split that is no video of a class, for example by its suffix.
                  Hidden files are not listed.
         --strict stops at the first file that would be listed, and writes no jsonl.
Limits   Videos are avi, flv, mkv, mov, mp4, mpeg, webm and wmv files of up to --max_video_gb, with
         frames of up to 8K. ffmpeg is given the open file and can open no other: playlists and
         other lists of files fail. --max_video_gb is also the limit of a file in an archive.
Output   An out_dir of this script has a file .convert_ucf101 from the first moment on, and at the
         end the checksums of the jsonl in .convert_ucf101.sha256. A folder that has images
         without the one, or a jsonl that is not in the other, is refused: it is someone's work.
Resume   The same command continues after a kill, Ctrl-C or a full disk. Each JPEG has a comment
         with the checksums of the video and of its own data and with the settings. A video whose
         frames are all there and fit is not decoded again; what does not fit is replaced. At the
         end, images of earlier runs that are not in this dataset are removed, no other files are.
         Files get their names when they are complete. After a power cut, run it again: torn
         images are found by their checksum. A killed run leaves its extracted archive in
         --tmp_dir until the same command runs again.
Jsonl    Removed before the first image changes and written when all is done: where there is a
         jsonl, all its images are there.

Exit code: 0 all videos converted, 1 some failed or --strict stopped, 2 wrong arguments, source or
output folder, or a full disk, 130 stopped by Ctrl-C (SIGINT), 143 stopped by SIGTERM.
"""

import os
import signal

if __name__ == "__main__":  # the imports take a while; stop() answers later
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

import argparse
import fcntl
import hashlib
import io
import json
import multiprocessing
import re
import shlex
import shutil
import stat
import string
import sys
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import PIL
from PIL import Image
from tqdm import tqdm

HUB_REPO, HUB_FILE = "sayakpaul/ucf101-subset", "UCF101_subset.tar.gz"
SPLITS = ("train", "val", "test")
SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
LAYOUT = f"{{train,val,test}}/<class>/<video> with a video in {' '.join(SUFFIXES)}"
JPEG_QUALITY = 95
# ffmpeg would follow the file names in playlists (concat, HLS, DASH) and open them.
CONTAINERS = "asf,avi,flv,m4v,matroska,mov,mpeg,mpegts,mpegvideo"
ONE_FILE = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
MAX_PIXELS = 1 << 25  # of a frame, which is 8K: dozens of them are held in memory
# More than the model's context of 131,072 tokens holds, which is some 400 images.
MAX_FRAMES = 1000
MAX_WORKERS = 256
# What the recipe refuses as a control token (phi3v/data/conversations.py), what would divide the
# list of classes in the prompt, and what is no text.
NOT_IN_CLASSES = re.compile(r"<\||\|>|<s>|<unk>|[,\x00-\x1f\x7f\ud800-\udfff]")
SIGNALS = {signal.SIGINT, signal.SIGTERM}
# How far the number of packets may be from that of frames before a video is decoded twice.
GUESS_SLACK = 2
# Images that something else made are not taken for those of this run. Raise the number when the
# same video gives other frames than before.
MADE_BY = f"convert_ucf101 1, PyAV {av.__version__}, Pillow {PIL.__version__}"
JFIF_END = 20  # where the comment goes: right behind the JFIF header that Pillow writes
PART = ".convert_ucf101.{}.part"  # a file that is being written
# What is in out_dir belongs to this script, and so do the jsonl with these checksums.
OWNED, SUMS = ".convert_ucf101", ".convert_ucf101.sha256"
# To fork a worker saves the start of Python and the imports; on macOS it is not safe.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
# How often a video whose worker died is tried in a process of its own.
TRIES_ALONE = 2
NO_SPACE = "there is not enough space, see --tmp_dir"
MAX_PADDING = 16 << 20  # zeros behind the end of a tar
SHOWN = 10  # ignored files that are named


class ConvertError(Exception):
    """The run cannot go on. The message says why and what to do."""


class StrictError(Exception):
    """There is a bad file, and --strict. The message is its line of the summary."""


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
    error: str = ""  # why there is nothing of this video
    warning: str = ""  # what is wrong with it otherwise
    kept: bool = False  # an earlier run had completed it

    def line(self, video: Video) -> str:
        """The line of the summary, empty if all is well."""
        kind = "failed" if self.error else "warning" if self.warning else ""
        return kind and f"{kind}: {printable(video.name)}: {self.error or self.warning}"


def printable(name: str) -> str:
    """A name that stays on one line."""
    return name if name.isprintable() else ascii(name)


# ---- To stop at any moment ----

CLEANUP = ExitStack()  # what is undone at the end, also when a signal is the end
LOCKED: list[int] = []  # the open folders that this process holds


@contextmanager
def signals_blocked() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block. Processes started in it inherit that."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def stderr_closed() -> Iterator[None]:
    """Processes started in the block are silent: one whose parent is killed prints a traceback."""
    kept = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def stop(number: int, _frame: object) -> None:
    """Signal handler: no workers and no temporary files stay; one line."""
    # Not an exception: it could strike in any library's code, which would print or lose it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join(5)
        CLEANUP.close()
    finally:
        newline = "\n" if os.isatty(2) else ""  # the progress bar may be on this line
        name = signal.Signals(number).name
        text = f"{newline}convert_ucf101.py: stopped by {name}; the same command continues\n"
        os.write(2, text.encode())
        os._exit(128 + number)


def unlock(file: int) -> None:
    LOCKED.remove(file)
    os.close(file)


def lock(folder: Path, out_dir: Path) -> None:
    """Keep other converters out of a folder until CLEANUP or the process ends, in whatever way."""
    file = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)  # what the lock covers may be emptied
    LOCKED.append(file)
    CLEANUP.callback(unlock, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConvertError(f"another convert_ucf101.py is writing to {out_dir}") from error
    except OSError:
        pass  # this file system has no locks


# ---- The source: an archive or a folder -> a list of videos ----


def download_archive() -> Path:
    # Imported here: it is slow, and neither the workers nor the other sources need it.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id=HUB_REPO, filename=HUB_FILE, repo_type="dataset"))
    except Exception as error:  # offline, proxy, full disk, ...: the ways out are the same
        raise ConvertError(
            f"cannot download {HUB_FILE} of the hub dataset {HUB_REPO}: {error}\n"
            "Give the file with --archive FILE, or a folder of videos with --video_dir DIR."
        ) from error


def checked_members(tar: tarfile.TarFile, folder: Path, max_gb: int) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, one by one. The filter would only strip the root of a name."""
    room = shutil.disk_usage(folder).free
    for member in tar:
        room -= member.size
        if member.name.startswith(("/", os.sep)):
            raise tarfile.AbsolutePathError(member)
        if member.size > max_gb << 30:
            raise tarfile.ExtractError(f"{member.name!r} is larger than --max_video_gb {max_gb}")
        if room < 0:
            raise tarfile.ExtractError(NO_SPACE)
        yield member


def extract_archive(archive: Path, folder: Path, max_gb: int) -> None:
    """Extract a tar into an empty folder. Nothing gets out of it; what fails leaves a part."""
    try:
        # Of zeros alone, lzma reads a terabyte, and needs hours.
        with archive.open("rb") as file:
            if not file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("it is empty")
        if archive.stat().st_size > shutil.disk_usage(folder).free:
            raise tarfile.ExtractError(NO_SPACE)
        with tarfile.open(archive, "r:*") as tar:
            # Read once: to check all members first would decompress the archive twice.
            tar.extractall(folder, checked_members(tar, folder, max_gb), filter="data")
            # tarfile takes a damaged header for the end, and leaves the checksum behind it unread.
            rest = tar.fileobj.read(MAX_PADDING)
            if rest.strip(b"\0") or len(rest) == MAX_PADDING:
                raise tarfile.ReadError("there is data behind its end")
    except tarfile.FilterError as error:
        raise ConvertError(f"{archive} is refused: {error}") from error
    except Exception as error:  # tarfile lets all kinds through, of the decompressors and its own
        why = getattr(error, "strerror", None) or str(error) or repr(error)
        raise ConvertError(f"{archive} cannot be extracted to {folder.parent}: {why}") from error


def make_temporary_folder(tmp_dir: Path, out_dir: Path) -> Path:
    """An empty folder, removed by CLEANUP. A killed run leaves it, and the next one finds it."""
    key = hashlib.sha256(os.fsencode(os.path.realpath(out_dir))).hexdigest()[:16]
    folder = tmp_dir.absolute() / f"convert_ucf101.{key}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder, out_dir)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    CLEANUP.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def video_root(args: argparse.Namespace) -> Path:
    """The folder that holds the splits."""
    if args.video_dir:
        return args.video_dir
    archive = args.archive or download_archive()
    if archive.exists() and not archive.is_file():  # a pipe or a device may have no end
        raise ConvertError(f"--archive {archive} is not a regular file")
    # Empty: nothing that another run left may become part of this dataset.
    folder = make_temporary_folder(args.tmp_dir, args.out_dir)
    extract_archive(archive, folder, args.max_video_gb)
    # The archive may have folders of its own above the splits.
    folders = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    names = [root.relative_to(folder) for root in (folder, *folders) if list_videos(root)]
    names = [name for name in names if not any(map(is_hidden, name.parts))]
    if len(names) > 1:
        first, second, *_ = sorted(names)
        raise ConvertError(
            f"{archive} has two datasets, {first} and {second}: give one of them as --video_dir"
        )
    return folder / names[0] if names else folder


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def list_videos(root: Path) -> list[Video]:
    """All videos below root, in the order of the ids. What is none in spite of its name fails."""
    videos: list[Video] = []
    for split in SPLITS:
        folders = (root / split).glob("*")
        folders = [path for path in folders if path.is_dir() and not is_hidden(path.name)]
        for folder in sorted(folders, key=lambda path: path.name):
            for path in sorted(folder.iterdir(), key=lambda path: (path.stem, path.suffix)):
                if path.suffix.lower() in SUFFIXES and not is_hidden(path.name):
                    id = f"{split}-{len(videos):010d}"
                    videos.append(Video(id, split, folder.name, path))
    return videos


def list_ignored(root: Path, videos: list[Video]) -> list[str]:
    """A line of the summary for each file below the splits that is not one of the videos."""
    known, lines = {video.path for video in videos}, []
    for path in sorted(path for split in SPLITS for path in (root / split).rglob("*")):
        name = path.relative_to(root)
        hidden = any(map(is_hidden, name.parts))
        if not (path in known or hidden or path.is_dir()):
            misplaced = path.suffix.lower() in SUFFIXES
            why = f"not in {name.parts[0]}/<class>/" if misplaced else "not a video suffix"
            lines.append(f"ignored: {printable(str(name))}: {why}")
    return lines


def check_videos(videos: list[Video], root: Path) -> None:
    """Stop before the work starts if the videos cannot become a dataset."""
    if not videos:
        found = sorted(str(p.relative_to(root)) for g in ("*", "*/*") for p in root.glob(g))
        shown = ", ".join(found[:12] + ["..."] * (len(found) > 12)) or "nothing"
        shown = shown if root.is_dir() else "no such folder"
        raise ConvertError(f"no videos in {root}\nExpected: {LAYOUT}\nFound: {shown}")
    check_classes(sorted({video.label for video in videos}))
    owners: dict[str, Video] = {}
    for video in videos:
        other = owners.setdefault(video.image_names(1)[0], video)
        if other is not video:
            raise ConvertError(
                f"{other.name} and {video.name} would write the same images: rename one of them"
            )


def check_classes(labels: list[str]) -> None:
    """Stop if a name of a class is one that the recipe refuses or cannot tell from another."""
    same: dict[str, str] = {}
    for label in labels:
        what = f"the class folder {label!r}: rename it: its name"
        if found := NOT_IN_CLASSES.search(label):
            raise ConvertError(f"{what} holds {found[0]!r}")
        if label != label.strip():
            raise ConvertError(f"{what} has white space around it")
        # Answers are compared like this (phi3v/training/metrics.py).
        other = same.setdefault(label.strip(string.whitespace + ".").lower(), label)
        if other != label:
            raise ConvertError(f"{what} differs from {other!r} only in case or full stops")


# ---- One video -> its frames ----


def frame_indices(count: int, num_frames: int) -> list[int]:
    """The frames to take of a video of `count` frames, (num_frames,); a short one repeats."""
    return [i * count // num_frames for i in range(num_frames)]


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    with ExitStack() as stack:
        # An open file, not a name: ffmpeg itself then opens nothing. As fast, as measured.
        file = stack.enter_context(path.open("rb"))
        try:
            container = av.open(file, options=ONE_FILE, metadata_errors="replace")
        except av.ArgumentError as error:
            raise ValueError(f"its format is none of {CONTAINERS}") from error
        stream = stack.enter_context(container).streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("no video stream that can be decoded")
        if stream.width * stream.height > MAX_PIXELS:
            raise ValueError(f"its frames of {stream.width} x {stream.height} are larger than 8K")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # where the size changes
        # The workers share the cores; threads inside one decoder do not pay.
        stream.codec_context.thread_count = 1
        yield container, stream


def guess_count(path: Path, stream: av.VideoStream) -> int:
    """Number of packets, nearly always that of the frames."""
    if stream.frames and stream.frames == len(stream.index_entries):
        return stream.frames  # a whole avi, mov or mp4: the header agrees with the index
    with open_video(path) as (container, stream):  # 5 % of the cost of decoding
        return sum(packet.size > 0 for packet in container.demux(stream))


def decode(
    container: av.container.InputContainer, stream: av.VideoStream, keep: set[int]
) -> tuple[dict[int, av.VideoFrame], int, list[str]]:
    """Decode a video to its end. A damaged packet is skipped.

    Returns the frames whose index is in `keep`, the number of all frames, and what was wrong.
    """
    frames: dict[int, av.VideoFrame] = {}
    count = num_packets = num_damaged = 0
    promised = stream.frames
    if not promised and container.duration and stream.average_rate:
        promised = round(container.duration / av.time_base * stream.average_rate)
    for packet in chain(container.demux(stream), [None]):  # None: give out what is held back
        num_packets += 1
        # An empty packet ends the decoding, so one in mid-file must not reach the decoder.
        if packet is not None and packet.size == 0:
            continue
        try:
            decoded = stream.codec_context.decode(packet)
        except av.FFmpegError:
            num_damaged += 1
            continue
        for frame in decoded:
            if count in keep:
                frames[count] = frame
            count += 1
    warnings = [f"{num_damaged} damaged packets skipped"] if num_damaged else []
    if num_packets < 0.9 * promised - GUESS_SLACK:  # what it promises is not always exact
        warnings.append(f"cut off: about {promised} frames promised, {count} found")
    return frames, count, warnings


def pick_frames(path: Path, num_frames: int) -> tuple[list[av.VideoFrame], str]:
    """The frames to save, (num_frames,), not yet RGB, and what is wrong with the video, or "".

    Which ones they are is known only when the last one has been decoded. So their number is
    guessed, the frames for every number near the guess are kept, and only a guess that was far
    off costs a second decoding. The result is the same either way.
    """
    with open_video(path) as (container, stream):
        guess = guess_count(path, stream)
        near = range(guess - GUESS_SLACK, guess + GUESS_SLACK + 1)
        keep = {i for count in near for i in frame_indices(count, num_frames)}
        frames, count, warnings = decode(container, stream, keep)
    if count == 0:
        raise ValueError("no frame can be decoded")
    if count < num_frames:
        warnings.append(f"frames repeat: it has {count}, fewer than {num_frames}")
    wanted = frame_indices(count, num_frames)
    if not keep.issuperset(wanted):
        with open_video(path) as (container, stream):
            frames, _, _ = decode(container, stream, set(wanted))
    return [frames[i] for i in wanted], "; ".join(warnings)


def to_jpeg(frame: av.VideoFrame) -> bytes:
    # frame.to_image() gives the same image, but copies it row by row in Python.
    rgb = frame.reformat(format="rgb24", threads=1)
    plane, size = rgb.planes[0], (rgb.width, rgb.height)
    image = Image.frombuffer("RGB", size, plane, "raw", "RGB", plane.line_size, 1)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def checksum(path: Path, max_gb: int) -> str:
    """SHA-256 of a video. Raises ValueError if it is empty, too large or, as a pipe, has no end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size == 0:
        raise ValueError("the file is empty")
    if status.st_size > max_gb << 30:
        raise ValueError(f"larger than --max_video_gb {max_gb}: {status.st_size >> 30} GB")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_stamp(jpeg: bytes, stamp: dict) -> bytes:
    """Put the stamp and a checksum of the image into a JPEG, as its comment."""
    text = json.dumps(stamp | {"crc32": zlib.crc32(jpeg)}).encode()
    comment = b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text
    return jpeg[:JFIF_END] + comment + jpeg[JFIF_END:]


def read_stamp(path: Path) -> dict | None:
    """The stamp of an image that this script wrote and nothing has changed since, else None."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    start = JFIF_END + 4
    end = start - 2 + int.from_bytes(data[start - 2 : start], "big")
    with suppress(ValueError):
        stamp = json.loads(data[start:end])
        if isinstance(stamp, dict) and "made_by" in stamp:
            crc32 = zlib.crc32(data[:JFIF_END] + data[end:])
            return stamp if stamp.pop("crc32", None) == crc32 else None
    return None


def write_files(files: dict[Path, bytes]) -> None:
    """Write all under temporary names, then rename: what has its final name is complete.

    Raises ConvertError.
    """
    names = (PART.format(f"{os.getpid()}.{i}") for i in range(len(files)))
    parts = {path: path.with_name(name) for path, name in zip(files, names, strict=True)}
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(files[path])
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        why = f"cannot write {path}: {error.strerror}"
        raise ConvertError(f"{why}\nWhen that is solved, the same command continues.") from error
    finally:
        for part in parts.values():
            with suppress(OSError):
                part.unlink()


def convert_video(video: Video, images_dir: Path, num_frames: int, max_gb: int) -> Outcome:
    """Write the frames of one video, unless they are all there already.

    What is wrong with the video is in the outcome: the others go on. Raises ConvertError or
    OSError if the output cannot be written.
    """
    paths = [images_dir / name for name in video.image_names(num_frames)]
    try:
        if any("\ud800" <= letter <= "\udfff" for letter in video.name):
            return Outcome("its name is not UTF-8, as jsonl is: rename it")
        # Before the decoding: a video that changes meanwhile is not taken for done next time.
        origin = {"made_by": MADE_BY, "video": checksum(video.path, max_gb)}
        origin["num_frames"] = num_frames
        found = [read_stamp(path) for path in paths]
        warning = (found[0] or {}).get("warning")
        if warning is not None and found == [origin | {"warning": warning}] * num_frames:
            return Outcome(warning=warning, kept=True)
        frames, warning = pick_frames(video.path, num_frames)
        stamp = origin | {"warning": warning}
        images = [add_stamp(to_jpeg(frame), stamp) for frame in frames]
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        other = getattr(error, "filename", None) not in (None, str(video.path))
        return Outcome(f"{reason}: {error.filename}" if other else reason)
    remove_jsonl(images_dir.parent)
    write_files(dict(zip(paths, images, strict=True)))
    return Outcome(warning=warning)


# ---- All videos ----


def keep_freed_memory() -> None:
    """Let the memory of one image serve the next, for 10 % of the time of a conversion."""
    # glibc hands a freed block back to the system, to get it anew page by page, unless it has seen
    # the process free a block as large as this one. It is mapped, but never touched.
    bytes(16 << 20)


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent ends, even if it was killed."""

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    keep_freed_memory()
    # A forked process has the parent's open locks, which would outlive it, and its stop().
    for file in LOCKED:
        os.close(file)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The parent started this process with both signals blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=follow_parent, daemon=True).start()


def convert_in_processes(
    convert: Callable[[Video], Outcome], videos: list[Video], num_workers: int
) -> Iterator[tuple[Video, Outcome]]:
    """Yield the videos with their outcomes, in their order as long as no worker dies."""
    context = multiprocessing.get_context(START_METHOD)
    # When this process is killed, the helper of "spawn" clears up and would warn of it.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    batches, deaths = [videos], Counter()
    while batches:
        batch = batches.pop(0)
        lost = dict.fromkeys(batch)
        pool = ProcessPoolExecutor(min(num_workers, len(batch)), context, start_worker)
        try:
            futures = {}
            with suppress(BrokenProcessPool), signals_blocked(), stderr_closed():
                for video in batch:
                    futures[video] = pool.submit(convert, video)
            for video, future in futures.items():
                with suppress(BrokenProcessPool):
                    outcome = future.result()
                    del lost[video]
                    yield video, outcome
        finally:
            pool.shutdown(cancel_futures=True)

        # A worker that dies (a crash in a decoder, no memory) takes the whole pool with it. Videos
        # start in order, so it is one of the first of the lost: those get a process each.
        suspects, rest = list(lost)[: 2 * num_workers], list(lost)[2 * num_workers :]
        if len(batch) == 1:
            deaths.update(suspects)
        for video in (video for video in suspects if deaths[video] == TRIES_ALONE):
            yield video, Outcome("its worker process died")
        again = [[video] for video in suspects if deaths[video] < TRIES_ALONE]
        batches = [*again, *filter(None, [rest]), *batches]


def convert_all(videos: list[Video], args: argparse.Namespace) -> dict[Video, Outcome]:
    """Convert the videos; the outcomes have their order. Raises StrictError."""
    convert = partial(
        convert_video,
        images_dir=args.out_dir / "images",
        num_frames=args.num_frames,
        max_gb=args.max_video_gb,
    )
    if args.num_workers == 1:
        keep_freed_memory()
        done = ((video, convert(video)) for video in videos)
    else:
        done = convert_in_processes(convert, videos, args.num_workers)
    outcomes = {}
    tqdm.monitor_interval = 0  # no thread of tqdm's: a process that has threads should not fork
    bar = tqdm(done, total=len(videos), unit="video", disable=args.no_tqdm)
    with closing(done), closing(bar):
        for video, outcome in bar:
            outcomes[video] = outcome
            if args.strict and outcome.line(video):
                raise StrictError(outcome.line(video))
    return {video: outcomes[video] for video in videos}


# ---- The output folder ----


def remove_parts(out_dir: Path) -> None:
    """Remove what killed processes were writing."""
    for pattern in ("", "images/*/*/"):
        for part in out_dir.glob(pattern + PART.format("*")):
            with suppress(OSError):
                part.unlink()


def sums_line(path: Path, data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}  {path.name}\n"


def check_out_dir(args: argparse.Namespace) -> None:
    """Stop if the output would replace files that no run of this script wrote."""
    folder = Path(os.path.realpath(args.out_dir))
    if args.video_dir and any(
        folder.is_relative_to(os.path.realpath(args.video_dir / split)) for split in SPLITS
    ):
        raise ConvertError(f"--out_dir {args.out_dir} is among the videos of --video_dir")
    owned, sums = args.out_dir / OWNED, args.out_dir / SUMS
    others = [] if owned.is_file() else [args.out_dir / "images"]
    known = sums.read_text(errors="replace") if sums.is_file() else ""
    for path in (jsonl_path(args.out_dir, split) for split in SPLITS):
        if not path.is_file() or sums_line(path, path.read_bytes()) not in known:
            others.append(path)
    for path in filter(os.path.lexists, others):
        raise ConvertError(
            f"{path} is not as this script wrote it, and would be replaced: "
            "choose another --out_dir, or move it away"
        )


def take_out_dir(out_dir: Path) -> None:
    """Make the output folder, keep other converters out of it, and clear up after a killed run."""
    out_dir.mkdir(parents=True, exist_ok=True)
    lock(Path(os.path.realpath(out_dir)), out_dir)
    remove_parts(out_dir)
    CLEANUP.callback(remove_parts, out_dir)
    if not (out_dir / OWNED).exists():
        write_files({out_dir / OWNED: b"convert_ucf101.py may replace and remove what is here.\n"})


def remove_stale_images(outcomes: dict[Video, Outcome], args: argparse.Namespace) -> int:
    """Remove images that this script wrote and that are not in the dataset. Returns their number.

    They are of videos that fail now or are gone, or of a larger --num_frames.
    """
    images_dir, names = args.out_dir / "images", set()
    for video, outcome in outcomes.items():
        names.update(() if outcome.error else video.image_names(args.num_frames))
    others = {path for split in SPLITS for path in images_dir.glob(f"{split}/*/*.jpg")}
    others -= {images_dir / name for name in names}
    stale = [path for path in others if path.is_file() and read_stamp(path)]
    if stale:
        remove_jsonl(args.out_dir)
    for path in stale:
        path.unlink()
        with suppress(OSError):  # other files are in it
            path.parent.rmdir()
    return len(stale)


def jsonl_path(out_dir: Path, split: str) -> Path:
    return out_dir / f"ucf101_{split}.jsonl"


def remove_jsonl(out_dir: Path) -> None:
    for split in SPLITS:
        jsonl_path(out_dir, split).unlink(missing_ok=True)


def write_jsonl(outcomes: dict[Video, Outcome], args: argparse.Namespace) -> None:
    """One record for each converted video; no file for a split without any."""
    classes = ", ".join(sorted({video.label for video in outcomes}))
    user = f"Classify the video into one of the following classes: {classes}."
    lines: dict[str, list[str]] = {}
    for video, outcome in outcomes.items():
        if not outcome.error:
            images = video.image_names(args.num_frames)
            turn = {"images": images, "user": user, "assistant": video.label}
            record = {"id": video.id, "source": "ucf101", "conversations": [turn]}
            lines.setdefault(video.split, []).append(json.dumps(record) + "\n")
    files = {jsonl_path(args.out_dir, split): "".join(lines[split]).encode() for split in lines}
    paths = [jsonl_path(args.out_dir, split) for split in SPLITS]
    if files != {path: path.read_bytes() for path in paths if path.is_file()}:
        remove_jsonl(args.out_dir)
        sums = "".join(sums_line(path, data) for path, data in files.items())
        write_files({args.out_dir / SUMS: sums.encode()})  # first: a kill may come between
        write_files(files)


def print_summary(
    outcomes: dict[Video, Outcome], ignored: list[str], num_stale: int, args: argparse.Namespace
) -> None:
    lines = [outcome.line(video) for video, outcome in outcomes.items()]
    more = [f"ignored: {len(ignored) - SHOWN} more files"] if len(ignored) > SHOWN else []
    for line in filter(None, [*lines, *ignored[:SHOWN], *more]):
        print(line, file=sys.stderr)
    for split in SPLITS:
        errors = [outcome.error for video, outcome in outcomes.items() if video.split == split]
        done = errors.count("")
        counts = f"{done} videos, {done * args.num_frames} frames, {len(errors) - done} failed"
        print(f"{split}: {counts} -> {jsonl_path(args.out_dir, split) if done else 'no jsonl'}")
    num_kept = sum(outcome.kept for outcome in outcomes.values())
    if num_kept or num_stale:
        print(f"Of earlier runs: {num_kept} videos kept, {num_stale} images removed")
    out_dir = shlex.quote(str(args.out_dir))
    print("Next: torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir", out_dir)
    print(end="", flush=True)


def number_up_to(limit: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not 1 <= int(text) <= limit:
            raise argparse.ArgumentTypeError(f"{text} is not in 1 to {limit}")
        return int(text)

    return number


def path(text: str) -> Path:
    if not text:  # a variable that is not set: the folder in which one is would be taken
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--out_dir", type=path, default="./ucf101", help="the result (default: %(default)s)")
    add("--tmp_dir", type=path, default="/tmp/ucf101", help="extract here (default: %(default)s)")
    source.add_argument(
        "--archive", type=path, help=f"tar on disk in place of the hub's {HUB_FILE}"
    )
    source.add_argument("--video_dir", type=path, help=f"folder with {LAYOUT}")
    add("--num_frames", type=number_up_to(MAX_FRAMES), default=8, help="a video (default: 8)")
    cpus = min(os.cpu_count(), MAX_WORKERS)
    add("--num_workers", type=number_up_to(MAX_WORKERS), default=cpus, help="default: all CPUs")
    add("--max_video_gb", type=number_up_to(1024), default=1, help="larger ones fail (default: 1)")
    add("--strict", action="store_true", help="stop at the first bad file")
    add("--no-tqdm", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse_args(argv)
    try:
        check_out_dir(args)
        root = video_root(args)
        videos = list_videos(root)
        check_videos(videos, root)
        ignored = list_ignored(root, videos)
        take_out_dir(args.out_dir)
        if args.strict and ignored:
            raise StrictError(ignored[0])
        outcomes = convert_all(videos, args)
        num_stale = remove_stale_images(outcomes, args)
        write_jsonl(outcomes, args)
    except StrictError as error:
        remove_jsonl(args.out_dir)
        print(f"{error}\nStopped by --strict. The same command continues.", file=sys.stderr)
        return 1
    except (ConvertError, OSError) as error:
        file = getattr(error, "filename", None)
        text = f"{file}: {error.strerror}" if file else error
        print(f"convert_ucf101.py: error: {text}", file=sys.stderr)
        return 2
    finally:
        with signals_blocked():
            CLEANUP.close()
    try:
        print_summary(outcomes, ignored, num_stale, args)
    except OSError:  # a closed pipe: nobody reads it, and the dataset is complete
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return int(any(outcome.error for outcome in outcomes.values()))


if __name__ == "__main__":
    for number in SIGNALS:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    sys.exit(main())
