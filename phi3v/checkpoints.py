"""
Checkpoints that can be trusted: what a run may resume from, and when it has to stop.

The Trainer writes a checkpoint's files one after the other into their final folder. Here a
checkpoint counts only once `complete.json` is in it, which is written last and lists all files with
their sizes. So a run may be killed at any moment: what is half written is never loaded, and the
checkpoint before it is deleted only after the new one counts.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import TrainerCallback, TrainerState, TrainingArguments

from .failures import RunError
from .files import write_json
from .images import undecoded
from .processing_phi3_v import Phi3VProcessor
from .training import deepspeed_path, print_first

COMPLETE = "complete.json"
STOPPED = 128 + signal.SIGTERM  # the exit status of a run that SIGTERM stopped
FINGERPRINT_SAMPLES = 1000

# Flags that change neither the trained weights nor the order of the samples. Where the data lies is
# among them: a fingerprint tells whether they are the same data.
HARMLESS = {
    *("output_dir", "tqdm", "dataloader_num_workers", "merge_lora"),
    *("data_dir", "dataset_name_or_path", "full_train", "num_eval_rows", "skip_bad_samples"),
    *("eval_dataset_name_or_path", "eval_file", "eval_split", "eval_only", "eval_steps"),
    *("eval_batch_size_per_gpu", "max_new_tokens"),
    *("save_steps", "save_total_limit", "resume_from_checkpoint", "overwrite_output_dir"),
    "gradient_checkpointing",
}


def find_checkpoint(args: argparse.Namespace, settings: dict[str, object]) -> str | None:
    """
    The checkpoint to resume from, or None to start anew.

    `--resume_from_checkpoint` takes the newest complete one of the output folder, and starts anew
    where there is none, so that the same command starts and restarts a run. With a path it takes
    that one.

    Args:
        settings: of this run, see `run_settings`.

    Raises:
        RunError: the checkpoint is not complete, or settings that change the result are others than
            those of its run; or a new run would mix with what the output folder holds.
    """
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint is None:
        _make_room(args, folder)
        return None
    if args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        if problem := incompleteness(checkpoint):
            raise RunError(
                f"--resume_from_checkpoint {checkpoint}: {problem}. Without a path, the newest "
                f"complete checkpoint of --output_dir is taken."
            )
    else:
        complete = [path for path in checkpoints(folder) if not incompleteness(path)]
        if not complete:
            print_first(f"{folder} holds no complete checkpoint: the run starts anew")
            return None
        checkpoint = complete[-1]
    _check_settings(checkpoint, settings)
    print_first(f"Resuming from {checkpoint}")
    return str(checkpoint)


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, complete or not, the oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def incompleteness(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be loaded; None if it is whole."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"it is not complete (no whole {COMPLETE} in it)"
    for name, size in files:
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or does not have its {size} bytes"
    return None


def _make_room(args: argparse.Namespace, folder: Path) -> None:
    """Refuse a folder with another run's results, or remove them with --overwrite_output_dir."""
    results = ["eval_before.json"] if args.eval_only else ["eval_*.json", "*.safetensors"]
    held = [path for pattern in results for path in sorted(folder.glob(pattern))]
    held += [] if args.eval_only else checkpoints(folder)
    if not held:
        return
    if not args.overwrite_output_dir:
        raise RunError(
            f"--output_dir {folder} holds {held[0].name} of another run. Go on with that run with "
            "--resume_from_checkpoint, replace it with --overwrite_output_dir, or choose another "
            "folder."
        )
    if int(os.environ.get("RANK", 0)) == 0:
        for path in held:
            if path.is_dir():
                _remove_checkpoint(path)
            else:
                path.unlink()


def _remove_checkpoint(checkpoint: Path) -> None:
    # First what makes it count: a half-deleted checkpoint is an incomplete one.
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def run_settings(args: argparse.Namespace, train_dataset: Sequence) -> dict[str, object]:
    """All that the trained weights depend on, as JSON has it."""
    settings = {name: value for name, value in vars(args).items() if name not in HARMLESS}
    path = deepspeed_path(args)
    settings["deepspeed"] = json.loads(path.read_text(encoding="utf-8")) if path else None
    settings["processes"] = int(os.environ.get("WORLD_SIZE", 1))
    settings["training data"] = fingerprint(train_dataset)
    return json.loads(json.dumps(settings))


