"""The live view and a report in a real browser: Chromium without a screen, drawing on the CPU."""

from __future__ import annotations

import array
import importlib.util
import math
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from geometry_msgs.msg import PoseStamped, WrenchStamped
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage

from genforce_collect.bags import BagWriter, TopicSpec
from genforce_collect.errors import ConfigError
from genforce_collect.nodes.common import to_stamp
from genforce_collect.report import write_report
from genforce_collect.trajectory import Phase
from genforce_msgs.msg import Contact, Markers

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[1]
T0_NS = 1_700_000_000_000_000_000
GEL_BGR = (190, 40, 200)  # nothing of a viewer has this colour
MARKER_BGR, MOTION_BGR, PREDICTED_BGR = (90, 220, 90), (0, 180, 255), (70, 70, 230)
PLACES = np.stack(np.meshgrid(np.arange(8) * 70 + 75, np.arange(6) * 70 + 65), -1).reshape(-1, 2)
TOPICS = {
    "/genforce/array_1/image/compressed": "sensor_msgs/msg/CompressedImage",
    "/genforce/array_1/markers": "genforce_msgs/msg/Markers",
    "/genforce/array_1/wrench": "geometry_msgs/msg/WrenchStamped",
    "/genforce/netft/wrench": "geometry_msgs/msg/WrenchStamped",
    "/genforce/robot/tcp_pose": "geometry_msgs/msg/PoseStamped",
    "/genforce/contact": "genforce_msgs/msg/Contact",
}


def _load_browser():
    spec = importlib.util.spec_from_file_location(
        "make_screenshots", ROOT / "docs" / "make_screenshots.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_screenshots"] = module  # its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


screenshots = _load_browser()
try:
    screenshots.find_browser()
except ConfigError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    """Two seconds of a press; the markers move to the right."""
    runs = tmp_path_factory.mktemp("browser") / "runs"
    runs.mkdir()
    path = runs / "bag"
    writer = BagWriter(path, {"sensor": "array_1", "session": "test", "contacts": [0]})
    for topic, kind in TOPICS.items():
        writer.add_topic(TopicSpec(topic, kind))

    def write(topic: str, ms: int, message) -> None:
        stamp = T0_NS + ms * 1_000_000
        message.header.stamp = to_stamp(stamp)
        writer.write(topic, serialize_message(message), stamp, stamp)

    for ms in range(2000):
        press = math.sin(math.pi * min(ms, 1400) / 2000)
        if ms in (20, 200, 1999):
            phase = {20: Phase.APPROACH, 200: Phase.DOWN, 1999: Phase.DONE}[ms]
            write("/genforce/contact", ms, Contact(phase=phase, total=1, depth=1e-3))
        force, pose = WrenchStamped(), PoseStamped()
        force.wrench.force.z, pose.pose.position.z = -2 * press, -1e-3 * press
        pose.pose.orientation.x, pose.pose.orientation.w = 1.0, 0.0
        write("/genforce/netft/wrench", ms, force)
        write("/genforce/robot/tcp_pose", ms, pose)
        if ms % 20 == 0:
            write("/genforce/array_1/wrench", ms, force)
            moved = PLACES + np.array([30 * press, 0])
            write("/genforce/array_1/image/compressed", ms, _frame(moved))
            write("/genforce/array_1/markers", ms, _markers(moved))
    writer.close()
    return path


def _frame(places: np.ndarray) -> CompressedImage:
    picture = np.full((480, 640, 3), GEL_BGR, np.uint8)
    for place in places:
        cv2.circle(picture, tuple(int(v) for v in place), 9, (40, 30, 40), cv2.FILLED, cv2.LINE_AA)
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    return CompressedImage(format="jpeg", data=array.array("B", jpeg.tobytes()))


def _markers(places: np.ndarray) -> Markers:
    x, y = places.T.astype(np.float32)
    return Markers(
        height=480,
        width=640,
        expected=len(places),
        x=array.array("f", x.tobytes()),
        y=array.array("f", y.tobytes()),
        mask=array.array("B", bytes(480 * 640 // 8)),
    )


def test_the_live_view_shows_camera_markers_motion_and_force(bag, tmp_path):
    pytest.importorskip("rerun", reason="Rerun is not installed (requirements/view.txt)")
    with screenshots.viewing(bag) as address, screenshots.browser() as page:
        page.open(address, 1400, 900)
        deadline = time.monotonic() + 150  # on the CPU, and beside other tests
        wanted = {GEL_BGR: 20_000, MARKER_BGR: 200, MOTION_BGR: 100, PREDICTED_BGR: 50}
        while True:
            page.wait(3)
            picture = page.screenshot()
            if screenshots.shows(picture, wanted):
                break
            cv2.imwrite(str(tmp_path / "live_view.png"), picture)
            assert time.monotonic() < deadline, f"not shown; picture in {tmp_path}"
        hosts = {
            address.split("/")[2].rsplit(":", 1)[0] for address in page.requested if "//" in address
        }
        assert hosts <= {"127.0.0.1", "localhost"}


def test_a_report_is_whole_on_a_phone_in_light_and_dark(bag):
    report, _ = write_report(bag)
    grounds = []
    for dark in (False, True):
        with screenshots.browser() as page:
            page.open(f"file://{report}", 390, 844, dark=dark)
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            widths = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
            assert len(widths) >= 5
            assert all(widths)
            grounds.append(page.screenshot()[:, 2].mean())
            asked = [a for a in page.requested if not a.startswith("data:")]
            assert asked == [f"file://{report}"]
    light, dark_ground = grounds
    assert light > 200
    assert dark_ground < 60


def test_the_list_of_reports_leads_to_a_report(bag):
    report, _ = write_report(bag)
    with screenshots.browser() as page:
        page.open(f"file://{bag.parent / 'index.html'}", 1000, 700)
        assert "Collection test" in page.evaluate("document.body.innerText")
        page.evaluate("document.querySelector('td a').click()")
        page.wait(1)
        assert page.evaluate("location.pathname") == str(report)
