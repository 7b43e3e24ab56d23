"""
Wrong datasets, through the functions that the recipes load them with: every one is answered with
one clear message, by DataError, before a model is loaded.
"""

import argparse
import io
import json
import os
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from finetune_hf_trainer_docvqa import CAULDRON_COLUMNS, cauldron_records
from phi3v import distributed
from phi3v.check import main as check
from phi3v.data import images, preparation
from phi3v.data.collators import TrainingCollator
from phi3v.data.formats import load_records
from phi3v.data.images import check_images, image_sizes, load_images
from phi3v.data.preparation import check_all_images, prepare
from phi3v.data.records import Records, check_record
from phi3v.data.rows import ImageFolder
from phi3v.data.sources import load_rows
from phi3v.errors import DataError, plain_message
from small_datasets import cauldron_row, write_parquet

pytestmark = pytest.mark.usefixtures("own_cache")


def noise(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture that does not compress to nothing, so there is something to cut off."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(format: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or noise()).save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def image_dir(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (folder / name).write_bytes(encoded("JPEG"))
    return folder


def good(identifier: str = "x", *names: str, **changes) -> dict:
    turn = {"images": list(names), "user": "What?", "assistant": "Red", **changes}
    return {"id": identifier, "source": "test", "conversations": [turn]}


def as_bytes(line: bytes | str | dict) -> bytes:
    line = json.dumps(line) if isinstance(line, dict) else line
    return line if isinstance(line, bytes) else line.encode()


def write(tmp_path: Path, *lines: bytes | str | dict) -> Path:
    """A jsonl file."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(map(as_bytes, lines)))
    return path


def arguments(**changes) -> argparse.Namespace:
    defaults = {"num_crops": 4, "tqdm": False, "max_length": None, "pack_length": None}
    return argparse.Namespace(**{**defaults, "skip_bad_samples": False, **changes})


GOOD_LINE = json.dumps(good("x"))
TURNS = good("x")["conversations"]

# ---------------------------------------------------------------- lines of a jsonl

# What line 2 holds, and what the message says after "line 2".
LINES = {
    "bytes that are no text": (
        b'{"id": "\xff"}',
        "not JSON in UTF-8: 'utf-8' codec .* UTF-8 without",
    ),
    "UTF-16": (GOOD_LINE.encode("utf-16"), "not JSON in UTF-8.* without BOM"),
    "UTF-16 without a mark": (GOOD_LINE.encode("utf-16-be"), "not JSON in UTF-8"),
    "byte order mark": (GOOD_LINE.encode("utf-8-sig"), "not JSON in UTF-8: Unexpected UTF-8 BOM"),
    "half a line": (GOOD_LINE[:40], "not JSON .* Write one record per line"),
    "two records": (GOOD_LINE + GOOD_LINE, "not JSON in UTF-8: Extra data"),
    "NaN": ('{"id": NaN, "conversations": []}', "NaN is no JSON value"),
    "Infinity": ('{"id": "a", "conversations": -Infinity}', "-Infinity is no JSON value"),
    "a key twice": ('{"id": "a", "id": "b", "conversations": []}', "an object has a key twice"),
    "deep lists": ("[" * 100_000, "maximum recursion depth"),
    "huge number": ('{"id": ' + "9" * 5000 + "}", "5000 digits"),
    "half a surrogate pair": (good("x", user="a\ud800b"), "surrogates not allowed"),
    "surrogate in an id": (good("\udc00"), "surrogates not allowed"),
    "surrogate in a key": ({**good(), "\ud800": 1}, r"unknown: '\\ud800'"),
    "a string": ('"x"', "the record must be an object, not a string"),
    "a list of records": (f"[{GOOD_LINE}]", "the record must be an object, not a list"),
    "no id": ({"conversations": TURNS}, "missing: 'id'.*Required: conversations, id; optional"),
    "misspelt key": ({"id": "a", "conversation": TURNS}, "unknown: 'conversation'"),
    "empty id": (good(""), "id is empty. Give"),
    "null id": (good(None), "id must be a string, not null"),
    "null source": ({**good(), "source": None}, "source must be a string, not null"),
    "conversations null": ({**good(), "conversations": None}, "conversations must be a list"),
    "no turns": ({**good(), "conversations": []}, "conversations is empty. Write at least one"),
    "a turn that is null": (
        {**good(), "conversations": [None]},
        r"\[0\] must be an object, not null",
    ),
    "a turn's key misspelt": (
        {**good(), "conversations": [*TURNS, {"user": "a", "assistent": "b"}]},
        r"conversations\[1\] has the wrong fields \(missing: 'assistant'; unknown: 'assistent'\)",
    ),
    "assistant a list": (good(assistant=["a"]), r"\[0\].assistant must be a string, not a list"),
    "assistant blank": (good(assistant="\n\t "), r"\[0\].assistant is empty. Write an answer"),
    "user a number": (good(user=3.5), r"\[0\].user must be a string, not a number"),
    "images a string": (good(images="a.jpg"), r"\[0\].images must be a list, not a string"),
    "an image that is null": (
        good(images=[None]),
        r"\[0\].images: a path must be a string, not null",
    ),
    "missing image": (good("x", "d.jpg"), r"\[0\].images: 'd.jpg' cannot be read .No such file"),
    "a folder": (good("x", "sub"), r"\[0\].images: 'sub' is not a file"),
    "a file as a folder": (good("x", "a.jpg/b.jpg"), "cannot be read .Not a directory"),
    "a pipe": (good("x", "pipe"), "'pipe' is not a file"),
    "zero bytes": (good("x", "empty.jpg"), "'empty.jpg' is not a file, or an empty one"),
    "parent of a sub-folder": (good("x", "sub/../../secret.jpg"), "leaves the image folder"),
    "missing outside": (good("x", "../../none.jpg"), "leaves the image folder"),
    "absolute": (good("x", "/etc/hostname"), "leaves the image folder"),
    "link to outside": (good("x", "link.jpg"), "'link.jpg' leaves the image folder"),
    "linked folder": (good("x", "linked/secret.jpg"), "leaves the image folder"),
    "sibling with the same prefix": (good("x", "../images2/a.jpg"), "leaves the image folder"),
    "dangling link": (good("x", "dangling.jpg"), "cannot be read .No such file"),
    "link to itself": (good("x", "loop.jpg"), "cannot be read .Too many levels"),
    "null byte": (good("x", "a\0.jpg"), "cannot be read .*null"),
    "surrogate in a path": (good("x", "\udfff.jpg"), "cannot be read .*surrogates not allowed"),
    "long name": (good("x", "a" * 5000), "cannot be read .File name too long"),
    "id of line 1": (good("first"), "id 'first' is that of line 1 too. Make ids unique"),
}


@pytest.fixture
def traps(tmp_path, image_dir):
    """What image paths must not lead to."""
    (tmp_path / "secret.jpg").write_bytes(encoded("JPEG"))
    (tmp_path / "images2").mkdir()
    (tmp_path / "images2" / "a.jpg").write_bytes(encoded("JPEG"))
    (image_dir / "sub").mkdir()
    (image_dir / "empty.jpg").touch()
    os.mkfifo(image_dir / "pipe")
    for name, target in {
        "link.jpg": tmp_path / "secret.jpg",
        "linked": tmp_path,
        "dangling.jpg": image_dir / "gone.jpg",
        "loop.jpg": image_dir / "loop.jpg",
    }.items():
        (image_dir / name).symlink_to(target)


@pytest.mark.parametrize("kind", LINES)
def test_lines(tmp_path, image_dir, traps, kind, capsys):
    """File, line, field and way out are named, on one line; and no other line is left out."""
    line, message = LINES[kind]
    path = write(tmp_path, good("first", "a.jpg"), line, good("last"))
    with pytest.raises(DataError, match=message) as caught:
        load_records(path, image_dir).check()
    text = str(caught.value)
    assert text.startswith(f"{path}, line 2: ") and "--skip_bad_samples" in text
    assert "\n" not in text and len(text) < 1000 and text.encode()
    kept = load_records(path, image_dir).check(skip_bad=True)
    assert [record["id"] for record in kept] == ["first", "last"]
    assert "1 of 3 samples are bad" in capsys.readouterr().out


CONTROL = [
    *("<|image_7|>", "<|image_01|>", "<|image_٣|>", "<|image|>", "<|end|>", "<|endoftext|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|placeholder1|>", "<|placeholder39|>"),
    *("<s>", "</s>", "<unk>"),
]


def test_control_tokens():
    """No text may hold what is read as the structure of the prompt."""
    for token in CONTROL:
        for role in ("user", "assistant"):
            with pytest.raises(DataError) as caught:
                check_record(good(**{role: f"a{token}b"}))
            assert f"conversations[0].{role} contains {token!r}" in str(caught.value)


def test_every_special_token_of_the_tokenizer_is_refused(tokenizer_folder):
    """No text can hold what the tokenizer takes as one of its special tokens."""
    tokens = json.loads((tokenizer_folder / "tokenizer.json").read_text())["added_tokens"]
    assert len(tokens) > 40
    for token in tokens:
        with pytest.raises(DataError, match="control token"):
            check_record(good(user=f"x{token['content']}"))


def test_what_only_looks_like_a_control_token_is_text(demo_processor):
    """Near misses are no tokens, and stay what they are."""
    for text in (
        "<|End|>",
        "<|end|",
        "<| end |>",
        "< s>",
        "<S>",
        "|end|>",
        "<|image_x|>",
        "<0x0A>",
    ):
        check_record(good(user=text, assistant=text))
        ids = demo_processor.tokenizer(text, add_special_tokens=False).input_ids
        assert not set(ids) & set(demo_processor.tokenizer.all_special_ids)


# ---------------------------------------------------------------- files


def test_files(tmp_path, image_dir, monkeypatch):
    """A file that is not there, is none, is empty or may not be read."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.jsonl", image_dir, tmp_path / "pipe", "a\0b", "a" * 5000):
        with pytest.raises(DataError, match="there is no such file. Check"):
            load_records(path, image_dir)
    for content in ("", "\n \n\t\n"):
        with pytest.raises(DataError, match="data.jsonl: the file has no records. Write"):
            load_records(write(tmp_path, content), image_dir)
    path = write(tmp_path, good("x" * 200))
    with monkeypatch.context() as limited:
        limited.setattr("phi3v.data.rows.MAX_LINE_BYTES", 100)
        with pytest.raises(DataError, match="line 1 is longer than .* one record per line"):
            load_records(path, image_dir)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match="data.jsonl cannot be read: Permission denied"):
        load_records(path, image_dir)


