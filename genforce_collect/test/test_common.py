"""What the nodes share: their heartbeat, and waiting for one another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.experimental import EventsExecutor
from rclpy.parameter import Parameter

from genforce_collect.errors import ConfigError
from genforce_collect.nodes import common
from genforce_collect.nodes.common import (
    NAMESPACE,
    Diagnostics,
    await_answer,
    declare,
    parameter_words,
    spin_until,
)
from genforce_collect.processes import ENDS_LAST

pytestmark = pytest.mark.live

PATIENCE_S = 60.0


@pytest.fixture
def executor() -> Iterator[EventsExecutor]:
    rclpy.init()
    executor = EventsExecutor()
    yield executor
    executor.shutdown()
    rclpy.shutdown()


@pytest.mark.parametrize("reader_first", [True, False])
def test_whoever_begins_to_listen_hears_the_present_state_before_it_is_due(
    executor: EventsExecutor, monkeypatch, reader_first: bool
):
    monkeypatch.setattr(common, "DIAGNOSTICS_PERIOD_S", 1e4)
    node, reader = (rclpy.create_node(name, namespace=NAMESPACE) for name in ("arm", "reader"))
    state, heard = ["starting"], []

    def listen() -> None:
        reader.create_subscription(
            DiagnosticArray, "/diagnostics", lambda m: heard.append(m.status[0].message), 10
        )
        executor.add_node(reader)

    def tell() -> None:
        diagnostics.publish(DiagnosticStatus.OK, state[0], "", {})

    if reader_first:
        listen()
    diagnostics = Diagnostics(node, tell)
    state[0] = "up"
    executor.add_node(node)
    if not reader_first:
        listen()
    assert spin_until(executor, lambda: bool(heard), PATIENCE_S)
    assert set(heard) == {"up"}
    node.destroy_node()
    reader.destroy_node()


def test_parameters_come_through_the_command_line_as_they_were_given():
    given = {
        "rate": 2,
        "bag": "runs/a bag, " + 40 * "long " + "path",
        "names": ["a", "b"],
        "on": True,
    }
    rclpy.init(args=["--ros-args", *parameter_words(given)])
    try:
        node = rclpy.create_node("node")
        defaults = {"rate": 1.0, "bag": "", "names": [""], "on": False}
        taken = {name: declare(node, name, default) for name, default in defaults.items()}
        assert taken == given
        assert node.get_parameter("rate").type_ == Parameter.Type.DOUBLE
        node.destroy_node()
    finally:
        rclpy.shutdown()


@pytest.mark.parametrize(("default", "given"), [(1.0, "fast"), (1.0, True), (1, 2.5), ("", 3)])
def test_a_parameter_of_another_type_is_refused_by_name(default: object, given: object):
    rclpy.init(args=["--ros-args", *parameter_words({"rate": given})])
    try:
        node = rclpy.create_node("node")
        with pytest.raises(ConfigError, match=r"parameter rate: .* expecting type"):
            declare(node, "rate", default)
        node.destroy_node()
    finally:
        rclpy.shutdown()


@pytest.mark.parametrize("last", [False, True])
def test_a_node_that_is_to_end_last_ignores_sigint_and_ends_by_sigterm(last: bool):
    node = subprocess.Popen(
        [sys.executable, "-m", "genforce_collect.nodes.recorder"],
        env=os.environ | ({ENDS_LAST: "1"} if last else {}),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert node.stderr is not None
        while "ready" not in (line := node.stderr.readline()):
            assert line
        (ignored,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{node.pid}/status").read_text())
        assert bool(int(ignored, 16) >> (signal.SIGINT - 1) & 1) == last
        node.terminate()
        assert node.wait(PATIENCE_S) == 0
    finally:
        node.kill()
        node.communicate()


def test_a_node_is_waited_for_until_it_answers_and_no_longer_than_asked(executor: EventsExecutor):
    server, client = (rclpy.create_node(name, namespace=NAMESPACE) for name in ("server", "client"))
    executor.add_node(client)
    assert not await_answer(executor, client, "server", timeout_s=0.1), "it is there, and silent"
    executor.add_node(server)
    assert await_answer(executor, client, "server", PATIENCE_S)
    server.destroy_node()
    client.destroy_node()
