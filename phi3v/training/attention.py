"""
Attention of a run: by the fastest kernel there is, with a mask only where no kernel does without.

Rows of training have no padding that a token could see, see `TrainingCollator`, so PyTorch's sdpa
takes its flash kernel. Packed rows, and prompts padded on the left, are a flash kernel's for
sequences of various lengths: of the package flash-attn, or PyTorch's own.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peft import PeftModel

# What transformers knows attention by, in the config. It takes a name with "flash" for one of its
# own.
SDPA, FLASH, FLASH_ATTN = "phi3v_sdpa", "phi3v_varlen", "phi3v_varlen_package"
PADDED = "_padded"
SHOWN = {
    SDPA: "sdpa attention",
    FLASH: "flash attention of PyTorch",
    FLASH_ATTN: "flash attention of the package flash-attn",
}


class PaddedRows(NamedTuple):
    """Rows that are padded on the left."""

    lengths: list[int]  # of the b rows, without padding
    positions: torch.Tensor  # (tokens,) of what is no padding in the flattened (b, s)
    cu_seq_lens: torch.Tensor  # (b + 1,) int32, where each row begins among these, and the end


def choose_attention(args: argparse.Namespace) -> str:
    """The name of the attention that the flags ask for and the installed packages allow."""
    if not args.use_flash_attention:
        return SDPA
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception:  # not installed, or built for another torch, which shows in many ways
        return FLASH
    return FLASH_ATTN


def flash(query, key, value, cu_seq_lens, max_length: int, scaling: float) -> torch.Tensor:
    """PyTorch's own kernel: causal attention inside each sequence, (tokens, heads, channels)."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = (cu_seq_lens, cu_seq_lens, max_length, max_length)
    return varlen_attn(query, key, value, *lengths, scale=scaling, window_size=(-1, 0))


def flash_attn(query, key, value, cu_seq_lens, max_length: int, scaling: float) -> torch.Tensor:
    """The same of the package flash-attn."""
    from flash_attn import flash_attn_varlen_func

    lengths = (cu_seq_lens, cu_seq_lens, max_length, max_length)
    return flash_attn_varlen_func(query, key, value, *lengths, softmax_scale=scaling, causal=True)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | PaddedRows | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    kernel: Callable | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    An attention function of transformers: `query`, `key`, `value` (b, heads, s, channels) to
    (b, s, heads, channels).

    Args:
        attention_mask: (b, 1, s, s) bool, or the padding of prompts. None where each token sees all
            before it, or with `cu_seq_lens_q` those of its own sequence.
        cu_seq_lens_q, max_length_q: see `TrainingCollator`.
        kernel: `flash` or `flash_attn`; without one, padding is left out row by row.
    """
    if isinstance(attention_mask, PaddedRows):
        return _attend_padded(module, query, key, value, attention_mask, kernel, **kwargs), None
    if cu_seq_lens_q is None or kernel is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    return kernel(*parts, cu_seq_lens_q, max_length_q, module.scaling)[None], None


def _attend_padded(
    module, query, key, value, rows: PaddedRows, kernel: Callable | None, **kwargs
) -> torch.Tensor:
    """What is no padding, without a mask."""
    output = value.new_zeros(value.shape).transpose(1, 2)  # (b, s, heads, channels)
    if kernel is None:
        for row, length in enumerate(rows.lengths):
            parts = (tensor[row : row + 1, :, -length:] for tensor in (query, key, value))
            output[row, -length:] = sdpa_attention_forward(module, *parts, None, **kwargs)[0][0]
        return output
    parts = (
        tensor.transpose(1, 2).flatten(0, 1)[rows.positions].to(value.dtype)
        for tensor in (query, key, value)
    )
    found = kernel(*parts, rows.cu_seq_lens, max(rows.lengths), module.scaling)
    return output.flatten(0, 1).index_copy(0, rows.positions, found).view(output.shape)


def padded_rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> PaddedRows | torch.Tensor | None:
    """
    A mask function of transformers, once for all layers: padding is asked of the device once, and
    only tokens that follow a padded prompt get a mask.
    """
    if attention_mask is None or q_length != kv_length:
        return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)
    lengths = attention_mask.sum(-1).tolist()
    if min(lengths) == q_length:
        return None
    starts = [sum(lengths[:row]) for row in range(batch_size + 1)]
    return PaddedRows(
        lengths,
        attention_mask.flatten().nonzero()[:, 0],
        torch.tensor(starts, dtype=torch.int32, device=attention_mask.device),
    )


for _name, _kernel in {SDPA: None, FLASH: flash, FLASH_ATTN: flash_attn}.items():
    _attend = partial(attend, kernel=_kernel)
    # Transformers makes no mask for a name without a mask function, nor asks the device for one.
    AttentionInterface.register(_name, _attend)
    AttentionInterface.register(_name + PADDED, _attend)
    AttentionMaskInterface.register(_name + PADDED, padded_rows)


def add_packed_mask(batch: dict, args: argparse.Namespace) -> None:
    """
    Give a packed row, in place, the mask (1, 1, s, s) that sdpa needs: `position_ids` (1, s) begin
    with 0 for each sample. Flash attention needs none.
    """
    if "cu_seq_lens_q" in batch and not args.use_flash_attention:
        sample = (batch["position_ids"] == 0).cumsum(-1)
        batch["attention_mask"] = (sample[:, None, :, None] == sample[:, None, None, :]).tril()


@contextlib.contextmanager
def attending_to_padding(model: torch.nn.Module) -> Iterator[None]:
    """For prompts, which are padded on the left. Training's rows need no mask function."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name = base.config._attn_implementation
    if name not in SHOWN:
        yield
        return
    base.set_attn_implementation(name + PADDED)
    try:
        yield
    finally:
        base.set_attn_implementation(name)
