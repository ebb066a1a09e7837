"""How the virtual arm moves: tool poses over time, with trapezoidal speeds and no dynamics.

Poses are `(x, y, z, rx, ry, rz)` of the TCP in the base frame, twists `(vx, vy, vz, wx, wy, wz)`
along base axes (m/s, rad/s); time is the robot's own (s). The arm follows its targets exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from genforce_collect.config import Pose
from genforce_collect.geometry import (
    distance,
    multiply,
    quaternion_from_rotvec,
    rotation_between,
    rotvec_from_quaternion,
)

AT_REST: Pose = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
# A turn counts like a straight move of this radius, so that speeds in m/s also bound rotations;
# the ratio of the controller's default tool speed (0.25 m/s) to its joint speed (1.05 rad/s).
TURN_RADIUS_M = 0.25 / 1.05
PROTECTIVE_DECELERATION = 10.0  # m/s^2


def tool_speed(twist: Sequence[float]) -> float:
    """Size of a twist (m/s): the larger of its linear part and its turn at `TURN_RADIUS_M`."""
    return max(math.hypot(*twist[:3]), TURN_RADIUS_M * math.hypot(*twist[3:6]))


@dataclass(frozen=True)
class Trapezoid:
    """Rest to rest over `length` (m) with bounded speed (m/s) and acceleration (m/s^2)."""

    length: float
    speed: float
    acceleration: float

    @property
    def peak(self) -> float:
        """Highest speed reached: short moves never get to `speed` (m/s)."""
        return min(self.speed, math.sqrt(self.length * self.acceleration))

    @property
    def duration(self) -> float:
        """From rest to rest (s)."""
        if self.length == 0:
            return 0.0
        return self.length / self.peak + self.peak / self.acceleration

    def at(self, time: float) -> tuple[float, float]:
        """Way covered (m) and speed (m/s) at `time` after the start."""
        if time >= self.duration:
            return self.length, 0.0
        ramp = self.peak / self.acceleration
        left = self.duration - time
        if left < ramp:
            return self.length - self.acceleration * left**2 / 2, self.acceleration * left
        if time < ramp:
            return self.acceleration * time**2 / 2, self.acceleration * time
        return self.peak * (time - ramp / 2), self.peak


class Motion(Protocol):
    """What the arm is doing; `step` moves it by `dt` and says whether the motion has ended."""

    def step(self, arm: Arm, dt: float) -> bool: ...

    def interrupted(self) -> None:
        """The arm was brought to rest elsewhere and will go on from there."""


class Arm:
    """TCP pose and twist, and the motion that changes them."""

    def __init__(self, pose: Pose) -> None:
        self.pose = pose
        self.twist = AT_REST
        self.target = pose
        self.rest_time = math.inf  # since the arm last moved (s)
        self._motion: Motion | None = None
        self._suspended: Motion | None = None

    @property
    def idle(self) -> bool:
        """No motion is left to do."""
        return self._motion is None and self._suspended is None

    def start(self, motion: Motion) -> None:
        """Replace the current motion; the twist carries over."""
        self._motion = motion
        self._suspended = None

    def suspend(self) -> None:
        """Come to rest at once and keep the motion for `resume`."""
        if self._suspended is None:
            self._suspended = self._motion
            self._motion = Stop(PROTECTIVE_DECELERATION)

    def resume(self) -> None:
        """Go on with the suspended motion from where the arm stands."""
        if self._suspended is not None:
            self._suspended.interrupted()
            self._motion, self._suspended = self._suspended, None

    def step(self, dt: float) -> None:
        """Advance by `dt`."""
        if self._motion is not None and self._motion.step(self, dt):
            self._motion = None
        self.rest_time = self.rest_time + dt if self.twist == AT_REST else 0.0

    def drive(self, twist: Pose, dt: float) -> None:
        """Take on `twist` and move with the mean of the old and the new one."""
        mean = tuple((old + new) / 2 for old, new in zip(self.twist, twist, strict=True))
        turn = quaternion_from_rotvec([w * dt for w in mean[3:]])
        rotation = multiply(turn, quaternion_from_rotvec(self.pose[3:]))
        self.pose = (
            self.pose[0] + mean[0] * dt,
            self.pose[1] + mean[1] * dt,
            self.pose[2] + mean[2] * dt,
            *rotvec_from_quaternion(rotation),
        )
        self.twist = twist
        self.target = self.pose

    def accelerate(self, twist: Pose, acceleration: float, dt: float) -> bool:
        """Change the twist towards `twist`; returns whether it was reached."""
        change = tuple(goal - now for goal, now in zip(twist, self.twist, strict=True))
        size = tool_speed(change)
        if size <= acceleration * dt:
            self.drive(twist, dt)
            return True
        share = acceleration * dt / size
        vx, vy, vz, wx, wy, wz = (
            now + share * by for now, by in zip(self.twist, change, strict=True)
        )
        self.drive((vx, vy, vz, wx, wy, wz), dt)
        return False


class Line:
    """movel: straight and with the shortest turn to `target`, from rest to rest."""

    def __init__(self, target: Pose, speed: float, acceleration: float) -> None:
        turn = quaternion_from_rotvec(target[3:])
        self._target: Pose = (target[0], target[1], target[2], *rotvec_from_quaternion(turn))
        self._speed = speed
        self._acceleration = acceleration
        self._plan: _LinePlan | None = None

    def interrupted(self) -> None:
        self._plan = None

    def step(self, arm: Arm, dt: float) -> bool:
        if self._plan is None:
            if arm.twist != AT_REST:  # a motion was replaced: brake first
                arm.accelerate(AT_REST, self._acceleration, dt)
                return False
            self._plan = _LinePlan(arm.pose, self._target, self._speed, self._acceleration)
        arm.target = self._target
        arm.pose, arm.twist = self._plan.advance(dt)
        return self._plan.finished


class _LinePlan:
    """One start, one end, the profile between them, and the time run so far."""

    def __init__(self, start: Pose, end: Pose, speed: float, acceleration: float) -> None:
        self._start = start
        self._end = end
        self._start_turn = quaternion_from_rotvec(start[3:])
        self._turn = rotation_between(start[3:], end[3:])
        length = max(distance(start, end), TURN_RADIUS_M * math.hypot(*self._turn))
        self._profile = Trapezoid(length, speed, acceleration)
        self._time = 0.0

    @property
    def finished(self) -> bool:
        return self._time >= self._profile.duration

    def advance(self, dt: float) -> tuple[Pose, Pose]:
        """Pose and twist after another `dt`."""
        self._time += dt
        if self.finished:
            return self._end, AT_REST
        way, speed = self._profile.at(self._time)
        share, rate = way / self._profile.length, speed / self._profile.length
        (sx, sy, sz), (ex, ey, ez) = self._start[:3], self._end[:3]
        rx, ry, rz = self._turn
        turn = quaternion_from_rotvec((rx * share, ry * share, rz * share))
        rotation = rotvec_from_quaternion(multiply(turn, self._start_turn))
        dx, dy, dz = ex - sx, ey - sy, ez - sz
        return (
            (sx + dx * share, sy + dy * share, sz + dz * share, *rotation),
            (dx * rate, dy * rate, dz * rate, rx * rate, ry * rate, rz * rate),
        )


class Speed:
    """speedl: a constant twist, until replaced."""

    def __init__(self, twist: Pose, acceleration: float) -> None:
        self._twist = twist
        self._acceleration = acceleration

    def interrupted(self) -> None:
        """Speeds up again from rest."""

    def step(self, arm: Arm, dt: float) -> bool:
        arm.accelerate(self._twist, self._acceleration, dt)
        return False


class Servo:
    """servoj on a tool pose: approaches `target` with the time constant `lookahead` (s)."""

    def __init__(self, target: Pose, lookahead: float) -> None:
        self._target = target
        self._lookahead = lookahead

    def interrupted(self) -> None:
        """Approaches its target again from where it stands."""

    def step(self, arm: Arm, dt: float) -> bool:
        share = -math.expm1(-dt / self._lookahead) / dt
        turn = rotation_between(arm.pose[3:], self._target[3:])
        vx, vy, vz = (
            share * (goal - now) for goal, now in zip(self._target[:3], arm.pose[:3], strict=True)
        )
        wx, wy, wz = (share * angle for angle in turn)
        arm.twist = (vx, vy, vz, wx, wy, wz)
        arm.drive(arm.twist, dt)
        if tool_speed(arm.twist) < 1e-6:
            arm.twist = AT_REST
        arm.target = self._target
        return False


class Stop:
    """stopl: brake to rest."""

    def __init__(self, deceleration: float) -> None:
        self._deceleration = deceleration

    def interrupted(self) -> None:
        """Is at rest already."""

    def step(self, arm: Arm, dt: float) -> bool:
        return arm.accelerate(AT_REST, self._deceleration, dt)
