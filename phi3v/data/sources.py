"""Rows of datasets from the hub, from local folders and from files of json lines."""

import os
import re
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet

from ..errors import DataError, first_line
from .rows import ROW, Lines, is_image, item_type
from .shard_rows import ShardRows, open_shards

# As `datasets` and the hub name the parts of a split: train-00000-of-00003.parquet.
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?!\d).*")
PART = re.compile(r"([^\[]+)(?:\[(\d*):(\d*)\])?")
# A file with none of these words in its path belongs to train.
SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}


def load_rows(
    name_or_path: str | Path,
    *layouts: dict,
    config: str | None = None,
    split: str = "train",
    flag: str = "--dataset_name_or_path",
    streaming: bool = False,
) -> datasets.Dataset | Lines | ShardRows:
    """
    A split of a hub dataset. Or in its place: a local folder of parquet files, a folder that
    `save_to_disk` wrote, a file of json lines; or records that `python -m phi3v.shards` wrote, in a
    folder or on the hub. Images stay encoded; the collator decodes them.

    Args:
        layouts: the columns that the recipe reads, in every form in which it knows the dataset:
            `{"image": datasets.Image, "query": {"en": str}, "answers": [str], "id": object}`. One
            has to fit. Without any, columns are not checked.
        config: of a hub dataset with several.
        split: also a part of one, such as "train[500:]".
        flag: that `name_or_path` was given with, for messages.
        streaming: it has to be shards; those on the hub are read there.

    Returns:
        Rows that keep their number in the split, and their origin, through `select`, `filter` and
        the like.

    Raises:
        DataError: there is no such dataset or split, it is broken, or columns are missing or of
            another type; the message says what was found and what was expected.
    """
    name = str(name_or_path)
    if name.endswith((".json", ".jsonl")):
        return Lines(name, *layouts)
    folder = Path(name)
    if not (part := PART.fullmatch(split)):
        raise DataError(f"{split} is no part of a split. Take one like train[500:].")
    whole, start, stop = part.groups()
    part = slice(int(start or 0), int(stop) if stop else None)
    if (shards := open_shards(name, whole, part, streaming)) is not None:
        return shards
    if streaming:
        raise DataError(f"--streaming: {name} is not what python -m phi3v.shards wrote.")
    try:
        if os.path.isdir(folder):
            rows = _load_folder(folder, config, whole)
        elif folder.is_absolute() or name.startswith("."):
            # No hub id looks like this, so the hub need not be asked.
            raise DataError("there is no such folder")
        else:
            rows = datasets.load_dataset(name, config, split=whole)
    except Exception as error:  # no network, no such id, no such split, a broken file
        while error.__cause__ is not None and not isinstance(error, DataError):
            error = error.__cause__
        wanted = ", or ".join(_words(columns) for columns in layouts)
        raise DataError(
            f"cannot load split {split!r} of {name}: {first_line(error)}. Give {flag} a hub id, a "
            "folder of parquet files or one of save_to_disk"
            f"{', with the columns ' if layouts else ''}{wanted}."
        ) from error
    if layouts:
        _check_columns(rows, layouts, name)
    part = range(len(rows))[part]
    if not part:
        raise DataError(f"{name} has {len(rows)} rows, none of them in {split}. Take another part.")
    encoded = datasets.Image(decode=False)
    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, encoded)
        elif isinstance(item_type(feature), datasets.Image):
            rows = rows.cast_column(column, datasets.List(encoded))
    rows.info.dataset_name = name
    rows = rows.remove_columns([ROW] if ROW in rows.column_names else [])  # if saved with it
    return rows.add_column(ROW, np.arange(len(rows))).select(part)


