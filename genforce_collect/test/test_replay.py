"""A bag played back is the recording again: same topics, same bytes, same spacing."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import rclpy
from builtin_interfaces.msg import Time
from geometry_msgs.msg import WrenchStamped
from rclpy.experimental import EventsExecutor
from rclpy.serialization import deserialize_message, serialize_message
from rosgraph_msgs.msg import Clock
from std_srvs.srv import SetBool

from genforce_collect.bags import BagWriter, TopicSpec
from genforce_collect.cdr import stamp_of
from genforce_collect.errors import ConfigError, DataError
from genforce_collect.nodes.common import LATCHED_QOS, NAMESPACE, spin_until, stream_qos
from genforce_collect.replay import Player, ReplayOptions, restamped
from genforce_msgs.msg import Contact

pytestmark = pytest.mark.live

WRENCH = TopicSpec(f"/{NAMESPACE}/netft/wrench", "geometry_msgs/msg/WrenchStamped")
CONTACT = TopicSpec(f"/{NAMESPACE}/contact", "genforce_msgs/msg/Contact", latched=True)
COUNT, PERIOD_NS, FIRST_NS = 400, 2_000_000, 1_700_000_000_000_000_000


@functools.cache  # padding bytes differ from call to call
def wrench(i: int) -> bytes:
    message = WrenchStamped()
    stamp_ns = FIRST_NS + i * PERIOD_NS - 500_000
    message.header.stamp = Time(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9)
    message.wrench.force.z = float(i)
    return serialize_message(message)


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    writer = BagWriter(tmp_path / "bag")
    writer.add_topic(WRENCH)
    writer.add_topic(CONTACT)
    writer.write(CONTACT.name, serialize_message(Contact(session="s", index=3)), FIRST_NS)
    for i in range(COUNT):
        writer.write(WRENCH.name, wrench(i), FIRST_NS + i * PERIOD_NS)
    writer.close()
    return tmp_path / "bag"


def played(options: ReplayOptions) -> tuple[list[tuple[str, bytes, float]], float]:
    """Messages with their time of sending, and how long it took (s)."""
    sent: list[tuple[str, bytes, float]] = []
    player = Player(options, lambda t, d: sent.append((t, d, time.monotonic())))
    begun = time.monotonic()
    player.play()
    return sent, time.monotonic() - begun


@pytest.mark.parametrize("rate", [1.0, 4.0])
def test_messages_come_as_recorded_and_at_the_rate_asked_for(bag: Path, rate: float):
    sent, took = played(ReplayOptions(bag, rate=rate))
    assert [d for t, d, _ in sent if t == WRENCH.name] == [wrench(i) for i in range(COUNT)]
    assert len(sent) == COUNT + 1
    expected = (COUNT - 1) * PERIOD_NS * 1e-9 / rate
    assert expected <= took + 0.01 <= expected + 0.5
    times = [at for t, _, at in sent if t == WRENCH.name]
    assert times[COUNT // 2] - times[0] == pytest.approx(expected / 2, abs=0.15)


def test_live_stamps_keep_each_messages_delay(bag: Path):
    sent, _ = played(ReplayOptions(bag, rate=4.0, restamp=True, topics=(WRENCH.name,)))
    now_ns = time.time_ns()
    stamps = [stamp_of(data) for _, data, _ in sent]
    assert now_ns - 2e9 < stamps[0] < now_ns
    steps = [b - a for a, b in itertools.pairwise(stamps)]
    assert sum(steps) / len(steps) == pytest.approx(PERIOD_NS / 4, rel=0.05)
    message = deserialize_message(restamped(wrench(7), 5_000_000_009), WrenchStamped)
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (5, 9)
    assert message.wrench.force.z == 7.0


def test_pause_holds_the_bag_and_loses_nothing(bag: Path):
    sent: list[bytes] = []
    player = Player(
        ReplayOptions(bag, rate=2.0, paused=True, topics=(WRENCH.name,)),
        lambda _, data: sent.append(data),
    )
    thread = threading.Thread(target=player.play)
    thread.start()
    thread.join(0.2)
    assert sent == []
    player.pause(False)
    while len(sent) < 50:
        thread.join(0.01)
    player.pause(True)
    thread.join(0.1)
    held = len(sent)
    thread.join(0.2)
    assert len(sent) == held < COUNT
    player.pause(False)
    thread.join(5)
    assert sent == [wrench(i) for i in range(COUNT)]


def test_a_loop_begins_again_until_it_is_stopped(bag: Path):
    sent: list[str] = []
    player = Player(ReplayOptions(bag, rate=20.0, loop=True), lambda t, _: sent.append(t))
    thread = threading.Thread(target=player.play)
    thread.start()
    while sent.count(CONTACT.name) < 3:
        thread.join(0.01)
        assert thread.is_alive()
    player.stop()
    thread.join(5)
    assert not thread.is_alive()


def test_wrong_options_are_named(bag: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="rate"):
        ReplayOptions(bag, rate=0)
    with pytest.raises(ConfigError, match="/unknown"):
        Player(ReplayOptions(bag, topics=("/unknown",)), lambda *_: None)
    with pytest.raises(DataError, match="no such bag"):
        Player(ReplayOptions(tmp_path / "nowhere"), lambda *_: None)


@pytest.fixture
def client() -> Iterator[tuple[rclpy.node.Node, EventsExecutor]]:
    rclpy.init()
    node = rclpy.create_node("client", namespace=NAMESPACE)
    executor = EventsExecutor()
    executor.add_node(node)
    yield node, executor
    node.destroy_node()
    executor.shutdown()
    rclpy.shutdown()


def test_the_node_publishes_topics_and_clock_and_ends_with_the_bag(bag: Path, client):
    node, executor = client
    wrenches: list[bytes] = []
    contacts: list[Contact] = []
    clocks: list[Clock] = []
    node.create_subscription(
        WrenchStamped, WRENCH.name, wrenches.append, stream_qos(1000), raw=True
    )
    node.create_subscription(Contact, CONTACT.name, contacts.append, LATCHED_QOS)
    node.create_subscription(Clock, "/clock", clocks.append, 100)
    pause = node.create_client(SetBool, "replay/pause")
    words = ["-p", f"bag:={bag}", "-p", "paused:=true", "-p", "clock:=true"]
    process = subprocess.Popen(
        [sys.executable, "-m", "genforce_collect.nodes.replay", "--ros-args", *words]
    )
    try:
        assert spin_until(executor, pause.service_is_ready, 60)
        assert spin_until(executor, lambda: node.count_publishers(WRENCH.name) == 1, 60)
        answer = pause.call_async(SetBool.Request(data=False))
        assert spin_until(executor, lambda: process.poll() is not None, 60)
        assert answer.result().success
        assert process.returncode == 0
    finally:
        process.kill()
    assert wrenches == [wrench(i) for i in range(COUNT)]
    assert contacts[0].index == 3
    times = [clock.clock.sec * 10**9 + clock.clock.nanosec for clock in clocks]
    assert times == sorted(times)
    assert FIRST_NS <= times[0] <= times[-1] <= FIRST_NS + COUNT * PERIOD_NS
