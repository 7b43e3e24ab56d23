"""Videos -> a folder of frames, by many processes, with a manifest of what is done."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self, TextIO

from phi3v.data.engine import as_done, in_order
from phi3v.data.manifest import (
    HEADER,
    Shard,
    file_digest,
    find_shards,
    locked,
    read_manifest,
    remove_parts,
    write_file,
)
from phi3v.data.sampling import Sampling
from phi3v.data.video import MADE_BY, read_frames, reason, to_jpeg
from phi3v.errors import RunError

LOCK = ".converted.lock"


class Video(NamedTuple):
    id: str  # "val-0000000300"
    split: str
    name: str  # of its images, without the ".0.jpg": "val/BabyCrawling/v_BabyCrawling_g21_c04"
    label: str  # its class
    path: Path

    def images(self, count: int) -> list[str]:
        """Paths of its first frames, relative to images/."""
        return [f"{self.name}.{i}.jpg" for i in range(count)]


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
        if len(f"{video.path.stem}.999.jpg".encode()) > 255:
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


def is_done(line: dict, sampling: Sampling) -> bool:
    """Whether a line of a shard's manifest tells of these settings, or why its video failed."""
    return "error" in line or line.get("frames") == str(sampling)


# ---- All videos ----


class FrameFolder:
    """
    An output folder, as a context: other converters are kept out. It holds

        images/<video.name>.<i>.jpg    the frames
        <jsonl>                        the caller's records, there only when all images are
        converted.jsonl                the manifest: what each file is made of, and its SHA-256
        converted.<i>-of-<n>.jsonl     what shard i of n has done, and which videos failed, until
                                       the shards are put together

    As a shard's, it lets in other shards, and no one else.

    Raises:
        RunError: on entering, if it has files that this module has not written and would replace,
            if another converter is at work in it, or if it has shards of another count.
    """

    def __init__(self, folder: Path, jsonl: Iterable[str], shard: Shard | None = None):
        self.folder, self.manifest, self.shard = folder, folder / "converted.jsonl", shard
        self.jsonl = [folder / name for name in jsonl]
        self.locks = ExitStack()
        self.old: list[dict] = []  # the manifest's lines of earlier runs
        self.new: list[dict] = []

    def __enter__(self) -> Self:
        self._check_owner()
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(self.folder / LOCK, shared=self.shard is not None))
            if self.shard:
                self._shards()
                stack.enter_context(locked(self.shard.lock(self.folder)))
            shards = [self.shard] if self.shard else find_shards(self.folder)
            for path in (self.manifest, *(shard.manifest(self.folder) for shard in shards)):
                if not path.exists():
                    write_file(path, HEADER.encode())
                self.old += [line for line in read_manifest(path) if "files" in line]
            self.locks = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.locks.close()

    def _check_owner(self) -> None:
        paths = (self.manifest, self.folder / "images", *self.jsonl)
        there = [path for path in paths if os.path.lexists(path)]
        # After that look: another shard, just begun, writes the manifest before all else.
        text = self.manifest.read_text(errors="replace") if self.manifest.is_file() else ""
        for path in there:
            ours = text.startswith(HEADER)
            if path in self.jsonl:  # it may be edited since
                with suppress(FileNotFoundError):
                    ours = ours and path.is_file() and file_digest(path) in text
            if not ours and os.path.lexists(path):  # another shard may have removed it
                why = "is not as this script wrote it, and would be replaced"
                raise RunError(f"{path} {why}: choose another --out_dir, or move it away")

    def _shards(self) -> list[Shard]:
        """
        Those that have begun, all of one count.

        Raises:
            RunError: they have not.
        """
        shards = find_shards(self.folder)
        if len(counts := sorted({shard.count for shard in [*shards, self.shard] if shard})) > 1:
            raise RunError(
                f"shards of {counts[0]} and of {counts[1]} do not fit together: a run without "
                f"--shard takes over what they did, or delete {self.folder}/converted.*-of-*.jsonl "
                "of the one or the other"
            )
        return shards

    def convert(
        self,
        videos: list[Video],
        sampling: Sampling,
        num_workers: int | None,
        max_gb: int,
        ray_address: str | None = None,
    ) -> Iterator[tuple[Video, dict]]:
        """
        Write the frames of all videos; yields each, in order, with what `convert_video` returns.

        Raises:
            RunError: an image cannot be written, or the nodes of a Ray cluster are not alike.
        """
        self._remove_jsonl()
        if not videos:  # there are more shards than videos
            return
        done = {line["name"]: line for line in self.old}
        old = [done.get(video.name, {}) for video in videos]
        # Other machines have other working folders.
        folder = self.folder.absolute()
        there = [video._replace(path=video.path.absolute()) for video in videos]
        work = partial(convert_video, folder=folder, sampling=sampling, max_gb=max_gb)
        results = as_done(
            *(work, there, old),
            died={"error": "its worker process died"},
            num_workers=num_workers,
            ray_address=ray_address,
            # The lock is in no other folder of that name.
            shared=(Path(os.path.commonpath([video.path for video in there])), folder / LOCK),
        )
        path = self.shard.manifest(self.folder) if self.shard else self.manifest
        with path.open("a") as file:
            file.write("\n")  # ends a line that a killed run has begun
            with closing(in_order(self._noted(results, videos, file))) as lines:
                for video, line in zip(videos, lines, strict=True):
                    yield video, self._checked(line)

    def _noted(
        self, results: Iterator[tuple[int, dict]], videos: list[Video], file: TextIO
    ) -> Iterator[tuple[int, dict]]:
        """Write each line to the manifest as soon as it is there."""
        with closing(results):
            for number, line in results:
                if "error" not in line or self.shard:
                    note = {"name": videos[number].name, **line}
                    print(json.dumps(note), file=file, flush=True)
                yield number, line

    def _checked(self, line: dict) -> dict:
        if line.get("made_by", MADE_BY) != MADE_BY:
            raise RunError(
                f"another machine has {line['made_by']}, this one {MADE_BY}: the frames could "
                "differ. Install the same, then the same command continues."
            )
        if "error" not in line:
            self.new.append(line)
        return line

    def join(self, videos: list[Video], sampling: Sampling) -> Iterator[tuple[Video, dict]]:
        """
        Yield all videos, in order, with what their shards noted of them. It is taken as it is: no
        video and no image is read.

        Raises:
            RunError: a shard has not done all of its videos.
        """
        done: dict[Shard, dict[str, dict]] = {}
        for shard in self._shards():
            lines = read_manifest(shard.manifest(self.folder))
            done[shard] = {line["name"]: line for line in lines}  # the last one of each counts
        if not done:
            raise RunError(f"{self.folder} has no shards to finish")
        count = shard.count
        owners = [Shard(i % count, count) for i in range(len(videos))]
        lines = [
            done.get(owner, {}).get(video.name, {})
            for video, owner in zip(videos, owners, strict=True)
        ]
        missing = Counter(
            owner
            for video, owner, line in zip(videos, owners, lines, strict=True)
            if not is_done(line, sampling)
        )
        if missing:
            numbers = ",".join(str(shard.number) for shard in sorted(missing))
            raise RunError(
                f"{missing.total()} of {len(videos)} videos are not done: those of the shards "
                f"{numbers} of {count}. Start these again with the same options, then --finish."
            )
        self._remove_jsonl()
        for video, line in zip(videos, lines, strict=True):
            yield video, self._checked(line)

    def _remove_jsonl(self) -> None:
        for path in self.jsonl:
            path.unlink(missing_ok=True)

    def finish(self, records: dict[str, list[dict]]) -> None:
        """
        Remove the images of earlier runs that are not of this one, and what killed ones left half
        written; write the manifest and, for each name of a jsonl, its records.

        Raises:
            RunError: a file cannot be written.
        """
        old, new = ({n for line in lines for n in line["files"]} for lines in (self.old, self.new))
        for name in old - new:
            (self.folder / name).unlink(missing_ok=True)
        remove_parts(self.folder)
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
        for shard in find_shards(self.folder):
            shard.manifest(self.folder).unlink()
            shard.lock(self.folder).unlink(missing_ok=True)
