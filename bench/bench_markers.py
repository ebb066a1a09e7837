"""From JPEG bytes to mask and centroids: time, and which markers are right.

Frames are contacts on virtual sensors with their imperfections, so that the truth is known. The
baseline is the classical part of the original's pipeline on the same bytes: blurred minus image
and HSV thresholds, morphology, and scikit-image's labelled regions. Times are of one thread on the
processor, so that what else runs on the machine does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rows import Row
from scipy.spatial import cKDTree

from genforce_collect.config import SensorConfig, load_sensor
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.segmentation import MarkerFrame
from genforce_collect.markers.tracking import Tracker
from genforce_collect.markers.view import View
from genforce_sim.sensor import Frame, SimulatedSensor

SENSORS = ("array_1", "circle_1", "gelsight", "tactip")
INDENTERS = ("sphere", "cylinder", "moon")
STEPS = 8
ROUNDS = 3
GOAL_MS, GOAL_P99_MS = 4.0, 8.0
WHITE_LEVEL = 225  # of the equalised image, in the classical pipeline for pins
EDGE_PX = 2.0  # markers nearer to the edge of the view than a radius and this are not judged


def bench() -> list[Row]:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return [row for name in SENSORS for row in _sensor(load_sensor(name))]
    finally:
        cv2.setNumThreads(threads)


def _sensor(sensor: SensorConfig) -> list[Row]:
    dark = sensor.segmentation.polarity == "dark"
    ours_ms, classic_ms, track_ms = [], [], []
    ours, classic = Score(sensor), Score(sensor)
    for seed, indenter in enumerate(INDENTERS):
        simulated = SimulatedSensor(sensor, indenter, seed=seed)
        frontend = Frontend(sensor)
        frontend.set_reference(frontend.process_jpeg(_jpeg(simulated.reference.image)))
        tracker = Tracker(frontend.reference.points)
        for frame in _contact(sensor, simulated, 2.4 * seed):
            data = _jpeg(frame.image)
            for _ in range(ROUNDS):
                found = _timed(ours_ms, frontend.process_jpeg, data)
                plain = _timed(classic_ms, classical, data, dark, frontend.field_of_view)
            _timed(track_ms, tracker.update, found.points)
            ours.add(found, frame)
            classic.add(plain, frame)
    name = f"markers: {sensor.name}"
    factor = float(np.median(classic_ms) / np.median(ours_ms))
    median, slowest = np.percentile(ours_ms, [50, 99])
    return [
        Row(f"{name}, JPEG to centroids p50", float(median), "ms", f"<= {GOAL_MS:g}",
            float(np.median(classic_ms)), factor),
        Row(f"{name}, JPEG to centroids p99", float(slowest), "ms", f"<= {GOAL_P99_MS:g}"),
        Row(f"{name}, speed against the classical pipeline", factor, "x", ">= 3"),
        Row(f"{name}, markers found", ours.found, "%", ">= 99.5", classic.found,
            ours.found / max(classic.found, 1e-9)),
        Row(f"{name}, false markers", ours.false, "%", "<= 0.2", classic.false),
        Row(f"{name}, centroid error RMS", ours.rms_px, "px", "<= 0.15", classic.rms_px,
            classic.rms_px / ours.rms_px),
        Row(f"{name}, mask IoU", ours.overlap, "", ">= 0.9", classic.overlap,
            ours.overlap / classic.overlap),
        Row(f"{name}, tracking p50", float(np.median(track_ms)), "ms"),
    ]  # fmt: skip


def classical(data: bytes, dark: bool, view: NDArray[np.uint8]) -> MarkerFrame:
    """The original's thresholds, morphology and labelled regions, without its foundation model."""
    from skimage.measure import label, regionprops

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    if dark:
        difference = cv2.GaussianBlur(gray, (63, 63), 0).astype(np.int16) - gray + 128
        mask = cv2.inRange(np.clip(difference, 0, 255).astype(np.uint8), 150, 255)
        mask |= cv2.inRange(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), (0, 0, 0), (179, 255, 70))
    else:
        equal = cv2.equalizeHist(gray)
        mask = cv2.threshold(equal, WHITE_LEVEL, 255, cv2.THRESH_BINARY)[1] & view
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel)
    mask = cv2.morphologyEx(cv2.dilate(mask, kernel), cv2.MORPH_CLOSE, kernel)
    regions = regionprops(label(mask > 0))
    points = np.float32([region.centroid[::-1] for region in regions]).reshape(-1, 2)
    area = np.float32([region.area for region in regions])
    return MarkerFrame(np.uint8(mask > 0), points[:, 0], points[:, 1], area)


def _contact(sensor: SensorConfig, simulated: SimulatedSensor, angle: float) -> Iterator[Frame]:
    """Frames of a press to full depth and of a shear to full length."""
    plan = sensor.plan
    for step in range(STEPS):
        depth = plan.max_z_mm * min(1.0, (step + 1) * 2 / STEPS)
        shear = plan.radius_mm * max(0.0, step * 2 / STEPS - 1)
        tip = [shear * np.cos(angle), shear * np.sin(angle), -depth]
        state = simulated.step(np.array([*np.multiply(tip, 1e-3), np.pi, 0, 0]), 0.1)
        yield simulated.render(state)


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def _timed(times_ms: list[float], work: Callable[..., Any], *inputs: Any) -> Any:
    started = time.thread_time()
    result = work(*inputs)
    times_ms.append((time.thread_time() - started) * 1e3)
    return result


class Score:
    """How many markers are right. Judged are those wholly in view that no other one covers."""

    def __init__(self, sensor: SensorConfig) -> None:
        view = View(sensor.segmentation).field_of_view
        self._to_edge = cv2.distanceTransform(np.pad(view, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
        self._diameter = sensor.segmentation.diameter_px
        self._total = self._found = self._false = 0
        self._squares: list[float] = []
        self._overlaps: list[float] = []

    def add(self, frame: MarkerFrame, truth: Frame) -> None:
        """Count one frame."""
        u, v = np.clip(np.round(truth.markers).astype(int), 0, [639, 479]).T
        judged = self._to_edge[v, u] > self._diameter / 2 + EDGE_PX
        judged &= cKDTree(truth.markers).query(truth.markers, k=2)[0][:, 1] > self._diameter
        mask = frame.mask > 0
        self._total += int(judged.sum())
        self._overlaps.append((mask & truth.mask).sum() / max(1, (mask | truth.mask).sum()))
        if not frame.count:
            return
        distance, nearest = cKDTree(frame.points).query(truth.markers[judged])
        close = distance < self._diameter / 2
        away = cKDTree(truth.markers).query(frame.points)[0] > self._diameter / 2
        self._found += len(np.unique(nearest[close]))
        self._false += int(away.sum())
        self._squares += (distance[close] ** 2).tolist()

    @property
    def found(self) -> float:
        """Markers found, %."""
        return 100 * self._found / self._total

    @property
    def false(self) -> float:
        """What is no marker and was taken for one, % of the markers."""
        return 100 * self._false / self._total

    @property
    def rms_px(self) -> float:
        """Centroid error."""
        return float(np.sqrt(np.mean(self._squares)))

    @property
    def overlap(self) -> float:
        """Mean intersection over union of the masks."""
        return float(np.mean(self._overlaps))
