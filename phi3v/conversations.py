"""
The record that every recipe turns its dataset into, and the jsonl that holds such records on disk.

    {"id": "val-0000000300", "source": "ucf101", "conversations": [
        {"images": ["val/a.0.jpg", "val/a.1.jpg"], "user": "...", "assistant": "..."}
    ]}

`conversations` is a list of turns; the images of a turn may be absent. In a jsonl, images are paths
relative to the image folder. In memory, an image is a path, the bytes of a file, a PIL image, or
what `datasets` makes of one of them.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
from PIL import Image

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

# In a text, these would be read as the structure of the prompt: a turn that nobody spoke, an image
# that nobody sent.
CONTROL_TOKEN = re.compile(
    r"<\|(?:image_\d+|image|user|assistant|system|end|endoftext|placeholder\d+)\|>"
)


class ConversationError(ValueError):
    """A record that is not what it has to be; the message says where and what to do."""


def load_conversations(path: str | Path, image_dir: str | Path) -> datasets.Dataset:
    """
    Read and check a jsonl file of conversations.

    Args:
        path: the jsonl file.
        image_dir: the folder that its image paths are relative to.

    Returns:
        A memory-mapped dataset with `FEATURES`, images as full paths, in the order of the file.

    Raises:
        ConversationError: the first line that is wrong: the file, the line, the field, and what is
            wrong with it.
    """
    path, image_dir = Path(path), Path(image_dir)
    if not path.is_file():
        raise ConversationError(f"{path}: there is no such file.")
    stat = path.stat()
    source = {
        "path": str(path.resolve()),
        "image_dir": str(image_dir.resolve()),
        # Size and time are part of the cache key: an edited file is read anew.
        "version": (stat.st_size, stat.st_mtime_ns),
    }
    # Checked in every run, because the cached dataset does not know that an image is gone.
    for _ in _read_jsonl(**source):
        pass
    return datasets.Dataset.from_generator(_read_jsonl, features=FEATURES, gen_kwargs=source)


def _read_jsonl(path: str, image_dir: str, version: tuple[int, int]) -> Iterator[dict]:
    seen: dict[str, str] = {}
    for where, record in read_json_lines(Path(path)):
        record = check_record(record, where)
        if (first := seen.setdefault(record["id"], where)) != where:
            line = first.rsplit(", ", 1)[-1]
            raise ConversationError(
                f"{where}: id {record['id']!r} is that of {line} too. Make ids unique."
            )
        for index, turn in enumerate(record["conversations"]):
            field = f"{where}: conversations[{index}].images"
            turn["images"] = [_image_path(image_dir, name, field) for name in turn["images"]]
        yield record


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """
    What each line of a json-lines file holds, and where it stands ("file, line 3").

    Raises:
        ConversationError: no such file, a line that is not UTF-8 or not JSON, or no lines.
    """
    if not path.is_file():
        raise ConversationError(f"{path}: there is no such file.")
    where = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                content = json.loads(line)
            except UnicodeDecodeError as error:
                message = f"{where}: not UTF-8 ({error}). Save it as UTF-8."
                raise ConversationError(message) from None
            except json.JSONDecodeError as error:
                message = f"{where}: not JSON ({error}). One record a line."
                raise ConversationError(message) from None
            yield where, content
    if where is None:
        raise ConversationError(f"{path}: the file has no records.")


def check_record(record: object, where: str) -> dict:
    """
    A record with all its fields, or an error that begins with `where`.

    Raises:
        ConversationError: a field is missing, unknown, of the wrong type or empty.
    """
    if not isinstance(record, dict):
        raise ConversationError(f"{where}: a record is an object, not {_kind(record)}.")
    _check_keys(record, {"id", "conversations"}, {"source"}, where)
    identifier = record["id"]
    if not isinstance(identifier, str) or not identifier:
        raise ConversationError(f"{where}: id must be a string, not {_kind(identifier)}.")
    source = record.get("source", "")
    if not isinstance(source, str):
        raise ConversationError(f"{where}: source must be a string, not {_kind(source)}.")
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ConversationError(f"{where}: conversations must be a list of at least one turn.")
    return {
        "id": identifier,
        "source": source,
        "conversations": [
            _check_turn(turn, f"{where}: conversations[{index}]")
            for index, turn in enumerate(turns)
        ],
    }


def _check_turn(turn: object, where: str) -> dict:
    if not isinstance(turn, dict):
        raise ConversationError(f"{where} must be an object, not {_kind(turn)}.")
    _check_keys(turn, {"user", "assistant"}, {"images"}, where)
    for field in ("user", "assistant"):
        text = turn[field]
        if not isinstance(text, str):
            raise ConversationError(f"{where}.{field} must be a string, not {_kind(text)}.")
        if found := CONTROL_TOKEN.search(text):
            raise ConversationError(
                f"{where}.{field} contains {found[0]!r}, which would be read as a control token. "
                "Remove it; images are listed in `images`."
            )
    if not turn["assistant"].strip():
        raise ConversationError(f"{where}.assistant is empty: there is nothing to learn.")
    images = turn.get("images")
    images = [] if images is None else images
    if not isinstance(images, list):
        raise ConversationError(f"{where}.images must be a list, not {_kind(images)}.")
    return {"images": images, "user": turn["user"], "assistant": turn["assistant"]}


def _check_keys(record: dict, required: set[str], optional: set[str], where: str) -> None:
    missing = sorted(required - record.keys())
    unknown = sorted(record.keys() - required - optional)
    if missing or unknown:
        problems = [f"missing: {', '.join(missing)}"] if missing else []
        problems += [f"unknown: {', '.join(map(str, unknown))}"] if unknown else []
        raise ConversationError(
            f"{where} has the wrong fields ({'; '.join(problems)}). Required: "
            f"{', '.join(sorted(required))}; optional: {', '.join(sorted(optional))}."
        )


def _image_path(image_dir: str, name: object, field: str) -> str:
    if not isinstance(name, str):
        raise ConversationError(f"{field} must hold paths, not {_kind(name)}.")
    folder = Path(image_dir)
    path = folder / name
    if not path.resolve().is_relative_to(folder):
        raise ConversationError(f"{field}: {name!r} leaves the image folder {image_dir}.")
    if not path.is_file():
        raise ConversationError(f"{field}: {name!r} is not a file in the image folder {image_dir}.")
    return str(path)


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


def load_images(record: dict) -> list[Image.Image]:
    """All images of a record, in order, decoded."""
    return [_open_image(image, record["id"], decode=True) for image in _images(record)]


def image_sizes(record: dict) -> list[tuple[int, int]]:
    """(width, height) of all images of a record, in order. Only their headers are read."""
    return [_open_image(image, record["id"], decode=False).size for image in _images(record)]


def _images(record: dict) -> list:
    return [image for turn in record["conversations"] for image in turn["images"]]


def _open_image(image: object, identifier: str, decode: bool) -> Image.Image:
    if isinstance(image, dict):  # an undecoded image of `datasets`
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Image.Image):
        return image
    try:
        opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        if decode:
            opened.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        name = "an image" if isinstance(image, bytes) else image
        raise ConversationError(f"sample {identifier!r}: cannot read {name}: {error}") from error
    return opened
