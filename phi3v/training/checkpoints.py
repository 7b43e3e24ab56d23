"""
Checkpoints that can be trusted: what a run may resume from, and when it has to stop.

The Trainer writes a checkpoint's files one after the other into their final folder. Here a
checkpoint counts only once `complete.json` is in it, which is written last and lists all files with
their sizes and hashes. So a run may be killed at any moment: what is half written is never loaded,
and the checkpoint before it is deleted only after the new one counts.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import TrainerCallback, TrainerState

from ..data.images import undecoded
from ..distributed import on_first_rank, print_first, world_size
from ..errors import RunError, record_failure
from ..model.processing_phi3_v import Phi3VProcessor
from . import stopping
from .output_folder import COMPLETE, MODE, OutputFolder, identity, incompleteness
from .training import deepspeed_path, merge_adapter, merged_dtype

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
    The checkpoint to resume from, or None to start anew. Nothing is removed yet.

    `--resume_from_checkpoint` takes the newest complete one of the output folder, and starts anew
    where there is none, so that the same command starts and restarts a run. With a path it takes
    that one. The process ends here, with status 0, where the run is finished already.

    Args:
        settings: of this run, see `run_settings`.

    Raises:
        RunError: the checkpoint is not complete, or settings that change the result are others than
            those of its run; or a new run would mix with what the output folder holds; or another
            run is writing there.
    """
    finished, checkpoint = on_first_rank(lambda: _choose(args, settings))
    if finished:
        print_first(f"{args.output_dir} holds this run, and it is finished: nothing is left to do.")
        if args.merge_lora:
            merge_adapter(args)
        raise SystemExit(0)
    if checkpoint:
        print_first(f"Resuming from {checkpoint}")
    return checkpoint


def _choose(args: argparse.Namespace, settings: dict[str, object]) -> tuple[bool, str | None]:
    """Whether the run is finished, and the checkpoint that it goes on from. For the first rank."""
    folder = OutputFolder(args.output_dir)
    try:
        finished, checkpoint, notes = _look(args, folder, settings)
        if not finished:
            # Only now is anything written; and a run that had the lock may have ended meanwhile.
            folder.lock()
            finished, checkpoint, notes = _look(args, folder, settings)
    except OSError as error:
        raise RunError(
            f"--output_dir {folder.path}: {error.strerror or error}. Choose another folder."
        ) from None
    for note in notes:
        print_first(note)
    return finished, checkpoint


def _look(
    args: argparse.Namespace, folder: OutputFolder, settings: dict[str, object]
) -> tuple[bool, str | None, list[str]]:
    """As `_choose`, and what to say. Nothing is written."""
    if args.resume_from_checkpoint is None:
        _refuse_results(args, folder, folder.results())
        return False, None, []
    record, given = folder.record, args.resume_from_checkpoint
    inside = not given or Path(given).resolve().is_relative_to(folder.path.resolve())
    if record["finished"] and inside:
        _check_settings(f"{folder.path} holds a finished run", record["settings"], settings)
        return True, None, []
    notes = []
    whole = [path for path in folder.checkpoints() if not incompleteness(path)]
    damaged = {
        path: incompleteness(path)
        for path in folder.checkpoints()
        if path not in whole and not folder.was_interrupted(path)
    }
    if given:
        checkpoint = Path(given)
        if problem := incompleteness(checkpoint):
            raise RunError(
                f"--resume_from_checkpoint {checkpoint}: {problem}. Without a path, the newest "
                "complete checkpoint of --output_dir is taken."
            )
        if not inside and record["settings"] != settings:
            _refuse_results(args, folder, folder.results())
    elif whole:
        checkpoint = whole[-1]
        notes = [f"{path} is left as it is: {problem}" for path, problem in damaged.items()]
    elif damaged:
        path, problem = list(damaged.items())[-1]
        raise RunError(
            f"{path} cannot be resumed from: {problem}. Restore the file, or start a new run in "
            "another --output_dir."
        )
    else:
        ours = {*record["files"], *record["checkpoints"]}
        _refuse_results(args, folder, [p for p in folder.results() if p.name not in ours])
        if record["settings"] is not None:
            _check_settings(f"{folder.path} holds a run", record["settings"], settings)
        return False, None, [f"{folder.path} holds no complete checkpoint: the run starts anew"]
    _check_settings(f"{checkpoint} comes from a run", _settings_of(checkpoint), settings)
    return False, str(checkpoint), notes


def _refuse_results(args: argparse.Namespace, folder: OutputFolder, held: list[Path]) -> None:
    """Raise RunError where the folder holds results, and they are not to be replaced."""
    if args.eval_only:
        held = [path for path in held if path.name == "eval_before.json"]
    if folder.path.exists() and not folder.path.is_dir():
        raise RunError(f"--output_dir {folder.path} is no folder. Choose another name.")
    if held and not args.overwrite_output_dir:
        raise RunError(
            f"--output_dir {folder.path} holds {held[0].name} of another run. Go on with that run "
            "with --resume_from_checkpoint, replace it with --overwrite_output_dir, or choose "
            "another folder."
        )


def run_settings(args: argparse.Namespace, train_dataset: Sequence) -> dict[str, object]:
    """All that the trained weights depend on, as JSON has it."""
    settings = {name: value for name, value in vars(args).items() if name not in HARMLESS}
    path = deepspeed_path(args)
    settings["deepspeed"] = json.loads(path.read_text(encoding="utf-8")) if path else None
    settings["processes"] = world_size()
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


def _settings_of(checkpoint: Path) -> dict:
    settings = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")).get("settings")
    return settings if isinstance(settings, dict) else {}


