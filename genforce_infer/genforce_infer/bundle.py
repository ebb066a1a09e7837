"""A model bundle: a folder with `manifest.json` and the ONNX graphs it describes.

Graphs are joined by the names of their inputs and outputs. A frame offers

| tensor | shape | what |
|---|---|---|
| image | (1, C, H, W) | the manifest's `input.channels`, area-averaged to 0..1 |
| target_reference | (1, 1, H, W) | no-contact image of the source sensor, if any |

and each stage reads what it names among these and among the outputs of the stages before it, and
writes its own. The last stage writes `force` (1, A): axis i is `force[i] * scale[i] + offset[i]`
in N or N m, in the sensor frame, what the indenter does to the gel. A stage that reads a state
`h` writes `h_next`, which it reads at the following frame; states start at zero. Optional outputs
of the last stage: `force_std` (1, A), unscaled like `force`, and `features` (1, K).

Modes: `direct` has one stage (image -> force); `field` has two (image -> `field`, (1, 3, h, w) in
mm -> force); `translate` has two (image, target_reference -> `source_image`, what the source
sensor would see, in the channels its force model reads -> force). For the stages after it
`source_image` takes the place of `image`.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import onnx
from pydantic import Field, JsonValue, ValidationError, model_validator

from genforce_collect.config import Positive, Section
from genforce_collect.errors import DataError
from genforce_collect.markers.packing import HEIGHT, WIDTH, unpack_mask
from genforce_infer.preprocess import IMAGE_STATISTICS

MANIFEST = "manifest.json"
TARGET_REFERENCE = "target_reference.npy"  # np.packbits of the 480 x 640 mask
STATISTICS = "training_statistics.npz"  # `Statistics` for `out_of_distribution`

_Model = TypeVar("_Model", bound=Section)
_Any = TypeVar("_Any")

Axis = Literal["fx", "fy", "fz", "tx", "ty", "tz"]
Shape = tuple[int, ...]


class InputSpec(Section):
    """The image the first stage reads, made from a marker mask."""

    height: int = Field(ge=8, le=2048)
    width: int = Field(ge=8, le=2048)
    channels: tuple[Literal["mask", "reference"], ...] = ("mask", "reference")
    preprocessing: Literal["area_average"] = "area_average"
    # Scale of this image; None: the whole frame is averaged, whatever it shows.
    px_per_mm: Positive | None = None
    # Whether frames are brought to where the sensor as drawn would show them, by the reference.
    upright: bool = False

    @property
    def exceeds_frame(self) -> bool:
        """Whether a whole frame cannot be averaged to it."""
        return self.height > HEIGHT or self.width > WIDTH

    @model_validator(mode="after")
    def _consistent(self) -> InputSpec:
        if self.px_per_mm is None and self.exceeds_frame:
            raise ValueError(f"larger than a frame of {HEIGHT} x {WIDTH}; it needs px_per_mm")
        return self


class StateSpec(Section):
    """A recurrent state: graph input `name`, graph output `name_next`."""

    name: str
    shape: Shape


class Normalisation(Section):
    """Graph output to SI: `value * scale + offset`, one entry an output axis (N or N m)."""

    scale: tuple[float, ...]
    offset: tuple[float, ...]


class Uncertainty(Section):
    """Standard deviation per axis: `sqrt(base^2 + (gain * |F|)^2)` with |F| the predicted force
    (N), or `factor * force_std` where the graph estimates it. `coverage` is the part of held-out
    samples within one and two standard deviations, per axis."""

    base: tuple[float, ...]  # N or N m
    gain: tuple[float, ...]
    factor: tuple[float, ...] | None = None
    coverage: dict[Axis, tuple[float, float]] = Field(default_factory=dict)


class Distribution(Section):
    """What is typical: score = |whitening @ (features - mean)| / threshold, > 1 is outside.

    `source` says whose features: `features`, an output of the last stage, or `image`,
    `preprocess.image_statistics` of the input image. Mean and whitening stand in `STATISTICS`."""

    source: Literal["features", "image"]
    threshold: Positive


class MaterialCorrection(Section):
    """Gain on the force over the predicted normal load -Fz (N, rising), from force-depth curves;
    between the nodes it is interpolated. Unloading is used while the load falls."""

    load_n: tuple[float, ...]
    loading: tuple[float, ...]
    unloading: tuple[float, ...]

    @model_validator(mode="after")
    def _consistent(self) -> MaterialCorrection:
        if len({len(self.load_n), len(self.loading), len(self.unloading)}) != 1:
            raise ValueError("load_n, loading and unloading must have the same length")
        if any(b <= a for a, b in zip(self.load_n, self.load_n[1:], strict=False)):
            raise ValueError("load_n must rise")
        return self


class Manifest(Section):
    """What `manifest.json` holds."""

    format: Literal[1] = 1
    model_id: str = Field(min_length=1)
    kind: Literal["force", "field", "m2m", "encoder"] = "force"
    mode: Literal["direct", "field", "translate"] = "direct"
    sensor: str  # the sensor this bundle reads; "*" where the mode serves any layout
    input: InputSpec
    stages: tuple[str, ...] = ("force.onnx",)  # in the order they run
    state: tuple[StateSpec, ...] = ()
    outputs: tuple[Axis, ...] = ("fx", "fy", "fz")
    normalisation: Normalisation
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    opset: int = Field(ge=13, le=64)
    rate_hz: Positive | None = None  # frame rate of the training data
    contact_threshold_n: float = Field(0.05, ge=0)  # forces below are those of no contact
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    uncertainty: Uncertainty | None = None
    out_of_distribution: Distribution | None = None
    material: MaterialCorrection | None = None
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)  # name -> sha256

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        axes = len(self.outputs)
        lengths = {
            "normalisation.scale": self.normalisation.scale,
            "normalisation.offset": self.normalisation.offset,
        }
        if self.uncertainty:
            lengths |= {
                "uncertainty.base": self.uncertainty.base,
                "uncertainty.gain": self.uncertainty.gain,
            }
            if self.uncertainty.factor is not None:
                lengths["uncertainty.factor"] = self.uncertainty.factor
        for name, values in lengths.items():
            if len(values) != axes:
                raise ValueError(f"{name} has {len(values)} entries for {axes} outputs")
        expected = {"direct": 1, "field": 2, "translate": 2}[self.mode]
        if self.kind == "force" and len(self.stages) != expected:
            raise ValueError(f"mode {self.mode} has {expected} stages, found {len(self.stages)}")
        if TARGET_REFERENCE in self.files and self.input.exceeds_frame:
            raise ValueError(f"input is larger than {TARGET_REFERENCE}, {HEIGHT} x {WIDTH}")
        return self


@dataclass(frozen=True)
class Statistics:
    """Of the features of the training data: `mean` (K,), and `whitening` (K, K), which makes their
    covariance one. float32."""

    mean: np.ndarray
    whitening: np.ndarray

    def to_npz(self) -> bytes:
        """The content of a bundle's `STATISTICS`."""
        file = io.BytesIO()
        np.savez(file, mean=self.mean, whitening=self.whitening)
        return file.getvalue()


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk. `target_reference`: (480, 640) uint8 of 0 and 1, or None;
    `statistics`: where the manifest has an `out_of_distribution`."""

    folder: Path
    manifest: Manifest
    target_reference: np.ndarray | None = None
    statistics: Statistics | None = None

    def path(self, name: str) -> Path:
        """Path of one of its files."""
        return self.folder / name


def write_bundle(
    folder: Path | str, manifest: Manifest, files: Mapping[str, Path | bytes]
) -> Bundle:
    """Write a bundle as a whole: it is verified beside its place and moved there.

    `files` maps names in the bundle to their content or to a file to copy; their hashes replace
    `manifest.files`. An older bundle at `folder` is replaced. Raises `DataError`.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: exists and is not a bundle; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        draft = Path(scratch) / "new"
        draft.mkdir()
        for name, content in files.items():
            data = content if isinstance(content, bytes) else Path(content).read_bytes()
            (draft / name).write_bytes(data)
        hashes = {name: _sha256(draft / name) for name in files}
        filled = manifest.model_copy(update={"files": hashes})
        (draft / MANIFEST).write_text(filled.model_dump_json(indent=2) + "\n")
        read_bundle(draft)
        if folder.exists():
            os.rename(folder, Path(scratch) / "old")
        os.rename(draft, folder)
    return read_bundle(folder)


