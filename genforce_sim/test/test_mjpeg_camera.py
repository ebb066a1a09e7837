"""The virtual camera, seen by clients that know nothing of this project."""

from __future__ import annotations

import itertools
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import pytest

from genforce_collect.errors import DeviceError
from genforce_sim.devices.mjpeg_camera import MjpegCamera

pytestmark = pytest.mark.live

FPS = 100.0
PORT = 8080


@dataclass(frozen=True)
class Shot:
    capture_ns: int
    jpeg: bytes


class Numbers:
    """Frames whose brightness counts up, on an absolute schedule."""

    def __init__(self) -> None:
        self.taken = 0
        self._start = time.monotonic()

    def next_shot(self, timeout_s: float) -> Shot:
        self.taken += 1
        time.sleep(max(0.0, self._start + self.taken / FPS - time.monotonic()))
        image = np.full((48, 64), self.taken % 250, np.uint8)
        return Shot(time.time_ns(), cv2.imencode(".jpg", image)[1].tobytes())


@pytest.fixture
def camera(loopback_host: str) -> Iterator[MjpegCamera]:
    with MjpegCamera(loopback_host, PORT, Numbers(), FPS) as served:
        served.url = f"http://{loopback_host}:{PORT}/stream.mjpg"  # type: ignore[attr-defined]
        yield served


def parts(url: str, stop: threading.Event | None = None) -> Iterator[tuple[dict[str, str], bytes]]:
    """Headers and body of each part, read with urllib."""
    with urllib.request.urlopen(url, timeout=5) as stream:
        while stop is None or not stop.is_set():
            headers = {}
            for line in iter(stream.readline, b"\r\n"):
                if not line:
                    return
                if b":" in line:
                    key, value = line.decode().split(":", 1)
                    headers[key] = value.strip()
            if headers:
                yield headers, stream.read(int(headers["Content-Length"]))


def first(url: str, wanted: Callable[[bytes], bool], limit: int = 300) -> bytes:
    for _, (_, body) in zip(range(limit), parts(url), strict=False):
        if wanted(body):
            return body
    raise AssertionError("no such frame")


def test_opencv_opens_it_by_url(camera: MjpegCamera) -> None:
    capture = cv2.VideoCapture(camera.url)
    frames = [capture.read() for _ in range(5)]
    capture.release()
    assert all(ok and frame.shape == (48, 64, 3) for ok, frame in frames)
    levels = [int(frame.mean()) for _, frame in frames]
    assert levels == sorted(set(levels))


def test_every_client_gets_every_frame_with_its_number_and_capture_time(
    camera: MjpegCamera,
) -> None:
    def take(results: list[dict[str, str]]) -> None:
        for _, (headers, _) in zip(range(40), parts(camera.url), strict=False):
            results.append(headers)

    seen: list[list[dict[str, str]]] = [[], [], []]
    threads = [threading.Thread(target=take, args=(results,)) for results in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for results in seen:
        numbers = [int(headers["X-Frame"]) for headers in results]
        assert numbers == list(range(numbers[0], numbers[0] + 40))
        times = [float(headers["X-Timestamp"]) for headers in results]
        assert times == sorted(times)
        assert abs(times[-1] - time.time()) < 10
    assert camera.overrun == 0


def test_frames_keep_the_rate_of_their_source(camera: MjpegCamera) -> None:
    times = [float(h["X-Timestamp"]) for _, (h, _) in zip(range(60), parts(camera.url))]  # noqa: B905
    assert 59 / (times[-1] - times[0]) == pytest.approx(FPS, rel=0.1)


def test_a_frozen_camera_repeats_its_picture(camera: MjpegCamera) -> None:
    stream = parts(camera.url)
    next(stream)
    camera.freeze()
    bodies = [next(stream)[1] for _ in range(60)]
    assert len(set(bodies[-20:])) == 1
    camera.freeze(False)
    bodies = [next(stream)[1] for _ in range(60)]
    assert len(set(bodies[-20:])) == 20


def test_a_cut_off_frame_has_a_start_and_no_end(camera: MjpegCamera) -> None:
    camera.truncate(1000)
    body = first(camera.url, lambda jpeg: not jpeg.endswith(b"\xff\xd9"))
    assert body.startswith(b"\xff\xd8")


def test_a_garbled_frame_is_no_image(camera: MjpegCamera) -> None:
    camera.garble(1000)
    body = first(camera.url, lambda jpeg: not jpeg.startswith(b"\xff\xd8"))
    assert cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR) is None


def test_dropped_frames_leave_a_gap_in_time_only(camera: MjpegCamera) -> None:
    stream = parts(camera.url)
    first_time = float(next(stream)[0]["X-Timestamp"])
    camera.drop(30)
    times = [first_time, *(float(next(stream)[0]["X-Timestamp"]) for _ in range(60))]
    assert max(np.diff(times)) > 25 / FPS


def test_it_disappears_and_comes_back_on_the_same_port(camera: MjpegCamera) -> None:
    stream = parts(camera.url)
    next(stream)
    camera.disappear()
    assert len(list(itertools.islice(stream, 500))) < 500
    with pytest.raises(OSError):  # noqa: PT011
        urllib.request.urlopen(camera.url, timeout=1)
    camera.come_back()
    assert next(parts(camera.url))[1].startswith(b"\xff\xd8")


def test_a_port_in_use_is_named(loopback_host: str) -> None:
    with socket.socket() as holder:
        holder.bind((loopback_host, PORT))
        holder.listen()
        with pytest.raises(DeviceError, match=rf"{loopback_host}:{PORT}.*camera_port"):
            MjpegCamera(loopback_host, PORT, Numbers(), FPS)
