"""
SIGTERM: remembered by the rank that gets it, answered by all ranks together.

A run is stopped after a step, or between two batches of an evaluation, with a checkpoint.
"""

import signal
from collections.abc import Callable

STOPPED = 128 + signal.SIGTERM  # the exit status of a run that SIGTERM stopped


class Stopped(SystemExit):
    """This run, on every rank, ends because of SIGTERM."""

    def __init__(self):
        super().__init__(STOPPED)


_received = False
_previous: signal.Handlers | Callable | None = signal.SIG_DFL


def listen() -> None:
    """From here on, SIGTERM is remembered and does nothing else, until `end`."""
    global _received, _previous
    _received = False

    def remember(*_) -> None:
        global _received
        _received = True

    _previous = signal.signal(signal.SIGTERM, remember)


def end() -> None:
    """SIGTERM does again what it did before `listen`."""
    global _received
    _received = False
    signal.signal(signal.SIGTERM, _previous)


def received() -> bool:
    """Whether this rank got SIGTERM since `listen`."""
    return _received
