"""Of each dataset of a mixture: its loss in training, and its metrics in evaluation."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from ..distributed import print_first
from ..errors import first_line

ROWS = 1024  # of logits that are taken to float32 at a time


class DatasetLosses:
    """
    The mean loss of a label of each dataset, over all ranks and since it was last asked for.

    It is that of the logits that the model has computed for its own loss. Nothing waits for the
    device before `collect`, and where there are no names, there is nothing to do.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = names
        self.numbers = torch.arange(len(names), device=device)[:, None]
        self._begin()

    def _begin(self) -> None:
        # Sums of losses, and how many labels they are of.
        self.totals = self.numbers.new_zeros(2, len(self.names), dtype=torch.float64)

    @torch.no_grad()
    def add(self, logits: torch.Tensor, labels: torch.Tensor, datasets: torch.Tensor) -> None:
        """
        A micro-batch: `logits` (labels, vocabulary), and of each label the number of its dataset.
        """
        parts = zip(logits.split(ROWS), labels.split(ROWS), strict=True)
        each = [cross_entropy(part.float(), its, reduction="none") for part, its in parts]
        losses = torch.cat(each).double()
        # In fp16, a step without a finite loss is skipped. By masks, whose sums are the same again.
        counted = (datasets == self.numbers) & losses.isfinite()
        sums = torch.where(counted, losses, 0).sum(1)
        self.totals += torch.stack([sums, counted.sum(1).double()])

    def collect(self) -> dict[str, float]:
        """`loss_<name>` of the datasets that there was a label of. All ranks have to ask."""
        if not self.names:
            return {}
        totals = self.totals
        self._begin()
        if dist.is_initialized():
            dist.all_reduce(totals)
        found = zip(self.names, *totals.tolist(), strict=True)
        return {f"loss_{name}": total / count for name, total, count in found if count}


def dataset_metrics(
    compute: Callable[[list], dict[str, float]], results: dict[str, list]
) -> dict[str, dict[str, float]]:
    """
    What `compute` makes of each dataset's results. It may raise ValueError, such as AUROC where all
    answers are the same: the dataset is left out then, and that is said once.
    """
    found = {}
    for name, its in results.items():
        try:
            found[name] = compute(its)
        except ValueError as error:
            _say_once(f"{name} has no metrics of its own: {first_line(error)}")
    return found


@functools.cache
def _say_once(message: str) -> None:
    print_first(message)
