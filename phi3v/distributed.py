"""Ranks: which one this is, what the first one says for all, what they share and agree on."""

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import DataError, RunError

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


def gather(mine: T) -> list[T]:
    """What every rank holds, in the ranks' order, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return shares


def share_out(
    work: Callable[[int], T],
    indices: Sequence[int],
    each_machine: bool = True,
    first_error: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[int, T | DataError]:
    """
    `work(index)` for all indices, shared by the ranks.

    Args:
        each_machine: the ranks of a machine do all of it among themselves, because another machine
            may have other files. Otherwise all ranks of the run share it.
        first_error: a rank stops at its first error.
        progress: shows how far this rank is, such as tqdm.

    Returns:
        Results by index, in order, the same on every rank. A DataError that was raised stands in
        the place of the result.
    """
    # By name: what counts a machine's ranks, LOCAL_WORLD_SIZE, is set by torchrun alone.
    machines = gather(platform.node() if each_machine else "")
    mine = rank() if len(machines) > 1 else 0
    team = [other for other, machine in enumerate(machines) if machine == machines[mine]]
    done = {}
    for index in progress(indices[team.index(mine) :: len(team)]):
        try:
            done[index] = work(index)
        except DataError as error:
            done[index] = error
            if first_error:
                break
    found: dict[int, T | DataError] = {}
    for share in gather(done):
        for index, result in share.items():
            # An image that one machine lacks is bad for all.
            if not isinstance(found.get(index), DataError):
                found[index] = result
    return {index: found[index] for index in sorted(found)}


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
