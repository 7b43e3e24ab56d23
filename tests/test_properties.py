"""Properties that hold for any input. The examples are drawn alike in every run."""

import io
import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v import Phi3VConfig, Phi3VImageProcessor
from phi3v.data.collators import IGNORED, GenerationCollator, TrainingCollator
from phi3v.data.formats import load_records
from phi3v.data.images import check_images, image_sizes, load_images
from phi3v.data.packing import count_tokens
from phi3v.data.records import CONTROL_TOKEN, check_record
from phi3v.errors import DataError
from phi3v.model.modeling_phi3_v import Phi3VImageEmbedding


def examples(count: int):
    """Settings for `count` examples, the same ones in every run."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# ---------------------------------------------------------------- the jsonl reader

texts = st.text(st.characters(exclude_categories=()), max_size=12)  # with lone surrogates
plain_texts = st.text(st.characters(codec="utf-8"), max_size=12).filter(
    lambda text: not CONTROL_TOKEN.search(text)
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
maybe_texts = plain_texts | values
almost_turns = st.fixed_dictionaries(
    {"user": maybe_texts, "assistant": maybe_texts}, optional={"images": values, "more": values}
)
almost_records = st.fixed_dictionaries(
    {"id": maybe_texts, "conversations": st.lists(almost_turns | values, max_size=2) | values},
    optional={"source": maybe_texts, "answers": values, "more": values},
)
answers = plain_texts.filter(str.strip)
records = st.fixed_dictionaries(
    {
        "id": plain_texts.filter(bool),
        "source": plain_texts,
        "conversations": st.lists(
            st.fixed_dictionaries(
                {"images": st.just([]), "user": plain_texts, "assistant": answers}
            ),
            min_size=1,
            max_size=3,
        ),
    }
)


def read(folder: Path, content: bytes) -> list[dict]:
    """All records of a file of this content; an error has to name the file and a line of it."""
    path = folder / "data.jsonl"
    path.write_bytes(content)
    try:
        return list(load_records(path, folder))
    except DataError as error:
        text = str(error)
        if "has no records" not in text:
            [(word, number)] = re.findall(rf"^{re.escape(str(path))}, (line|item) (\d+)", text)
            assert 1 <= int(number) <= content.count(b"\n" if word == "line" else b",") + 1
        assert str(path) in text and "\n" not in text and text.encode()
        raise


@examples(120)
@given(records)
def test_good_records_round_trip(tmp_path, record):
    """A good record is read as it was written, whatever its texts are."""
    for ascii in (True, False):
        line = json.dumps(record, ensure_ascii=ascii).encode()
        assert read(tmp_path, line) == [record]


@examples(120)
@given(values | almost_records)
def test_any_json_is_read_exactly_or_refused(tmp_path, value):
    """What is not refused has the right form and the content that was written."""
    try:
        [record] = read(tmp_path, json.dumps(value).encode())
    except DataError:
        return
    assert record == check_record(value)
    for written, turn in zip(value["conversations"], record["conversations"], strict=True):
        assert turn["user"] == written["user"] and turn["assistant"].strip()
    assert record["id"] == value["id"] and record["source"] == value.get("source", "")


edits = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=3)
        | st.sampled_from([b"\n", b'"', b"{", b"}", b"\\", b"\0"]),
    ),
    min_size=1,
    max_size=3,
)


@examples(120)
@given(st.lists(records, min_size=1, max_size=2, unique_by=lambda record: record["id"]), edits)
def test_mutated_bytes_are_read_or_refused(tmp_path, written, edits):
    """A damaged file is read or refused with its name and a line, and nothing else happens."""
    content = b"\n".join(json.dumps(record).encode() for record in written)
    for kind, place, extra in edits:
        at = int(place * len(content))
        before, after = content[:at], content[at:]
        content = {
            "replace": before + extra + after[len(extra) :],
            "insert": before + extra + after,
            "delete": before + after[len(extra) :],
            "cut": before,
            "repeat": before + before + after,
        }[kind]
    try:
        found = read(tmp_path, content)
    except DataError:
        return
    again = b"\n".join(json.dumps(record).encode() for record in found)
    assert read(tmp_path, again) == found


# ---------------------------------------------------------------- images

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]
sides = st.integers(1, 40) | st.sampled_from([336, 337, 700, 2000])


def picture(mode: str, width: int, height: int) -> Image.Image:
    """A picture that is not of one colour."""
    image = Image.new(mode, (width, height))
    image.paste(1, (0, 0, (width + 1) // 2, height)) if mode in ("1", "F", "I") else None
    return image


@pytest.fixture(scope="module")
def embedding() -> Phi3VImageEmbedding:
    """The model's own side of it, without its weights."""
    with torch.device("meta"):
        return Phi3VImageEmbedding(Phi3VConfig())


