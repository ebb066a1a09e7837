"""A virtual ATI Net F/T box with a Nano17: RDT over UDP and its configuration page over HTTP.

The wire format is that of ATI's Net F/T manual (9610-05-1022), so that unmodified clients talk
to it: requests of 8 bytes (0x1234, command, count) and records of 36 bytes (rdt_sequence,
ft_sequence, status, six counts), all big-endian.
"""

from __future__ import annotations

import math
import os
import socket
import socketserver
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import numpy as np

from genforce_collect.clock import system_offset_ns
from genforce_collect.errors import DeviceError

TICK_HZ = 7000  # internal sampling; ft_sequence counts these
CATCH_UP_S = 0.5  # a sender held up for longer leaves out what it missed
IDLE_S = 0.1  # how often the idle server looks whether it is to end

REQUEST = struct.Struct(">HHI")
RECORD = struct.Struct(">III6i")
HEADER = b"\x12\x34"
STOP, STREAM, RESET_LATCH, BIAS = 0, 2, 0x41, 0x42

STATUS_SUMMARY = 1 << 31
STATUS_SATURATION = 1 << 17
STATUS_LATCH = 1 << 16

# Nano17 SI-12-0.12 (N and N·m).
RANGE = np.array([12.0, 12.0, 17.0, 0.12, 0.12, 0.12])
RESOLUTION = np.array([1 / 320, 1 / 320, 1 / 320, 1 / 64e3, 1 / 64e3, 1 / 64e3])

COUNTS_PER_UNIT = 1_000_000  # per N and per N·m, as delivered by ATI
PAGE = """<?xml version="1.0" encoding="UTF-8"?>
<netft>
<runstat>0x{status:08x}</runstat>
<runrate>{tick_hz}</runrate>
<prodname>Net F/T Nano17 (virtual)</prodname>
<cfgcpf>{force}</cfgcpf>
<cfgcpt>{torque}</cfgcpt>
<scfgfu>N</scfgfu>
<scfgtu>Nm</scfgtu>
<comrdtrate>{rate:.0f}</comrdtrate>
<comrdtbsiz>1</comrdtbsiz>
</netft>
"""


