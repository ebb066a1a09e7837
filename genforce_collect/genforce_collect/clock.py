"""Device time → host time, so that samples of different devices can be laid side by side.

A sample arrives some time after the device took it, and never before: network and scheduler only
add delay. The least delayed arrivals of the last seconds therefore lie along the line that maps
device time to host time, and all others above it. `ClockMapper` finds that line as the edge of
the lower convex hull with the least total distance to the arrivals (a linear programme; Moon,
Skelly and Towsley, INFOCOM 1999; by hull: Zhang, Liu and Xia, INFOCOM 2002).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable

NS = 1_000_000_000
BLOCK_S = 0.1  # each block keeps its least delayed arrival
WINDOW_BLOCKS = 100
MIN_DRIFT_SPAN_S = 1.0  # below it, jitter would pass for drift
MAX_DRIFT = 1e-3  # a crystal is within 100 ppm; more is an outlier of the fit
JUMP_NS = 20e6  # arrivals this much too early cannot be jitter: a clock jumped
LATE_S = 3.0  # only late arrivals for this long: a clock stood still; no backlog lasts so long


def steady_ns() -> int:
    """Host time that neither steps nor slews (ns, origin arbitrary)."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


def system_offset_ns(steady: Callable[[], int] = steady_ns) -> int:
    """System time less a steady clock (ns), to a few µs also where the thread is preempted."""
    best_gap = 1 << 62
    offset = 0
    for _ in range(3):
        before = steady()
        system = time.time_ns()
        gap = steady() - before
        if gap < best_gap:
            best_gap, offset = gap, system - before - gap // 2
        if gap < 10_000:
            break
    return offset


def sequence_to_time(
    sequence: int, rate_hz: float, previous_s: float | None = None, bits: int = 32
) -> float:
    """Time (s) of a counter that ticks at `rate_hz` and wraps at 2**bits.

    `previous_s` is what this function returned for the sample before (None for the first): the
    answer is the one nearest to it. A counter that starts anew therefore gives a time that jumps
    (back, unless more than half its range had gone by), which `ClockMapper` takes for a restart.
    """
    if previous_s is None:
        return sequence / rate_hz
    previous = round(previous_s * rate_hz)
    half = 1 << (bits - 1)
    step = (sequence - previous + half) % (2 * half) - half
    return (previous + step) / rate_hz


