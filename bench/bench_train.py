"""Training: one streaming step of the compact model against the paper's, both in ONNX Runtime on
one core."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from rows import Row

from genforce_train.export import ForceStep, export_graph
from genforce_train.models.force import ChangeMaps, CompactForceNet, PaperForceNet

STEPS = 40


def bench() -> list[Row]:
    """The step's time."""
    with tempfile.TemporaryDirectory() as scratch:
        return [_step(Path(scratch))]


def _step(folder: Path) -> Row:
    times = {}
    for name, front, net in (
        ("compact", ChangeMaps(), CompactForceNet()),
        ("paper", torch.nn.Identity(), PaperForceNet()),
    ):
        image = torch.zeros(1, 2, 120, 160) if name == "compact" else torch.zeros(1, 1, 256, 256)
        path = folder / f"{name}.onnx"
        example = (image, net.zero_state())
        export_graph(ForceStep(front, net), example, ("image", "h"), ("force", "h_next", "f"), path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {"image": image.numpy(), "h": net.zero_state().numpy()}
        spent = []
        for _ in range(STEPS):
            started = time.perf_counter()
            session.run(None, feed)
            spent.append(time.perf_counter() - started)
        times[name] = 1e3 * float(np.median(spent))
    return Row(
        "train: one streaming step of the compact model, 1 core",
        times["compact"],
        "ms",
        goal="<= 2",
        baseline=times["paper"],
        ratio=times["paper"] / times["compact"],
    )
