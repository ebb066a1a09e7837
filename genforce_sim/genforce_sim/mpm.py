"""Reference solver: finite-strain MLS-MPM, the method of the original simulation.

It takes minutes where the spectral solver takes milliseconds, and knows neither relaxation nor
markers; use it to see where small strain ends. Needs Taichi (requirements/mpm.txt).
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import GelConfig
from genforce_collect.errors import ConfigError
from genforce_sim.indenters import Indenter

Array = NDArray[Any]

PRESS_SPEED_MM_S = 150.0  # far below the waves of the gel, 20 m/s
SETTLE_S = 1.5e-3
_DEVICES = ("cpu", "gpu")
_started: set[str] = set()


@dataclass(frozen=True)
class MpmResult:
    """The gel after a press."""

    rest_mm: Array  # (n, 3) particle positions before, sensor frame
    particles_mm: Array  # (n, 3) and after
    surface: Array  # (m,) which of them make the surface
    force_n: Array  # (3,) on the gel
    steps: int

    @property
    def surface_displacement_mm(self) -> Array:
        """(m, 3) displacement of the surface particles."""
        return (self.particles_mm - self.rest_mm)[self.surface]

    def save(self, path: Path) -> None:
        """Particle positions as `.npz`: `p_xpos_list` as the original wrote it, and `rest`."""
        np.savez_compressed(path, p_xpos_list=self.particles_mm[None], rest=self.rest_mm)


def press(
    gel: GelConfig,
    indenter: Indenter,
    depth_mm: float,
    shear_mm: tuple[float, float] = (0.0, 0.0),
    cell_mm: float = 0.4,
    device: str = "cpu",
) -> MpmResult:
    """Press the indenter in at the centre, then move it sideways, and let the gel settle.

    Raises `ConfigError` where Taichi is missing or the depth is beyond the gel.
    """
    if not 0 < depth_mm < gel.thickness_mm:
        raise ConfigError(f"depth {depth_mm:g} mm: must be within the {gel.thickness_mm:g} mm gel")
    solid = make_solid(gel, indenter, cell_mm, device)
    corners = [np.zeros(3), np.array([0, 0, -depth_mm]), np.array([*shear_mm, -depth_mm])]
    steps, tip = 0, corners[0]
    for start, end in [*itertools.pairwise(corners), (corners[-1], corners[-1])]:
        duration = float(np.linalg.norm(end - start)) / PRESS_SPEED_MM_S
        settling = end is start
        count = math.ceil((SETTLE_S if settling else duration) / solid.dt_s)
        velocity = (end - start) / max(count * solid.dt_s, 1e-12)
        for step in range(1, count + 1):
            tip = start + (end - start) * (step / count)
            solid.substep(*map(float, tip), *map(float, velocity))
        steps += count
    return MpmResult(
        rest_mm=solid.start_mm,
        particles_mm=solid.x.to_numpy(),
        surface=solid.surface,
        force_n=solid.force.to_numpy(),
        steps=steps,
    )


def make_solid(
    gel: GelConfig, indenter: Indenter, cell_mm: float, device: str, grid_cells: int | None = None
) -> Any:
    """The MLS-MPM block under an undeformed start. Raises `ConfigError` without Taichi."""
    if device not in _DEVICES:
        raise ConfigError(f"device '{device}': must be cpu or gpu")
    os.environ.setdefault("ENABLE_TAICHI_HEADER_PRINT", "0")
    try:
        import taichi as ti
    except ImportError:
        raise ConfigError(
            "the MPM solver needs Taichi: pip install -r requirements/mpm.txt"
        ) from None
    if device not in _started:
        ti.init(arch=getattr(ti, device), log_level=ti.ERROR)
        _started.clear()
        _started.add(device)
    from genforce_sim.mpm_kernels import MpmSolid

    return MpmSolid(
        (gel.width_mm, gel.height_mm, gel.thickness_mm),
        cell_mm,
        gel.youngs_modulus_pa * 1e-6,
        gel.poisson_ratio,
        gel.friction,
        indenter.height_mm,
        indenter.sample_mm,
        grid_cells,
    )
