"""The force estimator: camera frames, taxels or marker images in, a wrench per frame out.

A lifecycle node: configuring loads and warms the bundle and fails where it does not fit,
activating starts to listen. Every frame is answered once and in order by an `inference` status,
and by a `wrench` where the frame allows one. A frame that waited longer than `stale_s` is answered
as stale without being looked at, and so are those behind it until none is waiting: a backlog
clears at once, and nothing else is left out.
"""

from __future__ import annotations

import functools
import gc
import os
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import WrenchStamped
from rclpy.experimental import EventsExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import Trigger

from genforce_collect.config import SensorConfig, load_sensor
from genforce_collect.errors import ConfigError, DataError, GenforceError
from genforce_collect.nodes.common import (
    NAMESPACE,
    Stream,
    declare,
    from_stamp,
    run,
    spin_until,
    stream_qos,
)
from genforce_infer.bundle import read_bundle
from genforce_infer.pipeline import Estimate, ForcePipeline, State, image_of, markers_of
from genforce_infer.postprocess import Options
from genforce_infer.runtime import Model
from genforce_msgs.msg import InferenceStatus, Markers, Taxels
from genforce_msgs.srv import LoadModel

RATE_HZ = 60.0  # of the fastest camera; sizes the queues
WATCH_PERIOD_S = 0.1
LOG_PERIOD_S = 1.0
RIVAL_SILENCE_S = 1.5
DIAGNOSTICS_PERIOD_S = 1.0

INPUTS = ("image", "raw", "markers")
PARAMETERS: dict[str, Any] = {
    "sensor": "array_1",  # sensor file by name or path; several by commas
    "bundle": "",  # model bundle; several by commas, one for each sensor or one for all
    # image: JPEG frames or taxels as the sensor sends them; raw: sensor_msgs/Image on
    # <sensor>/image; markers: segmented frames
    "input": "image",
    "provider": "auto",  # auto, tensorrt, cuda, cpu
    "threads": 1,
    "realtime_priority": 0,  # 1 to 99: before all ordinary processes; 0: one of them
    "autostart": True,  # configure and activate without a lifecycle manager
    "auto_reference": True,  # the first good frames are the reference
    "stale_s": 0.25,  # older frames are not used; 0: any age, for bags
    "gate": True,
    "contact_threshold_n": -1.0,  # negative: the bundle's
    "material_correction": False,
    "drift_time_s": 0.0,
    "filter_hz": 0.0,
}


