"""
Batches per second out of one worker process.

    python -m benchmarks.loader

Both sides read the same PNG pages and JPEG photos, tokenize the same prompts and hand over the same
pixels. How long a step waits for its data is in the recipes' own log, `data_wait`, and in
benchmarks/recipe_table.py.
"""

import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from benchmarks.baseline import preprocess
from benchmarks.models import save_random
from benchmarks.preprocessing import KINDS, make_file, read
from benchmarks.side_by_side import in_turns, make_parser, ratios, report, spread
from phi3v.data.collators import TrainingCollator

NUM_CROPS = 16


class BaselineCollator(TrainingCollator):
    """Our tokens, without the images' placeholders, and pixels as the official code gives them."""

    def __call__(self, records: list[dict]) -> dict[str, torch.Tensor]:
        [[turn]] = [record["conversations"] for record in records]
        batch = super().__call__([{**records[0], "conversations": [{**turn, "images": []}]}])
        return {**batch, **preprocess([read(image) for image in turn["images"]], NUM_CROPS)}


def measure(records: list[dict], collator: TrainingCollator) -> float:
    """Seconds a batch of one sample, the worker's start excluded."""
    loader = DataLoader(records, batch_size=1, collate_fn=collator, num_workers=1)
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - start) / count


def main():
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--samples", type=int, default=24, help="of each kind and round (24)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_random("small", Path(folder), torch.float32, "cpu")
        processor = AutoProcessor.from_pretrained(folder, num_crops=NUM_CROPS)
    collators = {"ours": TrainingCollator(processor), "baseline": BaselineCollator(processor)}
    rows = []
    for kind, shape in KINDS.items():
        records = [
            {
                "id": str(number),
                "conversations": [
                    {
                        "images": [make_file(*shape, seed=number)],
                        "user": "What is written here? Answer briefly.",
                        "assistant": "Nothing",
                    }
                ],
            }
            for number in range(args.samples)
        ]
        sides = {
            name: lambda collator=collator, records=records: measure(records, collator)
            for name, collator in collators.items()
        }
        seconds = in_turns(sides, args.rounds)
        rows.append(
            [
                kind,
                *(spread([1 / value for value in seconds[name]], 1) for name in collators),
                f"{ratios(seconds['baseline'], seconds['ours'])}x",
            ]
        )
    header = ["sample", "ours, samples/s", "baseline, samples/s", "faster"]
    report("Loader, one worker", header, rows, args.save)


if __name__ == "__main__":
    main()