def fingerprint(dataset: Sequence) -> str:
    """
    The number of samples and a hash over them: ids, texts and the images' names and sizes.

    Of a long dataset, FINGERPRINT_SAMPLES are hashed, in even steps. Their folder does not count.
    """
    digest = hashlib.sha256()
    for index in range(0, len(dataset), max(1, len(dataset) // FINGERPRINT_SAMPLES)):
        sample = dataset[index]
        for record in sample if isinstance(sample, list) else [sample]:
            turns = [
                [turn["user"], turn["assistant"], *map(_image_identity, turn["images"])]
                for turn in record["conversations"]
            ]
            digest.update(json.dumps([record["id"], turns]).encode())
    return f"{len(dataset)} samples, {digest.hexdigest()[:16]}"


def _image_identity(image: object) -> list:
    image = undecoded(image)
    if isinstance(image, bytes):
        return [hashlib.sha256(image).hexdigest()]
    if isinstance(image, str | Path):
        return [Path(image).name, os.path.getsize(image)]
    return [image.mode, *image.size]


def _check_settings(checkpoint: Path, ours: dict[str, object]) -> None:
    theirs = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["settings"]
    differences = [
        f"{name} is {ours.get(name)!r}, the checkpoint has {theirs.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differences:
        raise RunError(
            f"{checkpoint} comes from a run with other settings, and would end with other weights: "
            f"{'; '.join(differences)}. Resume with the settings of its run, or start a new run in "
            "another --output_dir."
        )


def check_free_space(
    folder: Path, model: torch.nn.Module, with_checkpoints: bool, keep: int
) -> None:
    """
    Raise RunError where the disk cannot hold what the run will write.

    That is the model (of LoRA: the adapter), and of `keep` checkpoints and the one being written
    also AdamW's two float32 moments of what is trained.
    """
    # A shard of ZeRO-3 says in ds_numel how large the whole is.
    sizes = {p: getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    saved = [p for p in sizes if p.requires_grad or not isinstance(model, PeftModel)]
    weights = sum(sizes[p] * p.element_size() for p in saved)
    checkpoint = weights + 8 * sum(size for p, size in sizes.items() if p.requires_grad)
    needed = weights + with_checkpoints * (keep + 1) * checkpoint
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunError(
            f"--output_dir {folder}: the run will write up to {needed / 1e9:,.1f} GB, and the disk "
            f"has {free / 1e9:,.1f} GB free. Free some, lower --save_total_limit, or choose a "
            "folder on another disk."
        )


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint of the current step, named as the Trainer names it."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


class CheckpointCallback(TrainerCallback):
    """
    Makes the Trainer's checkpoints complete, deletes older ones, and answers SIGTERM.

    After SIGTERM, to any rank, all ranks finish the same step, save a checkpoint, and exit with
    status `STOPPED`.
    """

    def __init__(
        self, args: argparse.Namespace, processor: Phi3VProcessor, settings: dict[str, object]
    ):
        self.processor = processor
        self.settings = settings
        self.keep = args.save_total_limit
        self.terminated = self.stopping = False

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            check_free_space(Path(args.output_dir), model, args.save_strategy != "no", self.keep)

    def on_train_begin(self, args, state, control, **kwargs):
        # A group of its own on the CPU: asking whether to stop never waits for a GPU.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_):
        self.terminated = True

    def on_step_begin(self, args, state, control, **kwargs):
        # Ranks get the signal at different times, but have to stop at one step. They agree while
        # the step is computed.
        self.stop = torch.tensor([int(self.terminated)])
        if self.group is not None:
            self.agreement = dist.all_reduce(
                self.stop, dist.ReduceOp.MAX, group=self.group, async_op=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.group is not None:
            self.agreement.wait()
        if self.stop.item():
            self.stopping = control.should_save = control.should_training_stop = True
        if control.should_save:
            # One of this step may be there, of a run that was resumed from an earlier one. It
            # stops counting before it is overwritten.
            if state.is_world_process_zero:
                (_folder(args, state) / COMPLETE).unlink(missing_ok=True)
            if self.group is not None:
                dist.barrier(self.group)

    def on_save(self, args, state, control, **kwargs):
        checkpoint = _folder(args, state)
        if self.group is not None:
            dist.barrier(self.group)  # every rank has written its part
        if not state.is_world_process_zero:
            return
        self.processor.save_pretrained(checkpoint)
        files = {
            str(path.relative_to(checkpoint)): path.stat().st_size
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file() and path.name != COMPLETE
        }
        content = {"step": state.global_step, "settings": self.settings, "files": files}
        write_json(checkpoint / COMPLETE, content)
        older = [path for path in checkpoints(checkpoint.parent) if path != checkpoint]
        broken = [path for path in older if incompleteness(path)]
        whole = [path for path in older if path not in broken]
        for path in broken + whole[: max(0, len(whole) + 1 - self.keep)]:
            _remove_checkpoint(path)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.previous_handler)
        if self.stopping:
            print_first(
                f"Stopped by SIGTERM after step {state.global_step} of {state.max_steps}; a "
                "checkpoint is saved. The same command with --resume_from_checkpoint goes on."
            )
            sys.exit(STOPPED)
