"""A whole recipe, offline and on a CPU, in a few minutes:

    python -m demo.run --work_dir demo_output                # UCF-101: videos of moving digits
    python -m demo.run docvqa --work_dir demo_output         # read one of two digits on a page
    python -m demo.run hateful_memes --work_dir demo_output  # a photo with a number on it
    python -m demo.run nlvr2 --work_dir demo_output          # compare two photos

Each makes its data and a tiny checkpoint with random weights, then trains with the command that the
real model takes (for UCF-101, the videos are converted first, as the real ones are). Training never
sees the digits, nor the parts of the photos, that the evaluation shows. An untrained model writes
gibberish, which is never right; guessing would be right one time in ten in the first two tasks, and
every other time in the last two. The exit status is 1 where a metric ends below what is required.

UCF-101's files go to the working folder itself, those of the others to a folder of their own in it.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # the same everywhere; also, two processes need two GPUs or none
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",  # threads of the two processes would slow each other down
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
}
BATCHES = ("--batch_size", 8, "--batch_size_per_gpu", 4)
TRAINING_FLAGS = {
    "ucf101": {"--num_crops": 1, "--num_train_epochs": 5, "--learning_rate": 7e-4},
    # A page has the shape of two crops. Answers are one or two tokens long, and an untrained model
    # would write 64.
    "docvqa": {
        "--num_crops": 2,
        "--num_train_epochs": 3,
        "--learning_rate": 1e-3,
        "--max_new_tokens": 8,
    },
    "hateful_memes": {
        "--num_crops": 1,
        "--num_train_epochs": 4,
        "--learning_rate": 1e-3,
        "--max_new_tokens": 8,
    },
    "nlvr2": {
        "--num_crops": 1,
        "--num_train_epochs": 4,
        "--learning_rate": 1e-3,
        "--max_new_tokens": 8,
    },
}
# What has to be reached after training.
REQUIRED = {
    "ucf101": {"accuracy": 0.8},
    "docvqa": {"anls": 0.8},
    "hateful_memes": {"accuracy": 0.8, "auroc": 0.9},
    "nlvr2": {"accuracy": 0.8},
}
TRAIN_ROWS = {"docvqa": 3600, "hateful_memes": 1600, "nlvr2": 1600}
EVAL_ROWS = 240


def run_step(title: str, *command: object) -> None:
    """Show and run one command from the repository's root; its output goes where ours goes."""
    words = [str(word) for word in command]
    print(f"\n=== {title}\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env={**os.environ, **ENVIRONMENT}
    ).returncode
    if status:
        sys.exit(f"{title}: failed with exit status {status}")


def make_videos(work_dir: Path, seed: tuple, bars: tuple) -> tuple:
    """UCF-101's videos, converted; returns the recipe's flags for them."""
    archive = work_dir / "UCF101_subset.tar.gz"
    data_dir = work_dir / "converted_ucf101"
    run_step("Videos of moving digits", "-m", "demo.make_videos", "--out", archive, *seed)
    run_step(
        "Videos -> frames and jsonl",
        *("convert_ucf101.py", "--archive", archive, "--out_dir", data_dir, *bars),
    )
    return ("--data_dir", data_dir, "--eval_split", "test")


def make_dataset(task: str, work_dir: Path, seed: tuple) -> tuple:
    """Parquet files as the task's hub dataset has them; returns the recipe's flags for them."""
    data_dir = work_dir / "data"
    run_step(
        "Scans and photos -> parquet",
        *("-m", "demo.make_datasets", task, "--out", data_dir),
        *("--train_rows", TRAIN_ROWS[task], "--eval_rows", EVAL_ROWS, *seed),
    )
    if task == "docvqa":
        return ("--dataset_name_or_path", data_dir, "--eval_dataset_name_or_path", data_dir)
    return ("--dataset_name_or_path", data_dir, "--num_eval_rows", EVAL_ROWS)


def read_metrics(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=TRAINING_FLAGS, default="ucf101")
    parser.add_argument("--work_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--seed", type=int, default=0, help="other data, weights and order")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    task = args.task
    work_dir = args.work_dir.resolve()
    if task != "ucf101":
        work_dir = work_dir / task
    checkpoint = work_dir / "tiny_phi3v"
    output_dir = work_dir / "output"
    seed = ("--seed", args.seed)
    bars = () if sys.stderr.isatty() else ("--no-tqdm",)  # a log file is no place for them
    start = time.monotonic()

    if task == "ucf101":
        data_flags = make_videos(work_dir, seed, bars)
    else:
        data_flags = make_dataset(task, work_dir, seed)
    run_step("A checkpoint", "-m", "demo.make_checkpoint", "--out", checkpoint, *seed)
    run_step(
        "Evaluate, train, evaluate",
        # What the command torchrun runs; --standalone takes a free port.
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(f"finetune_hf_trainer_{task}.py", *data_flags),
        *("--model_name_or_path", checkpoint),
        *("--output_dir", output_dir, "--overwrite_output_dir"),
        *BATCHES,
        *(word for flag in TRAINING_FLAGS[task].items() for word in flag),
        *seed,
        *bars,
    )

    before = read_metrics(output_dir / "eval_before.json")
    after = read_metrics(output_dir / "eval_after.json")
    print("\n=== Result, on pictures that training never saw")
    for name, minimum in REQUIRED[task].items():
        print(f"{name} before training: {before[name]:.1%}")
        print(f"{name} after training:  {after[name]:.1%} (at least {minimum:.0%} is required)")
    print(f"wall time:                {time.monotonic() - start:.0f} s")
    return 0 if all(after[name] >= minimum for name, minimum in REQUIRED[task].items()) else 1


if __name__ == "__main__":
    sys.exit(main())
