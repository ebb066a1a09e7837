"""Markers are found where they are, whatever the light."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from genforce_collect.config import SegmentationConfig
from genforce_collect.markers.quality import Flag
from genforce_collect.markers.segmentation import MarkerFrame, MarkerSegmenter

Draw = Callable[..., Any]
DARK = SegmentationConfig(diameter_px=14)


def errors(frame: MarkerFrame, truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of each true marker to the nearest found one, px."""
    return cKDTree(frame.points).query(truth)[0]


def overlap(frame: MarkerFrame, truth: NDArray[np.bool_]) -> float:
    mask = frame.mask.astype(bool)
    return float((mask & truth).sum() / (mask | truth).sum())


@pytest.mark.parametrize("slope", [0.0, 0.8, -1.2])
@pytest.mark.parametrize(("gel", "marker"), [(130, 40), (140, 80), (80, 40)])
def test_every_dark_dot_is_found_under_uneven_light(
    draw_markers: Draw, slope: float, gel: float, marker: float
) -> None:
    picture = draw_markers(slope=slope, gel=gel, marker=marker)
    frame = MarkerSegmenter(DARK)(picture.image)
    assert frame.count == len(picture.points)
    assert np.sqrt((errors(frame, picture.points) ** 2).mean()) < 0.15
    assert overlap(frame, picture.mask) > 0.9
    assert frame.flags == 0


def test_light_pins_inside_a_round_view_are_found_and_its_rim_is_not(
    draw_markers: Draw, marker_grid: Callable[..., NDArray[np.float64]]
) -> None:
    points = marker_grid(13, 13, 24.0)
    points = points[np.hypot(*(points - [319.5, 239.5]).T) < 150]
    picture = draw_markers(points=points, diameter=10, gel=20, marker=170)
    image = cv2.circle(picture.image, (320, 240), 200, 255, 12)
    cv2.circle(image, (320 + 185, 240), 4, 255, -1)  # a glint
    config = SegmentationConfig(
        polarity="light", diameter_px=10, fov_circle_px=(319.5, 239.5, 175.0)
    )
    frame = MarkerSegmenter(config)(image)
    assert frame.count == len(points)
    assert errors(frame, points).max() < 0.5


def test_shadows_scratches_and_dust_are_no_markers(draw_markers: Draw) -> None:
    picture = draw_markers()
    image = picture.image.copy()
    cv2.line(image, (0, 20), (639, 460), 120, 2)
    cv2.rectangle(image, (250, 222), (390, 234), 100, -1)
    for x, y in ((60, 60), (300, 140), (500, 380)):
        cv2.circle(image, (x, y), 2, 60, -1)
    frame = MarkerSegmenter(DARK)(image)
    assert (cKDTree(picture.points).query(frame.points)[0] < 7).all()


def test_a_glint_on_a_dot_does_not_move_it(draw_markers: Draw) -> None:
    picture = draw_markers(diameter=20)
    image = picture.image.copy()
    x, y = picture.points[80]
    cv2.circle(image, (round(x) + 8, round(y)), 5, 250, -1)
    frame = MarkerSegmenter(SegmentationConfig(diameter_px=20))(image)
    assert frame.count == len(picture.points)
    assert errors(frame, picture.points)[80] < 1.5


def test_one_component_of_the_mask_is_one_centroid(draw_markers: Draw) -> None:
    shifted = draw_markers().points + np.array([13.0, 9.0])  # some cut by the edge
    frame = MarkerSegmenter(DARK)(draw_markers(points=shifted).image)
    count, _, stats, centres = cv2.connectedComponentsWithStats(frame.mask, connectivity=8)
    assert count - 1 == frame.count
    assert sorted(stats[1:, 4]) == sorted(frame.area)
    assert (cKDTree(centres[1:]).query(frame.points)[0] < 1).all()


