"""
What a run needs of a GPU's memory, counted before it starts.

The model, its backward pass and its cache run on fake tensors (torch's FakeTensorMode), which have
shapes and lifetimes, and no values. What libraries add to that is arithmetic from their source.
"""

import argparse
import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import TrainingArguments

from ..model.configuration_phi3_v import Phi3VConfig
from ..model.modeling_phi3_v import CACHE, Phi3VForCausalLM, token_order
from .attention import SDPA, add_packed_mask
from .generation import KeyCache
from .loading import freeze_and_adapt

from peft import LoraConfig

FOUR_BIT = 0.5 + 4 / 64  # bytes a weight in NF4: each 64 have a float32 scale
EIGHT_BIT = 2 + 2 * 4 / 256  # of 8-bit AdamW: two moments, each 256 numbers with a scale


class Memory(NamedTuple):
    """Bytes on one GPU at one moment. Activations include the batch and the cache."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0


class Setup(NamedTuple):
    """How a run computes. `zero` is `zero_optimization` of DeepSpeed's config, None without it."""

    gpus: int
    accumulation: int
    on_gpu: bool
    computed_in: torch.dtype
    zero: dict | None = None


class FakeRun:
    """
    A run's model, and what training and evaluation with it hold when they hold most.

    Everything is counted on fake CPU tensors, because without a GPU autograd refuses fake CUDA
    tensors (torch 2.14, "hasPrimaryContext expects a valid device index"). Attention keeps there
    what flash kernels keep on GPUs: its output, and one number a query and head.
    """

    def __init__(
        self,
        config: Phi3VConfig,
        args: argparse.Namespace,
        training_args: TrainingArguments,
        lora: LoraConfig | None,
        setup: Setup,
    ):
        self.setup, self.args, self.training_args = setup, args, training_args
        self.zero = {k: v for k, v in (setup.zero or {}).items() if v != "auto"}
        self.fake = FakeTensorMode()
        low = setup.computed_in != torch.float32 and setup.zero is None
        self.autocast = torch.autocast("cpu", setup.computed_in if low else None, enabled=low)
        mastered = setup.zero is not None or args.use_lora  # as in `load_model`
        dtype = setup.computed_in if mastered else torch.float32
        with torch.device("meta"):
            base = Phi3VForCausalLM._from_config(config, dtype=dtype, attn_implementation=SDPA)
            self.model = freeze_and_adapt(base, args, lora)
        # Not fakes from the start: PEFT moves adapters ("Couldn't swap Linear.weight", torch 2.14).
        with self.fake:
            for module in self.model.modules():
                for name, value in module.named_parameters(recurse=False):
                    new = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    setattr(module, name, torch.nn.Parameter(new, value.requires_grad))
                for name, value in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty(value.shape, dtype=value.dtype, device="cpu"))
                if setup.on_gpu and low and isinstance(module, torch.nn.LayerNorm):
                    # So does CUDA's autocast, and the CPU's does not.
                    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in self.learned)
        self.weights, self.unpacked = sum(p.nbytes for p in self.model.parameters()), 0
        if args.use_qlora:
            linear = (p for p in base.model.layers.parameters() if p.ndim == 2)
            packed = [p for p in linear if not p.requires_grad]
            self.weights -= sum(int(p.nbytes - FOUR_BIT * p.numel()) for p in packed)
            self.unpacked = max(p.nbytes for p in packed)  # of the layer that computes

    # ---- Arithmetic

    def optimizer(self) -> int:
        """Bytes of AdamW's state (others have no more) and of DeepSpeed's float32 weights."""
        state = EIGHT_BIT if "8bit" in self.training_args.optim else 8
        if self.setup.zero is None:
            return int(state * self.trained)
        part = self.trained / self.setup.gpus
        return 0 if self._offloads("optimizer") else int((4 + state) * part)

    def held_weights(self, gathered: int) -> int:
        """Bytes of the weights. ZeRO-3 has a shard, and of the whole as much as is gathered."""
        if self.zero.get("stage") != 3:
            return self.weights
        shard = 0 if self._offloads("param") else self.weights // self.setup.gpus
        return shard + min(gathered, self.weights)

    def gradients(self) -> tuple[int, int]:
        """
        Bytes of gradients that autograd does not hold: in a backward pass, and all at the step.

        Of DeepSpeed 0.19.8's stage_1_and_2.py: two buckets; the rank's partition of this pass and,
        with accumulation, that of those before it. The step flattens this partition into a second
        one, and that into float32. DDP's buckets hold every gradient once more.
        """
        gpus, whole = self.setup.gpus, sum(p.nbytes for p in self.learned)
        if self.setup.zero is None:
            buckets = whole if gpus > 1 else 0
            return buckets, whole + buckets
        count = 2 if self.zero.get("overlap_comm") else 1
        buckets = count * self._elements("reduce_bucket_size", 5e8)
        if self._offloads("optimizer"):
            return buckets, 0
        partitions = 2 if self.setup.accumulation > 1 else 1
        return buckets + partitions * whole // gpus, (2 * whole + 4 * self.trained) // gpus

    def _elements(self, name: str, otherwise: float) -> int:
        """Bytes of as many numbers as DeepSpeed's config says."""
        return int(self.zero.get(name, otherwise)) * self.setup.computed_in.itemsize

    def _offloads(self, what: str) -> bool:
        return self.zero.get(f"offload_{what}", {}).get("device", "none") != "none"

    # ---- Fake runs

    def training(self, batch: dict) -> Memory:
        """The most that a micro-batch of `TrainingCollator` takes, or the step after it."""
        model, partitioned = self.model.train(), self.zero.get("stage", 0) >= 2
        if self.training_args.gradient_checkpointing:
            model.gradient_checkpointing_enable(self.training_args.gradient_checkpointing_kwargs)
        live = _Live(self.model)

        def keep(parameter: torch.Tensor) -> None:
            live.rename(parameter.grad, "gradients")
            if partitioned:  # it goes into a bucket, see `gradients`
                parameter.grad = None

        with self._counting(live, batch) as batch:
            for parameter in self.learned:
                if self.setup.accumulation > 1 and not partitioned:
                    parameter.grad = torch.empty_like(parameter)
                    live.rename(parameter.grad, "gradients")
                parameter.register_post_accumulate_grad_hook(keep)
            add_packed_mask(batch, self.args)
            model(**batch, use_cache=False).loss.backward()
        in_backward, at_step = self.gradients()
        weights = self.held_weights(self._elements("stage3_max_live_parameters", 1e9))
        held = Memory(weights, optimizer=self.optimizer())
        backward = held._replace(
            gradients=live.peak["gradients"] + in_backward,
            activations=live.peak["activations"] + self.unpacked,
            logits=live.peak["logits"],
        )
        return max(backward, held._replace(gradients=at_step), key=sum)

    @torch.no_grad()
    def evaluation(self, batch: dict) -> Memory:
        """
        The most that prompts of `GenerationCollator` and one token after them take, beside the
        optimizer that training left.
        """
        batch = {name: value for name, value in batch.items() if name != "attention_mask"}
        is_image = batch["input_ids"].flatten() == self.model.config.image_token_id
        batch["image_positions"] = is_image.nonzero()[:, 0]
        if "image_sizes" in batch:
            batch["image_sizes"] = batch["image_sizes"].tolist()
        model, cached = self.model.eval(), {"use_cache": True, "logits_to_keep": 1}
        live = _Live(self.model)
        with self._counting(live, batch) as batch:
            cached[CACHE] = KeyCache()
            model(**batch, **cached)
            model(input_ids=batch["input_ids"][:, -1:], **cached)
        return Memory(
            weights=self.held_weights(self.weights),
            optimizer=self.optimizer(),
            activations=live.peak["activations"] + self.unpacked,
            logits=live.peak["logits"],
        )

    @contextlib.contextmanager
    def _counting(self, live: "_Live", batch: dict) -> Iterator[dict]:
        """The batch on fakes, where `live` counts. The model caches tensors of its own."""
        token_order.cache_clear()
        try:
            with self.fake, torch.device("cpu"), live, self.autocast:
                fakes = {
                    name: self.fake.from_tensor(value) if isinstance(value, torch.Tensor) else value
                    for name, value in batch.items()
                }
                for value in tree_iter(fakes):
                    live.add(value)
                yield fakes
        finally:  # or a run whose count failed would go on with fakes
            token_order.cache_clear()


class _Live(TorchDispatchMode):
    """
    Bytes of the tensors that live, by part, beside the weights; in `peak`, when they were most.

    torch's MemTracker counts so too, with statistics of every module, and does not know logits.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.live, self.peak = Counter(), Counter()
        self.vocab_size = model.config.vocab_size
        # By the storage's address.
        tensors = (*model.parameters(), *model.buffers())
        self.parts = {tensor.untyped_storage()._cdata: "weights" for tensor in tensors}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        for value in tree_iter(output):
            self.add(value)
        return output

    def add(self, tensor: object) -> None:
        """Count a tensor's storage, for as long as it lives."""
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.parts:
            return
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size
        self.parts[key] = "logits" if is_logits else "activations"
        self.live[self.parts[key]] += size
        weakref.finalize(storage, self._drop, key, size).atexit = False
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
