"""
What one GPU does: a table of the recipe's methods with all that makes them faster or smaller.

    python -m benchmarks.gpu --save                             # Phi-3.5-vision's size, bf16
    python -m benchmarks.gpu --size small --device cpu          # to try the command without a GPU

A row is the DocVQA recipe's own Trainer under the recipe's own flags, with one sample of 2,546
tokens (a page of 5 x 3 crops) as the batch: forward, backward, clipping and the optimizer's step.
Weights are random and made on the GPU itself, so nothing is read from a disk. STEPS steps warm up,
as many are measured. Each row has a process of its own: one that runs out of memory, or fails,
costs that row alone and says so in it. The most important come first; those that --minutes leaves
no time for say so.

Full finetuning and the frozen vision model run under DeepSpeed ZeRO-2, as the recipe does; on one
GPU it shards nothing. A batch of 64 on one GPU takes one optimizer step in 64 samples, and each row
one a batch: read the recipe's table (benchmarks/recipe_table.py) beside this one.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from types import ModuleType
from unittest import mock

import torch

from benchmarks.models import SIZES, make_config, make_processor, quantise, random_model
from benchmarks.recipe_table import FROZEN, FULL, LORA, METHODS, QLORA, predicted_gb
from benchmarks.side_by_side import make_parser, report
from benchmarks.training_step import page_records
from phi3v.training import Phi3VTrainer, load_model, trainer_arguments

RECIPE = "finetune_hf_trainer_docvqa"
TOKENS = 2546
STEPS = 8
OPERATORS = r"(?:attention|attn)(?!.*backward)"
CASE_SECONDS = 150  # a case that takes longer is given up; compiling takes most

# What is different from the recipe without gradient checkpointing: its flags.
VARIANTS = {
    "checkpointing": ["--gradient_checkpointing"],
    "flash attention": ["--use_flash_attention"],
    "cuDNN": [],  # sdpa's first choice on Hopper, which the recipe turns off
    "liger": ["--use_liger"],
    "compile": ["--torch_compile"],
    "8-bit AdamW": ["--optim", "adamw_bnb_8bit"],
    "no DeepSpeed": ["--deepspeed", "none"],
    "2 samples": ["--batch_size", "2", "--batch_size_per_gpu", "2"],
    "2 packed": [],
}
# They need a GPU, or on a CPU minutes to compile.
GPU_ONLY = {"flash attention", "cuDNN", "liger", "compile", "8-bit AdamW"}

Case = tuple[str, tuple[str, ...]]  # a method and the names of its variants
CASES: list[Case] = [
    *((method, ()) for method in METHODS),
    *((method, ("checkpointing",)) for method in METHODS),
    *((method, (name,)) for name in ("flash attention", "cuDNN") for method in (FULL, LORA)),
    *((method, (name,)) for name in ("compile", "liger") for method in (FULL, LORA)),
    (FULL, ("8-bit AdamW",)),
    (FULL, ("no DeepSpeed",)),
    (FULL, ("no DeepSpeed", "8-bit AdamW", "checkpointing")),
    *((FULL, ("2 packed", *more)) for more in ((), ("flash attention",))),
    *((method, ("2 samples",)) for method in (FULL, LORA)),
    *((method, ("flash attention", "liger", "compile")) for method in (FULL, LORA)),
    *(
        (method, (name,))
        for method in (FROZEN, QLORA)
        for name in ("flash attention", "compile", "liger")
    ),
    *((method, ("flash attention", "checkpointing")) for method in METHODS),
]


# ---- In a case's process ----


def run_child(case: Case, size: str) -> None:
    """Train for a few steps, and print what the last of them took as JSON."""
    import deepspeed  # noqa: F401  takes long, and the case before this one is still running

    recipe = importlib.import_module(RECIPE)
    input()  # the device is free
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train(recipe, case, size, folder)))


def train(recipe: ModuleType, case: Case, size: str, folder: str) -> dict:
    """What the recipe's Trainer logs of the last STEPS steps, and `attention`."""
    method, variants = case
    on_gpu = torch.cuda.is_available()
    flags = [*METHODS[method], *(["--bf16"] if on_gpu else []), "--no-gradient_checkpointing"]
    flags += ["--batch_size", "1", "--max_steps", str(2 * STEPS), "--logging_steps", str(STEPS)]
    flags += ["--output_dir", folder, "--no-tqdm"]
    sys.argv = [RECIPE, *flags, *(flag for name in variants for flag in VARIANTS[name])]
    args = recipe.get_arguments()
    training_args = trainer_arguments(args, optim="adamw_torch_fused", adam_beta2=0.95)
    torch.backends.cuda.enable_cudnn_sdp("cuDNN" in variants)

    def random_weights(name: str, dtype: torch.dtype, attn_implementation: str, **kwargs):
        device = "cuda" if on_gpu else "cpu"
        model = random_model(make_config(size), dtype, device, attn_implementation)
        settings = kwargs.get("quantization_config")
        return quantise(model, settings) if settings else model

    with mock.patch("phi3v.training.loading.load_weights", random_weights):
        model = load_model(args, training_args, recipe.lora_config(args))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # before 4 bits there were 16
    processor = make_processor()
    samples = page_records(processor, TOKENS, samples=2)
    rows = [samples] if "2 packed" in variants else samples
    trainer = Phi3VTrainer(
        model=model,
        args=training_args,
        flags=args,
        processing_class=processor,
        train_dataset=rows * (4 * STEPS),
        eval_dataset=rows,
        compute_metrics=dict,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "images_per_second" in entry]
    return {**logged[-1], "attention": attention_operators(trainer)}


