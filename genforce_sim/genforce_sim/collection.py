"""Virtual collections: a plan pressed into one instance of a sensor, in the training layout.

Contact numbers are those of the plan, so that contacts of the same number and indenter on
different sensors form exact pairs: the same point, the same normalised depth path.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import LimitsConfig, SensorConfig
from genforce_collect.layout import Contact, ContactKey, Layout
from genforce_collect.markers.packing import pack_mask
from genforce_collect.trajectory import ContactPlan, Phase, Plan, check_plan, to_sensor_frame
from genforce_sim.fieldset import to_micrometres
from genforce_sim.sensor import MaskFlaws, SimulatedSensor

Array = NDArray[Any]

CONTACTS_PER_TASK = 8
REST_FRAMES = 8
WRENCH_NOISE = np.array([5e-3, 5e-3, 8e-3, 5e-5, 5e-5, 5e-5])  # N, N.m: a Nano17 over a Net F/T
FLAWS = MaskFlaws(lost=0.002, jitter_px=0.1, size_spread=0.02, threshold=0.03)
_TOOL_DOWN = (math.pi, 0.0, 0.0)
_ANYWHERE = LimitsConfig(
    stale_s=0.1, workspace_min_m=(-1.0, -1.0, -1.0), workspace_max_m=(1.0, 1.0, 1.0)
)


@dataclass(frozen=True)
class CollectionSpec:
    """One sensor's collection; equal specs give equal bytes."""

    sensor: SensorConfig
    plan: Plan
    contacts: int | None = None  # so many, spread over the plan; all of it without
    seed: int = 0
    rate_hz: float = 30.0
    speed_m_s: float = 5e-3
    truth: bool = False
    perfect: bool = False
    instance: int | None = None  # of the sensor, as the virtual cell's seed; None: drawn by seed

    @property
    def numbers(self) -> list[int]:
        """The contacts of the plan that are made."""
        total = len(self.plan.contacts)
        count = min(self.contacts or total, total)
        return sorted({int(i) for i in np.round(np.linspace(0, total - 1, count))})

    def simulated(self, indenter: str) -> SimulatedSensor:
        """This collection's instance of the sensor: the same for every indenter."""
        instance = self.instance
        if instance is None:
            instance = zlib.crc32(f"{self.sensor.name}/{self.seed}".encode())
        return SimulatedSensor(self.sensor, indenter, instance, imperfections=not self.perfect)

    def rng(self, *what: object) -> np.random.Generator:
        """The noise of one part of the collection."""
        name = "/".join(map(str, (self.sensor.name, *what)))
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])


def collection_tasks(
    root: Path, spec: CollectionSpec, indenters: tuple[str, ...]
) -> Iterator[tuple[Any, ...]]:
    """Calls (function, arguments) that make the collection. Raises `SafetyError` on a bad plan."""
    check_plan(spec.plan, _ANYWHERE, spec.sensor)
    yield write_rest, (root, spec, indenters[0])
    for indenter in indenters:
        for first in range(0, len(spec.numbers), CONTACTS_PER_TASK):
            numbers = tuple(spec.numbers[first : first + CONTACTS_PER_TASK])
            yield write_contacts, (root, spec, indenter, numbers)


def write_rest(root: Path, spec: CollectionSpec, indenter: str) -> int:
    """The reference image and some frames without contact; returns the frames."""
    layout, name = Layout(root), spec.sensor.name
    simulated, rng = spec.simulated(indenter), spec.rng("rest")
    layout.write_reference(name, pack_mask(simulated.mask(None, rng)))
    flaws = None if spec.perfect else FLAWS
    frames = np.stack([pack_mask(simulated.mask(None, rng, flaws)) for _ in range(REST_FRAMES)])
    noise = rng.normal(0, 1, (REST_FRAMES, 6)) * WRENCH_NOISE * (not spec.perfect)
    layout.write_rest(name, frames, noise)
    return REST_FRAMES


def write_contacts(
    root: Path, spec: CollectionSpec, indenter: str, numbers: tuple[int, ...]
) -> int:
    """Make those contacts that are not there yet; returns the frames of all."""
    layout = Layout(root)
    label = Path(indenter).stem
    simulated: SimulatedSensor | None = None
    frames = 0
    for number in numbers:
        key = ContactKey(spec.sensor.name, label, number)
        if layout.holds(key):
            frames += len(layout.frame_paths(key))
            continue
        simulated = simulated or spec.simulated(indenter)
        contact, truth = make_contact(spec, simulated, key)
        if spec.truth:
            path = root / "truth" / key.sensor / key.indenter / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, to_micrometres(truth))
        layout.write(contact)
        frames += len(contact)
    return frames


def make_contact(
    spec: CollectionSpec, simulated: SimulatedSensor, key: ContactKey
) -> tuple[Contact, Array]:
    """One contact of the plan and its displacement (n, 3, 30, 40) mm."""
    rng = spec.rng(key.indenter, key.number)
    noise_rng = spec.rng("noise", key.indenter, key.number)
    flaws = None if spec.perfect else FLAWS
    tips, phases = frame_tips(spec, spec.plan.contacts[key.number])
    simulated.reset()
    bits, wrench, truth = [], [], []
    for tip in tips:
        state = simulated.step(np.array([*tip, *_TOOL_DOWN]), 1 / spec.rate_hz)
        bits.append(pack_mask(simulated.mask(state, rng, flaws)))
        wrench.append(state.wrench)
        truth.append(state.displacement)
    count = len(tips)
    noise = noise_rng.normal(0, 1, (count, 6)) * WRENCH_NOISE * (not spec.perfect)
    period_ns = round(1e9 / spec.rate_hz)
    start_z = spec.plan.start[2]
    contact = Contact(
        key=key,
        bits=np.stack(bits),
        wrench=np.stack(wrench) + noise,
        pose=np.column_stack([tips, np.tile(_TOOL_DOWN, (count, 1))]),
        depth=np.maximum(start_z - tips[:, 2], 0) / (spec.sensor.plan.max_z_mm * 1e-3),
        phase=phases,
        stamp_ns=(np.arange(count) + 1) * period_ns,
        wrench_age=np.zeros(count),
        pose_age=np.zeros(count),
        flags=np.zeros(count, np.uint32),
    )
    return contact, np.stack(truth)


def frame_tips(spec: CollectionSpec, contact: ContactPlan) -> tuple[Array, Array]:
    """Tip positions (n, 3) m in the sensor frame at frame times, and their phases (n,).

    The first frame touches; the last of each phase is at its target.
    """
    start = np.array(to_sensor_frame(spec.plan, (*contact.point, 0.0)))
    tips, phases = [start[None]], [contact.phases[0][0]]
    dwell = round(spec.plan.dwell_s * spec.rate_hz)
    for phase, target in contact.phases:
        end = np.array(to_sensor_frame(spec.plan, target))
        distance = float(np.linalg.norm(end - tips[-1][-1]))
        count = max(1, math.ceil(distance / spec.speed_m_s * spec.rate_hz))
        steps = np.linspace(tips[-1][-1], end, count + 1)[1:]
        tips.append(np.concatenate([steps, np.repeat(end[None], dwell, axis=0)]))
        phases += [phase] * (count + dwell)
    return np.concatenate(tips), np.array([int(Phase(phase)) for phase in phases], np.uint8)
