"""What recording costs and loses: the recorder as a process, fed by a process of its own at the
rates of a session (wrench 1 kHz, pose 500 Hz, camera and marker images at 60 fps).

The baseline of the cost of a sample is the way of the original system: one loop that rewrites the
whole CSV of a contact at every sample, here at its 200th row.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import rclpy
from geometry_msgs.msg import PoseStamped, WrenchStamped
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rows import Row
from sensor_msgs.msg import CompressedImage

from genforce_collect.nodes.common import NAMESPACE, Stream, run, spin_until, to_stamp
from genforce_collect.verification import verify
from genforce_msgs.msg import Markers
from genforce_msgs.srv import StartRecording, StopRecording

STREAMS = {
    "wrench": ("netft/wrench", WrenchStamped, 1000),
    "pose": ("robot/tcp_pose", PoseStamped, 500),
    "image": ("array_1/image/compressed", CompressedImage, 60),
    "markers": ("array_1/markers", Markers, 60),
}
SECONDS_EACH = 3.0
SECONDS_ALL = 12.0


class Publisher(Node):
    """Publishes streams at their rates: what the drivers of a cell do."""

    def __init__(self, names: list[str]) -> None:
        super().__init__("bench_publisher", namespace=NAMESPACE)
        self._streams = []
        for name in names:
            topic, kind, rate = STREAMS[name]
            message = kind()
            if name == "image":
                message.data = array("B", os.urandom(40_000))
            elif name == "markers":
                message.mask = array("B", (b"\x00" * 70 + b"\x1f\xff") * 533)
            self._streams.append((Stream(self, kind, topic, rate), rate, message))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._publish)
        self._thread.start()

    def _publish(self) -> None:
        begun, counts = time.monotonic(), [0] * len(self._streams)
        while not self._done.wait(0.001):
            elapsed = time.monotonic() - begun
            for i, (stream, rate, message) in enumerate(self._streams):
                while counts[i] < elapsed * rate:
                    message.header.stamp = to_stamp(time.time_ns())
                    stream.publish(message)
                    counts[i] += 1

    def close(self) -> None:
        self._done.set()
        self._thread.join()


class Recorder:
    """The recorder process and a client of its services."""

    def __init__(self) -> None:
        rclpy.init()
        self._node = rclpy.create_node("bench_client", namespace=NAMESPACE)
        self._executor = EventsExecutor()
        self._executor.add_node(self._node)
        self._start = self._node.create_client(StartRecording, "recorder/start")
        self._stop = self._node.create_client(StopRecording, "recorder/stop")
        self._process = subprocess.Popen([sys.executable, "-m", "genforce_collect.nodes.recorder"])
        self._wait(self._start.service_is_ready)

    def record(self, names: list[str], bag: Path, seconds: float) -> tuple[float, float, float]:
        """Record these streams; returns CPU (cores), memory growth (MB) and messages a second."""
        publisher = subprocess.Popen([sys.executable, __file__, *names])
        try:
            topics = [f"/{NAMESPACE}/{STREAMS[name][0]}" for name in names]
            self._wait(lambda: all(map(self._flows, topics)))
            spin_until(self._executor, lambda: False, 0.5)  # matched in both processes
            self._call(self._start, StartRecording.Request(bag=str(bag)))
            spin_until(self._executor, lambda: False, 1.0)
            cpu, memory, begun = self._cpu_s(), self._memory_mb(), time.monotonic()
            spin_until(self._executor, lambda: False, seconds)
            cores = (self._cpu_s() - cpu) / (time.monotonic() - begun)
            growth = self._memory_mb() - memory
            held = self._call(self._stop, StopRecording.Request())
        finally:
            publisher.terminate()
            publisher.wait()
        return cores, growth, sum(held.received) / (seconds + 1.0)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._node.destroy_node()
        self._executor.shutdown()
        rclpy.shutdown()

    def _flows(self, topic: str) -> bool:
        found = self._node.get_subscriptions_info_by_topic(topic)
        recorded = any(info.node_name == "recorder" for info in found)
        return recorded and self._node.count_publishers(topic) > 0

    def _wait(self, done: Callable[[], bool]) -> None:
        if not spin_until(self._executor, done, 15.0):
            raise TimeoutError("the recorder did not come up")

    def _call(self, client, request):
        answer = client.call_async(request)
        self._wait(answer.done)
        if not answer.result().success:
            raise RuntimeError(answer.result().message)
        return answer.result()

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _memory_mb(self) -> float:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def rewriting_ms(folder: Path, row_number: int = 200) -> float:
    """Cost (ms) of a sample where each one rewrites the whole file."""
    rows = [[f"{i + k / 7:.6f}" for k in range(6)] for i in range(row_number)]
    begun = time.perf_counter()
    for _ in range(50):
        with (folder / "ft.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return (time.perf_counter() - begun) / 50 * 1e3


def bench() -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recorder = Recorder()
        try:
            for stream, (_, _, rate) in STREAMS.items():
                cores, _, _ = recorder.record([stream], folder / stream, SECONDS_EACH)
                rows.append(
                    Row(f"recorder: CPU, {stream} at {rate} Hz", cores * 100, "% of a core")
                )
            cores, growth, rate = recorder.record([*STREAMS], folder / "all", SECONDS_ALL)
        finally:
            recorder.close()
        report = verify(folder / "all")
        cost_ms, baseline_ms = cores / rate * 1e3, rewriting_ms(folder)
    lost = sum(topic.lost or 0 for topic in report.topics)
    delay_ms = max(topic.delay_p99_s for topic in report.topics) * 1e3
    return [
        *rows,
        Row("recorder: CPU, all streams", cores * 100, "% of a core", "<= 30"),
        Row("recorder: lost of all streams", float(lost), "messages", "<= 0"),
        Row("recorder: messages a second", rate, "1/s"),
        Row("recorder: arrival after the stamp, worst stream p99", delay_ms, "ms", "<= 20"),
        Row("recorder: memory growth", growth, "MB", "<= 20"),
        Row(
            "recorder: cost of a message",
            cost_ms,
            "ms",
            baseline=baseline_ms,
            ratio=baseline_ms / cost_ms,
        ),
    ]


if __name__ == "__main__":
    sys.exit(run(lambda: Publisher(sys.argv[1:])))
