"""ONNX Runtime sessions of a bundle, and streams that carry the recurrent state on the device."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from genforce_collect.errors import ConfigError, DataError, DeviceError
from genforce_infer.bundle import Bundle, hand_on
from genforce_infer.preprocess import area_average

ProviderName = Literal["auto", "tensorrt", "cuda", "cpu"]
PROVIDERS: dict[str, str] = {  # in order of preference
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
WARM_UP_STEPS = 5
LAST_STAGE_OUTPUTS = ("force", "force_std", "features")


@dataclass(frozen=True)
class Choice:
    """The provider that runs a model and why the ones preferred to it do not."""

    provider: str  # "tensorrt", "cuda" or "cpu"
    fallbacks: tuple[str, ...] = ()


class Model:
    """The sessions of one bundle; shared by any number of streams and threads.

    `provider` "auto" takes the best one that works here and says in `choice.fallbacks` why others
    were passed over; a named one that does not work raises `DeviceError`. One intra-op thread is
    the default: these graphs are small, and a second thread costs more than it brings beside a
    camera. A graph that ONNX Runtime cannot load raises `DataError`.
    """

    def __init__(self, bundle: Bundle, provider: ProviderName = "auto", threads: int = 1) -> None:
        started = time.perf_counter()
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.choice, self.sessions = _open_sessions(bundle, provider, threads)
        self._shapes = self._learn_shapes()
        stream = self.stream()
        for _ in range(WARM_UP_STEPS):
            stream.step()
        self.load_time_s = time.perf_counter() - started

    @property
    def device(self) -> str:
        """Where tensors live between steps: "cpu" or "cuda"."""
        return "cpu" if self.choice.provider == "cpu" else "cuda"

    def stream(self) -> Stream:
        """A sequence of frames with its own recurrent state."""
        return Stream(self)

    def given_inputs(self) -> dict[str, np.ndarray]:
        """What every frame offers the first stage, at rest: float32 arrays by tensor name."""
        spec = self.manifest.input
        given = {"image": np.zeros((1, len(spec.channels), spec.height, spec.width), np.float32)}
        if self.bundle.target_reference is not None:
            target = area_average(self.bundle.target_reference, (spec.height, spec.width))
            given["target_reference"] = target[None, None]
        return given

    def _learn_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every state and output, by running the stages once: graphs may leave it open."""
        shapes: dict[str, tuple[int, ...]] = {s.name: s.shape for s in self.manifest.state}
        known = self.given_inputs()
        known |= {s.name: np.zeros(s.shape, np.float32) for s in self.manifest.state}
        for name, session in zip(self.manifest.stages, self.sessions, strict=True):
            feeds = {item.name: known[item.name] for item in session.get_inputs()}
            try:
                values = session.run(None, feeds)
            except Exception as error:  # ONNX Runtime raises its own types for each status code
                raise DataError(f"{self.bundle.path(name)}: {_one_line(error)}") from error
            outputs = {
                item.name: np.asarray(value)
                for item, value in zip(session.get_outputs(), values, strict=True)
            }
            shapes |= {tensor: value.shape for tensor, value in outputs.items()}
            known = hand_on(known, outputs)
        return shapes


