"""The virtual uSkin, read by the project's own client."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from genforce_collect.config import TaxelsConfig, UskinConfig
from genforce_collect.devices.uskin import TaxelSample, Uskin
from genforce_sim.devices.uskin import UskinServer

pytestmark = pytest.mark.live

PORT = 5000


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.01)


def test_counts_repeats_and_faults_reach_the_client(loopback_host: str) -> None:
    rng = np.random.default_rng(0)

    def read() -> np.ndarray:
        return rng.integers(30_000, 50_000, (16, 3))

    taken: list[TaxelSample] = []
    device = Uskin(UskinConfig(url=f"ws://{loopback_host}:{PORT}"), TaxelsConfig(), taken.append)
    with UskinServer(loopback_host, PORT, read, rate_hz=100, repeats=4) as server:
        device.start()
        wait(lambda: len(taken) >= 100)
        repeated = np.mean([sample.repeated for sample in taken])
        assert repeated == pytest.approx(0.75, abs=0.1)
        server.garble(3)
        wait(lambda: device.health().malformed == 3)
        server.freeze()
        wait(lambda: "stand still" in device.health().message)
        server.freeze(False)
        wait(lambda: device.health().usable)
    wait(lambda: not device.health().usable)
    device.stop()