def test_the_whole_of_a_wide_frame_is_seen_with_its_shape_kept(draw_markers: Draw) -> None:
    picture = draw_markers()
    wide = cv2.resize(
        cv2.copyMakeBorder(picture.image, 0, 0, 107, 106, cv2.BORDER_REPLICATE), (1280, 720)
    )
    config = SegmentationConfig(diameter_px=10.5, frame_width=1280, frame_height=720)
    segmenter = MarkerSegmenter(config)
    frame = segmenter(wide)
    assert frame.count == len(picture.points)
    expected = (picture.points + np.array([107, 0])) * 0.75 + [0, 60]
    assert errors(frame, expected).max() < 0.8
    assert not frame.mask[:60].any()
    assert not frame.mask[-60:].any()


def test_a_crop_and_four_corners_of_the_same_rectangle_agree(draw_markers: Draw) -> None:
    picture = draw_markers()
    box = (80, 60, 480, 360)
    corners = ((79.5, 59.5), (559.5, 59.5), (559.5, 419.5), (79.5, 419.5))
    cropped = MarkerSegmenter(SegmentationConfig(diameter_px=18.7, crop_px=box))(picture.image)
    warped = MarkerSegmenter(SegmentationConfig(diameter_px=18.7, corners_px=corners))(
        picture.image
    )
    assert cropped.count == warped.count
    assert errors(cropped, warped.points).max() < 0.5


def test_radial_distortion_is_undone(draw_markers: Draw) -> None:
    picture = draw_markers()
    offset = picture.points - [319.5, 239.5]
    radius2 = (offset**2).sum(axis=1, keepdims=True) / (319.5**2 + 239.5**2)
    bent = draw_markers(points=[319.5, 239.5] + offset * (1 - 0.1 * radius2))
    frame = MarkerSegmenter(SegmentationConfig(diameter_px=14, distortion=(-0.1, 0.0)))(bent.image)
    assert errors(frame, picture.points).max() < 0.3


@pytest.mark.parametrize(
    ("level", "expected"), [(0, Flag.NO_MARKERS | Flag.SATURATED), (128, Flag.NO_MARKERS)]
)
def test_an_image_without_markers_is_flagged(level: int, expected: Flag) -> None:
    noise = np.random.default_rng(0).normal(0, 2, (480, 640))
    image = np.clip(level + noise, 0, 255).astype(np.uint8)
    frame = MarkerSegmenter(DARK)(image)
    assert frame.count == 0
    assert frame.flags & expected == expected
    assert not frame.mask.any()


def test_an_overexposed_gel_is_flagged_and_not_miscounted(draw_markers: Draw) -> None:
    picture = draw_markers(gel=400, marker=120, slope=0.5)
    frame = MarkerSegmenter(DARK)(picture.image)
    assert frame.flags & Flag.SATURATED
    assert frame.count == len(picture.points)


def test_a_frame_of_another_size_is_scaled_and_flagged(draw_markers: Draw) -> None:
    picture = draw_markers()
    frame = MarkerSegmenter(DARK)(cv2.resize(picture.image, (1280, 960)))
    assert frame.flags == Flag.WRONG_SIZE
    assert errors(frame, picture.points).max() < 0.5


# --- real recordings --------------------------------------------------------------------------


def test_contact_texture_on_a_real_gel_is_not_taken_for_dots(realdata: Path) -> None:
    image = cv2.imread(str(realdata / "gelsight" / "mini_320x240.png"), cv2.IMREAD_GRAYSCALE)
    config = SegmentationConfig(diameter_px=31, frame_width=320, frame_height=240)
    assert MarkerSegmenter(config)(image).count == 63


@pytest.mark.parametrize("index", range(10))
def test_each_of_127_real_pins_is_found(realdata: Path, index: int) -> None:
    path = realdata / "tactip" / "pins127" / f"frame_{index}_0.png"
    config = SegmentationConfig(
        polarity="light",
        diameter_px=9.6,
        min_area=0.25,
        frame_width=256,
        frame_height=256,
        fov_circle_px=(319.5, 239.5, 215.0),
    )
    assert MarkerSegmenter(config)(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)).count == 127
