"""Bags to the training layout, or straight to a loader's cache: frames, wrench, pose and contacts
joined by their stamps."""

from __future__ import annotations

import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import IO, Any

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
AT_ONCE = 256  # rows brought in order
WRENCH_WIDTH, POSE_WIDTH = 6, 7  # a pose: m and quaternion xyzw
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
class Spool:
    """Rows of one shape in a temporary file, mapped only while they are read: those of a long bag
    do not fit into memory. Numpy takes it for an array."""

    file: IO[bytes]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not len(self):  # which cannot be mapped
            return np.empty(self.shape, self.dtype)
        return np.array(np.memmap(self.file, self.dtype, "r", shape=self.shape), dtype, copy=copy)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.array(np.asarray(self)[rows])


@dataclass(frozen=True)
class Stream:
    """Stamped samples of one topic in order of their stamps: stamp_ns (n,), values (n, k); of a
    pose, the last four of them are its quaternion."""

    stamp_ns: np.ndarray | Spool
    values: np.ndarray | Spool

    def at(self, stamp_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Linear interpolation at the stamps and the age (s) of the nearest sample; outside the
        stream the age is infinite."""
        index = np.clip(np.searchsorted(self.stamp_ns, stamp_ns), 1, len(self.stamp_ns) - 1)
        before, after = self.stamp_ns[index - 1], self.stamp_ns[index]
        span = np.maximum(after - before, 1)
        weight = np.clip((stamp_ns - before) / span, 0.0, 1.0)[:, None]
        first, second = self.values[index - 1], self.values[index]
        if first.shape[1] == POSE_WIDTH:  # of the two quaternions of a rotation, the near one
            far = np.einsum("ij,ij->i", first[:, 3:], second[:, 3:]) < 0
            second[far, 3:] *= -1
        values = (1 - weight) * first + weight * second
        age = np.minimum(abs(stamp_ns - before), abs(stamp_ns - after)) * 1e-9
        outside = (stamp_ns < self.stamp_ns[0]) | (stamp_ns > self.stamp_ns[-1])
        return values, np.where(outside, np.inf, age)


@dataclass(frozen=True)
class Frames:
    """Marker images of one sensor in order: stamp_ns (n,), flags (n,), bits (n, 38400);
    `segmented` where they were found anew."""

    stamp_ns: np.ndarray
    flags: np.ndarray
    bits: np.ndarray | Spool
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

    What is there is kept, unless `force`; of what several bags hold the first counts; the same bags
    give the same bytes. A bag that cannot be read or is of another cell than the first, and a
    contact that does not join, are left out and named in the report. Raises `DataError` where no
    bag is left.
    """
    config = config or BuildConfig()
    layout = Layout(root)
    report = BuildReport()
    provenance = layout.provenance() or new_provenance()
    written: set[ContactKey] = set()
    rested: set[str] = set()
    for path in map(Path, bags):
        try:
            bag = BagContents.read(path, config)
            _require_one_cell(provenance, path, bag.cell)
        except DataError as error:
            report.problems.append(str(error))
            continue
        provenance["bags"][path.resolve().name] = {
            "cell": bag.cell,
            "sessions": sorted({attempt.session for attempt in bag.attempts}),
        }
        report.broken_off += bag.broken_off
        try:
            for sensor in sorted(set(bag.frames) - rested):
                if _build_rest(layout, bag, sensor, config, provenance, force, report):
                    rested.add(sensor)
            for done, attempt in enumerate(bag.attempts):
                progress(f"{path.name} {attempt.key}", done, len(bag.attempts))
                if layout.holds(attempt.key) and not (force and attempt.key not in written):
                    report.kept.append(attempt.key)
                    continue
                try:
                    contact = join(bag, attempt, config)
                except DataError as error:
                    report.problems.append(str(error))
                    continue
                provenance["contacts"][str(attempt.key)] = contact.source
                layout.write(contact)
                written.add(attempt.key)
                report.written.append(attempt.key)
                report.frames += len(contact)
                report.max_wrench_age_s = max(report.max_wrench_age_s, contact.wrench_age.max())
                report.max_pose_age_s = max(report.max_pose_age_s, contact.pose_age.max())
        finally:
            layout.write_provenance(provenance)
        progress(path.name, len(bag.attempts), len(bag.attempts))
    if not provenance["bags"]:
        raise DataError(
            "; ".join(report.problems) or "no bag given; name at least one recorded bag folder"
        )
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
    sensors: Sensors = {}

    def contacts() -> Iterator[Contact]:
        seen: set[ContactKey] = set()
        cells: set[str] = set()
        for place, path in enumerate(paths):
            progress(f"reading {path.name}", place, len(paths))
            bag = BagContents.read(path, config)
            cells.add(f"'{bag.cell}'")
            if len(cells) > 1:
                raise DataError(
                    f"{path.parent}: bags of different cells: {', '.join(sorted(cells))}"
                )
            for sensor in sorted(set(bag.frames) - set(sensors)):
                try:
                    rest = rest_of(bag, sensor, config)
                    sensors[sensor] = (rest.reference, rest.bits, rest.wrench)
                except DataError as error:
                    problems.append(str(error))
            for done, attempt in enumerate(bag.attempts):
                progress(f"{bag.path.name} {attempt.key}", done, len(bag.attempts))
                if attempt.key in seen:
                    continue
                try:
                    yield join(bag, attempt, config)
                    seen.add(attempt.key)
                except DataError as error:
                    problems.append(str(error))

    made_of = [file for path in paths for file in sorted(path.glob("*.mcap"))]
    root = Path(folder).parent if len(paths) > 1 else paths[0].parent
    return cached(Path(folder), root, made_of, contacts(), lambda: sensors, problems)


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
    """What a build needs of one bag; what grows with its length lies in temporary files.

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
        contacts: list[Any] = []
        samples = {WRENCH: _Samples(WRENCH_WIDTH), POSE: _Samples(POSE_WIDTH)}
        with BagReader(path) as reader:
            types, metadata = reader.topics, reader.metadata
            markers = _markers(path, types, metadata, config)
            for topic, stamp_ns, _, data in reader.raw([CONTACT, *samples, *markers]):
                if topic in samples:
                    samples[topic].add(stamp_ns, data)
                elif topic in markers:
                    markers[topic].add(stamp_ns, reader.deserialize(data, types[topic]))
                else:
                    contacts.append(reader.deserialize(data, types[topic]))
        attempts, broken_off, idle = contacts_of(contacts)
        if not attempts and not broken_off:
            raise DataError(f"{path}: holds no contacts; record a collection into it")
        frames = {topic.split("/")[2]: images.frames() for topic, images in markers.items()}
        return cls(
            path=path,
            cell=str((metadata.get("cell_config") or {}).get("name", "")),
            wrench=samples[WRENCH].stream(f"{path}: no netft/wrench samples"),
            pose=samples[POSE].stream(f"{path}: no robot/tcp_pose samples"),
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
) -> bool:
    """Write the reference and the frames without contact; whether the sensor has them now."""
    if layout.holds_reference(sensor) and not force:
        return True
    try:
        rest = rest_of(bag, sensor, config)
    except DataError as error:
        report.problems.append(str(error))
        return False
    provenance["sensors"][sensor] = {
        "full_depth_mm": bag.full_depth_mm[sensor],
        "reference_bag": bag.path.resolve().name,
        "reference_frames": rest.reference_frames,
        "rest_frames": len(rest.bits),
    }
    layout.write_rest(sensor, rest.bits, rest.wrench)
    layout.write_reference(sensor, rest.reference)
    return True


def rest_of(bag: BagContents, sensor: str, config: BuildConfig) -> Rest:
    """The frames of a sensor without contact. Raises `DataError` where there are none."""
    frames = bag.frames[sensor]
    idle = np.zeros(len(frames.stamp_ns), bool)
    for start, end in bag.idle_ns:
        idle |= (frames.stamp_ns >= start) & (frames.stamp_ns < end)
    usable = np.flatnonzero(idle & (frames.flags & UNUSABLE == 0))
    wrench, age = bag.wrench.at(frames.stamp_ns[usable])
    free = np.linalg.norm(wrench[:, :3], axis=1) < config.rest_force_n
    free &= age <= config.max_age_s
    chosen, wrench = usable[free], wrench[free]
    if len(chosen) == 0:
        raise DataError(
            f"{bag.path}: {sensor}: no frame without contact, so no reference; "
            f"record before the first contact"
        )
    first = chosen[: config.reference_frames]
    spread = np.unique(np.linspace(0, len(chosen) - 1, config.rest_frames).round().astype(int))
    reference = majority(frames.bits[first])
    return Rest(reference, len(first), frames.bits[chosen[spread]], wrench[spread])


def majority(bits: np.ndarray) -> np.ndarray:
    """Packed images (n, 38400) -> the packed image of the pixels set in more than half of them."""
    votes = np.zeros(bits.shape[-1] * 8, np.uint16)
    for frame in bits:
        votes += np.unpackbits(frame)
    return np.packbits(votes * 2 > len(bits))


def _stamp_ns(message: Any) -> int:
    return int(message.header.stamp.sec) * 1_000_000_000 + int(message.header.stamp.nanosec)


class _Rows:
    """Rows of one shape as they come, on their way into a `Spool`."""

    def __init__(self, dtype: Any, width: tuple[int, ...]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - the spool keeps it
        self._dtype, self._width, self._count = np.dtype(dtype), width, 0

    def add(self, row: bytes) -> None:
        self._file.write(row)
        self._count += 1

    def spool(self, order: np.ndarray | None = None) -> Spool:
        """All of them, in this order."""
        self._file.flush()
        rows = Spool(self._file, self._dtype, (self._count, *self._width))
        if order is None:
            return rows
        in_order = tempfile.TemporaryFile()  # noqa: SIM115 - the spool keeps it
        for start in range(0, len(order), AT_ONCE):
            in_order.write(rows[order[start : start + AT_ONCE]].tobytes())
        in_order.flush()
        return replace(rows, file=in_order)


class _Samples:
    """Samples of one topic as they come. WrenchStamped and PoseStamped end in their `width`
    doubles; read so, a million samples take a second instead of a minute."""

    def __init__(self, width: int) -> None:
        self._bytes = 8 * width
        self._stamps, self._values = _Rows("<i8", ()), _Rows("<f8", (width,))
        self._count, self._latest, self._ordered = 0, 0, True

    def add(self, stamp_ns: int, data: bytes) -> None:
        self._stamps.add(stamp_ns.to_bytes(8, "little", signed=True))
        self._values.add(data[-self._bytes :])
        self._ordered &= stamp_ns >= self._latest
        self._latest = stamp_ns
        self._count += 1

    def stream(self, missing: str) -> Stream:
        """All of them in order of their stamps."""
        if self._count < 2:
            raise DataError(f"{missing}; record the topic")
        order = None if self._ordered else np.argsort(self._stamps.spool(), kind="stable")
        return Stream(self._stamps.spool(order), self._values.spool(order))


class _Markers:
    """Marker images of one topic as they come. `segment` finds the markers of a message that holds
    none yet."""

    def __init__(self, segment: Callable[[Any], MarkerFrame] | None) -> None:
        self._segment = segment
        self._bits = _Rows(np.uint8, (PACKED,))
        self._stamps, self._flags = array("q"), array("I")

    def add(self, stamp_ns: int, message: Any) -> None:
        if self._segment is None:
            flags, bits = int(message.flags), np.asarray(message.mask, np.uint8)
        else:
            frame = self._segment(message)
            flags, bits = frame.flags, pack_mask(frame.mask)
        if len(bits) != PACKED:
            flags, bits = flags | UNUSABLE, np.zeros(PACKED, np.uint8)
        self._bits.add(bits.tobytes())
        self._stamps.append(stamp_ns)
        self._flags.append(flags)

    def frames(self) -> Frames:
        """All of them in order of their stamps."""
        stamps, flags = np.array(self._stamps, np.int64), np.array(self._flags, np.uint32)
        if (np.diff(stamps) >= 0).all():
            return Frames(stamps, flags, self._bits.spool(), self._segment is not None)
        order = np.argsort(stamps, kind="stable")
        bits = self._bits.spool(order)
        return Frames(stamps[order], flags[order], bits, self._segment is not None)


def _markers(
    path: Path, topics: Iterable[str], metadata: dict[str, Any], config: BuildConfig
) -> dict[str, _Markers]:
    """What to take the marker images from, by topic: those recorded, or found anew."""
    parts = [topic.split("/") for topic in topics if topic.startswith("/genforce/")]
    recorded = {names[2] for names in parts if names[3:] == ["markers"]}
    sources: dict[str, list[str]] = defaultdict(list)
    for names in parts:
        if names[3:] in (["image", "compressed"], ["taxels"]):
            sources[names[2]].append("/".join(names))
    anew = set(sources) if config.resegment else set(sources) - recorded
    found = {f"/genforce/{sensor}/markers": _Markers(None) for sensor in recorded - anew}
    for sensor in anew:
        for topic in sources[sensor]:
            found[topic] = _Markers(_segmentation(path, sensor, topic, metadata, config))
    return found


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