class NetftBox:
    """Serves one client at a time, the last that asked, until `close`.

    `read_wrench(time)` gives the wrench on the transducer at a monotonic host time (s) of late,
    float (6,), N and N·m in the transducer frame; it is called from the box's own thread once a
    record, with the time at which the record fell due. As in the real box the rate is
    `TICK_HZ` divided by a whole number. The fault methods may be called at any time from any
    thread.
    """

    def __init__(
        self,
        host: str,
        rdt_port: int,
        http_port: int,
        read_wrench: Callable[[float], np.ndarray],
        *,
        rate_hz: float = 1000.0,
        noise: float = 0.5,
        drift: float = 0.0,
        uptime_s: float = 3600.0,
        seed: int = 0,
    ) -> None:
        """Open both ports and start serving. Raises `DeviceError` naming a port that is in use.

        `noise` is its standard deviation in units of the transducer's resolution; `drift` is how
        much longer than the host's the seconds of the box are (1e-5 = 10 ppm); `uptime_s` is how
        long ago it was switched on.
        """
        self._read_wrench = read_wrench
        self._ticks = max(1, round(TICK_HZ / rate_hz))  # per record
        self._tick_s = (1 + drift) / TICK_HZ
        self._noises = draw_noise(noise * RESOLUTION, seed)
        self._wire = Wire(seed)

        self._state = threading.Condition()  # guards all below
        self._closed = False
        self._boot = time.monotonic() - uptime_s
        self._counts_per_unit = np.full(6, COUNTS_PER_UNIT)
        self._bias = np.zeros(6)
        self._status = 0
        self._client: tuple[str, int] | None = None
        self._tick = 0  # of the next record
        self._rdt_sequence = 0
        self._last_record = 0  # 0: endless
        self._frozen_at: int | None = None
        self._saturated = False

        self._udp = _bind_udp(host, rdt_port)
        try:
            self._http = _PageServer((host, http_port), self._page)
        except OSError as error:
            self._udp.close()
            raise _port_error(host, http_port, "http_port", error) from error
        self._threads = [
            threading.Thread(target=target, name=f"netft-{name}", daemon=True)
            for name, target in (
                ("requests", self._answer_requests),
                ("records", self._send_records),
                ("page", lambda: self._http.serve_forever(IDLE_S)),
            )
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> NetftBox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop streaming and free both ports."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            self._state.notify_all()
        self._udp.sendto(b"", self._udp.getsockname())  # wakes the thread that awaits requests
        self._http.shutdown()
        for thread in self._threads:
            thread.join()
        self._http.server_close()
        self._udp.close()

    @property
    def rate_hz(self) -> float:
        """Records a second by the box's own clock."""
        return TICK_HZ / self._ticks

    def host_time_ns(self, ft_sequence: int) -> int:
        """Truth: system time at which the record with this ft_sequence fell due."""
        with self._state:
            due = self._boot + ft_sequence * self._tick_s
        return system_offset_ns(time.monotonic_ns) + round(due * 1e9)

    # --- faults -------------------------------------------------------------------------------

    def lose(self, fraction: float) -> None:
        """From now on lose this part of the records on their way, at random; 0 ends it."""
        self._wire.loss = fraction

    def delay(self, up_to_s: float) -> None:
        """From now on hold each record back at random for up to this long; 0 ends it."""
        self._wire.delay_s = up_to_s

    def reorder(self) -> None:
        """Swap the next two records."""
        self._wire.swap_next = True

    def duplicate(self) -> None:
        """Deliver the next record twice."""
        self._wire.double_next = True

    def mute(self, duration_s: float) -> None:
        """Deliver nothing for this long, while the box goes on as if it were heard."""
        self._wire.muted_until = time.monotonic() + duration_s

    def freeze_counter(self, on: bool = True) -> None:
        """Go on sending with an ft_sequence that stands still, as a hung sampling loop does."""
        with self._state:
            self._frozen_at = self._tick if on else None

    def status_error(self, bits: int) -> None:
        """Raise these bits in the status of all further records; 0 ends it."""
        with self._state:
            self._status = bits

    def saturate(self, on: bool = True) -> None:
        """Pin all gauges at the end of their range."""
        with self._state:
            self._saturated = on

    def restart(self, counts_per_force: int = COUNTS_PER_UNIT) -> None:
        """Lose power for a moment: counters, bias and client are gone, the scale may be new."""
        with self._state:
            self._boot = time.monotonic()
            self._counts_per_unit = np.repeat([counts_per_force, COUNTS_PER_UNIT], 3)
            self._bias = np.zeros(6)
            self._status = 0
            self._frozen_at = None
            self._client = None

    # --- requests -----------------------------------------------------------------------------

    def _page(self) -> str:
        with self._state:
            force, torque = self._counts_per_unit[[0, 3]]
            status = self._status
        return PAGE.format(
            status=status, force=force, torque=torque, rate=self.rate_hz, tick_hz=TICK_HZ
        )

    def _answer_requests(self) -> None:
        while True:
            datagram, client = self._udp.recvfrom(64)
            with self._state:
                if self._closed:
                    return
                if len(datagram) == REQUEST.size and datagram.startswith(HEADER):
                    _, command, count = REQUEST.unpack(datagram)
                    self._obey(command, count, client)

    def _obey(self, command: int, count: int, client: tuple[str, int]) -> None:
        if command == STREAM:
            self._client = client
            self._tick = self._next_tick()
            self._rdt_sequence = 0
            self._last_record = count
            self._state.notify_all()
        elif command == STOP:
            self._client = None
        elif command == BIAS:
            self._bias = self._read_wrench(time.monotonic())
        elif command == RESET_LATCH:
            self._status &= ~STATUS_LATCH

    # --- records ------------------------------------------------------------------------------

    def _send_records(self) -> None:
        """Records fall due at whole ticks since boot, however late this thread wakes up."""
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or self._client is not None)
                if self._closed or self._client is None:
                    return
                client = self._client
                if self._tick_now() - self._tick > CATCH_UP_S * TICK_HZ:
                    self._tick = self._next_tick()
                tick = self._tick
                due = self._boot + tick * self._tick_s
            time.sleep(max(0.0, min(due, self._wire.next_arrival) - time.monotonic()))
            now = time.monotonic()
            if now >= due:
                wrench = self._read_wrench(due) + next(self._noises)
                with self._state:
                    if client == self._client and tick == self._tick:  # no other request since
                        self._wire.send((self._record(tick, wrench), client), due)
            for datagram in self._wire.arrivals(now):
                self._udp.sendto(*datagram)

    def _tick_now(self) -> int:
        return int((time.monotonic() - self._boot) / self._tick_s)

    def _next_tick(self) -> int:
        return (self._tick_now() // self._ticks + 1) * self._ticks

    def _record(self, tick: int, wrench: np.ndarray) -> bytes:
        self._tick = tick + self._ticks
        self._rdt_sequence += 1
        if self._rdt_sequence == self._last_record:
            self._client = None
        status = self._status
        if self._saturated or (np.abs(wrench) > RANGE).any():
            wrench = RANGE if self._saturated else np.clip(wrench, -RANGE, RANGE)
            status |= STATUS_SUMMARY | STATUS_SATURATION
        measured = np.rint(wrench / RESOLUTION) * RESOLUTION - self._bias
        counts = np.rint(measured * self._counts_per_unit).astype(int).tolist()
        ft_sequence = tick if self._frozen_at is None else self._frozen_at
        return RECORD.pack(self._rdt_sequence, ft_sequence % 2**32, status, *counts)


Datagram = tuple[bytes, tuple[str, int]]  # record, client


class Wire:
    """The way from the box to its client, with what may happen to a record on it."""

    def __init__(self, seed: int) -> None:
        self.loss = 0.0
        self.delay_s = 0.0
        self.muted_until = 0.0
        self.swap_next = False
        self.double_next = False
        self._rng = np.random.default_rng(seed)
        self._held: Datagram | None = None
        self._last_arrival = 0.0
        self._flying: deque[tuple[float, Datagram]] = deque()

    @property
    def next_arrival(self) -> float:
        """When to ask for arrivals (s, monotonic)."""
        return self._flying[0][0] if self._flying else math.inf

    def send(self, record: Datagram, now: float) -> None:
        """Put a record on its way; one that is delayed delays those behind it."""
        if now < self.muted_until or (self.loss and self._rng.random() < self.loss):
            return
        if self.swap_next:
            self.swap_next = False
            self._held = record
            return
        delay = self.delay_s * self._rng.random() if self.delay_s else 0.0
        self._last_arrival = max(self._last_arrival, now + delay)
        self._flying.append((self._last_arrival, record))
        if self._held is not None:
            self._flying.append((self._last_arrival, self._held))
            self._held = None
        if self.double_next:
            self.double_next = False
            self._flying.append((self._last_arrival, record))

    def arrivals(self, now: float) -> Iterator[Datagram]:
        """Records that have arrived by now (s, monotonic)."""
        while self._flying and self._flying[0][0] <= now:
            yield self._flying.popleft()[1]


def draw_noise(deviation: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Endless Gaussian noise of shape (6,), drawn many at a time since single draws are slow."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.standard_normal((4096, 6)) * deviation


class _PageServer(socketserver.ThreadingTCPServer):
    """Serves the configuration page; plain TCPServer, as HTTPServer looks its name up in DNS."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], page: Callable[[], str]) -> None:
        self.page = page
        super().__init__(address, _PageHandler)


class _PageHandler(BaseHTTPRequestHandler):
    server: _PageServer

    def do_GET(self) -> None:
        if self.path != "/netftapi2.xml":
            self.send_error(404)
            return
        body = self.server.page().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _bind_udp(host: str, port: int) -> socket.socket:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        udp.bind((host, port))
    except OSError as error:
        udp.close()
        raise _port_error(host, port, "rdt_port", error) from error
    return udp


def _port_error(host: str, port: int, key: str, error: OSError) -> DeviceError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return DeviceError(
        f"virtual Net F/T box: cannot listen on {host}:{port} (netft.{key}): {reason}; "
        f"end the program that holds the port or choose another"
    )
