"""Node: `<sensor>/image/compressed` (or `<sensor>/taxels`) → `<sensor>/markers`, one a frame.

Parameters: `sensor` (name or path); `auto_reference` (default true): take the reference from the
first good frames; `reference_frames`: how many. Service `<sensor>/set_reference`: take it anew from
the next good frames. Frames are worked on in the order they came, and none is left out.
"""

from __future__ import annotations

import array
import queue
import sys
import threading
import time
from typing import Any

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.node import Node
from sensor_msgs.msg import CompressedImage
from std_srvs.srv import Trigger

from genforce_collect.config import load_sensor
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.orientation import Way
from genforce_collect.markers.packing import HEIGHT, WIDTH, pack_mask
from genforce_collect.markers.quality import REFERENCE_SINCE, explain
from genforce_collect.markers.reference import ReferenceTaker
from genforce_collect.markers.segmentation import MarkerFrame
from genforce_collect.nodes.common import (
    NAMESPACE,
    Diagnostics,
    Stream,
    from_stamp,
    run,
    stream_qos,
)
from genforce_msgs.msg import Markers, Taxels

MAX_RATE_HZ = 120.0  # deep enough a history for any camera


class SegmenterNode(Node):
    """Callbacks only queue; one thread segments and publishes."""

    def __init__(self) -> None:
        super().__init__("segmenter", namespace=NAMESPACE)
        sensor = load_sensor(str(self.declare_parameter("sensor", "array_1").value))
        auto = bool(self.declare_parameter("auto_reference", True).value)
        frames = int(self.declare_parameter("reference_frames", 10).value)

        cv2.setNumThreads(1)  # one frame is too small to share
        self._frontend = Frontend(sensor)
        self._taker = ReferenceTaker(self._frontend, frames)
        if auto:
            self._taker.begin()
        self._sensor_name, self._kind_is_taxels = sensor.name, sensor.kind == "taxels"
        self._counts = {"frames": 0, "flagged": 0}
        self._last_reason = ""
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stream = Stream(self, Markers, f"{sensor.name}/markers", MAX_RATE_HZ)
        self._diagnostics = Diagnostics(self, self._diagnose)
        self._worker = threading.Thread(target=self._work, name="segmenter", daemon=True)
        self._worker.start()

        kind, topic = (
            (Taxels, "taxels") if sensor.kind == "taxels" else (CompressedImage, "image/compressed")
        )
        self.create_subscription(
            kind, f"{sensor.name}/{topic}", self._inbox.put, stream_qos(MAX_RATE_HZ)
        )
        self.create_service(Trigger, f"{sensor.name}/set_reference", self._set_reference)

    def close(self) -> None:
        self._inbox.put(None)
        self._worker.join()
        self._stream.flush()

    def _set_reference(self, _request: object, response: Trigger.Response) -> Trigger.Response:
        self._inbox.put(time.time_ns())  # in turn: what waits before it is of another moment
        response.success = True
        response.message = f"the next {self._taker.wanted} good frames become the reference"
        return response

    def _work(self) -> None:
        while (item := self._inbox.get()) is not None:
            if isinstance(item, int):
                self._taker.begin(after_ns=item)
            else:
                self._segment(item)

    def _segment(self, message: Any) -> None:
        wanted = self._taker.wants(from_stamp(message.header.stamp))
        if isinstance(message, Taxels):
            frame = self._frontend.process_taxels(np.asarray(message.counts, np.int32))
        else:
            frame = self._frontend.process_jpeg(bytes(message.data))
        if wanted and self._taker.offer(frame):
            self._report_reference()
            self._diagnose()  # somebody may wait for it
        self._counts["frames"] += 1
        self._counts["flagged"] += bool(frame.flags)
        self._last_reason = explain(frame.flags)
        self._stream.publish(self._message(message.header, frame))

    def _report_reference(self) -> None:
        if (reference := self._frontend.reference) is None:
            return
        text = f"reference of {self._sensor_name}: {reference.count} markers"
        if self._kind_is_taxels:
            self.get_logger().info(text)
            return
        way = self._frontend.way_up(reference)
        log = self.get_logger().info if way is Way.UPRIGHT else self.get_logger().warning
        log(f"{text}, seen {way.value}")

    def _message(self, header: Any, frame: MarkerFrame) -> Markers:
        message = Markers(
            seq=self._stream.count,
            height=HEIGHT,
            width=WIDTH,
            mask=array.array("B", pack_mask(frame.mask).tobytes()),
            x=array.array("f", frame.x.tobytes()),
            y=array.array("f", frame.y.tobytes()),
            area=array.array("f", frame.area.tobytes()),
            expected=frame.expected,
            flags=frame.flags,
            contrast=frame.contrast,
            saturation=frame.saturation,
            sharpness=frame.sharpness,
        )
        message.header = header
        return message

    def _diagnose(self) -> None:
        waiting = self._inbox.qsize()
        has_reference = self._frontend.reference is not None
        doubtful = self._last_reason not in {"", "good"}
        text = self._last_reason if doubtful else "" if has_reference else "no reference yet"
        self._diagnostics.publish(
            DiagnosticStatus.WARN if text else DiagnosticStatus.OK,
            text,
            self._sensor_name,
            {**self._counts, "waiting": waiting, REFERENCE_SINCE: self._taker.since_ns},
        )


def main() -> int:
    """Entry point of the executable `segmenter`."""
    return run(SegmenterNode)


if __name__ == "__main__":
    sys.exit(main())
