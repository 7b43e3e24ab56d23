"""
What a run will be, said before it starts: --plan. And how many prompts fit a GPU at a time.

    python finetune_hf_trainer_docvqa.py --bf16 --batch_size 64 --plan "8 x A100-80GB"
"""

import argparse
import copy
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ..data.collators import GenerationCollator, TrainingCollator
from ..data.images import image_sizes
from ..data.packing import count_tokens
from ..data.records import to_messages
from ..distributed import print_first, share_out, world_size
from ..errors import DataError, RunError
from ..model.processing_phi3_v import Phi3VProcessor
from .checkpoints import bytes_to_write
from .flops import MEMORY, by_name, peak_flops, training_flops
from .launch import deepspeed_path
from .loading import load_config
from .memory import FakeRun, Memory, Setup

MOST = 2000  # samples whose tokens are counted
OVERHEAD = 1e9  # bytes of a CUDA context and of NCCL's buffers
USABLE = 0.95  # of a GPU that is there; allocators lose some. Names are short of the real size.
MFU = 0.4


class Machine(NamedTuple):
    """`memory` is in bytes for one process, `flops` are those of a GPU at its best, if known."""

    gpus: int
    name: str
    memory: float
    flops: float | None
    on_gpu: bool


class Sample(NamedTuple):
    """Of a sample, or of those that share a row. `prompt` is what an evaluation is given."""

    tokens: int
    prompt: int
    pairs: int
    crops: int


def plan_run(
    args: argparse.Namespace,
    training_args: TrainingArguments,
    processor: Phi3VProcessor,
    train_dataset: Dataset | Sequence[dict],
    eval_dataset: Sequence[dict],
    lora: LoraConfig | None = None,
) -> None:
    """
    Lower the evaluation's batch where its longest prompts would not fit the GPU, and say so. With
    --plan, print what the run will be, and leave. Without it and without a GPU, there is nothing
    to do.

    Raises:
        SystemExit: with --plan, always; the status is 0.
        RunError: --plan names no GPU that is known, or --batch_size does not go with it.
    """
    machine = named_machine(args.plan) if args.plan else this_machine()
    if args.plan is None and not machine.on_gpu:
        return
    setup = run_setup(args, machine)
    run = FakeRun(load_config(args), args, training_args, lora, setup)
    prompts = measure_all(processor, eval_dataset)
    longest = max(prompts, key=lambda index: prompts[index].prompt)
    rows, evaluation = fitting_batch(
        lambda rows: run.evaluation(GenerationCollator(processor)([eval_dataset[longest]] * rows)),
        min(args.eval_batch_size_per_gpu, len(eval_dataset)),
        machine.memory,
    )
    if rows < min(args.eval_batch_size_per_gpu, len(eval_dataset)):
        print_first(
            f"evaluation: {rows} prompts at a time, and not {args.eval_batch_size_per_gpu}: the "
            f"longest has {prompts[longest].prompt:,} tokens, and {machine.memory / 1e9:.0f} GB are "
            "there"
        )
    training_args.per_device_eval_batch_size = rows
    if args.plan is None:
        return
    samples = measure_all(processor, train_dataset)
    longest = max(samples, key=lambda index: samples[index].tokens)
    collate = TrainingCollator(processor, for_trainer=True)
    batch = collate([train_dataset[longest]] * args.batch_size_per_gpu)
    del batch["ids"], batch["lengths"]
    labels = len(batch["shift_labels"]) / args.batch_size_per_gpu
    lines = [
        *_about_data(samples, len(train_dataset), prompts, len(eval_dataset)),
        *_about_work(args, training_args, machine, run, samples, len(train_dataset), labels),
        *_about_memory(machine, run.training(batch), evaluation, rows),
        _about_disk(args, training_args, run),
    ]
    print_first("\n".join([_title(args, machine, setup), *lines]))
    raise SystemExit(0)


# ---- The machine


