"""What all force/torque sensors have in common: samples, frame, tare, rate."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from genforce_collect.config import NetftConfig
from genforce_collect.errors import DeviceError
from genforce_collect.geometry import matrix_from_rotvec

AXES = ("Fx", "Fy", "Fz", "Tx", "Ty", "Tz")
# ATI's names of its units, in SI.
NEWTONS = {"N": 1.0, "kN": 1e3, "lbf": 4.4482216152605, "klbf": 4448.2216152605, "kgf": 9.80665}
NEWTON_METERS = {
    "N-m": 1.0,
    "N-mm": 1e-3,
    "kN-m": 1e3,
    "lbf-in": 0.1129848290276167,
    "lbf-ft": 1.3558179483314004,
    "kgf-cm": 0.0980665,
}

STATUS_SATURATION = 1 << 17  # as in the status word of a Net F/T box
SENSOR_STATUS = "status"  # that word in the node's diagnostics, in hexadecimal
RATE_WINDOW_S = 1.0
SILENT_S = 0.2  # a sensor that gives nothing new for longer is at fault
RATE_TOLERANCE = 0.05

# A tare is refused when a standard deviation is above these: some ten times the noise of a Nano17
# at rest, and less than a touch makes.
TARE_DEVIATION_N = 0.03
TARE_DEVIATION_NM = 5e-4


class WrenchSample(NamedTuple):
    """One measurement; a tuple because a thousand of them are made a second."""

    seq: int  # the device's own number
    device_time: float  # s, by the device's clock
    receive_ns: int  # host system time of its arrival
    wrench: Sequence[float]  # (6,), N and N·m, sensor frame, tared
    status: int  # 0 is healthy


@dataclass(frozen=True)
class Tare:
    """What is taken off every wrench: the mean over a moment at rest."""

    wrench: tuple[float, ...]  # N, N·m; sensor frame
    deviation: tuple[float, ...]  # standard deviation over the samples
    samples: int
    stamp_ns: int  # host system time at which it was taken

    def __str__(self) -> str:
        force = ", ".join(f"{value:+.3f}" for value in self.wrench[:3])
        torque = ", ".join(f"{value:+.5f}" for value in self.wrench[3:])
        return f"force ({force}) N, torque ({torque}) N·m over {self.samples} samples"


@dataclass(frozen=True)
class WrenchHealth:
    """State of a force/torque sensor; `message` says what is wrong and how to mend it."""

    message: str  # empty while all is well
    usable: bool  # samples come in and may be trusted
    rate_hz: float  # measured
    requested_hz: float
    received: int
    lost: int  # numbered by the device, never delivered
    age_s: float  # of the newest sample
    status: int = 0
    details: tuple[tuple[str, str], ...] = ()  # what only this kind of sensor has


class WrenchSensor(ABC):
    """Base of the drivers: turns what a device measured into samples in the sensor frame.

    `on_sample` is called in the device's thread, once a sample, in order.
    """

    def __init__(self, config: NetftConfig, on_sample: Callable[[WrenchSample], None]) -> None:
        self.config = config
        self.tare_taken: Tare | None = None
        self.received = 0
        self.status = 0  # of the newest sample; 0 is healthy
        self._on_sample = on_sample
        self._to_sensor = sensor_frame_matrix(config)
        self._offset = np.zeros(6)
        self._arrivals: deque[float] = deque(maxlen=math.ceil(2 * RATE_WINDOW_S * config.rate_hz))
        self._taring = threading.Lock()
        self._wanted = 0  # samples the tare still needs
        self._at_rest: list[np.ndarray] = []
        self._enough = threading.Event()

    @abstractmethod
    def start(self, timeout_s: float = 3.0) -> None:
        """Connect and begin to deliver. Raises `DeviceError` when no sample comes in time."""

    @abstractmethod
    def stop(self) -> None:
        """End delivery; may be started again."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call it."""

    @property
    @abstractmethod
    def lost(self) -> int:
        """Samples the device numbered that never arrived."""

    @abstractmethod
    def health(self) -> WrenchHealth:
        """State now."""

    def tare(self, samples: int | None = None, timeout_s: float = 1.0) -> Tare:
        """Make the mean of the next samples (default: `tare_samples` of the cell) the new zero.

        Raises `DeviceError`, and leaves the zero as it was, when they do not arrive in time, carry
        an error status, or scatter too much for a sensor at rest.
        """
        count = samples or self.config.tare_samples
        with self._taring:
            self._enough.clear()
            self._at_rest = []
            self._wanted = count
            arrived = self._enough.wait(timeout_s + count / self.config.rate_hz)
            self._wanted = 0
            values = np.array(self._at_rest)
            health = self.health()
            if not arrived:
                raise DeviceError(
                    f"tare refused: {len(values)} of {count} samples came in; "
                    f"{health.message or 'the stream was interrupted'}"
                )
            if not health.usable:
                raise DeviceError(f"tare refused: {health.message}")
            self.tare_taken = mean_at_rest(values, time.time_ns())
            self._offset = np.array(self.tare_taken.wrench)
            return self.tare_taken

    @property
    def silent_s(self) -> float:
        """A newest sample older than this is a fault."""
        return max(SILENT_S, 5 / self.config.rate_hz)

    @property
    def age_s(self) -> float:
        """Since the newest sample; infinite before the first."""
        return time.monotonic() - self._arrivals[-1] if self._arrivals else math.inf

    @property
    def rate_hz(self) -> float:
        """Measured over the last second; 0 when silent."""
        since = time.monotonic() - RATE_WINDOW_S
        recent = [arrival for arrival in list(self._arrivals) if arrival > since]
        if len(recent) < 2 or self.age_s > self.silent_s:
            return 0.0
        return (len(recent) - 1) / max(1e-9, recent[-1] - recent[0])

    def _deliver(
        self,
        seq: int,
        device_time: float,
        receive_ns: int,
        wrench: np.ndarray,
        status: int,
    ) -> None:
        """Pass on a wrench (6,) in N and N·m on the gel, in the sensor frame, not yet tared."""
        if self._wanted > 0:
            self._at_rest.append(wrench)
            self._wanted -= 1
            if not self._wanted:
                self._enough.set()
        self.status = status
        self.received += 1
        self._arrivals.append(time.monotonic())
        tared = (wrench - self._offset).tolist()
        self._on_sample(WrenchSample(seq, device_time, receive_ns, tared, status))


