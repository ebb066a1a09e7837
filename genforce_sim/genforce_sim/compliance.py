"""Compliance of a bonded elastic layer, by wavenumber and on a grid.

Small-strain elasticity of a layer of thickness h on a rigid base is diagonal in Fourier space: for
each in-plane wavenumber a 3x3 compliance links surface tractions to displacements. Units: mm, MPa.
Fields are indexed [row, column] = [y, x], both ascending; vector fields have shape (3, rows,
columns) in the sensor frame (z out of the gel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from genforce_collect.config import GelConfig

Array = NDArray[Any]

_I = np.complex64(1j)


@dataclass(frozen=True)
class Grid:
    """A periodic grid of square cells centred on the sensor origin."""

    rows: int
    columns: int
    cell_mm: float

    @property
    def x_mm(self) -> Array:
        """Column centres (columns,)."""
        return (np.arange(self.columns) - (self.columns - 1) / 2) * self.cell_mm

    @property
    def y_mm(self) -> Array:
        """Row centres (rows,), ascending."""
        return (np.arange(self.rows) - (self.rows - 1) / 2) * self.cell_mm

    @classmethod
    def over(cls, width_mm: float, height_mm: float, cell_mm: float) -> Grid:
        """The smallest grid of at least this size whose transforms are fast."""
        return cls(
            rows=_even_fast_length(height_mm / cell_mm),
            columns=_even_fast_length(width_mm / cell_mm),
            cell_mm=cell_mm,
        )


def _even_fast_length(length: float) -> int:
    return 2 * int(fft.next_fast_len(math.ceil(length / 2), real=True))


class LayerResponse(NamedTuple):
    """Displacement per surface traction at one depth of a layer, by wavenumber, in mm/MPa.

    Index l is along the wave vector, s across it; l lags z by a quarter wave, hence the i.
    """

    zz: Array  # u_z / t_z
    lz: Array  # u_l / (i t_z)
    zl: Array  # u_z / (-i t_l); equal to lz at the surface
    ll: Array  # u_l / t_l
    ss: Array  # u_s / t_s


@dataclass(frozen=True)
class Compliance:
    """`LayerResponse` on a grid, in the layout of `rfft2`.

    With tractions (qx, qy, tz): u_t = t q + i c tz and u_z = n tz - i c_down . q.
    """

    t_xx: Array
    t_xy: Array
    t_yy: Array
    n: Array
    c_x: Array
    c_y: Array
    c_down_x: Array
    c_down_y: Array


def layer_compliance(
    k: Array, thickness_mm: float, modulus_mpa: float, poisson: float, depth_mm: float = 0.0
) -> LayerResponse:
    """Response at `depth_mm` below the surface of a bonded layer, for wavenumbers k (rad/mm).

    Plane-strain solutions in Papkovich-Neuber form, two growing and two decaying, fitted to a
    clamped base and the surface tractions; at the surface zz is the classical
    (1-nu)/(mu k) (2K sinh 2a - 4a)/(2K cosh 2a + K^2 + 1 + 4a^2), a = kh, K = 3 - 4 nu.
    """
    k = np.asarray(k, dtype=np.float64)
    mu = modulus_mpa / (2 * (1 + poisson))
    kappa = 3 - 4 * poisson
    h, z = thickness_mm, thickness_mm - depth_mm
    safe = np.where(k > 0, k, 1.0)

    def basis(at: float) -> tuple[Array, Array, Array, Array]:
        """Rows U, W, szz/(2 mu k), sxz/(2 mu k) of the four solutions at height `at`."""
        up, down = np.exp(safe * (at - h)), np.exp(-safe * at)
        rise, fall = safe * (at - h), safe * at
        u = np.stack([up, down, rise * up, fall * down])
        w = np.stack([up, -down, (rise - kappa) * up, (-fall - kappa) * down])
        szz = np.stack(
            [
                up,
                down,
                (rise - 2 * (1 - poisson)) * up,
                -(-fall - 2 * (1 - poisson)) * down,
            ]
        )
        sxz = np.stack(
            [up, -down, (rise - (1 - 2 * poisson)) * up, (-fall - (1 - 2 * poisson)) * down]
        )
        return u, w, szz, sxz

    base_u, base_w, _, _ = basis(0.0)
    _, _, top_zz, top_xz = basis(h)
    system = np.moveaxis(np.stack([base_u, base_w, top_zz, top_xz]), (0, 1), (-2, -1))
    load = np.zeros((*k.shape, 4, 2))
    load[..., 2, 0] = load[..., 3, 1] = 1.0
    weights = np.linalg.solve(system, load) / (2 * mu * safe)[..., None, None]
    u, w, _, _ = basis(z)
    u, w = np.moveaxis(u, 0, -1), np.moveaxis(w, 0, -1)
    u_from = np.einsum("...i,...ij->...j", u, weights)
    w_from = np.einsum("...i,...ij->...j", w, weights)
    across = (
        np.exp(-safe * depth_mm)
        * (-np.expm1(-2 * safe * z))
        / (mu * safe * (1 + np.exp(-2 * safe * h)))
    )
    uniform = k == 0
    oedometric = (1 + poisson) * (1 - 2 * poisson) / (modulus_mpa * (1 - poisson))
    return LayerResponse(
        zz=np.where(uniform, z * oedometric, w_from[..., 0]),
        lz=np.where(uniform, 0.0, u_from[..., 0]),
        zl=np.where(uniform, 0.0, w_from[..., 1]),
        ll=np.where(uniform, z / mu, u_from[..., 1]),
        ss=np.where(uniform, z / mu, across),
    )


def grid_compliance(grid: Grid, gel: GelConfig, depth_mm: float = 0.0) -> Compliance:
    """The compliance of `gel` on `grid` between surface tractions and the plane at `depth_mm`."""
    kx = 2 * np.pi * fft.rfftfreq(grid.columns, grid.cell_mm)[None, :]
    ky = 2 * np.pi * fft.fftfreq(grid.rows, grid.cell_mm)[:, None]
    k = np.hypot(kx, ky)
    modulus_mpa = gel.youngs_modulus_pa * 1e-6
    layer = layer_compliance(k, gel.thickness_mm, modulus_mpa, gel.poisson_ratio, depth_mm)
    safe = np.where(k > 0, k, 1.0)
    nx, ny = kx / safe, ky / safe
    # What is odd in a wavenumber has no real value at its Nyquist.
    below_x, below_y = kx < kx.max(), np.abs(ky) < np.abs(ky).max()
    parts = {
        "t_xx": nx**2 * layer.ll + ny**2 * layer.ss,
        "t_xy": nx * ny * (layer.ll - layer.ss) * (below_x & below_y),
        "t_yy": ny**2 * layer.ll + nx**2 * layer.ss,
        "n": layer.zz,
        "c_x": nx * layer.lz * below_x,
        "c_y": ny * layer.lz * below_y,
        "c_down_x": nx * layer.zl * below_x,
        "c_down_y": ny * layer.zl * below_y,
    }
    return Compliance(**{name: part.astype(np.float32) for name, part in parts.items()})


def displace(c: Compliance, traction: Array) -> Array:
    """Displacement (3, ...) mm under a traction field (3, ...) MPa."""
    x, y, z = fft.rfft2(traction, axes=(1, 2))
    out = np.stack(
        [
            c.t_xx * x + c.t_xy * y + _I * c.c_x * z,
            c.t_xy * x + c.t_yy * y + _I * c.c_y * z,
            c.n * z - _I * (c.c_down_x * x + c.c_down_y * y),
        ]
    )
    return fft.irfft2(out, traction.shape[1:], axes=(1, 2))


def displace_by_pressure(c: Compliance, pressure: Array) -> Array:
    """Displacement (3, ...) mm under a pressure (...) MPa."""
    z = fft.rfft2(pressure)
    iz = _I * z
    return fft.irfft2(np.stack([-c.c_x * iz, -c.c_y * iz, -c.n * z]), pressure.shape, axes=(1, 2))


def displace_by_shear(c: Compliance, shear: Array) -> Array:
    """Displacement (3, ...) mm under tangential tractions (2, ...) MPa."""
    x, y = fft.rfft2(shear, axes=(1, 2))
    out = np.stack(
        [
            c.t_xx * x + c.t_xy * y,
            c.t_xy * x + c.t_yy * y,
            -_I * (c.c_down_x * x + c.c_down_y * y),
        ]
    )
    return fft.irfft2(out, shear.shape[1:], axes=(1, 2))
