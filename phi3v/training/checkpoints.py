"""
Checkpoints that can be trusted: what a run may resume from, and what it may replace.

The Trainer writes a checkpoint's files one after the other into their final folder. Here a
checkpoint counts only once `complete.json` is in it, which is written last and lists all files with
their sizes and hashes. So a run may be killed at any moment: what is half written is never loaded,
and the checkpoint before it is deleted only after the new one counts.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..data.images import image_source
from ..data.mixing import Mixture
from ..data.records import Records
from ..distributed import gather, on_first_rank, print_first, world_size
from ..errors import RunError, one_line, phase
from .arguments import RecipeParser
from .card import push
from .merging import merge_adapter, merged_dtype
from .output_folder import COMPLETE, OutputFolder, complete_files, file_system, incompleteness

from peft import PeftModel

FINGERPRINT_SAMPLES = 1000

# Flags of all recipes that change neither the trained weights nor the order of the samples. A
# single recipe's flags say where its data lies; a fingerprint tells whether it is the same.
HARMLESS = {
    *("output_dir", "tqdm", "dataloader_num_workers", "merge_lora", "skip_bad_samples"),
    *("eval_only", "eval_steps", "eval_batch_size_per_gpu", "max_new_tokens"),
    *("save_steps", "save_total_limit", "resume_from_checkpoint", "overwrite_output_dir"),
    *("gradient_checkpointing", "deepspeed", "plan"),
}
# And what the weights depend on besides flags.
TRAINING_ARGUMENTS = (
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "data_seed"),
    *("neftune_noise_alpha", "train_sampling_strategy"),
)
DATA = "training data"
# Seconds. NFS goes by what it knows of a folder for 60 at most, if nobody has set another time.
SEEN_AFTER = 90.0


def find_checkpoint(args: argparse.Namespace, training_args: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from, or None to start anew. Nothing is removed yet.

    `--resume_from_checkpoint` takes the newest complete one of the output folder, and starts anew
    where there is none, so that the same command starts and restarts a run. With a path it takes
    that one. The process ends here, with status 0, where the run is finished already.

    Raises:
        RunError: the checkpoint is not complete, or settings that change the result are others than
            those of its run; or a new run would mix with what the output folder holds; or another
            run is writing there.
    """
    folder, settings = OutputFolder(args.output_dir), run_settings(args, training_args)

    def choose() -> tuple[bool, str | None]:
        with phase(f"--output_dir {args.output_dir}"):
            finished, checkpoint, notes = _look(args, folder, settings)
            if not finished:
                # Only now is anything written; a run that had the lock may have ended meanwhile.
                folder.lock()
                finished, checkpoint, notes = _look(args, folder, settings)
        for note in notes:
            print_first(note)
        return finished, checkpoint

    finished, checkpoint = on_first_rank(choose)
    if finished:
        print_first(f"{args.output_dir} holds this run, and it is finished: nothing is left to do.")
        if args.merge_lora:
            merge_adapter(args)
        if training_args.push_to_hub:
            push(folder, training_args)
        raise SystemExit(0)
    if checkpoint:
        print_first(f"Resuming from {checkpoint}")
        wait_until_seen(Path(checkpoint))
    return checkpoint


def _look(
    args: argparse.Namespace, folder: OutputFolder, settings: dict[str, object]
) -> tuple[bool, str | None, list[str]]:
    """Whether the run is finished, the checkpoint that it goes on from, and what to say."""
    if args.resume_from_checkpoint is None:
        _refuse_results(args, folder, folder.results())
        return False, None, []
    record, given = folder.record, args.resume_from_checkpoint
    inside = not given or Path(given).resolve().is_relative_to(folder.path.resolve())
    if folder.finished and inside:
        check_settings(f"{folder.path} holds a finished run", record["settings"], settings)
        return True, None, []
    notes = []
    problems = {path: incompleteness(path) for path in folder.checkpoints()}
    whole = [path for path, problem in problems.items() if not problem]
    damaged = {
        path: problem
        for path, problem in problems.items()
        if problem and not folder.was_interrupted(path)
    }
    if given:
        checkpoint = Path(given)
        if problem := incompleteness(checkpoint):
            raise RunError(
                f"--resume_from_checkpoint {checkpoint}: {problem}. Without a path, the newest "
                "complete checkpoint of --output_dir is taken."
            )
        if not inside and _differences(record["settings"] or {}, settings):
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
            check_settings(f"{folder.path} holds a run", record["settings"], settings)
        return False, None, [f"{folder.path} holds no complete checkpoint: the run starts anew"]
    theirs = _settings_of(Path(checkpoint))
    check_settings(f"{checkpoint} comes from a run", theirs, settings)
    return False, str(checkpoint), [*notes, *_other_shares(theirs, settings)]


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


