"""A tactile camera: every frame of a source as JPEG, with its times, through all that happens.

What comes of its faults (each is named in `CameraHealth.message`):

- gone, hung up or silent: opened anew, at pauses from `RECONNECT_S[0]` to `RECONNECT_S[1]`;
- frozen: frames that repeat the last one byte for byte are delivered, and the camera is called
  unusable after `FREEZE_S` of them;
- cut-off or garbled JPEG: delivered as it came, for its number to stay in the count, and counted;
- frames that the camera numbered and that never came: counted as lost.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from genforce_collect.config import CameraConfig
from genforce_collect.devices.camera_sources import (
    STALL_S,
    FrameIterator,
    is_recording,
    open_source,
)
from genforce_collect.errors import DeviceError
from genforce_collect.markers.jpeg import is_whole_jpeg

RECONNECT_S = (0.1, 1.0)  # first and longest pause
FREEZE_S = 0.5
RATE_WINDOW_S = 1.0


class CameraFrame(NamedTuple):
    """One frame."""

    seq: int  # counts the frames delivered
    jpeg: bytes
    device_time: float  # s, by the camera's clock; NaN where it tells none
    receive_ns: int  # host system time of its arrival


@dataclass(frozen=True)
class CameraHealth:
    """State of a camera; `message` says what is wrong."""

    message: str  # empty while all is well
    usable: bool  # new frames come in
    ended: bool  # a recording that has been played to its end
    rate_hz: float  # measured
    requested_hz: float
    received: int
    lost: int  # numbered by the camera, never arrived
    broken: int  # not a whole JPEG
    repeated: int  # same bytes as the frame before
    reconnects: int
    age_s: float  # of the newest frame


class Camera:
    """Streams from one source between `start` and `stop`.

    `on_frame` is called in the camera's thread, once a frame, in order.
    """

    def __init__(self, config: CameraConfig, on_frame: Callable[[CameraFrame], None]) -> None:
        self.config = config
        self.received = 0
        self.lost = 0
        self._on_frame = on_frame
        self._stop = threading.Event()
        self._first = threading.Event()
        self._thread: threading.Thread | None = None
        self._arrivals: deque[float] = deque(maxlen=max(4, round(2 * RATE_WINDOW_S * config.fps)))
        self._last_jpeg = b""
        self._last_number: int | None = None
        self._changed_at = time.monotonic()  # when the picture last changed
        self._broken = self._repeated = self._reconnects = 0
        self._fault = ""
        self._ended = False

    def start(self, timeout_s: float = 5.0) -> None:
        """Open the source and wait for its first frame.

        Raises `DeviceError` where it cannot be opened or no frame comes in time.
        """
        self._stop.clear()
        self._first.clear()
        frames = open_source(self.config, self._stop.is_set)
        self._thread = threading.Thread(
            target=self._run, args=(frames,), name="camera", daemon=True
        )
        self._thread.start()
        if not self._first.wait(timeout_s):
            fault = self._fault or f"camera {self.config.source}: gives no frame"
            self.stop()
            raise DeviceError(fault)

    def stop(self) -> None:
        """End delivery."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * STALL_S)  # OpenCV's reads cannot be broken off

    def wait_for(self, frames: int, timeout_s: float) -> None:
        """Wait until so many frames have come. Raises `DeviceError` when they do not."""
        deadline = time.monotonic() + timeout_s
        while self.received < frames:
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"camera {self.config.source}: {self.received} of {frames} frames in "
                    f"{timeout_s:.0f} s"
                )
            time.sleep(1 / self.config.fps)

    def health(self) -> CameraHealth:
        """State now."""
        now = time.monotonic()
        recent = [at for at in list(self._arrivals) if now - at <= RATE_WINDOW_S]
        age_s = now - self._arrivals[-1] if self._arrivals else float("inf")
        source = self.config.source
        message = self._fault
        if not message and not self._ended:
            if age_s > max(STALL_S, 5 / self.config.fps):
                message = f"camera {source}: no frame for {age_s:.1f} s"
            elif now - self._changed_at > FREEZE_S + 2 / self.config.fps:
                message = f"camera {source}: frozen, the same picture again and again"
        return CameraHealth(
            message=message or (f"camera {source}: end of the recording" if self._ended else ""),
            usable=not message and not self._ended,
            ended=self._ended,
            rate_hz=len(recent) / RATE_WINDOW_S,
            requested_hz=self.config.fps,
            received=self.received,
            lost=self.lost,
            broken=self._broken,
            repeated=self._repeated,
            reconnects=self._reconnects,
            age_s=age_s,
        )

    def _run(self, frames: FrameIterator) -> None:
        pause_s = RECONNECT_S[0]
        while not self._stop.is_set():
            try:
                for frame in frames:
                    pause_s = RECONNECT_S[0]
                    self._fault = ""
                    self._count_lost(frame.number)
                    self._deliver(frame.jpeg, frame.device_time, frame.receive_ns)
                if self._stop.is_set():
                    return
                if is_recording(self.config.source):
                    self._ended = True
                    return
            except DeviceError as error:
                self._fault = str(error)
            self._stop.wait(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_S[1])
            self._last_number = None
            try:
                frames = open_source(self.config, self._stop.is_set)
                self._reconnects += 1
            except DeviceError as error:
                self._fault = str(error)
                frames = iter(())

    def _deliver(self, jpeg: bytes, device_time: float, receive_ns: int) -> None:
        now = time.monotonic()
        if jpeg == self._last_jpeg:
            self._repeated += 1
        else:
            self._changed_at = now
        self._last_jpeg = jpeg
        self._broken += not is_whole_jpeg(jpeg)
        self._arrivals.append(now)
        self._on_frame(CameraFrame(self.received, jpeg, device_time, receive_ns))
        self.received += 1
        self._first.set()

    def _count_lost(self, number: int | None) -> None:
        if number is not None and self._last_number is not None:
            self.lost += max(0, number - self._last_number - 1)
        self._last_number = number
