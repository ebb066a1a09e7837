"""Markers told from the gel by local contrast, one frame at a time.

The gel's brightness under each pixel is the grey closing of the image with a window wider than a
marker, so that uneven light, its colour and its drift cancel. A pixel belongs to a marker where it
is darker than the gel by more than half of what the darkest pixel around it is: the boundary then
stands at half height whatever the contrast, the blur or the exposure. Connected pixels of a
marker's size and shape are markers. Light markers are dark ones of the negative.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import SegmentationConfig
from genforce_collect.markers.components import ComponentFinder, Components
from genforce_collect.markers.packing import HEIGHT, WIDTH
from genforce_collect.markers.quality import Flag
from genforce_collect.markers.view import Gray, View, edge_of

# Shape limits of a marker, in units of the nominal disc.
MIN_CUT_AREA = 0.35  # of one cut by the edge of the view
MAX_ASPECT = 2.6
MIN_EXTENT = 0.5  # of its bounding box; a disc fills 0.785
# A disc that a glint has bitten off from is small, not convex, and fits a disc's circle.
SMALL_AREA, MIN_SOLIDITY, MAX_MENDED_AREA = 0.92, 0.92, 1.4
FULL_EXTENT = 0.74  # of its bounding box that a whole disc fills at least
MIN_RELATIVE_CONTRAST = 0.35  # of the median marker's
BOUNDARY_LEVEL = 0.5  # of the local peak
FLOOR_LEVEL = 0.2  # of the image's high peaks
MIN_DIAMETER_TO_OPEN = 8.0  # px; hairs and bridges of one pixel are cut off larger markers
# Markers that touch make a large component with several cores, far from its outline.
LARGE_AREA, MAX_JOINED, CORE_LEVEL = 1.5, 5.0, 0.7
ROUND_ASPECT = 1.3  # a component no longer than this is a single one
# What makes a frame doubtful.
LIGHT_LIMIT, DARK_LIMIT = 235, 5  # coloured light clips its own channel well below 255
MAX_SATURATION = 0.15

MANY = 100  # components; above it, one pass over the image beats one a component
_SQUARE = np.ones((3, 3), np.uint8)
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_NONE = np.zeros(0, np.float32)


@dataclass(frozen=True)
class MarkerFrame:
    """The marker image of one frame.

    mask: (480, 640) uint8, 1 on markers. x, y: (n,) float32 centroids in px, origin at the centre
    of the top left pixel; area: (n,) float32 px². One component of the mask is one centroid. Of
    markers cut by the edge of the field of view those are in that show at least 0.35 of a nominal
    disc; their centroid is that of the part that shows. flags: `quality.Flag`. expected: markers
    in the reference, 0 without one. contrast, saturation: 0 to 1. sharpness: variance of the
    Laplacian over that of the reference, 1 without one.
    """

    mask: NDArray[np.uint8]
    x: NDArray[np.float32] = field(default_factory=lambda: _NONE)
    y: NDArray[np.float32] = field(default_factory=lambda: _NONE)
    area: NDArray[np.float32] = field(default_factory=lambda: _NONE)
    flags: int = 0
    expected: int = 0
    contrast: float = 0.0
    saturation: float = 0.0
    sharpness: float = 1.0
    laplacian: float = 0.0  # variance, grey levels²; what sharpness compares

    @property
    def count(self) -> int:
        """Markers found."""
        return len(self.x)

    @property
    def points(self) -> NDArray[np.float32]:
        """(n, 2) float32 centroids in px."""
        return np.stack([self.x, self.y], axis=1)


def empty_frame(flags: int, expected: int = 0) -> MarkerFrame:
    """A frame nothing could be read from."""
    return MarkerFrame(np.zeros((HEIGHT, WIDTH), np.uint8), flags=flags, expected=expected)


class MarkerSegmenter:
    """Marker images of one sensor's frames; stateless from frame to frame.

    One thread at a time: the images on the way are written into the same memory again and again,
    as fresh memory costs more than what is done in it.
    """

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config
        self.view = View(config)
        self._is_light = config.polarity == "light"
        diameter = config.diameter_px
        self._nominal_area = np.pi / 4 * diameter**2
        # The background is found at this fraction, the coarser the larger the markers are.
        self._scale = 1 if diameter < 8 else 2 if diameter < 18 else 4
        self._window = _square(1.6 * diameter / self._scale)
        # All that follows happens in the box around the field of view.
        self._box = self.view.box(self._scale)
        self._fov = np.ascontiguousarray(self.view.field_of_view[self._box])
        self._edge = edge_of(self._fov)
        height, width = self._fov.shape
        self._small_size = width // self._scale, height // self._scale
        self._small_fov = self._shrink(self._fov)
        self._small_fov_16 = np.where(self._small_fov > 0, -1, 0).astype(np.int16)
        self._fov_area = max(1, cv2.countNonZero(self._small_fov))
        self._smooth, self._limit = np.empty((2, height, width), np.uint8)
        self._laplacian = np.empty_like(self._small_fov_16)
        self._connected = ComponentFinder(height, width)
        self._candidates = self._connected.canvas

    def __call__(self, gray: Gray) -> MarkerFrame:
        """Segment one grey frame of any size, (height, width) uint8."""
        flags = 0 if self.view.fits(gray) else Flag.WRONG_SIZE
        return self.segment_view(self.view.apply(gray), int(flags))

    def segment_view(self, gray: Gray, flags: int = 0) -> MarkerFrame:
        """Segment a (480, 640) uint8 view."""
        gray = gray[self._box]
        small = self._shrink(gray)
        gel, depth, level = self._gel_and_level(small)
        self._find_candidates(gray, gel, level)
        whole = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask = whole[self._box]
        x, y, area, contrast = self._pick(depth, gel, mask)
        saturation = self._saturation(small, depth)
        if not len(x):
            flags |= Flag.NO_MARKERS
        if contrast < self.config.min_contrast:
            flags |= Flag.LOW_CONTRAST
        if saturation > MAX_SATURATION:
            flags |= Flag.SATURATED
        rows, columns = self._box
        x, y = x + np.float32(columns.start), y + np.float32(rows.start)
        sharpness = self._sharpness(small)
        return MarkerFrame(whole, x, y, area, int(flags), 0, contrast, saturation, 1.0, sharpness)

    def _shrink(self, image: Gray) -> Gray:
        if self._scale == 1:
            return image
        return cv2.resize(image, self._small_size, interpolation=cv2.INTER_AREA)

    def _gel_and_level(self, small: Gray) -> tuple[Gray, Gray, Gray]:
        """In the reduced view: brightness of the gel, how much darker each pixel is, and how much
        darker it must be to be a marker's; of the negative where markers are light."""
        reduced = cv2.bitwise_not(small) if self._is_light else small
        gel = cv2.morphologyEx(reduced, cv2.MORPH_CLOSE, self._window)
        depth = cv2.subtract(gel, reduced)
        if not self.view.is_whole:
            depth &= self._small_fov
        peak = cv2.dilate(depth, self._window)
        floor = max(FLOOR_LEVEL * _high_level(peak), 255 * self.config.min_contrast)
        level = cv2.max(cv2.convertScaleAbs(peak, alpha=BOUNDARY_LEVEL), round(floor))
        return gel, depth, level

    def _find_candidates(self, gray: Gray, gel: Gray, level: Gray) -> None:
        """Draw the mask of 0 and 255 of the pixels that are darker than the gel by the level."""
        smooth = cv2.GaussianBlur(gray, (3, 3), 0, dst=self._smooth)
        limit, is_marker = cv2.subtract(gel, level), cv2.CMP_LT
        if self._is_light:
            limit, is_marker = cv2.bitwise_not(limit), cv2.CMP_GT
        limit = cv2.resize(limit, gray.shape[::-1], dst=self._limit)
        candidates = cv2.compare(smooth, limit, is_marker, dst=self._candidates)
        if not self.view.is_whole:
            cv2.bitwise_and(candidates, self._fov, dst=candidates)
        if self.config.diameter_px >= MIN_DIAMETER_TO_OPEN:
            cv2.morphologyEx(candidates, cv2.MORPH_OPEN, _CROSS, dst=candidates)

    def _pick(
        self, depth: Gray, gel: Gray, mask: Gray
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], float]:
        """Centroids, areas and contrast of the components that are markers; draws the mask."""
        found = self._connected()
        cut = np.zeros(len(found.area) + 1, bool)
        cut[found.labels.ravel()[self._edge]] = True
        cut = cut[1:]
        good, contrast = self._choose(found, cut, depth, gel)
        _draw(mask, self._candidates, found, good)
        markers = np.stack([found.x, found.y, found.area])

        full = found.area >= FULL_EXTENT * found.width * found.height
        if good.any():
            median = _median(found.area[good])
            bitten = good & ~cut & ~full & (found.area < SMALL_AREA * median)
            for i in np.flatnonzero(bitten):
                if mended := _mend(mask, found, i, median):
                    markers[:, i] = mended

        shorter = np.minimum(found.width, found.height)
        round_ = full & (np.maximum(found.width, found.height) <= ROUND_ASPECT * shorter)
        joined = (found.area > LARGE_AREA * self._nominal_area) & ~round_ & ~cut
        joined &= found.area < MAX_JOINED * self._nominal_area
        parted = self._part(mask, found, np.flatnonzero(joined), good)
        x, y, area = np.concatenate([markers[:, good], *parted], axis=1).astype(np.float32)
        return x, y, area, contrast

    def _part(
        self, mask: Gray, found: Components, joined: NDArray[np.intp], good: NDArray[np.bool_]
    ) -> list[NDArray[np.float64]]:
        """Markers, (3, n) x, y, area, of each component all of whose parts are markers; it is
        parted in the mask too, and no longer good itself."""
        splits = [parts for i in joined if (parts := _split(found, i)) is not None]
        if not splits:
            return []
        width, height, area = np.concatenate([parts.sizes for parts in splits], axis=1)
        is_marker = self._is_marker(width, height, area)
        start, parted = 0, []
        for parts in splits:
            stop = start + len(parts.sizes[0])
            if is_marker[start:stop].all():
                good[parts.whole] = False
                parted.append(parts.markers)
                box = mask[parts.box]
                box[parts.inside] = 0
                box |= parts.mask
            start = stop
        return parted

    def _choose(
        self, found: Components, cut: NDArray[np.bool_], depth: Gray, gel: Gray
    ) -> tuple[NDArray[np.bool_], float]:
        """Which components have a marker's size, shape and contrast, and the contrast of those."""
        good = self._is_marker(found.width, found.height, found.area, cut)
        if not good.any():
            return good, 0.0
        mean = relative = found.mean_of(depth, self._scale)
        if not self._is_light:  # dark markers take a part of the light there is
            u, v = found.x.astype(int) // self._scale, found.y.astype(int) // self._scale
            relative = mean / np.maximum(gel[v, u], 1)
        good &= relative >= MIN_RELATIVE_CONTRAST * _median(relative[good])
        return good, float(mean[good].mean()) / 255

    def _is_marker(
        self,
        width: NDArray[np.integer],
        height: NDArray[np.integer],
        area: NDArray[np.number],
        cut: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.bool_]:
        """Which components have a marker's size and shape, by bounding box and area in px."""
        smallest = self.config.min_area
        if cut is not None:
            smallest = np.where(cut, MIN_CUT_AREA, smallest)
        return (
            (area >= smallest * self._nominal_area)
            & (area <= self.config.max_area * self._nominal_area)
            & (np.maximum(width, height) <= MAX_ASPECT * np.minimum(width, height))
            & (area >= MIN_EXTENT * width * height)
        )

    def _sharpness(self, small: Gray) -> float:
        """Variance of the Laplacian over the field of view, grey levels²."""
        laplacian = cv2.Laplacian(small, cv2.CV_16S, dst=self._laplacian)
        laplacian &= self._small_fov_16
        mean = cv2.sumElems(laplacian)[0] / self._fov_area
        return cv2.norm(laplacian, cv2.NORM_L2SQR) / self._fov_area - mean**2

    def _saturation(self, small: Gray, depth: Gray) -> float:
        """Part of the field of view at the sensor's limits; black gel and white pins are not."""
        if self._is_light:
            at_limits = cv2.inRange(small, LIGHT_LIMIT, 255)
            is_gel = cv2.compare(depth, 0, cv2.CMP_EQ)
            return cv2.countNonZero(at_limits & is_gel & self._small_fov) / self._fov_area
        at_limits = cv2.bitwise_not(cv2.inRange(small, DARK_LIMIT + 1, LIGHT_LIMIT - 1))
        return cv2.countNonZero(at_limits & self._small_fov) / self._fov_area


