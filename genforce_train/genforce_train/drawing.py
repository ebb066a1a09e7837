"""What is known of a sensor beside its images: its file, and how its reference lies to that."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np

from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError
from genforce_collect.layout import unpack
from genforce_collect.markers.registration import AS_DRAWN, Registration, register
from genforce_train.models.field import PX_PER_MM


@dataclass(frozen=True)
class Drawing:
    """Scale of the 480x640 image, distance of the camera, and how it is mounted; by default what a
    sensor without a file is taken for."""

    px_per_mm: float = PX_PER_MM
    camera_distance_mm: float = 40.0
    mounting: Registration = AS_DRAWN


def drawing_of(name: str, reference: np.ndarray) -> Drawing:
    """Of the sensor with this name and packed reference (38400,)."""
    with contextlib.suppress(ConfigError):  # a data set of others has no sensor files
        sensor = load_sensor(name)
        mounting = register(unpack(reference), sensor)
        return Drawing(sensor.px_per_mm, sensor.optics.camera_distance_mm, mounting)
    return Drawing()
