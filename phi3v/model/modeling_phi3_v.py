"""
Phi-3.5-vision for transformers 5: transformers' own Phi-3 and CLIP, and the glue between them.

Shape legend, used in the comments below:
    b: rows of the batch           s: tokens of a row           d: hidden_size of the language model
    n: images of the whole batch   k: crops an image is padded to, the global one included
    c: hidden_size of CLIP         g: patches along one side of a crop (24 at 336 pixels)
    m: side of a crop's grid after 2 x 2 patches are merged into one token (12 at 336 pixels)
"""

from .configuration_phi3_v import Phi3VConfig

# isort: split
from functools import lru_cache
from inspect import signature

import torch
from torch import nn
from transformers import CLIPVisionModel, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.phi3.modeling_phi3 import Phi3Model, Phi3PreTrainedModel
from transformers.utils import can_return_tuple

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


class Phi3VVisionTower(nn.Module):
    """
    CLIP up to its second-to-last layer, without the class token.

    The last layer and `post_layernorm` are in the checkpoint but nobody reads what they compute:
    they are kept, frozen and never run. Transformers' CLIP is the only child, under the name that
    the official checkpoint has for it.
    """

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        self.vision_model = CLIPVisionModel(config.vision_config)
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
        vision_config = config.vision_config
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

    def count_crops(self, image_sizes: torch.Tensor | list) -> list[tuple[int, int]]:
        """
        (rows, columns) of local crops of every image. `image_sizes`: (n, 2), height and width in
        pixels. An image of size 0 x 0 has its global crop alone.

        Raises:
            ValueError: a size is no multiple of the crop size.
        """
        sizes = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
        for height, width in sizes:
            if height % self.crop_size or width % self.crop_size or bool(height) != bool(width):
                raise ValueError(
                    f"image_sizes holds {height} x {width}, which is not a multiple of the crop "
                    f"size {self.crop_size}. It is the size after the HD transform, as the image "
                    "processor returns it."
                )
        return [(height // self.crop_size, width // self.crop_size) for height, width in sizes]

    def count_tokens(self, rows: int, columns: int) -> int:
        """Tokens of an image of `rows` x `columns` local crops, separators included."""
        if rows == 0:
            return 0
        return (rows * columns + 1) * self.crop_side**2 + 1 + (rows + 1) * self.crop_side

    def forward(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """
        Args:
            pixel_values: (n, k, 3, crop_size, crop_size); of every image the global crop, its local
                crops row by row, then padding, which is not computed.
            grids: (rows, columns) of local crops of each of the n images.

        Returns:
            (tokens of all images, d). Of every image its local crops as one picture, line by line,
            `glb_GN`, and the global crop; `sub_GN` ends every line. Of an image of 0 x 0 crops
            nothing, although its global crop is encoded: where several processes train together, a
            batch without images needs one of these, or the gradients of what sees pixels would be
            missing instead of 0, and the other processes would wait for them.
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
        return projected[torch.cat(orders).to(projected.device, non_blocking=True)]


@lru_cache(maxsize=512)
def token_order(rows: int, columns: int, side: int) -> torch.Tensor:
    """
    The rows of an image's features in the order of its tokens, 1-D, with `GLB_GN` and `SUB_GN` for
    the separators.

    Features are numbered by crop (the global one first), line and column inside the crop.
    """
    if rows == 0:
        return torch.empty(0, dtype=torch.long, device="cpu")

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
            found, used = found + image_tokens[used], used + 1
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
    """Phi-3's decoder. Its input embeddings are images' features at the image placeholders."""

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | list
    ) -> torch.Tensor:
        """(n, k, 3, height, width), (n, 2) to the embeddings of all images in turn, (tokens, d)."""
        embedding = self.vision_embed_tokens
        # Transformers' gradient checkpointing makes CLIP's first output require gradients, even of
        # a frozen CLIP. What nothing learns from needs no graph.
        trained = any(parameter.requires_grad for parameter in embedding.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return embedding(pixel_values, embedding.count_crops(image_sizes))

    def image_placeholders(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        (b, s) ids to a (b, s) bool mask. Negative ids are the official processor's placeholders.
        """
        return (input_ids == self.config.image_token_id) | (input_ids < 0)

    def images_per_row(self, input_ids: torch.Tensor, image_sizes: torch.Tensor | list) -> list:
        """
        How many images each row of `input_ids` (b, s) holds.

        Raises:
            ValueError: the images do not fill the placeholders of a row exactly.
        """
        embedding = self.vision_embed_tokens
        grids = embedding.count_crops(image_sizes)
        image_tokens = [embedding.count_tokens(*grid) for grid in grids]
        return assign_images(self.image_placeholders(input_ids).sum(-1).tolist(), image_tokens)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | list,
        image_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(b, s) ids with placeholders and the batch's images to (b, s, d), see `forward`."""
        if image_positions is None:
            self.images_per_row(input_ids, image_sizes)
            image_positions = self.image_placeholders(input_ids).flatten().nonzero()[:, 0]
        inputs_embeds = self.embed_tokens(input_ids.clamp(min=0))
        image_features = self.get_image_features(pixel_values, image_sizes)
        # Unlike masked_scatter, index_copy never waits for the device, its gradient included.
        tokens = inputs_embeds.flatten(0, 1)
        tokens = tokens.index_copy(0, image_positions, image_features.to(tokens.dtype))
        return tokens.view_as(inputs_embeds)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | list | None = None,
        image_positions: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Arguments as in [`Phi3Model.forward`], and:

        Args:
            input_ids: (b, s). `image_token_id` (or a negative id) holds the place of every image
                token.
            pixel_values: (n, k, 3, height, width), the images of all rows one after the other.
            image_sizes: (n, 2), height and width of every image after the HD transform.
            image_positions: (tokens of all images,), where they stand in the flattened `input_ids`.
                With these, and `image_sizes` as a list, nothing is checked or asked of the device.
            cache: the same as `past_key_values`, see `CACHE`.

        Raises:
            ValueError: images and placeholders do not fit.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Set exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None:
            if input_ids is None or image_sizes is None:
                raise ValueError(
                    "pixel_values need input_ids, whose placeholders say where the images stand, "
                    "and image_sizes, as the image processor returns it."
                )
            inputs_embeds = self.embed(input_ids, pixel_values, image_sizes, image_positions)
        elif inputs_embeds is None:
            if image_positions is None and (cache is None or cache.get_seq_length() == 0):
                self.images_per_row(input_ids, [])
            inputs_embeds = self.embed_tokens(input_ids.clamp(min=0))
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )


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
        key_mapping = kwargs.pop("key_mapping", None) or {}
        key_mapping[r"model\.vision_embed_tokens\.wte\.weight"] = "model.embed_tokens.weight"
        loaded = super().from_pretrained(*args, key_mapping=key_mapping, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # The model's own names are the official ones, and saving has nothing to convert back. As of
        # transformers 5.23, `revert_weight_conversion` would turn the alias's renaming round, and
        # under ZeRO-3 rename CLIP's tensors by a rule that loading had not used. This can go when
        # a renaming can be marked as one of loading alone.
        model._weight_conversions = []
        # Loading replaces parameters and generation config, and what __init__ had set of them.
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
        pixel_values: torch.FloatTensor | None = None,
        image_sizes: torch.LongTensor | list | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Arguments as in [`Phi3VModel.forward`], and:

        Args:
            labels: (b, s), the id to predict at every position, -100 where there is none; shifted
                inside.
            logits_to_keep: compute the logits of the last so many positions (0: of all), of these
                positions, (kept,), or of these rows and positions, (2, kept). Labels then have to
                be given as `shift_labels`, one for each logit that is kept.
            kwargs: for transformers' loss `num_items_in_batch` and `shift_labels`, the labels
                already shifted; `image_positions`; all else goes to the layers.

        Returns:
            `logits` (b, s, vocab_size) in the model's dtype; of (2, kept) (kept, vocab_size).
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (b, s, d)
        if isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, slice(-logits_to_keep, None)]
        elif logits_to_keep.ndim == 2:
            hidden_states = hidden_states[tuple(logits_to_keep)]
        else:
            hidden_states = hidden_states[:, logits_to_keep]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

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
            kwargs.pop("position_ids", None)  # of one token
            if attention_mask is not None and attention_mask.ndim == 2:
                kwargs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
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
        """Whether the longest row of `input_ids` (b, s) outgrows the short factors in this step."""
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


__all__ = ["Phi3VForCausalLM", "Phi3VModel", "Phi3VPreTrainedModel"]
