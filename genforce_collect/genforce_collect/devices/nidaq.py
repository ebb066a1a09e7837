"""A transducer read directly: six gauge voltages through an NI-DAQ card and a calibration file.

Needs the package nidaqmx and NI's driver; both are looked for only when a cell asks for them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from genforce_collect.config import NetftConfig, NidaqConfig
from genforce_collect.devices.ati_calibration import read_calibration
from genforce_collect.devices.wrench import (
    STATUS_SATURATION,
    WrenchHealth,
    WrenchSample,
    WrenchSensor,
    rate_message,
)
from genforce_collect.errors import ConfigError, DeviceError

BLOCK_S = 0.01  # samples are fetched this often
BUFFER_S = 2.0  # how long a stall of this process is bridged
RETRY_S = 1.0
SATURATED = 0.999  # of the full-scale voltage


class Voltages(Protocol):
    """A running acquisition of the six gauges."""

    rate_hz: float  # by the card's own clock

    def read(self) -> np.ndarray:
        """The next samples, float64 (n, 6), in V; none left out. Raises `DeviceError`."""

    def close(self) -> None:
        """End the acquisition."""


class NidaqSensor(WrenchSensor):
    """Reads blocks of voltages in a thread between `start` and `stop`.

    A card that fails (unplugged, buffer overrun) is opened anew every `RETRY_S`; its samples are
    then numbered from 0 again.
    """

    def __init__(
        self,
        config: NetftConfig,
        on_sample: Callable[[WrenchSample], None],
        acquire: Callable[[NidaqConfig, float, float], Voltages] | None = None,
    ) -> None:
        """`acquire(card, rate_hz, full_scale_v)` starts an acquisition; by default with nidaqmx."""
        super().__init__(config, on_sample)
        if config.nidaq is None:
            raise ConfigError("netft.nidaq: missing; it names the card and the calibration file")
        self.calibration = read_calibration(config.nidaq.calibration)
        self._card = config.nidaq
        self._acquire = acquire or DaqTask
        self._volts_to_sensor = self._to_sensor @ self.calibration.matrix
        self._failure = ""
        self._rate_message = ""
        self._reopened = 0
        self._stopped = threading.Event()
        self._first = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, timeout_s: float = 3.0) -> None:
        voltages = self._open()
        self._stopped.clear()
        self._thread = threading.Thread(
            target=self._read, args=(voltages,), name="nidaq", daemon=True
        )
        self._thread.start()
        if not self._first.wait(timeout_s):
            self.stop()
            raise DeviceError(self.health().message)

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def lost(self) -> int:
        return 0  # the card's buffer gives all or fails

    def health(self) -> WrenchHealth:
        age_s = self.age_s
        fault = self._failure
        if not fault and age_s > self.silent_s:
            fault = f"{self.name}: no samples; check that the card is connected and powered"
        saturated = f"{self.name}: a gauge is saturated; unload the sensor" if self.status else ""
        return WrenchHealth(
            message=fault or saturated or self._rate_message,
            usable=not fault and not self.status,
            rate_hz=self.rate_hz,
            requested_hz=self.config.rate_hz,
            received=self.received,
            lost=self.lost,
            age_s=age_s,
            status=self.status,
            details=(
                ("calibration", f"{self.calibration.serial} of {self.calibration.date}"),
                ("reopened", str(self._reopened)),
            ),
        )

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"NI-DAQ card {self._card.device}"

    def _open(self) -> Voltages:
        voltages = self._acquire(self._card, self.config.rate_hz, self.calibration.full_scale_v)
        self._rate_message = rate_message(self.name, voltages.rate_hz, self.config.rate_hz)
        return voltages

    def _read(self, voltages: Voltages) -> None:
        while not self._stopped.is_set():
            try:
                self._read_until_stopped(voltages)
            except DeviceError as error:
                self._failure = str(error)
            finally:
                voltages.close()
            while not self._stopped.wait(RETRY_S):
                try:
                    voltages = self._open()
                except DeviceError as error:
                    self._failure = str(error)
                else:
                    self._reopened += 1
                    break

    def _read_until_stopped(self, voltages: Voltages) -> None:
        seq = 0
        limit = SATURATED * self.calibration.full_scale_v
        while not self._stopped.is_set():
            block = voltages.read()
            receive_ns = time.time_ns()
            saturated = (np.abs(block) >= limit).any(axis=1).tolist()
            for wrench, over in zip(block @ self._volts_to_sensor.T, saturated, strict=True):
                status = STATUS_SATURATION if over else 0
                self._deliver(seq, seq / voltages.rate_hz, receive_ns, wrench, status)
                seq += 1
            self._failure = ""
            self._first.set()


class DaqTask:
    """Continuous, hardware-timed acquisition with nidaqmx."""

    def __init__(self, card: NidaqConfig, rate_hz: float, full_scale_v: float) -> None:
        try:
            import nidaqmx
            from nidaqmx.constants import AcquisitionType, TerminalConfiguration
            from nidaqmx.stream_readers import AnalogMultiChannelReader
        except ImportError as error:
            raise DeviceError(
                "reading gauge voltages needs nidaqmx: pip install -r requirements/daq.txt"
            ) from error
        self._error = nidaqmx.errors.Error
        self._name = f"NI-DAQ card {card.device}"
        try:
            self._task = nidaqmx.Task()
        except self._error as error:
            raise DeviceError(_one_line(self._name, error)) from error
        try:
            self._task.ai_channels.add_ai_voltage_chan(
                f"{card.device}/{card.channels}",
                terminal_config=TerminalConfiguration.DIFF,
                min_val=-full_scale_v,
                max_val=full_scale_v,
            )
            self._task.timing.cfg_samp_clk_timing(
                rate_hz,
                sample_mode=AcquisitionType.CONTINUOUS,
                samps_per_chan=max(2, round(BUFFER_S * rate_hz)),
            )
            self._reader = AnalogMultiChannelReader(self._task.in_stream)
            self.rate_hz = float(self._task.timing.samp_clk_rate)
            self._task.start()
        except self._error as error:
            self._task.close()
            raise DeviceError(_one_line(self._name, error)) from error
        self._block = np.empty((6, max(1, round(BLOCK_S * rate_hz))))

    def read(self) -> np.ndarray:
        try:
            self._reader.read_many_sample(self._block, self._block.shape[1], timeout=RETRY_S)
        except self._error as error:
            raise DeviceError(_one_line(self._name, error)) from error
        return self._block.T

    def close(self) -> None:
        self._task.close()


def _one_line(name: str, error: Exception) -> str:
    return f"{name}: {' '.join(str(error).split())}"
