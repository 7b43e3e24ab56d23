"""How fast a run is: samples and tokens a second, MFU, waiting for data, peak memory."""

import re
import resource
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback

from ..distributed import print_first
from ..errors import RunError

# What is counted in every micro-batch, padding excluded. `pairs` are a query and a key that it
# attends to; `labels` are the positions at which the head runs.
COUNTED = ("samples", "tokens", "pairs", "labels", "images", "crops")

# Dense (not sparse) 16-bit tensor core FLOP/s of NVIDIA's datasheets, by the words that a device's
# name has to hold. The first entry that fits counts.
PEAK_FLOPS = {
    ("B200",): 2250e12,
    ("H200",): 989e12,
    ("H100", "PCIe"): 756e12,
    ("H100",): 989e12,
    ("A100",): 312e12,
    ("A10",): 125e12,
    ("L40S",): 362e12,
    ("L4",): 121e12,
    ("V100", "PCIE"): 112e12,
    ("V100",): 125e12,
    ("RTX", "8000"): 130.5e12,
    ("RTX", "4090"): 165.2e12,
    ("RTX", "3090"): 71e12,
}
# Other chips of nearly the same name, and slices of a GPU.
OTHER_CHIPS = {"NVL", "Laptop", "Ti", "D", "MIG"}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of `torch.cuda.get_device_name()` at its best; None where it is not known."""
    words = set(re.split(r"[\s-]+", device_name))
    if words & OTHER_CHIPS:
        return None
    return next((flops for name, flops in PEAK_FLOPS.items() if words.issuperset(name)), None)


def training_flops(model: nn.Module) -> dict[str, int]:
    """
    FLOPs of a forward and backward pass for one of each, by its name in `COUNTED`.

    These are the FLOPs that training needs, for MFU as in appendix B of the PaLM paper (Chowdhery
    et al., 2022): what gradient checkpointing computes again does not count. A linear layer of m x
    n takes 2 m n a row forward, 2 m n for the gradient of its input, where something trained lies
    before it, and 2 m n for that of its weight, where that is trained. Attention takes 4 FLOPs a
    pair and channel forward, and 8 backward. All else (norms, softmax, RoPE, the two separators of
    a batch) is left out.

        tokens: the decoder's linear layers.
        pairs: its attention.
        labels: the head.
        crops: CLIP's layers that run, with attention from each of the 577 positions to all, and the
            projection of 144 tokens.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, vision = base.model, base.model.vision_embed_tokens
    tower, config = vision.img_processor.vision_model, base.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2
    positions = patches + 1  # one for the class token
    walk = _Walk()

    crop = patches * walk.linear(tower.embeddings.patch_embedding)
    walk.learn(tower.embeddings.parameters())
    walk.learn(tower.pre_layrnorm.parameters())
    for layer in tower.encoder.layers[:-1]:
        walk.learn(layer.layer_norm1.parameters())
        attention = layer.self_attn
        crop += positions * walk.linear(attention.q_proj, attention.k_proj, attention.v_proj)
        crop += positions**2 * walk.attention(config.hidden_size)
        crop += positions * walk.linear(attention.out_proj)
        walk.learn(layer.layer_norm2.parameters())
        crop += positions * (walk.linear(layer.mlp.fc1) + walk.linear(layer.mlp.fc2))
    walk.learn(vision.parameters(recurse=False))  # the separators
    for layer in vision.img_projection[::2]:
        crop += patches // 4 * walk.linear(layer)

    token = pair = 0
    walk.learn(decoder.embed_tokens.parameters())
    for layer in decoder.layers:
        walk.learn(layer.input_layernorm.parameters())
        token += walk.linear(layer.self_attn.qkv_proj)
        pair += walk.attention(base.config.hidden_size)
        token += walk.linear(layer.self_attn.o_proj)
        walk.learn(layer.post_attention_layernorm.parameters())
        token += walk.linear(layer.mlp.gate_up_proj) + walk.linear(layer.mlp.down_proj)
    walk.learn(decoder.norm.parameters())
    return {"tokens": token, "pairs": pair, "labels": walk.linear(base.lm_head), "crops": crop}


class _Walk:
    """A walk through the model in the order of its forward pass, which adds up FLOPs."""

    def __init__(self):
        self.learns = False  # whether something trained was passed: gradients come as far as here

    def learn(self, parameters: Iterable[nn.Parameter]) -> None:
        self.learns |= any(parameter.requires_grad for parameter in parameters)

    def linear(self, *modules: nn.Module) -> int:
        """FLOPs a row of modules that have the same input, with their adapters."""
        flops = 0
        for module in modules:
            for name, part in module.named_modules():
                if isinstance(part, nn.Conv2d):
                    size = part.in_channels * part.out_channels * part.kernel_size[0] ** 2
                elif isinstance(part, nn.Linear):
                    size = part.in_features * part.out_features
                else:
                    continue
                # Of an adapter's two layers, the second one has a trained one before it.
                passes_back = self.learns or name.startswith("lora_B")
                flops += 2 * size * (1 + passes_back + part.weight.requires_grad)
        for module in modules:
            self.learn(module.parameters())
        return flops

    def attention(self, width: int) -> int:
        """FLOPs a pair: queries times keys, and weights times values."""
        return 4 * width * (3 if self.learns else 1)