def named_machine(text: str) -> Machine:
    """
    "8 x A100-80GB", "H200", "2 x 24GB".

    Raises:
        RunError: it says neither a size nor a GPU that is known.
    """
    count, name = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?(.*)", text.strip()).groups()
    size = re.search(r"(\d+)\s*GB", name, re.IGNORECASE)
    memory = int(size[1]) if size else by_name(MEMORY, name)
    if not memory or count == "0":
        known = ", ".join(" ".join(words) for words in MEMORY)
        raise RunError(
            f'--plan {text!r}: say how many GPUs and which, like "8 x A100-80GB" or "24GB". Known '
            f"without a size: {known}."
        )
    return Machine(int(count or 1), name, memory * 1e9, peak_flops(name), True)


def this_machine() -> Machine:
    """The GPUs that torchrun uses, without it all that are there; or the CPU."""
    if not torch.cuda.is_available():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(world_size(), "CPU", memory / processes, None, False)
    gpus = world_size() if "WORLD_SIZE" in os.environ else torch.cuda.device_count()
    device = torch.cuda.get_device_properties()
    return Machine(gpus, device.name, USABLE * device.total_memory, peak_flops(device.name), True)


def run_setup(args: argparse.Namespace, machine: Machine) -> Setup:
    """How the run computes on this machine, by its flags."""
    per_step = machine.gpus * args.batch_size_per_gpu
    if args.batch_size % per_step:
        raise RunError(
            f"--plan: --batch_size {args.batch_size} must be divisible by {machine.gpus} GPUs x "
            f"--batch_size_per_gpu {args.batch_size_per_gpu} = {per_step}."
        )
    low = torch.bfloat16 if args.bf16 else torch.float16
    path = deepspeed_path(args)
    return Setup(
        machine.gpus,
        args.batch_size // per_step,
        low if args.bf16 or machine.on_gpu else torch.float32,
        path and json.loads(path.read_text("utf-8")).get("zero_optimization", {}),
    )


# ---- Data


