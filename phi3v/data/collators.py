"""
Records (see `records.py`) to batches.

Both collators tokenize the same prompt: the conversation up to its last question. Training appends
the last answer.
"""

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch.nn.utils.rnn import pad_sequence

from ..model.processing_phi3_v import Phi3VProcessor
from .images import load_images
from .records import to_messages

IGNORED = -100


class TrainingCollator:
    """
    Records to a training batch, padded on the right.

    Where the samples are lists of records (see `packing.py`), all of them become one row without
    padding: `position_ids` (1, s) start again with every record, and attention then stays inside a
    record. Otherwise there is no mask either: no token sees the padding to its right, and its
    labels are -100. So attention can take its fastest kernel.

    Args:
        blank_image: give a batch without images one of size 0 x 0, which takes no tokens: for
            several processes that train together, see `Phi3VImageEmbedding`.
        for_trainer: add `ids` and `lengths`, which have to be taken out before the model is called,
            and let the model know what it would ask the device for: `image_sizes` is a list, and
            `image_positions` says where images stand.
        datasets: the names of a mixture's datasets; without them, there is one. Add
            `label_datasets`, which has to be taken out too.

    Returns of each call:
        `input_ids`, `labels`: (b, s). Labels are the ids of every assistant turn, its end included,
            and -100 elsewhere.
        `logits_to_keep`, `shift_labels`: (2, labels), the rows and positions where the next token
            has a label, and these labels, (labels,). With them the model computes its logits there
            alone.
        `pixel_values`: (n, num_crops + 1, 3, 336, 336) and `image_sizes`: (n, 2) of all records'
            images, if there are any.
        `cu_seq_lens_q`, `cu_seq_lens_k`: (records + 1,) int32, of a packed row: where each record
            begins, and the end of the last; `max_length_q`, `max_length_k`: the longest, an int.
            These are the names that transformers gives to flash attention.
        `image_positions`: (tokens of all images,), where they stand in the flattened `input_ids`.
        `label_datasets`: (labels,), of each of `shift_labels` the number of its dataset.
        `ids`, `lengths`: lists of the records' ids and of their numbers of tokens, padding
            excluded, in their order.
    """

    def __init__(
        self,
        processor: Phi3VProcessor,
        blank_image: bool = False,
        for_trainer: bool = False,
        datasets: Sequence[str] = (),
    ):
        self.processor = processor
        self.blank_image = blank_image
        self.for_trainer = for_trainer
        self.datasets = datasets
        self.assistant, self.user = processor.tokenizer.convert_tokens_to_ids(
            ["<|assistant|>", "<|user|>"]
        )

    def __call__(self, records: list[dict] | list[list[dict]]) -> dict[str, torch.Tensor | list]:
        packed = isinstance(records[0], list)
        if packed:
            records = [record for pack in records for record in pack]
        prompts, image_inputs = encode_prompts(self.processor, records, self.blank_image)
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
        if packed:
            batch = {"input_ids": _join(ids), "labels": _join(labels)}
            batch["position_ids"] = _join([range(len(row)) for row in ids])
            starts = torch.tensor([0, *accumulate(map(len, ids))], dtype=torch.int32)
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = starts
            batch["max_length_q"] = batch["max_length_k"] = max(map(len, ids))
        else:
            batch = {
                "input_ids": _pad(ids, self.processor.tokenizer.pad_token_id, "right"),
                "labels": _pad(labels, IGNORED, "right"),
            }
        rows, positions = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
        batch["logits_to_keep"] = torch.stack([rows, positions])
        batch["shift_labels"] = batch["labels"][rows, positions + 1]
        batch |= image_inputs
        if self.datasets:
            numbers = [self.datasets.index(record["dataset"]) for record in records]
            counts = [sum(label != IGNORED for label in row) for row in labels]
            batch["label_datasets"] = torch.tensor(numbers).repeat_interleave(torch.tensor(counts))
        if self.for_trainer:
            batch["ids"] = [record["id"] for record in records]
            batch["lengths"] = [len(row) for row in ids]
            is_image = batch["input_ids"].flatten() == self.processor.image_token_id
            batch["image_positions"] = is_image.nonzero()[:, 0]
            if "image_sizes" in batch:
                batch["image_sizes"] = batch["image_sizes"].tolist()
        return batch

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

    Args:
        blank_image: as in [`TrainingCollator`]. Under ZeRO-3, processes that generate together
            need it too.

    Returns of each call:
        `input_ids`, `attention_mask`: (b, s); the images as in [`TrainingCollator`].
    """

    def __init__(self, processor: Phi3VProcessor, blank_image: bool = False):
        self.processor = processor
        self.blank_image = blank_image

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        prompts, image_inputs = encode_prompts(self.processor, records, self.blank_image)
        return {
            "input_ids": _pad(prompts, self.processor.tokenizer.pad_token_id, "left"),
            "attention_mask": _pad([[1] * len(row) for row in prompts], 0, "left"),
            **image_inputs,
        }


def encode_prompts(
    processor: Phi3VProcessor, records: list[dict], blank_image: bool = False
) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """
    The ids of every record up to its last question, generation prompt included, and the images of
    them all, or where there are none, a blank one if asked for.
    """
    prompts = processor.tokenizer.apply_chat_template(
        [to_messages(record)[:-1] for record in records], tokenize=False, add_generation_prompt=True
    )
    images = [load_images(record, processor.image_processor) for record in records]
    encoded = processor(prompts, images, return_tensors=None)
    image_inputs = {}
    if "pixel_values" in encoded:
        image_inputs["pixel_values"] = encoded["pixel_values"]
        image_inputs["image_sizes"] = torch.tensor(encoded["image_sizes"])
    elif blank_image:
        size = processor.image_processor.crop_size
        shape = (1, 1, 3, size["height"], size["width"])
        image_inputs["pixel_values"] = torch.zeros(shape)
        image_inputs["image_sizes"] = torch.zeros(1, 2, dtype=torch.long)
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
