"""Pose algebra, against scipy's rotations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from genforce_collect.geometry import (
    IDENTITY,
    SensorFrame,
    angle,
    compose,
    interpolate,
    invert,
    matrix_from_rotvec,
    quaternion_from_rotvec,
    rotation_between,
    rotvec_from_quaternion,
    tip_pose,
)

brief = settings(max_examples=50, deadline=None)

lengths = st.floats(-1, 1)
turns = st.floats(-2 * math.pi, 2 * math.pi) | st.sampled_from([0.0, 1e-9, -1e-9, math.pi])
rotvecs = st.tuples(turns, turns, turns)
poses = st.tuples(lengths, lengths, lengths, turns, turns, turns)


def matrix(pose) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3] = Rotation.from_rotvec(pose[3:]).as_matrix()
    result[:3, 3] = pose[:3]
    return result


@brief
@given(rotvecs)
def test_quaternions_and_matrices_are_those_of_scipy(rotvec):
    expected = Rotation.from_rotvec(rotvec)
    quaternion = np.array(quaternion_from_rotvec(rotvec))
    assert abs(quaternion @ expected.as_quat()) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(matrix_from_rotvec(rotvec), expected.as_matrix(), atol=1e-12)


@brief
@given(rotvecs)
def test_the_way_back_to_a_rotation_vector_gives_the_same_short_one(rotvec):
    back = rotvec_from_quaternion(quaternion_from_rotvec(rotvec))
    assert math.hypot(*back) <= math.pi + 1e-9
    difference = Rotation.from_rotvec(rotvec).inv() * Rotation.from_rotvec(back)
    assert difference.magnitude() < 1e-6


def test_a_zero_quaternion_is_refused():
    with pytest.raises(ValueError, match="no rotation"):
        rotvec_from_quaternion((0, 0, 0, 0))


@brief
@given(poses, poses)
def test_composition_is_the_product_of_matrices(a, b):
    np.testing.assert_allclose(matrix(compose(a, b)), matrix(a) @ matrix(b), atol=1e-9)


@brief
@given(poses)
def test_the_inverse_composes_to_the_identity(pose):
    np.testing.assert_allclose(compose(pose, invert(pose)), IDENTITY, atol=1e-7)


@brief
@given(poses, poses, st.floats(0, 1))
def test_interpolation_turns_the_short_way_at_a_constant_rate(a, b, fraction):
    between = interpolate(a, b, fraction)
    assert angle(a, between) == pytest.approx(fraction * angle(a, b), abs=1e-6)
    np.testing.assert_allclose(between[:3], np.add(a[:3], fraction * np.subtract(b[:3], a[:3])))


def test_interpolation_across_pi_does_not_turn_round():
    a, b = (0, 0, 0, math.pi - 0.05, 0, 0), (0, 0, 0, -math.pi + 0.05, 0, 0)
    assert math.hypot(*rotation_between(a[3:], b[3:])) == pytest.approx(0.1)
    assert angle(a, interpolate(a, b, 0.5)) == pytest.approx(0.05)


@brief
@given(poses, poses, poses)
def test_the_sensor_frame_is_undone_by_its_way_back(frame, pose, twist):
    sensor = SensorFrame(frame)
    back = sensor.to_base(sensor.from_base(pose))
    np.testing.assert_allclose(matrix(back), matrix(pose), atol=1e-6)
    np.testing.assert_allclose(
        sensor.twist_to_base(sensor.twist_from_base(twist)), twist, atol=1e-9
    )
    np.testing.assert_allclose(matrix(sensor.from_base(frame)), np.eye(4), atol=1e-6)


def test_the_tip_points_at_the_gel():
    tool_z = np.array(matrix_from_rotvec(tip_pose(0, 0, 0)[3:]))[:, 2]
    np.testing.assert_allclose(tool_z, (0, 0, -1), atol=1e-12)
