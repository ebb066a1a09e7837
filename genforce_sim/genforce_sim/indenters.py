"""The 18 indenters of the GenForce set, generated at their size, and any mesh as an indenter.

An indenter is a height map: for points (x, y) of the tool frame, in mm, how far its face lies
behind the tip (0 at the tip, positive away from the gel). The tool frame has its origin at the
tip and its z axis towards the gel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.errors import ConfigError

Array = NDArray[Any]
HeightFunction = Callable[[Array, Array], Array]

REACH_MM = 10.0  # from the tip to the 16 x 16 mm plate that carries it
HALF_EXTENT_MM = 12.0  # of the sampled height map
SAMPLE_MM = 0.05
FILLET_MM = 0.2  # edges of machined and printed tips are not sharper than this


@dataclass(frozen=True)
class Indenter:
    """A sampled height map in the tool frame."""

    name: str
    height_mm: NDArray[np.float32]  # (n, n), rows along y, columns along x
    sample_mm: float = SAMPLE_MM

    def behind_tip(self, x_mm: Array, y_mm: Array) -> Array:
        """Height behind the tip in mm at tool-frame points, bilinear; the plate outside the map."""
        centre = np.float32((self.height_mm.shape[0] - 1) / 2)
        scale = np.float32(1 / self.sample_mm)
        return cv2.remap(
            self.height_mm,
            (x_mm * scale + centre).astype(np.float32),
            (y_mm * scale + centre).astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )


def load_indenter(name_or_path: str | Path) -> Indenter:
    """One of `INDENTERS` by name, or a mesh file (mm, tip along +z). Raises `ConfigError`."""
    if str(name_or_path) in INDENTERS:
        return _generate(str(name_or_path))
    path = Path(name_or_path)
    if not path.suffix:
        raise ConfigError(
            f"unknown indenter '{name_or_path}': known are {', '.join(INDENTERS)}; "
            f"or give the path of a mesh (.stl, .obj, .ply)"
        )
    from genforce_sim.meshes import load_mesh_indenter

    return load_mesh_indenter(path)


@cache
def _generate(name: str) -> Indenter:
    return from_function(name, INDENTERS[name])


def from_function(name: str, height: HeightFunction) -> Indenter:
    """Sample a height function (mm) of the tool-frame x, y (mm)."""
    x, y = np.meshgrid(sample_points(), sample_points())
    return Indenter(name, np.minimum(height(x, y), REACH_MM).astype(np.float32))


def sample_points() -> Array:
    """Sample positions (mm) along either axis of a height map."""
    half = round(HALF_EXTENT_MM / SAMPLE_MM)
    return np.arange(-half, half + 1) * SAMPLE_MM


# --- shapes -----------------------------------------------------------------------------------


def ball(radius_mm: float) -> HeightFunction:
    """A sphere of this radius."""

    def height(x: Array, y: Array) -> Array:
        inside = radius_mm**2 - x**2 - y**2
        return np.where(inside > 0, radius_mm - np.sqrt(np.maximum(inside, 0)), REACH_MM)

    return height


def extrude(outline: HeightFunction, fillet_mm: float = FILLET_MM) -> HeightFunction:
    """A flat face with the given outline (signed distance in mm, negative inside)."""

    def height(x: Array, y: Array) -> Array:
        inside = -outline(x, y)
        rounded = fillet_mm - np.clip(inside, 0, fillet_mm)
        return np.where(
            inside >= 0, fillet_mm - np.sqrt(np.maximum(fillet_mm**2 - rounded**2, 0)), REACH_MM
        )

    return height


def disc(radius_mm: float, x_mm: float = 0.0, y_mm: float = 0.0) -> HeightFunction:
    """Outline of a disc."""
    return lambda x, y: np.hypot(x - x_mm, y - y_mm) - radius_mm


def box(half_x_mm: float, half_y_mm: float) -> HeightFunction:
    """Outline of a rectangle."""

    def distance(x: Array, y: Array) -> Array:
        dx, dy = np.abs(x) - half_x_mm, np.abs(y) - half_y_mm
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
        return outside + np.minimum(np.maximum(dx, dy), 0)

    return distance


def polygon(corners: list[tuple[float, float]]) -> HeightFunction:
    """Outline of a simple polygon."""

    def distance(x: Array, y: Array) -> Array:
        nearest = np.full(np.shape(x), np.inf)
        inside = np.zeros(np.shape(x), bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            ex, ey = x1 - x0, y1 - y0
            along = np.clip(((x - x0) * ex + (y - y0) * ey) / (ex**2 + ey**2), 0, 1)
            nearest = np.minimum(nearest, np.hypot(x - x0 - along * ex, y - y0 - along * ey))
            if ey:
                crossing = x < x0 + ex * (y - y0) / ey
                inside ^= ((y0 > y) != (y1 > y)) & crossing
        return np.where(inside, -nearest, nearest)

    return distance


def regular(sides: int, radius_mm: float, turn_deg: float = 0.0) -> HeightFunction:
    """Outline of a regular polygon by its circumradius."""
    turns = [math.radians(turn_deg) + 2 * math.pi * i / sides for i in range(sides)]
    return polygon([(radius_mm * math.cos(t), radius_mm * math.sin(t)) for t in turns])


def without(outline: HeightFunction, hole: HeightFunction) -> HeightFunction:
    """The outline less the hole."""
    return lambda x, y: np.maximum(outline(x, y), -hole(x, y))


def within(outline: HeightFunction, face: HeightFunction) -> HeightFunction:
    """A curved face cut to an outline, with its edge rounded."""
    edge = extrude(outline)
    return lambda x, y: np.minimum(np.maximum(face(x, y), edge(x, y)), REACH_MM)


def _cone(x: Array, y: Array) -> Array:
    # 90 degrees across, radius 4 mm; the hyperbola rounds the tip to 0.3 mm.
    r = np.hypot(x, y)
    return np.where(r < 4.0, np.sqrt(r**2 + 0.3**2) - 0.3, REACH_MM)


def _bar_lying(x: Array, y: Array) -> Array:
    face = 3.0 - np.sqrt(np.maximum(9.0 - x**2, 0))
    return np.where((np.abs(y) <= 7.0) & (np.abs(x) < 3.0), face, REACH_MM)


def _dimple(x: Array, y: Array) -> Array:
    return np.sqrt(np.maximum(4.0 - x**2 - y**2, 0))


def _bumps(x: Array, y: Array) -> Array:
    near_x, near_y = (v - 2.5 * np.clip(np.round(v / 2.5), -1, 1) for v in (x, y))
    bump = ball(1.0)(near_x, near_y)
    return np.where(bump < 1.0, bump, np.where(box(4.0, 4.0)(x, y) < 0, 1.0, REACH_MM))


def _ring_round(x: Array, y: Array) -> Array:
    off = np.hypot(x, y) - 3.0
    return np.where(np.abs(off) < 1.0, 1.0 - np.sqrt(np.maximum(1.0 - off**2, 0)), REACH_MM)


def _ripples(x: Array, y: Array) -> Array:
    return 0.5 * (1 - np.cos(2 * np.pi * x / 4.0))


INDENTERS: dict[str, HeightFunction] = {
    "cone": _cone,
    "cylinder": extrude(disc(3.0)),
    "cylinder_sh": extrude(without(disc(3.5), disc(2.7))),
    "cylinder_si": _bar_lying,
    "dotin": within(box(4.0, 4.0), _dimple),
    "dots": _bumps,
    "hemisphere": within(box(7.0, 7.0), ball(20.0)),
    "hexagon": extrude(regular(6, 3.5)),
    "line": extrude(box(1.0, 8.0)),
    "moon": extrude(without(disc(3.5), disc(2.7, x_mm=1.7))),
    "pacman": extrude(without(disc(3.5), polygon([(0.0, 0.0), (5.0, -3.5), (5.0, 3.5)]))),
    "prism": extrude(box(2.5, 3.5)),
    "random": extrude(
        polygon(
            [
                (-3.4, 1.0),
                (2.0, 2.3),
                (3.6, 0.9),
                (1.7, 0.4),
                (2.6, -2.0),
                (1.0, -2.3),
                (-0.6, 0.2),
                (-2.4, -0.8),
                (-3.3, -0.6),
            ]
        )
    ),
    "sphere": ball(5.0),
    "sphere_s": ball(3.0),
    "torus": _ring_round,
    "triangle": extrude(regular(3, 3.5, turn_deg=90.0)),
    "wave": within(box(4.0, 4.0), _ripples),
}
