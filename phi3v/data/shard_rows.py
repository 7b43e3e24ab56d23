"""
The records that `python -m phi3v.shards` wrote: a folder, or a dataset on the hub, with

    train-00000-of-00042.parquet    records with their images' bytes, shuffled
    train.order.npy                 (records,), the place of each record, in the order of the source
    train.shards.json               the manifest, written last: what there is and was checked

Index i is the record that the source has there, so a run on shards is the run on their source, and
parts such as train[500:] are the same. A record is read with its row group, of about a megabyte.
"""

import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pyarrow.parquet

from ..errors import DataError, first_line

VERSION = 1
ENDING = ".shards.json"  # of a manifest's name, after the split's
ORDER = "{split}.order.npy"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Text columns are null where a record has no such field.
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "system": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "conversations": datasets.List(
            {
                "images": datasets.List(datasets.Image()),
                "user": datasets.Value("string"),
                "assistant": datasets.Value("string"),
            }
        ),
        # Where the source has it, and its number among the records of that row.
        "row": datasets.Value("int64"),
        "number": datasets.Value("int64"),
    }
)
FIELDS = [name for name in FEATURES if name not in ("row", "number")]
WHOLE = slice(None)
OPEN_FILES = 32  # a process keeps the footers of so many


def open_shards(
    name: str, split: str | None = None, part: slice = WHOLE, streaming: bool = False
) -> "ShardRows | None":
    """
    The shards of that name, or None where it is the name of something else.

    Args:
        name: a local folder, or a manifest in it; a hub id, or another address, with ://.
        split: by default the only one that there is.
        streaming: of a hub id, transfer what is read and no more; otherwise all is downloaded.

    Raises:
        DataError: shards are missing or broken, or are of other splits.
    """
    root = name
    if name.endswith(ENDING):
        root, split = os.path.dirname(name) or ".", os.path.basename(name).removesuffix(ENDING)
    if os.path.isfile(root) or root.endswith((".json", ".jsonl")):
        return None
    try:
        is_hub_id = HUB_ID.fullmatch(root) and not os.path.exists(root)
        if is_hub_id and streaming:
            root = f"hf://datasets/{root}"
        elif is_hub_id:
            root = _download(name, f"*{ENDING}")
        fs, path = fsspec.core.url_to_fs(root)
        found = [os.path.basename(file) for file in fs.glob(f"{path}/*{ENDING}")]
        if is_hub_id and found and not streaming:
            _download(name)
    except Exception:  # no such name, no network: whoever else knows the name says it better
        return None
    splits = sorted(file.removesuffix(ENDING) for file in found)
    if not splits:
        return None
    if split is None and len(splits) > 1:
        raise DataError(f"{name} has {len(splits)} splits. Give one: {name}/{splits[0]}{ENDING}")
    if split is not None and split not in splits:
        raise DataError(f"{name} has shards of {', '.join(splits)}, and none of {split}.")
    return ShardRows(root, split or splits[0], part)


def _download(name: str, pattern: str | None = None) -> str:
    """The local folder of a dataset on the hub, which then has its files of this pattern."""
    return huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=pattern)


class ShardRows(Sequence):
    """
    The records of a split, read when they are asked for.

    Args:
        root: a local folder, which is memory-mapped, or an address that fsspec knows, such as
            hf://datasets/<user>/<name>, of which only what is asked for is transferred.
        part: of the records, in the order of the source.

    Attributes:
        order: (records,), where each record lies among all that the files hold.
        groups: (row groups + 1,), where each begins, and the end of the last.
        min_crops: the least --num_crops that all images fit; they were checked when written.
        identity: tells these records from others.

    Raises:
        DataError: a file is missing, or is not as it was written.
    """

    def __init__(self, root: str | Path, split: str, part: slice = WHOLE):
        self.root = str(root)
        self.fs, path = fsspec.core.url_to_fs(self.root)
        self.local = "file" in self.fs.protocol
        manifest = f"{path}/{split}{ENDING}"
        try:
            content = json.loads(self.fs.cat_file(manifest))
            if content["version"] != VERSION:
                raise ValueError(f"it is of version {content['version']}; write the shards again")
            self.paths = [f"{path}/{file['name']}" for file in content["files"]]
            sizes = [file["bytes"] for file in content["files"]]
            rows = [file["rows"] for file in content["files"]]
            self.min_crops = content["min_crops"]
            self.identity = f"{content['identity']} {part.start or 0}:{part.stop}"
            with self.fs.open(f"{path}/{ORDER.format(split=split)}", "rb") as file:
                self.order = np.load(file)
            if len(self.order) != content["records"]:
                raise ValueError(f"{ORDER.format(split=split)} is not its own")
            self.order = self.order[part]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{manifest}: {first_line(error)}.") from error
        for path, size in zip(self.paths, sizes, strict=True):
            if self.local and (not Path(path).is_file() or Path(path).stat().st_size != size):
                raise DataError(f"{path} is missing or cut off. Copy it again, all {size:,} bytes.")
        self.groups = np.cumsum([0, *(count for counts in rows for count in counts)])
        self.first_group = np.cumsum([0, *map(len, rows)])  # of each file
        self._last: tuple[int, object] = (-1, None)  # a group's number and table

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        """A record. Fields that it does not have are absent."""
        place = self.order[index]
        group = int(np.searchsorted(self.groups, place, side="right")) - 1
        if self._last[0] != group:
            self._last = (group, self._read(group))
        row = self._last[1].slice(place - self.groups[group], 1).to_pylist()[0]
        return {name: value for name, value in row.items() if value is not None}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": (-1, None)}

    def _read(self, group: int) -> pyarrow.Table:
        number = int(np.searchsorted(self.first_group, group, side="right")) - 1
        path = self.paths[number]
        try:
            file = _open(path, None if self.local else self.fs, os.getpid())
            group -= int(self.first_group[number])
            # Loader workers share the cores: threads in them would be in each other's way.
            return file.read_row_group(group, columns=FIELDS, use_threads=False)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{path} cannot be read: {first_line(error)}. Copy it again."
            ) from error


@functools.lru_cache(OPEN_FILES)
def _open(path: str, fs: fsspec.AbstractFileSystem | None, pid: int) -> pyarrow.parquet.ParquetFile:
    """A file, opened by each process for itself, so that forked loader workers share no place."""
    options = {"page_checksum_verification": True}
    if fs is None:
        return pyarrow.parquet.ParquetFile(path, memory_map=True, **options)
    source: BinaryIO = fs.open(path, "rb", cache_type="none")
    return pyarrow.parquet.ParquetFile(source, pre_buffer=True, **options)
