"""
The record that every recipe turns its dataset into, and the jsonl that holds such records on disk.

    {"id": "val-0000000300", "source": "ucf101", "conversations": [
        {"images": ["val/a.0.jpg", "val/a.1.jpg"], "user": "...", "assistant": "..."}
    ]}

`conversations` is a list of turns; the images of a turn may be absent. In a jsonl, images are paths
relative to the image folder. In memory, an image is a path, the bytes of a file, a PIL image, or
what `datasets` makes of one of them.

    python -m phi3v.check FILE --image_dir DIR

checks such a file and every image in it; see `check.py`.
"""

import functools
import math
import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
from datasets.utils import tqdm
from PIL import Image

from ..errors import DataError, quoted
from ..model.image_processing_phi3_v import Phi3VImageProcessor
from .bad_samples import SKIP, UniqueIds, find_bad, no_file, on_all_ranks, settle
from .images import MAX_CHECKED, image_size, images_of, read_image
from .json_lines import kind, parse_line, read_lines

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "conversations": [
            {
                "images": [datasets.Value("string")],
                "user": datasets.Value("string"),
                "assistant": datasets.Value("string"),
            }
        ],
    }
)

# All that the tokenizer and the processor take out of a text as one token. There, it would be read
# as the structure of the prompt: a turn that nobody spoke, an image that nobody sent.
CONTROL_TOKEN = re.compile(
    r"<\|(?:image_\d+|image|user|assistant|system|end|endoftext|placeholder\d+)\|>"
    r"|<s>|</s>|<unk>"
)


# Part of the cache's key: with another number, files that passed earlier checks are read anew.
CHECKS = 1


class Origin(NamedTuple):
    """Where the records of a dataset come from, for messages about what is found later."""

    path: Path
    image_dir: Path
    stored: datasets.Dataset  # with the number of every record's line

    def where(self, index: int) -> str:
        return f"{self.path}, line {self.stored[index]['line']}"

    def command(self, num_crops: int) -> str:
        """What checks the whole file."""
        file, folder = shlex.quote(str(self.path)), shlex.quote(str(self.image_dir))
        return f"python -m phi3v.check {file} --image_dir {folder} --num_crops {num_crops}"


def load_conversations(
    path: str | Path, image_dir: str | Path, skip_bad: bool = False
) -> datasets.Dataset:
    """
    Read and check a jsonl file of conversations. Of images, it is checked that they are files.

    The checked records are kept in the cache of `datasets`, so that only the first run on a file
    reads it. Images may go at any time: later runs look for them again, for 20,000 in even steps
    where there are more records.

    Args:
        path: the jsonl file.
        image_dir: the folder that its image paths are relative to.
        skip_bad: leave bad lines out and print which, instead of an error for the first. The whole
            file is then checked in every run.

    Returns:
        A memory-mapped dataset with `FEATURES`, images as full paths, in the order of the file. Its
        attribute `origin` is an [`Origin`].

    Raises:
        DataError: the first line that is wrong: the file, the line, the field, and what is
            wrong with it. Or the file as a whole is.
    """
    path, image_dir = Path(path), Path(image_dir)
    bad = _bad_lines(path, image_dir) if skip_bad else {}

    def load() -> datasets.Dataset:
        stored = _stored_records(path, image_dir, bad)
        if not skip_bad:  # else `_bad_lines` has just looked for every image
            _look_for_images(stored, path, image_dir)
        return stored

    stored = on_all_ranks(load)
    records = stored.remove_columns("line")
    records.origin = Origin(path, image_dir, stored.select_columns("line"))
    return records


def _bad_lines(path: Path, image_dir: Path) -> dict[int, str]:
    """The lines that are wrong, printed, with what is wrong with them."""
    checker, total = LineChecker(path, image_dir), 0

    def numbered() -> Iterator[tuple[int, tuple[int, bytes]]]:
        nonlocal total
        # The bar of `datasets` is hidden where all bars are, see `make_training_arguments`.
        for number, line in tqdm(read_lines(path), f"reading {path.name}", unit="line", delay=3):
            total += 1
            yield number, (number, line)

    bad = find_bad(numbered(), lambda numbered_line: checker.check(*numbered_line), True)
    settle(bad, total, str(path), skip_bad=True)
    return bad


