"""A collection: contacts as planned, recorded whole, broken ones repeated, ended and resumed.

The recorder and the indenter run as processes; the devices are real action servers, services and
streams, kept by this process, with a robot that moves at the speed it is told.
"""

from __future__ import annotations

import array
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped, WrenchStamped
from rclpy.action import ActionClient, ActionServer, CancelResponse, GoalResponse
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rclpy.task import Future
from sensor_msgs.msg import CompressedImage
from std_srvs.srv import Trigger

from genforce_collect.bags import BagReader, session_bags
from genforce_collect.markers.quality import REFERENCE_SINCE
from genforce_collect.nodes.common import (
    LATCHED_QOS,
    NAMESPACE,
    Stream,
    await_answer,
    spin_until,
    to_stamp,
)
from genforce_collect.safety import STOPPED_ON_REQUEST
from genforce_collect.trajectory import Phase
from genforce_collect.verification import BagReport, verify
from genforce_msgs.action import CollectIndent, MoveLinear
from genforce_msgs.msg import Markers, RecorderStatus, RobotState

pytestmark = pytest.mark.live

PATIENCE_S = 60.0  # a test that waits this long has failed, however busy the machine
RATES = {"wrench": 250.0, "pose": 125.0, "image": 30.0, "markers": 30.0}
MESSAGES = {
    "wrench": WrenchStamped,
    "pose": PoseStamped,
    "image": CompressedImage,
    "markers": Markers,
}


