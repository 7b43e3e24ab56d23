"""What a run may write, replace and remove in its output folder, and what it leaves as it is."""

import json
import multiprocessing
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import REPO
from helpers.launcher import torchrun
from helpers.trainers import SETTINGS, arguments, make_trainer
from phi3v.errors import RunError
from phi3v.training import RecipeParser, trainer_arguments
from phi3v.training.checkpoints import bytes_to_write
from phi3v.training.merging import merge_adapter
from phi3v.training.output_folder import COMPLETE, LAST_RESULT, OutputFolder, incompleteness
from small_datasets import write_videos

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def files_below(folder: Path) -> dict[str, bytes]:
    """The contents of all files, but for the run's lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def train(checkpoint: Path, folder: Path, *flags: str, finish: bool = True) -> None:
    """What a recipe does, without its first evaluation."""
    args = arguments(checkpoint, folder, "--batch_size", "1", "--save_steps", "1", *flags)
    trainer = make_trainer(args)
    trainer.train(trainer.args.resume_from_checkpoint)
    trainer.save_model()
    if finish:
        trainer.evaluate(file_name=LAST_RESULT)


@pytest.fixture(scope="module")
def finished(demo_checkpoint, tmp_path_factory) -> Path:
    """A finished LoRA run of three steps, whose adapter is small."""
    folder = tmp_path_factory.mktemp("finished")
    train(demo_checkpoint, folder, "--use_lora", "--lora_rank", "2")
    return folder


@pytest.fixture
def output(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "output")


def lora(checkpoint, folder, *flags):
    flags = ("--use_lora", "--lora_rank", "2", "--batch_size", "1", *flags)
    args = arguments(checkpoint, folder, *flags)
    return trainer_arguments(args, **SETTINGS).resume_from_checkpoint


# ---------------------------------------------------------------- what is refused


def test_results_are_not_overwritten(demo_checkpoint, output):
    """A new run is refused beside another's results, and nothing is changed by that."""
    before = files_below(output)
    with pytest.raises(RunError, match="holds .* of another run.*overwrite_output_dir"):
        lora(demo_checkpoint, output)
    (output / "eval_before.json").write_text("{}")
    with pytest.raises(RunError, match="holds eval_before.json"):
        lora(demo_checkpoint, output, "--eval_only")
    (output / "eval_before.json").unlink()
    assert files_below(output) == before


@pytest.mark.parametrize("where", ["itself", "dots", "link", "above", "its checkpoint", "files"])
@pytest.mark.parametrize(
    "flag", [(), ("--overwrite_output_dir",), ("--resume_from_checkpoint",), ("--eval_only",)]
)
def test_the_model_folder_is_no_output_folder(tmp_path, capsys, where, flag):
    """The weights that a run starts from cannot be where it writes, by whatever path."""
    model = tmp_path / "models" / "phi"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_text("weights")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "of_links").mkdir()
    (tmp_path / "of_links" / "model.safetensors").symlink_to(model / "model.safetensors")
    name, folder = {
        "itself": (model, model),
        "dots": (model, model / ".." / "phi" / "."),
        "link": (model, tmp_path / "link"),
        "above": (model, tmp_path / "models"),
        "its checkpoint": (model, model / "checkpoint-7"),
        "files": (tmp_path / "of_links", model),
    }[where]
    flags = [f"--model_name_or_path={name}", f"--output_dir={folder}", *flag]
    with pytest.raises(SystemExit) as stopped:
        RecipeParser("").parse_args(flags)
    assert stopped.value.code == 2
    assert f"--output_dir {folder} is where --model_name_or_path {name} lies" in (
        capsys.readouterr().err
    )
    assert files_below(model) == {"model.safetensors": b"weights"}


def test_folders_beside_and_below_the_model_are_fine(tmp_path):
    (tmp_path / "phi").mkdir()
    for folder in ("phi2", "phi/second_stage"):
        flags = [f"--model_name_or_path={tmp_path / 'phi'}", f"--output_dir={tmp_path / folder}"]
        assert RecipeParser("").parse_args(flags)


@pytest.mark.parametrize("name", ["file", "file/below", "a" * 300, "/dev/null", "/proc/out"])
def test_output_folders_that_cannot_be(demo_checkpoint, tmp_path, name):
    """One message that names the flag, before the model is loaded."""
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="--output_dir .*(no folder|too long|Not a dir|No such)"):
        lora(demo_checkpoint, tmp_path / name)


