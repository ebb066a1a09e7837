"""Train a marker-to-marker model: `genforce train m2m data=FOLDER [SETTINGS.yaml] [key=value ...]`.

Reads top to bottom: settings, pairs, model, loop, scores. `data` is a data set of at least two
sensors with one plan, or the simulated grid (`runs/synth/pretrain/sim`) to pretrain on; `init`
goes on from a model that is there, with other sensors. Everything lands in `out`, as for force.
"""

from __future__ import annotations

from functools import partial
from itertools import permutations
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from genforce_collect.errors import ConfigError, DataError
from genforce_train.losses import hinge, image_loss, perceptual_loss, pixel_places, place_loss
from genforce_train.models.encoder import MarkerEncoder, freeze
from genforce_train.models.m2m import CompactTranslator, Translator
from genforce_train.models.sd_turbo import ClipDiscriminator, SdTurboTranslator
from genforce_train.pairs import Pairs, read_pairs
from genforce_train.train_encoder import load_encoder
from genforce_train.training import Run, RunSettings, start, train_mode
from genforce_train.translate import know_sensor, load_m2m, translate, translator_by
from genforce_train.translations import TranslationScores, score_translations

CHECKED = 40  # moments a pair of sensors that tell during training which checkpoint is best


class M2mSettings(RunSettings):
    """Settings of `genforce train m2m`."""

    data: str  # data set in the training layout, or the simulated grid
    out: str = "runs/train/m2m"
    sensors: tuple[str, ...] = ()  # to translate between; empty: all of the data set
    indenters: tuple[str, ...] = ()  # empty: all
    unseen: tuple[str, ...] = ()  # indenters kept for the final test
    few_shot: int | None = Field(None, ge=1)  # paired contacts per indenter; none: all
    validation: float = Field(0.1, ge=0, lt=1)  # part of the contacts of seen indenters

    backbone: Literal["field", "compact", "sd_turbo"] = "field"
    init: str = ""  # checkpoint of `genforce train m2m` to begin from
    field_model: str = "models/field/field.safetensors"  # what backbone=field begins from
    encoder: str = ""  # checkpoint of `genforce train encoder`: how generators see references
    width: int = Field(24, ge=8, multiple_of=8)  # channels of backbone=compact
    weights: str = "stabilityai/sd-turbo"  # folder or hub name, of backbone=sd_turbo
    side: int = Field(256, ge=32)  # of its square images
    vae_rank: int = Field(4, ge=1)
    unet_rank: int = Field(8, ge=1)
    discriminator: str = ""  # CLIP weights, folder or hub name; empty: no adversarial loss

    steps: int = Field(400, ge=1)
    batch: int = Field(16, ge=1)
    rest: float = Field(0.1, ge=0, lt=1)  # part of the samples that show both references
    place: float = Field(0.05, gt=0)  # weight of a px by which backbone=field misplaces a marker
    perceptual: float = Field(0.0, ge=0)  # weight of the loss in the encoder's features
    adversarial: float = Field(0.5, ge=0)  # weight of the loss against the discriminator
    learning_rate: float = Field(1e-3, gt=0)
    network_rate: float = Field(1.0, ge=0)  # of a pretrained network, against learning_rate
    evaluate_every: int = Field(100, ge=1)


