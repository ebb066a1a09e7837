"""The live view: what goes into it comes out where a viewer looks for it."""

from __future__ import annotations

import array
import importlib
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import psutil
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import WrenchStamped
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage

from genforce_collect.bags import BagWriter, TopicSpec
from genforce_collect.config import SegmentationConfig, load_sensor
from genforce_collect.errors import ConfigError
from genforce_collect.markers.view import View as MarkerView
from genforce_collect.nodes.common import to_stamp
from genforce_collect.nodes.messages import message_class
from genforce_collect.trajectory import Phase
from genforce_collect.view import command
from genforce_collect.view.overview import Overview
from genforce_msgs.msg import Contact, Markers, StreamTimes

pytestmark = pytest.mark.live

try:
    rerun = importlib.import_module("rerun")
except ImportError:
    rerun = None

T0 = 1_700_000_000_000_000_000
MS = 1_000_000
MARKERS = np.stack(np.meshgrid(np.arange(8) * 60 + 100, np.arange(6) * 60 + 80), -1).reshape(-1, 2)


def stamped(message, ns: int):
    message.header.stamp = to_stamp(ns)
    return message


def wrench(ns: int, z: float) -> WrenchStamped:
    message = WrenchStamped()
    message.wrench.force.z = z
    return stamped(message, ns)


def markers(ns: int, shift: float = 0.0, flags: int = 0) -> Markers:
    x, y = (MARKERS + np.array([shift, 0])).T.astype(np.float32)
    message = Markers(height=480, width=640, expected=len(MARKERS), flags=flags)
    message.x, message.y = array.array("f", x.tobytes()), array.array("f", y.tobytes())
    message.mask = array.array("B", bytes(480 * 640 // 8))
    return stamped(message, ns)


def contact(ns: int, phase: Phase, index: int = 3, reason: str = "") -> Contact:
    message = Contact(sensor="array_1", indenter="sphere", index=index, total=10, phase=phase)
    message.reason = reason
    return stamped(message, ns)


def times(ns: int, first: int, count: int, lost: int = 0) -> StreamTimes:
    message = StreamTimes(topic="/genforce/netft/wrench", first_seq=first, device_lost=lost)
    message.stamp_ns = array.array("q", range(count))
    return stamped(message, ns)


# --- what is told -------------------------------------------------------------------------------


def test_a_rate_is_what_the_producer_counted_not_what_arrived():
    overview = Overview()
    for k in range(40):
        if k % 3:  # every third report is lost on its way
            overview.stream(T0 + k * 100 * MS, times(0, k * 100, 100))
    assert overview.rates()["netft/wrench"] == pytest.approx(1000, rel=1e-6)


def test_a_producer_that_starts_again_has_no_negative_rate():
    overview = Overview()
    for k in range(10):
        overview.stream(T0 + k * 100 * MS, times(0, k * 100, 100))
    for k in range(10):
        overview.stream(T0 + (k + 10) * 100 * MS, times(0, k * 100, 100))
    assert overview.rates()["netft/wrench"] == pytest.approx(1000, rel=1e-6)


def test_losses_broken_contacts_and_failing_nodes_are_events_once():
    overview = Overview()
    sick = DiagnosticArray()
    sick.status = [DiagnosticStatus(level=DiagnosticStatus.ERROR, name="netft", message="no data")]
    for k in range(3):
        overview.contact(T0 + k, contact(T0, Phase.INVALID, reason="protective stop"))
        overview.stream(T0 + k, times(0, k * 100, 100, lost=7))
        overview.diagnostics(T0 + k, sick)
    told = [(change.text, change.level) for change in overview.take_changes() if change.text]
    assert told == [
        ("contact 3 broken off: protective stop", "WARN"),
        ("netft/wrench: 7 samples lost between device and driver", "ERROR"),
        ("netft: no data", "ERROR"),
    ]
    assert overview.take_changes() == []
    assert "no data" in overview.page()


def test_the_page_tells_progress_recording_and_drops():
    overview = Overview()
    overview.contact(T0, contact(T0, Phase.SHEAR_INC))
    lost = SimpleNamespace(
        topics=["/genforce/netft/wrench"], lost=[2], recording=True, error="",
        duration=12.0, bytes_written=5e6, bytes_free=8e9,
    )  # fmt: skip
    overview.recorder(T0, lost)
    for k in range(3):
        overview.stream(T0 + k * 100 * MS, times(0, k * 100, 100, lost=5))
    page = overview.page()
    assert "contact 4 of 10: shear inc" in page
    assert "**2 lost**" in page
    assert "| netft/wrench | 1000.0 | 7 |" in page


def test_nothing_is_told_of_a_recorder_that_was_not_heard():
    """As of a bag, which holds no status of its recorder."""
    overview = Overview()
    overview.contact(T0, contact(T0, Phase.SHEAR_INC))
    assert "recording" not in overview.page()


# --- where markers lie --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        SegmentationConfig(frame_width=640, frame_height=480),
        SegmentationConfig(frame_width=1280, frame_height=720),
        SegmentationConfig(frame_width=800, frame_height=600, crop_px=(100, 50, 600, 450)),
        SegmentationConfig(
            frame_width=800,
            frame_height=600,
            corners_px=((90, 60), (720, 40), (740, 560), (70, 540)),
            distortion=(0.04, 0.01),
        ),
    ],
    ids=["as it is", "scaled", "cropped", "rectified"],
)
def test_a_marker_found_in_the_view_is_drawn_where_it_is_in_the_frame(config):
    spot = np.array([310.0, 260.0])
    frame = np.zeros((config.frame_height, config.frame_width), np.uint8)
    cv2.circle(frame, tuple(int(v) for v in spot), 12, 255, cv2.FILLED)
    view = MarkerView(config)
    weights = view.apply(frame).astype(float)
    v, u = np.indices(weights.shape)
    found = np.array([(u * weights).sum(), (v * weights).sum()]) / weights.sum()
    assert view.to_frame(found)[0] == pytest.approx(spot, abs=0.6)