class FakeCell(Node):
    """Robot, force sensor and camera as the drivers offer them."""

    def __init__(self) -> None:
        super().__init__("fake_cell", namespace=NAMESPACE)
        self.position = [0.004, 0.0, 0.02]
        self.moves: list[tuple[float, float, float]] = []
        self.calls: list[str] = []
        self.fail_next: Callable[[tuple[float, float, float]], str] = lambda _: ""
        self.slider = 1.0  # of the teach pendant
        self.camera_runs = True
        self.frozen = False
        self._picture = array.array("B")
        self.surface = 0.0  # height at which the tip touches (m)
        self.refusals = 0  # of the service that takes the reference, before it agrees
        self.reference_s = 0.1  # until it has the frames for it
        self.moves_before_reference = 0
        self._halt = threading.Event()
        self._done = threading.Event()
        self._streams = {
            "wrench": Stream(self, WrenchStamped, "netft/wrench", RATES["wrench"]),
            "pose": Stream(self, PoseStamped, "robot/tcp_pose", RATES["pose"]),
            "image": Stream(self, CompressedImage, "array_1/image/compressed", RATES["image"]),
            "markers": Stream(self, Markers, "array_1/markers", RATES["markers"]),
        }
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._state = self.create_publisher(RobotState, "robot/state", LATCHED_QOS)
        self._state_count = 0
        self.create_timer(0.1, self.publish_state)
        for name in ("robot/stop", "robot/recover", "netft/tare", "array_1/set_reference"):
            self.create_service(Trigger, name, self._service(name))
        self._server = ActionServer(
            self,
            MoveLinear,
            "robot/move_linear",
            self._move,
            goal_callback=lambda _: GoalResponse.ACCEPT,
            cancel_callback=self._on_cancel,
        )
        self._thread = threading.Thread(target=self._publish)
        self._thread.start()

    def publish_state(self) -> None:
        self._tell_state("")

    def _tell_state(self, message: str) -> None:
        state = RobotState(
            seq=self._state_count, connected=True, ready=not message, message=message
        )
        state.header.stamp = to_stamp(time.time_ns())
        self._state.publish(state)
        self._state_count += 1

    def _service(self, name: str) -> Callable[..., Trigger.Response]:
        def answer(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            self.calls.append(name)
            if name == "robot/stop":
                self.stop()
            response.success = name != "array_1/set_reference" or not self.refusals
            self.refusals -= not response.success
            if name == "array_1/set_reference" and response.success:
                threading.Timer(self.reference_s, self._tell_reference, [time.time_ns()]).start()
            response.message = "" if response.success else "2 good frames in a row"
            return response

        return answer

    def _tell_reference(self, since_ns: int) -> None:
        self.moves_before_reference = len(self.moves)
        status = DiagnosticStatus(name="segmenter", hardware_id="array_1")
        status.values = [KeyValue(key=REFERENCE_SINCE, value=str(since_ns))]
        self._diagnostics.publish(DiagnosticArray(status=[status]))

    def stop(self) -> None:
        """What a call of robot/stop does."""
        self._halt.set()
        self._tell_state(STOPPED_ON_REQUEST)

    async def _move(self, handle) -> MoveLinear.Result:
        finished = Future(executor=self.executor)
        threading.Thread(target=self._drive, args=(handle, finished)).start()
        message = await finished
        if message and handle.is_cancel_requested:
            handle.canceled()
        elif message:
            handle.abort()
        else:
            handle.succeed()
        return MoveLinear.Result(success=not message, message=message)

    def _on_cancel(self, _) -> CancelResponse:
        self.calls.append("cancel")
        self._halt.set()
        return CancelResponse.ACCEPT

    def _drive(self, handle, finished: Future) -> None:
        goal = handle.request
        target = (goal.pose.position.x, goal.pose.position.y, goal.pose.position.z)
        start = tuple(self.position)
        self.moves.append(target)
        duration = max(math.dist(start, target) / goal.speed, 1e-9)
        self._halt.clear()
        part, then, told = 0.0, time.monotonic(), 0.0
        while True:
            if self._halt.wait(0.002):
                finished.set_result(STOPPED_ON_REQUEST)
                return
            now = time.monotonic()
            part, then = part + (now - then) * self.slider / duration, now
            if part >= 1:
                break
            self.position = [a + (b - a) * part for a, b in zip(start, target, strict=True)]
            if now > told + 0.1:
                remaining = math.dist(self.position, target)
                handle.publish_feedback(MoveLinear.Feedback(remaining=remaining))
                told = now
            if part > 0.5 and (reason := self.fail_next(target)):
                finished.set_result(reason)
                return
        self.position = list(target)
        finished.set_result("")

    def _publish(self) -> None:
        sent = dict.fromkeys(self._streams, 0)
        begun = time.monotonic()
        while not self._done.wait(0.002):
            elapsed = time.monotonic() - begun
            for name, stream in self._streams.items():
                while sent[name] < elapsed * RATES[name]:
                    sent[name] += 1
                    self._send(name, stream)

    def _send(self, name: str, stream: Stream) -> None:
        message = MESSAGES[name]()
        message.header.stamp = to_stamp(time.time_ns())
        if name == "pose":
            point = message.pose.position
            point.x, point.y, point.z = self.position
        elif name == "wrench":  # 2 N/mm
            message.wrench.force.z = -2e3 * max(0.0, self.surface - self.position[2])
        elif name == "image" and not self.frozen:
            self._picture = array.array("B", os.urandom(4000))
        if name == "image":
            message.data = self._picture
        if name != "image" or self.camera_runs:
            stream.publish(message)

    def restart(self, name: str) -> None:
        """A node that was started again numbers its samples from 0."""
        self._streams[name].flush()
        self._streams[name].count = 0

    def complain(self, device: str, message: str) -> None:
        """As the driver of a device does once a second, while it is of no use."""
        level = DiagnosticStatus.ERROR if message else DiagnosticStatus.OK
        status = DiagnosticStatus(level=level, name=device, message=message)
        self._diagnostics.publish(DiagnosticArray(status=[status]))

    def close(self) -> None:
        self._done.set()
        self._thread.join()


class Session:
    """The cell, and a client of the indenter."""

    def __init__(self, cell: FakeCell, executor: EventsExecutor, folder: Path) -> None:
        self.cell, self.folder, self.feedback = cell, folder, []
        self._executor = executor
        self._node = rclpy.create_node("client", namespace=NAMESPACE)
        executor.add_node(self._node)
        self.alive: set[str] = set()
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self._note_life, 10)
        self._client = ActionClient(self._node, CollectIndent, "collect_indent")
        self.processes = {
            name: subprocess.Popen([sys.executable, "-m", f"genforce_collect.nodes.{name}"])
            for name in ("recorder", "indenter")
        }
        assert self.spin(self._client.server_is_ready, PATIENCE_S)

    def _note_life(self, message: DiagnosticArray) -> None:
        self.alive |= {status.name for status in message.status}

    def spin(self, done: Callable[[], bool], timeout_s: float) -> bool:
        return spin_until(self._executor, done, timeout_s)

    def send(self, **goal):
        goal = CollectIndent.Goal(**{"sensor": "array_1", "indenter": "sphere"} | goal)
        goal.execute_motion = not goal.execute_motion
        self.feedback = []
        assert await_answer(self._executor, self._node, "indenter", PATIENCE_S)
        sent = self._client.send_goal_async(goal, lambda m: self.feedback.append(m.feedback))
        assert self.spin(sent.done, PATIENCE_S)
        return sent.result()

    def run(self, **goal) -> CollectIndent.Result:
        finished = self.send(**goal).get_result_async()
        assert self.spin(finished.done, PATIENCE_S)
        return finished.result().result

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def is_served(self) -> bool:
        """Whether the one indenter that runs now answers, and none of before is remembered."""
        topic = f"/{NAMESPACE}/collect_indent/_action/status"
        return self._client.server_is_ready() and self._node.count_publishers(topic) == 1

    def terminate(self, name: str) -> int:
        self.processes[name].send_signal(signal.SIGTERM)
        return self.processes[name].wait(PATIENCE_S)

    def restart(self, name: str, largest_file: int = resource.RLIM_INFINITY) -> None:
        """With a `largest_file` (bytes), writing beyond it fails as on a full disk."""
        if self.processes[name].poll() is None:
            self.kill(name)
        limit = (largest_file, resource.RLIM_INFINITY)
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", f"genforce_collect.nodes.{name}"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        )

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(PATIENCE_S)
        self._executor.remove_node(self._node)
        self._node.destroy_node()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    rclpy.init()
    executor = EventsExecutor()
    cell = FakeCell()
    executor.add_node(cell)
    session = Session(cell, executor, tmp_path_factory.mktemp("bags"))
    yield session
    session.close()
    cell.close()
    cell.destroy_node()
    executor.shutdown()
    rclpy.shutdown()


