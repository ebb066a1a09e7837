"""Force models: one step a frame, state carried, normalised wrench out.

All take sequences `(b, t, c, h, w)` and a state, and give `(b, t, outputs)` and the next state;
a state of None is that of a stream that begins. `normalisation` says how outputs become N.
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class ForceModel(Protocol):
    """What training and export need of a force model."""

    size: tuple[int, int]  # height, width of its input
    channels: tuple[str, ...]  # what they are

    def __call__(self, images: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
    def step(self, image: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def features(self, images: Tensor) -> Tensor: ...
    def zero_state(self) -> Tensor: ...


def _layer(channels: int, out: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    ]


class _MapForceNet(nn.Module):
    """An encoder of frames to maps (c, 15, 20), and a wrench read from them with memory.

    Force is the integral of the traction and torque its moment, so the maps are averaged over the
    plane with the weights 1, x and y: whatever the place of a contact, it is read alike.
    """

    rows, columns = 15, 20

    def __init__(
        self, encoder: nn.Sequential, maps: int, hidden: int, outputs: int, encoded: int = 0
    ) -> None:
        """`encoded`: length of `features` (default: hidden)."""
        super().__init__()
        self.encoder = encoder
        y, x = torch.meshgrid(
            torch.linspace(1, -1, self.rows), torch.linspace(-1, 1, self.columns), indexing="ij"
        )
        basis = torch.stack([torch.ones_like(x), x, y]).flatten(1).T
        self.basis: Tensor
        self.register_buffer("basis", basis / math.sqrt(len(basis)), persistent=False)
        self.encode = nn.Sequential(
            nn.BatchNorm1d(3 * maps), nn.Linear(3 * maps, hidden), nn.ReLU()
        )
        self.recurrent = nn.GRU(encoded or hidden, hidden, batch_first=True)
        self.head = nn.Linear((encoded or hidden) + hidden, outputs)

    def forward(self, images: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(b, t, c, h, w) -> (b, t, outputs), (1, b, hidden)."""
        encoded = self.features(images.flatten(0, 1))
        return self._remember(encoded.view(*images.shape[:2], -1), state)

    def step(self, image: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One frame (1, c, h, w) -> (1, outputs), next state, features (1, k)."""
        features = self.features(image)
        force, state = self._remember(features[:, None], state)
        return force[:, 0], state, features

    def features(self, images: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, hidden): each frame by itself, before any memory."""
        maps = self.encoder(images.contiguous(memory_format=torch.channels_last)).float()
        return self.encode((maps.flatten(2) @ self.basis).flatten(1))

    def zero_state(self) -> Tensor:
        """State of one stream that begins."""
        return torch.zeros(1, 1, self.recurrent.hidden_size)

    def _remember(self, encoded: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        memory, state = self.recurrent(encoded, state)
        # What one frame shows goes straight to the head; the memory adds loading and relaxation.
        return self.head(torch.cat([encoded, memory], -1)), state


def smoothed(images: Tensor, taps: Tensor) -> Tensor:
    """Each channel of (n, c, h, w) smoothed by `taps` (k,) along both axes, zero outside.

    One axis after the other. ONNX Runtime does it as a convolution, in an eighth of the time of a
    square kernel; PyTorch is eight times as fast with one sum a tap."""
    channels, border = int(images.shape[1]), len(taps) // 2
    if torch.onnx.is_in_onnx_export():
        columns = taps.view(1, 1, -1, 1).repeat(channels, 1, 1, 1)
        images = functional.conv2d(images, columns, padding=(border, 0), groups=channels)
        rows = columns.transpose(2, 3)
        return functional.conv2d(images, rows, padding=(0, border), groups=channels)
    for axis in (2, 3):
        margin = (0, 0, border, border) if axis == 2 else (border, border, 0, 0)
        padded, size = functional.pad(images, margin), images.shape[axis]
        images = padded.narrow(axis, 0, size) * taps[0]
        for tap in range(1, len(taps)):
            images = images + padded.narrow(axis, tap, size) * taps[tap]
    return images


class ChangeMaps(nn.Module):
    """What moved, without learning: mask and reference (2, 120, 160) -> five maps (5, 30, 40).

    Change of the smoothed image; its size; change times the reference's slope along the columns
    and along the rows, whose ratio to the slope's square (the fifth map) is the shift that
    Lucas and Kanade's optical flow finds. Each is averaged over 4x4 px and scaled to order one.
    """

    odd: ClassVar = {-1: 2, -2: 3}  # the map that changes its sign when the scene is mirrored

    def __init__(self) -> None:
        super().__init__()
        self.taps: Tensor
        self.register_buffer("taps", torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 2, 120, 160) in 0..1 -> (n, 5, 30, 40)."""
        mask, still = smoothed(images, self.taps).split(1, 1)
        change = mask - still
        padded = functional.pad(still, (1, 1, 1, 1))
        slope_x = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
        slope_y = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
        maps = torch.cat(
            [
                4 * change,
                4 * change.abs(),
                16 * change * slope_x,
                16 * change * slope_y,
                16 * (slope_x * slope_x + slope_y * slope_y),
            ],
            1,
        )
        return functional.avg_pool2d(maps, 4)


class CompactForceNet(_MapForceNet):
    """Change maps (5, 30, 40) of a marker image -> wrench: for live use on one CPU core.

    Beside what convolutions find anywhere on the gel, it weighs each place by itself: a layout has
    more markers here than there, and a sensor's gel ends somewhere.
    """

    size = (30, 40)
    channels = ("change", "size", "along_x", "along_y", "slope")

    def __init__(self, outputs: int = 6, width: int = 16, deep: int = 40, hidden: int = 64) -> None:
        maps = len(self.channels)
        encoder = nn.Sequential(
            *_layer(maps, width, 3, 1, 1),
            *_layer(width, deep, 3, 2, 1),
        )
        super().__init__(encoder, deep, hidden, outputs, encoded=2 * hidden)
        self.norm = nn.BatchNorm2d(maps)
        self.places = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(maps * self.rows * self.columns, hidden),
            nn.BatchNorm1d(hidden),
        )

    def features(self, images: Tensor) -> Tensor:
        """(n, 5, 30, 40) -> (n, 2 hidden): each frame by itself, before any memory."""
        maps = self.norm(images)
        return torch.cat([super().features(maps), self.places(maps).float()], 1)


class FieldForceNet(_MapForceNet):
    """Gel displacement (3, 30, 40) in mm -> wrench; knows nothing of markers."""

    odd: ClassVar = {-1: 0, -2: 1}  # the component that changes its sign when the scene is mirrored

    size = (30, 40)
    channels = ("x", "y", "z")

    def __init__(self, outputs: int = 6, width: int = 32, deep: int = 48, hidden: int = 64) -> None:
        encoder = nn.Sequential(
            *_layer(3, width, 5, 2, 2),
            *_layer(width, deep, 3, 1, 1),
        )
        super().__init__(encoder, deep, hidden, outputs)


# --- the paper's model ------------------------------------------------------------------------


class _Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1),
            norm(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1),
            norm(out),
            nn.ReLU(),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


class _ConvGru(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(channels + hidden, 2 * hidden, 3, 1, 1)
        self.candidate = nn.Conv2d(channels + hidden, hidden, 3, 1, 1)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        update, reset = torch.sigmoid(self.gates(torch.cat([x, state], 1))).chunk(2, 1)
        candidate = torch.tanh(self.candidate(torch.cat([x, reset * state], 1)))
        return (1 - update) * state + update * candidate


class PaperForceNet(nn.Module):
    """The published architecture, 6.5 M parameters, for parity: mask (1, 256, 256) -> (0, 1)^3.

    Residual encoder (7x7 stride 2, 64; 64, 96 stride 2, 128 stride 2; instance norm), ConvGRU 128,
    residual 256 and 512 (stride 2, batch norm), average, linear, sigmoid.
    """

    size = (256, 256)
    channels = ("mask",)
    hidden = 128

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        norm = nn.InstanceNorm2d
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3),
            norm(64),
            nn.ReLU(),
            _Residual(64, 64, 1, norm),
            _Residual(64, 64, 1, norm),
            _Residual(64, 96, 2, norm),
            _Residual(96, 96, 1, norm),
            _Residual(96, 128, 2, norm),
            _Residual(128, 128, 1, norm),
            nn.Conv2d(128, 128, 1),
        )
        self.recurrent = _ConvGru(128, self.hidden)
        self.readout = nn.Sequential(
            _Residual(128, 256, 2, nn.BatchNorm2d),
            _Residual(256, 512, 2, nn.BatchNorm2d),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, outputs),
            nn.Sigmoid(),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Its inputs are normalised as the photographs of ImageNet are.
        self.mean: Tensor
        self.std: Tensor
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(b, t, 1, 256, 256) in 0..1 -> (b, t, outputs), (b, 128, 32, 32)."""
        batch, steps = images.shape[:2]
        features = self.encoder((images.flatten(0, 1) - self.mean) / self.std)
        features = features.view(batch, steps, *features.shape[1:])
        if state is None:
            state = torch.zeros_like(features[:, 0])
        states = []
        for step in range(steps):
            state = self.recurrent(features[:, step], state)
            states.append(state)
        wrench = self.readout(torch.stack(states, 1).flatten(0, 1))
        return wrench.view(batch, steps, -1), states[-1]

    def step(self, image: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One frame (1, 1, 256, 256) -> (1, outputs), next state, features (1, 128)."""
        maps = self.encoder((image - self.mean) / self.std)
        state = self.recurrent(maps, state)
        return self.readout(state), state, maps.mean((2, 3))

    def features(self, images: Tensor) -> Tensor:
        """(n, 1, 256, 256) -> (n, 128): the encoded frame, averaged over the plane."""
        return self.encoder((images - self.mean) / self.std).mean((2, 3))

    def blocks(self) -> list[nn.Module]:
        """What gradient checkpointing computes anew: the residual blocks."""
        return [module for module in self.modules() if isinstance(module, _Residual)]

    def zero_state(self) -> Tensor:
        """State of one stream that begins."""
        return torch.zeros(1, self.hidden, self.size[0] // 8, self.size[1] // 8)


# What a model reads is made from the marker image by its front end: change maps, a trained field
# model, or nothing.
MODELS: dict[str, type[nn.Module]] = {
    "compact": CompactForceNet,
    "paper": PaperForceNet,
    "field": FieldForceNet,
}


def parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad)
