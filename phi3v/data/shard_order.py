"""The order in which shards are trained on where only reading in sequence is fast (--streaming)."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from .mixing import Mixture
from .records import Records


def groups_of(dataset: Records | Mixture) -> np.ndarray:
    """
    (samples,): the number of each one's row group. Of what a mixture repeats, each pass over a
    dataset has numbers of its own.
    """
    if isinstance(dataset, Records):
        return np.searchsorted(dataset.shards.groups, dataset.places(), side="right") - 1
    groups, first = [], 0
    for number, part in enumerate(dataset.parts):
        of_part, places = groups_of(part), dataset.places(number)
        passes = np.arange(len(places)) // len(part)
        count = of_part.max() + 1
        groups.append(first + passes * count + of_part[places])
        first += (passes[-1] + 1) * count
    return np.concatenate(groups)


class ShardOrder(Sampler):
    """
    Row groups in an order by seed and epoch, each read once an epoch, whole, by one process.

    Samples of a row group (of about a megabyte) are shuffled among themselves and come near each
    other in every epoch; they lie together by the seed that the shards were written with. Reading
    is dealt out as accelerate and the DataLoader deal out batches: the i-th batch goes to rank
    i % processes, and there the j-th to worker j % workers. So each of the `streams` gets groups of
    its own. It is a sampler like any other: a run resumes exactly.

    Args:
        dataset: records from shards, or a mixture of such.
        batch_size: of one process.
        streams: processes x loader workers.
    """

    def __init__(self, dataset: Records | Mixture, batch_size: int, streams: int, seed: int):
        self.groups = groups_of(dataset)
        self.batch_size, self.streams, self.seed, self.epoch = batch_size, streams, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        indices = generator.permutation(len(self.groups))
        turn = generator.permutation(self.groups.max() + 1)[self.groups[indices]]  # of its group
        indices = indices[np.argsort(turn, kind="stable")]
        # Groups in their turn go to the streams round robin.
        stream = np.sort(turn) % self.streams
        place = np.empty_like(stream)  # in its stream
        for number in range(self.streams):
            mine = np.flatnonzero(stream == number)
            place[mine] = np.arange(len(mine))
        batch = place // self.batch_size * self.streams + stream
        return iter(indices[np.argsort(batch, kind="stable")].tolist())
