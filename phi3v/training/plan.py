"""
What a run will be, said before it starts: --plan. And how many prompts fit a GPU at a time.

    python finetune_hf_trainer_docvqa.py --bf16 --batch_size 64 --plan "8 x A100-80GB"
"""

import argparse
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ..data.collators import GenerationCollator, TrainingCollator
from ..data.images import image_sizes
from ..data.packing import count_parts
from ..distributed import print_first, share_out, world_size
from ..errors import DataError, RunError, one_line
from ..model.processing_phi3_v import Phi3VProcessor
from .checkpoints import bytes_to_write
from .flops import GIGABYTES, by_name, peak_flops, training_flops
from .launch import deepspeed_path
from .loading import load_config
from .memory import FakeRun, Memory, Setup

from peft import LoraConfig

MOST = 2000  # samples that are looked at
OVERHEAD = 1e9  # bytes of a CUDA context and NCCL's buffers
USABLE = 0.95  # of a GPU that is there, as allocators lose some; names say less than there is
MFU = 0.4


class Machine(NamedTuple):
    """`memory` in bytes for each process; `flops` of a GPU at its best, where they are known."""

    gpus: int
    name: str
    memory: float
    flops: float | None = None
    on_gpu: bool = True


def plan_run(
    args: argparse.Namespace,
    training_args: TrainingArguments,
    processor: Phi3VProcessor,
    train_dataset: Dataset | Sequence[dict],
    eval_dataset: Sequence[dict],
    lora: LoraConfig | None = None,
) -> None:
    """
    Say how much memory of the GPU the run will take. With --plan, print all that it will be and
    leave; without a GPU, there is nothing to say.

    Evaluation takes fewer prompts at a time, which is said, where the longest would not fit.

    Raises:
        SystemExit: with --plan; the status is 0.
    """
    machine = named_machine(args.plan) if args.plan else this_machine(args.plan is not None)
    if args.plan is None and not machine.on_gpu:
        return
    setup = run_setup(args, machine)
    samples, prompts = (measure_all(processor, data) for data in (train_dataset, eval_dataset))
    try:
        run = FakeRun(load_config(args), args, training_args, lora, setup)
        evaluation = fit_evaluation(run, machine, processor, prompts, eval_dataset)
        rows = training_args.per_device_eval_batch_size
        parts = {f"evaluation of {rows}": evaluation}
        if not args.eval_only:
            longest = train_dataset[max(samples, key=lambda index: samples[index]["tokens"])]
            parts = {"training": train_memory(run, processor, longest), **parts}
    except Exception as error:
        # A run does not end for it: evaluation takes fewer prompts too where memory runs out.
        if args.plan is not None:
            raise
        print_first(f"Plan: memory was not counted, because of {one_line(error)}")
        return
    if args.plan is None:
        sizes = ", ".join(f"{name} {sum(memory) / 1e9:.1f} GB" for name, memory in parts.items())
        print_first(f"Plan: {sizes} a GPU. {_verdict(machine, parts)}. --plan says more")
        return
    lines = [
        *_about_data(samples, len(train_dataset), prompts, len(eval_dataset)),
        *_about_work(args, training_args, machine, run, samples, len(train_dataset)),
        *_about_memory(machine, parts),
    ]
    print_first("\n  ".join([f"Plan for {machine.gpus} x {machine.name}", *lines]))
    raise SystemExit(0)


def train_memory(run: FakeRun, processor: Phi3VProcessor, longest: dict | list[dict]) -> Memory:
    """What a micro-batch of the longest samples takes."""
    batch = TrainingCollator(processor, for_trainer=True)([longest] * run.args.batch_size_per_gpu)
    del batch["ids"], batch["lengths"]
    return run.training(batch)


def fit_evaluation(
    run: FakeRun, machine: Machine, processor: Phi3VProcessor, prompts: dict, dataset: Sequence
) -> Memory:
    """Lower the evaluation's batch until its longest prompts fit; returns what they take then."""
    longest = dataset[max(prompts, key=lambda index: prompts[index]["prompt"])]
    collate, args = GenerationCollator(processor), run.training_args
    rows = wanted = min(args.per_device_eval_batch_size, len(dataset))
    while not _fits(memory := run.evaluation(collate([longest] * rows)), machine) and rows > 1:
        rows //= 2
    if rows < wanted:
        print_first(f"evaluation: {rows} prompts at a time, as {wanted} of the longest do not fit")
    args.per_device_eval_batch_size = rows
    return memory


def named_machine(text: str) -> Machine:
    """Of "8 x A100-80GB", "H200" or "2 x 24GB". Raises RunError where no size is known."""
    count, name = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.*)", text.strip(), re.IGNORECASE).groups()
    size = re.search(r"(\d+)\s*GB", name, re.IGNORECASE)
    memory = int(size[1]) if size else by_name(GIGABYTES, name)
    if not memory or count == "0":
        known = ", ".join(" ".join(words) for words in GIGABYTES)
        raise RunError(
            f'--plan {text!r}: say how many GPUs and which, like "8 x A100-80GB" or "24GB". '
            f"Known by name: {known}."
        )
    return Machine(int(count or 1), name, memory * 1e9, peak_flops(name))


def this_machine(planned: bool) -> Machine:
    """The run's GPUs, of a planned one without torchrun all that are there; or the CPU."""
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return Machine(world_size(), "CPU", memory, on_gpu=False)
    alone = planned and "WORLD_SIZE" not in os.environ
    gpus = torch.cuda.device_count() if alone else world_size()
    device = torch.cuda.get_device_properties()
    return Machine(gpus, device.name, USABLE * device.total_memory, peak_flops(device.name))


