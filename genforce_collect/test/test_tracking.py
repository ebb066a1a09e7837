"""Markers are matched with the reference through all a gel does to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from genforce_collect.config import SegmentationConfig
from genforce_collect.markers.segmentation import MarkerSegmenter
from genforce_collect.markers.tracking import Coherence, Tracker, match

Points = NDArray[np.float64]
Grid = Callable[..., Points]
PITCH = 40.0


def press(points: Points, shear: tuple[float, float], spread: float = 0.0) -> Points:
    """A contact in the middle: shear at its centre, and radial motion, both fading outward."""
    offset = points - [319.5, 239.5]
    fade = np.exp(-(offset**2).sum(axis=1, keepdims=True) / (2 * 110.0**2))
    return points + fade * (np.asarray(shear) + spread * offset / 110.0)


def test_a_still_gel_matches_itself(marker_grid: Grid) -> None:
    points = marker_grid()
    found = match(points, points)
    assert found.index.tolist() == list(range(len(points)))
    assert not found.displacement.any()
    assert len(found.extra) == 0


@pytest.mark.parametrize("angle", np.linspace(0, 2 * np.pi, 8, endpoint=False))
def test_shear_by_more_than_a_pitch_is_followed_from_nothing(
    marker_grid: Grid, angle: float
) -> None:
    points = marker_grid()
    moved = press(points, (48 * np.cos(angle), 48 * np.sin(angle)), 10.0)
    order = np.random.default_rng(0).permutation(len(points))
    found = match(points, moved[order])
    right = order[found.index] == np.arange(len(points))
    assert (right & (found.index >= 0)).mean() > 0.98
    assert np.nanmax(np.abs(found.points - moved)[right]) < 1e-3


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    length=st.floats(0, 30),
    angle=st.floats(0, 6.28),
)
def test_missing_new_and_noisy_markers_do_not_mislead(
    seed: int, length: float, angle: float
) -> None:
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(12) * PITCH + 100, np.arange(9) * PITCH + 80)
    points = np.stack([x, y], axis=-1).reshape(-1, 2) + rng.normal(0, 2, (108, 2))
    moved = press(points, (length * np.cos(angle), length * np.sin(angle)))
    moved += rng.normal(0, 0.3, moved.shape)
    seen = rng.random(len(points)) > 0.08
    intruders = rng.uniform((100, 80), (540, 400), (4, 2))
    found = match(points, np.concatenate([moved[seen], intruders]))
    known = found.index >= 0
    error = np.linalg.norm(found.points[known] - moved[known], axis=1)
    assert (error < 2).mean() > 0.96
    assert known[seen].mean() > 0.93


def test_two_markers_merged_into_one_leave_one_missing(marker_grid: Grid) -> None:
    points = marker_grid()
    merged = np.delete(points, [80, 81], axis=0)
    found = match(points, np.concatenate([merged, [(points[80] + points[81]) / 2]]))
    assert (found.index[[80, 81]] < 0).any()
    others = np.delete(np.arange(len(points)), [80, 81])
    assert (found.index[others] >= 0).all()


def test_a_tracker_follows_a_motion_frame_by_frame_over_two_pitches(marker_grid: Grid) -> None:
    points = marker_grid(9, 7)
    tracker = Tracker(points)
    for step in np.linspace(0, 2 * PITCH, 17):
        found = tracker.update(points + np.array([step, 0.0]))
    assert found.matched == 1
    assert np.allclose(found.displacement, [2 * PITCH, 0], atol=1e-3)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_few_markers_are_matched_too(count: int) -> None:
    points = np.array([[100.0 + 50 * i, 100.0] for i in range(count)]).reshape(-1, 2)
    found = match(points, points + 1.0)
    assert found.matched == (1.0 if count else 0.0)
    assert match(points, np.zeros((0, 2))).matched == 0


@pytest.mark.parametrize("shear", [0.0, 20.0, 45.0])
def test_a_pressed_gel_continues_its_reference_and_another_layout_does_not(
    marker_grid: Grid, shear: float
) -> None:
    coherence = Coherence(marker_grid())
    assert coherence(press(marker_grid(), (shear, 0.0), 10.0)) > 0.5
    for seed in range(5):
        other = np.random.default_rng(seed).uniform((40, 40), (600, 440), (165, 2))
        assert coherence(other) < 0.2


@pytest.mark.parametrize("index", [0, 1])
def test_displacements_of_a_real_gel_agree_with_another_tracker(realdata: Path, index: int) -> None:
    """The other tracker gives whole pixels, cut off, and misplaces a few dots itself."""
    folder = realdata / "gelsight"
    rows = np.loadtxt(folder / f"tracked_{index}.csv", delimiter=",", skiprows=1)
    image = cv2.imread(str(folder / f"tracked_{index}.png"), cv2.IMREAD_GRAYSCALE)
    config = SegmentationConfig(diameter_px=23, frame_width=320, frame_height=240)
    frame = MarkerSegmenter(config)(image)
    assert frame.count == len(rows) == 99
    found = match((rows[:, :2] + 0.5) * 2 + 0.5, frame.points)
    assert found.matched == 1
    pixel = np.floor((found.points - 0.5) / 2)
    assert (np.abs(pixel - rows[:, :2] - rows[:, 2:]).max(axis=1) <= 1).mean() >= 0.95
