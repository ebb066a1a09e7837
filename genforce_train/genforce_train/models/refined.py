"""The field model, set right where its displacement can be seen to be wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genforce_train.models.field import FieldNet
from genforce_train.models.m2m import FieldTranslator


class RefinedField(nn.Module):
    """Marker image and reference of a sensor as drawn (2, 120, 160) in 0..1 -> displacement x, y, z
    (3, 30, 40) mm, as of `FieldNet`, after so many `refinements` by the markers that it misses.
    """

    size, channels = FieldNet.size, FieldNet.channels

    def __init__(self, net: FieldNet, refinements: int) -> None:
        super().__init__()
        self.refinements = refinements
        self.carrier = FieldTranslator()
        self.carrier.field = net
        self.drawn: Tensor
        drawn = self.carrier.placements(torch.zeros(1, 1, *self.size))
        self.register_buffer("drawn", drawn.detach())

    def forward(self, images: Tensor) -> Tensor:
        """(n, 2, 120, 160) -> (n, 3, 30, 40) mm."""
        return self.carrier.displacement(images, self.drawn, self.refinements)
