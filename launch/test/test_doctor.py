"""genforce doctor: finds what is wrong, says what to do, and leaves running cells alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import rclpy
import yaml
from geometry_msgs.msg import WrenchStamped

from genforce_bringup import doctor
from genforce_bringup.cli import main
from genforce_bringup.doctor import Finding, examine
from genforce_sim.devices.netft_box import NetftBox
from genforce_sim.devices.ur_controller import UrController

pytestmark = pytest.mark.live

VIRTUAL = Path(__file__).parents[1] / "config" / "cells" / "virtual.yaml"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DDS domain where no node of another test is still known."""
    monkeypatch.setenv("ROS_DOMAIN_ID", str(1 + (os.getpid() + 50) % 100))


@pytest.fixture
def cell(tmp_path: Path, loopback_host: str) -> Path:
    """A cell file whose devices would be on a loopback address of this test's own."""
    data = yaml.safe_load(VIRTUAL.read_text())
    data["name"] = "bench"
    data["robot"]["host"] = data["netft"]["host"] = loopback_host
    data["camera"]["source"] = f"http://{loopback_host}:8080/stream.mjpg"
    del data["simulation"]
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def by_subject(cell: Path | None, timeout_s: float = 5.0) -> dict[str, Finding]:
    return {
        finding.subject: finding
        for finding in examine(str(cell) if cell else None, "array_1", timeout_s)
    }


def test_without_a_cell_the_machine_alone_is_looked_at(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    subjects = [finding["subject"] for finding in findings]
    assert subjects == ["Python", "packages", "ROS 2", "discovery", "workspace", "disk"]
    assert all(finding["state"] != "problem" for finding in findings)


def test_every_absent_device_is_a_problem_with_a_remedy(cell, capsys):
    assert main(["doctor", "--cell", str(cell), "--timeout", "0.5", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    problems = {f["subject"]: f["found"] for f in findings if f["state"] == "problem"}
    assert set(problems) == {"robot", "force sensor", "camera"}
    assert all(f["remedy"] for f in findings if f["state"] == "problem")


def test_devices_that_answer_are_found_and_left_as_they_were(cell, loopback_host):
    controller = UrController(loopback_host)
    box = NetftBox(loopback_host, 30049, 8081, lambda _: np.zeros(6))
    controller.start()
    try:
        found = by_subject(cell)
    finally:
        controller.stop()
        box.close()
    assert found["robot"].state == "ok", found["robot"]
    assert loopback_host in found["robot"].found
    assert found["force sensor"].state != "problem", found["force sensor"]
    assert found["camera"].state == "problem"


def test_a_stopped_robot_is_told_with_its_remedy(cell, loopback_host):
    controller = UrController(loopback_host)
    controller.start()
    try:
        controller.protective_stop()
        robot = by_subject(cell, 2.0)["robot"]
    finally:
        controller.stop()
    assert robot.state == "problem"
    assert "protective stop" in robot.found
    assert "recover" in robot.remedy


def test_a_robot_in_local_control_is_told_how_to_leave_it(cell, loopback_host):
    controller = UrController(loopback_host, remote_control=False)
    controller.start()
    try:
        robot = by_subject(cell, 2.0)["robot"]
    finally:
        controller.stop()
    assert robot.state == "problem"
    assert "Local to Remote" in robot.remedy


def test_a_device_that_a_running_graph_holds_is_not_touched(cell, monkeypatch):
    monkeypatch.setattr(doctor, "DISCOVERY_S", 8.0)  # on a machine that tests keep busy
    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    node = rclpy.create_node("holder", context=context)
    node.create_publisher(WrenchStamped, "/genforce/netft/wrench", 1)
    try:
        sensor = by_subject(cell, 0.5)["force sensor"]
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)
    assert sensor.state == "note"
    assert "held by a running graph" in sensor.found


def test_an_unknown_cell_is_a_problem_and_not_a_crash():
    assert by_subject(Path("nosuch.yaml"))["configuration"].state == "problem"
