"""The arm's driver against a virtual controller: real ur_rtde, real RTDE, real faults."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from genforce_collect.config import RobotConfig
from genforce_collect.devices import ur
from genforce_collect.devices.ur import PoseSample, UrRobot
from genforce_collect.errors import DeviceError, SafetyError
from genforce_sim.devices.ur_controller import UrController

pytestmark = pytest.mark.live

TOOL = (0.0, 0.0, 0.12, 0.0, 0.0, 0.0)
START = (0.4, -0.1, 0.3, math.pi, 0.0, 0.0)
BUSY_HOST_WATCHDOG_HZ = 2.0  # test machines stand still for longer than a real host may


def wait(done: Callable[[], bool], timeout_s: float = 15.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def above(pose, metres: float) -> tuple[float, ...]:
    return (*pose[:2], pose[2] + metres, *pose[3:])


class Rig:
    """A controller, a driver of it, and what the driver reported."""

    def __init__(self, host: str) -> None:
        self.controller = UrController(host, initial_pose=START, tool=TOOL, unlock_delay_s=0.3)
        self.config = RobotConfig(
            host=host, tcp=TOOL, watchdog_hz=BUSY_HOST_WATCHDOG_HZ, connect_timeout_s=3.0
        )
        self.samples: list[PoseSample] = []
        self.robot = UrRobot(self.config, on_sample=self.samples.append)
        self.beating = threading.Event()
        self.beating.set()
        self._done = threading.Event()
        self._heart = threading.Thread(target=self._beat)
        self._heart.start()

    def _beat(self) -> None:
        while not self._done.wait(0.02):
            if self.beating.is_set():
                self.robot.heartbeat()

    def still(self) -> bool:
        return not self.controller.is_moving()

    def begin_slow_move(self):
        move = self.robot.move_linear(above(START, -0.1), 0.01, 0.5)
        assert wait(self.controller.is_moving)
        return move

    def close(self) -> None:
        self.robot.close()
        self._done.set()
        self._heart.join()
        self.controller.stop()


@pytest.fixture
def unconnected(loopback_host) -> Iterator[Rig]:
    rig = Rig(loopback_host)
    yield rig
    rig.close()


@pytest.fixture
def rig(unconnected) -> Rig:
    unconnected.controller.start()
    unconnected.robot.connect()
    assert wait(lambda: not unconnected.robot.problem)
    return unconnected


# --- streaming ---


def test_every_controller_cycle_arrives_once_and_in_order(rig):
    assert wait(lambda: len(rig.samples) > 1000)
    times = [sample.device_time for sample in rig.samples[:1000]]
    steps = [round((b - a) * 500) for a, b in pairwise(times)]
    assert set(steps) == {1}
    assert rig.robot.lost_samples == 0
    assert all(s.receive_ns > 0 and s.tcp_pose == pytest.approx(START) for s in rig.samples[:9])


# --- motion ---


def test_a_move_ends_when_the_arm_is_there(rig):
    target = above(START, -0.01)
    rig.robot.move_linear(target, 0.1, 0.5).result(15)
    assert rig.robot.sample.tcp_pose == pytest.approx(target)
    assert not rig.robot.moving


def test_a_move_to_where_the_arm_is_ends_at_once(rig):
    rig.robot.move_linear(START, 0.1, 0.5).result(15)


def test_stop_interrupts_a_running_move(rig):
    move = rig.begin_slow_move()
    rig.robot.stop("operator")
    with pytest.raises(SafetyError, match="operator"):
        move.result(15)
    assert wait(rig.still)
    assert rig.controller.get_pose()[2] > START[2] - 0.09
    rig.robot.move_linear(START, 0.1, 0.5).result(15)


def test_a_move_submitted_after_a_stop_begins_at_rest(rig):
    move = rig.begin_slow_move()
    rig.robot.stop("operator")
    after = rig.robot.move_linear(START, 0.1, 0.5)
    after.result(15)
    assert isinstance(move.exception(), SafetyError)
    assert rig.controller.get_pose() == pytest.approx(START)


def test_a_second_move_is_refused_and_does_not_disturb_the_first(rig):
    first = rig.robot.move_linear(above(START, -0.02), 0.02, 0.5)
    second = rig.robot.move_linear(above(START, 0.02), 0.02, 0.5)
    with pytest.raises(SafetyError, match="another motion"):
        second.result(15)
    first.result(15)


def test_repeated_speed_commands_go_on_and_the_last_one_runs_out(rig):
    def push() -> bool:
        rig.robot.command_speed((0, 0.02, 0, 0, 0, 0), 0.5)
        time.sleep(0.02)
        return rig.controller.get_pose()[1] > START[1] + 0.015

    assert wait(push)
    assert wait(rig.still)
    assert wait(lambda: not rig.robot.moving)
    assert rig.robot.problem == ""


@pytest.mark.parametrize("target", [START[:5], (*START, 0.0), (math.nan, *START[1:])])
def test_what_is_no_pose_never_reaches_the_robot(rig, target):
    with pytest.raises(SafetyError, match="6 finite numbers"):
        rig.robot.move_linear(target, 0.1, 0.5)
    with pytest.raises(SafetyError, match="6 finite numbers"):
        rig.robot.command_speed(target, 0.5)
    assert rig.robot.problem == ""


@pytest.mark.parametrize(("speed", "acceleration"), [(0, 1), (-1, 1), (math.nan, 1), (0.1, 0)])
def test_what_is_no_speed_never_reaches_the_robot(rig, speed, acceleration):
    with pytest.raises(SafetyError, match="above 0"):
        rig.robot.move_linear(START, speed, acceleration)


# --- connecting ---


def test_no_controller_is_told_with_its_address(unconnected):
    with pytest.raises(DeviceError, match=rf"{unconnected.config.host}:29999 does not answer"):
        unconnected.robot.connect()


def test_a_host_that_takes_connections_and_says_nothing_does_not_hang_the_driver(unconnected):
    host = unconnected.config.host
    robot = UrRobot(unconnected.config.model_copy(update={"connect_timeout_s": 0.5}))
    with socket.create_server((host, 29999)), pytest.raises(DeviceError, match="does not answer"):
        robot.connect()


def test_local_control_is_told_with_the_remedy(unconnected):
    unconnected.controller.remote_control = False
    unconnected.controller.start()
    with pytest.raises(DeviceError, match="not in remote control: switch"):
        unconnected.robot.connect()


def test_a_robot_controlled_by_another_program_is_told(rig):
    other = UrRobot(rig.config)
    with pytest.raises(DeviceError, match="controlled by another program"):
        other.connect()
    assert rig.robot.problem == ""


def test_a_robot_in_protective_stop_is_connected_and_recovers(unconnected):
    unconnected.controller.start()
    unconnected.controller.protective_stop()
    unconnected.robot.connect()
    assert wait(lambda: "protective stop" in unconnected.robot.problem)
    unconnected.robot.recover().result(15)
    assert unconnected.robot.problem == ""
    unconnected.robot.move_linear(above(START, 0.005), 0.1, 0.5).result(15)


def test_closing_stops_the_arm_and_ends_the_script(rig):
    rig.begin_slow_move()
    rig.robot.close()
    assert wait(rig.still)
    assert not rig.controller.is_program_running()
    assert "not connected" in rig.robot.problem


# --- faults ---


def test_a_dropped_link_fails_the_move_and_comes_back(rig):
    move = rig.begin_slow_move()
    rig.controller.drop_link(duration_s=0.3)
    with pytest.raises(DeviceError, match="robot"):
        move.result(15)
    assert not rig.robot.connected
    assert wait(rig.still)
    assert wait(lambda: not rig.robot.problem)
    rig.robot.move_linear(START, 0.1, 0.5).result(15)


def test_a_silent_stall_fails_the_move_and_comes_back(rig):
    move = rig.begin_slow_move()
    rig.controller.freeze(2.0)
    with pytest.raises(DeviceError, match="silent"):
        move.result(15)
    assert wait(rig.still), "the controller's watchdog stops an arm nobody speaks to"
    assert wait(lambda: not rig.robot.problem)
    rig.robot.move_linear(START, 0.1, 0.5).result(15)


def test_after_a_protective_stop_the_pose_is_read_anew_and_the_old_move_is_not_resumed(rig):
    move = rig.begin_slow_move()
    rig.controller.protective_stop()
    with pytest.raises(DeviceError, match="protective stop"):
        move.result(15)
    assert "recover" in rig.robot.problem
    refused = rig.robot.move_linear(START, 0.1, 0.5)
    with pytest.raises(DeviceError, match="protective stop"):
        refused.result(15)
    assert wait(rig.still)
    began_ns = time.time_ns()
    rig.robot.recover().result(15)
    assert rig.robot.problem == ""
    assert rig.robot.sample.receive_ns > began_ns
    assert rig.still()
    assert rig.robot.sample.tcp_pose == pytest.approx(rig.controller.get_pose())
    rig.robot.move_linear(START, 0.1, 0.5).result(15)


def test_a_locked_protective_stop_is_retried_until_it_can_be_unlocked(rig):
    rig.controller.protective_stop()
    assert wait(lambda: "protective" in rig.robot.problem)
    began = time.monotonic()
    rig.robot.recover().result(15)
    assert time.monotonic() - began > 0.1
    assert rig.robot.problem == ""


def test_an_emergency_stop_fails_the_move_and_needs_a_person(rig):
    move = rig.begin_slow_move()
    rig.controller.emergency_stop()
    with pytest.raises(DeviceError, match="emergency stop"):
        move.result(15)
    with pytest.raises(DeviceError, match="release the button"):
        rig.robot.recover().result(15)
    rig.controller.release_emergency_stop()
    assert wait(lambda: "script" in rig.robot.problem)
    rig.robot.recover().result(15)
    rig.robot.move_linear(START, 0.1, 0.5).result(15)


def test_a_dead_control_script_fails_the_move_and_recovers(rig):
    move = rig.begin_slow_move()
    rig.controller.kill_script()
    with pytest.raises(DeviceError, match="control script"):
        move.result(15)
    rig.robot.recover().result(15)
    rig.robot.move_linear(START, 0.1, 0.5).result(15)


def test_a_dead_control_process_is_replaced(rig):
    move = rig.begin_slow_move()
    os.kill(rig.robot._control._process.pid, signal.SIGKILL)
    with pytest.raises(DeviceError, match="control process ended"):
        move.result(15)
    assert wait(rig.still)
    assert wait(lambda: not rig.robot.problem)


def test_a_caller_that_stands_still_stops_the_arm(rig):
    move = rig.begin_slow_move()
    rig.beating.clear()
    with pytest.raises(SafetyError, match="no heartbeat"):
        move.result(15)
    assert wait(rig.still)


def test_a_script_that_a_busy_host_let_die_is_started_anew(rig):
    pid = rig.robot._control._process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        assert wait(lambda: "control script" in rig.robot.problem)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert wait(lambda: not rig.robot.problem)
    rig.robot.move_linear(above(START, 0.005), 0.1, 0.5).result(15)


def test_a_script_that_somebody_ended_is_left_alone(rig):
    rig.controller.kill_script()
    assert wait(lambda: "control script" in rig.robot.problem)
    assert not wait(lambda: not rig.robot.problem, timeout_s=1.0)


CALLER = """
import sys, threading
from genforce_collect.config import RobotConfig
from genforce_collect.devices.ur import UrRobot
robot = UrRobot(RobotConfig.model_validate_json(sys.argv[1]))
robot.connect()
robot.move_linear([float(value) for value in sys.argv[2].split()], 0.01, 0.5)
print("moving", flush=True)
while True:
    robot.heartbeat()
    threading.Event().wait(0.02)
"""


def test_the_death_of_the_process_stops_the_arm(unconnected):
    unconnected.controller.start()
    target = " ".join(map(str, above(START, -0.1)))
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, unconnected.config.model_dump_json(), target],
        stdout=subprocess.PIPE,
    )
    try:
        assert caller.stdout.readline() == b"moving\n"
        assert wait(unconnected.controller.is_moving)
    finally:
        caller.kill()
        caller.communicate()
    assert wait(unconnected.still)
    assert unconnected.controller.get_pose()[2] > START[2] - 0.09


def test_the_death_of_both_processes_stops_the_arm_by_the_watchdog(rig):
    rig.begin_slow_move()
    os.kill(rig.robot._control._process.pid, signal.SIGSTOP)  # neither kicks nor stops any more
    assert wait(rig.still)
    assert any("watchdog" in line for line in rig.controller.get_log())
    os.kill(rig.robot._control._process.pid, signal.SIGKILL)


def test_the_dashboard_is_asked_line_by_line(rig):
    answers = ur.ask_dashboard(rig.config.host, "robotmode", "running", timeout_s=3.0)
    assert answers == ["Robotmode: RUNNING", "Program running: true"]