def count_batch(batch: dict[str, torch.Tensor], crop_size: int) -> torch.Tensor:
    """
    `COUNTED` of a batch of `TrainingCollator` with `for_trainer`: (6,), on the batch's device.
    Nothing here waits for the device.
    """
    lengths = torch.tensor(batch["lengths"])
    counts = [len(lengths), int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())]
    labels = (batch["labels"][:, 1:] != -100).sum()
    images = crops = torch.zeros_like(labels)
    if (sizes := batch.get("image_sizes")) is not None:
        sizes = sizes.to(labels.device, non_blocking=True)
        images = (sizes[:, 0] > 0).sum()  # a blank one has no size, but its crop is encoded
        crops = (sizes // crop_size).prod(-1).sum() + len(sizes)
    samples, tokens, pairs = (labels.new_tensor(count) for count in counts)
    return torch.stack([samples, tokens, pairs, labels, images, crops])


class ThroughputCallback(TrainerCallback):
    """
    Adds rates to every line that the Trainer logs, and prints those of the whole run at its end.

    Time is training time: from where an optimizer step's batches are asked for to where the step
    ends. Logging, evaluations and checkpoints come after that and do not count. For that it has to
    know the Trainer, see `time_batches`, and to stand behind `LossWatch` in the list of callbacks:
    its look at the losses waits until the device has finished the step.

    Logged, over all ranks:
        `samples_per_second`, `tokens_per_second`, `images_per_second`, `crops_per_second`: padding
            excluded. Crops are what the vision tower sees, the global one of every image included.
        `mfu`: the share of the GPUs' peak FLOP/s that `training_flops` makes use of; on a device
            whose peak is not known, `tflops_per_second` of a process instead.
        `data_wait`: the share of the time in which the rank that waits most has no batches yet.
        `peak_memory_gb_per_process`: since the process started.
    """

    knows_trainer = False

    def time_batches(self, trainer: Trainer) -> None:
        """Measure how long the trainer's steps wait for their batches."""
        get_batch_samples = trainer.get_batch_samples

        def timed(*args):
            self.step_start = time.perf_counter()
            batches = get_batch_samples(*args)
            self.waited += time.perf_counter() - self.step_start
            return batches

        trainer.get_batch_samples = timed
        self.knows_trainer = True

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.knows_trainer:
            # Without the waiting for data, the rates would be higher ones under the same names.
            raise RunError(
                "ThroughputCallback cannot see how long batches take. Call its "
                "time_batches(trainer) before trainer.train()."
            )
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        crop_size = base.model.vision_embed_tokens.crop_size
        self.flops = training_flops(model)
        self.total = dict.fromkeys((*COUNTED, "seconds", "waited", "peak_memory"), 0)
        self._reset()
        on_gpu = args.device.type == "cuda"
        self.peak_flops = peak_flops(torch.cuda.get_device_name()) if on_gpu else None

        def count(module, inputs, named_inputs):
            if module.training:
                self.counts = self.counts + count_batch(named_inputs, crop_size)
            named_inputs.pop("lengths", None)

        self.hook = model.register_forward_pre_hook(count, with_kwargs=True)

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda" and (control.should_log or control.should_save):
            torch.cuda.synchronize()  # what follows would wait for the step otherwise
        self.seconds += time.perf_counter() - self.step_start

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:  # the Trainer's own summary
            return
        numbers = self._rates(self._collect(args.device))
        logs.update(numbers)  # what is printed
        state.log_history[-1].update(numbers)

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()
        self._collect(args.device)
        numbers, total = self._rates(self.total), self.total
        summary = {f"train_{name}": number for name, number in numbers.items()}
        state.log_history.append({**summary, "step": state.global_step})
        speed = (
            f"MFU {numbers['mfu']:.1%}"
            if "mfu" in numbers
            else f"{numbers['tflops_per_second']:.3g} TFLOP/s a process"
        )
        print_first(
            f"Training: {total['samples']:,.0f} samples in {total['seconds']:,.1f} s, "
            f"{numbers['samples_per_second']:.2f} samples/s, "
            f"{numbers['tokens_per_second']:,.0f} tokens/s, "
            f"{numbers['crops_per_second']:.2f} crops/s, {speed}, "
            f"{numbers['data_wait']:.1%} of the time waiting for data, "
            f"peak memory {numbers['peak_memory_gb_per_process']:.2f} GB a process"
        )

    def _reset(self) -> None:
        self.counts: torch.Tensor | int = 0  # `COUNTED` of this rank
        self.seconds = self.waited = 0.0

    def _collect(self, device: torch.device) -> dict[str, float]:
        """What all ranks did since the last call, which is added to the total and begins anew."""
        counts = torch.zeros(len(COUNTED), device=device, dtype=torch.float64) + self.counts
        longest = torch.tensor(
            [self.seconds, self.waited, peak_memory()], device=device, dtype=torch.float64
        )
        self._reset()
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
        names = (*COUNTED, "seconds", "waited", "peak_memory")
        numbers = dict(zip(names, counts.tolist() + longest.tolist(), strict=True))
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


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
