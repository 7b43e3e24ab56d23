"""The converter's files: written whole, locked, and listed in manifests."""

import argparse
import errno
import fcntl
import hashlib
import json
import re
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

from phi3v.errors import RunError

# The first line of a manifest. Another number tells that its lines mean something else.
HEADER = json.dumps({"manifest_of": "phi3v.data.frame_folder", "version": 1}) + "\n"
PART = ".converted-{}.part"


class Shard(NamedTuple):
    """The items number, number + count, ... of all."""

    number: int  # from 0
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """For argparse: i/n."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise argparse.ArgumentTypeError(f"{text} is not i/n with i from 0 to n - 1")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def manifest(self, folder: Path) -> Path:
        return folder / f"converted.{self.number}-of-{self.count}.jsonl"

    def lock(self, folder: Path) -> Path:
        return folder / f".converted.{self.number}-of-{self.count}.lock"


def find_shards(folder: Path) -> list[Shard]:
    """Those that have a manifest."""
    names = [path.name for path in folder.glob("converted.*.jsonl")]
    found = [re.fullmatch(r"converted\.(\d+)-of-(\d+)\.jsonl", name) for name in names]
    return sorted(Shard(int(match[1]), int(match[2])) for match in found if match)


def read_manifest(path: Path) -> list[dict]:
    """
    Its lines, without the first.

    Raises:
        RunError: it is not one.
    """
    text = path.read_text()
    if not text.startswith(HEADER):
        raise RunError(f"{path} is not as this script wrote it: move it away")
    lines = []
    for line in text.splitlines()[1:]:
        with suppress(ValueError):  # the run was killed while it wrote the line
            lines.append(json.loads(line))
    return lines


@contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """
    Hold a lock, alone or together with others who share it.

    Raises:
        RunError: another process holds it.
    """
    with path.open("a+") as file:  # NFS wants a file to be readable for one kind, writable for both
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another run is writing to {path.parent}") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"warning: no locks in {path.parent}: start nothing twice", file=sys.stderr)
        yield


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """
    Write a file that has its name only when it is whole.

    Raises:
        RunError: it cannot be written.
    """
    # A name of its own: on another machine, a process of a run that was killed may still be writing
    # the same file. What a killed process leaves goes with `remove_parts`.
    part = path.with_name(PART.format(uuid.uuid4().hex))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        why = f"cannot write {path}: {error.strerror}"
        raise RunError(f"{why}. When that is solved, the same command continues.") from error


def remove_parts(folder: Path) -> None:
    for part in folder.rglob(PART.format("*")):
        part.unlink(missing_ok=True)
