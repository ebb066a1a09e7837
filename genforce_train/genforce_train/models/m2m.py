"""Marker-to-marker models: what a target sensor would see of a contact that a source sensor sees.

All have one interface, `forward(source, target_reference)`: the source's marker image and its
reference (n, 2, h, w), and the target's reference (n, 1, h, w), in 0..1 -> the target's marker
image (n, 1, h, w). One model serves all pairs; the target is chosen by its reference image.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from genforce_collect.layout import HEIGHT, WIDTH
from genforce_train.drawing import Drawing
from genforce_train.models.encoder import MarkerEncoder, freeze, layer
from genforce_train.models.field import PX_PER_MM, FieldNet, Misses


class Translator(nn.Module):
    """What training, translation and export need of a marker-to-marker model."""

    size: ClassVar[tuple[int, int]] = (HEIGHT // 4, WIDTH // 4)
    carries: ClassVar[bool] = False  # markers of the reference, and further channels of it too

    def forward(self, source: Tensor, target_reference: Tensor) -> Tensor:
        """(n, 2, h, w), (n, 1, h, w) -> (n, 1, h, w); see the module."""
        raise NotImplementedError

    def whole(self, source: Tensor, target_reference: Tensor) -> Tensor:
        """The same at full size: (n, 2, h, w) and the target's reference (n, 1, 480, 640) ->
        (n, 1, 480, 640), marker where it is above 0.5."""
        small = self(source, functional.adaptive_avg_pool2d(target_reference, self.size))
        return functional.interpolate(
            small, size=(HEIGHT, WIDTH), mode="bilinear", align_corners=False
        )

    def know(self, reference: Tensor, drawing: Drawing) -> None:
        """Take note of a sensor: its reference (h, w), and what else is known of it."""

    def bind(self, source_reference: Tensor, target_reference: Tensor) -> None:
        """Serve this one pair from now on, whatever the references given look like: what depends
        on them (1, 1, h, w) alone is a constant, as in an exported graph."""

    def shape(self) -> dict[str, Any]:
        """Arguments that make a network of the same shape."""
        return {}

    def groups(self, network_rate: float) -> list[dict[str, Any]]:
        """Parameters with their part (`ratio`) of the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]


