"""The arm: its stream through driver and node, the cost of both, and how soon a force stops it,
also while a recorder that holds all streams stands still.

Controller and node are processes of their own; this one publishes the force at 1 kHz. When the arm
began to brake is read from the controller's own history, as is where it was at each stamp.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped, WrenchStamped
from rclpy.action import ActionClient
from rclpy.experimental import EventsExecutor
from rows import Row
from rtde_receive import RTDEReceiveInterface

from genforce_collect.geometry import compose, tip_pose
from genforce_collect.nodes.common import (
    LATCHED_QOS,
    NAMESPACE,
    from_stamp,
    spin_until,
    stream_qos,
    to_stamp,
)
from genforce_msgs.action import MoveLinear
from genforce_msgs.msg import RobotState, StreamTimes
from genforce_sim.devices.ur_controller import CYCLE_S, UrController

HOST = "127.51.7.2"
TOOL = (0.0, 0.0, 0.12, 0.0, 0.0, 0.0)
SENSOR_POSE = (0.4, -0.1, 0.2, 0.0, 0.0, 0.0)
TOP_M, BOTTOM_M = 0.045, 0.001
SPEED_M_S = 0.02
STREAM_SECONDS = 8.0
STOPS = 15
FORCE_LIMIT_N = 12.0
CELL = f"""
name: bench
robot: {{host: {HOST}, tcp: {list(TOOL)}}}
netft: {{host: {HOST}}}
camera: {{source: "0"}}
sensor_pose: {list(SENSOR_POSE)}
limits:
  force_n: [8, 8, {FORCE_LIMIT_N}]
  stale_s: 0.5
  workspace_min_m: [-0.012, -0.012, -0.003]
  workspace_max_m: [0.012, 0.012, 0.05]
"""


class Controller(UrController):
    """A virtual controller that also tells what it did and what it cost."""

    def heights(self, since_ns: int) -> list[tuple[int, float]]:
        """Host time (ns) and tip height in the base frame (m) of each cycle since then."""
        with self._lock:
            return [(at, pose[2]) for at, pose in self._history if at >= since_ns]

    def cpu_seconds(self) -> float:
        """Processor time of its process."""
        return time.process_time()


BaseManager.register("Controller", Controller)


def bench() -> list[Row]:
    rclpy.init()
    try:
        with controller() as arm, Bench(arm) as client:
            rows = [*stream_rows(arm, client), *stop_rows(arm, client, "")]
            with blocked_recorder(client):
                return [*rows, *stop_rows(arm, client, ", recorder blocked")]
    finally:
        rclpy.try_shutdown()


def stream_rows(arm: Any, client: Bench) -> list[Row]:
    """Rate, loss, stamps and cost while the arm moves up and down."""
    polled = Polled()
    client.forget()
    began, arm_cpu, node_cpu = time.monotonic(), arm.cpu_seconds(), client.node_cpu_seconds()
    began_ns = time.time_ns()
    errors_ms: list[float] = []
    while time.monotonic() - began < STREAM_SECONDS:
        for height in (BOTTOM_M, TOP_M):
            first = len(client.poses)
            client.move(height)
            errors_ms += stamp_errors_ms(client.poses[first:], arm.heights(began_ns))
    seconds = time.monotonic() - began
    arm_load = (arm.cpu_seconds() - arm_cpu) / seconds
    node_load = (client.node_cpu_seconds() - node_cpu) / seconds
    received = len(client.poses)
    polled_hz = polled.stop()
    client.spin(lambda: False, 0.5)
    stamps = {from_stamp(pose.header.stamp) for pose in client.poses}
    first, last = min(stamps), max(stamps)
    published = {stamp for report in client.times for stamp in report.stamp_ns}
    missing = {stamp for stamp in published if first <= stamp <= last} - stamps
    device_lost = client.times[-1].device_lost - client.times[0].device_lost
    return [
        Row(
            "robot: pose samples received at 500 Hz",
            received / seconds,
            "1/s",
            ">= 495",
            baseline=polled_hz,
            ratio=received / seconds / polled_hz,
        ),
        Row(
            "robot: pose samples lost, controller to subscriber",
            len(missing) + device_lost,
            "",
            "<= 0",
        ),
        Row("robot: pose stamp error p99", float(np.percentile(errors_ms, 99)), "ms", "<= 1"),
        Row("robot: virtual controller, of one core", 100 * arm_load, "%", "<= 12"),
        Row("robot: node with driver and guard, of one core", 100 * node_load, "%"),
    ]


def stop_rows(arm: Any, client: Bench, when: str) -> list[Row]:
    """From the sample that crosses the limit, as it is published, to the arm's braking."""
    delays_ms = []
    for _ in range(STOPS):
        client.move(TOP_M)
        began_ns = time.time_ns()
        handle = client.send(BOTTOM_M)
        client.spin(lambda: at_speed(arm.heights(time.time_ns() - 50_000_000)), 5.0)
        stepped_ns = client.step_force(-FORCE_LIMIT_N - 1)
        client.finish(handle)
        delays_ms.append((braking_began(arm.heights(began_ns), stepped_ns) - stepped_ns) / 1e6)
        client.step_force(0.0)
        client.spin(lambda: client.state.ready, 10.0)
    return [
        Row(f"robot: force step to braking{when} p50", statistics.median(delays_ms), "ms", "<= 20"),
        Row(f"robot: force step to braking{when} max", max(delays_ms), "ms", "<= 50"),
    ]


