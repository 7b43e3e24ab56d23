"""The compiled table and bicubic against torch's own."""

import numpy as np
import pytest
import torch

from phi3v.model import levels as compiled_levels

SIZE = 42
STEPS = [(1, 1), (2, 2), (1, 4), (4, 1), (4, 4), (3, 4), (4, 3), (3, 3), (1, 2), (2, 8), (6, 6)]


def make_image(steps: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of three channels whose sides are these multiples of SIZE, and levels' values."""
    rng = np.random.default_rng(steps)
    levels = rng.integers(0, 256, (3, steps[0] * SIZE, steps[1] * SIZE), dtype=np.uint8)
    mean, std = rng.uniform(0.3, 0.5, (2, 3, 1))
    values = (np.arange(256) / 255 - mean) / std
    return torch.from_numpy(levels), torch.from_numpy(values.astype(np.float32))


def by_torch(levels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """torch's bicubic over all of the image."""
    image = torch.stack([values[c][levels[c].long()] for c in range(3)])
    scale = torch.nn.functional.interpolate
    return scale(image[None], (SIZE, SIZE), mode="bicubic", align_corners=False)[0]


@pytest.mark.parametrize("steps", STEPS)
def test_every_value_is_that_of_torch(steps):
    """The global view is the official one, to the last bit."""
    levels, values = make_image(steps)
    assert torch.equal(compiled_levels.shrink(levels, values, SIZE), by_torch(levels, values))


@pytest.mark.parametrize("with_numba", [True, False])
def test_crops_are_looked_up(with_numba, monkeypatch):
    """Every level becomes its channel's value, and no place is left out."""
    if not with_numba:
        monkeypatch.setattr(compiled_levels, "numba", None)
    levels, values = make_image((2, 3))
    crops = levels.view(3, 2, SIZE, 3, SIZE).permute(1, 3, 0, 2, 4)
    out = torch.full(crops.shape, torch.nan)
    compiled_levels.look_up(crops, values, out)
    for channel in range(3):
        assert torch.equal(out[:, :, channel], values[channel][crops[:, :, channel].long()])


@pytest.mark.parametrize("steps", STEPS)
def test_the_same_without_numba(steps, monkeypatch):
    """Where a checkpoint's files are used without numba, torch gives the same values."""
    monkeypatch.setattr(compiled_levels, "numba", None)
    agrees = compiled_levels._agrees_with_torch.__wrapped__
    monkeypatch.setattr(compiled_levels, "_agrees_with_torch", agrees)
    levels, values = make_image(steps)
    assert torch.equal(compiled_levels.shrink(levels, values, SIZE), by_torch(levels, values))


def test_other_rounding_is_noticed(monkeypatch):
    """Where torch rounds in other places, the compiled code is not used."""
    compiled = compiled_levels._shrink_compiled

    def one_bit_off(*image):
        scaled = compiled(*image)
        scaled[0, 5, 5] = torch.nextafter(scaled[0, 5, 5], torch.tensor(9.0))
        return scaled

    agrees = compiled_levels._agrees_with_torch.__wrapped__
    monkeypatch.setattr(compiled_levels, "_shrink_by_torch", compiled)
    assert agrees()
    monkeypatch.setattr(compiled_levels, "_shrink_compiled", one_bit_off)
    assert not agrees()
    monkeypatch.setattr(compiled_levels, "numba", None)
    assert not agrees()