def attention_operators(trainer: Phi3VTrainer) -> str:
    """What attends in a forward pass, by its names in PyTorch."""
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trainer.training_step(trainer.model_wrapped, batch)
    names = {event.key.split("::")[-1].strip("_") for event in profiler.key_averages()}
    return ", ".join(sorted(name for name in names if re.search(OPERATORS, name)))


# ---- The table ----


def start(case: Case, args: argparse.Namespace) -> subprocess.Popen:
    """A case's process, which imports libraries and then waits for a line."""
    method, variants = case
    one_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = (sys.executable, "-m", "benchmarks.gpu", "--size", args.size, "--child", method)
    return subprocess.Popen(
        [*command, *variants],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "" if args.device == "cpu" else one_gpu},
    )


def finish(process: subprocess.Popen, seconds: float) -> dict | str:
    """Let it begin. What it logged, or why it has not."""
    try:
        output, errors = process.communicate("begin\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"not done after {seconds:.0f} s"
    if process.returncode == 0:
        return json.loads(output.splitlines()[-1])
    print(errors, file=sys.stderr)
    if re.search("OutOfMemoryError|out of memory|no memory left", errors):
        return "out of memory"
    return f"failed: {' '.join(errors.split()[-30:])}".replace("|", "/")


def row(case: Case, result: dict | str, first: float | None, size: str) -> list[str]:
    method, variants = case
    predicted = predicted_gb(size, method, variants)
    name = [method, ", ".join(variants) or "-"]
    if isinstance(result, str):
        return [*name, result, *["-"] * 6]
    speed = result["images_per_second"]
    return [
        *(*name, f"{speed:.2f}", f"{speed / (first or speed):.2f}x"),
        f"{result['mfu']:.1%}" if "mfu" in result else f"{result['tflops_per_second']:.3g} TFLOP/s",
        f"{result['peak_memory_gb_per_process']:.1f}",
        predicted,
        f"{result['data_wait']:.1%}",
        result["attention"],
    ]


HEADER = (
    *("method", "with", "images/s", "relative", "MFU"),
    *("peak GB", "predicted GB", "data wait", "attention"),
)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="full", help="of the model")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(cuda)")
    parser.add_argument("--minutes", type=float, default=10, help="for all cases (10)")
    parser.add_argument("--first", type=int, default=len(CASES), help="only so many cases")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        method, *variants = args.child
        return run_child((method, tuple(variants)), args.size)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible. --size small --device cpu tries the command without one.")

    end = time.monotonic() + 60 * args.minutes
    usable = [case for case in CASES if args.device == "cuda" or not GPU_ONLY & set(case[1])]
    cases = usable[: args.first]
    rows, first = [], None
    coming = start(cases[0], args)
    for number, case in enumerate(cases):
        current, coming = coming, None
        if current is None:
            rows.append(row(case, "no time was left", first, args.size))
            continue
        if number + 1 < len(cases) and time.monotonic() < end:
            coming = start(cases[number + 1], args)
        result = finish(current, min(max(end - time.monotonic(), 1), CASE_SECONDS))
        if isinstance(result, dict):
            first = first or result["images_per_second"]
        rows.append(row(case, result, first, args.size))
        print(" | ".join(rows[-1]), file=sys.stderr)
    if len(cases) < len(CASES):
        print(f"Left out: {len(CASES) - len(cases)} cases, by --first, or as they need a GPU.")
    report(f"Training on one GPU, {args.size} model, {TOKENS:,} tokens", HEADER, rows, args.save)
    if any("failed" in cells[2] for cells in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