def wait_until_seen(checkpoint: Path) -> None:
    """
    Wait until every rank sees a checkpoint's files as the first one does. Other machines may be
    shown an older state of a shared file system for a while.

    Raises:
        RunError: one does not see them; on every rank.
    """
    if world_size() == 1:
        return
    files = on_first_rank(lambda: complete_files(checkpoint))
    deadline = time.monotonic() + SEEN_AFTER
    while (problem := _unseen(checkpoint, files)) and time.monotonic() < deadline:
        time.sleep(0.5)
    mine = problem and f"{platform.node()} sees it on {file_system(checkpoint)}: {problem}"
    if problems := [text for text in gather(mine) if text]:
        raise RunError(
            f"{checkpoint}, as {problems[0]}. The first rank sees it whole. Put --output_dir on "
            "storage that all machines share."
        )


def _unseen(checkpoint: Path, files: dict[str, list] | None) -> str | None:
    try:
        return incompleteness(checkpoint, files)
    except OSError as error:  # it is being replaced
        return one_line(error)


def run_settings(args: argparse.Namespace, training_args: TrainingArguments) -> dict[str, object]:
    """All that the trained weights depend on, but for the data, as JSON has it."""
    shared = vars(RecipeParser("").parse_known_args([])[0]).keys() - HARMLESS
    settings = {name: getattr(args, name) for name in shared}
    settings |= {name: getattr(training_args, name) for name in TRAINING_ARGUMENTS}
    path = training_args.deepspeed
    settings["deepspeed"] = json.loads(Path(path).read_text("utf-8")) if path else None
    settings["processes"] = training_args.world_size
    if args.streaming:  # whose order follows who reads
        readers = f"{world_size()} processes x {training_args.dataloader_num_workers} workers"
        settings["streaming"] = f"{readers} x {args.batch_size_per_gpu}"
    return json.loads(json.dumps(settings))


def take_over(
    args: argparse.Namespace,
    training_args: TrainingArguments,
    model: torch.nn.Module,
    train_dataset: Sequence,
) -> dict[str, object]:
    """
    Give the output folder to this run, whose model and data are loaded. On all ranks.

    Only now is the earlier run removed that --overwrite_output_dir replaces.

    Returns:
        The settings of the run, its data among them.

    Raises:
        RunError: the data is not that of the checkpoint; or the disk cannot hold what the run will
            write.
    """
    settings = {**run_settings(args, training_args), DATA: fingerprint(train_dataset)}
    folder, checkpoint = OutputFolder(args.output_dir), training_args.resume_from_checkpoint

    def take() -> None:
        if checkpoint:
            check_settings(
                f"{checkpoint} comes from a run", _settings_of(Path(checkpoint)), settings
            )
        elif args.resume_from_checkpoint is not None and folder.record["settings"] is not None:
            check_settings(f"{folder.path} holds a run", folder.record["settings"], settings)
        with phase(f"--output_dir {args.output_dir}"):
            _check_free_space(args, training_args, model, folder)
            if args.overwrite_output_dir:
                folder.remove_run()
            folder.take_over(settings, resumes=args.resume_from_checkpoint is not None)

    on_first_rank(take)
    return settings


