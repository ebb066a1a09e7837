"""Poses as the robot states them: `(x, y, z, rx, ry, rz)`, metres and a rotation vector (rad).

Everything here takes and returns plain tuples: for one pose at a time they are several times
faster than arrays, and like `config.Pose` they cannot be changed behind one's back. Quaternions
are `(x, y, z, w)` as in geometry_msgs. Rotation vectors that are returned are canonical: their
angle lies in [0, π], so a pose has one spelling except for the sign of the axis at exactly π.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from genforce_collect.config import Pose, Vector3

Quaternion = tuple[float, float, float, float]
Matrix3 = tuple[Vector3, Vector3, Vector3]

IDENTITY: Pose = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
TIP_ROTATION: Vector3 = (math.pi, 0.0, 0.0)  # tool z = - sensor z
_SMALL_ANGLE = 1e-7


# --- rotations --------------------------------------------------------------------------------


def quaternion_from_rotvec(rotvec: Sequence[float]) -> Quaternion:
    """Unit quaternion (x, y, z, w) of a rotation vector (rad)."""
    x, y, z = rotvec
    angle = math.sqrt(x * x + y * y + z * z)
    scale = 0.5 if angle < _SMALL_ANGLE else math.sin(angle / 2) / angle
    return (x * scale, y * scale, z * scale, math.cos(angle / 2))


def rotvec_from_quaternion(quaternion: Sequence[float]) -> Vector3:
    """Canonical rotation vector (rad) of a quaternion (x, y, z, w) of any length but zero."""
    x, y, z, w = quaternion
    if w < 0:  # the other spelling of the same rotation, with an angle up to π
        x, y, z, w = -x, -y, -z, -w
    sine = math.sqrt(x * x + y * y + z * z)
    if sine == 0 and w == 0:
        raise ValueError("a zero quaternion is no rotation")
    scale = 2 / w if sine < _SMALL_ANGLE * w else 2 * math.atan2(sine, w) / sine
    return (x * scale, y * scale, z * scale)


def matrix_from_rotvec(rotvec: Sequence[float]) -> Matrix3:
    """Rotation matrix, row by row, of a rotation vector (rad)."""
    x, y, z, w = quaternion_from_rotvec(rotvec)
    return (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )


def multiply(a: Quaternion, b: Quaternion) -> Quaternion:
    """Quaternion of rotation `b` followed by rotation `a`."""
    ax, ay, az, aw = a
    bx, by, bz, bw = b
    return (
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
        aw * bw - ax * bx - ay * by - az * bz,
    )


def conjugate(quaternion: Quaternion) -> Quaternion:
    """The inverse rotation of a unit quaternion."""
    x, y, z, w = quaternion
    return (-x, -y, -z, w)


def rotate(quaternion: Quaternion, vector: Sequence[float]) -> Vector3:
    """`vector` turned by a unit quaternion."""
    qx, qy, qz, qw = quaternion
    x, y, z = vector
    tx, ty, tz = 2 * (qy * z - qz * y), 2 * (qz * x - qx * z), 2 * (qx * y - qy * x)
    return (
        x + qw * tx + qy * tz - qz * ty,
        y + qw * ty + qz * tx - qx * tz,
        z + qw * tz + qx * ty - qy * tx,
    )


def rotation_between(start: Sequence[float], end: Sequence[float]) -> Vector3:
    """The shortest turn from one rotation vector to another, as a rotation vector in the same
    frame (rad)."""
    return rotvec_from_quaternion(
        multiply(quaternion_from_rotvec(end), conjugate(quaternion_from_rotvec(start)))
    )


# --- poses ------------------------------------------------------------------------------------


def compose(outer: Sequence[float], inner: Sequence[float]) -> Pose:
    """Pose `inner`, given in the frame `outer`, in the frame that `outer` is given in."""
    turn = quaternion_from_rotvec(outer[3:6])
    x, y, z = rotate(turn, inner[:3])
    rotation = rotvec_from_quaternion(multiply(turn, quaternion_from_rotvec(inner[3:6])))
    return (outer[0] + x, outer[1] + y, outer[2] + z, *rotation)


def invert(pose: Sequence[float]) -> Pose:
    """The pose that composes with `pose` to the identity."""
    back = conjugate(quaternion_from_rotvec(pose[3:6]))
    x, y, z = rotate(back, pose[:3])
    return (-x, -y, -z, *rotvec_from_quaternion(back))


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Between the origins of two poses (m)."""
    return math.dist(a[:3], b[:3])


def angle(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the shortest turn between two poses, 0 to π (rad)."""
    return math.hypot(*rotation_between(a[3:6], b[3:6]))


def interpolate(start: Sequence[float], end: Sequence[float], fraction: float) -> Pose:
    """Straight line for the origin, shortest turn at constant rate for the rotation."""
    sx, sy, sz = start[:3]
    ex, ey, ez = end[:3]
    rx, ry, rz = rotation_between(start[3:6], end[3:6])
    turn = quaternion_from_rotvec((rx * fraction, ry * fraction, rz * fraction))
    rotation = rotvec_from_quaternion(multiply(turn, quaternion_from_rotvec(start[3:6])))
    return (
        sx + (ex - sx) * fraction,
        sy + (ey - sy) * fraction,
        sz + (ez - sz) * fraction,
        *rotation,
    )


# --- the sensor frame -------------------------------------------------------------------------


def tip_pose(x: float, y: float, z: float) -> Pose:
    """TCP pose in the sensor frame with the tool pointing at the gel: z = 0 touches, z < 0
    presses in (m)."""
    return (x, y, z, *TIP_ROTATION)


class SensorFrame:
    """Poses and twists between the robot base and the sensor frame.

    `pose` is the sensor frame in the base frame, as `CellConfig.sensor_pose` has it.
    """

    def __init__(self, pose: Sequence[float]) -> None:
        self._origin = (pose[0], pose[1], pose[2])
        self._turn = quaternion_from_rotvec(pose[3:6])
        self._back = conjugate(self._turn)

    def from_base(self, pose: Sequence[float]) -> Pose:
        """A base-frame pose in the sensor frame."""
        ox, oy, oz = self._origin
        offset = rotate(self._back, (pose[0] - ox, pose[1] - oy, pose[2] - oz))
        turn = multiply(self._back, quaternion_from_rotvec(pose[3:6]))
        return (*offset, *rotvec_from_quaternion(turn))

    def to_base(self, pose: Sequence[float]) -> Pose:
        """A sensor-frame pose in the base frame."""
        ox, oy, oz = self._origin
        x, y, z = rotate(self._turn, pose[:3])
        turn = multiply(self._turn, quaternion_from_rotvec(pose[3:6]))
        return (ox + x, oy + y, oz + z, *rotvec_from_quaternion(turn))

    def twist_from_base(self, twist: Sequence[float]) -> Pose:
        """A twist of the TCP (m/s, rad/s) along base axes, along sensor axes."""
        return (*rotate(self._back, twist[:3]), *rotate(self._back, twist[3:6]))

    def twist_to_base(self, twist: Sequence[float]) -> Pose:
        """A twist of the TCP (m/s, rad/s) along sensor axes, along base axes."""
        return (*rotate(self._turn, twist[:3]), *rotate(self._turn, twist[3:6]))
