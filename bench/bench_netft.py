"""The wrench stream from a virtual Net F/T box, through the node, to a subscriber.

Box, node and subscriber are processes of their own; 2 ms of network jitter and 50 ppm of drift are
injected, and the box knows when each of its samples was due.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import rclpy
from geometry_msgs.msg import WrenchStamped
from rclpy.experimental import EventsExecutor
from rows import Row

from genforce_collect.nodes.common import NAMESPACE, from_stamp, spin_until, stream_qos
from genforce_msgs.msg import StreamTimes
from genforce_sim.devices.netft_box import NetftBox

HOST, RDT, HTTP = "127.52.7.2", 30049, 8081
RATE_HZ = 1000.0
SECONDS = 10.0
SETTLE_S = 2.0
JITTER_S = 2e-3
DRIFT = 5e-5
CELL = f"""
name: bench
robot: {{host: {HOST}}}
netft: {{host: {HOST}, rdt_port: {RDT}, http_port: {HTTP}, rate_hz: {RATE_HZ}}}
camera: {{source: "0"}}
sensor_pose: [0, 0, 0, 0, 0, 0]
limits: {{workspace_min_m: [-1, -1, -1], workspace_max_m: [1, 1, 1]}}
"""


def bench() -> list[Row]:
    with virtual_box() as epoch_ns, netft_node() as node:
        heard = Heard()
        try:
            heard.spin(SETTLE_S)
            cpu, started = cpu_seconds(node.pid), time.monotonic()
            first = len(heard.stamps)
            heard.spin(SECONDS)
            load = (cpu_seconds(node.pid) - cpu) / (time.monotonic() - started)
            last = len(heard.stamps)
            heard.spin(0.5)  # for the reports on the last of them
        finally:
            heard.close()
    reported = {
        stamp: (receive, epoch_ns + device_time * 1e9 * (1 + DRIFT))
        for report in heard.reports
        for stamp, receive, device_time in zip(
            report.stamp_ns, report.receive_ns, report.device_time, strict=True
        )
    }
    stamps = heard.stamps[first:last]
    published = [stamp for stamp in reported if stamps[0] <= stamp <= stamps[-1]]
    device_lost = heard.reports[-1].device_lost - heard.reports[0].device_lost
    receive, truth = np.array([reported[stamp] for stamp in published]).T
    error_ms = float(np.percentile(np.abs(np.array(published) - truth), 99) / 1e6)
    arrival_ms = float(np.percentile(np.abs(receive - truth), 99) / 1e6)
    return [
        Row("netft: samples received at 1 kHz", len(stamps) / SECONDS, "1/s", ">= 990"),
        Row(
            "netft: samples lost, box to subscriber",
            len(set(published) - set(stamps)) + device_lost,
            "",
            "<= 0",
        ),
        Row("netft: CPU of the node", 100 * load, "% of a core", "<= 15"),
        Row(
            "netft: stamp error p99, 2 ms jitter",
            error_ms,
            "ms",
            "<= 1",
            arrival_ms,
            arrival_ms / error_ms,
        ),
    ]


class Heard:
    """What a subscriber takes in."""

    def __init__(self) -> None:
        rclpy.init()
        self.stamps: list[int] = []
        self.reports: list[StreamTimes] = []
        self._node = rclpy.create_node("bench_netft", namespace=NAMESPACE)
        self._node.create_subscription(
            WrenchStamped,
            "netft/wrench",
            lambda message: self.stamps.append(from_stamp(message.header.stamp)),
            stream_qos(RATE_HZ),
        )
        self._node.create_subscription(
            StreamTimes, "stream_times", self.reports.append, stream_qos(10)
        )
        self._executor = EventsExecutor()
        self._executor.add_node(self._node)

    def spin(self, seconds: float) -> None:
        if not spin_until(self._executor, lambda: len(self.reports) > 0, 20.0):
            raise RuntimeError("the netft node does not publish")
        spin_until(self._executor, lambda: False, seconds)

    def close(self) -> None:
        self._node.destroy_node()
        self._executor.shutdown()
        rclpy.try_shutdown()


@contextmanager
def virtual_box() -> Iterator[int]:
    """Gives the system time (ns) at which the box's counter was 0."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        if not ours.poll(20.0):
            raise RuntimeError("the virtual box does not start")
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def serve(pipe: Connection) -> None:
    """Body of the box's process."""
    wrench = np.zeros(6)
    with NetftBox(HOST, RDT, HTTP, lambda _: wrench, rate_hz=RATE_HZ, drift=DRIFT) as box:
        box.delay(JITTER_S)
        pipe.send(box.host_time_ns(0))
        signal.pause()


@contextmanager
def netft_node() -> Iterator[subprocess.Popen[bytes]]:
    """The node, reading that box."""
    with tempfile.TemporaryDirectory() as folder:
        cell = Path(folder, "cell.yaml")
        cell.write_text(CELL)
        command = [sys.executable, "-m", "genforce_collect.nodes.netft", "--ros-args"]
        with subprocess.Popen([*command, "-p", f"cell:={cell}"], stderr=subprocess.DEVNULL) as node:
            try:
                yield node
            finally:
                node.send_signal(signal.SIGINT)


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
