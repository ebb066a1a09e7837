"""Recorded frames as a network reads them, with the force that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from genforce_collect.bags import BagReader
from genforce_collect.config import SensorConfig
from genforce_collect.errors import DataError
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.reference import UNFIT
from genforce_infer.bundle import Manifest
from genforce_infer.offline import interpolate, measured_wrenches
from genforce_infer.pipeline import REFERENCE_FRAMES, WRENCH_AXES, majority, network_view


@dataclass(frozen=True)
class LabelledFrames:
    """Sequences (T, C, H, W) float32 of input images, and the forces (T, A) measured meanwhile in
    N and N m; none where they were not."""

    images: Sequence[np.ndarray]
    measured: Sequence[np.ndarray] = ()


def read_labelled(
    bag: BagReader, sensor: SensorConfig, manifest: Manifest, limit: int
) -> tuple[LabelledFrames, LabelledFrames]:
    """Good frames among the first `limit` of a bag, every other quarter of them in each: to take
    ranges from, and to judge by.

    The reference is the majority of the first ones. Raises `DataError` where there are too few.
    """
    images, stamps = _network_images(bag, sensor, manifest, limit)
    axes = [WRENCH_AXES.index(axis) for axis in manifest.outputs]
    measured = interpolate(stamps, *measured_wrenches(bag))[:, axes]

    def part(quarters: list[np.ndarray]) -> LabelledFrames:
        labels = [measured[rows] for rows in quarters]
        known = all(np.isfinite(label).all() for label in labels)
        return LabelledFrames([images[rows] for rows in quarters], labels if known else ())

    quarters = np.array_split(np.arange(len(images)), 4)
    return part(quarters[::2]), part(quarters[1::2])


def _network_images(
    bag: BagReader, sensor: SensorConfig, manifest: Manifest, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Network inputs (T, C, H, W) float32 and their stamps (T,) ns."""
    spec = manifest.input
    topic = f"/genforce/{sensor.name}/image/compressed"
    front = Frontend(sensor)
    masks, stamps = [], []
    for record in islice(bag.messages([topic]), limit):
        frame = front.process_jpeg(record.message.data.tobytes())
        if not frame.flags & UNFIT:
            masks.append(frame.mask)
            stamps.append(record.stamp_ns)
    if len(masks) < 8 * REFERENCE_FRAMES:
        raise DataError(f"{bag.path}: {len(masks)} good frames on {topic}; too few to judge by")
    reference = majority(masks[:REFERENCE_FRAMES])
    view = network_view(spec, sensor, reference)
    seen = {"mask": [*map(view, masks)], "reference": [view(reference)] * len(masks)}
    images = np.stack([np.stack(seen[channel]) for channel in spec.channels], axis=1)
    return images, np.array(stamps, np.int64)
