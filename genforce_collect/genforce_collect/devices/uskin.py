"""A uSkin behind the websocket of its reading program: JSON messages of raw counts.

A message holds one object a sensor, under its port: `message["1"]["data"]` is a text of
hexadecimal counts, comma separated, x, y, z of each taxel in turn; `message["message"]` counts the
messages and `message["time"]` (s) is when the program sent it. Messages come faster than the
device measures, so many repeat the one before.

What comes of its faults (each is named in `UskinHealth.message`): a connection that breaks is
opened anew; a message that is no sample is counted and left out; counts that stand still for
`STALE_S` make the sensor unusable, since a live one is never without noise.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from genforce_collect.config import TaxelsConfig, UskinConfig
from genforce_collect.errors import DataError, DeviceError

OPEN_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 0.2
SILENT_S = 1.0  # a server that sends nothing for longer is taken for gone
STALE_S = 0.5
RECONNECT_S = (0.1, 1.0)  # first and longest pause
RATE_WINDOW_S = 1.0
MAX_COUNT = 2**31 - 1  # as genforce_msgs/Taxels holds
MAX_TIME_S = 1e12


class TaxelSample(NamedTuple):
    """One message's counts."""

    seq: int  # counts the samples delivered
    counts: tuple[int, ...]  # row-major, axis fastest
    repeated: bool  # identical to the sample before
    device_time: float  # s, by the sender's clock; NaN where it tells none
    receive_ns: int  # host system time of its arrival


@dataclass(frozen=True)
class UskinHealth:
    """State of the sensor; `message` says what is wrong."""

    message: str  # empty while all is well
    usable: bool
    rate_hz: float  # of messages
    fresh_hz: float  # of messages that do not repeat the one before
    received: int
    repeated: int
    lost: int  # numbered by the sender, never arrived
    malformed: int
    reconnects: int
    age_s: float  # of the newest change


def parse_sample(
    text: str | bytes, config: TaxelsConfig
) -> tuple[tuple[int, ...], dict[str, object]]:
    """Counts and the whole message of one text. Raises `DataError` where it holds no sample."""
    try:
        message = json.loads(text)
        words = message[config.port]["data"].split(",")
        counts = tuple(int(word, 16) for word in words)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"uSkin message without counts of port {config.port}") from error
    if len(counts) != config.size:
        raise DataError(
            f"uSkin message of {len(counts)} counts: the sensor file says {config.size}"
        )
    if any(abs(count) > MAX_COUNT for count in counts):
        raise DataError(f"uSkin message with a count beyond {MAX_COUNT}")
    return counts, message


def _seconds(sent: object) -> float:
    """A time of a message; NaN where it is none."""
    if isinstance(sent, int | float) and abs(sent) < MAX_TIME_S:
        return float(sent)
    return math.nan


class Uskin:
    """Streams from one websocket between `start` and `stop`.

    `on_sample` is called in the device's thread, once a message, in order.
    """

    def __init__(
        self, config: UskinConfig, taxels: TaxelsConfig, on_sample: Callable[[TaxelSample], None]
    ) -> None:
        self.config = config
        self.taxels = taxels
        self.received = self.lost = 0
        self._on_sample = on_sample
        self._stop = threading.Event()
        self._first = threading.Event()
        self._thread: threading.Thread | None = None
        window = max(4, round(2 * RATE_WINDOW_S * config.rate_hz))
        self._arrivals: deque[tuple[float, bool]] = deque(maxlen=window)
        self._last: tuple[int, ...] = ()
        self._last_number: int | None = None
        self._changed_at = time.monotonic()
        self._repeated = self._malformed = self._reconnects = 0
        self._fault = ""

    def start(self, timeout_s: float = 5.0) -> None:
        """Connect and wait for the first sample. Raises `DeviceError` when none comes."""
        self._stop.clear()
        self._first.clear()
        connection = self._connect()
        self._thread = threading.Thread(
            target=self._run, args=(connection,), name="uskin", daemon=True
        )
        self._thread.start()
        if not self._first.wait(timeout_s):
            fault = self._fault or f"uSkin {self.config.url}: sends nothing"
            self.stop()
            raise DeviceError(fault)

    def stop(self) -> None:
        """End delivery."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def health(self) -> UskinHealth:
        """State now."""
        now = time.monotonic()
        recent = [fresh for at, fresh in list(self._arrivals) if now - at <= RATE_WINDOW_S]
        age_s = now - self._changed_at
        message = self._fault
        if not message and age_s > STALE_S:
            message = f"uSkin {self.config.url}: counts stand still for {age_s:.1f} s; restart it"
        return UskinHealth(
            message=message,
            usable=not message,
            rate_hz=len(recent) / RATE_WINDOW_S,
            fresh_hz=sum(recent) / RATE_WINDOW_S,
            received=self.received,
            repeated=self._repeated,
            lost=self.lost,
            malformed=self._malformed,
            reconnects=self._reconnects,
            age_s=age_s,
        )

    def _connect(self) -> ClientConnection:
        try:
            return connect(self.config.url, open_timeout=OPEN_TIMEOUT_S, proxy=None)
        except (OSError, ValueError, WebSocketException) as error:
            raise DeviceError(
                f"uSkin {self.config.url}: {error}; start its reading program, or correct "
                f"uskin.url in the cell file"
            ) from error

    def _run(self, connection: ClientConnection) -> None:
        pause_s = RECONNECT_S[0]
        while not self._stop.is_set():
            try:
                with connection:
                    if self._receive(connection):
                        pause_s = RECONNECT_S[0]
            except (OSError, WebSocketException):
                self._fault = f"uSkin {self.config.url}: hung up"
            while not self._stop.wait(pause_s):
                pause_s = min(2 * pause_s, RECONNECT_S[1])
                try:
                    connection = self._connect()
                    self._reconnects += 1
                    self._last_number = None
                    break
                except DeviceError as error:
                    self._fault = str(error)

    def _receive(self, connection: ClientConnection) -> bool:
        """Take messages until the sender falls silent; whether there were any."""
        heard_at = time.monotonic()
        before = self.received
        while not self._stop.is_set():
            try:
                text = connection.recv(timeout=READ_TIMEOUT_S)
            except TimeoutError:
                if time.monotonic() - heard_at > SILENT_S:
                    self._fault = f"uSkin {self.config.url}: sends nothing"
                    break
                continue
            receive_ns = time.time_ns()
            heard_at = time.monotonic()
            try:
                counts, message = parse_sample(text, self.taxels)
            except DataError as error:
                self._malformed += 1
                self._fault = f"uSkin {self.config.url}: {error}"
                continue
            self._fault = ""
            self._deliver(counts, message, receive_ns)
        return self.received > before

    def _deliver(
        self, counts: tuple[int, ...], message: dict[str, object], receive_ns: int
    ) -> None:
        now = time.monotonic()
        repeated = counts == self._last
        if repeated:
            self._repeated += 1
        else:
            self._changed_at = now
        self._last = counts
        number = message.get("message")
        if isinstance(number, int):
            if self._last_number is not None:
                self.lost += max(0, number - self._last_number - 1)
            self._last_number = number
        device_time = _seconds(message.get("time"))
        self._arrivals.append((now, not repeated))
        self._on_sample(TaxelSample(self.received, counts, repeated, device_time, receive_ns))
        self.received += 1
        self._first.set()