def _load_folder(folder: Path, config: str | None, split: str) -> datasets.Dataset:
    """
    Parquet files alone: datasets 5.2 guesses a folder's format by most of its files, and pyarrow
    26 crashes on a .json of `null`.
    """
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        try:
            saved = datasets.load_from_disk(str(folder))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        except OSError:  # which file is missing
            raise
        except KeyError:
            raise DataError(f"it has only the splits {', '.join(saved)}") from None
        except Exception as error:
            raise DataError("its files are not those that save_to_disk wrote") from error
    if config and (folder / config).is_dir():
        folder = folder / config
    files = _parquet_files(folder, split)
    _check_shards(files)
    _check_schemas(files)
    return datasets.Dataset.from_parquet([str(path) for path in files])


def _parquet_files(folder: Path, split: str) -> list[Path]:
    """A split's files, by the words in their paths."""
    words = {}
    for path in sorted(folder.rglob("*.parquet")):
        parts = path.relative_to(folder).parts
        if not any(part.startswith(".") for part in parts):  # as what a download keeps there
            words[path] = SPLITS & set(re.split("[^a-z]+", "/".join(parts).lower()))
    files = [path for path, found in words.items() if split in found]
    if not files and split == "train":
        files = [path for path, found in words.items() if not found]
    if not files:
        raise DataError(f"of the {len(words)} parquet files below it, none is of this split")
    return files


def _check_shards(files: list[Path]) -> None:
    """Raise DataError where a split's files are not all there, or of two downloads."""
    shards = defaultdict(list)
    for path in files:
        if name := SHARD.fullmatch(path.name):
            shards[path.parent / name[1]].append((int(name[2]), int(name[3])))
    for start, found in shards.items():
        count = max(total for _, total in found)
        missing = sorted(set(range(count)) - {index for index, _ in found})
        if missing:
            raise DataError(
                f"{start}-{missing[0]:05}-of-{count:05} is missing ({len(missing)} in all); "
                "download it, or rename the files that are there"
            )
        if len(found) > count or any(total != count for _, total in found):
            raise DataError(
                f"{start}-*: {len(found)} files for {count} parts; remove what is of another "
                "download"
            )


def _check_schemas(files: list[Path]) -> None:
    """Raise DataError for the file that cannot be read, or has other columns than the first."""
    first = None
    for path in files:
        try:
            schema = pyarrow.parquet.read_schema(path)
        except Exception as error:  # not an OSError alone: pyarrow has its own
            raise DataError(f"{path} is broken ({first_line(error)}); replace the file") from error
        columns = {(field.name, field.type) for field in schema}
        first = first or columns
        if names := sorted({name for name, _ in columns ^ first}):
            raise DataError(
                f"{path} and {files[0]} differ in the columns {', '.join(names)}; convert one"
            )


def _check_columns(rows: datasets.Dataset, layouts: tuple[dict, ...], name: str) -> None:
    complete = [columns for columns in layouts if columns.keys() <= set(rows.column_names)]
    if not complete:
        raise DataError(
            f"{name} does not have the right columns. Found: {', '.join(rows.column_names)}. "
            f"Expected: {', or '.join(_words(columns) for columns in layouts)}."
        )
    for column, expected in complete[0].items():
        if not _fits(rows.features[column], expected):
            raise DataError(
                f"{name}: column {column} must hold {_words(expected)} in every row; it is of type "
                f"{rows.features[column]}. Convert the column."
            )


def _fits(feature: object, expected: object) -> bool:
    """Whether a column's type is what a layout says."""
    if isinstance(expected, list):
        return item_type(feature) is not None and _fits(item_type(feature), expected[0])
    if isinstance(expected, dict):
        return isinstance(feature, dict) and all(
            _fits(feature.get(name), inner) for name, inner in expected.items()
        )
    if expected is datasets.Image:
        return is_image(feature)
    name = feature.dtype if isinstance(feature, datasets.Value) else ""
    return {str: "string" in name, int: "int" in name or name == "bool"}.get(expected, True)


def _words(expected: object) -> str:
    """A layout, or a part of it, in words."""
    if isinstance(expected, list):
        return f"a list of {_words(expected[0])}"
    if isinstance(expected, dict):
        return f"{{{', '.join(expected)}}}"
    return {datasets.Image: "an image", str: "a text", int: "a whole number"}.get(expected, "any")
