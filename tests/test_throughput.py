"""What a run says about its own speed: counts, FLOPs, time."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from conftest import GOLDEN
from helpers.forward_cases import at_labels
from phi3v import Phi3VConfig
from phi3v.training.flops import peak_flops, training_flops
from phi3v.training.loading import quantization_config
from phi3v.training.throughput import Meter, count_batch

from peft import LoraConfig, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

BATCH = {
    "lengths": [4, 2],
    "shift_labels": torch.tensor([7, 7, 7]),
    "image_sizes": [[28, 84], [56, 56], [0, 0]],
}
COUNTS = {
    "samples": 2,
    "tokens": 6,
    "pairs": (1 + 2 + 3 + 4) + (1 + 2),
    "labels": 3,
    "images": 2,
    "crops": (1 * 3 + 1) + (2 * 2 + 1) + 1,
}


# ---------------------------------------------------------------- counts


def test_counts():
    """
    A blank image and an image's own padding to the batch's crops do not count. Of a blank image the
    tower sees the global crop.
    """
    assert count_batch(BATCH, crop_size=28) == COUNTS


def test_counts_without_images():
    """A batch of texts alone sees no crop."""
    numbers = count_batch({"lengths": [3], "shift_labels": torch.ones(2)}, 28)
    assert (numbers["images"], numbers["crops"], numbers["pairs"]) == (0, 0, 6)


# ---------------------------------------------------------------- FLOPs


def lora(frozen: bool) -> LoraConfig:
    targets = "qkv_proj|o_proj|gate_up_proj|down_proj|lm_head"
    if not frozen:
        targets += r"|[qkv]_proj|out_proj|fc1|fc2|img_projection\.[02]"
    return LoraConfig(
        r=4,
        target_modules=rf".*\b({targets})",
        exclude_modules=r".*\.vision_model\.encoder\.layers\.2\..*",  # is never run
    )


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
        model = get_peft_model(model, lora(frozen))
    length = vision.count_tokens(1, 2)
    ids = torch.full((1, length + 40), 9)
    ids[:, :length] = image_token
    labels = ids.where(ids != image_token, -100)
    batch = {
        "input_ids": ids,
        **at_labels(labels),
        "pixel_values": torch.zeros(1, 3, 3, vision.crop_size, vision.crop_size),
        "image_sizes": [[vision.crop_size, 2 * vision.crop_size]],
    }
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch, use_cache=False).loss
        if loss.requires_grad:
            loss.backward()
    assert loss.requires_grad == (trained != "nothing")
    flops = training_flops(model)
    numbers = count_batch({**batch, "lengths": [ids.shape[1]]}, vision.crop_size)
    numbers["pairs"] = numbers["tokens"] ** 2
    total = sum(numbers[name] * each for name, each in flops.items())
    assert total == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_flops_of_4_bit_weights(demo_checkpoint):
    """Weights of 4 bits take the FLOPs of those that they stand for."""
    flops = []
    for options in ({}, {"quantization_config": quantization_config(torch.float32)}):
        model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, **options)
        flops.append(training_flops(get_peft_model(model, lora(frozen=False))))
    assert flops[0] == flops[1]


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
    # A page of DocVQA as in docs/speed.md: 16 crops and the global one, 2,443 tokens, 10 of them
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


# ---------------------------------------------------------------- the meter


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


@pytest.fixture
def meter(demo_checkpoint, clock) -> Meter:
    meter = Meter(AutoModelForCausalLM.from_pretrained(demo_checkpoint), torch.device("cpu"))
    meter.crop_size = 28
    return meter


def step(meter: Meter, clock: Clock, batches: int = 2) -> None:
    """2 seconds of waiting, 1 of computing for every batch, and 50 before the next step."""
    with meter.waiting():
        clock.now += 2
    for _ in range(batches):
        meter.count(BATCH)
        clock.now += 1
    meter.step_done()
    clock.now += 50


def test_rates_are_those_of_training_time(meter, clock):
    """
    Waiting for samples and computing count, and the share of the waiting is told; what comes
    between steps does not. Rates are of the steps since the last ones, and the summary of all.
    """
    step(meter, clock)
    step(meter, clock)
    rates = meter.rates()
    for name in ("samples", "tokens", "images", "crops"):
        assert rates[f"{name}_per_second"] == 4 * COUNTS[name] / 8
    used = sum(COUNTS[name] * each for name, each in meter.flops.items())
    assert rates["tflops_per_second"] == pytest.approx(4 * used / 8 / 1e12)
    assert rates["data_wait"] == 4 / 8 and rates["peak_memory_gb_per_process"] > 0.01

    step(meter, clock, batches=1)
    assert meter.rates()["samples_per_second"] == COUNTS["samples"] / 3
    step(meter, clock, batches=1)
    numbers, line = meter.summary()
    assert numbers["train_samples_per_second"] == 6 * COUNTS["samples"] / 14
    assert numbers["train_data_wait"] == 8 / 14
    assert line.startswith("Training: 12 samples in 14.0 s, 0.86 samples/s") and "peak mem" in line


def test_mfu_where_the_peak_is_known(meter, clock):
    """MFU is the share of the peak, and stands in the place of TFLOP/s."""
    meter.peak_flops = 5e12
    step(meter, clock)
    numbers, line = meter.summary()
    used = 2 * sum(COUNTS[name] * each for name, each in meter.flops.items())
    assert numbers["train_mfu"] == pytest.approx(used / 4 / 5e12)
    assert "train_tflops_per_second" not in numbers and "crops/s, MFU 0.0%, " in line


def test_a_run_without_a_step(meter):
    """A run that is resumed at its end has no rates, and does not fail over that."""
    numbers, line = meter.summary()
    assert numbers["train_samples_per_second"] == 0 and "0 samples in 0.0 s" in line


def test_ranks_together(meter, clock, monkeypatch):
    """What ranks do is added up, and the slowest decides about the time."""

    def all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> None:
        other = tensor if op == dist.ReduceOp.SUM else tensor + 1  # a second slower
        tensor.copy_(tensor + other if op == dist.ReduceOp.SUM else tensor.maximum(other))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    step(meter, clock)
    rates = meter.rates()
    assert rates["samples_per_second"] == 2 * 2 * COUNTS["samples"] / 5
    assert rates["data_wait"] == 3 / 5
    used = 2 * sum(COUNTS[name] * each for name, each in meter.flops.items())
    assert rates["tflops_per_second"] == pytest.approx(used / 5 / 1e12)  # of one process
