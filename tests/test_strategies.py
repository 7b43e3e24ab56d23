"""Every recipe under every strategy: what is trained, on one process and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from conftest import REPO
from strategy_runs import RECIPES, STRATEGIES, write_datasets

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(demo_checkpoint, tmp_path_factory) -> dict[int, dict[str, dict]]:
    """Number of processes -> run -> what it trained. All runs of a number share its processes."""
    data = tmp_path_factory.mktemp("data")
    write_datasets(data)
    results = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("runs")
        cache = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        cpu = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        result = subprocess.run(
            [
                *(sys.executable, *launcher, str(REPO / "tests" / "strategy_runs.py")),
                *map(str, (demo_checkpoint, data, folder)),
            ],
            env={**os.environ, **cache, **cpu, "PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        results[processes] = json.loads((folder / "runs.json").read_text())
    return results


def tensor_names(checkpoint: Path) -> set[str]:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_trained(runs, demo_checkpoint, recipe, strategy, processes):
    """
    Everything that the strategy trains has gradients, and nothing else changes.

    Without weight decay, a tensor that changed is one whose gradients were not zero.
    """
    run = runs[processes][f"{recipe} {strategy}"]
    changed, same = set(run["changed"]), set(run["same"])
    deepspeed = strategy in ("full", "full-zero3", "full-offload", "frozen")
    assert run["engine"] == ("DEEPSPEED" if deepspeed else "MULTI_CPU")
    if "lora" in strategy:
        assert changed and not same
        assert all("lora_" in name for name in changed)
        sees = any("vision_embed_tokens" in name for name in changed)
        assert sees == ("frozen" not in strategy)
        return
    names = tensor_names(demo_checkpoint)
    unused = {n for n in names if ".encoder.layers.2." in n or "post_layernorm" in n}
    frozen = {n for n in names if "vision_embed_tokens" in n} if strategy == "frozen" else set()
    assert same == unused | frozen
    assert changed == names - same


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_do_not_depend_on_the_number_of_ranks(runs, recipe, strategy):
    """Two ranks go through the losses of one, at the same effective batch."""
    one, two = (runs[processes][f"{recipe} {strategy}"]["losses"] for processes in (1, 2))
    assert len(one) == len(two) == 4
    assert two == pytest.approx(one, abs=2e-4)
    assert one[-1] < one[0], "the model does not learn"
