"""
The record that every recipe turns its dataset into, and the jsonl that holds such records on disk.

    {"id": "val-0000000300", "source": "ucf101", "conversations": [
        {"images": ["val/a.0.jpg", "val/a.1.jpg"], "user": "...", "assistant": "..."}
    ]}

`conversations` is a list of turns; the images of a turn may be absent. In a jsonl, images are paths
relative to the image folder. In memory, an image is a path, the bytes of a file, a PIL image, or
what `datasets` makes of one of them.

    python -m phi3v.conversations FILE --image_dir DIR

checks such a file and every image in it; see `check.py`.
"""

import functools
import os
import re
import shlex
import stat
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
from datasets.utils import tqdm
from PIL import Image

from .errors import ConversationError, find_bad, quoted, settle
from .image_processing_phi3_v import Phi3VImageProcessor
from .images import image_size, images_of, read_image
from .json_lines import parse_line, read_lines

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


class Origin(NamedTuple):
    """Where the records of a dataset come from, for messages about what is found later."""

    path: Path
    image_dir: Path
    lines: array  # of every record, in 4 bytes each

    def where(self, index: int) -> str:
        return f"{self.path}, line {self.lines[index]}"

    def command(self, num_crops: int) -> str:
        """What checks the whole file."""
        file, folder = shlex.quote(str(self.path)), shlex.quote(str(self.image_dir))
        return f"python -m phi3v.conversations {file} --image_dir {folder} --num_crops {num_crops}"


def load_conversations(
    path: str | Path, image_dir: str | Path, skip_bad: bool = False
) -> datasets.Dataset:
    """
    Read and check a jsonl file of conversations. Of images, it is checked that they are files.

    Args:
        path: the jsonl file.
        image_dir: the folder that its image paths are relative to.
        skip_bad: leave bad lines out and print which, instead of an error for the first.

    Returns:
        A memory-mapped dataset with `FEATURES`, images as full paths, in the order of the file. Its
        attribute `origin` is an [`Origin`].

    Raises:
        ConversationError: the first line that is wrong: the file, the line, the field, and what is
            wrong with it. Or the file as a whole is.
    """
    path, image_dir = Path(path), Path(image_dir)
    lines = array("I")

    def numbered() -> Iterator[tuple[int, tuple[int, bytes]]]:
        # The bar of `datasets` is hidden where all bars are, see `make_training_arguments`.
        for number, line in tqdm(read_lines(path), f"reading {path.name}", unit="line", delay=3):
            lines.append(number)
            yield number, (number, line)

    checker = LineChecker(path, image_dir)
    # Checked in every run, because the cached dataset does not know that an image is gone.
    bad = find_bad(numbered(), lambda numbered_line: checker.check(*numbered_line), skip_bad)
    settle(bad, len(lines), str(path), skip_bad)
    info = path.stat()
    try:
        records = datasets.Dataset.from_generator(
            _read_again,
            features=FEATURES,
            gen_kwargs={
                "path": str(path.resolve()),
                "image_dir": os.path.realpath(image_dir),
                # Size and time are part of the cache key: an edited file is read anew.
                "version": (info.st_size, info.st_mtime_ns),
                "bad": tuple(bad),
            },
        )
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise ConversationError(
            f"{path}: cannot write its cache to {datasets.config.HF_DATASETS_CACHE} "
            f"({error.__cause__ or error}). Set HF_DATASETS_CACHE to a folder with room."
        ) from error
    records.origin = Origin(path, image_dir, array("I", (n for n in lines if n not in bad)))
    return records


def _read_again(
    path: str, image_dir: str, version: tuple[int, int], bad: tuple[int, ...]
) -> Iterator[dict]:
    """The records of a file whose lines have been checked."""
    bad = set(bad)
    for number, line in read_lines(Path(path)):
        if number not in bad:
            record = check_record(parse_line(line, path), path)
            for turn in record["conversations"]:
                turn["images"] = [os.path.join(image_dir, name) for name in turn["images"]]
            yield record


class LineChecker:
    """Checks the lines of a jsonl file, one after the other."""

    def __init__(self, path: Path, image_dir: Path):
        self.path = path
        self.folder = ImageFolder(image_dir)
        self.first_line: dict[str, int] = {}

    def check(self, number: int, line: bytes) -> dict:
        """
        The record of line `number`, its images as full paths.

        Raises:
            ConversationError: what is wrong with it; see `parse_line`, `check_record`,
                `ImageFolder`. Or an earlier line has its id.
        """
        where = f"{self.path}, line {number}"
        record = check_record(parse_line(line, where), where)
        for index, turn in enumerate(record["conversations"]):
            turn["images"] = [
                self.folder.find(name, f"{where}: conversations[{index}].images")
                for name in turn["images"]
            ]
        if (first := self.first_line.setdefault(record["id"], number)) != number:
            raise ConversationError(
                f"{where}: id {quoted(record['id'])} is that of line {first} too. Make ids unique."
            )
        return record


