"""
Phi-3.5-vision image processor: the HD transform.

An image is scaled to fill up to `num_crops` crops, padded with white and cut; a small global view
comes first. Pixels are those of the official pipeline (PIL resize, ToTensor, Normalize, torch's
bicubic), bit for bit.
"""

import math

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import to_pil_image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageInput
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
        do_convert_rgb (`bool`, *optional*, defaults to `True`): the official code always converts;
            False expects RGB.
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
        """
        if not num_crops >= 1:
            raise ValueError(f"num_crops is {num_crops}, and must be 1 or more.")
        size = self.crop_size["height"]
        table = _normalisation_table(image_mean, image_std)
        pixel_values = torch.zeros(len(images), num_crops + 1, 3, size, size)
        image_sizes = []
        for crops, image in zip(pixel_values, images, strict=True):
            padded = self._hd_transform(image, num_crops)
            height, width = padded.shape[:2]
            normalised = _normalise(padded, table)  # (3, height, width)
            crops[0] = _global_view(normalised, size)
            rows, columns = height // size, width // size
            local = normalised.view(3, rows, size, columns, size).permute(1, 3, 0, 2, 4)
            crops[1 : 1 + rows * columns].view(rows, columns, 3, size, size).copy_(local)
            image_sizes.append([height, width])
        data = {
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "num_img_tokens": [self._count_tokens(height, width) for height, width in image_sizes],
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _hd_transform(self, image: Image.Image, num_crops: int) -> np.ndarray:
        """
        Scale an RGB image to fill up to `num_crops` crops and pad it with white: (height, width, 3)
        uint8.
        """
        portrait = image.width < image.height
        if portrait:
            # PIL's resize is not the same along both axes to the last bit, so the detour matters.
            image = image.transpose(Image.Transpose.TRANSPOSE)
        size = self.crop_size["height"]
        columns, resized = _fit(image.width, image.height, num_crops, size)
        image = image.resize((columns * size, resized), Image.Resampling.BILINEAR)
        padded = np.full((math.ceil(resized / size) * size, columns * size, 3), 255, dtype=np.uint8)
        top = (len(padded) - resized) // 2
        padded[top : top + resized] = image
        return padded.transpose(1, 0, 2) if portrait else padded


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


def _normalisation_table(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """
    (3, 256) float32, every channel's value for every level, computed as ToTensor and Normalize do.
    """
    levels = torch.arange(256, dtype=torch.uint8).float().div(255)
    mean, std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    return levels.sub(mean[:, None]).div(std[:, None])


def _normalise(image: np.ndarray, table: torch.Tensor) -> torch.Tensor:
    """(height, width, 3) uint8 to (3, height, width) float32 by table look-up."""
    channels = [levels.numpy()[image[:, :, i]] for i, levels in enumerate(table)]
    return torch.from_numpy(np.stack(channels))


def _global_view(image: torch.Tensor, size: int) -> torch.Tensor:
    """
    (3, height, width) to (3, size, size): torch's bicubic without antialiasing, as the official
    global view.
    """
    return torch.nn.functional.interpolate(
        image[None], size=(size, size), mode="bicubic", align_corners=False
    )[0]


__all__ = ["Phi3VImageProcessor", "Phi3VImageProcessorKwargs"]
