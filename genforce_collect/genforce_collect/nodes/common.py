"""What every node shares: quality of service, numbered streams, start, spin and clean exit."""

from __future__ import annotations

import array
import math
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import ParameterDescriptor
from rcl_interfaces.srv import ListParameters
from rclpy.event_handler import PublisherEventCallbacks
from rclpy.exceptions import InvalidParameterTypeException
from rclpy.experimental import EventsExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rclpy.signals import SignalHandlerOptions
from rclpy.time import Time

from genforce_collect.cdr import set_stamp
from genforce_collect.clock import NS
from genforce_collect.errors import ConfigError, DeviceError, GenforceError
from genforce_collect.processes import call_at_end
from genforce_msgs.msg import StreamTimes

NAMESPACE = "genforce"
STREAM_TIMES_PERIOD_S = 0.1
SPIN_TIMEOUT_S = 0.02
STARTUP_RETRY_S = 0.2
DIAGNOSTICS_PERIOD_S = 1.0
REMIND_PERIOD_S = 5.0
ANSWER_S = 1.0

_stopping = threading.Event()  # SIGINT or SIGTERM arrived


def stream_qos(rate_hz: float) -> QoSProfile:
    """Reliable, with a history that outlasts a 2 s stall of the slowest reader."""
    return QoSProfile(
        reliability=ReliabilityPolicy.RELIABLE,
        history=HistoryPolicy.KEEP_LAST,
        depth=max(64, math.ceil(2.5 * rate_hz)),
    )


# For state that a late joiner must see: contact, robot/state, recorder status. Deep enough for a
# burst of changes to reach a reader that is busy for a moment.
LATCHED_QOS = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
    history=HistoryPolicy.KEEP_LAST,
    depth=64,
)


class Stream:
    """A publisher that numbers its samples and reports their times on `stream_times`.

    `publish` may be called from a device thread; rclpy publishers are thread-safe.
    """

    def __init__(self, node: Node, message_type: type, topic: str, rate_hz: float) -> None:
        self.count = 0
        self.device_lost = 0
        self.offset = math.nan
        self.drift = 0.0
        self._node = node
        self._publisher = node.create_publisher(message_type, topic, stream_qos(rate_hz))
        self._times = node.create_publisher(
            StreamTimes, f"/{NAMESPACE}/stream_times", stream_qos(100)
        )
        self._lock = threading.Lock()
        self._pending: list[tuple[int, int, float]] = []
        node.create_timer(STREAM_TIMES_PERIOD_S, self.flush)

    @property
    def topic(self) -> str:
        """Absolute topic name."""
        return str(self._publisher.topic_name)

    def publish(
        self, message: Any, receive_ns: int | None = None, device_time: float = math.nan
    ) -> None:
        """Publish a stamped message; `receive_ns` defaults to its stamp."""
        self._send(message, from_stamp(message.header.stamp), receive_ns, device_time)

    def _send(
        self, message: Any, stamp_ns: int, receive_ns: int | None, device_time: float
    ) -> None:
        with self._lock:  # keeps the numbering in publishing order
            self._publisher.publish(message)
            self.count += 1
            self._pending.append(
                (stamp_ns, stamp_ns if receive_ns is None else receive_ns, device_time)
            )

    def flush(self) -> None:
        """Report the samples since the last call; also called by a timer and at shutdown."""
        with self._lock:
            pending, self._pending = self._pending, []
            count = self.count
        if not pending:
            return
        stamps, receives, devices = zip(*pending, strict=True)
        report = StreamTimes(
            topic=self.topic,
            first_seq=count - len(pending),
            stamp_ns=array.array("q", stamps),
            receive_ns=array.array("q", receives),
            device_time=array.array("d", devices),
            offset=self.offset,
            drift=self.drift,
            device_lost=self.device_lost,
        )
        report.header.stamp = self._node.get_clock().now().to_msg()
        self._times.publish(report)


