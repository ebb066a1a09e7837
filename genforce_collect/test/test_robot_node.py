"""The robot node as a process: real controller protocol on one side, topics on the other.

The force sensor is a publisher of this test, so that a force step comes when it is wanted.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import rclpy
import yaml
from action_msgs.msg import GoalStatus
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped, TwistStamped, WrenchStamped
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.action import ActionClient
from rclpy.experimental import EventsExecutor
from std_srvs.srv import Trigger

from genforce_collect.devices.wrench import SENSOR_STATUS
from genforce_collect.geometry import compose, tip_pose
from genforce_collect.nodes.common import (
    LATCHED_QOS,
    NAMESPACE,
    Stream,
    await_answer,
    from_stamp,
    spin_until,
    stream_qos,
    to_stamp,
)
from genforce_collect.safety import STOPPED_ON_REQUEST
from genforce_msgs.action import MoveLinear
from genforce_msgs.msg import RobotState, StreamTimes
from genforce_sim.devices.ur_controller import UrController

pytestmark = pytest.mark.live

HOST = f"127.{210 + os.getpid() % 40}.{1 + os.getpid() // 40 % 250}.2"
TOOL = (0.0, 0.0, 0.12, 0.0, 0.0, 0.0)
SENSOR_POSE = (0.4, -0.1, 0.2, 0.0, 0.0, 0.5)
PARKED = (0.0, 0.0, 0.02)
FORCE_LIMIT = 12.0
WRENCH_HZ = 200.0

CELL = {
    "name": "test",
    # A busy test machine stands still for longer than a real host may.
    "robot": {"host": HOST, "tcp": list(TOOL), "watchdog_hz": 2.0, "connect_timeout_s": 3.0},
    "netft": {"host": HOST},
    "camera": {"source": "0"},
    "sensor_pose": list(SENSOR_POSE),
    "limits": {
        "force_n": [8, 8, FORCE_LIMIT],
        "stale_s": 1.0,
        "workspace_min_m": [-0.012, -0.012, -0.003],
        "workspace_max_m": [0.012, 0.012, 0.05],
    },
}


def start_node(cell_file: Path, *parameters: str) -> subprocess.Popen[str]:
    words = [f"cell:={cell_file}", *parameters]
    flags = [word for parameter in words for word in ("-p", parameter)]
    return subprocess.Popen(
        [sys.executable, "-m", "genforce_collect.nodes.robot", "--ros-args", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )


class Bench:
    """The controller, the force publisher, and a client of the node."""

    def __init__(self, folder: Path) -> None:
        self.controller = UrController(
            HOST,
            initial_pose=compose(SENSOR_POSE, tip_pose(*PARKED)),
            tool=TOOL,
            unlock_delay_s=0.2,
        )
        self.controller.start()
        self.cell_file = folder / "cell.yaml"
        self.cell_file.write_text(yaml.safe_dump(CELL))
        self.force = 0.0
        self.force_flows = threading.Event()
        self.backlog_s = 0.0  # of the forces that arrive
        self.poses: list[PoseStamped] = []
        self.times: list[StreamTimes] = []
        self.state = RobotState()
        self.states: list[RobotState] = []
        self.process: subprocess.Popen[str] | None = None
        node = self.node = rclpy.create_node("bench", namespace=NAMESPACE)
        self._executor = EventsExecutor()
        self._executor.add_node(node)
        self._wrenches = Stream(node, WrenchStamped, "netft/wrench", WRENCH_HZ)
        self._reports = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._speeds = node.create_publisher(TwistStamped, "robot/speed_command", 1)
        self.mover = ActionClient(node, MoveLinear, "robot/move_linear")
        self.clients = {
            name: node.create_client(Trigger, f"robot/{name}") for name in ("stop", "recover")
        }
        self.lifecycle = node.create_client(ChangeState, "robot/change_state")
        node.create_subscription(PoseStamped, "robot/tcp_pose", self.poses.append, stream_qos(500))
        node.create_subscription(StreamTimes, "stream_times", self.times.append, stream_qos(100))
        node.create_subscription(RobotState, "robot/state", self._on_state, LATCHED_QOS)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._press)
        self._thread.start()

    def _on_state(self, state: RobotState) -> None:
        self.state = state
        self.states.append(state)

    def _press(self) -> None:
        while not self._done.wait(1 / WRENCH_HZ):
            if self.force_flows.is_set():
                message = WrenchStamped()
                message.header.stamp = to_stamp(time.time_ns() - round(self.backlog_s * 1e9))
                message.header.frame_id = "sensor"
                message.wrench.force.z = self.force
                self._wrenches.publish(message)

    def bring_up(self) -> None:
        """A node that is ready, with the arm parked and no force."""
        self.force = 0.0
        self.force_flows.set()
        if self.process is None or self.process.poll() is not None:
            self.process = start_node(self.cell_file)
            self.state = RobotState()
        assert self.spin(self.mover.server_is_ready, 40)
        deadline = time.monotonic() + 60
        while not (self.state.ready and self.move(PARKED).result.success):
            assert time.monotonic() < deadline, self.state.message
            if not self.spin(lambda: self.state.ready, 5):
                self.call("recover")

    def spin(self, done: Callable[[], bool], timeout_s: float = 15.0) -> bool:
        return spin_until(self._executor, done, timeout_s)

    def send(
        self, target: tuple[float, float, float], speed: float = 0.1, feedback: Any = None
    ) -> Any:
        goal = MoveLinear.Goal(speed=speed, acceleration=0.5)
        goal.pose.position.x, goal.pose.position.y, goal.pose.position.z = map(float, target)
        goal.pose.orientation.x, goal.pose.orientation.w = 1.0, 0.0
        assert await_answer(self._executor, self.node, "robot", 15.0)
        sent = self.mover.send_goal_async(goal, feedback)
        assert self.spin(sent.done)
        assert sent.result().accepted
        return sent.result()

    def finish(self, handle: Any) -> Any:
        result = handle.get_result_async()
        assert self.spin(result.done, 30)
        return result.result()

    def move(self, target: tuple[float, float, float], speed: float = 0.1) -> Any:
        return self.finish(self.send(target, speed))

    def begin_slow_move(self) -> Any:
        handle = self.send((0.0, 0.0, 0.001), speed=0.004)
        assert self.spin(self.controller.is_moving)
        return handle

    def call(self, name: str) -> Trigger.Response:
        answer = self.clients[name].call_async(Trigger.Request())
        assert self.spin(answer.done, 30)
        return answer.result()

    def sensor_says(self, status: int, message: str) -> None:
        level = DiagnosticStatus.ERROR if status else DiagnosticStatus.OK
        report = DiagnosticStatus(level=level, name="netft", message=message)
        report.values = [KeyValue(key=SENSOR_STATUS, value=f"0x{status:08x}")]
        self._reports.publish(DiagnosticArray(status=[report]))

    def still(self) -> bool:
        return not self.controller.is_moving()

    def height(self) -> float:
        return float(self.controller.get_pose()[2] - SENSOR_POSE[2])

    def push(self, twist_y: float) -> None:
        message = TwistStamped()
        message.twist.linear.y = twist_y
        self._speeds.publish(message)

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self._executor.shutdown()
        self.node.destroy_node()
        self.controller.stop()


@pytest.fixture(scope="module")
def one_bench(tmp_path_factory) -> Iterator[Bench]:
    rclpy.init()
    bench = Bench(tmp_path_factory.mktemp("robot"))
    yield bench
    bench.close()
    rclpy.try_shutdown()


@pytest.fixture
def bench(one_bench: Bench) -> Bench:
    one_bench.bring_up()
    return one_bench


# --- streams ---


def test_poses_are_in_the_sensor_frame_numbered_and_on_host_time(bench):
    bench.poses.clear()
    assert bench.spin(lambda: len(bench.poses) > 500)
    pose = bench.poses[-1].pose
    assert (pose.position.x, pose.position.y, pose.position.z) == pytest.approx(PARKED, abs=1e-6)
    assert abs(pose.orientation.x) == pytest.approx(1)
    stamps = [from_stamp(message.header.stamp) for message in bench.poses]
    assert all(a < b for a, b in pairwise(stamps))
    assert abs(stamps[-1] - time.time_ns()) < 2e9
    mine = [m for m in bench.times if m.topic == f"/{NAMESPACE}/robot/tcp_pose"]
    assert all(len(a.stamp_ns) + a.first_seq == b.first_seq for a, b in pairwise(mine))
    device = [t for message in mine for t in message.device_time]
    assert {round((b - a) * 500) for a, b in pairwise(device)} == {1}
    assert mine[-1].device_lost == 0


# --- motion ---


def test_a_move_arrives_with_feedback_and_its_final_pose(bench):
    remaining: list[float] = []
    target = (0.003, -0.002, 0.005)
    handle = bench.send(
        target, speed=0.01, feedback=lambda message: remaining.append(message.feedback.remaining)
    )
    result = bench.finish(handle)
    assert result.status == GoalStatus.STATUS_SUCCEEDED
    assert result.result.success
    position = result.result.pose.position
    assert (position.x, position.y, position.z) == pytest.approx(target, abs=1e-6)
    assert remaining == sorted(remaining, reverse=True)
    assert remaining


@pytest.mark.parametrize(
    ("target", "speed", "reason"),
    [
        ((0, 0, 0.06), 0.05, "z = 60.00 mm is outside the workspace"),
        ((0.02, 0, 0.01), 0.05, "x = 20.00 mm is outside the workspace"),
        ((0, 0, -0.004), 0.05, "z = -4.00 mm"),
        ((0, 0, 0.01), 0.5, "speed 0.5 m/s"),
        ((0, 0, 0.01), 0.0, "speed 0 m/s"),
        ((0, 0, math.nan), 0.05, "not a pose"),
    ],
)
def test_a_move_that_would_break_a_limit_is_refused_with_the_reason(bench, target, speed, reason):
    result = bench.move(target, speed)
    assert result.status == GoalStatus.STATUS_ABORTED
    assert reason in result.result.message
    assert bench.still()


def test_cancel_and_stop_end_a_move(bench):
    handle = bench.begin_slow_move()
    handle.cancel_goal_async()
    assert bench.finish(handle).status == GoalStatus.STATUS_CANCELED
    assert bench.spin(bench.still)
    assert bench.spin(lambda: bench.state.ready)

    handle = bench.begin_slow_move()
    assert bench.call("stop").success
    result = bench.finish(handle)
    assert result.status == GoalStatus.STATUS_ABORTED
    assert result.result.message == STOPPED_ON_REQUEST
    assert bench.spin(bench.still)


def test_every_stop_is_told_where_the_arm_rests_too(bench):
    bench.states.clear()
    assert bench.call("stop").success
    assert bench.spin(lambda: any(s.message == STOPPED_ON_REQUEST for s in bench.states))
    assert bench.spin(lambda: bench.state.ready)
    assert sum(state.message == STOPPED_ON_REQUEST for state in bench.states) == 1


def test_speed_commands_move_the_arm_until_they_cease(bench):
    def push() -> bool:
        bench.push(0.01)
        bench.spin(lambda: False, 0.02)
        return any(message.pose.position.y > 0.002 for message in bench.poses[-20:])

    assert bench.spin(push, 20)
    assert bench.spin(bench.still)
    assert bench.spin(lambda: bench.state.ready)


@pytest.mark.parametrize(("start_y", "speed"), [(0.010, 0.02), (-0.010, 0.25)])
def test_speed_commands_do_not_lead_out_of_the_workspace(bench, start_y, speed):
    assert bench.move((0.0, start_y, 0.02)).result.success
    bench.poses.clear()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        bench.push(speed)
        bench.spin(lambda: False, 0.02)
    assert bench.spin(bench.still)
    assert 0.0 < max(message.pose.position.y for message in bench.poses) < 0.0135


# --- the guard ---


def test_a_force_step_stops_the_arm_and_backs_it_off(bench):
    handle = bench.begin_slow_move()
    lowest = bench.height()
    bench.force = -FORCE_LIMIT - 1
    result = bench.finish(handle)
    assert result.status == GoalStatus.STATUS_ABORTED
    assert "Fz = -13.00 N is beyond 12 N" in result.result.message
    assert bench.spin(lambda: bench.height() > lowest + 0.0015), "it retreats while pressed"
    assert bench.spin(bench.still)
    refused = bench.move(PARKED)
    assert "Fz = -13.00 N" in refused.result.message
    assert bench.spin(lambda: not bench.state.ready and "Fz" in bench.state.message)
    bench.force = 0.0
    assert bench.spin(lambda: bench.state.ready)
    assert bench.move(PARKED).result.success


def test_a_cancel_after_a_force_step_does_not_cut_the_retreat_short(bench):
    """As when a run ends in that moment, on a host too busy for the result to be there."""
    handle = bench.begin_slow_move()
    lowest = bench.height()
    bench.process.send_signal(signal.SIGSTOP)  # the force is there first, then the cancel
    bench.force = -FORCE_LIMIT - 1
    bench.spin(lambda: False, 0.1)
    handle.cancel_goal_async()
    bench.spin(lambda: False, 0.1)
    bench.process.send_signal(signal.SIGCONT)
    assert "beyond 12 N" in bench.finish(handle).result.message
    assert bench.spin(lambda: bench.height() > lowest + 0.0015), "less what it sank meanwhile"
    bench.force = 0.0
    assert bench.spin(lambda: bench.state.ready)


@pytest.mark.parametrize(
    ("status", "message", "backs_off"),
    [(0x80020000, "transducer saturated", True), (0x82000000, "halted", False)],
)
def test_forces_that_the_sensor_calls_wrong_stop_the_arm(bench, status, message, backs_off):
    handle = bench.begin_slow_move()
    lowest = bench.height()
    bench.sensor_says(status, message)
    assert bench.finish(handle).result.message == message
    if backs_off:
        assert bench.spin(lambda: bench.height() > lowest + 0.0015), "the tip may press"
    assert bench.spin(bench.still)
    assert (bench.height() > lowest) == backs_off
    assert message in bench.move(PARKED).result.message
    bench.sensor_says(0, "")
    assert bench.spin(lambda: bench.state.ready)


def test_a_silent_force_sensor_stops_the_arm(bench):
    handle = bench.begin_slow_move()
    bench.force_flows.clear()
    result = bench.finish(handle)
    assert "the newest netft/wrench is" in result.result.message
    assert bench.spin(bench.still)
    assert "old" in bench.move(PARKED).result.message
    bench.force_flows.set()
    assert bench.spin(lambda: bench.state.ready)


def test_forces_that_arrive_late_count_as_old(bench):
    handle = bench.begin_slow_move()
    bench.backlog_s = 1.5
    result = bench.finish(handle)
    bench.backlog_s = 0.0
    assert "the newest netft/wrench is 1.5" in result.result.message
    assert bench.spin(lambda: bench.state.ready)


# --- faults ---


def test_a_protective_stop_aborts_and_recovers_without_going_on(bench):
    handle = bench.begin_slow_move()
    bench.controller.protective_stop()
    assert "protective stop" in bench.finish(handle).result.message
    assert bench.spin(lambda: bench.state.protective_stopped and not bench.state.ready)
    assert bench.spin(bench.still)
    height = bench.height()
    assert bench.call("recover").success
    assert bench.spin(lambda: bench.state.ready)
    assert bench.height() == pytest.approx(height, abs=1e-6)
    assert bench.move(PARKED).result.success


def test_an_emergency_stop_aborts_and_says_what_to_do(bench):
    handle = bench.begin_slow_move()
    bench.controller.emergency_stop()
    assert "emergency stop" in bench.finish(handle).result.message
    answer = bench.call("recover")
    assert not answer.success
    assert "release the button" in answer.message
    bench.controller.release_emergency_stop()
    assert bench.spin(lambda: not bench.state.emergency_stopped)
    assert bench.call("recover").success
    assert bench.spin(lambda: bench.state.ready)


def test_a_dropped_link_is_told_and_mended(bench):
    handle = bench.begin_slow_move()
    bench.states.clear()
    bench.controller.drop_link(duration_s=0.5)
    assert bench.finish(handle).status == GoalStatus.STATUS_ABORTED
    assert bench.spin(lambda: any(not state.connected for state in bench.states))
    assert bench.spin(lambda: bench.state.connected and bench.state.ready, 30)
    assert bench.move(PARKED).result.success


def test_deactivated_it_stops_the_arm_and_lets_another_program_have_it(bench):
    def change(transition: int) -> bool:
        request = ChangeState.Request(transition=Transition(id=transition))
        answer = bench.lifecycle.call_async(request)
        assert bench.spin(answer.done, 30)
        return answer.result().success

    handle = bench.begin_slow_move()
    assert change(Transition.TRANSITION_DEACTIVATE)
    assert bench.finish(handle).status == GoalStatus.STATUS_ABORTED
    assert bench.still()
    assert bench.spin(lambda: not bench.controller.is_program_running())
    assert bench.move(PARKED).status == GoalStatus.STATUS_ABORTED
    assert change(Transition.TRANSITION_ACTIVATE)
    assert bench.spin(lambda: bench.state.ready, 30)
    assert bench.move(PARKED).result.success


def test_a_terminated_node_stops_the_arm_first_and_ends_well(bench):
    bench.begin_slow_move()
    bench.process.send_signal(signal.SIGTERM)
    assert bench.process.wait(20) == 0
    assert bench.still()
    assert bench.height() > 0.0015


def test_without_a_force_sensor_the_guard_can_do_without(bench):
    bench.process.terminate()
    bench.process.communicate(timeout=20)
    bench.force_flows.clear()
    bench.process = start_node(bench.cell_file, "guard_wrench:=false")
    bench.state = RobotState()
    assert bench.spin(lambda: bench.state.ready, 40)
    assert bench.spin(bench.mover.server_is_ready, 20)
    assert bench.move((0.0, 0.001, 0.02)).result.success
    bench.process.terminate()
    bench.process.communicate(timeout=20)


def test_the_death_of_the_node_stops_the_arm(bench):
    # The last that uses the bench: a killed node stays in the others' discovery for a while.
    bench.begin_slow_move()
    bench.process.kill()
    assert bench.spin(bench.still)
    assert bench.height() > 0.0015


def test_an_unreachable_robot_ends_the_node_with_one_line(tmp_path):
    path = tmp_path / "cell.yaml"
    path.write_text(yaml.safe_dump(CELL).replace(HOST, HOST[:-1] + "9"))
    node = start_node(path)
    _, errors = node.communicate(timeout=60)
    assert node.returncode == 3
    assert errors.splitlines() == [
        f"error: robot {HOST[:-1]}9:29999 does not answer (Connection refused): "
        "is the controller on, and robot.host right?"
    ]
