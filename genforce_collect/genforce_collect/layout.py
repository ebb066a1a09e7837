"""The training layout on disk: what one contact is, and how it is read and written.

    <root>/img/<sensor>/<indenter>/<contact>/NNNN.npy   packed 480x640 marker image (numpy.packbits)
    <root>/img/<sensor>/<indenter>/<contact>/last.csv   last frame of each phase, one path a line
    <root>/img/<sensor>_ref.npy                         packed no-contact marker image
    <root>/force/<sensor>/<indenter>/<contact>/{ft,pose,timing}.csv
    <root>/depth/<sensor>/<indenter>/<contact>/{inc_z,dec_z}.csv   normalised depth, no header
    <root>/rest/<sensor>/{NNNN.npy,ft.csv}              frames without contact, with their wrench
    <root>/provenance.json

It is the layout of the published GenForce data; `timing.csv`, `rest/` and `provenance.json` are
ours, and readers do without them. The published variants `img/npy`, `img/npy_csv` (where
`last.csv` stands) and `.jpg` frames are read as well.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from genforce_collect.errors import DataError

HEIGHT, WIDTH = 480, 640
PACKED = HEIGHT * WIDTH // 8
JPEG_THRESHOLD = 50  # masks kept as .jpg are white above it

# Phases as in genforce_msgs/Contact.
NORMAL_INC, SHEAR_INC, SHEAR_DEC, NORMAL_DEC, DOWN, UP = 2, 3, 4, 5, 8, 9
LOADING = (NORMAL_INC, SHEAR_INC, DOWN)
TOUCHING = (NORMAL_INC, SHEAR_INC, SHEAR_DEC, NORMAL_DEC, DOWN, UP)
UNKNOWN_PHASE = 255
NOT_FINITE = "NaN or infinite"  # in what is said of contacts with such labels

WRENCH_COLUMNS = ("Fx(N)", "Fy(N)", "Fz(N)", "Tx(Nmm)", "Ty(Nmm)", "Tz(Nmm)")
POSE_COLUMNS = ("X(m)", "Y(m)", "Z(m)", "RX(rad)", "RY(rad)", "RZ(rad)")
TIMING_COLUMNS = ("stamp(ns)", "phase", "wrench_age(s)", "pose_age(s)", "flags")
WRENCH_UNIT = np.array([1, 1, 1, 1e3, 1e3, 1e3])  # SI to the columns of ft.csv


@dataclass(frozen=True, order=True)
class ContactKey:
    """Which contact: numbers run with the plan, so that sensors can be matched by them."""

    sensor: str
    indenter: str
    number: int

    def __str__(self) -> str:
        return f"{self.sensor}/{self.indenter}/{self.number}"


@dataclass(frozen=True)
class Contact:
    """The frames of one whole contact and what was measured at their stamps.

    bits (n, 38400) uint8 packed marker images; wrench (n, 6) N and N m on the gel, sensor frame;
    pose (n, 6) of the tip, sensor frame, m and rotation vector rad; depth (n,) indentation over
    the full depth of the plan; phase (n,) uint8 as in genforce_msgs/Contact, 255 where unknown;
    stamp_ns (n,) int64; wrench_age, pose_age (n,) s to the nearest sample; flags (n,) uint32 of
    genforce_msgs/Markers.
    """

    key: ContactKey
    bits: np.ndarray
    wrench: np.ndarray
    pose: np.ndarray
    depth: np.ndarray
    phase: np.ndarray
    stamp_ns: np.ndarray
    wrench_age: np.ndarray
    pose_age: np.ndarray
    flags: np.ndarray
    source: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.bits)

    def last_frames(self) -> list[int]:
        """Number of the last frame of each phase, in the order of the phases."""
        ends = np.flatnonzero(np.diff(self.phase.astype(int)) != 0)
        return [*ends.tolist(), len(self) - 1]


def unpack(bits: np.ndarray) -> np.ndarray:
    """Packed marker images (..., 38400) -> (..., 480, 640) uint8 of 0 and 1."""
    return np.unpackbits(bits, axis=-1).reshape(*bits.shape[:-1], HEIGHT, WIDTH)


def pack(mask: np.ndarray) -> np.ndarray:
    """(..., 480, 640) of zero and nonzero -> packed (..., 38400) uint8."""
    return np.packbits(np.asarray(mask, bool).reshape(*mask.shape[:-2], -1), axis=-1)


class Layout:
    """A folder in the training layout. Reading names every fault with its file (`DataError`)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.images = self.root / "img"
        if (self.images / "npy").is_dir():
            self.images /= "npy"
        self.forces = self.root / "force"
        self.depths = self.root / "depth"
        self.rest = self.root / "rest"
        self.provenance_path = self.root / "provenance.json"
        self._known_sources: tuple[int, dict[str, Any]] = 0, {}

    # --- reading ------------------------------------------------------------------------------

    def contacts(self) -> list[ContactKey]:
        """Every contact that has labels, in order."""
        found = [
            ContactKey(path.parent.parent.parent.name, path.parent.parent.name, int(number))
            for path in self.forces.glob("*/*/*/ft.csv")
            if (number := path.parent.name).isdecimal()
        ]
        return sorted(found)

    def sensors(self) -> list[str]:
        """Names of the sensors that have labels."""
        return sorted({key.sensor for key in self.contacts()})

    def frame_paths(self, key: ContactKey) -> list[Path]:
        """The contact's marker images in order."""
        folder = self._folder(self.images, key)
        return sorted(path for path in folder.glob("*") if path.suffix in {".npy", ".jpg"})

    def read(self, key: ContactKey) -> Contact:
        """One contact; what the layout does not hold (stamps, ages) is NaN or zero."""
        force = self._folder(self.forces, key)
        wrench = read_columns(force / "ft.csv", WRENCH_COLUMNS, at_least=3) / WRENCH_UNIT
        paths = self.frame_paths(key)
        count = len(wrench)
        if len(paths) != count:
            raise DataError(
                f"{self._folder(self.images, key)}: {len(paths)} frames for {count} rows of "
                f"ft.csv; leave the contact out or build it again"
            )
        if count == 0:
            raise DataError(f"{force / 'ft.csv'}: holds no rows")
        if len(bad := np.flatnonzero(~np.isfinite(wrench).all(1))):
            raise DataError(
                f"{force / 'ft.csv'}: {NOT_FINITE} labels in line {bad[0] + 2}"
                + f" and {len(bad) - 1} more" * (len(bad) > 1)
                + "; leave the contact out or build it again"
            )
        timing = np.zeros((count, len(TIMING_COLUMNS)))
        timing[:, 1] = UNKNOWN_PHASE
        timing[:, 2:4] = np.nan
        stamp_ns = np.zeros(count, np.int64)
        if (path := force / "timing.csv").is_file():
            timing = read_columns(path, TIMING_COLUMNS)
            stamp_ns = _read_integers(path)
        pose = np.full((count, 6), np.nan)
        if (path := force / "pose.csv").is_file():
            pose = read_columns(path, POSE_COLUMNS)
        depth = self._read_depth(key, count)
        for name, rows in (("timing.csv", timing), ("pose.csv", pose)):
            if len(rows) != count:
                raise DataError(f"{force / name}: {len(rows)} rows for {count} of ft.csv")
        return Contact(
            key=key,
            bits=np.stack([read_mask(path) for path in paths]),
            wrench=wrench,
            pose=pose,
            depth=depth,
            phase=timing[:, 1].astype(np.uint8),
            stamp_ns=stamp_ns,
            wrench_age=timing[:, 2],
            pose_age=timing[:, 3],
            flags=timing[:, 4].astype(np.uint32),
            source=self._sources().get(str(key), {}),
        )

    def read_reference(self, sensor: str) -> np.ndarray:
        """Packed no-contact image (38400,) of a sensor."""
        if path := self._reference_path(sensor):
            return read_mask(path)
        raise DataError(
            f"{self.images}: no {sensor}_ref.npy; record frames without contact and build again"
        )

    def _reference_path(self, sensor: str) -> Path | None:
        folders = (self.images, self.root / "img")
        paths = (f / f"{sensor}_ref{suffix}" for f in folders for suffix in (".npy", ".jpg"))
        return next(filter(Path.is_file, paths), None)

    def read_rest(self, sensor: str) -> tuple[np.ndarray, np.ndarray]:
        """Frames without contact: packed (n, 38400) and wrench (n, 6); n = 0 where none is kept."""
        folder = self.rest / sensor
        paths = sorted(folder.glob("*.npy"))
        if not paths:
            return np.empty((0, PACKED), np.uint8), np.empty((0, 6))
        wrench = read_columns(folder / "ft.csv", WRENCH_COLUMNS) / WRENCH_UNIT
        if len(wrench) != len(paths):
            raise DataError(f"{folder}: {len(paths)} frames for {len(wrench)} rows of ft.csv")
        return np.stack([read_mask(path) for path in paths]), wrench

    def read_last(self, key: ContactKey) -> list[int]:
        """Number of the last frame of each phase as `last.csv` has it; empty without that file."""
        path = self._folder(self.images, key) / "last.csv"
        if self.images.name == "npy" and not path.is_file():
            path = self._folder(self.images.with_name("npy_csv"), key) / "last.csv"
        if not path.is_file():
            return []
        try:
            return [int(Path(line).stem) for line in path.read_text().split()]
        except ValueError as error:
            raise DataError(f"{path}: expected paths of numbered frames: {error}") from error

    def provenance(self) -> dict[str, Any]:
        """What was built from which bag; empty for data sets of others."""
        path = self.provenance_path
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON: {error}") from error

    def _sources(self) -> dict[str, Any]:
        """Provenance of each contact, read once and again where it has changed."""
        path = self.provenance_path
        version = path.stat().st_mtime_ns if path.is_file() else 0
        if self._known_sources[0] != version:
            self._known_sources = version, self.provenance().get("contacts", {})
        return self._known_sources[1]

    def _read_depth(self, key: ContactKey, count: int) -> np.ndarray:
        folder = self._folder(self.depths, key)
        parts = [folder / "inc_z.csv", folder / "dec_z.csv"]
        if not all(path.is_file() for path in parts):
            return np.full(count, np.nan)
        try:
            depth = np.array([float(row) for path in parts for row in path.read_text().split()])
        except ValueError as error:
            raise DataError(f"{folder}: {error}") from error
        if len(depth) != count:
            raise DataError(f"{folder}: {len(depth)} depths for {count} rows of ft.csv")
        return depth

    # --- writing ------------------------------------------------------------------------------

    def holds(self, key: ContactKey) -> bool:
        """Whether the contact is there, whole (ft.csv comes last)."""
        return (self._folder(self.forces, key) / "ft.csv").is_file()

    def holds_reference(self, sensor: str) -> bool:
        """Whether the no-contact image of a sensor is there."""
        return self._reference_path(sensor) is not None

    def write(self, contact: Contact, suffix: str = ".npy") -> None:
        """Write or replace one contact; a kill in between leaves it absent, not half there. Pose
        and depth that were not measured (NaN throughout) get no file; `suffix`: .npy or .jpg."""
        key = contact.key
        shutil.rmtree(self._folder(self.forces, key), ignore_errors=True)
        folder = _fresh(self._folder(self.images, key))
        for number, bits in enumerate(contact.bits):
            _write_mask(folder / f"{number:04d}{suffix}", bits)
        relative = f"{key.sensor}/{key.indenter}/{key.number}"
        names = [f"{relative}/{number:04d}{suffix}\n" for number in contact.last_frames()]
        (folder / "last.csv").write_text("".join(names))

        folder = self._folder(self.depths, key)
        shutil.rmtree(folder, ignore_errors=True)
        if not np.isnan(contact.depth).all():
            folder.mkdir(parents=True)
            loading = np.isin(contact.phase, LOADING)
            for name, chosen in (("inc_z", loading), ("dec_z", ~loading)):
                rows = "".join(f"{depth:.6f}\n" for depth in contact.depth[chosen])
                (folder / f"{name}.csv").write_text(rows)

        folder = _fresh(self._folder(self.forces, key))
        if not np.isnan(contact.pose).all():
            _write_columns(
                folder / "pose.csv", POSE_COLUMNS, ["%.9f"] * 6, np.round(contact.pose, 9).T + 0.0
            )
        timing = (
            contact.stamp_ns,
            contact.phase,
            contact.wrench_age,
            contact.pose_age,
            contact.flags,
        )
        _write_columns(
            folder / "timing.csv", TIMING_COLUMNS, ["%d", "%d", "%.6f", "%.6f", "%d"], timing
        )
        partial = folder / "ft.partial"
        _write_wrench(partial, contact.wrench)
        os.replace(partial, folder / "ft.csv")

    def write_reference(self, sensor: str, bits: np.ndarray) -> None:
        """Keep the packed no-contact image (38400,) of a sensor."""
        self.images.mkdir(parents=True, exist_ok=True)
        path = self.images / f"{sensor}_ref.npy"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, bits)
        partial.replace(path)

    def write_rest(self, sensor: str, bits: np.ndarray, wrench: np.ndarray) -> None:
        """Keep frames without contact: packed (n, 38400), wrench (n, 6) SI. Write the reference
        after it: who finds that takes the sensor to be whole."""
        folder = _fresh(self.rest / sensor)
        for number, frame in enumerate(bits):
            np.save(folder / f"{number:04d}.npy", frame)
        _write_wrench(folder / "ft.csv", wrench)

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        """Keep what was built from what."""
        write_json(self.provenance_path, provenance, sort_keys=True)

    @staticmethod
    def _folder(tree: Path, key: ContactKey) -> Path:
        return tree / key.sensor / key.indenter / str(key.number)