class NumberStream(Stream):
    """A stream of messages that end with their numbers: WrenchStamped, PoseStamped.

    The numbers go straight into serialised bytes: making a message object of them and that into
    bytes would cost twice as much, a thousand times a second.
    """

    def __init__(self, node: Node, template: Any, topic: str, rate_hz: float) -> None:
        """`template` has all but stamp and numbers."""
        super().__init__(node, type(template), topic, rate_hz)
        self._data = bytearray(serialize_message(template))

    def publish_numbers(
        self, stamp_ns: int, numbers: Sequence[float], receive_ns: int, device_time: float
    ) -> None:
        """Publish what the message holds, in its order, stamped (host system time, ns)."""
        data, size = self._data, 8 * len(numbers)
        set_stamp(data, stamp_ns)
        struct.pack_into(f"<{len(numbers)}d", data, len(data) - size, *numbers)
        self._send(bytes(data), stamp_ns, receive_ns, device_time)


class Diagnostics:
    """A node's entry on `/diagnostics`: `tell` publishes it, called once a second and, so that
    nobody has to wait for a sign of life, for whoever begins to listen."""

    def __init__(self, node: Node, tell: Callable[[], None]) -> None:
        self._node = node
        greeting = PublisherEventCallbacks(matched=lambda _: tell())
        self._publisher = node.create_publisher(
            DiagnosticArray, "/diagnostics", 10, event_callbacks=greeting
        )
        node.create_timer(DIAGNOSTICS_PERIOD_S, tell)

    def publish(
        self, level: bytes, message: str, hardware_id: str, values: Mapping[str, object]
    ) -> None:
        """Publish one status under the node's name; an empty message is "ok"."""
        report = DiagnosticArray()
        report.header.stamp = self._node.get_clock().now().to_msg()
        report.status = [
            DiagnosticStatus(
                level=level,
                name=self._node.get_name(),
                message=message or "ok",
                hardware_id=hardware_id,
                values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
            )
        ]
        self._publisher.publish(report)


