"""
Datasets of rows, from the hub or from a folder, and how their rows become records.

A recipe says which columns it reads and how a row becomes a record (see `conversations.py`).
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets

from .conversations import ConversationError, check_record, read_json_lines


def load_rows(
    name_or_path: str,
    layouts: list[set[str]],
    config: str | None = None,
    split: str = "train",
) -> datasets.Dataset:
    """
    A split of a hub dataset, or of a local folder in its place: parquet files, or what
    `save_to_disk` wrote. Images stay encoded; the collator decodes them.

    Args:
        layouts: the columns that the recipe reads, in every form in which it knows the dataset.
        config: of a hub dataset with several. A folder has one.

    Raises:
        ConversationError: there is no such dataset or split, or columns are missing; the message
            lists what was found and what was expected.
    """
    folder = Path(name_or_path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            rows = datasets.load_from_disk(str(folder))
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise ConversationError(
                        f"{name_or_path}: there is no split {split!r}, only {', '.join(rows)}."
                    )
                rows = rows[split]
        else:
            rows = datasets.load_dataset(
                name_or_path, None if folder.is_dir() else config, split=split
            )
    except ConversationError:
        raise
    except Exception as error:  # no network, no such id, no data files, a broken file, no split
        raise ConversationError(
            f"cannot load split {split!r} of {name_or_path}: {error}. Give a hub id, a folder of "
            "parquet files or one of save_to_disk with --dataset_name_or_path."
        ) from error
    if not any(columns <= set(rows.column_names) for columns in layouts):
        expected = ", or ".join(", ".join(sorted(columns)) for columns in layouts)
        raise ConversationError(
            f"{name_or_path} does not have the right columns. Found: "
            f"{', '.join(rows.column_names)}. Expected: {expected}."
        )
    if len(rows) == 0:
        raise ConversationError(f"{name_or_path}: split {split!r} has no rows.")
    return _keep_images_encoded(rows)


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


def read_fields(path: Path, fields: set[str]) -> list[tuple[str, dict]]:
    """
    The objects of a json-lines file, each with where it stands ("file, line 3").

    Raises:
        ConversationError: as `read_json_lines`, or a line that is not an object with `fields`.
    """
    found = list(read_json_lines(path))
    for where, row in found:
        missing = sorted(fields - row.keys()) if isinstance(row, dict) else sorted(fields)
        if missing:
            raise ConversationError(f"{where} does not have the fields {', '.join(missing)}.")
    return found


CAULDRON = "HuggingFaceM4/the_cauldron"
CAULDRON_COLUMNS = {"images", "texts"}


def cauldron_records(
    rows: datasets.Dataset, name: str, indices: Iterable[int] | None = None
) -> Records:
    """
    Records of the_cauldron's layout, one for every question of every row.

    Columns: `images`, and `texts`, a list of {"user", "assistant"}, which are taken as they are.

    Args:
        name: of the task; ids are `<name>-<row>-<question>`.
        indices: the rows to take, all by default.
    """
    texts = rows.select_columns("texts")
    indices = range(len(rows)) if indices is None else indices

    def make(row: int, question: int, images: list) -> dict:
        text = texts[row]["texts"][question]
        turn = {"images": images, "user": text["user"], "assistant": text["assistant"]}
        record = {"id": f"{name}-{row}-{question}", "source": name, "conversations": [turn]}
        return check_record(record, f"{name}, row {row}")

    keys = [(row, question) for row in indices for question in range(len(texts[row]["texts"]))]
    # All texts are checked before the work starts; images are read when their record is.
    for row, question in keys:
        make(row, question, [])
    return Records(keys, lambda key: make(*key, rows[key[0]]["images"]))


def split_rows(rows: datasets.Dataset, num_eval: int) -> tuple[range, range]:
    """Row numbers for training and for evaluation: the first `num_eval` rows are evaluated on."""
    if not 0 < num_eval < len(rows):
        raise ConversationError(
            f"--num_eval_rows is {num_eval} and the dataset has {len(rows)} rows: none are left to "
            "train on. Lower it."
        )
    return range(num_eval, len(rows)), range(num_eval)
