"""
From the start of a process to a recipe's first optimizer step, beside the imports of the libraries.

    python -m benchmarks.startup

Runs finetune_hf_trainer_docvqa.py on a model of random weights that costs nothing, on one page, and
ends it when the optimizer has stepped once. Every number is the time of a process of its own.
"""

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.models import save_random
from benchmarks.recipe_table import METHODS, RECIPE, write_data
from benchmarks.side_by_side import in_turns, make_parser, ratios, report, spread

DONE = 3  # the exit code of a process that came as far as it should, and ended there
FIRST_STEP = f"""
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit({DONE}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TORCH, TRAINER = "import torch", "from transformers import Trainer"


def seconds(code: str, flags: list[str]) -> float:
    """How long Python takes for `code`, from its start to DONE."""
    command, start = [sys.executable, "-c", code, *flags], time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, cwd=RECIPE.parent)
    taken = time.perf_counter() - start
    if result.returncode != DONE:
        sys.exit(f"{code}\nended with {result.returncode}:\n{result.stdout}{result.stderr}")
    return taken


def prepare(work_dir: Path) -> list[str]:
    """Write a model and a page, and return the recipe with the flags that train on them."""
    save_random("tiny", work_dir / "model", torch.float32, "cpu")
    (work_dir / "data").mkdir()
    write_data(work_dir / "data", rows=1)
    flags = [RECIPE, "--model_name_or_path", work_dir / "model", "--num_crops", 1]
    flags += ["--dataset_name_or_path", work_dir / "data", "--batch_size", 1, "--no-tqdm"]
    flags += ["--eval_dataset_name_or_path", work_dir / "data", "--max_new_tokens", 1]
    flags += ["--output_dir", work_dir / "output", "--overwrite_output_dir"]
    return [str(flag) for flag in flags]


def main():
    args = make_parser(__doc__, rounds=5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = prepare(Path(folder))
        imports = {TORCH: TORCH, TRAINER: TRAINER, "import of the recipe": f"import {RECIPE.stem}"}
        ways = {
            name: partial(seconds, f"{code}\nimport os; os._exit({DONE})", [])
            for name, code in imports.items()
        }
        for method in ("full finetuning", "LoRA"):
            name, all_flags = f"first step, {method}", [*flags, *METHODS[method]]
            ways[name] = partial(seconds, FIRST_STEP, all_flags)
        # What is new to the disk's cache costs the first round more; a median leaves that out.
        measured = in_turns(ways, args.rounds, warm_up=0)
    rows = [[way, spread(each), ratios(each, measured[TRAINER])] for way, each in measured.items()]
    report("To the first step", ["process", "s", "of the Trainer's import"], rows, args.save)


if __name__ == "__main__":
    main()
