"""Videos -> frames as JPEG files, in several processes, with a manifest of what is done."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Self

import av
import PIL
from filelock import FileLock, Timeout
from PIL import Image

from phi3v.errors import DataError, RunError

JPEG_QUALITY = 95
# ffmpeg would open the files that playlists (concat, HLS, DASH) name, wherever they are. So only
# formats that hold a video whole are read, and no file or address is opened.
CONTAINERS = "asf,avi,flv,m4v,matroska,mov,mpeg,mpegts,mpegvideo"
ONE_FILE = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
MAX_PIXELS = 1 << 25  # of a frame, which is 8K: dozens of them are held in memory
# The first line of a manifest. Another number tells that its lines mean something else.
HEADER = json.dumps({"manifest_of": "phi3v.data.video", "version": 1}) + "\n"
# Images that other versions made may differ in their pixels, and are made anew.
MADE_BY = f"PyAV {av.__version__}, Pillow {PIL.__version__}"


class Video(NamedTuple):
    id: str  # "val-0000000300"
    split: str
    name: str  # of its images, without the ".0.jpg": "val/BabyCrawling/v_BabyCrawling_g21_c04"
    label: str  # its class
    path: Path

    def images(self, num_frames: int) -> list[str]:
        """Paths of its frames, relative to images/."""
        return [f"{self.name}.{i}.jpg" for i in range(num_frames)]


# ---- One video -> its frames ----


def frame_indices(count: int, num_frames: int) -> list[int]:
    """The frames to take of a video of `count` frames, (num_frames,); a short one repeats."""
    return [i * count // num_frames for i in range(num_frames)]


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    with ExitStack() as stack:
        # An open file, not a name: ffmpeg itself then opens nothing.
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


def guess_count(path: Path) -> int:
    """The number of frames as the header or, in mkv and webm, the number of packets has it."""
    with open_video(path) as (container, stream):
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))


def decode(path: Path, keep: set[int]) -> tuple[dict[int, av.VideoFrame], int, list[str]]:
    """
    Decode a video to its end. A damaged packet is skipped.

    Returns the frames whose index is in `keep`, the number of all frames, and what was wrong.
    """
    frames: dict[int, av.VideoFrame] = {}
    count = num_packets = num_damaged = 0
    with open_video(path) as (container, stream):
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
    if num_packets < 0.9 * promised - 2:  # what it promises is not always exact
        warnings.append(f"cut off: about {promised} frames promised, {count} found")
    return frames, count, warnings


def read_frames(path: Path, num_frames: int) -> tuple[list[av.VideoFrame], str]:
    """
    Evenly spaced frames of a video, (num_frames,), and what is wrong with it, or "".

    They are exact: frame floor(i * n / num_frames) of the n that really decode, in the order of
    display. Seeking finds other frames where there are B-frames, and headers lie about n.

    Raises:
        ValueError: no frames that can be decoded. OSError, av.FFmpegError: it cannot be read.
    """
    # Sound videos, too, have a frame or two more or less than they say. So what any number near
    # it needs is kept, and only a video that is further off is decoded a second time.
    guess = guess_count(path)
    near = range(guess - 2, guess + 3)
    keep = {i for count in near for i in frame_indices(count, num_frames)}
    frames, count, warnings = decode(path, keep)
    if count == 0:
        raise ValueError("no frame can be decoded")
    if count < num_frames:
        warnings.append(f"frames repeat: it has {count}, fewer than {num_frames}")
    wanted = frame_indices(count, num_frames)
    if not keep.issuperset(wanted):
        frames, _, _ = decode(path, set(wanted))
    return [frames[i] for i in wanted], "; ".join(warnings)


def to_jpeg(frame: av.VideoFrame) -> bytes:
    rgb = frame.reformat(format="rgb24", threads=1)  # to start threads costs more than they gain
    buffer = BytesIO()
    Image.fromarray(rgb.to_ndarray()).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


# ---- One video -> its files ----


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or repr(error)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """
    Write a file that has its name only when it is whole.

    Raises:
        RunError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")  # left by a killed run, the next one replaces it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        why = f"cannot write {path}: {error.strerror}"
        raise RunError(f"{why}. When that is solved, the same command continues.") from error


def convert_video(video: Video, old: dict, folder: Path, num_frames: int, max_gb: int) -> dict:
    """
    Write the frames of one video, unless they are all there already.

    Returns its line of the manifest, or {"error": why there is none}. `old` is its line until now.

    Raises:
        RunError: an image cannot be written. All other errors cost this video only.
    """
    names = [f"images/{name}" for name in video.images(num_frames)]
    try:
        if any("\ud800" <= letter <= "\udfff" for letter in video.name):
            raise ValueError("its name is not UTF-8, as jsonl is: rename it")
        if not video.path.is_file():  # a pipe may have no end
            raise ValueError("not a regular file")
        if video.path.stat().st_size > max_gb << 30:
            raise ValueError(f"larger than --max_video_gb {max_gb}")
        found = {n: file_digest(folder / n) for n in names if (folder / n).is_file()}
        # Before the decoding: a video that changes meanwhile is not taken for done next time.
        line = {"name": video.name, "video": file_digest(video.path), "made_by": MADE_BY}
        if line.items() <= old.items() and found.keys() == set(names) and found == old["files"]:
            return old
        frames, warning = read_frames(video.path, num_frames)
        images = [to_jpeg(frame) for frame in frames]
    except Exception as error:  # a decoder may raise anything
        return {"error": reason(error)}
    for name, image in zip(names, images, strict=True):
        write_file(folder / name, image)
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    return {**line, "warning": warning, "files": dict(zip(names, digests, strict=True))}


