"""Models with random weights: the full size, one that a CPU can train, and one to try commands."""

from functools import cache
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from demo.make_checkpoint import build_tokenizer, save_checkpoint
from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

SIZES = {
    "full": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
# Of CLIP, scaled down as the decoders are; small: an eighth of the width, a sixth of the depth.
CLIPS = {
    "full": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "small": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}


@cache
def make_processor(num_crops: int = 16) -> Phi3VProcessor:
    """A processor with the demo's tokenizer."""
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=num_crops), build_tokenizer())


def make_config(size: str, layers: tuple[int, int] | None = None) -> Phi3VConfig:
    """
    The configuration of Phi-3.5-vision (`full`), or scaled down, with the ids of `make_processor`.
    Same crops and vocabulary.

    Args:
        layers: of the decoder and of CLIP, in place of the size's own.
    """
    shape, clip = dict(SIZES[size]), dict(CLIPS[size])
    if layers is not None:
        shape["num_hidden_layers"], clip["num_hidden_layers"] = layers
    pairs = shape["hidden_size"] // shape["num_attention_heads"] // 2
    tokenizer = make_processor().tokenizer
    return Phi3VConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"],
        vocab_size=32064,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        # One factor for every pair of rotated channels. Random weights need no particular ones.
        rope_scaling={"type": "su", "short_factor": [1.0] * pairs, "long_factor": [32.0] * pairs},
        img_processor={
            "image_dim_out": clip["hidden_size"],
            "clip_config": {"image_size": 336, "patch_size": 14, **clip},
        },
        bos_token_id=1,
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
    )


def random_model(
    config: Phi3VConfig, dtype: torch.dtype, device: str, attention: str = "sdpa"
) -> Phi3VForCausalLM:
    """The same weights in every process, made on the device itself."""
    torch.manual_seed(0)
    with torch.device(device):
        return Phi3VForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)


def quantise(model: Phi3VForCausalLM, settings: BitsAndBytesConfig) -> Phi3VForCausalLM:
    """`model` with the weights of the decoder's layers in 4 bits, as loading makes them."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                packed = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=settings.bnb_4bit_compute_dtype,
                    device="meta",
                )
                # Packed as they are moved, or of a CPU's, with the first use.
                packed.weight = Params4bit(
                    linear.weight.data,
                    requires_grad=False,
                    quant_type=settings.bnb_4bit_quant_type,
                )
                layer.set_submodule(name, packed.to(linear.weight.device))
    model.is_loaded_in_4bit = True  # what PEFT and the Trainer go by
    return model


def save_random(size: str, folder: Path, dtype: torch.dtype, device: str) -> None:
    """Write a checkpoint with random weights, and its processor."""
    save_checkpoint(folder, random_model(make_config(size), dtype, device), make_processor())
