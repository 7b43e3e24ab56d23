"""
The memory that a few steps of a small model really take on a CPU:

    python -m tests.helpers.peak_memory lora checkpointing

prints the bytes that the process held at most, on top of its libraries.
"""

import argparse
import ctypes
import re
import sys
from pathlib import Path

import torch

from benchmarks.memory import make_batch
from benchmarks.models import make_config
from benchmarks.training_step import LORA
from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.training.attention import SDPA
from phi3v.training.loading import freeze_and_adapt

ACCUMULATION = 2


def small_config() -> Phi3VConfig:
    """Activations of a sample take more than its weights."""
    config = make_config("small")
    config.vocab_size, config.image_token_id, config.pad_token_id = 2000, 1000, 0
    return config


def small_batch() -> dict:
    return make_batch([(1, 1)], 800)


def run_flags(lora: bool) -> argparse.Namespace:
    """What `freeze_and_adapt` and the count look at."""
    kinds = dict.fromkeys(("use_qlora", "use_dora", "freeze_vision_model", "use_flash_attention"))
    return argparse.Namespace(**kinds, use_lora=lora)


def train(config: Phi3VConfig, lora: bool, checkpointing: bool, batch: dict) -> None:
    """A step of one micro-batch and one of two, as the Trainer does them without DeepSpeed."""
    base = Phi3VForCausalLM._from_config(config, attn_implementation=SDPA)
    model = freeze_and_adapt(base, run_flags(lora), LORA).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, fused=True)
    for accumulation in (1, ACCUMULATION):
        for _ in range(accumulation):
            model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def held(field: str) -> int:
    """Bytes that this process holds (VmRSS) or has held at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is given back
    settings = "lora" in sys.argv, "checkpointing" in sys.argv
    train(make_config("tiny"), *settings, make_batch([(1, 1)], 400))  # loads the kernels
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = held("VmRSS")
    train(small_config(), *settings, small_batch())
    print(held("VmHWM") - before)
