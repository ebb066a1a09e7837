"""Node: force/torque sensor → `netft/wrench`; service `netft/tare`.

Parameters: `cell` (name or path), `tare_on_start` (default true).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import WrenchStamped
from std_msgs.msg import Header
from std_srvs.srv import Trigger

from genforce_collect.clock import ClockMapper
from genforce_collect.config import NetftConfig, load_cell
from genforce_collect.devices.netft import NetftSensor
from genforce_collect.devices.nidaq import NidaqSensor
from genforce_collect.devices.wrench import AXES, SENSOR_STATUS, WrenchSample, WrenchSensor
from genforce_collect.errors import DeviceError
from genforce_collect.nodes.common import DriverNode, NumberStream, run

STATUS_PERIOD_S = 0.02  # how often the newest sample's status is looked at


class NetftNode(DriverNode):
    """Publishes straight from the device's thread."""

    def __init__(self) -> None:
        super().__init__("netft")
        cell = str(self.declare_parameter("cell", "virtual").value)
        self._tare_on_start = bool(self.declare_parameter("tare_on_start", True).value)

        config = load_cell(cell).netft
        self._device_clock = ClockMapper()
        template = WrenchStamped(header=Header(frame_id="sensor"))
        self._stream = NumberStream(self, template, "netft/wrench", config.rate_hz)
        self._sensor = make_sensor(config, self._publish)
        self.create_service(Trigger, "netft/tare", self._tare)
        self._told_status = 0
        self.create_timer(STATUS_PERIOD_S, self._tell_status)
        self.start()

    def connect(self) -> None:
        self._sensor.start()
        if not self._tare_on_start:
            return
        try:
            self._take_tare()
        except DeviceError:  # the guard would take raw values for forces
            self._sensor.stop()
            raise

    def disconnect(self) -> None:
        self._sensor.stop()
        self._stream.flush()

    def _publish(self, sample: WrenchSample) -> None:
        stamp_ns = self._device_clock.update(sample.device_time, sample.receive_ns)
        stream = self._stream
        stream.device_lost = self._sensor.lost
        stream.offset, stream.drift = self._device_clock.offset, self._device_clock.drift
        stream.publish_numbers(stamp_ns, sample.wrench, sample.receive_ns, sample.device_time)

    def _take_tare(self) -> str:
        tare = str(self._sensor.tare())
        self.get_logger().info(f"tare: {tare}")
        return tare

    def _tare(self, _request: object, response: Trigger.Response) -> Trigger.Response:
        try:
            response.message = self._take_tare()
            response.success = True
        except DeviceError as error:
            response.message = str(error)
            self.get_logger().error(response.message)
        return response

    def _tell_status(self) -> None:
        """Tell at once when the samples cease to be worth anything, or are so again."""
        if self._active and self._sensor.status != self._told_status:
            self.diagnose()

    def diagnose(self) -> None:
        self._told_status = self._sensor.status
        health = self._sensor.health()
        tare = self._sensor.tare_taken
        message = health.message
        if not message and tare is None:
            message = "not tared; call netft/tare while nothing touches the gel"
        level = DiagnosticStatus.WARN if message else DiagnosticStatus.OK
        if not health.usable:
            level = DiagnosticStatus.ERROR
        clock = self._device_clock
        values = {
            "rate_hz": f"{health.rate_hz:.1f}",
            "requested_hz": f"{health.requested_hz:g}",
            "received": str(health.received),
            "lost": str(health.lost),
            "age_s": f"{health.age_s:.3f}",
            SENSOR_STATUS: f"0x{health.status:08x}",
            **dict(health.details),
            "clock_offset_s": f"{clock.offset:.6f}",
            "clock_drift_ppm": f"{clock.drift * 1e6:.1f}",
            "clock_restarts": f"{clock.restarts} {clock.last_restart}".strip(),
        }
        if tare is not None:
            values["tare_stamp_ns"] = str(tare.stamp_ns)
            for axis, value in zip(AXES, tare.wrench, strict=True):
                values[f"tare_{axis}"] = f"{value:.6f}"
        self._diagnostics.publish(
            level,
            message,
            self._sensor.name,
            values,
        )


def make_sensor(config: NetftConfig, on_sample: Callable[[WrenchSample], None]) -> WrenchSensor:
    """The driver that the cell asks for: the box, or a DAQ card."""
    return (NidaqSensor if config.nidaq else NetftSensor)(config, on_sample)


def main() -> int:
    """Entry point of the executable `netft`."""
    return run(NetftNode)


if __name__ == "__main__":
    sys.exit(main())
