"""The camera node: what comes out of the wire stands on the topic."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import CompressedImage

from genforce_collect.markers.jpeg import decode_gray
from genforce_collect.nodes.common import NAMESPACE, from_stamp, spin_until, stream_qos
from genforce_msgs.msg import StreamTimes

pytestmark = pytest.mark.live

TIMEOUT_S = 20.0


@pytest.fixture
def listener() -> Iterator[tuple[Any, Callable[..., bool]]]:
    rclpy.init(args=[])
    node = rclpy.create_node("listener", namespace=NAMESPACE)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    yield node, lambda done, timeout_s=TIMEOUT_S: spin_until(executor, done, timeout_s)
    node.destroy_node()
    executor.shutdown()
    rclpy.try_shutdown()


@contextmanager
def started(**parameters: object) -> Iterator[subprocess.Popen[str]]:
    arguments = [text for key, value in parameters.items() for text in ("-p", f"{key}:={value}")]
    process = subprocess.Popen(
        [sys.executable, "-m", "genforce_collect.nodes.camera", "--ros-args", *arguments],
        env=os.environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(TIMEOUT_S)
        assert process.stderr is not None
        process.stderr.close()


def frames(folder: Path, count: int) -> list[bytes]:
    data = []
    for number in range(count):
        image = np.full((48, 64), 10 + number, np.uint8)
        data.append(cv2.imencode(".jpg", image)[1].tobytes())
        (folder / f"{number:04d}.jpg").write_bytes(data[-1])
    return data


def test_a_recording_goes_out_byte_for_byte_numbered_and_stamped(
    tmp_path: Path, listener: tuple[Any, Callable[..., bool]]
) -> None:
    node, spin = listener
    sent = frames(tmp_path, 240)
    got: list[Any] = []
    times: list[Any] = []
    node.create_subscription(
        CompressedImage, "array_1/image/compressed", got.append, stream_qos(120)
    )
    node.create_subscription(StreamTimes, "stream_times", times.append, stream_qos(100))
    before = time.time_ns()
    with started(source=tmp_path, fps=60.0) as process:
        assert spin(lambda: bool(got) and bytes(got[-1].data) == sent[-1])
        stamps = [from_stamp(message.header.stamp) for message in got]

        def all_reported() -> bool:  # from when the reports were discovered
            reported = {stamp for report in times for stamp in report.stamp_ns}
            return bool(reported) and {s for s in stamps if s >= min(reported)} <= reported

        assert spin(all_reported)
        assert process.poll() is None
    bodies = [bytes(message.data) for message in got]
    assert bodies == sent[-len(bodies) :]  # from when the listener was discovered
    assert len(bodies) > 10
    assert all(a < b for a, b in itertools.pairwise(stamps))
    assert before < stamps[0] < stamps[-1] < time.time_ns()
    assert {(m.format, m.header.frame_id) for m in got} == {("jpeg", "array_1")}
    assert np.diff(stamps).mean() / 1e9 == pytest.approx(1 / 60, rel=0.1)
    assert times[0].topic == "/genforce/array_1/image/compressed"


def test_deactivated_it_sets_the_camera_free_and_takes_it_up_again(
    tmp_path: Path, listener: tuple[Any, Callable[..., bool]]
) -> None:
    node, spin = listener
    frames(tmp_path, 60)
    got: list[Any] = []
    said: list[str] = []
    node.create_subscription(CompressedImage, "array_1/image/compressed", got.append, 10)
    node.create_subscription(
        DiagnosticArray, "/diagnostics", lambda m: said.append(m.status[0].message), 10
    )
    client = node.create_client(ChangeState, "camera/change_state")

    def change(transition: int) -> None:
        assert spin(client.service_is_ready)
        request = ChangeState.Request(transition=Transition(id=transition))
        answer = client.call_async(request)
        assert spin(answer.done)
        assert answer.result().success

    with started(source=tmp_path, fps=60.0, loop=True):
        assert spin(lambda: len(got) > 5)
        change(Transition.TRANSITION_DEACTIVATE)
        said.clear()
        assert spin(lambda: "not active" in said)
        got.clear()
        assert not spin(lambda: bool(got), 0.5)
        change(Transition.TRANSITION_ACTIVATE)
        assert spin(lambda: len(got) > 5)


def test_diagnostics_say_when_a_recording_has_ended(
    tmp_path: Path, listener: tuple[Any, Callable[..., bool]]
) -> None:
    node, spin = listener
    frames(tmp_path, 5)
    messages: list[str] = []
    node.create_subscription(
        DiagnosticArray,
        "/diagnostics",
        lambda report: messages.extend(status.message for status in report.status),
        10,
    )
    with started(source=tmp_path, fps=60.0):
        assert spin(lambda: any("end of the recording" in message for message in messages))


def test_a_missing_camera_ends_the_node_with_one_clear_line() -> None:
    with started(source="http://127.0.0.1:9/none") as process:
        assert process.wait(TIMEOUT_S) == 3
        assert process.stderr is not None
        lines = [line for line in process.stderr.read().splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "http://127.0.0.1:9/none" in lines[0]
    assert "camera.source" in lines[0]


def test_a_real_clip_runs_through_the_node(
    realdata: Path, listener: tuple[Any, Callable[..., bool]]
) -> None:
    node, spin = listener
    got: list[Any] = []
    node.create_subscription(
        CompressedImage, "array_1/image/compressed", got.append, stream_qos(120)
    )
    clip = realdata / "gelsight" / "half_out1013_193221.mp4"
    with started(source=clip, fps=30.0, loop=True):
        assert spin(lambda: len(got) >= 30)
    image = decode_gray(bytes(got[-1].data))
    assert image is not None
    assert image.shape == (720, 1280)
