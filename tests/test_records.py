"""Rows and jsonl files to records, and records to chat messages."""

import json
import pickle

import datasets
import pytest
from PIL import Image

from phi3v.data.formats import load_records
from phi3v.data.images import load_images
from phi3v.data.records import Records, check_record, to_messages
from phi3v.data.rows import Lines
from phi3v.data.sources import load_rows
from phi3v.errors import DataError

TURN = {"user": "a", "assistant": "b"}


def good(**changes) -> dict:
    return {"id": "x-0", "source": "test", "conversations": [TURN], **changes}


def write(tmp_path, *records: str | dict):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(line) if isinstance(line, dict) else line for line in records]
    path.write_text("\n".join(lines))
    return path


def test_reads_every_record_in_order(tmp_path):
    """Several turns, images in any turn or none; source and images may be absent; blank lines."""
    (tmp_path / "val").mkdir()
    for name in ("val/a.jpg", "val/b.png"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / name)
    turns = [
        {"user": "Hello", "assistant": "Hi"},
        {"images": ["val/b.png", "val/a.jpg"], "user": "And here?", "assistant": "Red"},
        {"images": [], "user": "Sure?", "assistant": "Yes é"},
    ]
    path = write(tmp_path, good(), "", {"id": "x-1", "conversations": turns, "answers": ["a", "b"]})
    records = pickle.loads(pickle.dumps(load_records(path, tmp_path)))
    first, second = records
    assert first == good(conversations=[{**TURN, "images": []}])
    assert second["source"] == "" and second["answers"] == ["a", "b"]
    assert [turn["images"] for turn in second["conversations"]] == [
        [],
        [str(tmp_path / "val/b.png"), str(tmp_path / "val/a.jpg")],
        [],
    ]
    assert second["conversations"][2]["assistant"] == "Yes é"
    assert records.where(1) == f"{path}, line 3"
    assert records.select([1])[0] == second and records.select([1]).where(0) == records.where(1)


def test_an_edited_file_is_noticed(tmp_path):
    """Where a line stood, another may stand now."""
    path = write(tmp_path, good(), good(id="x-1"))
    records = load_records(path, tmp_path)
    assert len(records) == 2
    write(tmp_path, good(id="another"), good(id="x-1"))
    with pytest.raises(DataError, match="line 2: the file has changed since the start"):
        records[1]


def rows(count: int) -> datasets.Dataset:
    columns = {"text": [str(i) for i in range(count)], "image": [b"x"] * count}
    return datasets.Dataset.from_dict(columns)


def test_one_row_one_record_or_several():
    """A function makes them; ids are given where it gives none; rows are counted in their order."""

    def to_record(row: dict) -> dict:
        return {"conversations": [{**TURN, "user": row["text"], "images": [row["image"]]}]}

    def to_records(row: dict) -> list[dict]:
        return [{"source": "s", "conversations": [TURN]} for _ in range(int(row["text"]))]

    records = Records(rows(3), to_record)
    assert [record["id"] for record in records] == ["row-0", "row-1", "row-2"]
    assert records[2]["conversations"] == [{**TURN, "user": "2", "images": [b"x"]}]
    records = Records(rows(4).select([2, 1]), to_records)
    assert [record["id"] for record in records] == ["s-0-0", "s-0-1", "s-1-0"]
    assert [record["id"] for record in Records([good()], lambda row: row)] == ["x-0"]