class ClockMapper:
    """Maps the time stamps of one device to host system time.

    Outcomes of clock faults, each counted in `restarts` with its text in `last_restart`:

    - the device restarts (its time jumps back or ahead): the estimate starts afresh at once;
    - the device's clock pauses: after `LATE_S` of late arrivals the estimate starts afresh;
    - the host's system time is stepped: stamps follow it from the next sample on, device and host
      stay matched.

    Stamps strictly increase, except where the system time itself was stepped back, and never
    exceed `receive_ns` as long as that increases too. What a device takes to measure and the
    shortest network delay cannot be seen from the host and stay in the stamps.
    """

    _block_x: float
    _block_y: float
    _late_x: float
    _late_y: float

    def __init__(self, host_offset_ns: Callable[[], int] = system_offset_ns) -> None:
        """`host_offset_ns` gives system time less a steady clock; `lambda: 0` to replay times."""
        self.restarts = 0
        self.last_restart = ""
        self._host_offset_ns = host_offset_ns
        self._host_ns = host_offset_ns()
        self._blocks: deque[tuple[float, float]] = deque(maxlen=WINDOW_BLOCKS)
        self._last_stamp = -(1 << 62)
        self._device = math.nan  # newest device time; NaN before the first sample
        self._begin(0.0, 0)

    @property
    def offset(self) -> float:
        """Host system time − device time at the newest sample (s); NaN before the first."""
        x = self._device - self._device_0
        above = self._intercept + self._slope * x
        return (self._host_ns + self._steady_0 + above) / NS - self._device_0

    @property
    def drift(self) -> float:
        """d(host)/d(device) − 1; 0 until it can be told from jitter."""
        return self._slope / NS

    def update(self, device_time_s: float, receive_ns: int) -> int:
        """Host system time (ns) at `device_time_s`, learning from its arrival at `receive_ns`."""
        host_ns = self._host_offset_ns()
        if abs(host_ns - self._host_ns) > JUMP_NS:
            receive_ns = self._follow_host(device_time_s, receive_ns, host_ns)
        self._host_ns = host_ns
        steady = receive_ns - host_ns
        if not device_time_s >= self._device:  # also the first sample, by NaN
            self._restart(device_time_s, steady, "device time jumped back")
        self._device = device_time_s

        x = device_time_s - self._device_0
        y = steady - self._steady_0 - x * NS
        late = y - self._intercept - self._slope * x
        if late < 0:
            if late < -JUMP_NS:
                self._restart(device_time_s, steady, "device time jumped ahead")
                x = y = 0.0
            else:
                self._intercept += late
            late = 0.0
        if late < JUMP_NS:
            self._late_x = math.nan
        elif self._stays_late(x, y):
            self._restart(device_time_s, steady, "device time stood still")
            x = y = late = 0.0

        if y - self._slope * x < self._block_y - self._slope * self._block_x:
            self._block_x, self._block_y = x, y
        if x >= self._block_end:
            self._end_block(x)
            late = max(0.0, y - self._intercept - self._slope * x)

        stamp = receive_ns - math.ceil(late)
        if stamp <= self._last_stamp:
            stamp = self._last_stamp + 1
        self._last_stamp = stamp
        return stamp

    def _begin(self, device_time_s: float, steady: int) -> None:
        """Start the estimate at this arrival.

        The line is y = intercept + slope·x, with x the device time since then (s) and y the
        steady host time since then less x (ns): small numbers, so that floats hold them exactly.
        """
        self._device_0 = device_time_s
        self._steady_0 = steady
        self._intercept = self._slope = 0.0
        self._blocks.clear()
        self._block_end = BLOCK_S
        self._block_x = 0.0
        self._block_y = math.inf
        self._late_x = math.nan  # start of a run of late arrivals
        self._late_y = 0.0

    def _restart(self, device_time_s: float, steady: int, why: str) -> None:
        if not math.isnan(self._device):
            self._count(why)
        self._begin(device_time_s, steady)

    def _count(self, why: str) -> None:
        self.restarts += 1
        self.last_restart = why

    def _follow_host(self, device_time_s: float, receive_ns: int, host_ns: int) -> int:
        """Go over to the stepped system time; `receive_ns` may still be from before the step."""
        if math.isnan(self._device):
            return receive_ns
        step = host_ns - self._host_ns
        self._last_stamp += step
        self._count(f"system time stepped by {step / NS:+.3f} s")
        x = device_time_s - self._device_0
        expected = host_ns + self._steady_0 + x * NS + self._intercept + self._slope * x
        read_before = abs(receive_ns + step - expected) < abs(receive_ns - expected)
        return receive_ns + step if read_before else receive_ns

    def _stays_late(self, x: float, y: float) -> bool:
        """Late on both clocks for `LATE_S`: a backlog that is worked off passes more quickly."""
        if math.isnan(self._late_x):
            self._late_x, self._late_y = x, y
        span = x - self._late_x
        return span >= LATE_S and span + (y - self._late_y) / NS >= LATE_S

    def _end_block(self, x: float) -> None:
        blocks = self._blocks
        blocks.append((self._block_x, self._block_y))
        self._block_y = math.inf
        self._block_end = x + BLOCK_S
        slope = 0.0
        if blocks[-1][0] - blocks[0][0] >= MIN_DRIFT_SPAN_S:
            slope = min(max(hull_slope(blocks), -MAX_DRIFT * NS), MAX_DRIFT * NS)
        self._slope = slope
        self._intercept = min(y - slope * x for x, y in blocks)


def hull_slope(points: Iterable[tuple[float, float]]) -> float:
    """Slope of the line below all points (x ascending, at least two) that is closest to them.

    Of all lines with no point beneath, the one with the least summed distance holds the edge of
    the lower convex hull that spans the mean of x.
    """
    hull: list[tuple[float, float]] = []
    sum_x = count = 0.0
    for x, y in points:
        sum_x += x
        count += 1
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    right = next(i for i in range(1, len(hull)) if hull[i][0] * count >= sum_x)
    (x0, y0), (x1, y1) = hull[right - 1], hull[right]
    return (y1 - y0) / (x1 - x0)
