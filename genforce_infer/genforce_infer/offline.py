"""Run the estimator over a recorded bag: predictions beside the force sensor's labels.

Example: genforce replay runs/demo/bag --infer runs/demo/model -o runs/demo/offline
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table as ConsoleTable

from genforce_collect.bags import BagReader
from genforce_collect.config import SensorConfig, load_sensor
from genforce_collect.errors import DataError
from genforce_collect.html import (
    PAGE_NAME,
    Page,
    Pictures,
    Section,
    Table,
    Tone,
    Verdict,
    command,
    write_page,
)
from genforce_infer.agreement import agreement_plots
from genforce_infer.bundle import read_bundle
from genforce_infer.parity import VARIES_N
from genforce_infer.pipeline import WRENCH_AXES, Estimate, ForcePipeline, State, markers_of
from genforce_infer.postprocess import Options
from genforce_infer.runtime import Model

MEASURED = "/genforce/netft/wrench"
SCORE_HEADS = ("axis", "MAE (N)", "R²", "within 1 σ")
MAX_GAP_S = 0.05  # between the force sensor's samples around a frame


@dataclass(frozen=True)
class Predictions:
    """One row a frame, in order of capture. Forces in N and N m, sensor frame, NaN where none."""

    stamp_ns: np.ndarray  # (N,) int64
    state: np.ndarray  # (N,) pipeline.State
    in_contact: np.ndarray  # (N,) bool
    predicted: np.ndarray  # (N, 6)
    deviation: np.ndarray  # (N, 6)
    measured: np.ndarray  # (N, 6), interpolated at the stamps


@dataclass(frozen=True)
class Score:
    """Agreement of predictions with measurements, over the frames that have both."""

    frames: int
    answered: int
    compared: int
    mae_n: dict[str, float]  # per axis and "total", the mean length of the error
    r2: dict[str, float]  # of axes on which the measured force varies
    coverage: dict[str, float]  # part within one stated deviation; only where one is stated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("bag", type=Path, help="recorded bag")
    add_options(parser, required=True)


def add_options(parser: argparse._ActionsContainer, required: bool) -> None:
    """The options alone, for a command that has a bag already."""
    parser.add_argument(
        "--infer", type=Path, required=required, metavar="BUNDLE", help="model bundle"
    )
    parser.add_argument("--sensor", help="sensor file; default: the one of the bag's session")
    parser.add_argument("--input", choices=("image", "markers"), default="image")
    parser.add_argument("--provider", choices=("auto", "tensorrt", "cuda", "cpu"), default="auto")
    parser.add_argument("--material", action="store_true", help="apply the material correction")
    parser.add_argument("-o", "--output", type=Path, help="folder; default: <bag>_predictions")


def run(args: argparse.Namespace) -> int:
    """Write predictions.csv, report.html and report.json, print the table."""
    with BagReader(args.bag) as bag:
        sensor = sensor_of(bag, args.sensor)
        pipeline = ForcePipeline(
            Model(read_bundle(args.infer), args.provider),
            sensor,
            Options(material=args.material),
            stale_s=0.0,
        )
        started = time.perf_counter()
        predictions = infer_bag(bag, pipeline, args.input)
    rate_hz = len(predictions.stamp_ns) / (time.perf_counter() - started)
    result = score(predictions)
    output = args.output or args.bag.with_name(f"{args.bag.name}_predictions")
    output.mkdir(parents=True, exist_ok=True)
    write_csv(predictions, output / "predictions.csv")
    report = {
        "bag": str(args.bag),
        "bundle": str(args.infer),
        "model_id": pipeline.model.manifest.model_id,
        "sensor": sensor.name,
        "frames_per_second": rate_hz,
        **asdict(result),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    page = write_page(_page(args, report, result, predictions), output / PAGE_NAME)
    console = Console()
    console.print(_table(result))
    console.print(
        f"{result.frames} frames, {result.answered} answered, {result.compared} compared, "
        f"{rate_hz:.0f} frames/s; report {page}"
    )
    return 0


def infer_bag(bag: BagReader, pipeline: ForcePipeline, source: str = "image") -> Predictions:
    """Answer every frame of the sensor in the bag. Raises `DataError` where there is none."""
    name = pipeline.sensor.name
    topic, answer = _source(pipeline, source)
    topic = f"/genforce/{name}/{topic}"
    if not bag.counts.get(topic):
        held = ", ".join(sorted(bag.topics)) or "nothing"
        raise DataError(f"{bag.path}: no frames on {topic}; it holds {held}")
    messages = track(
        bag.messages([topic]), description=name, total=bag.counts[topic], transient=True
    )
    stamps, estimates = [], []
    for record in messages:
        stamps.append(record.stamp_ns)
        estimates.append(answer(record.message, record.stamp_ns))
    return _collect(np.array(stamps, np.int64), estimates, measured_wrenches(bag))


def score(predictions: Predictions) -> Score:
    """MAE and R2 per force axis. Raises `DataError` where nothing can be compared."""
    both = np.isfinite(predictions.predicted).all(1) & np.isfinite(predictions.measured).all(1)
    if both.sum() < 2:
        raise DataError(
            f"no frame has both a prediction and a measurement on {MEASURED}; "
            f"{int((predictions.state == State.OK).sum())} frames were answered"
        )
    predicted, measured = predictions.predicted[both, :3], predictions.measured[both, :3]
    errors = predicted - measured
    mae = dict(zip(WRENCH_AXES, np.abs(errors).mean(0).tolist(), strict=False))
    mae["total"] = float(np.linalg.norm(errors, axis=1).mean())
    total = ((measured - measured.mean(0)) ** 2).sum(0)
    rest = (errors**2).sum(0)
    r2 = {
        axis: float(1 - rest[i] / total[i])
        for i, axis in enumerate(WRENCH_AXES[:3])
        if total[i] > VARIES_N**2 * len(errors)
    }
    deviation = predictions.deviation[both, :3]
    stated = np.isfinite(deviation).all()
    within = (np.abs(errors) <= deviation).mean(0).tolist() if stated else []
    return Score(
        frames=len(predictions.stamp_ns),
        answered=int(np.isfinite(predictions.predicted).all(1).sum()),
        compared=int(both.sum()),
        mae_n=mae,
        r2=r2,
        coverage=dict(zip(WRENCH_AXES, within, strict=False)),
    )


def write_csv(predictions: Predictions, path: Path) -> None:
    """One row a frame; forces in N and N m, empty where there is none."""
    head = ["stamp_ns", "state", "in_contact"]
    for kind in ("predicted", "deviation", "measured"):
        head += [f"{kind}_{axis}" for axis in WRENCH_AXES]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for row in zip(
            predictions.stamp_ns.tolist(),
            predictions.state.tolist(),
            predictions.in_contact.tolist(),
            np.hstack([predictions.predicted, predictions.deviation, predictions.measured]),
            strict=True,
        ):
            stamp, state, in_contact, values = row
            numbers = ["" if np.isnan(v) else f"{v:.6g}" for v in values]
            writer.writerow([stamp, State(state).name, int(in_contact), *numbers])


def sensor_of(bag: BagReader, given: str | None) -> SensorConfig:
    """The sensor named, or that of the bag's session. Raises `DataError` without either."""
    name = given or bag.metadata.get("sensor")
    if isinstance(name, dict):
        name = name.get("name")
    if not name:
        raise DataError(f"{bag.path}: the bag does not say its sensor; give --sensor")
    return load_sensor(name)


