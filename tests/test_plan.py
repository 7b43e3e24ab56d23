"""--plan: its numbers against what is measured and known, and that it leaves everything alone."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.memory import PAGE, ZERO_2, full_size, make_batch, make_prompts
from benchmarks.training_step import LORA
from conftest import REPO
from helpers.peak_memory import ACCUMULATION, run_flags, small_batch, small_config
from helpers.recipes import recipe
from helpers.records import RECORDS
from helpers.trainers import arguments
from phi3v.data.collators import TrainingCollator
from phi3v.errors import RunError
from phi3v.model.modeling_phi3_v import token_order
from phi3v.training import plan, trainer_arguments
from phi3v.training.flops import training_flops
from phi3v.training.memory import FakeRun, Memory, Setup
from small_datasets import examples_row, write_parquet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

CLIP = ([(2, 2)] * 8, 6139)  # eight frames of 4 crops


# ---- Memory


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_prediction_and_what_a_process_holds(launcher, lora, checkpointing):
    """The peak of real steps on a CPU is within 15 % of the count, and so are its activations."""
    words = ["lora"] * lora + ["checkpointing"] * checkpointing
    process = launcher.start("-m", "tests.helpers.peak_memory", *words, cwd=REPO)
    measured = int(process.finish(120).split()[-1])
    assert process.returncode == 0
    training_args = SimpleNamespace(
        optim="adamw_torch_fused",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    setup = Setup(1, ACCUMULATION, False, torch.float32)
    run = FakeRun(small_config(), run_flags(lora), training_args, LORA, setup)
    predicted = run.training(small_batch())
    print(f"measured {measured / 1e6:.1f} MB, predicted {sum(predicted) / 1e6:.1f} MB: {predicted}")
    assert sum(predicted) == pytest.approx(measured, rel=0.15)
    known = sum(predicted) - predicted.activations
    assert predicted.activations == pytest.approx(measured - known, rel=0.15)


# GB a GPU: counted on fake tensors, arithmetic of DeepSpeed 0.19.8's source. With LoRA, that count
# has no buckets of DDP.
@pytest.mark.parametrize(
    ("expected", "batch", "settings"),
    [
        (26.0, (*CLIP, 2), {}),
        (41, PAGE, {"checkpointing": False}),
        (12.7, PAGE, {"use_lora": True}),
        (76, PAGE, {"zero": None, "gpus": 1}),
    ],
)
def test_training_of_the_full_size(expected, batch, settings):
    """The numbers agree with an independent count within 5 %."""
    run = full_size(**settings)
    memory = run.training(make_batch(*batch))
    buckets = run.gradients()[0] if run.setup.zero is None else 0
    assert (sum(memory) - buckets) / 1e9 == pytest.approx(expected, rel=0.05), memory


def test_the_step_of_the_full_size():
    """DeepSpeed's copies of gradients, by GPUs; 8-bit AdamW fits 80 GB, with and without it."""

    def at_step(run: FakeRun) -> float:
        return (run.weights + run.optimizer() + run.gradients()[1]) / 1e9

    for gpus, expected in {1: 91, 4: 29.0}.items():
        assert at_step(full_size(gpus)) == pytest.approx(expected, rel=0.05)
    assert at_step(full_size(1, freeze_vision_model=True)) == pytest.approx(84.7, rel=0.05)
    assert at_step(full_size(1, optim="adamw_bnb_8bit")) == pytest.approx(66.3, rel=0.05)
    assert at_step(full_size(1, None, optim="adamw_bnb_8bit")) == pytest.approx(42, rel=0.05)
    # 91 - 49.6: without the float32 weights and moments, and gradients of no device.
    offloaded = full_size(1, {**ZERO_2, "offload_optimizer": {"device": "cpu"}})
    assert at_step(offloaded) == pytest.approx(8.3, rel=0.05)
    sharded = full_size(8, {**ZERO_2, "stage": 3})
    assert sharded.held_weights(0) == pytest.approx(sharded.weights / 8, rel=0.001)