def _check_settings(where: str, theirs: dict, ours: dict[str, object]) -> None:
    differences = [
        f"{name} is {ours.get(name)!r}, it had {theirs.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differences:
        raise RunError(
            f"{where} with other settings, and this one would end with other weights: "
            f"{'; '.join(differences)}. Resume with the settings of its run, or start a new run in "
            "another --output_dir."
        )


def bytes_to_write(
    model: torch.nn.Module, args: argparse.Namespace, num_checkpoints: int, deepspeed: bool
) -> int:
    """
    What a run writes: the model (of LoRA: the adapter), checkpoints, the merged model.

    A checkpoint holds the weights and AdamW's two float32 moments of what is trained; DeepSpeed's
    holds the weights once more, and a float32 copy. In bf16, that is 16 bytes a parameter.
    """
    # A shard of ZeRO-3 says in ds_numel how large the whole is, a 4-bit weight in quant_state.
    sizes = {
        p: p.quant_state.shape.numel()
        if getattr(p, "quant_state", None)
        else getattr(p, "ds_numel", p.numel())
        for p in model.parameters()
    }
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    saved = [p for p in sizes if p.requires_grad or not isinstance(model, PeftModel)]
    weights = sum(sizes[p] * p.element_size() for p in saved)
    state = weights + 12 * trained if deepspeed else 8 * trained
    merged = args.merge_lora * sum(sizes.values()) * merged_dtype(args).itemsize
    return weights + num_checkpoints * (weights + state) + merged


class CheckpointCallback(TrainerCallback):
    """
    Takes the output folder over for this run, makes the Trainer's checkpoints complete, deletes
    older ones, and answers SIGTERM.

    After SIGTERM, to any rank, all ranks finish the same step, save a checkpoint, and exit with
    status `stopping.STOPPED`.
    """

    def __init__(
        self, args: argparse.Namespace, processor: Phi3VProcessor, settings: dict[str, object]
    ):
        self.args = args
        self.folder = OutputFolder(args.output_dir)
        self.processor = processor
        self.settings = settings
        self.stopping = False

    def on_init_end(self, args, state, control, model=None, **kwargs):
        # Model and data are loaded: only now is an earlier run replaced.
        if not state.is_world_process_zero or self.args.eval_only:
            return
        saves = args.save_strategy != "no"
        self._check_free_space(model, saves, args.deepspeed is not None)
        folder = self.folder
        if self.args.overwrite_output_dir:
            folder.remove_run()
        known = {*folder.record["checkpoints"]}
        if self.args.resume_from_checkpoint is not None:
            # What can be resumed from is this run's, whatever became of the record.
            known |= {path.name for path in folder.checkpoints() if not incompleteness(path)}
        folder.update(settings=self.settings, finished=False, checkpoints=sorted(known))

    def _check_free_space(self, model: torch.nn.Module, saves: bool, deepspeed: bool) -> None:
        """Raise RunError where the disk cannot hold what the run will write."""
        count = self.args.save_total_limit + 1 if saves else 0  # one is being written
        needed = bytes_to_write(model, self.args, count, deepspeed)
        folder = self.folder.path.absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if self.args.overwrite_output_dir:
            free += self.folder.size()
        if free < needed:
            raise RunError(
                f"--output_dir {self.folder.path}: the run will write up to {needed / 1e9:,.1f} "
                f"GB, and the disk has {free / 1e9:,.1f} GB free. Free some, lower "
                "--save_total_limit, or choose a folder on another disk."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        # A group of its own on the CPU: asking whether to stop never waits for a GPU.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        stopping.listen()

    def on_step_begin(self, args, state, control, **kwargs):
        # Ranks get the signal at different times, but have to stop at one step. They agree while
        # the step is computed.
        self.flag = torch.tensor([int(stopping.received())])
        if self.group is not None:
            self.agreement = dist.all_reduce(
                self.flag, dist.ReduceOp.MAX, group=self.group, async_op=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.group is not None:
            self.agreement.wait()
        if self.flag.item():
            self.stop(state, control)
        elif control.should_save:
            self._begin(state)

    def stop(self, state: TrainerState, control) -> None:
        """At the end of a step, on every rank: save a checkpoint, and stop."""
        self.stopping = control.should_save = control.should_training_stop = True
        self._begin(state)

    def _begin(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.folder.begin_checkpoint(_name(state))
        if self.group is not None:
            dist.barrier(self.group)

    def on_save(self, args, state, control, **kwargs):
        checkpoint = self.folder.path / _name(state)
        if self.group is not None:
            dist.barrier(self.group)  # every rank has written its part
        if not state.is_world_process_zero:
            return
        self.processor.save_pretrained(checkpoint)
        files = {}
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file():
                path.chmod(MODE)
                files[str(path.relative_to(checkpoint))] = identity(path)
        content = {"step": state.global_step, "settings": self.settings, "files": files}
        self.folder.complete_checkpoint(checkpoint, content)
        ours = [self.folder.path / name for name in self.folder.record["checkpoints"]]
        older = [path for path in self.folder.checkpoints() if path in ours and path != checkpoint]
        broken = [path for path in older if self.folder.was_interrupted(path)]
        whole = [path for path in older if not incompleteness(path)]
        for path in broken + whole[: max(0, len(whole) + 1 - self.args.save_total_limit)]:
            self.folder.remove_checkpoint(path.name)

    def on_train_end(self, args, state, control, **kwargs):
        if self.stopping:
            text = (
                f"Stopped by SIGTERM after step {state.global_step} of {state.max_steps}; a "
                "checkpoint is saved. The same command with --resume_from_checkpoint goes on."
            )
            print_first(text)
            record_failure(text)
            raise stopping.Stopped


def _name(state: TrainerState) -> str:
    """The checkpoint of the current step, as the Trainer names it."""
    return f"checkpoint-{state.global_step}"
