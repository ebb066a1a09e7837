"""Device time → host time: how exact, and what happens when a clock jumps."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genforce_collect.clock import (
    LATE_S,
    ClockMapper,
    hull_slope,
    sequence_to_time,
    steady_ns,
    system_offset_ns,
)

MS = 1_000_000
NOW = 1_700_000_000_000_000_000


class Wire:
    """A device with a drifting clock behind a network that delays; its own truth."""

    def __init__(
        self, rate_hz: float = 1000.0, drift: float = 5e-5, jitter_s: float = 2e-3
    ) -> None:
        self.period, self.drift, self.jitter_s = 1.0 / rate_hz, drift, jitter_s
        self.rng = np.random.default_rng(0)
        self.device, self.true_s, self.host_step_ns = 100.0, 0.0, 0
        self.received = 0
        self.mapper = ClockMapper(lambda: self.host_step_ns)
        self.stamps: list[int] = []
        self.truths: list[int] = []
        self.receives: list[int] = []

    def run(self, seconds: float, delay_s: float = 0.0) -> Wire:
        for _ in range(round(seconds / self.period)):
            self.device += self.period
            self.true_s += self.period * (1 + self.drift)
            delay = delay_s + self.rng.uniform(0, self.jitter_s)
            truth = NOW + int(self.true_s * 1e9)
            self.received = max(self.received + 1, truth + int(delay * 1e9))
            self.truths.append(truth + self.host_step_ns)
            self.receives.append(self.received + self.host_step_ns)
            self.stamps.append(self.mapper.update(self.device, self.receives[-1]))
        return self

    def errors_ms(self, last_s: float | None = None) -> np.ndarray:
        errors = (np.array(self.stamps) - np.array(self.truths)) / MS
        return errors if last_s is None else errors[-round(last_s / self.period) :]


@pytest.mark.parametrize("rate_hz", [30.0, 500.0, 1000.0])
@pytest.mark.parametrize("drift", [-1e-4, 0.0, 1e-4])
def test_stamps_are_within_a_millisecond_at_p99_under_2_ms_of_jitter(rate_hz, drift):
    wire = Wire(rate_hz, drift, jitter_s=2e-3).run(20.0)
    assert np.percentile(np.abs(wire.errors_ms()), 99) < 1.0
    assert np.abs(wire.errors_ms(last_s=10.0)).max() < 0.5
    assert wire.mapper.drift == pytest.approx(drift, abs=2e-5)
    assert wire.mapper.offset == pytest.approx(wire.truths[-1] / 1e9 - wire.device, abs=5e-4)
    assert wire.mapper.restarts == 0


@settings(max_examples=60, deadline=None)
@given(
    gaps_us=st.lists(st.integers(0, 300_000), min_size=2, max_size=300),
    delays_us=st.lists(st.integers(0, 3_000_000), min_size=300, max_size=300),
    drift=st.floats(-5e-4, 5e-4),
)
def test_stamps_increase_and_are_never_later_than_their_arrival(gaps_us, delays_us, drift):
    mapper = ClockMapper(lambda: 0)
    device_us, received, last = 0, 0, 0
    for gap, delay in zip(gaps_us, delays_us, strict=False):
        device_us += gap
        received = max(received + 1, NOW + int(device_us * (1 + drift) * 1000) + delay * 1000)
        stamp = mapper.update(device_us / 1e6, received)
        assert last < stamp <= received
        last = stamp


@settings(max_examples=60, deadline=None)
@given(
    slope=st.floats(-1e6, 1e6),
    above=st.lists(st.floats(0, 2e6), min_size=3, max_size=100),
)
def test_the_line_under_arrivals_is_found_wherever_two_of_them_were_not_delayed(slope, above):
    above[0] = above[-1] = 0.0
    points = [(float(x), slope * x + y) for x, y in enumerate(above)]
    assert hull_slope(points) == pytest.approx(slope, rel=1e-6, abs=1.0)


def test_a_backlog_after_a_stall_keeps_its_device_times():
    wire = Wire().run(5.0)
    stall = 2.0
    release = wire.received + int(stall * 1e9)
    for i in range(2000):
        wire.device += wire.period
        wire.true_s += wire.period * (1 + wire.drift)
        wire.truths.append(NOW + int(wire.true_s * 1e9))
        wire.received = max(release + i * 20_000, wire.truths[-1])
        wire.stamps.append(wire.mapper.update(wire.device, wire.received))
    assert wire.mapper.restarts == 0
    assert np.abs(wire.errors_ms(last_s=1.9)).max() < 0.5


def test_a_network_that_holds_everything_back_for_seconds_does_not_shift_the_stamps():
    wire = Wire().run(5.0)
    wire.run(2.0, delay_s=0.4).run(1.0)
    assert wire.mapper.restarts == 0
    assert np.abs(wire.errors_ms(last_s=3.0)).max() < 0.5


def test_a_device_restart_starts_the_estimate_afresh():
    wire = Wire().run(5.0)
    wire.device = 0.0
    wire.run(3.0)
    assert wire.mapper.restarts == 1
    assert "back" in wire.mapper.last_restart
    assert np.abs(wire.errors_ms()).max() < 2.1
    assert np.abs(wire.errors_ms(last_s=2.0)).max() < 0.5
    assert (np.diff(wire.stamps) > 0).all()


@pytest.mark.parametrize("jump_s", [0.1, 3600.0])
def test_a_device_clock_that_jumps_ahead_starts_the_estimate_afresh(jump_s):
    wire = Wire().run(5.0)
    wire.device += jump_s
    wire.run(2.0)
    assert wire.mapper.restarts == 1
    assert np.abs(wire.errors_ms()).max() < 2.1


def test_a_device_clock_that_stood_still_is_followed_within_seconds():
    wire = Wire().run(5.0)
    wire.true_s += 5.0
    wire.run(LATE_S + 1.0)
    assert wire.mapper.restarts == 1
    assert LATE_S < 5.0
    assert np.abs(wire.errors_ms(last_s=0.9)).max() < 2.1
    assert (np.diff(wire.stamps) > 0).all()


@pytest.mark.parametrize("step_s", [-5.0, 5.0])
def test_stamps_follow_a_step_of_the_system_time_from_the_next_sample_on(step_s):
    wire = Wire().run(5.0)
    wire.host_step_ns = int(step_s * 1e9)
    wire.run(5.0)
    assert wire.mapper.restarts == 1
    assert f"{step_s:+.3f}" in wire.mapper.last_restart
    assert np.abs(wire.errors_ms(last_s=9.0)).max() < 0.5
    assert (np.array(wire.stamps) <= np.array(wire.receives)).all()


@pytest.mark.parametrize("step_s", [-5.0, 5.0])
def test_a_sample_received_before_a_step_but_mapped_after_it_lands_after_it(step_s):
    wire = Wire().run(5.0)
    wire.device += wire.period
    wire.true_s += wire.period * (1 + wire.drift)
    truth = NOW + int(wire.true_s * 1e9)
    wire.host_step_ns = int(step_s * 1e9)
    stamp = wire.mapper.update(wire.device, truth + MS)
    assert abs(stamp - truth - wire.host_step_ns) < MS
    assert wire.mapper.restarts == 1


def test_the_slewing_of_system_time_is_no_drift_of_the_device():
    wire = Wire(drift=0.0)
    slewed = 0
    for _ in range(100):
        wire.run(0.1)
        slewed += 50_000  # 500 ppm
        wire.host_step_ns = slewed
    assert abs(wire.mapper.drift) < 2e-5
    assert wire.mapper.restarts == 0
    assert np.abs(wire.errors_ms(last_s=8.0)).max() < 0.5


@settings(max_examples=100, deadline=None)
@given(
    start=st.integers(0, 2**32 - 1),
    steps=st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=50),
)
def test_a_counter_that_wraps_goes_on(start, steps):
    rate_hz, count = 7000.0, start
    seconds = sequence_to_time(start, rate_hz)
    for step in steps:
        count += step
        seconds = sequence_to_time(count % 2**32, rate_hz, seconds)
        assert seconds == pytest.approx(count / rate_hz, rel=1e-15)


def test_a_counter_that_starts_anew_jumps_back():
    before = sequence_to_time(700_000, 7000.0)
    assert sequence_to_time(7, 7000.0, before) == pytest.approx(0.001)


def test_the_host_offset_leads_from_steady_to_system_time():
    assert steady_ns() + system_offset_ns() == pytest.approx(time.time_ns(), abs=20 * MS)
