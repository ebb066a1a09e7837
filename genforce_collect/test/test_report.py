"""The report says what the bag holds: force and depth per contact, what broke off and why."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path

import cv2
import numpy as np
import pytest
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped, WrenchStamped
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage

from genforce_collect.bags import BagWriter, TopicSpec
from genforce_collect.errors import DataError
from genforce_collect.report import write_report
from genforce_collect.trajectory import Phase
from genforce_msgs.msg import Contact, RobotState

TOPICS = {
    "wrench": TopicSpec("/genforce/netft/wrench", "geometry_msgs/msg/WrenchStamped"),
    "pose": TopicSpec("/genforce/robot/tcp_pose", "geometry_msgs/msg/PoseStamped"),
    "image": TopicSpec("/genforce/s/image/compressed", "sensor_msgs/msg/CompressedImage"),
    "contact": TopicSpec("/genforce/contact", "genforce_msgs/msg/Contact", latched=True),
    "state": TopicSpec("/genforce/robot/state", "genforce_msgs/msg/RobotState"),
    "diagnostics": TopicSpec("/diagnostics", "diagnostic_msgs/msg/DiagnosticArray"),
}
START_NS = 1_700_000_000_000_000_000
PEAK_N = 4.0


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    """Two presses of a second each, 1 mm deep, 4 N; the second breaks off half-way."""
    metadata = {"session": "s", "sensor": "s", "indenter": "sphere", "contacts": [0, 1]}
    writer = BagWriter(tmp_path / "bag", metadata | {"plan": {"start": [0, 0, 0]}})
    for spec in TOPICS.values():
        writer.add_topic(spec)
    jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 128, np.uint8))[1].tobytes()

    def write(name: str, ns: int, message) -> None:
        message.header.stamp = Time(sec=ns // 10**9, nanosec=ns % 10**9)
        message.header.frame_id = "sensor"
        writer.write(TOPICS[name].name, serialize_message(message), ns)

    phases = {0: Phase.DOWN, 500: Phase.UP, 999: Phase.DONE, 1100: Phase.DOWN, 1600: Phase.INVALID}
    for i, (at, phase) in enumerate(phases.items()):
        phases[at] = (phase, Contact(seq=i, index=int(at > 1000), phase=int(phase), depth=1e-3))
    for ms in range(2000):
        ns = START_NS + ms * 1_000_000
        press = max(0.0, math.sin(math.pi * (ms % 1100) / 1000))
        wrench, pose = WrenchStamped(), PoseStamped()
        wrench.wrench.force.z, wrench.wrench.force.x = -PEAK_N * press, 0.5 * press
        pose.pose.position.z = -1e-3 * press
        write("wrench", ns, wrench)
        write("pose", ns, pose)
        if ms % 33 == 0:
            write("image", ns, CompressedImage(format="jpeg", data=array("B", jpeg)))
        if ms % 100 == 0:
            moving = ms % 200 == 0 and ms < 1600
            state = RobotState(seq=ms // 100, ready=not moving and ms < 1600, moving=moving)
            state.message = "moving" if moving else "stopped"
            write("state", ns, state)
        if ms % 500 == 0:
            status = DiagnosticStatus(name="camera", message="ok")
            if ms == 500:
                status = DiagnosticStatus(name="camera", message="frozen", level=b"\x02")
            write("diagnostics", ns, DiagnosticArray(status=[status]))
        if ms in phases:
            phase, contact = phases[ms]
            contact.reason = "protective stop" if phase == Phase.INVALID else ""
            contact.direction = math.nan
            write("contact", ns, contact)
    writer.close()
    return tmp_path / "bag"


def test_report_gives_each_contacts_force_depth_and_fate(bag: Path):
    page, told = write_report(bag)
    assert told.whole == {0}
    report = json.loads((page.parent / "report.json").read_text())
    assert (report["contacts_asked"], report["contacts_whole"]) == (2, 1)
    whole, broken = report["contacts"]
    assert whole["whole"]
    assert whole["normal_force_n"] == pytest.approx(-PEAK_N, rel=0.01)
    assert whole["shear_force_n"] == pytest.approx(0.5, rel=0.01)
    assert whole["reached_depth_mm"] == pytest.approx(1.0, rel=0.01)
    assert whole["duration_s"] == pytest.approx(0.999)
    assert whole["frames"] in (30, 31)
    assert broken["reason"] == "protective stop"
    events = [event["what"] for event in report["events"]]
    assert "contact 1 broken off: protective stop" in events
    assert "robot: stopped" in events
    assert [e for e in events if "camera" in e] == ["camera: frozen", "camera: well again"]
    assert not any("moving" in event for event in events), "a move is no event"


def test_page_stands_alone_with_plots_and_thumbnails(bag: Path, tmp_path: Path):
    page, _ = write_report(bag, tmp_path / "elsewhere")
    text = page.read_text()
    assert page.parent == tmp_path / "elsewhere"
    assert text.count("data:image/png;base64,") == 5
    assert text.count("data:image/jpeg;base64,") == 1
    assert "1 of 2 contacts whole" in text
    assert "src='http" not in text


def test_no_bag_no_report(tmp_path: Path):
    with pytest.raises(DataError, match="no such bag"):
        write_report(tmp_path / "nowhere")
