"""The pretraining grid of the original: 18 indenters, 9 places, 5 depths, 12 marker patterns.

Written as sim/<indenter>/<pattern>/<x>_<y>_<z>.jpg (mm) and sim/<pattern>_ref.jpg, white markers
on black, 640x480. One press serves all patterns, since they are painted on the same gel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import SensorConfig
from genforce_collect.errors import DataError
from genforce_sim.sensor import SimulatedSensor

PLACES_MM = (-4.0, 0.0, 4.0)
DEPTHS_MM = (0.3, 0.6, 0.9, 1.2, 1.5)
_STEP_S = 0.03
_TOOL_DOWN = (np.pi, 0.0, 0.0)

PATTERNS: dict[str, dict[str, Any]] = {
    f"{name}{number}": {"pattern": name.lower(), "pitch_mm": pitch, "diameter_mm": diameter} | size
    for name, variants in {
        "Array": [
            (1.55, 0.60, {"rows": 13, "columns": 16}),
            (2.30, 0.80, {"rows": 9, "columns": 11}),
            (1.90, 0.70, {"rows": 11, "columns": 13}),
            (2.70, 1.00, {"rows": 8, "columns": 9}),
        ],
        "Circle": [
            (1.60, 0.60, {"rows": 7}),
            (2.30, 0.80, {"rows": 5}),
            (1.90, 0.70, {"rows": 6}),
            (2.70, 1.00, {"rows": 4}),
        ],
        "Diamond": [
            (1.25, 0.55, {"rows": 14, "columns": 14}),
            (2.00, 0.80, {"rows": 9, "columns": 9}),
            (1.60, 0.65, {"rows": 11, "columns": 11}),
            (2.40, 0.95, {"rows": 8, "columns": 8}),
        ],
    }.items()
    for number, (pitch, diameter, size) in enumerate(variants, start=1)
}


def pattern_sensor(pattern: str) -> SensorConfig:
    """The gel of the pretraining grid with one of its patterns."""
    return SensorConfig.model_validate(
        {
            "name": pattern,
            "kind": "dots",
            "px_per_mm": 27.0,
            "gel": {
                "width_mm": 25.0,
                "height_mm": 25.0,
                "thickness_mm": 4.0,
                "youngs_modulus_pa": 1.45e5,
                "poisson_ratio": 0.45,
                "relaxation_ratio": 0.0,
            },
            "layout": PATTERNS[pattern],
        }
    )


def pretrain_tasks(
    root: Path, indenters: tuple[str, ...], quick: bool
) -> Iterator[tuple[Any, ...]]:
    """Calls (function, arguments) that make the grid; `quick` is 2 indenters at 2 places."""
    yield write_references, (root,)
    places = [(x, y) for x in PLACES_MM for y in PLACES_MM]
    for indenter in indenters[:2] if quick else indenters:
        for place in places[4:6] if quick else places:
            yield write_place, (root, indenter, place)


def write_references(root: Path) -> int:
    """The no-contact image of every pattern."""
    for pattern in PATTERNS:
        sensor = SimulatedSensor(pattern_sensor(pattern), "sphere", imperfections=False)
        _write(root / "sim" / f"{pattern}_ref.jpg", sensor.mask(None))
    return len(PATTERNS)


def write_place(root: Path, indenter: str, place_mm: tuple[float, float]) -> int:
    """All depths of one place on all patterns, unless they are there; returns the images."""
    folder = root / "sim" / Path(indenter).stem
    x, y = place_mm
    paths = {
        (pattern, depth): folder / pattern / f"{x:.0f}_{y:.0f}_{depth:.1f}.jpg"
        for pattern in PATTERNS
        for depth in DEPTHS_MM
    }
    if all(path.is_file() for path in paths.values()):
        return len(paths)
    gels = {
        pattern: SimulatedSensor(pattern_sensor(pattern), indenter, imperfections=False)
        for pattern in PATTERNS
    }
    pressed = next(iter(gels.values()))
    for depth in DEPTHS_MM:
        state = pressed.step(np.array([x * 1e-3, y * 1e-3, -depth * 1e-3, *_TOOL_DOWN]), _STEP_S)
        for pattern, gel in gels.items():
            _write(paths[pattern, depth], gel.mask(state))
    return len(paths)


def _write(path: Path, mask: NDArray[np.bool_]) -> None:
    """A mask as .jpg, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(".jpg", mask.astype(np.uint8) * 255)
    if not done:
        raise DataError(f"{path}: the image could not be encoded")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data.tobytes())
    os.replace(partial, path)