def hold(folder: Path, started, ended) -> None:
    OutputFolder(folder).lock()
    started.set()
    ended.wait()


def test_two_runs_at_once(demo_checkpoint, tmp_path, monkeypatch):
    """The second run in a folder is refused as long as the first one lives."""
    monkeypatch.setattr("phi3v.training.output_folder.PATIENCE", 0.1)
    context = multiprocessing.get_context("fork")
    started, ended = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, started, ended))
    other.start()
    try:
        assert started.wait(60)
        for flag in ((), ("--resume_from_checkpoint",), ("--overwrite_output_dir",)):
            with pytest.raises(RunError, match="another run is writing to it"):
                lora(demo_checkpoint, tmp_path, *flag)
    finally:
        ended.set()
        other.join()
    assert lora(demo_checkpoint, tmp_path) is None


# ---------------------------------------------------------------- --overwrite_output_dir


def test_overwriting_removes_what_our_run_wrote(demo_checkpoint, output):
    """Adapter, checkpoints, record go; a user's files stay, whatever their names."""
    mine = {
        "checkpoint-7/notes.txt": "mine",
        "checkpoint-3/notes.txt": "mine",
        "eval_of_mine.json": "{}",
        "unfinished/a.txt": "mine",
        "other.safetensors": "mine",
    }
    for name, text in mine.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(text)
    before = files_below(output)
    args = arguments(demo_checkpoint, output, "--overwrite_output_dir", "--batch_size", "1")
    assert trainer_arguments(args).resume_from_checkpoint is None
    assert files_below(output) == before, "nothing goes before the model is loaded"
    make_trainer(args)
    left = files_below(output)
    assert left.keys() == {*mine, ".phi3v/run.json"}
    assert all(left[name] == text.encode() for name, text in mine.items())


def test_a_whole_checkpoint_of_another_run_is_not_taken_over(demo_checkpoint, finished, tmp_path):
    """One that somebody put there stays when a new run deletes its own older ones."""
    theirs = shutil.copytree(finished / "checkpoint-3", tmp_path / "checkpoint-100")
    before = files_below(theirs)
    flags = ("--overwrite_output_dir", "--use_lora", "--lora_rank", "2", "--save_total_limit", "1")
    train(demo_checkpoint, tmp_path, *flags)
    assert files_below(theirs) == before
    assert OutputFolder(tmp_path).record["checkpoints"] == ["checkpoint-3"]