def test_images_of_rows_are_not_read_for_the_check(monkeypatch):
    """They are many bytes. How many a row has is known all the same, and what is null."""
    seen = []

    def to_record(row: dict) -> dict:
        seen.append(row)
        return {"conversations": [TURN]}

    one, some = {"bytes": b"secret", "path": None}, datasets.Image(decode=False)
    features = datasets.Features(a=some, b=datasets.List(some), c=datasets.Value("string"))
    columns = {"a": [one, None], "b": [[one, one], None], "c": ["x", "y"]}
    data = datasets.Dataset.from_dict(columns, features=features)
    assert len(Records(data, to_record)) == 2
    assert str(seen) == (
        "[{'c': 'x', 'a': <image>, 'b': [<image>, <image>]}, {'c': 'y', 'a': None, 'b': None}]"
    )
    assert Records(data, to_record)[0] and seen[-1] == {"a": one, "b": [one, one], "c": "x"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda row: {"conversations": [{**TURN, "user": row["txt"]}]}, "KeyError: 'txt'"),
        (lambda row: {"conversations": [{**TURN, "user": row["text"] + 1}]}, "TypeError: can only"),
        (lambda row: {}, "missing: 'conversations'"),
        (lambda row: None, "TypeError: 'NoneType' object is not iterable"),
        (lambda row: [], "no record comes of it"),
        (lambda row: good(id="same"), "id 'same' is that of row 4 too"),
        (lambda row: good(answers=["a", " "]), r"answers\[1\] is empty"),
        (lambda row: good(answers=["<|end|>"]), r"answers\[0\] contains '<\|end\|>'"),
    ],
)
def test_what_goes_wrong_in_to_record(wrong, message):
    """Any error names the origin and the row, and shows what the row is."""
    data = rows(9)
    data.info.dataset_name = "my/data"
    records = Records(data.add_column("__row__", range(9)).select([4, 7]), wrong)
    with pytest.raises(DataError, match=f"^my/data, row [47]: .*{message}") as caught:
        records.check()
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=message):  # and not some of them in silence
        len(records)


def test_bad_records_of_a_row_leave_the_others(capsys):
    """Only what is bad is left out."""

    def to_records(row: dict) -> list[dict]:
        return [
            {"source": "s", "conversations": [{**TURN, "assistant": answer}]}
            for answer in row["answers"]
        ]

    data = [{"answers": ["a", "", "c"]}, {"answers": []}, {"answers": ["", ""]}]
    records = Records(data, to_records, "mine").check(skip_bad=True)
    assert [record["id"] for record in records] == ["s-0-0", "s-0-2"]
    assert "mine: 4 of 6 samples are bad and left out:\n  mine, row 0: " in capsys.readouterr().out


def test_lines_with_columns(tmp_path):
    """Of other files of json lines: every field is there, and of its type."""
    columns = {"id": (int, str), "label": int, "more": object}
    lines = Lines(write(tmp_path, {"id": 1, "label": 0, "more": None, "other": 3}, "[1]"), columns)
    assert lines[0]["other"] == load_rows(lines.path)[0]["other"] == 3
    bad = {
        '{"id": 1}': "wrong fields .missing: 'label', 'more'.. Required: id, label, more",
        '{"id": 1.5, "label": 1, "more": 1}': "id must be a number or a string",
        '{"id": 1, "label": null, "more": 1}': "label must be a number, not null",
        "1": "the line must be an object, not a number",
    }
    for line, message in bad.items():
        with pytest.raises(DataError, match=message):
            Lines(write(tmp_path, line), columns)[0]


def test_images_are_numbered_through_the_conversation():
    """Tags go on counting from turn to turn; a turn without images has no tag and no newline."""
    turns = [
        {"images": ["a", "b"], "user": "one", "assistant": "1"},
        {"images": [], "user": "two", "assistant": "2"},
        {"images": ["c"], "user": "three", "assistant": "3"},
    ]
    assert [message["content"] for message in to_messages({"id": "x", "conversations": turns})] == [
        "<|image_1|><|image_2|>\none",
        "1",
        "two",
        "2",
        "<|image_3|>\nthree",
        "3",
    ]


def test_images_come_as_paths_bytes_or_pil(tmp_path):
    """What a recipe's dataset holds for an image does not matter."""
    path = tmp_path / "b.png"
    Image.new("RGB", (8, 6), "red").save(path)
    kinds = [str(path), path.read_bytes(), Image.open(path), {"bytes": None, "path": str(path)}]
    images = load_images(check_record(good(conversations=[{**TURN, "images": kinds}])))
    assert [image.tobytes() for image in images] == [images[0].tobytes()] * 4
