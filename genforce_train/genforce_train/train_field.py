"""Train the field model: `genforce train field data=FOLDER [SETTINGS.yaml] [key=value ...]`.

`data` is what `genforce synth --suite field` makes: contacts of random sensors with the true
displacement of the gel. One model then serves every layout; a sensor brings its reference image.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError, DataError
from genforce_sim.fieldset import read_field_shard
from genforce_train.cache import Cache
from genforce_train.checkpoint import load_checkpoint
from genforce_train.models.field import PX_PER_MM, FieldNet
from genforce_train.models.refined import RefinedField
from genforce_train.sequences import maps_of, marker_images, mountings, upright_images
from genforce_train.training import Run, RunSettings, measure_norms, start, train_mode

NORM_BATCHES = 24
DOTS_PX_PER_MM = (24.3, 29.7)  # of models that do not say what they were trained on


class FieldSettings(RunSettings):
    """Settings of `genforce train field`."""

    data: str  # folder of the field suite
    out: str = "runs/train/field"
    init: str = ""  # checkpoint of `genforce train field` to begin from
    validation: int = Field(6, ge=1)  # shards (the last ones) that are not trained on
    steps: int = Field(6000, ge=1)
    batch: int = Field(32, ge=2)
    rest: float = Field(0.04, ge=0, lt=1)  # part of the samples without contact: zero everywhere
    mirror: bool = True
    warmup: int = Field(50, ge=0)
    settle: float = Field(0.5, gt=0, le=1)  # part of the training after which norms are constants
    evaluate_every: int = Field(500, ge=1)
    threads: int = Field(0, ge=0)


class FieldShards:
    """Samples of the field suite, memory-mapped."""

    def __init__(self, folder: str | Path, shards: slice) -> None:
        """Raises `DataError` where the folder holds none."""
        paths = sorted(path for path in (Path(folder) / "fields").glob("[0-9]*") if path.is_dir())
        self._shards = [read_field_shard(path) for path in paths[shards]]
        if not self._shards:
            raise DataError(
                f"{folder}: too few shards of fields; `genforce synth --suite field` makes them"
            )
        self._ends = np.cumsum([len(shard["masks"]) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def px_per_mm(self) -> tuple[float, float]:
        """Least and largest scale of their images."""
        scales = np.concatenate([shard["geometry"][:, 0] for shard in self._shards])
        return float(scales.min()), float(scales.max())

    def batch(self, samples: np.ndarray, rest: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Images (n, 2, 120, 160) and displacements (n, 3, 30, 40) mm at `PX_PER_MM`; where `rest`
        is true the reference stands for the mask, and nothing is displaced."""
        masks = np.empty((len(samples), 38400), np.uint8)
        references = np.empty_like(masks)
        fields = np.empty((len(samples), 3, 30, 40), np.float32)
        for row, sample in enumerate(samples):
            number = int(np.searchsorted(self._ends, sample, "right"))
            shard = self._shards[number]
            index = sample - (self._ends[number - 1] if number else 0)
            contact = shard["contact"][index]
            references[row] = shard["references"][contact]
            if rest is not None and rest[row]:
                masks[row], fields[row] = references[row], 0
                continue
            masks[row] = shard["masks"][index]
            scale = shard["geometry"][contact, 0] / PX_PER_MM
            fields[row] = shard["displacement"][index] * np.float32(1e-3 * scale)
        return marker_images(masks, references), torch.from_numpy(fields)


