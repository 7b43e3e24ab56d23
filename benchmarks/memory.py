"""
The README's table of memory a GPU, by the count that --plan makes. Nothing is measured.

    python -m benchmarks.memory

Phi-3.5-vision in bf16 with gradient checkpointing and accumulation, one sample at a time.
"""

import argparse
from types import SimpleNamespace

import torch
from transformers.utils import logging

from benchmarks.models import make_config
from benchmarks.training_step import LORA
from phi3v.training.memory import FakeRun, Setup

GPUS = (1, 2, 4, 8)
PAGE = ([(4, 4)], 2546)  # rows and columns of an image's crops, and tokens of the sample
ZERO_2 = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8}
METHODS = {
    "full finetuning, ZeRO-2": {},
    "the same, `--optim adamw_bnb_8bit`": {"optim": "adamw_bnb_8bit"},
    "8-bit AdamW and `--deepspeed none`": {"optim": "adamw_bnb_8bit", "zero": None},
    "frozen vision model, ZeRO-2": {"freeze_vision_model": True},
    "LoRA, rank 64": {"use_lora": True},
    "QLoRA, rank 64": {"use_lora": True, "use_qlora": True},
}


def make_batch(grids: list[tuple[int, int]], tokens: int, rows: int = 1, labels: int = 8) -> dict:
    """Rows of images of (rows, columns) crops each, as `TrainingCollator` gives them."""
    image_tokens = sum((h * w + 1) * 144 + 1 + (h + 1) * 12 for h, w in grids)
    starts = torch.arange(rows)[:, None] * tokens
    crops = max(h * w for h, w in grids) + 1
    return {
        "input_ids": torch.ones(rows, tokens, dtype=torch.long),
        "labels": torch.ones(rows, tokens, dtype=torch.long),
        "image_positions": (starts + torch.arange(image_tokens)).flatten(),
        "pixel_values": torch.zeros(len(grids) * rows, crops, 3, 336, 336),
        "image_sizes": [[h * 336, w * 336] for h, w in grids] * rows,
        "logits_to_keep": torch.stack(
            [torch.arange(rows).repeat_interleave(labels), torch.arange(labels).repeat(rows)]
        ),
        "shift_labels": torch.ones(rows * labels, dtype=torch.long),
    }


def make_prompts(config, grids: list[tuple[int, int]], tokens: int, rows: int = 8) -> dict:
    """The same without answers, as `GenerationCollator` gives them."""
    batch = make_batch(grids, tokens, rows)
    batch["input_ids"].flatten()[batch["image_positions"]] = config.image_token_id
    image_sizes = torch.tensor(batch["image_sizes"])
    return {name: batch[name] for name in ("input_ids", "pixel_values")} | {
        "image_sizes": image_sizes
    }


def full_size(
    gpus: int = 8,
    zero: dict | None = ZERO_2,
    checkpointing: bool = True,
    optim: str = "adamw_torch_fused",
    **flags: bool,
) -> FakeRun:
    """Phi-3.5-vision as the flags train it."""
    kinds = ("use_lora", "use_qlora", "use_dora", "freeze_vision_model", "use_flash_attention")
    args = argparse.Namespace(**dict.fromkeys(kinds, False) | flags)
    training_args = SimpleNamespace(
        optim=optim,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    setup = Setup(gpus, 2, True, torch.bfloat16, None if args.use_lora else zero)
    return FakeRun(make_config("full"), args, training_args, LORA, setup)


def main():
    logging.set_verbosity_error()
    print("| method | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs |")
    print("| --- |" + " --- |" * len(GPUS))
    for name, settings in METHODS.items():
        cells = []
        for gpus in GPUS:
            run = full_size(gpus, **settings)
            evaluation = run.evaluation(make_prompts(run.model.config, *PAGE))
            training = run.training(make_batch(*PAGE))
            cells.append(f"{sum(training) / 1e9:.0f}, {sum(evaluation) / 1e9:.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