def train(settings: M2mSettings, quiet: bool = False) -> dict[str, Any]:
    """Train, keep the checkpoints, and return the final metrics. Raises `GenforceError`."""
    start(settings)

    # --- pairs
    pairs = pairs_of(settings)

    # --- model
    encoder = load_encoder(settings.encoder) if settings.encoder else None
    if settings.perceptual and encoder is None:
        raise ConfigError("perceptual needs encoder=CHECKPOINT, whose features it compares")
    net = _new_net(settings, pairs, encoder)
    rival = ClipDiscriminator(settings.discriminator) if settings.discriminator else None
    eye = freeze(encoder) if encoder is not None else None
    meta: dict[str, Any] = {
        "kind": "m2m",
        "model": settings.backbone,
        "sensors": list(pairs.sensors),
        "shape": net.shape(),
    }
    run = Run(settings, net, meta, quiet, net.groups(settings.network_rate), rival)

    # --- loop
    places = pixel_places(net.size).to(run.device)
    known = "validation" if len(pairs.uses["validation"]) else "train"
    for step in run.steps():
        train_mode(run.model, settled=True)  # a pretrained network keeps its norms
        drawn = pairs.draw(run.rng(step), settings.batch, settings.rest)
        images = pairs.inputs(*map(run.share, drawn)).to(run.device)
        source, reference, target = images[:, :2], images[:, 2:3], images[:, 3:]
        if net.carries:  # the places of its pixels tell where each marker was taken from
            reference = torch.cat([reference, places.expand(len(images), -1, -1, -1)], 1)
        with run.autocast():
            translated = run.model(source, reference)
        translated, origins = translated.float().split([1, translated.shape[1] - 1], 1)
        if net.carries:
            moves = pairs.moves(*map(run.share, drawn[1:])).to(run.device)
            loss = settings.place * place_loss(origins, moves)
        else:
            loss = image_loss(translated, target)
        if eye is not None and settings.perceptual:
            loss = loss + settings.perceptual * perceptual_loss(eye.features, translated, target)
        if run.rival_model is not None:
            loss = loss - settings.adversarial * run.rival_model(translated).mean()
        run.descend(loss)
        if run.rival_model is not None:
            made = run.rival_model(translated.detach())
            run.descend(hinge(run.rival_model(target), made), rival=True)
        if run.due:
            scores = run.once(partial(evaluate, net, pairs, known, CHECKED))["mean"]
            run.keep(scores["rms_px"], scores)

    # --- scores
    run.restore_best()
    metrics: dict[str, Any] = {"seconds": run.seconds, "steps": run.meta["step"]}
    for use in ("validation", "test"):
        if len(pairs.uses[use]):
            metrics[use] = run.once(partial(evaluate, net, pairs, use))
    run.finish(metrics)
    return metrics


def pairs_of(settings: M2mSettings) -> Pairs:
    """The pairs that a model with these settings is trained and judged on. Raises `DataError`."""
    return read_pairs(
        settings.data,
        settings.sensors,
        settings.indenters,
        settings.unseen,
        settings.few_shot,
        settings.validation,
        settings.seed,
    )


def evaluate(net: Translator, pairs: Pairs, use: str, at_most: int | None = None) -> dict[str, Any]:
    """Scores of every ordered pair of sensors, and their mean. `use`: "all", or one of
    `Pairs.uses`; of about `at_most` moments a pair, spread evenly. Raises `DataError` where there
    are none."""
    scores: dict[str, Any] = {}
    for source, target in permutations(range(len(pairs.sensors)), 2):
        moments = pairs.of(source, target, use)
        moments = moments[:: max(1, len(moments) // at_most) if at_most else 1]
        if len(moments):
            name = f"{pairs.sensors[source]}-{pairs.sensors[target]}"
            scores[name] = evaluate_pair(net, pairs, source, target, moments).as_dict()
    if not scores:
        raise DataError(f"no pair for {use} with these settings; choose another use")
    mean = {
        name: float(np.mean([pair[name] for pair in scores.values()]))
        for name in next(iter(scores.values()))
    }
    return {"mean": mean, **scores}


def evaluate_pair(
    net: Translator, pairs: Pairs, source: int, target: int, moments: np.ndarray
) -> TranslationScores:
    """Scores of translations from one sensor to another at these moments."""
    reference, own = pairs.references[target], pairs.references[source]
    true = pairs.images(np.full(len(moments), target), moments)
    masks = pairs.images(np.full(len(moments), source), moments)
    translated = translate(net, masks, own, reference)
    return score_translations(reference, [(translated, true)])


def _new_net(
    settings: M2mSettings, pairs: Pairs, encoder: MarkerEncoder | None = None
) -> Translator:
    net: Translator
    if settings.init:
        net, meta = load_m2m(settings.init)
        if meta["model"] != settings.backbone:
            raise ConfigError(
                f"init={settings.init} has backbone {meta['model']}: give backbone={meta['model']}"
            )
    elif settings.backbone == "field":
        net = translator_by(settings.field_model)
    elif settings.backbone == "compact":
        net = CompactTranslator(settings.width, encoder=encoder)
    else:
        net = SdTurboTranslator(
            settings.weights,
            settings.side,
            settings.vae_rank,
            settings.unet_rank,
            encoder=encoder,
        )
    for sensor, reference in zip(pairs.sensors, pairs.references, strict=True):
        know_sensor(net, sensor, reference)
    return net


def summary(metrics: dict[str, Any]) -> str:
    """The metrics for people."""
    lines = [f"{metrics['steps']} steps in {metrics['seconds']:.0f} s"]
    for use in ("validation", "test"):
        for name, scores in metrics.get(use, {}).items():
            lines.append(f"{use} {name}: {TranslationScores(**scores).line()}")
    return "\n".join(lines)
