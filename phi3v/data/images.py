"""
Images of records: opened, and looked at before the start.

The look is cheap. It takes a file's header and last bytes, and decodes only what it is not sure of.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from ..errors import DataError, first_line, quoted
from ..model.image_processing_phi3_v import Phi3VImageProcessor

TAIL_BYTES = 64

# Pillow goes by a file's content alone, and knows formats that are programs: EPS for Ghostscript.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX"),
    "QOI",
)
# The modes whose RGB is what a viewer shows. Pillow clips wider ones (I;16, I, F), to white mostly.
MODES = {
    *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"),
}
NO_IMAGE = f"it is no image of a known format ({', '.join(FORMATS)}), or it is broken"


def load_images(
    record: dict, image_processor: Phi3VImageProcessor | None = None
) -> list[Image.Image]:
    """
    All images of a record, in order, decoded.

    Args:
        image_processor: where it is given, the images have to fit its HD transform.

    Raises:
        DataError: an image cannot be read or used; with the sample's id, the field and the path.
    """
    return _read_all(record, image_processor, lambda image, file: image.load())


def check_images(record: dict, image_processor: Phi3VImageProcessor) -> list[tuple[int, int]]:
    """
    Look for what is wrong with a record's images, cheaply. Errors as `load_images`.

    Returns:
        (width, height) of each.
    """
    return [image.size for image in _read_all(record, image_processor, _decode_if_suspicious)]


def image_sizes(record: dict) -> list[tuple[int, int]]:
    """(width, height) of a record's images, by their headers. Errors as `load_images`."""
    return [image.size for image in _read_all(record, None, lambda image, file: None)]


def image_source(image: object) -> object:
    """The bytes or the path of an image that `datasets` has not decoded; others as they are."""
    if not isinstance(image, dict):
        return image
    content = image.get("bytes")
    return image.get("path") if content is None else content


Look = Callable[[Image.Image, BinaryIO | None], object]


def _read_all(
    record: dict, image_processor: Phi3VImageProcessor | None, look: Look
) -> list[Image.Image]:
    images = []
    for turn, content in enumerate(record["conversations"]):
        for number, image in enumerate(content["images"]):
            try:
                images.append(_read(image_source(image), image_processor, look))
            except DataError as error:
                raise DataError(
                    f"sample {quoted(record['id'])}, conversations[{turn}].images[{number}]: "
                    f"{error} Replace the image or remove the sample."
                ) from None
    return images


def _read(image: object, image_processor: Phi3VImageProcessor | None, look: Look) -> Image.Image:
    """Open an image and let `look` at it and at its file."""
    name = str(image) if isinstance(image, str | os.PathLike) else "the image"
    name = name if name.isprintable() and len(name) < 1000 else quoted(name)
    try:
        with _opened(image) as (opened, file):
            # MPO is a JPEG of several pictures; an image that was made in memory has no format.
            if opened.format not in (*FORMATS, "MPO", None):
                raise DataError(NO_IMAGE)
            look(opened, file)
        if opened.mode not in MODES:
            raise DataError(
                f"it is not of 8 bits per channel (Pillow's mode {opened.mode}), and as RGB most "
                "of it would turn white or black. Convert it: magick IN -depth 8 OUT.png"
            )
        if image_processor is not None:
            try:
                image_processor.calc_hd_size(*opened.size)
            except ValueError as error:
                raise DataError(first_line(error)) from error
    except Exception as error:  # decoders raise anything
        raise DataError(f"cannot read {name}: {_reason(error)}.") from error
    return opened


@contextlib.contextmanager
def _opened(image: object) -> Iterator[tuple[Image.Image, BinaryIO | None]]:
    """An image, and the file that it is read from."""
    if isinstance(image, Image.Image):
        yield image, None
        return
    if isinstance(image, bytes):
        file = io.BytesIO(image)
    elif not isinstance(image, str | os.PathLike):
        raise DataError(f"it is {quoted(image)}, and neither a path nor the bytes of a file")
    elif os.path.exists(image) and not os.path.isfile(image):  # a pipe would be waited for
        raise DataError("it is not a file")
    else:
        file = open(image, "rb")  # noqa: SIM115  closed below
    with file:
        yield Image.open(file, formats=FORMATS), file


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it is absurdly large ({str(error).partition(',')[0]})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # What Pillow itself says of an image comes by these classes.
    known = isinstance(error, DataError | OSError | SyntaxError)
    if isinstance(error, UnidentifiedImageError) or not known:
        return NO_IMAGE
    return first_line(error)


def _decode_if_suspicious(image: Image.Image, file: BinaryIO | None) -> None:
    if file is not None:
        position = file.tell()
        whole = _has_its_end(image.format, file)
        file.seek(position)
        if whole:
            return
    image.load()


def _has_its_end(format: str | None, file: BinaryIO) -> bool:
    """Whether the last bytes are those that a whole file of the format has."""
    size = file.seek(0, os.SEEK_END)
    if format == "WEBP":
        file.seek(4)
        return size >= 8 + int.from_bytes(file.read(4), "little")
    file.seek(max(0, size - TAIL_BYTES))
    tail = file.read().rstrip(b"\0\r\n ")
    if format in ("JPEG", "MPO"):
        return tail.endswith(b"\xff\xd9")
    return format == "PNG" and tail.endswith(b"IEND\xaeB`\x82")
