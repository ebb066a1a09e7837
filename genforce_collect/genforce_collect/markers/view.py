"""From the camera's frame to the 640×480 view that markers are looked for in."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import SegmentationConfig
from genforce_collect.markers.packing import HEIGHT, WIDTH

Gray = NDArray[np.uint8]
VECTOR = 32  # pixels, a multiple of every step


class View:
    """Rectification, crop and field of view of one sensor, precomputed.

    `field_of_view` is a (480, 640) uint8 mask of 0 and 255; it excludes what the frame does not
    cover.
    """

    def __init__(self, config: SegmentationConfig) -> None:
        self._config = config
        self._size = (config.frame_width, config.frame_height)
        self._map = _remap_table(config) if _is_rectified(config) else None
        left, top, width, height = config.crop_px or (0, 0, *self._size)
        self._crop = (slice(top, top + height), slice(left, left + width))
        self.field_of_view = _field_of_view(config, self._map, (width, height))
        self.is_whole = bool(self.field_of_view.all())

    def fits(self, gray: Gray) -> bool:
        """Whether the frame has the size the sensor file says."""
        return gray.shape[:2] == (self._size[1], self._size[0])

    def box(self, step: int) -> tuple[slice, slice]:
        """Rows and columns around the field of view, at multiples of a step that divides 480. The
        number of columns suits vector instructions, with which filters take half the time."""
        left, top, width, height = cv2.boundingRect(self.field_of_view)
        if not width:
            return slice(0, HEIGHT), slice(0, WIDTH)
        rows = slice(top // step * step, -(-(top + height) // step) * step)
        columns = min(WIDTH, -(-(width + left % step) // VECTOR) * VECTOR)
        start = min(left, WIDTH - columns) // step * step
        return rows, slice(start, start + columns)

    def apply(self, gray: Gray) -> Gray:
        """The (480, 640) uint8 view of a frame, grey or colour; another size is scaled first."""
        if not self.fits(gray):
            gray = fit(gray, *self._size)
        if self._map is not None:
            return cv2.remap(gray, *self._map, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return fit(gray[self._crop], WIDTH, HEIGHT)

    def to_frame(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Where (n, 2) points (px) of the view lie in a frame of the size the sensor file says."""
        points = np.asarray(points, float).reshape(-1, 2)
        if self._map is not None:
            return np.column_stack(_frame_points(self._config, points[:, 0], points[:, 1]))
        rows, columns = self._crop
        width, height = columns.stop - columns.start, rows.stop - rows.start
        inner_width, inner_height, left, top = _inner(width, height, WIDTH, HEIGHT)
        scale = np.array([inner_width / width, inner_height / height])
        return (points + 0.5 - [left, top]) / scale - 0.5 + [columns.start, rows.start]


def edge_of(mask: Gray) -> NDArray[np.intp]:
    """Flat indices of a mask's outermost pixels."""
    inner = cv2.erode(mask, np.ones((3, 3)), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.flatnonzero(mask & ~inner)


def fit(image: Gray, width: int, height: int) -> Gray:
    """Scale an image into width × height, aspect ratio kept; borders repeat its edge."""
    inner_width, inner_height, left, top = _inner(image.shape[1], image.shape[0], width, height)
    if (inner_height, inner_width) != image.shape[:2]:
        shrinks = inner_width < image.shape[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = cv2.resize(image, (inner_width, inner_height), interpolation=method)
    if (inner_height, inner_width) == (height, width):
        return image
    right, bottom = width - inner_width - left, height - inner_height - top
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REPLICATE)


def _inner(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int, int, int]:
    """Width, height, left and top of a frame fitted into another."""
    scale = min(to_width / width, to_height / height)
    inner_width, inner_height = round(width * scale), round(height * scale)
    return inner_width, inner_height, (to_width - inner_width) // 2, (to_height - inner_height) // 2


def _is_rectified(config: SegmentationConfig) -> bool:
    return config.corners_px is not None or any(config.distortion)


def _remap_table(config: SegmentationConfig) -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
    """Fixed-point `cv2.remap` table: view pixel → frame pixel, all geometry in one look-up."""
    u, v = np.meshgrid(np.arange(WIDTH, dtype=float), np.arange(HEIGHT, dtype=float))
    x, y = _frame_points(config, u, v)
    return cv2.convertMaps(np.float32(x), np.float32(y), cv2.CV_16SC2)


def _frame_points(
    config: SegmentationConfig, u: NDArray[np.float64], v: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Frame pixel of each view pixel of a rectified sensor."""
    if config.corners_px is not None:
        frame_corners = np.float32(config.corners_px)
        sides = np.linalg.norm(np.diff(frame_corners, axis=0, append=frame_corners[:1]), axis=1)
        width, height = float(sides[[0, 2]].mean()), float(sides[[1, 3]].mean())
    else:
        left, top, width, height = config.crop_px or (
            0, 0, config.frame_width, config.frame_height,
        )  # fmt: skip
        frame_corners = np.float32(
            [
                [left - 0.5, top - 0.5],
                [left + width - 0.5, top - 0.5],
                [left + width - 0.5, top + height - 0.5],
                [left - 0.5, top + height - 0.5],
            ]
        )
    scale = min(WIDTH / width, HEIGHT / height)
    half = np.array([width * scale / 2, height * scale / 2])
    centre = np.array([(WIDTH - 1) / 2, (HEIGHT - 1) / 2])
    view_corners = np.float32(centre + half * [[-1, -1], [1, -1], [1, 1], [-1, 1]])
    homography = cv2.getPerspectiveTransform(view_corners, frame_corners)
    x, y, w = np.tensordot(homography, np.stack([u, v, np.ones_like(u)]), axes=1)
    x, y = x / w, y / w
    middle_x, middle_y = (config.frame_width - 1) / 2, (config.frame_height - 1) / 2
    k1, k2 = config.distortion
    dx, dy = x - middle_x, y - middle_y
    radius2 = (dx**2 + dy**2) / (middle_x**2 + middle_y**2)
    factor = 1 + k1 * radius2 + k2 * radius2**2
    return middle_x + dx * factor, middle_y + dy * factor


def _field_of_view(
    config: SegmentationConfig,
    table: tuple[NDArray[np.int16], NDArray[np.uint16]] | None,
    crop_size: tuple[int, int],
) -> Gray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    if table is None:
        width, height, left, top = _inner(*crop_size, WIDTH, HEIGHT)
        mask[top : top + height, left : left + width] = 255
    else:
        x, y = table[0][..., 0], table[0][..., 1]
        inside = (x >= 0) & (x < config.frame_width) & (y >= 0) & (y < config.frame_height)
        mask[inside] = 255
    if config.fov_circle_px is not None:
        x, y, radius = config.fov_circle_px
        mask &= cv2.circle(np.zeros_like(mask), (round(x), round(y)), round(radius), 255, -1)
    if config.fov_polygon_px:
        corners = np.int32(np.round(config.fov_polygon_px))
        mask &= cv2.fillPoly(np.zeros_like(mask), [corners], 255)
    return mask