@pytest.fixture(autouse=True)
def healthy(session: Session) -> None:
    session.cell.fail_next = lambda _: ""
    session.cell.camera_runs = True
    session.cell.frozen = False
    session.cell.surface = 0.0
    session.cell.refusals = 0
    session.cell.moves.clear()
    session.cell.calls.clear()


def phases(bag: str) -> list[tuple[int, Phase]]:
    with BagReader(bag) as reader:
        return [
            (record.message.index, Phase(record.message.phase))
            for record in reader.messages([f"/{NAMESPACE}/contact"])
        ]


def checked(result: CollectIndent.Result) -> BagReport:
    report = verify(result.bag)
    lost = dict(zip(result.topics, result.lost, strict=True))
    assert {t.name: t.lost or 0 for t in report.topics} == lost
    received = dict(zip(result.topics, result.received, strict=True))
    assert {t.name: t.received for t in report.topics} == received
    return report


def test_every_contact_goes_through_its_four_phases_and_is_whole(session: Session):
    result = session.run(bag=str(session.folder / "plain"), contacts=[0, 1, 33])
    assert result.success, result.message
    assert (result.contacts, result.invalid) == (3, 0)
    assert set(session.cell.calls) == {"netft/tare", "array_1/set_reference"}
    attempts: dict[int, list[Phase]] = {}
    for index, phase in phases(result.bag):
        if phase not in (Phase.IDLE, Phase.APPROACH, Phase.INVALID):
            attempts.setdefault(index, []).append(phase)
    assert list(attempts) == [0, 1, 33]
    four = [Phase.NORMAL_INC, Phase.SHEAR_INC, Phase.SHEAR_DEC, Phase.NORMAL_DEC, Phase.DONE]
    assert all(seen[: len(four)] == four for seen in attempts.values())
    report = checked(result)
    assert report.ok, report.problems
    assert report.whole_contacts == {0, 1, 33}
    assert session.cell.position[2] >= 0.002  # left clear of the gel
    assert {f.index for f in session.feedback} >= {0, 1, 2}
    assert all(f.total == 3 for f in session.feedback)
    with BagReader(result.bag) as bag:
        assert bag.metadata["sensor"] == "array_1"
        assert len(bag.metadata["plan"]["contacts"]) == 160
        first_contact = next(bag.messages([f"/{NAMESPACE}/contact"])).stamp_ns
        frames = [r.stamp_ns for r in bag.raw([f"/{NAMESPACE}/array_1/image/compressed"])]
    assert sum(stamp < first_contact for stamp in frames) >= 0.5 * RATES["image"] * 0.8