def test_image_folder_that_is_not_there(tmp_path):
    """It is said where an image is asked for; texts alone need none."""
    path = write(tmp_path, good("a", "a.jpg"))
    with pytest.raises(DataError, match="line 1: .*No such file.* relative to .*no"):
        load_records(path, tmp_path / "no").check()
    assert len(load_records(write(tmp_path, good("a")), tmp_path / "no")) == 1


def test_paths_inside_stay_allowed(tmp_path, image_dir):
    """Absolute, with dots or by a link: what stays inside is fine, and so is a linked folder."""
    (image_dir / "same.jpg").symlink_to("a.jpg")
    (tmp_path / "linked").symlink_to(image_dir)
    for folder in (image_dir, tmp_path / "linked", f"{image_dir}/", image_dir / "." / ""):
        found = ImageFolder(folder)
        for name in ("a.jpg", str(image_dir / "a.jpg"), "./b.jpg", "../images/c.jpg", "same.jpg"):
            assert Path(found.find(name, "field")).is_file()
    assert ImageFolder("/").find(str(image_dir / "a.jpg"), "field") == str(image_dir / "a.jpg")


# ---------------------------------------------------------------- going on without bad samples


def test_going_on_without_bad_lines(tmp_path, image_dir, capsys):
    """All are counted and the first ten shown; order and origin of the rest are kept."""
    lines = [good(str(i), "a.jpg" if i % 2 else "no.jpg") for i in range(30)]
    path = write(tmp_path, *lines[:3], "", *lines[3:])
    records = load_records(path, image_dir).check(skip_bad=True)
    assert [record["id"] for record in records] == [str(i) for i in range(1, 30, 2)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{path}: 15 of 30 samples are bad and left out:"
    assert len(printed) == 12 and printed[-1] == "  and 5 more"
    assert printed[1].startswith(f"  {path}, line 1: conversations[0].images: 'no.jpg'")
    assert records.where(0) == f"{path}, line 2"
    assert records.where(1) == f"{path}, line 5", "the blank line counts"
    (image_dir / "a.jpg").unlink()
    with pytest.raises(DataError, match="all of the 30 samples are bad. .*line 1: .*no.jpg"):
        load_records(path, image_dir).check(skip_bad=True)


@pytest.mark.parametrize("each_machine", [True, False])
def test_ranks_share_the_work(monkeypatch, each_machine):
    """
    Two machines of two ranks. Every machine does all of what needs its files; what is bad on one is
    bad on both, and every rank knows all, in order.
    """
    shares = []

    def work(index: int) -> int:
        if index == 3 and os.environ["RANK"] in "01":  # on the first machine
            raise DataError("bad")
        return 10 * index

    def run(gather) -> dict:
        def gather_names_too(mine):
            if not isinstance(mine, str):
                return gather(mine)
            return ["one", "one", "other", "other"] if mine else [mine] * 4

        monkeypatch.setattr(distributed, "gather", gather_names_too)
        return distributed.share_out(work, range(8), each_machine)

    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        run(lambda mine: shares.append(mine) or [mine])
    done = [index for share in shares for index in share]
    assert sorted(done) == sorted([*range(8)] * (2 if each_machine else 1))
    found = run(lambda mine: shares)
    assert list(found) == list(range(8)) and found[2] == 20
    assert isinstance(found[3], DataError) if each_machine else found[3] == 30


# ---------------------------------------------------------------- images


def bomb() -> bytes:
    """A PNG that claims a hundred thousand pixels each way."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def cut(format: str, **options) -> bytes:
    content = encoded(format, **options)
    return content[: len(content) * 2 // 3]


def damaged_png() -> bytes:
    """Its end is whole."""
    content = bytearray(encoded("PNG"))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


IMAGES = {
    "text": (b"this is no image", "it is no image of a known format .*JPEG, PNG"),
    "jpeg header alone": (encoded("JPEG")[:4], "it is no image of a known format"),
    "cut jpeg": (cut("JPEG"), "truncated"),
    "jpeg without its last byte": (encoded("JPEG")[:-30], "truncated"),
    "cut png": (cut("PNG"), "truncated"),
    "cut gif": (cut("GIF"), "truncated"),
    "cut webp": (cut("WEBP", lossless=True), "could not create decoder"),
    "words in a ppm header": (b"P6\nabc def\n255\n", "it is no image of a known format"),
    "words in a plain ppm": (
        b"P3\n2 2\n255\nred green blue white",
        "it is no image of a known format",
    ),
    "eps": (encoded("EPS"), "it is no image of a known format"),
    "16-bit png": (encoded("PNG", Image.new("I;16", (30, 20))), "mode I;16.*magick IN -depth 8"),
    "16-bit tiff": (encoded("TIFF", Image.new("I;16", (30, 20))), "8 bits per channel .*I;16"),
    "16-bit ppm": (b"P5\n2 2\n65535\n" + bytes(8), "8 bits per channel .*mode I"),
    "32-bit tiff": (encoded("TIFF", Image.new("I", (30, 20))), "8 bits per channel .*mode I"),
    "float tiff": (encoded("TIFF", Image.new("F", (30, 20))), "8 bits per channel .*mode F"),
    "bomb": (bomb(), "absurdly large"),
    "too long": (encoded("PNG", Image.new("L", (1, 5000))), "too long and thin for num_crops=4"),
}


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("kind", IMAGES)
def test_images(tmp_path, image_dir, demo_processor, kind, few, monkeypatch):
    """
    File, line, sample, field, path, reason, way out; of few images, which are decoded, and of many.
    In training the same without the line.
    """
    monkeypatch.setattr(preparation, "MAX_DECODED", 500 if few else 0)
    content, reason = IMAGES[kind]
    (image_dir / "bad.jpg").write_bytes(content)
    records = load_records(
        write(tmp_path, good("fine", "a.jpg"), good("x-1", "b.jpg", "bad.jpg")), image_dir
    )
    monkeypatch.setattr(demo_processor.image_processor, "num_crops", 4)
    monkeypatch.setattr(demo_processor.image_processor, "crop_size", {"height": 336, "width": 336})
    with pytest.raises(DataError, match=reason) as caught:
        check_all_images(records, demo_processor, arguments())
    where = f"{tmp_path / 'data.jsonl'}, line 2: sample 'x-1', conversations[0].images[1]: "
    text = str(caught.value)
    assert text.startswith(f"{where}cannot read {image_dir / 'bad.jpg'}: ")
    assert "Replace the image or remove the sample" in text and "\n" not in text
    kept = check_all_images(records, demo_processor, arguments(skip_bad_samples=True))
    assert [record["id"] for record in kept] == ["fine"]
    message = f"sample 'x-1', conversations[0].images[1]: cannot read {image_dir / 'bad.jpg'}: "
    with pytest.raises(DataError) as caught:
        load_images(records[1], demo_processor.image_processor)
    assert str(caught.value).startswith(message)


GOOD_IMAGES = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "jpeg with something behind it": encoded("JPEG") + b"camera notes",
    "png": encoded("PNG"),
    "png with something behind it": encoded("PNG") + b"notes",
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "webp": encoded("WEBP"),
    "animated png": encoded("PNG", save_all=True, append_images=[noise()]),
    "palette": encoded("PNG", noise().convert("P")),
    "cmyk": encoded("JPEG", noise().convert("CMYK")),
    "palette with transparency": encoded("PNG", noise().convert("P"), transparency=0),
    "lab": encoded("TIFF", Image.new("LAB", (30, 20), (128, 0, 0))),
    "several pictures": encoded("MPO", save_all=True, append_images=[noise()]),
    **{name: encoded(name) for name in ("AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX", "QOI")},
    "16-bit colour ppm": b"P6\n2 1\n65535\n" + bytes(range(12)),
}


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("kind", GOOD_IMAGES)
def test_whole_images_pass(tmp_path, image_dir, demo_processor, kind, few, monkeypatch):
    """No check refuses what decodes; and the pixels are those of PIL."""
    monkeypatch.setattr(preparation, "MAX_DECODED", 500 if few else 0)
    path = image_dir / "good"
    path.write_bytes(GOOD_IMAGES[kind])
    records = load_records(write(tmp_path, good("x", "good")), image_dir)
    assert check_all_images(records, demo_processor, arguments()) is records
    [image] = load_images(records[0])
    with Image.open(path) as plain:
        assert image.convert("RGB").tobytes() == plain.convert("RGB").tobytes()
    assert image_sizes(records[0]) == [image.size]


def test_damage_inside_of_few_images(demo_processor):
    """Is found before the start, since they are decoded. None at all are an error too."""
    with pytest.raises(DataError, match="mine: there are no samples"):
        Records([], origin="mine").check()
    record = check_record(good("x"))
    record["conversations"][0]["images"] = [damaged_png()]
    with pytest.raises(DataError, match="sample 'x'.*broken data stream"):
        check_all_images(Records([record]), demo_processor, arguments())


def test_whole_images_are_not_decoded(demo_processor, monkeypatch):
    """Of JPEG, PNG and WebP, the header and the last bytes are enough."""
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    for kind in ("jpeg", "progressive", "png", "webp"):
        record = good("x", images=[GOOD_IMAGES[kind]])
        check_images(record, demo_processor.image_processor)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "it is None, and neither a path nor"),
        ({"bytes": None, "path": None}, "it is None, and neither a path nor"),
        ({"bytes": b"", "path": "a.jpg"}, "it is no image"),
        (3, "it is 3, and neither"),
        ("/no/such.jpg", "/no/such.jpg: No such file"),
        ("/tmp", "/tmp: it is not a file"),
        ("a\0b", "it is no image"),
        ("a" * 5000, "File name too long"),
        (Image.new("La", (2, 2)), r"8 bits per channel \(Pillow's mode La\)"),
        (Image.new("I;16B", (2, 2)), r"8 bits per channel \(Pillow's mode I;16B\)"),
        (Image.new("F", (2, 2)), r"8 bits per channel \(Pillow's mode F\)"),
        (Image.new("RGB", (0, 5)), "0 pixels is empty"),
    ],
)
def test_images_of_rows(demo_processor, image, reason):
    """Whatever stands in the place of an image is answered, also where no check came before."""
    record = check_record(good("x"))
    record["conversations"][0]["images"] = [image]
    for read in (
        lambda: load_images(record, demo_processor.image_processor),
        lambda: check_all_images(Records([record]), demo_processor, arguments()),
    ):
        with pytest.raises(DataError, match=f"sample 'x'.*{reason}"):
            read()


@pytest.mark.parametrize("opened", [False, True])
def test_no_program_is_started_for_an_image(
    tmp_path, image_dir, demo_processor, monkeypatch, opened
):
    """PostScript with an image's name is not handed to Ghostscript, nor where PIL has opened it."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # not looked for yet
    path = image_dir / "bad.jpg"
    path.write_bytes(encoded("EPS"))
    record = check_record(good("x"))
    record["conversations"][0]["images"] = [Image.open(path) if opened else str(path)]
    for read in (
        lambda: check_all_images(Records([record]), demo_processor, arguments()),
        lambda: check_images(record, demo_processor.image_processor),
        lambda: load_images(record),
        lambda: image_sizes(record),
    ):
        with pytest.raises(DataError, match="cannot read"):
            read()
    assert not (tmp_path / "called").exists()


def test_a_sample_of_many_images(tmp_path, image_dir, demo_processor, capsys, monkeypatch):
    """Above the limit, an even sample is looked at, and the command for all is told."""
    monkeypatch.setattr(preparation, "MAX_CHECKED", 20)
    lines = [good(str(i), "a.jpg", "b.jpg") for i in range(40)]
    (image_dir / "bad.jpg").write_bytes(b"no")
    lines[1] = good("1", "a.jpg", "bad.jpg")
    records = load_records(write(tmp_path, *lines), image_dir)
    assert check_all_images(records, demo_processor, arguments()) is records
    said = capsys.readouterr().out
    assert "data.jsonl: looked at the images of 10 of 40 samples, evenly spaced. All of" in said
    assert "python -m phi3v.check" in said
    for flags in ({"max_length": 10}, {"pack_length": 10}, {"skip_bad_samples": True}):
        if "skip_bad_samples" in flags:
            assert len(check_all_images(records, demo_processor, arguments(**flags))) == 39
        else:
            with pytest.raises(DataError, match="line 2: sample '1'"):
                check_all_images(records, demo_processor, arguments(**flags))
        assert "evenly" not in capsys.readouterr().out


def test_plain_message_of_a_worker(tmp_path, image_dir, demo_processor):
    """An image that breaks during training: one line with the sample and the path."""
    records = load_records(write(tmp_path, good("x-3", "a.jpg")), image_dir)
    (image_dir / "a.jpg").write_bytes(b"overwritten")
    expected = (
        f"sample 'x-3', conversations[0].images[0]: cannot read {image_dir / 'a.jpg'}: "
        f"{images.NO_IMAGE}. Replace the image or remove the sample."
    )
    for workers in (0, 1):
        loader = DataLoader(
            records, collate_fn=TrainingCollator(demo_processor), num_workers=workers
        )
        with pytest.raises(DataError) as caught:
            next(iter(loader))
        assert plain_message(caught.value) == expected


# ---------------------------------------------------------------- rows


def rows_of(tmp_path: Path, *rows: dict) -> Path:
    return write_parquet(tmp_path / "rows", "train", list(rows))


def load(path: Path, **options) -> datasets.Dataset:
    return load_rows(path, CAULDRON_COLUMNS, **options)


def row(index: int = 0) -> dict:
    return cauldron_row(index, 1, ("a?", "1"), ("b?", "2"))


def broken_parquet(tmp_path: Path, break_it) -> Path:
    folder = rows_of(tmp_path, row())
    [path] = folder.glob("*.parquet")
    path.write_bytes(break_it(path.read_bytes()))
    return folder


def saved(tmp_path: Path, break_it) -> Path:
    load(rows_of(tmp_path, row())).save_to_disk(tmp_path / "saved")
    break_it(tmp_path / "saved")
    return tmp_path / "saved"


def typed(tmp_path: Path, **columns) -> Path:
    dataset = datasets.Dataset.from_dict(columns)
    (tmp_path / "typed").mkdir()
    dataset.to_parquet(tmp_path / "typed" / "train.parquet")
    return tmp_path / "typed"


def shards(tmp_path: Path, *names: str, other: list[str] | None = None) -> Path:
    """Parquet files of one row, of which the last has `other` column names."""
    [source] = rows_of(tmp_path, row()).glob("*.parquet")
    for name in names:
        path = tmp_path / "shards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.parquet.read_table(source)
        table = table.rename_columns(other) if other and name == names[-1] else table
        pyarrow.parquet.write_table(table, path)
    return tmp_path / "shards"


def texts_in(tmp_path: Path, **files: str) -> Path:
    (tmp_path / "files").mkdir()
    for name, text in files.items():
        (tmp_path / "files" / name).write_text(text)
    return tmp_path / "files"


TEXTS = [[{"user": "a", "assistant": "b"}]]
PICTURE = {"bytes": encoded("PNG"), "path": None}

BROKEN = "train-00000-of-00001.parquet is broken .*replace the file"
NOT_SAVED = "its files are not those that save_to_disk wrote"
NO_TEXTS = "column texts must hold a list of {user, assistant}.*Convert"
NO_IMAGES = "column images must hold a list of an image"

# How a dataset is made, and what is said of it.
SOURCES = {
    "no folder": (lambda p: p / "no", "there is no such folder. Give --dataset_name_or_path a hub"),
    "a long name": (lambda p: p / ("a" * 5000), "there is no such folder. Give --dataset_name"),
    "empty folder": (
        lambda p: (p / "void").mkdir() or p / "void",
        "of the 0 parquet files below it, none is of this split",
    ),
    "a json that crashes pyarrow": (
        lambda p: texts_in(p, **{"a.json": "null"}),
        "of the 0 parquet files .*with the columns {images, texts}",
    ),
    "cut parquet": (lambda p: broken_parquet(p, lambda content: content[:-20]), BROKEN),
    "empty parquet file": (lambda p: broken_parquet(p, lambda content: b""), BROKEN),
    "zeros in a parquet file": (
        lambda p: broken_parquet(p, lambda content: content[:20] + bytes(300) + content[320:]),
        "cannot load split 'train' of .*Unknown encoding type",
    ),
    "saved without data": (
        lambda p: saved(p, lambda f: next(f.glob("*.arrow")).unlink()),
        "No such file .*data-00000-of-00001.arrow",
    ),
    "saved with cut data": (
        lambda p: saved(p, lambda f: os.truncate(next(f.glob("*.arrow")), 100)),
        NOT_SAVED,
    ),
    "saved with a broken state": (
        lambda p: saved(p, lambda f: (f / "state.json").write_text("{")),
        NOT_SAVED,
    ),
    "saved with a state of null": (
        lambda p: saved(p, lambda f: (f / "state.json").write_text("null")),
        NOT_SAVED,
    ),
    "files of other columns": (
        lambda p: shards(p, "train.parquet", "train2.parquet", other=["images", "text"]),
        "train2.parquet and .*train.parquet differ in the columns text, texts; convert one",
    ),
    "a shard of three missing": (
        lambda p: shards(p, "train-00000-of-00003.parquet", "train-00002-of-00003.parquet"),
        r"/train-00001-of-00003 is missing \(1 in all\); download",
    ),
    "a shard of two downloads": (
        lambda p: shards(p, "train-00000-of-00001-ab.parquet", "train-00000-of-00001-cd.parquet"),
        "/train-.: 2 files for 1 parts; remove what is of another download",
    ),
    "half a version and the rest of another": (
        lambda p: shards(p, "train-00000-of-00001.parquet", "train-00001-of-00002.parquet"),
        "/train-.: 2 files for 2 parts",
    ),
    "no rows": (lambda p: typed(p, images=[], texts=[]), "cannot load split 'train' of "),
    "texts a string": (lambda p: typed(p, images=[[PICTURE]], texts=["a"]), NO_TEXTS),
    "texts of other fields": (
        lambda p: typed(p, images=[[PICTURE]], texts=[[{"question": "a"}]]),
        NO_TEXTS,
    ),
    "texts of numbers": (
        lambda p: typed(p, images=[[PICTURE]], texts=[[{"user": 1, "assistant": 2}]]),
        NO_TEXTS,
    ),
    "images a string": (lambda p: typed(p, images=["a.jpg"], texts=TEXTS), NO_IMAGES),
    "images paths": (lambda p: typed(p, images=[["a.jpg"]], texts=TEXTS), NO_IMAGES),
    "all images null": (lambda p: typed(p, images=[None], texts=TEXTS), NO_IMAGES),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_of_rows(tmp_path, kind):
    """A broken dataset is one message that names it and, where it is one file, the file."""
    make, message = SOURCES[kind]
    path = make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text


def test_all_shards_are_there(tmp_path, monkeypatch):
    """Complete splits load, from "." too; what a download keeps in hidden folders is none of it."""
    names = [f"{split}-{i:05}-of-00002.parquet" for split in ("train", "test") for i in range(2)]
    folder = shards(tmp_path, *names, ".cache/train-00000-of-00003.parquet")
    monkeypatch.chdir(folder)
    assert len(load(folder)) == len(load(Path("."))) == 2


def test_splits_of_rows(tmp_path):
    """A split that is not there, in either kind of folder; and a part of one that has no rows."""
    folder = rows_of(tmp_path, row(), row(1), row(2))
    with pytest.raises(DataError, match="split 'test' of .*of the 1 parquet files below it, none"):
        load(folder, split="test")
    datasets.DatasetDict({"train": load(folder)}).save_to_disk(tmp_path / "dict")
    assert len(load(tmp_path / "dict")) == len(load_rows(tmp_path / "dict")) == 3
    with pytest.raises(DataError, match="it has only the splits train"):
        load(tmp_path / "dict", split="test")
    part = Records(load(folder, split="train[2:]"), cauldron_records)
    assert [record["id"] for record in part] == ["docvqa-2-0", "docvqa-2-1"]
    with pytest.raises(DataError, match=r"has 3 rows, none of them in train\[500:\]"):
        load(folder, split="train[500:]")


def test_which_files_are_of_a_split(tmp_path):
    """By the words in their paths; of a folder with a config's name, that folder alone."""
    shards(tmp_path, "task/train-0.parquet", "task/test/0.parquet", "task/dev.parquet", "x.parquet")
    folder = tmp_path / "shards"
    assert len(load(folder, config="task")) == 1 and len(load(folder)) == 1
    with pytest.raises(DataError, match="1 parquet files below it, none is of this split"):
        load(shards(tmp_path, "other/train-1.parquet") / "other", split="dev")
    assert len(load(shards(tmp_path, "plain/one.parquet", "plain/b/two.parquet") / "plain")) == 2


BAD_ROWS = {
    "no images": ({**row(), "images": []}, "images is empty"),
    "images null": ({**row(), "images": None}, "images is empty"),
    "no texts": ({**row(), "texts": []}, "no record comes of it. Remove it"),
    "texts null": ({**row(), "texts": None}, "no record comes of it. Remove it"),
    "a text that is null": ({**row(), "texts": [None]}, "TypeError.* it is {.*None"),
    "user null": (
        cauldron_row(1, 1, (None, "1")),
        r"conversations\[0\].user must be a string, not null",
    ),
    "empty answer": (cauldron_row(1, 1, ("a?", "1"), ("b?", "")), "assistant is empty"),
    "control token": (cauldron_row(1, 1, ("a<|user|>", "1")), r"'<\|user\|>'"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_rows(tmp_path, kind, capsys):
    """A bad row is named before the start, and only what is bad of it is left out."""
    bad, message = BAD_ROWS[kind]
    records = Records(load(rows_of(tmp_path, row(0), bad, row(2))), cauldron_records)
    with pytest.raises(DataError, match=f"^{tmp_path / 'rows'}, row 1: .*{message}"):
        records.check()
    records.check(skip_bad=True)
    ids = [record["id"] for record in records if not record["id"].startswith("docvqa-1-")]
    assert ids == ["docvqa-0-0", "docvqa-0-1", "docvqa-2-0", "docvqa-2-1"]
    assert len(records) == 4 + (kind == "empty answer")
    assert "samples are bad and left out" in capsys.readouterr().out


def test_broken_image_bytes_of_rows(tmp_path, demo_processor):
    """The rows that can be read are kept."""
    contents = [PICTURE, {"bytes": cut("PNG"), "path": None}, {"bytes": None, "path": None}]
    path = typed(tmp_path, images=[[c] for c in contents], texts=TEXTS * 3)
    records = Records(load(path), cauldron_records)
    assert len(records) == 3
    with pytest.raises(
        DataError, match=r"row 1: sample 'docvqa-1-0', conversations\[0\].images\[0"
    ):
        check_all_images(records, demo_processor, arguments())
    kept = check_all_images(records, demo_processor, arguments(skip_bad_samples=True))
    assert [record["id"] for record in kept] == ["docvqa-0-0"]


def test_prepare(demo_processor, capsys):
    """All checks by one call, of any sequence of records; texts of both sets come before images."""
    fine = good("a", images=[noise()])
    bad = good("b", images=[b"broken"])
    with pytest.raises(DataError, match="evaluation data, row 1: id 'a' is that of row 0 too"):
        prepare([bad], [fine, fine], demo_processor, arguments())
    with pytest.raises(DataError, match="training data, row 0: sample 'b'.*cannot read the image"):
        prepare([bad], [fine], demo_processor, arguments())
    flags = arguments(skip_bad_samples=True, pack_length=10_000)
    train, evaluation = prepare([fine, bad, good("c")], [fine], demo_processor, flags)
    assert [[record["id"] for record in members] for members in train] == [["a", "c"]]
    assert [record["id"] for record in evaluation] == ["a"]
    assert "training data: 1 of 3 samples are bad" in capsys.readouterr().out


# ---------------------------------------------------------------- the command


def test_checking_a_good_file(tmp_path, image_dir, demo_checkpoint, capsys):
    """Status 0, and a summary with the lengths that training will see."""
    turns = [*good("b", "a.jpg", "b.jpg")["conversations"], {"user": "And?", "assistant": "Yes"}]
    path = write(tmp_path, good("a"), {"id": "b", "conversations": turns})
    flags = ["--image_dir", str(image_dir), "--num_crops", "2"]
    assert check([str(path), *flags, "--model_name_or_path", str(demo_checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert "2 samples, 0 of them bad" in printed and "3 turns, 2 images" in printed
    assert "\ntokens per sample: min " in printed and ", 99 % " in printed


def test_checking_a_bad_file(tmp_path, image_dir, capsys):
    """Status 1; every bad sample is listed, and every image is decoded."""
    (image_dir / "a.jpg").write_bytes(damaged_png())
    path = write(tmp_path, good("a", "a.jpg"), good("b", "b.jpg"), good("c", assistant=""), "{")
    assert check([str(path), "--image_dir", str(image_dir), "--model_name_or_path", "/no"]) == 1
    printed = capsys.readouterr().out
    assert "--model_name_or_path /no cannot be loaded, so only the tokens of images" in printed
    for line in (1, 3, 4):
        assert f"{path}, line {line}: " in printed
    assert "4 samples, 3 of them bad" in printed
    assert "\nimage tokens per sample: min 1,921" in printed
    assert check([str(write(tmp_path, "")), "--image_dir", str(image_dir)]) == 1
    assert "the file has no records" in capsys.readouterr().out


def test_checking_for_a_reader_that_has_gone(tmp_path, image_dir, monkeypatch):
    """The output of the command may be cut off, as by `| head`: no traceback follows."""
    path = write(tmp_path, good("a"), good(assistant=""))
    end, beginning = os.pipe()
    os.close(end)
    with open(beginning, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert check([str(path), "--image_dir", str(image_dir)]) == 1
        print("what is left")


def test_checking_on_a_terminal_of_few_characters(tmp_path, image_dir, monkeypatch):
    """What it has no character for is shown by its code."""
    path = write(tmp_path, good("é", "b.jpg", "none.jpg"))
    path = path.rename(tmp_path / "é.jsonl")
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert check([str(path), "--image_dir", str(image_dir)]) == 1
    assert rb"\xe9.jsonl: 1 samples, 1 of them bad" in shown.buffer.getvalue()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["data.jsonl"], "--image_dir"),
        (["none.jsonl", "--image_dir", "images"], "FILE 'none.jsonl' is no file"),
        (["data.jsonl", "--image_dir", "no"], "--image_dir 'no' is no folder"),
        (["a" * 5000, "--image_dir", "images"], "is no file. Check the path"),
        (["data.jsonl", "--image_dir", "a" * 5000], "is no folder. Check the path"),
        (["data.jsonl", "--image_dir", "images", "--num_crops", "17"], "must be 1 to 16"),
    ],
)
def test_wrong_commands(tmp_path, image_dir, capsys, monkeypatch, flags, message):
    """Status 2, and what to change."""
    write(tmp_path, good())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        check(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