def _draw(mask: Gray, candidates: Gray, found: Components, good: NDArray[np.bool_]) -> None:
    """Set the mask to 1 on the good components and to 0 elsewhere."""
    rejected = np.flatnonzero(~good)
    if len(rejected) > MANY:
        mask[:] = np.concatenate([[0], good]).astype(np.uint8)[found.labels]
        return
    cv2.min(candidates, 1, dst=mask)
    for i in rejected:
        mask[found.box(i)][found.inside(i)] = 0


def _mend(
    mask: Gray, found: Components, i: int, disc_area: float
) -> tuple[float, float, float] | None:
    """Fill what a glint has bitten off a disc in the mask; centre and area of the whole.

    None where nothing is bitten off, or where what is left is no part of a disc.
    """
    inside = found.inside(i).view(np.uint8)
    hull = cv2.convexHull(cv2.findNonZero(inside))
    filled = cv2.fillConvexPoly(np.zeros_like(inside), hull, 1)
    whole = cv2.countNonZero(filled)
    if found.area[i] > MIN_SOLIDITY * whole:
        return None
    (x, y), radius = cv2.minEnclosingCircle(hull)
    if np.pi * radius**2 > MAX_MENDED_AREA * disc_area:
        return None
    mask[found.box(i)] |= filled
    return found.left[i] + x, found.top[i] + y, whole


