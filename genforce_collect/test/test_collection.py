"""What a run does in which order, and what a failure leads to, on a rig that takes no time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genforce_collect import collection
from genforce_collect.bags import BagWriter
from genforce_collect.collection import (
    FAILURES_IN_A_ROW,
    Announcement,
    Cancelled,
    ContactBroken,
    Counts,
    Goal,
    Outcome,
    job_metadata,
    prepare,
    run_collection,
)
from genforce_collect.config import Vector3, load_cell, load_sensor
from genforce_collect.errors import DataError, DeviceError
from genforce_collect.geometry import TIP_ROTATION
from genforce_collect.safety import check_target
from genforce_collect.trajectory import Phase

CELL = load_cell("virtual")
SENSOR = load_sensor("array_1")
ABOVE_M = 0.02


class FakeRig:
    """Moves at once; `on_move` may do or raise anything. Notes all that is asked of it."""

    def __init__(self, on_move: Callable[[Vector3], None] = lambda _: None) -> None:
        self.on_move = on_move
        self.position: Vector3 = (0.0, 0.0, ABOVE_M)
        self.log: list[str] = []
        self.said: list[tuple[int, Phase, str]] = []

    def wait_ready(self, recorder: bool) -> None:
        self.log.append("wait_ready")

    def tip(self) -> Vector3:
        return self.position

    def move(self, target: Vector3, speed_m_s: float) -> None:
        self.on_move(target)
        self.position = target
        self.log.append("in" if target[2] < 0 else "touch" if target[2] == 0 else "clear")

    def halt(self) -> None:
        self.log.append("halt")

    def recover(self) -> None:
        self.log.append("recover")

    def normal_force(self) -> float:
        return 0.0

    def zero(self) -> None:
        self.log.append("zero")

    def start_recording(self, bag: Path, metadata: dict[str, Any]) -> None:
        self.log.append("start_recording")

    def stop_recording(self) -> Counts:
        self.log.append("stop_recording")
        return Counts()

    def announce(self, announcement: Announcement) -> int:
        phase = announcement.phase
        if phase in (Phase.DONE, Phase.INVALID):
            self.said.append((announcement.contact.index, phase, announcement.reason))
        return len(self.said) + 1

    def gap(self, start_ns: int, end_ns: int) -> str | None:
        return ""

    def rest(self, seconds: float) -> None:
        pass

    def let_finish(self) -> None:
        self.log.append("let_finish")


def run(rig: FakeRig, tmp_path: Path, contacts: int = 3) -> Outcome:
    goal = Goal("sphere", contacts=tuple(range(contacts)), bag=str(tmp_path / "bag"))
    return run_collection(prepare(goal, CELL, SENSOR), rig, lambda _: None)


def once(depth: int, act: Callable[[], None]) -> Callable[[Vector3], None]:
    """Acts in the `depth`-th move into the gel."""
    count = 0

    def on_move(target: Vector3) -> None:
        nonlocal count
        count += target[2] < 0
        if target[2] < 0 and count == depth:
            act()

    return on_move


def break_off() -> None:
    raise ContactBroken("protective stop")


def test_a_broken_contact_is_repeated_with_force_and_image_zeroed_out_of_the_gel(tmp_path: Path):
    rig = FakeRig(once(4, break_off))
    outcome = run(rig, tmp_path)
    assert (outcome.whole, outcome.invalid, outcome.message) == (3, 0, "")
    assert rig.said == [
        (0, Phase.DONE, ""),
        (1, Phase.INVALID, "protective stop"),
        (2, Phase.DONE, ""),
        (1, Phase.DONE, ""),
    ]
    broken = rig.log.index("halt")
    assert rig.log[broken : broken + 4] == ["halt", "recover", "clear", "zero"]


def test_a_fault_on_the_way_out_of_the_gel_is_one_more_to_recover_from(tmp_path: Path):
    broken = []

    def fail(target: Vector3) -> None:
        pressed = target[2] < 0
        if (pressed and not broken) or (len(broken) == 1 and not pressed):
            broken.append(target)
            break_off()

    rig = FakeRig(fail)
    assert run(rig, tmp_path).whole == 3
    assert len(broken) == 2
    assert rig.log.count("recover") == 2
    assert rig.log.count("zero") == 2


def test_after_a_gap_that_came_to_light_later_all_must_be_well_before_it_goes_on(tmp_path: Path):
    class Gappy(FakeRig):
        asked = 0

        def gap(self, start_ns: int, end_ns: int) -> str | None:
            self.asked += 1
            return "image is silent for 0.40 s" if self.asked == 1 else ""

    rig = Gappy()
    assert run(rig, tmp_path, contacts=2).whole == 2
    assert [(index, phase) for index, phase, _ in rig.said] == [
        (0, Phase.DONE),
        (0, Phase.INVALID),
        (1, Phase.DONE),
        (0, Phase.DONE),
    ]
    settled = rig.log.index("recover")
    assert rig.log[settled : settled + 3] == ["recover", "clear", "zero"]


@pytest.mark.parametrize("step_s", [5.0, -5.0])
def test_a_step_of_the_system_time_has_the_contact_repeated(tmp_path: Path, monkeypatch, step_s):
    offset_ns = [0]
    monkeypatch.setattr(collection, "system_offset_ns", lambda _: offset_ns[0])

    def step() -> None:
        offset_ns[0] += round(step_s * 1e9)

    rig = FakeRig(once(4, step))
    outcome = run(rig, tmp_path)
    assert outcome.whole == 3
    assert (1, Phase.INVALID, f"the system time was stepped by {step_s:+.2f} s") in rig.said
    assert rig.said[-1] == (1, Phase.DONE, "")


def test_contacts_that_break_off_in_a_row_end_the_run_with_the_bag_closed(tmp_path: Path):
    def fail(target: Vector3) -> None:
        if target[2] < 0:
            break_off()

    rig = FakeRig(fail)
    outcome = run(rig, tmp_path, contacts=8)
    assert outcome.whole == 0
    assert "3 contacts in a row broke off: protective stop" in outcome.message
    assert len(rig.said) == FAILURES_IN_A_ROW
    assert rig.log[-1] == "stop_recording"
    assert rig.position[2] > 0


def test_a_device_that_does_not_recover_ends_the_run_with_its_reason(tmp_path: Path):
    class Broken(FakeRig):
        def recover(self) -> None:
            raise DeviceError("emergency stop: release the button")

    rig = Broken(once(1, break_off))
    outcome = run(rig, tmp_path)
    assert "emergency stop" in outcome.message
    assert rig.log[-1] == "stop_recording"


def test_the_operators_wish_ends_the_run_tip_out_and_bag_closed(tmp_path: Path):
    def cancel() -> None:
        raise Cancelled("ended by the operator")

    rig = FakeRig(once(2, cancel))
    outcome = run(rig, tmp_path)
    assert outcome.message == "ended by the operator"
    assert rig.position[2] > 0
    assert rig.log[-1] == "stop_recording"


def test_a_run_begins_from_an_arm_parked_above_the_workspace(tmp_path: Path):
    def guard(target: Vector3) -> None:
        pose = (*target, *TIP_ROTATION)
        if breach := check_target(CELL.limits, pose, 0.01, 0.1):
            raise ContactBroken(breach.text)

    rig = FakeRig(guard)
    rig.position = (0.02, -0.03, 0.2)
    assert run(rig, tmp_path, contacts=1).whole == 1


class TouchRig(FakeRig):
    """Over a gel of 1 N/mm, 3 mm above where it was taught to be."""

    surface = 0.003

    def __init__(self, on_move: Callable[[Vector3], None] = lambda _: None) -> None:
        super().__init__(on_move)
        self.speeds: list[float] = []  # of the moves that ended deeper than the touch

    def move(self, target: Vector3, speed_m_s: float) -> None:
        if target[2] < self.surface - 2e-4:
            self.speeds.append(speed_m_s)
        super().move(target, speed_m_s)

    def normal_force(self) -> float:
        return min(0.0, 1e3 * (self.position[2] - self.surface))


def touch(rig: FakeRig, tmp_path: Path) -> Outcome:
    path = tmp_path / "plan.yaml"
    path.write_text("press: true\nmax_z_mm: 0.5\ntouch_n: 0.1\ntouch_search_mm: 4\n")
    goal = Goal("sphere", plan=str(path), bag=str(tmp_path / "bag"))
    return run_collection(prepare(goal, CELL, SENSOR), rig, lambda _: None)


def test_the_search_for_the_surface_is_slow_wherever_it_may_be(tmp_path: Path):
    rig = TouchRig()
    assert touch(rig, tmp_path).whole == 1
    assert max(rig.speeds) <= CELL.speeds.contact_m_s
    assert rig.position[2] == pytest.approx(rig.surface - 1e-4 + 0.002, abs=2e-5)


@pytest.mark.parametrize("error", [Cancelled("ended by the operator"), ContactBroken("silent")])
def test_a_search_for_the_surface_that_breaks_off_leaves_the_tip_out_of_the_gel(
    tmp_path: Path, error: Exception
):
    def fail(target: Vector3) -> None:
        if rig.position[2] < rig.surface < target[2] and "let_finish" not in rig.log:
            raise error

    rig = TouchRig(fail)
    with pytest.raises(type(error), match=str(error)):
        touch(rig, tmp_path)
    assert rig.position[2] > rig.surface
    assert "start_recording" not in rig.log


@pytest.mark.parametrize("what", ["cell", "sensor", "indenter", "plan"])
def test_only_the_same_collection_is_resumed(tmp_path: Path, what: str):
    cells = [CELL.model_copy(update={"name": "lab"}) if what == "cell" else CELL, CELL]
    sensors = [load_sensor("array_2") if what == "sensor" else SENSOR, SENSOR]
    goals = [
        Goal("cone" if what == "indenter" else "sphere", "press" if what == "plan" else ""),
        Goal("sphere", bag=str(tmp_path / "bag"), resume=True),
    ]
    first, again = zip(goals, cells, sensors, strict=True)
    BagWriter(tmp_path / "bag", job_metadata(prepare(*first))).close()
    with pytest.raises(DataError, match=f"another {what}"):
        prepare(*again)


def test_the_union_of_resumed_runs_is_the_plan(tmp_path: Path, monkeypatch):
    """Of what the bags hold whole nothing is made again, whatever the run before ended with."""
    whole = frozenset({0, 2})
    monkeypatch.setattr(collection, "session_bags", lambda _: [tmp_path / "bag"])
    monkeypatch.setattr(collection, "_check_resumable", lambda *_: "session")
    report = type("Report", (), {"whole_contacts": whole})
    monkeypatch.setattr(collection, "verify", lambda _: report)
    goal = Goal("sphere", contacts=(0, 1, 2, 3), bag=str(tmp_path / "bag"), resume=True)
    job = prepare(goal, CELL, SENSOR)
    assert {contact.index for contact in job.contacts} | whole == {0, 1, 2, 3}
    assert job.session == "session"
