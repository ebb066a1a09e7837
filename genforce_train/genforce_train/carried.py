"""Frames of one sensor translated for a model that reads another's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genforce_train.cache import Cache
from genforce_train.models.force import ChangeMaps
from genforce_train.sequences import MapSource, area_images, frame_images
from genforce_train.train_m2m import know_sensor, load_m2m


class CarriedChanges(MapSource):
    """Change maps of frames as a source sensor would show them, translated as a live bundle does:
    each frame by itself, at the network's size."""

    def __init__(self, cache: Cache, m2m_model: str | Path, source: str) -> None:
        """Raises `DataError` for a checkpoint of another kind."""
        super().__init__(np.empty(0), ChangeMaps.odd)
        self._read = frame_images(cache)
        self._wanted = area_images(cache.reference(source)[None])[:, None]
        self._translator, self._front = load_m2m(m2m_model)[0], ChangeMaps()
        for name in cache.sensors:
            know_sensor(self._translator, name, cache.reference(name))

    def images(self, frames: np.ndarray, sensors: np.ndarray) -> Tensor:
        """See `FrameSource`."""
        seen = self._read(frames)
        wanted = self._wanted.expand(len(seen), -1, -1, -1)
        with torch.inference_mode():
            return self._front(torch.cat([self._translator(seen, wanted), wanted], 1))
