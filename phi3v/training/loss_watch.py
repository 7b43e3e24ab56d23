"""A loss that is not finite ends the run."""

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..errors import OVERFLOW, RunError

# Loss scaling starts at 65,536 and halves with every overflow; it recovers when they are rare.
SMALLEST_LOSS_SCALE = 1
# Steps of fp16 in a row without a finite loss: each is skipped, and lowers the loss scale.
MOST_OVERFLOWS = 10


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
