"""Runs that are killed and resumed, as real processes."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
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


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that torchrun has started. They are in sessions of their own."""
    return psutil.Process(process.pid).children()


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a run and all its ranks."""
    victims = [*psutil.Process(process.pid).children(recursive=True), process]
    for victim in victims:
        victim.kill()
    process.communicate(timeout=30)


class Runs:
    """The recipe's command line, over and over: two epochs of 4 steps, a checkpoint every other."""

    def __init__(self, data_dir: Path, checkpoint: Path, folder: Path):
        self.folder = folder
        self.command = [
            *(SCRIPT, "--data_dir", str(data_dir), "--model_name_or_path", str(checkpoint)),
            *("--num_crops", "1", "--batch_size", "4", "--num_train_epochs", "2", "--no-tqdm"),
            *("--learning_rate", "1e-2", "--max_new_tokens", "2", "--save_steps", "2"),
        ]

    def start(
        self, name: str, processes: int, *flags: str, restarts: int = 0, **options
    ) -> subprocess.Popen:
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
            **options,
        )

    def finish(self, name: str, processes: int, *flags: str, status: int = 0) -> str:
        process = self.start(name, processes, *flags)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == status, output
        return output

    def kill_at(self, name: str, step: int, processes: int, *flags: str) -> None:
        """SIGKILL to all processes of a run as soon as a checkpoint of this step appears."""
        process = self.start(name, processes, *flags)
        self.wait_for(name, step, process)
        kill(process)
        assert not (self.folder / name / "eval_after.json").exists()

    def wait_for(self, name: str, step: int, process: subprocess.Popen) -> None:
        """Until the folder of a checkpoint of this step appears."""
        while process.poll() is None and not (self.folder / name / f"checkpoint-{step}").exists():
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()[0]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        [file] = (self.folder / name).glob("*model.safetensors")
        return load_file(file)

    def assert_same(self, one: str, other: str) -> None:
        """Weights and answers of two runs are equal, bit for bit."""
        ours, theirs = self.weights(one), self.weights(other)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
        ours, theirs = (
            json.loads((self.folder / name / "eval_after.json").read_text())
            for name in (one, other)
        )
        assert ours == theirs


@pytest.fixture
def runs(data_dir, demo_checkpoint, tmp_path) -> Runs:
    return Runs(data_dir, demo_checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("processes", "kills", "flags"),
    [
        (2, (2, 6), ()),
        (2, (6,), ("--deepspeed", str(REPO / "ds_configs" / "zero3.json"))),
        (1, (6,), ("--deepspeed", "none")),
        (2, (6,), ("--deepspeed", "none", "--batch_size_per_gpu", "2")),
        (2, (6,), LORA),
        (1, (6,), (*LORA, "--use_qlora")),
    ],
    ids=["zero2", "zero3", "full", "ddp", "lora", "qlora"],
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
    runs.assert_same("whole", "killed")
    kept = checkpoints(runs.folder / "killed")
    assert [path.name for path in kept] == ["checkpoint-6", "checkpoint-8"]
    assert not any(map(incompleteness, kept))


@pytest.mark.parametrize("victim", ["all", "one rank"])
def test_killed_at_any_moment(runs, victim):
    """
    Killed at random: in a step, in an evaluation, while saving. What is left lets the same command
    go on, to where the run without interruption ends.
    """
    flags = ("--save_steps", "1", "--eval_steps", "2", "--num_train_epochs", "5")
    runs.finish("whole", 2, *flags)
    seed = random.SystemRandom().randrange(1000)
    print("seed", seed)
    moments = random.Random(seed)
    for step in (moments.randrange(1, 6), moments.randrange(8, 13)):
        process = runs.start("killed", 2, *flags, "--resume_from_checkpoint")
        runs.wait_for("killed", step, process)
        time.sleep(moments.uniform(0, 0.4))
        if victim == "all":
            kill(process)
        else:
            moments.choice(ranks(process)).kill()
            assert process.wait(timeout=120) != 0
        assert not (runs.folder / "killed" / "eval_after.json").exists()
    runs.finish("killed", 2, *flags, "--resume_from_checkpoint")
    runs.assert_same("whole", "killed")


def test_full_disk(runs):
    """
    A file that the system refuses to write further: one message with what to do, and the checkpoint
    before counts still. The run goes on from it once there is room.
    """
    flags = ("--deepspeed", "none")
    runs.finish("whole", 1, *flags)
    runs.kill_at("full", 4, 1, *flags)
    weights = runs.folder / "full" / "checkpoint-2" / "model.safetensors"
    # Room for the weights, but not for the optimizer's state, which is twice as large.
    limit = int(1.5 * weights.stat().st_size)
    process = runs.start(
        *("full", 1, *flags, "--resume_from_checkpoint"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    assert "error: cannot write" in output and "Traceback" not in output, output
    kept = [path.name for path in checkpoints(runs.folder / "full") if not incompleteness(path)]
    assert kept == ["checkpoint-2"]
    runs.finish("full", 1, *flags, "--resume_from_checkpoint")
    runs.assert_same("whole", "full")


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
    ranks(process)[-1].send_signal(sent)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert ("Stopped by SIGTERM after step" in output) == (sent == signal.SIGTERM)
    assert "Resuming from" in output
    runs.assert_same("whole", "stopped")


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
