"""Path-traced frames, where Blender's module is installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError
from genforce_sim.blender import render_photo
from genforce_sim.sensor import SimulatedSensor


def test_a_photo_shows_the_markers_where_the_fast_frame_has_them() -> None:
    sensor = SimulatedSensor(load_sensor("array_2"), "sphere", imperfections=False)
    state = sensor.step(np.array([0, 0, -0.0008, np.pi, 0, 0]), 0.1)
    if importlib.util.find_spec("bpy") is None:
        with pytest.raises(ConfigError, match=r"requirements/photo\.txt"):
            render_photo(sensor, state)
        return
    photo = render_photo(sensor, state, samples=8)
    mask = sensor.mask(state)
    assert photo.shape == (480, 640, 3)
    assert photo[mask].mean() + 30 < photo[~mask].mean()
