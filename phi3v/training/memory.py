"""
What a run needs of a GPU's memory, counted before it starts.

The model, its backward pass and its cache run on fake tensors (torch's FakeTensorMode): they have
shapes and lifetimes, and no values. What the libraries add to that is arithmetic from their source.
"""

import argparse
import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import TrainingArguments

from ..model.configuration_phi3_v import Phi3VConfig
from ..model.modeling_phi3_v import CACHE, Phi3VForCausalLM, token_order
from .attention import SDPA, packed_mask
from .generation import _Cache
from .loading import freeze_and_adapt

# Bytes a weight: 4 bits, and a float32 scale for every 64 of them (bitsandbytes' NF4).
FOUR_BIT = 0.5 + 4 / 64


class Memory(NamedTuple):
    """Bytes on one GPU at one moment, by part. Activations include a batch and the cache."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return sum(self)


class Setup(NamedTuple):
    """
    How a run computes.

    Args:
        computed_in: float32, or what autocast or DeepSpeed computes in.
        zero: `zero_optimization` of DeepSpeed's config; None without DeepSpeed.
    """

    gpus: int
    accumulation: int
    computed_in: torch.dtype
    zero: dict | None


class FakeRun:
    """
    A run's model, and what training and evaluation with it hold at their peaks.

    It is counted on fake CPU tensors whatever the device: without a GPU, autograd does not take
    fake CUDA tensors (torch 2.14, "hasPrimaryContext expects a valid device index"). Attention is
    sdpa's flash kernel there, which keeps what the kernels of GPUs keep: its output, and one number
    a query and head.
    """

    def __init__(
        self,
        config: Phi3VConfig,
        args: argparse.Namespace,
        training_args: TrainingArguments,
        lora: LoraConfig | None,
        setup: Setup,
    ):
        self.setup, self.training_args, self.fake = setup, training_args, FakeTensorMode()
        self.flash = args.use_flash_attention
        mastered = setup.zero is not None or args.use_lora
        dtype = setup.computed_in if mastered else torch.float32
        with torch.device("meta"):
            model = Phi3VForCausalLM._from_config(config, dtype=dtype, attn_implementation=SDPA)
            self.model = freeze_and_adapt(model, args, lora)
        with self.fake:
            _to_fakes(self.model)
        parameters = list(self.model.parameters())
        self.parameters = sum(p.numel() for p in parameters)
        self.learned = [p for p in parameters if p.requires_grad]
        self.trained = sum(p.numel() for p in self.learned)
        self.weights = sum(p.nbytes for p in parameters)
        self.unpacked = 0
        if args.use_qlora:
            packed = [p for p in model.model.layers.parameters() if p.ndim == 2 and not p.requires_grad]
            self.weights -= sum(int(p.nbytes - FOUR_BIT * p.numel()) for p in packed)
            self.unpacked = max(p.nbytes for p in packed)  # the layer that computes

    # ---- Arithmetic

    def optimizer(self) -> int:
        """
        Bytes of the optimizer's state, and of DeepSpeed's float32 weights. AdamW has two float32
        numbers a weight; in 8 bits, two bytes and a float32 scale for each 256 of either. Of other
        optimizers, this is the most.
        """
        zero, eight_bit = self.setup.zero, "8bit" in self.training_args.optim
        state = 2 + 2 * 4 / 256 if eight_bit else 8
        if zero is None:
            # The Trainer leaves embeddings in 32 bits.
            embedding = self.model.get_input_embeddings().weight
            whole = embedding.numel() if eight_bit and embedding.requires_grad else 0
            return int(state * self.trained + 6 * whole)
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            return 0
        return int((4 + state) * self.trained / self.setup.gpus)

    def held_weights(self) -> int:
        """Bytes in training. ZeRO-3 has a shard, and as much as it may gather."""
        zero = self.setup.zero or {}
        if zero.get("stage") != 3:
            return self.weights
        size = self.setup.computed_in.itemsize
        gathered = min(self.weights, size * _number(zero, "stage3_max_live_parameters", 1e9))
        offloaded = zero.get("offload_param", {}).get("device", "none") != "none"
        return int(gathered + (0 if offloaded else self.weights / self.setup.gpus))

    def buffers(self) -> tuple[int, int]:
        """
        Bytes of gradients that autograd does not hold itself: in a backward pass, and at the step.

        Of DeepSpeed 0.19.8's stage_1_and_2.py: two buckets; the rank's partition of this pass and,
        with accumulation, that of the ones before it. The step has this partition, flattens it
        into a second one, and that one into float32. DDP's buckets hold every gradient once more.
        """
        zero, gpus = self.setup.zero, self.setup.gpus
        whole = sum(p.nbytes for p in self.learned)
        if zero is None:
            buckets = whole if gpus > 1 else 0
            return buckets, whole + buckets
        size = self.setup.computed_in.itemsize
        offloaded = self.optimizer() == 0
        buckets = size * _number(zero, "reduce_bucket_size", 5e8) * (1 + zero.get("overlap_comm", False))
        part = 0 if offloaded else whole / gpus
        masters = 0 if offloaded else 4 * self.trained / gpus
        return int(buckets + part * (1 + (self.setup.accumulation > 1))), int(2 * part + masters)

    # ---- Fake runs

    def training(self, batch: dict) -> Memory:
        """The peak of a micro-batch of `TrainingCollator`, or of the step after it."""
        partitioned = (self.setup.zero or {}).get("stage", 0) >= 2
        model, checkpointing = self.model.train(), self.training_args.gradient_checkpointing
        if checkpointing:
            model.gradient_checkpointing_enable(self.training_args.gradient_checkpointing_kwargs)
        with self._counting(batch) as (live, batch):

            def keep(parameter: torch.Tensor) -> None:
                live.rename(parameter.grad, "gradients")
                if partitioned:  # it is copied into a bucket, see `buffers`
                    parameter.grad = None

            hooks = [p.register_post_accumulate_grad_hook(keep) for p in self.learned]
            if self.setup.accumulation > 1 and not partitioned:
                for parameter in self.learned:
                    parameter.grad = torch.empty_like(parameter)
                    live.rename(parameter.grad, "gradients")
            if "cu_seq_lens_q" in batch and not self.flash:
                batch["attention_mask"] = packed_mask(batch["position_ids"])
            model(**batch, use_cache=False).loss.backward()
            for hook in hooks:
                hook.remove()
            model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_disable()
        in_backward, at_step = self.buffers()
        held = Memory(weights=self.held_weights(), optimizer=self.optimizer())
        backward = held._replace(
            gradients=live.peak["gradients"] + in_backward,
            activations=live.peak["activations"] + self.unpacked,
            logits=live.peak["logits"],
        )
        return max(backward, held._replace(gradients=at_step), key=lambda memory: memory.total)

    @torch.no_grad()
    def evaluation(self, batch: dict) -> Memory:
        """
        The peak of prompts of `GenerationCollator`: all of them, and one token after them. Beside
        them lies what training has left, the optimizer.
        """
        model = self.model.eval()
        batch = {name: value for name, value in batch.items() if name != "attention_mask"}
        with self._counting(batch) as (live, batch):
            cached = {CACHE: _Cache(), "use_cache": True, "logits_to_keep": 1}
            model(**batch, **cached)
            model(input_ids=batch["input_ids"][:, -1:], **cached)
            del cached
        shard = self.weights / self.setup.gpus if (self.setup.zero or {}).get("stage") == 3 else 0
        activations = live.peak["activations"] + self.unpacked
        return Memory(
            int(self.weights + shard), 0, self.optimizer(), activations, live.peak["logits"]
        )

    @contextlib.contextmanager
    def _counting(self, batch: dict) -> Iterator[tuple["_Live", dict]]:
        """Counts what is done to the batch, which it makes fake, under the run's autocast."""
        if "pixel_values" in batch and "image_positions" not in batch:
            is_image = batch["input_ids"].flatten() == self.model.config.image_token_id
            batch = {**batch, "image_positions": is_image.nonzero().flatten()}
        low = self.setup.computed_in if self.setup.computed_in != torch.float32 else None
        autocast = torch.autocast("cpu", low, enabled=low is not None and self.setup.zero is None)
        live = _Live(self.model)
        with self.fake, torch.device("cpu"):
            batch = {
                name: self.fake.from_tensor(value)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in batch.items()
            }
            for value in batch.values():
                live.add(value)
            token_order.cache_clear()
            with live, autocast:
                yield live, batch
        token_order.cache_clear()  # it holds fakes


