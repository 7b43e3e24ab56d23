"""Evaluation by generation: batched, shared out over the ranks, every sample counted once."""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import GenerationConfig, Trainer, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..data.collators import GenerationCollator
from ..distributed import any_rank, print_first
from ..errors import RunError, record_failure
from ..model.processing_phi3_v import Phi3VProcessor
from . import stopping
from .checkpoints import CheckpointCallback
from .metrics import normalise
from .output_folder import OutputFolder


class Result(NamedTuple):
    """What came back for one record. Answers and text are normalised, see `metrics.py`."""

    id: str
    answers: list[str]  # the accepted ones
    text: str
    probability: float | None  # of the first of two choices, where there are any


def evaluate(
    trainer: Trainer,
    processor: Phi3VProcessor,
    records: Sequence[dict],
    metrics: Callable[[list[Result]], dict[str, float]],
    file_name: str,
    args: argparse.Namespace,
    choices: tuple[str, str] | None = None,
) -> dict[str, float]:
    """
    Generate an answer to the last question of every record, measure, and write `file_name` into the
    output folder.

    Args:
        records: a dataset or list of conversations. The last assistant turn is the answer, or what
            is in `answers` where a record has several accepted ones.
        metrics: all results to named numbers.
        choices: two answers, for the probability that the model gives to the first of them.

    Returns:
        The metrics, on every rank.

    Raises:
        Stopped: SIGTERM came; nothing is written.
    """
    generated = generate(trainer, processor, records, args, desc=file_name, choices=choices)
    results = []
    for record, (text, probability) in zip(records, generated, strict=True):
        answers = record.get("answers") or [record["conversations"][-1]["assistant"]]
        answers = [normalise(answer) for answer in answers]
        results.append(Result(record["id"], answers, normalise(text), probability))
    numbers = metrics(results)
    if trainer.is_world_process_zero():
        several = any(len(result.answers) > 1 for result in results)
        written = {
            **numbers,
            "ids": [result.id for result in results],
            "answers_unique": [r.answers if several else r.answers[0] for r in results],
            "generated_texts_unique": [result.text for result in results],
        }
        if choices:
            written["probabilities"] = [result.probability for result in results]
        OutputFolder(trainer.args.output_dir).write_json(file_name, written)
    shown = ", ".join(f"{name} {number:.4f}" for name, number in numbers.items())
    print_first(f"{file_name}: {shown} on {len(results)} samples")
    return numbers


class EvaluateEvery(TrainerCallback):
    """
    Calls `run(file_name)` after every `steps` optimizer steps; never, where `steps` is None.

    A step's checkpoint is saved before its evaluation, so that a long evaluation cannot cost it. At
    SIGTERM the evaluation is left, and what the checkpoints' callback does at SIGTERM is done.
    """

    def __init__(
        self, steps: int | None, run: Callable[[str], object], checkpoints: CheckpointCallback
    ):
        self.steps = steps
        self.run = run
        self.checkpoints = checkpoints

    def on_train_begin(self, args, state, control, **kwargs):
        # The run may have been stopped between a checkpoint and its evaluation.
        if state.global_step and not (Path(args.output_dir) / _file_name(state)).exists():
            self._evaluate(state)

    def on_step_end(self, args, state, control, **kwargs):
        if not control.should_save and not self._evaluate(state):
            self.checkpoints.stop(state, control)

    def on_save(self, args, state, control, **kwargs):
        if not self.checkpoints.stopping and not self._evaluate(state):
            self.checkpoints.stopping = control.should_training_stop = True

    def _evaluate(self, state: TrainerState) -> bool:
        """Evaluate if it is time to. False if SIGTERM has cut that short."""
        if self.steps and state.global_step % self.steps == 0:
            try:
                self.run(_file_name(state))
            except stopping.Stopped:
                return False
        return True


def _file_name(state: TrainerState) -> str:
    return f"eval_step_{state.global_step}.json"


