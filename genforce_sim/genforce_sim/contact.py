"""Frictional contact on a patch of an elastic layer: pressures, then shear tractions.

Pressures (p >= 0, gap >= 0, one of them zero) come from the conjugate gradients of Polonsky and
Keer (1999); Coulomb friction |q| <= mu p from spectral projected gradients (Birgin et al. 2000) on
the incremental stick-slip problem, so that partial slip, sliding and hysteresis come out of one
minimisation. Both convolve only over the patch that touches: the response of the layer inside a
patch is that of the whole grid, at a fraction of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from genforce_sim.compliance import Compliance, Grid

Array = NDArray[Any]

_NORMAL_ITERATIONS = 60
_FRICTION_ITERATIONS = 40
_PATCH_STEP = 8  # patch sizes are multiples of this, so that few kernels serve all
_TINY = np.float32(1e-12)


@dataclass(frozen=True)
class Kernels:
    """Spectra of the response on a patch of some size, in the layout of `rfft2` of `padded`."""

    size: tuple[int, int]
    padded: tuple[int, int]
    n: Array
    t_xx: Array
    t_xy: Array
    t_yy: Array

    def normal(self, pressure: Array) -> Array:
        """How far pressures (...) MPa push the surface in, mm."""
        pushed = fft.irfft2(self.n * fft.rfft2(pressure, self.padded), self.padded)
        return pushed[: self.size[0], : self.size[1]]

    def shear(self, q: Array) -> Array:
        """In-plane displacement (2, ...) mm by tractions (2, ...) MPa."""
        x, y = fft.rfft2(q, self.padded, axes=(1, 2))
        mixed = np.stack([self.t_xx * x + self.t_xy * y, self.t_xy * x + self.t_yy * y])
        moved = fft.irfft2(mixed, self.padded, axes=(1, 2))
        return moved[:, : self.size[0], : self.size[1]]


@dataclass(frozen=True)
class Patch:
    """A rectangle of the grid with its kernels."""

    rows: slice
    columns: slice
    kernels: Kernels

    def cut(self, field: Array) -> Array:
        """The part of a field (..., rows, columns) in the patch."""
        return field[..., self.rows, self.columns]

    def paste(self, part: Array, shape: tuple[int, int]) -> Array:
        """A field that is zero but for the patch."""
        field = np.zeros((*part.shape[:-2], *shape), part.dtype)
        field[..., self.rows, self.columns] = part
        return field


class Patches:
    """Patches of one grid and layer; keeps the kernels of every size it has met."""

    def __init__(self, grid: Grid, compliance: Compliance) -> None:
        self._shape = (grid.rows, grid.columns)
        c = compliance
        self._whole = Kernels(self._shape, self._shape, c.n, c.t_xx, c.t_xy, c.t_yy)
        names = ("n", "t_xx", "t_xy", "t_yy")
        self._impulse = {name: fft.irfft2(getattr(c, name), self._shape) for name in names}
        self._known: dict[tuple[int, int], Kernels] = {}

    @property
    def whole(self) -> Patch:
        """All of the grid."""
        return Patch(slice(None), slice(None), self._whole)

    def around(self, mask: Array) -> Patch:
        """The smallest patch that holds all of a mask (rows, columns)."""
        rows = _span(np.any(mask, axis=1), self._shape[0])
        columns = _span(np.any(mask, axis=0), self._shape[1])
        size = (rows.stop - rows.start, columns.stop - columns.start)
        padded = tuple(2 * int(fft.next_fast_len(length, real=True)) for length in size)
        if padded[0] * padded[1] >= self._shape[0] * self._shape[1]:
            return self.whole
        if size not in self._known:
            self._known[size] = self._kernels(size, (padded[0], padded[1]))
        return Patch(rows, columns, self._known[size])

    def _kernels(self, size: tuple[int, int], padded: tuple[int, int]) -> Kernels:
        """Response at every offset that occurs within a patch, on a grid where none wraps round."""
        rows, columns = (np.arange(-length + 1, length) for length in size)
        spectra = {}
        for name, impulse in self._impulse.items():
            near = np.zeros(padded, np.float32)
            near[np.ix_(rows % padded[0], columns % padded[1])] = impulse[
                np.ix_(rows % self._shape[0], columns % self._shape[1])
            ]
            spectra[name] = np.ascontiguousarray(fft.rfft2(near).real)
        return Kernels(size, padded, **spectra)


def _span(occupied: Any, length: int) -> slice:
    """The occupied range, grown to a multiple of the patch step and kept on the grid."""
    found = np.flatnonzero(occupied)
    first, last = (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 1)
    size = min(-(-(last - first) // _PATCH_STEP) * _PATCH_STEP, length)
    first = min(max(0, first - (size - last + first) // 2), length - size)
    return slice(first, first + size)


def press(kernels: Kernels, gap: Array, start: Array, tolerance: float) -> Array:
    """Pressures with gap + C p >= 0, p >= 0, p (gap + C p) = 0, from a first guess.

    `tolerance` is relative to the deepest overlap.
    """
    p: Array = np.maximum(start, 0)
    if not p.any():
        p = np.where(gap < 0, -gap, 0) * np.float32(0.2 / kernels.n[0, 1])
    g = gap + kernels.normal(p)
    direction: Array = np.zeros_like(gap)
    delta, previous = 0.0, 1.0
    enough = tolerance * max(float(-gap.min()), 1e-6)
    for _ in range(_NORMAL_ITERATIONS):
        active = p > 0
        residual = np.where(active, g, 0)
        square = float(np.vdot(residual, residual))
        direction = residual + np.float32(delta * square / previous) * np.where(
            active, direction, 0
        )
        previous = max(square, 1e-30)
        image = kernels.normal(direction)
        curvature = float(np.vdot(direction, image))
        if curvature <= 0:
            break
        length = np.float32(float(np.vdot(residual, direction)) / curvature)
        p = p - length * direction
        overlap = ~active & (g < 0)
        overlaps = bool(overlap.any())
        clipped = overlaps or bool((p < 0).any())
        if clipped:
            p = np.maximum(p, 0)
            p[overlap] = -length * g[overlap]
            g = gap + kernels.normal(p)
        else:
            g = g - length * image
        delta = 0.0 if overlaps else 1.0
        if not clipped and float(np.where(p > 0, np.abs(g), -g).max()) < enough:
            break
    return p


def rub(kernels: Kernels, target: Array, start: Array, limit: Array, tolerance: float) -> Array:
    """Tractions q (2, ...) with |q| <= limit that bring the points with a limit to `target`.

    Minimises q.Cq/2 - q.target over the friction discs: the incremental Coulomb problem with
    given pressures.
    """

    def project(q: Array) -> Array:
        size = np.sqrt(q[0] * q[0] + q[1] * q[1])
        return q * np.minimum(limit / np.maximum(size, _TINY), 1)

    inside = limit > 0
    count = int(inside.sum())
    q = project(start)
    slope = np.where(inside, kernels.shear(q) - target, 0)
    scale = max(float(np.abs(np.where(inside, target, 0)).max()), 1e-3)
    step = np.float32(1.0 / kernels.t_xx[0, 1])
    for _ in range(_FRICTION_ITERATIONS):
        change = project(q - step * slope) - q
        image = kernels.shear(change)
        curvature = float(np.vdot(change, image))
        size = float(np.vdot(change, change))
        if size == 0 or curvature <= 0:
            break
        length = min(1.0, -float(np.vdot(change, slope)) / curvature)
        if length <= 0:
            break
        q = q + np.float32(length) * change
        slope = np.where(inside, slope + np.float32(length) * image, 0)
        if np.sqrt(size / count) < tolerance * scale * max(float(step), 1e-9):
            break
        step = np.float32(size / curvature)
    return q
