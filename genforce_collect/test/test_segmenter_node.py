"""The segmenter node: one marker image a frame, the same as offline."""

from __future__ import annotations

import array
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import CompressedImage
from std_srvs.srv import Trigger

from genforce_collect.config import load_sensor
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.packing import pack_mask
from genforce_collect.markers.reference import ReferenceTaker
from genforce_collect.nodes.common import NAMESPACE, from_stamp, spin_until, stream_qos, to_stamp
from genforce_msgs.msg import Markers, Taxels

pytestmark = pytest.mark.live

TIMEOUT_S = 20.0
REFERENCE_FRAMES = 3


class Rig:
    """A segmenter in a process of its own, and both ends of its topics."""

    def __init__(self, sensor: str, message_type: type, topic: str) -> None:
        rclpy.init(args=[])
        self.node = rclpy.create_node("rig", namespace=NAMESPACE)
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.markers: list[Any] = []
        qos = stream_qos(120)
        self.publisher = self.node.create_publisher(message_type, f"{sensor}/{topic}", qos)
        self.node.create_subscription(Markers, f"{sensor}/markers", self.markers.append, qos)
        parameters = (f"sensor:={sensor}", f"reference_frames:={REFERENCE_FRAMES}")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "genforce_collect.nodes.segmenter", "--ros-args"]
            + [text for parameter in parameters for text in ("-p", parameter)],
            env=os.environ,
        )
        self.wait(
            lambda: (
                self.publisher.get_subscription_count() > 0
                and self.node.count_publishers(f"{sensor}/markers") > 0
            )
        )

    def wait(self, done: Callable[[], bool]) -> None:
        assert spin_until(self.executor, done, TIMEOUT_S), "condition not met in time"

    def send(self, message: Any, age_s: float = 0.0) -> int:
        stamp_ns = time.time_ns() - round(age_s * 1e9)
        message.header.stamp = to_stamp(stamp_ns)
        message.header.frame_id = "camera"
        self.publisher.publish(message)
        return stamp_ns

    def send_jpeg(self, data: bytes, age_s: float = 0.0) -> int:
        return self.send(CompressedImage(format="jpeg", data=array.array("B", data)), age_s)

    def ask_for_reference(self, sensor: str) -> None:
        client = self.node.create_client(Trigger, f"{sensor}/set_reference")
        self.wait(client.service_is_ready)
        future = client.call_async(Trigger.Request())
        self.wait(future.done)
        assert future.result().success

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(TIMEOUT_S) == 0
        self.node.destroy_node()
        self.executor.shutdown()
        rclpy.try_shutdown()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig("array_1", CompressedImage, "image/compressed")
    yield rig
    rig.close()


def test_every_frame_in_a_burst_gets_the_marker_image_it_gets_offline(
    rig: Rig, draw_markers: Callable[..., Any]
) -> None:
    frames = [draw_markers(diameter=16, seed=seed).jpeg for seed in range(40)]
    frames[20] = frames[20][:2000]
    frames[21] = b"no image"
    stamps = [rig.send_jpeg(data) for data in frames]
    rig.wait(lambda: len(rig.markers) == len(frames))
    offline = Frontend(load_sensor("array_1"))
    taker = ReferenceTaker(offline, REFERENCE_FRAMES)
    taker.begin()
    for index, (data, message) in enumerate(zip(frames, rig.markers, strict=True)):
        expected = offline.process_jpeg(data)
        taker.offer(expected)
        assert message.seq == index
        assert from_stamp(message.header.stamp) == stamps[index]
        assert message.header.frame_id == "camera"
        assert bytes(message.mask) == pack_mask(expected.mask).tobytes()
        assert np.asarray(message.x).tobytes() == expected.x.tobytes()
        assert np.asarray(message.y).tobytes() == expected.y.tobytes()
        assert (message.flags, message.expected) == (expected.flags, expected.expected)
    assert rig.markers[20].flags & Markers.FLAG_DECODE_ERROR
    assert rig.markers[21].flags & Markers.FLAG_DECODE_ERROR
    assert rig.markers[-1].expected == 165


def show(rig: Rig, draw_markers: Callable[..., Any], age_s: float = 0.0, **drawing: Any) -> None:
    """Enough frames for a reference and one more, and wait for their marker images."""
    wanted = len(rig.markers) + REFERENCE_FRAMES + 1
    for seed in range(REFERENCE_FRAMES + 1):
        rig.send_jpeg(draw_markers(diameter=16, seed=seed, **drawing).jpeg, age_s)
    rig.wait(lambda: len(rig.markers) == wanted)


def test_the_reference_is_taken_anew_on_request(rig: Rig, draw_markers: Callable[..., Any]) -> None:
    show(rig, draw_markers)
    rig.ask_for_reference("array_1")
    fewer = draw_markers().points[:120]
    show(rig, draw_markers, points=fewer)
    assert [message.expected for message in rig.markers[-2:]] == [165, 120]
    assert rig.markers[-2].flags & Markers.FLAG_TOO_FEW
    assert rig.markers[-1].flags == 0


@pytest.mark.parametrize(("age_s", "expected"), [(5.0, 165), (1e6, 120)], ids=["late", "replayed"])
def test_frames_from_before_the_request_are_not_taken_for_the_reference(
    rig: Rig, draw_markers: Callable[..., Any], age_s: float, expected: int
) -> None:
    show(rig, draw_markers)
    rig.ask_for_reference("array_1")
    pressed = draw_markers().points[:120]
    show(rig, draw_markers, age_s, points=pressed)
    assert rig.markers[-1].expected == expected


def test_taxels_that_were_still_pressed_before_the_request_are_no_baseline() -> None:
    rig = Rig("uskin", Taxels, "taxels")
    rest = np.arange(48) + 30000
    pressed = rest.copy()
    pressed[2::3] += 500

    def send(counts: Any, age_s: float = 0.0) -> None:
        data = array.array("i", counts.tolist())
        rig.send(Taxels(rows=4, cols=4, axes=3, counts=data), age_s)

    send(rest)
    rig.wait(lambda: len(rig.markers) == 1)
    rig.ask_for_reference("uskin")
    send(pressed, age_s=5.0)
    send(rest)
    send(pressed)
    rig.wait(lambda: len(rig.markers) == 4)
    rig.close()
    assert np.mean(rig.markers[3].area) > 3 * np.mean(rig.markers[2].area)


def test_taxels_are_drawn_as_markers() -> None:
    rig = Rig("uskin", Taxels, "taxels")
    rest = np.arange(48) + 30000
    pressed = rest.copy()
    pressed[2::3] += 500
    for counts in (rest, rest + 1, rest, pressed):
        rig.send(Taxels(rows=4, cols=4, axes=3, counts=array.array("i", counts.tolist())))
    rig.wait(lambda: len(rig.markers) == 4)
    rig.close()
    assert [len(message.x) for message in rig.markers] == [16] * 4
    assert np.mean(rig.markers[3].area) > 3 * np.mean(rig.markers[0].area)
