"""Runs that are killed and resumed, as real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import REPO
from phi3v.checkpoints import COMPLETE, STOPPED, checkpoints, incompleteness
from small_datasets import write_videos

pytestmark = pytest.mark.slow
SCRIPT = str(REPO / "finetune_hf_trainer_ucf101.py")
LORA = ("--use_lora", "--lora_rank", "2", "--lora_dropout", "0.1")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_videos(folder, "train", 14)
    return write_videos(folder, "val", 2)


class Runs:
    """The recipe's command line, over and over: two epochs of 4 steps, a checkpoint every other."""

    def __init__(self, data_dir: Path, checkpoint: Path, folder: Path):
        self.folder = folder
        self.command = [
            *(SCRIPT, "--data_dir", str(data_dir), "--model_name_or_path", str(checkpoint)),
            *("--num_crops", "1", "--batch_size", "4", "--num_train_epochs", "2", "--no-tqdm"),
            *("--learning_rate", "1e-2", "--max_new_tokens", "2", "--save_steps", "2"),
        ]

    def start(self, name: str, processes: int, *flags: str, restarts: int = 0) -> subprocess.Popen:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc_per_node={processes}", f"--max_restarts={restarts}"]
        cache = {"HF_DATASETS_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            [*launcher, *self.command, "--output_dir", str(self.folder / name), *flags],
            env={**os.environ, **cache, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, name: str, processes: int, *flags: str, status: int = 0) -> str:
        process = self.start(name, processes, *flags)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == status, output
        return output

    def kill_at(self, name: str, step: int, processes: int, *flags: str) -> None:
        """SIGKILL to all processes of a run as soon as a checkpoint of this step appears."""
        process = self.start(name, processes, *flags)
        while process.poll() is None and not (self.folder / name / f"checkpoint-{step}").exists():
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()[0]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        [file] = (self.folder / name).glob("*model.safetensors")
        return load_file(file)


@pytest.fixture
def runs(data_dir, demo_checkpoint, tmp_path) -> Runs:
    return Runs(data_dir, demo_checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("processes", "kills", "flags"),
    [
        (2, (2, 6), ()),
        (1, (6,), ("--deepspeed", "none")),
        (2, (6,), ("--deepspeed", "none", "--batch_size_per_gpu", "2")),
        (2, (6,), LORA),
        (1, (6,), (*LORA, "--use_qlora")),
    ],
    ids=["zero2", "full", "ddp", "lora", "qlora"],
)
def test_killed_and_resumed_is_never_interrupted(runs, processes, kills, flags):
    """
    Killed while checkpoints are written, in the second epoch too, and resumed each time: weights
    and answers are those of a run without interruption, bit for bit.
    """
    runs.finish("whole", processes, *flags)
    for step in kills:
        runs.kill_at("killed", step, processes, *flags, "--resume_from_checkpoint")
    output = runs.finish("killed", processes, *flags, "--resume_from_checkpoint")
    assert "Resuming from" in output
    whole, killed = runs.weights("whole"), runs.weights("killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())
    whole, killed = (
        json.loads((runs.folder / name / "eval_after.json").read_text())
        for name in ("whole", "killed")
    )
    assert killed == whole
    kept = checkpoints(runs.folder / "killed")
    assert [path.name for path in kept] == ["checkpoint-6", "checkpoint-8"]
    assert not any(map(incompleteness, kept))


def complete_checkpoint(folder: Path) -> bool:
    return any(incompleteness(path) is None for path in checkpoints(folder))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_torchrun_goes_on(runs, sent):
    """
    SIGTERM to one rank: both finish the step, save and exit. SIGKILL: the other one ends as well.
    torchrun starts them again, and the weights become those of a run that was never stopped.
    """
    flags = ("--deepspeed", "none", "--num_train_epochs", "6")
    runs.finish("whole", 2, *flags)
    process = runs.start("stopped", 2, *flags, "--resume_from_checkpoint", restarts=1)
    while process.poll() is None and not complete_checkpoint(runs.folder / "stopped"):
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), sent)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert ("Stopped by SIGTERM after step" in output) == (sent == signal.SIGTERM)
    assert "Resuming from" in output
    whole, stopped = runs.weights("whole"), runs.weights("stopped")
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())


def test_sigterm_exit_status(runs):
    """The exit status is the documented one, and what was saved counts."""
    process = runs.start("stopped", 1, "--deepspeed", "none", "--num_train_epochs", "60")
    while process.poll() is None and not complete_checkpoint(runs.folder / "stopped"):
        time.sleep(0.01)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == STOPPED == 143, output
    newest = checkpoints(runs.folder / "stopped")[-1]
    assert incompleteness(newest) is None
    step = json.loads((newest / COMPLETE).read_text())["step"]
    assert f"Stopped by SIGTERM after step {step} of 240" in output
