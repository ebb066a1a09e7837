"""A virtual network camera: multipart MJPEG over HTTP, as browsers, OpenCV and ffmpeg open it.

Each part carries its time of capture on the camera's clock as `X-Timestamp` (s), the way common
MJPEG streamers do, and the frame's number as `X-Frame`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol

from genforce_collect.errors import DeviceError

BOUNDARY = "genforceframe"
BACKLOG_S = 2.5  # a client that stalls for less loses nothing
MIN_BACKLOG = 64
IDLE_S = 0.1  # how often an idle thread looks whether it is to end
WRITE_TIMEOUT_S = 5.0  # a client that takes nothing for longer is hung up on
GARBLED_BYTES = 64


class Shot(Protocol):
    """A frame: when it was captured (host system time, ns) and its JPEG."""

    @property
    def capture_ns(self) -> int: ...

    @property
    def jpeg(self) -> bytes: ...


class ShotSource(Protocol):
    """Where frames come from, each at its time of capture."""

    def next_shot(self, timeout_s: float) -> Shot | None:
        """Wait for the next frame; None where none comes in time."""
        ...


@dataclass(frozen=True)
class _Part:
    number: int
    capture_ns: int
    jpeg: bytes

    def encode(self) -> bytes:
        head = (
            f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(self.jpeg)}\r\n"
            f"X-Timestamp: {self.capture_ns // 10**9}.{self.capture_ns % 10**9:09d}\r\n"
            f"X-Frame: {self.number}\r\n\r\n"
        )
        return head.encode() + self.jpeg + b"\r\n"


class MjpegCamera:
    """Serves every frame of `source` to any number of clients until `close`; any path will do.

    The fault methods may be called at any time from any thread.
    """

    def __init__(self, host: str, port: int, source: ShotSource, fps: float) -> None:
        """Open the port and start serving. Raises `DeviceError` where the port is in use."""
        self.sent = 0  # frames put out, to however many clients
        self._source = source
        self._address = (host, port)
        self._backlog = max(MIN_BACKLOG, round(BACKLOG_S * fps))
        self._lock = threading.Lock()  # guards the clients, their count and the faults
        self._clients: set[queue.Queue[_Part]] = set()
        self._overrun = 0
        self._closed = threading.Event()
        self._drop = self._truncate = self._garble = 0
        self._frozen = False
        self._stalled = False
        self._last: _Part | None = None
        self._server: _Server | None = None
        self._serve()
        self._pump = threading.Thread(target=self._run, name="camera-frames", daemon=True)
        self._pump.start()

    def __enter__(self) -> MjpegCamera:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def overrun(self) -> int:
        """Frames that clients were too slow to take."""
        return self._overrun

    @property
    def clients(self) -> int:
        """Clients connected now."""
        with self._lock:
            return len(self._clients)

    def close(self) -> None:
        """Hang up on all clients and free the port."""
        self._closed.set()
        self.disappear()
        self._pump.join()

    # --- faults -------------------------------------------------------------------------------

    def freeze(self, on: bool = True) -> None:
        """Repeat the last picture in every frame, with times that go on."""
        self._frozen = on

    def stall(self, on: bool = True) -> None:
        """Keep the connections open and send nothing."""
        self._stalled = on

    def drop(self, frames: int) -> None:
        """Lose the next frames, numbered as they are."""
        with self._lock:
            self._drop = frames

    def truncate(self, frames: int) -> None:
        """Cut each of the next frames off in the middle."""
        with self._lock:
            self._truncate = frames

    def garble(self, frames: int) -> None:
        """Overwrite a part of each of the next frames, their ends included."""
        with self._lock:
            self._garble = frames

    def disappear(self) -> None:
        """Hang up on all clients and refuse new ones, as if unplugged."""
        server, self._server = self._server, None
        if server is None:
            return
        server.stopped.set()
        server.shutdown()
        server.server_close()

    def come_back(self) -> None:
        """Serve again on the same port. Raises `DeviceError` where it has been taken."""
        if self._server is None:
            self._serve()

    # --- serving ------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._server = _Server(self._address, self)
        except OSError as error:
            host, port = self._address
            raise DeviceError(
                f"virtual camera: cannot listen on {host}:{port} ({os.strerror(error.errno or 0)}):"
                f" stop what uses it, or change simulation.camera_port and camera.source"
            ) from error
        threading.Thread(
            target=self._server.serve_forever, args=(IDLE_S,), name="camera-http", daemon=True
        ).start()

    def _run(self) -> None:
        number = 0
        while not self._closed.is_set():
            shot = self._source.next_shot(IDLE_S)
            if shot is None:
                continue
            number += 1
            part = self._spoil(_Part(number, shot.capture_ns, shot.jpeg))
            if part is None or self._stalled:
                continue
            self.sent += 1
            with self._lock:
                for client in self._clients:
                    try:
                        client.put_nowait(part)
                    except queue.Full:
                        self._overrun += 1

    def _spoil(self, part: _Part) -> _Part | None:
        """What the faults in force make of a frame."""
        if self._frozen and self._last is not None:
            part = replace(part, jpeg=self._last.jpeg)
        self._last = part
        with self._lock:
            if self._drop:
                self._drop -= 1
                return None
            if self._truncate:
                self._truncate -= 1
                return replace(part, jpeg=part.jpeg[: len(part.jpeg) // 2])
            if self._garble:
                self._garble -= 1
                middle = len(part.jpeg) // 2
                noise = bytes(range(1, GARBLED_BYTES + 1))
                spoilt = part.jpeg[:middle] + noise + part.jpeg[middle + GARBLED_BYTES : -2]
                return replace(part, jpeg=b"\0\0" + spoilt[2:] + b"\0\0")
        return part

    def stream_to(self, write: Callable[[bytes], Any], stopped: threading.Event) -> None:
        """Write parts to one client until it hangs up (`OSError`) or `stopped`."""
        client: queue.Queue[_Part] = queue.Queue(self._backlog)
        with self._lock:
            self._clients.add(client)
        try:
            while not stopped.is_set():
                with contextlib.suppress(queue.Empty):
                    write(client.get(timeout=IDLE_S).encode())
        finally:
            with self._lock:
                self._clients.discard(client)


class _Server(socketserver.ThreadingTCPServer):
    """One thread a client; plain TCPServer, as HTTPServer looks its name up in DNS."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], camera: MjpegCamera) -> None:
        self.camera = camera
        self.stopped = threading.Event()
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = WRITE_TIMEOUT_S

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        with contextlib.suppress(OSError):  # the client hung up
            self.server.camera.stream_to(self.wfile.write, self.server.stopped)

    def log_message(self, *_: object) -> None:
        """Say nothing of requests."""
