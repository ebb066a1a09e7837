"""The plan makes the contacts it says, in order, within the limits, in the time it estimates."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genforce_collect import plan_cli
from genforce_collect.config import PlanConfig, load_cell, load_sensor
from genforce_collect.errors import ConfigError, SafetyError
from genforce_collect.trajectory import (
    LOADED_PHASES,
    Headway,
    Phase,
    build_plan,
    check_plan,
    contact_moves,
    load_plan,
    move_duration,
    plan_duration,
    plan_moves,
    press_plan,
    random_plan,
)
from genforce_msgs.msg import Contact

SENSOR = load_sensor("array_1")
CELL = load_cell("virtual")


def test_phase_numbers_are_those_of_the_message():
    for phase in Phase:
        assert phase == getattr(Contact, f"PHASE_{phase.name}")


@pytest.mark.parametrize(
    ("config", "depths"),
    [
        (PlanConfig(step_x_mm=3, step_y_mm=4, step_z_mm=0.25, max_z_mm=1.0), [0.25, 0.5, 0.75, 1]),
        (
            PlanConfig(step_x_mm=6.5, step_y_mm=6.5, step_z_mm=1.125, max_z_mm=4.5, radius_mm=1.5),
            [1.125, 2.25, 3.375, 4.5],
        ),
        (PlanConfig(step_x_mm=5, step_y_mm=7, step_z_mm=0.25, max_z_mm=1.0), [0.25, 0.5, 0.75, 1]),
    ],
    ids=["gelsight", "tactip", "uskin"],
)
def test_plan_is_the_originals_160_contacts(config: PlanConfig, depths: list[float]):
    plan = build_plan(config)
    assert [c.index for c in plan.contacts] == list(range(160))
    assert sorted({c.depth_m for c in plan.contacts}) == pytest.approx([d * 1e-3 for d in depths])
    x, y = config.step_x_mm * 1e-3, config.step_y_mm * 1e-3
    assert {c.point for c in plan.contacts} == {(0, 0), (x, 0), (-x, 0), (0, y), (0, -y)}
    combinations = {(c.point, c.depth_m, c.direction_rad) for c in plan.contacts}
    assert len(combinations) == 160


def test_a_contact_goes_down_sideways_back_and_up():
    contact = build_plan(SENSOR.plan).contacts[-1]
    down, side, back, up = (target for _, target in contact.phases)
    assert [p for p, _ in contact.phases] == [
        Phase.NORMAL_INC,
        Phase.SHEAR_INC,
        Phase.SHEAR_DEC,
        Phase.NORMAL_DEC,
    ]
    assert down == back == (0.0, -0.004, pytest.approx(-0.001))
    assert math.dist(side, down) == pytest.approx(1e-3)
    assert side[2] == down[2]
    assert up == (0.0, -0.004, 0.0)


def test_the_tip_never_travels_sideways_in_the_gel_but_to_shear():
    plan = build_plan(SENSOR.plan)
    position = (0.0, 0.0, plan.clearance_m)
    for _, move in plan_moves(plan, plan.contacts, CELL.speeds):
        sideways = math.dist(position[:2], move.target[:2]) > 1e-9
        if sideways and move.phase not in (Phase.SHEAR_INC, Phase.SHEAR_DEC):
            assert min(position[2], move.target[2]) >= plan.clearance_m
        if move.phase in LOADED_PHASES:
            assert move.speed_m_s == CELL.speeds.contact_m_s
        position = move.target
    assert position[2] >= plan.clearance_m


def test_contacts_at_one_point_follow_without_a_lift():
    plan = build_plan(SENSOR.plan)
    first, second = plan.contacts[:2]
    moves = contact_moves(plan, second, first.phases[-1][1], CELL.speeds)
    assert [m.phase for m in moves] == [p for p, _ in second.phases]


def test_press_goes_to_full_depth_and_up():
    (press,) = press_plan(SENSOR.plan).contacts
    assert press.phases == (
        (Phase.DOWN, (0.0, 0.0, pytest.approx(-1e-3))),
        (Phase.UP, (0.0, 0.0, 0.0)),
    )


@given(seed=st.integers(0, 2**32 - 1))
def test_random_contacts_stay_within_the_ranges_and_repeat_by_seed(seed: int):
    plan = random_plan(SENSOR.plan, 20, seed)
    assert plan == random_plan(SENSOR.plan, 20, seed)
    for contact in plan.contacts:
        assert abs(contact.point[0]) <= 3e-3
        assert abs(contact.point[1]) <= 4e-3
        assert 0.25e-3 <= contact.depth_m <= 1e-3
        assert contact.radius_m <= 1e-3
    check_plan(plan, CELL.limits, SENSOR)


def test_duration_adds_up_trapezoids_and_dwell():
    assert move_duration(0.1, 0.1, 0.1) == pytest.approx(2.0)  # just a triangle
    assert move_duration(0.2, 0.1, 0.1) == pytest.approx(3.0)
    assert move_duration(0.001, 0.1, 0.1) == pytest.approx(0.2)
    plan = press_plan(SENSOR.plan.model_copy(update={"dwell_s": 1.5, "speed_mm_s": 4.0}))
    v, a = 4e-3, CELL.speeds.acceleration_m_s2
    lift = move_duration(plan.clearance_m, CELL.speeds.transfer_m_s, a)
    expected = 2 * lift + 2 * move_duration(1e-3, v, a) + 2 * 1.5
    assert plan_duration(plan, plan.contacts, CELL.speeds) == pytest.approx(expected)


def test_a_move_at_a_twentieth_of_a_tenth_of_its_speed_is_not_stuck_and_one_that_rests_is():
    headway = Headway(now=0.0)
    speed, noise = 0.05 * 0.1 * CELL.speeds.contact_m_s, 5e-6
    for step in range(400):  # ten times a second
        now = 0.1 * step
        headway.note(1e-3 - speed * now + (noise if step % 2 else -noise), now)
        assert not headway.stuck(now)
    headway = Headway(now)
    for step in range(100):
        headway.note(1e-3 + (noise if step % 2 else -noise), now + 0.1 * step)
    assert headway.stuck(now + 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_z_mm": 5.0, "step_z_mm": 5.0}, "deep"),
        ({"step_x_mm": 11.5}, "x ="),
        ({"step_y_mm": SENSOR.gel.height_mm / 2 - 0.5}, "edge of the gel"),
        ({"clearance_mm": 60.0}, "z = 60.00 mm, outside the workspace"),
        ({"start_mm": (0.0, 0.0, -4.5)}, "mm"),
        ({"touch_n": 0.1, "touch_search_mm": 9.5}, "z = -10.25 mm, outside the workspace"),
        ({"touch_n": 0.1, "clearance_mm": 49.5}, "z = 50.50 mm, outside the workspace"),
    ],
)
def test_a_plan_beyond_a_limit_is_refused_by_name(change: dict, words: str):
    plan = build_plan(SENSOR.plan.model_copy(update=change))
    limits = CELL.limits.model_copy(update={"workspace_min_m": (-0.012, -0.012, -0.01)})
    with pytest.raises(SafetyError, match="contact") as error:
        check_plan(plan, limits, SENSOR)
    assert words in str(error.value)


def test_plan_files_of_every_kind_load(tmp_path: Path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "contacts:\n"
        "  - {x_mm: 1, y_mm: -2, depth_mm: 0.5, direction_deg: 90, radius_mm: 0.5}\n"
        "  - {x_mm: 0, y_mm: 0, depth_mm: 1}\n"
    )
    sheared, press = load_plan(str(path), SENSOR).contacts
    assert sheared.phases[1][1] == pytest.approx((1e-3, -1.5e-3, -0.5e-3))
    assert [p for p, _ in press.phases] == [Phase.DOWN, Phase.UP]
    path.write_text("random: {count: 7, seed: 3}\nmax_z_mm: 0.5\n")
    assert max(c.depth_m for c in load_plan(str(path), SENSOR).contacts) <= 0.5e-3
    path.write_text("press: true\n")
    assert len(load_plan(str(path), SENSOR).contacts) == 1
    path.write_text("directions: 4\n")
    assert len(load_plan(str(path), SENSOR).contacts) == 80
    assert len(load_plan("random:9:1", SENSOR).contacts) == 9
    slides = load_plan("slide", SENSOR).contacts
    assert [c.depth_m / SENSOR.plan.max_z_mm * 1e3 for c in slides] == pytest.approx([0.25, 1.0])
    assert {len(c.phases) for c in slides} == {4}
    assert load_plan("press", SENSOR) == press_plan(SENSOR.plan)
    assert load_plan("press:0.4", SENSOR).contacts[0].depth_m == pytest.approx(0.4e-3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("contacts: []", "contacts"),
        ("random: {count: 0, seed: 1}", "random.count"),
        ("press: true\nrandom: {count: 1, seed: 1}", "only one of"),
        ("depth: 3", "depth: unknown key"),
        ("step_z_mm: 2\nmax_z_mm: 1", "no contact"),
    ],
)
def test_a_bad_plan_file_is_named(tmp_path: Path, text: str, words: str):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_plan(str(path), SENSOR)


@pytest.mark.parametrize(
    "name",
    ["nowhere.yaml", "random:1", "random:a:b", "random:0:1", "press:", "press:-1", "press:deep"],
)
def test_an_unknown_plan_name_is_refused(name: str):
    with pytest.raises(ConfigError):
        load_plan(name, SENSOR)


def test_a_plan_may_be_slower_than_the_cell_but_not_faster():
    def speeds(name: str, **change: float) -> set[float]:
        sensor = SENSOR.model_copy(update={"plan": SENSOR.plan.model_copy(update=change)})
        plan = load_plan(name, sensor)
        moves = contact_moves(plan, plan.contacts[0], (0.0, 0.0, 0.0), CELL.speeds)
        return {move.speed_m_s for move in moves if move.phase in LOADED_PHASES}

    assert speeds("") == {CELL.speeds.contact_m_s}
    assert speeds("", speed_mm_s=1.0) == {1e-3}
    assert speeds("", speed_mm_s=1e3) == {CELL.speeds.contact_m_s}
    assert speeds("press:1.0") == {0.5e-3}
    assert speeds("press", speed_mm_s=2.0) == {2e-3}


def test_moves_end_where_the_next_begins():
    plan = random_plan(SENSOR.plan, 10, 1)
    targets = [m.target for _, m in plan_moves(plan, plan.contacts, CELL.speeds)]
    for a, b in itertools.pairwise(targets):
        changed = sum(abs(p - q) > 1e-9 for p, q in zip(a, b, strict=True))
        assert 1 <= changed <= 2  # up, over, or down; never a diagonal into the gel


def test_preview_says_what_the_plan_is_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parser = argparse.ArgumentParser()
    plan_cli.add_arguments(parser)
    for number, plan in enumerate(["", "press", "random:5:1"]):
        out = tmp_path / f"{number}.png"
        assert plan_cli.run(parser.parse_args(["preview", "--plan", plan, "--out", str(out)])) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
    assert "160 contacts at 5 points" in capsys.readouterr().out
