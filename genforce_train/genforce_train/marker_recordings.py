"""Recordings of marker displacements with a force/torque reading a frame, into the training layout.

A recording is an HDF5 file of one session on one marker-based sensor:

    vision/dxyz        (n, markers, 3) float   displacement of each marker, mm
    vision/timestamp   (n,) float              s, of the frames
    reference/xyz_ref  (markers, 3) float      where the markers rest, mm
    force/values       (n, 6) float            N, N m; attribute columns = "fx,fy,fz,mx,my,mz"
    force/timestamp    (n,) float              s, of the reading nearest to each frame
    force/segment_id   (n,) int                one number a press

x and y span the gel and z points out of it. Each marker is drawn as a disc where a camera behind
the gel sees it; each segment becomes one contact, and the session (the file's name) stands as its
indenter. So contacts are the sequences to split by, and sessions can be held out whole:

    genforce dataset import SESSION_A.h5 SESSION_B.h5 -o DIR

    cache = open_layout("DIR")                                    # genforce_train.cache
    rows = cache.select(["markers_ft"])
    split = split_contacts(cache, rows, seed=0)                                # within sessions
    split = split_contacts(cache, rows, seed=0, unseen=["SESSION_B"])          # across sessions
    cache.contact(cache.keys[split.train[0]]).wrench              # (n, 6) N, N m

    genforce train force data=DIR unseen=[SESSION_B] out=OUT

A press holds the frames on the way in alone, some 10 at 10 to 30 Hz with gaps; there are no pose
and no depth. The one frame at rest is the reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genforce_collect.config import OpticsConfig
from genforce_collect.errors import DataError
from genforce_collect.layout import UNKNOWN_PHASE, Contact, ContactKey, Layout, pack
from genforce_sim.optics import Camera, Imperfections, draw_mask
from genforce_train.build import new_provenance

FORCE_COLUMNS = "fx,fy,fz,mx,my,mz"
LEAST_FRAMES = 2  # of a contact
SAME_SENSOR_MM = 1.0  # markers of two sessions rest within this, or the sensors differ
EXTRA = "pip install -r requirements/exchange.txt"


@dataclass(frozen=True)
class ImportConfig:
    """How recordings are drawn, and how their readings lie to the markers."""

    sensor: str = "markers_ft"
    px_per_mm: float = 24.0
    marker_mm: float = 0.6  # diameter
    camera_distance_mm: float = OpticsConfig().camera_distance_mm
    # Quarter turn about z from the axes of the readings to those of the markers; found from the
    # recordings without it: friction drags the gel the way it is pushed.
    turn_deg: int | None = None
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the transducer, sensor frame


@dataclass(frozen=True)
class Recording:
    """One session: displacement_mm (n, m, 3), reference_mm (m, 3), wrench (n, 6) N and N m in the
    transducer's axes, stamp_s, wrench_stamp_s (n,) and segment (n,)."""

    path: Path
    sha256: str
    displacement_mm: np.ndarray
    reference_mm: np.ndarray
    wrench: np.ndarray
    stamp_s: np.ndarray
    wrench_stamp_s: np.ndarray
    segment: np.ndarray

    @property
    def name(self) -> str:
        """Of the session, as it stands in the layout."""
        return self.path.stem


@dataclass
class ImportReport:
    """What an import did; `problems` name what was left out and why."""

    turn_deg: int
    written: list[ContactKey] = field(default_factory=list)
    kept: list[ContactKey] = field(default_factory=list)
    frames: int = 0
    problems: list[str] = field(default_factory=list)