class DriverNode(LifecycleNode):
    """A lifecycle node around a device. Active, it is connected and delivers; deactivating it sets
    the device free for another program.

    Parameters: `autostart` (default true: it activates itself, without a lifecycle manager) and
    `startup_wait_s` (default 0), for how long activating tries again where the device does not
    answer: a virtual cell started beside the node needs a moment.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, namespace=NAMESPACE)
        self._autostart = declare(self, "autostart", True)
        self._patience_s = declare(self, "startup_wait_s", 0.0)
        self._active = False
        self._failure: Exception | None = None
        self._diagnostics = Diagnostics(self, self._show_life)

    def connect(self) -> None:
        """Connect the device and start its streams. Raises `DeviceError`."""
        raise NotImplementedError

    def disconnect(self) -> None:
        """Let go of the device."""
        raise NotImplementedError

    def diagnose(self) -> None:
        """Publish the state of the device; called as `Diagnostics` say while the node is active."""
        raise NotImplementedError

    def start(self) -> None:
        """What a constructor ends with: activate, where `autostart` is on. Raises what failed."""
        if self._autostart:
            self.trigger_configure()
            if self.trigger_activate() != TransitionCallbackReturn.SUCCESS:
                raise self._failure or DeviceError("not activated")

    def close(self) -> None:
        """Let go of the device where it is held."""
        if self._active:
            self._active = False
            self.disconnect()

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Connect; stays inactive where that fails."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                self.connect()
                break
            except DeviceError as error:
                self._failure = error
                if time.monotonic() > deadline or _stopping.wait(STARTUP_RETRY_S):
                    return TransitionCallbackReturn.FAILURE
            except Exception as error:  # rclpy would swallow it
                self._failure = error
                return TransitionCallbackReturn.FAILURE
        self._active = True
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Disconnect."""
        self.close()
        return super().on_deactivate(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Disconnect."""
        self.close()
        return super().on_shutdown(state)

    def _show_life(self) -> None:
        if self._active:
            self.diagnose()
        else:
            text = f"not active: {self._failure}" if self._failure else "not active"
            self._diagnostics.publish(DiagnosticStatus.WARN, text, "", {})


def declare(node: Node, name: str, default: Any) -> Any:
    """Declare a parameter; returns its value. Where the default is a float, a whole number is taken
    as well, which rclpy refuses. Raises `ConfigError` on another type."""
    try:
        if not isinstance(default, float):
            return node.declare_parameter(name, default).value
        untyped = ParameterDescriptor(dynamic_typing=True)
        given = node.declare_parameter(name, default, untyped).value
        node.undeclare_parameter(name)
        whole = type(given) is int
        value = float(given) if whole else default
        return node.declare_parameter(name, value, ignore_override=whole).value
    except InvalidParameterTypeException as error:
        raise ConfigError(f"parameter {name}: {error}") from error


def parameter_words(parameters: Mapping[str, object]) -> list[str]:
    """`-p name:=value` of each, for a node's command line after `--ros-args`."""
    texts = (
        f"{name}:={yaml.safe_dump(value, default_flow_style=True, width=math.inf).splitlines()[0]}"
        for name, value in parameters.items()
    )
    return [word for text in texts for word in ("-p", text)]


def await_nodes(executor: Any) -> None:
    """Wait until each node named in parameter `after` has given a sign of life on `/diagnostics`,
    or the process is to end."""
    node = rclpy.create_node(f"waiting_{os.getpid()}", namespace=NAMESPACE)
    missing = set(filter(None, node.declare_parameter("after", [""]).value))

    def note(report: DiagnosticArray) -> None:
        missing.difference_update(status.name for status in report.status)

    if missing:
        node.create_subscription(DiagnosticArray, "/diagnostics", note, 10)
        executor.add_node(node)
        while not spin_until(executor, lambda: not missing or _stopping.is_set(), REMIND_PERIOD_S):
            node.get_logger().info(f"waiting for {', '.join(sorted(missing))}")
        executor.remove_node(node)
    node.destroy_node()


def to_stamp(time_ns: int) -> Any:
    """Host system time in ns as a builtin_interfaces/Time."""
    return Time(nanoseconds=time_ns).to_msg()


def values_of(status: DiagnosticStatus) -> dict[str, str]:
    """What a status carries, by name."""
    return {entry.key: entry.value for entry in status.values}


def from_stamp(stamp: Any) -> int:
    """builtin_interfaces/Time as host system time in ns."""
    return int(stamp.sec) * NS + int(stamp.nanosec)


def run(make_node: Callable[[], Node]) -> int:
    """Body of every node's `main`: build it, spin until SIGINT/SIGTERM (SIGTERM only, where
    `ENDS_LAST` is in the environment), close it, exit code.

    With parameter `after`, a list of names, it is built once those nodes are up. It may define
    `close()`, called once before it is destroyed. A `GenforceError` on the way ends with its
    one-line text on stderr and its exit code.
    """
    rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
    call_at_end(_stopping.set)
    node: Node | None = None
    executor = EventsExecutor()
    try:
        await_nodes(executor)
        if _stopping.is_set():
            return 0
        node = make_node()
        executor.add_node(node)
        node.get_logger().info("ready")
        spin_until(executor, _stopping.is_set)
        return 0
    except GenforceError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        if node is not None:
            if close := getattr(node, "close", None):
                close()
            node.destroy_node()
        executor.shutdown()
        rclpy.try_shutdown()


def spin_until(executor: Any, done: Callable[[], bool], timeout_s: float | None = None) -> bool:
    """Spin until `done()` or the timeout; returns whether it was done.

    `EventsExecutor.spin()` ignores SIGTERM, hence the short `spin_once` calls.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while not done():
        if deadline is not None and time.monotonic() > deadline:
            return False
        executor.spin_once(timeout_sec=SPIN_TIMEOUT_S)
    return True


def await_answer(executor: Any, node: Node, server: str, timeout_s: float = ANSWER_S) -> bool:
    """Ask node `server` something harmless until it answers; returns whether it did.

    That a server is seen does not mean that it sees its client: what it answers before then, a goal
    as well, is dropped and the client waits for ever. It learns of a node's clients in the order in
    which they were made, so one that answers this one knows all that `node` made before.
    """
    client = node.create_client(ListParameters, f"{server}/list_parameters")
    deadline = time.monotonic() + timeout_s
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            if not spin_until(executor, client.service_is_ready, left_s):
                break
            answer = client.call_async(ListParameters.Request())
            if spin_until(executor, answer.done, ANSWER_S):
                return True
            client.remove_pending_request(answer)
        return False
    finally:
        node.destroy_client(client)
