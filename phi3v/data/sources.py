"""
Datasets of rows, from the hub or from a folder, and how their rows become records.

A recipe says which columns it reads and how a row becomes a record (see `conversations.py`).
"""

import functools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow.parquet
from pyarrow.compute import list_value_length

from ..errors import DataError, first_line
from .bad_samples import UniqueIds, find_bad, keep_good, settle
from .conversations import check_record
from .json_lines import kind, parse_line, read_lines

# As `datasets` and the hub name the parts of a split: train-00000-of-00003.parquet.
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?!\d).*")


def load_rows(
    name_or_path: str,
    layouts: list[set[str]],
    config: str | None = None,
    split: str = "train",
    flag: str = "--dataset_name_or_path",
) -> datasets.Dataset:
    """
    A split of a hub dataset, or of a local folder in its place: parquet files, or what
    `save_to_disk` wrote. Images stay encoded; the collator decodes them.

    Args:
        layouts: the columns that the recipe reads, in every form in which it knows the dataset.
        config: of a hub dataset with several. A folder has one.
        flag: that `name_or_path` was given with, for messages.

    Returns:
        The rows; their attribute `origin` is `name_or_path`.

    Raises:
        DataError: there is no such dataset or split, it is broken, or columns are missing
            or of another type; the message lists what was found and what was expected.
    """
    folder, local = Path(name_or_path), os.path.isdir(name_or_path)
    wanted = ", or ".join(", ".join(sorted(columns)) for columns in layouts)
    remedy = (
        f"Give a hub id, a folder of parquet files or one of save_to_disk with {flag}. Expected "
        f"columns: {wanted}."
    )
    if not local and (folder.is_absolute() or name_or_path.startswith(".")):
        # No hub id looks like this, so the hub need not be asked.
        raise DataError(
            f"cannot load split {split!r} of {name_or_path}: there is no such folder. {remedy}"
        )
    saved = any(os.path.isfile(folder / name) for name in ("dataset_dict.json", "state.json"))
    if local and not saved:
        _check_shards(folder)
    try:
        if saved:
            rows = datasets.load_from_disk(str(folder))
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise DataError(
                        f"{name_or_path}: there is no split {split!r}, only {', '.join(rows)}."
                    )
                rows = rows[split]
        else:
            rows = datasets.load_dataset(
                os.path.abspath(folder) if local else name_or_path,  # `datasets` knows no "."
                None if local else config,
                split=split,
            )
    except DataError:
        raise
    except Exception as error:  # no network, no such id, no data files, a broken file, no split
        cause = _cause(folder if local else None, saved, error)
        raise DataError(
            f"cannot load split {split!r} of {name_or_path}: {cause}. {remedy}"
        ) from error
    if not any(columns <= set(rows.column_names) for columns in layouts):
        raise DataError(
            f"{name_or_path} does not have the right columns. Found: "
            f"{', '.join(rows.column_names)}. Expected: {wanted}."
        )
    if len(rows) == 0:
        raise DataError(f"{name_or_path}: split {split!r} has no rows. {remedy}")
    for name in sorted(set().union(*layouts) & set(rows.column_names)):
        expected, fits = COLUMN_TYPES.get(name, ("", None))
        if fits and not fits(rows.features[name]):
            raise DataError(
                f"{name_or_path}: column {name} must hold {expected} in every row; it is of type "
                f"{rows.features[name]}. Convert the column."
            )
    rows = _keep_images_encoded(rows)
    rows.origin = name_or_path
    return rows


def _check_shards(folder: Path) -> None:
    """
    Raise DataError where a split's files are not all there, or of two downloads.

    `datasets` loads what it finds.
    """
    shards = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and (name := SHARD.fullmatch(path.name)):
            shards[path.parent / name[1]].append((int(name[2]), int(name[3])))
    for start, found in shards.items():
        totals = {total for _, total in found}
        missing = sorted(set(range(max(totals))) - {index for index, _ in found})
        if missing:
            raise DataError(
                f"{start}-{missing[0]:05}-of-{max(totals):05} is missing ({len(missing)} in all). "
                "Download it, or give the files that are there names without -of-."
            )
        if len(totals) > 1 or len(found) > max(totals):
            raise DataError(
                f"{start}-*: {len(found)} files for {max(totals)} parts. Remove what is of another "
                "download."
            )