def read_bundle(folder: Path | str) -> Bundle:
    """Read and verify a bundle: hashes, opset, and manifest against graphs.

    Raises `DataError` naming the file and the field that do not fit.
    """
    folder = Path(folder)
    try:
        return _read(folder)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror}") from error


def _read(folder: Path) -> Bundle:
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: no {MANIFEST} there; give the folder of a model bundle")
    manifest = _parse(folder / MANIFEST, Manifest)
    needed = set(manifest.stages)
    if manifest.mode == "translate" and manifest.kind == "force":
        needed.add(TARGET_REFERENCE)
    if manifest.out_of_distribution:
        needed.add(STATISTICS)
    if missing := sorted(needed - set(manifest.files)):
        raise DataError(f"{folder / MANIFEST}: files: {', '.join(missing)} missing")
    for name, sha256 in manifest.files.items():
        _check_file(folder, name, sha256)
    reference = statistics = None
    if TARGET_REFERENCE in manifest.files:
        reference = _read_mask(folder / TARGET_REFERENCE)
    if manifest.out_of_distribution:
        statistics = _read_statistics(folder / STATISTICS)
        length = len(statistics.mean)
        if manifest.out_of_distribution.source == "image" and length != IMAGE_STATISTICS:
            raise DataError(
                f"{folder / STATISTICS}: mean of {length} numbers; of an image there are "
                f"{IMAGE_STATISTICS}"
            )
    _check_graphs(folder, manifest, statistics)
    return Bundle(folder, manifest, reference, statistics)


