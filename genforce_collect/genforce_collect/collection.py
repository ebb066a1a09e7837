"""Running an indentation plan: what happens in which order, and what a failure leads to.

Knows nothing of ROS: a `Rig` moves, records and announces. A contact that breaks off is marked
invalid, the tip is taken out of the gel, force and image are zeroed anew (a device may have been
started again), and the contact is repeated once after the others; three in a row, or a rig that
does not recover, end the run. Whatever ends it, the robot is stopped, the tip retracted and the bag
closed.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from genforce_collect.bags import BagReader, next_session_bag, session_bags
from genforce_collect.clock import JUMP_NS, system_offset_ns
from genforce_collect.config import CellConfig, SensorConfig, Vector3
from genforce_collect.errors import (
    ConfigError,
    DataError,
    DeviceError,
    GenforceError,
    SafetyError,
)
from genforce_collect.trajectory import (
    SAME_PLACE_M,
    ContactPlan,
    Move,
    Phase,
    Plan,
    check_plan,
    contact_moves,
    load_plan,
    plan_duration,
    retract_move,
    to_sensor_frame,
)
from genforce_collect.verification import verify

NO_CONTACT_S = 0.6  # recorded before the first contact, for tare and reference
SETTLE_S = 0.2  # at rest before the tare
FAILURES_IN_A_ROW = 3
TOUCH_STEPS_M = (1e-4, 2e-5)  # coarse, then fine from one coarse step above
TOUCH_REST_S = 0.06  # at each step, for the force to settle
LAST_SAMPLES_S = 2.0  # longest wait for the samples of the last contact


class ContactBroken(GenforceError):
    """A contact could not be finished; the run may go on."""


class Cancelled(GenforceError):
    """The operator ended the run."""

    exit_code = 130


@dataclass(frozen=True)
class Goal:
    """What was asked for; the fields are those of the CollectIndent action."""

    indenter: str
    plan: str = ""
    contacts: tuple[int, ...] = ()
    bag: str = ""
    resume: bool = False
    execute_motion: bool = True


@dataclass(frozen=True)
class Job:
    """A checked goal."""

    session: str
    cell: CellConfig
    sensor: SensorConfig
    goal: Goal
    plan: Plan
    contacts: tuple[ContactPlan, ...]  # to be made now
    bag: Path | None


@dataclass(frozen=True)
class Announcement:
    """Where the robot is in the plan: the content of a Contact message."""

    job: Job
    contact: ContactPlan
    phase: Phase
    target: Vector3  # start frame (m)
    reason: str = ""


@dataclass(frozen=True)
class Progress:
    """For the operator."""

    done: int
    total: int
    phase: Phase
    eta_s: float


@dataclass(frozen=True)
class Counts:
    """What the recorder held at the end, topic by topic."""

    topics: tuple[str, ...] = ()
    received: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    whole: int
    invalid: int
    counts: Counts
    message: str = ""  # empty: every contact is whole


class Rig(Protocol):
    """The devices of a cell. Every method but `halt` raises `Cancelled` once the operator asked
    for the end and `let_finish` was not called.
    """

    def wait_ready(self, recorder: bool) -> None:
        """Wait until the robot would move, every stream is fresh and, where it is needed, the
        recorder is there. Raises `DeviceError`.
        """

    def tip(self) -> Vector3:
        """Where the tip is now, in the sensor frame (m)."""

    def move(self, target: Vector3, speed_m_s: float) -> None:
        """Move to a position in the sensor frame (m). Raises `ContactBroken`; where the guard ended
        the move, once the robot has backed off.
        """

    def halt(self) -> None:
        """Stop a move that is under way at once."""

    def recover(self) -> None:
        """Make the robot ready after a failure. Raises `DeviceError` where that fails."""

    def normal_force(self) -> float:
        """Fz now (N), negative when pressing; NaN before the first sample."""

    def zero(self) -> None:
        """Tare the force sensor and take the no-contact reference. Raises `DeviceError`."""

    def start_recording(self, bag: Path, metadata: dict[str, Any]) -> None:
        """Raises `GenforceError` with the recorder's reason."""

    def stop_recording(self) -> Counts:
        """Close the bag."""

    def announce(self, announcement: Announcement) -> int:
        """Publish the phase; returns its stamp (ns)."""

    def gap(self, start_ns: int, end_ns: int) -> str | None:
        """Why the streams do not cover an interval; empty if they do, None while samples of its
        end may be on their way.
        """

    def rest(self, seconds: float) -> None:
        """Wait with everything running."""

    def let_finish(self) -> None:
        """From now on the operator's wish to end is known and being carried out."""


