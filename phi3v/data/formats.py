"""
What datasets look like elsewhere, to records (see `records.py`). Their keys tell them apart:

    LLaVA                 {"id": "1", "image": "a.jpg", "conversations": [
                              {"from": "human", "value": "<image>\\nWhat is it?"},
                              {"from": "gpt", "value": "A cat."}]}
    Hugging Face, TRL     {"messages": [
                              {"role": "user", "content": [
                                  {"type": "image"}, {"type": "text", "text": "What is it?"}]},
                              {"role": "assistant", "content": "A cat."}], "images": ["a.jpg"]}
    ms-swift              {"messages": [{"role": "user", "content": "<image>What is it?"}, ...],
                           "images": ["a.jpg"]}
    the_cauldron          {"images": ["a.jpg"], "texts": [
                              {"user": "What is it?", "assistant": "A cat."}]}

Of the last one, each text is a record, with all images before it. In the others, an image stands
where `<image>` does; a part {"type": "image"} may also bring its own as "image", "path" or "url". A
conversation may begin with a system turn. Ids need not differ: a record's is `<id>-<line>`.

Where questions are asked for, the last answer of each may be absent, and this is one too:

    {"question": "What is it?", "image": "a.jpg", "id": "1"}

An id, where there is one, then is the record's: an answer is found by it.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ..errors import DataError, quoted
from .images import image_source
from .records import FIELDS, IMAGE, Records
from .rows import Lines, check_fields, check_type
from .shard_rows import open_shards

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
}


UNANSWERED = "?"  # stands for the answer of a record that has none


def load_records(
    path: str | Path,
    image_dir: str | Path | None,
    questions: bool = False,
    streaming: bool = False,
) -> Records:
    """
    The records of a jsonl file, or of a JSON list, in any of these formats. Images are paths in
    `image_dir`. Or those that `python -m phi3v.shards` wrote: a folder, or an id on the hub.

    Args:
        questions: see `to_record`.
        streaming: it has to be shards; those on the hub are read there.

    Raises:
        DataError: there is no such file, it cannot be read, or it is empty.
    """
    if (shards := open_shards(str(path), streaming=streaming)) is not None:
        return Records(shards)
    if streaming:
        raise DataError(f"--streaming: {path} is not what python -m phi3v.shards wrote.")
    if os.path.isdir(path):
        raise DataError(
            f"{path}: there is no such file. Check the path. It is a folder, which has no shards "
            "before python -m phi3v.shards has finished."
        )
    if image_dir is None:
        raise DataError(f"{path}: give --image_dir, the folder that its images' paths start from.")
    return Records(Lines(path), partial(to_record, questions=questions), image_dir=image_dir)


def to_record(row: object, questions: bool = False) -> dict | list[dict]:
    """
    A record of a row in one of these formats, or several; one that is a record stays as it is.

    Args:
        questions: the last answer may be absent, and is UNANSWERED then.

    Raises:
        DataError: a field is missing or of the wrong type, turns do not alternate, or there are not
            as many tags as images.
    """
    check_type(row, dict, "the record")
    if questions and "question" in row:
        return _question(row)
    if "texts" in row:
        return list(_texts(row))
    if "messages" in row:
        field, turns = "messages", check_type(row["messages"], list, "messages")
        role, content, images = "role", "content", row.get("images")
    else:
        turns = row.get("conversations")
        turns = turns if isinstance(turns, list) else []
        if not any(isinstance(turn, dict) and "from" in turn for turn in turns):
            check_fields(row, "the record", *FIELDS)
            if questions and turns and isinstance(turns[-1], dict):
                turns[-1].setdefault("assistant", UNANSWERED)
            return row
        field, role, content, images = "conversations", "from", "value", row.get("image")
    images = images if isinstance(images, list) else [] if images is None else [images]
    unused = map(image_source, images)
    spoken = list(_turns(turns, field, role, content, unused))
    if left := len(list(unused)):
        raise DataError(
            f"{field} has {len(images) - left} times {IMAGE} and the record {len(images)} images. "
            f"Write {IMAGE} where each one stands."
        )
    source = field if row.get("id") in (None, "") else str(row["id"])
    record = {"source": source, "conversations": []}
    if questions and source != field:
        record["id"] = source
    if spoken and spoken[0][0] == "system":
        record["system"] = spoken.pop(0)[1]
    for number, (speaker, _, _) in enumerate(spoken):
        wanted = ("user", "assistant")[number % 2]
        if speaker != wanted:
            place = f"{field}[{number + ('system' in record)}].{role}"
            raise DataError(f"{place} is {speaker}, where it is the {wanted}'s turn. Correct it.")
    if questions and len(spoken) % 2:
        spoken.append(("assistant", UNANSWERED, []))
    if len(spoken) % 2:
        raise DataError(f"{field} ends with a question. Write its answer.")
    for (_, user, shown), (_, assistant, _) in zip(spoken[::2], spoken[1::2], strict=True):
        turn = {"images": shown, "user": user, "assistant": assistant}
        record["conversations"].append(turn)
    return record


def _question(row: dict) -> dict:
    """A record of a question with its image, or a list of them."""
    check_fields(row, "the line", {"question"}, {"id", "image", "images", "answer", "answers"})
    images = row.get("images") or row.get("image") or []
    images = images if isinstance(images, list) else [images]
    turn = {"images": images, "user": row["question"], "assistant": UNANSWERED}
    named = {} if row.get("id") in (None, "") else {"id": str(row["id"])}
    return {**named, "source": "question", "conversations": [turn]}


def _texts(row: dict) -> Iterator[dict]:
    """A record for each of the texts of a row of the_cauldron."""
    check_fields(row, "the row", {"images", "texts"})
    for number, text in enumerate(check_type(row["texts"], list, "texts")):
        check_fields(text, f"texts[{number}]", {"user", "assistant"})
        turn = {"images": row["images"], "user": text["user"], "assistant": text["assistant"]}
        yield {"source": text.get("source") or "texts", "conversations": [turn]}


def _turns(
    turns: list, field: str, role: str, content: str, unused: Iterator
) -> Iterator[tuple[str, str, list]]:
    """Who speaks in each turn, what, and the images that it shows, taken from `unused`."""
    for number, turn in enumerate(turns):
        place = f"{field}[{number}]"
        check_fields(turn, place, {role, content})
        speaker = ROLES.get(check_type(turn[role], str, f"{place}.{role}"))
        if speaker is None:
            raise DataError(
                f"{place}.{role} is {quoted(turn[role])}. Known are {', '.join(sorted(ROLES))}."
            )
        place = f"{place}.{content}"
        said, own = check_type(turn[content], (str, list), place), []
        if isinstance(said, list):
            parts = [_part(part, f"{place}[{i}]", own) for i, part in enumerate(said)]
            said = "".join(parts)
        if speaker == "user":  # of others, it is text like any other
            tags = said.count(IMAGE)
            shown = own or [image for _, image in zip(range(tags), unused, strict=False)]
            if len(shown) != tags:
                raise DataError(f"{place} has {tags} times {IMAGE} and {len(shown)} images left.")
            yield speaker, said, shown
        else:
            if own or isinstance(turn[content], list) and IMAGE in said:
                raise DataError(f"{place} has an image, which a user alone may send.")
            yield speaker, said, []


def _part(part: object, place: str, own: list) -> str:
    """The text that stands for a part of a message. An image that comes with it goes to `own`."""
    check_fields(part, place, {"type"})
    if part["type"] == "text":
        check_fields(part, place, {"text"})
        return check_type(part["text"], str, f"{place}.text")
    if part["type"] != "image":
        raise DataError(f"{place}.type is {quoted(part['type'])}, and neither image nor text.")
    given = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
    own += map(image_source, given[:1])
    return f"{IMAGE}\n"  # as the processor's chat template has it