class _Parts(NamedTuple):
    """What one component, the whole, was parted into. box, inside: as of `Components`."""

    whole: int
    box: tuple[slice, slice]
    inside: NDArray[np.bool_]
    markers: NDArray[np.float64]  # (3, n): x, y, area
    sizes: NDArray[np.int32]  # (3, n): width, height, area
    mask: Gray  # 1 on the parts, in the box


def _split(found: Components, i: int) -> _Parts | None:
    """Part markers that touch; None for a component with a single core."""
    box, is_inside = found.box(i), found.inside(i)
    inside = is_inside.view(np.uint8)
    padded = cv2.copyMakeBorder(inside, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    to_edge = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    outside_cores = cv2.compare(to_edge, CORE_LEVEL * float(to_edge.max()), cv2.CMP_LE)
    if cv2.connectedComponents(cv2.bitwise_not(outside_cores))[0] < 3:
        return None
    _, owner = cv2.distanceTransformWithLabels(  # the nearest core of each pixel
        outside_cores, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_CCOMP
    )
    owner = np.uint8(owner) * inside
    # A line of background between parts, or they would be one component of the mask.
    mask = cv2.bitwise_and(inside, cv2.compare(cv2.dilate(owner, _SQUARE), owner, cv2.CMP_EQ))
    _, _, stats, centres = cv2.connectedComponentsWithStats(mask, connectivity=8)
    x, y = centres[1:].T
    sizes = stats[1:, cv2.CC_STAT_WIDTH :].T
    markers = np.array([x + found.left[i], y + found.top[i], sizes[2]])
    return _Parts(i, box, is_inside, markers, sizes, mask)


def _square(size: float) -> Gray:
    """Square structuring element of an odd size in px, at least 3."""
    odd = max(3, int(size) | 1)
    return cv2.getStructuringElement(cv2.MORPH_RECT, (odd, odd))


def _median(values: NDArray[np.number]) -> float:
    """Upper median; `np.median` takes ten times as long for a hundred values."""
    middle = len(values) // 2
    return float(np.partition(values, middle)[middle])


def _high_level(image: Gray) -> float:
    """90th percentile, of every fourth pixel."""
    sample = image[::4, ::4].ravel()
    index = int(0.9 * sample.size)
    return float(np.partition(sample, index)[index])
