from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genforce_infer.preprocess import IMAGE_STATISTICS, area_average, at_scale, image_statistics


@given(seed=st.integers(0, 2**32 - 1), factor=st.sampled_from([1, 2, 3, 4, 8]))
def test_area_average_is_the_exact_block_mean(seed: int, factor: int) -> None:
    mask = np.random.default_rng(seed).random((48, 96)) > 0.7
    h, w = 48 // factor, 96 // factor
    mean = mask.reshape(h, factor, w, factor).mean((1, 3))
    result = area_average(mask, (h, w))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, mean, atol=1e-6)


@pytest.mark.parametrize("high", [1, 255])
def test_every_nonzero_value_is_marker(high: int) -> None:
    mask = np.zeros((480, 640), np.uint8)
    mask[100:200, 50:90] = high
    np.testing.assert_array_equal(
        area_average(mask, (120, 160)), area_average(mask > 0, (120, 160))
    )


def test_uneven_sizes_keep_the_covered_area() -> None:
    mask = np.random.default_rng(0).random((480, 640)) > 0.8
    assert area_average(mask, (130, 170)).mean() == pytest.approx(mask.mean(), abs=1e-4)


def test_enlarging_is_refused() -> None:
    with pytest.raises(ValueError, match="only shrinks"):
        area_average(np.zeros((48, 64), bool), (60, 80))


@pytest.mark.parametrize("px_per_mm", [20.0, 27.0, 40.0])
def test_at_scale_shows_the_same_millimetres_from_every_camera(px_per_mm: float) -> None:
    y, x = np.mgrid[:480, :640]
    radius_mm = np.hypot(x - 319.5, y - 239.5) / px_per_mm
    image = at_scale(radius_mm < 4.0, (120, 160), px_per_mm, 7.0)
    assert image.shape == (120, 160)
    assert image.sum() == pytest.approx(np.pi * (4.0 * 7.0) ** 2, rel=0.02)
    assert image[60, 80] == pytest.approx(1)
    assert image[60, 80 + 31] == 0


def test_image_statistics_tell_a_blurred_or_empty_image_from_a_good_one() -> None:
    rng = np.random.default_rng(0)
    mask = (rng.random((120, 160)) > 0.8).astype(np.float32)
    good = image_statistics(np.stack([mask, mask]))
    empty = image_statistics(np.stack([np.zeros_like(mask), mask]))
    assert good.shape == (IMAGE_STATISTICS,)
    assert good[5] == 0
    assert empty[0] == 0
    assert empty[7] == pytest.approx(mask.mean())
