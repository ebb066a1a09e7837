"""The netft node as other nodes see it: topic, service, diagnostics, exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import WrenchStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from std_srvs.srv import Trigger

from genforce_collect.nodes.common import from_stamp, stream_qos, values_of
from genforce_msgs.msg import StreamTimes
from genforce_sim.devices.netft_box import NetftBox

pytestmark = pytest.mark.live

WRENCH = np.array([0.5, -1.0, -2.0, 0.01, 0.02, -0.03])
RDT, HTTP = 30049, 8081
CELL = """
name: test
robot: {{host: {host}}}
netft: {{host: {host}, rdt_port: {rdt}, http_port: {http}}}
camera: {{source: "0"}}
sensor_pose: [0, 0, 0, 0, 0, 0]
limits: {{workspace_min_m: [-1, -1, -1], workspace_max_m: [1, 1, 1]}}
"""


class Listener(Node):
    """Takes in all that the node says."""

    def __init__(self) -> None:
        super().__init__("listener", namespace="genforce")
        self.wrenches: list[WrenchStamped] = []
        self.times: list[StreamTimes] = []
        self.status: DiagnosticStatus | None = None
        self.told_ns = 0  # when that was published
        self.create_subscription(
            WrenchStamped, "netft/wrench", self.wrenches.append, stream_qos(1000)
        )
        self.create_subscription(StreamTimes, "stream_times", self.times.append, 100)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self.tare = self.create_client(Trigger, "netft/tare")

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        self.status, self.told_ns = message.status[0], from_stamp(message.header.stamp)

    @property
    def values(self) -> dict[str, str]:
        return {} if self.status is None else values_of(self.status)


class Setup:
    """The node in a process of its own, a virtual box and a listener."""

    def __init__(self, host: str, folder: Path) -> None:
        self.wrench = WRENCH
        self.box = NetftBox(host, RDT, HTTP, lambda _: self.wrench)
        self.cell = folder / "cell.yaml"
        self.cell.write_text(CELL.format(host=host, rdt=RDT, http=HTTP))
        self.listener = Listener()
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.listener)
        self.node = start_node(self.cell)

    def spin_until(self, done: Callable[[], object], timeout_s: float = 15.0) -> bool:
        deadline = time.monotonic() + timeout_s
        while not done() and time.monotonic() < deadline:
            self.executor.spin_once(timeout_sec=0.05)
        return bool(done())

    def call_tare(self) -> Trigger.Response:
        assert self.listener.tare.wait_for_service(10.0)
        future = self.listener.tare.call_async(Trigger.Request())
        assert self.spin_until(future.done)
        return future.result()

    def newest(self) -> list[float]:
        wrench = self.listener.wrenches[-1].wrench
        return [getattr(part, axis) for part in (wrench.force, wrench.torque) for axis in "xyz"]

    def close(self) -> None:
        self.node.kill()
        self.node.wait()
        self.box.close()
        self.executor.shutdown()
        self.listener.destroy_node()


def start_node(cell: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "genforce_collect.nodes.netft"]
    return subprocess.Popen(
        [*command, "--ros-args", "-p", f"cell:={cell}"], stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module", autouse=True)
def ros() -> Iterator[None]:
    rclpy.init()
    yield
    rclpy.try_shutdown()


@pytest.fixture
def setup(loopback_host, tmp_path) -> Iterator[Setup]:
    setup = Setup(loopback_host, tmp_path)
    yield setup
    setup.close()


def test_wrenches_arrive_whole_tared_and_stamped(setup):
    listener = setup.listener
    assert setup.spin_until(lambda: len(listener.wrenches) > 1500 and listener.values)
    stamps = [from_stamp(message.header.stamp) for message in listener.wrenches]
    assert (np.diff(stamps) > 0).all()
    assert abs(stamps[-1] - time.time_ns()) < 2e9
    assert {message.header.frame_id for message in listener.wrenches} == {"sensor"}
    assert setup.newest() == pytest.approx(np.zeros(6), abs=0.02)

    # every sample that was numbered from the first heard on has come
    assert setup.spin_until(lambda: any(stamps[-1] in report.stamp_ns for report in listener.times))
    reported = [stamp for report in listener.times for stamp in report.stamp_ns]
    heard = set(stamps)
    assert [s for s in reported if stamps[0] <= s <= stamps[-1] and s not in heard] == []
    report = listener.times[-1]
    assert report.topic == "/genforce/netft/wrench"
    assert report.device_lost == 0
    assert np.diff(report.device_time) == pytest.approx(1e-3)
    ages = [np.subtract(each.receive_ns, each.stamp_ns) / 1e9 for each in listener.times]
    assert min(age.min() for age in ages) >= 0
    assert min(age.min() for age in ages) < 0.05, "load delays many, but not the promptest"
    assert report.offset == pytest.approx(
        report.stamp_ns[-1] / 1e9 - report.device_time[-1], abs=0.02
    )


def test_the_tare_at_start_is_on_record_and_a_new_one_replaces_it(setup):
    listener = setup.listener
    assert setup.spin_until(lambda: "tare_Fz" in listener.values and listener.wrenches)
    tare = [float(listener.values[f"tare_{axis}"]) for axis in ("Fx", "Fy", "Fz")]
    assert tare == pytest.approx(WRENCH[:3], abs=0.01)
    assert listener.status.level == DiagnosticStatus.OK
    assert setup.spin_until(lambda: abs(setup.newest()[2]) < 0.02)  # past the samples before it

    setup.wrench = 2 * WRENCH
    assert setup.spin_until(lambda: abs(setup.newest()[2] + 2.0) < 0.02)
    answer = setup.call_tare()
    assert answer.success
    assert "over 50 samples" in answer.message
    assert setup.spin_until(lambda: abs(setup.newest()[2]) < 0.02)
    assert setup.spin_until(lambda: abs(float(listener.values["tare_Fz"]) + 4.0) < 0.02)


def test_a_refused_tare_says_why_and_keeps_the_old_zero(setup):
    assert setup.spin_until(lambda: "tare_Fz" in setup.listener.values)
    before = setup.listener.values["tare_stamp_ns"]
    setup.box.mute(20.0)
    answer = setup.call_tare()
    assert not answer.success
    assert "samples came in" in answer.message
    assert setup.spin_until(lambda: setup.listener.status.level == DiagnosticStatus.ERROR)
    assert setup.listener.values["tare_stamp_ns"] == before


def test_faults_and_losses_show_in_diagnostics(setup):
    listener = setup.listener
    assert setup.spin_until(lambda: len(listener.wrenches) > 100)
    setup.box.lose(0.2)
    assert setup.spin_until(lambda: int(listener.values.get("lost", 0)) > 20)
    assert setup.spin_until(lambda: listener.times[-1].device_lost > 20)
    setup.box.lose(0.0)
    setup.box.status_error(0x80020000)
    assert setup.spin_until(lambda: "saturated" in listener.status.message)
    assert listener.status.level == DiagnosticStatus.ERROR
    setup.box.status_error(0)
    assert setup.spin_until(lambda: listener.status.level == DiagnosticStatus.OK)


def test_a_status_that_spoils_the_samples_is_told_at_once(setup):
    assert setup.spin_until(lambda: "tare_Fz" in setup.listener.values)
    listener = setup.listener
    for status in (0x80020000, 0) * 3:
        begun_ns = time.time_ns()
        setup.box.status_error(status)
        word = f"0x{status:08x}"
        assert setup.spin_until(lambda word=word: listener.values["status"] == word)
        assert listener.told_ns - begun_ns < 0.5e9  # and not with the next report, once a second
        assert (listener.status.level == DiagnosticStatus.ERROR) == bool(status)


def test_it_ends_cleanly_on_sigint(setup):
    assert setup.spin_until(lambda: len(setup.listener.wrenches) > 100)
    setup.node.send_signal(signal.SIGINT)
    assert setup.node.wait(10) == 0
    assert "Traceback" not in setup.node.stderr.read()


def test_an_unreachable_box_ends_it_with_one_line_and_exit_code_3(loopback_host, tmp_path):
    cell = tmp_path / "cell.yaml"
    cell.write_text(CELL.format(host=loopback_host, rdt=RDT, http=HTTP))
    node = start_node(cell)
    _, errors = node.communicate(timeout=30)
    assert node.returncode == 3
    assert errors.strip().count("\n") == 0
    assert errors.startswith(f"error: Net F/T box {loopback_host}: no configuration page")


def test_a_tare_refused_at_the_start_ends_it_with_the_reason(loopback_host, tmp_path):
    box = NetftBox(loopback_host, RDT, HTTP, lambda _: WRENCH)
    box.status_error(0x80020000)
    cell = tmp_path / "cell.yaml"
    cell.write_text(CELL.format(host=loopback_host, rdt=RDT, http=HTTP))
    node = start_node(cell)
    _, errors = node.communicate(timeout=30)
    box.close()
    assert node.returncode == 3
    assert errors.startswith("error: tare refused: ")
    assert "saturated" in errors


def test_an_unknown_cell_ends_it_with_exit_code_2(tmp_path):
    node = start_node(tmp_path / "none.yaml")
    _, errors = node.communicate(timeout=30)
    assert node.returncode == 2
    assert "none.yaml" in errors
    assert os.linesep not in errors.strip()