# ---- All videos ----


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent ends, even if it was killed."""

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=follow_parent, daemon=True).start()


def run_pool(work: Callable, num_workers: int, *arguments: list) -> Iterator[dict]:
    # Forked, a worker is there at once; spawned, it imports the script and phi3v again, some
    # 5 seconds. On macOS to fork is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(min(num_workers, len(arguments[0])), context, start_worker)
    try:
        yield from pool.map(work, *arguments)
    except BaseException:  # stopped: the videos at work are not waited for
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_all(
    work: Callable, num_workers: int, videos: list[Video], old: list[dict]
) -> Iterator[dict]:
    """Yield what `work` returns for the videos, in order. A worker that dies costs one video."""
    start = 0
    while start < len(videos):
        lines = run_pool(work, num_workers, videos[start:], old[start:])
        with suppress(BrokenProcessPool), closing(lines):
            for line in lines:
                start += 1
                yield line
        # A worker that dies (a crash in a decoder, no memory) takes the whole pool with it. Videos
        # start in order, so it had one of the next: these get a process each.
        for i in range(start, min(start + 2 * num_workers, len(videos))):
            start += 1
            try:
                yield from run_pool(work, 1, [videos[i]], [old[i]])
            except BrokenProcessPool:
                yield {"error": "its worker process died"}


class FrameFolder:
    """
    An output folder, as a context: other converters are kept out. It holds

        images/<video.name>.<i>.jpg    the frames
        <jsonl>                        the caller's records, there only when all images are
        converted.jsonl                the manifest: what each file is made of, and its SHA-256

    Raises:
        RunError: on entering, if it has files that this module has not written and would replace,
            or if another converter is at work in it.
    """

    def __init__(self, folder: Path, jsonl: Iterable[str]):
        self.folder, self.manifest = folder, folder / "converted.jsonl"
        self.jsonl = [folder / name for name in jsonl]
        self.lock = FileLock(folder / ".converted.lock", timeout=0)
        self.old: list[dict] = []  # the manifest's lines of earlier runs
        self.new: list[dict] = []

    def __enter__(self) -> Self:
        text = self.manifest.read_text(errors="replace") if self.manifest.is_file() else ""
        for path in (self.manifest, self.folder / "images", *self.jsonl):
            ours = text.startswith(HEADER)
            if path in self.jsonl:  # it may be edited since
                ours = ours and path.is_file() and file_digest(path) in text
            if os.path.lexists(path) and not ours:
                why = "is not as this script wrote it, and would be replaced"
                raise RunError(f"{path} {why}: choose another --out_dir, or move it away")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise RunError(f"another converter is writing to {self.folder}") from error
        if not text:
            write_file(self.manifest, HEADER.encode())
        for line in self.manifest.read_text().splitlines()[1:]:
            with suppress(ValueError):  # the run was killed while it wrote the line
                self.old.append(json.loads(line))
        for path in self.jsonl:
            path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def convert(
        self, videos: list[Video], num_frames: int, num_workers: int, max_gb: int
    ) -> Iterator[tuple[Video, dict]]:
        """
        Write the frames of all videos; yields each, in order, with what `convert_video` returns.

        Raises:
            RunError: an image cannot be written.
        """
        done = {line["name"]: line for line in self.old}
        old = [done.get(video.name, {}) for video in videos]
        work = partial(convert_video, folder=self.folder, num_frames=num_frames, max_gb=max_gb)
        lines = run_all(work, num_workers, videos, old)
        with self.manifest.open("a") as file, closing(lines):
            file.write("\n")  # ends a line that a killed run has begun
            for video, line in zip(videos, lines, strict=True):
                if "error" not in line:
                    self.new.append(line)
                    print(json.dumps(line), file=file, flush=True)
                yield video, line

    def finish(self, records: dict[str, list[dict]]) -> None:
        """
        Remove the images of earlier runs that are not of this one; write the manifest and, for
        each name of a jsonl, its records.

        Raises:
            RunError: a file cannot be written.
        """
        old, new = ({n for line in lines for n in line["files"]} for lines in (self.old, self.new))
        for name in old - new:
            (self.folder / name).unlink(missing_ok=True)
        texts = {
            name: "".join(json.dumps(record) + "\n" for record in each).encode()
            for name, each in records.items()
        }
        for name, text in texts.items():
            digest = hashlib.sha256(text).hexdigest()
            self.new.append({"name": name, "files": {name: digest}})
        lines = "".join(json.dumps(line) + "\n" for line in self.new)
        write_file(self.manifest, (HEADER + lines).encode())  # first: a kill may come between
        for name, text in texts.items():
            write_file(self.folder / name, text)


# ---- An archive of videos ----


def extract_archive(archive: Path, folder: Path, max_gb: int) -> None:
    """
    Extract a tar into an empty folder. Nothing gets out of it.

    Raises:
        DataError: the archive is broken, or has members that lead out of the folder.
    """

    def check(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
        if member.name.startswith("/"):  # the filter would only strip it
            raise tarfile.AbsolutePathError(member)
        if member.size > max_gb << 30:
            raise ValueError(f"{member.name!r} is larger than --max_video_gb {max_gb}")
        return tarfile.data_filter(member, path)

    try:
        if archive.exists() and not archive.is_file():  # a pipe or a device may have no end
            raise ValueError("not a regular file")
        with tarfile.open(archive, "r:*") as tar:
            tar.extractall(folder, filter=check)
            # tarfile takes a damaged header for the end: a smaller dataset, without a word.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it is damaged or cut off")
    except Exception as error:  # those of tarfile and of all decompressors
        raise DataError(f"{archive} cannot be extracted to {folder}: {reason(error)}") from error
