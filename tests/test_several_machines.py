"""Collector, estimator and cluster on machines of their own: network namespaces on a switch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genforce_collect.bags import BagReader

ROOT = Path(__file__).parents[1]
MACHINES = ROOT / "scripts" / "machines.sh"
NAME = f"gf{os.getpid()}"
ROBOT, CLUSTER = "10.77.0.1", "10.77.0.3"
TIMEOUT_S = 180.0
SUBNET = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET"}
LOCALHOST = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}

pytestmark = [pytest.mark.live, pytest.mark.timeout(420)]


class Machines:
    """Starts commands on the machines and ends them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []

    def command(self, machine: str, *words: object) -> list[str]:
        return [str(MACHINES), "on", machine, *map(str, words)]

    def start(self, machine: str, *words: object, **env: str) -> Path:
        """Start a command; the file with what it says."""
        log = self._folder / f"{len(self._running)}-{machine}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command(machine, *words),
                env=environment(**env),
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
            )
        self._running.append(process)
        return log

    def run(self, machine: str, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(machine, *words),
            env=environment(**env),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            cwd=self._folder,
        )

    def end(self) -> None:
        for process in reversed(self._running):
            process.send_signal(signal.SIGINT)
        for process in reversed(self._running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        self._running.clear()


def environment(**env: str) -> dict[str, str]:
    return {**os.environ, "MACHINES": NAME, **env}


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(MACHINES), *words], env=environment(), capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2 (apt install iproute2)")
    made = script("up", "robot", "gpu", "cluster")
    if made.returncode:
        script("down")
        pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
    yield
    script("down")


@pytest.fixture
def machines(network: None, tmp_path: Path) -> Iterator[Machines]:
    started = Machines(tmp_path)
    yield started
    started.end()


def wait(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)


def heard(machines: Machines, machine: str, bag: Path, seconds: int, **env: str) -> dict[str, int]:
    """Messages a machine hears in some seconds, by topic."""
    words = ("record", "--sensor", "array_1", "--seconds", seconds, "--out", bag)
    done = machines.run(machine, "genforce", *words, **env)  # fails where messages were lost
    assert bag.is_dir(), done.stdout + done.stderr
    with BagReader(bag) as reader:
        counts: dict[str, int] = {}
        for record in reader.messages():
            counts[record.topic] = counts.get(record.topic, 0) + 1
    return counts


def test_the_estimator_s_force_comes_back_to_the_collector_from_another_machine(
    machines: Machines, tmp_path: Path
) -> None:
    graph = ("genforce", "up", "collect_indent", "cell:=virtual", "sensor:=array_1")
    cell = machines.start("robot", *graph, **SUBNET)
    model = ROOT / "models" / "array_1" / "bundle"
    patient = ("--set", "stale_s:=5.0")  # the processors are those of one machine
    machines.start("gpu", "genforce", "serve", model, "--sensor", "array_1", *patient, **SUBNET)
    wrench = "/genforce/array_1/wrench"
    tries = iter(range(99))

    def force_arrives() -> bool:
        bag = tmp_path / f"robot-{next(tries)}"
        return heard(machines, "robot", bag, 5, **SUBNET).get(wrench, 0) > 10

    wait(force_arrives, cell)
    there = heard(machines, "gpu", tmp_path / "gpu", 4, **SUBNET)
    assert there.get("/genforce/netft/wrench", 0) > 500
    assert there.get("/genforce/array_1/image/compressed", 0) > 10
    alone = heard(machines, "gpu", tmp_path / "alone", 4, **LOCALHOST)
    assert not {topic for topic in alone if "netft" in topic or "image" in topic}


def test_workers_on_two_machines_make_one_data_set(machines: Machines, tmp_path: Path) -> None:
    scheduler = machines.start("cluster", "dask", "scheduler", "--host", CLUSTER, "--no-dashboard")
    address = f"tcp://{CLUSTER}:8786"
    workers = [
        machines.start(machine, "dask", "worker", address, "--nthreads", 1, "--no-dashboard")
        for machine in ("robot", "gpu")
    ]
    for worker in workers:
        wait(lambda log=worker: "Registered to" in log.read_text(), worker)
    out = tmp_path / "made"
    words = ("--sensors", "array_1", "--indenters", "sphere", "cone", "--contacts", 1, "--quick")
    made = machines.run("cluster", "genforce", "synth", *words, "-o", out, "--scheduler", address)
    assert made.returncode == 0, made.stdout + made.stderr
    assert {path.name for path in out.rglob("*") if path.is_dir()} >= {"sphere", "cone"}
    assert "10.77.0.1" in scheduler.read_text()
    assert "10.77.0.2" in scheduler.read_text()
