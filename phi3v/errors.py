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
import time
import traceback
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


def explain_failures(output_dir=None) -> None:
    """From here on, a failure that has an explanation ends the run with it, on every rank."""
    sys.excepthook = _report
    atexit.register(_wait_for_gloo)
    atexit.register(_leave_group)  # comes before, as the last one registered


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _wait_for_gloo() -> None:
    """
    Let gloo's threads finish before Python does.

    They let go of a collective's tensors a moment after it is done. The tensors belong to Python,
    which aborts the process where it is ending by then. Leaving the group does not end the threads
    as long as anything refers to it: DDP, or a default argument in torch itself.
    """
    end = time.monotonic() + 10
    looks_at_rest = 0  # one is not enough: who waits for the interpreter's lock is asleep as well
    while (states := _gloo_states()) and looks_at_rest < 5 and time.monotonic() < end:
        looks_at_rest = looks_at_rest + 1 if states == {"S"} else 0
        time.sleep(0.01)  # the lock is free for them meanwhile


def _gloo_states() -> set[str]:
    """The states of gloo's threads, "S" for asleep. None are known where there is no /proc."""
    states = set()
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            name, _, state = stat.read_text().rpartition(") ")
            if name.endswith("(pt_gloo_runloop"):
                states.add(state[0])
    return states


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    atexit.unregister(_leave_group)  # it would wait for ranks that may be gone
    text = explanation(error)
    if text is None:
        record_failure("".join(traceback.format_exception(kind, error, trace)))
        sys.__excepthook__(kind, error, trace)
        return
    if _lost_a_peer(error):
        time.sleep(RESPITE)
    record_failure(text)
    if prints_failures():
        print(f"error: {text}", file=sys.stderr, flush=True)


def prints_failures() -> bool:
    """Not where torchrun shows this rank's record, and the first rank may fail alike."""
    return os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_ERROR_FILE" not in os.environ


def record_failure(text: str) -> None:
    """
    Let torchrun's summary, the last that a user sees, show `text` as the reason of this rank's end.

    The file is that of torch elastic's `record`, which would put a traceback there.
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


@contextlib.contextmanager
def phase(what):
    try:
        yield
    except (RunError, DataError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RunError(f"{what}: {first_line(error)}") from error
