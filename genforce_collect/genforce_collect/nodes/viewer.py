"""Node: every topic of a cell → Rerun's web viewer, served on loopback; prints the page's address.

Parameters: `sensor` (name or path); `port` (of the page, default 9090; the one above it carries the
data); `image_rate` (Hz, default 10): pictures shown. It asks for nothing to be sent again and holds
nothing up: what it misses is missing in the view only.
"""

from __future__ import annotations

import sys
from typing import Any

import rclpy
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.subscription import Subscription

from genforce_collect.config import load_sensor
from genforce_collect.nodes.common import LATCHED_QOS, NAMESPACE, declare, run
from genforce_collect.nodes.messages import message_class
from genforce_collect.view.command import DEFAULT_IMAGE_RATE_HZ, DEFAULT_PORT, open_view

DRAIN_PERIOD_S = 0.1
LATCHED = frozenset({"/genforce/contact", "/genforce/robot/state", "/genforce/recorder/status"})
PASSING_QOS = QoSProfile(  # holds what the fastest stream brings from one draining to the next
    reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST, depth=500
)


class ViewerNode(Node):
    """A timer takes what has come; no message wakes this process for itself."""

    def __init__(self) -> None:
        super().__init__("viewer", namespace=NAMESPACE)
        sensor = load_sensor(str(self.declare_parameter("sensor", "array_1").value))
        port = int(self.declare_parameter("port", DEFAULT_PORT).value)
        rate_hz = declare(self, "image_rate", DEFAULT_IMAGE_RATE_HZ)
        self._classes: dict[str, type] = {}
        self._view = open_view(sensor, port, self._deserialize, rate_hz)
        # Of no executor, which would wake for each message.
        self._ear = rclpy.create_node("viewer_ear", namespace=NAMESPACE)
        self._streams = [
            self._subscribe(topic, name) for topic, name in self._view.scene.topics.items()
        ]
        self.create_timer(DRAIN_PERIOD_S, self._drain)
        print(f"live view: {self._view.address}", flush=True)

    def close(self) -> None:
        self._drain()
        self._ear.destroy_node()
        self._view.close()

    def _subscribe(self, topic: str, type_name: str) -> tuple[str, Subscription]:
        kind = self._classes[type_name] = message_class(type_name)
        qos = LATCHED_QOS if topic in LATCHED else PASSING_QOS
        return topic, self._ear.create_subscription(kind, topic, lambda _: None, qos)

    def _deserialize(self, data: bytes, type_name: str) -> Any:
        return deserialize_message(data, self._classes[type_name])

    def _drain(self) -> None:
        for topic, subscription in self._streams:
            with subscription.handle:
                while taken := subscription.handle.take_message(subscription.msg_type, True):
                    self._view.scene.add(topic, taken[0])
        self._view.scene.flush()


def main() -> int:
    """Entry point of the executable `viewer`."""
    return run(ViewerNode)


if __name__ == "__main__":
    sys.exit(main())
