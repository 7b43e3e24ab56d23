"""
What rows come from, made so that a row is read when it is asked for: files of json lines, and
datasets whose images are left out while their texts are looked at. And where images lie.
"""

import functools
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from pyarrow.compute import list_value_length

from ..errors import DataError, first_line, quoted

NO_ITEM = re.compile(r"\s*,?\s*")
# A longer line is no record: a file without line ends, or not a text at all.
MAX_LINE_BYTES = 64 * 2**20
# The column in which `load_rows` keeps the number of a row; filters and shuffles carry it along.
ROW = "__row__"
BYTES = (datasets.Value("binary"), datasets.Value("large_binary"))


def check_fields(
    value: object, field: str, required: set[str], optional: set[str] | None = None
) -> None:
    """Refuse missing fields and, where `optional` ones are known, unknown ones."""
    check_type(value, dict, field)
    found = {"missing": required - value.keys()}
    if optional is not None:
        found["unknown"] = value.keys() - required - optional
    if any(found.values()):
        names = [f"{k}: {', '.join(map(quoted, sorted(v)[:5]))}" for k, v in found.items() if v]
        allowed = f"; optional: {', '.join(sorted(optional))}" if optional else ""
        raise DataError(
            f"{field} has the wrong fields ({'; '.join(names)}). Required: "
            f"{', '.join(sorted(required))}{allowed}."
        )


def check_type(value: object, type_: type | tuple[type, ...], field: str) -> object:
    if not isinstance(value, type_):
        wanted = " or ".join(map(_kind, type_ if isinstance(type_, tuple) else (type_,)))
        raise DataError(f"{field} must be {wanted}, not {_kind(type(value))}. Correct it.")
    return value


def _kind(type_: type) -> str:
    """A type as JSON calls it."""
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string"}
    return {**names, bool: "a bool", int: "a number", float: "a number"}.get(type_, type_.__name__)


class Lines(Sequence):
    """
    The values of a file of json lines, or of one JSON list, parsed when they are asked for.

    Args:
        columns: fields that every line must have, with their types.

    Attributes:
        word, numbers: "line", and those of the lines that are not blank, from 1 on; or "item".

    Raises:
        DataError: there is no such file, it cannot be read, or it has no lines. Asked for a line:
            it is not JSON in UTF-8, or the file has changed.
    """

    def __init__(self, path: str | Path, columns: dict[str, type | tuple[type, ...]] | None = None):
        self.path, self.columns = path, columns or {}
        try:
            if not os.path.isfile(path):  # or a folder, a pipe, a name that no file can have
                raise DataError(f"{quoted(str(path))}: there is no such file. Check the path.")
            self.version = self._version()
            with open(path, "rb") as file:
                is_list = file.read(4096).lstrip().startswith(b"[")
            self.word = "item" if is_list else "line"
            spans = self._find_items() if is_list else self._find_lines()
            found = np.fromiter(spans, dtype=(np.int64, 3))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}. Check it.") from None
        if not len(found):
            raise DataError(f"{path}: the file has no records. Write one record per line.")
        self.numbers, self.spans = found[:, 0], found[:, 1:]

    def _version(self) -> tuple[int, int]:
        info = os.stat(self.path)
        return info.st_size, info.st_mtime_ns

    def _find_lines(self) -> Iterator[tuple[int, int, int]]:
        """Number, place and length of the lines that are not blank."""
        with open(self.path, "rb") as file:
            start = 0
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{self.path}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB. "
                        "Write one record per line."
                    )
                if line.strip():
                    yield number, start, len(line)
                start += len(line)

    def _find_items(self) -> Iterator[tuple[int, int, int]]:
        """Number, place and length of the items of a list."""
        number, decoder = 0, json.JSONDecoder()
        try:
            text = Path(self.path).read_bytes().decode()  # places count every byte, \r too
            end = text.index("[") + 1
            start = len(text[:end].encode())
            while True:
                begin = NO_ITEM.match(text, end).end()
                if text[begin] == "]":
                    break
                start += len(text[end:begin].encode())
                number += 1
                _, end = decoder.raw_decode(text, begin)
                length = len(text[begin:end].encode())
                yield number, start, length
                start += length
            if text[begin + 1 :].strip():
                raise ValueError("there is more after the list")
        except (ValueError, IndexError, RecursionError) as error:
            raise DataError(
                f"{self.path}, item {max(1, number)}: not a JSON list in UTF-8: "
                f"{first_line(error)}. Correct it, or write one record per line."
            ) from None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> object:
        start, length = self.spans[index]
        # Opened for every line: the workers of a DataLoader would share the place in an open file.
        with open(self.path, "rb") as file:
            if self._version() != self.version:
                raise DataError("the file has changed since the start. Start again.")
            file.seek(start)
            line = file.read(length)
        try:
            value = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"not JSON in UTF-8: {first_line(error)}. Write one record per line, and save the "
                "file as UTF-8 without BOM."
            ) from None
        if self.columns:
            check_fields(value, "the line", set(self.columns))
        for name, type_ in self.columns.items():
            check_type(value[name], type_, name)
        return value