def rate_message(name: str, rate_hz: float, wanted_hz: float) -> str:
    """Says that a device does not keep to the rate that was asked for; empty when it does."""
    if abs(rate_hz / wanted_hz - 1) <= RATE_TOLERANCE:
        return ""
    return f"{name}: sends {rate_hz:.0f} Hz, netft.rate_hz is {wanted_hz:.0f}; make them the same"


def sensor_frame_matrix(config: NetftConfig) -> np.ndarray:
    """(6, 6): wrench in the transducer frame → wrench on the gel in the sensor frame, about its
    origin. The torque about another point is T' = T + p × F, p from that point to the old one."""
    rotation = np.array(matrix_from_rotvec(config.rotation))
    x, y, z = config.origin_m
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return config.sign * np.block([[rotation, np.zeros((3, 3))], [cross @ rotation, rotation]])


def mean_at_rest(wrenches: np.ndarray, stamp_ns: int) -> Tare:
    """Tare from wrenches (n, 6) in N and N·m. Raises `DeviceError` when they scatter too much."""
    deviation = wrenches.std(axis=0)
    limit = np.repeat([TARE_DEVIATION_N, TARE_DEVIATION_NM], 3)
    worst = int(np.argmax(deviation / limit))
    if deviation[worst] > limit[worst]:
        unit = "N" if worst < 3 else "N·m"
        raise DeviceError(
            f"tare refused: {AXES[worst]} scatters by {deviation[worst]:.3g} {unit} "
            f"(limit {limit[worst]:g}); keep robot and sensor still and apart, then tare again"
        )
    mean = tuple(wrenches.mean(axis=0).tolist())
    return Tare(mean, tuple(deviation.tolist()), len(wrenches), stamp_ns)
