"""
Several machines, as far as one can stand for them: the commands of examples/ on loopback with a
tiny model, and a machine that is lost.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import REPO
from helpers.launcher import Launcher, Process
from phi3v.errors import RunError
from phi3v.training.launch import init_after_restart
from phi3v.training.output_folder import OutputFolder, incompleteness
from small_datasets import cauldron_row, examples_row, write_parquet

pytestmark = pytest.mark.slow
EXAMPLES, SCRIPT = REPO / "examples", "finetune_hf_trainer_docvqa.py"
# In place of Slurm's: what would be started on each machine, and in which environment.
SRUN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["STARTED"], "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
"""
SCONTROL = "#!/bin/sh\necho localhost\necho other\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def small(demo_checkpoint, tmp_path_factory) -> list[str]:
    """Flags that make the examples' run a small one: 8 epochs of 2 steps."""
    data = tmp_path_factory.mktemp("data")
    write_parquet(data, "train", [cauldron_row(i, 1, ("Color?", "red")) for i in range(8)])
    write_parquet(data, "test", [examples_row(i) for i in range(2)])
    flags = ("--dataset_name_or_path", data, "--eval_dataset_name_or_path", data)
    flags += ("--model_name_or_path", demo_checkpoint, "--num_crops", 1, "--batch_size", 4)
    flags += ("--num_train_epochs", 8, "--learning_rate", 1e-2, "--max_new_tokens", 2)
    return [str(flag) for flag in flags]


def for_here(words: list[str], others: dict[str, str]) -> list[str]:
    """An example's words with others in their place, without what needs a GPU."""
    assert others.keys() <= set(words), words
    return [others.get(word, word) for word in words if word != "--use_flash_attention"]


class Machines:
    """Two machines with one GPU each, on which Slurm starts what examples/slurm.sbatch says."""

    def __init__(self, launcher: Launcher, small: list[str], folder: Path):
        self.launcher = launcher
        self.port = free_port()
        self.folder = OutputFolder(folder / "output")
        self.small = [*small, "--output_dir", str(self.folder.path), "--save_steps", "2"]
        self.command, self.env = self._submit(folder)

    @staticmethod
    def _submit(folder: Path) -> tuple[list[str], dict[str, str]]:
        """Run the file, as far as srun."""
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").touch()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        given = {
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "STARTED": str(folder / "started.json"),
            **{"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": "7"},
        }
        subprocess.run(["bash", EXAMPLES / "slurm.sbatch"], env={**os.environ, **given}, check=True)
        words, env = json.loads((folder / "started.json").read_text())
        return words[words.index("torchrun") + 1 :], env

    def start(self, number: int) -> Process:
        """On a machine. The first one keeps the addresses, which machines know by their names."""
        others = {
            "--nproc_per_node=8": "--nproc_per_node=1",
            "--rdzv_endpoint=localhost:29500": f"--rdzv_endpoint=localhost:{self.port}",
            SCRIPT: str(REPO / SCRIPT),
        }
        words = for_here(self.command, others)
        # A machine is missed after 3 seconds, which are 15 otherwise.
        meet = f"--rdzv_conf=keep_alive_interval=1,is_host={int(number == 0)}"
        here = ("--local_addr=127.0.0.1", meet)
        words = ["-m", "torch.distributed.run", *here, *words, *self.small]
        return self.launcher.start(*words, env=self.env)

    def wait_for_checkpoint(self, step: int, *processes: Process) -> int:
        """Until there is a complete one of a later step. Returns its step."""
        while True:
            steps = [
                int(path.name.partition("-")[2])
                for path in self.folder.checkpoints()
                if incompleteness(path) is None
            ]
            if max(steps, default=0) > step:
                return max(steps)
            assert all(process.poll() is None for process in processes), [
                process.text() for process in processes
            ]
            time.sleep(0.01)

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder.path / "model.safetensors")


@pytest.fixture
def new_machines(launcher, small, tmp_path_factory) -> Iterator:
    yield lambda: Machines(launcher, small, tmp_path_factory.mktemp("slurm"))
    launcher.end_runs()


def finish(*processes: Process) -> None:
    for process in processes:
        output = process.finish()
        assert process.returncode == 0, output


def test_a_machine_is_lost(new_machines):
    """
    One machine is lost in mid-training and comes back: the other one waits for it, and both go on.
    Then the one that keeps the addresses is lost: the other one ends as well, and both are started
    again. The weights become those of a run in which nothing happened, bit for bit.
    """
    whole, lost = new_machines(), new_machines()
    finish(whole.start(0), whole.start(1))
    first = lost.start(0)
    second = lost.start(1)
    step = lost.wait_for_checkpoint(0, first, second)
    second.kill()
    second = lost.start(1)
    lost.wait_for_checkpoint(step + 2, first, second)
    assert f"Resuming from {lost.folder.path}" in first.text()
    first.kill()
    second.finish()
    assert second.returncode == 1
    finish(lost.start(0), lost.start(1))
    ours, theirs = lost.weights(), whole.weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_restarts_on_several_machines(monkeypatch):
    """Refused where ranks that are restarted would wait in vain for those before them."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    init_after_restart(on_gpu=False)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(RunError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        init_after_restart(on_gpu=False)


def test_azure_ml_file(launcher, small, tmp_path):
    """Its command, with the environment that Azure ML gives to the processes of two machines."""
    job = yaml.safe_load((EXAMPLES / "azureml_docvqa.yml").read_text())
    python, *words = shlex.split(job["command"])
    assert python == "python"
    output = tmp_path / "output"
    others = {SCRIPT: str(REPO / SCRIPT), "${{outputs.model}}": str(output)}
    words = [*for_here(words, others), *small, "--num_train_epochs", "1"]
    machines, each = job["resources"]["instance_count"], 2
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meet |= job.get("environment_variables", {})
    numbers = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank % each), "WORLD_SIZE": str(machines * each)}
        for rank in range(machines * each)
    ]
    finish(*[launcher.start(*words, env={**meet, **number}) for number in numbers])
    assert len(json.loads((output / "eval_after.json").read_text())["ids"]) == 2
