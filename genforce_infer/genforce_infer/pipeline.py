"""One sensor: camera frame or marker image in, force and the state of its health out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np

from genforce_collect.config import SensorConfig
from genforce_collect.errors import DataError
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.packing import unpack_mask
from genforce_collect.markers.quality import Flag, explain
from genforce_collect.markers.reference import UNFIT, most_typical
from genforce_collect.markers.registration import AS_DRAWN, register
from genforce_collect.markers.segmentation import MarkerFrame
from genforce_collect.markers.taxels import render_taxels
from genforce_infer.bundle import InputSpec, Manifest
from genforce_infer.postprocess import (
    Options,
    OutOfDistribution,
    Postprocess,
    standard_deviation,
)
from genforce_infer.preprocess import image_statistics, network_mask
from genforce_infer.runtime import Model

WRENCH_AXES = ("fx", "fy", "fz", "tx", "ty", "tz")
REFERENCE_FRAMES = 9  # an odd number, for the majority
HISTORY_FRAMES = 32  # replayed through a new model so that it takes over with a settled state
FROZEN_S = 0.25  # identical frames for longer than this are a frozen camera
UNUSABLE = (
    Flag.DECODE_ERROR | Flag.WRONG_SIZE | Flag.NO_MARKERS | Flag.ROTATED | Flag.WRONG_REFERENCE
)


class State(IntEnum):
    """The STATE_* constants of genforce_msgs/InferenceStatus."""

    OK = 0
    NO_REFERENCE = 1
    LOW_QUALITY = 2
    STALE = 3
    ERROR = 4


def _unknown() -> np.ndarray:
    return np.full(6, np.nan)


@dataclass(frozen=True)
class Estimate:
    """The answer to one frame. `wrench` (6,) in N and N m, or None where none may be published."""

    state: State
    message: str = ""
    wrench: np.ndarray | None = None
    standard_deviation: np.ndarray = field(default_factory=_unknown)  # (6,), NaN: not estimated
    in_contact: bool = False
    marker_quality: float = 0.0
    out_of_distribution: float = 0.0
    decode_time_s: float = 0.0
    segment_time_s: float = 0.0
    translate_time_s: float = 0.0
    inference_time_s: float = 0.0  # from the marker image to the force, without the above


class Engine:
    """A model with one sensor's reference image and the force it gives on it (the tare)."""

    def __init__(self, model: Model, sensor: SensorConfig, reference: np.ndarray) -> None:
        manifest = model.manifest
        check_sensor(manifest, sensor)
        self.model = model
        self.manifest = manifest
        self._scale = np.asarray(manifest.normalisation.scale)
        self._offset = np.asarray(manifest.normalisation.offset)
        self._channels = manifest.input.channels
        self._distribution = (
            OutOfDistribution(manifest.out_of_distribution, model.bundle.statistics)
            if manifest.out_of_distribution and model.bundle.statistics
            else None
        )
        self._view = network_view(manifest.input, sensor, reference)
        self.reference = reference
        self.frame = 0  # number of the newest frame it has seen
        self.stream = model.stream()
        self._write("reference", reference)
        self.tare = self.settle()

    def settle(self) -> np.ndarray:
        """Bring the state to that of a gel at rest; returns the force there, not tared (A,)."""
        self.stream.reset()
        self._write("mask", self.reference)
        for number in range(HISTORY_FRAMES):
            at_rest = self.stream.step(same_image=number > 0)
        return at_rest["force"][0] * self._scale + self._offset

    def infer(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, float]:
        """One frame: mask (480, 640) -> tared force (A,), its own deviation (A,) or None, score."""
        self._write("mask", mask)
        answer = self.stream.step()
        force = answer["force"][0] * self._scale + self._offset - self.tare
        std = answer["force_std"][0] * np.abs(self._scale) if "force_std" in answer else None
        score = 0.0
        if self._distribution is not None:
            score = self._distribution.score(
                answer["features"][0]
                if self._distribution.source == "features"
                else image_statistics(self.stream.image[0])
            )
        return force, std, score

    @property
    def translate_time_s(self) -> float:
        """What the last frame's translation to the source sensor took; 0 in other modes."""
        return self.stream.stage_times_s[0] if self.manifest.mode == "translate" else 0.0

    def _write(self, channel: str, mask: np.ndarray) -> None:
        if channel in self._channels:
            self.stream.image[0, self._channels.index(channel)] = self._view(mask)