def _source(pipeline: ForcePipeline, source: str) -> tuple[str, Any]:
    if source == "markers":
        return "markers", lambda m, t: pipeline.process(markers_of(m), t)
    if pipeline.sensor.kind == "taxels":
        return "taxels", lambda m, t: pipeline.process_taxels(m.counts, t)
    return "image/compressed", lambda m, t: pipeline.process_jpeg(m.data.tobytes(), t)


def measured_wrenches(bag: BagReader) -> tuple[np.ndarray, np.ndarray]:
    """Stamps (M,) ns, rising, and wrenches (M, 6) of the force sensor."""
    stamps, values = [], []
    for record in bag.messages([MEASURED]):
        force, torque = record.message.wrench.force, record.message.wrench.torque
        stamps.append(record.stamp_ns)
        values.append([force.x, force.y, force.z, torque.x, torque.y, torque.z])
    times, first = np.unique(np.array(stamps, np.int64), return_index=True)
    return times, np.array(values, float).reshape(-1, 6)[first]


def _collect(
    stamps: np.ndarray, estimates: Iterable[Estimate], labels: tuple[np.ndarray, np.ndarray]
) -> Predictions:
    estimates = list(estimates)
    none = np.full(6, np.nan)
    return Predictions(
        stamps,
        np.array([e.state for e in estimates]),
        np.array([e.in_contact for e in estimates]),
        np.array([none if e.wrench is None else e.wrench for e in estimates]),
        np.array([e.standard_deviation for e in estimates]),
        interpolate(stamps, *labels),
    )


