"""Small real ONNX models: marker moments as force, smoothed by a recurrent state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from genforce_collect.markers.segmentation import MarkerFrame
from genforce_infer.bundle import (
    STATISTICS,
    Bundle,
    InputSpec,
    Manifest,
    Normalisation,
    StateSpec,
    Statistics,
    write_bundle,
)

HEIGHT, WIDTH, OPSET = 60, 80, 17


def tensor(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def constant(name: str, value: object) -> onnx.TensorProto:
    array = np.asarray(value)
    return numpy_helper.from_array(
        array.astype(np.int64 if array.dtype.kind == "i" else np.float32), name
    )


def serialise(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto],
    opset: int = OPSET,
) -> bytes:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def force_graph(
    memory: float = 0.5, height: int = HEIGHT, width: int = WIDTH, opset: int = OPSET
) -> bytes:
    """First moments of mask minus reference as Fx and Fy, the second moment as -Fz; `memory` is
    the part of the last force that stays."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x - x.mean()) / width, (y.mean() - y) / height
    kernels = np.stack([x, y, -(x**2 + y**2)]) / 10
    return serialise(
        [
            helper.make_node("Conv", ["image", "kernels"], ["moments"]),
            helper.make_node("Reshape", ["moments", "shape"], ["features"]),
            helper.make_node("Mul", ["features", "fresh"], ["new"]),
            helper.make_node("Mul", ["hidden", "memory"], ["old"]),
            helper.make_node("Add", ["new", "old"], ["hidden_next"]),
            helper.make_node("Identity", ["hidden_next"], ["force"]),
        ],
        [tensor("image", 1, 2, height, width), tensor("hidden", 1, 3)],
        [tensor("force", 1, 3), tensor("hidden_next", 1, 3), tensor("features", 1, 3)],
        [
            constant("kernels", np.stack([kernels, -kernels], axis=1)),
            constant("shape", [1, 3]),
            constant("fresh", 1 - memory),
            constant("memory", memory),
        ],
        opset,
    )


def nan_graph() -> bytes:
    """A model that answers NaN for every frame."""
    return serialise(
        [
            helper.make_node("ReduceMean", ["image"], ["mean"], keepdims=1),
            helper.make_node("Reshape", ["mean", "shape"], ["scalar"]),
            helper.make_node("Mul", ["scalar", "nan"], ["force"]),
        ],
        [tensor("image", 1, 2, HEIGHT, WIDTH)],
        [tensor("force", 1, 3)],
        [constant("shape", [1, 1]), constant("nan", [[np.nan] * 3])],
    )


def force_manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {
        "model_id": "moments",
        "sensor": "array_1",
        "input": InputSpec(height=HEIGHT, width=WIDTH),
        "state": (StateSpec(name="hidden", shape=(1, 3)),),
        "normalisation": Normalisation(scale=(1.0, 1.0, 1.0), offset=(0.0, 0.0, 0.0)),
        "opset": OPSET,
    }
    return Manifest.model_validate(fields | changes)


MakeBundle = Callable[..., Bundle]


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Write a direct bundle; `memory` goes to its graph, the rest to its manifest. It knows
    statistics of its three features where the manifest speaks of them."""

    def make(name: str = "bundle", memory: float = 0.5, **changes: object) -> Bundle:
        manifest = force_manifest(**changes)
        files = {"force.onnx": force_graph(memory)}
        if manifest.out_of_distribution:
            usual = Statistics(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
            files[STATISTICS] = usual.to_npz()
        return write_bundle(tmp_path / name, manifest, files)

    return make


def dots(
    shift_px: tuple[float, float] = (0.0, 0.0), spread: float = 0.0, flags: int = 0
) -> MarkerFrame:
    """A square array of discs, moved and spread from the centre as under a pressing finger."""
    x, y = np.meshgrid(np.arange(50, 640, 60.0), np.arange(60, 480, 60.0))
    x, y = x.ravel(), y.ravel()
    pull = np.exp(-((x - 320) ** 2 + (y - 240) ** 2) / 150**2)
    x = x + shift_px[0] * pull + spread * pull * (x - 320)
    y = y + shift_px[1] * pull + spread * pull * (y - 240)
    mask = np.zeros((480, 640), np.uint8)
    for u, v in zip(x, y, strict=True):
        cv2.circle(mask, (round(u * 16), round(v * 16)), 8 * 16, 1, -1, cv2.LINE_8, 4)
    return MarkerFrame(mask, x.astype(np.float32), y.astype(np.float32), flags=flags)


@pytest.fixture(scope="session")
def make_dots() -> Callable[..., MarkerFrame]:
    return dots


def jpeg(markers: MarkerFrame, seed: int) -> bytes:
    """A camera frame that shows these markers, dark on a bright gel, with noise."""
    rng = np.random.default_rng(seed)
    gray = cv2.GaussianBlur(190.0 - 130.0 * markers.mask, (5, 5), 0)
    gray += rng.normal(0, 2, gray.shape)
    return cv2.imencode(".jpg", gray.clip(0, 255).astype(np.uint8))[1].tobytes()


@pytest.fixture(scope="session")
def make_jpeg() -> Callable[..., bytes]:
    return jpeg


def field_stages() -> dict[str, bytes]:
    """Two stages: image -> coarse field -> force."""
    h, w = HEIGHT // 2, WIDTH // 2
    difference = np.array([[[1.0]], [[-1.0]]])
    to_field = serialise(
        [
            helper.make_node("Conv", ["image", "difference"], ["change"]),
            helper.make_node(
                "AveragePool", ["change"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]
            ),
            helper.make_node("Mul", ["pooled", "axes"], ["field"]),
        ],
        [tensor("image", 1, 2, HEIGHT, WIDTH)],
        [tensor("field", 1, 3, h, w)],
        [
            constant("difference", difference[None]),
            constant("axes", np.array([10.0, 20.0, 30.0])[None, :, None, None]),
        ],
    )
    x = np.arange(w, dtype=np.float32) - (w - 1) / 2
    to_force = serialise(
        [
            helper.make_node("Mul", ["field", "x"], ["lever"]),
            helper.make_node("ReduceMean", ["lever"], ["force"], axes=[2, 3], keepdims=0),
        ],
        [tensor("field", 1, 3, h, w)],
        [tensor("force", 1, 3)],
        [constant("x", x)],
    )
    return {"field.onnx": to_field, "force.onnx": to_force}


def translate_stages() -> dict[str, bytes]:
    """Two stages: this sensor's change laid over the source sensor's reference, then its model."""
    difference = np.array([[[1.0]], [[-1.0]]])
    to_image = serialise(
        [
            helper.make_node("Conv", ["image", "difference"], ["change"]),
            helper.make_node("Add", ["change", "target_reference"], ["translated"]),
            helper.make_node(
                "Concat", ["translated", "target_reference"], ["source_image"], axis=1
            ),
        ],
        [tensor("image", 1, 2, HEIGHT, WIDTH), tensor("target_reference", 1, 1, HEIGHT, WIDTH)],
        [tensor("source_image", 1, 2, HEIGHT, WIDTH)],
        [constant("difference", difference[None])],
    )
    return {"translate.onnx": to_image, "force.onnx": force_graph()}


@pytest.fixture(scope="session")
def models() -> SimpleNamespace:
    """The functions above, for tests that build bundles of their own."""
    return SimpleNamespace(
        force=force_graph,
        nan=nan_graph,
        field=field_stages,
        translate=translate_stages,
        manifest=force_manifest,
        height=HEIGHT,
        width=WIDTH,
    )