def run_setup(args: argparse.Namespace, machine: Machine) -> Setup:
    """How the run computes there, by its flags."""
    per_step = machine.gpus * args.batch_size_per_gpu
    if args.batch_size % per_step:
        raise RunError(
            f"--batch_size {args.batch_size} must be divisible by {machine.gpus} GPUs x "
            f"--batch_size_per_gpu {args.batch_size_per_gpu} = {per_step}."
        )
    low = torch.bfloat16 if args.bf16 else torch.float16
    precision = low if args.bf16 or machine.on_gpu else torch.float32
    path = deepspeed_path(args)
    zero = path and json.loads(path.read_text("utf-8")).get("zero_optimization", {})
    return Setup(machine.gpus, args.batch_size // per_step, machine.on_gpu, precision, zero)


def measure_all(processor: Phi3VProcessor, dataset: Sequence) -> dict[int, Counter]:
    """By index; of more than `MOST` samples, an even part. The ranks share the work."""
    count = min(len(dataset), MOST)
    indices = [len(dataset) * i // count for i in range(count)]
    measured = share_out(lambda i: measure(processor, dataset[i]), indices, each_machine=False)
    for sample in measured.values():
        if isinstance(sample, DataError):
            raise sample
    return measured


def measure(processor: Phi3VProcessor, item: dict | list[dict]) -> Counter:
    """What `training_flops` goes by, and `prompt`, the tokens before the answer: of a row."""
    measured, size = Counter(), processor.image_processor.crop_size["height"]
    for record in item if isinstance(item, list) else [item]:
        prompt, labels = count_parts(processor, record)
        tokens = prompt + labels
        padded = [processor.image_processor.calc_hd_size(*s) for s in image_sizes(record)]
        crops = sum(width * height // size**2 + 1 for width, height in padded)
        pairs = tokens * (tokens + 1) // 2
        measured.update(tokens=tokens, prompt=prompt, pairs=pairs, labels=labels, crops=crops)
    return measured


def _fits(memory, machine) -> bool:
    return sum(memory) + OVERHEAD * machine.on_gpu <= machine.memory


def _about_data(samples, train_count, prompts, eval_count) -> list[str]:
    part = f"; an even {MOST:,} looked at" if max(train_count, eval_count) > MOST else ""
    lines = [f"data          {train_count:,} samples to train on, {eval_count:,} to evaluate{part}"]
    for name, of, unit in (
        ("tokens of a sample", samples, "tokens"),
        ("crops of a sample", samples, "crops"),
        ("tokens of a prompt to evaluate", prompts, "prompt"),
    ):
        numbers = sorted(sample[unit] for sample in of.values())
        shown = [f"{numbers[int(part * (len(numbers) - 1))]:,}" for part in (0, 0.5, 0.95, 1)]
        lines.append("  {:<32}min {}, median {}, p95 {}, max {}".format(name, *shown))
    return lines


def _about_work(args, training_args, machine, run, samples, count) -> list[str]:
    """Steps as the Trainer counts them; FLOPs without what checkpointing computes again."""
    strategy = f"DeepSpeed {deepspeed_path(args).stem}" if deepspeed_path(args) else "DDP"
    precision = str(run.setup.computed_in).removeprefix("torch.")
    micro_batches = math.ceil(count / (machine.gpus * args.batch_size_per_gpu))
    per_epoch = math.ceil(micro_batches / run.setup.accumulation)
    steps = math.ceil(args.num_train_epochs * per_epoch)
    steps = training_args.max_steps if training_args.max_steps > 0 else steps
    flops = sum(
        each * sum(sample[unit] for sample in samples.values()) / len(samples)
        for unit, each in training_flops(run.model).items()
    )
    total, hours = flops * count * steps / per_epoch, "this device's FLOP/s are not known"
    if machine.flops:
        seconds = total / (MFU * machine.flops * machine.gpus)
        hours = f"{seconds / 3600:,.2f} hours at {MFU:.0%} MFU, beside the evaluations"
    parameters = sum(p.numel() for p in run.model.parameters())
    checkpoints = args.save_total_limit + 1 if training_args.save_strategy != "no" else 0
    written = bytes_to_write(run.model, args, checkpoints, run.setup.zero is not None)
    path = Path(args.output_dir).absolute()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    return [
        f"steps         {steps:,} of {args.batch_size} samples: {machine.gpus} x "
        f"{args.batch_size_per_gpu} x {run.setup.accumulation} accumulated",
        f"parameters    {run.trained:,} trained of {parameters:,}, {precision}, {strategy}",
        f"computation   {flops / 1e12:,.4g} TFLOP a sample, {total / 1e15:,.4g} PFLOP: {hours}",
        f"disk          {written / 1e9:,.1f} GB are written, {free / 1e9:,.1f} GB are free",
    ]


def _about_memory(machine, parts) -> list[str]:
    lines = [f"{'GB a process':<18}{''.join(f'{part:>12}' for part in (*Memory._fields, 'all'))}"]
    for name, memory in parts.items():
        cells = "".join(f"{size / 1e9:>12.2f}" for size in (*memory, sum(memory)))
        lines.append(f"  {name:<16}{cells}")
    return [*lines, f"memory        {_verdict(machine, parts)}"]


def _verdict(machine: Machine, parts: dict[str, Memory]) -> str:
    most, of = max(parts.values(), key=sum), f"{machine.memory / 1e9:.1f} GB"
    context = ", and 1 for CUDA and NCCL," if machine.on_gpu else ""
    fits = "fits" if _fits(most, machine) else "DOES NOT FIT"
    return f"{sum(most) / 1e9:.1f} GB{context} of {of}: it {fits}"
