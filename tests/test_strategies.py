"""Every recipe and every strategy: what is trained, on one process and on two."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from conftest import REPO
from helpers.launcher import torchrun
from strategy_runs import RUNS, write_datasets


@pytest.fixture(scope="module")
def runs(launcher, demo_checkpoint, tmp_path_factory) -> dict[int, dict[str, dict]]:
    """Number of processes -> run -> what it trained. All runs of a number share its processes."""
    data = tmp_path_factory.mktemp("data")
    write_datasets(data)
    results = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp("runs")
        script = (REPO / "tests" / "strategy_runs.py", demo_checkpoint, data, folder)
        launcher.run(*torchrun(processes, *script), env={"PYTHONPATH": str(REPO)})
        results[processes] = json.loads((folder / "runs.json").read_text())
    return results


def tensor_names(checkpoint: Path) -> set[str]:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("recipe", "strategy"), RUNS)
def test_what_is_trained(runs, demo_checkpoint, recipe, strategy, processes):
    """
    Everything that the strategy trains has gradients, and nothing else changes.

    Without weight decay, a tensor that changed is one whose gradients were not zero.
    """
    run = runs[processes][f"{recipe} {strategy}"]
    changed, same = set(run["changed"]), set(run["same"])
    deepspeed = strategy in ("full", "full-8bit", "full-zero3", "full-offload", "frozen")
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


@pytest.mark.parametrize(("recipe", "strategy"), RUNS)
def test_losses_do_not_depend_on_the_number_of_ranks(runs, recipe, strategy):
    """Two ranks go through the losses of one, at the same effective batch."""
    one, two = (runs[processes][f"{recipe} {strategy}"]["losses"] for processes in (1, 2))
    assert len(one) == len(two) == 4
    assert two == pytest.approx(one, abs=2e-4)
    assert one[-1] < one[0], "the model does not learn"
