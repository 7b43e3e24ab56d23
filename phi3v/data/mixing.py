"""
Several datasets in one run, each with a weight: `--train_file a.jsonl:0.7 b.jsonl:0.3`.
"""

import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from ..errors import DataError
from .records import Records

# A weight near nothing makes the others repeat for ever.
MOST_SAMPLES = 100_000_000


def mix(
    given: str | Path | Sequence[str | Path], load: Callable[[str], Records]
) -> "Records | Mixture":
    """
    What `load` makes of a dataset's name; of several, their mixture.

    Args:
        given: one name, or several, each with a weight or all without: see `parse_datasets`.
    """
    names, weights = parse_datasets(given)
    parts = [load(name) for name in names]
    return parts[0] if len(parts) == 1 else Mixture(parts, short_names(names), weights)


def parse_datasets(
    given: str | Path | Sequence[str | Path],
) -> tuple[list[str], list[float] | None]:
    """
    Names, and the weights that stand behind them, if they do: ["a.jsonl:0.7", "b.jsonl:0.3"].

    Raises:
        DataError: a weight is not a positive number; some have one and some have none; a dataset is
            there twice.
    """
    texts = [given] if isinstance(given, str | Path) else given
    names, weights = zip(*(_split(str(text)) for text in texts), strict=True)
    if len({weight is None for weight in weights}) > 1:
        raise DataError(
            f"{names[weights.index(None)]} has no weight, and others have one. Give each a weight, "
            "or none, which takes every sample once."
        )
    places = [os.path.realpath(name) for name in names]
    for name, place in zip(names, places, strict=True):
        if places.count(place) > 1:
            raise DataError(f"{name} is given twice. Give it once, with a larger weight.")
    return list(names), None if None in weights else list(weights)


def _split(text: str) -> tuple[str, float | None]:
    name, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:  # a colon of the path's own, or none
        return text, None
    if not name or not 0 < weight < math.inf:
        raise DataError(f"{text}: write <dataset>:<weight>, and the weight as a positive number.")
    return name, weight


def short_names(names: Sequence[str]) -> list[str]:
    """Names for logs: the last parts of a path, as many as tell all of them apart."""
    paths = [Path(re.sub(r"\.jsonl?$", "", name)).parts for name in names]
    for count in range(1, max(map(len, paths)) + 1):
        short = [re.sub(r"[^\w.-]+", "_", "_".join(parts[-count:])) for parts in paths]
        if len({*short}) == len(short):
            return short
    return [f"{name}_{number}" for number, name in enumerate(short, 1)]


class Mixture(Sequence):
    """
    An epoch of several datasets: each has its weight's share of the samples, and it is as long as
    it takes for every sample of all to be seen.

    With `length` = max(size / weight), a dataset has round(weight * length) samples: all of them as
    often as they fit in, and of a pass that is not whole, a random choice by the seed, the same in
    every epoch. Their order is that of the datasets; the Trainer's sampler shuffles. It is what
    `datasets.interleave_datasets` calls "all_exhausted", but exact.

    Where samples share rows, rows are counted: weights are shares of them, and so nearly of tokens.

    Ids begin with the dataset's name, which is the field `dataset` too: ids of two may be equal.

    Args:
        parts: datasets of records, or of lists of records that share a row. Nothing is asked of
            them before the mixture is.
        names: of the datasets, for messages and logs; all differ.
        weights: positive, of any sum. Without them, every sample is there once.

    Raises:
        DataError: asked for the first time: an epoch would have more than MOST_SAMPLES.
    """

    def __init__(
        self,
        parts: Sequence[Sequence],
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ):
        self.parts, self.names, self.weights, self.seed = parts, names, weights, seed

    @cached_property
    def counts(self) -> list[int]:
        """How many samples of an epoch are of each dataset."""
        sizes = [len(part) for part in self.parts]
        weights = self.weights or sizes
        length = max(size / weight for size, weight in zip(sizes, weights, strict=True))
        total = length * sum(weights)
        if self.weights and total > MOST_SAMPLES:
            raise DataError(
                f"an epoch of {', '.join(self.names)} would have {total:.3g} samples, until all of "
                "them are seen. Give weights that are closer to the datasets' sizes."
            )
        return [round(weight * length) for weight in weights]

    @cached_property
    def _ends(self) -> list[int]:
        return [*accumulate(self.counts)]

    @cached_property
    def _rests(self) -> list[np.ndarray]:
        """Of each dataset, which samples its last pass has that is not whole."""
        return [
            np.random.default_rng([self.seed, number]).choice(
                len(part), count % len(part), replace=False
            )
            for number, (part, count) in enumerate(zip(self.parts, self.counts, strict=True))
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict | list[dict]:
        number, place = self.locate(index)
        sample, name = self.parts[number][place], self.names[number]
        if isinstance(sample, list):
            return [_named(record, name) for record in sample]
        return _named(sample, name)

    def locate(self, index: int) -> tuple[int, int]:
        """The number of a sample's dataset, and its own there."""
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        size, count = len(self.parts[number]), self.counts[number]
        place = index - self._ends[number] + count
        beyond = place - count // size * size
        return number, place % size if beyond < 0 else int(self._rests[number][beyond])

    def places(self, number: int) -> np.ndarray:
        """(counts[number],): which of its own each sample of a dataset is, in an epoch."""
        size, count = len(self.parts[number]), self.counts[number]
        return np.concatenate([np.tile(np.arange(size), count // size), self._rests[number]])

    def spans(self) -> list[range]:
        """The samples of each dataset."""
        return [range(end - count, end) for end, count in zip(self._ends, self.counts, strict=True)]

    def map(self, work: Callable[[Sequence], Sequence]) -> "Mixture":
        """The mixture of what `work` makes of each dataset."""
        return Mixture([work(part) for part in self.parts], self.names, self.weights, self.seed)

    def describe(self, unit: str = "samples") -> str:
        """An epoch in a line, counted in `unit`."""
        shares = (
            f"{count:,} of {name} (each {count / len(part):.4g}x)"
            for name, count, part in zip(self.names, self.counts, self.parts, strict=True)
        )
        return f"{unit.capitalize()} of an epoch: {', '.join(shares)}"


def _named(record: dict, name: str) -> dict:
    return {**record, "id": f"{name}/{record['id']}", "dataset": name}


def each_part(dataset: Sequence, work: Callable[[Sequence], Sequence]) -> Sequence:
    """`work` of a dataset, or of each of a mixture."""
    return dataset.map(work) if isinstance(dataset, Mixture) else work(dataset)