class TimedFrontend(Frontend):
    """The front end of the collection, and when it had decoded the last frame."""

    decoded_at = 0.0

    def process_image(self, image: np.ndarray) -> MarkerFrame:
        """As `Frontend.process_image`."""
        self.decoded_at = time.perf_counter()
        return super().process_image(image)


class ForcePipeline:
    """Answers every frame of one sensor, in order, and never with NaN or an old value.

    The frames are judged before they are used: too old, garbled, black, turned or frozen ones get
    a state and a message and no wrench. Without a reference the first good frames become it if
    `auto_reference`. Not thread-safe, but `prepare` may run beside the frames in another thread.
    """

    def __init__(
        self,
        model: Model,
        sensor: SensorConfig,
        options: Options | None = None,
        stale_s: float = 0.25,
        auto_reference: bool = True,
    ) -> None:
        check_sensor(model.manifest, sensor)
        self.sensor = sensor
        self.options = options or Options()
        self.stale_s = stale_s
        self.auto_reference = auto_reference
        self.frontend = TimedFrontend(sensor)
        self.reference: np.ndarray | None = None
        self.reference_count = 0
        self.post = Postprocess(model.manifest, self.options)
        self._model = model
        self._engine: Engine | None = None
        self._recent: deque[MarkerFrame] = deque(maxlen=REFERENCE_FRAMES)
        self._history: deque[tuple[int, np.ndarray]] = deque(maxlen=HISTORY_FRAMES)
        self._frames = 0
        self._clearing = False
        self._last_image: np.ndarray | None = None
        self._last_stamp_ns: int | None = None
        self._repeated_since_ns: int | None = None

    @property
    def model(self) -> Model:
        """The model that answers."""
        return self._model

    def restart(self) -> None:
        """Forget the frames before a pause, not the reference and the drift since it was taken."""
        self._recent.clear()
        self._history.clear()
        self._clearing = False
        self._last_image = self._last_stamp_ns = self._repeated_since_ns = None
        self.post.release()
        if self._engine is not None:
            self._engine.settle()

    def refuse(self, state: State, message: str) -> Estimate:
        """The answer to a frame that is not used. What came before it is old: no reference is taken
        of that."""
        self._recent.clear()
        return Estimate(state, message)

    def age_problem(self, stamp_ns: int, now_ns: int, more_waiting: bool) -> Estimate | None:
        """The answer to a frame that is too old (or from the future); None for one to be used.

        To be asked before a frame is decoded. After one that is too old all are left out as long
        as `more_waiting` says that a newer one is there: answers are then prompt again, where
        otherwise they would stay late by just under `stale_s`.
        """
        age_s = (now_ns - stamp_ns) * 1e-9
        if self.stale_s <= 0:
            return None
        if age_s < -self.stale_s:
            return self.refuse(
                State.STALE,
                f"frame is stamped {-age_s:.2f} s ahead of this clock; synchronise clocks",
            )
        too_old = age_s > self.stale_s
        self._clearing = too_old or (self._clearing and more_waiting)
        if not self._clearing:
            return None
        reason = "" if too_old else ", left out for newer ones"
        return self.refuse(State.STALE, f"frame is {age_s:.2f} s old{reason}")

    def process_jpeg(self, data: bytes, stamp_ns: int) -> Estimate:
        """Answer one encoded camera frame captured at `stamp_ns` (host time)."""
        started = time.perf_counter()
        self.frontend.decoded_at = started
        markers = self.frontend.process_jpeg(data)
        decoded, segmented = self.frontend.decoded_at, time.perf_counter()
        return replace(
            self.process(markers, stamp_ns),
            decode_time_s=decoded - started,
            segment_time_s=segmented - decoded,
        )

    def process_image(self, image: np.ndarray, stamp_ns: int) -> Estimate:
        """Answer one raw camera frame, (h, w) grey or (h, w, 3) BGR uint8."""
        started = time.perf_counter()
        repeated = self._last_image is not None and np.array_equal(image, self._last_image)
        self._last_image = image
        markers = self.frontend.process_image(image)
        if repeated:
            markers = replace(markers, flags=markers.flags | Flag.REPEATED)
        segmented_s = time.perf_counter() - started
        return replace(self.process(markers, stamp_ns), segment_time_s=segmented_s)

    def process_taxels(self, counts: np.ndarray, stamp_ns: int) -> Estimate:
        """Answer one taxel sample, raw counts (rows * columns * axes,)."""
        started = time.perf_counter()
        markers = self.frontend.process_taxels(counts)
        rendered_s = time.perf_counter() - started
        return replace(self.process(markers, stamp_ns), segment_time_s=rendered_s)

    def process(self, markers: MarkerFrame, stamp_ns: int) -> Estimate:
        """Answer one marker image captured at `stamp_ns` (host time)."""
        step_s, jump = self._advance(stamp_ns)
        flags = int(markers.flags)
        quality = self._quality(markers.count)
        if problem := self._judge(flags, stamp_ns):
            return problem
        if flags & UNFIT:
            self._recent.clear()
        else:
            self._recent.append(markers)
        if self._engine is None:
            return replace(self._wait_for_reference(), marker_quality=quality)

        started = time.perf_counter()
        force, std, score = self._engine.infer(markers.mask)
        self._frames += 1
        self._history.append((self._frames, np.packbits(markers.mask != 0)))
        if not (np.isfinite(force).all() and np.isfinite(score)):
            self._engine.stream.reset()
            return Estimate(State.ERROR, "the model gave NaN; its state was reset")
        published = self.post.apply(force, step_s)
        deviation = standard_deviation(self._engine.manifest.uncertainty, force, std)
        doubt = explain(flags) if flags else jump
        translated_s = self._engine.translate_time_s
        return Estimate(
            State.LOW_QUALITY if doubt else State.OK,
            doubt,
            wrench=self._six(published, 0.0),
            standard_deviation=self._six(deviation, np.nan),
            in_contact=self.post.in_contact,
            marker_quality=quality,
            out_of_distribution=score,
            translate_time_s=translated_s,
            inference_time_s=time.perf_counter() - started - translated_s,
        )

    # --- reference ----------------------------------------------------------------------------

    def set_reference(self) -> str:
        """Take the newest good frames as the no-contact reference and tare the model on it.

        Returns a line about it. Raises `DataError` without enough good frames.
        """
        if len(self._recent) < REFERENCE_FRAMES:
            raise DataError(
                f"{len(self._recent)} good frames of {self.sensor.name} in a row; "
                f"a reference needs {REFERENCE_FRAMES}: check the camera and its picture"
            )
        reference = self._majority()
        self.reference_count = int(np.median([frame.count for frame in self._recent]))
        self._engine = Engine(self._model, self.sensor, reference)
        self.reference = reference
        self.frontend.set_reference(most_typical(self._recent))
        self._history.clear()
        self.post.reset()
        return f"reference of {self.reference_count} markers taken"

    def _majority(self) -> np.ndarray:
        """The mask of most of the recent frames; taxels at rest look the same at any baseline."""
        if self.sensor.kind == "taxels":
            at_rest = np.zeros(self.sensor.taxels.size, np.int32)
            return render_taxels(at_rest, at_rest, self.sensor.taxels).mask
        return majority([frame.mask for frame in self._recent])

    def _wait_for_reference(self) -> Estimate:
        if self.auto_reference and len(self._recent) == REFERENCE_FRAMES:
            return Estimate(State.NO_REFERENCE, self.set_reference())
        return Estimate(
            State.NO_REFERENCE,
            "taking the first frames as reference"
            if self.auto_reference
            else f"no reference: call {self.sensor.name}/set_force_reference while nothing touches",
        )

    # --- hot swap -----------------------------------------------------------------------------

    def prepare(self, model: Model) -> Engine | None:
        """A new model with this sensor's reference and recent past; None without a reference.

        Thread-safe against `process`. Raises `DataError` where the model is for another sensor.
        """
        check_sensor(model.manifest, self.sensor)
        reference = self.reference
        if reference is None:
            return None
        engine = Engine(model, self.sensor, reference)
        self._catch_up(engine)
        return engine

    def swap(self, model: Model, engine: Engine | None) -> None:
        """Switch to a prepared engine; to be called between two frames."""
        if engine is None or engine.reference is not self.reference:
            engine = self.prepare(model)  # a new reference was taken since
        else:
            self._catch_up(engine)
        old = self.post
        self.post = Postprocess(model.manifest, self.options)
        self.post.in_contact = old.in_contact
        self._model, self._engine = model, engine

    def _catch_up(self, engine: Engine) -> None:
        for number, packed in list(self._history):
            if number > engine.frame:
                engine.infer(np.unpackbits(packed).reshape(480, 640))
                engine.frame = number

    # --- judging frames -----------------------------------------------------------------------

    def _advance(self, stamp_ns: int) -> tuple[float, str]:
        last, self._last_stamp_ns = self._last_stamp_ns, stamp_ns
        if last is None:
            return 0.0, ""
        step_s = (stamp_ns - last) * 1e-9
        return step_s, "" if step_s > 0 else f"capture time jumped back by {-step_s:.3f} s"

    def _judge(self, flags: int, stamp_ns: int) -> Estimate | None:
        """The answer to a frame that must not be used; None for a usable one."""
        if flags & Flag.REPEATED:
            if self._repeated_since_ns is None:
                self._repeated_since_ns = stamp_ns
            frozen_s = (stamp_ns - self._repeated_since_ns) * 1e-9
            if frozen_s > FROZEN_S:
                return self.refuse(
                    State.STALE, f"the camera has sent one frame for {frozen_s:.1f} s"
                )
        else:
            self._repeated_since_ns = None
        if flags & UNUSABLE:
            return self.refuse(State.ERROR, explain(flags & UNUSABLE))
        return None

    def _quality(self, count: int) -> float:
        if self.reference_count == 0 or count == 0:
            return float(count > 0)
        return min(count, self.reference_count) / max(count, self.reference_count)

    def _six(self, values: np.ndarray, missing: float) -> np.ndarray:
        wrench = np.full(6, missing)
        for axis, value in zip(self._model.manifest.outputs, values, strict=True):
            wrench[WRENCH_AXES.index(axis)] = value
        return wrench


