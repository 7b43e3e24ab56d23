"""What several ranks have to do together: choose, fail, and stop, as real processes."""

import json
import re
import time
from pathlib import Path

import pytest

from conftest import REPO
from helpers.launcher import Launcher, torchrun
from phi3v.training.output_folder import OutputFolder, incompleteness
from small_datasets import write_videos

pytestmark = pytest.mark.slow
SCRIPT = str(REPO / "finetune_hf_trainer_ucf101.py")
ZERO3 = ("--deepspeed", str(REPO / "ds_configs" / "zero3.json"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_videos(folder, "train", 8)
    return write_videos(folder, "val", 20)


@pytest.fixture
def flags(data_dir, demo_checkpoint) -> tuple[str, ...]:
    return (
        *("--data_dir", str(data_dir), "--model_name_or_path", str(demo_checkpoint)),
        *("--num_crops", "1", "--batch_size", "4", "--no-tqdm", "--max_new_tokens", "2"),
    )


# The second rank sees no file of a checkpoint for two seconds after it looks for one, as on a file
# system that shows other machines what it knew before. Step 7 is the best one.
LATE = """
import builtins, hashlib, io, os, sys, time, runpy
from stat import S_ISDIR
sys.path.insert(0, {repo!r})
from phi3v.training import Phi3VTrainer
first_look, look, open_file = {{}}, os.stat, io.open

def hide(path):
    folder, now = str(path).rpartition("/")[0], time.monotonic()
    if "/checkpoint-" in folder and now < first_look.setdefault(folder, now) + 2:
        raise FileNotFoundError(2, "not seen yet", path)

def stat(path, *args, **options):
    found = look(path, *args, **options)
    if not S_ISDIR(found.st_mode):
        hide(path)
    return found

def open_seen(path, mode="r", *args, **options):
    if mode[0] == "r":
        hide(path)
    return open_file(path, mode, *args, **options)

if os.environ["RANK"] == "1":
    os.stat = stat
    io.open = builtins.open = open_seen

save_model = Phi3VTrainer.save_model

def tell_and_save(self, output_dir=None, **options):
    if output_dir is None:
        weights = b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())
        print("trained weights:", hashlib.sha256(weights).hexdigest(), flush=True)
    save_model(self, output_dir, **options)

make = Phi3VTrainer.__init__

def make_with_metric(self, **options):
    best = lambda results: {{"accuracy": -abs(7 - self.state.global_step)}}
    make(self, **options | {{"compute_metrics": best}})

Phi3VTrainer.save_model = tell_and_save
Phi3VTrainer.__init__ = make_with_metric
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_rank_that_sees_files_later(launcher: Launcher, flags, tmp_path):
    """
    It waits for a checkpoint to go on from, and for the best one at the end. So all ranks resume
    the same, train the same, and end with the same weights.
    """
    script, output = tmp_path / "late.py", OutputFolder(tmp_path / "out")
    script.write_text(LATE.format(repo=str(REPO), script=SCRIPT))
    flags = (*flags, "--output_dir", str(output.path), "--use_lora", "--lora_rank", "2")
    flags += ("--merge_lora", "--num_train_epochs", "4", "--save_steps", "1", "--eval_steps", "1")
    flags += ("--load_best_model_at_end", "--metric_for_best_model", "accuracy")
    flags += ("--eval_samples", "2", "--resume_from_checkpoint")
    first = launcher.start(*torchrun(2, script, *flags))
    while all(map(incompleteness, output.checkpoints())):
        assert first.poll() is None, first.text()
        time.sleep(0.01)
    first.kill()
    said = launcher.run(*torchrun(2, script, *flags))
    assert said.count(f"Resuming from {output.path / 'checkpoint-'}") == 1
    weights = re.findall("trained weights: (.*)", said)
    assert len(weights) == 2 and len(set(weights)) == 1, said
    assert (output.path / "merged" / "config.json").is_file()


# The loss of the second rank alone is NaN.
POISONED = """
import os, sys, runpy
sys.path.insert(0, {repo!r})
from phi3v import Phi3VForCausalLM
if os.environ["RANK"] == "1":
    compute = Phi3VForCausalLM.forward
    def poison(self, *args, **inputs):
        output = compute(self, *args, **inputs)
        if output.loss is not None:
            output.loss = output.loss * float("nan")
        return output
    Phi3VForCausalLM.forward = poison
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_loss_that_is_not_finite_on_one_rank(launcher: Launcher, flags, tmp_path):
    """All ranks end, with the samples of the one that saw it, in torchrun's summary as well."""
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.format(repo=str(REPO), script=SCRIPT))
    flags = (*flags, "--output_dir", str(tmp_path / "out"), "--deepspeed", "none")
    said = launcher.run(*torchrun(2, script, *flags), status=1)
    message = "the loss of step 1 is not finite, in the batch of 'train-"
    assert f"error: {message}" in said, said
    before, _, summary = said.partition("Root Cause (first observed failure):")
    assert message in summary, said
    assert "error: another rank is gone" not in before


def test_the_message_comes_last(launcher: Launcher, flags, tmp_path):
    """Below torchrun's own traceback stands what to do, and no traceback of the recipe."""
    for extra, message in (
        (("--data_dir", str(tmp_path / "none")), "there is no such file"),
        (("--num_crops", "17"), "--num_crops: must be at least 1 and at most 16, not 17"),
    ):
        words = (*flags, "--output_dir", str(tmp_path / "out"), *extra)
        said = launcher.run(*torchrun(2, SCRIPT, *words), status=1)
        summary = said.partition("Root Cause (first observed failure):")[2]
        assert message in summary and "Traceback" not in summary, said
        assert 'finetune_hf_trainer_ucf101.py", line' not in said, said


# SIGTERM comes in the first evaluation after a step, whose batches take long from then on.
STOPPED = """
import os, signal, sys, time, runpy
sys.path.insert(0, {repo!r})
from phi3v import Phi3VForCausalLM
generate, calls = Phi3VForCausalLM.generate, []
def slow(self, **inputs):
    calls.append(1)
    if len(calls) >= 13:  # ten batches are evaluated before training
        if len(calls) == 13 and os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun hands it on
        time.sleep(1)
        print("batch", os.environ["RANK"], flush=True)
    return generate(self, **inputs)
Phi3VForCausalLM.generate = slow
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("engine", [("--deepspeed", "none"), ZERO3], ids=["DDP", "ZeRO-3"])
def test_sigterm_in_an_evaluation(launcher: Launcher, flags, tmp_path, engine):
    """
    It is left at the next batch, on all ranks; a checkpoint of the step before it is saved, and the
    run goes on from there, with that evaluation.
    """
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED.format(repo=str(REPO), script=SCRIPT))
    flags = (*flags, *engine, "--eval_steps", "1", "--eval_batch_size_per_gpu", "1")
    output = OutputFolder(tmp_path / "out")
    flags = (*flags, "--output_dir", str(output.path))
    said = launcher.run(*torchrun(2, script, *flags), status=1)
    assert said.count("batch ") <= 2 * 4, "the whole evaluation has ten batches a rank"
    assert "Stopped by SIGTERM after step 1 of 2; a checkpoint is saved" in said
    assert not incompleteness(output.path / "checkpoint-1")
    assert not (output.path / "eval_step_1.json").exists()
    launcher.run(*torchrun(2, SCRIPT, *flags, "--resume_from_checkpoint"))
    for name in ("eval_step_1.json", "eval_step_2.json", "eval_after.json"):
        assert len(json.loads((output.path / name).read_text())["ids"]) == 20


def test_two_runs_in_one_folder(launcher: Launcher, flags, tmp_path):
    """The second one is refused, with every flag; the first one ends as if it had been alone."""
    flags = (*flags, "--output_dir", str(tmp_path), "--deepspeed", "none")
    first = launcher.start(SCRIPT, *flags, "--num_train_epochs", "3000")
    while not (tmp_path / ".phi3v" / "lock").exists():
        assert first.poll() is None, first.text()
        time.sleep(0.01)
    said = launcher.run(SCRIPT, *flags, "--overwrite_output_dir", status=1)
    assert first.poll() is None, "the first one was too short for this test"
    assert "error: --output_dir" in said and "another run is writing to it" in said
    first.kill()
    assert "Traceback" not in said