class ForceEstimator(LifecycleNode):
    """Parameters: `PARAMETERS`. One `Channel` a sensor."""

    def __init__(self) -> None:
        super().__init__("force_estimator", namespace=NAMESPACE)
        for name, default in PARAMETERS.items():
            declare(self, name, default)
        self._channels: list[Channel] = []
        self._streams: dict[str, Stream] = {}
        self._own_endpoints: dict[str, set[bytes]] = {}
        self._inputs: list[Any] = []
        self._failure: Exception | None = None
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(WATCH_PERIOD_S, self._watch)
        self.create_timer(DIAGNOSTICS_PERIOD_S, self._diagnose)
        self._service_thread = _ServiceThread()
        if self._value("autostart"):
            self._start()

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _start(self) -> None:
        for transition in (self.trigger_configure, self.trigger_activate):
            if transition() != TransitionCallbackReturn.SUCCESS:
                self.close()
                raise self._failure or GenforceError("the estimator did not start")

    def close(self) -> None:
        """Stop serving requests and answering frames; report the last samples."""
        self._service_thread.close()
        for channel in self._channels:
            channel.stop()
        for stream in self._streams.values():
            stream.flush()

    # --- lifecycle ------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read sensors and bundles, warm the models."""
        try:
            if self._value("input") not in INPUTS:
                raise ConfigError(
                    f"parameter input: must be {', '.join(INPUTS)}, not '{self._value('input')}'"
                )
            self._channels = [self._make_channel(s, m) for s, m in self._sensors_and_models()]
            self._take_priority(self._value("realtime_priority"))
        except Exception as error:  # rclpy would swallow it
            self._failure = error
            known = isinstance(error, GenforceError)
            self.get_logger().error(str(error) if known else traceback.format_exc())
            return TransitionCallbackReturn.FAILURE
        self._service_thread.serve(self._channels, self._load_model, self._set_reference)
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Listen to the sensors."""
        for channel in self._channels:
            message_type, topic, process = self._input_of(channel)
            channel.start(functools.partial(self._work, channel, process))
            self._inputs.append(
                self.create_subscription(message_type, topic, channel.receive, stream_qos(RATE_HZ))
            )
        # A collection that looks through all modules again would cost two frames.
        gc.freeze()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening."""
        self._stop_listening()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let the models go."""
        self._let_go()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening and let the models go."""
        self._stop_listening()
        self._let_go()
        return super().on_shutdown(state)

    def _stop_listening(self) -> None:
        while self._inputs:
            self.destroy_subscription(self._inputs.pop())
        for channel in self._channels:
            channel.stop()

    def _let_go(self) -> None:
        self._service_thread.serve([], self._load_model, self._set_reference)
        self._channels = []

    def _sensors_and_models(self) -> list[tuple[SensorConfig, Model]]:
        sensors = [load_sensor(name) for name in _listed(self._value("sensor"))]
        folders = _listed(self._value("bundle"))
        if not sensors or len(folders) not in (1, len(sensors)):
            raise ConfigError(
                f"parameter bundle names {len(folders)} bundles for {len(sensors)} sensors: "
                f"give one for each or one for all"
            )
        models = {folder: self._open(folder) for folder in dict.fromkeys(folders)}
        return [
            (sensor, models[folders[min(i, len(folders) - 1)]]) for i, sensor in enumerate(sensors)
        ]

    def _take_priority(self, priority: int) -> None:
        """Put all threads, those of DDS too, before ordinary processes; but not the services."""
        if priority == 0:
            return
        if not 1 <= priority <= 99:
            raise ConfigError(f"parameter realtime_priority: must be 0 to 99, not {priority}")
        try:
            for task in os.listdir("/proc/self/task"):
                if int(task) != self._service_thread.native_id:
                    os.sched_setscheduler(int(task), os.SCHED_FIFO, os.sched_param(priority))
        except PermissionError as error:
            raise ConfigError(
                "parameter realtime_priority: not permitted to this user; set rtprio in "
                "/etc/security/limits.conf, or 0 here"
            ) from error

    def _open(self, folder: str) -> Model:
        model = Model(read_bundle(folder), self._value("provider"), self._value("threads"))
        chosen = [*model.choice.fallbacks, f"running on {model.choice.provider}"]
        self.get_logger().info(
            f"model {model.manifest.model_id} ({model.manifest.precision}) ready in "
            f"{model.load_time_s:.2f} s; {'; '.join(chosen)}"
        )
        return model

    def _make_channel(self, sensor: SensorConfig, model: Model) -> Channel:
        threshold = self._value("contact_threshold_n")
        options = Options(
            gate=self._value("gate"),
            contact_threshold_n=threshold if threshold >= 0 else None,
            material=self._value("material_correction"),
            drift_time_s=self._value("drift_time_s"),
            filter_hz=self._value("filter_hz"),
        )
        pipeline = ForcePipeline(
            model, sensor, options, self._value("stale_s"), self._value("auto_reference")
        )
        return Channel(
            pipeline,
            self._stream(WrenchStamped, f"{sensor.name}/wrench"),
            self._stream(InferenceStatus, f"{sensor.name}/inference"),
        )

    def _stream(self, message_type: type, topic: str) -> Stream:
        if topic not in self._streams:
            before = self._endpoints(topic)
            stream = self._streams[topic] = Stream(self, message_type, topic, RATE_HZ)
            self._own_endpoints[stream.topic] = self._endpoints(topic) - before
        return self._streams[topic]

    def _endpoints(self, topic: str) -> set[bytes]:
        return {bytes(info.endpoint_gid) for info in self.get_publishers_info_by_topic(topic)}

    # --- frames ---------------------------------------------------------------------------------

    def _input_of(self, channel: Channel) -> tuple[type, str, Callable[..., Estimate]]:
        pipeline = channel.pipeline
        name = pipeline.sensor.name
        if self._value("input") == "markers":
            return Markers, f"{name}/markers", lambda m, t: pipeline.process(markers_of(m), t)
        if self._value("input") == "raw":
            return Image, f"{name}/image", lambda m, t: pipeline.process_image(image_of(m), t)
        if pipeline.sensor.kind == "taxels":
            return (
                Taxels,
                f"{name}/taxels",
                lambda m, t: pipeline.process_taxels(np.asarray(m.counts), t),
            )
        return (
            CompressedImage,
            f"{name}/image/compressed",
            lambda m, t: pipeline.process_jpeg(bytes(m.data), t),
        )

    def _work(self, channel: Channel, process: Callable[..., Estimate]) -> None:
        """Body of a channel's thread: answer frames in the order they came until it is stopped."""
        while (message := channel.inbox.get()) is not None and not channel.stopping:
            with channel.lock:
                stamp_ns, started_ns = from_stamp(message.header.stamp), self._now_ns()
                channel.last_input_ns = started_ns
                channel.taken += 1
                estimate = self._answer(channel, process, message, stamp_ns, started_ns)
                self._publish(channel, message.header, estimate, stamp_ns, started_ns)

    def _answer(
        self,
        channel: Channel,
        process: Callable[..., Estimate],
        message: Any,
        stamp_ns: int,
        started_ns: int,
    ) -> Estimate:
        if channel.rival:
            return channel.pipeline.refuse(State.ERROR, channel.rival)
        more_waiting = not channel.inbox.empty()
        if problem := channel.pipeline.age_problem(stamp_ns, started_ns, more_waiting):
            return problem
        try:
            return process(message, stamp_ns)
        except GenforceError as error:
            return channel.pipeline.refuse(State.ERROR, str(error))
        except Exception as error:  # one bad frame must not silence the topic
            self.get_logger().error(traceback.format_exc())
            return channel.pipeline.refuse(State.ERROR, f"internal error: {error}")

    def _publish(
        self, channel: Channel, header: Any, estimate: Estimate, stamp_ns: int, started_ns: int
    ) -> None:
        if estimate.wrench is not None:
            wrench = WrenchStamped(header=header)
            force, torque = wrench.wrench.force, wrench.wrench.torque
            force.x, force.y, force.z, torque.x, torque.y, torque.z = estimate.wrench.tolist()
            channel.wrench.publish(wrench, receive_ns=started_ns)
            channel.frames_out += 1
        latency_s = (self._now_ns() - stamp_ns) * 1e-9
        channel.own_latencies.append(latency_s)
        model = channel.pipeline.model
        channel.status.publish(
            InferenceStatus(
                header=header,
                seq=channel.taken,
                state=int(estimate.state),
                message=estimate.message,
                model_id=model.manifest.model_id,
                provider=model.choice.provider,
                latency=latency_s,
                queue_age=(started_ns - stamp_ns) * 1e-9,
                decode_time=estimate.decode_time_s,
                segment_time=estimate.segment_time_s,
                translate_time=estimate.translate_time_s,
                inference_time=estimate.inference_time_s,
                frames_in=channel.frames_in,
                frames_out=channel.frames_out,
                dropped=channel.taken - channel.frames_out,
                in_contact=estimate.in_contact,
                marker_quality=estimate.marker_quality,
                out_of_distribution=estimate.out_of_distribution,
                standard_deviation=estimate.standard_deviation,
            ),
            receive_ns=started_ns,
        )
        if estimate.state != channel.last.state:
            self._log_change(channel, estimate)
        channel.last = estimate
        channel.latencies_s.append(latency_s)

    def _log_change(self, channel: Channel, estimate: Estimate) -> None:
        text = f"{channel.pipeline.sensor.name}: {estimate.state.name} {estimate.message}".strip()
        if estimate.state == State.OK:
            self.get_logger().info(text, throttle_duration_sec=LOG_PERIOD_S)
        else:
            self.get_logger().warning(text, throttle_duration_sec=LOG_PERIOD_S)

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    # --- services, called in their own thread ---------------------------------------------------

    def _load_model(self, channel: Channel, folder: str) -> str:
        model = self._open(folder)
        engine = channel.pipeline.prepare(model)
        with channel.lock:
            channel.pipeline.swap(model, engine)
        return model.manifest.model_id

    def _set_reference(self, channel: Channel) -> str:
        with channel.lock:
            if channel.taken == 0 or self._is_silent(channel):
                raise DataError(f"no frames of {channel.pipeline.sensor.name} are arriving")
            return channel.pipeline.set_reference()

    # --- health ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Tell once when the frames stop."""
        for channel in self._channels if self._inputs else []:
            silent = self._is_silent(channel)
            if silent and not channel.silent:
                channel.last = Estimate(State.STALE, "no frames are arriving")
                self._log_change(channel, channel.last)
            channel.silent = silent

    def _is_silent(self, channel: Channel) -> bool:
        quiet_s = (self._now_ns() - channel.last_input_ns) * 1e-9
        return channel.taken > 0 and 0 < channel.pipeline.stale_s < quiet_s

    def _diagnose(self) -> None:
        report = DiagnosticArray()
        report.header.stamp = self.get_clock().now().to_msg()
        for channel in self._channels if self._inputs else []:
            self._look_for_rival(channel)
            report.status.append(channel.diagnostics())
        if not report.status:
            report.status.append(
                DiagnosticStatus(
                    level=DiagnosticStatus.WARN, name="force_estimator", message="not active"
                )
            )
        self._diagnostics.publish(report)

    # --- a second estimator on the same topic -----------------------------------------------------

    def _look_for_rival(self, channel: Channel) -> None:
        """Listen to the statuses of others where there are any; forget a rival that fell silent.

        An endpoint alone is not enough: that of a killed process stays known for a while.
        """
        topic = channel.status.topic
        others = self._endpoints(topic) - self._own_endpoints[topic]
        if others and channel.listener is None:
            heard = functools.partial(self._on_status, channel)
            channel.listener = self.create_subscription(
                InferenceStatus, topic, heard, stream_qos(RATE_HZ)
            )
        elif channel.listener is not None and not others:
            self.destroy_subscription(channel.listener)
            channel.listener = None
        if time.monotonic() - channel.rival_heard > RIVAL_SILENCE_S:
            channel.rival = ""

    def _on_status(self, channel: Channel, status: Any) -> None:
        """Of two estimators the one whose publisher sorts first goes on."""
        if status.latency in channel.own_latencies:
            return
        topic = channel.status.topic
        own = self._own_endpoints[topic]
        others = self._endpoints(topic) - own
        if own and others and min(others) < min(own):
            channel.rival = f"another estimator publishes {channel.wrench.topic}; stop one of them"
            channel.rival_heard = time.monotonic()


