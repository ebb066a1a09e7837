"""Write a trained force model as a bundle: genforce export CHECKPOINT -o FOLDER

The bundle holds ONNX graphs that take one frame and the recurrent state and give the wrench and
the next state. They are compared with the PyTorch model on a stream before anything is written.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genforce_collect.errors import DataError
from genforce_collect.layout import WIDTH
from genforce_infer.bundle import (
    STATISTICS,
    Bundle,
    InputSpec,
    Manifest,
    Normalisation,
    StateSpec,
    write_bundle,
)
from genforce_infer.calibrate import MINIMUM_SAMPLES, fit_distribution, fit_uncertainty
from genforce_infer.labelled import LabelledFrames
from genforce_infer.parity import parity_of, run_sequences, with_parity
from genforce_train.build import open_data
from genforce_train.cache import Cache, Split
from genforce_train.checkpoint import load_checkpoint
from genforce_train.models.field import PX_PER_MM, FieldNet
from genforce_train.models.force import MODELS, ChangeMaps, FieldForceNet, PaperForceNet
from genforce_train.sequences import FrameSource, MarkerSource, frame_images, upright_images
from genforce_train.train_field import load_reader
from genforce_train.train_force import ForceSettings, judged_labels, predict, source_of, split_of

OPSET = 17
FEATURE_SAMPLES = 2000  # training frames that say what is typical
PARITY_CONTACTS, PARITY_FRAMES = 4, 40
VARIANT_CONTACTS = 16  # to take ranges from, and as many to judge by
QUIET_N = 0.02  # a contact threshold is not set below this


def export_force(
    checkpoint: str | Path, folder: str | Path, model_id: str = "", data: str = ""
) -> Bundle:
    """Write the bundle of a force checkpoint, with what its errors are on contacts it has not
    learned from. `data`: the data set it was trained on, where that was moved.

    Raises `DataError` for a checkpoint of another kind, or a graph that differs from the model.
    """
    saved = load_checkpoint(checkpoint)
    meta = saved.meta
    if meta.get("kind") != "force":
        raise DataError(f"{checkpoint}: a {meta.get('kind')} checkpoint, expected one of force")
    net: Any = MODELS[meta["model"]](outputs=len(meta["outputs"]))
    saved.restore_model(net)
    net.eval()
    settings, cache, split = _training_of(meta, data)
    source = source_of(settings, cache)
    held_out = _held_out(split)
    labels = judged_labels(settings, cache, held_out)
    predicted, measured, rest = predict(net, source, cache, held_out, meta, wrench=labels)
    contacts = np.repeat(np.arange(len(held_out)), np.diff(cache.bounds)[held_out])
    # Without contact the answer shall be zero: what is left there is taken off.
    bias = rest.mean(0)
    predicted, rest = predicted - bias, rest - bias
    measured = measured[:, : len(meta["outputs"])]
    known = len(predicted) >= MINIMUM_SAMPLES
    features = _features(net, source, cache, split.train)

    distribution, statistics = None, None
    if len(features) >= MINIMUM_SAMPLES:
        distribution, statistics = fit_distribution(features, "features")

    in_field = isinstance(net, FieldForceNet)
    with tempfile.TemporaryDirectory() as scratch:
        graphs, spec = _write_graphs(net, settings, Path(scratch))
        files: dict[str, Path | bytes] = {**graphs}
        if statistics is not None:
            files[STATISTICS] = statistics.to_npz()
        manifest = Manifest(
            model_id=model_id or f"{'-'.join(meta['sensors'])}-{meta['model']}-{settings.seed}",
            mode="field" if in_field else "direct",
            sensor="*" if in_field or len(meta["sensors"]) > 1 else meta["sensors"][0],
            input=spec,
            stages=tuple(graphs),
            state=(StateSpec(name="h", shape=tuple(net.zero_state().shape)),),
            outputs=tuple(meta["outputs"]),
            normalisation=Normalisation(
                scale=tuple(meta["scale"]), offset=tuple((np.array(meta["offset"]) - bias).tolist())
            ),
            opset=OPSET,
            rate_hz=_rate_hz(cache, split.train),
            contact_threshold_n=max(QUIET_N, 1.5 * float(abs(rest[:, :3]).max())),
            metrics=_scores(meta),
            uncertainty=fit_uncertainty(predicted, measured, meta["outputs"], contacts=contacts)
            if known
            else None,
            out_of_distribution=distribution,
            provenance={
                "settings": meta["settings"],
                "step": meta["step"],
                "bags": [*sorted({str(s.get("bag", "")) for s in cache.sources} - {""})],
            },
        )
        draft = write_bundle(Path(scratch) / "bundle", manifest, files)
        compared = _images(net, cache, held_out[:PARITY_CONTACTS])
        images = [sequence[:PARITY_FRAMES] for sequence in compared]
        parity = parity_of(
            _stepwise(net, settings, images) * manifest.normalisation.scale
            + manifest.normalisation.offset,
            run_sequences(draft, [sequence.numpy() for sequence in images]),
            manifest.outputs,
        )
        if problem := parity.problem("fp32"):
            raise DataError(f"{checkpoint}: the exported graph is not the model: {problem}")
        return write_bundle(folder, with_parity(manifest, parity), files)


def labelled_frames(
    checkpoint: str | Path, data: str = ""
) -> tuple[LabelledFrames, LabelledFrames]:
    """What the bundle of a force checkpoint reads, and the wrench: of contacts it was trained on,
    and of those it was not. `data`: as in `export_force`."""
    meta = load_checkpoint(checkpoint).meta
    _, cache, split = _training_of(meta, data)
    kind, axes = MODELS[meta["model"]], len(meta["outputs"])

    def frames(contacts: list[int]) -> LabelledFrames:
        chosen = contacts[:: max(1, len(contacts) // VARIANT_CONTACTS)]
        return LabelledFrames(
            [sequence.numpy() for sequence in _images(kind, cache, chosen)],
            [np.array(cache.wrench[cache.rows(row)])[:, :axes] for row in chosen],
        )

    return frames(split.train), frames(_held_out(split))


def _training_of(meta: dict[str, Any], data: str) -> tuple[ForceSettings, Cache, Split]:
    settings = ForceSettings.model_validate(meta["settings"] | ({"data": data} if data else {}))
    cache = open_data(settings.data)
    return settings, cache, split_of(settings, cache)


def _held_out(split: Split) -> list[int]:
    """Contacts to judge by; those of the training only where there are no others."""
    return split.validation + split.test or split.train


class ForceStep(nn.Module):
    """One frame of a force model behind its front end, as it is exported."""

    def __init__(self, front: nn.Module, net: Any) -> None:
        super().__init__()
        self.front, self.net = front, net

    def forward(self, image: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, c, h, w) and state -> force (1, A), next state, features (1, K)."""
        return self.net.step(self.front(image), state)