# --- the scene ----------------------------------------------------------------------------------


class Drawn:
    """A scene into a file, and what is in the file."""

    def __init__(self, path: Path, sensor: str = "array_1", image_rate_hz: float = 10.0) -> None:
        from genforce_collect.view.scene import Scene

        self._path = path
        self._recording = rerun.RecordingStream("test")
        self._recording.save(path)
        self.scene = Scene(self._recording, load_sensor(sensor), parse, image_rate_hz)

    def add(self, topic: str, message) -> None:
        self.scene.add(topic, serialize_message(message))

    def column(self, entity: str, component: str) -> list:
        """Values of a component of an entity, in order of time. Ends the scene."""
        self.scene.flush()
        self._recording.disconnect()
        rows = []
        for chunk in rerun.chunk.RrdReader(self._path).stream():
            if chunk.entity_path == f"/{entity}" and not chunk.is_static:
                batch = chunk.to_record_batch()
                names = [name for name in batch.schema.names if name.endswith(component)]
                for name in names:
                    rows += zip(
                        batch["time"].cast("int64").to_pylist(),
                        batch[name].to_pylist(),
                        strict=True,
                    )
        return [value for _, value in sorted(rows, key=lambda row: row[0]) if value is not None]


def parse(data: bytes, type_name: str):
    return deserialize_message(data, message_class(type_name))


needs_rerun = pytest.mark.skipif(
    rerun is None, reason="Rerun is not installed (requirements/view.txt)"
)


@needs_rerun
def test_every_sample_of_the_force_sensor_is_in_the_plot(tmp_path):
    drawn = Drawn(tmp_path / "scene.rrd")
    for k in range(250):
        drawn.add("/genforce/netft/wrench", wrench(T0 + k * MS, -k / 100))
        if k % 40 == 0:
            drawn.scene.flush()
    values = drawn.column("force/z/measured", "Scalars:scalars")
    assert [value[0] for value in values] == pytest.approx([-k / 100 for k in range(250)])


@needs_rerun
def test_frames_and_their_markers_are_thinned_out_alike(tmp_path):
    drawn = Drawn(tmp_path / "scene.rrd")
    for k in range(120):  # 2 s at 60 fps
        stamp = T0 + k * 16_666_667
        image = CompressedImage(format="jpeg", data=array.array("B", b"jpeg %03d" % k))
        drawn.add("/genforce/array_1/image/compressed", stamped(image, stamp))
        drawn.add("/genforce/array_1/markers", markers(stamp, shift=k / 10))
    images = drawn.column("camera/image", "EncodedImage:blob")
    assert 20 <= len(images) <= 21
    places = drawn.column("camera/image/markers", "Points2D:positions")
    assert len(places) == len(images)
    shown = [int(bytes(image[0])[-3:]) for image in images]
    shifts = [place[0][0] - MARKERS[0][0] - 0.5 for place in places]
    assert shifts == pytest.approx([k / 10 for k in shown], abs=1e-3)


