"""
What is wrong with a dataset: the error that says so, and how bad samples are found and left out.

Every kind of dataset goes through `find_bad` and `settle`, so `--skip_bad_samples` means the same
everywhere, and every rank comes to the same result.
"""

import os
import reprlib
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch.distributed as dist

SHOWN = 10
SKIP = "Or go on without bad samples: --skip_bad_samples."

T = TypeVar("T")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 160


class ConversationError(ValueError):
    """A record that is not what it has to be; the message says where and what to do."""


def plain_message(error: Exception) -> str:
    """
    The message of an error, on one line and without a traceback.

    An error of a DataLoader worker arrives as the same class, with the worker's traceback as text.
    """
    text = str(error)
    if "Original Traceback" in text:
        name = f"\n{type(error).__module__}.{type(error).__qualname__}: "
        text = text.partition(name)[2] or text.strip().splitlines()[-1]
    return " ".join(text.split())


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def no_file(mode: int) -> str | None:
    """What stands where a regular file should, by its `st_mode`; None if it is one."""
    if stat.S_ISREG(mode):
        return None
    return "a folder" if stat.S_ISDIR(mode) else "not a regular file"


def quoted(value: object) -> str:
    """A value of the user's for a message: quoted, printable, and never longer than a line."""
    return _short.repr(value).replace("\n", " ")


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
        """Raise ConversationError, beginning with `where`, if another number has the id."""
        if (first := self.first.setdefault(identifier, number)) != number:
            raise ConversationError(
                f"{where}: id {quoted(identifier)} is that of {self.place} {first} too. Make ids "
                "unique."
            )


def find_bad(
    samples: Iterable[tuple[int, T]], check: Callable[[T], object], all_of_them: bool
) -> dict[int, str]:
    """
    The samples that `check` raises a ConversationError for.

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
        except ConversationError as error:
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
    """What `load()` returns. A ConversationError of one rank is raised on every one."""
    message = result = None
    try:
        result = load()
    except ConversationError as error:
        message = str(error)
    messages = [message]
    if dist.is_available() and dist.is_initialized():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message)
    for message in filter(None, messages):
        raise ConversationError(message)
    return result


def settle(bad: dict[int, str], total: int, what: str, skip_bad: bool) -> None:
    """
    Say what `find_bad` found among `total` samples of `what`: with `skip_bad` in print, else as an
    error.

    Raises:
        ConversationError: the first bad sample, or with `skip_bad`, that no good one is left.
    """
    if not bad:
        return
    messages = list(bad.values())
    if not skip_bad:
        raise ConversationError(f"{messages[0]} {SKIP}")
    if len(bad) >= total:
        raise ConversationError(f"{what}: all of the {total} samples are bad. {messages[0]}")
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
    The samples that `check` raises no ConversationError for.

    Raises:
        ConversationError: as `settle`.
    """
    bad = find_bad(enumerate(samples), check, skip_bad)
    settle(bad, len(samples), what, skip_bad)
    return [sample for number, sample in enumerate(samples) if number not in bad]
