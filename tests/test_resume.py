"""Runs that are killed and resumed, as real processes."""

import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import REPO
from helpers.launcher import Launcher, Process, torchrun
from phi3v.training.output_folder import COMPLETE, OutputFolder, incompleteness
from phi3v.training.stopping import STOPPED
from small_datasets import write_videos

SCRIPT = REPO / "finetune_hf_trainer_ucf101.py"
LORA = ("--use_lora", "--lora_rank", "2", "--lora_dropout", "0.1")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_videos(folder, "train", 14)
    return write_videos(folder, "val", 2)


def checkpoints_of(folder: Path) -> list[Path]:
    return OutputFolder(folder).checkpoints()


class Runs:
    """The recipe's command line, over and over: two epochs of 4 steps, a checkpoint every other."""

    def __init__(self, launcher: Launcher, data_dir: Path, checkpoint: Path, folder: Path):
        self.launcher = launcher
        self.folder = folder
        self.command = [
            *(SCRIPT, "--data_dir", data_dir, "--model_name_or_path", checkpoint),
            *("--num_crops", "1", "--batch_size", "4", "--num_train_epochs", "2", "--no-tqdm"),
            *("--learning_rate", "1e-2", "--max_new_tokens", "2", "--save_steps", "2"),
        ]

    def start(self, name: str, processes: int, *flags: str, restarts: int = 0, **options: object):
        command = [*self.command, "--output_dir", self.folder / name, *flags]
        if processes > 1:
            command = torchrun(processes, *command, restarts=restarts)
        return self.launcher.start(*command, **options)

    def finish(self, name: str, processes: int, *flags: str, status: int = 0) -> str:
        process = self.start(name, processes, *flags)
        output = process.finish()
        assert process.returncode == status, output
        return output

    def kill_at(self, name: str, step: int, processes: int, *flags: str) -> None:
        """SIGKILL to all processes of a run as soon as a checkpoint of this step appears."""
        process = self.start(name, processes, *flags)
        self.wait_for(name, step, process)
        process.kill()
        assert not (self.folder / name / "eval_after.json").exists()

    def wait_for(self, name: str, step: int, process: Process) -> None:
        """Until the folder of a checkpoint of this step appears."""
        while not (self.folder / name / f"checkpoint-{step}").exists():
            assert process.poll() is None, process.text()
            time.sleep(0.002)

    def wait_for_a_whole_one(self, name: str, process: Process) -> None:
        """Until there is a checkpoint that a run can go on from."""
        while all(map(incompleteness, checkpoints_of(self.folder / name))):
            assert process.poll() is None, process.text()
            time.sleep(0.01)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        [file] = (self.folder / name).glob("*model.safetensors")
        return load_file(file)

    def log(self, name: str) -> list[dict]:
        """What a run logged, from its first step on."""
        return json.loads((self.folder / name / "trainer_state.json").read_text())["log_history"]

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
def runs(launcher, data_dir, demo_checkpoint, tmp_path) -> Iterator[Runs]:
    yield Runs(launcher, data_dir, demo_checkpoint, tmp_path)
    launcher.end_runs()


@pytest.mark.parametrize(
    ("processes", "kills", "flags"),
    [
        (2, (2, 6), ()),
        (2, (6,), ("--deepspeed", str(REPO / "ds_configs" / "zero3.json"))),
        (1, (6,), ("--deepspeed", "none")),
        (2, (6,), ("--deepspeed", "none", "--batch_size_per_gpu", "2")),
        (2, (6,), LORA),
        (1, (6,), (*LORA, "--use_qlora")),
        (1, (6,), (*LORA, "--use_dora", "--use_rslora")),
    ],
    ids=["zero2", "zero3", "full", "ddp", "lora", "qlora", "dora"],
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
    kept = checkpoints_of(runs.folder / "killed")
    assert [path.name for path in kept] == ["checkpoint-6", "checkpoint-8"]
    assert not any(map(incompleteness, kept))


@pytest.mark.parametrize("flags", [("--deepspeed", "none"), LORA[:3]], ids=["full", "lora"])
def test_other_numbers_of_processes(runs, flags):
    """
    Killed, resumed with one process in place of two, killed, and resumed with two: losses and
    weights are those of two processes all along, but for rounding.
    """
    flags = (*flags, "--logging_steps", "1")
    runs.finish("whole", 2, *flags)
    runs.kill_at("other", 4, 2, *flags)
    runs.kill_at("other", 6, 1, *flags, "--resume_from_checkpoint")
    output = runs.finish("other", 2, *flags, "--resume_from_checkpoint")
    assert "Going on with 2 x 1 samples at a time in place of 1 x 1" in output
    ours, theirs = runs.weights("other"), runs.weights("whole")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=name)
    losses = [
        [entry["loss"] for entry in runs.log(name) if "loss" in entry]
        for name in ("other", "whole")
    ]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("victim", ["all", "one rank"])
def test_killed_at_any_moment(runs, victim, seed):
    """
    Killed at random: in a step, in an evaluation, while saving. What is left lets the same command
    go on, to where the run without interruption ends.
    """
    flags = ("--save_steps", "1", "--eval_steps", "2", "--num_train_epochs", "5")
    runs.finish("whole", 2, *flags)
    moments = random.Random(seed)
    for step in (moments.randrange(1, 6), moments.randrange(8, 13)):
        process = runs.start("killed", 2, *flags, "--resume_from_checkpoint")
        runs.wait_for("killed", step, process)
        time.sleep(moments.uniform(0, 0.4))
        if victim == "all":
            process.kill()
        else:
            moments.choice(process.children()).kill()
            process.finish()
            assert process.returncode == 1, process.text()
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
    process = runs.start("full", 1, *flags, "--resume_from_checkpoint", file_size=limit)
    output = process.finish()
    assert process.returncode == 1, output
    assert "error: cannot write" in output and "Traceback" not in output, output
    kept = [path.name for path in checkpoints_of(runs.folder / "full") if not incompleteness(path)]
    assert kept == ["checkpoint-2"]
    runs.finish("full", 1, *flags, "--resume_from_checkpoint")
    runs.assert_same("whole", "full")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_torchrun_goes_on(runs, sent):
    """
    SIGTERM to one rank: both finish the step, save and exit. SIGKILL: the other one ends as well.
    torchrun starts them again, and the weights become those of a run that was never stopped.
    """
    flags = ("--deepspeed", "none", "--num_train_epochs", "6")
    runs.finish("whole", 2, *flags)
    process = runs.start("stopped", 2, *flags, "--resume_from_checkpoint", restarts=1)
    runs.wait_for_a_whole_one("stopped", process)
    process.children()[-1].send_signal(sent)
    output = process.finish()
    assert process.returncode == 0, output
    assert ("Stopped by SIGTERM after step" in output) == (sent == signal.SIGTERM)
    assert "Resuming from" in output
    runs.assert_same("whole", "stopped")


def test_sigterm_exit_status(runs):
    """The exit status is the documented one, and what was saved counts."""
    process = runs.start("stopped", 1, "--deepspeed", "none", "--num_train_epochs", "60")
    runs.wait_for_a_whole_one("stopped", process)
    process.send_signal(signal.SIGTERM)
    output = process.finish()
    assert process.returncode == STOPPED == 143, output
    newest = checkpoints_of(runs.folder / "stopped")[-1]
    assert incompleteness(newest) is None
    step = json.loads((newest / COMPLETE).read_text())["step"]
    assert f"Stopped by SIGTERM after step {step} of 240" in output