def test_a_reference_refused_by_streams_that_have_just_begun_is_asked_for_again(session: Session):
    session.cell.refusals = 2
    result = session.run(bag=str(session.folder / "refused"), contacts=[0])
    assert result.success, result.message
    assert session.cell.calls.count("array_1/set_reference") == 3


def test_an_estimator_beside_takes_its_reference_after_the_segmenter(session: Session):
    calls, refusals = session.cell.calls, [1]

    def answer(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        calls.append("array_1/set_force_reference")
        response.success = not refusals
        response.message = f"{refusals.pop()} good frame" if refusals else ""
        return response

    service = session.cell.create_service(Trigger, "array_1/set_force_reference", answer)
    try:
        result = session.run(bag=str(session.folder / "estimated"), contacts=[0])
    finally:
        session.cell.destroy_service(service)
    assert result.success, result.message
    zeroed = ["netft/tare", "array_1/set_reference", *["array_1/set_force_reference"] * 2]
    assert calls[: len(zeroed)] == zeroed


def test_no_contact_begins_before_the_reference_is_taken(session: Session):
    session.cell.reference_s = 2.0
    try:
        result = session.run(bag=str(session.folder / "reference"), contacts=[0])
    finally:
        session.cell.reference_s = 0.1
    assert result.success, result.message
    before = session.cell.moves[: session.cell.moves_before_reference]
    assert all(z > 0 for _, _, z in before)
    assert len(before) < len(session.cell.moves)


def test_no_contact_begins_before_the_bag_holds_every_stream(session: Session):
    session.kill("recorder")
    handle = session.send(bag=str(session.folder / "late"), contacts=[0])
    session.restart("recorder")
    finished = handle.get_result_async()
    assert session.spin(finished.done, PATIENCE_S)
    result = finished.result().result
    assert result.success, result.message
    with BagReader(result.bag) as bag:
        first_contact = next(bag.messages([f"/{NAMESPACE}/contact"])).stamp_ns
        for topic in ("robot/tcp_pose", "netft/wrench", "array_1/image/compressed"):
            assert next(bag.raw([f"/{NAMESPACE}/{topic}"])).stamp_ns < first_contact


def test_the_nodes_without_a_device_show_that_they_live(session: Session):
    session.alive.clear()
    assert session.spin(lambda: {"indenter", "recorder"} <= session.alive, PATIENCE_S)


def test_a_broken_contact_is_marked_and_repeated_after_the_others(session: Session):
    failures = []

    def fail_once(target: tuple[float, float, float]) -> str:
        if target[2] < 0 and not failures and len(session.cell.moves) > 6:
            failures.append(target)
            return "protective stop"
        return ""

    session.cell.fail_next = fail_once
    result = session.run(bag=str(session.folder / "repeat"), contacts=[0, 1, 2])
    assert result.success, result.message
    assert result.contacts == 3
    ends = [e for e in phases(result.bag) if e[1] in (Phase.DONE, Phase.INVALID)]
    broken = next(index for index, phase in ends if phase == Phase.INVALID)
    assert ends[-1] == (broken, Phase.DONE)
    assert len(ends) == 4
    report = checked(result)
    assert report.ok, report.problems
    assert [c.reason for c in report.contacts if not c.whole] == ["protective stop"]


def test_a_robot_that_keeps_failing_ends_the_run_with_its_reason(session: Session):
    session.cell.fail_next = lambda target: "force limit" if target[2] < 0 else ""
    result = session.run(bag=str(session.folder / "failing"), contacts=[0, 1, 2, 3, 4])
    assert not result.success
    assert "force limit" in result.message
    assert result.contacts == 0
    assert verify(result.bag).whole_contacts == frozenset()


def test_a_silent_camera_breaks_the_contact_off(session: Session):
    def freeze(target: tuple[float, float, float]) -> str:
        if len(session.cell.moves) > 9:
            session.cell.camera_runs = False
            threading.Timer(2.5, lambda: setattr(session.cell, "camera_runs", True)).start()
            session.cell.fail_next = lambda _: ""
        return ""

    session.cell.fail_next = freeze
    result = session.run(bag=str(session.folder / "camera"), contacts=list(range(6)))
    assert result.success, result.message
    assert result.contacts == 6
    reasons = [c.reason for c in checked(result).contacts if not c.whole]
    assert reasons
    assert all("image/compressed" in reason for reason in reasons)


def in_a_contact(session: Session, number: int, act: Callable[[], None]) -> None:
    """Acts once, in the middle of the `number`-th move into the gel."""
    seen: set[int] = set()

    def hook(target: tuple[float, float, float]) -> str:
        if target[2] < 0:
            seen.add(len(session.cell.moves))
            if len(seen) == number:
                session.cell.fail_next = lambda _: ""
                act()
        return ""

    session.cell.fail_next = hook


@pytest.mark.parametrize("stream", ["image", "wrench", "markers"])
def test_a_node_that_is_started_again_in_a_contact_has_it_repeated_after_a_new_tare(
    session: Session, stream: str
):
    in_a_contact(session, 2, lambda: session.cell.restart(stream))
    result = session.run(bag=str(session.folder / f"restart_{stream}"), contacts=[0, 1, 2])
    assert result.success, result.message
    assert result.contacts == 3
    reasons = [c.reason for c in verify(result.bag).contacts if not c.whole]
    assert any("began anew" in reason for reason in reasons), reasons
    assert session.cell.calls.count("netft/tare") == 2
    assert session.cell.calls.count("array_1/set_reference") == 2


@pytest.mark.parametrize(
    ("device", "message"),
    [("camera", "frozen, the same picture again and again"), ("netft", "gauge 1 is saturated")],
)
def test_a_device_that_says_it_is_of_no_use_has_the_contact_repeated(
    session: Session, device: str, message: str
):
    def ail() -> None:
        session.cell.complain(device, message)
        threading.Timer(1.0, session.cell.complain, (device, "")).start()

    in_a_contact(session, 2, ail)
    result = session.run(bag=str(session.folder / f"ailing_{device}"), contacts=[0, 1, 2])
    assert result.success, result.message
    assert result.contacts == 3
    assert message in [c.reason for c in verify(result.bag).contacts if not c.whole]


def test_a_contact_under_a_frozen_camera_is_not_whole(session: Session):
    """By the pictures alone, should nobody have noticed while it was made."""

    def freeze() -> None:
        session.cell.frozen = True
        threading.Timer(1.0, setattr, (session.cell, "frozen", False)).start()

    in_a_contact(session, 2, freeze)
    result = session.run(bag=str(session.folder / "frozen"), contacts=[0, 1, 2])
    reasons = [c.reason for c in verify(result.bag).contacts if not c.whole]
    assert reasons
    assert set(reasons) == {f"/{NAMESPACE}/array_1/image/compressed is frozen"}


def test_a_full_disk_ends_the_run_with_the_tip_out_of_the_gel_and_a_readable_bag(
    session: Session,
):
    session.restart("recorder", largest_file=400_000)
    bag = session.folder / "full"
    result = session.run(bag=str(bag), contacts=list(range(40)))
    session.restart("recorder")
    assert not result.success
    assert "recording ended" in result.message
    assert session.cell.position[2] >= 0.002
    assert verify(bag).messages > 100


def test_a_recorder_that_began_anew_ends_the_run_without_another_contact(session: Session):
    another = session.cell.create_publisher(RecorderStatus, "recorder/status", LATCHED_QOS)

    def begin_anew() -> None:
        another.publish(RecorderStatus())  # holds no bag
        session.cell.fail_next = lambda _: "protective stop"  # a fault that is recovered from

    in_a_contact(session, 2, begin_anew)
    result = session.run(bag=str(session.folder / "anew"), contacts=list(range(6)))
    session.cell.destroy_publisher(another)
    assert not result.success
    assert "recorder: it began anew" in result.message
    assert session.cell.calls.count("netft/tare") == 1
    assert Phase.DONE not in [phase for index, phase in phases(result.bag) if index > 0]


def test_cancel_stops_the_robot_retracts_and_closes_the_bag(session: Session):
    handle = session.send(bag=str(session.folder / "cancel"), contacts=list(range(40)))
    assert session.spin(
        lambda: bool(session.feedback and session.feedback[-1].index >= 1), PATIENCE_S
    )
    handle.cancel_goal_async()
    finished = handle.get_result_async()
    assert session.spin(finished.done, PATIENCE_S)
    result = finished.result().result
    assert not result.success
    assert "operator" in result.message
    assert {"cancel", "robot/stop"} & set(session.cell.calls)
    assert session.cell.position[2] >= 0.002
    assert checked(result).whole_contacts == set(range(result.contacts))


def pull_slider(session: Session, slider: float, seconds: float) -> None:
    session.cell.slider = slider
    threading.Timer(seconds, setattr, (session.cell, "slider", 1.0)).start()


def test_a_move_at_the_lowest_setting_of_the_slider_is_waited_for(session: Session):
    in_a_contact(session, 1, lambda: pull_slider(session, 0.003, seconds=7.0))
    result = session.run(bag=str(session.folder / "slow"), contacts=[0])
    assert result.success, result.message
    assert [c.whole for c in verify(result.bag).contacts] == [True]


def test_a_move_that_is_stuck_has_the_contact_repeated(session: Session):
    in_a_contact(session, 1, lambda: pull_slider(session, 0.0, seconds=5.5))
    result = session.run(bag=str(session.folder / "stuck"), contacts=[0])
    assert result.success, result.message
    reasons = [c.reason for c in verify(result.bag).contacts if not c.whole]
    assert len(reasons) == 1
    assert "the arm is stuck" in reasons[0]
    assert "cancel" in session.cell.calls
    assert "robot/stop" not in session.cell.calls, "it would end a retreat of the guard too"


@pytest.mark.parametrize("at", ["in a move", "between two moves"])
def test_a_stop_by_another_ends_the_run_with_the_tip_out_of_the_gel(session: Session, at: str):
    plan = session.folder / "dwell.yaml"
    plan.write_text("dwell_s: 1.0\n")
    delay_s = 0.0 if at == "in a move" else 0.5

    def stop() -> None:
        threading.Timer(delay_s, session.cell.stop).start() if delay_s else session.cell.stop()

    in_a_contact(session, 1, stop)
    bag = session.folder / f"stopped {at}"
    result = session.run(bag=str(bag), plan=str(plan), contacts=[0, 1])
    assert not result.success
    assert "somebody called robot/stop" in result.message
    assert session.cell.position[2] >= 0.002
    assert [c.reason for c in verify(bag).contacts] == [result.message]


def test_a_second_collector_is_refused_while_one_runs(session: Session):
    handle = session.send(bag=str(session.folder / "one"), contacts=list(range(40)))
    second = session.send(bag=str(session.folder / "two"))
    assert not second.accepted
    handle.cancel_goal_async()
    assert session.spin(handle.get_result_async().done, PATIENCE_S)


def test_a_resumed_run_completes_the_plan_contact_by_contact(session: Session):
    bag = session.folder / "resumed"
    handle = session.send(bag=str(bag), contacts=list(range(6)))
    assert session.spin(
        lambda: bool(session.feedback and session.feedback[-1].index >= 2), PATIENCE_S
    )
    session.kill("recorder")
    finished = handle.get_result_async()
    assert session.spin(finished.done, PATIENCE_S)
    assert not finished.result().result.success
    session.restart("recorder")
    assert not session.run(bag=str(bag), contacts=list(range(6))).success  # exists already
    result = session.run(bag=str(bag), contacts=list(range(6)), resume=True)
    assert result.success, result.message
    first, second = (verify(path) for path in session_bags(bag))
    told = first.problems + second.problems
    assert first.whole_contacts | second.whole_contacts == set(range(6)), told
    assert not first.whole_contacts & second.whole_contacts
    assert len(first.whole_contacts) >= 1
    assert first.metadata["session"] == second.metadata["session"]
    other = session.run(bag=str(bag), indenter="cone", resume=True)
    assert "indenter" in other.message


def test_a_dry_run_does_everything_but_move(session: Session):
    result = session.run(bag=str(session.folder / "dry"), contacts=[0], execute_motion=True)
    assert result.success, result.message
    assert session.cell.moves == []
    assert set(session.cell.calls) == {"netft/tare", "array_1/set_reference"}
    assert verify(result.bag).whole_contacts == frozenset()


def test_a_press_is_recorded_down_and_up(session: Session):
    result = session.run(bag=str(session.folder / "press"), plan="press")
    assert result.success, result.message
    seen = [phase for _, phase in phases(result.bag) if phase not in (Phase.IDLE, Phase.APPROACH)]
    assert seen[-3:] == [Phase.DOWN, Phase.UP, Phase.DONE]


def test_the_surface_is_found_where_the_start_pose_is_not_taught(session: Session):
    plan = session.folder / "touch.yaml"
    plan.write_text("press: true\nmax_z_mm: 0.5\ntouch_n: 0.1\ntouch_search_mm: 0.6\n")
    session.cell.surface = -0.0003
    result = session.run(bag=str(session.folder / "touch"), plan=str(plan))
    assert result.success, result.message
    with BagReader(result.bag) as bag:
        start = bag.metadata["plan"]["start"]
    # 0.1 N is reached 0.05 mm below the surface; the search steps by 0.02 mm.
    assert start[2] == pytest.approx(-0.00035, abs=2.1e-5)
    assert min(z for _, _, z in session.cell.moves) == pytest.approx(start[2] - 0.0005)
    session.cell.surface = -0.002
    result = session.run(bag=str(session.folder / "no_touch"), plan=str(plan))
    assert "no surface" in result.message
    assert session.cell.position[2] >= 0.002


def test_a_killed_indenter_leaves_a_closed_bag_to_resume(session: Session):
    bag = session.folder / "orphan"
    session.send(bag=str(bag), contacts=list(range(4)))
    assert session.spin(
        lambda: bool(session.feedback and session.feedback[-1].index >= 1), PATIENCE_S
    )
    session.restart("indenter")
    assert session.spin(lambda: (bag / "metadata.yaml").is_file(), PATIENCE_S)
    result = session.run(bag=str(bag), contacts=list(range(4)), resume=True)
    assert result.success, result.message
    union = frozenset().union(*(verify(path).whole_contacts for path in session_bags(bag)))
    assert union == set(range(4))


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ({"plan": "nowhere.yaml"}, "no such plan file"),
        ({"contacts": [160]}, "not in the plan"),
        ({"sensor": "circle_1"}, "array_1"),
        ({"bag": "/nowhere/at/all"}, "/nowhere/at"),
    ],
)
def test_a_goal_that_cannot_be_met_is_refused_in_one_line(session: Session, goal, words: str):
    result = session.run(**goal)
    assert not result.success
    assert words in result.message
    assert "\n" not in result.message