@examples(40)
@given(st.sampled_from(MODES), sides, sides, st.integers(1, 16))
def test_any_image_becomes_crops_or_is_refused(embedding, mode, width, height, num_crops):
    """Shapes, token counts and values fit together, and agree with what is known in advance."""
    processor = Phi3VImageProcessor(num_crops=num_crops)
    image = picture(mode, width, height)
    file = io.BytesIO()
    in_a_file = mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    if in_a_file:
        image.save(file, "PNG")
    try:
        known = processor.calc_num_image_tokens_from_image_size(width, height)
    except ValueError as error:
        assert f"too long and thin for num_crops={num_crops}" in str(error)
        with pytest.raises(ValueError, match="too long and thin"):
            processor(image)
        if in_a_file:
            with pytest.raises(DataError, match="sample 'x'.*too long and thin"):
                check_images(holding(file.getvalue()), processor)
        return
    if in_a_file:
        check_images(holding(file.getvalue()), processor)
    encoded = processor(image, return_tensors="pt")
    assert encoded["pixel_values"].shape == (1, num_crops + 1, 3, 336, 336)
    assert encoded["pixel_values"].isfinite().all()
    [[padded_height, padded_width]] = encoded["image_sizes"].tolist()
    assert (padded_width, padded_height) == processor.calc_hd_size(width, height)
    [(rows, columns)] = embedding.count_crops(encoded["image_sizes"])
    assert 1 <= rows * columns <= num_crops
    assert not encoded["pixel_values"][0, 1 + rows * columns :].any()
    assert encoded["num_img_tokens"].tolist() == [known]
    assert (
        known == embedding.count_tokens(rows, columns) == processor.calc_num_image_tokens(image)[0]
    )
    assert known == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12


def holding(image: object) -> dict:
    """A record of one image."""
    return {"id": "x", "conversations": [{"images": [image], "user": "a", "assistant": "b"}]}


def pixels(content: bytes, look=load_images) -> bytes | None:
    """What is decoded of a file that `look` takes; None where it is refused in the right words."""
    try:
        look(holding(content), Phi3VImageProcessor(num_crops=1))
    except DataError as error:
        assert str(error).startswith(
            "sample 'x', conversations[0].images[0]: cannot read the image: "
        )
        assert "\n" not in str(error)
        return None
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB").tobytes()


@examples(100)
@given(
    st.binary(min_size=1, max_size=60),
    st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP"]),
    st.floats(0, 1, exclude_max=True),
)
def test_damaged_images_are_refused(junk, format, place):
    """
    Bytes that are no image, and files that are cut, are refused with where they are, by the cheap
    look too; of a cut file that is read all the same, no pixel is lost. Other damage is refused or
    read, and nothing else happens; what is read when training gets to it was not refused before.
    """
    file = io.BytesIO()
    noise(20, 10).save(file, format)
    content = file.getvalue()
    whole = pixels(content)
    assert whole is not None and pixels(content, check_images) == whole
    assert pixels(junk) is None and pixels(junk, check_images) is None
    at = int(place * len(content))
    for look in (load_images, check_images):
        assert pixels(content[:at], look) in (None, whole)
    damaged = content[:at] + junk + content[at + len(junk) :]
    if pixels(damaged) is not None:
        assert pixels(damaged, check_images) is not None


def noise(width: int, height: int) -> Image.Image:
    """A picture of which every byte of its file says something."""
    levels = random.Random(0).randbytes(width * height * 3)
    return Image.frombytes("RGB", (width, height), levels)


# ---------------------------------------------------------------- batches

turns = st.tuples(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=3), plain_texts, answers
)
conversations = st.lists(st.lists(turns, min_size=1, max_size=3), min_size=1, max_size=2)


def spoken(labels: list[int], end: int) -> list[list[int]]:
    """The labelled ids, by answer, without what ends each."""
    runs, last = [], False
    for label in labels:
        if label != IGNORED and not last:
            runs.append([])
        last = label != IGNORED
        if last:
            runs[-1].append(label)
    return [run[: run.index(end)] for run in runs]


@examples(40)
@given(conversations)
def test_batches(demo_processor, drawn):
    """
    As many placeholders as features; labels are every answer and nothing else; and training
    continues the very prompt that evaluation generates from.
    """
    tokenizer = demo_processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    batch_records = [
        {
            "id": str(number),
            "conversations": [
                {
                    "images": [picture("RGB", *size) for size in sizes],
                    "user": user,
                    "assistant": answer,
                }
                for sizes, user, answer in conversation
            ],
        }
        for number, conversation in enumerate(drawn)
    ]
    processor = demo_processor.image_processor
    sizes = [size for record in batch_records for size in image_sizes(record)]
    assume(all(max(size) < 50 * min(size) for size in sizes))
    training = TrainingCollator(demo_processor, for_trainer=True)(batch_records)
    generation = GenerationCollator(demo_processor)(batch_records)
    placeholders = (training["input_ids"] == demo_processor.image_token_id).sum()
    assert placeholders == sum(
        processor.calc_num_image_tokens_from_image_size(*size) for size in sizes
    )
    assert ("pixel_values" in training) == bool(sizes)
    if sizes:
        assert len(training["pixel_values"]) == len(training["image_sizes"]) == len(sizes)
        assert torch.equal(training["pixel_values"], generation["pixel_values"])
    for row, record in enumerate(batch_records):
        ids = training["input_ids"][row, : training["lengths"][row]].tolist()
        prompt = generation["input_ids"][row][generation["attention_mask"][row].bool()].tolist()
        labels = training["labels"][row].tolist()
        assert ids[: len(prompt)] == prompt and len(ids) == count_tokens(demo_processor, record)
        assert all(label in (IGNORED, i) for label, i in zip(labels, ids, strict=False))
        assert set(labels[len(ids) :]) <= {IGNORED}
        assert demo_processor.image_token_id not in labels
        answered = spoken(labels, end)
        expected = [turn["assistant"] for turn in record["conversations"]]
        assert len(answered) == len(expected)
        for found, answer in zip(answered, expected, strict=True):
            # The white space that follows <|assistant|> is the tokenizer's to drop.
            alone = tokenizer(answer, add_special_tokens=False).input_ids
            assert tokenizer.decode(found).strip() == tokenizer.decode(alone).strip()
