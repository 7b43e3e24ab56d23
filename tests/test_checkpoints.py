"""Which checkpoints count, what a run may resume from, and failures with a message."""

import errno
import gc
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import psutil
import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from helpers.records import RECORDS
from helpers.trainers import SETTINGS, arguments, make_trainer
from phi3v.errors import RunError, explanation
from phi3v.training import checkpoints, trainer_arguments
from phi3v.training.checkpoints import check_settings, fingerprint
from phi3v.training.launch import _prepare_deepspeed
from phi3v.training.output_folder import COMPLETE, OutputFolder, complete_files, incompleteness

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def trained(checkpoint, folder, *flags, records=RECORDS):
    """A short run that saves a checkpoint at every step."""
    args = arguments(checkpoint, folder, "--batch_size", "1", "--save_steps", "1", *flags)
    trainer = make_trainer(args, records)
    trainer.train(trainer.args.resume_from_checkpoint)


@pytest.fixture(scope="module")
def run(demo_checkpoint, tmp_path_factory):
    """An output folder with the checkpoints of three steps, the oldest deleted."""
    folder = tmp_path_factory.mktemp("run")
    trained(demo_checkpoint, folder)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "output")


def resume(demo_checkpoint, folder, *flags) -> str | None:
    """What a run would resume from, whose settings in make_trainer are these."""
    args = arguments(
        demo_checkpoint, folder, *("--batch_size", "1", "--resume_from_checkpoint", *flags)
    )
    return trainer_arguments(args, **SETTINGS).resume_from_checkpoint


def test_newest_complete_one(demo_checkpoint, copy):
    """Two are kept, both whole; the newest is taken; a folder without any starts anew."""
    kept = OutputFolder(copy).checkpoints()
    assert [path.name for path in kept] == ["checkpoint-2", "checkpoint-3"]
    assert resume(demo_checkpoint, copy) == str(kept[1])
    assert resume(demo_checkpoint, copy, str(kept[0])) == str(kept[0])
    assert resume(demo_checkpoint, copy.parent / "new") is None


@pytest.mark.parametrize("damage", ["no marker", "half a marker", "file gone", "file cut"])
def test_a_half_written_one_does_not_count(demo_checkpoint, copy, damage):
    """Nor does it hide the one before it. Named by its path, it is refused with the reason."""
    newest = OutputFolder(copy).checkpoints()[-1]
    if damage == "no marker":
        (newest / COMPLETE).unlink()
    elif damage == "half a marker":
        (newest / COMPLETE).write_text((newest / COMPLETE).read_text()[:100])
    elif damage == "file gone":
        (newest / "optimizer.pt").unlink()
    else:
        content = (newest / "model.safetensors").read_bytes()
        (newest / "model.safetensors").write_bytes(content[:-1])
    assert resume(demo_checkpoint, copy) == str(copy / "checkpoint-2")
    reason = "not complete|is missing|is not as it was written"
    with pytest.raises(RunError, match=f"checkpoint-3: .*({reason})"):
        resume(demo_checkpoint, copy, str(newest))


def test_a_machine_that_does_not_see_it(copy, monkeypatch):
    """It is named with what is missing there, and the disk that it looked at."""
    checkpoint = copy / "checkpoint-3"
    listed = complete_files(checkpoint)
    monkeypatch.setattr(checkpoints, "world_size", lambda: 2)
    monkeypatch.setattr(checkpoints, "SEEN_AFTER", 0)
    monkeypatch.setattr(checkpoints, "on_first_rank", lambda decide: listed)
    monkeypatch.setattr(checkpoints, "gather", lambda mine: [None, mine])
    checkpoints.wait_until_seen(checkpoint)
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text().replace("0", "1", 1))  # an older one of the same size
    with pytest.raises(
        RunError, match=r"checkpoint-3, as .* sees it on .*: trainer_state.json is not"
    ):
        checkpoints.wait_until_seen(checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(RunError, match="there is no such folder.* storage that all machines share"):
        checkpoints.wait_until_seen(checkpoint)


def test_the_next_checkpoint_removes_half_written_ones(demo_checkpoint, tmp_path):
    """Left-overs of a killed run go, and do not push out whole ones. Other folders stay."""
    flags = ("--batch_size", "1", "--save_steps", "1")
    trainer = make_trainer(arguments(demo_checkpoint, tmp_path, *flags))
    OutputFolder(tmp_path).begin_checkpoint("checkpoint-9").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    trainer.train()
    names = [path.name for path in OutputFolder(tmp_path).checkpoints()]
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-7"]


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--batch_size", "3"), "batch_size is 3, it had 1"),
        (("--use_lora",), "use_lora is True, it had False"),
        (("--learning_rate", "1"), "learning_rate is 1.0, it had 4e-05"),
        (("--num_train_epochs", "2"), "num_train_epochs is 2.0"),
    ],
)
def test_other_settings_are_refused(demo_checkpoint, copy, flags, difference):
    """What would end with other weights is named, with both values."""
    with pytest.raises(RunError, match=difference):
        resume(demo_checkpoint, copy, *flags)


