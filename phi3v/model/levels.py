"""
From the levels of an image, 0 to 255, to the values that the vision tower sees, compiled.

Normalising makes one value of a level, so it is looked up in a table. The global view is torch's
bicubic, without antialiasing, to a whole fraction of the size: the same values to the last bit, in
a fraction of the time. At a whole fraction every new pixel lies at the same place between old ones.
At an odd one that is on a pixel, which bicubic returns as it is. At an even one it is in the middle
of two, so that all have the same four weights.
"""

from functools import lru_cache

import numpy as np
import torch

from .resize import compiled, numba

try:
    from numba import float32
    from numba.extending import intrinsic
except ImportError:  # this file travels with checkpoints, to places that lack it

    def intrinsic(function):
        return function


# The cubic kernel of torch (a = -0.75) at distances of 1.5 and 0.5.
OUTER, INNER = np.float32(-0.09375), np.float32(0.59375)


def look_up(levels: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    """
    Write the values of crops to `out`.

    Args:
        levels: (rows, columns, channels, size, size) uint8.
        values: (channels, 256) float32, what every channel's levels stand for.
        out: float32 of the same shape as `levels`.
    """
    if numba is None:
        for channel, table in enumerate(values):
            out[:, :, channel] = table[levels[:, :, channel].int()]
    else:
        _look_up(levels.numpy(), values.numpy(), out.numpy())


def shrink(levels: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """
    An image scaled to `size` x `size`, which its sides are whole multiples of.

    Args:
        levels: (channels, height, width) uint8.
        values: as for `look_up`.

    Returns:
        (channels, size, size) float32.
    """
    way = _shrink_compiled if _agrees_with_torch() else _shrink_by_torch
    return way(levels, values, size)


@lru_cache
def _agrees_with_torch() -> bool:
    """
    Whether the compiled code rounds as torch does here.

    Where a processor multiplies and adds in one instruction, which rounds once, compilers use it;
    in which of the four steps is their choice. `_mix` has that of torch's builds for x86.
    """
    if numba is None:
        return False
    levels = (torch.arange(56 * 112) * 89 % 251).to(torch.uint8).view(1, 56, 112)
    values = torch.linspace(-1.8, 2.2, 256)[None]
    image = (levels, values, 28)  # halves one side and quarters the other
    return torch.equal(_shrink_compiled(*image), _shrink_by_torch(*image))


def _shrink_compiled(levels: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    scaled = np.empty((len(levels), size, size), dtype=np.float32)
    _shrink(levels.numpy(), values.numpy(), scaled)
    return torch.from_numpy(scaled)


def _shrink_by_torch(levels: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    # At an odd step only the pixels in the middle count: no others are looked up.
    steps = [side // size if side // size % 2 else 1 for side in levels.shape[1:]]
    levels = levels[:, steps[0] // 2 :: steps[0], steps[1] // 2 :: steps[1]]
    image = torch.stack([row[plane.int()] for row, plane in zip(values, levels, strict=True)])
    return torch.nn.functional.interpolate(
        image[None], size=(size, size), mode="bicubic", align_corners=False
    )[0]


@compiled
def _look_up(levels, values, out):
    for row, column, channel, y in np.ndindex(levels.shape[:4]):
        line, target = levels[row, column, channel, y], out[row, column, channel, y]
        table = values[channel]
        for x in range(len(line)):
            target[x] = table[line[x]]


@intrinsic
def _multiply_add(typing, a, b, c):
    """a * b + c, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return float32(float32, float32, float32), generate


@compiled
def _mix(a, b, c, d):
    mixed = _multiply_add(a, OUTER, b * INNER)
    return _multiply_add(d, OUTER, _multiply_add(c, INNER, mixed))


@compiled
def _shrink_row(levels, values, step, line, out):
    """
    Every `step`-th of `levels` (width,) into `out` (size,), by way of `line` (width + 2,). Given
    the step, the compiler makes a loop for each kind, of twice the speed.
    """
    # Unsigned: numba would look out for negative indices, which takes longer than the rest.
    one, width, size = np.uint64(1), np.uint64(len(levels)), np.uint64(len(out))
    step = np.uint64(step)
    half = step // np.uint64(2)
    if step % np.uint64(2):
        for x in range(size):
            out[x] = values[levels[x * step + half]]
        return
    line[0] = values[levels[0]]  # beyond the edge, its pixel repeats
    for x in range(width):
        line[x + one] = values[levels[x]]
    line[width + one] = line[width]
    for x in range(size):
        first = x * step + half - one
        out[x] = _mix(
            line[first], line[first + one], line[first + np.uint64(2)], line[first + np.uint64(3)]
        )


@compiled
def _shrink(levels, values, out):
    """`levels` (channels, height, width) into `out` (channels, size, size)."""
    channels, height, width = levels.shape
    size = out.shape[1]
    down, across = height // size, width // size
    line = np.empty(width + 2, dtype=np.float32)
    rows = np.empty((4, size), dtype=np.float32)
    held = np.empty(4, dtype=np.int64)  # which rows these are; two of four serve twice at a half
    for channel in range(channels):
        held[:] = -2
        for y in range(size):
            middle = y * down + down // 2
            if down % 2:
                _shrink_row(levels[channel, middle], values[channel], across, line, out[channel, y])
                continue
            for r in range(middle - 2, middle + 2):
                if held[r % 4] != r:
                    inside = min(max(r, 0), height - 1)
                    _shrink_row(levels[channel, inside], values[channel], across, line, rows[r % 4])
                    held[r % 4] = r
            a, b = rows[(middle - 2) % 4], rows[(middle - 1) % 4]
            c, d = rows[middle % 4], rows[(middle + 1) % 4]
            for x in range(size):
                out[channel, y, x] = _mix(a[x], b[x], c[x], d[x])
