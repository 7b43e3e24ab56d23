"""Ranks: which one this is, what the first one says for all, what they have to agree on."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import RunError

T = TypeVar("T")


def rank() -> int:
    """The number of this process among all that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def print_first(message: str) -> None:
    """Print on the first rank alone."""
    if rank() == 0:
        print(message, flush=True)


def on_first_rank(decide: Callable[[], T]) -> T:
    """
    What `decide()` returns on the first rank, on every rank.

    Other ranks may see another state of a shared file system, so they do not look for themselves.

    Raises:
        RunError: `decide` raised one on the first rank; on every rank.
    """
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = decide()
        except RunError as error:
            outcome[1] = str(error)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise RunError(outcome[1])
    return outcome[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank. All ranks have to ask."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())