def stamp_errors_ms(poses: list[PoseStamped], heights: list[tuple[int, float]]) -> list[float]:
    """How far off in time each pose of the steady part of a move is from the controller's own."""
    at, height = np.array(heights).T
    stamps = np.array([from_stamp(pose.header.stamp) for pose in poses])
    measured = np.array([pose.pose.position.z + SENSOR_POSE[2] for pose in poses])
    speed = np.gradient(measured, stamps / 1e9)
    steady = np.abs(np.abs(speed) - SPEED_M_S) < 0.1 * SPEED_M_S
    origin = int(at[0])  # nanoseconds of a year do not fit a float
    truth = np.interp(stamps - origin, at - origin, height)
    errors = np.abs(measured - truth)[steady] / SPEED_M_S * 1e3
    return list(errors)


def at_speed(heights: list[tuple[int, float]]) -> bool:
    """Over all of `heights`, the arm moves at full speed."""
    (t0, z0), (t1, z1) = heights[0], heights[-1]
    return t1 > t0 and abs(z1 - z0) / (t1 - t0) * 1e9 > 0.98 * SPEED_M_S


def braking_began(heights: list[tuple[int, float]], since_ns: int) -> int:
    """Host time (ns) of the first cycle after `since_ns` that is slower than full speed."""
    for (_, before), (at, height) in pairwise(heights):
        if at > since_ns and abs(height - before) < 0.98 * SPEED_M_S * CYCLE_S:
            return at
    raise RuntimeError("the arm did not brake")


class Polled:
    """The way this driver replaces: ur_rtde's receive interface, polled for new samples."""

    def __init__(self) -> None:
        self._receive = RTDEReceiveInterface(HOST)
        self._done = threading.Event()
        self._count = 0
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def _poll(self) -> None:
        newest = 0.0
        while not self._done.wait(0.001):
            stamp = self._receive.getTimestamp()
            self._count += stamp != newest
            newest = stamp

    def stop(self) -> float:
        """Distinct samples a second."""
        self._done.set()
        self._thread.join()
        rate = self._count / (time.monotonic() - self._began)
        self._receive.disconnect()
        return rate


