"""Capture to published wrench at 60 fps: the force estimator in a process of its own, beside a
process that publishes frames of a simulated contact and reads the answers. The bundles are those of
models/; only the generator, of which none is shipped, has random weights, which cost the same."""

from __future__ import annotations

import array
import io
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import cv2
import numpy as np
import onnxruntime as ort
import rclpy
from geometry_msgs.msg import WrenchStamped
from rclpy.experimental import EventsExecutor
from rows import Row
from sensor_msgs.msg import CompressedImage

from genforce_collect.config import load_sensor
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.packing import pack_mask
from genforce_collect.nodes.common import NAMESPACE, from_stamp, spin_until, stream_qos, to_stamp
from genforce_infer.bundle import (
    TARGET_REFERENCE,
    Axis,
    InputSpec,
    Manifest,
    Normalisation,
    StateSpec,
    read_bundle,
    write_bundle,
)
from genforce_infer.pipeline import REFERENCE_FRAMES, ForcePipeline
from genforce_infer.preprocess import area_average
from genforce_infer.runtime import Model
from genforce_msgs.msg import InferenceStatus
from genforce_msgs.srv import LoadModel
from genforce_sim.sensor import SimulatedSensor

MODELS = Path(__file__).resolve().parent.parent / "models"
SENSOR = "array_1"
RATE_HZ = 60.0
GENERATOR_RATE_HZ = 30.0
SECONDS = 8.0
OPSET = 17
IMAGE = (1, 2, 120, 160)
STATE = (1, 1, 64)
STEP_OUTPUTS = ("force", "h_next", "features")
AXES: tuple[Axis, ...] = ("fx", "fy", "fz", "tx", "ty", "tz")


def bench() -> list[Row]:
    """Latency percentiles with their parts, frames answered, start-up time."""
    from genforce_train.models.m2m import CompactTranslator

    jpegs = contact_frames()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = {
            "direct": MODELS / "array_1" / "bundle",
            "field": MODELS / "array_1" / "field",
            "translate": MODELS / "translate" / "array_1",
            "generate": translate_bundle(folder / "generate", CompactTranslator()),
        }
        rows = [row for mode, b in bundles.items() for row in stage_times(mode, b, jpegs)]
        for mode, rate_hz, goals in (  # of the median and the 99th percentile
            ("direct", RATE_HZ, ("<= 8", "<= 16.7")),
            ("field", RATE_HZ, ("<= 8", "<= 16.7")),
            ("translate", RATE_HZ, ("", "<= 25")),
            ("generate", GENERATOR_RATE_HZ, ("", "")),
        ):
            rows += measure(mode, bundles[mode], jpegs, rate_hz, goals)
        rows += hot_swap(bundles["direct"], compact_bundle(folder / "other"), jpegs)
        return rows + force_steps(jpegs, folder)