def test_other_data_is_refused(demo_checkpoint, copy):
    """It is known once it is loaded."""
    flags = ("--batch_size", "1", "--resume_from_checkpoint")
    with pytest.raises(RunError, match="training data is '2 samples"):
        make_trainer(arguments(demo_checkpoint, copy, *flags), RECORDS[:2])


def test_another_number_of_processes(demo_checkpoint, copy, capsys):
    """
    A run goes on and says what is another, where steps have the same samples. It is refused under
    DeepSpeed, and where batches are made by length.
    """
    complete = copy / "checkpoint-3" / COMPLETE
    content = json.loads(complete.read_text())
    ours = {**content["settings"]}
    theirs = content["settings"]
    theirs |= {"processes": 2, "batch_size_per_gpu": 4, "use_lora": True, "lora_dropout": 0.5}
    complete.write_text(json.dumps(content))
    flags = ("--use_lora", "--lora_dropout", "0.5")
    assert resume(demo_checkpoint, copy, *flags) == str(complete.parent)
    said = capsys.readouterr().out
    assert "Going on with 1 x 1 samples at a time in place of 2 x 4" in said
    assert "the random numbers of --lora_dropout" in said
    for other in ({"deepspeed": {}}, {"train_sampling_strategy": "group_by_length"}):
        check_settings(
            "here is a run", {**ours, **other, "batch_size_per_gpu": 4}, {**ours, **other}
        )
        with pytest.raises(RunError, match=r"processes is 1, it had 2 \(.*(part|batches)"):
            check_settings("here is a run", {**ours, **other, "processes": 2}, {**ours, **other})


def test_harmless_settings_may_change(demo_checkpoint, copy):
    """Evaluation, workers and how often to save have no part in the weights."""
    flags = ("--eval_steps", "7", "--max_new_tokens", "3", "--save_steps", "5")
    assert resume(demo_checkpoint, copy, *flags)


def test_fingerprint():
    """A changed word, answer, order or image is another dataset; another folder is not."""
    assert fingerprint(RECORDS) == fingerprint(list(RECORDS))
    assert fingerprint(RECORDS) != fingerprint(RECORDS[::-1])
    [record, *others] = RECORDS
    for field in ("user", "assistant", "images"):
        [first, *turns] = record["conversations"]
        changed = {**first, field: first[field][:-1]}
        other = {**record, "conversations": [changed, *turns]}
        assert fingerprint([other, *others]) != fingerprint(RECORDS), field
    assert fingerprint([RECORDS[:2]]) != fingerprint([RECORDS[1:]])


def test_a_checkpoint_that_is_overwritten_stops_counting(run, copy, demo_checkpoint, monkeypatch):
    """Resumed from an earlier one, the run writes the later one anew: half of it must not count."""
    flags = ("--save_steps", "1", "--resume_from_checkpoint", str(copy / "checkpoint-2"))
    trainer = make_trainer(arguments(demo_checkpoint, copy, "--batch_size", "1", *flags))
    states = []
    monkeypatch.setattr(
        trainer,
        "_save_optimizer_and_scheduler",
        lambda path: states.append(incompleteness(Path(path))),
    )
    trainer.train(trainer.args.resume_from_checkpoint)
    assert states and "not complete" in states[0]


def test_many_steps_hold_no_memory(demo_checkpoint, tmp_path):
    """Hundreds of steps end with the memory that the first hundred had."""
    args = arguments(demo_checkpoint, tmp_path, "--batch_size", "1", "--num_train_epochs", "130")
    trainer = make_trainer(args)
    held = {}

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 130 == 0:
                gc.collect()
                held[state.global_step] = psutil.Process().memory_info().rss / 1e6

    trainer.add_callback(Measure())
    trainer.train()
    assert list(held) == [130, 260, 390]
    assert held[390] - held[130] < 20


@patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0"})  # all put back after the test
def test_no_code_of_an_optimizer_state_runs(tmp_path):
    """Under DeepSpeed too, which asks for plain pickles, a checkpoint cannot run code."""
    _prepare_deepspeed(on_gpu=False)
    dist.destroy_process_group()
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"state": Evil()}, tmp_path / "optim_states.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "optim_states.pt", weights_only=False)
    assert not marker.exists()


# ---------------------------------------------------------------- failures


def test_full_disk_is_named():
    """A full disk, in whatever words a library says it, names the path and the way on."""
    full = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    assert "cannot write /data/x: the disk is full" in explanation(full)
    copied = OSError(errno.ENOSPC, "No space left on device", "/code/a.py", None, "/data/a.py")
    assert "cannot write /data/a.py" in explanation(copied)
    said = RuntimeError("I/O error: No space left on device (os error 28)")
    assert "cannot write --output_dir: the disk is full" in explanation(said)
    half = "[enforce fail at inline_container.cc:603] . unexpected pos 1024 vs 918"
    assert "the disk is full" in explanation(RuntimeError(half))
    assert explanation(OSError(errno.ENOENT, "no such file")) is None
    assert explanation(RuntimeError("something else")) is None


def test_a_lost_rank_points_to_its_own_message():
    """The ranks that wait for one that died do not bury its message under tracebacks."""
    lost = RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:9938.")
    assert "another rank is gone" in explanation(lost)


def test_out_of_memory_says_what_to_lower():
    text = explanation(torch.OutOfMemoryError("CUDA"))
    assert (
        text.index("--batch_size_per_gpu") < text.index("--num_crops") < text.index("--use_qlora")
    )


def poisoned_trainer(demo_checkpoint, folder, *steps: int, fp16: bool = False):
    """A trainer whose loss is NaN at some steps, of one sample each."""
    args = arguments(demo_checkpoint, folder, "--batch_size", "1", "--num_train_epochs", "10")
    records = [{**one, "id": f"sample-{i}"} for i, one in enumerate(RECORDS)]
    trainer = make_trainer(args, records)
    trainer.args.fp16 = fp16  # what is looked at; a CPU computes in float32 all the same
    forward, calls = trainer.model.forward, []

    def poison(**inputs):
        calls.append(1)
        output = forward(**inputs)
        if len(calls) in steps:
            output.loss = output.loss * float("nan")
        return output

    trainer.model.forward = poison
    # GradScaler skips the update of such a step.
    trainer.create_optimizer()
    update = trainer.optimizer.step
    trainer.optimizer.step = lambda *args: None if len(calls) in steps else update(*args)
    return trainer


def test_a_loss_that_is_not_finite(demo_checkpoint, tmp_path):
    """The run ends at that step, and names the samples of its batch."""
    trainer = poisoned_trainer(demo_checkpoint, tmp_path, 2)
    with pytest.raises(RunError, match=r"step 2 is not finite, in the batch of 'sample-\d'"):
        trainer.train()


def test_overflows_of_fp16_are_skipped(demo_checkpoint, tmp_path):
    """One lowers the loss scale, and training goes on; ten in a row end it."""
    trainer = poisoned_trainer(demo_checkpoint, tmp_path, 2, *range(4, 13), fp16=True)
    trainer.train()
    assert trainer.state.global_step == 30
    trainer = poisoned_trainer(demo_checkpoint, tmp_path, *range(4, 14), fp16=True)
    with pytest.raises(RunError, match="the loss of step 13 is not finite"):
        trainer.train()


def test_loss_scale_at_its_minimum(demo_checkpoint, tmp_path):
    """fp16 that overflows again and again ends the run; a scale that works does not."""
    trainer = make_trainer(arguments(demo_checkpoint, tmp_path))
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    logs = {"loss": 1.0, "learning_rate": 1.0}
    trainer.log(logs)
    trainer.accelerator.scaler.get_scale = lambda: 0.5
    with pytest.raises(RunError, match="Use --bf16 .* or lower --learning_rate"):
        trainer.log(logs)
    text = explanation(Exception("Current loss scale already at minimum - cannot decrease"))
    assert "fp16 overflows" in text