# --- before the run -----------------------------------------------------------------------------


def prepare(goal: Goal, cell: CellConfig, sensor: SensorConfig) -> Job:
    """Check a goal against cell, sensor and what the session holds already; nothing moves.

    Raises `ConfigError`, `SafetyError` or `DataError`.
    """
    plan = load_plan(goal.plan, sensor)
    check_plan(plan, cell.limits, sensor)
    if bad := [i for i in goal.contacts if i >= len(plan.contacts)]:
        raise ConfigError(f"contact {bad[0]} is not in the plan of {len(plan.contacts)} contacts")
    wanted = list(goal.contacts or range(len(plan.contacts)))
    session = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    bag = Path(goal.bag).absolute() if goal.bag else None
    if bag is not None and (earlier := session_bags(bag)):
        if not goal.resume:
            raise ConfigError(f"{bag}: exists already; give another name or resume it")
        session = _check_resumable(earlier[0], plan, cell, sensor, goal.indenter) or session
        whole = frozenset[int]().union(*(verify(path).whole_contacts for path in earlier))
        wanted = [index for index in wanted if index not in whole]
        bag = next_session_bag(bag)
    contacts = tuple(plan.contacts[index] for index in dict.fromkeys(wanted))
    return Job(session, cell, sensor, goal, plan, contacts, bag)


def _check_resumable(
    bag: Path, plan: Plan, cell: CellConfig, sensor: SensorConfig, indenter: str
) -> str:
    """Session of an earlier bag. Raises `DataError` where it is of another collection."""
    with BagReader(bag) as reader:
        recorded = reader.metadata
    for what, known, now in (
        ("cell", recorded.get("cell_config", {}).get("name"), cell.name),
        ("sensor", recorded.get("sensor"), sensor.name),
        ("indenter", recorded.get("indenter"), indenter),
        ("plan", recorded.get("plan", {}).get("contacts"), _plan_data(plan)["contacts"]),
    ):
        if known != now:
            raise DataError(f"{bag}: was recorded with another {what}; give another name")
    return str(recorded["session"])


def job_metadata(job: Job) -> dict[str, Any]:
    """What the bag says of its session."""
    return {
        "session": job.session,
        "sensor": job.sensor.name,
        "indenter": job.goal.indenter,
        "plan": _plan_data(job.plan),
        "contacts": [contact.index for contact in job.contacts],
        "execute_motion": job.goal.execute_motion,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cell_config": job.cell.model_dump(mode="json"),
        "sensor_config": job.sensor.model_dump(mode="json"),
        "versions": {name: _version(name) for name in ("genforce_collect", "rclpy", "mcap")},
    }


def _plan_data(plan: Plan) -> dict[str, Any]:
    data = asdict(plan)
    for contact in data["contacts"]:
        if math.isnan(contact["direction_rad"]):
            contact["direction_rad"] = None
        contact["point"] = list(contact["point"])
    return data | {"start": list(plan.start), "contacts": list(data["contacts"])}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# --- the run ------------------------------------------------------------------------------------


def run_collection(job: Job, rig: Rig, report: Callable[[Progress], None]) -> Outcome:
    """Carry out a job. Raises only where not even the recording could begin."""
    return _Run(job, rig, report).run()


