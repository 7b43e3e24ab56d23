"""
Phi-3.5-vision for transformers 5: transformers' own Phi-3 and CLIP, and the glue between them.

Shape legend, used in the comments below:
    b: rows of the batch           s: tokens of a row           d: hidden_size of the language model
    n: images of the whole batch   k: crops an image is padded to, the global one included
    c: hidden_size of CLIP         g: patches along one side of a crop (24 at 336 pixels)
    m: side of a crop's grid after 2 x 2 patches are merged into one token (12 at 336 pixels)
"""

from functools import lru_cache
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn
from transformers import CLIPVisionModel, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.phi3.modeling_phi3 import (
    Phi3Model,
    Phi3PreTrainedModel,
    Phi3RotaryEmbedding,
)
from transformers.utils import can_return_tuple

from .configuration_phi3_v import Phi3VConfig

# Rows of the separators behind the crops' features, see `Phi3VImageEmbedding.forward`.
GLB_GN, SUB_GN = -2, -1

# </s>, which the official config and generation_config name as the end of generation and which the
# model never emits, and the tokens at which an answer does end: <|endoftext|>, <|assistant|>,
# <|end|>.
OFFICIAL_EOS_TOKEN_ID = 2
STOP_TOKEN_IDS = [32000, 32001, 32007]

# Transformers 5.24 has renamed `past_key_values`, in arguments and outputs; the old name goes with
# 5.40. This file travels with checkpoints, so it takes both and hands on the one that is known.
CACHE = "cache" if "cache" in signature(Phi3Model.forward).parameters else "past_key_values"


