"""
Images of records: opened, and checked before the start.

The check of many is cheap. It looks at a file's size, header and last bytes, and decodes only what
it is not sure of.
"""

import argparse
import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch.distributed as dist
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Subset
from tqdm import tqdm

from ..errors import DataError, first_line, quoted
from ..model.image_processing_phi3_v import Phi3VImageProcessor
from ..model.processing_phi3_v import Phi3VProcessor
from .bad_samples import find_bad, no_file, settle

# More images are not all looked at before the start, which would grow with the dataset.
MAX_CHECKED = 20_000
# So few are decoded, all of them: that takes seconds, and finds what a header does not show.
MAX_DECODED = 500
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
NO_IMAGE = f"it is no image of a known format ({', '.join(FORMATS)}), or its header is broken"


def read_image(
    image: object, where: str, image_processor: Phi3VImageProcessor | None = None
) -> Image.Image:
    """
    Decode a path, the bytes of a file, a PIL image, or what `datasets` makes of one of them.

    Args:
        where: begins the error; the record and the field.
        image_processor: where it is given, the image has to fit its HD transform.

    Raises:
        DataError: the image cannot be read or used; the message names it.
    """
    return _read(image, where, image_processor, lambda opened, file: opened.load())


def image_size(image: object, where: str) -> tuple[int, int]:
    """(width, height) by an image's header. Arguments and errors as `read_image`."""
    return _read(image, where, None, lambda opened, file: None).size


def check_image(image: object, where: str, image_processor: Phi3VImageProcessor) -> None:
    """Look for what is wrong with an image, cheaply. Arguments and errors as `read_image`."""

    def decode_if_suspicious(opened: Image.Image, file: BinaryIO | None) -> None:
        if file is not None:
            position = file.tell()
            whole = _has_its_end(opened.format, file)
            file.seek(position)
            if whole:
                return
        opened.load()

    _read(image, where, image_processor, decode_if_suspicious)


def _read(
    image: object,
    where: str,
    image_processor: Phi3VImageProcessor | None,
    look: Callable[[Image.Image, BinaryIO | None], object],
) -> Image.Image:
    """Open an image, let `look` at it and its file, and say of any error whose it is."""
    image = undecoded(image)
    try:
        with contextlib.nullcontext() if isinstance(image, Image.Image) else _open(image) as file:
            opened = image if file is None else _identify(file)
            # MPO is a JPEG of several pictures; an image that was made in memory has no format.
            if opened.format not in (*FORMATS, "MPO", None):
                raise ValueError(f"{opened.format} is none of {', '.join(FORMATS)}")
            with _plain_errors("it cannot be decoded"):
                look(opened, file)
        if opened.mode not in MODES:
            raise ValueError(
                f"it is not of 8 bits per channel (Pillow's mode {opened.mode}), and as RGB most "
                "of it would turn white or black. Convert it: magick IN -depth 8 OUT.png"
            )
        if image_processor is not None:
            image_processor.calc_hd_size(*opened.size)
    except Exception as error:  # decoders raise anything
        raise DataError(
            f"{where}: cannot read {_name(image)}: {_reason(error)}. Replace the image or remove "
            "the sample."
        ) from error
    return opened


def undecoded(image: object) -> object:
    """The bytes or the path of an image that `datasets` has not decoded; others as they are."""
    if not isinstance(image, dict):
        return image
    content = image.get("bytes")
    return image.get("path") if content is None else content


def _open(image: object) -> BinaryIO:
    if isinstance(image, bytes):
        size = len(image)
    elif isinstance(image, str | os.PathLike):
        info = os.stat(image)
        if found := no_file(info.st_mode):
            raise ValueError(f"it is {found}")
        size = info.st_size
    else:
        raise ValueError(f"it is {quoted(image)}, and neither a path nor the bytes of a file")
    if size == 0:
        raise ValueError("it is empty (0 bytes)")
    return io.BytesIO(image) if isinstance(image, bytes) else Path(image).open("rb")


def _identify(file: BinaryIO) -> Image.Image:
    with _plain_errors(NO_IMAGE):
        return Image.open(file, formats=FORMATS)


@contextlib.contextmanager
def _plain_errors(otherwise: str) -> Iterator[None]:
    """Decoders raise anything; what Pillow itself says of an image comes by these classes."""
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise
    except Exception as error:
        raise ValueError(otherwise) from error


def _name(image: object) -> str:
    if not isinstance(image, str | os.PathLike):
        return "the image"
    path = str(image)
    return path if path.isprintable() and len(path) < 1000 else quoted(path)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return NO_IMAGE
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.DecompressionBombError):
        return f"it is absurdly large ({str(error).partition(',')[0]})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


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


def check_images(
    records: Sequence, what: str, processor: Phi3VProcessor, args: argparse.Namespace
) -> Sequence:
    """
    The records whose images can be read and fit --num_crops.

    Up to 500 images are decoded; of more than 20,000, an even sample is looked at, and that is
    said. All are looked at where every one has to be good: to leave bad samples out, or to count
    tokens.

    Args:
        what: the data's name in messages.

    Raises:
        DataError: of the first bad sample; with --skip_bad_samples, that none is left. Or
            there are no samples.
    """
    if len(records) == 0:
        raise DataError(f"{what}: there are no samples. Check where it comes from.")
    origin = getattr(records, "origin", None)
    images = _count_images(records)
    check_one = read_image if images <= MAX_DECODED else check_image
    indices = range(len(records))
    if images > MAX_CHECKED and not (args.skip_bad_samples or args.max_length or args.pack_length):
        count = max(1, int(len(records) * MAX_CHECKED / images))
        indices = [len(records) * i // count for i in range(count)]
    first = int(os.environ.get("RANK", 0)) == 0
    if len(indices) < len(records) and first:
        print(
            f"{what}: looked at the images of {len(indices):,} of {len(records):,} samples, "
            "evenly spaced. All of them: "
            + (origin.command(args.num_crops) if origin else "--skip_bad_samples"),
            flush=True,
        )

    def check(index: int) -> None:
        record = records[index]
        where = f"sample {quoted(record['id'])}"
        where = f"{origin.where(index)}: {where}" if origin else where
        for field, image in images_of(record):
            check_one(image, f"{where}, {field}", processor.image_processor)

    mine = indices
    if dist.is_available() and dist.is_initialized():
        # The ranks of a machine share its work; other machines may have other files.
        local = int(os.environ.get("LOCAL_RANK", 0))
        mine = indices[local :: int(os.environ.get("LOCAL_WORLD_SIZE", 1))]
    hidden = not (args.tqdm and first)
    bar = tqdm(mine, f"{what}: images", unit="sample", delay=3, disable=hidden)
    bad = find_bad(((index, index) for index in bar), check, args.skip_bad_samples)
    settle(bad, len(records), what, args.skip_bad_samples)
    return Subset(records, [i for i in range(len(records)) if i not in bad]) if bad else records


def _count_images(records: Sequence) -> float:
    """About how many images all records have, by some fifty of them."""
    some = range(0, len(records), max(1, len(records) // 50))
    return sum(len(images_of(records[index])) for index in some) / len(some) * len(records)


def images_of(record: dict) -> list[tuple[str, object]]:
    """The images of a record, in order, each with the name of its field."""
    return [
        (f"conversations[{turn}].images[{number}]", image)
        for turn, content in enumerate(record["conversations"])
        for number, image in enumerate(content["images"])
    ]