@dataclass
class Channel:
    """One sensor's way through the node, in a thread of its own: the executor only queues, so that
    no frame waits in DDS, where it could be lost. `lock` keeps frames and services apart."""

    pipeline: ForcePipeline
    wrench: Stream
    status: Stream
    lock: threading.Lock = field(default_factory=threading.Lock)
    inbox: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    worker: threading.Thread | None = None
    stopping: bool = False
    frames_in: int = 0
    taken: int = 0
    frames_out: int = 0
    last_input_ns: int = 0
    silent: bool = False
    rival: str = ""  # what to say of it; empty while there is none
    rival_heard: float = 0.0  # time.monotonic()
    listener: Any = None
    own_latencies: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    last: Estimate = field(default_factory=lambda: Estimate(State.NO_REFERENCE, "no frame yet"))
    latencies_s: list[float] = field(default_factory=list)  # since the last diagnostics

    def start(self, work: Callable[[], None]) -> None:
        """Count from zero and begin to answer."""
        with self.lock:
            self.pipeline.restart()
        self.inbox = queue.SimpleQueue()
        self.frames_in = self.taken = self.frames_out = 0
        self.stopping = self.silent = False
        self.worker = threading.Thread(target=work, name=self.pipeline.sensor.name, daemon=True)
        self.worker.start()

    def receive(self, message: Any) -> None:
        """Queue a frame."""
        self.frames_in += 1
        self.inbox.put(message)

    def stop(self) -> None:
        """End after the frame in work."""
        if self.worker is not None:
            self.stopping = True
            self.inbox.put(None)
            self.worker.join()
            self.worker = None

    def diagnostics(self) -> DiagnosticStatus:
        """State and figures of the last second."""
        model, post = self.pipeline.model, self.pipeline.post
        latencies_s, self.latencies_s = self.latencies_s, []
        latencies_ms = np.array(latencies_s or [0.0]) * 1e3
        level = {State.OK: DiagnosticStatus.OK, State.LOW_QUALITY: DiagnosticStatus.WARN}.get(
            self.last.state, DiagnosticStatus.ERROR
        )
        if self.last.state == State.NO_REFERENCE:
            level = DiagnosticStatus.WARN
        figures = {
            "rate (Hz)": len(latencies_s) / DIAGNOSTICS_PERIOD_S,
            "latency p50 (ms)": round(float(np.percentile(latencies_ms, 50)), 2),
            "latency max (ms)": round(float(latencies_ms.max()), 2),
            "frames in": self.frames_in,
            "frames out": self.frames_out,
            "dropped": self.taken - self.frames_out,
            "waiting": self.inbox.qsize(),
            "model": model.manifest.model_id,
            "precision": model.manifest.precision,
            "provider": model.choice.provider,
            "fallbacks": "; ".join(model.choice.fallbacks),
            "reference markers": self.pipeline.reference_count,
            "filter delay (s)": round(post.options.filter_delay_s, 4),
            "drift compensation (N)": np.array2string(post.drift, precision=3)
            if post.options.drift_time_s > 0
            else "off",
            "material correction": "on" if post.options.material else "off",
        }
        return DiagnosticStatus(
            level=level,
            name=f"force_estimator: {self.pipeline.sensor.name}",
            message=f"{self.last.state.name} {self.last.message}".strip(),
            hardware_id=self.pipeline.sensor.name,
            values=[KeyValue(key=key, value=str(value)) for key, value in figures.items()],
        )


