"""Reading and checking jsonl datasets."""

import json

import pytest
from phi3v.data.conversations import (
    FEATURES,
    DataError,
    check_record,
    load_conversations,
    load_images,
    to_messages,
)
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def image_dir(tmp_path):
    folder = tmp_path / "images"
    (folder / "val").mkdir(parents=True)
    for name in ("val/a.jpg", "val/b.png"):
        Image.new("RGB", (8, 6), "red").save(folder / name)
    (tmp_path / "secret.jpg").write_bytes((folder / "val/a.jpg").read_bytes())
    return folder


TURN = {"user": "a", "assistant": "b"}


def good(**changes) -> dict:
    turn = {"images": ["val/a.jpg", "val/b.png"], "user": "What?", "assistant": "Red"}
    return {"id": "x-0", "source": "test", "conversations": [turn], **changes}


def write(tmp_path, *lines: str | bytes | dict):
    path = tmp_path / "data.jsonl"
    coded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    coded = [line.encode() if isinstance(line, str) else line for line in coded]
    path.write_bytes(b"\n".join(coded) + b"\n")
    return path


def test_reads_every_record_in_order(tmp_path, image_dir):
    """Several turns, images in any turn or none; source and images may be absent."""
    turns = [
        {"user": "Hello", "assistant": "Hi"},
        {"images": ["val/b.png"], "user": "And here?", "assistant": "Red"},
        {"images": [], "user": "Sure?", "assistant": "Yes"},
    ]
    path = write(tmp_path, good(), "", {"id": "x-1", "conversations": turns})
    dataset = load_conversations(path, image_dir)
    assert dataset.features == FEATURES and dataset["id"] == ["x-0", "x-1"]
    first, second = dataset
    assert first["conversations"][0]["images"] == [
        str(image_dir / "val/a.jpg"),
        str(image_dir / "val/b.png"),
    ]
    assert [len(turn["images"]) for turn in second["conversations"]] == [0, 1, 0]
    assert second["source"] == ""


def test_an_edited_file_is_read_anew(tmp_path, image_dir):
    """The cache must not hand out an old version of the file."""
    path = write(tmp_path, good())
    assert load_conversations(path, image_dir)["id"] == ["x-0"]
    write(tmp_path, good(id="new"))
    assert load_conversations(path, image_dir)["id"] == ["new"]


def test_a_lost_image_is_noticed(tmp_path, image_dir):
    """The cache must not hide that an image has gone since the last run."""
    path = write(tmp_path, good())
    load_conversations(path, image_dir)
    (image_dir / "val/b.png").unlink()
    with pytest.raises(DataError, match="'val/b.png' is not a file"):
        load_conversations(path, image_dir)


def test_a_file_is_read_in_its_first_run_alone(tmp_path, image_dir, monkeypatch):
    """Later runs start from the cache, whatever the number of records; of bad lines, none does."""
    path = write(tmp_path, good(), good(id="x-1"))
    first = load_conversations(path, image_dir)
    with monkeypatch.context() as unreadable:
        unreadable.setattr("phi3v.data.conversations.parse_line", None)
        again = load_conversations(path, image_dir)
    assert again[:] == first[:] and again.origin.where(1) == f"{path}, line 2"
    path = write(tmp_path, good(), good())
    for _ in range(2):
        with pytest.raises(DataError, match="line 2: id 'x-0' is that of line 1 too"):
            load_conversations(path, image_dir)


@pytest.mark.parametrize(("lost", "noticed"), [(0, True), (1, False), (2, True)])
def test_of_many_records_an_even_part_is_looked_at_again(
    tmp_path, image_dir, monkeypatch, lost, noticed
):
    """So that a start does not grow with the dataset. In the first run, all are looked at."""
    monkeypatch.setattr("phi3v.data.conversations.MAX_CHECKED", 2)
    names = [f"{number}.jpg" for number in range(4)]
    for name in names:
        (image_dir / name).write_bytes(b"x")
    turns = [{"images": [name], "user": "a", "assistant": "b"} for name in names]
    path = write(tmp_path, *(good(id=str(i), conversations=[t]) for i, t in enumerate(turns)))
    (image_dir / names[lost]).unlink()
    with pytest.raises(DataError, match=f"line {lost + 1}: "):
        load_conversations(path, image_dir)
    (image_dir / names[lost]).write_bytes(b"x")
    assert len(load_conversations(path, image_dir)) == 4
    (image_dir / names[lost]).unlink()
    if noticed:
        with pytest.raises(DataError, match=rf"line {lost + 1}: .*'{names[lost]}'"):
            load_conversations(path, image_dir)
    else:
        assert len(load_conversations(path, image_dir)) == 4


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


def test_images_come_as_paths_bytes_or_pil(image_dir):
    """What a recipe's dataset holds for an image does not matter."""
    path = image_dir / "val/b.png"
    kinds = [str(path), path.read_bytes(), Image.open(path), {"bytes": None, "path": str(path)}]
    turn = {"images": kinds, "user": "a", "assistant": "b"}
    images = load_images({"id": "x", "conversations": [turn]})
    assert [image.tobytes() for image in images] == [images[0].tobytes()] * 4


def test_a_broken_image_names_its_sample(image_dir):
    """An image that does not decode is reported with the sample it belongs to."""
    path = image_dir / "val/broken.jpg"
    path.write_bytes((image_dir / "val/a.jpg").read_bytes()[:200])
    turn = {"images": [str(path)], "user": "a", "assistant": "b"}
    with pytest.raises(DataError, match="sample 'x-9': cannot read .*broken.jpg"):
        load_images({"id": "x-9", "conversations": [turn]})


def test_records_are_completed():
    """A checked record has every field."""
    record = check_record({"id": "a", "conversations": [TURN]}, "here")
    assert record == {"id": "a", "source": "", "conversations": [{**TURN, "images": []}]}
