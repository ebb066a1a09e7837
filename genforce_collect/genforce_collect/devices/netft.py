"""The force/torque sensor behind an ATI Net F/T box, read with pynetft.

What comes of its faults (each is named in `WrenchHealth.message`):

- lost, late and doubled records: the first are counted as lost, the others left out;
- silence: pynetft reconnects by itself; what the box numbered meanwhile is counted as lost;
- a counter that stands still: records arrive but say nothing new, so no sample is passed on;
- an error status: samples carry it; pynetft opens a new session for each until it clears;
- a box that restarts: its scale is read anew and its time begins anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pynetft

from genforce_collect.clock import sequence_to_time, system_offset_ns
from genforce_collect.config import NetftConfig
from genforce_collect.devices.wrench import (
    NEWTON_METERS,
    NEWTONS,
    STATUS_SATURATION,
    WrenchHealth,
    WrenchSample,
    WrenchSensor,
    rate_message,
)
from genforce_collect.errors import DeviceError

TICK_HZ = 7000.0  # the box samples this often; ft_sequence counts it, however often it sends
QUEUE_SIZE = 14_000  # a stall of 2 s at the highest rate
RECONNECT_S = (0.1, 1.0)  # first and longest pause
RECEIVE_TIMEOUT_S = 0.5  # a new session costs as much as is lost in this; stalls are shorter
COUNTER_RANGE = 1 << 32
BATCH_S = 3e-3  # records are taken so often: to wake up costs more than the work on a record

STATUS_SUMMARY = 1 << 31
STATUS_LATCH = 1 << 16
HARMLESS = {0, STATUS_LATCH, STATUS_LATCH | STATUS_SUMMARY}  # a latched condition spoils no sample
STATUS_BITS = {
    30: "CPU or RAM error",
    29: "digital board error",
    28: "analog board error",
    27: "serial link communication error",
    26: "program memory error",
    25: "halted by configuration errors",
    24: "settings validation error",
    23: "configuration does not fit the calibration",
    22: "network communication failure",
    21: "CAN communication failure",
    20: "RDT communication failure",
    19: "EtherNet/IP failure",
    18: "DeviceNet failure",
    17: "transducer saturated",
    16: "monitor condition latched",
    14: "watchdog timeout",
    13: "stack check error",
    12: "EEPROM failure",
    11: "flash failure",
    10: "analog board watchdog timeout",
    9: "gauge excitation current too high",
    8: "gauge excitation current too low",
    7: "analog ground out of range",
    6: "analog supply too high",
    5: "analog supply too low",
    4: "serial link data unavailable",
    3: "reference voltage or power monitoring error",
    2: "internal temperature error",
    1: "HTTP failure",
}


class NetftSensor(WrenchSensor):
    """Streams from one box between `start` and `stop`."""

    def __init__(self, config: NetftConfig, on_sample: Callable[[WrenchSample], None]) -> None:
        super().__init__(config, on_sample)
        self._client = pynetft.Client(
            pynetft.Config(
                sensor_host=config.host,
                rdt_port=config.rdt_port,
                http_port=config.http_port,
                receive_timeout=max(RECEIVE_TIMEOUT_S, 5 / config.rate_hz),
                reconnect_initial_delay=RECONNECT_S[0],
                reconnect_max_delay=RECONNECT_S[1],
                deliver_samples_with_error_status=True,
            ),
            queue_size=QUEUE_SIZE,
        )
        self._revision = -1  # of the scale that the box had when it was last read
        self._units_to_sensor = self._to_sensor
        self._device_time: float | None = None
        self._losses = LossCount()
        self._period_ns = round(1e9 / config.rate_hz)

    def start(self, timeout_s: float = 3.0) -> None:
        self._client.start(self._on_record)
        try:
            if not self._client.wait_for_first_sample(timeout_s):
                raise DeviceError(self.health().message)
            configuration = self._client.health().sensor_configuration
            if configuration is not None:
                units = configuration.calibration
                self._scale_to_si(units.force_unit, units.torque_unit)
        except DeviceError:
            self.stop()
            raise

    def stop(self) -> None:
        self._client.stop()

    @property
    def lost(self) -> int:
        return self._losses.total

    def health(self) -> WrenchHealth:
        box = self._client.health()
        age_s = self.age_s
        fault = self._fault(box, age_s)
        sent_hz = TICK_HZ / self._losses.ticks if self._losses.ticks else self.config.rate_hz
        return WrenchHealth(
            message=fault
            or self._status_message(self.status)
            or rate_message(self.name, sent_hz, self.config.rate_hz),
            usable=not fault and self.status in HARMLESS,
            rate_hz=self.rate_hz,
            requested_hz=self.config.rate_hz,
            received=self.received,
            lost=self.lost,
            age_s=age_s,
            status=self.status,
            details=(
                ("duplicate", str(box.duplicate_count)),
                ("out of order", str(box.out_of_order_count)),
                ("malformed", str(box.malformed_count)),
                ("reconnects", str(box.reconnect_count)),
                ("box restarts", str(box.ft_restart_count)),
                ("calibration changes", str(box.calibration_change_count)),
                ("dropped in the queue", str(box.python_queue_dropped_count)),
            ),
        )

    def _on_record(self, record: pynetft.Sample) -> None:
        if record.configuration_revision != self._revision:
            self._scale_to_si(record.force_unit, record.torque_unit)
            self._revision = record.configuration_revision
        self._losses.update(record.rdt_sequence, record.ft_sequence)
        self._device_time = sequence_to_time(record.ft_sequence, TICK_HZ, self._device_time)
        self._deliver(
            record.ft_sequence,
            self._device_time,
            record.received_at_ns + system_offset_ns(time.monotonic_ns),
            self._units_to_sensor @ record.wrench,
            record.status,
        )
        if time.monotonic_ns() - record.received_at_ns < self._period_ns:  # none is waiting
            time.sleep(BATCH_S)

    def _scale_to_si(self, force_unit: str, torque_unit: str) -> None:
        if force_unit not in NEWTONS or torque_unit not in NEWTON_METERS:
            raise DeviceError(
                f"{self.name}: counts in unknown units; set N and Nm on its configuration page"
            )
        scale = np.repeat([NEWTONS[force_unit], NEWTON_METERS[torque_unit]], 3)
        self._units_to_sensor = self._to_sensor * scale

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"Net F/T box {self.config.host}"

    def _fault(self, box: pynetft.Health, age_s: float) -> str:
        """Why no samples come; empty while they do."""
        try:
            self._client.raise_if_failed()
        except pynetft.NetFTError as error:
            return f"{self.name}: reading ended: {error.__cause__ or error}"
        if age_s <= self.silent_s:
            return ""
        if box.last_ft_progress == "stall":
            return (
                f"{self.name}: its counter stands still, it repeats one measurement; "
                f"switch it off and on"
            )
        if box.last_ft_progress == "backward":
            return f"{self.name}: restarted twice within seconds; wait until it has been up longer"
        if box.state is not pynetft.ClientState.STREAMING and box.last_status not in HARMLESS:
            return self._status_message(box.last_status)
        if box.sensor_configuration is None or "configuration" in box.last_error:
            return (
                f"{self.name}: no configuration page on port {self.config.http_port}: "
                f"{box.last_error or 'no answer'}; check power, cable, netft.host and http_port"
            )
        return (
            f"{self.name}: no records from port {self.config.rdt_port}: "
            f"{box.last_error or 'no answer'}; check that RDT is enabled and netft.rdt_port"
        )

    def _status_message(self, status: int) -> str:
        if not status:
            return ""
        causes = ", ".join(cause for bit, cause in STATUS_BITS.items() if status >> bit & 1)
        remedy = (
            "unload the sensor"
            if status & STATUS_SATURATION
            else "see the box's system status page"
        )
        return f"{self.name}: {causes or 'unnamed error'} (status 0x{status:08x}); {remedy}"


class LossCount:
    """Counts the records that were numbered and never seen.

    `rdt_sequence` counts records from 1 in each session; across sessions only `ft_sequence` tells,
    which goes on at a fixed number of ticks a record.
    """

    def __init__(self) -> None:
        self.total = 0
        self.ticks = 0  # of ft_sequence between records; 0 until two in a row were seen
        self._rdt = 0
        self._ft = -1
        self._last_ticks = 0

    def update(self, rdt_sequence: int, ft_sequence: int) -> None:
        """Take in a record that arrived."""
        records = rdt_sequence - self._rdt
        ticks = (ft_sequence - self._ft) % COUNTER_RANGE
        first = self._ft < 0
        self._rdt, self._ft = rdt_sequence, ft_sequence
        if first or ticks >= COUNTER_RANGE // 2:  # the box restarted
            return
        if records == 1 and ticks == self._last_ticks:
            self.ticks = ticks
        elif records >= 1 and abs(ticks - records * self.ticks) < self.ticks:
            self.total += records - 1
        elif self.ticks:
            self.total += max(0, round(ticks / self.ticks) - 1)
        self._last_ticks = ticks if records == 1 else 0
