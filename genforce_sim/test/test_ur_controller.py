"""The virtual controller as the unmodified ur_rtde client sees it.

The controller runs in a process of its own: constructors of ur_rtde hold the interpreter.
"""

from __future__ import annotations

import math
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.managers import BaseManager
from typing import Any

import numpy as np
import pytest
from dashboard_client import DashboardClient
from rtde_control import RTDEControlInterface
from rtde_receive import RTDEReceiveInterface

from genforce_collect.errors import DeviceError
from genforce_collect.geometry import angle
from genforce_sim.devices.ur_controller import UrController
from genforce_sim.devices.ur_motion import Trapezoid

pytestmark = pytest.mark.live

START = (0.4, -0.1, 0.3, math.pi, 0.0, 0.0)
TOOL = (0.0, 0.0, 0.12, 0.0, 0.0, 0.0)


BaseManager.register("UrController", UrController)


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    manager = BaseManager(ctx=multiprocessing.get_context("spawn"))
    manager.start()
    yield manager
    manager.shutdown()


@pytest.fixture
def serve(processes, loopback_host) -> Iterator[Callable[..., Any]]:
    started = []

    def start(**options) -> Any:
        options = {"initial_pose": START, "tool": TOOL, "unlock_delay_s": 0.1} | options
        controller = processes.UrController(loopback_host, **options)
        controller.start()
        started.append(controller)
        return controller

    yield start
    for controller in started:
        controller.stop()


@pytest.fixture
def clients(loopback_host) -> Iterator[Callable[[], tuple[Any, Any]]]:
    made: list[Any] = []

    def connect() -> tuple[RTDEControlInterface, RTDEReceiveInterface]:
        made.append(RTDEReceiveInterface(loopback_host))
        made.append(RTDEControlInterface(loopback_host))
        return made[-1], made[-2]

    yield connect
    for client in reversed(made):
        client.disconnect()


