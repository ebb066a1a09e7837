"""Record a whole virtual cell for minutes: camera 60 fps, wrench 1 kHz, pose 500 Hz, markers.

    python bench/soak_collect.py --minutes 10

Robot, force sensor, camera, segmenter and recorder run as they do in a collection; the arm presses
and shears the gel all the while. Every half minute a line with the recorder's counts; at the end
what was produced, recorded and lost of each stream, the processor time of each process, and how
its memory grew, also in runs/soak_collect.json. Ends with 1 where a message was lost, a stream was
slower than its rate, or memory grew by more than 1 MB a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import rclpy
import yaml
from geometry_msgs.msg import PoseStamped
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rich.console import Console
from rich.table import Table

from genforce_bringup.graph import GRAPHS, Process
from genforce_bringup.up import command_line
from genforce_collect.nodes.common import LATCHED_QOS, NAMESPACE, spin_until
from genforce_collect.verification import BagReport, verify
from genforce_msgs.action import MoveLinear
from genforce_msgs.msg import RecorderStatus, RobotState
from genforce_msgs.srv import StartRecording, StopRecording

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "runs" / "soak_collect.json"
HOST, FPS = "127.53.7.2", 60.0
RATES_HZ = {"netft/wrench": 1000.0, "robot/tcp_pose": 500.0, "image": FPS, "markers": FPS}
ON_RATE = 0.99
LINE_S = 30.0
SAMPLE_S = 5.0  # of memory
SETTLED_S = 30.0  # from then on memory is to be flat
MAX_SLOPE_MB_MIN = 1.0
STARTUP_S = 60.0
WAY = ((0.0, 0.0, -0.0008), (0.001, 0.0, -0.0008), (0.0, 0.0, -0.0008), (0.0, 0.0, 0.002))
SPEED_M_S, ACCELERATION_M_S2 = 0.005, 0.1


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    cpu_percent: float  # of one core
    memory_mb: float
    slope_mb_min: float  # once settled


def main() -> int:
    """Exit code 0 where nothing was lost, every stream kept its rate, and memory stayed flat."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="keep the bag here")
    args = parser.parse_args()
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bag = args.out or folder / "bag"
        cell = write_cell(folder / "cell.yaml")
        with running(graph_processes(cell), folder / "log") as processes, Client() as client:
            client.bring_up()
            meter = Meter(processes)
            client.record(bag, args.minutes * 60, meter)
            costs = meter.costs()
        report = verify(bag)
    show(report, costs)
    write(report, costs)
    return judge(report, costs)


def write_cell(path: Path) -> Path:
    """The virtual cell on addresses of its own, with a faster camera."""
    source = ROOT / "launch" / "config" / "cells" / "virtual.yaml"
    data = yaml.safe_load(source.read_text())
    data["robot"]["host"] = data["netft"]["host"] = HOST
    data["camera"] |= {"source": f"http://{HOST}:8080/stream.mjpg", "fps": FPS}
    path.write_text(yaml.safe_dump(data))
    return path


def graph_processes(cell: Path) -> list[Process]:
    """Those of a collection but for the indenter: here the arm moves without pause."""
    processes = GRAPHS["collect_indent"].processes({"cell": str(cell)})
    return [process for process in processes if process.executable != "indenter"]


@contextmanager
def running(processes: list[Process], log: Path) -> Iterator[dict[str, psutil.Process]]:
    """The processes by name, with their output in a file."""
    with log.open("wb") as output:
        started = {
            process.label: subprocess.Popen(
                command_line(process), stdout=output, stderr=subprocess.STDOUT
            )
            for process in processes
        }
    try:
        yield {label: psutil.Process(process.pid) for label, process in started.items()}
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.wait(20)


