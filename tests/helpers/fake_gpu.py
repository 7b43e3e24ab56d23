"""
A GPU that is not there: tensors with the shapes, dtypes and device of a run, and without values.

Torch's FakeTensorMode finds what would fail on a GPU: tensors of two devices or dtypes that meet,
and every question to the device, to which a fake tensor has no answer.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from phi3v.model.modeling_phi3_v import token_order

CUDA = torch.device("cuda", 0)
# Operators whose result, or its shape, the host has to wait for.
READS = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
    "aten._unique2.default",
    "aten.repeat_interleave.Tensor",
}


class Kernels(TorchFunctionMode):
    """
    Lets sdpa take the kernel that it takes on an Ampere GPU or newer, with cuDNN off: flash for 16
    bits without a mask, else the memory-efficient one. Without a GPU it would take none.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value = args
        mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
        if torch.is_autocast_enabled("cuda"):
            low = torch.get_autocast_dtype("cuda")
            query, key, value = (tensor.to(low) for tensor in (query, key, value))
        assert query.dtype == key.dtype == value.dtype and key.shape == value.shape
        options = {"is_causal": causal, "scale": kwargs.get("scale")}
        if mask is None and query.dtype in (torch.float16, torch.bfloat16):
            operator = torch.ops.aten._scaled_dot_product_flash_attention
            return operator(query, key, value, **options)[0]
        if mask is not None:
            mask = torch.zeros_like(mask, dtype=query.dtype)
        operator = torch.ops.aten._scaled_dot_product_efficient_attention
        return operator(query, key, value, mask, compute_log_sumexp=True, **options)[0]


class Watch(TorchDispatchMode):
    """
    Counts operators, and notes those that ask the device, a fake GPU or a real `device`. Of a fake
    one, it answers.
    """

    def __init__(self, device: str = "cuda"):
        super().__init__()
        self.device = device
        self.operators: Counter = Counter()
        self.reads: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, kwargs = str(operator), kwargs or {}
        self.operators[name] += 1
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        asked = any(tensor.device.type == self.device for tensor in tensors)
        by_mask = name.startswith("aten.index") and any(t.dtype == torch.bool for t in tensors[1:])
        to = kwargs.get("device")
        moved = name == "aten._to_copy.default" and to and torch.device(to) != tensors[0].device
        if asked and (name in READS or by_mask) or (moved and not kwargs.get("non_blocking")):
            self.reads.append(name)
        if name == "aten._local_scalar_dense.default" and tensors[0].device == CUDA:
            return args[0].dtype == torch.bool or 1
        return operator(*args, **kwargs)

    def attention(self) -> dict[str, int]:
        """How often each kernel of attention ran forward."""
        known = {
            "aten._scaled_dot_product_flash_attention.default": "flash",
            "aten._scaled_dot_product_efficient_attention.default": "efficient",
            "torch_attn._varlen_attn.default": "varlen",
        }
        return {known[name]: n for name, n in self.operators.items() if name in known}


def to_gpu(value):
    """What is made of real tensors, as fake ones on the GPU. Others are handed on as they are."""
    return tree_map(
        lambda x: x.to(CUDA, non_blocking=True) if isinstance(x, torch.Tensor) else x, value
    )


def backward(loss: torch.Tensor) -> None:
    """
    Fill `.grad` as `loss.backward()` does, node by node. Autograd's engine takes no tensors of a
    GPU that is not there (torch 2.14, "hasPrimaryContext expects a valid device index").
    """
    waiting: Counter = Counter()
    seen, open_nodes = {loss.grad_fn}, [loss.grad_fn]
    while open_nodes:
        for node, _ in open_nodes.pop().next_functions:
            waiting[node] += 1
            if node is not None and node not in seen:
                seen.add(node)
                open_nodes.append(node)
    gradients: dict = defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    ready = [loss.grad_fn]
    # Checkpoints compute a layer again once for each such number.
    with mock.patch("torch._C._current_graph_task_id", return_value=1), torch.no_grad():
        while ready:
            node = ready.pop()
            given = gradients.pop(node, None)
            found = (None,) * len(node.next_functions)
            if given is not None:
                # A Function that is written in Python is not called, but applied.
                call = node if callable(node) else node.apply
                found = call(*(given.get(place) for place in range(len(node._input_metadata))))
                found = found if isinstance(found, tuple) else (found,)
            # A Function gives None for its arguments that are no tensors, which come last.
            for gradient, (following, place) in zip(found, node.next_functions, strict=False):
                if following is None:
                    continue
                if gradient is not None:
                    wanted = following._input_metadata[place]
                    assert gradient.device == wanted.device
                    gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                    before = gradients[following].get(place)
                    gradients[following][place] = gradient if before is None else before + gradient
                waiting[following] -= 1
                if waiting[following] == 0:
                    ready.append(following)


def move(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with fake parameters and buffers on the GPU, in place."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            fake = torch.nn.Parameter(torch.empty_like(value, device=CUDA), value.requires_grad)
            module.register_parameter(name, fake)
        for name, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty_like(value, device=CUDA), persistent=False)
    return model


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """In here, new tensors are fake, and on the GPU unless a place is named."""
    with (
        # Without a GPU, autocast would switch itself off.
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device(CUDA),
        Kernels(),
    ):
        try:
            yield
        finally:  # the model would keep fakes for the tests that follow
            token_order.cache_clear()