def read_mask(path: Path) -> np.ndarray:
    """Packed marker image (38400,) from packed or 2D `.npy` or from `.jpg`. Raises `DataError`."""
    if path.suffix == ".jpg":
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if image is None:
            raise DataError(f"{path}: not a readable image")
        mask = image > JPEG_THRESHOLD
    else:
        try:
            mask = np.load(path, allow_pickle=False)
            plain = isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf"
        except Exception as error:  # numpy's own are many, down to those of zip and memory
            raise DataError(f"{path}: not a readable .npy: {error}") from error
        if not plain:
            raise DataError(f"{path}: not an array of numbers")
        if mask.shape == (PACKED,) and mask.dtype == np.uint8:
            return np.asarray(mask)
    if mask.shape != (HEIGHT, WIDTH):
        raise DataError(f"{path}: marker image of shape {mask.shape}, expected (480, 640)")
    return pack(mask)


def _write_mask(path: Path, bits: np.ndarray) -> None:
    if path.suffix == ".jpg":
        done, data = cv2.imencode(".jpg", unpack(bits) * 255)
        if not done:
            raise DataError(f"{path}: the image could not be encoded")
        path.write_bytes(data.tobytes())
    else:
        np.save(path, bits)


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write a JSON file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, sort_keys=sort_keys) + "\n")
    partial.replace(path)


