"""The camera's picture with the markers that were found in it and how far they have moved."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import rerun as rr

from genforce_collect.config import SensorConfig
from genforce_collect.markers.packing import unpack_mask
from genforce_collect.markers.tracking import Tracker
from genforce_collect.markers.view import View

IMAGE = "camera/image"
MARKERS = "camera/image/markers"
ARROWS = "camera/image/displacement"
MARKER_PX = 3.0
GOOD, DOUBTFUL, MOTION = (90, 220, 90), (230, 70, 70), (255, 180, 0)


class CameraScene:
    """Decimated to a rate by the stamps, so that a frame and its markers are shown together.

    The displacement is from the last untouched frame: call `forget_reference` before a contact.
    """

    def __init__(self, recording: rr.RecordingStream, sensor: SensorConfig, rate_hz: float) -> None:
        self._recording = recording
        self._period_ns = round(1e9 / rate_hz)
        self._view = View(sensor.segmentation)
        self._has_camera = sensor.kind != "taxels"
        self._tracker: Tracker | None = None
        self._last = {"image": -1, "markers": -1}

    def wants(self, what: str, stamp_ns: int) -> bool:
        """Whether the image or the markers of that stamp are to be drawn."""
        slot = stamp_ns // self._period_ns
        wanted = slot != self._last[what]
        self._last[what] = slot
        return wanted

    def forget_reference(self) -> None:
        """Take the next good frame as the one of the untouched gel."""
        self._tracker = None

    def draw_image(self, jpeg: bytes) -> None:
        """Show a frame as the camera sent it."""
        self._recording.log(IMAGE, rr.EncodedImage(contents=jpeg, media_type="image/jpeg"))

    def draw_markers(self, message: Any) -> None:
        """Show a genforce_msgs/Markers: over the picture, or as one where there is no camera."""
        points = np.column_stack([message.x, message.y]).astype(np.float32)
        if not self._has_camera:
            mask = unpack_mask(np.frombuffer(bytes(message.mask), np.uint8))
            png = cv2.imencode(".png", mask)[1].tobytes()
            self._recording.log(IMAGE, rr.EncodedImage(contents=png, media_type="image/png"))
        colour = DOUBTFUL if message.flags else GOOD
        shown = rr.Points2D(self._place(points), colors=colour, radii=MARKER_PX)
        self._recording.log(MARKERS, shown)
        if self._tracker is None and message.expected and not message.flags:
            self._tracker = Tracker(points)
        if self._tracker is not None:
            match = self._tracker.update(points)
            known = match.index >= 0
            start = self._place(self._tracker.reference[known].astype(np.float32))
            end = self._place(match.points[known])
            arrows = rr.Arrows2D(origins=start, vectors=end - start, colors=MOTION, radii=1.2)
            self._recording.log(ARROWS, arrows)

    def _place(self, points: np.ndarray) -> np.ndarray:
        """Where (n, 2) points of the marker image lie in the picture, whose first pixel's centre
        is at (0.5, 0.5)."""
        return (self._view.to_frame(points) if self._has_camera else points) + 0.5
