"""
Phi-3.5-vision image processor: the HD transform.

An image is scaled to fill up to `num_crops` crops, padded with white and cut; a small global view
comes first. Pixels are those of the official pipeline (PIL's resize, ToTensor, Normalize, torch's
bicubic), bit for bit.
"""

from .configuration_phi3_v import Phi3VConfig  # noqa: F401

# isort: split
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import to_pil_image
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageInput,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, Unpack


class Phi3VImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_crops (`int`, *optional*, defaults to 1):
        The most crops an image is cut into. Images are always scaled up to use them, so the number
        of tokens depends on this and on the aspect ratio alone.
    """

    num_crops: int | None


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
        do_convert_rgb (`bool`, *optional*, defaults to `True`): as in the official config; images
            are always converted.
    """

    valid_kwargs = Phi3VImageProcessorKwargs
    model_input_names = ["pixel_values", "image_sizes"]

    num_crops = 1
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
        return {**super().to_dict(), "num_img_tokens": self.num_img_tokens}

    def calc_hd_size(
        self, width: int, height: int, num_crops: int | None = None
    ) -> tuple[int, int]:
        """
        (width, height) in pixels of the padded image that an image of `width` x `height` becomes.

        Raises:
            ValueError: the image is too long and thin for `num_crops`, or empty.
        """
        num_crops = self.num_crops if num_crops is None else num_crops
        return _fit(width, height, num_crops, self.crop_size["height"])[1]

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """How many tokens an image of `width` x `height` pixels takes."""
        width, height = self.calc_hd_size(width, height)
        return self._count_tokens(height, width)

    def calc_num_image_tokens(self, images: ImageInput) -> list[int]:
        """How many tokens each image takes. Only sizes are looked at."""
        return [
            self.calc_num_image_tokens_from_image_size(*_to_pil(image).size)
            for image in make_flat_list_of_images(images)
        ]

    def _count_tokens(self, height: int, width: int) -> int:
        """
        Tokens of a padded image: its crops, the global one, a separator a line, one between the
        two.
        """
        size, side = self.crop_size["height"], math.isqrt(self.num_img_tokens)
        rows, columns = height // size, width // size
        return (rows * columns + 1) * self.num_img_tokens + 1 + (rows + 1) * side

    def process_image(self, image: ImageInput, **kwargs) -> Image.Image:
        image = _to_pil(image)
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
        image_mean: Sequence[float],
        image_std: Sequence[float],
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Returns:
            `pixel_values`: (images, num_crops + 1, 3, crop_size, crop_size) float32, the global
                crop first, then the local ones row by row, then zeros.
            `image_sizes`: (images, 2), height and width of the padded image.
            `num_img_tokens`: tokens of every image.
        """
        if not num_crops >= 1:
            raise ValueError(f"num_crops is {num_crops}, and must be 1 or more.")
        size = self.crop_size["height"]
        pixel_values = torch.empty(len(images), num_crops + 1, 3, size, size)
        image_sizes = []
        for image, crops in zip(images, pixel_values, strict=True):
            page = self._hd_transform(image, num_crops)
            image_sizes.append([page.height, page.width])
            rows, columns = page.height // size, page.width // size
            local = crops[1 : 1 + rows * columns].view(rows, columns, 3, size, size)
            levels = torch.from_numpy(np.array(page))  # (height, width, 3) uint8
            # One channel at a time, in one buffer: new memory for a whole page costs more than the
            # arithmetic, which is that of ToTensor and Normalize.
            plane = torch.empty(page.height, page.width)
            for channel, (mean, std) in enumerate(zip(image_mean, image_std, strict=True)):
                plane.copy_(levels[..., channel]).div_(255).sub_(mean).div_(std)
                crops[0, channel] = torch.nn.functional.interpolate(
                    plane[None, None], size=(size, size), mode="bicubic", align_corners=False
                )[0, 0]
                local[:, :, channel] = plane.view(rows, size, columns, size).transpose(1, 2)
            crops[1 + rows * columns :] = 0
        data = {
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "num_img_tokens": [self._count_tokens(height, width) for height, width in image_sizes],
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _hd_transform(self, image: Image.Image, num_crops: int) -> Image.Image:
        """Scale an RGB image to fill up to `num_crops` crops and pad it with white."""
        resized, padded = _fit(*image.size, num_crops, self.crop_size["height"])
        if image.width < image.height:
            # The official code lays it on its side, where PIL scales what is then the width first,
            # and rounds. The same order gives the same levels, without turning the image.
            image = image.resize((image.width, resized[1]), Image.Resampling.BILINEAR)
        image = image.resize(resized, Image.Resampling.BILINEAR)
        if padded == resized:
            return image
        page = Image.new("RGB", padded, "white")
        page.paste(image, ((padded[0] - resized[0]) // 2, (padded[1] - resized[1]) // 2))
        return page


def _to_pil(image: ImageInput) -> Image.Image:
    return image if isinstance(image, Image.Image) else to_pil_image(image)


def _fit(
    width: int, height: int, num_crops: int, size: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """
    (width, height) to which the HD transform scales an image, and of that padded to whole crops.

    The longer side is as many crops as fit into `num_crops`. In float64, as in the official code:
    now and then one pixel less than exact arithmetic.

    Raises:
        ValueError: nothing would be left of the shorter side; or the image is empty.
    """
    long, short = max(width, height), min(width, height)
    if short < 1:
        raise ValueError(f"An image of {long} x {short} pixels is empty.")
    ratio = long / short
    crops = 1
    while (crops + 1) * math.ceil((crops + 1) / ratio) <= num_crops:
        crops += 1
    resized = crops * size, int(crops * size / ratio)
    if resized[1] == 0:
        raise ValueError(
            f"An image of {long} x {short} pixels is too long and thin for "
            f"num_crops={num_crops}: scaled to a length of {resized[0]} pixels, nothing is left of "
            "its other side. Crop it or raise num_crops."
        )
    padded = resized[0], math.ceil(resized[1] / size) * size
    return (resized, padded) if width >= height else (resized[::-1], padded[::-1])


__all__ = ["Phi3VImageProcessor", "Phi3VImageProcessorKwargs"]