def read_columns(path: Path, columns: Iterable[str], at_least: int | None = None) -> np.ndarray:
    """(n, columns) of a CSV with that header; columns after `at_least` may be absent (zero).

    Raises `DataError` for other names, order or units, and for rows that are not numbers.
    """
    columns = tuple(columns)
    try:
        rows = list(csv.reader(io.StringIO(path.read_text())))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: not a text of columns: {error}") from error
    header = tuple(name.strip() for name in rows[0]) if rows else ()
    known = len(header) >= (at_least or len(columns)) and header == columns[: len(header)]
    if not known:
        raise DataError(f"{path}: columns {','.join(header)}, expected {','.join(columns)}")
    values = []
    for line, row in enumerate(rows[1:], 2):
        try:
            values.append([float(cell) for cell in row])
        except ValueError as error:
            raise DataError(f"{path}: line {line}: {error}") from error
        if len(row) not in (0, len(header)):
            raise DataError(f"{path}: line {line}: {len(row)} values in {len(header)} columns")
    whole = np.array([row for row in values if row], float).reshape(-1, len(header))
    return np.pad(whole, ((0, 0), (0, len(columns) - len(header))))


def _read_integers(path: Path) -> np.ndarray:
    rows = path.read_text().splitlines()[1:]
    return np.array([int(row.split(",", 1)[0]) for row in rows if row], np.int64)


def _write_columns(
    path: Path, columns: Iterable[str], formats: list[str], values: Iterable[np.ndarray]
) -> None:
    row_format = ",".join(formats) + "\n"
    lists = [column.tolist() for column in values]
    path.write_text(",".join(columns) + "\n" + "".join(row_format % r for r in zip(*lists)))  # noqa: B905


def _write_wrench(path: Path, wrench: np.ndarray) -> None:
    rounded = np.round(wrench * WRENCH_UNIT, 6) + 0.0  # no negative zero: it would not read back
    _write_columns(path, WRENCH_COLUMNS, ["%.6f"] * 6, rounded.T)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
