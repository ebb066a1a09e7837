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

LIVE_NS = 60_000_000_000  # no queue holds a frame longer: an older stamp is that of a replay


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
        self.since_ns = -1  # what the newest reference was begun with; -1: there is none yet
        self._frontend = frontend
        self._frames: list[MarkerFrame] | None = None
        self._after_ns = 0
        self._forgets = False

    def begin(self, after_ns: int = 0) -> None:
        """Start to collect a new reference, of frames stamped later than this.

        The old one stays until then; that of taxels until the first of those frames.
        """
        self._after_ns, self._frames = after_ns, []
        self._forgets = self._frontend.sensor.kind == "taxels"

    def wants(self, stamp_ns: int) -> bool:
        """Whether a frame with this stamp, about to be processed, is one to offer."""
        if self._frames is None or 0 <= self._after_ns - stamp_ns < LIVE_NS:
            return False
        if self._forgets:
            self._frontend.set_reference(None)
            self._forgets = False
        return True

    def offer(self, frame: MarkerFrame) -> bool:
        """Look at a processed frame; whether the reference was set just now."""
        frames = self._frames
        if frames is None or frame.flags & UNFIT:
            return False
        frames.append(frame)
        if len(frames) < self.wanted:
            return False
        self._frontend.set_reference(most_typical(frames))
        self._frames, self.since_ns = None, self._after_ns
        return True
