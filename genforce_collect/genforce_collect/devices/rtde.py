"""RTDE, the data exchange of a Universal Robots controller: its frames, and a reader of its stream.

ur_rtde's receive interface keeps only the newest of the samples that have arrived, so that a busy
host misses some; `RtdeStream` takes each of them, in order, and its socket has a timeout.

A frame is a big-endian u16 size of the whole, a u8 type, and payload. Source: Universal Robots,
"Real-Time Data Exchange (RTDE) Guide", protocol version 2.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain

from genforce_collect.errors import DeviceError

PORT = 30004
PROTOCOL_VERSION = 2

REQUEST_PROTOCOL_VERSION = ord("V")
GET_CONTROLLER_VERSION = ord("v")
SETUP_OUTPUTS = ord("O")
SETUP_INPUTS = ord("I")
START = ord("S")
PAUSE = ord("P")
DATA = ord("U")

# RTDE type name -> (struct code, number of values)
TYPES = {
    "BOOL": ("?", 1),
    "UINT8": ("B", 1),
    "UINT32": ("I", 1),
    "UINT64": ("Q", 1),
    "INT32": ("i", 1),
    "DOUBLE": ("d", 1),
    "VECTOR3D": ("d", 3),
    "VECTOR6D": ("d", 6),
    "VECTOR6INT32": ("i", 6),
}
NOT_FOUND = "NOT_FOUND"
IN_USE = "IN_USE"


def frame(kind: int, payload: bytes = b"") -> bytes:
    """One RTDE frame."""
    return struct.pack(">HB", 3 + len(payload), kind) + payload


def take_frames(received: bytearray) -> Iterator[tuple[int, bytes]]:
    """Remove whole frames from the front of `received`; yields their types and payloads.

    Raises ValueError where the bytes cannot be RTDE.
    """
    while len(received) >= 3:
        size, kind = struct.unpack_from(">HB", received)
        if size < 3:
            raise ValueError(f"RTDE frame of {size} bytes")
        if len(received) < size:
            return
        payload = bytes(received[3:size])
        del received[:size]
        yield kind, payload


class Recipe:
    """An ordered choice of variables that travels as one data package."""

    def __init__(self, names: Sequence[str], types: Sequence[str]) -> None:
        self.names = tuple(names)
        codes = "".join(TYPES[kind][0] * TYPES[kind][1] for kind in types)
        self._struct = struct.Struct(">" + codes)
        ends = tuple(accumulate(TYPES[kind][1] for kind in types))
        self._slices = tuple(map(slice, (0, *ends), ends))

    def pack(self, values: Mapping[str, tuple[float, ...]]) -> bytes:
        """The variables' values, each a tuple, as bytes."""
        return self._struct.pack(*chain.from_iterable(map(values.__getitem__, self.names)))

    def unpack(self, payload: bytes) -> tuple[tuple[float, ...], ...]:
        """Values, each a tuple, in the recipe's order. Raises ValueError on another length."""
        if len(payload) != self._struct.size:
            raise ValueError(f"RTDE data of {len(payload)} bytes, expected {self._struct.size}")
        flat = self._struct.unpack(payload)
        return tuple([flat[part] for part in self._slices])


class RtdeStream:
    """Every sample of some output variables, in order.

    Raises DeviceError where the controller is not there, does not speak RTDE, does not know a
    variable, or is silent for `timeout_s` during set-up.
    """

    def __init__(
        self, host: str, names: Sequence[str], frequency_hz: float, timeout_s: float
    ) -> None:
        self._where = f"robot {host}:{PORT}"
        self._received = bytearray()
        try:
            self._socket = socket.create_connection((host, PORT), timeout=timeout_s)
        except OSError as error:
            raise DeviceError(
                f"{self._where} does not answer ({_reason(error)}): is the controller on, "
                "and robot.host right?"
            ) from error
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._recipe = self._set_up(names, frequency_hz)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """End a `samples` that another thread may be waiting in, and the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def samples(self, silence_s: float) -> Iterator[tuple[int, tuple[tuple[float, ...], ...]]]:
        """Host system time of arrival (ns) and the variables' values, sample by sample, until
        the connection ends, or nothing comes for `silence_s`, with DeviceError."""
        self._socket.settimeout(silence_s)
        while True:
            receive_ns = self._receive()
            try:
                for kind, payload in take_frames(self._received):
                    if kind == DATA:
                        yield receive_ns, self._recipe.unpack(payload[1:])
            except ValueError as error:
                raise DeviceError(f"{self._where}: {error}") from error

    def _set_up(self, names: Sequence[str], frequency_hz: float) -> Recipe:
        version = struct.pack(">H", PROTOCOL_VERSION)
        if self._ask(REQUEST_PROTOCOL_VERSION, version) != b"\x01":
            raise DeviceError(f"{self._where} does not speak RTDE version {PROTOCOL_VERSION}")
        payload = struct.pack(">d", frequency_hz) + ",".join(names).encode()
        types = self._ask(SETUP_OUTPUTS, payload)[1:].decode("ascii", "replace").split(",")
        if len(types) != len(names):
            raise DeviceError(
                f"{self._where} answers {len(names)} variables with {len(types)} types"
            )
        if unknown := [name for name, kind in zip(names, types, strict=True) if kind not in TYPES]:
            raise DeviceError(
                f"{self._where} does not offer {', '.join(unknown)}: PolyScope 5.6 or newer is "
                "needed"
            )
        if self._ask(START) != b"\x01":
            raise DeviceError(f"{self._where} does not start its stream")
        return Recipe(names, types)

    def _ask(self, kind: int, payload: bytes = b"") -> bytes:
        try:
            self._socket.sendall(frame(kind, payload))
            while True:
                self._receive()
                for answer, content in take_frames(self._received):
                    if answer == kind:
                        return content
        except (OSError, ValueError) as error:
            raise DeviceError(f"{self._where} does not speak RTDE ({_reason(error)})") from error

    def _receive(self) -> int:
        """Take in what has arrived; returns when (host system time, ns)."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError as error:
            raise DeviceError(f"{self._where} is silent ({_reason(error)})") from error
        if not data:
            raise DeviceError(f"{self._where} closed the connection")
        self._received += data
        return time.time_ns()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