@needs_rerun
def test_displacement_is_from_the_frame_before_the_contact(tmp_path):
    drawn = Drawn(tmp_path / "scene.rrd", image_rate_hz=1000)
    topic = "/genforce/array_1/markers"
    drawn.add(topic, markers(T0, shift=0))
    drawn.add(topic, markers(T0 + 20 * MS, shift=5))
    drawn.add("/genforce/contact", contact(T0 + 30 * MS, Phase.APPROACH))
    drawn.add(topic, markers(T0 + 40 * MS, shift=2, flags=Markers.FLAG_BLURRED))
    drawn.add(topic, markers(T0 + 60 * MS, shift=1))
    drawn.add(topic, markers(T0 + 80 * MS, shift=4))
    arrows = drawn.column("camera/image/displacement", "Arrows2D:vectors")
    assert [np.mean(vectors, axis=0)[0] for vectors in arrows] == pytest.approx([0, 5, 0, 3])


@needs_rerun
def test_what_changes_is_a_lane_and_what_fails_a_line(tmp_path):
    drawn = Drawn(tmp_path / "scene.rrd")
    for k, phase in enumerate((Phase.APPROACH, Phase.DOWN, Phase.DOWN, Phase.INVALID)):
        drawn.add("/genforce/contact", contact(T0 + k * MS, phase, reason="force"))
    assert drawn.column("states/contact", "StateChange:state") == [
        ["approach"],
        ["down"],
        ["invalid"],
    ]
    assert drawn.column("events", "TextLog:text") == [["contact 3 broken off: force"]]


# --- the server ---------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def view(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "genforce_bringup.cli", "view", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    writer = BagWriter(tmp_path / "bag", {"sensor": "array_1"})
    writer.add_topic(TopicSpec("/genforce/netft/wrench", "geometry_msgs/msg/WrenchStamped"))
    for k in range(100):
        writer.write("/genforce/netft/wrench", serialize_message(wrench(T0 + k * MS, 1)), T0 + k)
    writer.close()
    return tmp_path / "bag"


@needs_rerun
@pytest.mark.parametrize("source", ["bag", "live"])
def test_the_view_is_served_on_loopback_alone_and_ends_with_the_command(source, bag):
    port = free_port()
    process = view(*([str(bag)] if source == "bag" else []), "--port", str(port))
    try:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/?url=" in line, process.stderr.read()
        (server,) = psutil.Process(process.pid).children()
        listening = {
            (c.laddr.ip, c.laddr.port)
            for one in (psutil.Process(process.pid), server)
            for c in one.net_connections()
            if c.status == "LISTEN" and c.laddr.port in {port, port + 1}
        }
        assert listening == {("127.0.0.1", port), ("127.0.0.1", port + 1)}
        open_wide = [c.laddr for c in server.net_connections() if c.laddr.ip != "127.0.0.1"]
        assert open_wide == []
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10) as page:
            assert "connect-src 'self'" in page.headers["Content-Security-Policy"]
            text = page.read()
        assert b"<html" in text
        assert not re.search(rb"<link[^>]*https://", text)
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
        psutil.wait_procs([server], timeout=10)
        assert not server.is_running()
    finally:
        process.kill()


@needs_rerun
def test_the_server_ends_with_a_view_that_is_killed(bag):
    process = view(str(bag), "--port", str(free_port()))
    process.stdout.readline()
    (server,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs([server], timeout=10)
    assert not alive


@needs_rerun
def test_a_port_that_is_taken_is_named_with_the_way_out(bag):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = view(str(bag), "--port", str(port))
        _, error = process.communicate(timeout=60)
    assert process.returncode == ConfigError.exit_code
    assert f"port {port} cannot be used" in error
    assert "--port" in error


def test_without_rerun_the_error_names_the_extra(bag, monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements/view\.txt"):
        command.show_bag(bag, None, free_port())
