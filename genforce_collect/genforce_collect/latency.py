"""How much later a camera shows a contact than the force sensor feels it.

How far the markers move is a smooth function of the force, the same in every contact. At the right
lag that function explains the motion best; it is fitted anew for each lag, over all contacts
together, so that neither its curve nor the gel's creep shifts the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genforce_collect.bags import BagReader
from genforce_collect.errors import DataError
from genforce_collect.markers.tracking import Tracker
from genforce_collect.trajectory import LOADED_PHASES, Phase

STEP_S = 0.002
MAX_LAG_S = (-0.1, 0.4)  # searched
REST_S = 0.1  # before and after a contact that is looked at too
MIN_FORCE_N = 0.3  # a contact below it shows too little
MIN_FRAMES = 8
MIN_CONTACTS = 4
GROUPS = 4  # of contacts, measured apart to tell the spread
ENDS = (Phase.DONE, Phase.INVALID, Phase.IDLE)

Signal = NDArray[np.float64]


@dataclass(frozen=True)
class Latency:
    """sensor: whose camera. latency_s: over all contacts; spread_s: standard deviation of what
    groups of them give."""

    sensor: str
    latency_s: float
    spread_s: float
    contacts: int


def measure_latency(bag: Path, sensor: str | None = None) -> Latency:
    """Latency of the camera of a bag with contacts, beyond what its stamps already allow for.

    Raises `DataError` where markers, wrench or enough contacts are missing.
    """
    with BagReader(bag) as reader:
        topics = [topic for topic in reader.topics if topic.endswith("/markers")]
        if sensor is not None:
            topics = [topic for topic in topics if topic.split("/")[-2] == sensor]
        if len(topics) != 1:
            names = ", ".join(topic.split("/")[-2] for topic in topics) or "none"
            raise DataError(f"{bag}: needs the markers of one sensor, has {names}; see --sensor")
        name = topics[0].split("/")[-2]
        image_t, motion = _motion(reader, topics[0])
        force_t, force = _force(reader)
        spans = []
        for start, stop in contact_spans(reader):
            seen = (image_t >= start) & (image_t <= stop)
            felt = (force_t >= start) & (force_t <= stop)
            if min(seen.sum(), felt.sum()) < MIN_FRAMES:
                continue
            if np.ptp(np.linalg.norm(force[felt], axis=1)) >= MIN_FORCE_N:
                spans.append((start - REST_S, stop + REST_S))
    if len(spans) < MIN_CONTACTS:
        raise DataError(f"{bag}: {len(spans)} contacts to measure with, {MIN_CONTACTS} are needed")

    def lag_over(chosen: list[tuple[float, float]]) -> float:
        used = np.any([(image_t >= start) & (image_t <= stop) for start, stop in chosen], axis=0)
        return lag_s(force_t, force, image_t[used], motion[used])

    groups = [lag_over(spans[first::GROUPS]) for first in range(GROUPS)]
    return Latency(name, lag_over(spans), float(np.std(groups)), len(spans))


def lag_s(force_t: Signal, force: Signal, image_t: Signal, motion: Signal) -> float:
    """By how much (s) the motion of the markers follows the force.

    force_t: (n,) s; force: (n, 3) N in the sensor frame; image_t: (m,) s; motion: (m,) px, of any
    number of contacts. Between steps a parabola through the best three gives the minimum.
    """
    lags = np.arange(*MAX_LAG_S, STEP_S)
    left_over = np.array([_unexplained(force_t, force, image_t - lag, motion) for lag in lags])
    best = int(left_over.argmin())
    if 0 < best < len(lags) - 1:
        a, b, c = left_over[best - 1 : best + 2]
        return float(lags[best] + STEP_S * (a - c) / (2 * (a - 2 * b + c)))
    return float(lags[best])


def _unexplained(force_t: Signal, force: Signal, at: Signal, motion: Signal) -> float:
    """Mean square (px²) of the motion that a smooth function of the force does not give."""
    fx, fy, fz = (np.interp(at, force_t, component) for component in force.T)
    normal, shear = np.abs(fz), np.hypot(fx, fy)
    terms = [np.ones_like(normal), np.sqrt(normal), normal, normal**2, shear, shear**2]
    system = np.column_stack(terms)
    coefficients, *_ = np.linalg.lstsq(system, motion, rcond=None)
    return float(np.mean((motion - system @ coefficients) ** 2))


def _motion(reader: BagReader, topic: str) -> tuple[Signal, Signal]:
    """Time (s) and root mean square displacement (px) of the markers of each frame."""
    times, motion = [], []
    tracker: Tracker | None = None
    for _, stamp_ns, _, message in reader.messages([topic]):
        points = np.stack([message.x, message.y], axis=1)
        if tracker is None:
            if not len(points):
                continue
            tracker = Tracker(points)
        found = tracker.update(points).displacement
        if np.isfinite(found).any():
            times.append(stamp_ns * 1e-9)
            motion.append(float(np.sqrt(np.nanmean(found**2))))
    return np.array(times), np.array(motion)


def _force(reader: BagReader) -> tuple[Signal, Signal]:
    """Time (s) and force (n, 3) (N)."""
    topics = [t for t in reader.topics if t.endswith("netft/wrench")]
    rows = [
        (stamp_ns * 1e-9, message.wrench.force)
        for _, stamp_ns, _, message in reader.messages(topics)
    ]
    if not topics or not rows:
        raise DataError(f"{reader.path}: holds no wrench of the force/torque sensor")
    vectors = np.array([(f.x, f.y, f.z) for _, f in rows])
    return np.array([t for t, _ in rows]), vectors


def contact_spans(reader: BagReader) -> list[tuple[float, float]]:
    """Start and end (s) of each whole contact."""
    topics = [topic for topic in reader.topics if topic.endswith("/contact")]
    spans, start = [], None
    for _, stamp_ns, _, message in reader.messages(topics):
        if message.phase in LOADED_PHASES and start is None:
            start = stamp_ns * 1e-9
        elif message.phase in ENDS and start is not None:
            if message.phase == Phase.DONE:
                spans.append((start, stamp_ns * 1e-9))
            start = None
    return spans
