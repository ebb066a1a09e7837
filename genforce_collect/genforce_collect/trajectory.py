"""Indentation plans: which contacts to make, the moves that make them, and how long they take.

A plan is data: points, depths and shear directions in the *start frame* (the sensor frame shifted
to the start pose, where the tip just touches the gel), in metres and radians. One contact is four
phases, straight down, sideways, back, straight up; a force-depth press is two, down and up.

    plan = load_plan("", sensor)                      # the sensor's own plan
    check_plan(plan, cell.limits, sensor)             # raises SafetyError before anything moves
    for contact in plan.contacts:
        for move in contact_moves(plan, contact, position, cell.speeds):
            ...                                       # drive to move.target
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from genforce_collect.config import (
    LimitsConfig,
    PlanConfig,
    Positive,
    Section,
    SensorConfig,
    SpeedsConfig,
    Vector3,
    parse_section,
    read_section,
)
from genforce_collect.errors import ConfigError, SafetyError

SAME_PLACE_M = 1e-6  # closer than this needs no move
HEADWAY_M = 1e-5  # an arm at rest does not seem to move this far
STUCK_S = 5.0
PRESS_S = 2.0  # each way of a force-depth press: slow, for many frames on the curve


class Phase(enum.IntEnum):
    """Phases of a contact; the numbers are those of genforce_msgs/Contact."""

    IDLE = 0
    APPROACH = 1
    NORMAL_INC = 2
    SHEAR_INC = 3
    SHEAR_DEC = 4
    NORMAL_DEC = 5
    DONE = 6
    INVALID = 7
    DOWN = 8
    UP = 9


LOADED_PHASES = frozenset({2, 3, 4, 5, 8, 9})  # the tip is in the gel


@dataclass(frozen=True)
class ContactPlan:
    """One contact, in the start frame."""

    index: int
    point: tuple[float, float]  # m
    depth_m: float
    direction_rad: float  # NaN: a press without shear
    radius_m: float

    @property
    def phases(self) -> tuple[tuple[Phase, Vector3], ...]:
        """Each phase with the tip position it ends at (m)."""
        x, y = self.point
        touching, pressed = (x, y, 0.0), (x, y, -self.depth_m)
        if math.isnan(self.direction_rad):
            return (Phase.DOWN, pressed), (Phase.UP, touching)
        sheared = (
            x + self.radius_m * math.cos(self.direction_rad),
            y + self.radius_m * math.sin(self.direction_rad),
            -self.depth_m,
        )
        return (
            (Phase.NORMAL_INC, pressed),
            (Phase.SHEAR_INC, sheared),
            (Phase.SHEAR_DEC, pressed),
            (Phase.NORMAL_DEC, touching),
        )


@dataclass(frozen=True)
class Plan:
    """Contacts in the order they are made."""

    contacts: tuple[ContactPlan, ...]
    start: Vector3  # start pose in the sensor frame (m)
    clearance_m: float  # height of the tip while it moves from point to point
    dwell_s: float  # rest at the end of each phase
    touch_n: float = 0.0  # force at which the tip touches; 0: the start pose is known
    touch_search_m: float = 0.0
    speed_m_s: float | None = None  # in contact, where slower than the cell's


@dataclass(frozen=True)
class Move:
    """One straight motion of the tip, at rest at both ends."""

    phase: Phase
    target: Vector3  # start frame (m)
    speed_m_s: float


# --- building -----------------------------------------------------------------------------------


def build_plan(config: PlanConfig) -> Plan:
    """The original's plan: centre and +-step_x, +-step_y; at each point every depth from step_z to
    max_z, at each depth every shear direction. 5 x 4 x 8 = 160 contacts for a GelSight.
    """
    step_x, step_y = config.step_x_mm * 1e-3, config.step_y_mm * 1e-3
    points = [(0.0, 0.0), (step_x, 0.0), (-step_x, 0.0), (0.0, step_y), (0.0, -step_y)]
    levels = math.floor(config.max_z_mm / config.step_z_mm + 1e-9)
    depths = [config.step_z_mm * 1e-3 * level for level in range(1, levels + 1)]
    directions = [2 * math.pi * k / config.directions for k in range(config.directions)]
    return _plan(
        (
            ContactPlan(0, point, depth, direction, config.radius_mm * 1e-3)
            for point in dict.fromkeys(points)
            for depth in depths
            for direction in directions
        ),
        config,
    )


def random_plan(config: PlanConfig, count: int, seed: int) -> Plan:
    """Contacts drawn uniformly from the ranges that `build_plan` spans; for evaluation on
    contacts that no training plan holds. The same seed gives the same plan.
    """
    rng = np.random.default_rng(seed)
    reach = np.array([config.step_x_mm, config.step_y_mm]) * 1e-3
    return _plan(
        (
            ContactPlan(
                0,
                (float(point[0]), float(point[1])),
                float(rng.uniform(config.step_z_mm, config.max_z_mm)) * 1e-3,
                float(rng.uniform(0, 2 * math.pi)),
                float(rng.uniform(0.3, 1.0)) * config.radius_mm * 1e-3,
            )
            for point in (rng.uniform(-reach, reach) for _ in range(count))
        ),
        config,
    )


def press_plan(config: PlanConfig) -> Plan:
    """The force-depth curve: one slow press at the start point to max_z, recorded down and up."""
    slow = {"speed_mm_s": config.speed_mm_s or config.max_z_mm / PRESS_S}
    press = ContactPlan(0, (0.0, 0.0), config.max_z_mm * 1e-3, math.nan, 0.0)
    return _plan([press], config.model_copy(update=slow))


def slide_plan(config: PlanConfig) -> Plan:
    """Calibration of shear: pressed in at the start point to a quarter of max_z, where a slide of
    radius soon slips, and to all of it, each time with a slide askew to both axes."""
    askew, radius = math.radians(45), config.radius_mm * 1e-3
    depths = (config.max_z_mm * 1e-3 / 4, config.max_z_mm * 1e-3)
    return _plan((ContactPlan(0, (0.0, 0.0), depth, askew, radius) for depth in depths), config)


def _plan(contacts: Iterable[ContactPlan], config: PlanConfig) -> Plan:
    numbered = tuple(
        ContactPlan(index, c.point, c.depth_m, c.direction_rad, c.radius_m)
        for index, c in enumerate(contacts)
    )
    if not numbered:
        raise ConfigError("the plan has no contact: max_z_mm is below step_z_mm")
    return Plan(
        numbered,
        start=(config.start_mm[0] * 1e-3, config.start_mm[1] * 1e-3, config.start_mm[2] * 1e-3),
        clearance_m=config.clearance_mm * 1e-3,
        dwell_s=config.dwell_s,
        touch_n=config.touch_n,
        touch_search_m=config.touch_search_mm * 1e-3,
        speed_m_s=config.speed_mm_s * 1e-3 if config.speed_mm_s else None,
    )


# --- plan files ---------------------------------------------------------------------------------


class ContactEntry(Section):
    """One contact of a plan file; without a direction it is a press."""

    x_mm: float
    y_mm: float
    depth_mm: Positive
    direction_deg: float | None = None
    radius_mm: Positive = 1.0


class RandomEntry(Section):
    """A number of random contacts within the ranges of the plan."""

    count: int = Field(ge=1, le=100_000)
    seed: int = Field(ge=0)


class PlanFile(PlanConfig):
    """A plan file: the keys of a sensor's `plan`, and optionally one of the other kinds."""

    contacts: Annotated[tuple[ContactEntry, ...], Field(min_length=1)] | None = None
    random: RandomEntry | None = None
    press: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> PlanFile:
        if sum([self.contacts is not None, self.random is not None, self.press]) > 1:
            raise ValueError("give only one of contacts, random and press")
        return self

    def plan(self) -> Plan:
        """The plan this file describes."""
        if self.contacts is not None:
            return _plan(map(_from_entry, self.contacts), self)
        if self.random is not None:
            return random_plan(self, self.random.count, self.random.seed)
        return press_plan(self) if self.press else build_plan(self)


