"""Train the marker encoder: `genforce train encoder data=FOLDER [SETTINGS.yaml] [key=value ...]`.

`data` holds marker images of any kind: the simulated grid (`runs/synth/pretrain/sim`) or a data set
in the training layout. The encoder is then the frozen eye through which the generators of
`genforce train m2m` (encoder=...) see references.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from genforce_collect.errors import DataError
from genforce_train.checkpoint import load_checkpoint
from genforce_train.losses import kl_divergence
from genforce_train.models.encoder import MarkerEncoder
from genforce_train.pairs import open_images
from genforce_train.sequences import area_images
from genforce_train.training import Run, RunSettings, start

EVALUATION_IMAGES = 256


class EncoderSettings(RunSettings):
    """Settings of `genforce train encoder`."""

    data: str  # the simulated grid, or a data set in the training layout
    out: str = "runs/train/encoder"
    unseen: tuple[str, ...] = ()  # indenters kept for validation; empty: a tenth of the contacts
    steps: int = Field(1000, ge=1)
    batch: int = Field(32, ge=1)
    width: int = Field(24, ge=8, multiple_of=8)  # channels of its first stage
    learning_rate: float = Field(2e-3, gt=0)
    kl: float = Field(1e-6, ge=0)  # weight of the Kullback-Leibler divergence
    evaluate_every: int = Field(200, ge=1)


def train(settings: EncoderSettings, quiet: bool = False) -> dict[str, Any]:
    """Train, keep the checkpoints, and return the final metrics. Raises `GenforceError`."""
    start(settings)

    # --- images
    cache = open_images(settings.data)
    seen = [row for row, key in enumerate(cache.keys) if key.indenter not in settings.unseen]
    held = sorted(set(range(len(cache))) - set(seen)) or seen[::10]
    learned, known = (
        np.concatenate([np.r_[cache.rows(row)] for row in rows] or [np.empty(0, int)])
        for rows in (sorted(set(seen) - set(held)), held)
    )
    if not len(learned):
        raise DataError(f"{settings.data}: no image left to train on; all indenters are unseen")
    references = area_images(np.stack([cache.reference(name) for name in cache.sensors]))

    # --- model
    net = MarkerEncoder(settings.width)
    meta: dict[str, Any] = {"kind": "encoder", "model": "encoder", "width": settings.width}
    run = Run(settings, net, meta, quiet)

    # --- loop
    for step in run.steps():
        run.model.train()
        rows = run.share(run.rng(step).choice(learned, settings.batch))
        images = torch.from_numpy(cache.images(rows))[:, None].to(run.device)
        with run.autocast():
            shown, mean, log_variance = run.model(images)
        shown = shown.float()
        loss = functional.l1_loss(shown, images) + functional.mse_loss(shown, images)
        run.descend(loss + settings.kl * kl_divergence(mean.float(), log_variance.float()))
        if run.due:
            chosen = known[:: max(1, len(known) // EVALUATION_IMAGES)]
            images = torch.cat([torch.from_numpy(cache.images(chosen)), references])[:, None]
            scores = run.once(partial(evaluate, net, images.to(run.device)))
            run.keep(scores["l1"], scores)

    # --- scores
    metrics = {
        "seconds": run.seconds,
        "steps": run.meta["step"],
        "images": len(learned),
        "validation": run.restore_best()["scores"],
    }
    run.finish(metrics)
    return metrics


def evaluate(net: MarkerEncoder, images: Tensor) -> dict[str, float]:
    """How well the mean of the latent shows images (n, 1, 120, 160) again."""
    net.eval()
    with torch.inference_mode():
        shown = torch.cat([net.decoder(net.encode(part)[0]) for part in images.split(32)])
    ours, own = shown > 0.5, images > 0.5
    return {
        "l1": float(functional.l1_loss(shown, images)),
        "rmse": float(functional.mse_loss(shown, images).sqrt()),
        "iou": float((ours & own).sum() / (ours | own).sum().clamp(min=1)),
    }


def load_encoder(checkpoint: str | Path) -> MarkerEncoder:
    """The encoder of a checkpoint, ready to run. Raises `DataError`."""
    saved = load_checkpoint(checkpoint)
    if saved.meta.get("kind") != "encoder":
        raise DataError(
            f"{checkpoint}: a {saved.meta.get('kind')} checkpoint, expected an encoder's"
        )
    net = MarkerEncoder(saved.meta["width"])
    saved.restore_model(net)
    return net.eval()


def summary(metrics: dict[str, Any]) -> str:
    """The metrics for people."""
    scores = metrics["validation"]
    return (
        f"{metrics['steps']} steps on {metrics['images']} images in {metrics['seconds']:.0f} s\n"
        f"validation: L1 {scores['l1']:.4f}, RMSE {scores['rmse']:.4f}, IoU {scores['iou']:.3f}"
    )