def hand_on(offered: Mapping[str, _Any], outputs: Mapping[str, _Any]) -> dict[str, _Any]:
    """What the stages after one may read, by tensor name: what it could, and its outputs."""
    offered = {**offered, **outputs}
    if "source_image" in outputs:
        offered["image"] = outputs["source_image"]
    return offered


def _parse(path: Path, model: type[_Model]) -> _Model:
    try:
        return model.model_validate_json(path.read_text())
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, p['loc'])) or '(whole file)'}: "
            + ("unknown key" if p["type"] == "extra_forbidden" else p["msg"])
            for p in error.errors()
        )
        raise DataError(f"{path}: " + "; ".join(problems)) from error
    except ValueError as error:
        raise DataError(f"{path}: not a text: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_file(folder: Path, name: str, sha256: str) -> None:
    if Path(name).name != name or name in {"", ".", "..", MANIFEST}:
        raise DataError(f"{folder / MANIFEST}: files: '{name}' is not a plain file name")
    if not (folder / name).is_file():
        raise DataError(f"{folder / name}: missing; copy the whole bundle folder")
    if _sha256(folder / name) != sha256:
        raise DataError(
            f"{folder / name}: sha256 differs from the manifest's (files.{name}); "
            f"the file is damaged or was exchanged: export or copy the bundle again"
        )


def _read_mask(path: Path) -> np.ndarray:
    try:
        bits = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's own are many, down to those of zip and memory
        raise DataError(f"{path}: not a .npy array: {error}") from error
    try:
        return unpack_mask(bits)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read_statistics(path: Path) -> Statistics:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, whitening = arrays["mean"], arrays["whitening"]
    except Exception as error:  # numpy's own are many, down to those of zip and memory
        raise DataError(f"{path}: not a .npz of mean and whitening: {error}") from error
    fits = mean.ndim == 1 and whitening.shape == (len(mean), len(mean))
    if not fits or mean.dtype != np.float32 or whitening.dtype != np.float32:
        raise DataError(
            f"{path}: mean {mean.dtype}{mean.shape} and whitening {whitening.dtype}"
            f"{whitening.shape}, expected float32 (K,) and (K, K)"
        )
    return Statistics(mean, whitening)


# --- manifest against graphs ------------------------------------------------------------------

# None stands for a dimension the graph leaves open.
_Open = tuple[int | None, ...]


def _check_graphs(folder: Path, manifest: Manifest, statistics: Statistics | None) -> None:
    spec = manifest.input
    offered: dict[str, _Open] = {"image": (1, len(spec.channels), spec.height, spec.width)}
    if manifest.mode == "translate":
        offered["target_reference"] = (1, 1, spec.height, spec.width)
    states = {state.name: state.shape for state in manifest.state}
    unused = set(states)
    for name in manifest.stages:
        path = folder / name
        graph, opset = _load_graph(path)
        if opset != manifest.opset:
            raise DataError(f"{path}: opset {opset}, but the manifest says opset: {manifest.opset}")
        weights = {item.name for item in graph.initializer}
        inputs = [item for item in graph.input if item.name not in weights]
        for item in (*inputs, *graph.output):
            if item.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
                raise DataError(f"{path}: '{item.name}' is not a tensor of float32")
        outputs = _shapes(graph.output)
        for tensor, shape in _shapes(inputs).items():
            if tensor in states:
                unused.discard(tensor)
                _fit(path, tensor, shape, states[tensor], "state")
                if f"{tensor}_next" not in outputs:
                    raise DataError(f"{path}: reads state {tensor} but has no {tensor}_next output")
                _fit(path, f"{tensor}_next", outputs[f"{tensor}_next"], states[tensor], "state")
            elif tensor in offered:
                _fit(path, tensor, shape, offered[tensor], "input")
            else:
                raise DataError(
                    f"{path}: input '{tensor}' is neither a state of the manifest nor one of "
                    f"{', '.join(sorted(offered))}"
                )
        offered = hand_on(offered, outputs)
    if unused:
        raise DataError(f"{folder / MANIFEST}: state: no graph reads {', '.join(sorted(unused))}")
    if manifest.kind != "force":
        return
    last = folder / manifest.stages[-1]
    if "force" not in outputs:
        raise DataError(f"{last}: no output 'force'")
    _fit(last, "force", outputs["force"], (1, len(manifest.outputs)), "outputs")
    if manifest.uncertainty and manifest.uncertainty.factor and "force_std" not in outputs:
        raise DataError(f"{last}: no output 'force_std', which uncertainty.factor needs")
    distribution = manifest.out_of_distribution
    if statistics and distribution and distribution.source == "features":
        if "features" not in outputs:
            raise DataError(f"{last}: no output 'features', which out_of_distribution needs")
        shape = (1, len(statistics.mean))
        _fit(last, "features", outputs["features"], shape, STATISTICS)


def _load_graph(path: Path) -> tuple[onnx.GraphProto, int]:
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own error types differ between its versions
        raise DataError(f"{path}: not an ONNX model: {error}") from error
    opsets = [item.version for item in model.opset_import if item.domain in ("", "ai.onnx")]
    if not opsets or not model.graph.output:
        raise DataError(f"{path}: not an ONNX model")
    return model.graph, max(opsets)


def _shapes(values: Iterable[onnx.ValueInfoProto]) -> dict[str, _Open]:
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in values
    }


def _fit(path: Path, tensor: str, found: _Open, expected: _Open, field: str) -> None:
    same = len(found) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(found, expected, strict=True)
    )
    if not same:
        shown = [["?" if d is None else d for d in shape] for shape in (found, expected)]
        raise DataError(
            f"{path}: '{tensor}' has shape {shown[0]}, but the manifest's {field} says {shown[1]}"
        )
