"""Plays a bag onto its topics; ends with it.

Parameters: bag, rate, loop, paused, topics, stamps (original or now), clock.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from std_srvs.srv import SetBool

from genforce_collect.bags import TopicSpec
from genforce_collect.nodes.common import NAMESPACE, declare, run, to_stamp
from genforce_collect.nodes.messages import message_class
from genforce_collect.replay import Player, ReplayOptions


class Replay(Node):
    """A player with its publishers; without options it reads them from its parameters."""

    def __init__(self, options: ReplayOptions | None = None) -> None:
        super().__init__("replay", namespace=NAMESPACE)
        options = options or self._declared_options()
        self._player = Player(options, self._publish, self._publish_clock)
        self._outputs = {
            spec.name: self.create_publisher(message_class(spec.type), spec.name, _qos(spec))
            for spec in self._player.specs
        }
        self._clock_output = self.create_publisher(Clock, "/clock", 10) if options.clock else None
        self.create_service(SetBool, "replay/pause", self._on_pause)
        self.get_logger().info(
            f"{options.bag}: {self._player.duration_s:.1f} s, {len(self._outputs)} topics"
        )
        self._thread = threading.Thread(target=self._play, name="player")
        self._thread.start()

    def _declared_options(self) -> ReplayOptions:
        return ReplayOptions(
            Path(self.declare_parameter("bag", "").value),
            declare(self, "rate", 1.0),
            self.declare_parameter("loop", False).value,
            self.declare_parameter("paused", False).value,
            tuple(filter(None, self.declare_parameter("topics", [""]).value)),
            self.declare_parameter("stamps", "original").value == "now",
            self.declare_parameter("clock", False).value,
        )

    def _play(self) -> None:
        self._player.play()
        signal.raise_signal(signal.SIGTERM)  # the end of the bag is the end of the node

    def _publish(self, topic: str, data: bytes) -> None:
        self._outputs[topic].publish(data)

    def _publish_clock(self, time_ns: int) -> None:
        if self._clock_output is not None:
            self._clock_output.publish(Clock(clock=to_stamp(time_ns)))

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._player.pause(request.data)
        response.success = True
        return response

    def close(self) -> None:
        """Stop playing."""
        self._player.stop()
        self._thread.join()
        self.get_logger().info(f"{self._player.sent} messages played")


def _qos(spec: TopicSpec) -> QoSProfile:
    return QoSProfile(
        reliability=ReliabilityPolicy.RELIABLE,
        durability=(
            DurabilityPolicy.TRANSIENT_LOCAL if spec.latched else DurabilityPolicy.VOLATILE
        ),
        history=HistoryPolicy.KEEP_LAST,
        depth=max(1, spec.depth),
    )


def replay(options: ReplayOptions) -> int:
    """Play until the end, SIGINT or SIGTERM; returns the exit code."""
    return run(lambda: Replay(options))


def main() -> int:
    """Run the node with options from its parameters."""
    return run(Replay)


if __name__ == "__main__":
    sys.exit(main())
