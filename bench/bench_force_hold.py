"""The virtual robot holds 2 N through the live force topic, judged by the virtual Nano17; the
picture is runs/force_hold.png. Takes models/array_1/bundle, or $GENFORCE_BUNDLE."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import yaml
from geometry_msgs.msg import WrenchStamped
from rclpy.executors import SingleThreadedExecutor
from rows import Row

from genforce_bringup.session import RunningGraph
from genforce_collect.config import find_config
from genforce_collect.nodes.common import NAMESPACE, from_stamp, spin_until, stream_qos

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
SENSOR, INDENTER = "array_1", "sphere"
TARGET_N = 2.0
TOUCH_N, TOUCH_SAMPLES = 0.1, 20  # of the force sensor in a row: one alone may be noise
APPROACH_S = 60.0  # until the first touch, starting of the processes included
SETTLE_S = 3.0
HOLD_S = 6.0
HOST = "127.58.8.2"


def bench() -> list[Row]:
    """RMS of the true force about the target after settling, and how it got there."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        arguments = {
            "cell": str(own_cell(folder / "cell.yaml")),
            "sensor": SENSOR,
            "indenter": INDENTER,
            "bundle": os.environ.get("GENFORCE_BUNDLE", str(ROOT / "models" / SENSOR / "bundle")),
        }
        with RunningGraph("infer", arguments, folder / "graph.log") as graph, hold_force():
            measured, live = record(graph)
    touch = first_time(measured, TOUCH_N)
    measured[:, 0] -= touch
    live[:, 0] -= touch
    settled = measured[measured[:, 0] > SETTLE_S, 1]
    picture(measured, live)
    head = "force_hold: 2 N,"
    rms = float(np.sqrt(np.mean((settled + TARGET_N) ** 2)))
    return [
        Row(f"{head} RMS error after {SETTLE_S:.0f} s", rms, "N", "<= 0.1"),
        Row(f"{head} mean error", float(np.mean(-settled) - TARGET_N), "N"),
        Row(f"{head} spread", float(np.std(settled)), "N"),
        Row(f"{head} overshoot", float(max(0.0, -measured[:, 1].min() - TARGET_N)), "N"),
        Row(f"{head} touch to 90 %", first_time(measured, 0.9 * TARGET_N), "s"),
    ]


def first_time(measured: np.ndarray, force_n: float) -> float:
    """When (s) the normal force of (N, 2) times and Fz stayed above this for the first time; NaN
    where it never did."""
    above = np.convolve(measured[:, 1] < -force_n, np.ones(TOUCH_SAMPLES), "valid")
    held = above == TOUCH_SAMPLES
    return float(measured[np.argmax(held), 0]) if held.any() else float("nan")


def own_cell(path: Path) -> Path:
    """The virtual cell on addresses of its own."""
    data = yaml.safe_load(find_config("cells", "virtual").read_text())
    data["robot"]["host"] = data["netft"]["host"] = HOST
    data["camera"]["source"] = f"http://{HOST}:8080/stream.mjpg"
    path.write_text(yaml.safe_dump(data))
    return path


@contextmanager
def hold_force() -> Iterator[None]:
    """The example client in a process of its own."""
    parameters = ["-p", f"sensor:={SENSOR}", "-p", f"force_n:={TARGET_N}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "genforce_infer.examples.hold_force", "--ros-args", *parameters]
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def record(graph: RunningGraph) -> tuple[np.ndarray, np.ndarray]:
    """Time (s) and Fz (N) of force sensor and estimator, until the hold is over."""
    rclpy.init()
    node = rclpy.create_node("judge", namespace=NAMESPACE)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    measured: list[tuple[float, float]] = []
    live: list[tuple[float, float]] = []

    def into(rows: list[tuple[float, float]]) -> Any:
        return lambda m: rows.append((from_stamp(m.header.stamp) * 1e-9, m.wrench.force.z))

    try:
        node.create_subscription(WrenchStamped, "netft/wrench", into(measured), stream_qos(1000))
        node.create_subscription(WrenchStamped, f"{SENSOR}/wrench", into(live), stream_qos(60))

        def touching() -> bool:
            graph.check()
            return len(measured) > TOUCH_SAMPLES and all(
                fz < -TOUCH_N for _, fz in measured[-TOUCH_SAMPLES:]
            )

        if not spin_until(executor, touching, APPROACH_S):
            raise RuntimeError(f"no touch in {APPROACH_S:.0f} s; {len(live)} live wrenches")
        end = time.monotonic() + SETTLE_S + HOLD_S
        spin_until(executor, lambda: time.monotonic() > end)
    finally:
        node.destroy_node()
        executor.shutdown()
        rclpy.try_shutdown()
    return np.array(sorted(measured)), np.array(sorted(live))


def picture(measured: np.ndarray, live: np.ndarray) -> None:
    """The step response."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    axes.axhspan(TARGET_N - 0.1, TARGET_N + 0.1, color="0.9", label="2 N ± 0.1 N")
    axes.plot(measured[:, 0], -measured[:, 1], color="0.5", lw=2, label="force sensor")
    axes.plot(live[:, 0], -live[:, 1], color="C3", lw=1, label="live estimate")
    axes.set(xlim=(-1, SETTLE_S + HOLD_S), xlabel="time since touch (s)", ylabel="-Fz (N)")
    axes.legend(loc="lower right")
    figure.savefig(RUNS / "force_hold.png", dpi=110)
    plt.close(figure)
