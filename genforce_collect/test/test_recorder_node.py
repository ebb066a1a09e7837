"""The recorder as a process: nothing lost at the demo's rates, and a whole bag however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rclpy
from geometry_msgs.msg import PoseStamped, WrenchStamped
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rosbags.highlevel import AnyReader
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import String

from genforce_collect.bags import BagReader
from genforce_collect.nodes.common import (
    LATCHED_QOS,
    NAMESPACE,
    Stream,
    await_answer,
    spin_until,
    to_stamp,
)
from genforce_collect.verification import verify
from genforce_msgs.msg import Markers, RecorderStatus, RobotState
from genforce_msgs.srv import StartRecording, StopRecording

pytestmark = pytest.mark.live

PATIENCE_S = 60.0  # a test that waits this long has failed, however busy the machine
# By its file, whose topics are those of the name in it.
SENSOR = Path(__file__).parents[2] / "launch" / "config" / "sensors" / "array_1.yaml"
IMAGE = f"/{NAMESPACE}/array_1/image/compressed"
WRENCH = f"/{NAMESPACE}/netft/wrench"


class Producers(Node):
    """The streams of a session, at the demo's rates."""

    def __init__(self) -> None:
        super().__init__("producers", namespace=NAMESPACE)
        image = CompressedImage(format="jpeg", data=array("B", os.urandom(40_000)))
        markers = Markers(height=480, width=640, mask=array("B", bytes(38_400)))
        self.streams = {
            "wrench": (Stream(self, WrenchStamped, WRENCH, 1000), 1000, WrenchStamped()),
            "pose": (Stream(self, PoseStamped, "robot/tcp_pose", 500), 500, PoseStamped()),
            "image": (Stream(self, CompressedImage, IMAGE, 30), 30, image),
            "markers": (Stream(self, Markers, "array_1/markers", 30), 30, markers),
        }
        self.published: dict[str, list[int]] = {name: [] for name in self.streams}
        state = self.create_publisher(RobotState, "robot/state", LATCHED_QOS)
        state.publish(RobotState(ready=True))
        self.note = self.create_publisher(String, "note", 10)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        begun = time.monotonic()
        while not self._done.wait(0.001):
            elapsed = time.monotonic() - begun
            for name, (stream, rate, message) in self.streams.items():
                while len(self.published[name]) < elapsed * rate:
                    now = time.time_ns()
                    message.header.stamp = to_stamp(now)
                    stream.publish(message)
                    self.published[name].append(now)

    def close(self) -> None:
        self._done.set()
        self._thread.join()


class Rig:
    """Producers, the recorder process, and a client of its services."""

    def __init__(self) -> None:
        self.executor = EventsExecutor()
        self.producers = Producers()
        self.node = rclpy.create_node("client", namespace=NAMESPACE)
        self.executor.add_node(self.producers)
        self.executor.add_node(self.node)
        self.statuses: list[RecorderStatus] = []
        self.node.create_subscription(
            RecorderStatus, "recorder/status", self.statuses.append, LATCHED_QOS
        )
        self.start_client = self.node.create_client(StartRecording, "recorder/start")
        self.process: subprocess.Popen[bytes] | None = None
        self.stop_client = self.node.create_client(StopRecording, "recorder/stop")

    def launch(self, *parameters: str) -> None:
        words = [word for p in (f"sensor:={SENSOR}", *parameters) for word in ("-p", p)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "genforce_collect.nodes.recorder", "--ros-args", *words]
        )
        self.statuses.clear()
        assert self.spin(lambda: bool(self.statuses), PATIENCE_S)
        # Every stream has been seen by its subscription before a recording begins.
        assert self.spin(self._subscribed, PATIENCE_S)
        assert await_answer(self.executor, self.node, "recorder_services", PATIENCE_S)

    def _subscribed(self) -> bool:
        names = [WRENCH, IMAGE, f"/{NAMESPACE}/robot/tcp_pose", f"/{NAMESPACE}/array_1/markers"]
        return all(
            any(i.node_name == "recorder" for i in self.node.get_subscriptions_info_by_topic(n))
            for n in names
        )

    def spin(self, done: Callable[[], bool], timeout_s: float) -> bool:
        return spin_until(self.executor, done, timeout_s)

    def wait(self, seconds: float) -> None:
        self.spin(lambda: False, seconds)

    def start(self, bag: Path, **more) -> StartRecording.Response:
        assert self.spin(self.start_client.service_is_ready, PATIENCE_S)
        answer = self.start_client.call_async(StartRecording.Request(bag=str(bag), **more))
        assert self.spin(answer.done, PATIENCE_S)
        return answer.result()

    def stop(self) -> StopRecording.Response:
        assert self.spin(self.stop_client.service_is_ready, PATIENCE_S)
        answer = self.stop_client.call_async(StopRecording.Request())
        assert self.spin(answer.done, PATIENCE_S)
        return answer.result()

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(PATIENCE_S)
            self.process = None

    def close(self) -> None:
        self.end()
        self.producers.close()
        self.producers.destroy_node()
        self.node.destroy_node()
        self.executor.shutdown()


@pytest.fixture(scope="module")
def shared_rig() -> Iterator[Rig]:
    rclpy.init()
    rig = Rig()
    try:
        yield rig
    finally:
        rig.close()
        rclpy.shutdown()