def fingerprint(dataset: Sequence) -> str:
    """
    The number of samples and a hash over them: ids, texts and the images' names and sizes.

    Of a long dataset, FINGERPRINT_SAMPLES are hashed, in even steps. Their folder does not count.
    Of a mixture, that of each dataset, and how many of its samples an epoch has.
    Shards have a hash of their own, and what is chosen of them counts.
    """
    if isinstance(dataset, Mixture):
        parts = zip(dataset.names, dataset.counts, dataset.parts, strict=True)
        return "; ".join(f"{n}: {count} of {fingerprint(part)}" for n, count, part in parts)
    digest = hashlib.sha256()
    if isinstance(dataset, Records) and dataset.shards:
        digest.update(dataset.shards.identity.encode() + dataset.places().tobytes())
        return f"{len(dataset)} samples, {digest.hexdigest()[:16]}"
    for index in range(0, len(dataset), max(1, len(dataset) // FINGERPRINT_SAMPLES)):
        sample = dataset[index]
        for record in sample if isinstance(sample, list) else [sample]:
            turns = [
                [turn["user"], turn["assistant"], *map(_image_identity, turn["images"])]
                for turn in record["conversations"]
            ]
            system = [record["system"]] if "system" in record else []
            digest.update(json.dumps([record["id"], turns, *system]).encode())
    return f"{len(dataset)} samples, {digest.hexdigest()[:16]}"


def _image_identity(image: object) -> list:
    image = image_source(image)
    if isinstance(image, bytes):
        return [hashlib.sha256(image).hexdigest()]
    if isinstance(image, str | Path):
        return [Path(image).name, os.path.getsize(image)]
    return [image.mode, *image.size]


def _settings_of(checkpoint: Path) -> dict:
    settings = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")).get("settings")
    return settings if isinstance(settings, dict) else {}


def check_settings(where: str, theirs: dict | None, ours: dict[str, object]) -> None:
    """Raise RunError where `theirs` differ from `ours`. Without data in `ours`, it is not asked."""
    if differences := _differences(theirs or {}, ours):
        raise RunError(
            f"{where} with other settings, and this one would end with other weights: "
            f"{'; '.join(differences)}. Resume with the settings of its run, or start a new run in "
            "another --output_dir."
        )


def _differences(theirs: dict, ours: dict[str, object]) -> list[str]:
    names = (ours.keys() | theirs.keys()) - ({DATA} - ours.keys()) - {"batch_size_per_gpu"}
    reason = _needs_processes(ours)
    if reason is None:
        names -= {"processes"}
    return [
        f"{name} is {ours.get(name)!r}, it had {theirs.get(name)!r}"
        f"{f' ({reason})' if name == 'processes' else ''}"
        for name in sorted(names)
        if ours.get(name) != theirs.get(name)
    ]


def _needs_processes(settings: dict[str, object]) -> str | None:
    """
    Why a run has to go on with as many processes as it had; None where it need not. With the same
    --batch_size, the same samples make each step: they are dealt out to processes and micro-batches
    in turn.
    """
    if settings["deepspeed"] is not None:
        # DeepSpeed's own converter (0.19, ds_to_universal) makes wrong weights of ours, silently.
        return "DeepSpeed's checkpoints have a part for each, so start as many"
    if settings["train_sampling_strategy"] not in ("random", "sequential"):
        return "--train_sampling_strategy makes other batches for another number"
    return None


def _other_shares(theirs: dict, ours: dict[str, object]) -> list[str]:
    """What to say where the samples of a step are dealt out otherwise from here on."""
    before, now = (
        f"{each.get('processes')} x {each.get('batch_size_per_gpu')}" for each in (theirs, ours)
    )
    if before == now:
        return []
    text = (
        f"Going on with {now} samples at a time in place of {before}: each step has the same "
        "samples, added up in another order. The last step of an epoch may be filled up with others"
    )
    random = " and ".join(f"--{n}" for n in ("lora_dropout", "neftune_noise_alpha") if ours[n])
    return [f"{text}, and others are the random numbers of {random}" if random else text]


def _check_free_space(
    args: argparse.Namespace,
    training_args: TrainingArguments,
    model: torch.nn.Module,
    folder: OutputFolder,
) -> None:
    saves = training_args.save_strategy != "no"
    count = args.save_total_limit + 1 if saves else 0  # one is being written
    needed = bytes_to_write(model, args, count, training_args.deepspeed is not None)
    free = shutil.disk_usage(folder.path).free
    if args.overwrite_output_dir:
        free += folder.size()
    if free < needed:
        raise RunError(
            f"--output_dir {folder.path}: the run will write up to {needed / 1e9:,.1f} GB, and the "
            f"disk has {free / 1e9:,.1f} GB free. Free some, lower --save_total_limit, or choose a "
            "folder on another disk."
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
