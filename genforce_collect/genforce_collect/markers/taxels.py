"""A taxel array drawn as a marker image: one disc a taxel, moved by shear, grown by pressure.

The drawing is that of a scatter plot of 6.4×4.8 inch at 100 dots per inch whose grid fills the
image: positions shift by the shear counts, disc areas grow with the pressure counts.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import TaxelsConfig
from genforce_collect.errors import DataError
from genforce_collect.markers.packing import HEIGHT, WIDTH
from genforce_collect.markers.segmentation import MarkerFrame

SHEAR_COUNTS = 2000.0  # counts that move a disc by one grid unit
MAX_OFFSET = 0.8  # grid units
BASE_AREA, MAX_AREA = 100.0, 6000.0  # square points, at rest and at most
PX_PER_POINT = 100 / 72
SUBPIXEL_BITS = 4


def render_taxels(
    counts: NDArray[np.integer], baseline: NDArray[np.integer], config: TaxelsConfig
) -> MarkerFrame:
    """Marker image of one sample.

    counts, baseline: rows · columns · axes raw counts, row-major from the top left, axis fastest;
    the baseline is the no-contact sample. Axes are x (along the rows of taxels), y (up the image)
    and z (pressure), or z alone. Raises `DataError` on another length.
    """
    if counts.size != config.size or baseline.size != config.size:
        raise DataError(f"taxel sample of {counts.size} counts: the sensor file says {config.size}")
    change = counts.astype(np.float64).ravel() - baseline.astype(np.float64).ravel()
    change = change.reshape(config.rows * config.columns, config.axes)
    column, row = np.meshgrid(np.arange(config.columns), np.arange(config.rows))
    shear = np.zeros((len(change), 2))
    if config.axes == 3:
        shear = np.clip(change[:, :2] / SHEAR_COUNTS, -MAX_OFFSET, MAX_OFFSET)
    unit_x, unit_y = WIDTH / (config.columns + 1), HEIGHT / (config.rows + 1)
    x = (column.ravel() + 1 + shear[:, 0]) * unit_x - 0.5
    y = (row.ravel() + 1 - shear[:, 1]) * unit_y - 0.5
    points2 = np.clip(BASE_AREA + change[:, -1], BASE_AREA, MAX_AREA)
    radius = np.sqrt(points2 / math.pi) * PX_PER_POINT

    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    one = 1 << SUBPIXEL_BITS
    for centre_x, centre_y, r in zip(x, y, radius, strict=True):
        centre = round(centre_x * one), round(centre_y * one)
        cv2.circle(mask, centre, round(r * one), 1, cv2.FILLED, cv2.LINE_8, SUBPIXEL_BITS)
    return MarkerFrame(
        mask,
        x.astype(np.float32),
        y.astype(np.float32),
        (math.pi * radius**2).astype(np.float32),
        expected=len(x),
        contrast=1.0,
    )
