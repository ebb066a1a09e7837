"""Registration of a sensor's reference with its drawing, on instances whose mounting is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from genforce_collect.config import load_sensor
from genforce_collect.markers.registration import AS_DRAWN, Registration, register
from genforce_sim.optics import Imperfections
from genforce_sim.sensor import SimulatedSensor

FLAWS = Imperfections(
    turn_deg=1.6,
    shift_px=(-1.5, 1.8),
    scale=1.018,
    radial=-0.015,
    jitter_mm=0.02,
    size_spread=0.06,
    missing=0.01,
)


def masks(name, flaws=FLAWS, seed=3):
    sensor = load_sensor(name)
    return sensor, SimulatedSensor(sensor, "sphere", seed, flaws).reference.mask.astype(np.uint8)


@pytest.mark.parametrize("name", ["array_1", "circle_2", "diamond_1", "ratio_6", "tactip"])
def test_a_mounting_is_found_from_the_reference_alone(name):
    sensor, reference = masks(name)
    found = register(reference, sensor)
    assert np.degrees(found.turn_rad) == pytest.approx(FLAWS.turn_deg, abs=0.1)
    assert found.scale == pytest.approx(FLAWS.scale, abs=3e-3)
    assert found.radial == pytest.approx(FLAWS.radial, abs=1.2e-2)
    assert found.shift_px == pytest.approx(FLAWS.shift_px, abs=0.4)


def test_an_upright_image_is_that_of_the_sensor_as_drawn():
    flaws = replace(FLAWS, jitter_mm=0.0, size_spread=0.0, missing=0.0)
    sensor, reference = masks("array_1", flaws)
    drawn = masks("array_1", Imperfections())[1] > 0

    def overlap(mask):
        return (mask & drawn)[20:-20, 20:-20].sum() / (mask | drawn)[20:-20, 20:-20].sum()

    assert overlap(reference > 0) < 0.6
    assert overlap(register(reference, sensor).upright(reference) > 0) > 0.95


def test_the_motion_of_markers_is_scaled_and_turned_back():
    """Twelve pixels along the drawing's columns, as a camera mounted so shows them."""
    found = Registration(turn_rad=0.1, shift_px=(3.0, -2.0), scale=1.1)
    here, there = found.seen(np.array([[40.0, 30.0], [52.0, 30.0]]))
    assert np.hypot(*(there - here)) == pytest.approx(13.2)
    image = np.zeros((480, 640), np.uint8)
    u, v = np.rint(there).astype(int)
    image[v - 2 : v + 3, u - 2 : u + 3] = 1
    rows, columns = np.nonzero(found.upright(image))
    assert columns.mean() - 319.5 == pytest.approx(52, abs=1)
    assert rows.mean() - 239.5 == pytest.approx(30, abs=1)


@pytest.mark.parametrize(("shown", "drawn"), [("circle_1", "array_1"), ("uskin", "uskin")])
def test_what_is_not_as_the_file_says_is_left_as_it_is(shown, drawn):
    reference = masks(shown)[1]
    found = register(reference, load_sensor(drawn))
    assert found is AS_DRAWN
    assert found.upright(reference) is reference


def test_an_empty_reference_is_left_as_it_is():
    assert register(np.zeros((480, 640), np.uint8), load_sensor("array_1")) is AS_DRAWN