def _object(pairs: list[tuple[str, object]]) -> dict:
    """An object; json.loads alone would take the last of two equal keys."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has a key twice")
    return content


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


class ImageFolder:
    """
    A folder that image paths are relative to and may not leave, not by a link either.

    Args:
        folder: need not exist as long as no image is asked for.
    """

    def __init__(self, folder: str | Path):
        self.folder = os.path.realpath(folder)

    def find(self, name: str, field: str) -> str:
        """
        The full path of the image `name`.

        Raises:
            DataError: it is not the path of a file in the folder. The message begins with `field`.
        """
        path = os.path.join(self.folder, check_type(name, str, f"{field}: a path"))
        try:
            inside = _is_inside(self.folder, os.path.dirname(path))
            info = os.lstat(path) if inside else None
            if inside and stat.S_ISLNK(info.st_mode):
                inside, info = _is_inside(self.folder, path), os.stat(path)
            if not inside:
                problem = "leaves the image folder"
            elif not stat.S_ISREG(info.st_mode) or not info.st_size:
                problem = "is not a file, or an empty one"
            else:
                return path
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"
        raise DataError(
            f"{field}: {quoted(name)} {problem}. Correct the path; it is relative to {self.folder}."
        )


@functools.lru_cache(10_000)  # images share their folders, so few are resolved
def _is_inside(folder: str, path: str) -> bool:
    root = os.path.join(folder, "")
    return os.path.join(os.path.realpath(path), "").startswith(root)


class _Unread:
    """What stands for an image in a row while its texts alone are looked at."""

    def __repr__(self) -> str:
        return "<image>"


class Texts(Sequence):
    """The rows of a `datasets.Dataset` without reading their images."""

    def __init__(self, rows: datasets.Dataset):
        names = [n for n, f in rows.features.items() if is_image(f) or is_image(item_type(f))]
        self.images = {name: _counts(rows, name) for name in names}
        self.texts = rows.remove_columns(list(self.images))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict:
        row = self.texts[index]
        for name, counts in self.images.items():
            count = counts[index]
            if isinstance(count, bool):
                row[name] = _Unread() if count else None
            else:
                row[name] = None if count is None else [_Unread()] * count
        return row


def is_image(feature: object) -> bool:
    """Whether a column's type is that of an image, as `datasets` or as bytes."""
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    return isinstance(feature, datasets.Image) or feature in BYTES


def _counts(rows: datasets.Dataset, name: str) -> list[int | bool | None]:
    """Of a column of images, whether each row has one; of lists of them, how many."""
    counts = []
    for table in rows.select_columns(name).with_format("arrow").iter(batch_size=1000):
        single = is_image(rows.features[name])
        counted = table[name].is_valid() if single else list_value_length(table[name])
        counts += counted.to_pylist()
    return counts


def item_type(feature: object) -> object:
    """The type of a list's items, or None."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
