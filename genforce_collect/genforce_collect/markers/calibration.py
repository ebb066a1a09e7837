"""What a sensor's markers look like, found out from a few frames without contact.

Each polarity is tried with marker diameters over the whole range; a trial that finds markers of
another size than it looked for is repeated with that size. The best trial is the one whose markers
are many, clear, and alike in size and spacing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from genforce_collect.config import Point2, SegmentationConfig
from genforce_collect.errors import DataError
from genforce_collect.markers.packing import HEIGHT, WIDTH
from genforce_collect.markers.segmentation import MAX_SATURATION, MarkerFrame, MarkerSegmenter
from genforce_collect.markers.view import Gray

DIAMETERS_PX = (5.0, 7.0, 10.0, 14.0, 20.0, 28.0, 40.0, 56.0)
POLARITIES: tuple[Literal["dark", "light"], ...] = ("dark", "light")
REFINEMENTS = 3
MIN_MARKERS = 6
MAX_LINK = 1.5  # pitches between neighbours of one layout
MIN_LINKS = 2  # that a marker has; a glint beside the layout has fewer
AREA_LIMITS = {"min_area": 0.2, "max_area": 5.0}  # while searching
MIN_AREA_RANGE, MAX_AREA_RANGE = (0.2, 0.4), (2.5, 5.0)
# Fields of view to choose from, in pitches: how far from the edge of the view a marker must be to
# belong to it, and how far it reaches beyond its outer markers.
MARGINS, REACHES = (0.3, 0.5, 0.7), (0.35, 0.5, 0.65)
FREE_REACH = 0.75  # where the layout ends inside the view
MAX_CANDIDATES = 6  # frames that propose a field of view
AROUND = 9  # markers whose brightness is compared
MAX_UNLIKE = 0.25  # of the contrast, at least
STABLE = 0.02  # part by which a count may differ from the median count


@dataclass(frozen=True)
class Calibration:
    """segmentation: for the sensor file. frame: the most typical of the given frames with it.
    pitch_px: median distance of a marker to its nearest neighbour, in the 640×480 image."""

    segmentation: SegmentationConfig
    frame: MarkerFrame
    view: Gray  # (480, 640), what `frame` was found in
    pitch_px: float


def calibrate(images: Sequence[Gray], whole_view: bool = False) -> Calibration:
    """Segmentation settings for grey frames of one sensor without contact, all of one size.

    The field of view is drawn around the layout so that its edge runs between markers and none
    comes and goes with the gel's motion; `whole_view` leaves it open. Raises `DataError` where
    no frame shows markers.
    """
    if not images:
        raise DataError("no frames to calibrate from: give a video, a folder or an image")
    height, width = images[0].shape
    if any(image.shape != (height, width) for image in images):
        raise DataError("frames of different sizes: calibrate from frames of one camera setting")
    base = SegmentationConfig(frame_width=width, frame_height=height)
    best = max((_best_of(_median(images), base, p) for p in POLARITIES), key=lambda trial: trial[0])
    score, config = best
    if score == 0:
        raise DataError(
            "no markers in the frames: they must show the gel at rest, in focus, and evenly lit"
        )
    frame, view = _most_typical(images, config)
    layout = _layout(frame, view)
    pitch = _pitch(layout)
    areas = frame.area[np.isin(frame.x, layout[:, 0])]
    ratio = areas / (np.pi / 4 * config.diameter_px**2)
    update: dict[str, object] = {
        "min_area": round(float(np.clip(np.percentile(ratio, 1) / 2, *MIN_AREA_RANGE)), 2),
        "max_area": round(float(np.clip(np.percentile(ratio, 99) * 2, *MAX_AREA_RANGE)), 2),
    }
    if not whole_view:
        segmenter = MarkerSegmenter(config)
        views = [segmenter.view.apply(image) for image in images]
        frames = [(segmenter.segment_view(view), view) for view in views]
        frames = [(frame, view) for frame, view in frames if frame.count >= MIN_MARKERS]
        update["fov_polygon_px"] = _field_of_view(frames, segmenter.view.field_of_view, pitch)
    config = config.model_copy(update=update)
    frame, view = _most_typical(images, config)
    places = tuple((round(float(x), 1), round(float(y), 1)) for x, y in frame.points)
    config = config.model_copy(update={"markers_px": places})
    return Calibration(config, frame, view, pitch)


def _median(images: Sequence[Gray]) -> Gray:
    """The frame in the middle by brightness: neither the dark nor the overexposed one."""
    order = np.argsort([float(image[::8, ::8].mean()) for image in images])
    return images[order[len(order) // 2]]


def _best_of(
    image: Gray, base: SegmentationConfig, polarity: Literal["dark", "light"]
) -> tuple[float, SegmentationConfig]:
    best = 0.0, base
    for start in DIAMETERS_PX:
        diameter = start
        for _ in range(REFINEMENTS):
            config = base.model_copy(
                update={"polarity": polarity, "diameter_px": round(diameter, 1), **AREA_LIMITS}
            )
            frame = MarkerSegmenter(config)(image)
            if frame.count < MIN_MARKERS:
                break
            diameter = float(np.clip(2 * np.sqrt(np.median(frame.area) / np.pi), 2.5, 150))
        else:
            best = max(best, (_score(frame), config), key=lambda trial: trial[0])
    return best


def _score(frame: MarkerFrame) -> float:
    size_spread = frame.area.std() / frame.area.mean()
    nearest = cKDTree(frame.points).query(frame.points, k=2)[0][:, 1]
    pitch_spread = nearest.std() / nearest.mean()
    return float(np.sqrt(frame.count) * frame.contrast / (1 + size_spread) / (1 + pitch_spread))


def _most_typical(images: Sequence[Gray], config: SegmentationConfig) -> tuple[MarkerFrame, Gray]:
    segmenter = MarkerSegmenter(config)
    views = [segmenter.view.apply(image) for image in images]
    frames = [segmenter.segment_view(view) for view in views]
    good = [i for i, f in enumerate(frames) if f.saturation <= MAX_SATURATION] or range(len(frames))
    middle = np.median([frames[i].count for i in good])
    index = min(good, key=lambda i: abs(frames[i].count - middle))
    return frames[index], views[index]


def _pitch(points: NDArray[np.float32]) -> float:
    return float(np.median(cKDTree(points).query(points, k=2)[0][:, 1]))


def _layout(frame: MarkerFrame, view: Gray) -> NDArray[np.float32]:
    """Centroids of the largest set of neighbours that are alike in brightness."""
    points = frame.points[_is_alike(frame, view)]
    pitch = np.median(cKDTree(points).query(points, k=4)[0][:, 1:], axis=1)
    pairs = cKDTree(points).query_pairs(MAX_LINK * float(pitch.max()), output_type="ndarray")
    length = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
    limit = MAX_LINK * np.minimum(pitch[pairs[:, 0]], pitch[pairs[:, 1]])
    a, b = pairs[length <= limit].T
    count = len(points)
    links = np.bincount(a, minlength=count) + np.bincount(b, minlength=count)
    firm = (links[a] >= MIN_LINKS) & (links[b] >= MIN_LINKS)
    graph = coo_matrix((np.ones(firm.sum()), (a[firm], b[firm])), (count, count))
    _, component = connected_components(graph, directed=False)
    layout = points[component == np.bincount(component).argmax()]
    if len(layout) < MIN_MARKERS:
        raise DataError("too few markers form a layout: show more of the gel, or light it evenly")
    return layout


def _is_alike(frame: MarkerFrame, view: Gray) -> NDArray[np.bool_]:
    """Which markers are as bright as those around them; glints and dust are not."""
    size = max(3, round(float(np.sqrt(np.median(frame.area)) / 2)))
    level = _at(cv2.blur(view, (size, size)), frame.points).astype(float)
    _, around = cKDTree(frame.points).query(frame.points, k=min(AROUND, frame.count))
    difference = np.abs(level - np.median(level[around], axis=1))
    limit = max(5 * 1.48 * np.median(difference), MAX_UNLIKE * 255 * frame.contrast)
    return difference <= limit


def _field_of_view(
    frames: list[tuple[MarkerFrame, Gray]], whole: Gray, pitch: float
) -> tuple[Point2, ...]:
    """The polygon whose edge markers cross least as the gel moves.

    Where the layout ends inside the view, that is around all places its markers take. Where the
    view ends inside the layout, it is the best of many that run between the outer markers.
    """
    points = [frame.points for frame, _ in frames]
    layouts = [_layout(frame, view) for frame, view in frames]
    to_edge = cv2.distanceTransform(np.pad(whole, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    everywhere = np.concatenate(layouts)
    if _at(to_edge, everywhere).min() > FREE_REACH * pitch:
        return _surround(everywhere, FREE_REACH * pitch)
    step = max(1, len(layouts) // MAX_CANDIDATES)
    best: tuple[tuple[float, float], tuple[Point2, ...]] = ((-1.0, 0.0), ())
    for layout in layouts[::step]:
        for margin in MARGINS:
            inner = layout[_at(to_edge, layout) >= margin * pitch]
            if len(inner) < MIN_MARKERS:
                continue
            for reach in REACHES:
                polygon = _surround(inner, reach * pitch)
                best = max(best, (_stability(polygon, points, whole), polygon))
    return best[1]


def _stability(
    polygon: tuple[Point2, ...], points: list[NDArray[np.float32]], view: Gray
) -> tuple[float, float]:
    """Part of the frames with a steady count inside, and how clear of the edge markers stay."""
    corners = np.int32(np.round(polygon))
    inside = cv2.fillPoly(np.zeros_like(view), [corners], 255) & view
    edge = cv2.polylines(np.full_like(view, 255), [corners], True, 0)
    counts = np.array([np.count_nonzero(_at(inside, found)) for found in points])
    middle = np.median(counts)
    steady = float(np.mean(np.abs(counts - middle) <= STABLE * middle))
    to_edge = cv2.distanceTransform(edge, cv2.DIST_L2, 5)
    return round(steady, 2), float(np.mean([_at(to_edge, found).min() for found in points]))


def _at(image: NDArray[np.generic], points: NDArray[np.float32]) -> NDArray[np.generic]:
    u, v = np.clip(np.round(points).astype(int), 0, [WIDTH - 1, HEIGHT - 1]).T
    return image[v, u]


def _surround(points: NDArray[np.float32], distance: float) -> tuple[Point2, ...]:
    """Convex polygon at a distance around points, px."""
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    rim = distance * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    hull = cv2.convexHull(np.float32((points[:, None] + rim).reshape(-1, 2)))
    simple = cv2.approxPolyDP(hull, 0.05 * distance, closed=True)[:, 0]
    return tuple((round(float(x), 1), round(float(y), 1)) for x, y in simple)