def import_recordings(
    paths: Iterable[str | Path],
    root: str | Path,
    config: ImportConfig | None = None,
    force: bool = False,
) -> ImportReport:
    """Add the segments of the recordings to the layout at `root` as contacts.

    What is there is kept, unless `force`; the same files give the same bytes. A segment that cannot
    be used is left out and named in the report. Raises `DataError` for a file of another structure
    and for one that does not fit the sensor of that name already there.
    """
    config = config or ImportConfig()
    layout = Layout(root)
    recordings = [read_recording(path) for path in paths]
    if not recordings:
        raise DataError("no recording given; name at least one .h5 file")
    provenance = layout.provenance() or new_provenance()
    sensor = _sensor(config, recordings)
    known = provenance["sensors"].setdefault(config.sensor, sensor)
    _require_same_sensor(known, sensor, layout.root)
    reference_mm = np.array(known["reference_mm"])
    turn_deg = int(known["turn_deg"])
    for recording in recordings:
        _require_same_markers(reference_mm, recording)

    camera = Camera(config.px_per_mm, config.camera_distance_mm, Imperfections())
    reference = draw(reference_mm, config.marker_mm, camera)
    layout.write_reference(config.sensor, reference)
    layout.write_rest(config.sensor, reference[None], np.zeros((1, 6)))
    report = ImportReport(turn_deg)
    for recording in recordings:
        wrench = to_sensor_frame(recording.wrench, turn_deg, config.origin_mm)
        for number, rows in segments(recording, report.problems):
            key = ContactKey(config.sensor, recording.name, number)
            if layout.holds(key) and not force:
                report.kept.append(key)
                continue
            markers_mm = reference_mm + recording.displacement_mm[rows]
            bits = np.stack([draw(points, config.marker_mm, camera) for points in markers_mm])
            contact = _contact(key, recording, rows, bits, wrench[rows])
            layout.write(contact)
            provenance["contacts"][str(key)] = contact.source
            report.written.append(key)
            report.frames += len(contact)
        provenance.setdefault("recordings", {})[recording.path.name] = {
            "sha256": recording.sha256,
            "frames": len(recording.wrench),
        }
    layout.write_provenance(provenance)
    return report


def read_recording(path: str | Path) -> Recording:
    """Read one file. Raises `DataError` naming the file and what is not as documented above."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"reading HDF5 needs h5py: {EXTRA}") from error
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            displacement_mm = _dataset(file, path, "vision/dxyz", (None, None, 3))
            frames, markers, _ = displacement_mm.shape
            arrays = {
                "reference_mm": _dataset(file, path, "reference/xyz_ref", (markers, 3)),
                "wrench": _dataset(file, path, "force/values", (frames, 6)),
                "stamp_s": _dataset(file, path, "vision/timestamp", (frames,)),
                "wrench_stamp_s": _dataset(file, path, "force/timestamp", (frames,)),
                "segment": _dataset(file, path, "force/segment_id", (frames,)),
            }
            columns = file["force"].attrs.get("columns", "")
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file: {error}") from error
    if columns != FORCE_COLUMNS:
        raise DataError(f"{path}: force columns '{columns}', expected '{FORCE_COLUMNS}'")
    if not np.isfinite(arrays["reference_mm"]).all():
        raise DataError(f"{path}: reference/xyz_ref holds NaN or infinite places")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Recording(path, digest, displacement_mm, **arrays)


def segments(recording: Recording, problems: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Number and rows of each usable segment; what is wrong with the others goes to `problems`."""
    finite = np.isfinite(recording.wrench).all(1)
    finite &= np.isfinite(recording.displacement_mm).all((1, 2))
    for number in np.unique(recording.segment):
        rows = np.flatnonzero(recording.segment == number)
        where = f"{recording.path}: segment {number}"
        if number < 0:
            problems.append(f"{where}: {len(rows)} frames belong to no contact; left out")
        elif len(rows) < LEAST_FRAMES:
            problems.append(f"{where}: {len(rows)} frame, needs {LEAST_FRAMES}; left out")
        elif not finite[rows].all():
            problems.append(f"{where}: holds NaN or infinite values; left out")
        elif not (np.diff(recording.stamp_s[rows]) > 0).all():
            problems.append(f"{where}: stamps do not increase; left out")
        else:
            yield int(number), rows


