"""Connected components of a marker image, with what is measured of each."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Components:
    """Components of a mask, 8-connected. labels: (h, w) uint16, 0 outside, i + 1 on component i.
    left, top, width, height: (n,) int px, of the bounding boxes; area: (n,) int px². x, y: (n,)
    float64 px, centroids. runs: four (m,) int, the component, row, first column and length of each
    line of pixels in a row."""

    labels: NDArray[np.uint16]
    left: NDArray[np.int64]
    top: NDArray[np.int64]
    width: NDArray[np.int64]
    height: NDArray[np.int64]
    area: NDArray[np.int64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    runs: tuple[NDArray[np.int64], ...]

    def box(self, i: int) -> tuple[slice, slice]:
        """Rows and columns of component i."""
        left, top = self.left[i], self.top[i]
        return slice(top, top + self.height[i]), slice(left, left + self.width[i])

    def inside(self, i: int) -> NDArray[np.bool_]:
        """Which pixels of its box belong to component i."""
        return self.labels[self.box(i)] == i + 1

    def mean_of(self, image: NDArray[np.uint8], scale: int) -> NDArray[np.float64]:
        """(n,) mean over each component of an image reduced by a scale: of three pixels a run."""
        owner, row, column, length = self.runs
        start, pixels = row // scale * image.shape[1], image.ravel()
        total = np.zeros(len(length))
        for place in (1, 3, 5):
            total += pixels[start + (column + length * place // 6) // scale]
        return np.bincount(owner, total * length, len(self.area)) / (3 * self.area)


class ComponentFinder:
    """Finds the components of masks of one size, in memory that it uses again and again.

    canvas: (h, w) uint8, where the next mask is to be drawn: 0, and one other value.
    """

    def __init__(self, height: int, width: int) -> None:
        self._labels = np.empty((height, width), np.uint16)
        self._padded = np.zeros((height, width + 2), np.uint8)
        self.canvas = self._padded[:, 1:-1]
        self._differs = np.empty(self._padded.size - 1, bool)

    def __call__(self) -> Components:
        """Components of the mask on the canvas; `labels` is overwritten by the next call.

        The figures are those of `cv2.connectedComponentsWithStats`, summed over runs of pixels in
        a row instead of over pixels, which takes half the time.
        """
        row_major = self._padded.ravel()
        change = np.flatnonzero(np.not_equal(row_major[1:], row_major[:-1], out=self._differs))
        start, length = change[::2], change[1::2] - change[::2]
        row, column = np.divmod(start, self._padded.shape[1])
        count, labels = cv2.connectedComponents(self.canvas, self._labels, ltype=cv2.CV_16U)
        owner = labels[row, column].astype(np.intp) - 1
        count -= 1
        left, top = np.full((2, count), max(labels.shape))
        right, bottom = np.zeros((2, count), int)
        np.minimum.at(left, owner, column)
        np.minimum.at(top, owner, row)
        np.maximum.at(right, owner, column + length)
        np.maximum.at(bottom, owner, row + 1)
        area = np.bincount(owner, length, count)
        x = np.bincount(owner, length * (column + (length - 1) / 2), count) / area
        y = np.bincount(owner, length * row, count) / area
        runs = owner, row, column, length
        return Components(
            labels, left, top, right - left, bottom - top, area.astype(int), x, y, runs
        )
