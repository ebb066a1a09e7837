"""Frames, masks, markers and fields of the simulated sensors."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from genforce_collect.config import SensorConfig, load_sensor
from genforce_collect.errors import ConfigError, DataError
from genforce_collect.markers.layouts import marker_positions, pattern_markers
from genforce_sim.sensor import ContactState, SimulatedSensor

SENSORS = [
    *("array_1", "array_2", "circle_1", "circle_2", "diamond_1"),
    *(f"ratio_{n}" for n in (6, 8, 10, 12, 14, 16, 18)),
    *("gelsight", "tactip", "uskin"),
]


def tip(x_mm: float, y_mm: float, z_mm: float) -> NDArray[np.float64]:
    """A tip pose that points straight into the gel."""
    return np.array([x_mm * 1e-3, y_mm * 1e-3, z_mm * 1e-3, math.pi, 0, 0])


def press(sensor: SimulatedSensor, *corners_mm: tuple[float, float, float]) -> ContactState:
    """Move the tip through the corners."""
    for corner in corners_mm:
        state = sensor.step(tip(*corner), 0.1)
    return state


@pytest.mark.parametrize("name", SENSORS)
def test_every_sensor_file_gives_markers_that_follow_a_press(name: str) -> None:
    config = load_sensor(name)
    sensor = SimulatedSensor(config, "sphere", seed=3)
    depth = config.plan.max_z_mm
    state = press(sensor, (0, 0, 0), (0, 0, -depth), (0.8, 0, -depth))
    frame, rest = sensor.render(state), sensor.reference
    assert frame.image.shape == (480, 640, 3)
    assert frame.image.dtype == np.uint8
    assert len(frame.markers) == len(rest.markers)
    moved = frame.markers - rest.markers
    assert moved[:, 0].max() > 6  # px, towards +x with the gel
    assert 0.7 < -state.wrench[2] < 12.0
    assert state.wrench[0] > 0.3
    assert state.displacement.shape == (3, 30, 40)
    assert state.displacement[2].min() == pytest.approx(-depth, abs=0.12 * depth)


def test_a_press_to_plus_y_shows_above_the_centre_and_turns_the_wrench_with_it() -> None:
    sensor = SimulatedSensor(load_sensor("array_1"), "sphere", imperfections=False)
    state = press(sensor, (2, 4, 0), (2, 4, -0.8))
    row, column = np.unravel_index(state.displacement[2].argmin(), (30, 40))
    assert (column + 0.5) * 16 - 320 == pytest.approx(2 * 27, abs=12)
    assert 240 - (row + 0.5) * 16 == pytest.approx(4 * 27, abs=12)
    assert state.wrench[3] == pytest.approx(4e-3 * state.wrench[2], rel=0.05)
    assert state.wrench[4] == pytest.approx(-2e-3 * state.wrench[2], rel=0.05)


def test_the_mask_holds_the_markers_where_they_are_said_to_be() -> None:
    sensor = SimulatedSensor(load_sensor("circle_1"), "moon", seed=5)
    state = press(sensor, (0, 0, 0), (0, 0, -1.0), (0.6, 0.4, -1.0))
    frame = sensor.render(state)
    assert np.array_equal(frame.mask, sensor.mask(state))
    count, _, _, centres = cv2.connectedComponentsWithStats(frame.mask.astype(np.uint8))
    inside = ((frame.markers > 12) & (frame.markers < [627, 467])).all(axis=1)
    nearest = np.linalg.norm(centres[1:, None] - frame.markers[inside], axis=2).min(axis=0)
    assert np.percentile(nearest, 95) < 0.5  # px
    assert inside.sum() <= count - 1 <= len(frame.markers)
    assert (frame.image[frame.mask].mean() + 60) < frame.image[~frame.mask].mean()


def test_at_rest_a_marker_stands_at_the_pixel_of_its_place() -> None:
    config = load_sensor("array_2")
    sensor = SimulatedSensor(config, "sphere", imperfections=False)
    x, y = marker_positions(config.layout, config.gel).T
    expected = np.stack([319.5 + x * config.px_per_mm, 239.5 - y * config.px_per_mm], axis=1)
    assert sensor.reference.markers == pytest.approx(expected, abs=1e-3)


def test_instances_differ_as_seeds_do_and_repeat_with_them() -> None:
    config = load_sensor("array_1")
    one, same, other = (SimulatedSensor(config, "sphere", seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.reference.image, same.reference.image)
    shift = np.median(np.abs(one.reference.image.astype(int) - other.reference.image))
    assert shift > 1
    frames = [sensor.render(press(sensor, (0, 0, -0.5))).image for sensor in (one, same)]
    assert np.array_equal(*frames)


def test_noise_is_new_in_every_frame() -> None:
    sensor = SimulatedSensor(load_sensor("array_1"), "sphere")
    state = press(sensor, (0, 0, 5))
    first, second = sensor.render(state).image, sensor.render(state).image
    difference = first.astype(int) - second
    assert 1.5 < difference.std() < 6
    assert np.abs(difference.mean()) < 0.1


def test_softer_gels_push_back_less_at_the_same_depth() -> None:
    names = [f"ratio_{n}" for n in (6, 10, 14, 18)]
    forces = [
        -press(SimulatedSensor(load_sensor(name), "sphere"), (0, 0, 0), (0, 0, -0.8)).wrench[2]
        for name in names
    ]
    assert forces == sorted(forces, reverse=True)
    assert forces[0] > 2 * forces[-1]


def test_pins_spread_around_a_press_on_the_dome() -> None:
    sensor = SimulatedSensor(load_sensor("tactip"), "sphere", imperfections=False)
    rest = sensor.reference.markers
    moved = sensor.render(press(sensor, (0, 0, 0), (0, 0, -3.0))).markers - rest
    outward = rest - [319.5, 239.5]
    radius = np.linalg.norm(outward, axis=1)
    ring = (radius > 45) & (radius < 90)
    along = (moved * outward).sum(axis=1)[ring] / radius[ring]
    assert len(rest) == 127
    assert along.mean() > 3  # px


def test_taxels_count_what_presses_on_them() -> None:
    sensor = SimulatedSensor(load_sensor("uskin"), "cylinder", seed=4)
    rest = sensor.taxels(press(sensor, (0, 0, 5)))
    # The taxel of the first row and column lies at the top left.
    change = sensor.taxels(press(sensor, (-7, 7, 0), (-7, 7, -0.8))) - rest
    assert rest.shape == (16, 3)
    assert abs(rest.mean(axis=0)[2] - 37500) < 500
    assert change[:, 2].argmax() == 0
    assert change[0, 2] > 500
    again = sensor.taxels(press(sensor, (0, 0, 5))) - sensor.taxels(press(sensor, (0, 0, 5)))
    assert 1.0 < again.std() < 6.0


def test_a_half_turn_written_with_the_other_sign_is_no_motion() -> None:
    sensor = SimulatedSensor(load_sensor("array_1"), "prism")
    state = press(sensor, (0, 0, 0), (0, 0, -0.8))
    pose = tip(0, 0, -0.8)
    pose[3] = -pose[3]
    assert sensor.step(pose, 0.0).wrench == pytest.approx(state.wrench, abs=0.05)


def test_a_jump_to_another_place_drags_no_gel_along() -> None:
    config = load_sensor("array_1")
    jumped = SimulatedSensor(config, "sphere", imperfections=False)
    press(jumped, (-6, 0, 0), (-6, 0, -0.8))
    state = press(jumped, (6, 0, -0.8), (6, 0, -0.8))
    fresh = press(SimulatedSensor(config, "sphere", imperfections=False), (6, 0, -0.8))
    assert state.wrench[0] == pytest.approx(0.0, abs=0.1)
    assert state.wrench[2] == pytest.approx(fresh.wrench[2], rel=0.15)


def test_a_leaning_tool_meets_the_gel_on_one_side() -> None:
    sensor = SimulatedSensor(load_sensor("array_1"), "cylinder", imperfections=False)
    pose = tip(0, 0, -0.3)
    pose[3:] = [math.pi * math.cos(0.03), 0.0, math.pi * math.sin(0.03)]
    sensor.step(pose + np.array([0, 0, 1e-3, 0, 0, 0]), 0.1)
    state = sensor.step(pose, 0.1)
    assert abs(state.wrench[4]) > 3e-4


@pytest.mark.parametrize(
    "pose",
    [np.full(6, np.nan), np.zeros(5), np.array([0, 0, 0, 0.0, 0, 0])],
    ids=["not finite", "five numbers", "tool upwards"],
)
def test_an_impossible_pose_is_refused(pose: NDArray[np.float64]) -> None:
    with pytest.raises(DataError):
        SimulatedSensor(load_sensor("array_1"), "sphere").step(pose, 0.1)


# --- layouts ----------------------------------------------------------------------------------


def with_layout(**layout: object) -> SensorConfig:
    config = load_sensor("array_1").model_dump()
    return SensorConfig.model_validate(config | {"layout": config["layout"] | layout})


@pytest.mark.parametrize("pattern", ["staggered", "spiral", "scattered", "hexagon", "diamond"])
def test_markers_of_every_pattern_keep_apart_and_on_the_gel(pattern: str) -> None:
    config = with_layout(pattern=pattern, rows=9, columns=9, pitch_mm=1.8, seed=3)
    places = marker_positions(config.layout, config.gel)
    apart = np.linalg.norm(places[:, None] - places, axis=2) + 99 * np.eye(len(places))
    assert len(places) > 40
    assert apart.min() > 1.3
    assert (np.abs(places) <= [12.5, 10.0]).all()


def test_a_pattern_picture_gives_the_markers_it_shows(tmp_path: Path) -> None:
    sensor = SimulatedSensor(load_sensor("array_2"), "sphere", imperfections=False)
    picture = sensor.reference.mask.astype(np.uint8) * 255
    cv2.imwrite(str(tmp_path / "pattern.png"), picture)
    config = with_layout(
        pattern="image", image=str(tmp_path / "pattern.png"), image_width_mm=640 / 27
    )
    found = marker_positions(config.layout, config.gel)
    inside = (np.abs(sensor.reference.markers - [319.5, 239.5]) < [305, 225]).all(axis=1)
    drawn = (sensor.reference.markers[inside] - [319.5, 239.5]) * [1, -1] / 27
    assert np.linalg.norm(found[:, None] - drawn, axis=2).min(axis=0).max() < 0.03  # mm


def test_a_picture_without_markers_is_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "black.png"), np.zeros((50, 50), np.uint8))
    for name in ("black.png", "absent.png"):
        config = with_layout(pattern="image", image=str(tmp_path / name))
        with pytest.raises(ConfigError, match=name):
            marker_positions(config.layout, config.gel)


def test_printed_patterns_are_read(realdata: Path) -> None:
    counts = {
        path.stem: len(pattern_markers(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), 25.0))
        for path in sorted((realdata / "patterns").glob("*.jpg"))
    }
    assert counts["Array1"] == 225
    assert counts["Array2"] == 100
    assert counts["uskin_ref"] == 16
    assert counts["tactip_ref"] == pytest.approx(127, abs=1)
    assert min(counts.values()) >= 16