def wait(done: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def above(pose, metres: float) -> list[float]:
    return [*pose[:2], pose[2] + metres, *pose[3:]]


# --- reading ---


def test_the_full_default_recipe_is_served(serve, loopback_host):
    serve()
    receive = RTDEReceiveInterface(loopback_host)
    assert receive.getActualTCPPose() == pytest.approx(START)
    assert receive.getTargetTCPPose() == pytest.approx(START)
    assert receive.getRobotMode() == 7
    assert receive.getSafetyMode() == 1
    assert receive.getRuntimeState() == 1
    assert receive.getSpeedScaling() == 1
    assert len(receive.getActualQ()) == len(receive.getFtRawWrench()) == 6
    assert len(receive.getPayloadInertia()) == 6
    receive.disconnect()


@pytest.mark.parametrize("frequency", [500.0, 125.0])
def test_time_passes_at_host_rate_for_a_short_recipe(serve, loopback_host, frequency):
    serve(time_scale=4.0)
    receive = RTDEReceiveInterface(
        loopback_host, frequency, variables=["timestamp", "actual_TCP_pose"]
    )
    times = []

    def enough() -> bool:
        if not times or receive.getTimestamp() != times[-1]:
            times.append(receive.getTimestamp())
        return len(times) > 20

    began = time.monotonic()
    assert wait(enough)
    steps = np.round(np.diff(times) * frequency)
    assert (steps >= 1).all()
    assert np.diff(times) == pytest.approx(steps / frequency)
    # What the client saw may start with a backlog, never with time that has not passed.
    assert times[-1] - times[0] < time.monotonic() - began + 1.0
    receive.disconnect()


def test_a_receiver_reconnects_after_a_dropped_link(serve, loopback_host):
    controller = serve()
    receive = RTDEReceiveInterface(loopback_host)
    controller.drop_link()
    assert wait(lambda: not receive.isConnected())
    assert receive.reconnect()
    stamp = receive.getTimestamp()
    assert wait(lambda: receive.getTimestamp() > stamp)
    receive.disconnect()


def test_a_silent_stall_freezes_the_stream_and_nothing_else(serve, loopback_host):
    controller = serve()
    receive = RTDEReceiveInterface(loopback_host)
    controller.freeze(0.5)
    assert wait(lambda: receive.getTimestamp() == (time.sleep(0.1), receive.getTimestamp())[1])
    stalled = receive.getTimestamp()
    assert receive.isConnected()
    assert wait(lambda: receive.getTimestamp() > stalled + 0.2)
    receive.disconnect()


# --- moving ---


def test_a_synchronous_move_arrives_and_takes_its_time(serve, clients):
    serve()
    control, receive = clients()
    target = above(START, -0.02)
    began = time.monotonic()
    assert control.moveL(target, 0.1, 0.5)
    assert time.monotonic() - began >= Trapezoid(0.02, 0.1, 0.5).duration - 0.01
    assert wait(lambda: receive.getActualTCPPose() == pytest.approx(target))
    assert receive.getActualTCPSpeed() == [0] * 6


def test_speed_and_acceleration_keep_to_their_limits(serve, clients):
    serve()
    control, receive = clients()
    seen = []

    def follow() -> bool:
        seen.append((receive.getTimestamp(), receive.getActualTCPSpeed()[2]))
        return not control.getAsyncOperationProgressEx().isAsyncOperationRunning()

    control.moveL(above(START, -0.03), 0.1, 0.4, asynchronous=True)
    assert wait(follow)
    times, speeds = np.array(seen).T
    assert speeds.min() == pytest.approx(-0.1, abs=1e-3)
    new = np.diff(times) > 0
    # The client's getters may straddle a cycle of 2 ms.
    assert (np.abs(np.diff(speeds))[new] <= 0.4 * (np.diff(times)[new] + 0.004)).all()


def test_an_asynchronous_move_reports_its_progress_and_can_be_stopped(serve, clients):
    serve()
    control, receive = clients()
    before = control.getAsyncOperationProgressEx().operationId()
    assert control.moveL(above(START, -0.1), 0.05, 0.5, asynchronous=True)
    progress = control.getAsyncOperationProgressEx()
    assert progress.isAsyncOperationRunning()
    assert progress.operationId() != before
    assert wait(lambda: receive.getActualTCPSpeed()[2] < -0.04)
    control.stopL(2.0, asynchronous=True)
    assert wait(lambda: not control.getAsyncOperationProgressEx().isAsyncOperationRunning())
    assert wait(lambda: receive.getActualTCPSpeed() == [0] * 6)
    assert -0.1 < receive.getActualTCPPose()[2] - START[2] < 0


def test_a_path_passes_its_waypoints(serve, clients):
    serve(time_scale=4.0)
    control, receive = clients()
    high, low = above(START, 0.01), above(START, -0.01)
    assert control.moveL([[*high, 0.1, 0.5, 0.0], [*low, 0.1, 0.5, 0.0]])
    assert wait(lambda: receive.getActualTCPPose() == pytest.approx(low))


def test_a_turn_across_pi_goes_the_short_way(serve, clients):
    serve()
    control, receive = clients()
    target = [*START[:3], -math.pi + 0.1, 0.0, 0.0]
    turned = []
    control.moveL(target, 0.05, 0.5, asynchronous=True)

    def follow() -> bool:
        turned.append(angle(START, receive.getActualTCPPose()))
        return not control.getAsyncOperationProgressEx().isAsyncOperationRunning()

    assert wait(follow)
    assert max(turned) <= 0.1 + 1e-6
    assert wait(lambda: angle(target, receive.getActualTCPPose()) < 1e-6)


def test_time_scale_makes_the_robot_faster_and_leaves_speeds_consistent(serve, clients):
    serve(time_scale=4.0)
    control, receive = clients()
    control.moveL(above(START, -0.08), 0.05, 2.0, asynchronous=True)
    assert wait(lambda: receive.getActualTCPSpeed()[2] == pytest.approx(-0.2))
    stamps, heights = [], []
    for _ in range(2):
        stamp = receive.getTimestamp()
        assert wait(lambda stamp=stamp: receive.getTimestamp() > stamp + 0.02)
        stamps.append(receive.getTimestamp())
        heights.append(receive.getActualTCPPose()[2])
    rate = (heights[1] - heights[0]) / (stamps[1] - stamps[0])
    assert rate == pytest.approx(-0.2, rel=0.2)


def test_the_speed_slider_slows_every_motion_down_and_is_told(serve, clients):
    controller = serve()
    controller.set_speed_slider(0.25)
    control, receive = clients()
    assert wait(lambda: receive.getTargetSpeedFraction() == 0.25)
    began = time.monotonic()
    assert control.moveL(above(START, -0.02), 0.1, 0.5)
    assert time.monotonic() - began >= 4 * Trapezoid(0.02, 0.1, 0.5).duration - 0.01


def test_speedl_goes_on_until_speed_stop(serve, clients):
    serve()
    control, receive = clients()
    assert control.speedL([0, 0.02, 0, 0, 0, 0.1], 0.5)
    assert wait(lambda: receive.getActualTCPSpeed()[1] == pytest.approx(0.02))
    assert receive.getActualTCPSpeed()[5] == pytest.approx(0.1)
    assert control.speedStop(2.0)
    assert wait(lambda: receive.getActualTCPSpeed() == [0] * 6)
    assert receive.getActualTCPPose()[1] > START[1]


def test_servol_approaches_its_target(serve, clients):
    serve()
    control, receive = clients()
    target = above(START, -0.01)
    for _ in range(20):
        assert control.servoL(target, 0.1, 0.1, 0.002, 0.05, 300)
    assert wait(lambda: receive.getActualTCPPose()[2] == pytest.approx(target[2], abs=1e-4))
    assert control.servoStop(2.0)


def test_two_motions_at_once_end_the_script_as_on_the_robot(serve, clients):
    controller = serve()
    control, _ = clients()
    control.speedL([0, 0.02, 0, 0, 0, 0], 0.5)
    assert not control.moveL(above(START, 0.01), 0.1, 0.5)
    assert any("already controlling" in line for line in controller.get_log())
    assert wait(lambda: not controller.is_moving())


@pytest.mark.parametrize("wrong", ["reach", "joints"])
def test_what_a_robot_cannot_do_ends_the_script(serve, clients, wrong):
    serve()
    control, _ = clients()
    if wrong == "reach":
        assert not control.moveL([2.0, 0, 0.3, 0, 0, 0], 0.1, 0.5)
    else:
        assert not control.moveJ([0, -1, 1, -1, -1, 0], 0.5, 0.5)
    assert wait(lambda: not control.isProgramRunning())
    assert control.reuploadScript()
    assert wait(control.isProgramRunning)


# --- settings ---


def test_tool_and_payload_are_taken(serve, clients):
    controller = serve()
    control, receive = clients()
    assert control.getTCPOffset() == pytest.approx(TOOL)
    assert control.setTcp([0, 0, 0.1, 0, 0, 0])
    assert control.getTCPOffset() == pytest.approx([0, 0, 0.1, 0, 0, 0])
    # The flange stayed; a shorter tool pointing down ends higher. The mounted tip did not move.
    assert wait(lambda: receive.getActualTCPPose()[2] == pytest.approx(START[2] + 0.02))
    assert controller.get_pose() == pytest.approx(START)
    assert control.setPayload(0.3, [0, 0, 0.03])
    assert wait(lambda: receive.getPayload() == pytest.approx(0.3))
    assert wait(control.isSteady)


def test_poses_of_the_past_can_be_asked_for(serve, clients):
    controller = serve()
    control, _ = clients()
    control.moveL(above(START, -0.02), 0.1, 0.5, asynchronous=True)
    assert wait(controller.is_moving)
    assert wait(lambda: not controller.is_moving())
    now = time.time_ns() - 50_000_000
    heights = [controller.get_pose(now - back)[2] for back in (300_000_000, 200_000_000, 0)]
    assert heights == sorted(heights, reverse=True)
    with pytest.raises(ValueError, match="no pose"):
        controller.get_pose(now - 60_000_000_000)


# --- watchdog, stops, link ---


def test_without_kicks_the_watchdog_ends_the_script_and_stops_the_arm(serve, clients):
    controller = serve()
    control, receive = clients()
    assert control.setWatchdog(10.0)
    control.speedL([0, 0, -0.01, 0, 0, 0], 0.5)
    assert wait(lambda: not control.isProgramRunning())
    assert wait(lambda: receive.getActualTCPSpeed() == [0] * 6)
    assert any("watchdog" in line for line in controller.get_log())
    assert control.reuploadScript()
    assert wait(control.isProgramRunning)


def test_kicks_keep_the_watchdog_quiet(serve, clients):
    serve()
    control, _ = clients()
    assert control.setWatchdog(2.0)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert control.kickWatchdog()
        time.sleep(0.02)
    assert control.isProgramRunning()


def test_a_protective_stop_pauses_until_unlocked_and_started_anew(serve, clients, loopback_host):
    controller = serve(unlock_delay_s=0.3)
    control, receive = clients()
    control.moveL(above(START, -0.1), 0.05, 0.5, asynchronous=True)
    assert wait(controller.is_moving)
    controller.protective_stop()
    assert wait(receive.isProtectiveStopped)
    assert wait(lambda: receive.getActualTCPSpeed() == [0] * 6)
    assert receive.getRuntimeState() == 4
    assert not control.moveL(list(START), 0.1, 0.5)
    dashboard = DashboardClient(loopback_host)
    dashboard.connect()
    with pytest.raises(RuntimeError):
        dashboard.unlockProtectiveStop()

    def unlocked() -> bool:
        try:
            dashboard.unlockProtectiveStop()
        except RuntimeError:
            return False
        return True

    assert wait(unlocked)
    assert wait(lambda: not receive.isProtectiveStopped())
    assert control.reuploadScript()
    assert wait(control.isProgramRunning)
    assert control.moveL(above(START, -0.005), 0.1, 0.5)
    dashboard.disconnect()


def test_play_goes_on_with_a_paused_move(serve, clients, loopback_host):
    controller = serve()
    control, receive = clients()
    target = above(START, -0.03)
    control.moveL(target, 0.05, 0.5, asynchronous=True)
    assert wait(controller.is_moving)
    dashboard = DashboardClient(loopback_host)
    dashboard.connect()
    dashboard.pause()
    assert wait(lambda: not controller.is_moving())
    assert receive.getActualTCPPose()[2] > target[2]
    dashboard.play()
    assert wait(lambda: receive.getActualTCPPose() == pytest.approx(target))
    dashboard.disconnect()


def test_a_move_that_asks_for_it_is_protectively_stopped(serve, clients):
    serve()
    control, receive = clients()
    control.triggerProtectiveStop()
    assert wait(receive.isProtectiveStopped)


def test_an_emergency_stop_ends_the_program_and_cuts_power(serve, clients):
    controller = serve()
    control, receive = clients()
    control.moveL(above(START, -0.1), 0.05, 0.5, asynchronous=True)
    assert wait(controller.is_moving)
    controller.emergency_stop()
    assert wait(receive.isEmergencyStopped)
    assert wait(lambda: not controller.is_moving())
    assert receive.getRobotMode() == 3
    assert wait(lambda: not control.isProgramRunning())
    controller.release_emergency_stop()
    assert wait(lambda: not receive.isEmergencyStopped())


def test_a_script_killed_is_told_to_its_client(serve, clients):
    controller = serve()
    control, _ = clients()
    controller.kill_script()
    assert wait(lambda: not control.isProgramRunning())
    assert not control.moveL(list(START), 0.1, 0.5)


def test_a_second_control_is_refused_while_the_first_lives(serve, clients, loopback_host):
    serve()
    control, _ = clients()
    with pytest.raises(RuntimeError, match="in use"):
        RTDEControlInterface(loopback_host)
    assert control.moveL(above(START, 0.001), 0.1, 0.5)
    control.disconnect()
    second = RTDEControlInterface(loopback_host)
    assert second.isProgramRunning()
    second.disconnect()


def test_local_control_refuses_the_client(serve, loopback_host):
    serve(remote_control=False)
    with pytest.raises(RuntimeError, match="remote control"):
        RTDEControlInterface(loopback_host)


def test_what_is_not_rtde_ends_only_its_own_connection(serve, loopback_host):
    serve()
    receive = RTDEReceiveInterface(loopback_host)
    with socket.create_connection((loopback_host, 30004), timeout=5) as stranger:
        stranger.sendall(b"\x00\x01\x00GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b""
    stamp = receive.getTimestamp()
    assert wait(lambda: receive.getTimestamp() > stamp)
    receive.disconnect()


def test_a_port_in_use_is_named_with_the_remedy(serve, loopback_host):
    serve()
    with pytest.raises(DeviceError, match=rf"{loopback_host}:30004 is in use.*robot\.host"):
        UrController(loopback_host).start()


# --- the profile ---


@pytest.mark.parametrize(("length", "speed"), [(0.1, 0.05), (0.001, 0.05), (0.0, 0.05)])
def test_the_profile_is_continuous_and_ends_at_rest(length, speed):
    profile = Trapezoid(length, speed, acceleration=0.5)
    times = np.linspace(0, profile.duration * 1.1, 500)
    ways, speeds = np.array([profile.at(t) for t in times]).T
    assert ways[0] == pytest.approx(0)
    assert ways[-1] == length
    assert speeds[-1] == 0
    assert speeds.max() <= speed + 1e-12
    assert (np.diff(ways) >= 0).all()
    step = times[1] - times[0]
    assert (np.abs(np.diff(speeds)) <= 0.5 * step + 1e-12).all()