class _Run:
    def __init__(self, job: Job, rig: Rig, report: Callable[[Progress], None]) -> None:
        self._job, self._rig, self._report = job, rig, report
        self._whole = 0
        self._invalid: list[ContactPlan] = []
        self._waiting: deque[ContactPlan] = deque()
        self._repeated: set[int] = set()
        self._unchecked: deque[tuple[ContactPlan, int, int]] = deque()  # with start and end (ns)
        self._position: Vector3 = (0.0, 0.0, job.plan.clearance_m)  # start frame
        self._begun_at = 0.0

    def run(self) -> Outcome:
        job, rig = self._job, self._rig
        if not job.contacts:
            return Outcome(0, 0, Counts())
        rig.wait_ready(recorder=job.bag is not None)
        try:
            self._begin()
        except Exception:
            self._retreat()  # a search for the surface may have ended in the gel
            raise
        message, counts = "", Counts()
        try:
            rig.rest(NO_CONTACT_S)
            if job.goal.execute_motion:
                self._make_contacts()
        except GenforceError as error:
            rig.let_finish()
            message = str(error)
        finally:
            self._retreat()
            if job.bag is not None:
                counts = rig.stop_recording()
        if not message and self._invalid:
            message = f"{len(self._invalid)} of {len(job.contacts)} contacts are not whole"
        return Outcome(self._whole, len(self._invalid), counts, message or counts.error)

    def _begin(self) -> None:
        """From anywhere to above the first contact, all zeroed and recording."""
        job, rig = self._job, self._rig
        plan, moves = job.plan, job.goal.execute_motion
        if moves:
            if plan.touch_n:  # until the surface is found, it may be anywhere within the search
                high = max(plan.clearance_m, plan.touch_search_m)
                self._job = replace(job, plan=replace(plan, clearance_m=high))
            self._go_above(job.contacts[0])
        rig.rest(SETTLE_S)
        rig.zero()
        if moves and plan.touch_n:
            self._job = replace(job, plan=replace(plan, start=self._find_surface()))
            self._read_position()
            self._move(retract_move(self._job.plan, self._position, job.cell.speeds))
        if job.bag is not None:
            rig.start_recording(job.bag, job_metadata(self._job))

    def _make_contacts(self) -> None:
        self._begun_at = time.monotonic()
        self._waiting.extend(self._job.contacts)
        failures = 0
        while self._waiting:
            contact = self._waiting.popleft()
            try:
                self._make_contact(contact)
            except ContactBroken as error:
                failures += 1
                self._break_off(contact, str(error))
                self._repeat(contact)
                if failures == FAILURES_IN_A_ROW:
                    raise ContactBroken(
                        f"{failures} contacts in a row broke off: {error}"
                    ) from error
                self._start_afresh()
            except GenforceError as error:
                self._break_off(contact, str(error))
                self._invalid.append(contact)
                raise
            else:
                failures = 0
            if self._look_back(LAST_SAMPLES_S if not self._waiting else 0.0) and self._waiting:
                self._start_afresh()

    def _start_afresh(self) -> None:
        """After a fault: wait until all is well, leave the gel, and zero what may have changed.

        Faults come in company: what breaks here is tried again.
        """
        for attempt in range(1, FAILURES_IN_A_ROW + 1):
            self._rig.recover()
            try:
                self._read_position()
                self._move(retract_move(self._job.plan, self._position, self._job.cell.speeds))
                self._rig.rest(SETTLE_S)
                self._rig.zero()
                return
            except (ContactBroken, DeviceError):
                self._rig.halt()
                if attempt == FAILURES_IN_A_ROW:
                    raise

    def _make_contact(self, contact: ContactPlan) -> None:
        moves = contact_moves(self._job.plan, contact, self._position, self._job.cell.speeds)
        previous, start_ns = Phase.IDLE, 0
        clock_ns = system_offset_ns(time.monotonic_ns)
        for move in moves:
            if move.phase != previous:
                stamp_ns = self._announce(contact, move.phase, move.target)
                self._report_progress(move.phase, [contact, *self._waiting])
                previous = move.phase
                if not start_ns and move.phase != Phase.APPROACH:
                    start_ns = stamp_ns
            self._move(move)
            if move.phase != Phase.APPROACH and self._job.plan.dwell_s:
                self._rig.rest(self._job.plan.dwell_s)
        step_ns = system_offset_ns(time.monotonic_ns) - clock_ns
        if abs(step_ns) > JUMP_NS:
            raise ContactBroken(f"the system time was stepped by {step_ns * 1e-9:+.2f} s")
        end_ns = self._announce(contact, Phase.DONE, self._position)
        self._whole += 1
        self._unchecked.append((contact, start_ns, end_ns))

    def _look_back(self, patience_s: float) -> bool:
        """Take back contacts whose samples, as they came in since, turn out to have a gap, and
        tell whether there was one.

        With patience, a contact whose samples do not come in time is taken back too.
        """
        taken_back = False
        deadline = time.monotonic() + patience_s
        while self._unchecked:
            contact, start_ns, end_ns = self._unchecked[0]
            reason = self._rig.gap(start_ns, end_ns)
            if reason is None and time.monotonic() < deadline:
                self._rig.rest(0.02)
                continue
            if reason is None:
                if not patience_s:
                    break
                reason = f"its samples did not arrive within {patience_s:g} s"
            self._unchecked.popleft()
            if reason:
                taken_back = True
                self._whole -= 1
                self._announce(contact, Phase.INVALID, self._position, reason)
                self._repeat(contact)
        return taken_back

    def _repeat(self, contact: ContactPlan) -> None:
        """After the others, once."""
        if contact.index in self._repeated:
            self._invalid.append(contact)
        else:
            self._repeated.add(contact.index)
            self._waiting.append(contact)

    def _break_off(self, contact: ContactPlan, reason: str) -> None:
        self._rig.halt()
        self._announce(contact, Phase.INVALID, self._position, reason)

    def _go_above(self, contact: ContactPlan) -> None:
        """Clear of the gel, over the first contact; from a parked arm straight into the box."""
        plan, speeds = self._job.plan, self._job.cell.speeds
        x, y = contact.point
        highest = self._job.cell.limits.workspace_max_m[2] - plan.start[2] - SAME_PLACE_M
        for attempt in range(1, FAILURES_IN_A_ROW + 1):
            try:
                self._read_position()
                self._move(retract_move(plan, self._position, speeds))
                for z in (min(self._position[2], highest), plan.clearance_m):
                    self._move(Move(Phase.IDLE, (x, y, z), speeds.transfer_m_s))
                return
            except ContactBroken:
                if attempt == FAILURES_IN_A_ROW:
                    raise
                self._rig.recover()

    def _find_surface(self) -> Vector3:
        """The start pose at the height where the tip touches, in the sensor frame.

        Presses at the first contact's point in steps until the force is reached, and leaves the
        tip close above. Raises `SafetyError` where there is no surface to be found.
        """
        plan, speeds = self._job.plan, self._job.cell.speeds
        x, y = self._job.contacts[0].point
        height = plan.touch_search_m
        touching = 0.0
        for step in TOUCH_STEPS_M:
            while True:
                if height < -plan.touch_search_m:
                    raise SafetyError(
                        f"no surface within {plan.touch_search_m * 1e3:g} mm of the start pose: "
                        "teach start_mm or widen touch_search_mm"
                    )
                self._move(Move(Phase.IDLE, (x, y, height), speeds.contact_m_s))
                self._rig.rest(TOUCH_REST_S)
                if self._rig.normal_force() <= -plan.touch_n:
                    break
                height -= step
            touching, height = height, height + TOUCH_STEPS_M[0]
            self._move(Move(Phase.IDLE, (x, y, height), speeds.contact_m_s))
        return plan.start[0], plan.start[1], plan.start[2] + touching

    def _retreat(self) -> None:
        """Out of the gel, whatever happened; a robot that cannot move stays stopped."""
        self._rig.let_finish()
        if not self._job.goal.execute_motion:
            return
        try:
            self._read_position()
            self._move(retract_move(self._job.plan, self._position, self._job.cell.speeds))
            self._announce(self._job.plan.contacts[0], Phase.IDLE, self._position)
        except GenforceError:
            self._rig.halt()

    def _read_position(self) -> None:
        tip, start = self._rig.tip(), self._job.plan.start
        self._position = (tip[0] - start[0], tip[1] - start[1], tip[2] - start[2])

    def _move(self, move: Move) -> None:
        if math.dist(self._position, move.target) < 1e-6:
            return
        self._rig.move(to_sensor_frame(self._job.plan, move.target), move.speed_m_s)
        self._position = move.target

    def _announce(
        self, contact: ContactPlan, phase: Phase, target: Vector3, reason: str = ""
    ) -> int:
        return self._rig.announce(Announcement(self._job, contact, phase, target, reason))

    def _report_progress(self, phase: Phase, ahead: Sequence[ContactPlan]) -> None:
        plan, speeds = self._job.plan, self._job.cell.speeds
        estimate = plan_duration(plan, ahead, speeds)
        total = len(self._job.contacts)
        if self._whole:  # scale by how long the contacts took so far
            expected = plan_duration(plan, self._job.contacts, speeds) - estimate
            estimate *= (time.monotonic() - self._begun_at) / max(expected, 1e-3)
        self._report(Progress(self._whole, total, phase, estimate))
