"""Where camera frames come from. Every source yields JPEG bytes, the camera's own if it sends any.

| source | frames | device time |
|---|---|---|
| `http(s)://…` multipart MJPEG | the camera's JPEG | `X-Timestamp` of the part, where sent |
| number or `/dev/video…` (V4L2) | the camera's JPEG in MJPG mode, else encoded | of the driver |
| other URLs (`rtsp://…`) | decoded by OpenCV, encoded | none |
| video file, folder of images | JPEG files as they are, others encoded; paced | index / rate |
"""

from __future__ import annotations

import http.client
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import CameraConfig
from genforce_collect.errors import DeviceError

# What FFmpeg says of a broken video, often a line a block, is told in one message of our own.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

JPEG_QUALITY = 95
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
OPEN_TIMEOUT_S = 3.0
STALL_S = 1.0  # at least; and five frames
MAX_HEADER_LINES = 64
MAX_FRAME_BYTES = 32 << 20


class SourceFrame(NamedTuple):
    """One frame as the source gave it."""

    jpeg: bytes
    device_time: float  # s, on the source's clock; NaN where it has none
    receive_ns: int  # host system time of its arrival
    number: int | None = None  # the source's own


FrameIterator = Iterator[SourceFrame]
Stopped = Callable[[], bool]


def open_source(config: CameraConfig, stopped: Stopped = lambda: False) -> FrameIterator:
    """Open a source and give its frames until it ends, fails or `stopped()`.

    Raises `DeviceError` at once where there is nothing to open, and while iterating where the
    source breaks off; a file or folder simply ends.
    """
    source = config.source
    if source.isdigit() or source.startswith("/dev/"):
        return _v4l2(config, stopped)
    if re.match(r"https?://", source):
        stream = _open_http(config)
        if stream.headers.get_content_maintype() == "multipart":
            return _multipart(stream, config, stopped)
        stream.close()
        return _opencv_url(config, stopped)
    if "://" in source:
        return _opencv_url(config, stopped)
    return _recording(config, stopped)


def is_recording(source: str) -> bool:
    """Whether the source is a file or folder, which ends, rather than a device."""
    return not (source.isdigit() or source.startswith("/dev/") or "://" in source)