def _write_graphs(
    net: Any, settings: ForceSettings, folder: Path
) -> tuple[dict[str, Path], InputSpec]:
    """The stages of the bundle in their order, and the image the first one reads."""
    inputs, outputs = ("image", "h"), ("force", "h_next", "features")
    state, force = net.zero_state(), folder / "force.onnx"
    if isinstance(net, PaperForceNet):
        height, width = net.size
        example = torch.zeros(1, 1, height, width)
        export_graph(ForceStep(nn.Identity(), net), (example, state), inputs, outputs, force)
        return {"force.onnx": force}, InputSpec(height=height, width=width, channels=("mask",))
    height, width = FieldNet.size
    example = torch.zeros(1, 2, height, width)
    if isinstance(net, FieldForceNet):
        field = folder / "field.onnx"
        reader = _reader(settings)
        export_graph(reader, (example,), ("image",), ("field",), field)
        step, example = ForceStep(nn.Identity(), net), torch.zeros(1, 3, *net.size)
        export_graph(step, (example, state), ("field", "h"), outputs, force)
        px_per_mm = PX_PER_MM * width / WIDTH
        spec = InputSpec(height=height, width=width, px_per_mm=px_per_mm, upright=True)
        return {"field.onnx": field, "force.onnx": force}, spec
    export_graph(ForceStep(ChangeMaps(), net), (example, state), inputs, outputs, force)
    return {"force.onnx": force}, InputSpec(height=height, width=width)


def _reader(settings: ForceSettings) -> nn.Module:
    return load_reader(settings.field_model, settings.refinements, settings.field_sha256)


def _images(kind: Any, cache: Cache, contacts: Sequence[int]) -> list[Tensor]:
    """What a model of this kind, or the front end before it, reads over contacts (n, c, h, w)."""
    rows = [np.r_[cache.rows(contact)] for contact in contacts]
    if kind.channels == PaperForceNet.channels:
        source = MarkerSource(cache, kind.size)
        return [source.images(frames, np.empty(0)) for frames in rows]
    in_field = kind.channels == FieldForceNet.channels
    return [*map((upright_images if in_field else frame_images)(cache), rows)]


def _stepwise(net: Any, settings: ForceSettings, sequences: Sequence[Tensor]) -> np.ndarray:
    """Normalised wrench (sum of n, A) of the PyTorch model, frame by frame, each sequence (n, c,
    h, w) from a state of zero."""
    front: nn.Module = ChangeMaps()
    if isinstance(net, PaperForceNet):
        front = nn.Identity()
    elif isinstance(net, FieldForceNet):
        front = _reader(settings)
    step, forces = ForceStep(front, net).eval(), []
    with torch.inference_mode():
        for sequence in sequences:
            state = net.zero_state()
            for image in sequence:
                force, state, _ = step(image[None], state)
                forces.append(force[0].numpy())
    return np.array(forces, np.float64)


def _features(net: Any, source: FrameSource, cache: Cache, contacts: list[int]) -> np.ndarray:
    """Features (n, K) of frames spread over the training contacts: what is typical."""
    rows = np.concatenate([np.r_[cache.rows(row)] for row in contacts])
    rows = rows[:: max(1, len(rows) // FEATURE_SAMPLES)]
    sensors = cache.sensor_numbers()[rows]
    with torch.inference_mode():
        parts = [
            net.features(source.images(rows[start : start + 64], sensors[start : start + 64]))
            for start in range(0, len(rows), 64)
        ]
    return torch.cat(parts).numpy()


def export_graph(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    path: Path,
) -> None:
    """Write an ONNX graph of fixed shapes with these names."""
    with warnings.catch_warnings():
        # The exporter that needs no further package warns of shapes, which are fixed here.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            example,
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=False,
        )


def _rate_hz(cache: Cache, contacts: list[int]) -> float | None:
    """Median frame rate; None for data without stamps."""
    stamps = cache.array("stamp_ns")
    steps = np.concatenate([np.diff(stamps[cache.rows(row)]) for row in contacts])
    median = float(np.median(steps))
    return round(1e9 / median, 3) if median > 0 else None


def _scores(meta: dict[str, Any]) -> dict[str, Any]:
    """The scores, as the manifest keeps them."""
    metrics = meta.get("metrics", {})
    return {name: metrics[name] for name in ("train", "validation", "test") if name in metrics}
