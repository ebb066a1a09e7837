"""Each limit, at its edge: what is inside passes, what is outside is named."""

from __future__ import annotations

import math

import pytest

from genforce_collect.config import LimitsConfig
from genforce_collect.geometry import tip_pose
from genforce_collect.safety import (
    REACTION_S,
    BreachKind,
    check_age,
    check_position,
    check_speed,
    check_target,
    check_tracking,
    check_wrench,
    retreat,
    stopping_point,
    tool_speed,
)

LIMITS = LimitsConfig(
    force_n=(8.0, 8.0, 12.0),
    torque_nm=(0.1, 0.1, 0.1),
    stale_s=0.1,
    workspace_min_m=(-0.012, -0.012, -0.003),
    workspace_max_m=(0.012, 0.012, 0.05),
)
NOTHING = (0.0, 0.0, 0.0)


@pytest.mark.parametrize("force", [(8.0, -8.0, -12.0), NOTHING])
def test_forces_up_to_the_limit_pass(force):
    assert check_wrench(LIMITS, force, NOTHING) is None


@pytest.mark.parametrize(
    ("force", "torque", "named"),
    [
        ((8.1, 0, 0), NOTHING, ("Fx", "8.10", "8 N")),
        ((0, -8.1, 0), NOTHING, ("Fy", "-8.10", "8 N")),
        ((0, 0, -12.5), NOTHING, ("Fz", "-12.50", "12 N")),
        (NOTHING, (0, 0, 0.11), ("Tz", "0.110", "0.1 N·m")),
        ((0, math.nan, 0), NOTHING, ("Fy", "nan")),
        (NOTHING, (math.inf, 0, 0), ("Tx", "inf")),
    ],
)
def test_a_breach_names_axis_value_and_limit(force, torque, named):
    breach = check_wrench(LIMITS, force, torque)
    assert breach is not None
    assert all(word in breach.text for word in named)
    assert breach.kind.pressed


def test_old_and_missing_data_are_told_apart():
    assert check_age(LIMITS, "netft/wrench", 10.0, 10.1 - 1e-9) is None
    assert "0.25 s old" in check_age(LIMITS, "netft/wrench", 10.0, 10.25).text
    assert "no netft/wrench yet" in check_age(LIMITS, "netft/wrench", None, 10.0).text


def test_the_box_holds_for_targets_and_in_flight():
    assert check_position(LIMITS, (0.012, -0.012, 0.05)) is None
    breach = check_position(LIMITS, (0.0, 0.0125, 0.0))
    assert breach.kind is BreachKind.WORKSPACE
    assert "y = 12.50 mm" in breach.text
    assert check_position(LIMITS, (math.nan, 0, 0)) is not None


def test_from_outside_the_arm_may_come_in_but_not_go_further_out():
    start = (0.0, 0.0, 0.2)
    assert check_position(LIMITS, (0.0, 0.0, 0.15), start) is None
    assert check_position(LIMITS, (0.0, 0.0, 0.21), start) is not None
    assert check_position(LIMITS, (0.02, 0.0, 0.15), start) is not None


@pytest.mark.parametrize(
    ("pose", "speed", "acceleration", "kind"),
    [
        (tip_pose(0, 0, -0.004), 0.01, 0.1, BreachKind.WORKSPACE),
        (tip_pose(0, 0, math.nan), 0.01, 0.1, BreachKind.WORKSPACE),
        (tip_pose(0, 0, 0.01), 0.26, 0.1, BreachKind.SPEED),
        (tip_pose(0, 0, 0.01), 0.0, 0.1, BreachKind.SPEED),
        (tip_pose(0, 0, 0.01), math.nan, 0.1, BreachKind.SPEED),
        (tip_pose(0, 0, 0.01), 0.01, 1.1, BreachKind.SPEED),
        (tip_pose(0, 0, 0.01), 0.01, -0.1, BreachKind.SPEED),
    ],
)
def test_a_target_that_would_break_a_limit_is_refused(pose, speed, acceleration, kind):
    assert check_target(LIMITS, pose, speed, acceleration).kind is kind


def test_a_target_within_all_limits_is_allowed():
    assert check_target(LIMITS, tip_pose(0.01, 0, -0.002), 0.25, 1.0) is None


def test_turning_fast_is_fast():
    assert tool_speed((0, 0, 0.1, 0, 0, 0)) == pytest.approx(0.1)
    assert check_speed(LIMITS, tool_speed((0, 0, 0, 0, 0, 2.0))) is not None


def test_an_arm_that_is_held_back_is_noticed():
    assert check_tracking(LIMITS, tip_pose(0, 0, 0.003), tip_pose(0, 0, 0.0001)) is None
    breach = check_tracking(LIMITS, tip_pose(0, 0, 0.004), tip_pose(0, 0, 0))
    assert breach.kind is BreachKind.TRACKING
    assert "4.00 mm" in breach.text


def test_the_retreat_leads_out_of_the_gel_and_not_out_of_the_box():
    assert retreat(LIMITS, (0.001, 0.002, -0.001)) == pytest.approx((0.001, 0.002, 0.002))
    assert retreat(LIMITS, (0, 0, 0.049)) == pytest.approx((0, 0, 0.05))
    assert retreat(LIMITS, (0, 0, 0.07)) == pytest.approx((0, 0, 0.07))


def test_a_tip_that_is_stopped_comes_to_rest_after_reaction_and_braking():
    velocity = (0.0, -0.15, 0.2)
    way = 0.25 * REACTION_S + 0.25**2 / (2 * 2.0)
    rest = stopping_point((0.01, 0.0, 0.0), velocity, deceleration=2.0)
    assert rest == pytest.approx((0.01, -0.6 * way, 0.8 * way))