def test_a_graph_that_ends_with_a_node_is_not_said_to_be_ended_by_the_operator(session: Session):
    def end() -> None:
        session.cell.camera_runs = False
        session.processes["indenter"].terminate()

    bag = session.folder / "ended"
    in_a_contact(session, 3, end)
    session.send(bag=str(bag), contacts=list(range(6)))
    assert session.spin(lambda: session.processes["indenter"].poll() is not None, PATIENCE_S)
    session.cell.camera_runs = True
    session.restart("indenter")
    reasons = [contact.reason for contact in verify(bag).contacts if not contact.whole]
    assert any("the graph ended" in reason for reason in reasons), reasons
    assert any("image/compressed is silent" in reason for reason in reasons), reasons
    assert session.spin(session.is_served, PATIENCE_S)


def test_sigterm_retracts_and_closes_the_bag(session: Session):
    bag = session.folder / "sigterm"
    session.send(bag=str(bag), contacts=list(range(40)))
    assert session.spin(
        lambda: bool(session.feedback and session.feedback[-1].index >= 1), PATIENCE_S
    )
    ended = threading.Thread(target=session.terminate, args=("indenter",))
    ended.start()
    assert session.spin(lambda: not ended.is_alive(), PATIENCE_S)
    assert (bag / "metadata.yaml").is_file()
    assert session.cell.position[2] >= 0.002
    session.restart("indenter")
