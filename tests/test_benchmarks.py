"""The benchmarks' baseline computes the official numbers, so what it is compared with is fair."""

import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.baseline import BaselineForCausalLM, preprocess, use_side
from benchmarks.scaling import memory_gb
from benchmarks.side_by_side import in_turns, ratios, spread
from benchmarks.training_step import LABELS, LORA, SLICES, collate, extrapolate
from conftest import GOLDEN, REPO
from golden_util import make_image
from helpers.forward_cases import CASES, WITH_LOSS, case_inputs, check_outputs, rows
from phi3v import Phi3VForCausalLM, Phi3VImageProcessor
from phi3v.training.loading import add_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
PIXELS = json.loads((GOLDEN / "processor.json").read_text())["cases"]
SPECS = [case["spec"] for case in PIXELS if case["num_crops"] == 1 and "error" not in case]
# Around 4,096 tokens the decoder alone is at work, which the baseline shares. Eight images are like
# two, and take four times as long.
SHORT = [name for name in CASES if "409" not in name and name != "ucf_8_frames"]


def load_baseline(folder) -> BaselineForCausalLM:
    return BaselineForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def baseline(tiny_checkpoint):
    return load_baseline(tiny_checkpoint)


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
    check_answer(baseline, case, inputs)
    # As the evaluation's prompts come.
    check_answer(baseline, case, inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})


def check_answer(model, case: dict, inputs: dict) -> None:
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokens[:, case["generate"]["prompt_len"] :].tolist() == case["generate"]["new_tokens"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_baseline_trains_adapters(tiny_checkpoint, forward_cases, checkpointing):
    """New adapters change nothing, and get gradients in every layer that they are added to."""
    case, baseline = forward_cases["single_small"], load_baseline(tiny_checkpoint)
    model = add_adapters(baseline, LORA).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    inputs, labels = case_inputs(case), rows(case["labels_rle"])
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-4)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        # Behind lora_B, which is zero at first, lora_A has gradients of zero.
        if "lora_B" in name and "k_proj" not in name:
            assert parameter.grad.count_nonzero() > 0, name
    model.gradient_checkpointing_disable()
    check_answer(model.eval(), case, case_inputs(case, key="prompt_ids_rle"))


def test_baseline_pixels():
    """Bit for bit ours, which are the official ones, for the sizes of the reference numbers."""
    for index, spec in enumerate(SPECS):
        image = make_image(spec)
        for num_crops in (1, (4, 16)[index % 2]):
            processor = Phi3VImageProcessor(num_crops=num_crops)
            ours, theirs = processor([image], return_tensors="pt"), preprocess([image], num_crops)
            for name in ("pixel_values", "image_sizes"):
                assert torch.equal(ours[name], theirs[name]), (spec, num_crops)


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


def test_one_model_takes_both_sides(tiny_checkpoint, forward_cases):
    """The benchmark's sides have the same weights and the same loss, by code of their own."""
    case = forward_cases["single_small"]
    model = Phi3VForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).train()
    attention = []
    for side in ("ours", "baseline", "ours"):
        use_side(model, side, "sdpa")
        with torch.profiler.profile() as profiler:
            loss = model(**case_inputs(case), labels=rows(case["labels_rle"])).loss
        assert loss.item() == pytest.approx(case["loss"], abs=1e-4)
        attention.append(any("dot_product" in event.key for event in profiler.key_averages()))
    assert attention == [True, False, True]


def test_the_whole_is_calculated_from_slices():
    """Time and memory are linear in the layers of the decoder and those of CLIP."""
    slices = [5 + 3 * decoder + 2 * clip for decoder, clip in SLICES]
    assert extrapolate(slices, (32, 24)) == pytest.approx(5 + 3 * 32 + 2 * 24)


@pytest.mark.parametrize("tokens", [2443, 2546])
def test_the_page_is_docvqas(tokens):
    """15 crops and the global one, and exactly so many tokens and labels."""
    batch = collate(tokens)
    assert batch["lengths"] == [tokens] and list(batch["image_sizes"]) == [[5 * 336, 3 * 336]]
    assert len(batch["shift_labels"]) == LABELS


