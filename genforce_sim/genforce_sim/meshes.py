"""Any mesh as an indenter: millimetres, tip along +z, the tool axis through its origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray

from genforce_collect.errors import ConfigError
from genforce_sim.indenters import HALF_EXTENT_MM, REACH_MM, SAMPLE_MM, Indenter, sample_points

Array = NDArray[Any]

SIZE_MM = (2.0, 100.0)  # allowed largest extent of a mesh
_BLUNT_MM = 0.3  # how far behind an end its cross-section is compared


def load_mesh_indenter(path: Path) -> Indenter:
    """Height map of a mesh file (.stl, .obj, .ply, ...), watertight or not.

    Raises `ConfigError` where it is no mesh, empty, not in millimetres, upside down, off the tool
    axis or wider than the height map.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such mesh file")
    try:
        mesh: Any = trimesh.load(path, force="mesh")
    except Exception as error:  # trimesh's readers raise whatever their formats do
        raise ConfigError(f"{path}: not a readable mesh: {error}") from error
    triangles = np.asarray(mesh.triangles, np.float64) if len(mesh.faces) else np.empty((0, 3, 3))
    return Indenter(path.stem, height_map(triangles, str(path)))


def height_map(triangles: Array, origin: str) -> NDArray[np.float32]:
    """Distance behind the tip (mm) over the tool plane, of triangles (n, 3, 3) in mm.

    `origin` names where they came from in the `ConfigError`.
    """
    if not len(triangles) or not np.isfinite(triangles).all():
        raise ConfigError(f"{origin}: the mesh is empty or holds NaN")
    low, high = triangles.min(axis=(0, 1)), triangles.max(axis=(0, 1))
    size = float((high - low).max())
    if not SIZE_MM[0] <= size <= SIZE_MM[1]:
        hint = "; scale inches by 25.4, metres by 1000" if size < SIZE_MM[0] else ""
        raise ConfigError(
            f"{origin}: is {size:.3g} across, must be {SIZE_MM[0]:.0f} to {SIZE_MM[1]:.0f} mm{hint}"
        )
    if not ((low[:2] <= 0) & (high[:2] >= 0)).all():
        raise ConfigError(f"{origin}: the tool axis x = y = 0 passes the mesh by; centre it")
    face = triangles[triangles[:, :, 2].max(axis=1) > high[2] - REACH_MM / 2]
    if np.abs(face[:, :, :2]).max() > HALF_EXTENT_MM:
        raise ConfigError(
            f"{origin}: reaches {np.abs(face[:, :, :2]).max():.1f} mm from the tool axis, "
            f"at most {HALF_EXTENT_MM:.0f} mm are simulated"
        )
    top = _from_above(triangles) - high[2]
    flipped = triangles * np.array([1, -1, -1])
    bottom = _from_above(flipped) + low[2]
    tip_area, base_area = (int((side > -_BLUNT_MM).sum()) for side in (top, bottom))
    if tip_area > 1.2 * base_area:
        raise ConfigError(
            f"{origin}: its +z end is wider than its -z end; the tip must point along +z"
        )
    return np.minimum(-top, REACH_MM).astype(np.float32)


def _from_above(triangles: Array) -> Array:
    """Highest z over each sample of the tool plane; -inf beside the triangles."""
    points = sample_points()
    highest = np.full((len(points), len(points)), -np.inf)
    corners = np.clip(triangles[:, :, :2], -HALF_EXTENT_MM, HALF_EXTENT_MM)
    first = np.ceil((corners.min(axis=1) - points[0]) / SAMPLE_MM - 1e-9).astype(int)
    last = np.floor((corners.max(axis=1) - points[0]) / SAMPLE_MM + 1e-9).astype(int)
    for (a, b, c), (i0, j0), (i1, j1) in zip(triangles, first, last, strict=True):
        area = (b[0] - a[0]) * (c[1] - a[1]) - (c[0] - a[0]) * (b[1] - a[1])
        if abs(area) < 1e-12 or i1 < i0 or j1 < j0:  # upright, or between two samples
            continue
        x, y = points[i0 : i1 + 1][None, :], points[j0 : j1 + 1][:, None]
        beta = ((x - a[0]) * (c[1] - a[1]) - (c[0] - a[0]) * (y - a[1])) / area
        gamma = ((b[0] - a[0]) * (y - a[1]) - (x - a[0]) * (b[1] - a[1])) / area
        inside = (beta >= -1e-9) & (gamma >= -1e-9) & (beta + gamma <= 1 + 1e-9)
        z = a[2] + beta * (b[2] - a[2]) + gamma * (c[2] - a[2])
        window = highest[j0 : j1 + 1, i0 : i1 + 1]
        np.maximum(window, np.where(inside, z, -np.inf), out=window)
    return highest