def measure_all(processor: Phi3VProcessor, dataset: Sequence) -> dict[int, Sample]:
    """Samples by index; of more than `MOST`, an even part. The ranks share the work."""
    count = min(len(dataset), MOST)
    indices = [len(dataset) * i // count for i in range(count)]
    measured = share_out(
        lambda index: measure(processor, dataset[index]), indices, each_machine=False
    )
    for sample in measured.values():
        if isinstance(sample, DataError):
            raise sample
    return measured


def measure(processor: Phi3VProcessor, item: dict | list[dict]) -> Sample:
    """A record, or several that share a row."""
    total = Sample(0, 0, 0, 0)
    size = processor.image_processor.crop_size["height"]
    for record in item if isinstance(item, list) else [item]:
        tokens = count_tokens(processor, record)
        answer = f"{to_messages(record)[-1]['content']}<|end|>\n<|endoftext|>"
        answer_tokens = processor.tokenizer(answer, add_special_tokens=False).input_ids
        padded = [processor.image_processor.calc_hd_size(*s) for s in image_sizes(record)]
        crops = sum(width * height // size**2 + 1 for width, height in padded)
        one = Sample(tokens, tokens - len(answer_tokens), tokens * (tokens + 1) // 2, crops)
        total = Sample(*map(sum, zip(total, one, strict=True)))
    return total


def fitting_batch(count, most: int, memory: float) -> tuple[int, Memory]:
    """The largest of `most`, its half, ..., 1 whose `count(rows)` fits, and what it needs."""
    rows = most
    while (needed := count(rows)).total + OVERHEAD > memory and rows > 1:
        rows //= 2
    return rows, needed


# ---- The text


def _title(args: argparse.Namespace, machine: Machine, setup: Setup) -> str:
    precision = str(setup.computed_in).removeprefix("torch.")
    path = deepspeed_path(args)
    return (
        f"Plan for {machine.gpus} x {machine.name}: {precision}, "
        f"{f'DeepSpeed {path.stem}' if path else 'DDP'}, batches of {args.batch_size} = "
        f"{machine.gpus} x {args.batch_size_per_gpu} x {setup.accumulation} accumulation steps"
    )


def _about_data(
    samples: dict[int, Sample], train_count: int, prompts: dict[int, Sample], eval_count: int
) -> list[str]:
    part = f" (by an even {len(samples):,} of them)" if len(samples) < train_count else ""
    lines = [
        f"  data         {train_count:,} to train on, {eval_count:,} to evaluate on",
        f"    {'a sample' + part:<36}{'min':>9}{'median':>9}{'p95':>9}{'max':>9}",
    ]
    for name, values in {
        "tokens": [sample.tokens for sample in samples.values()],
        "crops": [sample.crops for sample in samples.values()],
        "tokens of a prompt to evaluate": [sample.prompt for sample in prompts.values()],
    }.items():
        values = sorted(values)
        shown = (values[int(share * (len(values) - 1))] for share in (0, 0.5, 0.95, 1))
        lines.append(f"    {name:<36}" + "".join(f"{value:>9,}" for value in shown))
    return lines


def _about_work(
    args: argparse.Namespace,
    training_args: TrainingArguments,
    machine: Machine,
    run: FakeRun,
    samples: dict[int, Sample],
    count: int,
    labels: float,
) -> list[str]:
    """Steps as the Trainer counts them; FLOPs without what checkpointing computes again."""
    micro_batches = math.ceil(count / (machine.gpus * args.batch_size_per_gpu))
    per_epoch = math.ceil(micro_batches / run.setup.accumulation)
    steps = math.ceil(args.num_train_epochs * per_epoch)
    if training_args.max_steps > 0:
        steps = training_args.max_steps
    each = training_flops(run.model)
    mean = {
        name: sum(getattr(sample, name) for sample in samples.values()) / len(samples)
        for name in ("tokens", "pairs", "crops")
    }
    flops = sum(each[unit] * number for unit, number in (mean | {"labels": labels}).items())
    total = flops * count * steps / per_epoch
    hours = "  (hours: the GPU's FLOP/s are not known)"
    if machine.flops:
        at_speed = MFU * machine.flops * machine.gpus
        hours = f", {total / at_speed / 3600:,.2f} hours at {MFU:.0%} MFU, evaluations apart"
    return [
        f"  steps        {steps:,}",
        f"  parameters   {run.trained:,} trained, of {run.parameters:,}",
        f"  computation  {flops / 1e12:,.3g} TFLOP a sample, {total / 1e15:,.4g} PFLOP{hours}",
    ]


def _about_memory(
    machine: Machine, training: Memory, evaluation: Memory, rows: int
) -> list[str]:
    parts = {"training": training, f"evaluation of {rows}": evaluation}
    lines = [f"  {'GB a process':<18}" + "".join(f"{p:>13}" for p in (*Memory._fields, "all"))]
    for name, memory in parts.items():
        cells = "".join(f"{size / 1e9:>13.2f}" for size in (*memory, memory.total))
        lines.append(f"    {name:<16}{cells}")
    needed = max(memory.total for memory in parts.values()) + OVERHEAD * machine.on_gpu
    fits = "it fits" if needed <= machine.memory else "IT DOES NOT FIT"
    context = ", with 1 GB for CUDA and NCCL," if machine.on_gpu else ""
    return [*lines, f"  memory       {needed / 1e9:.1f} GB{context} of {machine.memory / 1e9:.1f}: {fits}"]


def _about_disk(args: argparse.Namespace, training_args: TrainingArguments, run: FakeRun) -> str:
    checkpoints = args.save_total_limit + 1 if training_args.save_strategy != "no" else 0
    needed = bytes_to_write(run.model, args, checkpoints, run.setup.zero is not None)
    path = Path(args.output_dir).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    return f"  disk         {needed / 1e9:,.1f} GB for {args.output_dir}, {free / 1e9:,.1f} are free"