@pytest.mark.parametrize("variants", [(), ("2 packed",)])
def test_cases_of_the_gpu_table(tmp_path, monkeypatch, variants):
    """A case trains as the recipe does, and its row says how fast, by which attention."""
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(sys, "argv", [])
    case = (gpu.LORA, variants)
    result = gpu.train(importlib.import_module(gpu.RECIPE), case, "tiny", str(tmp_path))
    assert result["images_per_second"] > 0 and "dot_product" in result["attention"]
    cells = gpu.row(case, result, result["images_per_second"], "tiny")
    assert len(cells) == len(gpu.HEADER) and cells[3] == "1.00x" and all(cells)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise MemoryError('CUDA out of memory. Tried to')", "out of memory"),
        ("raise ValueError('a | b')", "failed: .*a / b"),
        ("import time; input(); time.sleep(60)", "not done after 1 s"),
        ("input(); print('noise'); print('{}')", None),
    ],
)
def test_a_case_that_fails_costs_its_row_alone(program, message):
    """What went wrong stands in the table, which goes on."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    result = gpu.finish(subprocess.Popen([sys.executable, "-c", program], text=True, **pipes), 1)
    if message is None:
        assert result == {}
        return
    assert re.match(message, result)
    cells = gpu.row((gpu.FULL, ()), result, None, "full")
    assert len(cells) == len(gpu.HEADER) and cells[2] == result


def test_memory_of_a_cluster():
    """Mixed precision with AdamW takes 16 bytes a weight; ZeRO-2 keeps 2 of them on every GPU."""
    assert memory_gb(10**9, 1, "zero2") == memory_gb(10**9, 1, "zero3") == 16
    assert memory_gb(10**9, 8, "zero2") == 2 + 14 / 8 and memory_gb(10**9, 8, "zero3") == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("module", "flags", "column", "count"),
    [
        ("preprocessing", "--rounds 1", "baseline, images/s", 16),
        ("loader", "--rounds 1 --samples 2", "faster", 4),
        (
            "evaluation",
            "--size tiny --rounds 1 --samples 2 --batch_size 2 --new_tokens 1",
            "tokens that agree",
            1,
        ),
        (
            "training_step",
            "--size tiny --rounds 1 --methods lora --checkpointing yes",
            "baseline, peak GB",
            4,
        ),
        ("gpu", "--size tiny --device cpu --first 1", "data wait", 1),
        (
            "recipe_table",
            "--size tiny --batch_size 1 --steps 1 --methods 'full finetuning' LoRA "
            "-- --num_crops 1",
            "MFU",
            2,
        ),
        ("conversion", "--videos 2 --rounds 1", "gain of a second", 6),
        ("conversion", "--long 2 --rounds 1", "of decoding all", 5),
        ("startup", "--rounds 1", "of the Trainer's import", 5),
        ("scaling", "--parts samples --size tiny --steps 1", "GFLOP/s", 11),
        ("scaling", "--parts rows --rows 20 30", "start, s", 2),
        ("scaling", "--parts processes --size tiny --steps 1", "times one process", 2),
        ("scaling", "--parts cluster", "hybrid, s", 10),
    ],
)
def test_benchmarks_print_their_table(monkeypatch, capsys, module, flags, column, count):
    """The commands of the pages run, and give a row for every case."""
    # Not as a process: importing the libraries takes longer than most of these.
    benchmark = importlib.import_module(f"benchmarks.{module}")
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *shlex.split(flags)])
    monkeypatch.chdir(REPO)
    benchmark.main()
    header, _, *table = [
        line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line[:1] == "|"
    ]
    assert column in [name.strip() for name in header]
    assert len(table) == count
    assert all(len(row) == len(header) and all(map(str.strip, row)) for row in table)
    assert not any("nan" in cell for row in table for cell in row)
