"""The whole recipe, offline and on a CPU, in a few minutes:

    python -m demo.run --work_dir demo_output

It makes videos of moving digits and a tiny checkpoint with random weights, then converts and trains
with the two commands that the real model takes. Training never sees the digits of the test clips.
An untrained model writes gibberish, which is never right; guessing would be right one time in ten.
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
REQUIRED_ACCURACY = 0.8
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # the same everywhere; also, two processes need two GPUs or none
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",  # threads of the two processes would slow each other down
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
}
TRAINING_FLAGS = {
    "--num_crops": 1,
    "--num_train_epochs": 5,
    "--batch_size": 8,
    "--batch_size_per_gpu": 4,
    "--learning_rate": 7e-4,
}


def run_step(title: str, *command: object) -> None:
    """Show and run one command from the repository's root; its output goes where ours goes."""
    words = [str(word) for word in command]
    print(f"\n=== {title}\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env={**os.environ, **ENVIRONMENT}
    ).returncode
    if status:
        sys.exit(f"{title}: failed with exit status {status}")


def read_accuracy(path: Path) -> float:
    return json.loads(path.read_text(encoding="utf-8"))["accuracy"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--seed", type=int, default=0, help="other clips, weights and order")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    work_dir = args.work_dir.resolve()
    archive = work_dir / "UCF101_subset.tar.gz"
    checkpoint = work_dir / "tiny_phi3v"
    data_dir = work_dir / "converted_ucf101"
    output_dir = work_dir / "output"
    seed = ("--seed", args.seed)
    bars = () if sys.stderr.isatty() else ("--no-tqdm",)  # a log file is no place for them
    start = time.monotonic()

    run_step("Videos of moving digits", "-m", "demo.make_videos", "--out", archive, *seed)
    run_step("A checkpoint", "-m", "demo.make_checkpoint", "--out", checkpoint, *seed)
    run_step(
        "Videos -> frames and jsonl",
        *("convert_ucf101.py", "--archive", archive, "--out_dir", data_dir, *bars),
    )
    run_step(
        "Evaluate, train, evaluate",
        # What the command torchrun runs; --standalone takes a free port.
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("finetune_hf_trainer_ucf101.py", "--data_dir", data_dir, "--eval_split", "test"),
        *("--model_name_or_path", checkpoint, "--output_dir", output_dir),
        *(word for flag in TRAINING_FLAGS.items() for word in flag),
        *seed,
        *bars,
    )

    before = read_accuracy(output_dir / "eval_before.json")
    after = read_accuracy(output_dir / "eval_after.json")
    print("\n=== Result, on digits that training never saw")
    print(f"accuracy before training: {before:.1%}")
    print(f"accuracy after training:  {after:.1%} (at least {REQUIRED_ACCURACY:.0%} is required)")
    print(f"wall time:                {time.monotonic() - start:.0f} s")
    return 0 if after >= REQUIRED_ACCURACY else 1


if __name__ == "__main__":
    sys.exit(main())
