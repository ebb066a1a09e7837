"""From the deformed gel to the camera frame: projection, markers, shading, noise.

A point goes through the ideal camera (perspective: what is pressed towards the lens looks larger)
and then through this instance's lens and mounting. Markers are drawn as the ellipses into which
the local deformation and projection turn their discs, so the mask is exact to the pixel centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import OpticsConfig

WIDTH_PX, HEIGHT_PX = 640, 480
CENTRE_PX = (319.5, 239.5)
_HALF_DIAGONAL_PX = math.hypot(*CENTRE_PX)
_NOISE_MARGIN_PX = 64
_EDGE_BLURS = 1.88  # half width of the smooth step with the slope of a Gaussian's edge
_ZERO_LEVEL = 128  # of signed images kept as uint8

Array = NDArray[Any]


@dataclass(frozen=True)
class Imperfections:
    """What sets one instance of a sensor apart from its drawing."""

    turn_deg: float = 0.0  # of the camera about the optical axis
    shift_px: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    radial: float = 0.0  # lens: relative change of radius in the corners
    jitter_mm: float = 0.0  # standard deviation of a marker's place
    size_spread: float = 0.0  # relative standard deviation of a marker's diameter
    missing: float = 0.0  # part of the markers that are absent for good
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)  # gain per colour channel
    light_tilt: tuple[float, float] = (0.0, 0.0)  # relative change of light across the image

    @classmethod
    def draw(cls, rng: np.random.Generator, strength: float = 1.0) -> Imperfections:
        """Those of a well-made sensor at strength 1, within +-2 degrees, 2 px and 2 %."""
        s = strength
        shift, light = rng.uniform(-2 * s, 2 * s, 2), 1 + rng.uniform(-0.08 * s, 0.08 * s, 3)
        tilt = rng.uniform(-0.1 * s, 0.1 * s, 2)
        return cls(
            turn_deg=float(rng.uniform(-2 * s, 2 * s)),
            shift_px=(float(shift[0]), float(shift[1])),
            scale=float(1 + rng.uniform(-0.02 * s, 0.02 * s)),
            radial=float(rng.uniform(-0.02 * s, 0.02 * s)),
            jitter_mm=float(0.03 * s * rng.random()),
            size_spread=0.06 * s,
            missing=float(0.015 * s * rng.random()),
            light=(float(light[0]), float(light[1]), float(light[2])),
            light_tilt=(float(tilt[0]), float(tilt[1])),
        )


@dataclass(frozen=True)
class Camera:
    """The projection of one sensor instance."""

    px_per_mm: float
    distance_mm: float
    flaws: Imperfections

    def project(self, x_mm: Array, y_mm: Array, z_mm: Array) -> tuple[Array, Array]:
        """Pixel (u, v) of sensor-frame points; z is the height over the rest surface."""
        nearer = self.px_per_mm / (1 + z_mm / self.distance_mm)
        return self.lens(x_mm * nearer, -y_mm * nearer)

    def lens(self, du_px: Array, dv_px: Array) -> tuple[Array, Array]:
        """Lens and mounting, applied to ideal offsets from the image centre."""
        flaws = self.flaws
        square = (du_px**2 + dv_px**2) / _HALF_DIAGONAL_PX**2
        gain = flaws.scale * (1 + flaws.radial * square)
        cos, sin = (f(math.radians(flaws.turn_deg)) for f in (math.cos, math.sin))
        return (
            CENTRE_PX[0] + flaws.shift_px[0] + gain * (cos * du_px - sin * dv_px),
            CENTRE_PX[1] + flaws.shift_px[1] + gain * (sin * du_px + cos * dv_px),
        )


@dataclass(frozen=True)
class Drawing:
    """Pixels that markers touch, and how much of each they cover, softened by the blur."""

    index: NDArray[np.intp]  # into the flattened image; a pixel may stand there twice
    cover: NDArray[np.float32]  # 0 to 1


def draw_ellipses(
    centres_px: Array, axes_px: Array, blur_px: float, drawable: NDArray[np.bool_] | None = None
) -> Drawing:
    """Draw N ellipses. `axes_px` (N, 2, 2) maps the unit disc onto each, columns in pixels."""
    edge = _EDGE_BLURS * blur_px
    index, q, radius = _ellipse_pixels(centres_px, axes_px, edge, drawable)
    ramp = np.clip(0.5 + (1 - np.sqrt(q)) * radius / np.float32(2 * edge), 0, 1)
    cover = ramp * ramp * (3 - 2 * ramp)
    canvas = np.zeros(HEIGHT_PX * WIDTH_PX, np.float32)
    canvas[index] = cover
    rest, hidden = index, canvas[index] < cover
    while hidden.any():  # where markers overlap, a pixel shows the one that covers most of it
        rest, cover = rest[hidden], cover[hidden]
        canvas[rest] = cover
        hidden = canvas[rest] < cover
    return Drawing(index, canvas[index])


def mask_of(drawing: Drawing) -> NDArray[np.bool_]:
    """The exact mask (480, 640) of a drawing: pixel centres inside a marker."""
    return _mask(drawing.index[drawing.cover >= 0.5])


def draw_mask(
    centres_px: Array, axes_px: Array, drawable: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """The exact mask (480, 640) of N ellipses, without the softened image."""
    return _mask(_ellipse_pixels(centres_px, axes_px, 0.0, drawable)[0])


def _mask(index: NDArray[np.intp]) -> NDArray[np.bool_]:
    mask = np.zeros(HEIGHT_PX * WIDTH_PX, bool)
    mask[index] = True
    return mask.reshape(HEIGHT_PX, WIDTH_PX)


def _ellipse_pixels(
    centres_px: Array, axes_px: Array, edge_px: float, drawable: NDArray[np.bool_] | None
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.float32]]:
    """Pixels within `edge_px` of N ellipses: index, squared radius (1 on the rim), mean radius."""
    shape = np.linalg.inv(axes_px @ axes_px.transpose(0, 2, 1)).astype(np.float32)
    radius = np.sqrt(np.abs(np.linalg.det(axes_px))).astype(np.float32)
    reach = np.linalg.norm(axes_px, axis=2).max(axis=1, initial=0.0) * (1 + edge_px / radius)
    half = math.ceil(float(reach.max(initial=0.0)) + 0.5)  # the centre lies within half a pixel
    base = np.round(centres_px).astype(np.intp)
    near = (
        (base[:, 0] >= -half)
        & (base[:, 0] < WIDTH_PX + half)
        & (base[:, 1] >= -half)
        & (base[:, 1] < HEIGHT_PX + half)
    )
    base, shape, radius = base[near], shape[near], radius[near]
    rest = (base - centres_px[near]).astype(np.float32)
    steps = np.arange(-half, half + 1)
    dx = (steps + rest[:, :1]).astype(np.float32)[:, None, :]
    dy = (steps + rest[:, 1:]).astype(np.float32)[:, :, None]
    q = shape[:, 0, 0, None, None] * dx**2 + shape[:, 1, 1, None, None] * dy**2
    q += (2 * shape[:, 0, 1, None, None]) * (dx * dy)
    touched = q <= (1 + edge_px / radius)[:, None, None] ** 2
    cut_off = (base < half).any(axis=1) | (base >= (WIDTH_PX - half, HEIGHT_PX - half)).any(axis=1)
    u = base[cut_off, 0, None, None] + steps[None, None, :]
    v = base[cut_off, 1, None, None] + steps[None, :, None]
    touched[cut_off] &= (u >= 0) & (u < WIDTH_PX) & (v >= 0) & (v < HEIGHT_PX)
    origin = base @ (1, WIDTH_PX)
    index = (origin[:, None, None] + (steps[:, None] * WIDTH_PX + steps))[touched]
    q, radius = q[touched], np.repeat(radius, np.count_nonzero(touched, axis=(1, 2)))
    if drawable is None:
        return index, q, radius
    keep = drawable.reshape(-1)[index]
    return index[keep], q[keep], radius[keep]


def field_of_view(optics: OpticsConfig, camera: Camera) -> NDArray[np.bool_] | None:
    """Pixels (480, 640) inside a round field of view; None where the whole image is one."""
    if optics.view_radius_mm is None:
        return None
    centre = camera.project(*np.zeros((3, 1)))
    radius = optics.view_radius_mm * camera.px_per_mm * camera.flaws.scale
    u, v = np.meshgrid(np.arange(WIDTH_PX), np.arange(HEIGHT_PX))
    return np.hypot(u - centre[0], v - centre[1]) <= radius


class Scene:
    """The gel as this instance's camera sees it without markers, and the camera's noise."""

    def __init__(self, optics: OpticsConfig, camera: Camera, rng: np.random.Generator) -> None:
        self._optics = optics
        u, v = np.meshgrid(np.arange(WIDTH_PX), np.arange(HEIGHT_PX))
        nu, nv = (u - CENTRE_PX[0]) / CENTRE_PX[0], (v - CENTRE_PX[1]) / CENTRE_PX[1]
        flaws = camera.flaws
        light = 1 - optics.vignette * (nu**2 + nv**2) / 2
        light = light * (1 + flaws.light_tilt[0] * nu + flaws.light_tilt[1] * nv)
        cloud: Array = cv2.GaussianBlur(
            rng.normal(0, 1, (HEIGHT_PX // 8, WIDTH_PX // 8)), (0, 0), 6
        )
        cloud *= 0.02 / float(cloud.std())
        light = light * (
            1 + cv2.resize(cloud, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC)
        )
        # Coloured lamps stand around the gel: blue from the right, red from the left, green below.
        lamps = 1 + 0.12 * np.stack([nu, nv, -nu], axis=-1)
        gel = np.array(optics.gel_bgr) * np.array(flaws.light)
        background = light[..., None] * gel * lamps
        if (visible := field_of_view(optics, camera)) is not None:
            background[~visible] *= 0.4
        self.background = np.clip(background, 0, 255).astype(np.uint8)
        ink = np.array(optics.marker_bgr) * np.array(flaws.light)
        inked = np.clip(light[..., None] * ink, 0, 255).astype(np.uint8)
        self._ink = cv2.cvtColor(inked, cv2.COLOR_BGR2BGRA)
        shape = (HEIGHT_PX + _NOISE_MARGIN_PX, WIDTH_PX + _NOISE_MARGIN_PX, 3)
        self._noise = _signed_image(rng.normal(0, optics.noise, shape))

    def paint(
        self, drawing: Drawing, slopes: Array | None, noise: np.random.Generator | None
    ) -> Array:
        """The frame (480, 640, 3): `slopes` (2, rows, cols) of the surface over the image field."""
        image = self.background.copy()
        if slopes is not None:
            image = _add_signed(image, self._shade(slopes))
        image = _blend(image, self._ink, drawing)
        return image if noise is None else self.add_noise(image, noise)

    def add_noise(self, image: Array, rng: np.random.Generator) -> Array:
        """The frame (480, 640, 3) with the noise of one shot."""
        u, v = rng.integers(0, _NOISE_MARGIN_PX, 2)
        return _add_signed(image, self._noise[v : v + HEIGHT_PX, u : u + WIDTH_PX])

    def _shade(self, slopes: Array) -> Array:
        sx, sy = slopes * self._optics.shading
        delta = np.stack([sx, sy, -sx], axis=-1) - 0.15 * np.hypot(sx, sy)[..., None]
        size = (WIDTH_PX, HEIGHT_PX)
        return cv2.resize(_signed_image(delta), size, interpolation=cv2.INTER_LINEAR)


def _blend(image: Array, ink: Array, drawing: Drawing) -> Array:
    """Cover an image (480, 640, 3) with ink (480, 640, 4) where a drawing says so.

    Pixels move as 32-bit words, a third of the cost of three channels by index.
    """
    words = cv2.cvtColor(image, cv2.COLOR_BGR2BGRA).view(np.uint32)
    flat = words.reshape(-1)
    under = flat[drawing.index].view(np.uint8).reshape(-1, 4).astype(np.int16)
    over = ink.view(np.uint32).reshape(-1)[drawing.index].view(np.uint8).reshape(-1, 4)
    share = (drawing.cover * 128 + 0.5).astype(np.int16)[:, None]
    under += (over - under) * share >> 7  # 255 * 128 fits into 16 bits
    flat[drawing.index] = under.astype(np.uint8).view(np.uint32).reshape(-1)
    return cv2.cvtColor(words.view(np.uint8), cv2.COLOR_BGRA2BGR)


def _signed_image(values: Array) -> Array:
    return np.clip(np.round(values) + _ZERO_LEVEL, 0, 255).astype(np.uint8)


def _add_signed(image: Array, signed: Array) -> Array:
    return cv2.addWeighted(image, 1, signed, 1, -_ZERO_LEVEL)