def test_a_model_that_does_not_load_costs_no_results(demo_checkpoint, output, tmp_path):
    """The old run is there still when the new one cannot start."""
    broken = shutil.copytree(demo_checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    before = files_below(output)
    with pytest.raises(RunError):
        train(broken, output, "--overwrite_output_dir")
    assert files_below(output) == before


def test_a_record_cannot_lead_out_of_the_folder(output, tmp_path):
    """A record of a folder that came from elsewhere removes nothing outside of it."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "precious_folder").mkdir()
    (output / "link").symlink_to(tmp_path)
    folder = OutputFolder(output)
    folder.update(files=["../precious", "link/precious", str(tmp_path / "precious")])
    folder.remove_run()
    assert (tmp_path / "precious").exists()
    folder.update(checkpoints=["../precious_folder"])
    assert folder.record["checkpoints"] == [], "a record with such a name is none"
    folder.remove_run()
    assert (tmp_path / "precious_folder").is_dir()


def test_files_of_others_are_kept_beside_ours(demo_checkpoint, tmp_path, capsys):
    """A file whose name the run needs is set aside, and so is a folder."""
    (tmp_path / "checkpoint-2").mkdir()
    for name in ("README.md", "checkpoint-2/notes.txt", "eval_after.json"):
        (tmp_path / name).write_text("mine")
    flags = ("--overwrite_output_dir", "--use_lora", "--lora_rank", "2")
    train(demo_checkpoint, tmp_path, *flags)
    OutputFolder(tmp_path).write_json("eval_after.json", {})
    for name in ("README.md.bak", "checkpoint-2.bak/notes.txt", "eval_after.json.bak"):
        assert (tmp_path / name).read_text() == "mine"
    assert (tmp_path / "README.md").read_text() != "mine"
    listed = json.loads((tmp_path / "checkpoint-2" / COMPLETE).read_text())["files"]
    assert "notes.txt" not in listed
    assert "was not written by a run of this recipe" in capsys.readouterr().out


# ---------------------------------------------------------------- --resume_from_checkpoint


def test_a_finished_run_is_left_alone(demo_checkpoint, output, capsys):
    """The command that starts and restarts a run says so, and ends well; other settings do not."""
    before = files_below(output)
    for flags in ((), ("--eval_steps", "3"), ("--no-gradient_checkpointing",)):
        with pytest.raises(SystemExit) as ended:
            lora(demo_checkpoint, output, "--resume_from_checkpoint", *flags)
        assert ended.value.code == 0
        assert "holds this run, and it is finished" in capsys.readouterr().out
    with pytest.raises(RunError, match="finished run with other settings.* learning_rate is 1.0"):
        lora(demo_checkpoint, output, "--resume_from_checkpoint", "--learning_rate", "1")
    assert files_below(output) == before


def leave_one(output: Path) -> Path:
    """Only the newest checkpoint of a run that has not finished."""
    folder = OutputFolder(output)
    [*others, newest] = folder.checkpoints()
    for path in others:
        folder.remove_checkpoint(path.name)
    (output / LAST_RESULT).unlink()
    return newest


@pytest.mark.parametrize(
    "damage", ["lost", "edited", "same size", "of the plain Trainer", "garbled list"]
)
def test_a_damaged_checkpoint_is_not_thrown_away(demo_checkpoint, output, damage):
    """The only one there is, not whole and not ours to delete: an error with what is wrong."""
    newest = leave_one(output)
    if damage == "lost":
        (newest / "tokenizer.json").unlink()
    elif damage == "edited":
        (newest / "adapter_config.json").write_text("{}")
    elif damage == "same size":
        state = (newest / "trainer_state.json").read_text()
        (newest / "trainer_state.json").write_text(
            state.replace('"global_step": 3', '"global_step": 2')
        )
    elif damage == "garbled list":
        (newest / COMPLETE).write_text("{")
    else:
        (newest / COMPLETE).unlink()
        shutil.rmtree(output / ".phi3v")
        (output / "adapter_model.safetensors").unlink()
    before = files_below(output)
    reason = "is missing|is not as it was written|not complete"
    with pytest.raises(RunError, match=f"{newest} cannot be resumed from: .*({reason})"):
        lora(demo_checkpoint, output, "--resume_from_checkpoint")
    assert files_below(output) == before


def test_what_an_interrupted_saving_left_is_replaced(demo_checkpoint, output, capsys):
    """Our own half-written checkpoint is none: the run starts anew."""
    newest = leave_one(output)
    (newest / COMPLETE).unlink()
    assert lora(demo_checkpoint, output, "--resume_from_checkpoint") is None
    assert "holds no complete checkpoint: the run starts anew" in capsys.readouterr().out
    with pytest.raises(RunError, match="holds a run with other settings"):
        lora(demo_checkpoint, output, "--resume_from_checkpoint", "--learning_rate", "1")


def test_results_of_another_origin_are_not_resumed(demo_checkpoint, output, tmp_path):
    """Without a checkpoint, --resume_from_checkpoint is no way around the refusal."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(output / "adapter_model.safetensors", other)
    with pytest.raises(RunError, match="holds adapter_model.safetensors of another run"):
        lora(demo_checkpoint, other, "--resume_from_checkpoint")
    path = str(output / "checkpoint-2")
    with pytest.raises(RunError, match="holds adapter_model.safetensors of another run"):
        lora(demo_checkpoint, other, "--resume_from_checkpoint", path)


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("step", ["from_pretrained", "merge_and_unload", "save_pretrained"])
def test_a_merge_that_fails_leaves_the_adapter(demo_checkpoint, output, monkeypatch, step):
    """The trained adapter is in the output folder whatever becomes of merged/."""
    adapter = (output / "adapter_model.safetensors").read_bytes()
    owner = {
        "from_pretrained": "phi3v.training.loading.Phi3VForCausalLM",
        "merge_and_unload": "peft.LoraModel",
        "save_pretrained": "phi3v.model.modeling_phi3_v.Phi3VForCausalLM",
    }[step]

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    args = arguments(demo_checkpoint, output, "--use_lora", "--merge_lora", "--batch_size", "1")
    with monkeypatch.context() as broken:
        broken.setattr(f"{owner}.{step}", fail)
        with pytest.raises(RunError, match="--merge_lora: .*No space.* The adapter is saved in"):
            merge_adapter(args)
    assert (output / "adapter_model.safetensors").read_bytes() == adapter
    assert not (output / "merged").exists()
    # The same command goes on with the merge.
    with pytest.raises(SystemExit) as ended:
        lora(demo_checkpoint, output, "--resume_from_checkpoint", "--merge_lora")
    assert ended.value.code == 0
    assert AutoModelForCausalLM.from_pretrained(output / "merged")


def test_saved_files_are_as_the_umask_says(finished):
    """safetensors' are not for the owner alone: colleagues can read a model and a checkpoint."""
    mask = os.umask(0)
    os.umask(mask)
    written = [path for path in finished.rglob("*.safetensors")]
    assert len(written) == 3
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


def test_files_are_whole_or_absent(tmp_path):
    """An error on the way leaves the old files and nothing else."""
    folder = OutputFolder(tmp_path)
    folder.write_json("a.json", {"a": 1})
    with pytest.raises(TypeError):
        folder.write_json("a.json", {"a": object()})
    with pytest.raises(OSError, match="full"), folder.finished_files() as unfinished:
        (unfinished / "b").write_text("half")
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir() if path.name != ".phi3v"] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    with folder.finished_files() as unfinished:
        (unfinished / "b").mkdir()
        (unfinished / "b" / "c").write_text("whole")
    assert (tmp_path / "b" / "c").read_text() == "whole" and not unfinished.exists()
    assert folder.record["files"] == ["a.json", "b/c"]