@pytest.fixture
def rig(shared_rig: Rig) -> Rig:
    """With a recorder that runs and records nothing."""
    if shared_rig.process is None or shared_rig.process.poll() is not None:
        shared_rig.launch()
    return shared_rig


def test_every_stream_is_recorded_without_a_loss_and_counted_exactly(rig: Rig, tmp_path: Path):
    bag = tmp_path / "bag"
    assert rig.start(bag, metadata='{"session": "x"}').success
    begun = time.time_ns()
    rig.wait(4.0)
    ended = time.time_ns()
    held = rig.stop()
    assert held.success, held.message
    assert sum(held.lost) == 0
    with AnyReader([bag]) as reader:  # any ROS 2 tool reads it
        counts = {c.topic: c.msgcount for c in reader.connections}
        assert sum(1 for _ in reader.messages()) == sum(counts.values())
    assert dict(zip(held.topics, held.received, strict=True)) == counts
    with BagReader(bag) as reader:
        for name, topic in (("wrench", WRENCH), ("image", IMAGE)):
            recorded = {r.stamp_ns for r in reader.raw([topic])}
            expected = {s for s in rig.producers.published[name] if begun <= s <= ended}
            assert expected <= recorded
        assert reader.metadata["session"] == "x"
    report = verify(bag)
    assert report.ok, report.problems
    assert {t.name: t.lost for t in report.topics}[WRENCH] == 0
    assert any(s.recording and len(s.topics) >= 4 for s in rig.statuses)


def test_sigterm_drains_and_closes_the_bag(rig: Rig, tmp_path: Path):
    bag = tmp_path / "bag"
    assert rig.start(bag).success
    rig.wait(1.0)
    before = time.time_ns()
    rig.process.send_signal(signal.SIGTERM)
    assert rig.process.wait(PATIENCE_S) == 0
    report = verify(bag)
    assert "repaired" not in report.metadata
    topics = {t.name: t for t in report.topics}
    # What was published up to the signal is in the bag.
    with BagReader(bag) as reader:
        recorded = {r.stamp_ns for r in reader.raw([WRENCH])}
    sent = {s for s in rig.producers.published["wrench"] if s < before - 50_000_000}
    started = report.metadata["start_ns"]
    assert {s for s in sent if s > started} <= recorded
    assert topics[WRENCH].received > 500


def test_a_killed_recorder_leaves_all_but_the_last_second(rig: Rig, tmp_path: Path):
    bag = tmp_path / "bag"
    assert rig.start(bag).success
    rig.wait(2.5)
    rig.process.kill()
    killed = time.time_ns()
    rig.process.wait()
    assert not (bag / "metadata.yaml").exists()
    report = verify(bag)  # repairs on opening
    assert any("died" in problem for problem in report.problems)
    with BagReader(bag) as reader:
        stamps = [r.stamp_ns for r in reader.raw([WRENCH])]
    assert killed - stamps[-1] < 1_000_000_000
    assert {t.name: t.lost for t in report.topics}[WRENCH] == 0
    rig.launch()
    assert rig.start(tmp_path / "next").success  # life goes on
    rig.wait(0.5)
    assert rig.stop().success


def test_wrong_requests_are_answered_in_one_line(rig: Rig, tmp_path: Path):
    assert "nothing is being recorded" in rig.stop().message
    assert "not JSON" in rig.start(tmp_path / "a", metadata="{").message
    assert "/nowhere" in rig.start(Path("/nowhere/bag")).message
    assert "not subscribed" in rig.start(tmp_path / "b", topics=["/unknown"]).message
    assert rig.start(tmp_path / "c", topics=[WRENCH]).success
    assert "being recorded" in rig.start(tmp_path / "d").message
    rig.wait(0.5)
    held = rig.stop()
    assert held.topics == [WRENCH]
    assert "exists already" in rig.start(tmp_path / "c").message


@pytest.mark.parametrize("topic", [f"/{NAMESPACE}/note", "note"])
def test_parameters_add_topics_and_guard_the_disk(rig: Rig, tmp_path: Path, topic: str):
    rig.end()
    rig.launch(f"topics:=['{topic}']")
    assert rig.spin(lambda: rig.producers.note.get_subscription_count() > 0, PATIENCE_S)
    assert rig.start(tmp_path / "bag").success
    rig.producers.note.publish(String(data="hello"))
    rig.wait(0.3)
    held = rig.stop()
    assert dict(zip(held.topics, held.received, strict=True))[f"/{NAMESPACE}/note"] == 1
    rig.end()
    rig.launch(f"min_free_mb:={2**40}")
    assert "free" in rig.start(tmp_path / "full").message
    rig.end()


def test_record_command_needs_no_client_and_verifies_what_it_wrote(rig: Rig, tmp_path: Path):
    rig.end()
    words = f"['--out', {str(tmp_path / 'free')!r}, '--seconds', '6']"
    script = (
        "import argparse, sys\n"
        "from genforce_collect import record_cli\n"
        "parser = argparse.ArgumentParser()\n"
        "record_cli.add_arguments(parser)\n"
        f"sys.exit(record_cli.run(parser.parse_args({words})))\n"
    )
    rig.process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert rig.spin(lambda: rig.process.poll() is not None, PATIENCE_S)
    assert rig.process.returncode == 0
    assert rig.process.stdout is not None
    assert b"nothing lost" in rig.process.stdout.read()
    report = verify(tmp_path / "free")
    assert {t.name: t.received for t in report.topics}[WRENCH] > 500