def _from_entry(entry: ContactEntry) -> ContactPlan:
    shear = entry.direction_deg is not None
    return ContactPlan(
        0,
        (entry.x_mm * 1e-3, entry.y_mm * 1e-3),
        entry.depth_mm * 1e-3,
        math.radians(entry.direction_deg) if entry.direction_deg is not None else math.nan,
        entry.radius_mm * 1e-3 if shear else 0.0,
    )


def load_plan(name_or_path: str, sensor: SensorConfig) -> Plan:
    """The plan a goal names. Raises `ConfigError`.

    Empty is the sensor's own plan, `press` its force-depth press (`press:DEPTH_MM` to another
    depth), `slide` its presses with a slide, `random:COUNT:SEED` random contacts within its ranges,
    and anything else the path of a plan file.
    """
    if not name_or_path:
        return build_plan(sensor.plan)
    if name_or_path == "press":
        return press_plan(sensor.plan)
    if name_or_path == "slide":
        return slide_plan(sensor.plan)
    if name_or_path.startswith("press:"):
        depth = name_or_path.removeprefix("press:")
        origin = f"plan '{name_or_path}'"
        return press_plan(
            parse_section(sensor.plan.model_dump() | {"max_z_mm": depth}, PlanConfig, origin)
        )
    if name_or_path.startswith("random:"):
        try:
            count, seed = (int(word) for word in name_or_path.split(":")[1:])
        except ValueError:
            raise ConfigError(
                f"plan '{name_or_path}': write random:COUNT:SEED with two whole numbers"
            ) from None
        entry = parse_section({"count": count, "seed": seed}, RandomEntry, f"plan '{name_or_path}'")
        return random_plan(sensor.plan, entry.count, entry.seed)
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such plan file (or: press, press:DEPTH_MM, slide, random:COUNT:SEED)"
        )
    return read_section(path, PlanFile).plan()


