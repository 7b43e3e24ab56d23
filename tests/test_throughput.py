"""What a run says about its own speed: counts, FLOPs, time."""

import argparse
import json
import re

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from conftest import GOLDEN
from helpers.forward_cases import at_labels
from helpers.recipes import run
from helpers.records import RECORDS, image, record, turn
from helpers.trainers import arguments, make_trainer
from phi3v import Phi3VConfig
from phi3v.data.collators import TrainingCollator
from phi3v.errors import RunError
from phi3v.training.loading import load_processor, lora_config
from phi3v.training.loss_watch import LossWatch
from phi3v.training.throughput import (
    COUNTED,
    ThroughputCallback,
    count_batch,
    peak_flops,
    training_flops,
)
from strategy_runs import data_flags, write_datasets

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

LORA = {"lora_rank": 4, "lora_alpha_ratio": 2, "lora_dropout": 0.0}


class Clock:
    """Stands for time.perf_counter: it moves when a test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("phi3v.training.throughput.time", clock)
    return clock


def timed_trainer(args: argparse.Namespace, records: list, *callbacks) -> Trainer:
    """Logs every other step."""
    trainer = make_trainer(args, records)
    trainer.args.logging_steps = 2
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def throughput_of(trainer: Trainer) -> ThroughputCallback:
    callbacks = trainer.callback_handler.callbacks
    return next(callback for callback in callbacks if isinstance(callback, ThroughputCallback))


def log_lines(trainer: Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def summary(trainer: Trainer) -> dict:
    return next(e for e in trainer.state.log_history if "train_tokens_per_second" in e)


# ---------------------------------------------------------------- counts


def counted(batch: dict, crop_size: int = 28) -> dict[str, int]:
    return dict(zip(COUNTED, count_batch(batch, crop_size).tolist(), strict=True))


def test_counts_of_a_padded_batch():
    """Padding, the first label and an image's own padding to the batch's crops do not count."""
    batch = {
        "lengths": [4, 2],
        "labels": torch.tensor([[7, -100, 7, 7], [-100, 7, -100, -100]]),
        "image_sizes": torch.tensor([[28, 84], [56, 56]]),
    }
    assert counted(batch) == {
        "samples": 2,
        "tokens": 6,
        "pairs": (1 + 2 + 3 + 4) + (1 + 2),
        "labels": 3,
        "images": 2,
        "crops": (1 * 3 + 1) + (2 * 2 + 1),
    }


def test_counts_of_a_packed_row(demo_processor):
    """Samples that share a row are counted like the same samples in rows of their own."""
    collator = TrainingCollator(demo_processor, for_trainer=True)
    assert counted(collator([RECORDS])) == counted(collator(RECORDS))


def test_counts_without_images():
    """A batch of texts alone sees no crop."""
    ids = torch.ones(1, 3, dtype=torch.long)
    numbers = counted({"lengths": [3], "labels": ids})
    assert (numbers["images"], numbers["crops"], numbers["pairs"]) == (0, 0, 6)


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("trained", ["nothing", "full", "frozen", "lora", "lora-frozen"])
def test_flops_are_those_that_pytorch_counts(demo_checkpoint, trained):
    """
    Forward alone (where nothing is trained) and with the backward pass, the formula gives what
    PyTorch's counter sees in the matrix multiplications.

    The counter sees all pairs where eager attention computes and masks them, so all are given to
    the formula. What remains, up to 0.4 % in a model as tiny as this, are the separators' two rows.
    """
    model = AutoModelForCausalLM.from_pretrained(
        demo_checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).train()
    frozen = "frozen" in trained
    model.requires_grad_(trained != "nothing")
    model.model.vision_embed_tokens.requires_grad_(trained in ("full", "lora"))
    model.model.vision_embed_tokens.img_processor.freeze_unused()
    vision, image_token = model.model.vision_embed_tokens, model.config.image_token_id
    if "lora" in trained:
        config = lora_config(argparse.Namespace(freeze_vision_model=frozen, **LORA), model)
        model = get_peft_model(model, config)
    length = vision.count_tokens(1, 2)
    ids = torch.full((1, length + 40), 9)
    ids[:, :length] = image_token
    batch = {
        "input_ids": ids,
        "lengths": [ids.shape[1]],
        **at_labels(ids.where(ids != image_token, -100)),
        "pixel_values": torch.zeros(1, 3, 3, vision.crop_size, vision.crop_size),
        "image_sizes": torch.tensor([[vision.crop_size, 2 * vision.crop_size]]),
    }
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch, use_cache=False).loss
        if loss.requires_grad:
            loss.backward()
    assert loss.requires_grad == (trained != "nothing")
    flops = training_flops(model)
    numbers = counted(batch, vision.crop_size)
    numbers["pairs"] = numbers["tokens"] ** 2
    total = sum(numbers[name] * each for name, each in flops.items())
    assert total == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_flops_of_the_real_model():
    """Worked out by hand from the sizes of the published configuration, for full finetuning."""
    with torch.device("meta"):
        config = Phi3VConfig.from_pretrained(GOLDEN / "config_full.json")
        model = AutoModelForCausalLM.from_config(config)
    flops = training_flops(model)
    d, mlp, c = 3072, 8192, 1024
    decoder_layer = d * 3 * d + d * d + d * 2 * mlp + mlp * d  # qkv, o, gate_up, down
    assert flops["tokens"] == 6 * 32 * decoder_layer == 21_743_271_936
    assert flops["pairs"] == 12 * 32 * d
    assert flops["labels"] == 6 * d * 32064
    patch = 3 * 14 * 14 * c  # without a gradient of the pixels
    clip = 577 * 6 * 12 * c * c + 577**2 * 12 * c  # a layer, and its attention over all pairs
    projection = 144 * 6 * (4 * c * d + d * d)
    assert flops["crops"] == 576 * 4 * patch + 23 * clip + projection
    # A page of DocVQA as in the README: 16 crops and the global one, 2,443 tokens, 10 of them
    # labelled.
    page = {"tokens": 2443, "pairs": 2443 * 2444 // 2, "labels": 10, "crops": 17}
    assert sum(page[name] * each for name, each in flops.items()) / 1e12 == pytest.approx(
        75.63, 1e-3
    )


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Quadro RTX 8000", 130.5e12),
        ("Some future GPU", None),
    ],
)
def test_peak_flops(name, flops):
    """A device is told by whole words of its name; no number is guessed for another chip."""
    assert peak_flops(name) == flops


# ---------------------------------------------------------------- a run


def test_every_log_line_and_the_summary(demo_checkpoint, tmp_path, capsys):
    """Rates are in the printed lines and in the log; the whole run's add up to its batches."""
    trainer = timed_trainer(arguments(demo_checkpoint, tmp_path), RECORDS * 3)
    trainer.train()
    names = {f"{name}_per_second" for name in ("samples", "tokens", "images", "crops", "tflops")}
    names |= {"data_wait", "peak_memory_gb_per_process"}
    lines = log_lines(trainer)
    assert len(lines) == 2, "the fifth step is in the summary alone"
    assert all(line[name] > 0 for line in lines for name in names), lines
    printed = capsys.readouterr().out
    assert printed.count("'tokens_per_second'") == 2 and "'crops_per_second'" in printed
    assert "Training: 9 samples in" in printed and "peak memory" in printed

    total = throughput_of(trainer).total
    processor = load_processor(arguments(demo_checkpoint, tmp_path))
    batch = TrainingCollator(processor, for_trainer=True)(RECORDS)
    assert total["samples"] == 9
    assert total["tokens"] == 3 * sum(batch["lengths"])
    assert total["labels"] == 3 * int((batch["labels"] != -100).sum())
    assert total["images"] == 3 * len(batch["image_sizes"])
    assert summary(trainer)["train_tokens_per_second"] == total["tokens"] / total["seconds"]
    flops = training_flops(trainer.model)
    used = sum(total[name] * each for name, each in flops.items()) / total["seconds"]
    assert summary(trainer)["train_tflops_per_second"] == pytest.approx(used / 1e12)


