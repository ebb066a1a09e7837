"""What the guard stops at, as pure functions: each returns the `Breach`, or None where all is well.

Positions, forces and torques are in the sensor frame, times are monotonic host time (s). A value
that is not a number breaks every limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from genforce_collect.config import LimitsConfig
from genforce_collect.geometry import distance

AXES = "xyz"
IN_FLIGHT_MARGIN_M = 5e-4  # a controlled path is not exact
REACTION_S = 0.03  # from a sample to an arm that brakes
TURN_RADIUS_M = 0.25  # a turn counts like a straight move of this radius
STOPPED_ON_REQUEST = "stopped on request"  # what `robot/stop` ends a move with


class BreachKind(Enum):
    """What was broken; the first two call for a retreat."""

    FORCE = "force"
    TORQUE = "torque"
    DATA = "data"
    WORKSPACE = "workspace"
    SPEED = "speed"
    TRACKING = "tracking"

    @property
    def pressed(self) -> bool:
        """The tip presses too hard, so that it must back off."""
        return self in (BreachKind.FORCE, BreachKind.TORQUE)


@dataclass(frozen=True)
class Breach:
    """One limit broken: `text` names axis, value and limit."""

    kind: BreachKind
    text: str


def check_wrench(
    limits: LimitsConfig, force: Sequence[float], torque: Sequence[float]
) -> Breach | None:
    """Force (3,) N and torque (3,) N·m against their limits, axis by axis."""
    for axis, value, limit in zip(AXES, force, limits.force_n, strict=True):
        if not abs(value) <= limit:
            return Breach(BreachKind.FORCE, f"force F{axis} = {value:.2f} N is beyond {limit:g} N")
    for axis, value, limit in zip(AXES, torque, limits.torque_nm, strict=True):
        if not abs(value) <= limit:
            return Breach(
                BreachKind.TORQUE, f"torque T{axis} = {value:.3f} N·m is beyond {limit:g} N·m"
            )
    return None


def check_age(limits: LimitsConfig, what: str, taken: float | None, now: float) -> Breach | None:
    """The newest sample of a stream that motion needs; `taken` is its stamp, None for none yet."""
    if taken is None:
        return Breach(BreachKind.DATA, f"no {what} yet: is its node running?")
    if not now - taken <= limits.stale_s:
        return Breach(
            BreachKind.DATA,
            f"the newest {what} is {now - taken:.2f} s old, limit {limits.stale_s:g} s",
        )
    return None


def check_position(
    limits: LimitsConfig, position: Sequence[float], start: Sequence[float] | None = None
) -> Breach | None:
    """A TCP position against the workspace box.

    In flight, `start` is where the motion began: from outside, the arm may come in but not go
    further out.
    """
    for index, axis in enumerate(AXES):
        value = position[index]
        low, high = limits.workspace_min_m[index], limits.workspace_max_m[index]
        if start is not None:
            low = min(low, start[index]) - IN_FLIGHT_MARGIN_M
            high = max(high, start[index]) + IN_FLIGHT_MARGIN_M
        if not low <= value <= high:
            return Breach(
                BreachKind.WORKSPACE,
                f"{axis} = {value * 1e3:.2f} mm is outside the workspace, "
                f"{low * 1e3:.2f} to {high * 1e3:.2f} mm",
            )
    return None


def stopping_point(
    position: Sequence[float], velocity: Sequence[float], deceleration: float
) -> tuple[float, float, float]:
    """Where the TCP would rest if it were told to stop now; `velocity` (3,) in m/s."""
    seconds = REACTION_S + math.hypot(*velocity) / (2 * deceleration)
    x, y, z = (p + v * seconds for p, v in zip(position[:3], velocity, strict=True))
    return x, y, z


def tool_speed(twist: Sequence[float]) -> float:
    """Size of a twist (6,) (m/s): the larger of its linear part and its turn's rim speed."""
    return max(math.hypot(*twist[:3]), TURN_RADIUS_M * math.hypot(*twist[3:6]))


def check_speed(
    limits: LimitsConfig, speed: float, acceleration: float | None = None
) -> Breach | None:
    """A commanded tool speed (m/s) and acceleration (m/s^2)."""
    if not 0 <= speed <= limits.speed_m_s:
        return Breach(
            BreachKind.SPEED, f"speed {speed:g} m/s is outside 0 to {limits.speed_m_s:g} m/s"
        )
    if acceleration is not None and not 0 < acceleration <= limits.acceleration_m_s2:
        return Breach(
            BreachKind.SPEED,
            f"acceleration {acceleration:g} m/s² is outside 0 to {limits.acceleration_m_s2:g} m/s²",
        )
    return None


def check_target(
    limits: LimitsConfig, pose: Sequence[float], speed: float, acceleration: float
) -> Breach | None:
    """A straight move, before it begins: its end, and so its way, lies in the box."""
    if not all(map(math.isfinite, pose)):
        return Breach(BreachKind.WORKSPACE, "the target is not a pose: it has no finite numbers")
    if speed <= 0:
        return Breach(BreachKind.SPEED, f"speed {speed:g} m/s: a move needs one above 0")
    return check_position(limits, pose) or check_speed(limits, speed, acceleration)


def check_tracking(
    limits: LimitsConfig, actual: Sequence[float], commanded: Sequence[float]
) -> Breach | None:
    """Measured against commanded TCP position: an arm that is held back is pushing something."""
    error = distance(actual, commanded)
    if not error <= limits.tracking_m:
        return Breach(
            BreachKind.TRACKING,
            f"the arm is {error * 1e3:.2f} mm off its path, limit {limits.tracking_m * 1e3:g} mm",
        )
    return None


def retreat(limits: LimitsConfig, position: Sequence[float]) -> tuple[float, float, float]:
    """Where to back off to from `position`: out of the gel, but no further than the box."""
    x, y, z = position[:3]
    return (x, y, max(z, min(z + limits.retract_m, limits.workspace_max_m[2])))
