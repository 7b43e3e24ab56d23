"""
Failures that a user can do something about: one message instead of a traceback.
"""

import atexit
import contextlib
import errno
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import TrainerCallback

from .errors import ConversationError, plain_message

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
# Loss scaling starts at 65,536 and halves with every overflow; it recovers when they are rare.
SMALLEST_LOSS_SCALE = 1
# Steps of fp16 in a row without a finite loss: each is skipped, and lowers the loss scale.
MOST_OVERFLOWS = 10
# Seconds by which a rank that lost another one waits, so that the other's reason comes first.
RESPITE = 2


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


def explain_failures() -> None:
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
    if isinstance(error, ConversationError):
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


class LossWatch(TrainerCallback):
    """
    Ends the run, on all ranks, at a loss that is not finite, and says which samples it comes from.

    In fp16 such a step is skipped and the loss scale lowered; there, `MOST_OVERFLOWS` of them in a
    row end the run, or a loss scale at which nothing is learnt.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.losses: list[tuple[list[str], torch.Tensor]] = []  # of a step's micro-batches
        self.ids: list[str] = []
        self.overflows = 0

        def take_ids(module, inputs, named_inputs):
            self.ids = named_inputs.pop("ids", [])
            return inputs, named_inputs

        def keep_loss(module, inputs, output):
            if module.training and output.loss is not None:
                self.losses.append((self.ids, output.loss.detach()))

        self.hooks = [
            model.register_forward_pre_hook(take_ids, with_kwargs=True),
            model.register_forward_hook(keep_loss),
        ]

    def on_step_end(self, args, state, control, **kwargs):
        losses, self.losses = self.losses, []
        # One look at the device a step, not one a micro-batch.
        bad = ~torch.stack([loss for _, loss in losses]).isfinite()
        any_bad = bad.any().int()
        if dist.is_initialized():
            dist.all_reduce(any_bad, dist.ReduceOp.MAX)
        if not any_bad.item():
            self.overflows = 0
            return
        self.overflows += 1
        if args.fp16 and self.overflows < MOST_OVERFLOWS:
            return
        message = ""
        for (ids, loss), this_bad in zip(losses, bad.tolist(), strict=True):
            if this_bad and not message:
                message = (
                    f"the loss of step {state.global_step} is {loss.item()}, in the batch of "
                    f"{', '.join(map(repr, ids))}. Look at these samples; if they are as they "
                    "should be, lower --learning_rate, or use --bf16 in place of fp16. The "
                    "checkpoints before this step are untouched."
                )
        messages = [message]
        if dist.is_initialized():
            messages = [None] * dist.get_world_size()
            dist.all_gather_object(messages, message)
        raise RunError(next(filter(None, messages)))

    def on_log(self, args, state, control, optimizer=None, **kwargs):
        scaler = getattr(optimizer, "scaler", None)  # of fp16 without DeepSpeed, which has its own
        if scaler is not None and scaler.get_scale() < SMALLEST_LOSS_SCALE:
            raise RunError(OVERFLOW)

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self.hooks:
            hook.remove()