class Phi3VRotaryEmbedding(Phi3RotaryEmbedding):
    """Phi-3's RoPE, whose frequencies stay in float32 when the model is cast."""

    def _apply(self, fn, recurse=True):
        # `model.half()`, which DeepSpeed calls as well, would round the frequencies: in bf16, the
        # fastest angle at position 4,000 can be off by more than a full turn.
        exact = {
            name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()
        }
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class Phi3VVisionTower(nn.Module):
    """
    CLIP up to its second-to-last layer, without the class token.

    The last layer and `post_layernorm` are in the checkpoint but nobody reads what they compute:
    they are kept, frozen and never run. Transformers' CLIP is the only child, under the name that
    the official checkpoint has for it.
    """

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        self.vision_model = CLIPVisionModel(config.get_vision_config())
        self.freeze_unused()

    def freeze_unused(self) -> None:
        self.vision_model.encoder.layers[-1].requires_grad_(False)
        self.vision_model.post_layernorm.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (crops, 3, height, width). Returns (crops, g * g, c)."""
        hidden_states = self.vision_model.embeddings(pixel_values)
        hidden_states = self.vision_model.pre_layrnorm(hidden_states)
        for layer in self.vision_model.encoder.layers[:-1]:
            hidden_states = layer(hidden_states, None)
        return hidden_states[:, 1:]


class Phi3VImageEmbedding(nn.Module):
    """Images to token embeddings: CLIP, 2 x 2 merge, separators, projection."""

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        layout = {"hd_transform_order": "sub_glb", "projection_cls": "mlp"}
        unknown = {
            k: v for k, v in config.embd_layer.items() if layout.get(k, v) != v or v is False
        }
        if unknown:
            raise ValueError(f"embd_layer has settings that Phi-3.5-vision does not use: {unknown}")
        vision_config = config.get_vision_config()
        self.crop_size = vision_config.image_size
        self.crop_side = vision_config.image_size // vision_config.patch_size // 2
        merged_size = 4 * vision_config.hidden_size
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged_size))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged_size))
        self.img_processor = Phi3VVisionTower(config)
        self.img_projection = nn.Sequential(
            nn.Linear(merged_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    @property
    def learns(self) -> bool:
        """Whether anything that sees pixels is trained, adapters included."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def count_crops(self, image_sizes: torch.Tensor | list) -> list[tuple[int, int]]:
        """
        (rows, columns) of local crops of every image. `image_sizes`: (n, 2), height and width in
        pixels.
        """
        sizes = _as_list(image_sizes)
        for height, width in sizes:
            if height % self.crop_size or width % self.crop_size or not height or not width:
                raise ValueError(
                    f"image_sizes holds {height} x {width}, which is not a multiple of the crop "
                    f"size {self.crop_size}. It is the size after the HD transform, as the image "
                    "processor returns it."
                )
        return [
            (int(height) // self.crop_size, int(width) // self.crop_size) for height, width in sizes
        ]

    def count_tokens(self, rows: int, columns: int) -> int:
        """Tokens of an image of `rows` x `columns` local crops, separators included."""
        return (rows * columns + 1) * self.crop_side**2 + 1 + (rows + 1) * self.crop_side

    def forward(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """
        Args:
            pixel_values: (n, k, 3, crop_size, crop_size); of every image the global crop, its local
                crops row by row, then padding, which is not computed.
            grids: (rows, columns) of local crops of each of the n images.

        Returns:
            (tokens of all images, d). Of every image its local crops as one picture, line by line,
            `glb_GN`, and the global crop; `sub_GN` ends every line.
        """
        real_crops = [rows * columns + 1 for rows, columns in grids]
        if len(grids) != pixel_values.shape[0] or max(real_crops) > pixel_values.shape[1]:
            raise ValueError(
                f"image_sizes describes {len(grids)} images of up to {max(real_crops)} crops, but "
                f"pixel_values holds {pixel_values.shape[0]} of {pixel_values.shape[1]}."
            )
        m = self.crop_side
        orders, first = [], 0
        for (rows, columns), count in zip(grids, real_crops, strict=True):
            image_order = token_order(rows, columns, m)
            orders.append(torch.where(image_order < 0, image_order, image_order + first))
            first += count * m * m
        # Copied before the tower runs: the copy would wait for its end.
        order = torch.cat(orders).to(pixel_values.device)

        crops = [image[:count] for image, count in zip(pixel_values, real_crops, strict=True)]
        crops = torch.cat(crops) if len(crops) > 1 else crops[0]  # one image's are not copied
        patches = self.img_processor(crops)  # (crops, g * g, c)
        merged = (
            patches.view(len(patches), m, 2, m, 2, -1)
            .transpose(2, 3)
            .reshape(len(patches) * m * m, -1)
        )

        # The projection treats every row alone, so each feature and each separator goes through it
        # once, and the result is then laid out. This is what projecting the laid-out rows gives,
        # for fewer of them.
        separators = torch.stack([self.glb_GN.flatten(), self.sub_GN.flatten()])
        projected = self.img_projection(torch.cat([merged, separators.to(merged.dtype)]))
        return projected[order.to(projected.device)]


def _as_list(image_sizes: torch.Tensor | list) -> list:
    return image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes


@lru_cache(maxsize=512)
def token_order(rows: int, columns: int, side: int) -> torch.Tensor:
    """
    The rows of an image's features in the order of its tokens, 1-D, with `GLB_GN` and `SUB_GN` for
    the separators.

    Features are numbered by crop (the global one first), line and column inside the crop.
    """

    def end_lines(picture: torch.Tensor) -> torch.Tensor:
        return torch.cat([picture, picture.new_full((len(picture), 1), SUB_GN)], dim=1).flatten()

    # On the CPU, whatever the default device: the result is cached.
    crops = torch.arange((rows * columns + 1) * side * side, device="cpu").view(-1, side, side)
    local = (
        crops[1:]
        .view(rows, columns, side, side)
        .transpose(1, 2)
        .reshape(rows * side, columns * side)
    )
    return torch.cat([end_lines(local), crops.new_tensor([GLB_GN]), end_lines(crops[0])])


def join_crops(
    pixel_values: torch.Tensor,
    crop_levels: torch.Tensor,
    level_values: torch.Tensor,
    image_sizes: torch.Tensor | list,
) -> torch.Tensor:
    """
    The crops of n images from what the image processor returns with `as_levels`.

    Args:
        pixel_values: (n, 1, 3, size, size), the global crops.
        crop_levels: (crops, 3, size, size) uint8, the local crops of all images.
        level_values: (3, 256), the value of every channel's levels.
        image_sizes: (n, 2), height and width of every image after the HD transform.

    Returns:
        `pixel_values` (n, k, 3, size, size) as without `as_levels`, bit for bit, with k for the
        image of most crops.
    """
    size = pixel_values.shape[-1]
    counts = [int(h) // size * (int(w) // size) for h, w in _as_list(image_sizes)]
    joined = pixel_values.new_zeros(len(counts), 1 + max(counts), *pixel_values.shape[2:])
    joined[:, 0] = pixel_values[:, 0]
    for image, levels in zip(joined, crop_levels.split(counts), strict=True):
        for channel, values in enumerate(level_values):
            image[1 : 1 + len(levels), channel] = values[levels[:, channel].int()]
    return joined


def labelled_positions(labels: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Of (b, s) labels, where the next position has a label, as indices into b * s, and these labels:
    both (labels,).
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    positions = (targets != -100).nonzero().squeeze(-1)
    return positions, targets[positions]


def _turn(rows: torch.Tensor, steps: list[int], dim: int) -> torch.Tensor:
    """Every row of a (b, ...) batch, rolled to the right along its `dim` by its own `steps`."""
    return torch.stack([row.roll(count, dim) for row, count in zip(rows, steps, strict=True)])


def _put_padding_back(outputs: BaseModelOutputWithPast, paddings: list[int]) -> None:
    """Turn what was computed of rows without padding before them to where the caller had them."""
    outputs.last_hidden_state = _turn(outputs.last_hidden_state, paddings, 0)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(_turn(h, paddings, 0) for h in outputs.hidden_states)
    if outputs.get(CACHE) is not None:
        for layer in outputs[CACHE].layers:  # (b, heads, s, head_dim)
            layer.keys = _turn(layer.keys, paddings, 1)
            layer.values = _turn(layer.values, paddings, 1)


def assign_images(placeholders: list[int], image_tokens: list[int]) -> list[int]:
    """
    How many of the batch's images belong to each row.

    Args:
        placeholders: number of image placeholders of every row.
        image_tokens: number of tokens of every image, in the order of the rows.

    Raises:
        ValueError: the images do not fill the placeholders of a row exactly.
    """
    counts, used = [], 0
    for row, wanted in enumerate(placeholders):
        first, found = used, 0
        while found < wanted and used < len(image_tokens):
            found += image_tokens[used]
            used += 1
        if row == len(placeholders) - 1:
            found, used = found + sum(image_tokens[used:]), len(image_tokens)
        if found != wanted:
            raise ValueError(
                f"Sample {row} of the batch has {wanted} image placeholders in input_ids, but its "
                f"images give {found} features. Were pixel_values and image_sizes made with the "
                "same text and num_crops?"
            )
        counts.append(used - first)
    return counts


class Phi3VPreTrainedModel(Phi3PreTrainedModel):
    config: Phi3VConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["Phi3DecoderLayer", "CLIPEncoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Phi3VImageEmbedding):
            nn.init.zeros_(module.glb_GN)
            nn.init.zeros_(module.sub_GN)


class Phi3VModel(Phi3VPreTrainedModel, Phi3Model):
    """
    Phi-3's decoder, whose input embeddings hold image features where the ids hold image
    placeholders.
    """

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.rotary_emb = Phi3VRotaryEmbedding(config)
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor
    ) -> torch.Tensor:
        """
        (n, k, 3, height, width) and (n, 2) to the embeddings of all images, one after the other:
        (tokens, d).
        """
        return self.vision_embed_tokens(
            pixel_values, self.vision_embed_tokens.count_crops(image_sizes)
        )

    def image_placeholders(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        (b, s) ids to a (b, s) bool mask. Negative ids are the official processor's placeholders.
        """
        return (input_ids == self.config.image_token_id) | (input_ids < 0)

    def images_per_row(self, input_ids: torch.Tensor, image_sizes: torch.Tensor) -> list[int]:
        """
        How many images each row of `input_ids` (b, s) holds. Raises ValueError where they do not
        fit.
        """
        embedding = self.vision_embed_tokens
        image_tokens = [
            embedding.count_tokens(*grid) for grid in embedding.count_crops(image_sizes)
        ]
        return assign_images(self.image_placeholders(input_ids).sum(-1).tolist(), image_tokens)

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_sizes: torch.Tensor
    ) -> torch.Tensor:
        """(b, s) ids with placeholders and the batch's images to (b, s, d)."""
        embedding = self.vision_embed_tokens
        grids = embedding.count_crops(image_sizes)
        placeholders = self.image_placeholders(input_ids)
        assign_images(
            placeholders.sum(-1).tolist(), [embedding.count_tokens(*grid) for grid in grids]
        )
        inputs_embeds = self.embed_tokens(input_ids.clamp(min=0))
        # Transformers' gradient checkpointing makes CLIP's first output require gradients, even of
        # a frozen CLIP. What nothing learns from needs no graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and embedding.learns):
            image_features = embedding(pixel_values, grids)
        return inputs_embeds.masked_scatter(
            placeholders[..., None], image_features.to(inputs_embeds.dtype)
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (b, s). `image_token_id` (or a negative id) holds the place of every image
                token.
            attention_mask: (b, s) of 1 for real tokens; padding left or right. Or a mask that the
                attention implementation takes as it is.
            position_ids: (b, s). By default a row counts from 0 at its first real token.
            pixel_values: (n, k, 3, height, width), the images of all rows one after the other.
            image_sizes: (n, 2), height and width of every image after the HD transform.
            cache: the same as `past_key_values`, see `CACHE`.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Set exactly one of input_ids and inputs_embeds.")
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # Counted from a row's first token, so that padding on the left does not change the row.
            # Gaps further on count: that is how the official code numbers them.
            padding = (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)
            position_ids = (
                torch.arange(attention_mask.shape[1], device=attention_mask.device) - padding
            )
            position_ids = position_ids.clamp(min=0)[:, -length:]
        paddings = self._paddings(attention_mask, position_ids, cache)

        if pixel_values is not None:
            if input_ids is None:
                raise ValueError(
                    "pixel_values need input_ids, whose placeholders say where the images stand."
                )
            if image_sizes is None:
                raise ValueError(
                    "pixel_values need image_sizes, as the image processor returns it."
                )
            inputs_embeds = self.embed(input_ids, pixel_values, image_sizes)

        past_length = cache.get_seq_length() if cache is not None else 0
        if inputs_embeds is None:
            if past_length == 0:
                self.images_per_row(input_ids, [])
            inputs_embeds = self.embed_tokens(input_ids.clamp(min=0))
        if pixel_values is None and self._all_ranks_must_see(past_length):
            size = self.vision_embed_tokens.crop_size
            blank = inputs_embeds.new_zeros(1, 2, 3, size, size)
            inputs_embeds = inputs_embeds + 0 * self.vision_embed_tokens(blank, [(1, 1)]).sum()

        if paddings is not None:
            # Padding on the right needs no mask: no token looks to its right.
            attention_mask = None
            position_ids = torch.arange(length, device=inputs_embeds.device)[None]
            if any(paddings):
                inputs_embeds = _turn(inputs_embeds, [-count for count in paddings], 0)
        elif self.config._attn_implementation == "sdpa" and inputs_embeds.shape[1] > 1:
            attention_mask = self._additive_mask(inputs_embeds, attention_mask, cache, position_ids)

        outputs = super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        if paddings is not None and any(paddings):
            _put_padding_back(outputs, paddings)
        return outputs

    def _paddings(
        self,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> list[int] | None:
        """
        How many tokens of padding stand before each row, where causal attention alone can do.

        It can where a row is padding, its tokens, padding; the longest row has none; and nothing
        is cached yet. Otherwise None. Attention without a mask skips what lies above the diagonal,
        and flash attention does not take the rows out of the batch in every layer.
        """
        implementation = self.config._attn_implementation or ""
        growing = cache is None or type(cache) is DynamicCache
        if (
            attention_mask is None
            or attention_mask.ndim != 2
            or position_ids is None
            or position_ids.shape[1] != attention_mask.shape[1]
            or not growing
            or not (implementation == "sdpa" or implementation.startswith("flash_attention"))
        ):
            return None
        real = attention_mask != 0
        lengths, paddings = real.sum(-1), (real.cumsum(-1) == 0).sum(-1)
        columns = torch.arange(real.shape[1], device=real.device) - paddings[:, None]
        plain = (columns >= 0) & (columns < lengths[:, None]) == real
        plain &= (position_ids == columns) | ~real
        fits = plain.all() & (lengths.max() == real.shape[1])
        *paddings, fits = torch.cat([paddings, fits[None]]).tolist()
        return paddings if fits else None

    def _additive_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """
        The (b, 1, s, keys) mask that sdpa adds to its scores, made from transformers' bool mask: of
        a bool mask sdpa would make it in every layer. Where transformers makes no mask, or one that
        sdpa can add, `attention_mask` is returned as it is, for transformers to do so again.
        """
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        if mask is None or mask.dtype != torch.bool:
            return attention_mask
        dtype = inputs_embeds.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    def _all_ranks_must_see(self, past_length: int) -> bool:
        """
        Whether a batch without images has to go through the vision tower all the same.

        Ranks meet in collectives, for gradients (DDP, ZeRO) and for parameters (ZeRO-3). A rank
        that skips the tower while another runs it makes both wait for ever. DDP misses gradients of
        a single rank as well.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return False
        if is_deepspeed_zero3_enabled() and past_length == 0:
            return True
        return self.training and torch.is_grad_enabled() and self.vision_embed_tokens.learns


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    """Phi-3.5-vision with its language modelling head."""

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._stop_where_answers_end()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "Phi3VForCausalLM":
        # The official checkpoints hold the token embedding under a second name too. It is read, in
        # case it is the only one, and not written again.
        alias = r"model\.vision_embed_tokens\.wte\.weight"
        key_mapping = {
            **(kwargs.pop("key_mapping", None) or {}),
            alias: "model.embed_tokens.weight",
        }
        loaded = super().from_pretrained(*args, key_mapping=key_mapping, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # The model's own names are the official ones: saving converts nothing back. Under ZeRO-3 it
        # would, and rename CLIP's tensors by a rule that loading had not used.
        model._weight_conversions = []
        # Loading replaces parameters and the generation config, and with them what __init__ had
        # set.
        model.model.vision_embed_tokens.img_processor.freeze_unused()
        model._stop_where_answers_end()
        return loaded

    def _stop_where_answers_end(self) -> None:
        if self.generation_config.eos_token_id == OFFICIAL_EOS_TOKEN_ID:
            self.generation_config.eos_token_id = list(STOP_TOKEN_IDS)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        crop_levels: torch.ByteTensor | None = None,
        level_values: torch.FloatTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Inputs as in [`Phi3VModel.forward`], and:

        Args:
            labels: (b, s), the id to predict at every position, -100 where there is none; shifted
                inside.
            crop_levels, level_values: with the global crops alone as `pixel_values`, the local
                crops, see `join_crops`.
            logits_to_keep: compute the logits of the last so many positions (0: of all), or of
                these positions.
            num_items_in_batch: what the summed loss is divided by, instead of the number of labels
                in this call; the Trainer passes the number of labels of the whole optimizer step.

        Returns:
            `logits` (b, s, vocab_size), in the model's dtype. In training with labels they are
            None: the head then runs only where there is a label, which spares the memory of s x
            vocab_size logits.
        """
        # The host waits for the device wherever it reads from it. So all is read before the layers
        # run, here and in the model, and the sizes once.
        if labels is not None:
            positions, targets = labelled_positions(labels)
        if crop_levels is not None:
            image_sizes = _as_list(image_sizes)
            pixel_values = join_crops(pixel_values, crop_levels, level_values, image_sizes)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            cache=cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (b, s, d)
        loss = logits = None
        if labels is not None:
            loss = self._loss(hidden_states, positions, targets, num_items_in_batch)
        if labels is None or not self.training:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden_states[:, kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def _loss(
        self,
        hidden_states: torch.Tensor,
        positions: torch.LongTensor,
        targets: torch.LongTensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Cross entropy in float32 of (b, s, d) at `labelled_positions`."""
        device = hidden_states.device
        rows = hidden_states.flatten(0, 1).index_select(0, positions.to(device))
        logits = self.lm_head(rows).float()  # (labels, vocab_size)
        loss = nn.functional.cross_entropy(logits, targets.to(device), reduction="sum")
        # A batch without labels has loss 0, and gradients of 0, not of 0 / 0.
        count = max(targets.numel(), 1) if num_items_in_batch is None else num_items_in_batch
        return loss / (count.to(device) if isinstance(count, torch.Tensor) else count)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        pixel_values=None,
        image_sizes=None,
        cache=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        # Past 4,096 tokens RoPE uses its long factors, for all positions. Keys cached under the
        # short ones do not fit then: drop them, and compute the whole prompt, images included, once
        # more.
        switches = cache is not None and self._switches_to_long_factors(
            input_ids, cache.get_seq_length(), attention_mask
        )
        if switches:
            cache = None
            kwargs["next_sequence_length"] = None
            kwargs.pop("position_ids", None)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            **{CACHE: cache},
            **kwargs,
        )
        if switches:
            model_inputs.update(pixel_values=pixel_values, image_sizes=image_sizes)
        return model_inputs

    def _switches_to_long_factors(
        self, input_ids: torch.Tensor, past_length: int, attention_mask: torch.Tensor | None
    ) -> bool:
        """
        Whether the longest row of `input_ids` (b, s) outgrows the short factors with the tokens not
        yet cached.
        """
        limit = self.config.original_max_position_embeddings
        length = input_ids.shape[1]
        if length <= limit or past_length == 0:
            return False
        new_tokens = length - past_length
        if attention_mask is not None and attention_mask.ndim == 2:
            length = int(attention_mask.sum(-1).max())
        return length - new_tokens <= limit < length

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs
    ):
        # The parent repeats every tensor along its first dimension. The images' is not the rows':
        # all images of a row have to be repeated together.
        pixel_values = model_kwargs.pop("pixel_values", None)
        image_sizes = model_kwargs.pop("image_sizes", None)
        images_per_row = None
        if pixel_values is not None and expand_size > 1:
            images_per_row = self.model.images_per_row(input_ids, image_sizes)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if images_per_row is not None:
            indices = torch.arange(len(pixel_values)).split(images_per_row)
            order = torch.cat([row for row in indices for _ in range(expand_size)])
            pixel_values = pixel_values[order.to(pixel_values.device)]
            image_sizes = image_sizes[order.to(image_sizes.device)]
        if pixel_values is not None:
            model_kwargs.update(pixel_values=pixel_values, image_sizes=image_sizes)
        return input_ids, model_kwargs


__all__ = ["Phi3VForCausalLM", "Phi3VModel", "Phi3VPreTrainedModel", "join_crops"]
