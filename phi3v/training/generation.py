"""Answers by generation: batched, shared out over the ranks, every sample answered once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..data.collators import GenerationCollator
from ..distributed import any_rank
from ..errors import RunError
from ..model.processing_phi3_v import Phi3VProcessor


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
) -> list[tuple[str, float | None]] | None:
    """
    The greedy answer to the last question of every record, in the records' order, on every rank.

    Args:
        model: whole, and on the device of `args`. It is left in evaluation mode.
        choices: two answers that begin with different tokens.
        stop: asked before every batch.

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
    loader = DataLoader(
        Subset(records, mine),
        batch_size=args.per_device_eval_batch_size,
        collate_fn=GenerationCollator(processor),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.device.type == "cuda",
        # A generator of its own: training goes on with the random state that it had.
        generator=torch.Generator(),
    )
    model.eval()  # the Trainer turns it back before every step
    texts, probabilities = [], []
    choice_ids = _first_tokens(processor, choices) if choices else None
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
    hidden = args.disable_tqdm or args.process_index != 0
    with (
        _instead_of_its_own(greedy, model),
        row_by_row(model),
        tqdm(total=len(records), desc=desc, unit="sample", disable=hidden) as progress,
    ):
        for batch in loader:
            if stop():
                break
            batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
            # Whole on every rank, so under ZeRO-3 too none waits for another's tokens.
            output = model.generate(**batch, generation_config=greedy, synced_gpus=False)
            answers = output.sequences[:, batch["input_ids"].shape[1] :]
            texts += processor.batch_decode(answers, skip_special_tokens=True)
            if choices:
                logits = output.logits[0][:, choice_ids].float()
                probabilities += logits.softmax(-1)[:, 0].tolist()
            progress.update(min(len(answers) * args.world_size, len(records) - progress.n))
    if any_rank(len(texts) < len(mine), args.device):
        return None
    answered = zip(mine, texts, probabilities or [None] * len(texts), strict=True)
    answers = {index: (text, number) for index, text, number in gather_object(list(answered))}
    if answers.keys() != set(range(len(records))):
        raise RuntimeError(f"{len(answers)} answers came back for {len(records)} samples.")
    return [answers[index] for index in range(len(records))]


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


def attend_row_by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Transformers' sdpa attention for prompts padded on the left: each row without its padding, which
    then needs no mask, so the causal kernel computes half of the pairs.

    `query`, `key` and `value` are (b, heads, s, head_dim), `attention_mask` (b, 1, s, s) bool.
    """
    if attention_mask is None or query.shape[2] != key.shape[2]:  # no padding, or a token to come
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output = query.new_zeros(query.shape).transpose(1, 2)  # (b, s, heads, head_dim)
    for row, length in enumerate(attention_mask[:, 0, -1].sum(-1).tolist()):
        parts = (tensor[row : row + 1, :, -length:] for tensor in (query, key, value))
        output[row, -length:] = sdpa_attention_forward(module, *parts, None, **kwargs)[0][0]
    return output, None


ROW_BY_ROW = "phi3v_row_by_row"
AttentionInterface.register(ROW_BY_ROW, attend_row_by_row)
AttentionMaskInterface.register(ROW_BY_ROW, sdpa_mask)


@contextlib.contextmanager
def row_by_row(model: torch.nn.Module) -> Iterator[None]:
    """Let the decoder attend by `attend_row_by_row` where it attends by sdpa."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.config._attn_implementation != "sdpa":
        yield
        return
    base.set_attn_implementation(ROW_BY_ROW)
    try:
        yield
    finally:
        base.set_attn_implementation("sdpa")


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
