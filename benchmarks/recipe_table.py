"""
The recipe's speed table, from the DocVQA recipe itself on all GPUs of this machine.

    python -m benchmarks.recipe_table                       # GPUs: Phi-3.5-vision's size, bf16
    python -m benchmarks.recipe_table --size small          # a scaled-down model, on a CPU too

Runs finetune_hf_trainer_docvqa.py with torchrun once for every method, on random weights and pages
of 5 x 3 crops whose samples have about as many tokens as the published table's 2,443, and reads
what each run logs. A run that fails is a row that says so. More flags go to the recipe, such as
`-- --no-gradient_checkpointing`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import torch

from benchmarks.models import SIZES, save_random
from benchmarks.preprocessing import make_file, read
from benchmarks.side_by_side import make_parser, report

RECIPE = Path(__file__).resolve().parent.parent / "finetune_hf_trainer_docvqa.py"
FULL, FROZEN, LORA, QLORA = "full finetuning", "frozen image model", "LoRA", "QLoRA"
METHODS = {
    FULL: [],
    FROZEN: ["--freeze_vision_model"],
    LORA: ["--use_lora"],
    QLORA: ["--use_lora", "--use_qlora"],
}
# GB of one GPU for a batch of one page, with what is different from gradient checkpointing turned
# off. Counted before any GPU was at hand: weights and activations of the full-size model on torch's
# fake tensors, gradients and optimizer by arithmetic. About 1 GB of CUDA's own comes on top.
PREDICTED_GB = {
    (FULL, ()): 99,
    (FULL, ("checkpointing",)): 91,
    (FROZEN, ()): 85,
    (FROZEN, ("checkpointing",)): 84.7,
    (LORA, ()): 35,
    (LORA, ("checkpointing",)): 12.7,
    (QLORA, ()): 29,
    (QLORA, ("checkpointing",)): 7.6,
    (FULL, ("no DeepSpeed",)): 100,
    (FULL, ("no DeepSpeed", "8-bit AdamW", "checkpointing")): 60,
}
WIDTH, HEIGHT = 1000, 1700
QUESTION = "What is the total amount due on this page of the invoice from last year?"


def write_data(folder: Path, rows: int) -> None:
    """DocVQA's columns, in the splits that the recipe asks for."""
    pages = [read(make_file(WIDTH, HEIGHT, "PNG", seed)) for seed in range(8)]
    for split, count in (("train", rows), ("test", 1)):
        content = {
            "id": [str(number) for number in range(count)],
            "image": [pages[number % len(pages)] for number in range(count)],
            "query": [{"en": QUESTION}] * count,
            "answers": [["$1,234.56"]] * count,
        }
        table = datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def run(
    args: argparse.Namespace, method: str, flash: bool, work_dir: Path
) -> dict[str, float] | None:
    """What one run of the recipe logs at its end; None where it fails."""
    output_dir = work_dir / "output"
    on_gpu = torch.cuda.is_available()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={args.processes}", RECIPE, *METHODS[method]),
        *("--model_name_or_path", work_dir / "model", "--output_dir", output_dir),
        *("--dataset_name_or_path", work_dir / "data"),
        *("--eval_dataset_name_or_path", work_dir / "data"),
        *("--batch_size", args.batch_size, "--batch_size_per_gpu", args.batch_size_per_gpu),
        *("--max_new_tokens", 1, "--overwrite_output_dir", "--no-tqdm"),
        *(["--bf16"] if on_gpu else []),
        *(["--use_flash_attention"] if flash else []),
        *args.flags,
    ]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        print(f"{method} failed:\n{result.stdout}{result.stderr}", file=sys.stderr)
        return None
    state = json.loads((output_dir / "trainer_state.json").read_text())
    [summary] = (e for e in state["log_history"] if "train_images_per_second" in e)
    return summary


def predicted_gb(size: str, method: str, variants: tuple[str, ...]) -> str:
    """A cell of a table."""
    known = size == "full" and (method, variants) in PREDICTED_GB
    return f"{PREDICTED_GB[method, variants]:.1f}" if known else "-"


def main():
    parser = make_parser(__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="full", help="of the model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--flash_attention", action="store_true", help="each method with flash attention 2 as well"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="effective (64)")
    parser.add_argument("--batch_size_per_gpu", type=int, default=1, help="micro batch (1)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run (10)")
    parser.add_argument(
        "--processes", type=int, default=torch.cuda.device_count() or 1, help="GPUs (all)"
    )
    parser.add_argument("flags", nargs="*", help="more flags for the recipe, after --")
    args = parser.parse_args()
    rows, first = [], None
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder)
        dtype = torch.bfloat16 if on_gpu else torch.float32
        save_random(args.size, work_dir / "model", dtype, "cuda" if on_gpu else "cpu")
        (work_dir / "data").mkdir()
        write_data(work_dir / "data", args.steps * args.batch_size)
        for method in args.methods:
            for flash in (False, True) if args.flash_attention else (False,):
                logged = run(args, method, flash, work_dir)
                name = [method, "1", str(args.processes), "yes" if flash else "no"]
                name.append(str(args.batch_size))
                alone = args.processes * args.batch_size_per_gpu == 1 and not (flash or args.flags)
                predicted = predicted_gb(args.size if alone else "", method, ("checkpointing",))
                if logged is None:
                    rows.append([*name, "failed", *["-"] * 5])
                    continue
                speed = logged["train_images_per_second"]
                first = first or speed
                mfu = logged.get("train_mfu")
                rows.append(
                    [
                        *(*name, f"{speed:.3f}", f"{speed / first:.2f}x"),
                        f"{logged['train_peak_memory_gb_per_process']:.1f}",
                        predicted,
                        "unknown peak" if mfu is None else f"{mfu:.1%}",
                        f"{logged['train_data_wait']:.1%}",
                    ]
                )
    header = ["method", "nodes", "GPUs" if on_gpu else "processes", "flash attention"]
    header += ["effective batch", "images/s", "relative", "peak GB", "predicted GB"]
    header += ["MFU", "data wait"]
    report(f"DocVQA recipe, {args.size} model", header, rows, args.save)
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
