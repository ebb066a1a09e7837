"""Score a bag in which the estimator ran live beside the force sensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genforce_collect.bags import BagReader
from genforce_collect.errors import DataError
from genforce_collect.nodes.common import NAMESPACE, from_stamp
from genforce_infer.agreement import draw_course, draw_scatter
from genforce_train.evaluate import AXES, score


@dataclass(frozen=True)
class LiveScore:
    """Agreement of the live wrench with the force sensor, and how promptly it came."""

    frames: int  # from the first answered one to the last
    answered: int
    rate_hz: float
    latency_ms: dict[str, float]  # p50, p99: capture to publish
    r2: dict[str, float]  # per axis fx, fy, fz
    mae_n: dict[str, float]


@dataclass(frozen=True)
class LiveFigures:
    """Predicted and measured force at each answered frame: times (N,) s, forces (N, 3) N."""

    times: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray
    score: LiveScore


def read_live_bag(bag: Path, sensor: str) -> LiveFigures:
    """Join the estimator's wrench with the force sensor's, interpolated at the frames' stamps.

    Raises `DataError` when the bag holds no prediction.
    """
    measured_topic = f"/{NAMESPACE}/netft/wrench"
    predicted_topic = f"/{NAMESPACE}/{sensor}/wrench"
    status_topic = f"/{NAMESPACE}/{sensor}/inference"
    image_topic = f"/{NAMESPACE}/{sensor}/image/compressed"
    forces: dict[str, list[tuple[int, float, float, float]]] = {
        measured_topic: [],
        predicted_topic: [],
    }
    frames: set[int] = set()
    latencies: list[float] = []
    with BagReader(bag) as reader:
        topics = [measured_topic, predicted_topic, status_topic, image_topic]
        for record in reader.messages(topics):
            stamp = from_stamp(record.message.header.stamp)
            if record.topic in forces:
                force = record.message.wrench.force
                forces[record.topic].append((stamp, force.x, force.y, force.z))
            elif record.topic == image_topic:
                frames.add(stamp)
            else:
                latencies.append(record.message.latency)
    if not forces[predicted_topic] or not forces[measured_topic]:
        raise DataError(f"{bag}: no live wrench on {predicted_topic}; did the estimator run?")
    answered = {row[0] for row in forces[predicted_topic]}
    # The recording begins and ends between a frame and its answer.
    frames = {stamp for stamp in frames if min(answered) <= stamp <= max(answered)}
    reference_ns, reference = _by_stamp(forces[measured_topic])
    answer_ns, predicted = _by_stamp(forces[predicted_topic])
    # Frames before the first measurement or after the last have nothing to be compared with.
    inside = (answer_ns >= reference_ns[0]) & (answer_ns <= reference_ns[-1])
    answer_ns, predicted = answer_ns[inside], predicted[inside]
    times = (answer_ns - answer_ns[0]) * 1e-9
    reference_times = (reference_ns - answer_ns[0]) * 1e-9
    measured = np.stack(
        [np.interp(times, reference_times, column) for column in reference.T], axis=1
    )
    agreement = score(predicted, measured)
    return LiveFigures(
        times,
        predicted,
        measured,
        LiveScore(
            frames=len(frames),
            answered=len(frames & answered),
            rate_hz=float((len(times) - 1) / (times[-1] - times[0])),
            latency_ms={
                name: float(np.percentile(latencies, percentile) * 1e3)
                for name, percentile in (("p50", 50), ("p99", 99))
            },
            r2=agreement.r2,
            mae_n=agreement.mae,
        ),
    )


def save_picture(figures: LiveFigures, path: Path) -> None:
    """Predicted over measured force: time series and scatter, one row an axis."""
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(
        3, 2, figsize=(12, 8), width_ratios=[3, 1], layout="constrained", squeeze=False
    )
    for axis, (name, (series, scatter)) in enumerate(zip(AXES[:3], rows, strict=True)):
        measured, predicted = figures.measured[:, axis], figures.predicted[:, axis]
        draw_course(series, figures.times, measured, predicted)
        series.set_ylabel(f"F{name[1]} (N)")
        draw_scatter(scatter, measured, predicted)
        scatter.set_title(
            f"R² {figures.score.r2[name]:.3f}, MAE {figures.score.mae_n[name]:.3f} N", fontsize=10
        )
        scatter.set_ylabel("predicted (N)")
    rows[0][0].legend(loc="upper right")
    rows[-1][0].set_xlabel("time (s)")
    rows[-1][1].set_xlabel("measured (N)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _by_stamp(rows: list[tuple[int, float, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Stamps (N,) int64 ns in order, and their forces (N, 3) N."""
    stamps = np.array([row[0] for row in rows], dtype=np.int64)
    order = np.argsort(stamps)
    return stamps[order], np.array([row[1:] for row in rows])[order]
