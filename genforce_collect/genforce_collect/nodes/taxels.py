"""Node: uSkin websocket → `<sensor>/taxels`, raw counts as they came.

Parameters: `cell`, `sensor` (names or paths); `url` (overrides the cell's).
"""

from __future__ import annotations

import array
import math
import sys

from diagnostic_msgs.msg import DiagnosticStatus

from genforce_collect.clock import NS, ClockMapper
from genforce_collect.config import load_cell, load_sensor
from genforce_collect.devices.uskin import TaxelSample, Uskin
from genforce_collect.errors import ConfigError
from genforce_collect.nodes.common import DriverNode, Stream, run
from genforce_msgs.msg import Taxels


class TaxelsNode(DriverNode):
    """Publishes straight from the device's thread."""

    def __init__(self) -> None:
        super().__init__("taxels")
        cell = str(self.declare_parameter("cell", "virtual").value)
        sensor = load_sensor(str(self.declare_parameter("sensor", "uskin").value))
        url = str(self.declare_parameter("url", "").value)
        if sensor.kind != "taxels":
            raise ConfigError(f"sensor '{sensor.name}' has no taxels: its kind is {sensor.kind}")
        config = load_cell(cell).uskin
        if url:
            config = config.model_copy(update={"url": url})

        self._device_clock = ClockMapper()
        self._taxels = sensor.taxels
        self._frame_id = sensor.name
        self._stream = Stream(self, Taxels, f"{sensor.name}/taxels", config.rate_hz)
        self._device = Uskin(config, sensor.taxels, self._publish)
        self.start()

    def connect(self) -> None:
        self._device.start()

    def disconnect(self) -> None:
        self._device.stop()
        self._stream.flush()

    def _publish(self, sample: TaxelSample) -> None:
        stamp_ns = sample.receive_ns
        if not math.isnan(sample.device_time):
            stamp_ns = self._device_clock.update(sample.device_time, sample.receive_ns)
            self._stream.offset = self._device_clock.offset
            self._stream.drift = self._device_clock.drift
        message = Taxels(
            seq=sample.seq,
            rows=self._taxels.rows,
            cols=self._taxels.columns,
            axes=self._taxels.axes,
            counts=array.array("i", sample.counts),
            repeated=sample.repeated,
        )
        message.header.frame_id = self._frame_id
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, NS)
        self._stream.device_lost = self._device.lost
        self._stream.publish(message, sample.receive_ns, sample.device_time)

    def diagnose(self) -> None:
        health = self._device.health()
        values = {
            "rate_hz": f"{health.rate_hz:.1f}",
            "fresh_hz": f"{health.fresh_hz:.1f}",
            "received": str(health.received),
            "repeated": str(health.repeated),
            "lost": str(health.lost),
            "malformed": str(health.malformed),
            "reconnects": str(health.reconnects),
            "age_s": f"{health.age_s:.3f}",
        }
        self._diagnostics.publish(
            DiagnosticStatus.OK if health.usable else DiagnosticStatus.ERROR,
            health.message,
            self._device.config.url,
            values,
        )


def main() -> int:
    """Entry point of the executable `taxels`."""
    return run(TaxelsNode)


if __name__ == "__main__":
    sys.exit(main())
