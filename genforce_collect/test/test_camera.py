"""The camera driver against a server that speaks MJPEG, and against recordings."""

from __future__ import annotations

import math
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import cv2
import numpy as np
import pytest

from genforce_collect.config import CameraConfig
from genforce_collect.devices.camera import Camera, CameraFrame
from genforce_collect.devices.camera_sources import recorded_frames
from genforce_collect.errors import DeviceError

pytestmark = pytest.mark.live

PORT = 8090
FPS = 100.0


def picture(number: int) -> bytes:
    image = np.full((48, 64), number % 250, np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


class Server:
    """An MJPEG server written for these tests alone, with its faults as attributes."""

    def __init__(self, host: str, with_length: bool = True) -> None:
        self.address = (host, PORT)
        self.with_length = with_length
        self.frozen = self.silent = self.truncated = False
        self.number = 0
        self.skip = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{PORT}/stream"

    def start(self) -> None:
        server = self
        self.running = True

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=--frame")
                self.end_headers()
                try:
                    while server.running:
                        self.wfile.write(server.part())
                        time.sleep(1 / FPS)
                except OSError:
                    return

            def log_message(self, *_: object) -> None:
                return

        class Tcp(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._tcp = Tcp(self.address, Handler)
        threading.Thread(target=self._tcp.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.running = False
        self._tcp.shutdown()
        self._tcp.server_close()

    def part(self) -> bytes:
        if self.silent:
            return b""
        self.number += 1 + self.skip
        self.skip = 0
        jpeg = picture(0 if self.frozen else self.number)
        if self.truncated:
            jpeg = jpeg[: len(jpeg) // 2]
        head = f"--frame\r\nContent-Type: image/jpeg\r\nX-Frame: {self.number}\r\n"
        if self.with_length:
            head += f"Content-Length: {len(jpeg)}\r\nX-Timestamp: {self.number / FPS}\r\n"
        return head.encode() + b"\r\n" + jpeg + b"\r\n"


class Taken(list[CameraFrame]):
    """What a camera delivered."""

    def wait(self, condition: Callable[[Taken], bool], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition(self):
            assert time.monotonic() < deadline, "condition not met in time"
            time.sleep(0.01)


@pytest.fixture
def server(loopback_host: str) -> Iterator[Server]:
    server = Server(loopback_host)
    yield server
    server.stop()


@pytest.fixture
def taken() -> Taken:
    return Taken()


@pytest.fixture
def camera(server: Server, taken: Taken) -> Iterator[Camera]:
    camera = Camera(CameraConfig(source=server.url, fps=FPS), taken.append)
    camera.start()
    yield camera
    camera.stop()


def test_every_frame_is_delivered_as_the_camera_sent_it(camera: Camera, taken: Taken) -> None:
    taken.wait(lambda t: len(t) >= 50)
    first = round(taken[0].device_time * FPS)
    for index, frame in enumerate(list(taken)):
        assert frame.seq == index
        assert frame.jpeg == picture(first + index)
        assert frame.device_time == pytest.approx((first + index) / FPS)
        assert abs(frame.receive_ns - time.time_ns()) < 60e9
    health = camera.health()
    assert (health.message, health.usable, health.lost, health.broken) == ("", True, 0, 0)


def test_a_stream_without_lengths_is_cut_at_its_boundary(loopback_host: str, taken: Taken) -> None:
    server = Server(loopback_host, with_length=False)
    camera = Camera(CameraConfig(source=server.url, fps=FPS), taken.append)
    camera.start()
    taken.wait(lambda t: len(t) >= 20)
    camera.stop()
    server.stop()
    assert {frame.jpeg for frame in taken} <= {picture(number) for number in range(250)}
    assert all(math.isnan(frame.device_time) for frame in taken)


def test_a_camera_that_goes_away_is_taken_up_again(
    camera: Camera, taken: Taken, server: Server
) -> None:
    server.stop()
    taken.wait(lambda _: not camera.health().usable)
    assert server.url in camera.health().message
    before = len(taken)
    server.start()
    taken.wait(lambda t: len(t) > before + 10)
    assert camera.health().usable
    assert camera.health().reconnects >= 1
    assert [frame.seq for frame in taken] == list(range(len(taken)))


def test_a_silent_camera_is_noticed_and_opened_anew(
    camera: Camera, taken: Taken, server: Server
) -> None:
    server.silent = True
    taken.wait(lambda _: bool(camera.health().message))
    server.silent = False
    taken.wait(lambda _: camera.health().usable)


def test_a_frozen_camera_is_called_frozen_until_it_moves(
    camera: Camera, taken: Taken, server: Server
) -> None:
    server.frozen = True
    taken.wait(lambda _: "frozen" in camera.health().message)
    assert not camera.health().usable
    server.frozen = False
    taken.wait(lambda _: camera.health().usable)
    assert camera.health().repeated > 10


def test_a_cut_off_frame_is_delivered_and_counted(
    camera: Camera, taken: Taken, server: Server
) -> None:
    server.truncated = True
    taken.wait(lambda _: camera.health().broken >= 5)
    server.truncated = False
    assert [frame.seq for frame in taken] == list(range(len(taken)))


def test_frames_the_camera_numbered_and_never_sent_are_counted(
    camera: Camera, taken: Taken, server: Server
) -> None:
    server.skip = 7
    taken.wait(lambda _: camera.lost == 7)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("http://127.0.0.1:9/nothing", "camera.source"),
        ("/dev/video97", "plugged in"),
        ("/no/such/clip.mp4", "no such file"),
    ],
)
def test_a_missing_camera_is_named_with_its_remedy(source: str, words: str) -> None:
    camera = Camera(CameraConfig(source=source), lambda _: None)
    with pytest.raises(DeviceError, match=words) as caught:
        camera.start(2.0)
    assert source in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_page_that_is_no_camera_is_refused(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"not a video")
    with pytest.raises(DeviceError, match="not a video"):
        Camera(CameraConfig(source=str(clip)), lambda _: None).start()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        (tmp_path / f"frame_{number}.jpg").write_bytes(picture(number))
    return tmp_path


def test_a_folder_of_images_is_played_in_order_at_its_rate(folder: Path, taken: Taken) -> None:
    camera = Camera(CameraConfig(source=str(folder), fps=50), taken.append)
    camera.start()
    taken.wait(lambda _: camera.health().ended)
    camera.stop()
    assert [frame.jpeg for frame in taken] == [picture(number) for number in range(12)]
    assert (taken[-1].receive_ns - taken[0].receive_ns) / 1e9 == pytest.approx(11 / 50, abs=0.1)


def test_a_recording_is_played_again_when_asked(folder: Path, taken: Taken) -> None:
    camera = Camera(CameraConfig(source=str(folder), fps=200, loop=True), taken.append)
    camera.start()
    taken.wait(lambda t: len(t) > 30)
    camera.stop()
    assert taken[12].jpeg == taken[0].jpeg
    assert taken[24].device_time == pytest.approx(24 / 200)


def test_a_video_gives_every_frame(tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, (64, 48))
    for number in range(9):
        writer.write(np.full((48, 64, 3), 20 * number, np.uint8))
    writer.release()
    levels = [
        cv2.imdecode(np.frombuffer(jpeg, np.uint8), 0).mean() for jpeg in recorded_frames(path)
    ]
    assert levels == pytest.approx([20 * number for number in range(9)], abs=2)