# ---------------------------------------------------------------- room on the disk


def test_no_room_is_found_at_the_start(demo_checkpoint, tmp_path, monkeypatch):
    """What is free is held against all that the run will write."""
    usage = SimpleNamespace(free=10**12)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    args = arguments(demo_checkpoint, tmp_path / "a" / "b", "--save_steps", "1")
    trainer = make_trainer(args)
    usage.free = bytes_to_write(trainer.model, args, num_checkpoints=3, deepspeed=False)
    make_trainer(args)
    usage.free -= 1
    with pytest.raises(RunError, match=r"will write up to 0.0 GB, .* lower --save_total_limit"):
        make_trainer(args)


def test_bytes_to_write():
    """DeepSpeed writes 16 bytes a parameter in bf16; DDP weights and moments; merged/ counts."""
    model = torch.nn.Linear(1000, 1000, bias=False, dtype=torch.bfloat16)
    args = SimpleNamespace(merge_lora=False, bf16=True)
    assert bytes_to_write(model, args, 0, True) == 2_000_000
    assert bytes_to_write(model, args, 1, True) == 2_000_000 + 16_000_000
    assert bytes_to_write(model, args, 2, False) == 2_000_000 + 2 * 10_000_000
    args.merge_lora = True
    assert bytes_to_write(model, args, 0, True) == 4_000_000


def test_an_estimate_is_what_a_run_writes(demo_checkpoint, tmp_path):
    """The sizes on the disk are those that were foreseen, but for small files."""
    train(demo_checkpoint, tmp_path, "--num_train_epochs", "0.3", finish=False)
    args = arguments(demo_checkpoint, tmp_path / "other")
    foreseen = bytes_to_write(make_trainer(args).model, args, num_checkpoints=1, deepspeed=False)
    [checkpoint] = OutputFolder(tmp_path).checkpoints()
    assert not incompleteness(checkpoint)
    written = [tmp_path / "model.safetensors"]
    written += [checkpoint / name for name in ("model.safetensors", "optimizer.pt")]
    assert foreseen == pytest.approx(sum(path.stat().st_size for path in written), rel=0.02)


def test_an_estimate_is_what_deepspeed_writes(launcher, demo_checkpoint, tmp_path):
    """With the weights a second time, and a float32 copy of them; the ranks' parts together."""
    data = tmp_path / "data"
    write_videos(data, "train", 2)
    write_videos(data, "val", 1)
    flags = ("--data_dir", data, "--model_name_or_path", demo_checkpoint, "--num_crops", "1")
    flags += ("--batch_size", "2", "--save_steps", "1", "--max_new_tokens", "1", "--no-tqdm")
    script = REPO / "finetune_hf_trainer_ucf101.py"
    launcher.run(*torchrun(2, script, *flags, "--output_dir", tmp_path / "out"))
    args = arguments(demo_checkpoint, tmp_path / "other")
    model = make_trainer(args).model
    foreseen = bytes_to_write(model, args, 2, True) - bytes_to_write(model, args, 1, True)
    files = (tmp_path / "out" / "checkpoint-1").rglob("*")
    assert foreseen == pytest.approx(sum(path.stat().st_size for path in files), rel=0.03)
