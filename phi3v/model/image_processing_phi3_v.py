"""
Phi-3.5-vision image processor: the HD transform.

An image is scaled to fill up to `num_crops` crops, padded with white and cut; a small global view
comes first. Pixels are those of the official pipeline (PIL resize, ToTensor, Normalize, torch's
bicubic), bit for bit.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import to_pil_image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageInput
from transformers.processing_utils import ImagesKwargs, Unpack

from .levels import look_up, shrink
from .resize import resize


class Phi3VImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_crops (`int`, *optional*, defaults to 1):
        The most crops an image is cut into. Images are always scaled up to use them, so the number
        of tokens depends on this and on the aspect ratio alone.
    as_levels (`bool`, *optional*, defaults to `False`):
        Return what `join_crops` of the model makes the pixels of: about a quarter of the bytes.
    """

    num_crops: int | None
    as_levels: bool | None


class Phi3VImageProcessor(PilBackend):
    """
    Turns images into crops.

    Args:
        num_crops (`int`, *optional*, defaults to 1): see [`Phi3VImageProcessorKwargs`].
        crop_size (`dict[str, int]`, *optional*, defaults to 336 x 336): the size of a crop, square,
            which is the `image_size` of the vision tower. Its patches have 14 pixels, and 2 x 2 of
            them make a token.
        image_mean, image_std (`list[float]`, *optional*, defaults to CLIP's): per channel, for
            values of 0 to 1.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): the official code always converts;
            False expects RGB.
    """

    valid_kwargs = Phi3VImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]

    num_crops = 1
    as_levels = False
    crop_size = {"height": 336, "width": 336}
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True

    patch_size = 14

    def __init__(self, **kwargs: Unpack[Phi3VImageProcessorKwargs]):
        # In the official preprocessor_config.json; here it follows from the crop size.
        kwargs.pop("num_img_tokens", None)
        super().__init__(**kwargs)

    @property
    def num_img_tokens(self) -> int:
        """Tokens of one crop, without separators: 144 at 336 pixels."""
        return (self.crop_size["height"] // self.patch_size // 2) ** 2

    def to_dict(self) -> dict:
        saved = {**super().to_dict(), "num_img_tokens": self.num_img_tokens}
        saved.pop("as_levels", None)  # a choice of the caller's, not of the checkpoint's
        return saved

    def calc_hd_size(
        self, width: int, height: int, num_crops: int | None = None
    ) -> tuple[int, int]:
        """
        (width, height) in pixels of the padded image that an image of `width` x `height` becomes.

        Raises:
            ValueError: the image is too long and thin for `num_crops`, or empty.
        """
        num_crops = self.num_crops if num_crops is None else num_crops
        size = self.crop_size["height"]
        # A portrait image is handled lying on its side.
        long, short = max(width, height), min(width, height)
        columns, resized = _fit(long, short, num_crops, size)
        padded = math.ceil(resized / size) * size
        return (columns * size, padded) if width >= height else (padded, columns * size)

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """How many tokens an image of `width` x `height` pixels takes."""
        width, height = self.calc_hd_size(width, height)
        return self._count_tokens(height, width)

    def calc_num_image_tokens(self, images: ImageInput) -> list[int]:
        """How many tokens each image takes. Only sizes are looked at."""
        images = self._prepare_images_structure(images)
        return [
            self.calc_num_image_tokens_from_image_size(*_to_pil(image).size) for image in images
        ]

    def _count_tokens(self, height: int, width: int) -> int:
        """
        Tokens of a padded image: its crops, the global one, a separator a line, one between the
        two.
        """
        size, side = self.crop_size["height"], math.isqrt(self.num_img_tokens)
        rows, columns = height // size, width // size
        return (rows * columns + 1) * self.num_img_tokens + 1 + (rows + 1) * side

    def process_image(
        self, image: ImageInput, do_convert_rgb: bool | None = None, **kwargs
    ) -> Image.Image:
        image = _to_pil(image)
        if not do_convert_rgb:
            if image.mode != "RGB":
                raise ValueError(f"An image of mode {image.mode} is not RGB: set do_convert_rgb.")
            return image
        if image.mode == "RGB":
            return image  # PIL would copy it
        try:
            return image.convert("RGB")
        except ValueError as error:
            raise ValueError(
                f"An image of mode {image.mode} cannot be converted to RGB ({error}). Save it as "
                "RGB."
            ) from error

    def _preprocess(
        self,
        images: list[Image.Image],
        num_crops: int,
        as_levels: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Returns:
            `pixel_values`: (images, num_crops + 1, 3, crop_size, crop_size) float32, the global
                crop first, then the local ones row by row, then zeros.
            `image_sizes`: (images, 2), height and width of the padded image.
            `num_img_tokens`: tokens of every image.

            With `as_levels`, `pixel_values` holds the global crops alone, (images, 1, 3, crop_size,
            crop_size). `crop_levels` (local crops of all images, 3, crop_size, crop_size) uint8
            are the others, without padding, and `level_values` (3, 256) float32 the value of every
            channel's levels. Global crops have values between the levels.
        """
        if not num_crops >= 1:
            raise ValueError(f"num_crops is {num_crops}, and must be 1 or more.")
        size = self.crop_size["height"]
        padded = [self._hd_transform(image, num_crops) for image in images]
        values = _level_values(image_mean, image_std)
        views = [shrink(levels, values, size) for levels in padded]
        local = [_cut(levels, size) for levels in padded]
        image_sizes = [list(levels.shape[1:]) for levels in padded]
        data = {
            "image_sizes": image_sizes,
            "num_img_tokens": [self._count_tokens(height, width) for height, width in image_sizes],
        }
        if as_levels:
            data["pixel_values"] = torch.stack(views)[:, None]
            data["crop_levels"] = torch.cat([crops.flatten(0, 1) for crops in local])
            data["level_values"] = values
        else:
            data["pixel_values"] = torch.empty(len(images), num_crops + 1, 3, size, size)
            for crops, view, cut in zip(data["pixel_values"], views, local, strict=True):
                end = 1 + cut.shape[0] * cut.shape[1]
                crops[0] = view
                look_up(cut, values, crops[1:end].view(cut.shape))
                crops[end:] = 0
        return BatchFeature(data, tensor_type=return_tensors)

    def _hd_transform(self, image: Image.Image, num_crops: int) -> torch.Tensor:
        """
        Scale an RGB image to fill up to `num_crops` crops and pad it with white: (3, height, width)
        uint8.
        """
        size = self.crop_size["height"]
        width, height = image.size
        columns, resized = _fit(max(width, height), min(width, height), num_crops, size)
        long, padded = columns * size, math.ceil(resized / size) * size
        first = (padded - resized) // 2
        # The official code lays a portrait image on its side, and PIL scales the longer side first
        # and rounds. Doing so in this order rounds alike, without turning anything.
        if width < height:
            levels = resize(image, resized, long, height_first=True)
            shape, inside = (3, long, padded), np.s_[:, :, first : first + resized]
        else:
            levels = resize(image, long, resized, height_first=False)
            shape, inside = (3, padded, long), np.s_[:, first : first + resized]
        if padded > resized:
            white = np.full(shape, 255, dtype=np.uint8)
            white[inside] = levels
            levels = white
        return torch.from_numpy(levels)


def _to_pil(image: ImageInput) -> Image.Image:
    return image if isinstance(image, Image.Image) else to_pil_image(image)


def _fit(long: int, short: int, num_crops: int, size: int) -> tuple[int, int]:
    """
    The HD transform's choice for a landscape image of `long` x `short` pixels.

    Returns:
        The largest number of columns whose crops fit into `num_crops`, and the height in pixels
        after scaling to them.
        In float64, as the official code: now and then one less than exact arithmetic.

    Raises:
        ValueError: nothing would be left of the height; or the image is empty.
    """
    if short < 1:
        raise ValueError(f"An image of {long} x {short} pixels is empty.")
    ratio = long / short
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= num_crops:
        columns += 1
    resized = int(columns * size / ratio)
    if resized == 0:
        raise ValueError(
            f"An image of {long} x {short} pixels is too long and thin for num_crops={num_crops}: "
            f"scaled to a length of {columns * size} pixels, nothing is left of its other side. "
            "Crop it or raise num_crops."
        )
    return columns, resized


def _cut(image: torch.Tensor, size: int) -> torch.Tensor:
    """(3, height, width) to a view of its crops: (rows, columns, 3, size, size)."""
    _, height, width = image.shape
    crops = image.view(3, height // size, size, width // size, size)
    return crops.permute(1, 3, 0, 2, 4)


def _level_values(image_mean: Sequence[float], image_std: Sequence[float]) -> torch.Tensor:
    """
    The tower's values of the levels 0 to 255, (3, 256) float32; in the steps of ToTensor and
    Normalize, whose rounding is to be kept.
    """
    mean, std = (torch.tensor(values).view(3, 1) for values in (image_mean, image_std))
    return torch.arange(256.0).div(255).sub(mean).div(std)


__all__ = ["Phi3VImageProcessor", "Phi3VImageProcessorKwargs"]