class Placements(nn.Module):
    """How each known sensor shows its gel, found again by its reference image.

    A sensor's row says how a point of the gel (x right, y down, mm) comes to stand in the image:
    `centre + px_per_mm * (turn @ point) * (1 + radial r²) + shift` with r in half diagonals, how
    far its camera is, and how much its gel yields against the others' at the same contact. Rows
    begin at what the sensor file and the reference's registration with it say, and are learned
    from pairs. A reference that is none of the known stands for a sensor as drawn.
    """

    key_size = (30, 40)
    nearness = 0.01  # mean square difference of references up to which they are one sensor's

    def __init__(self, sensors: int = 0) -> None:
        super().__init__()
        self.keys: Tensor
        self.drawn: Tensor
        self.register_buffer("keys", torch.zeros(sensors, self.key_size[0] * self.key_size[1]))
        # px per mm, camera distance in mm, radial
        self.register_buffer("drawn", torch.zeros(sensors, 3))
        # turn - 1 (4), shift (2) as part of the half width, log of lateral and normal yield
        self.learned = nn.Parameter(torch.zeros(sensors, 8))

    def forward(self, references: Tensor) -> Tensor:
        """References (n, 1, h, w) -> (n, 11): px per mm, camera distance in mm, radial, learned."""
        with torch.autocast(references.device.type, enabled=False):  # hundredths of a px count
            distance = (self._keys(references)[:, None] - self.keys).square().mean(2)
            stranger = distance.new_full((len(distance), 1), self.nearness)
            weights = (torch.cat([distance, stranger], 1) * (-40 / self.nearness)).softmax(1)
            known = torch.cat([self.drawn, self.learned], 1)
            return weights @ torch.cat([known, known.new_tensor([self._row(Drawing())])])

    @torch.no_grad()
    def know(self, reference: Tensor, drawing: Drawing) -> None:
        """Take note of a sensor by its reference (h, w), unless it is known."""
        key = self._keys(reference[None, None])
        if len(self.keys) and (self.keys - key).square().mean(1).min() < self.nearness:
            return
        self.keys = torch.cat([self.keys, key])
        row = self.drawn.new_tensor([self._row(drawing)])
        drawn, begin = row.split([self.drawn.shape[1], self.learned.shape[1]], 1)
        self.drawn = torch.cat([self.drawn, drawn])
        self.learned = nn.Parameter(torch.cat([self.learned, begin]))

    @staticmethod
    def _row(drawing: Drawing) -> list[float]:
        mounting = drawing.mounting
        cos, sin = (mounting.scale * part(mounting.turn_rad) for part in (math.cos, math.sin))
        shift = (part / (WIDTH / 2) for part in mounting.shift_px)
        drawn = drawing.px_per_mm, drawing.camera_distance_mm, mounting.radial
        return [*drawn, cos - 1, -sin, sin, cos - 1, *shift, 0.0, 0.0]

    def _keys(self, references: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(references, self.key_size).flatten(1)


class FieldTranslator(Translator):
    """Estimates how the gel is displaced and carries the target's own markers along with it.

    A marker of the target that rests at gel point X stands, displaced by u, where the camera sees
    X + u. The image is made the other way: for each pixel the X that came to stand there, from
    which the reference is read. X solves `X = P (1 + u_z / distance) - u(X)`, P being the gel point
    behind the pixel at rest; the iteration contracts as long as the gel does not fold.

    What the network says is set right where it can be seen to be wrong: the source's own reference
    is carried along too, and where its markers then miss those of the image, the displacement
    changes by that much; twice, as the first time finds a part of what is missed by much.
    """

    carries = True
    # Points for which X is solved, and how often; from grid to grid, and at last to the image, it
    # is interpolated.
    grids = ((30, 40), (60, 80))
    iterations = (3, 2)
    refinements = 2  # one in training: what it leaves tells the network more

    def __init__(self, sensors: int = 0) -> None:
        super().__init__()
        self.field = FieldNet()
        self.misses = Misses()
        self.placements = Placements(sensors)
        self._bound: tuple[Tensor, Tensor] | None = None
        self.coarse: Tensor
        self.fine: Tensor
        for name, grid in zip(("coarse", "fine"), self.grids, strict=True):
            self.register_buffer(name, _pixels(grid), persistent=False)

    def forward(self, source: Tensor, target_reference: Tensor) -> Tensor:
        """See `Translator`; further channels of the reference are carried along with it."""
        return carry(target_reference, self.origins(source, target_reference[:, :1]))

    def whole(self, source: Tensor, target_reference: Tensor) -> Tensor:
        """See `Translator`; the markers keep their sharp outlines."""
        small = functional.avg_pool2d(target_reference, HEIGHT // self.size[0])
        return carry(target_reference, self.origins(source, small))

    def know(self, reference: Tensor, drawing: Drawing) -> None:
        """See `Translator`."""
        self.placements.know(reference, drawing)

    def bind(self, source_reference: Tensor, target_reference: Tensor) -> None:
        """See `Translator`."""
        with torch.no_grad():
            self._bound = self.placements(source_reference), self.placements(target_reference)

    def shape(self) -> dict[str, Any]:
        """See `Translator`."""
        return {"sensors": len(self.placements.keys)}

    def groups(self, network_rate: float) -> list[dict[str, Any]]:
        """See `Translator`; `network_rate`: of the pretrained network."""
        return [
            {"params": [self.placements.learned], "ratio": 3.0, "weight_decay": 0.0},
            {"params": list(self.field.parameters()), "ratio": network_rate},
        ]

    def origins(self, source: Tensor, target_reference: Tensor) -> Tensor:
        """How far from each point of the target's image the marker rests that stands there:
        (n, 2, 60, 80), along columns and rows, as part of the half width of the image."""
        given, wanted = self._bound or (
            self.placements(source[:, 1:]),
            self.placements(target_reference),
        )
        field = self.displacement(source, given, 1 if self.training else self.refinements)
        return self._origins(field, given, wanted, len(self.grids))

    def displacement(self, source: Tensor, given: Tensor, refinements: int) -> Tensor:
        """The displacement (n, 3, 30, 40) that images (n, 2, h, w) of a sensor placed as `given`
        (n or 1, 11) show, after so many refinements."""
        field: Tensor = self.field(source)
        for _ in range(refinements):
            field = self._refined(field, source, given)
        return field

    def _refined(self, field: Tensor, source: Tensor, given: Tensor) -> Tensor:
        """The displacement (n, 3, 30, 40), changed by how far it misses the source's markers."""
        carried = carry(source[:, 1:], self._origins(field, given, given, 1))
        with torch.autocast(source.device.type, enabled=False):  # differences of near equals
            missed = self.misses(torch.cat([source[:, :1], carried], 1).float())
        # It is seen where the gel has come to; it belongs to where that rests.
        to_mm = field.new_tensor([1.0, -1.0])[:, None, None] / PX_PER_MM
        half = field.new_tensor([WIDTH / 2, HEIGHT / 2])[:, None, None]
        rest = self.coarse * field.new_tensor([1.0, WIDTH / HEIGHT])[:, None, None]
        there = rest + field[:, :2] / (to_mm * half)
        missed = functional.grid_sample(
            missed, there.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
        )
        px = HEIGHT // self.size[0]  # of the image, in one of the network's
        return torch.cat([field[:, :2] + missed * (px * to_mm), field[:, 2:]], 1)

    def _origins(self, field: Tensor, given: Tensor, wanted: Tensor, grids: int) -> Tensor:
        """`origins` of a displacement that `given` shows, as `wanted` does; on so many grids."""
        # What shows as so many px, in mm of the source's gel; then in mm of the target's.
        yields = PX_PER_MM / given[:, :1] * (wanted[:, 9:] - given[:, 9:]).exp()
        x, y = _turned_back(field[:, :1], -field[:, 1:2], given)
        field = torch.cat([x, y, field[:, 2:]], 1)
        field = field * torch.stack([yields[:, 0], yields[:, 0], yields[:, 1]], 1)[..., None, None]
        distance = wanted[:, 1, None, None, None]
        aspect = field.new_tensor([1.0, WIDTH / HEIGHT])[:, None, None]
        moved = torch.zeros_like(field[:, :2])
        used = zip((self.coarse, self.fine)[:grids], self.iterations[:grids], strict=True)
        for points, iterations in used:
            gel = _to_gel(points, wanted)
            at = gel + functional.interpolate(
                moved, size=points.shape[2:], mode="bilinear", align_corners=False
            )
            for _ in range(iterations):
                seen = _to_image(at, given) * aspect  # where the source sees the point at rest
                u = functional.grid_sample(
                    field, seen.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
                )
                at = gel * (1 + u[:, 2:] / distance) - u[:, :2]
            moved = at - gel
        return _to_image(at, wanted) - points


class CompactTranslator(Translator):
    """A small conditional generator: paints the target's marker image, beginning with its
    reference. Both references go in as images and, through the frozen marker `encoder` where one
    is given, as latents at the narrowest place."""

    def __init__(
        self, width: int = 24, encoder_width: int = 0, encoder: MarkerEncoder | None = None
    ) -> None:
        super().__init__()
        self.width = width
        self.encoder: MarkerEncoder | None = None
        if encoder is not None or encoder_width:
            self.encoder = freeze(encoder or MarkerEncoder(encoder_width))
        latents = 2 * MarkerEncoder.latent if self.encoder else 0
        self.down = nn.ModuleList(
            [
                nn.Sequential(layer(3, width, 2), layer(width, width)),
                nn.Sequential(layer(width, 2 * width, 2), layer(2 * width, 2 * width)),
                nn.Sequential(layer(2 * width, 4 * width, 2), layer(4 * width, 4 * width)),
            ]
        )
        self.middle = layer(4 * width + latents, 4 * width)
        self.up = nn.ModuleList(
            [
                layer(4 * width + 2 * width, 2 * width),
                layer(2 * width + width, width),
                layer(width + 3, width),
            ]
        )
        self.head = nn.Conv2d(width, 1, 3, 1, 1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, source: Tensor, target_reference: Tensor) -> Tensor:
        """See `Translator`."""
        maps = [torch.cat([source, target_reference], 1)]
        for stage in self.down:
            maps.append(stage(maps[-1]))
        deep = maps.pop()
        if self.encoder is not None:
            latents = [self.encoder.encode(r)[0] for r in (source[:, 1:], target_reference)]
            deep = torch.cat([deep, *latents], 1)
        deep = self.middle(deep)
        for stage in self.up:
            deep = functional.interpolate(deep, scale_factor=2.0, mode="nearest")
            deep = stage(torch.cat([deep, maps.pop()], 1))
        # Without a change the sigmoid gives the reference again, but for its last percents.
        return torch.sigmoid(6 * (2 * target_reference - 1) + self.head(deep))

    def shape(self) -> dict[str, Any]:
        """See `Translator`."""
        return {"width": self.width, "encoder_width": self.encoder.width if self.encoder else 0}

    def blocks(self) -> list[nn.Module]:
        """What gradient checkpointing computes anew."""
        return [*self.down, *self.up]


def carry(reference: Tensor, origins: Tensor) -> Tensor:
    """References (n, c, h, w) read where `origins` (n, 2, rows, columns) say, bilinearly."""
    height, width = reference.shape[-2:]
    origins = functional.interpolate(
        origins, size=(height, width), mode="bilinear", align_corners=False
    )
    v, u = (
        (torch.arange(n, dtype=origins.dtype, device=origins.device) + 0.5) / n * 2 - 1
        for n in (height, width)
    )
    # One unit of `origins` is the half width; grid_sample counts in half heights along the rows.
    grid = torch.stack([origins[:, 0] + u, origins[:, 1] * (WIDTH / HEIGHT) + v[:, None]], -1)
    return functional.grid_sample(reference, grid, align_corners=False)


def _pixels(grid: tuple[int, int]) -> Tensor:
    """Points of the image from its centre, as part of the half width: (1, 2, rows, columns)."""
    v, u = torch.meshgrid(*((torch.arange(n) + 0.5) / n * 2 - 1 for n in grid), indexing="ij")
    return torch.stack([u, v * HEIGHT / WIDTH])[None]


def _to_image(gel_mm: Tensor, placement: Tensor) -> Tensor:
    """Gel points (n, 2, rows, columns) mm -> image, as part of the half width."""
    scale, (a, b, c, d), shift = _parts(placement)
    x, y = gel_mm[:, :1], gel_mm[:, 1:]
    straight = torch.cat([(1 + a) * x + b * y, c * x + (1 + d) * y], 1) * scale
    return straight * _lens(straight, placement) + shift


def _to_gel(points: Tensor, placement: Tensor) -> Tensor:
    """The inverse of `_to_image`, to the first order of the lens."""
    scale, _, shift = _parts(placement)
    offset = points - shift
    offset = offset / _lens(offset, placement) / scale
    return torch.cat(_turned_back(offset[:, :1], offset[:, 1:], placement), 1)


def _turned_back(x: Tensor, y: Tensor, placement: Tensor) -> tuple[Tensor, Tensor]:
    """What stands in the image as (x, y), in the axes of the gel."""
    a, b, c, d = _parts(placement)[1]
    determinant = (1 + a) * (1 + d) - b * c
    return ((1 + d) * x - b * y) / determinant, ((1 + a) * y - c * x) / determinant


def _lens(offset: Tensor, placement: Tensor) -> Tensor:
    """By how much the lens enlarges an offset from the image's centre, in half widths."""
    half_diagonal = math.hypot(1, HEIGHT / WIDTH)
    square = offset.square().sum(1, keepdim=True) / half_diagonal**2
    return 1 + placement[:, 2, None, None, None] * square


def _parts(placement: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    scale, *turn = (placement[:, i, None, None, None] for i in (0, 3, 4, 5, 6))
    return scale / (WIDTH / 2), tuple(turn), placement[:, 7:9, None, None]
