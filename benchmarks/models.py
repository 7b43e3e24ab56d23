"""Models with random weights: the full size, one that a CPU can train, and one to try commands."""

from pathlib import Path

import torch

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
# Scaled down as the decoders are; small: an eighth of the width, a sixth of the depth.
CLIPS = {
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


def make_config(size: str) -> Phi3VConfig:
    """The configuration of Phi-3.5-vision (`full`), or scaled down. Same crops and vocabulary."""
    shape, clip = SIZES[size], CLIPS.get(size)
    pairs = shape["hidden_size"] // shape["num_attention_heads"] // 2
    return Phi3VConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"],
        vocab_size=32064,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        # One factor for every pair of rotated channels. Random weights need no particular ones.
        rope_scaling={"type": "su", "short_factor": [1.0] * pairs, "long_factor": [32.0] * pairs},
        img_processor=clip
        and {
            "image_dim_out": clip["hidden_size"],
            "clip_config": {"image_size": 336, "patch_size": 14, **clip},
        },
        bos_token_id=1,
        pad_token_id=32000,
    )


def save_random(size: str, folder: Path, dtype: torch.dtype, device: str) -> None:
    """Write a checkpoint with random weights, and a processor with the demo's tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = make_config(size)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|image|>")
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device(device):
        model = Phi3VForCausalLM._from_config(config, dtype=dtype)
    save_checkpoint(folder, model, Phi3VProcessor(Phi3VImageProcessor(num_crops=16), tokenizer))
