"""What a person sees of a training: a bar, and a short line for every logging step."""

import time

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from ..data.mixing import Mixture
from ..data.packing import PackedRecords


class Bar(ProgressCallback):
    """Transformers' bar of the steps, without its dictionaries."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class LogLines(TrainerCallback):
    """The line of `log_line`. All that is logged goes to trainer_state.json and the trackers."""

    start, first_step = 0.0, 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.start, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            steps = f"{state.max_steps - state.global_step:,} of {state.max_steps:,} steps"
            data = train_dataloader.dataset
            part = data.parts[0] if isinstance(data, Mixture) else data
            of = f"{len(data):,} {'packed rows' if isinstance(part, PackedRecords) else 'samples'}"
            tqdm.write(f"Training: {steps}, {state.num_train_epochs} epochs of {of}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            done = state.global_step - self.first_step
            each = (time.monotonic() - self.start) / max(done, 1)
            left = each * (state.max_steps - state.global_step)
            # Above a bar, where there is one.
            tqdm.write(log_line(state.global_step, state.max_steps, state.epoch, logs, left))


def log_line(step: int, steps: int, epoch: float, logs: dict[str, float], left: float) -> str:
    """
    One logging step: where the run is, loss, rates, memory of the GPU or process that has most, and
    the seconds that are left, evaluations at the end excepted. Lines of a run are aligned. Of a
    mixture, the loss of each dataset comes last.
    """
    speed = (
        f"MFU {logs['mfu']:5.1%}"
        if "mfu" in logs
        else f"{logs['tflops_per_second']:#.3g} TFLOP/s a process"
    )
    parts = [
        f"step {step:{len(str(steps))}}/{steps}",
        f"epoch {epoch:.2f}",
        f"loss {logs['loss']:7.4f}",
        f"lr {logs['learning_rate']:.2e}",
        f"{logs['samples_per_second']:6.2f} samples/s",
        speed,
        f"{logs['peak_memory_gb_per_process']:.1f} GB",
        f"{in_words(left)} left",
        *(f"{n[5:17]} {loss:.4f}" for n, loss in logs.items() if n.startswith("loss_")),
    ]
    return "  ".join(parts)


def in_words(seconds: float) -> str:
    """A duration, such as 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
