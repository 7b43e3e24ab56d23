"""
The record that every recipe turns its rows into, and the jsonl that holds such records on disk.

    {"id": "val-0000000300", "source": "ucf101", "conversations": [
        {"images": ["val/a.0.jpg", "val/a.1.jpg"], "user": "...", "assistant": "..."}
    ]}

`conversations` is a list of turns; the images of a turn may be absent. They stand before the text,
or where it says `<image>`. In a jsonl, images are paths relative to the image folder. In memory, an
image is a path, the bytes of a file, a PIL image, or what `datasets` makes of one of them.
`answers` may list all accepted answers to the last question, and `system` be a text ahead of all.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
from datasets.utils import tqdm

from ..distributed import print_first, share_out
from ..errors import DataError, first_line, quoted
from .rows import ROW, ImageFolder, Lines, Texts, check_fields, check_type
from .shard_rows import ShardRows

SHOWN = 10
SKIP = "Or go on without bad samples: --skip_bad_samples."

# All that the tokenizer and the processor take out of a text as one token. There, it would be read
# as the structure of the prompt: a turn that nobody spoke, an image that nobody sent.
CONTROL_TOKEN = re.compile(
    r"<\|(?:image_\d+|image|user|assistant|system|end|endoftext|placeholder\d+)\|>"
    r"|<s>|</s>|<unk>"
)

IMAGE = "<image>"  # in a user's text, where an image stands
FIELDS = {"id", "conversations"}, {"source", "answers", "system"}  # required, and optional

# ---- A record


def check_record(record: object) -> dict:
    """
    A record with all its fields.

    Raises:
        DataError: a field is missing, unknown, of the wrong type or empty.
    """
    check_fields(record, "the record", *FIELDS)
    if not check_type(record["id"], str, "id"):
        raise DataError("id is empty. Give every record one of its own.")
    if not check_type(record["conversations"], list, "conversations"):
        raise DataError("conversations is empty. Write at least one turn.")
    turns = record["conversations"]
    checked = {
        "id": record["id"],
        "source": check_type(record.get("source", ""), str, "source"),
        "conversations": [_check_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)],
    }
    (checked["id"] + checked["source"]).encode()  # UnicodeEncodeError: half a surrogate pair
    if "system" in record:
        checked["system"] = _check_text(record["system"], "system")
    if "answers" in record:
        answers = check_type(record["answers"], list, "answers")
        checked["answers"] = [_check_text(a, f"answers[{i}]", True) for i, a in enumerate(answers)]
    return checked


def _check_turn(turn: object, field: str) -> dict:
    check_fields(turn, field, {"user", "assistant"}, {"images"})
    images = [] if turn.get("images") is None else turn["images"]
    check_type(images, list, f"{field}.images")
    user = _check_text(turn["user"], f"{field}.user")
    if IMAGE in user and user.count(IMAGE) != len(images):
        raise DataError(
            f"{field}.user has {user.count(IMAGE)} times {IMAGE} and {field}.images {len(images)}. "
            f"Write as many {IMAGE} as images, or none: then images come first."
        )
    return {
        "images": images,
        "user": user,
        "assistant": _check_text(turn["assistant"], f"{field}.assistant", answer=True),
    }


def _check_text(text: object, field: str, answer: bool = False) -> str:
    if found := CONTROL_TOKEN.search(check_type(text, str, field)):
        raise DataError(
            f"{field} contains {found[0]!r}, which would be read as a control token. Remove it; "
            "images are listed in `images`."
        )
    if answer and not text.strip():
        raise DataError(f"{field} is empty. Write an answer or remove it.")
    text.encode()
    return text


def to_messages(record: dict) -> list[dict[str, str]]:
    """
    The chat messages of a record, image tags included.

    Images are numbered through the whole conversation. Tags stand where the user's text says
    `<image>`. Where it does not, they come first, then a newline, then the text.
    """
    messages, number = [], 0
    if "system" in record:
        messages.append({"role": "system", "content": record["system"]})
    for turn in record["conversations"]:
        user, count = turn["user"], len(turn["images"])
        if count and IMAGE not in user:
            user = f"{IMAGE * count}\n{user}"
        for _ in range(count):
            number += 1
            user = user.replace(IMAGE, f"<|image_{number}|>", 1)
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": turn["assistant"]})
    return messages


# ---- Rows to records


class Records(Sequence):
    """
    Records made of rows, each when it is asked for: a map-style dataset for the Trainer.

    All rows are checked before the first record is handed out, see `check`.

    Args:
        rows: a `datasets.Dataset`, `Lines`, or any sequence.
        to_record: a row to its record, or to several: a list, or a generator. Without it, rows are
            records; those of shards are anyhow. Images of a `datasets.Dataset` are not read while
            its rows are checked, so it should hand them on as they are. Whatever it raises becomes
            a DataError that names the row. A record without an id gets `<source>-<row>`, of
            several `<source>-<row>-<number>`.
        origin: what the rows are called in messages. `Lines` and what `load_rows` returns know it.
        image_dir: the folder that images are paths in; they may not leave it.
    """

    def __init__(
        self,
        rows: Sequence,
        to_record: Callable[[dict], dict | Iterable[dict]] | None = None,
        origin: str | Path = "",
        image_dir: str | Path | None = None,
    ):
        self.rows, self.to_record, self.origin = rows, to_record, str(origin)
        self._folder = None if image_dir is None else ImageFolder(image_dir)
        self._word, self._numbers = "row", range(len(rows))
        if isinstance(rows, Lines):
            self._word, self._numbers, self.origin = rows.word, rows.numbers, str(rows.path)
        if isinstance(rows, datasets.Dataset):
            self.origin = self.origin or rows.info.dataset_name or ""
            if ROW in rows.column_names:
                self._numbers = rows.with_format("numpy")[ROW][:]
                self.rows = rows.remove_columns(ROW)
        if isinstance(rows, ShardRows):
            self.to_record, self.origin = None, rows.root
        # (records, 2): the index of a record's row, and its number there. None before `check`.
        self._keys: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._checked())

    def __getitem__(self, index: int) -> dict:
        row, number = map(int, self._checked()[index])
        return self._record(row, self._make(row, self.rows)[number])

    def where(self, index: int) -> str:
        """Where a record comes from, for messages, as `place` has it."""
        return self.place(self._checked()[index][0])

    @property
    def shards(self) -> ShardRows | None:
        """What the records are read from, where it is shards."""
        return self.rows if isinstance(self.rows, ShardRows) else None

    def places(self) -> np.ndarray:
        """(records,), of shards: where each lies among all that they hold."""
        return self.rows.order[self._checked()[:, 0]]

    def reading_order(self) -> Sequence[int]:
        """All indices, as it is quickest to read them: those of shards as they lie there."""
        return np.argsort(self.places()).tolist() if self.shards else range(len(self))

    def select(self, indices: Sequence[int]) -> "Records":
        """Some of the records, in this order."""
        chosen = copy.copy(self)
        chosen._keys = self._checked()[list(indices)]
        return chosen

    def check(self, skip_bad: bool = False) -> "Records":
        """
        Check every row: it becomes records with all fields, whose ids no other has, and whose image
        paths are files. What is in images is not looked at. The ranks share the work.

        Args:
            skip_bad: leave bad records out and print which, instead of an error for the first.

        Raises:
            DataError: the first bad record, or with `skip_bad`, that no good one is left.
        """
        bad = self.find_bad(first_alone=not skip_bad)
        good = 0 if self._keys is None else len(self._keys)
        report_bad(bad, good + len(bad), self.origin, skip_bad)
        return self

    def find_bad(self, first_alone: bool = False) -> list[DataError]:
        """What `check` finds, and the records are without from now on; or not all of it."""
        if self.shards:  # which were checked when they were written
            rows = np.arange(len(self.rows))
            self._keys = np.stack([rows, np.zeros_like(rows)], axis=1)
            return []
        is_dataset = isinstance(self.rows, datasets.Dataset)
        texts = Texts(self.rows) if is_dataset else self.rows
        checked = share_out(
            lambda row: self._check_row(row, texts),
            range(len(self.rows)),
            first_error=first_alone,
            # Hidden where the bars of `datasets` are.
            progress=functools.partial(
                tqdm, desc=f"checking {self.origin}", unit=self._word, delay=3
            ),
        )
        keys, bad, first = [], [], {}
        for row, ids in checked.items():
            for number, identifier in enumerate([ids] if isinstance(ids, DataError) else ids):
                if isinstance(identifier, DataError):
                    bad.append(identifier)
                elif identifier in first:
                    other = f"{self._word} {self._numbers[first[identifier]]}"
                    error = f"id {quoted(identifier)} is that of {other} too. Make ids unique."
                    bad.append(DataError(f"{self.place(row)}: {error}"))
                else:
                    first[identifier] = row
                    keys.append((row, number))
        if not (bad and first_alone):
            self._keys = np.array(keys, dtype=np.int64).reshape(-1, 2)
        return bad

    def read_row(self, row: int, rows: Sequence | None = None) -> list[dict | DataError]:
        """
        The records of a row, checked, but for whether their ids are unique; a bad one is its error.

        Args:
            rows: to read it from, if not the records' own; perhaps without images.
        """
        try:
            made = self._make(row, self.rows if rows is None else rows)
        except DataError as error:
            return [error]
        records: list[dict | DataError] = []
        for record in made:
            try:
                records.append(self._record(row, record))
            except DataError as error:
                records.append(error)
        return records

    def _check_row(self, row: int, texts: Sequence) -> list[str | DataError]:
        """
        The ids of a row's records; of several, a bad one is its error.

        Raises:
            DataError: the row, or its only record, is bad.
        """
        records = self.read_row(row, texts)
        if len(records) == 1 and isinstance(records[0], DataError):
            raise records[0]
        return [r if isinstance(r, DataError) else r["id"] for r in records]

    def _checked(self) -> np.ndarray:
        return self._keys if self._keys is not None else self.check()._keys

    def _make(self, row: int, rows: Sequence) -> list:
        """What `to_record` makes of a row, with ids, as a list."""
        content = None
        try:
            content = rows[row]
            if self.to_record is None:
                return [content]
            made = self.to_record(content)
            several = not isinstance(made, dict)
            records = []
            for number, record in enumerate(made if several else [made]):
                source = f"{record.get('source', 'row')}-{self._numbers[row]}"
                records.append({"id": f"{source}-{number}" if several else source, **record})
            if not records:
                raise DataError("no record comes of it. Remove it.")
            return records
        except Exception as error:  # `to_record` is the recipe's own code
            raise self._error(row, error, content) from _cause(error)

    def _record(self, row: int, record: object) -> dict:
        """A record of a row, checked, its images as full paths."""
        try:
            record = check_record(record)
            if self._folder:
                for number, turn in enumerate(record["conversations"]):
                    field = f"conversations[{number}].images"
                    turn["images"] = [self._folder.find(image, field) for image in turn["images"]]
            return record
        except Exception as error:
            raise self._error(row, error, record) from _cause(error)

    def place(self, row: int) -> str:
        """Where a row comes from, for messages: "file, line 3"."""
        place = f"{self._word} {self._numbers[row]}"
        return f"{self.origin}, {place}" if self.origin else place

    def _error(self, row: int, error: Exception, content: object) -> DataError:
        """A DataError with the place of a row; of an error of other kinds, with its content too."""
        if isinstance(error, DataError):
            return DataError(f"{self.place(row)}: {error}")
        reason = first_line(error)
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        return DataError(f"{self.place(row)}: {reason}. Correct it; it is {quoted(content)}.")


def _cause(error: Exception) -> Exception | None:
    """Where the recipe's code failed is worth a traceback; a message that is repeated is not."""
    return None if isinstance(error, DataError) else error


def report_bad(bad: Sequence[DataError], total: int, name: str, skip_bad: bool) -> None:
    """
    Say which of `total` samples are bad: with `skip_bad` in print, else as an error.

    Raises:
        DataError: the first bad one, or with `skip_bad`, that no good one is left. Or there are
            no samples.
    """
    if not total:
        raise DataError(f"{name}: there are no samples. Check where they come from.")
    if bad and not skip_bad:
        raise DataError(f"{bad[0]} {SKIP}")
    if len(bad) == total:
        raise DataError(f"{name}: all of the {total} samples are bad. {bad[0]}")
    if bad:
        shown = [f"  {error}" for error in bad[:SHOWN]]
        rest = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        counted = f"{name}: {len(bad)} of {total} samples are bad and left out:"
        print_first("\n".join([counted, *shown, *rest]))