def test_mfu_where_the_peak_is_known(demo_checkpoint, tmp_path, capsys):
    """MFU is the share of the peak, and stands in the place of TFLOP/s."""

    class Device(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            throughput.peak_flops = 5e12

    trainer = timed_trainer(arguments(demo_checkpoint, tmp_path), RECORDS, Device())
    throughput = throughput_of(trainer)
    trainer.train()
    total, numbers = throughput.total, summary(trainer)
    used = sum(total[name] * each for name, each in throughput.flops.items()) / total["seconds"]
    assert numbers["train_mfu"] == pytest.approx(used / 5e12)
    assert "train_tflops_per_second" not in numbers
    assert re.search(r"crops/s, MFU \d+\.\d%, ", capsys.readouterr().out)


def test_what_counts_as_training_time(demo_checkpoint, tmp_path, clock):
    """
    Waiting for samples and computing count, and the share of the waiting is told. Evaluations and
    checkpoints, which come between steps, make a run longer, but not its rates lower.
    """

    class Samples(list):
        def __getitem__(self, index: int) -> dict:
            clock.now += 2
            return super().__getitem__(index)

    class BetweenSteps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.now += 50

        def on_save(self, args, state, control, **kwargs):
            clock.now += 50

    def compute(*_):
        clock.now += 1

    samples = Samples([record(turn("A?", "b", image(color="red")))] * 8)
    args = arguments(demo_checkpoint, tmp_path, "--save_steps", "1")
    trainer = timed_trainer(args, samples, BetweenSteps())
    trainer.model.register_forward_hook(compute)
    trainer.train()
    total = throughput_of(trainer).total
    assert clock.now >= 4 * 100, "four steps, and a checkpoint after each"
    assert (total["waited"], total["seconds"]) == (8 * 2, 8 * (2 + 1))
    assert summary(trainer)["train_data_wait"] == pytest.approx(2 / 3)
    assert summary(trainer)["train_samples_per_second"] == pytest.approx(1 / 3)


def test_a_script_that_forgets_to_time_batches_is_told(demo_checkpoint, tmp_path):
    trainer = make_trainer(arguments(demo_checkpoint, tmp_path))
    trainer.add_callback(ThroughputCallback())
    with pytest.raises(RunError, match=r"time_batches\(trainer\) before trainer\.train\(\)"):
        trainer.train()


@pytest.mark.parametrize("name", ["docvqa", "hateful_memes", "nlvr2", "ucf101"])
def test_recipes_measure_whole_steps(
    demo_checkpoint, tmp_path, monkeypatch, own_cache, clock, name
):
    """
    LossWatch waits for the device at the end of a step. That time is the step's, in every recipe.
    """

    def wait(watch, *args, **kwargs):
        clock.now += 10
        on_step_end(watch, *args, **kwargs)

    on_step_end = LossWatch.on_step_end
    monkeypatch.setattr(LossWatch, "on_step_end", wait)
    write_datasets(tmp_path / "data")
    run(name, demo_checkpoint, tmp_path, monkeypatch, *data_flags(name, tmp_path / "data"))
    state = json.loads((tmp_path / "output" / "trainer_state.json").read_text())
    [rate] = [
        entry["train_samples_per_second"]
        for entry in state["log_history"]
        if "train_data_wait" in entry
    ]
    assert state["global_step"] == 4 and rate == pytest.approx(8 / (4 * 10))
