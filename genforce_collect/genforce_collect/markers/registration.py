"""How a sensor's picture lies to its drawing: the turn, shift, scale and lens of its mounting.

No two sensors of a kind show their gel alike, and force is sensitive to it: shear is the mean
displacement over the gel, in which what is lifted at the contact and drawn along around it nearly
cancel, so that a picture larger by 2 % shows 11 % more of it. The markers of the image without
contact say how it is mounted, where the sensor file says where they are on the gel.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import SensorConfig
from genforce_collect.errors import ConfigError
from genforce_collect.markers.layouts import marker_positions
from genforce_collect.markers.packing import HEIGHT, WIDTH
from genforce_collect.markers.tracking import match

CENTRE_PX = np.array([(WIDTH - 1) / 2, (HEIGHT - 1) / 2])
HALF_DIAGONAL_PX = math.hypot(WIDTH, HEIGHT) / 2
MIN_AREA_PX = 20  # components below are specks
MIN_MARKERS, MIN_MATCHED = 12, 0.7  # of those the drawing has in the image
MAX_MISS = 0.1  # of the pitch, RMS: another layout than the drawn one misses by more
MAX_TURN_RAD, MAX_SCALE, MAX_RADIAL = 0.2, 0.15, 0.15


@dataclass(frozen=True)
class Registration:
    """Where a point of the drawing is seen: `centre + shift + scale (1 + radial r²) turn(offset)`,
    offset (right, down) and r from the image's centre, r in half diagonals. As drawn by default."""

    turn_rad: float = 0.0
    shift_px: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    radial: float = 0.0

    def seen(self, offsets_px: NDArray[np.float64]) -> NDArray[np.float64]:
        """Pixels (..., 2) of offsets (..., 2) from the centre of the drawing."""
        square = (offsets_px**2).sum(-1, keepdims=True) / HALF_DIAGONAL_PX**2
        cos, sin = math.cos(self.turn_rad), math.sin(self.turn_rad)
        turned = offsets_px @ np.array([[cos, sin], [-sin, cos]])
        return CENTRE_PX + self.shift_px + self.scale * (1 + self.radial * square) * turned

    def upright(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The marker image (480, 640), nonzero is marker, as a sensor as drawn would show it: 0 and
        1. What it does not show is empty."""
        if self == AS_DRAWN:
            return mask
        return cv2.remap((mask != 0).view(np.uint8) * 255, *self._maps, cv2.INTER_LINEAR) >> 7

    @cached_property
    def _maps(self) -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
        pixels = np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), -1)
        seen = self.seen(pixels - CENTRE_PX).astype(np.float32)
        return cv2.convertMaps(seen[..., 0], seen[..., 1], cv2.CV_16SC2)


AS_DRAWN = Registration()


def register(reference: NDArray[np.uint8], sensor: SensorConfig) -> Registration:
    """How the image without contact (480, 640) lies to the sensor's drawing; as drawn where that
    cannot be told: taxels, few markers, or another layout than the file says."""
    if sensor.kind == "taxels":
        return AS_DRAWN
    places = np.empty((0, 2))
    with contextlib.suppress(ConfigError):  # a picture of the layout that is not there
        places = marker_positions(sensor.layout, sensor.gel)
    drawn = places * [sensor.px_per_mm, -sensor.px_per_mm]
    drawn = drawn[(np.abs(drawn) < CENTRE_PX).all(1)]
    if sensor.optics.view_radius_mm is not None:
        radius = sensor.optics.view_radius_mm * sensor.px_per_mm
        drawn = drawn[np.hypot(*drawn.T) < radius]
    found = marker_centres(reference)
    if min(len(drawn), len(found)) < MIN_MARKERS:
        return AS_DRAWN
    matched = match((drawn + CENTRE_PX).astype(np.float32), found)
    known = matched.index >= 0
    if known.mean() < MIN_MATCHED or known.sum() < MIN_MARKERS:
        return AS_DRAWN
    offsets, seen = drawn[known], matched.points[known].astype(np.float64)
    result = _fit(offsets, seen)
    missed = np.hypot(*(result.seen(offsets) - seen).T)
    near = missed <= 3 * np.median(missed) + 0.1  # markers that are off their places weigh nothing
    result = _fit(offsets[near], seen[near])
    miss = float(np.sqrt(((result.seen(offsets[near]) - seen[near]) ** 2).sum(1).mean()))
    likely = (
        miss <= MAX_MISS * sensor.layout.pitch_mm * sensor.px_per_mm
        and abs(result.turn_rad) <= MAX_TURN_RAD
        and abs(result.scale - 1) <= MAX_SCALE
        and abs(result.radial) <= MAX_RADIAL
    )
    return result if likely else AS_DRAWN


def _fit(offsets: NDArray[np.float64], seen: NDArray[np.float64]) -> Registration:
    """Least squares; the lens is small, so that its term is not turned."""
    x, y = offsets.T
    square = (offsets**2).sum(1) / HALF_DIAGONAL_PX**2
    one, none = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate(
        [
            np.stack([x, -y, one, none, x * square], 1),
            np.stack([y, x, none, one, y * square], 1),
        ]
    )
    values = np.concatenate((seen - CENTRE_PX).T)
    cos, sin, right, down, lens = np.linalg.lstsq(rows, values, rcond=None)[0]
    scale = math.hypot(cos, sin)
    return Registration(
        math.atan2(sin, cos), (float(right), float(down)), scale, float(lens) / scale
    )


def marker_centres(mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Centroids (n, 2) px of the markers of a mask (480, 640) that lie wholly in it."""
    _, _, stats, centres = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    left, top, width, height, area = stats.T
    inside = (left > 0) & (top > 0) & (left + width < WIDTH) & (top + height < HEIGHT)
    inside &= area >= MIN_AREA_PX
    inside[0] = False  # the background
    return centres[inside].astype(np.float32)
