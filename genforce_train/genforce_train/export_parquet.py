"""A data set as plain Parquet, one row a frame, for pandas, Polars, DuckDB, Spark and the like.

    <out>/frames/<sensor>.parquet   labelled frames in order, one row group a contact
    <out>/rest/<sensor>.parquet     frames without contact
    <out>/references.parquet        the no-contact marker image of each sensor

    import numpy as np, pandas as pd
    frames = pd.read_parquet("out/frames/array_1.parquet", columns=["indenter", "contact", "fz"])
    packed = pd.read_parquet("out/references.parquet").marker_image[0]
    mask = np.unpackbits(np.frombuffer(packed, np.uint8)).reshape(480, 640)

Numbers are those of the data set, unrounded, in SI units; every column says in its metadata what it
is and in which unit. What was not measured is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from genforce_collect.layout import PACKED, UNKNOWN_PHASE
from genforce_train.cache import Cache

FORMAT = 1
WRENCH = {
    "fx": ("N", "force of the indenter on the gel, sensor frame"),
    "fy": ("N", "force of the indenter on the gel, sensor frame"),
    "fz": ("N", "force of the indenter on the gel, sensor frame; pressing is negative"),
    "tx": ("N m", "torque about the origin of the sensor frame"),
    "ty": ("N m", "torque about the origin of the sensor frame"),
    "tz": ("N m", "torque about the origin of the sensor frame"),
}
POSE = {
    "x": ("m", "tip of the indenter, sensor frame"),
    "y": ("m", "tip of the indenter, sensor frame"),
    "z": ("m", "tip of the indenter, sensor frame; 0 touches, negative is pressed in"),
    "rx": ("rad", "rotation vector of the tip"),
    "ry": ("rad", "rotation vector of the tip"),
    "rz": ("rad", "rotation vector of the tip"),
}
LABELS = {
    "depth": ("", "indentation over the full depth of the plan"),
    "wrench_age": ("s", "from the frame to the nearest wrench sample"),
    "pose_age": ("s", "from the frame to the nearest pose sample"),
}


def _field(name: str, kind: pa.DataType, unit: str, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"unit": unit, "description": description})


def _text(name: str) -> pa.Field:
    return _field(name, pa.dictionary(pa.int32(), pa.string()), "", f"name of the {name}")


def _numbers(described: dict[str, tuple[str, str]]) -> list[pa.Field]:
    return [_field(name, pa.float64(), *what) for name, what in described.items()]


IMAGE = _field(
    "marker_image", pa.binary(PACKED), "", "numpy.packbits of 480x640, 1 where a marker is"
)
ABOUT = {"genforce": json.dumps({"format": FORMAT})}
FRAMES = pa.schema(
    [
        _text("sensor"),
        _text("indenter"),
        _field("contact", pa.int32(), "", "number in the plan, the same for every sensor"),
        _field("frame", pa.int32(), "", "number in the contact"),
        _field("stamp_ns", pa.int64(), "ns", "capture time of the frame, since 1970 UTC"),
        _field("phase", pa.uint8(), "", "as in genforce_msgs/Contact"),
        *_numbers(WRENCH | POSE | LABELS),
        _field("flags", pa.uint32(), "", "as in genforce_msgs/Markers"),
        IMAGE,
    ],
    metadata=ABOUT,
)
REST = pa.schema([_text("sensor"), *_numbers(WRENCH), IMAGE], metadata=ABOUT)
REFERENCES = pa.schema([_text("sensor"), IMAGE], metadata=ABOUT)


def export_parquet(cache: Cache, out: Path) -> list[Path]:
    """Write the data set under `out`; returns the files. Memory is that of one contact."""
    written = []
    for sensor in sorted({key.sensor for key in cache.keys}):
        path = _folder(out / "frames") / f"{sensor}.parquet"
        with parquet.ParquetWriter(path, FRAMES, compression="zstd") as writer:
            for row in cache.select([sensor]):
                writer.write_table(_frames_of(cache, row))
        written.append(path)
    for sensor in cache.sensors:
        bits, wrench = cache.rest(sensor)
        path = _folder(out / "rest") / f"{sensor}.parquet"
        columns = {"sensor": [sensor] * len(bits), **_columns(WRENCH, wrench)}
        table = pa.Table.from_pydict(columns | {"marker_image": _bytes(bits)}, REST)
        parquet.write_table(table, path, compression="zstd")
        written.append(path)
    images = np.array([cache.reference(sensor) for sensor in cache.sensors], np.uint8)
    table = {"sensor": cache.sensors, "marker_image": _bytes(images.reshape(-1, PACKED))}
    path = _folder(out) / "references.parquet"
    parquet.write_table(pa.Table.from_pydict(table, REFERENCES), path, compression="zstd")
    return [*written, path]


def _frames_of(cache: Cache, row: int) -> pa.Table:
    contact = cache.contact(cache.keys[row])
    count = len(contact)
    columns = {
        "sensor": [contact.key.sensor] * count,
        "indenter": [contact.key.indenter] * count,
        "contact": np.full(count, contact.key.number, np.int32),
        "frame": np.arange(count, dtype=np.int32),
        "stamp_ns": _or_null(contact.stamp_ns, contact.stamp_ns == 0),
        "phase": _or_null(contact.phase, contact.phase == UNKNOWN_PHASE),
        **_columns(WRENCH, contact.wrench),
        **_columns(POSE, contact.pose),
        **{name: _or_null(getattr(contact, name)) for name in LABELS},
        "flags": contact.flags,
        "marker_image": _bytes(contact.bits),
    }
    return pa.Table.from_pydict(columns, FRAMES)


def _columns(names: Iterable[str], values: np.ndarray) -> dict[str, pa.Array]:
    return {name: _or_null(column) for name, column in zip(names, values.T, strict=True)}


def _or_null(values: np.ndarray, missing: np.ndarray | None = None) -> pa.Array:
    return pa.array(values, mask=np.isnan(values) if missing is None else missing)


def _bytes(bits: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in bits]


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
