"""The field suite: contacts on random sensors with the gel's true displacement.

Every contact is on a sensor of its own: layout, gel, geometry and imperfections are drawn anew, so
that a network trained on it learns the gel and not a layout. On disk it is shards of plain arrays:

    <root>/fields/<NNNNN>/masks.npy          (n, 38400) uint8, numpy.packbits of the marker images
    <root>/fields/<NNNNN>/displacement.npy   (n, 3, 30, 40) int16, um, x y z of the sensor frame
    <root>/fields/<NNNNN>/wrench.npy         (n, 6) float32, N and N.m on the gel
    <root>/fields/<NNNNN>/pose.npy           (n, 6) float32, tip in the sensor frame, m and rad
    <root>/fields/<NNNNN>/contact.npy        (n,) int32, row of the references
    <root>/fields/<NNNNN>/references.npy     (contacts, 38400) uint8, no contact
    <root>/fields/<NNNNN>/geometry.npy       (contacts, 4) float32: px_per_mm, gel thickness mm,
                                             pin lever mm, dome radius mm (0: flat)
    <root>/fields/<NNNNN>/contacts.json      what was drawn for each contact

The displacement is that of the material which at rest lies behind the centre of each 16 x 16 px
block of the ideal image (row 0 on top).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from genforce_collect.config import SensorConfig
from genforce_collect.markers.packing import pack_mask
from genforce_sim.indenters import INDENTERS
from genforce_sim.optics import Imperfections
from genforce_sim.sensor import FIELD_COLUMNS, FIELD_ROWS, MaskFlaws, SimulatedSensor

Array = NDArray[Any]

SHARD_CONTACTS = 32
FRAMES_PER_CONTACT = 8
_STEP_MM = 0.22
_STEP_S = 0.03


@dataclass(frozen=True)
class FieldSuite:
    """What to draw from; the seed and the number of a contact say all about it."""

    contacts: int
    seed: int = 0
    kinds: tuple[str, ...] = ("dots",)  # of dots, pins, taxels
    frames: int = FRAMES_PER_CONTACT
    indenters: tuple[str, ...] = tuple(INDENTERS)

    @property
    def shards(self) -> int:
        """Number of shard folders."""
        return math.ceil(self.contacts / SHARD_CONTACTS)


def shard_folder(root: Path, shard: int) -> Path:
    """Where a shard stands once it is whole."""
    return root / "fields" / f"{shard:05d}"


def write_shard(root: Path, suite: FieldSuite, shard: int) -> int:
    """Make one shard unless it is there; returns its frames. Appears whole or not at all."""
    folder = shard_folder(root, shard)
    if folder.is_dir():
        return len(np.load(folder / "contact.npy", mmap_mode="r"))
    first = shard * SHARD_CONTACTS
    numbers = range(first, min(first + SHARD_CONTACTS, suite.contacts))
    made = [make_contact(suite, number) for number in numbers]
    columns: dict[str, Array] = {
        name: np.concatenate([contact[name] for contact in made])
        for name in ("masks", "displacement", "wrench", "pose")
    }
    columns["contact"] = np.repeat(
        np.arange(len(made), dtype=np.int32), [len(contact["masks"]) for contact in made]
    )
    columns["references"] = np.stack([contact["reference"] for contact in made])
    columns["geometry"] = np.array([contact["geometry"] for contact in made], np.float32)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, column in columns.items():
        np.save(partial / f"{name}.npy", column)
    facts = json.dumps([contact["facts"] for contact in made], indent=1, sort_keys=True)
    (partial / "contacts.json").write_text(facts + "\n")
    os.replace(partial, folder)
    return len(columns["contact"])


def make_contact(suite: FieldSuite, number: int) -> dict[str, Any]:
    """One contact of the suite: frames picked along press, shear, twist and release."""
    rng = np.random.default_rng([suite.seed, number])
    sensor = draw_sensor(rng, str(rng.choice(suite.kinds)))
    indenter = str(rng.choice(suite.indenters))
    imperfections = Imperfections.draw(rng)
    simulated = SimulatedSensor(
        sensor, indenter, seed=int(rng.integers(2**31)), imperfections=imperfections
    )
    flaws = MaskFlaws()
    reference = simulated.mask(None, rng, MaskFlaws(lost=0.0, jitter_px=0.0))
    path = draw_path(rng, sensor)
    # The first frame touches lightly or not at all; the others are spread over the contact.
    picked = {0, *rng.choice(np.arange(1, len(path)), suite.frames - 1, replace=False).tolist()}
    masks, fields, wrenches, poses = [], [], [], []
    for index, pose in enumerate(path):
        state = simulated.step(pose, _STEP_S)
        if index in picked:
            masks.append(pack_mask(simulated.mask(state, rng, flaws)))
            fields.append(state.displacement)
            wrenches.append(state.wrench)
            poses.append(pose)
    gel, layout = sensor.gel, sensor.layout
    return {
        "masks": np.stack(masks),
        "displacement": to_micrometres(np.stack(fields)),
        "wrench": np.array(wrenches, np.float32),
        "pose": np.array(poses, np.float32),
        "reference": pack_mask(reference),
        "geometry": (
            sensor.px_per_mm,
            gel.thickness_mm,
            layout.lever_mm,
            gel.dome_radius_mm or 0.0,
        ),
        "facts": {"number": number, "indenter": indenter, "sensor": sensor.model_dump(mode="json")},
    }


def to_micrometres(displacement_mm: Array) -> NDArray[np.int16]:
    """Displacement in mm as stored."""
    return np.round(displacement_mm * 1e3).astype(np.int16)


def draw_sensor(rng: np.random.Generator, kind: str) -> SensorConfig:
    """A random sensor of a kind: GelSight-like dots, TacTip-like pins, uSkin-like taxels."""
    return {"dots": _draw_dots, "pins": _draw_pins, "taxels": _draw_taxels}[kind](rng)


def _draw_dots(rng: np.random.Generator) -> SensorConfig:
    pitch = rng.uniform(1.2, 2.5)
    pattern = str(rng.choice(["array", "staggered", "circle", "diamond", "spiral", "scattered"]))
    rows, columns = math.ceil(20.0 / pitch) + 1, math.ceil(25.0 / pitch) + 1
    if pattern in {"circle", "diamond"}:
        rows = columns = rows // 2 if pattern == "circle" else rows
    return _sensor(
        kind="dots",
        px_per_mm=rng.uniform(25.0, 29.0),
        gel={
            "width_mm": 25.0,
            "height_mm": 20.0,
            "thickness_mm": rng.uniform(3.0, 5.5),
            "youngs_modulus_pa": math.exp(rng.uniform(math.log(1.2e5), math.log(4e5))),
            "poisson_ratio": rng.uniform(0.45, 0.49),
            "friction": rng.uniform(0.4, 1.3),
            "relaxation_ratio": rng.uniform(0.05, 0.3),
            "relaxation_time_s": rng.uniform(0.2, 1.5),
        },
        layout={
            "pattern": pattern,
            "rows": rows + int(rng.integers(-2, 2)),
            "columns": columns + int(rng.integers(-2, 2)),
            "pitch_mm": pitch,
            "diameter_mm": pitch * rng.uniform(0.3, 0.48),
            "seed": int(rng.integers(2**31)),
        },
        optics={"camera_distance_mm": rng.uniform(30.0, 60.0)},
    )


def _draw_pins(rng: np.random.Generator) -> SensorConfig:
    rings = int(rng.integers(5, 9))
    pitch = 11.7 / rings
    return _sensor(
        kind="pins",
        px_per_mm=rng.uniform(16.5, 19.5),
        gel={
            "width_mm": 36.0,
            "height_mm": 36.0,
            "thickness_mm": rng.uniform(10.0, 16.0),
            "youngs_modulus_pa": math.exp(rng.uniform(math.log(5e4), math.log(2e5))),
            "poisson_ratio": rng.uniform(0.45, 0.48),
            "friction": rng.uniform(0.5, 1.3),
            "relaxation_ratio": rng.uniform(0.1, 0.35),
            "relaxation_time_s": rng.uniform(0.3, 1.5),
            "dome_radius_mm": rng.uniform(16.0, 30.0),
        },
        layout={
            "pattern": str(rng.choice(["hexagon", "circle"])),
            "rows": rings,
            "pitch_mm": pitch,
            "diameter_mm": pitch * rng.uniform(0.42, 0.58),
            "depth_mm": rng.uniform(0.8, 1.6),
            "lever_mm": rng.uniform(0.6, 1.8),
        },
        optics={"camera_distance_mm": rng.uniform(35.0, 60.0), "view_radius_mm": 13.2},
    )


def _draw_taxels(rng: np.random.Generator) -> SensorConfig:
    return _sensor(
        kind="taxels",
        px_per_mm=27.0,
        gel={
            "width_mm": 24.0,
            "height_mm": 24.0,
            "thickness_mm": rng.uniform(3.5, 5.5),
            "youngs_modulus_pa": math.exp(rng.uniform(math.log(2e5), math.log(5e5))),
            "poisson_ratio": rng.uniform(0.45, 0.48),
            "friction": rng.uniform(0.4, 1.2),
            "relaxation_ratio": rng.uniform(0.1, 0.3),
            "relaxation_time_s": rng.uniform(0.3, 1.5),
        },
        layout={
            "pattern": "array",
            "rows": 4,
            "columns": 4,
            "pitch_mm": rng.uniform(4.5, 4.9),
            "diameter_mm": 0.9,
            "depth_mm": rng.uniform(1.6, 2.4),
        },
    )


def _sensor(**sections: Any) -> SensorConfig:
    return SensorConfig.model_validate({"name": "random", **sections})


def draw_path(rng: np.random.Generator, sensor: SensorConfig) -> Array:
    """Tip poses (n, 6) of a random press with shear, twist, lean and release."""
    dome = sensor.gel.dome_radius_mm is not None
    deepest = 4.5 if dome else 0.38 * sensor.gel.thickness_mm
    half = np.array([6.5, 6.5]) if dome else np.array([7.0, 5.5])
    point = rng.uniform(-half, half)
    sag = 0.0 if not dome else float(point @ point) / (2 * (sensor.gel.dome_radius_mm or 1.0))
    depth = rng.uniform(0.15, 1.0) ** 0.7 * deepest
    radius = rng.uniform(0.0, 1.3) * (1.3 if dome else 1.0)
    heading, twist = rng.uniform(0, 2 * math.pi), rng.normal(0, math.radians(4))
    lean, yaw = rng.normal(0, math.radians(2), 2), rng.uniform(-math.pi, math.pi)
    towards = np.array([math.cos(heading), math.sin(heading)]) * radius
    # Fractions of depth, shear and twist at the corners of the path.
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 1], [rng.uniform(0.2, 0.7), 0.5, 0.5]])
    lengths = np.linalg.norm(np.diff(corners[:, :2] * [depth, radius], axis=0), axis=1)
    steps = np.maximum(np.ceil(lengths / _STEP_MM).astype(int), 3)
    along = np.concatenate(
        [
            np.linspace(start, end, count, endpoint=False)
            for start, end, count in zip(corners[:-1], corners[1:], steps, strict=True)
        ]
        + [corners[-1:]]
    )
    tip = np.column_stack([point + along[:, 1:2] * towards, -sag - along[:, 0] * depth]) * 1e-3
    tool = Rotation.from_rotvec([math.pi, 0, 0])
    base = Rotation.from_rotvec([lean[0], lean[1], 0]) * Rotation.from_rotvec([0, 0, yaw])
    turn = Rotation.from_rotvec(np.outer(along[:, 2], [0, 0, twist])) * base * tool
    return np.column_stack([tip, turn.as_rotvec()])


def read_field_shard(folder: Path) -> dict[str, Array]:
    """The arrays of one shard, memory-mapped; displacement (n, 3, 30, 40) still in um."""
    names = ("masks", "displacement", "wrench", "pose", "contact", "references", "geometry")
    shard = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    assert shard["displacement"].shape[1:] == (3, FIELD_ROWS, FIELD_COLUMNS)
    return shard
