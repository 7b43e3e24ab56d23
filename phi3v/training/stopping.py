"""SIGTERM: remembered by the rank that gets it, answered by all ranks together."""

import signal
from typing import NoReturn

from ..distributed import print_first
from ..errors import record_failure

STOPPED = 128 + signal.SIGTERM  # the exit status of a run that SIGTERM stopped

_received = False


def listen() -> None:
    """From here on, SIGTERM is remembered and does nothing else."""
    global _received
    _received = False

    def remember(*_) -> None:
        global _received
        _received = True

    signal.signal(signal.SIGTERM, remember)


def received() -> bool:
    """Whether this rank got SIGTERM since `listen`."""
    return _received


def stop(text: str) -> NoReturn:
    """End the run, on every rank, with status STOPPED."""
    text += " The same command with --resume_from_checkpoint goes on."
    print_first(text)
    record_failure(text)
    raise SystemExit(STOPPED)