class _ServiceThread:
    """The services in a node and thread of their own: frames go on while a model loads."""

    def __init__(self) -> None:
        self._node = rclpy.create_node(
            "force_estimator_services", namespace=NAMESPACE, use_global_arguments=False
        )
        self._made: list[Any] = []
        self._stop = threading.Event()
        self._executor = EventsExecutor()
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name="services", daemon=True)
        self._thread.start()

    @property
    def native_id(self) -> int | None:
        """The thread, as the system knows it."""
        return self._thread.native_id

    def serve(
        self,
        channels: list[Channel],
        load_model: Callable[[Channel, str], str],
        set_reference: Callable[[Channel], str],
    ) -> None:
        """Offer `<sensor>/load_model` and `<sensor>/set_force_reference` for these channels."""
        while self._made:
            self._node.destroy_service(self._made.pop())
        for channel in channels:
            name = channel.pipeline.sensor.name
            load = functools.partial(self._on_load_model, channel, load_model)
            reference = functools.partial(self._on_set_reference, channel, set_reference)
            self._made += [
                self._node.create_service(LoadModel, f"{name}/load_model", load),
                self._node.create_service(Trigger, f"{name}/set_force_reference", reference),
            ]

    def close(self) -> None:
        """Finish the request in progress and end the thread."""
        self._stop.set()
        self._thread.join()
        self._executor.shutdown()
        self._node.destroy_node()

    def _spin(self) -> None:
        spin_until(self._executor, self._stop.is_set)

    def _on_load_model(
        self,
        channel: Channel,
        load_model: Callable[[Channel, str], str],
        request: LoadModel.Request,
        response: LoadModel.Response,
    ) -> LoadModel.Response:
        with self._answering(response):
            response.model_id = load_model(channel, request.bundle)
        return response

    def _on_set_reference(
        self,
        channel: Channel,
        set_reference: Callable[[Channel], str],
        request: Trigger.Request,
        response: Trigger.Response,
    ) -> Trigger.Response:
        with self._answering(response):
            response.message = set_reference(channel)
        return response

    @contextmanager
    def _answering(self, response: Any) -> Iterator[None]:
        """Answer with what went wrong; it must not end the thread."""
        try:
            yield
            response.success = True
        except GenforceError as error:
            response.message = str(error)
        except Exception as error:
            self._node.get_logger().error(traceback.format_exc())
            response.message = f"internal error: {error!r}"


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def main() -> int:
    """Run the node."""
    return run(ForceEstimator)


if __name__ == "__main__":
    sys.exit(main())
