"""The demo's videos, tokenizer and checkpoint."""

import io
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerFast

from demo import make_checkpoint, make_videos
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
        assert pieces(tokenizer, f"{token}\na") == ["<s>", token, "\u2581", *newline, "a"]


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
