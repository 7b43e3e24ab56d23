"""How fast a run is: samples and tokens per second, MFU, waiting for data, peak memory."""

import contextlib
import resource
import time
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..distributed import gather
from .flops import peak_flops, training_flops

# What is counted in every micro-batch, padding excluded. `pairs` are a query and a key that it
# attends to; `labels` are the positions at which the head runs.
COUNTED = ("samples", "tokens", "pairs", "labels", "images", "crops")


def count_batch(batch: dict, crop_size: int) -> dict[str, int]:
    """
    `COUNTED` of a batch of `TrainingCollator`. Nothing here waits for the device.

    Args:
        batch: `lengths`, the tokens of every sample, also where several share a row; `shift_labels`
            (labels,); with images `image_sizes`, a list of (height, width), where 0 x 0 is a blank
            one, of which only the global crop is seen.
        crop_size: pixels along a side.
    """
    lengths, sizes = batch["lengths"], batch.get("image_sizes", [])
    return {
        "samples": len(lengths),
        "tokens": sum(lengths),
        "pairs": sum(length * (length + 1) // 2 for length in lengths),
        "labels": len(batch["shift_labels"]),
        "images": sum(height > 0 for height, _ in sizes),
        "crops": sum(height * width // crop_size**2 + 1 for height, width in sizes),
    }


class Meter:
    """
    Measures training: `waiting` around the wait for a step's batches, `count` for each of them,
    `step_done` at the step's end, then `rates` wherever something is logged.

    Only the time from `waiting` to `step_done` counts. Logging, evaluations and checkpoints come
    between, and make a run longer but not its rates lower.

    `rates` and `summary` are over all ranks, which have to call them together:
        `samples_per_second`, `tokens_per_second`, `images_per_second`, `crops_per_second`: padding
            excluded. Crops are what the vision tower sees, the global one of every image included.
        `mfu`: the share of the GPUs' peak FLOP/s that `training_flops` makes use of; on a device
            whose peak is not known, `tflops_per_second` of a process instead.
        `data_wait`: the share of the time in which the rank that waits most has no batches yet.
        `peak_memory_gb_per_process`: since the process started.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        """`model` as it is trained, adapters included, and before it is wrapped."""
        self.device = device
        self.crop_size = model.config.vision_config.image_size
        self.flops = training_flops(model)
        on_gpu = device.type == "cuda"
        self.peak_flops = peak_flops(torch.cuda.get_device_name(device)) if on_gpu else None
        self.lengths: Counter[int] = Counter()  # of this rank's samples
        self.total = dict.fromkeys((*COUNTED, "seconds", "waited", "peak_memory"), 0.0)
        self._begin_window()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A step begins here, with the wait for its batches."""
        self.step_start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - self.step_start

    def count(self, batch: dict) -> None:
        """A micro-batch, see `count_batch`."""
        for name, number in count_batch(batch, self.crop_size).items():
            self.counts[name] += number
        self.lengths.update(batch["lengths"])

    def step_done(self) -> None:
        """The step ends when the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - self.step_start

    def rates(self) -> dict[str, float]:
        """Of what was done since the last call."""
        return self._rates(self._collect())

    def summary(self) -> tuple[dict[str, float | dict], str]:
        """
        Of the whole run: the rates, each as `train_...`, the `histogram` of samples' lengths in
        tokens as `train_lengths`, and a line for people.
        """
        self._collect()
        total, rates = self.total, self._rates(self.total)
        speed = (
            f"MFU {rates['mfu']:.1%}"
            if "mfu" in rates
            else f"{rates['tflops_per_second']:.3g} TFLOP/s per process"
        )
        line = (
            f"Training: {total['samples']:,.0f} samples in {total['seconds']:,.1f} s, "
            f"{rates['samples_per_second']:.2f} samples/s, "
            f"{rates['tokens_per_second']:,.0f} tokens/s, "
            f"{rates['crops_per_second']:.2f} crops/s, {speed}, "
            f"{rates['data_wait']:.1%} of the time waiting for data, "
            f"peak memory {rates['peak_memory_gb_per_process']:.2f} GB per process"
        )
        lengths = histogram(sum(gather(self.lengths), Counter()))
        return {f"train_{name}": rate for name, rate in rates.items()} | lengths, line

    def _begin_window(self) -> None:
        self.counts = dict.fromkeys(COUNTED, 0)  # of this rank
        self.seconds = self.waited = 0.0

    def _collect(self) -> dict[str, float]:
        """What all ranks did since the last call, which is added to the total and begins anew."""
        counts = [float(number) for number in self.counts.values()]
        longest = [self.seconds, self.waited, float(peak_memory(self.device))]
        counts, longest = (
            torch.tensor(numbers, device=self.device, dtype=torch.float64)
            for numbers in (counts, longest)
        )
        self._begin_window()
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
        numbers = dict(zip(self.total, counts.tolist() + longest.tolist(), strict=True))
        peak = max(self.total["peak_memory"], numbers["peak_memory"])
        self.total = {name: self.total[name] + number for name, number in numbers.items()}
        self.total["peak_memory"] = peak
        return numbers

    def _rates(self, numbers: dict[str, float]) -> dict[str, float]:
        seconds = max(numbers["seconds"], 1e-9)  # a resumed run may have had no step left
        processes = dist.get_world_size() if dist.is_initialized() else 1
        flops = sum(numbers[name] * each for name, each in self.flops.items())
        flops_per_second = flops / seconds / processes
        rates = {
            f"{name}_per_second": numbers[name] / seconds
            for name in ("samples", "tokens", "images", "crops")
        }
        if self.peak_flops:
            rates["mfu"] = flops_per_second / self.peak_flops
        else:
            rates["tflops_per_second"] = flops_per_second / 1e12
        rates["data_wait"] = numbers["waited"] / seconds
        rates["peak_memory_gb_per_process"] = numbers["peak_memory"] / 1e9
        return rates


def histogram(lengths: Counter[int], most: int = 40) -> dict[str, dict]:
    """
    At most `most` bars of one width: `from`, where they begin, and how many `samples` they hold, as
    often as these were seen. Nothing where there are no lengths.
    """
    if not lengths:
        return {}
    width = -(-(max(lengths) + 1 - min(lengths)) // most)
    bars: Counter[int] = Counter()
    for length, count in lengths.items():
        bars[(length - min(lengths)) // width * width + min(lengths)] += count
    starts = sorted(bars)
    samples = [bars[start] for start in starts]
    return {"train_lengths": {"width": width, "from": starts, "samples": samples}}


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
