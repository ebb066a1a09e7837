"""Components are those OpenCV finds, measured alike."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genforce_collect.markers.components import ComponentFinder


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 255]))
@settings(max_examples=100, deadline=None)
def test_the_figures_are_opencv_s_own(seed: int, height: int, width: int, value: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    image = np.uint8(mask) * np.uint8(value)
    count, labels, stats, centres = cv2.connectedComponentsWithStats(image, connectivity=8)
    finder = ComponentFinder(height, width)
    finder.canvas[:] = value  # what an earlier mask leaves behind does no harm
    finder()
    finder.canvas[:] = image
    found = finder()
    assert np.array_equal(found.labels, labels)
    measured = np.stack([found.left, found.top, found.width, found.height, found.area], axis=1)
    assert np.array_equal(measured, stats[1:])
    np.testing.assert_allclose(np.stack([found.x, found.y], axis=1), centres[1:], rtol=1e-12)
    for i in range(count - 1):
        assert np.count_nonzero(found.inside(i)) == found.area[i]


@pytest.mark.parametrize("scale", [1, 2])
def test_the_mean_of_a_component_is_near_that_of_its_pixels(scale: int) -> None:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 255, (60, 80), np.uint8), (9, 9), 0)
    mask = np.zeros((60 * scale, 80 * scale), np.uint8)
    for centre in ((20, 20), (50, 40), (64, 15)):
        cv2.circle(mask, tuple(scale * c for c in centre), 8 * scale, 1, -1)
    finder = ComponentFinder(*mask.shape)
    finder.canvas[:] = mask
    found = finder()
    whole = cv2.resize(image, mask.shape[::-1], interpolation=cv2.INTER_NEAREST)
    means = [whole[found.labels == i + 1].mean() for i in range(len(found.area))]
    np.testing.assert_allclose(found.mean_of(image, scale), means, rtol=0.03)
