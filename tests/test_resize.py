"""The compiled resize against PIL's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v import Phi3VImageProcessor
from phi3v.model.resize import resize

BILINEAR = Image.Resampling.BILINEAR
TRANSPOSE = Image.Transpose.TRANSPOSE
SIDE = st.integers(1, 400)


def noise(width: int, height: int) -> Image.Image:
    """Black, white and all between: what rounds, and what could overflow."""
    levels = np.random.default_rng(width * height).integers(-200, 456, (height, width, 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


@settings(max_examples=150, deadline=None)
@given(SIDE, SIDE, SIDE, SIDE)
def test_every_pixel_is_that_of_pil(width, height, new_width, new_height):
    """Up and down, either side first."""
    image = noise(width, height)
    wide = image.resize((new_width, height), BILINEAR).resize((new_width, new_height), BILINEAR)
    ours = resize(image, new_width, new_height, height_first=False)
    assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(wide))
    tall = image.resize((width, new_height), BILINEAR).resize((new_width, new_height), BILINEAR)
    ours = resize(image, new_width, new_height, height_first=True)
    assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(tall))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1200), st.integers(1, 1200), st.sampled_from([1, 4, 16]))
def test_hd_transform_is_pils(width, height, num_crops):
    """
    At the sizes that the HD transform asks for, one call of PIL's, lying on the side where
    portrait, gives the same: PIL chooses the order of its two steps by the sizes.
    """
    processor = Phi3VImageProcessor(num_crops=num_crops)
    image = noise(width, height)
    try:
        levels = processor._hd_transform(image, num_crops)
    except ValueError as error:
        assert "too long and thin" in str(error)
        return
    lying = image.transpose(TRANSPOSE) if width < height else image
    levels = levels.transpose(1, 2) if width < height else levels
    length = levels.shape[2]
    resized = lying.resize((length, int(length / (lying.width / lying.height))), BILINEAR)
    top = (levels.shape[1] - resized.height) // 2
    inside = levels[:, top : top + resized.height].permute(1, 2, 0)
    assert np.array_equal(inside.numpy(), np.asarray(resized))
    assert (levels[:, :top] == 255).all() and (levels[:, top + resized.height :] == 255).all()


@pytest.mark.parametrize("height_first", [False, True])
def test_the_same_without_numba(height_first, monkeypatch):
    """Where a checkpoint's files are used without numba, PIL gives the same pixels."""
    compiled = resize(noise(90, 70), 60, 100, height_first)
    monkeypatch.setattr("phi3v.model.resize.numba", None)
    assert np.array_equal(resize(noise(90, 70), 60, 100, height_first), compiled)
