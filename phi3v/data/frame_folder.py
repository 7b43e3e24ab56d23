"""Videos -> a folder of frames, by several processes, with a manifest of what is done."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from filelock import FileLock, Timeout

from phi3v.data.sampling import Sampling
from phi3v.data.video import MADE_BY, read_frames, reason, to_jpeg
from phi3v.errors import RunError

# The first line of a manifest. Another number tells that its lines mean something else.
HEADER = json.dumps({"manifest_of": "phi3v.data.frame_folder", "version": 1}) + "\n"


class Video(NamedTuple):
    id: str  # "val-0000000300"
    split: str
    name: str  # of its images, without the ".0.jpg": "val/BabyCrawling/v_BabyCrawling_g21_c04"
    label: str  # its class
    path: Path

    def images(self, count: int) -> list[str]:
        """Paths of its first frames, relative to images/."""
        return [f"{self.name}.{i}.jpg" for i in range(count)]


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


def convert_video(video: Video, old: dict, folder: Path, sampling: Sampling, max_gb: int) -> dict:
    """
    Write the frames of one video that `sampling` chooses, unless they are all there already.

    Returns its line of the manifest, or {"error": why there is none}. `old` is its line until now.

    Raises:
        RunError: an image cannot be written. All other errors cost this video only.
    """
    try:
        if any("\ud800" <= letter <= "\udfff" for letter in video.name):
            raise ValueError("its name is not UTF-8, as jsonl is: rename it")
        if len(f"{video.path.stem}.999.jpg.part".encode()) > 255:
            raise ValueError("its name is too long for those of its images")
        if not video.path.is_file():  # a pipe may have no end
            raise ValueError("not a regular file")
        if video.path.stat().st_size > max_gb << 30:
            raise ValueError(f"larger than --max_video_gb {max_gb}")
        names = old.get("files", {})
        found = {n: file_digest(folder / n) for n in names if (folder / n).is_file()}
        # Before the decoding: a video that changes meanwhile is not taken for done next time.
        line = {"name": video.name, "video": file_digest(video.path), "made_by": MADE_BY}
        line["frames"] = str(sampling)
        if line.items() <= old.items() and found == old["files"]:
            return old
        frames, warning = read_frames(video.path, sampling)
        images = [to_jpeg(frame) for frame in frames]
    except Exception as error:  # a decoder may raise anything
        return {"error": reason(error)}
    files = {}
    for name, image in zip(video.images(len(images)), images, strict=True):
        write_file(folder / "images" / name, image)
        files[f"images/{name}"] = hashlib.sha256(image).hexdigest()
    return {**line, "warning": warning, "files": files}


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
        self, videos: list[Video], sampling: Sampling, num_workers: int, max_gb: int
    ) -> Iterator[tuple[Video, dict]]:
        """
        Write the frames of all videos; yields each, in order, with what `convert_video` returns.

        Raises:
            RunError: an image cannot be written.
        """
        done = {line["name"]: line for line in self.old}
        old = [done.get(video.name, {}) for video in videos]
        work = partial(convert_video, folder=self.folder, sampling=sampling, max_gb=max_gb)
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