class Stream:
    """One sequence of frames through a model. Not thread-safe; take one stream a sensor.

    All tensors are allocated once and bound twice, with the state's two buffers in turn, so that
    a step copies nothing but the answer (and, on a GPU, the image). `image` is the input buffer,
    float32 (1, C, H, W), to be written before a step.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._turn = 0
        self.stage_times_s = [0.0] * len(model.sessions)  # what the stages took at the last step
        given = model.given_inputs()
        self.image = given["image"]
        on_device = model.device != "cpu"
        values = {name: self._value(array) for name, array in given.items()}
        self._image_value = values["image"] if on_device else None
        self._states = {
            s.name: [self._value(np.zeros(s.shape, np.float32)) for _ in range(2)]
            for s in model.manifest.state
        }
        self._steps: list[list[tuple[ort.InferenceSession, ort.IOBinding]]] = [[], []]
        for session in model.sessions:
            outputs = {
                item.name: self._value(np.zeros(model._shapes[item.name], np.float32))
                for item in session.get_outputs()
                if item.name.removesuffix("_next") not in self._states
            }
            for turn in range(2):
                self._steps[turn].append((session, self._bind(session, values, outputs, turn)))
            values = hand_on(values, outputs)
        remembers = [
            any(item.name in self._states for item in session.get_inputs())
            for session in model.sessions
        ]
        self._first_with_memory = [*remembers, True].index(True)
        self._answers = {name: values[name] for name in LAST_STAGE_OUTPUTS if name in values}

    def _value(self, array: np.ndarray) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, self._model.device, 0)

    def _bind(
        self,
        session: ort.InferenceSession,
        inputs: dict[str, ort.OrtValue],
        outputs: dict[str, ort.OrtValue],
        turn: int,
    ) -> ort.IOBinding:
        binding = session.io_binding()
        for item in session.get_inputs():
            state = self._states.get(item.name)
            binding.bind_ortvalue_input(item.name, state[turn] if state else inputs[item.name])
        for item in session.get_outputs():
            state = self._states.get(item.name.removesuffix("_next"))
            value = state[1 - turn] if state else outputs[item.name]
            binding.bind_ortvalue_output(item.name, value)
        return binding

    def reset(self) -> None:
        """Forget the past: all states to zero."""
        for name, pair in self._states.items():
            for value in pair:
                value.update_inplace(np.zeros(self._model._shapes[name], np.float32))

    def step(self, same_image: bool = False) -> dict[str, np.ndarray]:
        """Run what is in `image`. Returns `force` (1, A) unscaled, and `force_std`, `features`
        where the graph has them; the arrays are new at every step.

        `same_image`: it is that of the last step, so that only stages with a memory run."""
        if self._image_value is not None and not same_image:
            self._image_value.update_inplace(self.image)
        stages = list(enumerate(self._steps[self._turn]))
        for stage, (session, binding) in stages[self._first_with_memory if same_image else 0 :]:
            started = time.perf_counter()
            session.run_with_iobinding(binding)
            self.stage_times_s[stage] = time.perf_counter() - started
        self._turn = 1 - self._turn
        return {name: value.numpy().copy() for name, value in self._answers.items()}


# --- sessions -----------------------------------------------------------------------------------


def engine_cache(bundle: Bundle) -> Path:
    """Where TensorRT engines of this bundle are kept: `$GENFORCE_ENGINE_CACHE`, by default
    `~/.cache/genforce/engines`, then GPU, TensorRT version and sha256 of the stages."""
    root = os.environ.get("GENFORCE_ENGINE_CACHE")
    base = Path(root) if root else Path.home() / ".cache" / "genforce" / "engines"
    digest = "-".join(bundle.manifest.files[name][:16] for name in bundle.manifest.stages)
    return base / _gpu_name() / f"tensorrt-{_tensorrt_version()}" / digest


def build_engine(bundle: Bundle) -> Path:
    """Build this bundle's TensorRT engines on this machine's GPU; returns the cache folder.

    Raises `DeviceError` in one line where TensorRT or the GPU is missing.
    """
    if reason := _unavailable(bundle, "tensorrt", built_only=False):
        raise DeviceError(f"cannot build TensorRT engines: tensorrt: {reason}")
    cache = engine_cache(bundle)
    cache.mkdir(parents=True, exist_ok=True)
    try:
        Model(bundle, "tensorrt")
    except DeviceError:
        if not any(cache.iterdir()):  # an empty folder would pass for a built engine
            cache.rmdir()
        raise
    return cache


def _open_sessions(
    bundle: Bundle, wanted: ProviderName, threads: int
) -> tuple[Choice, list[ort.InferenceSession]]:
    if wanted != "auto" and wanted not in PROVIDERS:
        raise ConfigError(f"provider '{wanted}': known are auto, {', '.join(PROVIDERS)}")
    fallbacks: list[str] = []
    for name in PROVIDERS if wanted == "auto" else (wanted,):
        reason = _unavailable(bundle, name, built_only=wanted == "auto")
        if reason is None:
            sessions = _try_sessions(bundle, name, threads)
            if not isinstance(sessions, str):
                return Choice(name, tuple(fallbacks)), sessions
            reason = sessions
        fallbacks.append(f"{name}: {reason}")
    raise DeviceError(
        f"cannot run {bundle.folder} with provider {wanted}: {'; '.join(fallbacks)}; "
        f"set provider to auto or cpu"
    )


def _unavailable(bundle: Bundle, name: str, built_only: bool) -> str | None:
    if PROVIDERS[name] not in ort.get_available_providers():
        return "not in this onnxruntime (install onnxruntime-gpu)"
    if name == "tensorrt" and built_only and not engine_cache(bundle).is_dir():
        return "no engine for this GPU (genforce build-engine)"  # building takes minutes
    return None


def _try_sessions(bundle: Bundle, name: str, threads: int) -> list[ort.InferenceSession] | str:
    """The sessions, or why this provider does not take them. Raises `DataError` on the CPU."""
    sessions = []
    for stage in bundle.manifest.stages:
        path = bundle.path(stage)
        try:
            session = ort.InferenceSession(
                str(path), _options(threads), providers=_provider_list(bundle, name)
            )
        except Exception as error:  # ONNX Runtime raises its own types for each status code
            if name == "cpu":
                raise DataError(f"{path}: {_one_line(error)}") from error
            return _one_line(error)
        if PROVIDERS[name] not in session.get_providers():
            return "failed to start (driver or CUDA libraries missing)"
        sessions.append(session)
    return sessions


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    # A spinning pool would take the core the camera and DDS need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _provider_list(bundle: Bundle, name: str) -> Sequence[str | tuple[str, dict[str, Any]]]:
    cpu = PROVIDERS["cpu"]
    if name == "cpu":
        return [cpu]
    if name == "cuda":
        return [(PROVIDERS[name], {"cudnn_conv_algo_search": "HEURISTIC"}), cpu]
    options = {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(engine_cache(bundle)),
        "trt_fp16_enable": bundle.manifest.precision == "fp16",
        "trt_int8_enable": bundle.manifest.precision == "int8",
    }
    return [(PROVIDERS[name], options), PROVIDERS["cuda"], cpu]


def _gpu_name() -> str:
    """Model of the first GPU as the driver knows it, fit for a file name; "none" without one."""
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in information.read_text().splitlines():
            if line.startswith("Model:"):
                return "-".join(line.removeprefix("Model:").split())
    return "none"


def _tensorrt_version() -> str:
    for distribution in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return f"of-onnxruntime-{ort.__version__}"  # found by the loader, not by Python


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
