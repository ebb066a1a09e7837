"""Bags to the training layout, or straight to a loader's cache: frames, wrench, pose and contacts
joined by their stamps."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from genforce_collect.config import SensorConfig
from genforce_collect.errors import DataError
from genforce_collect.layout import PACKED, TOUCHING, Contact, ContactKey, Layout
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.packing import pack_mask
from genforce_collect.markers.segmentation import MarkerFrame
from genforce_train.cache import Cache, Progress, Sensors, cached, open_layout, silent

IDLE, APPROACH, DONE, INVALID = 0, 1, 6, 7  # genforce_msgs/Contact
# Frames whose pixels or stamp cannot be trusted: decode error, wrong size, repeated.
UNUSABLE = 64 | 128 | 1024
FORMAT = 1
CONTACT, WRENCH, POSE = (
    "/genforce/contact",
    "/genforce/netft/wrench",
    "/genforce/robot/tcp_pose",
)


@dataclass(frozen=True)
class BuildConfig:
    """How bags are joined."""

    max_age_s: float = 0.02  # a contact with an older nearest wrench or pose is left out
    rest_force_n: float = 0.1  # frames without contact feel less than this
    rest_frames: int = 200  # of them kept per sensor, spread evenly over the bag
    reference_frames: int = 50  # majority of these is the no-contact reference
    # Find the markers anew in the recorded images or taxels; done without it for bags that hold no
    # markers. `sensor` says how, where the bag's own settings were wrong.
    resegment: bool = False
    sensor: SensorConfig | None = None


@dataclass(frozen=True)
class Attempt:
    """One contact of a session as its Contact messages tell it."""

    key: ContactKey
    session: str
    phases: tuple[int, ...]
    starts_ns: tuple[int, ...]  # one a phase; the contact ends where DONE starts
    end_ns: int
    depth_m: float


@dataclass(frozen=True)
class Stream:
    """Stamped samples of one topic in order of their stamps: stamp_ns (n,), values (n, k)."""

    stamp_ns: np.ndarray
    values: np.ndarray

    def at(self, stamp_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Linear interpolation at the stamps and the age (s) of the nearest sample; outside the
        stream the age is infinite."""
        index = np.clip(np.searchsorted(self.stamp_ns, stamp_ns), 1, len(self.stamp_ns) - 1)
        before, after = self.stamp_ns[index - 1], self.stamp_ns[index]
        span = np.maximum(after - before, 1)
        weight = np.clip((stamp_ns - before) / span, 0.0, 1.0)[:, None]
        values = (1 - weight) * self.values[index - 1] + weight * self.values[index]
        age = np.minimum(abs(stamp_ns - before), abs(stamp_ns - after)) * 1e-9
        outside = (stamp_ns < self.stamp_ns[0]) | (stamp_ns > self.stamp_ns[-1])
        return values, np.where(outside, np.inf, age)


@dataclass(frozen=True)
class Frames:
    """Marker images of one sensor in order: stamp_ns (n,), flags (n,), bits (n, 38400), which lie
    in a temporary file; `segmented` where they were found anew."""

    stamp_ns: np.ndarray
    flags: np.ndarray
    bits: np.ndarray
    segmented: bool = False


@dataclass(frozen=True)
class Rest:
    """Frames without contact, spread over a bag: packed `reference` (38400,) made of
    `reference_frames`; bits (n, 38400), wrench (n, 6)."""

    reference: np.ndarray
    reference_frames: int
    bits: np.ndarray
    wrench: np.ndarray


@dataclass
class BuildReport:
    """What a build did; `problems` name what was left out and why."""

    written: list[ContactKey] = dataclass_field(default_factory=list)
    kept: list[ContactKey] = dataclass_field(default_factory=list)
    broken_off: int = 0
    problems: list[str] = dataclass_field(default_factory=list)
    frames: int = 0
    max_wrench_age_s: float = 0.0
    max_pose_age_s: float = 0.0