def recorded_frames(path: Path, leave_out: str = "") -> Iterator[bytes]:
    """The frames of a video file or folder of images (but one), as JPEG. Raises `DeviceError`."""
    if path.is_dir():
        images = (file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        files = sorted(
            (file for file in images if file.name != leave_out),
            key=lambda file: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", file.name)],
        )
        if not files:
            raise DeviceError(f"camera {path}: no images in the folder (camera.source)")
        yield from map(_read_image, files)
    elif not path.exists():
        raise DeviceError(f"camera {path}: no such file or folder (camera.source)")
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield _read_image(path)
    else:
        capture = cv2.VideoCapture(str(path))
        if not capture.isOpened():
            raise DeviceError(f"camera {path}: not a video that OpenCV can read (camera.source)")
        try:
            while (image := capture.read()[1]) is not None:
                yield encode_jpeg(image)
        finally:
            capture.release()


def missing_frames(path: Path, decoded: int) -> int:
    """How many frames more than those decoded a video file says it has; 0 for what is no video.

    One frame is forgiven, since some containers tell their length in seconds only.
    """
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return 0
    capture = cv2.VideoCapture(str(path))
    told = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    capture.release()
    missing = round(told) - decoded if math.isfinite(told) else 0
    return missing if missing > 1 else 0


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """(h, w) grey or (h, w, 3) BGR uint8 as JPEG, for sources that send none."""
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return encoded.tobytes()


def _read_image(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix.lower() in {".jpg", ".jpeg"}:
        return data
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise DeviceError(f"camera {path}: not an image that OpenCV can read (camera.source)")
    return encode_jpeg(image)


def _recording(config: CameraConfig, stopped: Stopped) -> FrameIterator:
    path = Path(config.source).expanduser()
    frames = recorded_frames(path)
    first = next(frames, None)  # so that a bad file is told at once
    if first is None:
        raise DeviceError(f"camera {path}: the video has no frames (camera.source)")

    def paced() -> FrameIterator:
        start = time.monotonic()
        index, jpeg = 0, first
        nonlocal frames
        while not stopped():
            time.sleep(max(0.0, start + index / config.fps - time.monotonic()))
            yield SourceFrame(jpeg, index / config.fps, time.time_ns())
            index += 1
            following = next(frames, None)
            if following is None and config.loop:
                frames = recorded_frames(path)
                following = next(frames, None)
            if following is None:
                return
            jpeg = following

    return paced()


def _open_http(config: CameraConfig) -> http.client.HTTPResponse:
    # Cameras are on the local net: no proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        response = opener.open(config.source, timeout=max(STALL_S, 5 / config.fps))
    except urllib.error.HTTPError as error:
        raise DeviceError(
            f"camera {config.source}: answers {error.code} {error.reason}; "
            f"check path and login in camera.source"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DeviceError(
            f"camera {config.source}: {reason}; is it powered and on the net? check camera.source"
        ) from error
    return response


def _multipart(
    stream: http.client.HTTPResponse, config: CameraConfig, stopped: Stopped
) -> FrameIterator:
    """Parts of a multipart/x-mixed-replace stream (RFC 2046), with or without Content-Length."""
    boundary = str(stream.headers.get_param("boundary") or "").lstrip("-").encode()
    try:
        with stream:
            while not stopped():
                headers = _part_headers(stream)
                receive_ns = time.time_ns()
                length = headers.get("content-length", "")
                if length.isdigit() and int(length) <= MAX_FRAME_BYTES:
                    jpeg = stream.read(int(length))
                    if len(jpeg) < int(length):
                        raise DeviceError(f"camera {config.source}: hung up")
                else:
                    jpeg = _read_to_boundary(stream, boundary, config)
                yield SourceFrame(
                    jpeg,
                    _number(headers.get("x-timestamp"), math.nan),
                    receive_ns,
                    _integer(headers.get("x-frame")),
                )
    except TimeoutError as error:
        raise DeviceError(f"camera {config.source}: sends no more frames") from error
    except (OSError, http.client.HTTPException, EOFError) as error:
        raise DeviceError(f"camera {config.source}: hung up") from error


def _part_headers(stream: http.client.HTTPResponse) -> dict[str, str]:
    headers: dict[str, str] = {}
    for _ in range(MAX_HEADER_LINES):
        line = stream.readline(1024)
        if not line:
            raise EOFError
        name, colon, value = line.decode("latin-1").partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
        elif not line.strip() and headers:
            return headers
    raise http.client.HTTPException("endless part header")


def _read_to_boundary(
    stream: http.client.HTTPResponse, boundary: bytes, config: CameraConfig
) -> bytes:
    """A part without a length: all up to the line that holds the boundary."""
    data = bytearray()
    while len(data) < MAX_FRAME_BYTES:
        line = stream.readline(65536)
        if not line:
            raise EOFError
        if line.startswith(b"--") and line[2:].lstrip(b"-").startswith(boundary):
            return bytes(data.removesuffix(b"\r\n"))
        data += line
    raise DeviceError(f"camera {config.source}: not an MJPEG stream")


def _v4l2(config: CameraConfig, stopped: Stopped) -> FrameIterator:
    device = int(config.source) if config.source.isdigit() else config.source
    capture = cv2.VideoCapture(device, cv2.CAP_V4L2)
    if not capture.isOpened():
        raise DeviceError(
            f"camera {config.source}: cannot be opened; is it plugged in, free, and may this user "
            f"read it (group 'video')? check camera.source"
        )
    capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
    capture.set(cv2.CAP_PROP_FRAME_WIDTH, config.width)
    capture.set(cv2.CAP_PROP_FRAME_HEIGHT, config.height)
    capture.set(cv2.CAP_PROP_FPS, config.fps)
    sends_jpeg = int(capture.get(cv2.CAP_PROP_FOURCC)) == cv2.VideoWriter.fourcc(*"MJPG")
    capture.set(cv2.CAP_PROP_CONVERT_RGB, 0 if sends_jpeg else 1)
    return _grabbed(capture, config, stopped)


def _opencv_url(config: CameraConfig, stopped: Stopped) -> FrameIterator:
    capture = cv2.VideoCapture()
    timeout_ms = int(OPEN_TIMEOUT_S * 1e3)
    limits = [
        cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms,
    ]  # fmt: skip
    if not capture.open(config.source, cv2.CAP_FFMPEG, limits):
        raise DeviceError(
            f"camera {config.source}: cannot be opened; is it powered and on the net? "
            f"check camera.source"
        )
    return _grabbed(capture, config, stopped)


def _grabbed(capture: cv2.VideoCapture, config: CameraConfig, stopped: Stopped) -> FrameIterator:
    try:
        while not stopped():
            ok, image = capture.read()
            receive_ns = time.time_ns()
            if not ok:
                raise DeviceError(f"camera {config.source}: sends no more frames")
            if image.shape[0] == 1:  # the driver's buffer, not an image
                jpeg, device_time = image.tobytes(), capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            else:
                jpeg, device_time = encode_jpeg(image), math.nan
            yield SourceFrame(jpeg, device_time if device_time else math.nan, receive_ns)
    finally:
        capture.release()


def _number(text: str | None, default: float) -> float:
    try:
        return float(text) if text is not None else default
    except ValueError:
        return default


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
