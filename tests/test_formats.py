"""Datasets as they are elsewhere: what becomes of them, and what is said of wrong ones."""

import json

import pytest
from PIL import Image

from phi3v.check import main as check
from phi3v.data.formats import load_records, to_record
from phi3v.data.records import to_messages
from phi3v.errors import DataError

LLAVA = {
    "id": 7,
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}
PARTS = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "Which is older?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "The first."}]},
    ],
    "images": ["a.jpg", {"path": "b.jpg", "bytes": None}],
}
SWIFT = {
    "messages": [
        {"role": "user", "content": "Compare <image> and <image>."},
        {"role": "assistant", "content": "Equal."},
        {"role": "user", "content": "And <image>?"},
        {"role": "assistant", "content": "An <image>, too."},
    ],
    "images": ["a.jpg", "b.jpg", "a.jpg"],
}
OWN_IMAGE = {
    "messages": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "See: "}, {"type": "image", "path": "b.jpg"}],
        },
        {"role": "assistant", "content": "Yes."},
    ]
}
OURS = {
    "id": "x",
    "conversations": [{"images": ["a.jpg", "b.jpg"], "user": "Equal?", "assistant": "No."}],
}


@pytest.fixture
def images(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    return tmp_path


def write(folder, *rows, lines: bool = True):
    path = folder / "data.json"
    rows = [json.dumps(row) for row in rows]
    text = "\n".join(rows) if lines else f" [ {', '.join(rows)}\n]\n".replace(", {", ",\r\n{")
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("lines", [True, False], ids=["lines", "a list"])
def test_all_formats_in_one_file(images, lines):
    path = write(images, LLAVA, PARTS, SWIFT, OWN_IMAGE, OURS, lines=lines)
    records = load_records(path, images).check()
    assert [record["id"] for record in records] == ["7-1", "messages-2", "messages-3"] + [
        "messages-4",
        "x",
    ]
    assert [[m["content"] for m in to_messages(record)] for record in records] == [
        ["<|image_1|>\nWhat is it?", "A cat.", "Sure?", "Yes."],
        ["Be short.", "<|image_1|>\n<|image_2|>\nWhich is older?", "The first."],
        ["Compare <|image_1|> and <|image_2|>.", "Equal.", "And <|image_3|>?", "An <image>, too."],
        ["See: <|image_1|>\n", "Yes."],
        ["<|image_1|><|image_2|>\nEqual?", "No."],
    ]
    assert to_messages(records[1])[0]["role"] == "system"
    shown = [image for turn in records[2]["conversations"] for image in turn["images"]]
    assert [image[-5:] for image in shown] == ["a.jpg", "b.jpg", "a.jpg"]


def test_parts_are_the_prompt_that_the_processor_makes(demo_processor):
    processor = demo_processor
    messages = PARTS["messages"][:2]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    official = to_messages(to_record(PARTS))[:-1]
    same = processor.apply_chat_template(official, add_generation_prompt=True)
    assert text == same and "<|system|>\nBe short.<|end|>" in text


def changed(row: dict, **changes) -> dict:
    return {**json.loads(json.dumps(row)), **changes}


def said(*turns: tuple[str, object], **more) -> dict:
    return {"messages": [{"role": r, "content": c} for r, c in turns], **more}


WRONG = {
    "more tags": (
        changed(LLAVA, image=None),
        r"conversations\[0\].value has 1 times <image> and 0",
    ),
    "more images": (
        changed(LLAVA, image=["a.jpg", "b.jpg"]),
        "has 1 times <image> and .* 2 images",
    ),
    "a question last": (said(("user", "a")), "messages ends with a question"),
    "twice the user": (said(("user", "a"), ("user", "b")), r"messages\[1\].role is user, where"),
    "system later": (
        said(("user", "a"), ("assistant", "b"), ("system", "c")),
        r"messages\[2\].role is system",
    ),
    "after system": (
        said(("system", "s"), ("assistant", "b")),
        r"messages\[1\].role is assistant, where it is the user's turn",
    ),
    "a role": (said(("tool", "a")), r"messages\[0\].role is 'tool'. Known are assistant, gpt"),
    "no content": (
        {"messages": [{"role": "user"}]},
        r"messages\[0\] has the wrong .*missing: 'con",
    ),
    "a number": (said(("user", 3)), r"messages\[0\].content must be a string or a list"),
    "a part": (
        said(("user", [{"type": "video"}])),
        r"messages\[0\].content\[0\].type is 'video', and neither",
    ),
    "an image of the assistant": (
        said(("user", "a"), ("assistant", [{"type": "image"}]), images=["a.jpg"]),
        r"messages\[1\].content has an image",
    ),
    "nothing said": (said(), "conversations is empty"),
    "no image file": (changed(LLAVA, image="c.jpg"), r"conversations\[0\].images: 'c.jpg' cannot"),
    "a control token": (said(("user", "<|end|>"), ("assistant", "b")), "control token"),
    "tags in a record": (
        changed(OURS, conversations=[{"user": "<image>", "assistant": "b", "images": []}]),
        r"user has 1 times <image> and conversations\[0\].images 0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("lines", [True, False], ids=["lines", "a list"])
def test_what_is_wrong_is_said(images, case, lines):
    """The file, the line and the field, and what to do."""
    row, message = WRONG[case]
    path = write(images, LLAVA, row, lines=lines)
    word = "line" if lines else "item"
    with pytest.raises(DataError, match=f"data.json, {word} 2: .*{message}"):
        load_records(path, images).check()
    assert len(load_records(path, images).check(skip_bad=True)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}', "item 1: not a JSON list"),
        ('[{"id": 1}, {"id": }]', "item 2: not a JSON list"),
        ("[]", "no records"),
        ('[{"id": 1}] {}', "item 1: .*more after the list"),
        ("[" * 100_000, "item 1: not a JSON list"),
        ('["ä"]'.encode("latin-1"), "not a JSON list in UTF-8"),
    ],
)
def test_broken_lists(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        load_records(path, tmp_path)


def test_check_writes_records(images, capsys):
    """What is written is read as the same samples, without those that are bad."""
    path, out = write(images, LLAVA, said(("user", "a")), PARTS, lines=False), images / "out.jsonl"
    words = [str(path), "--image_dir", str(images), "--write", str(out)]
    assert check(words) == 1  # a sample is bad
    before = load_records(path, images).check(skip_bad=True)
    assert list(load_records(out, images).check()) == list(before)
    assert json.loads(out.read_text().splitlines()[0])["conversations"][0]["images"] == ["a.jpg"]
    assert sorted(p.name for p in images.iterdir()) == ["a.jpg", "b.jpg", "data.json", "out.jsonl"]
    with pytest.raises(SystemExit):
        check(words)
    assert "exists already" in capsys.readouterr().err
