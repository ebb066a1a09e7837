"""Node: camera, video file or image folder → `<sensor>/image/compressed`, JPEG as it came.

Parameters: `cell`, `sensor` (names or paths); `source`, `fps`, `loop` (override the cell's camera).
"""

from __future__ import annotations

import array
import math
import sys

from diagnostic_msgs.msg import DiagnosticStatus
from sensor_msgs.msg import CompressedImage

from genforce_collect.clock import NS, ClockMapper
from genforce_collect.config import CameraConfig, load_cell, load_sensor, parse_section
from genforce_collect.devices.camera import Camera, CameraFrame
from genforce_collect.nodes.common import DriverNode, Stream, declare, run


class CameraNode(DriverNode):
    """Publishes straight from the camera's thread."""

    def __init__(self) -> None:
        super().__init__("camera")
        cell = str(self.declare_parameter("cell", "virtual").value)
        sensor = load_sensor(str(self.declare_parameter("sensor", "array_1").value))
        config = self._overridden(load_cell(cell).camera)

        self._camera_clock = ClockMapper()
        self._latency_ns = round(config.latency_s * NS)
        self._last_stamp_ns = 0
        self._frame_id = sensor.name
        self._stream = Stream(self, CompressedImage, f"{sensor.name}/image/compressed", config.fps)
        self._camera = Camera(config, self._publish)
        self.start()

    def connect(self) -> None:
        self._camera.start()

    def disconnect(self) -> None:
        self._camera.stop()
        self._stream.flush()

    def _overridden(self, config: CameraConfig) -> CameraConfig:
        source = str(self.declare_parameter("source", "").value)
        fps = declare(self, "fps", 0.0)
        loop = bool(self.declare_parameter("loop", config.loop).value)
        values = config.model_dump() | {"loop": loop}
        values |= {"source": source} if source else {}
        values |= {"fps": fps} if fps else {}
        return parse_section(values, CameraConfig, "camera node")

    def _publish(self, frame: CameraFrame) -> None:
        message = CompressedImage(format="jpeg", data=array.array("B", frame.jpeg))
        message.header.frame_id = self._frame_id
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(self._stamp_ns(frame), NS)
        self._stream.device_lost = self._camera.lost
        self._stream.publish(message, frame.receive_ns, frame.device_time)

    def _stamp_ns(self, frame: CameraFrame) -> int:
        """Time of capture: the camera's own where it tells one, else that of arrival."""
        stamp_ns = frame.receive_ns
        if not math.isnan(frame.device_time):
            stamp_ns = self._camera_clock.update(frame.device_time, frame.receive_ns)
            self._stream.offset, self._stream.drift = (
                self._camera_clock.offset,
                self._camera_clock.drift,
            )
        if 0 <= self._last_stamp_ns - stamp_ns < NS:  # two frames must not share a stamp
            stamp_ns = self._last_stamp_ns + 1
        self._last_stamp_ns = stamp_ns
        return stamp_ns - self._latency_ns

    def diagnose(self) -> None:
        health = self._camera.health()
        level = DiagnosticStatus.OK if health.usable else DiagnosticStatus.ERROR
        if health.ended:
            level = DiagnosticStatus.WARN
        values = {
            "rate_hz": f"{health.rate_hz:.1f}",
            "requested_hz": f"{health.requested_hz:g}",
            "received": str(health.received),
            "lost": str(health.lost),
            "broken": str(health.broken),
            "repeated": str(health.repeated),
            "reconnects": str(health.reconnects),
            "age_s": f"{health.age_s:.3f}",
            "clock_offset_s": f"{self._camera_clock.offset:.6f}",
            "clock_drift_ppm": f"{self._camera_clock.drift * 1e6:.1f}",
        }
        self._diagnostics.publish(
            level,
            health.message,
            self._camera.config.source,
            values,
        )


def main() -> int:
    """Entry point of the executable `camera`."""
    return run(CameraNode)


if __name__ == "__main__":
    sys.exit(main())
