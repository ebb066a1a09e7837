"""The marker encoder: an autoencoder of marker images, whose latent says what a layout is like."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

_Net = TypeVar("_Net", bound=nn.Module)


def layer(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, group norm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(8, out), nn.SiLU()
    )


class MarkerEncoder(nn.Module):
    """Variational autoencoder: marker image (1, 120, 160) in 0..1 <-> latent (8, 15, 20)."""

    size = (120, 160)
    latent = 8

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.width = width
        self.stages = nn.ModuleList(
            [
                nn.Sequential(layer(1, width, 2), layer(width, width)),
                nn.Sequential(layer(width, 2 * width, 2), layer(2 * width, 2 * width)),
                nn.Sequential(layer(2 * width, 4 * width, 2), layer(4 * width, 4 * width)),
            ]
        )
        self.moments = nn.Conv2d(4 * width, 2 * self.latent, 1)
        up = nn.Upsample(scale_factor=2, mode="nearest")
        self.decoder = nn.Sequential(
            layer(self.latent, 4 * width),
            up,
            layer(4 * width, 2 * width),
            up,
            layer(2 * width, width),
            up,
            layer(width, width),
            nn.Conv2d(width, 1, 3, 1, 1),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, 1, 120, 160) -> what a drawn latent shows, mean and log variance (n, 8, 15, 20)."""
        mean, log_variance = self.encode(images)
        drawn = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(drawn), mean, log_variance

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 1, 120, 160) -> mean and log variance (n, 8, 15, 20)."""
        mean, log_variance = self.moments(self.features(images)[-1]).chunk(2, 1)
        return mean, log_variance.clamp(-20, 10)

    def features(self, images: Tensor) -> list[Tensor]:
        """What its stages see, from fine to coarse: what a perceptual loss compares."""
        found = []
        for stage in self.stages:
            images = stage(images)
            found.append(images)
        return found

    def blocks(self) -> list[nn.Module]:
        """What gradient checkpointing computes anew."""
        return [*self.stages]


def freeze(net: _Net) -> _Net:
    """The network as a constant: no gradients, evaluation mode."""
    net.requires_grad_(False)
    return net.eval()
