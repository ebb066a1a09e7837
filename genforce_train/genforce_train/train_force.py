"""Train a force model: `genforce train force data=FOLDER [SETTINGS.yaml] [key=value ...]`.

Reads top to bottom: settings, data, model, loop, scores. Everything lands in `out`:
last.safetensors (with the optimiser: `resume=true` goes on from it, to the same result),
best.safetensors, metrics.json, curves/ (TensorBoard) and scatter pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from genforce_collect.errors import ConfigError, DataError
from genforce_train.borrow import borrowed_wrench, partners
from genforce_train.build import open_data
from genforce_train.cache import Cache, Split, split_contacts
from genforce_train.calibration import Calibration, carried_wrench
from genforce_train.checkpoint import load_checkpoint
from genforce_train.evaluate import AXES, Scores, scatter, score
from genforce_train.materials import ForceDepth, is_loading, ratios
from genforce_train.models.force import (
    MODELS,
    ChangeMaps,
    CompactForceNet,
    FieldForceNet,
    PaperForceNet,
)
from genforce_train.sequences import (
    MIRROR_SIGNS,
    FrameSource,
    MapSource,
    MarkerSource,
    Sequences,
    maps_of,
)
from genforce_train.train_field import fields_of
from genforce_train.training import Run, RunSettings, measure_norms, start, train_mode


class ForceSettings(RunSettings):
    """Settings of `genforce train force`."""

    data: str  # data set in the training layout, or bag, or folder of bags
    out: str = "runs/train/force"
    sensors: tuple[str, ...] = ()  # to train on; empty: all of the data set
    indenters: tuple[str, ...] = ()  # empty: all
    unseen: tuple[str, ...] = ()  # indenters kept for the final test
    few_shot: int | None = Field(None, ge=1)  # training contacts per indenter; none: all
    validation: float = Field(0.1, ge=0, lt=1)  # part of the contacts of seen indenters

    model: Literal["compact", "paper"] = "compact"
    input: Literal["markers", "field"] = "markers"  # field: read the gel's displacement instead
    field_model: str = ""  # checkpoint of `genforce train field`, for input=field
    field_sha256: str = ""  # of its weights, noted by the training
    refinements: int = Field(0, ge=0, le=4)  # of that displacement, by the markers that it misses
    init: str = ""  # checkpoint of `genforce train force` to begin from
    labels_of: str = ""  # sensor whose labels of the same contacts stand for those of the others
    calibration: str = ""  # data set of both sensors (`--plan slide`): carry those labels by it

    material: str = ""  # folder of force-depth coefficients: correct the labels by them
    material_target: str = ""  # sensor whose gel the labels shall be of
    material_start: float = Field(0.0, ge=0)  # normalised depth from which they are corrected
    material_weight: float = Field(1.0, ge=0, le=1)

    steps: int = Field(600, ge=1)
    frames: int = Field(128, ge=8)  # in a batch, whatever the length of its windows
    windows: tuple[int, ...] = (8, 16, 32)  # frames in a row; one is drawn a step
    rest_frames: int = Field(6, ge=0)  # without contact, before and after each contact
    mirror: bool = True  # also learn from the scene mirrored left-right and up-down
    settle: float = Field(0.5, gt=0, le=1)  # part of the training after which norms are constants
    torque_weight: float = Field(0.25, ge=0)  # of the loss of torques against that of forces


# Ranges of the published model's sigmoid outputs (N).
PAPER_LOW, PAPER_HIGH = (-5.0, -5.0, -20.0), (5.0, 5.0, 5.0)
NORM_BATCHES = 24
EVALUATION_LEAD = 6  # frames at rest before each contact that is evaluated


def train(settings: ForceSettings, quiet: bool = False) -> dict[str, Any]:
    """Train, keep the checkpoints, and return the final metrics. Raises `GenforceError`."""
    _check(settings)
    start(settings)
    if settings.input == "field":
        read_by = {"field_sha256": load_checkpoint(settings.field_model).sha256()}
        settings = settings.model_copy(update=read_by)

    # --- data
    cache = open_data(settings.data)
    cache.require_finite_labels()
    split = split_of(settings, cache)
    if not split.train:
        raise DataError(
            f"{settings.data}: no contact to train on; known sensors are "
            f"{', '.join(cache.sensors)}, indenters "
            f"{', '.join(sorted({key.indenter for key in cache.keys}))}"
        )
    wrench = training_labels(settings, cache, split.train + split.validation)
    sequences = Sequences.of(cache, split.train, settings.rest_frames, wrench)
    source = source_of(settings, cache)

    # --- model
    kind = "field" if settings.input == "field" else settings.model
    outputs = 3 if kind == "paper" else 6
    net = MODELS[kind](outputs=outputs)
    if settings.init:
        begun = load_checkpoint(settings.init)
        begun.restore_model(net)
        # In its own units what it has learned already is in newtons.
        offset, scale = np.array(begun.meta["offset"]), np.array(begun.meta["scale"])
    elif kind == "paper":
        offset = np.array(PAPER_LOW)
        scale = np.array(PAPER_HIGH) - offset
    else:
        labels = np.concatenate([wrench[cache.rows(row)] for row in split.train])
        offset, scale = np.zeros(6), np.maximum(np.sqrt((labels**2).mean(0)), 1e-6)
    meta: dict[str, Any] = {
        "kind": "force",
        "model": kind,
        "outputs": list(AXES[:outputs]),
        "scale": scale.tolist(),
        "offset": offset.tolist(),
        "sensors": sorted({cache.keys[row].sensor for row in split.train}),
        "settled": bool(settings.init),  # norms that were measured are kept
    }
    run = Run(settings, net, meta, quiet, restored=("settled",))
    weights = torch.tensor([1.0] * 3 + [settings.torque_weight] * (outputs - 3), device=run.device)

    # --- loop
    known = split.validation or split.train
    for step in run.steps():
        if run.finished >= settings.settle and not run.meta["settled"]:
            batches = _norm_batches(source, sequences, settings, scale, offset)
            measure_norms(net, batches, run.device)
            run.meta["settled"] = True
        train_mode(run.model, run.meta["settled"])
        rng = run.rng(step)
        length = int(rng.choice(settings.windows))
        batch = _batch(source, sequences, rng, settings, length, scale, offset)
        images, targets = (run.share(tensor).to(run.device) for tensor in batch)
        with run.autocast():
            predicted, _ = run.model(images)
        loss = functional.smooth_l1_loss(predicted.float(), targets, beta=0.1, reduction="none")
        run.descend((loss * weights).mean())
        if run.due:
            error = run.once(
                partial(_error, net, source, cache, known, run.meta, run.device, wrench)
            )
            run.keep(error)

    # --- scores
    run.restore_best()
    metrics: dict[str, Any] = {
        "seconds": run.seconds,
        "steps": run.meta["step"],
        "contacts": {name: len(getattr(split, name)) for name in ("train", "validation", "test")},
        "train_frames": int(sum(np.diff(cache.bounds)[split.train])),
        "problems": cache.problems,
    }
    for name in ("train", "validation", "test"):
        if rows := getattr(split, name):
            labels = judged_labels(settings, cache, rows)
            predicted, measured, rest = run.once(
                partial(predict, net, source, cache, rows, run.meta, run.device, labels)
            )
            metrics[name] = score(predicted, measured, rest).as_dict()
            if name != "train" and run.main:
                picture = run.out / f"scatter_{name}.png"
                scatter(picture, predicted, measured, f"{kind}, {name}")
    run.finish(metrics)
    return metrics


def predict(
    net: torch.nn.Module,
    source: FrameSource,
    cache: Cache,
    contacts: list[int],
    meta: dict[str, Any],
    device: torch.device | str = "cpu",
    wrench: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stream whole contacts: predicted (n, k) and measured (n, 6) in N and N m, and what is
    predicted at rest (m, k). `wrench` (frames, 6) stands for the measured, where given."""
    labels = np.array(cache.wrench) if wrench is None else wrench
    sequences = Sequences.of(cache, contacts, 0, labels)
    scale, offset = np.array(meta["scale"]), np.array(meta["offset"])
    predicted, measured, rest = [], [], []
    net.eval()
    with torch.inference_mode():
        for contact in range(len(contacts)):
            frames, sensors, wrench = sequences.whole(contact, EVALUATION_LEAD)
            images = source.images(frames[0], sensors.repeat(frames.shape[1]))[None].to(device)
            output = net(images)[0][0].float().cpu().numpy() * scale + offset
            predicted.append(output[EVALUATION_LEAD:])
            measured.append(wrench[0, EVALUATION_LEAD:])
            rest.append(output[EVALUATION_LEAD // 2 : EVALUATION_LEAD])
    return np.concatenate(predicted), np.concatenate(measured), np.concatenate(rest)


def _batch(
    source: FrameSource,
    sequences: Sequences,
    rng: np.random.Generator,
    settings: ForceSettings,
    length: int,
    scale: np.ndarray,
    offset: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """Windows (b, t, c, h, w) and their normalised wrench (b, t, 6), mirrored at random."""
    count = max(1, settings.frames // length)
    frames, sensors, wrench = sequences.windows(rng, count, length)
    images = source.images(frames.ravel(), sensors.repeat(length))
    images = images.view(count, length, *images.shape[1:])
    for axis, signs in MIRROR_SIGNS.items():
        if settings.mirror and (turned := rng.random(count) < 0.5).any():
            images[turned] = source.mirror(images[turned].flatten(0, 1), axis).view_as(
                images[turned]
            )
            wrench[turned] *= signs
    axes = len(scale)
    return images, torch.from_numpy(((wrench[..., :axes] - offset) / scale).astype(np.float32))


def _norm_batches(
    source: FrameSource,
    sequences: Sequences,
    settings: ForceSettings,
    scale: np.ndarray,
    offset: np.ndarray,
) -> Iterator[Tensor]:
    for number in range(NORM_BATCHES):
        rng = np.random.default_rng([settings.seed, number, 1])
        yield _batch(source, sequences, rng, settings, 16, scale, offset)[0]


def split_of(settings: ForceSettings, cache: Cache) -> Split:
    """Which contacts are for training, validation and test."""
    chosen = cache.select(settings.sensors or None, settings.indenters or None)
    return split_contacts(
        cache, chosen, settings.seed, settings.validation, settings.unseen, settings.few_shot
    )


def source_of(settings: ForceSettings, cache: Cache) -> FrameSource:
    """The inputs a model with these settings reads."""
    if settings.input == "field":
        sensors = settings.sensors or tuple(cache.sensors)
        fields = fields_of(
            settings.field_model, cache, sensors, settings.refinements, settings.field_sha256
        )
        return MapSource(fields, FieldForceNet.odd)
    if settings.model == "paper":
        return MarkerSource(cache, PaperForceNet.size)
    shape = (len(CompactForceNet.channels), *CompactForceNet.size)
    return MapSource(maps_of(cache, ChangeMaps(), shape, "change_maps"), ChangeMaps.odd)


def training_labels(settings: ForceSettings, cache: Cache, contacts: list[int]) -> np.ndarray:
    """Wrench of all frames (n, 6); for these contacts borrowed from their pairs on `labels_of`,
    and corrected for the target's gel, where the settings say so."""
    wrench = np.array(cache.wrench)
    taken = {row: row for row in contacts}  # contact whose labels it has
    if settings.labels_of:
        borrowers = [row for row in contacts if cache.keys[row].sensor != settings.labels_of]
        taken |= dict(zip(borrowers, partners(cache, borrowers, settings.labels_of), strict=True))
        carried = _carry(settings, cache) if settings.calibration else borrowed_wrench
        for row in borrowers:
            wrench[cache.rows(row)] = carried(cache, row, taken[row])
    for row in contacts:
        if not np.isfinite(wrench[cache.rows(row)]).all():
            raise DataError(f"{cache.folder}: {cache.keys[row]} has labels that are no numbers")
    if not settings.material:
        return wrench
    target = ForceDepth.read(settings.material, settings.material_target)
    # The gel that was pressed; a translated contact keeps the labels of its source.
    gels = {
        row: cache.sources[taken[row]].get("labels_of", cache.keys[taken[row]].sensor)
        for row in contacts
    }
    curves = {gel: ForceDepth.read(settings.material, gel) for gel in set(gels.values())}
    for row in contacts:
        if gels[row] == settings.material_target:
            continue
        frames = cache.rows(row)
        depth = np.array(cache.array("depth")[frames])
        if not np.isfinite(depth).all():
            raise DataError(f"{cache.folder}: {cache.keys[row]} has no depth to correct labels by")
        wrench[frames] *= ratios(
            curves[gels[row]],
            target,
            depth,
            is_loading(depth, np.array(cache.array("phase")[frames])),
            settings.material_start,
            settings.material_weight,
        )[:, None]
    return wrench


def judged_labels(settings: ForceSettings, cache: Cache, contacts: list[int]) -> np.ndarray:
    """Wrench of all frames (n, 6) by which predictions for these contacts are judged: as measured,
    or as it would be of the gel that the model was trained for. Never a borrowed one."""
    if settings.labels_of or not settings.material:
        return np.array(cache.wrench)
    return training_labels(settings, cache, contacts)


def _carry(settings: ForceSettings, cache: Cache) -> Callable[[Cache, int, int], np.ndarray]:
    """As `borrowed_wrench`, but what the borrowing sensor itself would have measured."""
    contacts = open_data(settings.calibration)
    sensors = {settings.labels_of, *(settings.sensors or cache.sensors)}
    known = {sensor: Calibration.fit(contacts, sensor) for sensor in sorted(sensors)}

    def carried(cache: Cache, contact: int, partner: int) -> np.ndarray:
        sensor = cache.keys[contact].sensor
        return carried_wrench(cache, contact, partner, known[settings.labels_of], known[sensor])

    return carried


def _error(
    net: torch.nn.Module,
    source: FrameSource,
    cache: Cache,
    contacts: list[int],
    meta: dict[str, Any],
    device: torch.device,
    wrench: np.ndarray,
) -> float:
    """What decides which checkpoint is best: mean absolute error of forces over their scale."""
    predicted, measured, _ = predict(net, source, cache, contacts, meta, device, wrench)
    error = abs(predicted[:, :3] - measured[:, :3]).mean(0) / np.array(meta["scale"])[:3]
    return float(error.mean())


def _check(settings: ForceSettings) -> None:
    if settings.calibration and (settings.material or not settings.labels_of):
        raise ConfigError(
            "calibration carries the labels of labels_of=SENSOR; give it, and no material"
        )
    if settings.input == "field" and not settings.field_model:
        raise ConfigError("input=field needs field_model=CHECKPOINT of `genforce train field`")
    if settings.refinements and settings.input != "field":
        raise ConfigError("refinements are of the displacement; give input=field, or 0 of them")
    if settings.input == "field" and settings.model != "compact":
        raise ConfigError("input=field has its own model; leave model=compact")


def summary(metrics: dict[str, Any]) -> str:
    """The metrics for people."""
    lines = [f"{metrics['steps']} steps in {metrics['seconds']:.0f} s"]
    for name in ("train", "validation", "test"):
        if name in metrics:
            lines += [name, *(f"  {line}" for line in Scores(**metrics[name]).lines())]
    return "\n".join(lines)
