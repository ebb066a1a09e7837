"""Where the markers are on a gel at rest: regular patterns, random ones, and pattern images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import GelConfig, LayoutConfig
from genforce_collect.errors import ConfigError

Points = NDArray[Any]

_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
_MIN_IMAGE_AREA_PX = 6


def marker_positions(layout: LayoutConfig, gel: GelConfig) -> Points:
    """Centres (N, 2) mm in the sensor frame of the markers on the gel. Raises `ConfigError`."""
    points = _PATTERNS[layout.pattern](layout, gel)
    margin = layout.diameter_mm / 2
    limit = np.array([gel.width_mm, gel.height_mm]) / 2 - margin
    return points[(np.abs(points) <= limit).all(axis=1)]


def _array(layout: LayoutConfig, _: GelConfig) -> Points:
    return _lattice(layout.rows, layout.columns, layout.pitch_mm, layout.pitch_mm)


def _staggered(layout: LayoutConfig, _: GelConfig) -> Points:
    row_pitch = layout.pitch_mm * math.sqrt(3) / 2
    points = _lattice(layout.rows, layout.columns, layout.pitch_mm, row_pitch)
    odd = np.round(points[:, 1] / row_pitch - (layout.rows - 1) / 2).astype(int) % 2 == 1
    points[odd, 0] += layout.pitch_mm / 2
    return points - [layout.pitch_mm / 4, 0]


def _lattice(rows: int, columns: int, pitch_x: float, pitch_y: float) -> Points:
    x = (np.arange(columns) - (columns - 1) / 2) * pitch_x
    y = (np.arange(rows) - (rows - 1) / 2) * pitch_y
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _circle(layout: LayoutConfig, _: GelConfig) -> Points:
    """A centre and rings one pitch apart, their markers about one pitch apart."""
    rings = [np.zeros((1, 2))]
    for ring in range(1, layout.rows + 1):
        angles = np.arange(6 * ring) * (2 * math.pi / (6 * ring))
        radius = ring * layout.pitch_mm
        rings.append(radius * np.stack([np.cos(angles), np.sin(angles)], axis=1))
    return np.concatenate(rings)


def _diamond(layout: LayoutConfig, _: GelConfig) -> Points:
    """A square lattice turned by 45 degrees, clipped to a diamond."""
    points = _lattice(layout.rows, layout.columns, layout.pitch_mm, layout.pitch_mm)
    turn = math.sqrt(0.5) * np.array([[1, 1], [-1, 1]])
    return points @ turn


def _hexagon(layout: LayoutConfig, _: GelConfig) -> Points:
    """A triangular lattice clipped to a hexagon: 1 + 3 n (n + 1) markers for n rings."""
    n = layout.rows
    cells = [(i, j) for j in range(-n, n + 1) for i in range(-n, n + 1) if abs(i + j) <= n]
    return layout.pitch_mm * np.array([(i + j / 2, j * math.sqrt(3) / 2) for i, j in cells])


def _spiral(layout: LayoutConfig, _: GelConfig) -> Points:
    """Sunflower seeds, one marker per square pitch."""
    start = np.random.default_rng(layout.seed).uniform(0, 2 * math.pi)
    index = np.arange(layout.columns * layout.rows)
    radius = layout.pitch_mm * np.sqrt((index + 0.5) / math.pi)
    angle = start + index * _GOLDEN_ANGLE
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _scattered(layout: LayoutConfig, gel: GelConfig) -> Points:
    """Random markers, no two closer than 0.75 pitch: dart throwing on a cell list."""
    rng = np.random.default_rng(layout.seed)
    half = np.array([gel.width_mm, gel.height_mm]) / 2 - layout.diameter_mm / 2
    apart = 0.75 * layout.pitch_mm
    wanted = min(layout.rows * layout.columns, int(4 * half[0] * half[1] / layout.pitch_mm**2))
    kept: list[Points] = []
    near: dict[tuple[int, int], list[Points]] = {}
    for dart in rng.uniform(-half, half, (20 * wanted, 2)):
        i, j = (int(c) for c in np.floor(dart / apart))
        around = [p for a in (-1, 0, 1) for b in (-1, 0, 1) for p in near.get((i + a, j + b), [])]
        if all(math.hypot(*(p - dart)) >= apart for p in around):
            kept.append(dart)
            near.setdefault((i, j), []).append(dart)
            if len(kept) == wanted:
                break
    return np.array(kept)


def _image(layout: LayoutConfig, gel: GelConfig) -> Points:
    if layout.image is None:
        raise ConfigError("layout.image: missing; pattern 'image' needs the path of a picture")
    path = Path(layout.image)
    picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if picture is None:
        raise ConfigError(f"layout.image: {path}: no such file or not a picture")
    width_mm = layout.image_width_mm or gel.width_mm
    points = pattern_markers(picture, width_mm)
    if not len(points):
        raise ConfigError(f"layout.image: {path}: no white markers on black found")
    return points


def pattern_markers(picture: Points, width_mm: float) -> Points:
    """Centres (N, 2) in mm of the white blobs of a grey picture that spans `width_mm`."""
    _, binary = cv2.threshold(picture, 127, 255, cv2.THRESH_BINARY)
    rows, columns = binary.shape
    count, _, stats, centres = cv2.connectedComponentsWithStats(binary)
    area = stats[1:count, cv2.CC_STAT_AREA]
    typical = np.median(area) if len(area) else 0
    blob = (area >= _MIN_IMAGE_AREA_PX) & (area > 0.3 * typical) & (area < 4 * typical)
    u, v = centres[1:count][blob].T
    scale = width_mm / columns
    return np.stack([(u - (columns - 1) / 2) * scale, ((rows - 1) / 2 - v) * scale], axis=1)


_PATTERNS: dict[str, Callable[[LayoutConfig, GelConfig], Points]] = {
    "array": _array,
    "staggered": _staggered,
    "circle": _circle,
    "diamond": _diamond,
    "hexagon": _hexagon,
    "spiral": _spiral,
    "scattered": _scattered,
    "image": _image,
}
