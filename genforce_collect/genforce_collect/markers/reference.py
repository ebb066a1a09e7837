"""The no-contact reference of a sensor, from several frames so that noise does not choose it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.quality import Flag
from genforce_collect.markers.segmentation import MarkerFrame

# A frame with one of these is no reference.
UNFIT = (
    Flag.NO_MARKERS
    | Flag.LOW_CONTRAST
    | Flag.SATURATED
    | Flag.DECODE_ERROR
    | Flag.WRONG_SIZE
    | Flag.REPEATED
)


def most_typical(frames: Sequence[MarkerFrame]) -> MarkerFrame:
    """The frame with the median count of markers whose sharpness is the median of those."""
    count = int(np.median([frame.count for frame in frames]))
    distance = [abs(frame.count - count) for frame in frames]
    typical = [f for f, d in zip(frames, distance, strict=True) if d == min(distance)]
    return sorted(typical, key=lambda frame: frame.laplacian)[len(typical) // 2]


class ReferenceTaker:
    """Collects the next `wanted` good frames of a front end and makes them its reference."""

    def __init__(self, frontend: Frontend, wanted: int = 10) -> None:
        self.wanted = max(1, wanted)
        self._frontend = frontend
        self._frames: list[MarkerFrame] | None = None

    def begin(self) -> None:
        """Start to collect a new reference; the old one stays until then, but for taxels."""
        if self._frontend.sensor.kind == "taxels":
            self._frontend.set_reference(None)
        self._frames = []

    def offer(self, frame: MarkerFrame) -> bool:
        """Look at a processed frame; whether the reference was set just now."""
        frames = self._frames
        if frames is None or frame.flags & UNFIT:
            return False
        frames.append(frame)
        if len(frames) < self.wanted:
            return False
        self._frontend.set_reference(most_typical(frames))
        self._frames = None
        return True
