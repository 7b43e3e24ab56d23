"""
What is wrong with a dataset: how bad samples are found and left out.

Every kind of dataset goes through `find_bad` and `settle`, so `--skip_bad_samples` means the same
everywhere, and every rank comes to the same result.
"""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch.distributed as dist

from ..errors import DataError, quoted

SHOWN = 10
SKIP = "Or go on without bad samples: --skip_bad_samples."

T = TypeVar("T")


def no_file(mode: int) -> str | None:
    """What stands where a regular file should, by its `st_mode`; None if it is one."""
    if stat.S_ISREG(mode):
        return None
    return "a folder" if stat.S_ISDIR(mode) else "not a regular file"


class UniqueIds:
    """
    Refuses an id that came before.

    Args:
        place: what numbers count: "line" or "row".
    """

    def __init__(self, place: str):
        self.place = place
        self.first: dict[str, int] = {}

    def add(self, identifier: str, number: int, where: str) -> None:
        """Raise DataError, beginning with `where`, if another number has the id."""
        if (first := self.first.setdefault(identifier, number)) != number:
            raise DataError(
                f"{where}: id {quoted(identifier)} is that of {self.place} {first} too. Make ids "
                "unique."
            )


def find_bad(
    samples: Iterable[tuple[int, T]], check: Callable[[T], object], all_of_them: bool
) -> dict[int, str]:
    """
    The samples that `check` raises a DataError for.

    Args:
        samples: numbered. The ranks may look at different ones: each learns what all have found.
        all_of_them: or only the first.

    Returns:
        Messages by sample number, in order, the same on every rank.
    """
    bad = {}
    for number, sample in samples:
        try:
            check(sample)
        except DataError as error:
            bad[number] = str(error)
            if not all_of_them:
                break
    shares = [bad]
    if dist.is_available() and dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, bad)
    found = {number: message for share in reversed(shares) for number, message in share.items()}
    return dict(sorted(found.items()))


def on_all_ranks(load: Callable[[], T]) -> T:
    """What `load()` returns. A DataError of one rank is raised on every one."""
    message = result = None
    try:
        result = load()
    except DataError as error:
        message = str(error)
    messages = [message]
    if dist.is_available() and dist.is_initialized():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message)
    for message in filter(None, messages):
        raise DataError(message)
    return result


def settle(bad: dict[int, str], total: int, what: str, skip_bad: bool) -> None:
    """
    Say what `find_bad` found among `total` samples of `what`: with `skip_bad` in print, else as an
    error.

    Raises:
        DataError: the first bad sample, or with `skip_bad`, that no good one is left.
    """
    if not bad:
        return
    messages = list(bad.values())
    if not skip_bad:
        raise DataError(f"{messages[0]} {SKIP}")
    if len(bad) >= total:
        raise DataError(f"{what}: all of the {total} samples are bad. {messages[0]}")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{what}: {len(bad)} of {total} samples are bad and left out:", flush=True)
        for message in messages[:SHOWN]:
            print(f"  {message}", flush=True)
        if len(bad) > SHOWN:
            print(f"  and {len(bad) - SHOWN} more", flush=True)


def keep_good(
    samples: Sequence[T], check: Callable[[T], object], what: str, skip_bad: bool
) -> list[T]:
    """
    The samples that `check` raises no DataError for.

    Raises:
        DataError: as `settle`.
    """
    bad = find_bad(enumerate(samples), check, skip_bad)
    settle(bad, len(samples), what, skip_bad)
    return [sample for number, sample in enumerate(samples) if number not in bad]
