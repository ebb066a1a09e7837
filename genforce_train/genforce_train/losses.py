"""Losses of translated marker images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from genforce_collect.layout import HEIGHT, WIDTH

# Maps (n, c, h, w) of an image (n, 1, h, w), from fine to coarse.
Features = Callable[[Tensor], list[Tensor]]


def image_loss(translated: Tensor, target: Tensor) -> Tensor:
    """Mean square difference, sharp and of coarser images: what is a marker's width off is still
    drawn to its place."""
    loss = functional.mse_loss(translated, target)
    for cells in (2, 4):
        change = functional.avg_pool2d(translated - target, 2 * cells, cells)
        loss = loss + change.square().mean()
    return loss


def place_loss(origins: Tensor, moves: Tensor) -> Tensor:
    """How far off markers are put (px): `origins` (n, 2, h, w) says where what a pixel shows
    rested, as `pixel_places` counts, and `moves` (n, m, 4) is as of `Pairs.moves`."""
    known = torch.isfinite(moves).all(2)
    rest, stands = torch.nan_to_num(moves).split(2, 2)
    size = moves.new_tensor([WIDTH, HEIGHT])
    grid = (stands + 0.5) / size * 2 - 1
    found = functional.grid_sample(origins, grid[:, None], align_corners=False)[:, :, 0]
    error = (found.transpose(1, 2) - rest) * known[..., None]
    loss = functional.smooth_l1_loss(error, torch.zeros_like(error), reduction="sum")
    return loss / known.sum().clamp(min=1)


def pixel_places(size: tuple[int, int]) -> Tensor:
    """(1, 2, h, w): u and v (px of the whole image) of the pixels of an image of this size."""
    v = (torch.arange(size[0]) + 0.5) * (HEIGHT / size[0]) - 0.5
    u = (torch.arange(size[1]) + 0.5) * (WIDTH / size[1]) - 0.5
    return torch.stack(torch.meshgrid(v, u, indexing="ij")[::-1])[None]


def perceptual_loss(features: Features, translated: Tensor, target: Tensor) -> Tensor:
    """Distance in the feature maps of a network, each cell's channels scaled to length one (LPIPS,
    Zhang et al. 2018, with equal weights). The network is the caller's choice."""
    loss = translated.new_zeros(())
    for ours, wanted in zip(features(translated), features(target), strict=True):
        difference = functional.normalize(ours, dim=1) - functional.normalize(wanted, dim=1)
        loss = loss + difference.square().sum(1).mean()
    return loss


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """Loss of a discriminator: real images above 1, made ones below -1."""
    return torch.relu(1 - real).mean() + torch.relu(1 + made).mean()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of normal distributions from the standard one, summed over a sample, mean over the batch."""
    terms = mean.square() + log_variance.exp() - 1 - log_variance
    return 0.5 * terms.flatten(1).sum(1).mean()
