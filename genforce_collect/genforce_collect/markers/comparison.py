"""What only the no-contact reference can tell of a frame."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.markers.orientation import Way, way_up
from genforce_collect.markers.packing import HEIGHT, WIDTH
from genforce_collect.markers.quality import Flag
from genforce_collect.markers.segmentation import MarkerFrame
from genforce_collect.markers.tracking import Coherence

ROWS = 4  # every fourth row of a mask tells how much two overlap
COUNT_TOLERANCE = 0.1  # of the reference's markers, more or fewer
MIN_SHARPNESS = 0.5
GOOD_OVERLAP = 0.4  # of the masks, as part of the reference; above it the reference is right
# Overlap and coherence with the turned reference must be better by this.
TURNED_OVERLAP_GAIN, TURNED_COHERENCE_GAIN = 0.05, 0.2
MIN_COHERENCE = 0.25  # with the reference; below it the reference is another sensor's


class Comparison:
    """Frames against one reference."""

    def __init__(self, reference: MarkerFrame) -> None:
        self.reference = reference
        self._mask = reference.mask[::ROWS].copy()
        self._turned_mask = cv2.rotate(reference.mask, cv2.ROTATE_180)[::ROWS].copy()
        self._mask_area = max(1, cv2.countNonZero(self._mask))
        self._turned_area = max(1, cv2.countNonZero(self._turned_mask))
        self._common = np.empty_like(self._mask)

    # Each takes as long as a frame, and most frames need neither.
    @cached_property
    def _coherence(self) -> Coherence:
        return Coherence(self.reference.points)

    @cached_property
    def _turned_coherence(self) -> Coherence:
        return Coherence(np.float32([WIDTH - 1, HEIGHT - 1]) - self.reference.points)

    def judge(self, frame: MarkerFrame) -> MarkerFrame:
        """The frame with `expected`, `sharpness`, and the flags that need a reference."""
        reference = self.reference
        flags = frame.flags
        if frame.count < (1 - COUNT_TOLERANCE) * reference.count:
            flags |= Flag.TOO_FEW
        if frame.count > (1 + COUNT_TOLERANCE) * reference.count:
            flags |= Flag.TOO_MANY
        sharpness = frame.laplacian / reference.laplacian if reference.laplacian else 1.0
        if sharpness < MIN_SHARPNESS:
            flags |= Flag.BLURRED
        if frame.count and reference.count:
            flags |= self._orientation(frame)
        return replace(
            frame, flags=int(flags), expected=reference.count, sharpness=float(sharpness)
        )

    def _orientation(self, frame: MarkerFrame) -> int:
        """Whether the frame is of the reference's sensor, and the right way up."""
        reference = self.reference
        mask = frame.mask[::ROWS]
        overlap = self._overlap(mask, self._mask) / self._mask_area
        turned = self._overlap(mask, self._turned_mask) / self._turned_area
        suspect = turned > overlap + TURNED_OVERLAP_GAIN
        if overlap > GOOD_OVERLAP and not suspect:
            return 0
        points = frame.points
        coherence = self._coherence(points)
        # A shift can favour the turned mask on a regular layout, but neighbours moved alike.
        if suspect and (
            self._turned_coherence(points) > coherence + TURNED_COHERENCE_GAIN
            or way_up(reference.points, points, half_turn_only=True) is Way.TURNED
        ):
            return Flag.ROTATED
        if overlap > GOOD_OVERLAP or coherence >= MIN_COHERENCE:
            return 0
        fits = way_up(reference.points, points, half_turn_only=True) is not Way.ELSE
        return 0 if fits else Flag.WRONG_REFERENCE

    def _overlap(self, mask: NDArray[np.uint8], reference: NDArray[np.uint8]) -> int:
        return cv2.countNonZero(cv2.bitwise_and(mask, reference, dst=self._common))
