"""The field model: a marker image and its own reference -> displacement of the gel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from genforce_train.models.force import ChangeMaps, smoothed

PX_PER_MM = 27.0  # scale of the 480x640 image at which the model's output is in mm


def _layer(channels: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


class FlowMaps(nn.Module):
    """Shift of the image by optical flow, without learning: (2, 120, 160) -> (2, 30, 40) px.

    The least squares of Lucas and Kanade over windows of 12x12 px. It is right for shifts of less
    than a marker's radius, and shows where there are larger ones.
    """

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 8.0, 28.0, 56.0, 70.0, 56.0, 28.0, 8.0, 1.0]) / 256
        self.taps: Tensor
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 2, 120, 160) -> (n, 2, 30, 40): along columns and rows, at most 4 px."""
        mask, still = smoothed(images, self.taps).split(1, 1)
        return _shift(functional.avg_pool2d(_terms(mask - still, still), 3, 1, 1))


class Misses(nn.Module):
    """How far markers lie from where a displacement puts them, without learning: marker image and
    reference carried along (2, 120, 160) -> (2, 30, 40) px.

    As `FlowMaps`, of images that nearly agree: slopes are those of both together, which errs in the
    second order alone, and windows are wide enough to say something of what lies between markers.
    """

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 8.0, 28.0, 56.0, 70.0, 56.0, 28.0, 8.0, 1.0]) / 256
        window = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.taps: Tensor
        self.window: Tensor
        self.register_buffer("taps", taps, persistent=False)
        self.register_buffer("window", window, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 2, 120, 160) -> (n, 2, 30, 40): along columns and rows, at most 4 px."""
        mask, carried = smoothed(images, self.taps).split(1, 1)
        return _shift(smoothed(_terms(mask - carried, (mask + carried) / 2), self.window))


DAMPING = 1e-4  # where there is no marker there is no shift


def _terms(change: Tensor, image: Tensor) -> Tensor:
    """What the least squares of Lucas and Kanade sum up, of 4x4 px: (n, 5, h / 4, w / 4)."""
    padded = functional.pad(image, (1, 1, 1, 1))
    x = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    y = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    return functional.avg_pool2d(torch.cat([x * x, y * y, x * y, -x * change, -y * change], 1), 4)


def _shift(terms: Tensor) -> Tensor:
    """Their solution (n, 2, ...) px."""
    xx, yy, xy, xt, yt = terms.split(1, 1)
    xx, yy = xx + DAMPING, yy + DAMPING
    determinant = xx * yy - xy * xy
    return (torch.cat([yy * xt - xy * yt, xx * yt - xy * xt], 1) / determinant).clamp(-4, 4)


class FieldNet(nn.Module):
    """Mask and reference (2, 120, 160) in 0..1 -> displacement x, y, z (3, 30, 40).

    It begins with what optical flow and the change maps say, and an hourglass corrects it: full
    detail where markers move by less than a cell, half and quarter for what lies between markers.
    The displacement is in mm at `PX_PER_MM`; an image of another scale shows the same shift in px,
    so its displacement is this times `PX_PER_MM / px_per_mm`.
    """

    size = (120, 160)
    channels = ("mask", "reference")

    def __init__(self, width: int = 40, deep: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(_layer(2, 16, 5, 2), _layer(16, width - 8, 3, 2))
        self.flow, self.changes = FlowMaps(), ChangeMaps()
        self.begin = nn.Sequential(nn.Conv2d(7, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.fine = _layer(width, width)
        self.medium = nn.Sequential(_layer(width, deep, 3, 2), _layer(deep, deep))
        self.coarse = nn.Sequential(_layer(deep, deep, 3, 2), _layer(deep, deep))
        self.from_coarse = _layer(deep, deep)
        self.from_medium = nn.Sequential(
            nn.Conv2d(deep, width, 1, bias=False), nn.BatchNorm2d(width)
        )
        self.join = _layer(width, width)
        self.head = nn.Conv2d(width, 3, 3, 1, 1)
        # Displacements are tenths of a millimetre: outputs of order one learn faster.
        self.unit_mm = 0.1

    def forward(self, images: Tensor) -> Tensor:
        """(n, 2, 120, 160) -> (n, 3, 30, 40) mm."""
        with torch.autocast(images.device.type, enabled=False):  # differences of near equals
            known = torch.cat([self.flow(images), self.changes(images)], 1)
        begin = self.begin(known)
        stem = self.stem(images.contiguous(memory_format=torch.channels_last))
        fine = torch.cat([stem, begin], 1)
        fine = fine + self.fine(fine)
        medium = self.medium(fine)
        wide = functional.interpolate(self.coarse(medium), size=(15, 20), mode="nearest")
        medium = medium + self.from_coarse(medium + wide)
        wide = functional.interpolate(self.from_medium(medium), size=(30, 40), mode="nearest")
        return self.head(self.join(fine + wide)).float() * self.unit_mm
