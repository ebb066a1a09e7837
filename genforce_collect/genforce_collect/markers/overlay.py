"""Pictures of what was found: markers, their motion, the field of view, what is wrong."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.markers.quality import explain
from genforce_collect.markers.segmentation import MarkerFrame
from genforce_collect.markers.tracking import Match
from genforce_collect.markers.view import Gray

SCALE = 2  # outlines of small markers would hide them at their own size
GOOD_BGR, BAD_BGR, MOTION_BGR, VIEW_BGR = (80, 255, 80), (60, 60, 255), (0, 200, 255), (255, 160, 0)


def draw(
    view: Gray, frame: MarkerFrame, field_of_view: Gray | None = None, motion: Match | None = None
) -> NDArray[np.uint8]:
    """(960, 1280, 3) BGR uint8: the view with outlines, centroids, motion and a line of text.

    Markers the reference has and the frame lacks are not drawn; those of an earlier place are
    joined to it by a line.
    """
    picture = cv2.cvtColor(cv2.resize(view, None, fx=SCALE, fy=SCALE), cv2.COLOR_GRAY2BGR)
    if field_of_view is not None:
        _outline(picture, field_of_view, VIEW_BGR)
    _outline(picture, frame.mask, GOOD_BGR)
    for point in frame.points:
        cv2.circle(picture, _place(point), 2, BAD_BGR, cv2.FILLED)
    if motion is not None:
        known = np.isfinite(motion.points[:, 0])
        start = motion.points - motion.displacement
        for a, b in zip(start[known], motion.points[known], strict=True):
            cv2.line(picture, _place(a), _place(b), MOTION_BGR, 2, cv2.LINE_AA)
    reason = explain(frame.flags)
    expected = f" of {frame.expected}" if frame.expected else ""
    colour = BAD_BGR if frame.flags else GOOD_BGR
    cv2.rectangle(picture, (0, 0), (picture.shape[1], 34), (0, 0, 0), cv2.FILLED)
    text = f"{frame.count}{expected} markers: {reason}"
    cv2.putText(picture, text, (10, 25), cv2.FONT_HERSHEY_SIMPLEX, 0.7, colour, 2, cv2.LINE_AA)
    return picture


def _outline(picture: NDArray[np.uint8], mask: Gray, colour: tuple[int, int, int]) -> None:
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, [line * SCALE for line in outlines], -1, colour, 1)


def _place(point: NDArray[np.floating]) -> tuple[int, int]:
    x, y = np.round((point + 0.5) * SCALE - 0.5).astype(int)
    return int(x), int(y)
