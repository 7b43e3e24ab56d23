"""The demos, from nothing to a model that learned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO
from demo import make_checkpoint, make_videos, run
from helpers.launcher import torchrun


def run_demo(tmp_path: Path, output_dir: Path, *arguments: str) -> tuple[dict, dict, str]:
    """Both evaluations and what was printed. The seed is one that no setting was chosen with."""
    result = subprocess.run(
        [sys.executable, "-m", "demo.run", *arguments, "--work_dir", str(tmp_path), "--seed", "7"],
        cwd=REPO,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    before, after = (
        json.loads((output_dir / f"eval_{when}.json").read_text()) for when in ("before", "after")
    )
    return before, after, result.stdout


def test_a_short_run_learns(launcher, tmp_path, monkeypatch):
    """
    The way from videos to answers, in a part of the demo's time: trained on one frame of each clip,
    the recipe tells four digits apart in clips of other scans. Chance is one in four.
    """
    archive, data, checkpoint, output = (
        tmp_path / name for name in ("videos.tar.gz", "data", "checkpoint", "output")
    )
    monkeypatch.setattr(make_videos, "CLASSES", make_videos.CLASSES[:4])
    clips = ("--train_clips", "80", "--val_clips", "1", "--test_clips", "12")
    make_videos.main(["--out", str(archive), *clips, "--seed", "7"])
    make_checkpoint.main(["--out", str(checkpoint), "--seed", "7"])
    convert = ("--archive", archive, "--out_dir", data, "--tmp_dir", tmp_path / "extracted")
    launcher.run(REPO / "convert_ucf101.py", *convert, "--num_frames", "1", "--no-tqdm")
    flags = {**run.TRAINING_FLAGS["ucf101"], "--learning_rate": 1e-3, "--max_new_tokens": 4}
    launcher.run(
        *torchrun(2, REPO / "finetune_hf_trainer_ucf101.py"),
        *("--data_dir", data, "--eval_split", "test", "--output_dir", output, "--no-tqdm"),
        *("--model_name_or_path", checkpoint, "--seed", "7", *run.BATCHES),
        *(word for flag in flags.items() for word in flag),
    )
    before, after = (run.read_metrics(output / f"eval_{when}.json") for when in ("before", "after"))
    assert len(after["ids"]) == 48
    assert before["accuracy"] <= 0.3 and after["accuracy"] >= 0.7, after


@pytest.mark.long
def test_the_demo_learns(tmp_path):
    """Videos, conversion, two processes: at most chance before, at least 80 % after training."""
    before, after, output = run_demo(tmp_path, tmp_path / "output")
    assert before["accuracy"] <= 0.2 and after["accuracy"] >= 0.8
    assert len(set(after["ids"])) == len(after["ids"]) == 300
    assert f"accuracy after training:  {after['accuracy']:.1%}" in output


@pytest.mark.long
@pytest.mark.parametrize("task", ["docvqa", "hateful_memes", "nlvr2"])
def test_the_other_demos_learn(tmp_path, task):
    """Data, two processes: at most chance before, every metric above its minimum afterwards."""
    before, after, output = run_demo(tmp_path, tmp_path / task / "output", task)
    for name, minimum in run.REQUIRED[task].items():
        assert after[name] >= minimum >= 0.8
        assert before[name] <= (0.7 if name == "auroc" else 0.5)
        assert f"{name} after training:  {after[name]:.1%}" in output
    assert len(set(after["ids"])) == len(after["ids"]) == 240
    assert not (tmp_path / "output").exists(), "that is the place of UCF-101"


@pytest.mark.parametrize("task", run.REQUIRED)
def test_every_metric_has_to_reach_its_minimum(tmp_path, monkeypatch, task):
    """The exit status is 1 as soon as one metric is below; here nothing is run."""
    monkeypatch.setattr(run, "run_step", lambda *command: None)
    output_dir = (tmp_path if task == "ucf101" else tmp_path / task) / "output"
    output_dir.mkdir(parents=True)
    for low in (None, *run.REQUIRED[task]):
        metrics = {
            name: minimum - 0.01 if name == low else minimum
            for name, minimum in run.REQUIRED[task].items()
        }
        for when in ("before", "after"):
            (output_dir / f"eval_{when}.json").write_text(json.dumps(metrics))
        assert run.main([task, "--work_dir", str(tmp_path)]) == (0 if low is None else 1)


def test_no_demo_writes_where_another_does(tmp_path, monkeypatch):
    """Each command's output is an own folder or file, in the same working folder."""
    written: dict[str, set[str]] = {}

    def record(title, *command):
        words = [str(word) for word in command]
        flags = ("--out", "--out_dir", "--output_dir")
        written[task] |= {words[i + 1] for i, word in enumerate(words) if word in flags}

    monkeypatch.setattr(run, "run_step", record)
    perfect = {"accuracy": 1.0, "anls": 1.0, "auroc": 1.0}
    monkeypatch.setattr(run, "read_metrics", lambda path: perfect)
    for task in run.REQUIRED:
        written[task] = set()
        assert run.main([task, "--work_dir", str(tmp_path)]) == 0
    assert all(len(paths) >= 3 for paths in written.values())
    assert len(set().union(*written.values())) == sum(map(len, written.values()))