@torch.no_grad()
def generate(
    trainer: Trainer,
    processor: Phi3VProcessor,
    records: Sequence[dict],
    args: argparse.Namespace,
    desc: str = "",
    choices: tuple[str, str] | None = None,
) -> list[tuple[str, float | None]]:
    """
    The greedy answer to the last question of every record, in the records' order, on every rank.

    Returns:
        Per record the text, and with `choices` the probability that it begins like the first choice
        rather than like the second.
    """
    rank, world_size = trainer.args.process_index, trainer.args.world_size
    device = trainer.args.device
    # Alike lengths meet in a batch, so little of it is padding, and ranks get alike shares.
    sizes = [_size(record) for record in records]
    order = sorted(range(len(records)), key=sizes.__getitem__, reverse=True)
    mine = order[rank::world_size]
    zero3 = is_deepspeed_zero3_enabled()
    rounds = mine
    if zero3:
        # Ranks meet at every layer, so each has to generate as often: some do a sample twice.
        rounds = [*mine, *order[:1]][: math.ceil(len(order) / world_size)]
    loader = DataLoader(
        Subset(records, rounds),
        batch_size=args.eval_batch_size_per_gpu,
        collate_fn=GenerationCollator(processor, blank_image=zero3),
        num_workers=trainer.args.dataloader_num_workers,
        pin_memory=device.type == "cuda",
        # Of its own: training goes on with the random state that it had.
        generator=torch.Generator(),
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    if getattr(model, "hf_device_map", None) is None and not zero3:
        model.to(device)
    model.eval()  # the Trainer turns it back before every step
    texts, probabilities = [], []
    choice_ids = _first_tokens(processor, choices) if choices else None
    greedy = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=processor.stop_token_ids,
        pad_token_id=processor.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=choices is not None,
    )
    hidden = trainer.args.disable_tqdm or rank != 0
    with (
        _autocast(trainer),
        _whole_model(trainer),
        _instead_of_its_own(greedy, model),
        tqdm(total=len(records), desc=desc, unit="sample", disable=hidden) as progress,
    ):
        for batch in loader:
            # Under ZeRO-3 ranks generate together, so they have to stop together.
            if any_rank(stopping.received(), device) if zero3 else stopping.received():
                break
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            output = model.generate(**batch, generation_config=greedy)
            answers = output.sequences[:, batch["input_ids"].shape[1] :]
            texts += processor.batch_decode(answers, skip_special_tokens=True)
            if choices:
                logits = output.logits[0][:, choice_ids].float()
                probabilities += logits.softmax(-1)[:, 0].tolist()
            progress.update(min(len(answers) * world_size, len(records) - progress.n))
    if any_rank(len(texts) < len(rounds), device):
        text = f"{desc}: left at SIGTERM. The same command with --resume_from_checkpoint goes on."
        print_first(text)
        record_failure(text)
        raise stopping.Stopped
    answered = zip(texts, probabilities or [None] * len(texts), strict=True)
    return _gather(dict(zip(mine, answered, strict=False)), len(records))


def _first_tokens(processor: Phi3VProcessor, choices: tuple[str, str]) -> list[int]:
    """The ids that two answers begin with. They have to differ, or there is nothing to compare."""
    ids = processor.tokenizer(list(choices), add_special_tokens=False).input_ids
    first, second = ids[0][0], ids[1][0]
    if first == second:
        raise RunError(
            f"choices {choices[0]!r} and {choices[1]!r} begin with the same token, by which they "
            "are told apart. Choose others."
        )
    return [first, second]


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


def _whole_model(trainer: Trainer) -> contextlib.AbstractContextManager:
    """Under ZeRO-3, before training has started its engine, the shards have to be put together."""
    if is_deepspeed_zero3_enabled() and trainer.model_wrapped is trainer.model:
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(trainer.model.parameters()))
    return contextlib.nullcontext()


@contextlib.contextmanager
def _instead_of_its_own(config: GenerationConfig, model: torch.nn.Module) -> Iterator[None]:
    """
    Hide the generation config that came with the checkpoint: beams, penalties, lengths.

    Handing one to `generate` is not enough: it would take from the model's own whatever that one
    leaves open (transformers 5.17 to 5.24, `_prepare_generation_config`).
    """
    owner = model.get_base_model() if isinstance(model, PeftModel) else model
    own, owner.generation_config = owner.generation_config, config
    try:
        yield
    finally:
        owner.generation_config = own


def _gather(mine: dict[int, tuple], count: int) -> list[tuple]:
    """Every rank's answers by sample number, to one list on every rank."""
    shares = [mine]
    if dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
    answers = {index: answer for share in shares for index, answer in share.items()}
    if sum(map(len, shares)) != count or answers.keys() != set(range(count)):
        raise RuntimeError(f"{sum(map(len, shares))} answers came back for {count} samples.")
    return [answers[index] for index in range(count)]