def to_sensor_frame(
    wrench: np.ndarray, turn_deg: float, origin_mm: tuple[float, float, float]
) -> np.ndarray:
    """Readings (n, 6) N, N m about the transducer's origin -> about the sensor's, in its axes."""
    cos, sin = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    force, torque = wrench[:, :3] @ turn.T, wrench[:, 3:] @ turn.T
    return np.hstack([force, torque + np.cross(np.array(origin_mm) * 1e-3, force)])


def quarter_turn_deg(recordings: Iterable[Recording]) -> int:
    """Turn of the readings' axes under which shear force and markers go the same way best."""
    along = np.zeros(2)  # work of the force on the markers as it stands, and turned by 90 degrees
    for recording in recordings:
        usable = np.isfinite(recording.wrench).all(1)
        usable &= np.isfinite(recording.displacement_mm).all((1, 2))
        moved = recording.displacement_mm[usable, :, :2].mean(1)
        fx, fy = recording.wrench[usable, 0], recording.wrench[usable, 1]
        along += [
            np.sum(fx * moved[:, 0] + fy * moved[:, 1]),
            np.sum(-fy * moved[:, 0] + fx * moved[:, 1]),
        ]
    return 90 * int(np.argmax([along[0], along[1], -along[0], -along[1]]))


def draw(markers_mm: np.ndarray, marker_mm: float, camera: Camera) -> np.ndarray:
    """Packed marker image (38400,) of discs at (m, 3) mm; nearer ones look larger."""
    centres = np.column_stack(camera.project(*markers_mm.T))
    radius_px = 0.5 * marker_mm * camera.px_per_mm / (1 + markers_mm[:, 2] / camera.distance_mm)
    return pack(draw_mask(centres, radius_px[:, None, None] * np.eye(2)))


def _dataset(file: Any, path: Path, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    if name not in file:
        raise DataError(f"{path}: no data set '{name}'")
    found = np.asarray(file[name])
    fits = found.ndim == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True)
    )
    if not fits or found.dtype.kind not in "iuf":
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise DataError(f"{path}: {name} is {found.shape} {found.dtype}, expected {wanted} numbers")
    return found.astype(np.int64 if found.dtype.kind in "iu" else np.float64)


def _sensor(config: ImportConfig, recordings: list[Recording]) -> dict[str, Any]:
    turn = quarter_turn_deg(recordings) if config.turn_deg is None else config.turn_deg
    described = asdict(config) | {"turn_deg": turn, "origin_mm": list(config.origin_mm)}
    del described["sensor"]
    return described | {"reference_mm": recordings[0].reference_mm.round(4).tolist()}


def _require_same_sensor(known: dict[str, Any], sensor: dict[str, Any], root: Path) -> None:
    for name in sensor.keys() - {"reference_mm"}:
        if known.get(name) != sensor[name]:
            raise DataError(
                f"{root}: its sensor of that name has {name} {known.get(name)}, not "
                f"{sensor[name]}; import under another --sensor or into another folder"
            )


def _require_same_markers(reference_mm: np.ndarray, recording: Recording) -> None:
    same_count = recording.reference_mm.shape == reference_mm.shape
    if not same_count or abs(recording.reference_mm - reference_mm).max() > SAME_SENSOR_MM:
        raise DataError(
            f"{recording.path}: its {len(recording.reference_mm)} markers rest elsewhere than "
            f"those of the sessions before; import it under another --sensor"
        )


def _contact(
    key: ContactKey, recording: Recording, rows: np.ndarray, bits: np.ndarray, wrench: np.ndarray
) -> Contact:
    count = len(rows)
    return Contact(
        key=key,
        bits=bits,
        wrench=wrench,
        pose=np.full((count, 6), np.nan),
        depth=np.full(count, np.nan),
        phase=np.full(count, UNKNOWN_PHASE, np.uint8),
        stamp_ns=np.round(recording.stamp_s[rows] * 1e9).astype(np.int64),
        wrench_age=abs(recording.wrench_stamp_s[rows] - recording.stamp_s[rows]),
        pose_age=np.full(count, np.nan),
        flags=np.zeros(count, np.uint32),
        source={"recording": recording.path.name, "segment": key.number, "frames": count},
    )