def _stored_records(path: Path, image_dir: Path, bad: Iterable[int]) -> datasets.Dataset:
    """All but the `bad` lines, checked, from the cache or for it, with the numbers of the lines."""
    next(read_lines(path))  # what is wrong with the file as a whole
    info = path.stat()
    try:
        return datasets.Dataset.from_generator(
            _checked_records,
            features=datasets.Features({**FEATURES, "line": datasets.Value("int64")}),
            gen_kwargs={
                "path": str(path),
                "image_dir": os.path.realpath(image_dir),
                # Where the path leads, size and time are part of the cache key: an edited file is
                # read anew.
                "version": (CHECKS, str(path.resolve()), info.st_size, info.st_mtime_ns),
                "bad": tuple(bad),
            },
        )
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise DataError(
            f"{path}: cannot write its cache to {datasets.config.HF_DATASETS_CACHE} "
            f"({error.__cause__ or error}). Set HF_DATASETS_CACHE to a folder with room."
        ) from error


def _checked_records(
    path: str, image_dir: str, version: tuple[int, str, int, int], bad: tuple[int, ...]
) -> Iterator[dict]:
    """What `datasets` stores; `version` is for its cache's key alone."""
    checker, bad = LineChecker(Path(path), Path(image_dir)), set(bad)
    for number, line in read_lines(Path(path)):
        if number not in bad:
            try:
                yield {**checker.check(number, line), "line": number}
            except DataError as error:
                raise DataError(f"{error} {SKIP}") from None


def _look_for_images(stored: datasets.Dataset, path: Path, image_dir: Path) -> None:
    """Raise DataError for the first image that is gone since its record was stored."""
    folder = ImageFolder(image_dir)
    step = math.ceil(len(stored) / MAX_CHECKED)
    some = stored.select(range(0, len(stored), step)) if step > 1 else stored
    try:
        for records in some.iter(batch_size=1000):
            for line, turns in zip(records["line"], records["conversations"], strict=True):
                folder.find_all(turns, f"{path}, line {line}")
    except DataError as error:
        raise DataError(f"{error} {SKIP}") from None


class LineChecker:
    """Checks the lines of a jsonl file, one after the other."""

    def __init__(self, path: Path, image_dir: Path):
        self.path = path
        self.folder = ImageFolder(image_dir)
        self.ids = UniqueIds("line")

    def check(self, number: int, line: bytes) -> dict:
        """
        The record of line `number`, its images as full paths.

        Raises:
            DataError: what is wrong with it; see `parse_line`, `check_record`,
                `ImageFolder`. Or an earlier line has its id.
        """
        where = f"{self.path}, line {number}"
        record = check_record(parse_line(line, where), where)
        turns = record["conversations"]
        for turn, paths in zip(turns, self.folder.find_all(turns, where), strict=True):
            turn["images"] = paths
        self.ids.add(record["id"], number, where)
        return record


class ImageFolder:
    """
    A folder that image paths are relative to and may not leave, not by a link either.

    Args:
        folder: need not exist as long as no image is asked for.
    """

    def __init__(self, folder: str | Path):
        self.folder = os.path.realpath(folder)
        self._prefix = os.path.join(self.folder, "")
        # Images share their folders, so these are not resolved for every image.
        self._is_inside = functools.lru_cache(10_000)(self._resolves_inside)

    def find_all(self, turns: Sequence[dict], where: str) -> list[list[str]]:
        """
        The full paths of the images of every turn of a conversation.

        Raises:
            DataError: as `find`, beginning with `where` and the number of the turn.
        """
        return [
            [self.find(name, f"{where}: conversations[{index}].images") for name in turn["images"]]
            for index, turn in enumerate(turns)
        ]

    def find(self, name: object, field: str) -> str:
        """
        The full path of the image `name`.

        Raises:
            DataError: it is not the path of a file in the folder. The message begins with
                `field`.
        """
        if not isinstance(name, str):
            raise DataError(f"{field} must hold paths, not {kind(name)}.")
        # Plain operations on strings: a dataset may have millions of names.
        path = name if name.startswith("/") else self._prefix + name
        try:
            name.encode()
            inside = self._is_inside(path.rpartition("/")[0] or "/")
            info = os.lstat(path) if inside else None
            if inside and stat.S_ISLNK(info.st_mode):
                inside, info = self._resolves_inside(path), os.stat(path)
        except ValueError:
            problem = "cannot be the name of a file. Remove what is no text"
        except (FileNotFoundError, NotADirectoryError):
            problem = f"is not a file in the image folder {self.folder}"
            if not os.path.isdir(self.folder):
                problem += ", which is no folder"
            problem += ". Paths are relative to that folder: check both"
        except OSError as error:
            problem = f"cannot be read: {error.strerror}. Check the path"
        else:
            if not inside:
                problem = f"leaves the image folder {self.folder}. Move the image into it"
            elif found := no_file(info.st_mode):
                problem = f"is {found}. Give the path of an image"
            elif info.st_size == 0:
                problem = "is empty (0 bytes). Replace the image or remove the sample"
            else:
                return path
        raise DataError(f"{field}: {quoted(name.removeprefix(self._prefix))} {problem}.")

    def _resolves_inside(self, path: str) -> bool:
        return os.path.join(os.path.realpath(path), "").startswith(self._prefix)


