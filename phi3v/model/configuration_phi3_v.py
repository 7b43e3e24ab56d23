"""Phi-3.5-vision model configuration: Phi-3's own, plus what describes the vision tower."""

import copy

from transformers import CLIPVisionConfig, Phi3Config
from transformers.utils.versions import require_version

# All four files import this one first, so whichever is loaded says the same.
require_version("transformers>=5.15", "This model's code needs it: pip install -U transformers")

# The vision tower of every published checkpoint, openai/clip-vit-large-patch14-336.
CLIP_VIT_LARGE_PATCH14_336 = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}


class Phi3VConfig(Phi3Config):
    """
    Configuration of [`Phi3VForCausalLM`].

    Reads and writes the official `config.json`: RoPE as `rope_scaling` of type `su` with
    `rope_theta` beside it. Inside, it is transformers' `rope_parameters` of type `longrope`, which
    is the same function under its newer name.

    Args:
        img_processor (`dict`, *optional*):
            The vision tower, as the official config describes it. `num_img_tokens` is the number of
            tokens of one crop, without separators. `clip_config`, absent in the published
            checkpoints, holds arguments of [`CLIPVisionConfig`] for a tower of another size than
            CLIP ViT-L/14 at 336 pixels. `vision_config` is made from it.
        embd_layer (`dict`, *optional*):
            How crops become tokens. Only the layout of Phi-3-vision and Phi-3.5-vision exists: HD
            transform, learnable separators, local crops before the global one.
        image_token_id (`int`, *optional*, defaults to 32044):
            The id that holds an image's place in `input_ids`, the tokenizer's `<|image|>`. The
            official code's negative ids are accepted as well.
    """

    model_type = "phi3_v"
    sub_configs = {"vision_config": CLIPVisionConfig}

    max_position_embeddings: int = 131072
    sliding_window: int | None = 262144
    # What the official config says. The model never emits it, see `Phi3VForCausalLM`.
    eos_token_id: int | list[int] | None = 2
    img_processor: dict | None = None
    embd_layer: dict | None = None
    image_token_id: int = 32044

    def __post_init__(self, **kwargs):
        # How attention is computed is this run's choice, not the checkpoint's: the official
        # config.json says flash_attention_2, which fails where that package is missing.
        kwargs.pop("_attn_implementation", None)
        if kwargs.get("rope_scaling") is not None:
            kwargs["rope_scaling"] = _to_longrope(kwargs["rope_scaling"])
        if self.rope_parameters is not None:
            self.rope_parameters = _to_longrope(self.rope_parameters)
        self.img_processor = {
            "name": "clip_vision_model",
            "model_name": "openai/clip-vit-large-patch14-336",
            "image_dim_out": 1024,
            "num_img_tokens": 144,
            **(self.img_processor or {}),
        }
        self.embd_layer = {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
            **(self.embd_layer or {}),
        }
        clip_config = self.img_processor.get("clip_config") or CLIP_VIT_LARGE_PATCH14_336
        self.vision_config = CLIPVisionConfig(**clip_config)
        super().__post_init__(**kwargs)
        if self.rope_parameters["rope_type"] == "longrope":
            # Stated, because transformers warns where it has to derive it.
            extension = self.max_position_embeddings / self.original_max_position_embeddings
            self.rope_parameters.setdefault("factor", extension)

    def to_dict(self) -> dict:
        output = super().to_dict()
        # `img_processor` says it in the official form, and nothing but that form is written.
        output.pop("vision_config", None)
        # A class can be registered for one Auto class, and is found under both.
        if model_class := (output.get("auto_map") or {}).get("AutoModelForCausalLM"):
            output["auto_map"]["AutoModelForImageTextToText"] = model_class
        rope = output.get("rope_parameters") or {}
        if rope.get("rope_type") == "longrope":
            # Older stacks and other engines know only this form, and insist on these three fields.
            output["rope_scaling"] = {
                "type": "su",
                "long_factor": rope["long_factor"],
                "short_factor": rope["short_factor"],
            }
            output["rope_theta"] = rope["rope_theta"]
            del output["rope_parameters"]
        return output


def _to_longrope(rope: dict) -> dict:
    """A copy of `rope` under transformers' name for `su`; the caller's dict stays as it is."""
    rope = copy.deepcopy(rope)
    rope_type = rope.pop("type", None)
    rope.setdefault("rope_type", rope_type)
    if rope["rope_type"] == "su":
        rope["rope_type"] = "longrope"
    return rope


__all__ = ["Phi3VConfig"]