def network_view(
    spec: InputSpec, sensor: SensorConfig, reference: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """How a network with this input sees masks (480, 640) of a sensor whose image at rest is
    `reference`: a function to float32 (height, width)."""
    mounting = register(reference, sensor) if spec.upright else AS_DRAWN
    size = (spec.height, spec.width)

    def view(mask: np.ndarray) -> np.ndarray:
        return network_mask(mounting.upright(mask), size, sensor.px_per_mm, spec.px_per_mm)

    return view


def majority(masks: Sequence[np.ndarray]) -> np.ndarray:
    """What most masks (h, w) show, uint8 of 0 and 1."""
    votes = np.stack([mask != 0 for mask in masks]).sum(0, dtype=np.uint16)
    return (votes > len(masks) // 2).astype(np.uint8)


def image_of(message: Any) -> np.ndarray:
    """A sensor_msgs/Image as (h, w) grey or (h, w, 3) BGR uint8, without a copy where it is that.

    Raises `DataError` on an encoding that is not mono8, bgr8 or rgb8, or on missing bytes.
    """
    channels = {"mono8": 1, "8UC1": 1, "bgr8": 3, "8UC3": 3, "rgb8": 3}.get(message.encoding)
    if channels is None:
        raise DataError(f"image encoding '{message.encoding}': known are mono8, bgr8, rgb8")
    data = np.asarray(message.data, np.uint8)
    if data.size != message.height * message.step or message.step < channels * message.width:
        raise DataError(f"image of {data.size} bytes: its header says {message.height} rows")
    rows = data.reshape(message.height, message.step)[:, : channels * message.width]
    if channels == 1:
        return rows
    image = rows.reshape(message.height, message.width, 3)
    return np.ascontiguousarray(image[..., ::-1]) if message.encoding == "rgb8" else image


def markers_of(message: Any) -> MarkerFrame:
    """A genforce_msgs/Markers, live or from a bag. Raises `DataError` on a mask of another size."""
    return MarkerFrame(
        unpack_mask(np.asarray(message.mask, np.uint8)),
        np.asarray(message.x, np.float32),
        np.asarray(message.y, np.float32),
        np.asarray(message.area, np.float32),
        flags=int(message.flags),
        expected=int(message.expected),
        contrast=float(message.contrast),
        saturation=float(message.saturation),
        sharpness=float(message.sharpness),
    )


def check_sensor(manifest: Manifest, sensor: SensorConfig) -> None:
    """Raises `DataError` where a model is not for this sensor."""
    if manifest.kind != "force":
        raise DataError(f"model {manifest.model_id} is a {manifest.kind} model, not a force model")
    if manifest.sensor not in (sensor.name, "*"):
        raise DataError(
            f"model {manifest.model_id} reads sensor '{manifest.sensor}', not '{sensor.name}'; "
            f"give a bundle trained for {sensor.name}"
        )
