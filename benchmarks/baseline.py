"""
The textbook baseline: what the official code computes, the way it computes it.

PIL resize, float tensor and normalisation of the whole image, the global crop from that by bicubic,
padding to num_crops + 1 crops; all CLIP layers over all crops, padding included; eager attention;
float32 logits at every position; generation one sample at a time. Weights, names and results are
those of `phi3v`: tests/test_benchmarks.py holds both against the same reference numbers.

Where it is kinder than the official code, it is so in our disfavour: cos and sin of RoPE are
computed once a forward, not once a layer.
"""

import math

import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_outputs import CausalLMOutputWithPast

from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.model.modeling_phi3_v import Phi3VImageEmbedding

from peft import PeftModel

CROP = 336


def preprocess(images: list[Image.Image], num_crops: int) -> dict[str, torch.Tensor]:
    """
    Images to `pixel_values` (n, num_crops + 1, 3, 336, 336) float32 and `image_sizes` (n, 2), as
    `Phi3VImageProcessor` gives them.
    """
    pixel_values, image_sizes = [], []
    for image in images:
        tensor = functional.to_tensor(hd_transform(image.convert("RGB"), num_crops))
        tensor = functional.normalize(tensor, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        _, height, width = tensor.shape
        view = nn.functional.interpolate(tensor[None], size=(CROP, CROP), mode="bicubic")
        local = tensor.reshape(3, height // CROP, CROP, width // CROP, CROP)
        local = local.permute(1, 3, 0, 2, 4).reshape(-1, 3, CROP, CROP)
        crops = torch.cat([view, local])
        padding = torch.zeros(num_crops + 1 - len(crops), 3, CROP, CROP)
        pixel_values.append(torch.cat([crops, padding]))
        image_sizes.append([height, width])
    return {"pixel_values": torch.stack(pixel_values), "image_sizes": torch.tensor(image_sizes)}


def hd_transform(image: Image.Image, num_crops: int) -> Image.Image:
    """Scale to fill up to `num_crops` crops, lying on the side where portrait; pad with white."""
    portrait = image.width < image.height
    if portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    columns = 1
    while columns * math.ceil(columns / ratio) <= num_crops:
        columns += 1
    columns -= 1
    width, height = columns * CROP, int(columns * CROP / ratio)
    image = functional.resize(image, [height, width])
    padded = math.ceil(height / CROP) * CROP
    top = (padded - height) // 2
    image = functional.pad(image, [0, top, 0, padded - height - top], fill=255)
    return image.transpose(Image.Transpose.TRANSPOSE) if portrait else image


class BaselineImageEmbedding(Phi3VImageEmbedding):
    """All crops through all of CLIP; every row of the layout through the projection."""

    def forward(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        n, k = pixel_values.shape[:2]
        vision = self.img_processor.vision_model
        states = [vision.pre_layrnorm(vision.embeddings(pixel_values.flatten(0, 1)))]
        for layer in vision.encoder.layers:
            states.append(layer(states[-1], None))
        vision.post_layernorm(states[-1][:, 0])
        patches = states[-2][:, 1:]
        m = self.crop_side
        merged = patches.reshape(n, k, m, 2, m, 2, -1).transpose(4, 3).reshape(n, k, m, m, -1)
        rows = []
        for image, (height, width) in zip(merged, grids, strict=True):
            local = image[1 : 1 + height * width].reshape(height, width, m, m, -1)
            local = local.transpose(1, 2).reshape(height * m, width * m, -1)
            rows += [self._end_lines(local), self.glb_GN[0], self._end_lines(image[0])]
        return self.img_projection(torch.cat(rows))

    def _end_lines(self, picture: torch.Tensor) -> torch.Tensor:
        """(lines, columns, c) with `sub_GN` behind every line, flat."""
        ends = self.sub_GN[0].expand(len(picture), 1, -1)
        return torch.cat([picture, ends], dim=1).flatten(0, 1)


class BaselineForCausalLM(Phi3VForCausalLM):
    """The official forward: load it with `attn_implementation="eager"`."""

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.model.vision_embed_tokens = BaselineImageEmbedding(config)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **inputs,
    ) -> CausalLMOutputWithPast:
        """`logits_to_keep` is not followed: the official code computes all logits."""
        outputs = self.model(input_ids=input_ids, **inputs)
        logits = self.lm_head(outputs.last_hidden_state).float()
        loss = None
        if labels is not None:
            shifted = logits[:, :-1].contiguous().view(-1, logits.shape[-1])
            loss = nn.functional.cross_entropy(shifted, labels[:, 1:].contiguous().view(-1))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def use_side(model: Phi3VForCausalLM | PeftModel, side: str, attention: str) -> None:
    """
    Let a model that was loaded as ours compute as the `side` does, "ours" with this `attention` or
    "baseline", with the same weights. The two have no state but these.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    classes = {
        "ours": (Phi3VForCausalLM, Phi3VImageEmbedding),
        "baseline": (BaselineForCausalLM, BaselineImageEmbedding),
    }
    base.__class__, base.model.vision_embed_tokens.__class__ = classes[side]
    base.set_attn_implementation("eager" if side == "baseline" else attention)
