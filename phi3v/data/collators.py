"""
Records (see `records.py`) to batches.

Both collators tokenize the same prompt: the conversation up to its last question. Training appends
the last answer.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch.nn.utils.rnn import pad_sequence

from ..model.processing_phi3_v import Phi3VProcessor
from .images import load_images
from .records import to_messages

IGNORED = -100
IMAGE_INPUTS = ("pixel_values", "crop_levels", "level_values")


class TrainingCollator:
    """
    Records to a training batch, padded on the right.

    Where the samples are lists of records (see `packing.py`), all of them become one row without
    padding: `position_ids` (1, s) start again with every record and stand in for the mask, since
    attention then stays inside a record.

    Returns of each call:
        `input_ids`, `attention_mask`, `labels`: (b, s). Labels are the ids of every assistant turn,
            its end included, and -100 elsewhere. The mask comes from lengths: the trained
            <|endoftext|>, which is the padding token as well, is attended to.
        `pixel_values`: (n, 1, 3, 336, 336), `crop_levels`: (crops, 3, 336, 336) uint8,
            `level_values`: (3, 256) and `image_sizes`: (n, 2) of all records' images, if there are
            any. The model joins them, see `join_crops`: workers hand over bytes, and no padding.
        `ids`: those of the records, where `with_ids` is set; `LossWatch` takes them out again
            before the model is called.
    """

    def __init__(self, processor: Phi3VProcessor, with_ids: bool = False):
        self.processor = processor
        self.with_ids = with_ids
        self.assistant, self.user = processor.tokenizer.convert_tokens_to_ids(
            ["<|assistant|>", "<|user|>"]
        )

    def __call__(self, records: list[dict] | list[list[dict]]) -> dict[str, torch.Tensor]:
        packed = isinstance(records[0], list)
        if packed:
            records = [record for pack in records for record in pack]
        prompts, extra = encode_prompts(self.processor, records)
        answers = self.processor.tokenizer(
            [
                f"{record['conversations'][-1]['assistant']}<|end|>\n<|endoftext|>"
                for record in records
            ],
            add_special_tokens=False,
        ).input_ids
        ids = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [
            self._earlier_answers(prompt) + answer
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        if self.with_ids:
            extra["ids"] = [record["id"] for record in records]
        if packed:
            positions = [range(len(row)) for row in ids]
            return {
                "input_ids": _join(ids),
                "position_ids": _join(positions),
                "labels": _join(labels),
                **extra,
            }
        return {
            "input_ids": _pad(ids, self.processor.tokenizer.pad_token_id, "right"),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0, "right"),
            "labels": _pad(labels, IGNORED, "right"),
            **extra,
        }

    def _earlier_answers(self, prompt: list[int]) -> list[int]:
        """Labels of a prompt: what stands between <|assistant|> and the next <|user|>."""
        labels, answering = [], False
        for token in prompt:
            answering = answering and token != self.user
            labels.append(token if answering else IGNORED)
            answering = answering or token == self.assistant
        return labels


class GenerationCollator:
    """
    Records to a batch of prompts without their last answer, padded on the left.

    Returns of each call:
        `input_ids`, `attention_mask`: (b, s); the images as in [`TrainingCollator`], to be joined
            before `generate`.
    """

    def __init__(self, processor: Phi3VProcessor):
        self.processor = processor

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        prompts, image_inputs = encode_prompts(self.processor, records)
        return {
            "input_ids": _pad(prompts, self.processor.tokenizer.pad_token_id, "left"),
            "attention_mask": _pad([[1] * len(row) for row in prompts], 0, "left"),
            **image_inputs,
        }


def encode_prompts(
    processor: Phi3VProcessor, records: list[dict]
) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """
    The ids of every record up to its last question, generation prompt included, and the images of
    them all.
    """
    prompts = processor.tokenizer.apply_chat_template(
        [to_messages(record)[:-1] for record in records], tokenize=False, add_generation_prompt=True
    )
    images = [load_images(record, processor.image_processor) for record in records]
    encoded = processor(prompts, images, return_tensors=None, as_levels=True)
    image_inputs = {name: encoded[name] for name in IMAGE_INPUTS if name in encoded}
    if image_inputs:
        image_inputs["image_sizes"] = torch.tensor(encoded["image_sizes"])
    return encoded["input_ids"], image_inputs


def _join(rows: list[Sequence[int]]) -> torch.Tensor:
    """Rows one behind the other: (1, s)."""
    return torch.tensor([[*chain.from_iterable(rows)]])


def _pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    """Rows of different lengths to (b, s)."""
    return pad_sequence(
        [torch.tensor(row) for row in rows],
        batch_first=True,
        padding_value=value,
        padding_side=side,
    )
