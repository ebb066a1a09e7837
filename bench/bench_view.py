"""What the live view costs: the same contacts collected on the virtual cell with it and without.

CPU is that of the view's two processes, node and server, and not of a browser, which may run on
another machine. That it does not slow the collection is told by the time the contacts take, by what
is lost, and by how late the messages arrive at the recorder.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from rows import Row

from genforce_bringup.session import CollectClient, RunningGraph
from genforce_collect.verification import verify
from genforce_msgs.action import CollectIndent

CELL = Path(__file__).parents[1] / "launch" / "config" / "cells" / "virtual.yaml"
HOST = "127.71.9.1"
CONTACTS = list(range(40, 48))
VIEW_PROCESSES = ("genforce_collect/viewer", "rerun_cli/rerun")


@dataclass(frozen=True)
class Run:
    """A collection."""

    seconds: float
    lost: int
    delay_p99_ms: float  # of the slowest stream
    view_cores: float


def collect(folder: Path, view: bool) -> Run:
    """Collect the contacts; the CPU is averaged over the whole collection."""
    data = yaml.safe_load(CELL.read_text())
    data["robot"]["host"] = data["netft"]["host"] = HOST
    data["camera"]["source"] = f"http://{HOST}:8080/stream.mjpg"
    cell = folder / "cell.yaml"
    cell.write_text(yaml.safe_dump(data))
    bag = folder / f"bag_{view}"
    goal = CollectIndent.Goal(
        sensor="array_1", indenter="sphere", contacts=CONTACTS, bag=str(bag), execute_motion=True
    )
    arguments = {"cell": str(cell), "view": str(view).lower()}
    begun: list[tuple[float, float]] = []

    def note_begin(_: CollectIndent.Feedback) -> None:
        if not begun:
            begun.append((time.monotonic(), _view_cpu_s()))

    with (
        RunningGraph("collect_indent", arguments, folder / "log") as graph,
        CollectClient(graph) as client,
    ):
        client.run(goal, note_begin)
        seconds, cpu_s = time.monotonic() - begun[0][0], _view_cpu_s() - begun[0][1]
    report = verify(bag)
    return Run(
        seconds,
        sum(topic.lost or 0 for topic in report.topics),
        max(topic.delay_p99_s for topic in report.topics) * 1e3,
        cpu_s / seconds,
    )


def _view_cpu_s() -> float:
    return sum(
        sum(process.cpu_times()[:2])
        for process in psutil.Process().children(recursive=True)
        if any(name in " ".join(process.cmdline()) for name in VIEW_PROCESSES)
    )


def bench() -> list[Row]:
    """The figures."""
    with tempfile.TemporaryDirectory() as name:
        without = collect(Path(name), view=False)
        viewed = collect(Path(name), view=True)
    share = viewed.seconds / without.seconds
    return [
        Row("view: CPU of node and server", viewed.view_cores * 100, "% of a core", "<= 15"),
        Row("view: time of a collection, of that without", share, "", "<= 1.05"),
        Row("view: lost", float(viewed.lost), "messages", "<= 0", float(without.lost)),
        Row(
            "view: arrival after the stamp, worst stream p99",
            viewed.delay_p99_ms,
            "ms",
            baseline=without.delay_p99_ms,
        ),
    ]
