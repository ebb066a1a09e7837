"""A gel with its history: what it does when a rigid indenter moves on it.

The gel is a bonded, viscoelastic layer (`compliance`) in frictional contact (`contact`); all its
tractions relax as one standard linear solid. The indenter meets each material point where it has
moved to, so a contact that sticks keeps its shape when it is sheared.

Units inside this module: mm, N, MPa, s. Arrays are indexed [row, column] = [y, x], both ascending,
and vector fields have shape (3, rows, columns) in the sensor frame (z out of the gel).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import GelConfig
from genforce_sim.compliance import (
    Compliance,
    Grid,
    displace,
    displace_by_pressure,
    displace_by_shear,
    grid_compliance,
)
from genforce_sim.contact import Patches, press, rub

Array = NDArray[Any]

# The face of an indenter above the points that are now at x, y: its z in mm.
SurfaceOver = Callable[[Array, Array], Array]

_SLIPPING = 0.999  # part of the friction limit from which a point slips
_TOUCHING_RELATIVE = 1e-4  # pressures below this part of the peak count as the edge of contact
_REACH = 0.1  # points less than this part of the depth away may be lifted into the contact


@dataclass(frozen=True)
class RigidMotion:
    """In-plane motion of the tool between two steps: how far tool points at (x, y) moved."""

    shift_mm: tuple[float, float] = (0.0, 0.0)
    turn_rad: float = 0.0
    centre_mm: tuple[float, float] = (0.0, 0.0)

    def at(self, x: Array, y: Array) -> Array:
        """Displacements (2, ...) in mm of the tool points now at x, y (mm)."""
        cos, sin = math.cos(self.turn_rad) - 1.0, math.sin(self.turn_rad)
        rx, ry = x - self.centre_mm[0], y - self.centre_mm[1]
        return np.stack(
            [
                self.shift_mm[0] + cos * rx - sin * ry,
                self.shift_mm[1] + sin * rx + cos * ry,
            ]
        ).astype(np.float32)


class Elastomer:
    """A gel and its history: what it does when an indenter moves on it."""

    def __init__(self, gel: GelConfig, grid: Grid, tolerance: float = 2e-3) -> None:
        """`tolerance` is the relative residual at which both solvers stop."""
        self.gel = gel
        self.grid = grid
        self._tolerance = tolerance
        self._c = grid_compliance(grid, gel)
        self._patches = Patches(grid, self._c)
        x, y = np.meshgrid(grid.x_mm, grid.y_mm)
        self.x_mm, self.y_mm = x.astype(np.float32), y.astype(np.float32)
        self._on_gel = (np.abs(x) <= gel.width_mm / 2) & (np.abs(y) <= gel.height_mm / 2)
        self.rest_z_mm = dome_height(self.x_mm, self.y_mm, gel.dome_radius_mm)
        self._deeper: dict[float, Compliance] = {}
        self.reset()

    def reset(self) -> None:
        """Forget contact, friction and relaxation."""
        shape = (3, self.grid.rows, self.grid.columns)
        self.traction: Array = np.zeros(shape, np.float32)  # MPa
        self.displacement: Array = np.zeros(shape, np.float32)  # mm
        self._elastic: Array = np.zeros(shape, np.float32)  # MPa, to hold u unrelaxed
        self._branch: Array = np.zeros(shape, np.float32)  # traction of the relaxing branch
        self._anchor = np.zeros(shape[1:], np.float32)[None].repeat(2, axis=0)
        self._touching = np.zeros(shape[1:], bool)
        self._at_rest = True

    @property
    def in_contact(self) -> bool:
        """Whether any point carries pressure."""
        return bool(self._touching.any())

    @property
    def wrench(self) -> Array:
        """(6,) force N and moment N.mm on the gel about the sensor origin."""
        if not self.in_contact:
            return np.zeros(6)
        inside = self._touching
        t = self.traction[:, inside].astype(np.float64) * self.grid.cell_mm**2
        u = self.displacement[:, inside]
        at = np.stack(
            [
                self.x_mm[inside] + u[0],
                self.y_mm[inside] + u[1],
                self.rest_z_mm[inside] + u[2],
            ]
        )
        return np.concatenate([t.sum(axis=1), np.cross(at, t, axis=0).sum(axis=1)])

    def displacement_at(self, depth_mm: float) -> Array:
        """Displacement (3, ...) mm of the material `depth_mm` below the surface."""
        if depth_mm == 0 or self._at_rest:
            return self.displacement
        if depth_mm not in self._deeper:
            self._deeper[depth_mm] = grid_compliance(self.grid, self.gel, depth_mm)
        return displace(self._deeper[depth_mm], self._elastic)

    def step(self, surface_over: SurfaceOver, motion: RigidMotion, dt_s: float) -> None:
        """Advance by one small motion of the indenter.

        `surface_over(x, y)` gives the height (mm) of the indenter's face above points x, y (mm);
        `motion` is how its points moved in the plane since the last step; `dt_s` gel time.
        """
        relax = self.gel.relaxation_ratio
        ratio = dt_s / self.gel.relaxation_time_s
        decay = math.exp(-ratio)
        gamma = -math.expm1(-ratio) / ratio if ratio > 1e-9 else 1.0
        stiffness = 1 - relax + relax * gamma
        remembered = None
        history: Array = np.zeros_like(self.traction)
        if relax and not self._at_rest:
            remembered = decay * self._branch - relax * gamma * self._elastic
            history = displace(self._c, remembered) / -stiffness

        carried = np.where(self._touching, motion.at(*self._current()), 0.0)
        anchor = np.where(self._touching, self._anchor, self.displacement[:2]) + carried
        # All tractions are kept relative to the present stiffness, so that u = history + C t.
        q, p = self.traction[:2] / stiffness, -self.traction[2] / stiffness
        # Friction first, with the old pressure: it tells where the gel around the contact goes,
        # and so what the indenter meets there.
        moved = history[:2] + displace_by_pressure(self._c, p)[:2]
        if carried.any():
            q = self._rub(anchor - moved, q, self.gel.friction * p)
        by_shear = displace_by_shear(self._c, q)
        moved = moved + by_shear[:2]
        height = surface_over(self.x_mm + moved[0], self.y_mm + moved[1]) - self.rest_z_mm
        gap = np.where(self._on_gel, height - history[2], np.float32(1e3)).astype(np.float32)
        if not (self._touching.any() or (gap < 0).any()):
            self._leave(remembered, history, stiffness, decay, relax * gamma)
            return

        p, by_pressure = self._press(gap - by_shear[2], p)
        limit = self.gel.friction * p
        q = self._rub(anchor - history[:2] - by_pressure[:2], q, limit)
        self._touching = p > 0
        self.traction = np.concatenate([q, -p[None]]) * np.float32(stiffness)
        self.displacement = history + by_pressure + displace_by_shear(self._c, q)
        slips = self._touching & (np.hypot(q[0], q[1]) >= _SLIPPING * limit)
        self._anchor = np.where(slips, self.displacement[:2], anchor)
        self._at_rest = False
        self._remember(remembered, stiffness, decay, relax * gamma)

    def _press(self, gap: Array, start: Array) -> tuple[Array, Array]:
        """Pressures (...) and the displacement (3, ...) they cause."""
        depth = max(float(-gap.min()), 1e-6)
        patch = self._patches.around((gap < _REACH * depth) | (start > 0))
        while True:
            found = press(patch.kernels, patch.cut(gap), patch.cut(start), self._tolerance)
            found = np.where(found > _TOUCHING_RELATIVE * found.max(initial=0.0), found, 0)
            p = patch.paste(found, gap.shape)
            displacement = displace_by_pressure(self._c, p)
            missed = (gap - displacement[2] < -2 * self._tolerance * depth) & (p == 0)
            patch.cut(missed)[...] = False
            if not missed.any():
                return p, displacement
            patch = self._patches.whole  # the gel bulged into the indenter beside the patch

    def _rub(self, target: Array, start: Array, limit: Array) -> Array:
        """Shear tractions (2, ...) within the limit."""
        if not limit.any():
            return np.zeros_like(start)
        patch = self._patches.around(limit > 0)
        cut = patch.cut
        q = rub(patch.kernels, cut(target), cut(start), cut(limit), self._tolerance)
        return patch.paste(q.astype(np.float32), limit.shape)

    def _current(self) -> tuple[Array, Array]:
        return self.x_mm + self.displacement[0], self.y_mm + self.displacement[1]

    def _leave(
        self, remembered: Array | None, history: Array, stiffness: float, decay: float, gain: float
    ) -> None:
        self.traction = np.zeros_like(self.traction)
        self._touching = np.zeros_like(self._touching)
        self.displacement = history
        self._remember(remembered, stiffness, decay, gain)
        if not self._at_rest and np.abs(history).max() < 1e-5:
            self.reset()

    def _remember(
        self, remembered: Array | None, stiffness: float, decay: float, gain: float
    ) -> None:
        before = self._elastic
        held = self.traction if remembered is None else self.traction - remembered
        self._elastic = held / stiffness
        self._branch = decay * self._branch + gain * (self._elastic - before)


def dome_height(x: Array, y: Array, radius_mm: float | None) -> Array:
    """Height (mm, <= 0) of the undeformed surface: flat, or a dome with its apex at the origin."""
    if radius_mm is None:
        return np.zeros_like(x)
    inside = np.maximum(radius_mm**2 - x**2 - y**2, (0.2 * radius_mm) ** 2)
    return np.sqrt(inside) - radius_mm