def test_four_bits_of_the_full_size():
    """LoRA's 12.7 GB and QLoRA's 7.6 GB differ by the decoder's weights."""
    whole, packed = full_size(use_lora=True), full_size(use_lora=True, use_qlora=True)
    assert (whole.weights - packed.weights) / 1e9 == pytest.approx(12.7 - 7.6, rel=0.05)


def test_evaluation_of_the_full_size():
    """Eight prompts with 16-bit weights, within 5 %; the optimizer of training is beside them."""
    run = full_size()
    memory = run.evaluation(make_prompts(run.model.config, *CLIP))
    assert memory.optimizer == pytest.approx(49.6e9 / 8, rel=0.01)
    assert (sum(memory) - memory.optimizer) / 1e9 == pytest.approx(32.5, rel=0.05), memory


def test_computation_of_the_full_size():
    """TFLOP of a page, counted on fake tensors."""
    tokens = PAGE[1]
    numbers = {"tokens": tokens, "pairs": tokens * (tokens + 1) // 2, "labels": 8, "crops": 17}
    for expected, flags in (
        (78.167, {}),
        (65.518, {"freeze_vision_model": True}),
        (56.997, {"use_lora": True}),
    ):
        each = training_flops(full_size(**flags).model)
        flops = sum(each[unit] * number for unit, number in numbers.items())
        assert flops / 1e12 == pytest.approx(expected, rel=0.05)


# ---- Machines


def test_machines_by_name():
    """GPUs are known by their sizes and names; what is not known is an error that shows how."""
    assert plan.named_machine("8 x A100-80GB") == (8, "A100-80GB", 80e9, 312e12, True)
    assert plan.named_machine("2x24gb") == (2, "24gb", 24e9, None, True)
    assert plan.named_machine("H200") == (1, "H200", 141e9, 989e12, True)
    assert plan.named_machine("4 X RTX 4090")[:3] == (4, "RTX 4090", 24e9)
    for wrong in ("8 x K80", "0 x H200", "many"):
        with pytest.raises(RunError, match='like "8 x A100-80GB"'):
            plan.named_machine(wrong)


# ---- In a recipe


@pytest.fixture
def docvqa(demo_checkpoint, tmp_path, monkeypatch, own_cache):
    """The recipe's main() on 24 pages, with flags."""
    rows = [examples_row(i) for i in range(24)]
    folder = write_parquet(tmp_path / "examples", "train", rows)
    write_parquet(folder, "test", rows[:9])
    # Neither weights nor a model are needed.
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in demo_checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (checkpoint / path.name).write_bytes(path.read_bytes())

    def start(*flags: str) -> None:
        argv = ["docvqa", f"--model_name_or_path={checkpoint}", f"--output_dir={tmp_path / 'out'}"]
        argv += [f"--dataset_name_or_path={folder}", f"--eval_dataset_name_or_path={folder}"]
        monkeypatch.setattr(sys, "argv", [*argv, "--num_crops=2", "--no-tqdm", *flags])
        recipe("docvqa").main()

    return start


def test_the_plan_of_a_recipe(docvqa, tmp_path, capsys):
    """It says what the run will be, loads no weights, and leaves with status 0."""
    flags = ("--num_train_epochs", "2", "--save_steps", "5", "--plan", "4 x A100-80GB")
    with pytest.raises(SystemExit) as left:
        docvqa("--batch_size", "8", *flags)
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "Plan for 4 x A100-80GB" in text
    assert "24 samples to train on, 9 to evaluate" in text
    assert "crops of a sample               min 3, median 3, p95 3, max 3" in text
    assert "steps         6 of 8 samples: 4 x 1 x 2 accumulated" in text
    assert "float16, DeepSpeed zero2" in text and "hours at 40% MFU" in text
    assert "evaluation of 8" in text and "of 80.0 GB: it fits" in text
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_a_plan_beside_a_run(docvqa, tmp_path, capsys):
    """Of a folder with results, and with packed samples; on the machine that is there."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval_after.json").write_text("{}")
    with pytest.raises(SystemExit):
        docvqa("--use_lora", "--pack_length", "100", "--plan")
    text = capsys.readouterr().out
    assert "Plan for 1 x CPU" in text and "float32, DDP" in text and "FLOP/s are not known" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["eval_after.json"]


def test_a_batch_that_no_gpus_can_share(docvqa):
    with pytest.raises(RunError, match="--batch_size 8 must be divisible by 3 GPUs x"):
        docvqa("--batch_size", "8", "--plan", "3 x H100")


def test_an_evaluation_that_would_not_fit(docvqa, monkeypatch, capsys):
    """On a GPU, a run takes fewer prompts at a time, and says so once."""
    chosen = []

    def load_model(args, training_args, lora):
        chosen.append(training_args.per_device_eval_batch_size)
        raise SystemExit

    monkeypatch.setattr(recipe("docvqa"), "load_model", load_model)
    counted = []
    monkeypatch.setattr(
        FakeRun,
        "evaluation",
        lambda run, batch: counted.append(len(batch["input_ids"])) or Memory(counted[-1] * 10**9),
    )
    monkeypatch.setattr(FakeRun, "training", lambda run, batch: Memory(5 * 10**9))
    machine = plan.Machine(1, "a small GPU", 3.5e9)
    monkeypatch.setattr(plan, "this_machine", lambda planned: machine)
    with pytest.raises(SystemExit):
        docvqa("--deepspeed", "none")
    assert counted == [8, 4, 2] and chosen == [2]
    printed = capsys.readouterr().out
    assert "evaluation: 2 prompts at a time, as 8 of the longest do not fit" in printed
    assert "Plan: training 5.0 GB, evaluation of 2 2.0 GB a GPU. 5.0 GB, and 1 for CUDA" in printed
    assert "of 3.5 GB: it DOES NOT FIT. --plan says more" in printed


def test_a_cpu_counts_nothing(docvqa, monkeypatch):
    """Without --plan and without a GPU, a run starts as before."""
    monkeypatch.setattr(plan, "FakeRun", None)
    monkeypatch.setattr(recipe("docvqa"), "load_model", lambda *args: sys.exit("loads"))
    with pytest.raises(SystemExit, match="loads"):
        docvqa("--deepspeed", "none")


def test_a_count_that_fails_leaves_no_fakes(demo_checkpoint, demo_processor, tmp_path, monkeypatch):
    """The run that goes on computes with tensors that have values."""
    args = arguments(demo_checkpoint, tmp_path)
    setup = plan.run_setup(args, plan.Machine(1, "CPU", 8e9, on_gpu=False))
    run = FakeRun(plan.load_config(args), args, trainer_arguments(args), None, setup)
    batch = TrainingCollator(demo_processor, for_trainer=True)(RECORDS)
    del batch["ids"], batch["lengths"]
    monkeypatch.setattr(run.model, "lm_head", None)
    with pytest.raises(TypeError):
        run.training(batch)
    assert token_order.cache_info().currsize == 0


def test_a_count_that_fails_costs_no_run(docvqa, monkeypatch, capsys):
    """Unless it was asked for: evaluation finds a batch that fits without it."""

    def fail(*args):
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(plan, "FakeRun", fail)
    monkeypatch.setattr(plan, "this_machine", lambda planned: plan.Machine(1, "a GPU", 80e9))
    monkeypatch.setattr(recipe("docvqa"), "load_model", lambda *args: sys.exit("loads"))
    with pytest.raises(SystemExit, match="loads"):
        docvqa("--deepspeed", "none")
    assert "was not counted, because of no such operator" in capsys.readouterr().out
    with pytest.raises(NotImplementedError):
        docvqa("--deepspeed", "none", "--plan")