def mirror(images: Tensor, fields: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mirror a random half of the samples left-right, and up-down."""
    for axis, component in ((-1, 0), (-2, 1)):
        turned = torch.from_numpy(rng.random(len(images)) < 0.5)
        if turned.any():
            images[turned] = images[turned].flip(axis)
            flipped = fields[turned].flip(axis)
            flipped[:, component] *= -1
            fields[turned] = flipped
    return images, fields


def train(settings: FieldSettings, quiet: bool = False) -> dict[str, Any]:
    """Train, keep the checkpoints, and return the final metrics. Raises `GenforceError`."""
    start(settings)

    # --- data
    data = FieldShards(settings.data, slice(None, -settings.validation))
    held_out = FieldShards(settings.data, slice(-settings.validation, None))

    # --- model
    net = FieldNet()
    if settings.init:
        load_checkpoint(settings.init).restore_model(net)
    meta: dict[str, Any] = {
        "kind": "field",
        "model": "field",
        "px_per_mm": data.px_per_mm,
        "settled": False,
    }
    run = Run(settings, net, meta, quiet, restored=("settled",))

    # --- loop
    for step in run.steps():
        if run.finished >= settings.settle and not run.meta["settled"]:
            samples = (_samples(data, settings, number, 1)[0] for number in range(NORM_BATCHES))
            measure_norms(net, samples, run.device)
            run.meta["settled"] = True
        train_mode(run.model, run.meta["settled"])
        batch = _samples(data, settings, step, 0)
        images, fields = (run.share(tensor).to(run.device) for tensor in batch)
        with run.autocast():
            predicted = run.model(images)
        run.descend(field_loss(predicted, fields))
        if run.due:
            scores = run.once(partial(evaluate, net, held_out, run.device))
            run.keep(sum(scores["rmse_mm"].values()), scores)

    # --- scores
    metrics = {
        "seconds": run.seconds,
        "steps": run.meta["step"],
        "samples": len(data),
        "validation": run.restore_best()["scores"],
    }
    run.finish(metrics)
    return metrics


def field_loss(predicted: Tensor, fields: Tensor) -> Tensor:
    """Error per cell, and of means over ever larger parts of the image.

    Shear force is the mean displacement of a bonded layer times its area and shear modulus over
    its thickness (the compliance at wavenumber 0), so small errors that agree over the gel weigh
    more than large ones that do not.
    """
    error = predicted - fields
    loss = error.new_zeros(())
    for cells, beta in ((1, 0.02), (3, 0.01), (10, 0.005), ((30, 40), 0.002)):
        mean = functional.avg_pool2d(error, cells)
        loss = loss + functional.smooth_l1_loss(mean, torch.zeros_like(mean), beta=beta)
    return loss / 0.1


def evaluate(
    net: torch.nn.Module, data: FieldShards, device: torch.device, limit: int = 960
) -> dict[str, Any]:
    """Error of the field and of its mean over the image, per axis (mm RMS), beside the signal's."""
    net.eval()
    chosen = np.unique(np.linspace(0, len(data) - 1, limit).astype(int))
    error, signal, mean = np.zeros(3), np.zeros(3), np.zeros(3)
    with torch.inference_mode():
        for part in np.array_split(chosen, max(1, len(chosen) // 48)):
            images, fields = data.batch(part)
            predicted = net(images.to(device)).cpu()
            error += ((predicted - fields) ** 2).sum((0, 2, 3)).numpy()
            signal += (fields**2).sum((0, 2, 3)).numpy()
            mean += ((predicted - fields).mean((2, 3)) ** 2).sum(0).numpy()
    cells = len(chosen) * 30 * 40
    return {
        name: dict(zip("xyz", np.sqrt(total / count).tolist(), strict=True))
        for name, total, count in (
            ("rmse_mm", error, cells),
            ("signal_mm", signal, cells),
            ("mean_rmse_mm", mean, len(chosen)),
        )
    }


def _samples(
    data: FieldShards, settings: FieldSettings, number: int, stream: int
) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng([settings.seed, number, stream])
    rest = rng.random(settings.batch) < settings.rest
    images, fields = data.batch(rng.integers(len(data), size=settings.batch), rest)
    return mirror(images, fields, rng) if settings.mirror else (images, fields)


def load_field(checkpoint: str | Path, sha256: str = "") -> FieldNet:
    """The field model of a checkpoint, ready to run. Raises `DataError`, also where its weights
    are others than `sha256`, where given."""
    saved = load_checkpoint(checkpoint)
    if saved.meta.get("kind") != "field":
        raise DataError(f"{checkpoint}: a {saved.meta.get('kind')} checkpoint, expected a field's")
    if sha256 and saved.sha256() != sha256:
        raise DataError(
            f"{checkpoint}: trained anew since the force model that reads it; train that one again"
        )
    net = FieldNet()
    saved.restore_model(net)
    return net.eval()


def load_reader(checkpoint: str | Path, refinements: int, sha256: str = "") -> nn.Module:
    """What reads the displacement: the field model of a checkpoint, refined so many times by the
    markers that it misses. Raises `DataError` as `load_field`."""
    net = load_field(checkpoint, sha256)
    return RefinedField(net, refinements).eval() if refinements else net


def fields_of(
    checkpoint: str | Path,
    cache: Cache,
    sensors: Sequence[str],
    refinements: int = 0,
    sha256: str = "",
) -> np.ndarray:
    """Fields (frames + rest frames, 3, 30, 40) float16 mm of all frames of a cache, of their
    sensors as drawn: see `Registration.upright` and `load_reader`.

    Raises `DataError` where images of one of `sensors` are of quite another scale than the model's.
    """
    reader = load_reader(checkpoint, refinements, sha256)
    saved = load_checkpoint(checkpoint)
    low, high = saved.meta.get("px_per_mm", DOTS_PX_PER_MM)
    for sensor in sensors:
        with contextlib.suppress(ConfigError):  # a data set of others has no sensor files
            scale = load_sensor(sensor).px_per_mm
            if not low <= scale <= high:
                raise DataError(
                    f"{cache.folder}: {sensor} has {scale:g} px per mm, the field model reads "
                    f"{low:g} to {high:g}; train on sensors of that scale (sensors=...)"
                )
    made_of = hashlib.sha256(Path(checkpoint).read_bytes())
    mounted = [np.hstack(astuple(mounting)) for mounting in mountings(cache)]
    made_of.update(np.round(mounted, 6).tobytes())
    name = f"upright_{made_of.hexdigest()[:16]}" + f"_refined_{refinements}" * bool(refinements)
    return maps_of(cache, reader, (3, 30, 40), name, upright_images)


def summary(metrics: dict[str, Any]) -> str:
    """The metrics for people."""
    scores = metrics["validation"]
    rows = [
        f"{axis}  error {scores['rmse_mm'][axis]:.4f} mm RMS of {scores['signal_mm'][axis]:.4f}"
        for axis in "xyz"
    ]
    head = f"{metrics['steps']} steps on {metrics['samples']} samples in {metrics['seconds']:.0f} s"
    return "\n".join([head, *rows])
