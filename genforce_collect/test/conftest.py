"""Marker images drawn by area coverage, so that tests know the truth to a fraction of a pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

SUPERSAMPLING = 8


@dataclass(frozen=True)
class Picture:
    """A drawn frame and its truth."""

    image: NDArray[np.uint8]  # (480, 640) grey
    mask: NDArray[np.bool_]
    points: NDArray[np.float64]  # (n, 2) px

    @property
    def jpeg(self) -> bytes:
        return cv2.imencode(".jpg", self.image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


DrawMarkers = Callable[..., Picture]


def grid(columns: int = 15, rows: int = 11, pitch: float = 40.0) -> NDArray[np.float64]:
    """Centres (n, 2) px of a regular layout in the middle of the image."""
    x = (np.arange(columns) - (columns - 1) / 2) * pitch + 319.5
    y = (np.arange(rows) - (rows - 1) / 2) * pitch + 239.5
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _draw(
    points: NDArray[np.float64] | None = None,
    diameter: float = 14.0,
    gel: float = 170.0,
    marker: float = 50.0,
    slope: float = 0.0,
    noise: float = 2.0,
    seed: int = 0,
) -> Picture:
    """`slope`: brightness on the right edge less that on the left, over the mean."""
    points = grid() if points is None else points
    one = SUPERSAMPLING
    cover = np.zeros((480 * one, 640 * one), np.uint8)
    for x, y in points:
        centre = (round((x + 0.5) * one * 16 - 8), round((y + 0.5) * one * 16 - 8))
        cv2.circle(cover, centre, round(diameter / 2 * one * 16), 255, -1, cv2.LINE_8, 4)
    part = cv2.resize(cover, (640, 480), interpolation=cv2.INTER_AREA) / 255.0
    light = 1 + slope * (np.arange(640) / 639 - 0.5)
    image = light * (gel + (marker - gel) * cv2.GaussianBlur(part, (0, 0), 0.8))
    image = image + np.random.default_rng(seed).normal(0, noise, image.shape)
    return Picture(np.clip(np.round(image), 0, 255).astype(np.uint8), part > 0.5, points)


@pytest.fixture
def draw_markers() -> DrawMarkers:
    """Draws a `Picture`; without points, a grid of 15 x 11."""
    return _draw


@pytest.fixture
def marker_grid() -> Callable[..., NDArray[np.float64]]:
    """Centres of a regular layout."""
    return grid
