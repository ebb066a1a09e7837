"""The launch files under the real `ros2 launch`. It comes with an apt ROS 2, not with the wheels:
without it these tests are skipped."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import rclpy
from rclpy.action import ActionClient
from rclpy.experimental import EventsExecutor

from genforce_bringup.graph import GRAPHS
from genforce_collect.bags import BagReader, is_closed
from genforce_collect.nodes.common import LATCHED_QOS, NAMESPACE, await_answer, spin_until
from genforce_collect.trajectory import Phase
from genforce_collect.verification import verify
from genforce_msgs.action import CollectIndent
from genforce_msgs.msg import Contact

LAUNCH_FILES = Path(__file__).parents[1] / "launch"
PATIENCE_S = 60.0
IN_GEL = {Phase.NORMAL_INC, Phase.SHEAR_INC, Phase.SHEAR_DEC, Phase.NORMAL_DEC}

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


class Client:
    """Of a collection that was launched."""

    def __init__(self) -> None:
        rclpy.init()
        self._node = rclpy.create_node("client", namespace=NAMESPACE)
        self._executor = EventsExecutor()
        self._executor.add_node(self._node)
        self._action = ActionClient(self._node, CollectIndent, "collect_indent")
        self.phase = Phase.IDLE
        self._node.create_subscription(Contact, "contact", self._note, LATCHED_QOS)

    def _note(self, contact: Contact) -> None:
        self.phase = Phase(contact.phase)

    def spin(self, done: Callable[[], bool]) -> bool:
        return spin_until(self._executor, done, 2 * PATIENCE_S)

    def send(self, **goal: object) -> Any:
        assert self.spin(self._action.server_is_ready)
        assert await_answer(self._executor, self._node, "indenter", PATIENCE_S)
        goal = CollectIndent.Goal(indenter="sphere", execute_motion=True, **goal)
        sent = self._action.send_goal_async(goal)
        assert self.spin(sent.done)
        return sent.result()

    def close(self) -> None:
        self._node.destroy_node()
        self._executor.shutdown()
        rclpy.shutdown()


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


def test_a_collection_launched_by_path_records_whole_contacts(fast_cell, tmp_path, client):
    process = launch(str(LAUNCH_FILES / "collect_indent.launch.py"), f"cell:={fast_cell}")
    try:
        finished = client.send(contacts=[0, 1], bag=str(tmp_path / "bag")).get_result_async()
        assert client.spin(finished.done)
        assert finished.result().result.success, finished.result().result.message
    finally:
        text = interrupt(process)
    assert verify(tmp_path / "bag").whole_contacts == {0, 1}, text


def test_ctrl_c_in_a_contact_lifts_the_tip_and_closes_the_bag(fast_cell, tmp_path, client):
    plan, bag = tmp_path / "plan.yaml", tmp_path / "bag"
    plan.write_text("speed_mm_s: 1.0\n")
    process = launch(str(LAUNCH_FILES / "collect_indent.launch.py"), f"cell:={fast_cell}")
    try:
        client.send(plan=str(plan), bag=str(bag))
        assert client.spin(lambda: client.phase in IN_GEL)
    finally:
        text = interrupt(process)
    assert is_closed(bag), text
    with BagReader(bag) as reader:
        *_, last = reader.messages([f"/{NAMESPACE}/robot/tcp_pose"])
    assert last.message.pose.position.z > 0, text