def contact_frames(count: int = 90) -> list[bytes]:
    """Frames without contact, then a press with shear and its release, as JPEG."""
    sensor = SimulatedSensor(load_sensor(SENSOR), "sphere")
    noise = np.random.default_rng(0)
    depth = np.clip(np.sin(np.linspace(-0.6, np.pi, count)), 0, None)
    jpegs = []
    for part in depth:
        pose = np.array([0.6e-3 * part, 0, 0.2e-3 - 1.0e-3 * part, np.pi, 0, 0])
        image = sensor.render(sensor.step(pose, 1 / RATE_HZ), noise).image
        jpegs.append(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    return jpegs


def compact_bundle(folder: Path) -> Path:
    """The compact force model on marker images, untrained."""
    return write(folder, "direct", {"force.onnx": compact_graph(folder.with_suffix(".onnx"))})


def field_stages(folder: Path, field: Any, force: Any) -> dict[str, Path]:
    """The graphs of a field model and of a force model that reads its field."""
    import torch

    from genforce_train.export import ForceStep

    example = torch.zeros(1, 3, *force.size), force.zero_state()
    step = ForceStep(torch.nn.Identity(), force)
    return {
        "field.onnx": export(
            field, (torch.zeros(IMAGE),), ("image",), ("field",), folder / "field.onnx"
        ),
        "force.onnx": export(step, example, ("field", "h"), STEP_OUTPUTS, folder / "force.onnx"),
    }


def translate_bundle(folder: Path, net: Any) -> Path:
    """A translation to another sensor, by warping its reference or generating its image, and a
    force model of that one, untrained."""
    import torch

    from genforce_train.export_translate import TranslateStep

    own, target = (
        np.asarray(SimulatedSensor(load_sensor(name), "sphere").reference.mask)
        for name in (SENSOR, "circle_1")
    )
    images = [torch.from_numpy(area_average(mask, IMAGE[2:]))[None, None] for mask in (own, target)]
    net.bind(*images)
    spec = InputSpec(height=IMAGE[2], width=IMAGE[3])
    reference = io.BytesIO()
    np.save(reference, pack_mask(target))
    stages = {
        "translate.onnx": export(
            TranslateStep(net, spec),
            (torch.zeros(IMAGE), images[1]),
            ("image", "target_reference"),
            ("source_image",),
            folder / "translate.onnx",
        ),
        "force.onnx": compact_graph(folder / "force.onnx"),
    }
    return write(folder / "bundle", "translate", stages, {TARGET_REFERENCE: reference.getvalue()})


def write(
    folder: Path,
    mode: Literal["direct", "field", "translate"],
    stages: dict[str, Path],
    more: dict[str, bytes] | None = None,
) -> Path:
    """A bundle of these graphs."""
    manifest = Manifest(
        model_id=f"{mode}-untrained",
        mode=mode,
        sensor=SENSOR,
        input=InputSpec(height=IMAGE[2], width=IMAGE[3]),
        stages=tuple(stages),
        state=(StateSpec(name="h", shape=STATE),),
        outputs=AXES,
        normalisation=Normalisation(scale=(1.0,) * 6, offset=(0.0,) * 6),
        opset=OPSET,
    )
    return write_bundle(folder, manifest, {**stages, **(more or {})}).folder


def compact_graph(path: Path, batch: int = 1, net: Any = None) -> Path:
    """One step of the compact model, by default an untrained one, for `batch` streams at once."""
    import torch

    from genforce_train.export import ForceStep
    from genforce_train.models.force import ChangeMaps, CompactForceNet

    net = net or CompactForceNet()
    example = (torch.zeros(batch, *IMAGE[1:]), net.zero_state().repeat(1, batch, 1))
    return export(ForceStep(ChangeMaps(), net), example, ("image", "h"), STEP_OUTPUTS, path)


def export(module: Any, example: Any, inputs: Any, outputs: Any, path: Path) -> Path:
    """As bundles are exported."""
    from genforce_train.export import export_graph

    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_graph(module, example, inputs, outputs, path)
    return path


def stage_times(mode: str, bundle: Path, jpegs: list[bytes]) -> list[Row]:
    """Mean CPU time of each stage in this process, which other processes disturb less than they
    do the latency."""
    pipeline = ForcePipeline(Model(read_bundle(bundle)), load_sensor(SENSOR), stale_s=0)
    stages: dict[str, list[float]] = {}
    with mock.patch.object(time, "perf_counter", time.thread_time):  # what the pipeline reads
        for number in range(4 * len(jpegs)):
            jpeg = jpegs[number % len(jpegs)]
            estimate = pipeline.process_jpeg(jpeg, round(number * 1e9 / RATE_HZ))
            for part in ("decode", "segment", "translate", "inference"):
                seconds = getattr(estimate, f"{part}_time_s")
                stages.setdefault(part, []).append(seconds)
    return [
        Row(f"infer {mode}: CPU time to {part}", float(np.mean(times[len(jpegs) :])) * 1e3, "ms")
        for part, times in stages.items()
        if any(times)
    ]


def force_steps(jpegs: list[bytes], folder: Path) -> list[Row]:
    """One step of the compact model against the published one in PyTorch, on the same masks and
    one thread each: on a busy machine PyTorch's threads would wait for each other."""
    import torch

    from genforce_train.models.force import PaperForceNet

    front = Frontend(load_sensor(SENSOR))
    masks = [front.process_jpeg(jpeg).mask for jpeg in jpegs[:20]]
    stream = Model(read_bundle(compact_bundle(folder / "step"))).stream()
    stream.image[0, 1] = area_average(masks[0], (120, 160))

    def compact(mask: np.ndarray) -> None:
        stream.image[0, 0] = area_average(mask, (120, 160))
        stream.step()

    paper, state = PaperForceNet().eval(), None

    def published(mask: np.ndarray) -> None:
        nonlocal state
        image = torch.from_numpy(area_average(mask, PaperForceNet.size))
        with torch.inference_mode():
            _, state = paper(image[None, None, None], state)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, theirs = median_ms(compact, masks), median_ms(published, masks)
    torch.set_num_threads(threads)
    one, two = (
        ort.InferenceSession(
            str(compact_graph(folder / f"batch{batch}.onnx", batch)),
            single_thread(),
        )
        for batch in (1, 2)
    )
    single, double = (median_ms(lambda _, s=s: s.run(None, zeros(s)), masks) for s in (one, two))
    return [
        Row(
            "infer force step, compact, published model in PyTorch as baseline",
            ours,
            "ms",
            baseline=theirs,
            ratio=theirs / ours,
        ),
        Row("infer force steps a second over the published model's", theirs / ours, "", ">= 20"),
        Row(
            "infer force step for two sensors in one batch, one by one as baseline",
            double,
            "ms",
            baseline=2 * single,
            ratio=2 * single / double,
        ),
    ]


def single_thread() -> ort.SessionOptions:
    """As the runtime's."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def zeros(session: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Inputs of a graph."""
    return {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}


def median_ms(step: Callable[[Any], None], items: list[Any]) -> float:
    """Median time of `step` over the items, after one round to warm up."""
    times = []
    for _ in range(2):
        times = []
        for item in items:
            started = time.perf_counter()
            step(item)
            times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


class Rig:
    """The estimator in a process of its own, and a camera that feeds it and reads its answers."""

    def __init__(self, bundle: Path, jpegs: list[bytes], **parameters: object) -> None:
        self.jpegs = jpegs
        self.sent = 0
        self.statuses: list[Any] = []
        self.ages_ms: list[float] = []  # of wrenches when they arrive, against their frame
        self.first_wrench_s = 0.0
        rclpy.init()
        self.executor = EventsExecutor()
        self.node = rclpy.create_node("frames", namespace=NAMESPACE)
        self.executor.add_node(self.node)
        qos = stream_qos(RATE_HZ)
        self.camera = self.node.create_publisher(CompressedImage, f"{SENSOR}/image/compressed", qos)
        subscribe = self.node.create_subscription
        subscribe(InferenceStatus, f"{SENSOR}/inference", self.statuses.append, qos)
        subscribe(WrenchStamped, f"{SENSOR}/wrench", self._on_wrench, qos)
        self._started = time.monotonic()
        given = {"sensor": SENSOR, "bundle": bundle} | parameters
        options = [text for name, value in given.items() for text in ("-p", f"{name}:={value}")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "genforce_infer.nodes.force_estimator", "--ros-args", *options],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Rig:
        def connected() -> bool:
            return self.camera.get_subscription_count() > 0 and all(
                self.node.count_publishers(f"{SENSOR}/{topic}") for topic in ("wrench", "inference")
            )

        if not spin_until(self.executor, connected, 30):
            raise RuntimeError("the estimator did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.node.destroy_node()
        self.executor.shutdown()
        rclpy.try_shutdown()

    def _on_wrench(self, message: Any) -> None:
        self.ages_ms.append((time.time_ns() - from_stamp(message.header.stamp)) * 1e-6)
        if not self.first_wrench_s:
            self.first_wrench_s = time.monotonic() - self._started

    def feed(self, until: Callable[[], bool], rate_hz: float = RATE_HZ) -> None:
        """Publish frames until told to stop, then wait for the last answers."""
        next_frame = time.monotonic()
        while not until():
            message = CompressedImage(format="jpeg")
            message.data = array.array("B", self.jpegs[self.sent % len(self.jpegs)])
            message.header.stamp = to_stamp(time.time_ns())
            self.camera.publish(message)
            self.sent += 1
            next_frame += 1 / rate_hz
            while (left := next_frame - time.monotonic()) > 0:
                self.executor.spin_once(timeout_sec=left)

        def all_answered() -> bool:
            return bool(self.statuses) and self.statuses[-1].frames_in >= self.sent

        spin_until(self.executor, all_answered, 5)

    def load_model(self, bundle: Path) -> Any:
        """Ask for another model; the future of the answer."""
        client = self.node.create_client(LoadModel, f"{SENSOR}/load_model")
        spin_until(self.executor, client.service_is_ready, 5)
        return client.call_async(LoadModel.Request(bundle=str(bundle)))

    def cpu_s(self) -> float:
        """CPU time the estimator has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """Resident memory of the estimator."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(
    name: str, bundle: Path, jpegs: list[bytes], rate_hz: float, goals: tuple[str, str]
) -> list[Row]:
    """Feed frames, count and time every answer."""
    with Rig(bundle, jpegs) as rig:
        rig.feed(lambda: rig.sent >= rate_hz, rate_hz)
        cpu_s, sent = rig.cpu_s(), rig.sent
        rig.feed(lambda: rig.sent >= SECONDS * rate_hz, rate_hz)
        cpu_ms = (rig.cpu_s() - cpu_s) / (rig.sent - sent) * 1e3
    begun = [s for s in rig.statuses if s.seq <= rate_hz]  # among them the reference
    settled = [s for s in rig.statuses if s.seq > rate_hz]
    latency = ms(settled, lambda s: s.latency)
    head = f"infer {name}:"
    parts = {
        "queue": lambda s: s.queue_age,
        "decode": lambda s: s.decode_time,
        "segment": lambda s: s.segment_time,
        "translate": lambda s: s.translate_time,
        "force": lambda s: s.inference_time,
        "publish": lambda s: (
            s.latency
            - s.queue_age
            - s.decode_time
            - s.segment_time
            - s.translate_time
            - s.inference_time
        ),
    }
    last = rig.statuses[-1]
    return [
        Row(f"{head} capture to publish p50", *p(latency, 50), goal=goals[0]),
        Row(f"{head} capture to publish p99", *p(latency, 99), goal=goals[1]),
        Row(f"{head} of the first second max", *p(ms(begun, lambda s: s.latency), 100)),
        *(Row(f"{head} of which {part} p50", *p(ms(settled, f), 50)) for part, f in parts.items()),
        Row(f"{head} capture to reader p99", *p(np.array(rig.ages_ms[round(rate_hz) :]), 99)),
        Row(f"{head} CPU time a frame", cpu_ms, "ms"),
        Row(f"{head} frames unanswered of {rig.sent}", rig.sent - last.frames_in, "", "<= 0"),
        Row(
            f"{head} frames without wrench after the reference",
            last.dropped - REFERENCE_FRAMES,
            "",
            "<= 0",
        ),
        Row(f"{head} process start to first wrench", rig.first_wrench_s, "s", "<= 2"),
    ]


def hot_swap(old: Path, new: Path, jpegs: list[bytes]) -> list[Row]:
    """What a change of model costs the frames beside it."""
    with Rig(old, jpegs) as rig:
        rig.feed(lambda: rig.sent >= 2 * RATE_HZ)
        dropped = rig.statuses[-1].dropped  # while the reference was awaited
        answer = rig.load_model(new)
        rig.feed(lambda: answer.done() and rig.sent >= 4 * RATE_HZ)
        rig.feed(lambda: rig.sent >= 6 * RATE_HZ)
    if not answer.result().success:
        raise RuntimeError(answer.result().message)
    beside = [s for s in rig.statuses if 2 * RATE_HZ <= s.seq <= 4 * RATE_HZ]
    last = rig.statuses[-1]
    return [
        Row("infer hot swap: frames without wrench", last.dropped - dropped, "", "<= 0"),
        Row("infer hot swap: latency max", *p(ms(beside, lambda s: s.latency), 100)),
    ]


def ms(statuses: list[Any], value: Any) -> np.ndarray:
    """A figure of every status in ms."""
    return np.array([value(status) for status in statuses]) * 1e3


def p(values: np.ndarray, percent: float) -> tuple[float, str]:
    """A percentile of figures in ms, NaN of none, with its unit."""
    return float(np.percentile(values, percent)) if len(values) else float("nan"), "ms"
