"""How closely `ClockMapper` recovers when the device took a sample, and what a call costs."""

from __future__ import annotations

import time

import numpy as np
from rows import Row

from genforce_collect.clock import ClockMapper

RATE_HZ = 1000.0
SECONDS = 60.0
DRIFT = 5e-5
JITTER_S = 2e-3


def bench() -> list[Row]:
    rng = np.random.default_rng(0)
    count = round(RATE_HZ * SECONDS)
    device = np.arange(count) / RATE_HZ
    truth = time.time_ns() + (device * (1 + DRIFT) * 1e9).astype(np.int64)
    jitter = (rng.uniform(0, JITTER_S, count) * 1e9).astype(np.int64)
    received = np.maximum.accumulate(truth + jitter) + np.arange(count)

    mapper = ClockMapper()
    started = time.thread_time()
    stamps = [
        mapper.update(*arrival) for arrival in zip(device.tolist(), received.tolist(), strict=True)
    ]
    cost_us = (time.thread_time() - started) / count * 1e6

    error_ms = np.percentile(np.abs(stamps - truth), 99) / 1e6
    arrival_ms = np.percentile(received - truth, 99) / 1e6
    return [
        Row(
            "clock: stamp error p99, 2 ms jitter, 50 ppm drift",
            float(error_ms),
            "ms",
            "<= 1",
            float(arrival_ms),
            float(arrival_ms / error_ms),
        ),
        Row("clock: cost of a stamp", cost_us, "µs", "<= 5"),
    ]
