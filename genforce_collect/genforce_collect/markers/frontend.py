"""The one way from what a sensor sends to its marker image, live, offline and in the estimator."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import SensorConfig
from genforce_collect.markers.comparison import Comparison
from genforce_collect.markers.jpeg import decode_gray
from genforce_collect.markers.orientation import Way, way_up
from genforce_collect.markers.quality import Flag
from genforce_collect.markers.segmentation import MarkerFrame, MarkerSegmenter, empty_frame
from genforce_collect.markers.taxels import render_taxels

_FLAGS = {Way.TURNED: Flag.ROTATED, Way.ELSE: Flag.WRONG_REFERENCE}


class Frontend:
    """Frames or taxel samples of one sensor in, `MarkerFrame`s out.

    The result depends on the frame and the reference alone, except for `Flag.REPEATED`, which
    compares with the frame before. Bad input is flagged, never raised.
    """

    def __init__(self, sensor: SensorConfig) -> None:
        self.sensor = sensor
        self._segmenter = MarkerSegmenter(sensor.segmentation)
        self._comparison: Comparison | None = None
        self._reference_flags = 0  # what is wrong with the reference is wrong with all frames
        self._baseline: NDArray[np.int32] | None = None
        self._last: bytes | None = None

    @property
    def reference(self) -> MarkerFrame | None:
        """The no-contact frame later ones are compared with."""
        return self._comparison.reference if self._comparison else None

    @property
    def field_of_view(self) -> NDArray[np.uint8]:
        """(480, 640) uint8, 255 where markers are looked for."""
        return self._segmenter.view.field_of_view

    def set_reference(self, frame: MarkerFrame | None) -> None:
        """Compare later frames with this one (None: with none).

        None also forgets the baseline of taxels: the next sample becomes the new one.
        """
        self._comparison = None if frame is None else Comparison(frame)
        self._reference_flags = 0
        if frame is None:
            self._baseline = None
        elif self.sensor.segmentation.markers_px:
            self._reference_flags = _FLAGS.get(self.way_up(frame), 0)

    def way_up(self, reference: MarkerFrame) -> Way:
        """Which way up a reference is seen, by the markers' places in the sensor file; without
        those, whether a turned frame could be told from it."""
        places = np.array(self.sensor.segmentation.markers_px or reference.points)
        return way_up(places.reshape(-1, 2), reference.points)

    def process_jpeg(self, data: bytes) -> MarkerFrame:
        """Marker image of an encoded frame; one that cannot be decoded comes back empty."""
        repeated = data == self._last
        self._last = bytes(data)
        gray = decode_gray(self._last)
        if gray is None:
            expected = self.reference.count if self.reference else 0
            return empty_frame(Flag.DECODE_ERROR | Flag.NO_MARKERS, expected)
        frame = self.process_image(gray)
        return replace(frame, flags=frame.flags | Flag.REPEATED) if repeated else frame

    def process_image(self, image: NDArray[np.uint8]) -> MarkerFrame:
        """Marker image of a decoded frame, (h, w) grey or (h, w, 3) BGR uint8.

        A decoded JPEG may differ from `process_jpeg` of its bytes by rounding of the grey values.
        """
        gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        frame = self._segmenter(gray)
        if self._comparison is None:
            return frame
        frame = self._comparison.judge(frame)
        flags = frame.flags | self._reference_flags
        return frame if flags == frame.flags else replace(frame, flags=int(flags))

    def process_taxels(self, counts: NDArray[np.integer]) -> MarkerFrame:
        """Marker image of a taxel sample, against the first one as baseline."""
        if np.size(counts) != self.sensor.taxels.size:
            return empty_frame(Flag.WRONG_SIZE | Flag.NO_MARKERS)
        if self._baseline is None:
            self._baseline = np.array(counts, np.int32)
        data = np.asarray(counts, np.int32).tobytes()
        flags = Flag.REPEATED if data == self._last else 0
        self._last = data
        frame = render_taxels(counts, self._baseline, self.sensor.taxels)
        return replace(frame, flags=int(flags))