# --- moving -------------------------------------------------------------------------------------


def contact_moves(
    plan: Plan, contact: ContactPlan, position: Vector3, speeds: SpeedsConfig
) -> list[Move]:
    """The moves of one contact from a tip position (start frame, m): the approach, then a move
    for each phase. The approach lifts the tip only where it has to travel sideways.
    """
    x, y = contact.point
    height = max(plan.clearance_m, position[2])
    targets = [(position[0], position[1], height), (x, y, height), (x, y, 0.0)]
    if math.dist(position, targets[-1]) <= SAME_PLACE_M:
        targets = []
    moves = [
        Move(Phase.APPROACH, target, speeds.transfer_m_s)
        for start, target in zip([position, *targets], targets, strict=False)
        if math.dist(start, target) > SAME_PLACE_M
    ]
    speed = min(plan.speed_m_s or math.inf, speeds.contact_m_s)
    return moves + [Move(phase, target, speed) for phase, target in contact.phases]


def retract_move(plan: Plan, position: Vector3, speeds: SpeedsConfig) -> Move:
    """Straight up, clear of the gel."""
    height = max(plan.clearance_m, position[2])
    return Move(Phase.IDLE, (position[0], position[1], height), speeds.transfer_m_s)


def plan_moves(
    plan: Plan, contacts: Iterable[ContactPlan], speeds: SpeedsConfig
) -> Iterator[tuple[ContactPlan, Move]]:
    """Every move of these contacts, from above the start pose to above the last contact."""
    position: Vector3 = (0.0, 0.0, plan.clearance_m)
    contact = None
    for contact in contacts:
        for move in contact_moves(plan, contact, position, speeds):
            yield contact, move
            position = move.target
    if contact is not None:
        yield contact, retract_move(plan, position, speeds)


