"""Answers by generation: batched, shared out over the ranks, every sample answered once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, TrainingArguments
from transformers.generation.streamers import BaseStreamer

from ..data.collators import GenerationCollator
from ..distributed import any_rank
from ..errors import RunError
from ..model.modeling_phi3_v import CACHE
from ..model.processing_phi3_v import Phi3VProcessor
from .attention import attending_to_padding

from peft import PeftModel


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    processor: Phi3VProcessor,
    records: Sequence[dict],
    args: TrainingArguments,
    max_new_tokens: int,
    choices: tuple[str, str] | None = None,
    desc: str = "",
    stop: Callable[[], bool] = lambda: False,
    bar: tqdm | None = None,
    streamer: BaseStreamer | None = None,
) -> list[tuple[str, float | None]] | None:
    """
    The greedy answer to the last question of every record, in the records' order, on every rank.

    Args:
        model: whole, and on the device of `args`. It is left in evaluation mode.
        choices: two answers that begin with different tokens.
        stop: asked before every batch.
        bar: goes on with these records; without one, they get a bar of their own, called `desc`.
        streamer: of transformers, for a single record: gets its tokens as they are generated.

    Returns:
        Per record the text, and with `choices` the probability that it begins like the first choice
        rather than like the second. None where `stop()` was true on a rank before it was done.

    Raises:
        RunError: the choices begin with the same token.
    """
    # Similar lengths meet in a batch, so little of it is padding, and ranks get similar shares.
    sizes = [_size(record) for record in records]
    order = sorted(range(len(records)), key=sizes.__getitem__, reverse=True)
    mine = order[args.process_index :: args.world_size]
    model.eval()  # the Trainer turns it back before every step
    found: list[tuple[str, float | None]] = []
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=processor.stop_token_ids,
        pad_token_id=processor.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=choices is not None,
    )
    choice_ids = _first_tokens(processor, choices) if choices else None
    hidden = args.disable_tqdm or args.process_index != 0
    with (
        _instead_of_its_own(greedy, model),
        attending_to_padding(model),
        tqdm(
            total=len(records), desc=desc, unit="sample", disable=hidden or bar is not None
        ) as own,
    ):
        progress = own if bar is None else bar
        while len(found) < len(mine) and not stop():
            try:
                for batch in _batches(Subset(records, mine[len(found) :]), processor, args):
                    if stop():
                        break
                    answers = _answer(model, processor, batch, greedy, choice_ids, streamer)
                    found += answers
                    left = progress.total - progress.n
                    progress.update(min(len(answers) * args.world_size, left))
            except torch.OutOfMemoryError:
                if args.per_device_eval_batch_size == 1:
                    raise
                args.per_device_eval_batch_size //= 2
            if len(found) < len(mine) and not stop():
                torch.cuda.empty_cache()
                print(
                    "Out of memory in generation: it goes on with "
                    f"{args.per_device_eval_batch_size} prompts at a time.",
                    flush=True,
                )
    if any_rank(len(found) < len(mine), args.device):
        return None
    answers = dict(gather_object(list(zip(mine, found, strict=True))))
    if answers.keys() != set(range(len(records))):
        raise RuntimeError(f"{len(answers)} answers came back for {len(records)} samples.")
    return [answers[index] for index in range(len(records))]


def _batches(
    records: Sequence[dict], processor: Phi3VProcessor, args: TrainingArguments
) -> Iterator[dict[str, torch.Tensor]]:
    """Prompts in batches, on the device."""
    loader = DataLoader(
        records,
        batch_size=args.per_device_eval_batch_size,
        collate_fn=GenerationCollator(processor),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.device.type == "cuda",
        # A generator of its own: training goes on with the random state that it had.
        generator=torch.Generator(),
    )
    for batch in loader:
        yield {name: tensor.to(args.device, non_blocking=True) for name, tensor in batch.items()}


def _answer(
    model: torch.nn.Module,
    processor: Phi3VProcessor,
    batch: dict[str, torch.Tensor],
    config: GenerationConfig,
    choice_ids: list[int] | None,
    streamer: BaseStreamer | None,
) -> list[tuple[str, float | None]]:
    """Of each prompt the text that follows, and the first choice's share of the two."""
    # Whole on every rank, so under ZeRO-3 too none waits for another's tokens.
    output = model.generate(
        **batch,
        **{CACHE: KeyCache()},
        generation_config=config,
        synced_gpus=False,
        streamer=streamer,
    )
    texts = processor.batch_decode(
        output.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    if choice_ids is None:
        return [(text, None) for text in texts]
    probabilities = output.logits[0][:, choice_ids].float().softmax(-1)[:, 0].tolist()
    return list(zip(texts, probabilities, strict=True))


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


class KeyCache(DynamicCache):
    """Keys in the precision of values: RoPE makes float32 of them where weights are float32."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


@contextlib.contextmanager
def _instead_of_its_own(config: GenerationConfig, model: torch.nn.Module) -> Iterator[None]:
    """
    Hide the generation config that came with the checkpoint: beams, penalties, lengths.

    Handing one to `generate` is not enough: it takes from the model's own whatever that one leaves
    open (transformers 5.17 to 5.24, `_prepare_generation_config`). It can go when it does not.
    """
    owner = model.get_base_model() if isinstance(model, PeftModel) else model
    own, owner.generation_config = owner.generation_config, config
    try:
        yield
    finally:
        owner.generation_config = own
