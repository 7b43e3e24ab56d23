"""FLOPs: what training needs of a model, and what a GPU can do at its best."""

import re
from collections import Counter
from collections.abc import Iterator

from torch import nn

from peft import PeftModel

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
# A GPU's memory where its name says no size; of two that there are, the smaller.
GIGABYTES = {
    ("B200",): 180,
    ("H200",): 141,
    ("H100",): 80,
    ("A100",): 40,
    ("A10",): 24,
    ("L40S",): 48,
    ("L4",): 24,
    ("V100",): 16,
    ("RTX", "8000"): 48,
    ("RTX", "4090"): 24,
    ("RTX", "3090"): 24,
}
# Other chips of nearly the same name, and slices of a GPU.
OTHER_CHIPS = {"NVL", "Laptop", "Ti", "D", "MIG"}


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of `torch.cuda.get_device_name()` at its best; None where it is not known."""
    return by_name(PEAK_FLOPS, device_name)


def by_name(table: dict[tuple[str, ...], float], device_name: str) -> float | None:
    """The entry of a table like `PEAK_FLOPS`."""
    words = set(re.split(r"[\s-]+", device_name))
    if words & OTHER_CHIPS:
        return None
    return next((value for name, value in table.items() if words.issuperset(name)), None)


def training_flops(model: nn.Module) -> dict[str, int]:
    """
    FLOPs of a forward and backward pass per token, per pair of a query and a key, per label, and
    per crop.

    These are the FLOPs that training needs, for MFU as in appendix B of the PaLM paper (Chowdhery
    et al., 2022): what gradient checkpointing computes again does not count. A linear layer of m x
    n takes 2 m n per row forward, 2 m n for the gradient of its input, where something trained lies
    before it, and 2 m n for that of its weight, where that is trained. Attention takes 4 FLOPs per
    pair and channel forward, and 8 backward. All else (norms, softmax, RoPE, the two separators of
    a batch) is left out.
    """
    flops = Counter()
    learns = False  # whether gradients come as far back as here
    for unit, rows, step in _forward_steps(model):
        if isinstance(step, int):  # attention: queries times keys, and weights times values
            flops[unit] += rows * 4 * step * (3 if learns else 1)
            continue
        for name, part in step.named_modules():
            # By what the layer says of itself: its weight may be sharded, or packed into 4 bits.
            if isinstance(part, nn.Linear):
                size = part.in_features * part.out_features
            elif isinstance(part, nn.Conv2d):
                size = part.in_channels * part.out_channels * part.kernel_size[0] ** 2
            else:
                continue
            # Of an adapter's two layers, the second one has a trained one before it.
            passes_back = learns or "lora_B" in name
            flops[unit] += rows * 2 * size * (1 + passes_back + part.weight.requires_grad)
        learns = learns or any(parameter.requires_grad for parameter in step.parameters())
    return dict(flops)


def _forward_steps(model: nn.Module) -> Iterator[tuple[str, int, nn.Module | int]]:
    """
    The steps of a forward pass in their order: what they are taken for, the rows of that, and the
    modules that see the same input. A width in their place stands for attention.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, vision = base.model, base.model.vision_embed_tokens
    tower, config = vision.img_processor.vision_model, base.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2
    positions = patches + 1  # one for the class token

    yield "crops", patches, tower.embeddings
    yield "crops", positions, tower.pre_layrnorm
    for layer in tower.encoder.layers[:-1]:  # the last one never runs
        attention, mlp = layer.self_attn, layer.mlp
        yield "crops", positions, layer.layer_norm1
        projections = nn.ModuleList([attention.q_proj, attention.k_proj, attention.v_proj])
        yield "crops", positions, projections
        yield "crops", positions**2, config.hidden_size
        for module in (attention.out_proj, layer.layer_norm2, mlp.fc1, mlp.fc2):
            yield "crops", positions, module
    yield "crops", 0, nn.ParameterList(vision.parameters(recurse=False))  # the separators
    for module in vision.img_projection:
        yield "crops", patches // 4, module  # of 2 x 2 patches

    yield "tokens", 1, decoder.embed_tokens
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield "tokens", 1, layer.input_layernorm
        yield "tokens", 1, attention.qkv_proj
        yield "pairs", 1, base.config.hidden_size
        for module in (attention.o_proj, layer.post_attention_layernorm):
            yield "tokens", 1, module
        for module in (mlp.gate_up_proj, mlp.down_proj):
            yield "tokens", 1, module
    yield "tokens", 1, decoder.norm
    yield "labels", 1, base.lm_head
