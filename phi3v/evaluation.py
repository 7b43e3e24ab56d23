"""Evaluation by generation: batched, shared out over the ranks, every sample counted once."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import Trainer

from .collators import GenerationCollator
from .metrics import normalise
from .processing_phi3_v import Phi3VProcessor
from .training import print_first


def evaluate(
    trainer: Trainer,
    processor: Phi3VProcessor,
    records,
    metrics: Callable[[list[str], list[str]], dict[str, float]],
    file_name: str,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """
    Generate an answer to the last question of every record, measure, and write `file_name` into the
    output folder.

    Args:
        records: a dataset (or list) of conversations; the last assistant turn is the answer.
        metrics: (generated texts, answers), both as they are written to the file, to named numbers.
        batch_size: prompts generated at a time, per process.

    Returns:
        The metrics, on every rank.
    """
    texts = generate(trainer, processor, records, batch_size, max_new_tokens, desc=file_name)
    texts = [normalise(text) for text in texts]
    answers = [normalise(record["conversations"][-1]["assistant"]) for record in records]
    numbers = metrics(texts, answers)
    if trainer.is_world_process_zero():
        result = {
            **numbers,
            "ids": [record["id"] for record in records],
            "answers_unique": answers,
            "generated_texts_unique": texts,
        }
        path = Path(trainer.args.output_dir) / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under its own name only when it is whole.
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.replace(unfinished, path)
    shown = ", ".join(f"{name} {number:.4f}" for name, number in numbers.items())
    print_first(f"{file_name}: {shown} on {len(answers)} samples")
    return numbers


@torch.no_grad()
def generate(
    trainer: Trainer,
    processor: Phi3VProcessor,
    records,
    batch_size: int,
    max_new_tokens: int,
    desc: str,
) -> list[str]:
    """
    The greedy answer to the last question of every record, in the records' order, on every rank.
    """
    args = trainer.args
    rank, world_size = args.process_index, args.world_size
    # Alike lengths meet in a batch, so little of it is padding, and ranks get alike shares.
    order = sorted(range(len(records)), key=lambda index: _size(records[index]), reverse=True)
    mine = order[rank::world_size]
    loader = DataLoader(
        Subset(records, mine),
        batch_size=batch_size,
        collate_fn=GenerationCollator(processor),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.device.type == "cuda",
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    if getattr(model, "hf_device_map", None) is None:
        model.to(args.device)
    was_training = model.training
    model.eval()
    texts = []
    hidden = args.disable_tqdm or rank != 0
    with (
        _autocast(trainer),
        tqdm(total=len(records), desc=desc, unit="sample", disable=hidden) as progress,
    ):
        for batch in loader:
            batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
            generated = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                max_length=None,
                do_sample=False,
                eos_token_id=processor.stop_token_ids,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
            answers = generated[:, batch["input_ids"].shape[1] :]
            texts += processor.batch_decode(answers, skip_special_tokens=True)
            progress.update(min(len(answers) * world_size, len(records) - progress.n))
    model.train(was_training)
    return _gather(dict(zip(mine, texts, strict=True)), len(records))


def _size(record: dict) -> tuple[int, int]:
    """What a prompt's length goes by: its images, then its text."""
    turns = record["conversations"]
    return sum(len(turn["images"]) for turn in turns), sum(len(turn["user"]) for turn in turns)


def _autocast(trainer: Trainer) -> contextlib.AbstractContextManager:
    """The low precision that training asked for, where the weights do not have it already."""
    args = trainer.args
    low = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if low is None:
        return contextlib.nullcontext()
    return torch.autocast(args.device.type, dtype=low)


def _gather(mine: dict[int, str], count: int) -> list[str]:
    """Every rank's texts by sample number, to one list on every rank."""
    shares = [mine]
    if dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
    texts = {index: text for share in shares for index, text in share.items()}
    if sum(map(len, shares)) != count or texts.keys() != set(range(count)):
        raise RuntimeError(f"{sum(map(len, shares))} answers came back for {count} samples.")
    return [texts[index] for index in range(count)]
