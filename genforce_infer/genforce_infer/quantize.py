"""Lower-precision variants of a bundle."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from genforce_collect.errors import DataError
from genforce_infer.bundle import Bundle, hand_on, write_bundle
from genforce_infer.runtime import Model

Precision = Literal["fp16", "int8"]
# Weights of recurrent cells and the layers that end in newtons stay in float: an error there is
# fed back or goes straight to the answer, and they cost next to nothing.
INT8_OPERATORS = ["Conv", "Gemm", "MatMul"]
CALIBRATION_FRAMES = 400


def make_variant(
    bundle: Bundle, precision: Precision, folder: Path | str, images: Sequence[np.ndarray] = ()
) -> Bundle:
    """Write `bundle` (fp32) to `folder` in another precision.

    `images`: sequences (T, C, H, W) float32 of input images, in order of time; int8 takes the
    ranges of its activations from them. fp16 keeps float32 at the inputs and outputs and pays on
    GPUs; int8 pays on CPUs. Raises `DataError`.
    """
    if bundle.manifest.precision != "fp32":
        raise DataError(f"{bundle.folder}: already {bundle.manifest.precision}; give the fp32 one")
    if precision == "int8" and not images:
        raise DataError("int8 needs images to take its ranges from: give a data set")
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: bundle.path(name) for name in bundle.manifest.files}
        for name in bundle.manifest.stages:
            source, target = bundle.path(name), Path(scratch) / name
            if precision == "fp16":
                _to_fp16(source, target)
            else:
                feeds = list(_stage_feeds(bundle, name, images))
                _to_int8(source, target, feeds, ends_in_force=name == bundle.manifest.stages[-1])
            files[name] = target
        opsets = {_opset(files[name]) for name in bundle.manifest.stages}
        if len(opsets) > 1:
            raise DataError(f"{bundle.folder}: stages came out with different opsets {opsets}")
        manifest = bundle.manifest.model_copy(
            update={
                "model_id": f"{bundle.manifest.model_id}-{precision}",
                "precision": precision,
                "opset": opsets.pop(),
                "provenance": {
                    **bundle.manifest.provenance,
                    "made_from": bundle.manifest.model_id,
                },
            }
        )
        return write_bundle(folder, manifest, files)


# --- conversion ---------------------------------------------------------------------------------


def _to_fp16(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16  # 1 s to import

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _to_int8(
    source: Path, target: Path, feeds: list[dict[str, np.ndarray]], ends_in_force: bool
) -> None:
    prepared = target.with_suffix(".prepared.onnx")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantiser advises on the root logger
    try:
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            _Feeds(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=INT8_OPERATORS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[
                *_filters(prepared),
                *(_final_layers(prepared) if ends_in_force else []),
            ],
            calibrate_method=CalibrationMethod.MinMax,
        )
    finally:
        root.setLevel(level)


def _filters(path: Path) -> list[str]:
    """Names of the convolutions that take each channel for itself: they smooth images whose small
    differences count, and in int8 they are slower than in float."""
    return [
        node.name
        for node in onnx.load(path).graph.node
        if node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute)
    ]


def _final_layers(path: Path) -> list[str]:
    """Names of the weighted nodes the force comes from without another between."""
    graph = onnx.load(path).graph
    makers = {output: node for node in graph.node for output in node.output}
    found, pending = [], ["force"]
    while pending:
        node = makers.get(pending.pop())
        if node is None:
            continue
        if node.op_type in INT8_OPERATORS:
            found.append(node.name)
        elif node.op_type not in ("GRU", "LSTM"):
            pending += node.input
    return found


class _Feeds(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def _stage_feeds(
    bundle: Bundle, wanted: str, images: Sequence[np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """What one stage reads while the chain runs over frames spread over the sequences."""
    total = sum(map(len, images))
    every = max(1, total // CALIBRATION_FRAMES)
    sessions = {
        name: ort.InferenceSession(str(bundle.path(name)), providers=["CPUExecutionProvider"])
        for name in bundle.manifest.stages
    }
    given = Model(bundle, "cpu").given_inputs()
    number = 0
    for sequence in images:
        states = {s.name: np.zeros(s.shape, np.float32) for s in bundle.manifest.state}
        for image in sequence:
            known: dict[str, Any] = {**given, **states, "image": image[None].astype(np.float32)}
            for name, session in sessions.items():
                feeds = {item.name: known[item.name] for item in session.get_inputs()}
                if name == wanted and number % every == 0:
                    yield feeds
                values = session.run(None, feeds)
                names = [item.name for item in session.get_outputs()]
                known = hand_on(known, dict(zip(names, values, strict=True)))
            states = {name: known[f"{name}_next"] for name in states}
            number += 1


def _opset(path: Path) -> int:
    return max(
        item.version for item in onnx.load(path).opset_import if item.domain in ("", "ai.onnx")
    )