class Client:
    """Keeps the arm moving and has all recorded."""

    def __init__(self) -> None:
        rclpy.init()
        self._node = rclpy.create_node("soak", namespace=NAMESPACE)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._mover = ActionClient(self._node, MoveLinear, "robot/move_linear")
        self._start = self._node.create_client(StartRecording, "recorder/start")
        self._stop = self._node.create_client(StopRecording, "recorder/stop")
        self._ready = False
        self._status = RecorderStatus()
        self._moves = 0
        for kind, topic, note in (
            (RobotState, "robot/state", self._on_state),
            (RecorderStatus, "recorder/status", self._on_status),
        ):
            self._node.create_subscription(kind, topic, note, LATCHED_QOS)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._mover.destroy()
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.try_shutdown()

    def _on_state(self, state: RobotState) -> None:
        self._ready = state.ready

    def _on_status(self, status: RecorderStatus) -> None:
        self._status = status

    def bring_up(self) -> None:
        """Wait until the robot is ready and the recorder holds every stream."""
        self._wait(lambda: self._ready and self._start.service_is_ready(), STARTUP_S)
        self._wait(self._all_held, STARTUP_S)

    def _all_held(self) -> bool:
        names = ("netft/wrench", "robot/tcp_pose", "array_1/image/compressed", "array_1/markers")
        found = [
            self._node.get_subscriptions_info_by_topic(f"/{NAMESPACE}/{name}") for name in names
        ]
        return all(any(info.node_name == "recorder" for info in infos) for infos in found)

    def record(self, bag: Path, seconds: float, meter: Meter) -> None:
        """Record for so long, moving."""
        self._call(self._start, StartRecording.Request(bag=str(bag)))
        began = time.monotonic()
        next_sample, next_line = began, began + LINE_S
        motion = self._move()
        while (now := time.monotonic()) - began < seconds:
            spin_until(self._executor, lambda: False, 0.05)
            if motion.done():
                motion = self._move()
            if now > next_sample:
                next_sample += SAMPLE_S
                meter.sample()
            if now > next_line:
                next_line += LINE_S
                self._print_line(now - began)
        meter.sample()
        self._call(self._stop, StopRecording.Request())

    def _print_line(self, seconds: float) -> None:
        status = self._status
        print(
            f"{seconds / 60:5.1f} min  {sum(status.received):9,} messages  "
            f"{sum(status.lost)} lost  {status.bytes_written / 2**20:.0f} MB  "
            f"{self._moves} moves",
            flush=True,
        )

    def _move(self) -> Any:
        """The next leg of the way, once the arm is ready; a future of its result."""
        self._wait(lambda: self._ready, STARTUP_S)
        goal = MoveLinear.Goal(speed=SPEED_M_S, acceleration=ACCELERATION_M_S2)
        target = WAY[self._moves % len(WAY)] if self._moves else WAY[-1]
        self._moves += 1
        pose = PoseStamped().pose
        pose.position.x, pose.position.y, pose.position.z = target
        pose.orientation.x, pose.orientation.w = 1.0, 0.0
        goal.pose = pose
        sent = self._mover.send_goal_async(goal)
        self._wait(sent.done, 10.0)
        self._ready = False  # until the state after the move says so
        return sent.result().get_result_async()

    def _call(self, client: Any, request: Any) -> None:
        answer = client.call_async(request)
        self._wait(answer.done, 30.0)
        if not answer.result().success:
            raise RuntimeError(answer.result().message)

    def _wait(self, done: Callable[[], bool], timeout_s: float) -> None:
        if not spin_until(self._executor, done, timeout_s):
            raise RuntimeError("the cell does not come up, or does not answer")


class Meter:
    """Processor time and memory of each process and its children."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self._times: list[float] = []
        self._cpu: dict[str, list[float]] = {name: [] for name in processes}
        self._memory: dict[str, list[float]] = {name: [] for name in processes}

    def sample(self) -> None:
        """Look once."""
        self._times.append(time.monotonic())
        for name, process in self._processes.items():
            family = [process, *process.children(recursive=True)]
            times = [member.cpu_times() for member in family]
            self._cpu[name].append(sum(t.user + t.system for t in times))
            self._memory[name].append(sum(m.memory_info().rss for m in family) / 2**20)

    def costs(self) -> dict[str, Cost]:
        """Over all samples; the slope of memory over those after it settled."""
        times = np.array(self._times) - self._times[0]
        settled = times >= min(SETTLED_S, times[-1] / 2)
        return {
            name: Cost(
                100 * (self._cpu[name][-1] - self._cpu[name][0]) / times[-1],
                self._memory[name][-1],
                60 * float(np.polyfit(times[settled], np.array(memory)[settled], 1)[0]),
            )
            for name, memory in self._memory.items()
        }


def show(report: BagReport, costs: dict[str, Cost]) -> None:
    """Print both tables."""
    console = Console()
    streams = Table("stream", "produced", "recorded", "lost", "Hz", title="streams")
    for topic in report.topics:
        produced = topic.received + (topic.lost or 0) + topic.device_lost
        lost = "-" if topic.lost is None else str(topic.lost + topic.device_lost)
        streams.add_row(
            topic.name, str(produced), str(topic.received), lost, f"{topic.rate_hz:.1f}"
        )
    processes = Table("process", "% of a core", "MB", "MB/min", title="processes")
    for name, cost in costs.items():
        processes.add_row(
            name, f"{cost.cpu_percent:.1f}", f"{cost.memory_mb:.0f}", f"{cost.slope_mb_min:+.2f}"
        )
    processes.add_row("all", f"{sum(cost.cpu_percent for cost in costs.values()):.1f}", "", "")
    console.print(streams, processes)


def write(report: BagReport, costs: dict[str, Cost]) -> None:
    """The same figures for machines."""
    REPORT.parent.mkdir(exist_ok=True)
    figures = {
        "seconds": report.duration_s,
        "streams": [asdict(topic) for topic in report.topics],
        "processes": {name: asdict(cost) for name, cost in costs.items()},
    }
    REPORT.write_text(json.dumps(figures, indent=1) + "\n")


def judge(report: BagReport, costs: dict[str, Cost]) -> int:
    """Print what is wrong; the exit code."""
    wrong = list(report.problems)
    for part, rate in RATES_HZ.items():
        found = [topic.rate_hz for topic in report.topics if part in topic.name]
        if not found or found[0] < ON_RATE * rate:
            wrong.append(f"{part}: {found[0] if found else 0:.1f} Hz of {rate:g}")
    wrong += [
        f"{name}: memory grows by {cost.slope_mb_min:.2f} MB a minute"
        for name, cost in costs.items()
        if cost.slope_mb_min > MAX_SLOPE_MB_MIN
    ]
    for text in wrong:
        print(f"error: {text}", file=sys.stderr)
    if not wrong:
        print(f"nothing lost in {report.duration_s / 60:.1f} min; {REPORT}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