def interpolate(stamps: np.ndarray, times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` (M, K) at `times` (M,), rising, read at `stamps` (N,), all ns. NaN before the
    first, after the last and inside gaps of more than `MAX_GAP_S`. Returns (N, K)."""
    result = np.full((len(stamps), values.shape[1]), np.nan)
    if len(times) < 2:
        return result
    after = np.searchsorted(times, stamps)
    inside = (after > 0) & (after < len(times))
    after = np.clip(after, 1, len(times) - 1)
    gaps = times[after] - times[after - 1]
    good = inside & (gaps <= MAX_GAP_S * 1e9)
    part = ((stamps - times[after - 1]) / gaps)[:, None]
    mixed = values[after - 1] * (1 - part) + values[after] * part
    result[good] = mixed[good]
    return result


def _rows(result: Score) -> list[tuple[str, str, str, str]]:
    """Axis, MAE, R² and coverage, for tables; empty where there is none."""
    return [
        (
            axis,
            f"{mae:.3f}",
            f"{result.r2[axis]:.3f}" if axis in result.r2 else "",
            f"{result.coverage[axis]:.0%}" if axis in result.coverage else "",
        )
        for axis, mae in result.mae_n.items()
    ]


def _table(result: Score) -> ConsoleTable:
    table = ConsoleTable(*SCORE_HEADS)
    for row in _rows(result):
        table.add_row(*row)
    return table


def _page(
    args: argparse.Namespace, report: dict[str, Any], result: Score, predictions: Predictions
) -> Page:
    times_s = (predictions.stamp_ns - predictions.stamp_ns[0]) * 1e-9
    words = ["replay", args.bag, "--infer", args.infer, "--input", args.input]
    words += ["--sensor", args.sensor] if args.sensor else []
    words += ["--material"] if args.material else []
    states = {state.name: int((predictions.state == state).sum()) for state in State}
    return Page(
        kind="inference",
        title=f"{report['model_id']} on {args.bag.resolve().name}",
        command=command(*words),
        verdict=Verdict(
            Tone.PLAIN,
            f"mean error {result.mae_n['total']:.3f} N over {result.compared} frames",
        ),
        facts={
            "sensor": report["sensor"],
            "bundle": str(args.infer),
            "answered": f"{result.answered} of {result.frames} frames",
            "speed": f"{report['frames_per_second']:.0f} frames/s",
        },
        sections=(
            Section(
                "Agreement with the force sensor",
                (
                    Table(SCORE_HEADS, _rows(result)),
                    Pictures(
                        agreement_plots(
                            times_s, predictions.measured[:, :3], predictions.predicted[:, :3]
                        )
                    ),
                ),
            ),
            Section(
                "States of the answers",
                (Table(("state", "frames"), [(k, str(v)) for k, v in states.items() if v]),),
            ),
        ),
    )
