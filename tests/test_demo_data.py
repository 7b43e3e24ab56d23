"""The demos' videos, datasets, tokenizer and checkpoint."""

import io
import re
import tarfile
from collections import Counter
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerFast

from demo import make_checkpoint, make_datasets, make_videos
from demo.make_datasets import NUMBER_WORDS, PHOTOS, make_rows
from demo.make_videos import CLASSES, FRAME_SIZE, NUM_FRAMES, SPLITS, plan_clips, split_scans

CLIPS_PER_CLASS = {"train": 2, "val": 1, "test": 1}
ARGUMENTS = ["--train_clips", "2", "--val_clips", "1", "--test_clips", "1"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("videos") / "UCF101_subset.tar.gz"
    make_videos.main(["--out", str(path), *ARGUMENTS])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return path.read_bytes()


def test_archive_layout(archive):
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        paths = [member.name.split("/") for member in tar.getmembers()]
    assert {path[0] for path in paths} == {"UCF101_subset"}
    counts = {(split, label): 0 for split in SPLITS for label in CLASSES}
    for _, split, label, name in paths:
        counts[split, label] += 1
        assert name.startswith(f"v_{label}_g") and name.endswith(".avi")
    assert all(count == CLIPS_PER_CLASS[split] for (split, _), count in counts.items())


def test_archive_is_the_same_every_time(archive, tmp_path):
    make_videos.main(["--out", str(tmp_path / "again.tar"), *ARGUMENTS])
    make_videos.main(["--out", str(tmp_path / "other.tar"), *ARGUMENTS, "--seed", "1"])
    assert (tmp_path / "again.tar").read_bytes() == archive
    assert (tmp_path / "other.tar").read_bytes() != archive


def test_clips_move(archive):
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        video = tar.extractfile(tar.getmembers()[0]).read()
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.codec_tag == "XVID"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert [frame.shape for frame in frames] == [(FRAME_SIZE, FRAME_SIZE, 3)] * NUM_FRAMES
    assert np.ptp(frames[0]) > 80
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 80


@pytest.mark.parametrize("seed", [0, 1])
def test_no_scan_is_in_two_splits(seed):
    digits = load_digits()
    scans = split_scans(digits.target, seed)
    used = {split: {scan for pool in scans[split] for scan in pool} for split in SPLITS}
    # By content as well: the table could hold the same picture twice.
    pictures = {split: {digits.images[scan].tobytes() for scan in used[split]} for split in SPLITS}
    for kind in (used, pictures):
        assert not kind["train"] & kind["val"]
        assert not kind["train"] & kind["test"]
        assert not kind["val"] & kind["test"]
    assert sum(len(pool) for pool in used.values()) == len(digits.target)
    for pools in scans.values():
        for label, pool in enumerate(pools):
            assert (digits.target[pool] == label).all()


def test_clips_stay_the_same_when_there_are_more_of_them():
    labels = load_digits().target
    few = set(plan_clips(labels, CLIPS_PER_CLASS, seed=0))
    many = list(plan_clips(labels, {"train": 300, "val": 20, "test": 50}, seed=0))
    assert few < set(many)
    assert len({clip.path for clip in many}) == len({clip.seed for clip in many}) == len(many)


TASKS = ("docvqa", "hateful_memes", "nlvr2")


def write_dataset(task: str, folder: Path, *flags: str) -> Path:
    make_datasets.main(
        [task, "--out", str(folder), "--train_rows", "9", "--eval_rows", "5", *flags]
    )
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_dataset_layout(tmp_path, task):
    """The hub datasets' columns and files, as `datasets` reads them; evaluation's rows first."""
    folder = write_dataset(task, tmp_path / "data")
    splits = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    rows = splits["train"]
    if task == "docvqa":
        assert {split: len(splits[split]) for split in splits} == {"train": 9, "test": 5}
        assert isinstance(rows.features["image"], datasets.Image)
        assert {*rows.column_names} == {"id", "image", "query", "answers"}
        assert rows[0]["image"].size == (FRAME_SIZE, 2 * FRAME_SIZE)
        assert rows[0]["query"] == {
            "en": "Which digit is at the top?",
            "de": "Welche Ziffer steht oben?",
        }
        assert rows[4]["answers"] == ["4"]
        assert splits["test"][4]["answers"] == ["4", "four"]
        ids = [*rows["id"], *splits["test"]["id"]]
        assert len({*ids}) == len(ids) == 14 and all(isinstance(name, str) for name in ids)
        return
    assert {split: len(splits[split]) for split in splits} == {"train": 14}
    assert {*rows.column_names} == {"images", "texts"}
    assert isinstance(rows.features["images"].feature, datasets.Image)
    made = [*make_rows(task, "test", 5, seed=0), *make_rows(task, "train", 9, seed=0)]
    for row, expected in zip(rows, made, strict=True):
        assert len(row["images"]) == (2 if task == "nlvr2" else 1)
        for image, made_image in zip(row["images"], expected["images"], strict=True):
            assert (np.array(image) == np.array(made_image)).all()
        assert row["texts"] == expected["texts"]
        assert {*row["texts"][0]} == {"user", "assistant", "source"}


@pytest.mark.parametrize("task", TASKS)
def test_dataset_is_the_same_every_time(tmp_path, task):
    """The same bytes for the same arguments; more rows leave the others as they are."""
    folders = [write_dataset(task, tmp_path / name) for name in "ab"]
    folders.append(write_dataset(task, tmp_path / "c", "--seed", "1"))
    first, again, other = ([p.read_bytes() for p in sorted(f.iterdir())] for f in folders)
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))
    assert make_rows(task, "test", 6, seed=0)[:3] == make_rows(task, "test", 3, seed=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_evaluation_shows_no_scan_of_training(monkeypatch, seed):
    """Training's scans are made blank and all others solid: so are the digits in the pictures."""
    digits = load_digits()
    digits.images = np.full_like(digits.images, 16)
    for pool in split_scans(digits.target, seed)["train"]:
        digits.images[pool] = 0
    monkeypatch.setattr(make_datasets, "load_digits", lambda: digits)
    black = np.zeros((427, 640, 3), dtype=np.uint8)
    monkeypatch.setattr(make_datasets, "load_sample_image", lambda name: black)
    for split in ("train", "test"):
        inked = []  # pixels of every digit: dark ones on a page, bright ones on a meme
        for row in make_rows("docvqa", split, 40, seed):
            inked += [(half < 100).all(-1).sum() for half in np.split(np.array(row["image"]), 2)]
        for row in make_rows("hateful_memes", split, 40, seed):
            inked.append((np.array(row["images"][0]) > 200).all(-1).sum())
        assert len(inked) == 120
        assert max(inked) == 0 if split == "train" else min(inked) >= 50**2


def test_evaluation_shows_no_part_of_a_photo_of_training(monkeypatch):
    """By the place of every pixel, then by colour in the pictures that are made."""
    places = np.stack(np.mgrid[:427, :640], axis=-1)
    monkeypatch.setattr(make_datasets, "load_sample_image", lambda name: places)
    painted = {}
    for thing, (name, (left, top, right, bottom)) in PHOTOS.items():
        quarters = make_datasets.quarters(thing)
        seen = {
            split: {tuple(place) for part in parts for place in part.reshape(-1, 2).tolist()}
            for split, parts in quarters.items()
        }
        assert not seen["train"] & seen["test"]
        assert len(seen["train"] | seen["test"]) == (right - left) * (bottom - top)
        painted[name] = np.zeros((427, 640, 3), dtype=np.uint8)
        for channel, split in enumerate(("train", "test")):
            rows, columns = np.array(sorted(seen[split])).T
            painted[name][rows, columns, channel] = 255
    monkeypatch.setattr(make_datasets, "load_sample_image", painted.get)
    for channel, split in enumerate(("train", "test")):
        for row in make_rows("nlvr2", split, 60, seed=0):
            for image in map(np.array, row["images"]):
                assert image[:, :, channel].min() > 100
                assert image[:, :, 1 - channel].max() == image[:, :, 2].max() == 0


class Shown:
    """In the place of `Pictures`: what a picture shows, instead of the picture."""

    def __init__(self, split, seed):
        self.split = split

    def page(self, labels, rng):
        return list(labels)

    def meme(self, thing, label, rng):
        return thing, label

    def photo(self, thing, rng):
        return thing


@pytest.fixture
def shown(monkeypatch):
    monkeypatch.setattr(make_datasets, "Pictures", Shown)


@pytest.mark.parametrize("split", ["train", "test"])
def test_docvqa_answers(shown, split):
    """Right, and as often each digit at each place, so that a guess is right 1 time in 10."""
    answers, twice = Counter(), 0
    for row in make_rows("docvqa", split, 240, seed=0):
        place = {"top": 0, "bottom": 1}[row["query"]["en"].rstrip("?").split()[-1]]
        assert (place == 0) == row["query"]["de"].endswith("oben?")
        label = row["image"][place]
        twice += row["image"][1 - place] == label
        accepted = [str(label), NUMBER_WORDS[label]]
        assert row["answers"] == (accepted[:1] if split == "train" else accepted)
        answers[label, place] += 1
    assert len(answers) == 20 and {*answers.values()} == {12}
    assert 90 < twice < 150 if split == "train" else twice == 0, "in evaluation, the place matters"


def test_hateful_memes_answers(shown):
    """Right, and balanced for each photo and for each number: neither alone says anything."""
    answers = Counter()
    for row in make_rows("hateful_memes", "train", 240, seed=0):
        [shows], [text] = row["images"], row["texts"]
        assert text["assistant"] == ("Yes." if shows in (("flower", 0), ("temple", 1)) else "No.")
        answers[(*shows, text["assistant"])] += 1
    assert len(answers) == 4 and {*answers.values()} == {60}


def test_nlvr2_answers(shown):
    """Right, and each statement is true as often as not; some need both pictures."""
    answers, shows = Counter(), Counter()
    for row in make_rows("nlvr2", "train", 240, seed=0):
        [text] = row["texts"]
        left, right = (thing == "flower" for thing in row["images"])
        truth = {
            "Both pictures": left and right,
            "Exactly one": left + right == 1,
            "The left": left,
            "The right": right,
        }[re.match(r"Both pictures|Exactly one|The left|The right", text["user"])[0]]
        assert text["assistant"] == ("True." if truth else "False.")
        answers[text["user"], text["assistant"]] += 1
        shows[left, right] += 1
    assert len(answers) == 8 and {*answers.values()} == {30}
    assert len(shows) == 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint.main(["--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(processor) -> PreTrainedTokenizerFast:
    """Saved and loaded, as it is used."""
    return processor.tokenizer


def pieces(tokenizer: PreTrainedTokenizerFast, text: str, **kwargs) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **kwargs).input_ids)


@pytest.mark.parametrize(
    "text",
    [
        "Classify the video into one of the following classes: DigitZero, DigitOne.",
        " two  spaces  around ",
        "~`{[<|}]>\\",
        "<0x41> is text",
        "h\u00e9llo \u65e5\u672c \U0001f389\ttab\nline",
    ],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_class_names_are_single_tokens(tokenizer):
    ids = [tokenizer(name, add_special_tokens=False).input_ids for name in CLASSES]
    assert [len(name_ids) for name_ids in ids] == [1] * len(CLASSES)
    assert len({name_ids[0] for name_ids in ids}) == len(CLASSES)


def test_answers_begin_with_different_words(tokenizer):
    """AUROC compares first tokens, so these must not be a shared letter or the mark of a space."""
    for answers in (("Yes", "No"), ("Yes.", "No."), ("True.", "False."), NUMBER_WORDS):
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in answers]
        assert len({answer_ids[0] for answer_ids in ids}) == len(answers)
        assert [*map(len, ids)] == [1 + answer.endswith(".") for answer in answers]


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_whole_words(tokenizer, task):
    """Prompts stay short: a word that falls into characters would be missing in WORDS."""
    for row in make_rows(task, "train", 40, seed=0):
        question = row["query"]["en"] if task == "docvqa" else row["texts"][0]["user"]
        words = [f"\u2581{word}" for word in re.findall(r"\w+", question)]
        marks = re.findall(r"[^\w\s]", question)
        tokens = pieces(tokenizer, question, add_special_tokens=False)
        assert Counter(tokens) == Counter(words + marks)


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    eats_space = {
        "<|endoftext|>": False,
        "<|system|>": False,
        "<|end|>": False,
        "<|user|>": False,
        "<|assistant|>": True,
        "<|image|>": True,
        "</s>": True,
    }
    for token, eats in eats_space.items():
        assert pieces(tokenizer, token) == ["<s>", token]
        newline = [] if eats else ["<0x0A>"]
        assert pieces(tokenizer, f"{token}\nx") == ["<s>", token, "\u2581", *newline, "x"]


def test_answers_decode_as_the_real_ones_do(tokenizer):
    answer = f"{CLASSES[3]}<|end|>\n<|endoftext|>"
    assert pieces(tokenizer, answer, add_special_tokens=False) == [
        f"\u2581{CLASSES[3]}",
        "<|end|>",
        "\u2581",
        "<0x0A>",
        "<|endoftext|>",
    ]
    ids = tokenizer(answer, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"{CLASSES[3]} \n"


def test_chat_template(tokenizer):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|user|>\nHi<|end|>\n<|assistant|>\nYes<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n"
    )
    newline = ["\u2581", "<0x0A>"]
    assert pieces(tokenizer, text[: len("<|user|>\nHi<|end|>\n<|assistant|>\n")]) == [
        *("<s>", "<|user|>", *newline, "H", "i", "<|end|>", *newline, "<|assistant|>")
    ]


def test_checkpoint_answers_and_knows_where_to_stop(checkpoint, processor):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = processor.tokenizer
    assert model.num_parameters() < 1_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image|>")
    assert model.generation_config.eos_token_id == processor.stop_token_ids
    frames = [Image.new("RGB", (FRAME_SIZE, FRAME_SIZE))] * 2
    inputs = processor("<|user|>\n<|image_1|><|image_2|>\nHi<|end|>\n<|assistant|>\n", frames)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], len(tokenizer))
    assert logits.isfinite().all()


def test_checkpoint_is_the_same_every_time(checkpoint, tmp_path):
    make_checkpoint.main(["--out", str(tmp_path)])
    for file in checkpoint.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
