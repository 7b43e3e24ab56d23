"""The model card, README.md of the output folder, and the folder's way to the hub."""

import argparse
import importlib.metadata
import json
import os
import shlex
import sys
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import TrainerState, TrainingArguments

from ..data.mixing import parse_datasets
from ..distributed import on_first_rank, print_first, rank, world_size
from ..errors import phase
from .metrics import metrics_of
from .output_folder import LAST_RESULT, PAGE, PICTURE, OutputFolder

from peft import PeftModel

EVALUATIONS = {"before": "eval_before.json", "after": LAST_RESULT}
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "huggingface_hub")


def model_card(
    folder: Path, flags: argparse.Namespace, model, state: TrainerState, name: str
) -> ModelCard:
    """
    The card of a trained model, with the metrics of the evaluations in `folder`.

    Args:
        flags: the recipe's.
        name: of the model on the hub, or of the output folder.
    """
    base, given = flags.model_name_or_path, getattr(flags, "dataset_name_or_path", None)
    datasets = [d for d in parse_datasets(given)[0] if not os.path.exists(d)] if given else []
    tags = _adapters(flags, model)
    numbers = {when: _numbers(folder / file) for when, file in EVALUATIONS.items()}
    rows = list(numbers["before"] | numbers["after"])
    metrics = [metric for metric, dataset in rows if not dataset]
    data = ModelCardData(
        base_model=None if os.path.isdir(base) else base,
        datasets=datasets or None,
        library_name="peft" if tags else "transformers",
        metrics=metrics or None,
        pipeline_tag="image-text-to-text",
        tags=["phi3_v", *tags],
    )
    table = [f"| metric | {' | '.join(numbers)} |", "| --- | --- | --- |"]
    for row in rows:
        values = (numbers[when].get(row) for when in numbers)
        shown = ("" if value is None else f"{value:.4f}" for value in values)
        table.append(f"| {', '.join(filter(None, row))} | {' | '.join(shown)} |")
    about, command = describe(flags, model, state)
    text = [
        f"# {name}\n",
        *(f"- {line}" for line in about),
        f"\n```bash\n{command}\n```\n",
        "Generated answers of the evaluation:\n",
        *table,
    ]
    if (folder / PICTURE).is_file():
        text += [f"\n![curves of the run]({PICTURE})\n", f"Samples are in [{PAGE}]({PAGE})."]
    return ModelCard("\n".join(["---", data.to_yaml(), "---", "", *text, ""]))


def describe(flags: argparse.Namespace, model, state: TrainerState) -> tuple[list[str], str]:
    """How a model came about: what it is from, by and with, in Markdown; and the command line."""
    base, commit = flags.model_name_or_path, getattr(model.config, "_commit_hash", None)
    origin = Path(base).name if os.path.isdir(base) else base
    method = ", ".join(_adapters(flags, model)) or "full finetuning"
    versions = (f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    about = [
        f"from `{origin}`" + (f", commit `{commit}`" if commit else ""),
        f"by {method}, {state.global_step} steps of {flags.batch_size} samples",
        f"with {', '.join(versions)}",
    ]
    start = f"torchrun --nproc_per_node={world_size()}" if world_size() > 1 else "python"
    return about, f"{start} {shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])}"


def _adapters(flags: argparse.Namespace, model) -> list[str]:
    """The kinds of adapters that are trained; none in full finetuning."""
    kinds = [kind for kind in ("qlora", "dora", "rslora") if getattr(flags, f"use_{kind}")]
    return ["lora", *kinds] if isinstance(model, PeftModel) else []


def _numbers(path: Path) -> dict[tuple[str, str], float]:
    """The metrics of an evaluation's file; none where there is no such file."""
    try:
        return metrics_of(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def create_repository(args: TrainingArguments) -> None:
    """
    Make --hub_model_id on the hub, before anything is trained; its default is the output folder's
    name. `args` has its whole name then.

    Raises:
        RunError: no token, no right to, no network; on every rank.
    """

    def create() -> str:
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        with phase("--push_to_hub"):
            hub = HfApi(token=True)  # or there would be a request without a token first
            return hub.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id

    args.hub_model_id = on_first_rank(create)


def push(folder: OutputFolder, args: TrainingArguments) -> None:
    """
    On the first rank, upload what runs wrote to the folder, checkpoints excepted.

    Raises:
        RunError: it cannot be done.
    """
    if rank() != 0:
        return
    retry = (
        f"{folder.path} is complete, and the same command with --resume_from_checkpoint pushes it"
    )
    with phase(f"--push_to_hub {args.hub_model_id}: {retry}"):
        HfApi(token=True).upload_folder(
            repo_id=args.hub_model_id,
            folder_path=folder.path,
            allow_patterns=folder.record["files"],
            commit_message="Finetuned model",
            revision=args.hub_revision,
        )
    print_first(f"Pushed {folder.path} to {args.hub_model_id}")