def _cause(folder: Path | None, saved: bool, error: Exception) -> str:
    """What is behind an error of `datasets`, on one line; the broken file, where there is one."""
    first, odd = None, None
    for path in sorted(folder.rglob("*.parquet")) if folder else ():
        try:
            columns = {(field.name, field.type) for field in pyarrow.parquet.read_schema(path)}
        except Exception as broken:  # not an OSError alone: pyarrow has its own
            return f"{path} is broken ({first_line(broken)}); replace the file"
        first = first or (path, columns)
        if names := sorted({name for name, _ in columns ^ first[1]}):
            odd = f"{path} and {first[0]} differ in the columns {', '.join(names)}; convert one"
    while error.__cause__ is not None:
        error = error.__cause__
    if saved and not isinstance(error, OSError):
        return "its files are not those that save_to_disk wrote; save it again"
    of_python = isinstance(error, TypeError | LookupError | AttributeError) or not str(error)
    if of_python or isinstance(error, datasets.table.CastError):
        return odd or "its files do not all hold rows of the same columns and types"
    return first_line(error)


def _item(feature: object) -> object:
    """The type of a list's items, or None."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


BYTES = (datasets.Value("binary"), datasets.Value("large_binary"))


def _is_image(feature: object) -> bool:
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    return isinstance(feature, datasets.Image) or feature in BYTES


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and "string" in feature.dtype


def _has_texts(feature: object, *fields: str) -> bool:
    return isinstance(feature, dict) and all(_is_text(feature.get(field)) for field in fields)


# Of the columns that recipes read: what has to be in them, in words and as a test of the type.
COLUMN_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "image": ("an image", _is_image),
    "images": ("a list of images", lambda feature: _is_image(_item(feature))),
    "texts": (
        "a list of {user, assistant}",
        lambda feature: _has_texts(_item(feature), "user", "assistant"),
    ),
    "query": ("an object with the text `en`", lambda feature: _has_texts(feature, "en")),
    "answers": ("a list of texts", lambda feature: _is_text(_item(feature))),
}


def image_counts(rows: datasets.Dataset) -> list[int]:
    """
    How many images each row has in its column `images`. Only the lists' lengths are read.
    """
    counts = list_value_length(rows.data.column("images"))
    if rows._indices is not None:  # of rows that were selected before they were saved
        counts = counts.take(rows._indices.column(0))
    return [count or 0 for count in counts.to_pylist()]


def _keep_images_encoded(rows: datasets.Dataset) -> datasets.Dataset:
    encoded = datasets.Image(decode=False)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, encoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(encoded))
    return rows


class Records:
    """
    Records made of rows, each when it is asked for: a map-style dataset for the Trainer.

    Args:
        keys: what `make` makes a record of, for every record.
    """

    def __init__(self, keys: Iterable, make: Callable[..., dict]):
        self.keys = list(keys)
        self.make = make

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict:
        return self.make(self.keys[index])

    def __iter__(self) -> Iterator[dict]:
        return (self.make(key) for key in self.keys)


def read_fields(
    path: Path,
    fields: dict[str, type | tuple[type, ...]],
    unique: str | None = None,
    skip_bad: bool = False,
) -> list[tuple[str, dict]]:
    """
    The objects of a json-lines file, each with where it stands ("file, line 3").

    Args:
        fields: that every object has, and of which types.
        unique: the field that tells objects apart; 1 and "1" are the same there.
        skip_bad: leave bad lines out and print which, instead of an error for the first.

    Raises:
        DataError: as `read_lines` and `parse_line`, or a line that is not an object with
            `fields`.
    """
    found: dict[int, tuple[str, dict]] = {}
    ids = UniqueIds("line")

    def check(numbered: tuple[int, bytes]) -> None:
        number, line = numbered
        where = f"{path}, line {number}"
        row = parse_line(line, where)
        missing = sorted(fields.keys() - row.keys()) if isinstance(row, dict) else sorted(fields)
        if missing:
            raise DataError(f"{where} does not have the fields {', '.join(missing)}.")
        for name, types in fields.items():
            if not isinstance(row[name], types):
                types = types if isinstance(types, tuple) else (types,)
                raise DataError(
                    f"{where}: {name} must be {' or '.join(kind(each()) for each in types)}, not "
                    f"{kind(row[name])}. Correct it."
                )
        if unique:
            ids.add(str(row[unique]), number, where)
        found[number] = (where, row)

    lines = ((number, (number, line)) for number, line in read_lines(path))
    bad = find_bad(lines, check, skip_bad)
    settle(bad, len(found.keys() | bad.keys()), str(path), skip_bad)
    return [row for number, row in found.items() if number not in bad]


CAULDRON = "HuggingFaceM4/the_cauldron"
CAULDRON_COLUMNS = {"images", "texts"}


def cauldron_records(
    rows: datasets.Dataset,
    name: str,
    indices: Iterable[int] | None = None,
    skip_bad: bool = False,
    images: int | None = None,
    check_more: Callable[[dict, str], object] | None = None,
) -> Records:
    """
    Records of the_cauldron's layout, one for every question of every row.

    Columns: `images`, and `texts`, a list of {"user", "assistant"}, which are taken as they are.

    Args:
        name: of the task; ids are `<name>-<row>-<question>`.
        indices: the rows to take, all by default.
        skip_bad: leave bad questions out and print which, instead of an error for the first.
        images: how many every row has; any number but none by default.
        check_more: what the task asks of a record (without its images), which stands at `where`:
            called with both, to raise DataError.

    Raises:
        DataError: a row has no or the wrong number of images, no question, or a text is
            wrong.
    """
    texts = rows.select_columns("texts")
    counts = image_counts(rows)
    indices = range(len(rows)) if indices is None else indices
    origin = getattr(rows, "origin", None)
    prefix = f"{origin}: {name}" if origin else name

    @functools.lru_cache(1)  # the questions of a row come one after the other
    def questions(row: int) -> list[dict]:
        return texts[row]["texts"] or []

    def where(row: int, question: int) -> str:
        return f"{prefix}, row {row}, texts[{question}]"

    def make(row: int, question: int, pictures: list) -> dict:
        text = questions(row)[question]
        if text is None:
            raise DataError(f"{where(row, question)} is null. Remove it.")
        turn = {"images": pictures, "user": text["user"], "assistant": text["assistant"]}
        record = {"id": f"{name}-{row}-{question}", "source": name, "conversations": [turn]}
        return check_record(record, where(row, question))

    def check(key: tuple[int, int]) -> None:
        row, question = key
        if not counts[row] or not questions(row):
            field = "texts" if counts[row] else "images"
            raise DataError(f"{prefix}, row {row}: {field} is empty. Remove the row.")
        if images and counts[row] != images:
            raise DataError(
                f"{prefix}, row {row} has {counts[row]} images, not {images}. Remove the row."
            )
        record = make(row, question, [])
        if check_more:
            check_more(record, where(row, question))

    # A row without questions counts as one bad sample.
    keys = [(row, question) for row in indices for question in range(len(questions(row)) or 1)]
    # All texts are checked before the work starts; images are read when their record is.
    keys = keep_good(keys, check, prefix, skip_bad)
    return Records(keys, lambda key: make(*key, rows[key[0]]["images"]))


def split_rows(rows: datasets.Dataset, num_eval: int) -> tuple[range, range]:
    """Row numbers for training and for evaluation: the first `num_eval` rows are evaluated on."""
    if num_eval < 1:
        raise DataError(f"--num_eval_rows is {num_eval}: none are left to evaluate on. Raise it.")
    if num_eval >= len(rows):
        raise DataError(
            f"--num_eval_rows is {num_eval} and the dataset has {len(rows)} rows: none are left to "
            "train on. Lower it."
        )
    return range(num_eval, len(rows)), range(num_eval)
