"""Serves `collect_indent`: runs an indentation plan on a cell and has it recorded.

The action server lives on the node's executor and only accepts, cancels and reports. Each run has
a thread of its own with a `RosRig`, which owns a node and an executor for its clients: so waiting
for the robot never holds up a cancel, and nothing is shared between threads but an event.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from action_msgs.msg import GoalStatus
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Point, PoseStamped, Quaternion, WrenchStamped
from rclpy.action import ActionClient, ActionServer, CancelResponse, GoalResponse
from rclpy.action.client import ClientGoalHandle
from rclpy.action.server import ServerGoalHandle
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.task import Future
from std_srvs.srv import Trigger

from genforce_collect.collection import (
    Announcement,
    Cancelled,
    ContactBroken,
    Counts,
    Goal,
    Outcome,
    Progress,
    prepare,
    run_collection,
)
from genforce_collect.config import (
    CellConfig,
    SensorConfig,
    Vector3,
    load_cell,
    load_sensor,
)
from genforce_collect.errors import ConfigError, DeviceError, GenforceError
from genforce_collect.markers.quality import REFERENCE_SINCE
from genforce_collect.nodes.common import (
    LATCHED_QOS,
    NAMESPACE,
    Diagnostics,
    run,
    spin_until,
    stream_qos,
    to_stamp,
    values_of,
)
from genforce_collect.safety import STOPPED_ON_REQUEST
from genforce_collect.trajectory import STUCK_S, Headway
from genforce_collect.verification import silence
from genforce_msgs.action import CollectIndent, MoveLinear
from genforce_msgs.msg import Contact, RecorderStatus, RobotState, StreamTimes
from genforce_msgs.srv import StartRecording, StopRecording

NEWEST_QOS = QoSProfile(
    reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST, depth=1
)
TOOL_DOWN = Quaternion(x=1.0, y=0.0, z=0.0, w=0.0)  # tool z = - sensor z: rotation (pi, 0, 0)

READY_TIMEOUT_S = 30.0  # the bag of a dead predecessor takes 20 s to be closed
RECOVER_TIMEOUT_S = 20.0
RETREAT_TIMEOUT_S = 60.0  # of the guard's, slowed down by the pendant's slider
CALL_TIMEOUT_S = 5.0
ZERO_TIMEOUT_S = 10.0
HALT_TIMEOUT_S = 1.0
STOPPED_BY_ANOTHER = "the robot was stopped: somebody called robot/stop or cancelled its move"
STATE_AGE_S = 0.15  # a robot/state this much later than an event was published after it
SILENT_S = 2.0  # a needed stream without news for longer ends the contact
FAULT_S = 0.5  # the guard comes first: a stop would cut its retreat short
LAST_WORD_S = 1.0  # a stream silent for longer at the end of the graph is why it ended
RECORDER_SILENT_S = 3.0  # it reports five times a second
STOP_TIMEOUT_S = 20.0  # a bag on a slow disk
FEEDBACK_PERIOD_S = 0.2
STAMPS_KEPT = 20_000  # of each stream, to look for gaps: 20 s of the fastest


class Indenter(Node):
    """Parameters: cell, sensor; plan, of goals that name none (default: the sensor's own)."""

    def __init__(self) -> None:
        super().__init__("indenter", namespace=NAMESPACE)
        self._cell = load_cell(self.declare_parameter("cell", "virtual").value)
        self._sensor = load_sensor(self.declare_parameter("sensor", "array_1").value)
        self._plan = str(self.declare_parameter("plan", "").value)
        self._contacts = self.create_publisher(Contact, "contact", LATCHED_QOS)
        self._contact_count = 0
        self._diagnostics = Diagnostics(self, self._diagnose)
        self._run: threading.Thread | None = None
        self._busy = False
        self._cancel = threading.Event()
        self._closing = threading.Event()  # this node is to end, whoever wants it
        self._result = CollectIndent.Result()
        self._server = ActionServer(
            self,
            CollectIndent,
            "collect_indent",
            execute_callback=self._answer,
            goal_callback=self._on_goal,
            handle_accepted_callback=self._begin,
            cancel_callback=self._on_cancel,
        )

    # --- the action ---

    def _on_goal(self, _: CollectIndent.Goal) -> GoalResponse:
        if self._busy:
            return GoalResponse.REJECT
        self._busy = True
        return GoalResponse.ACCEPT

    def _on_cancel(self, _: ServerGoalHandle) -> CancelResponse:
        self._cancel.set()
        return CancelResponse.ACCEPT

    def _begin(self, handle: ServerGoalHandle) -> None:
        # Executed only when the run has ended: this executor polls an awaited goal without rest.
        self._cancel.clear()
        self._run = threading.Thread(target=self._work, args=(handle,), name="run")
        self._run.start()

    def _answer(self, handle: ServerGoalHandle) -> CollectIndent.Result:
        if self._result.success:
            handle.succeed()
        elif handle.is_cancel_requested:
            handle.canceled()
        else:
            handle.abort()
        return self._result

    # --- the run, in its own thread ---

    def _work(self, handle: ServerGoalHandle) -> None:
        try:
            self._result = self._collect(handle)
        except GenforceError as error:
            self.get_logger().error(str(error))
            self._result = CollectIndent.Result(message=str(error))
        except Exception as error:  # the client must not wait for ever for a run that is no more
            self.get_logger().fatal(f"run ended by {error!r}")
            self._result = CollectIndent.Result(message=f"internal error: {error!r}")
            raise
        finally:
            self._busy = False  # before the client hears of the end: it may ask for more at once
            handle.execute()

    def _collect(self, handle: ServerGoalHandle) -> CollectIndent.Result:
        request = handle.request
        if request.sensor not in ("", self._sensor.name):
            raise ConfigError(
                f"this cell holds sensor {self._sensor.name}, not {request.sensor}: start its "
                f"nodes with sensor:={request.sensor}"
            )
        goal = Goal(
            indenter=request.indenter,
            plan=request.plan or self._plan,
            contacts=tuple(request.contacts),
            bag=request.bag,
            resume=request.resume,
            execute_motion=request.execute_motion,
        )
        job = prepare(goal, self._cell, self._sensor)
        feedback = CollectIndent.Feedback(total=len(job.contacts))
        rig = RosRig(self._cell, self._sensor, self._announce, self._cancel, self._closing)
        try:

            def send_feedback() -> None:
                feedback.force = rig.normal_force()
                handle.publish_feedback(feedback)

            def note(progress: Progress) -> None:
                feedback.index, feedback.phase = progress.done, int(progress.phase)
                feedback.eta = progress.eta_s
                send_feedback()

            rig.on_tick = send_feedback
            outcome = run_collection(job, rig, note)
        finally:
            rig.close()
        return _result(outcome, str(job.bag or ""))

    def _announce(self, announcement: Announcement) -> int:
        contact, job = announcement.contact, announcement.job
        message = Contact(
            seq=self._contact_count,
            session=job.session,
            sensor=job.sensor.name,
            indenter=job.goal.indenter,
            index=contact.index,
            total=len(job.plan.contacts),
            phase=int(announcement.phase),
            point=_point((*contact.point, 0.0)),
            depth=contact.depth_m,
            direction=contact.direction_rad,
            target=_point(announcement.target),
            reason=announcement.reason,
        )
        now_ns = time.time_ns()
        message.header.stamp = to_stamp(now_ns)
        self._contacts.publish(message)
        self._contact_count += 1
        return now_ns

    def _diagnose(self) -> None:
        values = {"running": self._busy, "announced": self._contact_count}
        self._diagnostics.publish(DiagnosticStatus.OK, "", self._sensor.name, values)

    def close(self) -> None:
        """End a run: robot stopped, tip retracted, bag closed."""
        self._closing.set()
        self._cancel.set()
        if self._run is not None:
            self._run.join()


def _result(outcome: Outcome, bag: str) -> CollectIndent.Result:
    return CollectIndent.Result(
        success=not outcome.message,
        message=outcome.message,
        bag=bag,
        contacts=outcome.whole,
        invalid=outcome.invalid,
        topics=list(outcome.counts.topics),
        received=list(outcome.counts.received),
        lost=list(outcome.counts.lost),
    )


def _point(position: Vector3) -> Point:
    return Point(x=float(position[0]), y=float(position[1]), z=float(position[2]))


class RosRig:
    """The `Rig` of a run over topics, services and actions. Used from one thread."""

    def __init__(
        self,
        cell: CellConfig,
        sensor: SensorConfig,
        announce: Callable[[Announcement], int],
        cancel: threading.Event,
        closing: threading.Event,
    ) -> None:
        self.announce = announce
        self.on_tick: Callable[[], None] = lambda: None
        self._cell, self._cancel, self._closing = cell, cancel, closing
        self._finishing = False
        self._next_tick = 0.0
        self._node = rclpy.create_node("indenter_rig", namespace=NAMESPACE)
        self._executor = EventsExecutor()
        self._executor.add_node(self._node)
        self._mover = ActionClient(self._node, MoveLinear, "robot/move_linear")
        self._reference = f"{sensor.name}/set_reference"
        self._force_reference = f"{sensor.name}/set_force_reference"  # of an estimator, if any
        self._clients = {
            name: self._node.create_client(kind, name)
            for name, kind in (
                ("robot/stop", Trigger),
                ("robot/recover", Trigger),
                ("netft/tare", Trigger),
                (self._reference, Trigger),
                (self._force_reference, Trigger),
                ("recorder/start", StartRecording),
                ("recorder/stop", StopRecording),
            )
        }
        frames, self._devices = "image/compressed", {"netft", "camera"}
        if sensor.kind == "taxels":
            frames, self._devices = "taxels", {"netft", "taxels"}
        names = ("robot/tcp_pose", "netft/wrench", f"{sensor.name}/{frames}")
        self._stamps = {f"/{NAMESPACE}/{name}": np.empty(0, np.int64) for name in names}
        watched = [*self._stamps, f"/{NAMESPACE}/{sensor.name}/markers"]
        self._heard_at = dict.fromkeys(watched, -math.inf)
        self._next_seq = dict.fromkeys(watched, 0)
        self._began_anew = ""  # a stream whose node was started again
        self._sensor_name = sensor.name
        self._reference_since_ns = -1  # when the newest one that the segmenter has was asked for
        # Since when (s) which devices say that they are of no use, and why.
        self._faults: dict[str, tuple[float, str]] = {}
        self._state = RobotState(message="the robot node has not spoken yet")
        self._state_heard_at = -math.inf
        self._stops_asked = self._stops_heard = 0  # calls of robot/stop by this run, and by anybody
        self._bag = ""
        self._other_bag = ""
        self._recorder_error = ""
        self._recorded: frozenset[str] = frozenset()  # topics of which the bag holds something
        self._recorder_heard_at = -math.inf
        self._goal: ClientGoalHandle | None = None  # the newest move; None while unknown
        self._motion: Future | None = None  # its result
        for message_type, topic, callback, qos in (
            (StreamTimes, "stream_times", self._on_stream_times, stream_qos(100)),
            (RobotState, "robot/state", self._on_state, stream_qos(10)),  # none of before this run
            (RecorderStatus, "recorder/status", self._on_recorder, LATCHED_QOS),
            (DiagnosticArray, "/diagnostics", self._on_diagnostics, stream_qos(10)),
        ):
            self._node.create_subscription(message_type, topic, callback, qos)
        # Nobody spins this node: its subscriptions are asked for their newest message now and then.
        self._probe = rclpy.create_node("indenter_probe", namespace=NAMESPACE)
        self._pose = _Newest(self._probe, PoseStamped, "robot/tcp_pose")
        self._wrench = _Newest(self._probe, WrenchStamped, "netft/wrench")

    def close(self) -> None:
        """Give back nodes and clients."""
        self._mover.destroy()
        self._executor.shutdown()
        self._node.destroy_node()
        self._probe.destroy_node()

    def normal_force(self) -> float:
        """Fz now (N); NaN before the first wrench."""
        wrench = self._wrench.take()
        return math.nan if wrench is None else wrench.wrench.force.z

    # --- Rig ---

    def wait_ready(self, recorder: bool) -> None:
        self._await_ready(READY_TIMEOUT_S, self._recorder_busy if recorder else str)

    def tip(self) -> Vector3:
        pose = self._pose.take()
        if pose is None:
            raise DeviceError("no pose from the robot: is its node running?")
        position = pose.pose.position
        return position.x, position.y, position.z

    def move(self, target: Vector3, speed_m_s: float) -> None:
        goal = MoveLinear.Goal(speed=speed_m_s, acceleration=self._cell.speeds.acceleration_m_s2)
        goal.pose.position = _point(target)
        goal.pose.orientation = TOOL_DOWN
        if gone := self._robot_gone():
            raise ContactBroken(gone)
        self._goal = self._motion = None  # until accepted, nobody knows whether the robot moves
        headway = Headway(time.monotonic())

        def note(message: MoveLinear.Impl.FeedbackMessage) -> None:
            headway.note(message.feedback.remaining, time.monotonic())

        handle = self._wait_moving(self._mover.send_goal_async(goal, note), headway)
        if not handle.accepted:
            raise ContactBroken(f"the robot refused to move: {self._state.message or 'busy'}")
        self._goal, self._motion = handle, handle.get_result_async()
        answer = self._wait_moving(self._motion, headway)
        result = answer.result
        cancelled = answer.status == GoalStatus.STATUS_CANCELED
        if cancelled or result.message == STOPPED_ON_REQUEST:
            raise Cancelled(STOPPED_BY_ANOTHER)
        if not result.success:
            self._await_rest()
            raise ContactBroken(result.message)

    def halt(self) -> None:
        motion = self._motion

        def ended() -> bool:
            return motion is None or motion.done() or bool(self._robot_gone())

        if motion is not None and motion.done():
            return  # what moves now is a retreat of the guard
        if self._goal is not None:  # cancelled, and not stopped, for the same reason
            self._goal.cancel_goal_async()
            if spin_until(self._executor, ended, HALT_TIMEOUT_S):
                return
        client = self._clients["robot/stop"]
        if client.service_is_ready():
            self._stops_asked += 1
            client.call_async(Trigger.Request())
            spin_until(self._executor, ended, HALT_TIMEOUT_S)

    def _await_rest(self) -> None:
        """Let the robot end what it does by itself: after too much force it backs off."""
        begun = time.monotonic()

        def rests() -> bool:
            told = self._state_heard_at > begun + STATE_AGE_S
            return (told and not self._state.moving) or bool(self._robot_gone())

        spin_until(self._executor, rests, RETREAT_TIMEOUT_S)

    def recover(self) -> None:
        self.rest(0.2)
        if not self._state.ready:
            self._call("robot/recover", Trigger.Request(), RECOVER_TIMEOUT_S)
        self._await_ready(RECOVER_TIMEOUT_S)

    def gap(self, start_ns: int, end_ns: int) -> str | None:
        if not self._reached(end_ns):
            return None
        for topic, stamps in self._stamps.items():
            if reason := silence(np.sort(stamps), start_ns, end_ns):
                return f"{topic} {reason}"
        return ""

    def _reached(self, time_ns: int) -> bool:
        """Whether every source has samples of this moment or later."""
        return all(len(stamps) and stamps[-1] >= time_ns for stamps in self._stamps.values())

    def zero(self) -> None:
        # What is still under way may be from before, with the tip in the gel.
        now_ns = time.time_ns()
        if not self._spin(lambda: self._reached(now_ns), ZERO_TIMEOUT_S):
            raise DeviceError(f"the streams lag by more than {ZERO_TIMEOUT_S:.0f} s")
        deadline = time.monotonic() + ZERO_TIMEOUT_S
        names = ["netft/tare", self._reference]
        if self._clients[self._force_reference].service_is_ready():
            names.append(self._force_reference)
        for name in names:
            while True:
                try:
                    self._call(name, Trigger.Request())
                    break
                except DeviceError:  # streams that have just begun need a moment to run smoothly
                    if time.monotonic() > deadline:
                        raise
                    self.rest(0.5)
            if name == self._reference:
                self._await_reference(now_ns)

    def _await_reference(self, asked_ns: int) -> None:
        """It is made of the next frames, which must be there before the tip goes in again."""
        if not self._spin(lambda: self._reference_since_ns >= asked_ns, ZERO_TIMEOUT_S):
            raise DeviceError(f"no good frames for a reference within {ZERO_TIMEOUT_S:.0f} s")

    def start_recording(self, bag: Path, metadata: dict[str, Any]) -> None:
        self._bag = str(bag)
        self._call(
            "recorder/start", StartRecording.Request(bag=self._bag, metadata=json.dumps(metadata))
        )
        # A recorder that has just come up may not have found every stream yet.
        if not self._spin(lambda: self._heard_at.keys() <= self._recorded, READY_TIMEOUT_S):
            missing = ", ".join(sorted(self._heard_at.keys() - self._recorded))
            raise DeviceError(f"the recorder does not receive {missing}")

    def stop_recording(self) -> Counts:
        answer = self._clients["recorder/stop"].call_async(StopRecording.Request())
        if not spin_until(
            self._executor,
            lambda: answer.done() or bool(self._recorder_gone()),
            STOP_TIMEOUT_S,
        ):
            return Counts(error="the recorder does not close its bag")
        if not answer.done():
            return Counts(error="the recorder is gone; its bag is repaired when it is opened")
        held = answer.result()
        return Counts(
            tuple(held.topics),
            tuple(held.received),
            tuple(held.lost),
            "" if held.success else held.message,
        )

    def rest(self, seconds: float) -> None:
        self._spin(lambda: False, seconds)

    def let_finish(self) -> None:
        self._finishing = True

    # --- waiting ---

    def _spin(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Spin until done or the timeout. Raises `Cancelled` when the run is to end."""
        deadline = time.monotonic() + timeout_s
        while not done():
            now = time.monotonic()
            if now > deadline:
                return False
            if not self._finishing and self._stops_heard > self._stops_asked:
                raise Cancelled(STOPPED_BY_ANOTHER)
            if self._cancel.is_set() and not self._finishing:
                raise Cancelled(self._why_cancelled())
            if now > self._next_tick:
                self._next_tick = now + FEEDBACK_PERIOD_S
                self.on_tick()
            self._executor.spin_once(timeout_sec=min(0.02, max(0.0, deadline - now)))
        return True

    def _why_cancelled(self) -> str:
        """Who wants the end: the operator, or the graph, which ends with any of its nodes."""
        if not self._closing.is_set():
            return "ended by the operator"
        self.halt()
        why = ""

        def known() -> bool:
            nonlocal why
            state = self._state
            problem = "" if state.ready or state.moving else state.message
            why = self._silent(LAST_WORD_S) or problem
            return bool(why)

        spin_until(self._executor, known, 1.5 * LAST_WORD_S)
        return f"the graph ended: {why}" if why else "the graph was ended"

    def _wait_moving(self, future: Future, headway: Headway) -> Any:
        """Result of a future of the robot; whatever keeps it from coming stops the robot."""
        trouble = ""

        def over() -> bool:
            nonlocal trouble
            trouble = self._robot_gone() if self._finishing else self._trouble()
            if not trouble and headway.stuck(time.monotonic()):
                trouble = f"the arm is stuck: it came no nearer to its target for {STUCK_S:g} s"
            return bool(future.done() or trouble)

        try:
            self._spin(over, math.inf)
        except Cancelled:
            self.halt()
            raise
        if future.done():
            return future.result()
        self.halt()
        if self._recording_lost():
            raise DeviceError(trouble)
        raise ContactBroken(trouble)

    def _call(self, name: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call a service. Raises `DeviceError` with its reason where it does not succeed."""
        client = self._clients[name]
        ready = self._spin(client.service_is_ready, timeout_s)  # else the request would be lost
        answer = client.call_async(request)
        if not ready or not self._spin(answer.done, timeout_s):
            raise DeviceError(f"{name} does not answer; is its node running?")
        if not answer.result().success:
            raise DeviceError(f"{name}: {answer.result().message}")
        return answer.result()

    def _await_ready(self, timeout_s: float, hindrance: Callable[[], str] = str) -> None:
        """Wait until a contact could begin. Raises `DeviceError` with what hinders it."""
        deadline = time.monotonic() + timeout_s
        while True:
            if lost := self._recording_lost():  # no recorder takes up a bag again
                raise DeviceError(lost)
            self._began_anew = ""  # a node may: what it measures is zeroed before the contact
            reason = self._not_ready() or hindrance()
            if not reason:
                return
            if time.monotonic() > deadline:
                raise DeviceError(reason)
            self.rest(0.05)

    def _not_ready(self) -> str:
        """Why a contact could not begin now; empty when it could."""
        if not self._mover.server_is_ready():
            return "robot/move_linear is not served; is the robot node running?"
        for name in ("robot/stop", "robot/recover", "netft/tare", self._reference):
            if not self._clients[name].service_is_ready():
                return f"service {name} is not there; is its node running?"
        if not self._state.ready:
            return f"the robot is not ready: {self._state.message}"
        if self._pose.take() is None:
            return "no pose from the robot: is its node running?"
        return self._trouble()

    def _trouble(self) -> str:
        """What forbids to go on; empty when nothing does."""
        if lost := self._recording_lost():
            return lost
        if silent := self._silent(SILENT_S):
            return silent
        if self._began_anew:
            return f"{self._began_anew} began anew: its node was started again"
        now = time.monotonic()
        return next((why for since, why in self._faults.values() if now - since > FAULT_S), "")

    def _silent(self, longer_than_s: float) -> str:
        """Which stream is silent; empty when none is."""
        now = time.monotonic()
        for topic, heard_at in self._heard_at.items():
            if now - heard_at > longer_than_s:
                return f"{topic} is silent"
        return ""

    def _robot_gone(self) -> str:
        """Why nobody would carry out a move; empty where the robot node lives."""
        silent = time.monotonic() - self._state_heard_at > SILENT_S
        return "the robot node is gone" if silent or not self._mover.server_is_ready() else ""

    def _recording_lost(self) -> str:
        """Why what comes now is in no bag; empty while it is recorded, or need not be."""
        if self._recorder_error:
            return f"recorder: {self._recorder_error}"
        return self._recorder_gone() if self._bag else ""

    def _recorder_busy(self) -> str:
        if self._other_bag:
            return f"the recorder is recording {self._other_bag}; stop it first"
        return self._recorder_gone()

    def _recorder_gone(self) -> str:
        silent = time.monotonic() - self._recorder_heard_at > RECORDER_SILENT_S
        return "the recorder is silent: is its node running?" if silent else ""

    # --- subscriptions ---

    def _on_stream_times(self, message: StreamTimes) -> None:
        topic = message.topic
        if topic not in self._heard_at or not len(message.stamp_ns):
            return
        self._heard_at[topic] = time.monotonic()
        if message.first_seq < self._next_seq[topic]:
            self._began_anew = topic
        self._next_seq[topic] = message.first_seq + len(message.stamp_ns)
        if topic in self._stamps:
            known = self._stamps[topic][-STAMPS_KEPT:]
            self._stamps[topic] = np.append(known, message.stamp_ns)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name in self._devices:
                if status.level == DiagnosticStatus.ERROR:
                    self._faults.setdefault(status.name, (time.monotonic(), status.message))
                else:
                    self._faults.pop(status.name, None)
            elif status.name == "segmenter" and status.hardware_id == self._sensor_name:
                self._reference_since_ns = int(values_of(status).get(REFERENCE_SINCE, -1))

    def _on_state(self, message: RobotState) -> None:
        self._state_heard_at = time.monotonic()
        if message.message == STOPPED_ON_REQUEST:
            self._stops_heard += 1
        else:
            self._state = message

    def _on_recorder(self, message: RecorderStatus) -> None:
        if message.bag == self._bag:
            self._recorder_error = message.error
            self._recorded = frozenset(
                topic
                for topic, count in zip(message.topics, message.received, strict=True)
                if count
            )
        elif self._recorded and not message.bag:
            self._recorder_error = "it began anew: its node was started again"
        self._other_bag = message.bag if message.recording and message.bag != self._bag else ""
        if message.bag == self._bag or not self._bag:
            self._recorder_heard_at = time.monotonic()


class _Newest:
    """The newest message of a topic, taken only when asked for: fast streams cost nothing."""

    def __init__(self, node: Node, message_type: Any, topic: str) -> None:
        self._type = message_type
        self._subscription = node.create_subscription(
            message_type, topic, lambda _: None, NEWEST_QOS
        )
        self._message: Any = None

    def take(self) -> Any:
        """The newest message ever received; None before the first."""
        with self._subscription.handle:
            taken = self._subscription.handle.take_message(self._type, True)
        if taken is not None:
            self._message = deserialize_message(taken[0], self._type)
        return self._message


def main() -> int:
    """Run the node."""
    return run(Indenter)


if __name__ == "__main__":
    sys.exit(main())