def check_record(record: object, where: str) -> dict:
    """
    A record with all its fields, or an error that begins with `where`.

    Raises:
        DataError: a field is missing, unknown, of the wrong type or empty.
    """
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a record is an object, not {kind(record)}. Write "
            '{"id": ..., "conversations": [...]}.'
        )
    _check_keys(record, {"id", "conversations"}, {"source"}, where)
    identifier = _check_text(record["id"], f"{where}: id")
    if not identifier:
        raise DataError(f"{where}: id is empty. Give every record an id of its own.")
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: conversations must be a list of at least one turn. Write "
            '[{"user": ..., "assistant": ...}].'
        )
    return {
        "id": identifier,
        "source": _check_text(record.get("source", ""), f"{where}: source"),
        "conversations": [
            _check_turn(turn, f"{where}: conversations[{index}]")
            for index, turn in enumerate(turns)
        ],
    }


def _check_turn(turn: object, where: str) -> dict:
    if not isinstance(turn, dict):
        raise DataError(
            f'{where} must be an object, not {kind(turn)}. Write {{"user": ..., "assistant": ...}}.'
        )
    _check_keys(turn, {"user", "assistant"}, {"images"}, where)
    for field in ("user", "assistant"):
        text = _check_text(turn[field], f"{where}.{field}")
        if found := CONTROL_TOKEN.search(text):
            raise DataError(
                f"{where}.{field} contains {found[0]!r}, which would be read as a control token. "
                "Remove it; images are listed in `images`."
            )
    if not turn["assistant"].strip():
        raise DataError(
            f"{where}.assistant is empty: there is nothing to learn. "
            "Write an answer or remove the turn."
        )
    images = turn.get("images")
    images = [] if images is None else images
    if not isinstance(images, list):
        raise DataError(f"{where}.images must be a list, not {kind(images)}. Write [...].")
    return {"images": images, "user": turn["user"], "assistant": turn["assistant"]}


def _check_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where} must be a string, not {kind(text)}. Write it in quotes.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half a surrogate pair, {text[error.start]!r}, which is no character. "
            "Remove it or write the whole pair."
        ) from None
    return text


def _check_keys(record: dict, required: set[str], optional: set[str], where: str) -> None:
    missing = sorted(required - record.keys())
    unknown = sorted(record.keys() - required - optional)
    if missing or unknown:
        problems = [f"missing: {', '.join(missing)}"] if missing else []
        shown = [key if key.isidentifier() and len(key) < 40 else quoted(key) for key in unknown]
        problems += [f"unknown: {', '.join(shown[:5])}"] if unknown else []
        raise DataError(
            f"{where} has the wrong fields ({'; '.join(problems)}). Required: "
            f"{', '.join(sorted(required))}; optional: {', '.join(sorted(optional))}."
        )


def to_messages(record: dict) -> list[dict[str, str]]:
    """
    The chat messages of a record, image tags included.

    Images are numbered through the whole conversation. A turn's tags come first, then a newline,
    then the user's text; a turn without images is its text alone.
    """
    messages, number = [], 0
    for turn in record["conversations"]:
        tags = "".join(f"<|image_{number + i + 1}|>" for i in range(len(turn["images"])))
        number += len(turn["images"])
        messages.append(
            {"role": "user", "content": f"{tags}\n{turn['user']}" if tags else turn["user"]}
        )
        messages.append({"role": "assistant", "content": turn["assistant"]})
    return messages


def load_images(
    record: dict, image_processor: Phi3VImageProcessor | None = None
) -> list[Image.Image]:
    """
    All images of a record, in order, decoded.

    Raises:
        DataError: an image cannot be read, or does not fit the HD transform of
            `image_processor`; with the sample's id and the image's path.
    """
    where = f"sample {quoted(record['id'])}"
    return [read_image(image, where, image_processor) for _, image in images_of(record)]


def image_sizes(record: dict) -> list[tuple[int, int]]:
    """
    (width, height) of all images of a record, in order. Only their headers are read.

    Raises:
        DataError: an image cannot be read; with the sample's id and the image's path.
    """
    where = f"sample {quoted(record['id'])}"
    return [image_size(image, where) for _, image in images_of(record)]
