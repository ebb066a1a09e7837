"""The launch files under the real `ros2 launch`. It comes with an apt ROS 2, not with the wheels:
without it these tests are skipped."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import rclpy
from rclpy.action import ActionClient
from rclpy.experimental import EventsExecutor

from genforce_bringup.graph import GRAPHS
from genforce_collect.nodes.common import NAMESPACE, await_answer, spin_until
from genforce_collect.verification import verify
from genforce_msgs.action import CollectIndent

LAUNCH_FILES = Path(__file__).parents[1] / "launch"
PATIENCE_S = 60.0

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(
        shutil.which("ros2") is None or find_spec("launch_ros") is None,
        reason="ros2 launch is not installed (it comes with an apt ROS 2)",
    ),
]


@pytest.mark.parametrize("name", GRAPHS)
def test_show_args_lists_every_argument_with_its_description(name: str):
    command = ["ros2", "launch", "genforce_bringup", f"{name}.launch.py", "--show-args"]
    shown = " ".join(subprocess.check_output(command, text=True).split())
    for argument in GRAPHS[name].arguments:
        assert f"'{argument.name}': {argument.description}" in shown


def launch(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["ros2", "launch", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def interrupt(process: subprocess.Popen[str]) -> str:
    """End a launch as Ctrl-C in a terminal does; its output. No process of it may stay."""
    children = psutil.Process(process.pid).children(recursive=True)
    for each in (process, *children):  # a terminal sends SIGINT to all
        each.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=PATIENCE_S)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    return text


def test_the_virtual_cell_starts_by_package_name_and_ends_with_ctrl_c(fast_cell, loopback_host):
    process = launch("genforce_bringup", "virtual_cell.launch.py", f"cell:={fast_cell}")
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex((loopback_host, 30004)) == 0:
                break
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "virtual cell" in interrupt(process)


def test_a_collection_launched_by_path_records_whole_contacts(fast_cell, tmp_path):
    process = launch(str(LAUNCH_FILES / "collect_indent.launch.py"), f"cell:={fast_cell}")
    rclpy.init()
    node = rclpy.create_node("client", namespace=NAMESPACE)
    executor = EventsExecutor()
    executor.add_node(node)
    client = ActionClient(node, CollectIndent, "collect_indent")
    try:
        assert spin_until(executor, client.server_is_ready, PATIENCE_S)
        assert await_answer(executor, node, "indenter", PATIENCE_S)
        goal = CollectIndent.Goal(indenter="sphere", contacts=[0, 1], bag=str(tmp_path / "bag"))
        goal.execute_motion = True
        sent = client.send_goal_async(goal)
        assert spin_until(executor, sent.done, PATIENCE_S)
        finished = sent.result().get_result_async()
        assert spin_until(executor, finished.done, 2 * PATIENCE_S)
        assert finished.result().result.success, finished.result().result.message
    finally:
        text = interrupt(process)
        node.destroy_node()
        executor.shutdown()
        rclpy.shutdown()
    assert verify(tmp_path / "bag").whole_contacts == {0, 1}, text
