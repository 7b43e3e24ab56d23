"""
PIL's bilinear resize, compiled: the same pixels to the last bit, in a fraction of the time.

PIL scales one side, rounds to whole levels, then scales the other side and rounds again. Both steps
are sums of a few levels with weights in fixed point. The steps here are the same; what differs is
that they are vectorised, and put the three channels apart, as crops need them.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

try:
    import numba
except ImportError:  # this file travels with checkpoints, to places that lack it
    numba = None

# Fractional bits of a weight. With eight of a level, and two to spare, they fill an int32.
PRECISION = 22


def resize(image: Image.Image, width: int, height: int, height_first: bool) -> np.ndarray:
    """
    An RGB image scaled to `width` x `height`: (3, height, width) uint8.

    As two calls of `image.resize` with `Image.Resampling.BILINEAR`, for the width and for the
    height, or with `height_first` the other way round; and by these where there is no numba.
    """
    if numba is None:
        between = (image.width, height) if height_first else (width, image.height)
        for size in (between, (width, height)):
            image = image.resize(size, Image.Resampling.BILINEAR)
        return np.stack([np.asarray(band) for band in image.split()])
    pixels = np.asarray(image)  # (h, w, 3)
    scaled = np.empty((3, height, width), dtype=np.uint8)
    lines, columns = _weights(image.height, height), _weights(image.width, width)
    if height_first:
        tall = np.empty((height, image.width, 3), dtype=np.uint8)
        _scale_height(pixels.reshape(1, image.height, -1), *lines, tall.reshape(1, height, -1))
        _scale_width(tall, *columns, scaled)
    else:
        wide = np.empty((3, image.height, width), dtype=np.uint8)
        _scale_width(pixels, *columns, wide)
        _scale_height(wide, *lines, scaled)
    return scaled


@lru_cache(maxsize=64)
def _weights(size: int, scaled: int) -> tuple[np.ndarray, np.ndarray]:
    """
    What every one of `scaled` new positions is made of.

    Returns:
        The first old position of each, (scaled,), and the weights from there on, (scaled, taps),
        in fixed point. The formula is that of PIL's Resample.c.
    """
    scale = size / scaled
    reach = max(scale, 1.0)  # upwards, a triangle of two pixels; downwards, it grows with the scale
    centers = (np.arange(scaled) + 0.5) * scale
    first = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + reach + 0.5).astype(np.int64), size)
    positions = first[:, None] + np.arange((last - first).max())
    distances = np.abs((positions - centers[:, None] + 0.5) * (1.0 / reach))
    weights = np.where((distances < 1.0) & (positions < last[:, None]), 1.0 - distances, 0.0)
    total = np.zeros(scaled)
    for tap in weights.T:  # in PIL's order, whose rounding counts
        total += tap
    fixed = (weights / total[:, None] * (1 << PRECISION) + 0.5).astype(np.int32)
    # Unsigned: numba would look out for negative indices, and not vectorise.
    return first.astype(np.uint64), np.asfortranarray(fixed)


def compiled(function: Callable) -> Callable:
    """The function as machine code, kept on disk where there is a place for it."""
    if numba is None:
        return function
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return numba.njit(function, nogil=True)


@compiled
def _scale_width(image, first, weights, out):
    """`image` (h, w, 3) into `out` (3, h, width)."""
    height, old, _ = image.shape
    width, taps = weights.shape
    lines = np.zeros((3, old + taps), dtype=np.int32)
    sums = np.empty(width, dtype=np.int32)
    for y in range(height):
        for x in range(old):
            for c in range(3):
                lines[c, x] = image[y, x, c]
        for c in range(3):
            line = lines[c]
            sums[:] = 1 << (PRECISION - 1)
            for tap in range(taps):
                for x in range(width):
                    sums[x] += line[first[x] + np.uint64(tap)] * weights[x, tap]
            for x in range(width):
                out[c, y, x] = sums[x] >> PRECISION


@compiled
def _scale_height(image, first, weights, out):
    """`image` (c, h, w) into `out` (c, height, w)."""
    channels, height, width = out.shape
    last = np.uint64(image.shape[1] - 1)
    sums = np.empty(width, dtype=np.int32)
    for c in range(channels):
        for y in range(height):
            sums[:] = 1 << (PRECISION - 1)
            for tap in range(weights.shape[1]):
                line = image[c, min(first[y] + np.uint64(tap), last)]
                weight = weights[y, tap]
                for x in range(width):
                    sums[x] += np.int32(line[x]) * weight
            for x in range(width):
                out[c, y, x] = sums[x] >> PRECISION
