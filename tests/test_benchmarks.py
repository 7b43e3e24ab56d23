"""The benchmarks' baseline computes the official numbers, so what it is compared with is fair."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.baseline import BaselineForCausalLM, preprocess
from benchmarks.side_by_side import in_turns, ratios, spread
from conftest import GOLDEN, REPO
from golden_util import make_image
from phi3v import Phi3VImageProcessor
from test_modeling import CASES, WITH_LOSS, case_inputs, check_outputs, rows

PIXELS = json.loads((GOLDEN / "processor.json").read_text())["cases"]
SPECS = [case["spec"] for case in PIXELS if case["num_crops"] == 1 and "error" not in case]
# Around 4,096 tokens the decoder alone is at work, which the baseline shares.
SHORT = [name for name in CASES if "409" not in name]


@pytest.fixture(scope="module")
def baseline(tiny_checkpoint):
    return BaselineForCausalLM.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.mark.parametrize("name", SHORT)
def test_baseline_logits(baseline, forward_cases, name):
    baseline.eval()
    check_outputs(baseline, case_inputs(forward_cases[name]), forward_cases[name], name)


@pytest.mark.parametrize("name", sorted({*WITH_LOSS} & {*SHORT}))
def test_baseline_loss_and_gradients(baseline, forward_cases, name):
    case = forward_cases[name]
    baseline.train()
    baseline.zero_grad()
    outputs = baseline(**case_inputs(case), labels=rows(case["labels_rle"]), use_cache=False)
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(case["loss"], abs=1e-4)
    assert outputs.logits.shape == (1, case["seq_len"], 32064)
    for parameter, golden in case["grad_norms"].items():
        if golden is not None and not parameter.endswith("k_proj.bias"):
            norm = baseline.get_parameter(parameter).grad.norm().item()
            assert norm == pytest.approx(golden, rel=1e-4, abs=1e-6), parameter


@pytest.mark.parametrize("name", ["single_small", "text_only"])
def test_baseline_generates_one_sample_at_a_time(baseline, forward_cases, name):
    case = forward_cases[name]
    baseline.eval()
    inputs = case_inputs(case, key="prompt_ids_rle")
    tokens = baseline.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokens[:, case["generate"]["prompt_len"] :].tolist() == case["generate"]["new_tokens"]


@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_baseline_pixels(num_crops):
    """Bit for bit ours, which are the official ones, for every size of the reference numbers."""
    processor = Phi3VImageProcessor(num_crops=num_crops)
    for spec in SPECS:
        image = make_image(spec)
        ours, theirs = processor([image], return_tensors="pt"), preprocess([image], num_crops)
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"]), spec
        assert torch.equal(ours["image_sizes"], theirs["image_sizes"])


def test_turns_are_taken_and_compared_round_by_round():
    """Sides alternate, the warm-up does not count, and a ratio is of one round."""
    calls = []

    def side(name: str, values: list[float]):
        taken = iter(values)

        def measure() -> float:
            calls.append(name)
            return next(taken)

        return measure

    measured = in_turns({"a": side("a", [9, 1, 2]), "b": side("b", [9, 4, 6])}, rounds=2)
    assert calls == ["a", "b"] * 3 and measured == {"a": [1, 2], "b": [4, 6]}
    assert ratios(measured["b"], measured["a"]) == "3.50 (3.00 to 4.00)"
    assert spread([3, 1, 2]) == "2.00 (1.00 to 3.00)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "flags", "column"),
    [
        ("preprocessing", ["--rounds", "1"], "baseline, images/s"),
        ("loader", ["--rounds", "1", "--samples", "2"], "baseline, MB"),
        ("recipe_table", ["--size", "small", "--batch_size", "1", "--steps", "1"], "MFU"),
    ],
)
def test_benchmarks_print_their_table(module, flags, column):
    """The commands of the pages run, and give a row for every case."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *flags]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert column in table[0] and len(table) > 4
    assert len({line.count("|") for line in table}) == 1
