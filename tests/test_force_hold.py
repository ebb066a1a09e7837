"""A robot holds a force by the live topic alone, on the virtual cell."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import rclpy
from geometry_msgs.msg import WrenchStamped
from rclpy.executors import SingleThreadedExecutor

from genforce_bringup.session import RunningGraph
from genforce_collect.nodes.common import NAMESPACE, spin_until, stream_qos

pytestmark = pytest.mark.live

MODEL = Path(__file__).parents[1] / "models" / "array_1" / "bundle"
TARGET_N, TOLERANCE_N = 2.0, 0.3  # on a machine that does other things too
HELD_SAMPLES = 1000  # of the force sensor: one second
TIMEOUT_S = 90.0


def test_the_example_client_holds_two_newtons(fast_cell: Path, tmp_path: Path) -> None:
    arguments = {"cell": str(fast_cell), "sensor": "array_1", "bundle": str(MODEL)}
    client = [sys.executable, "-m", "genforce_infer.examples.hold_force"]
    measured: deque[float] = deque(maxlen=HELD_SAMPLES)
    with (
        RunningGraph("infer", arguments, tmp_path / "graph.log") as graph,
        subprocess.Popen([*client, "--ros-args", "-p", f"force_n:={TARGET_N}"]) as hold,
    ):
        rclpy.init()
        node = rclpy.create_node("judge", namespace=NAMESPACE)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        node.create_subscription(
            WrenchStamped,
            "netft/wrench",  # the truth, which the client does not see
            lambda message: measured.append(-message.wrench.force.z),
            stream_qos(1000),
        )

        def held() -> bool:
            graph.check()
            near = (abs(force - TARGET_N) < TOLERANCE_N for force in measured)
            return len(measured) == HELD_SAMPLES and all(near)

        try:
            assert spin_until(executor, held, TIMEOUT_S), f"force at the end: {list(measured)[-5:]}"
        finally:
            hold.terminate()
            node.destroy_node()
            executor.shutdown()
            rclpy.try_shutdown()
