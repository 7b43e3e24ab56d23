"""
The two errors that a user can act on, and messages in place of tracebacks for failures that have an
explanation.
"""

import atexit
import contextlib
import errno
import json
import os
import reprlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from safetensors import SafetensorError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FAILED_WRITE = (
    *("No space left on device", "Disk quota exceeded", "File too large"),
    *("PytorchStreamWriter", "unexpected pos"),
)
# Their texts are a key or a few words about Python, which mean little without the name.
BARE_WORDS = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)
# What gloo and NCCL say.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
OUT_OF_MEMORY = (
    "the GPU has no memory left. Lower, in this order: --batch_size_per_gpu (with the same "
    "--batch_size the result stays the same), --eval_batch_size_per_gpu where it was evaluating, "
    "--num_crops; or use --use_flash_attention, --deepspeed ds_configs/zero3.json or "
    "zero3_offload.json, --use_lora, --use_qlora."
)
OVERFLOW = (
    "fp16 overflows in step after step, at the smallest loss scale too. Use --bf16 where the GPU "
    "has it, or lower --learning_rate."
)
# Seconds by which a rank that lost another one waits, so that the other's reason comes first.
RESPITE = 2

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 160


class DataError(ValueError):
    """A record that is not what it has to be; the message says where and what to do."""


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


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


def quoted(value: object) -> str:
    """A value of the user's for a message: quoted, printable, and never longer than a line."""
    return _short.repr(value).replace("\n", " ")


def one_line(error: BaseException) -> str:
    """What an error says, on a line of at most 300 characters; its kind, where that says more."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, BARE_WORDS):
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= 300 else text[:297] + "..."


@contextlib.contextmanager
def phase(what: str) -> Iterator[Callable[[object, str], None]]:
    """
    Turn whatever libraries raise in here into one message. Errors of ours pass, and those for which
    there is an explanation.

    Args:
        what: what this is about, as the user knows it: the flag, the file.

    Yields:
        `require(holds, otherwise)`, for what libraries take without a word.

    Raises:
        RunError: `what`, and what the library said, or what was required.
    """

    def require(holds: object, otherwise: str) -> None:
        if not holds:
            raise RunError(f"{what}: {otherwise}")

    try:
        yield require
    except Exception as error:
        if explanation(error) is not None:
            raise
        raise RunError(f"{what}: {one_line(error).rstrip('.')}.") from error


def explain_failures(output_dir: str | Path) -> None:
    """
    From here on, a failure that has an explanation ends the run with it, on every rank. Its
    traceback goes to a file in `output_dir`.
    """

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None):
        _report(error, "".join(traceback.format_exception(kind, error, trace)), Path(output_dir))

    sys.excepthook = report
    atexit.register(_leave_group)


def _leave_group() -> None:
    if not dist.is_initialized():
        return
    on_gloo = dist.get_backend() == dist.Backend.GLOO
    dist.destroy_process_group()
    if on_gloo:
        # Gloo's threads (torch 2.14) let go of a collective's tensors a moment after it is done.
        # The tensors belong to Python, and where it has ended by then, the process aborts:
        # "terminate called without an active exception". Leaving the group does not end the threads
        # while anything else, like DDP, refers to it. Can go when gloo drops tensors before `wait`
        # returns.
        time.sleep(0.1)


def _report(error: BaseException, trace: str, output_dir: Path) -> None:
    atexit.unregister(_leave_group)  # it would wait for ranks that may be gone
    if isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(type(error), error, error.__traceback__)
        return
    text = explanation(error)
    ours = isinstance(error, DataError | RunError)
    path = None if ours and error.__cause__ is None else _write_trace(trace, output_dir)
    where = f" The traceback is in {path}." if path else ""
    if _lost_a_peer(error):
        time.sleep(RESPITE)
    if text is None:
        record_failure(trace)
        text = f"{trace}{where.lstrip()}"
    else:
        text = f"{text}{where}"
        record_failure(text)
        text = f"error: {text}"
    if prints_failures():
        print(text, file=sys.stderr, flush=True)


def _write_trace(trace: str, output_dir: Path) -> Path | None:
    """The file that holds it: in the output folder, or a temporary one where that fails."""
    rank = int(os.environ.get("RANK", 0))
    name = "error.txt" if rank == 0 else f"error-rank{rank}.txt"
    for folder in (lambda: output_dir / ".phi3v", lambda: Path(tempfile.mkdtemp(prefix="phi3v-"))):
        with contextlib.suppress(OSError, ValueError):
            path = folder() / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(trace, encoding="utf-8", errors="backslashreplace")
            return path
    return None


def prints_failures() -> bool:
    """Not where torchrun shows this rank's record, and the first rank may fail alike."""
    return os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_ERROR_FILE" not in os.environ


def record_failure(text: str) -> None:
    """
    Let torchrun's summary, the last that a user sees, show `text` as the reason of this rank's end.

    The file and its form are those of torch's `elastic.multiprocessing.errors.ErrorHandler`, which
    (torch 2.14) puts a traceback there, and has no argument for another text.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # torchrun then says that there is no record
            content = {"message": {"message": text, "extraInfo": details}}
            Path(path).write_text(json.dumps(content), encoding="utf-8")


def explanation(error: BaseException) -> str | None:
    """What to tell about an error; None where nothing is known but the traceback."""
    if isinstance(error, DataError):
        return plain_message(error)
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if "loss scale already at minimum" in str(error):  # DeepSpeed
        return OVERFLOW
    if _disk_is_full(error):
        # A copy has two names; the second one is written.
        names = (getattr(error, name, None) for name in ("filename2", "filename"))
        path = next(filter(None, names), "--output_dir")
        return (
            f"cannot write {path}: the disk is full, or a quota is ({error}). Free some space, "
            "then go on with --resume_from_checkpoint; complete checkpoints are untouched."
        )
    if _lost_a_peer(error):
        return f"another rank is gone, and its own message says why ({error})"
    return None


def _lost_a_peer(error: BaseException) -> bool:
    return any(sign in str(error) for sign in LOST_PEER)


def _disk_is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    # safetensors and torch.save tell what happened in words only, the latter not even why.
    return isinstance(error, SafetensorError | RuntimeError | OSError) and any(
        sign in str(error) for sign in FAILED_WRITE
    )