class ImageFolder:
    """
    A folder that image paths are relative to and may not leave, not by a link either.

    Args:
        folder: need not exist as long as no image is asked for.
    """

    def __init__(self, folder: str | Path):
        self.folder = os.path.realpath(folder)
        # Images share their folders, so these are not resolved for every image.
        self._is_inside = functools.lru_cache(10_000)(self._resolves_inside)

    def find(self, name: object, field: str) -> str:
        """
        The full path of the image `name`.

        Raises:
            ConversationError: it is not the path of a file in the folder. The message begins with
                `field`.
        """
        if not isinstance(name, str):
            raise ConversationError(f"{field} must hold paths, not {_kind(name)}.")
        path = os.path.join(self.folder, name)
        try:
            name.encode()
            inside = self._is_inside(os.path.dirname(path))
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
            elif not stat.S_ISREG(info.st_mode):
                kind = "a folder" if stat.S_ISDIR(info.st_mode) else "not a regular file"
                problem = f"is {kind}. Give the path of an image"
            elif info.st_size == 0:
                problem = "is empty (0 bytes). Replace the image or remove the sample"
            else:
                return path
        raise ConversationError(f"{field}: {quoted(name)} {problem}.")

    def _resolves_inside(self, path: str) -> bool:
        return f"{os.path.realpath(path)}{os.sep}".startswith(os.path.join(self.folder, ""))


def check_record(record: object, where: str) -> dict:
    """
    A record with all its fields, or an error that begins with `where`.

    Raises:
        ConversationError: a field is missing, unknown, of the wrong type or empty.
    """
    if not isinstance(record, dict):
        raise ConversationError(
            f"{where}: a record is an object, not {_kind(record)}. Write "
            '{"id": ..., "conversations": [...]}.'
        )
    _check_keys(record, {"id", "conversations"}, {"source"}, where)
    identifier = _check_text(record["id"], f"{where}: id")
    if not identifier:
        raise ConversationError(f"{where}: id is empty. Give every record an id of its own.")
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ConversationError(
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
        raise ConversationError(
            f"{where} must be an object, not {_kind(turn)}. Write "
            '{"user": ..., "assistant": ...}.'
        )
    _check_keys(turn, {"user", "assistant"}, {"images"}, where)
    for field in ("user", "assistant"):
        text = _check_text(turn[field], f"{where}.{field}")
        if found := CONTROL_TOKEN.search(text):
            raise ConversationError(
                f"{where}.{field} contains {found[0]!r}, which would be read as a control token. "
                "Remove it; images are listed in `images`."
            )
    if not turn["assistant"].strip():
        raise ConversationError(
            f"{where}.assistant is empty: there is nothing to learn. "
            "Write an answer or remove the turn."
        )
    images = turn.get("images")
    images = [] if images is None else images
    if not isinstance(images, list):
        raise ConversationError(f"{where}.images must be a list, not {_kind(images)}. Write [...].")
    return {"images": images, "user": turn["user"], "assistant": turn["assistant"]}


def _check_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise ConversationError(f"{where} must be a string, not {_kind(text)}. Write it in quotes.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
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
        raise ConversationError(
            f"{where} has the wrong fields ({'; '.join(problems)}). Required: "
            f"{', '.join(sorted(required))}; optional: {', '.join(sorted(optional))}."
        )


def _kind(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "a string", bool: "a bool"}
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else str(type(value))
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
        ConversationError: an image cannot be read, or does not fit the HD transform of
            `image_processor`; with the sample's id and the image's path.
    """
    where = f"sample {quoted(record['id'])}"
    return [read_image(image, where, image_processor) for _, image in images_of(record)]


def image_sizes(record: dict) -> list[tuple[int, int]]:
    """
    (width, height) of all images of a record, in order. Only their headers are read.

    Raises:
        ConversationError: an image cannot be read; with the sample's id and the image's path.
    """
    where = f"sample {quoted(record['id'])}"
    return [image_size(image, where) for _, image in images_of(record)]


if __name__ == "__main__":
    from .check import main

    sys.exit(main())
