"""A data set in LeRobot's format (v3.0), written by its own library: one data set a sensor, one
episode a contact.

    <out>/<sensor>/                 root of a LeRobotDataset
    <out>/<sensor>/reference.png    the no-contact marker image

    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    dataset = LeRobotDataset("genforce/array_1", root="out/array_1")

| feature | what |
|---|---|
| observation.images.markers | 480x640 marker image, white on black, without loss |
| observation.wrench | force N and torque N m of the indenter on the gel, sensor frame |
| observation.state | pose of the tip, sensor frame: m and rotation vector rad |
| observation.depth | indentation over the full depth of the plan |
| observation.phase | as in genforce_msgs/Contact |
| observation.stamp | s since the contact's first frame, as measured |

LeRobot numbers frames by the rate alone; `observation.stamp` keeps when they were taken. What was
not measured on a sensor has no feature. The library's pins clash with ours, so it lives in an
environment of its own: requirements/lerobot.txt says how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from genforce_collect.errors import DataError
from genforce_collect.layout import HEIGHT, UNKNOWN_PHASE, WIDTH, Contact, unpack
from genforce_train.cache import Cache

MARKERS = "observation.images.markers"
VECTORS = {
    "observation.wrench": ("wrench", ("fx", "fy", "fz", "tx", "ty", "tz")),
    "observation.state": ("pose", ("x", "y", "z", "rx", "ry", "rz")),
    "observation.depth": ("depth", ("depth",)),
}
WRITER_THREADS = 2


def export_lerobot(cache: Cache, out: Path, fps: int | None = None) -> list[Path]:
    """Write the data set under `out`; returns the root of each sensor's.

    `fps` is needed for a sensor whose frames have no stamps. Raises `DataError`.
    """
    try:
        from datasets import disable_progress_bars  # it would draw one an episode
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise DataError(
            f"writing this format needs lerobot, which wants an environment of its own: "
            f"see requirements/lerobot.txt ({error})"
        ) from error
    disable_progress_bars()
    roots = []
    for sensor in sorted({key.sensor for key in cache.keys}):
        rows = cache.select([sensor])
        root = out / sensor
        dataset = LeRobotDataset.create(
            f"genforce/{sensor}",
            fps=fps or _rate(cache, sensor, rows),
            features=features(cache, rows),
            root=root,
            robot_type="genforce",
            use_videos=False,
            image_writer_threads=WRITER_THREADS,
        )
        for row in rows:
            for frame in frames(cache.contact(cache.keys[row]), dataset.features):
                dataset.add_frame(frame)
            dataset.save_episode()
        dataset.finalize()
        dataset.stop_image_writer()
        if sensor in cache.sensors:
            cv2.imwrite(str(root / "reference.png"), unpack(cache.reference(sensor)) * 255)
        roots.append(root)
    return roots


def features(cache: Cache, rows: list[int]) -> dict[str, dict[str, Any]]:
    """LeRobot's description of what these contacts hold, without what was not measured."""
    frames = np.concatenate([np.r_[cache.rows(row)] for row in rows])
    found: dict[str, dict[str, Any]] = {
        MARKERS: {
            "dtype": "image",
            "shape": (HEIGHT, WIDTH, 3),
            "names": ["height", "width", "channels"],
        }
    }
    for name, (field, axes) in VECTORS.items():
        if not np.isnan(cache.array(field)[frames]).all():
            found[name] = {"dtype": "float32", "shape": (len(axes),), "names": list(axes)}
    if (cache.array("phase")[frames] != UNKNOWN_PHASE).any():
        found["observation.phase"] = {"dtype": "uint8", "shape": (1,), "names": ["phase"]}
    if (cache.array("stamp_ns")[frames] != 0).any():
        found["observation.stamp"] = {"dtype": "float64", "shape": (1,), "names": ["s"]}
    return found


def frames(contact: Contact, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The frames of a contact as LeRobot takes them, with the features that are wanted."""
    count = len(contact)
    columns: dict[str, np.ndarray] = {
        name: getattr(contact, field).reshape(count, -1).astype(np.float32)
        for name, (field, _) in VECTORS.items()
    }
    columns["observation.phase"] = contact.phase[:, None]
    columns["observation.stamp"] = ((contact.stamp_ns - contact.stamp_ns[0]) * 1e-9)[:, None]
    columns[MARKERS] = np.repeat(unpack(contact.bits)[..., None] * np.uint8(255), 3, -1)
    task = f"press {contact.key.sensor} with {contact.key.indenter}"
    return [
        {name: column[number] for name, column in columns.items() if name in wanted}
        | {"task": task}
        for number in range(count)
    ]


def _rate(cache: Cache, sensor: str, rows: list[int]) -> int:
    stamps = cache.array("stamp_ns")
    steps = np.concatenate([np.diff(stamps[cache.rows(row)]) for row in rows])
    steps = steps[steps > 0]
    if not len(steps):
        raise DataError(f"{cache.folder}: frames of '{sensor}' have no stamps; give their --fps")
    return max(1, round(1e9 / float(np.median(steps))))
