"""The simulated sensor: physics against closed forms, cost of a labelled frame, and how many times
less that is than a press of the MPM simulation the original makes its frames with."""

from __future__ import annotations

import importlib.util
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rows import Row

from genforce_collect.config import GelConfig, load_sensor
from genforce_sim.compliance import Grid
from genforce_sim.elastomer import Elastomer, RigidMotion
from genforce_sim.sensor import SimulatedSensor

Array = NDArray[Any]

MODULUS_MPA = 0.25
LATTICE_SUM = 3.90026492  # of 1/r over a square lattice on a neutral background
# One press of the original: gel, particle spacing, nodes a side, steps (1.5 mm at 40 mm/s).
ORIGINAL_GEL_MM = (25.0, 25.0, 4.0)
ORIGINAL_SPACING_MM = 0.25
ORIGINAL_GRID_CELLS = 256
ORIGINAL_STEPS = 625
LIVE_FPS = 60.0


def bench() -> list[Row]:
    return [*_physics(), *_speed()]


def _press(gel: GelConfig, cells: int, face: Any) -> float:
    grid = Grid(cells, cells, gel.width_mm / cells)
    elastomer = Elastomer(gel, grid, tolerance=1e-4)
    elastomer.step(face, RigidMotion(), 0.0)
    return -float(elastomer.wrench[2])


def _gel(width: float, thickness: float, poisson: float) -> GelConfig:
    return GelConfig.model_validate(
        {
            "width_mm": width,
            "height_mm": width,
            "thickness_mm": thickness,
            "youngs_modulus_pa": MODULUS_MPA * 1e6,
            "poisson_ratio": poisson,
            "friction": 0.0,
            "relaxation_ratio": 0.0,
        }
    )


def _half_space(width: float, poisson: float) -> GelConfig:
    """A layer whose uniform compliance cancels the periodic images."""
    images = LATTICE_SUM * width * (1 - poisson**2) / math.pi
    return _gel(width, images * (1 - poisson) / ((1 + poisson) * (1 - 2 * poisson)), poisson)


def _physics() -> list[Row]:
    rows = []
    poisson, radius, depth = 0.3, 20.0, 0.1
    hertz = 4 / 3 * MODULUS_MPA / (1 - poisson**2) * math.sqrt(radius) * depth**1.5
    punch = 2 * 3.0 * 0.05 * MODULUS_MPA / (1 - poisson**2)
    for cells in (64, 128, 256):
        sphere = _press(
            _half_space(20.0, poisson), cells, lambda x, y: (x**2 + y**2) / (2 * radius) - depth
        )
        flat = _press(
            _half_space(20.0, poisson),
            cells,
            lambda x, y: np.where(x**2 + y**2 <= 9.0, -0.05, 10.0),
        )
        rows += [
            Row(f"sim: Hertz error, {cells} cells", abs(sphere / hertz - 1) * 100, "%", "<= 3"),
            Row(f"sim: flat punch error, {cells} cells", abs(flat / punch - 1) * 100, "%", "<= 3"),
        ]
    for chi in (0.1, 0.3, 0.5):
        thickness = 1.0 / chi
        width = max(8 * thickness, 10.0)
        force = _press(
            _gel(width, thickness, 0.4999),
            2 * round(width / 0.24),
            lambda x, y: (x**2 + y**2) / 40.0 - 0.05,
        )
        exact = 4 / 3 * MODULUS_MPA / (1 - 0.4999**2) * math.sqrt(20.0) * 0.05**1.5
        exact *= 1 + 1.133 * chi + 1.497 * chi**2 + 1.469 * chi**3 + 0.755 * chi**4
        rows.append(
            Row(f"sim: bonded layer error, chi {chi}", abs(force / exact - 1) * 100, "%", "<= 3")
        )
    return rows


def _speed() -> list[Row]:
    frame_ms, step_ms, render_ms = _labelled_frame_ms()
    rows = [
        Row("sim: contact step, p50", step_ms, "ms"),
        Row("sim: frame and mask, p50", render_ms, "ms"),
        Row("sim: part of a core for a live 60 fps", frame_ms * LIVE_FPS / 1e3, "", "<= 1"),
    ]
    press_s = _mpm_press_s() if importlib.util.find_spec("taichi") else None
    ratio = press_s * 1e3 / frame_ms if press_s else None
    baseline = press_s * 1e3 if press_s else None
    rows.append(Row("sim: labelled 640x480 frame", frame_ms, "ms", "<= 15", baseline, ratio))
    if ratio:
        rows.append(Row("sim: frames for one MPM press", ratio, "", ">= 5000"))
    return rows


def _labelled_frame_ms() -> tuple[float, float, float]:
    """CPU time of one thread: mean of force, mask and colour frame; median of step and render."""
    sensor = SimulatedSensor(load_sensor("array_1"), "sphere", seed=1)
    sensor.render(sensor.step(_tip(0, 1), 0.01))
    depth, shear = np.linspace(0, 1, 30), np.linspace(0, 1, 30)
    tips = [_tip(0, -d) for d in depth] + [_tip(s, -1) for s in shear]
    tips += [_tip(s, -1) for s in shear[::-1]] + [_tip(0, -d) for d in depth[::-1]]
    costs = []
    for tip in tips:
        start = time.thread_time()
        state = sensor.step(tip, 1 / LIVE_FPS)
        solved = time.thread_time()
        sensor.render(state)
        costs.append((solved - start, time.thread_time() - solved))
    step, render = np.array(costs).T * 1e3
    return float((step + render).mean()), float(np.median(step)), float(np.median(render))


def _tip(x_mm: float, z_mm: float) -> Array:
    return np.array([x_mm * 1e-3, 0.0, z_mm * 1e-3, math.pi, 0.0, 0.0])


def _mpm_press_s() -> float:
    """CPU seconds of one press at the original's size, from some of its steps."""
    from genforce_sim.indenters import load_indenter
    from genforce_sim.mpm import make_solid

    width, height, thickness = ORIGINAL_GEL_MM
    gel = _gel(width, thickness, 0.45).model_copy(update={"height_mm": height})
    cell = 2 * ORIGINAL_SPACING_MM
    solid = make_solid(gel, load_indenter("sphere"), cell, "cpu", ORIGINAL_GRID_CELLS)
    tip = (0.0, 0.0, -0.1, 0.0, 0.0, -40.0)
    solid.substep(*tip)
    solid.x.to_numpy()  # waits for the step, which compiles
    start, steps = time.process_time(), 4
    for _ in range(steps):
        solid.substep(*tip)
    solid.x.to_numpy()
    return (time.process_time() - start) / steps * ORIGINAL_STEPS