def _to_fakes(model: torch.nn.Module) -> None:
    """
    Give a model of meta tensors fake ones of the CPU, in their shapes. It is not built of fakes,
    because PEFT moves adapters, which fakes refuse (torch 2.14, "Couldn't swap Linear.weight").
    """
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            new = torch.empty(value.shape, dtype=value.dtype, device="cpu")
            setattr(module, name, torch.nn.Parameter(new, value.requires_grad))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype, device="cpu"))


class _Live(TorchDispatchMode):
    """
    Bytes of the tensors that live, by part, and as they were when they were most.

    torch's MemTracker does so too. It also keeps statistics of every module, and does not know
    logits.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.live: Counter = Counter()
        self.peak: Counter = Counter()
        self.vocab_size = model.config.vocab_size
        self.parts: dict[int, str] = {}  # by the storage's address
        for tensor in (*model.parameters(), *model.buffers()):
            self.add(tensor, "weights")
        self.live, self.peak = Counter(), Counter()  # weights are counted apart

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        for value in tree_iter(output):
            self.add(value)
        return output

    def add(self, tensor: object, part: str | None = None) -> None:
        """Count a tensor's storage, for as long as it lives."""
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.parts:
            return
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size
        self.parts[key] = part or ("logits" if is_logits else "activations")
        weakref.finalize(storage, self._drop, key, size).atexit = False
        self.live[self.parts[key]] += size
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def rename(self, tensor: torch.Tensor, part: str) -> None:
        """Count a tensor as another part."""
        storage = tensor.untyped_storage()
        self.live[self.parts[storage._cdata]] -= storage.nbytes()
        self.live[part] += storage.nbytes()
        self.parts[storage._cdata] = part

    def _drop(self, key: int, size: int) -> None:
        self.live[self.parts.pop(key)] -= size


def _number(config: dict, name: str, otherwise: float) -> float:
    """A number of DeepSpeed's config, which may be "auto"."""
    value = config.get(name, otherwise)
    return otherwise if value == "auto" else float(value)
