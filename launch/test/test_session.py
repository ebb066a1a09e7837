"""What is told of a graph that ended, and how Ctrl-C reaches a collection."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from genforce_bringup.session import CollectClient, interruptions, why_ended
from genforce_msgs.action import CollectIndent

CAMERA_CAME_BACK = """\
12:00:01 camera | error: camera /dev/video0: cannot be opened
12:00:01 graph  | camera died (exit code 3): starting it again
"""

# The operator's Ctrl-C arrives before the goal is accepted.
INTERRUPTING_SERVER = """
import os, signal, time
import rclpy
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.executors import MultiThreadedExecutor
from genforce_msgs.action import CollectIndent

def interrupt(goal):
    os.kill(os.getppid(), signal.SIGINT)
    return GoalResponse.ACCEPT

def execute(handle):
    while not handle.is_cancel_requested:
        time.sleep(0.01)
    print("cancelled", flush=True)
    handle.canceled()
    return CollectIndent.Result()

rclpy.init()
node = rclpy.create_node("indenter", namespace="genforce")
server = ActionServer(
    node, CollectIndent, "collect_indent", execute,
    goal_callback=interrupt, cancel_callback=lambda _: CancelResponse.ACCEPT,
)
executor = MultiThreadedExecutor(2)
executor.add_node(node)
executor.spin()
"""


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("", "the graph ended without a word"),
        ("error: robot 10.0.0.1 is driven by another graph", "robot 10.0.0.1 is driven by"),
        (
            CAMERA_CAME_BACK + "12:00:09 graph  | robot ended (exit code -9): ending all\n",
            "robot ended (exit code -9): ending all",
        ),
        (
            CAMERA_CAME_BACK
            + "12:00:08 robot  | error: robot 10.0.0.1 does not answer\n"
            + "12:00:09 graph  | robot ended (exit code 3): ending all\n"
            + "12:00:09 netft  | error: netft: no records\n",
            "robot 10.0.0.1 does not answer",
        ),
    ],
)
def test_the_reason_is_that_of_the_part_whose_end_ended_all(log: str, why: str):
    assert why_ended(log).startswith(why)


@pytest.fixture
def in_background():
    """As of a process that a script began with `&`: its shell has it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_heard_in_the_background_too_and_raised_where_nobody_acts_on_it(in_background):
    heard = False

    def collect() -> None:
        nonlocal heard
        with interruptions() as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            heard = interrupted.wait(1)

    with pytest.raises(KeyboardInterrupt):
        collect()
    assert heard
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_error_in_an_interrupted_collection_is_not_covered_up():
    def collect() -> None:
        with interruptions():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        collect()


@pytest.mark.live
def test_ctrl_c_while_a_goal_is_sent_cancels_it():
    """Nothing else would end it on a graph that was started before."""
    words = [sys.executable, "-c", INTERRUPTING_SERVER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            with CollectClient(graph=None) as client, pytest.raises(KeyboardInterrupt):
                client.run(CollectIndent.Goal(), lambda _: None)
        finally:
            server.kill()
        assert server.stdout.read() == "cancelled\n"
