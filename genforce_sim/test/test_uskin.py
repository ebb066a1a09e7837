"""The virtual uSkin, seen by a plain websocket client."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from genforce_collect.config import load_sensor
from genforce_collect.errors import DeviceError
from genforce_sim.devices.uskin import REPEATS, UskinServer
from genforce_sim.sensor import SimulatedSensor

pytestmark = pytest.mark.live

PORT = 5000
RATE_HZ = 200.0


@pytest.fixture
def server(loopback_host: str) -> Iterator[UskinServer]:
    sensor = SimulatedSensor(load_sensor("uskin"), "sphere", seed=1)
    state = sensor.step(np.array([0, 0, 0.005, np.pi, 0, 0]), 0.01)
    with UskinServer(loopback_host, PORT, lambda: sensor.taxels(state), RATE_HZ) as served:
        yield served


@pytest.fixture
def client(server: UskinServer, loopback_host: str) -> Iterator[ClientConnection]:
    with connect(f"ws://{loopback_host}:{PORT}") as connection:
        yield connection


def counts(message: str | bytes) -> list[int]:
    """As the original's client reads a message."""
    return [int(word, 16) for word in json.loads(message)["1"]["data"].split(",")]


def test_a_client_reads_48_counts_near_those_of_a_real_sensor(client: ClientConnection) -> None:
    frame = np.array(counts(client.recv(timeout=5))).reshape(16, 3)
    assert np.abs(frame - [33000, 33000, 37500]).max() < 2500


def test_messages_are_numbered_and_most_repeat_the_one_before(client: ClientConnection) -> None:
    messages = [client.recv(timeout=5) for _ in range(80)]
    numbers = [json.loads(message)["message"] for message in messages]
    assert np.diff(numbers).tolist() == [1] * 79
    rows: list[Any] = [counts(message) for message in messages]
    repeated = np.mean([a == b for a, b in itertools.pairwise(rows)])
    assert repeated == pytest.approx(0.75, abs=0.06)


def test_a_frozen_sensor_repeats_and_a_stalled_one_is_silent(
    server: UskinServer, client: ClientConnection
) -> None:
    server.freeze()
    run, last = 0, None
    while run < 3 * REPEATS:  # fails by the timeout of recv or of the test
        now = counts(client.recv(timeout=5))
        run, last = run + 1 if now == last else 1, now
    server.stall()
    assert falls_silent(client)


def falls_silent(client: ClientConnection) -> bool:
    """Read what is still on its way, until nothing comes."""
    try:
        for _ in range(1000):
            client.recv(timeout=0.3)
    except TimeoutError:
        return True
    return False


def test_a_garbled_message_is_followed_by_good_ones(
    server: UskinServer, client: ClientConnection
) -> None:
    counts(client.recv(timeout=5))  # the server knows this client now
    server.garble(1)
    broken = 0
    for _ in range(20):
        try:
            counts(client.recv(timeout=5))
        except ValueError:
            broken += 1
    assert broken == 1


def test_a_port_in_use_is_named(server: UskinServer, loopback_host: str) -> None:
    with pytest.raises(DeviceError, match=f"{loopback_host}:{PORT}"):
        UskinServer(loopback_host, PORT, lambda: np.zeros((16, 3), int))