class Bench:
    """The node under test, its force sensor and its client."""

    def __init__(self, arm: Any) -> None:
        self._arm = arm
        self._folder = tempfile.TemporaryDirectory()
        self.poses: list[PoseStamped] = []
        self.times: list[StreamTimes] = []
        self.state = RobotState()
        self._force = 0.0
        self._stepped_ns = 0
        self._node = rclpy.create_node("bench", namespace=NAMESPACE)
        self._executor = EventsExecutor()
        self._executor.add_node(self._node)
        self._wrenches = self._node.create_publisher(
            WrenchStamped, "netft/wrench", stream_qos(1000)
        )
        self._mover = ActionClient(self._node, MoveLinear, "robot/move_linear")
        self._node.create_subscription(
            PoseStamped, "robot/tcp_pose", self.poses.append, stream_qos(500)
        )
        self._node.create_subscription(StreamTimes, "stream_times", self._on_times, stream_qos(100))
        self._node.create_subscription(RobotState, "robot/state", self._on_state, LATCHED_QOS)
        self._done = threading.Event()
        self._press = threading.Thread(target=self._publish_force)

    def __enter__(self) -> Bench:
        cell = Path(self._folder.name) / "cell.yaml"
        cell.write_text(CELL)
        parameters = ["-p", f"cell:={cell}", "-p", "startup_wait_s:=20.0"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "genforce_collect.nodes.robot", "--ros-args", *parameters]
        )
        self._press.start()
        if not self.spin(lambda: self.state.ready and self._mover.server_is_ready(), 40.0):
            self.__exit__()
            raise RuntimeError(f"the robot node does not get ready: {self.state.message}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(20)
        self._done.set()
        self._press.join()
        self._executor.shutdown()
        self._node.destroy_node()
        self._folder.cleanup()

    def _on_state(self, state: RobotState) -> None:
        self.state = state

    def _on_times(self, report: StreamTimes) -> None:
        if report.topic == f"/{NAMESPACE}/robot/tcp_pose":
            self.times.append(report)

    def _publish_force(self) -> None:
        message, sent = WrenchStamped(), math.nan
        due = time.monotonic()
        while not self._done.is_set():
            force = self._force
            message.wrench.force.z = force
            now_ns = time.time_ns()
            message.header.stamp = to_stamp(now_ns)
            self._wrenches.publish(message)
            if force != sent:
                self._stepped_ns, sent = now_ns, force
            due += 0.001
            time.sleep(max(0.0, due - time.monotonic()))

    def step_force(self, force: float) -> int:
        """Publish `force` from now on; host time (ns) of the first such sample."""
        before, self._force = self._stepped_ns, force
        while self._stepped_ns == before:
            time.sleep(0.0002)
        return self._stepped_ns

    def recorded(self) -> bool:
        """Whether a recorder has found both streams of the guard."""
        topics = (f"/{NAMESPACE}/netft/wrench", f"/{NAMESPACE}/robot/tcp_pose")
        found = (self._node.get_subscriptions_info_by_topic(topic) for topic in topics)
        return all(any(info.node_name == "recorder" for info in infos) for infos in found)

    def forget(self) -> None:
        """Count anew, from a moment when both counts agree."""
        self.spin(lambda: False, 0.5)
        self.poses.clear()
        self.times.clear()

    def node_cpu_seconds(self) -> float:
        """Processor time of the node and its control process."""
        pids = [self._process.pid]
        children = Path(f"/proc/{pids[0]}/task").glob("*/children")
        pids += [int(pid) for path in children for pid in path.read_text().split()]
        ticks = 0
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def spin(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Until done or the timeout."""
        return spin_until(self._executor, done, timeout_s)

    def send(self, height: float) -> Any:
        """Begin a move to a height above the gel."""
        goal = MoveLinear.Goal(speed=SPEED_M_S, acceleration=0.5)
        goal.pose.position.z = height
        goal.pose.orientation.x, goal.pose.orientation.w = 1.0, 0.0
        sent = self._mover.send_goal_async(goal)
        if not self.spin(sent.done, 10.0):
            raise RuntimeError("the robot node does not answer")
        return sent.result()

    def finish(self, handle: Any) -> MoveLinear.Result:
        """Wait for the end of a move."""
        result = handle.get_result_async()
        if not self.spin(result.done, 20.0):
            raise RuntimeError("the move does not end")
        return result.result().result

    def move(self, height: float) -> None:
        """Move there and arrive."""
        result = self.finish(self.send(height))
        if not result.success:
            raise RuntimeError(result.message)


@contextmanager
def blocked_recorder(client: Bench) -> Iterator[None]:
    """A recorder at work, stopped as if its disk hung: reliable streams wait for what it takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "genforce_collect.nodes.recorder", "--ros-args"]
        with subprocess.Popen([*command, "-p", f"bag:={folder}/bag"]) as recorder:
            try:
                if not client.spin(client.recorded, 20.0):
                    raise RuntimeError("the recorder does not come up")
                client.spin(lambda: False, 1.0)
                recorder.send_signal(signal.SIGSTOP)
                yield
            finally:
                recorder.kill()


@contextmanager
def controller() -> Iterator[Any]:
    """A virtual controller in a process of its own."""
    manager = BaseManager(ctx=multiprocessing.get_context("spawn"))
    manager.start()
    try:
        arm = manager.Controller(
            HOST, initial_pose=compose(SENSOR_POSE, tip_pose(0, 0, TOP_M)), tool=TOOL
        )
        arm.start()
        yield arm
        arm.stop()
    finally:
        manager.shutdown()
