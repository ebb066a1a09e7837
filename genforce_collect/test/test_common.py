"""What the nodes share: their heartbeat, and waiting for one another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.experimental import EventsExecutor

from genforce_collect.nodes import common
from genforce_collect.nodes.common import NAMESPACE, Diagnostics, await_answer, spin_until

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


def test_a_node_is_waited_for_until_it_answers_and_no_longer_than_asked(executor: EventsExecutor):
    server, client = (rclpy.create_node(name, namespace=NAMESPACE) for name in ("server", "client"))
    executor.add_node(client)
    assert not await_answer(executor, client, "server", timeout_s=0.1), "it is there, and silent"
    executor.add_node(server)
    assert await_answer(executor, client, "server", PATIENCE_S)
    server.destroy_node()
    client.destroy_node()
