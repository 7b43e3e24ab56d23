"""
Flash attention's functions in plain PyTorch, for machines without its GPUs.

They follow flash-attn 2's documented behaviour, so that what the model hands to them is tested
everywhere. How fast and how exact the real kernels are is not.
"""

import sys
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as utils


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)
) -> torch.Tensor:
    """(b, s, heads, channels) each; causal is aligned to the end, as the real one is."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        mask = mask.tril(keys - queries)
        if window_size[0] >= 0:
            mask = mask.triu(keys - queries - window_size[0])
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=softmax_scale
    )
    return out.transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs
) -> torch.Tensor:
    """(tokens, heads, channels) each; cu_seqlens say where each sequence begins and ends."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max(b - a for a, b in zip(ends_q, ends_q[1:], strict=False)) <= max_seqlen_q
    assert ends_q[-1] == len(q) and ends_k[-1] == len(k)
    parts = [
        flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **kwargs)[0]
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    ]
    return torch.cat(parts)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers find the functions above as the package flash_attn."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func = flash_attn_func
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    for name in ("_flash_attn_can_dispatch", "_flash_attn_2_can_dispatch"):  # by version
        monkeypatch.setattr(PreTrainedModel, name, lambda *args, **kwargs: True, raising=False)


def install_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one of them in the place of torch's kernel for sequences of various lengths."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=None, window_size=(-1, -1)):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and q.dtype == k.dtype == v.dtype
        assert window_size == (-1, 0)
        options = {"softmax_scale": scale, "causal": True}
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