def build(
    bags: Iterable[str | Path],
    root: str | Path,
    config: BuildConfig | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> BuildReport:
    """Add the whole contacts of the bags to the layout at `root`.

    What is there is kept, unless `force`; the same bags give the same bytes. A contact that does
    not join is left out and named in the report. Raises `DataError` for a bag that cannot be read
    or bags of different cells.
    """
    config = config or BuildConfig()
    layout = Layout(root)
    report = BuildReport()
    provenance = layout.provenance() or new_provenance()
    for path in map(Path, bags):
        bag = BagContents.read(path, config)
        _require_one_cell(provenance, path, bag.cell)
        provenance["bags"][path.resolve().name] = {
            "cell": bag.cell,
            "sessions": sorted({attempt.session for attempt in bag.attempts}),
        }
        report.broken_off += bag.broken_off
        for sensor in sorted(bag.frames):
            _build_rest(layout, bag, sensor, config, provenance, force, report)
        for done, attempt in enumerate(bag.attempts):
            progress(f"{path.name} {attempt.key}", done, len(bag.attempts))
            if layout.holds(attempt.key) and not force:
                report.kept.append(attempt.key)
                continue
            try:
                contact = join(bag, attempt, config)
            except DataError as error:
                report.problems.append(str(error))
                continue
            layout.write(contact)
            provenance["contacts"][str(attempt.key)] = contact.source
            report.written.append(attempt.key)
            report.frames += len(contact)
            report.max_wrench_age_s = max(report.max_wrench_age_s, contact.wrench_age.max())
            report.max_pose_age_s = max(report.max_pose_age_s, contact.pose_age.max())
        progress(path.name, len(bag.attempts), len(bag.attempts))
        layout.write_provenance(provenance)
    if not provenance["bags"]:
        raise DataError("no bag given; name at least one recorded bag folder")
    return report


def open_data(source: str | Path, progress: Progress = silent) -> Cache:
    """The cache of a folder in the training layout, of a bag or of a folder of bags; kept in it.

    Raises `DataError` where it is none of them.
    """
    source = Path(source)
    candidates = [source, *sorted(path for path in source.glob("*") if path.is_dir())]
    bags = [path for path in candidates if next(path.glob("*.mcap"), None)]
    if bags:
        return open_bags(bags, source / ".cache", progress=progress)
    return open_layout(source, progress=progress)


def open_bags(
    bags: Iterable[str | Path],
    folder: str | Path,
    config: BuildConfig | None = None,
    progress: Progress = silent,
) -> Cache:
    """The cache of bags at `folder`, made straight from what was recorded where it is absent or
    older. Contacts that do not join are left out and named in `problems`; of a contact recorded
    twice, the first counts. Raises `DataError` like `build`.
    """
    config = config or BuildConfig()
    paths = [Path(bag) for bag in bags]
    problems: list[str] = []
    read: list[BagContents] = []

    def contents() -> list[BagContents]:
        if not read:
            for done, path in enumerate(paths):
                progress(f"reading {path.name}", done, len(paths))
                read.append(BagContents.read(path, config))
            if len({bag.cell for bag in read}) > 1:
                cells = ", ".join(sorted({f"'{bag.cell}'" for bag in read}))
                raise DataError(f"{paths[0].parent}: bags of different cells: {cells}")
        return read

    def contacts() -> Iterator[Contact]:
        seen: set[ContactKey] = set()
        for bag in contents():
            for done, attempt in enumerate(bag.attempts):
                progress(f"{bag.path.name} {attempt.key}", done, len(bag.attempts))
                if attempt.key in seen:
                    continue
                try:
                    yield join(bag, attempt, config)
                    seen.add(attempt.key)
                except DataError as error:
                    problems.append(str(error))

    def sensors() -> Sensors:
        found: Sensors = {}
        for bag in contents():
            for sensor in sorted(set(bag.frames) - set(found)):
                try:
                    rest = rest_of(bag, sensor, config)
                    found[sensor] = (rest.reference, rest.bits, rest.wrench)
                except DataError as error:
                    problems.append(str(error))
        return found

    made_of = [file for path in paths for file in sorted(path.glob("*.mcap"))]
    root = Path(folder).parent if len(paths) > 1 else paths[0].parent
    return cached(Path(folder), root, made_of, contacts(), sensors, problems)


def new_provenance() -> dict[str, Any]:
    """What `provenance.json` of an empty data set says."""
    return {"format": FORMAT, "bags": {}, "contacts": {}, "sensors": {}}


def join(bag: BagContents, attempt: Attempt, config: BuildConfig | None = None) -> Contact:
    """The frames of one contact with wrench, pose and phase at their stamps.

    Raises `DataError` naming contact and bag where frames, wrench or pose are missing.
    """
    config = config or BuildConfig()
    where = f"{bag.path}: contact {attempt.key}"
    frames = bag.frames.get(attempt.key.sensor)
    if frames is None:
        raise DataError(f"{where}: no markers of {attempt.key.sensor} in the bag")
    during = (frames.stamp_ns >= attempt.starts_ns[0]) & (frames.stamp_ns < attempt.end_ns)
    chosen = np.flatnonzero(during & (frames.flags & UNUSABLE == 0))
    if len(chosen) == 0:
        raise DataError(f"{where}: no usable frame between its first phase and its end")
    stamps = frames.stamp_ns[chosen]
    wrench, wrench_age = bag.wrench.at(stamps)
    pose, pose_age = bag.pose.at(stamps)
    for name, age in (("wrench", wrench_age), ("pose", pose_age)):
        if age.max() > config.max_age_s:
            raise DataError(
                f"{where}: nearest {name} is {age.max() * 1e3:.0f} ms from a frame "
                f"(at most {config.max_age_s * 1e3:.0f}); left out"
            )
    phase = np.array(attempt.phases)[np.searchsorted(attempt.starts_ns, stamps, "right") - 1]
    depth_mm = np.maximum(-pose[:, 2] * 1e3, 0.0)
    return Contact(
        key=attempt.key,
        bits=frames.bits[chosen],
        wrench=wrench,
        pose=np.concatenate([pose[:, :3], _rotation_vectors(pose[:, 3:])], 1),
        depth=depth_mm / bag.full_depth_mm[attempt.key.sensor],
        phase=phase.astype(np.uint8),
        stamp_ns=stamps,
        wrench_age=wrench_age,
        pose_age=pose_age,
        flags=frames.flags[chosen],
        source={
            "bag": bag.path.resolve().name,
            "session": attempt.session,
            "frames": len(chosen),
            "unusable_frames": int(during.sum()) - len(chosen),
            **({"segmented": True} if frames.segmented else {}),
        },
    )


@dataclass(frozen=True)
class BagContents:
    """What a build needs of one bag, in memory (marker images stay packed).

    wrench values: (n, 6) N, N m; pose values: (n, 7) m and quaternion xyzw, sensor frame.
    """

    path: Path
    cell: str
    wrench: Stream
    pose: Stream
    frames: dict[str, Frames]
    attempts: list[Attempt]  # whole contacts, one a key (the latest)
    broken_off: int
    idle_ns: list[tuple[int, int]]  # spans in which nothing touches
    full_depth_mm: dict[str, float]

    @classmethod
    def read(cls, path: str | Path, config: BuildConfig | None = None) -> BagContents:
        """Read a bag. Raises `DataError` naming what is wrong with it."""
        from genforce_collect.bags import BagReader  # needs ROS messages; layouts do without

        path, config = Path(path), config or BuildConfig()
        raw: dict[str, list[Any]] = defaultdict(list)
        with BagReader(path) as reader:
            types, metadata = reader.topics, reader.metadata
            spools = _spools(path, types, metadata, config)
            for topic, stamp_ns, _, data in reader.raw([CONTACT, WRENCH, POSE, *spools]):
                if topic in spools:
                    spools[topic].add(stamp_ns, reader.deserialize(data, types[topic]))
                else:
                    vectorised = topic in (WRENCH, POSE)
                    raw[topic].append(
                        data if vectorised else reader.deserialize(data, types[topic])
                    )
        attempts, broken_off, idle = contacts_of(raw[CONTACT])
        if not attempts and not broken_off:
            raise DataError(f"{path}: holds no contacts; record a collection into it")
        frames = {topic.split("/")[2]: spool.frames() for topic, spool in spools.items()}
        return cls(
            path=path,
            cell=str((metadata.get("cell_config") or {}).get("name", "")),
            wrench=_stream(raw[WRENCH], 6, f"{path}: no netft/wrench samples"),
            pose=_continuous(_stream(raw[POSE], 7, f"{path}: no robot/tcp_pose samples")),
            frames=frames,
            attempts=attempts,
            broken_off=broken_off,
            idle_ns=idle,
            full_depth_mm={sensor: _full_depth_mm(metadata, sensor, attempts) for sensor in frames},
        )


def contacts_of(messages: list[Any]) -> tuple[list[Attempt], int, list[tuple[int, int]]]:
    """Contact messages to whole contacts, the number broken off, and the spans of no contact."""
    messages = sorted(messages, key=lambda m: (_stamp_ns(m), m.seq))
    whole: dict[ContactKey, Attempt] = {}
    broken_off = 0
    idle: list[tuple[int, int]] = []
    open_phases: list[Any] = []
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        if message.phase in (IDLE, APPROACH):
            broken_off += bool(open_phases)
            open_phases = []
            if following is not None:
                idle.append((_stamp_ns(message), _stamp_ns(following)))
        elif message.phase in TOUCHING:
            if open_phases and open_phases[0].index != message.index:
                broken_off += 1
                open_phases = []
            open_phases.append(message)
        elif message.phase == INVALID:
            broken_off += 1
            open_phases = []
            # After its DONE, a contact is taken back: samples of it turned out to be missing.
            whole.pop(ContactKey(message.sensor, message.indenter, int(message.index)), None)
        elif message.phase == DONE and open_phases:
            key = ContactKey(message.sensor, message.indenter, int(message.index))
            whole[key] = Attempt(
                key=key,
                session=message.session,
                phases=tuple(int(m.phase) for m in open_phases),
                starts_ns=tuple(_stamp_ns(m) for m in open_phases),
                end_ns=_stamp_ns(message),
                depth_m=float(open_phases[0].depth),
            )
            open_phases = []
    broken_off += bool(open_phases)
    return [whole[key] for key in sorted(whole)], broken_off, idle


def _build_rest(
    layout: Layout,
    bag: BagContents,
    sensor: str,
    config: BuildConfig,
    provenance: dict[str, Any],
    force: bool,
    report: BuildReport,
) -> None:
    """Write the reference and the frames without contact, once a sensor."""
    if sensor in provenance["sensors"] and not force:
        return
    try:
        rest = rest_of(bag, sensor, config)
    except DataError as error:
        report.problems.append(str(error))
        return
    layout.write_reference(sensor, rest.reference)
    layout.write_rest(sensor, rest.bits, rest.wrench)
    provenance["sensors"][sensor] = {
        "full_depth_mm": bag.full_depth_mm[sensor],
        "reference_bag": bag.path.resolve().name,
        "reference_frames": rest.reference_frames,
        "rest_frames": len(rest.bits),
    }


def rest_of(bag: BagContents, sensor: str, config: BuildConfig) -> Rest:
    """The frames of a sensor without contact. Raises `DataError` where there are none."""
    frames = bag.frames[sensor]
    usable = frames.flags & UNUSABLE == 0
    idle = np.zeros(len(frames.stamp_ns), bool)
    for start, end in bag.idle_ns:
        idle |= (frames.stamp_ns >= start) & (frames.stamp_ns < end)
    wrench, age = bag.wrench.at(frames.stamp_ns)
    free = np.linalg.norm(wrench[:, :3], axis=1) < config.rest_force_n
    chosen = np.flatnonzero(usable & idle & free & (age <= config.max_age_s))
    if len(chosen) == 0:
        raise DataError(
            f"{bag.path}: {sensor}: no frame without contact, so no reference; "
            f"record before the first contact"
        )
    first = chosen[: config.reference_frames]
    spread = chosen[
        np.unique(np.linspace(0, len(chosen) - 1, config.rest_frames).round().astype(int))
    ]
    return Rest(majority(frames.bits[first]), len(first), frames.bits[spread], wrench[spread])


def majority(bits: np.ndarray) -> np.ndarray:
    """Packed images (n, 38400) -> the packed image of the pixels set in more than half of them."""
    votes = np.zeros(bits.shape[-1] * 8, np.uint16)
    for frame in bits:
        votes += np.unpackbits(frame)
    return np.packbits(votes * 2 > len(bits))


def _continuous(pose: Stream) -> Stream:
    """Of the two quaternions of a rotation, the one near the sample before."""
    q = pose.values[:, 3:]
    flips = np.where(np.einsum("ij,ij->i", q[1:], q[:-1]) < 0, -1.0, 1.0)
    signs = np.concatenate([[1.0], np.cumprod(flips)])
    return Stream(pose.stamp_ns, np.concatenate([pose.values[:, :3], q * signs[:, None]], 1))


def _stamp_ns(message: Any) -> int:
    return int(message.header.stamp.sec) * 1_000_000_000 + int(message.header.stamp.nanosec)


def _stream(raw: list[bytes], width: int, missing: str) -> Stream:
    """WrenchStamped and PoseStamped end in their `width` doubles, and begin with the stamp; read
    so, a million samples take a second instead of a minute."""
    if len(raw) < 2:
        raise DataError(f"{missing}; record the topic")
    heads = np.frombuffer(b"".join(data[4:12] for data in raw), "<i4").reshape(-1, 2)
    values = np.frombuffer(b"".join(data[-8 * width :] for data in raw), "<f8")
    stamps = heads[:, 0].astype(np.int64) * 1_000_000_000 + heads[:, 1]
    order = np.argsort(stamps, kind="stable")
    return Stream(stamps[order], values.reshape(-1, width)[order])


class _Spool:
    """Marker images of one topic as they come, bits in a temporary file: a bag's do not fit into
    memory. `segment` finds the markers of a message that holds none yet."""

    def __init__(self, segment: Callable[[Any], MarkerFrame] | None) -> None:
        self._segment = segment
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - the memory map of it lives on
        self._stamps: list[int] = []
        self._flags: list[int] = []

    def add(self, stamp_ns: int, message: Any) -> None:
        if self._segment is None:
            flags, bits = int(message.flags), np.asarray(message.mask, np.uint8)
        else:
            frame = self._segment(message)
            flags, bits = frame.flags, pack_mask(frame.mask)
        if len(bits) != PACKED:
            flags, bits = flags | UNUSABLE, np.zeros(PACKED, np.uint8)
        self._file.write(bits.tobytes())
        self._stamps.append(stamp_ns)
        self._flags.append(flags)

    def frames(self) -> Frames:
        """All of them in order of their stamps."""
        stamps, flags = np.array(self._stamps, np.int64), np.array(self._flags, np.uint32)
        self._file.flush()
        bits = np.empty((0, PACKED), np.uint8)
        if len(stamps):
            bits = np.memmap(self._file, np.uint8, "r", shape=(len(stamps), PACKED))
        if (np.diff(stamps) < 0).any():
            order = np.argsort(stamps, kind="stable")
            stamps, flags, bits = stamps[order], flags[order], bits[order]
        return Frames(stamps, flags, bits, segmented=self._segment is not None)


def _spools(
    path: Path, topics: Iterable[str], metadata: dict[str, Any], config: BuildConfig
) -> dict[str, _Spool]:
    """What to take the marker images from, by topic: those recorded, or found anew."""
    parts = [topic.split("/") for topic in topics if topic.startswith("/genforce/")]
    recorded = {names[2] for names in parts if names[3:] == ["markers"]}
    sources: dict[str, list[str]] = defaultdict(list)
    for names in parts:
        if names[3:] in (["image", "compressed"], ["taxels"]):
            sources[names[2]].append("/".join(names))
    anew = set(sources) if config.resegment else set(sources) - recorded
    spools = {f"/genforce/{sensor}/markers": _Spool(None) for sensor in recorded - anew}
    for sensor in anew:
        for topic in sources[sensor]:
            spools[topic] = _Spool(_segmentation(path, sensor, topic, metadata, config))
    return spools


def _segmentation(
    path: Path, sensor: str, topic: str, metadata: dict[str, Any], config: BuildConfig
) -> Callable[[Any], MarkerFrame]:
    settings = config.sensor
    if settings is None:
        recorded = metadata.get("sensor_config") or {}
        if recorded.get("name") != sensor:
            raise DataError(f"{path}: does not say how to find the markers of {sensor}; --sensor")
        settings = SensorConfig.model_validate(recorded)
    frontend = Frontend(settings)
    if topic.endswith("/taxels"):
        return lambda message: frontend.process_taxels(message.counts)
    return lambda message: frontend.process_jpeg(message.data.tobytes())


def _rotation_vectors(quaternions: np.ndarray) -> np.ndarray:
    # Interpolated quaternions of neighbours 2 ms apart need their sign but not slerp.
    return Rotation.from_quat(quaternions).as_rotvec()


def _full_depth_mm(metadata: dict[str, Any], sensor: str, attempts: list[Attempt]) -> float:
    """Depth of the sensor's plan, which depths are given over; where the bag does not say, the
    deepest commanded in it."""
    recorded = metadata.get("sensor_config") or {}
    if recorded.get("name") == sensor and recorded.get("plan"):
        return float(recorded["plan"]["max_z_mm"])
    depths = [attempt.depth_m for attempt in attempts if attempt.key.sensor == sensor]
    return round(max(depths, default=0.0) * 1e3, 6) or 1.0


def _require_one_cell(provenance: dict[str, Any], path: Path, cell: str) -> None:
    others = {entry["cell"] for entry in provenance["bags"].values()} - {cell}
    if others:
        raise DataError(
            f"{path}: recorded in cell '{cell}', the data set holds '{min(others)}'; "
            f"build into another folder"
        )