def move_duration(distance_m: float, speed_m_s: float, acceleration_m_s2: float) -> float:
    """Duration (s) of a trapezoidal motion profile, rest to rest."""
    if distance_m < speed_m_s**2 / acceleration_m_s2:
        return 2 * math.sqrt(distance_m / acceleration_m_s2)
    return distance_m / speed_m_s + speed_m_s / acceleration_m_s2


class Headway:
    """Tells a slow move from one that is stuck: by the way that is left, because the controller
    may scale any speed down. Times are monotonic (s).
    """

    def __init__(self, now: float) -> None:
        self._remaining = math.inf
        self._gained_at = now

    def note(self, remaining_m: float, now: float) -> None:
        """Take in how far it is to the target."""
        if remaining_m < self._remaining - HEADWAY_M:
            self._remaining, self._gained_at = remaining_m, now

    def stuck(self, now: float) -> bool:
        """Whether it has come no nearer for too long."""
        return now - self._gained_at > STUCK_S


def plan_duration(plan: Plan, contacts: Iterable[ContactPlan], speeds: SpeedsConfig) -> float:
    """Estimated duration (s) of these contacts without pauses between moves."""
    position: Vector3 = (0.0, 0.0, plan.clearance_m)
    total = 0.0
    for _, move in plan_moves(plan, contacts, speeds):
        distance = math.dist(position, move.target)
        total += move_duration(distance, move.speed_m_s, speeds.acceleration_m_s2)
        total += plan.dwell_s if move.phase in LOADED_PHASES else 0.0
        position = move.target
    return total


def to_sensor_frame(plan: Plan, position: Vector3) -> Vector3:
    """A position of the start frame in the sensor frame (m)."""
    return (
        position[0] + plan.start[0],
        position[1] + plan.start[1],
        position[2] + plan.start[2],
    )


# --- checking -----------------------------------------------------------------------------------


def check_plan(plan: Plan, limits: LimitsConfig, sensor: SensorConfig) -> None:
    """Refuse a plan that leaves the workspace box or the gel. Raises `SafetyError` naming the
    first contact at fault and the limit.

    Where the surface is to be searched for, the plan has to fit wherever it may be found; depths
    in the gel are then those below it.
    """
    search = plan.touch_search_m if plan.touch_n else 0.0
    half_gel = (sensor.gel.width_mm * 0.5e-3, sensor.gel.height_mm * 0.5e-3)
    thickness = sensor.gel.thickness_mm * 1e-3
    for contact in plan.contacts:
        name = f"contact {contact.index}"
        above = (*contact.point, plan.clearance_m)
        targets = [above, *(target for _, target in contact.phases)]
        for target, shift in product(targets, (-search, search)):
            position = to_sensor_frame(plan, target)
            found = (position[0], position[1], position[2] + shift)
            for axis, value, low, high in zip(
                "xyz", found, limits.workspace_min_m, limits.workspace_max_m, strict=True
            ):
                if not low <= value <= high:
                    raise SafetyError(
                        f"{name} reaches {axis} = {value * 1e3:.2f} mm, outside the workspace "
                        f"{low * 1e3:.2f} to {high * 1e3:.2f} mm of the cell"
                    )
            for axis, value, half in zip("xy", position, half_gel, strict=False):
                if abs(value) > half:
                    raise SafetyError(
                        f"{name} reaches {axis} = {value * 1e3:.2f} mm, beyond the edge of the "
                        f"gel of {sensor.name} at {half * 1e3:.2f} mm"
                    )
            depth = -target[2] if plan.touch_n else -position[2]
            if depth >= thickness:
                raise SafetyError(
                    f"{name} presses {depth * 1e3:.2f} mm deep, through the "
                    f"{sensor.gel.thickness_mm:.2f} mm of gel of {sensor.name}"
                )
