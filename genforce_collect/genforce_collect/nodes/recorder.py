"""Records the session's topics as they were sent, and knows what it missed.

Subscribes to each topic as soon as someone publishes it, with the publisher's own durability, and
keeps the messages as bytes. Recording begins and ends with the services `recorder/start` and
`recorder/stop`, or at once with the parameter `bag`; SIGINT and SIGTERM close the bag as well, and
so does the death of the node that leads the session.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile

from genforce_collect.bags import TopicSpec
from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError, GenforceError
from genforce_collect.nodes.common import (
    LATCHED_QOS,
    NAMESPACE,
    Diagnostics,
    run,
    spin_until,
)
from genforce_collect.nodes.messages import message_class
from genforce_collect.recording import (
    STATUS_PERIOD_S,
    Recording,
    RecordingOptions,
    RecordingStatus,
)
from genforce_msgs.msg import RecorderStatus
from genforce_msgs.srv import StartRecording, StopRecording

DISCOVERY_PERIOD_S = 0.2
IDLE = RecordingStatus(False, "", 0.0, 0, 0, (), "")  # says that the recorder lives
QUEUE_DEPTH = 2500  # 2.5 s of the fastest stream


def session_topics(sensor: str) -> list[str]:
    """Absolute names of the topics of a session with this sensor."""
    names = ["robot/tcp_pose", "robot/state", "netft/wrench", "contact", "stream_times"]
    own = ["image/compressed", "taxels", "markers", "wrench", "inference"]
    return [f"/{NAMESPACE}/{name}" for name in [*names, *(f"{sensor}/{n}" for n in own)]] + [
        "/diagnostics"
    ]


def absolute(topic: str) -> str:
    """A relative name is one of this project's namespace."""
    return topic if topic.startswith("/") else f"/{NAMESPACE}/{topic}"


class Recorder(Node):
    """Parameters: sensor; topics, besides the session's; bag, to begin at once; compress,
    split_mb, min_free_mb.
    """

    def __init__(self, **node_options: Any) -> None:
        super().__init__("recorder", namespace=NAMESPACE, **node_options)
        sensor = load_sensor(str(self.declare_parameter("sensor", "array_1").value)).name
        more = self.declare_parameter("topics", [""]).value
        added = map(absolute, filter(None, more))
        self._wanted = dict.fromkeys([*session_topics(sensor), *added])
        self._options = RecordingOptions(
            compress=self.declare_parameter("compress", True).value,
            split_bytes=self.declare_parameter("split_mb", 4096).value * 2**20,
            min_free_bytes=self.declare_parameter("min_free_mb", 500).value * 2**20,
        )
        self._recording: Recording | None = None
        self._recorded: frozenset[str] = frozenset()
        self._leaders: frozenset[bytes] = frozenset()  # publishers of `contact` at the start
        self._specs: dict[str, TopicSpec] = {}
        self._state_lock = threading.Lock()  # of the five above, against the services' thread

        self._status = self.create_publisher(RecorderStatus, "recorder/status", LATCHED_QOS)
        self._diagnostics = Diagnostics(self, self._diagnose)
        self.create_timer(STATUS_PERIOD_S, self._publish_status)
        self.create_timer(DISCOVERY_PERIOD_S, self._discover)
        if bag := self.declare_parameter("bag", "").value:
            self._start(StartRecording.Request(bag=bag))
        self._service_thread = _ServiceThread(self._start, self._stop)

    # --- receiving ---

    def _discover(self) -> None:
        """Subscribe to wanted topics that have got a publisher."""
        missing = [name for name in self._wanted if name not in self._specs]
        if not missing:
            return
        types = dict(self.get_topic_names_and_types())
        for name in missing:
            if name in types:
                self._subscribe(name, types[name][0])

    def _subscribe(self, name: str, type_name: str) -> None:
        publishers = self.get_publishers_info_by_topic(name)
        if not publishers:
            return
        offered = publishers[0].qos_profile
        latched = offered.durability == DurabilityPolicy.TRANSIENT_LOCAL
        qos = QoSProfile(
            reliability=offered.reliability,
            durability=offered.durability,
            history=HistoryPolicy.KEEP_LAST,
            depth=QUEUE_DEPTH,
        )
        spec = TopicSpec(name, type_name, latched, QUEUE_DEPTH)
        with self._state_lock:
            try:
                if self._recording is not None and name in self._recorded:
                    self._recording.add_topic(spec)
                message_type = message_class(type_name)
            except GenforceError as error:
                self.get_logger().error(f"{name} is not recorded: {error}")
                del self._wanted[name]
                return
            self._specs[name] = spec
        self.create_subscription(
            message_type, name, functools.partial(self._receive, name), qos, raw=True
        )

    def _receive(self, name: str, data: bytes) -> None:
        recording = self._recording
        if recording is not None and name in self._recorded:
            recording.put(name, data)

    # --- services, in their own thread ---

    def _start(self, request: StartRecording.Request) -> None:
        if self._recording is not None and not self._recording.done:
            raise GenforceError(f"{self._recording.path} is being recorded; stop it first")
        try:
            metadata = json.loads(request.metadata or "{}")
        except ValueError as error:
            raise ConfigError(f"metadata is not JSON: {error}") from error
        topics = frozenset(map(absolute, request.topics or self._wanted))
        if unknown := topics - set(self._wanted):
            raise ConfigError(
                f"not subscribed to {', '.join(sorted(unknown))}: name them in the recorder's "
                "parameter 'topics'"
            )
        with self._state_lock:
            recording = Recording(Path(request.bag).absolute(), metadata, self._options)
            for name, spec in self._specs.items():
                if name in topics:
                    recording.add_topic(spec)
            self._recorded = topics
            self._leaders = self._contact_publishers()
            self._recording = recording
            recording.start()
        self.get_logger().info(f"recording {request.bag}")

    def _stop(self) -> RecordingStatus:
        if self._recording is None:
            raise GenforceError("nothing is being recorded")
        recording, status = self._recording, self._recording.finish()
        with self._state_lock:
            self._recording, self._leaders = None, frozenset()
        self._publish(status)
        self.get_logger().info(f"closed {recording.path}")
        return status

    # --- status ---

    def status(self) -> RecordingStatus:
        """Of the bag being recorded, or last ended."""
        recording = self._recording
        return IDLE if recording is None else recording.status()

    def _publish_status(self) -> None:
        self._publish(self.status())
        if self._recording and self._leaders and not self._leaders & self._contact_publishers():
            self.get_logger().warning("the node that led this session is gone: closing its bag")
            self._leaders = frozenset()
            self._recording.request_stop()

    def _contact_publishers(self) -> frozenset[bytes]:
        found = self.get_publishers_info_by_topic(f"/{NAMESPACE}/contact")
        return frozenset(bytes(info.endpoint_gid) for info in found)

    def _publish(self, status: RecordingStatus) -> None:
        message = RecorderStatus(
            recording=status.recording,
            bag=status.bag,
            duration=status.duration_s,
            bytes_written=status.bytes_written,
            bytes_free=status.bytes_free,
            topics=[t.name for t in status.topics],
            received=[t.received for t in status.topics],
            lost=[t.lost for t in status.topics],
            rate=[t.rate_hz for t in status.topics],
            error=status.error,
        )
        message.header.stamp = self.get_clock().now().to_msg()
        self._status.publish(message)

    def _diagnose(self) -> None:
        status = self.status()
        lost = sum(topic.lost for topic in status.topics)
        level = DiagnosticStatus.WARN if lost else DiagnosticStatus.OK
        values = {
            "recording": status.recording,
            "lost": lost,
            "bytes_written": status.bytes_written,
            "bytes_free": status.bytes_free,
        }
        self._diagnostics.publish(
            DiagnosticStatus.ERROR if status.error else level, status.error, status.bag, values
        )

    def close(self) -> None:
        """Close the bag with everything sent so far."""
        self._service_thread.close()
        if (recording := self._recording) is not None:
            recording.request_stop()
            spin_until(self.executor, lambda: recording.done)  # for the last of what is awaited


class _ServiceThread:
    """`recorder/start` and `recorder/stop` in a node and thread of their own: closing a bag waits
    for the last messages, which must go on arriving meanwhile.
    """

    def __init__(
        self,
        start: Callable[[StartRecording.Request], None],
        stop: Callable[[], RecordingStatus],
    ) -> None:
        self._start, self._stop = start, stop
        self._node = rclpy.create_node("recorder_services", namespace=NAMESPACE)
        self._node.create_service(StartRecording, "recorder/start", self._on_start)
        self._node.create_service(StopRecording, "recorder/stop", self._on_stop)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name="services", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._executor.shutdown()
        self._thread.join()
        self._node.destroy_node()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            return

    def _on_start(
        self, request: StartRecording.Request, response: StartRecording.Response
    ) -> StartRecording.Response:
        try:
            self._start(request)
        except GenforceError as error:
            response.message = str(error)
            return response
        response.success = True
        return response

    def _on_stop(
        self, request: StopRecording.Request, response: StopRecording.Response
    ) -> StopRecording.Response:
        try:
            status = self._stop()
        except GenforceError as error:
            response.message = str(error)
            return response
        response.success = not status.error
        response.message = status.error
        response.bag = status.bag
        response.topics = [t.name for t in status.topics]
        response.received = [t.received for t in status.topics]
        response.lost = [t.lost for t in status.topics]
        return response


def main() -> int:
    """Run the node."""
    return run(Recorder)


if __name__ == "__main__":
    sys.exit(main())
