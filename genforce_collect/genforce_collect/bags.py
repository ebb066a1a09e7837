"""Recordings: rosbag2 MCAP folders that any ROS 2 reads, written so that a killed writer loses at
most the last second.

A bag is a folder `<name>/` with `<name>_0.mcap`, `<name>_1.mcap`, ... and `metadata.yaml`. The
latter is written last, on closing: a folder without it was never closed and is not presented as
whole until `repair` has cut off its torn end. Messages are kept as they were sent (CDR), with
their definitions; what is known of the session (cell, sensor, plan, versions) stands as JSON
in each file's MCAP metadata record and in `metadata.yaml`.

Times: the log time of a message is when it arrived here, its stamp is that of its header, both in
ns of host system time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import yaml
from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
from mcap.writer import CompressionType, Writer
from rosbags.highlevel import AnyReader
from rosbags.interfaces import Nodetype, QosDurability
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from genforce_collect.cdr import stamp_of
from genforce_collect.errors import DataError, GenforceError
from genforce_collect.mcap_files import (
    SESSION_KEY,
    LockedFile,
    finish_torn,
    is_finished,
    is_locked,
    read_session,
    read_summary,
    require_finished,
)

CHUNK_BYTES = 2**20  # each chunk's index stays in memory until the file is closed
CHUNK_PERIOD_S = 0.4  # a chunk that is not full is written after this long
METADATA_FILE = "metadata.yaml"
ROSBAG2_VERSION = 9  # of metadata.yaml, as ROS 2 Jazzy writes it


class TopicSpec(NamedTuple):
    """What a bag says about a topic beside its messages."""

    name: str
    type: str  # package/msg/Name
    latched: bool = False
    depth: int = 64


# --- message definitions ------------------------------------------------------------------------


@functools.cache
def message_definition(type_name: str) -> str:
    """The `ros2msg` schema of a type: its .msg text followed by those of all types it uses.

    Reads the .msg files in the share folders of the ament index. Raises `DataError`.
    """
    texts: dict[str, str] = {}
    waiting = [type_name]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = _message_text(name)
            waiting.extend(_used_types(texts[name], package=name.split("/")[0]))
    separator = "=" * 80
    return texts.pop(type_name) + "".join(
        f"\n{separator}\nMSG: {name.replace('/msg/', '/')}\n{text}" for name, text in texts.items()
    )


def _message_text(type_name: str) -> str:
    package, _, name = type_name.split("/")
    try:
        return (Path(get_package_share_directory(package)) / "msg" / f"{name}.msg").read_text()
    except (PackageNotFoundError, OSError) as error:
        raise DataError(
            f"no definition of {type_name}: build its package and source setup.bash"
        ) from error


def _used_types(text: str, package: str) -> Iterator[str]:
    for line in text.splitlines():
        word = line.partition("#")[0].split()[:1]
        name = word[0].partition("[")[0] if word else ""
        if "/" in name:
            yield name.replace("/", "/msg/", 1)
        elif name[:1].isupper():
            yield f"{package}/msg/{name}"


@functools.cache
def typestore(*type_names: str) -> Typestore:
    """A rosbags type store that (de)serialises these types without ROS."""
    store = get_typestore(Stores.EMPTY)
    for name in type_names:
        types = get_types_from_msg(message_definition(name), name)
        store.register({key: value for key, value in types.items() if key not in store.fielddefs})
    return store


def has_header(type_name: str, store: Typestore) -> bool:
    """Whether messages of this type begin with a std_msgs/Header."""
    _, fields = store.fielddefs[type_name]
    return bool(fields) and fields[0][1] == (Nodetype.NAME, "std_msgs/msg/Header")


# --- writing ------------------------------------------------------------------------------------


class BagWriter:
    """Writes one bag. Not thread-safe: one thread writes.

    `write` puts a message into the open chunk; `tick`, called at least every 0.1 s, sends a chunk
    that has grown old to the file. Any method may raise OSError (disk full); then only `abandon`
    makes sense, which keeps every chunk written so far.
    """

    def __init__(
        self, path: Path | str, metadata: dict[str, Any] | None = None, compress: bool = True
    ) -> None:
        self.path = Path(path)
        self.metadata = metadata or {}
        self._compression = CompressionType.ZSTD if compress else CompressionType.NONE
        self._topics: dict[str, TopicSpec] = {}
        self._counts: dict[str, int] = {}
        self._files: list[Path] = []
        self._closed_bytes = 0
        self._flushed_size = 0
        self._flushed_at = 0.0
        try:
            self.path.mkdir()
        except FileExistsError:
            raise DataError(f"{self.path}: exists already; give another name") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be created: {error.strerror}") from error
        self._open_file()

    @property
    def size_bytes(self) -> int:
        """Bytes in all files so far."""
        return self._closed_bytes + self._file.tell()

    @property
    def file_bytes(self) -> int:
        """Bytes in the file being written."""
        return self._file.tell()

    def add_topic(self, spec: TopicSpec) -> None:
        """Announce a topic. Raises `DataError` where its message definition is unknown."""
        message_definition(spec.type)
        self._topics[spec.name] = spec
        self._counts.setdefault(spec.name, 0)
        self._register(spec)

    def write(self, topic: str, data: bytes, log_ns: int, stamp_ns: int | None = None) -> None:
        """Add a CDR message of an announced topic."""
        self._counts[topic] += 1
        self._writer.add_message(
            channel_id=self._channels[topic],
            log_time=log_ns,
            data=data,
            publish_time=log_ns if stamp_ns is None else stamp_ns,
            sequence=self._counts[topic] & 0xFFFFFFFF,
        )

    def tick(self) -> None:
        """Write the open chunk to the file if the last one was written a while ago."""
        size, now = self._file.tell(), time.monotonic()
        if size == self._flushed_size and now - self._flushed_at > CHUNK_PERIOD_S:
            self._writer.flush()
            size = self._file.tell()
        if size != self._flushed_size:
            self._flushed_size, self._flushed_at = size, now

    def split(self) -> None:
        """Go on in a new file."""
        self._close_file()
        self._open_file()

    def annotate(self, **more: Any) -> None:
        """Add to the session's metadata."""
        self.metadata = self.metadata | more
        self._writer.add_metadata(SESSION_KEY, {"session": json.dumps(more)})

    def close(self, **more: Any) -> None:
        """Finish the bag; `more` joins the session's metadata."""
        self.annotate(**more)
        self._close_file()
        _write_metadata_yaml(self.path, self._files, self.metadata)

    def abandon(self) -> None:
        """Let go of the files as they are; `repair` makes a whole bag of them."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _open_file(self) -> None:
        path = self.path / f"{self.path.name}_{len(self._files)}.mcap"
        try:
            self._file = LockedFile(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from error
        self._files.append(path)
        self._writer = Writer(self._file, CHUNK_BYTES, self._compression)  # type: ignore[arg-type]
        self._schemas: dict[str, int] = {}
        self._channels: dict[str, int] = {}
        self._writer.start("ros2", "genforce")
        self._writer.add_metadata(SESSION_KEY, {"session": json.dumps(self.metadata)})
        self._flushed_size, self._flushed_at = self._file.tell(), time.monotonic()
        for spec in self._topics.values():
            self._register(spec)

    def _close_file(self) -> None:
        self._writer.finish()
        self._file.sync()
        self._closed_bytes += self._file.tell()
        self._file.close()

    def _register(self, spec: TopicSpec) -> None:
        if spec.type not in self._schemas:
            self._schemas[spec.type] = self._writer.register_schema(
                spec.type, "ros2msg", message_definition(spec.type).encode()
            )
        self._channels[spec.name] = self._writer.register_channel(
            spec.name,
            "cdr",
            self._schemas[spec.type],
            {"offered_qos_profiles": yaml.safe_dump(_qos_profiles(spec), sort_keys=False)},
        )


def _qos_profiles(spec: TopicSpec) -> list[dict[str, Any]]:
    forever = {"sec": 9223372036, "nsec": 854775807}
    return [
        {
            "history": "keep_last",
            "depth": spec.depth,
            "reliability": "reliable",
            "durability": "transient_local" if spec.latched else "volatile",
            "deadline": dict(forever),
            "lifespan": dict(forever),
            "liveliness": "automatic",
            "liveliness_lease_duration": dict(forever),
            "avoid_ros_namespace_conventions": False,
        }
    ]


def _write_metadata_yaml(path: Path, files: list[Path], metadata: dict[str, Any]) -> None:
    """metadata.yaml from the summaries of the files, so that it says what is really there."""
    summaries = [read_summary(file) for file in files]
    topics: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        for channel in summary.channels.values():
            entry = topics.setdefault(
                channel.topic,
                {
                    "topic_metadata": {
                        "name": channel.topic,
                        "type": (type_name := summary.schemas[channel.schema_id].name),
                        "serialization_format": "cdr",
                        "offered_qos_profiles": yaml.safe_load(
                            channel.metadata.get("offered_qos_profiles", "") or "[]"
                        ),
                        "type_description_hash": _type_hash(type_name),
                    },
                    "message_count": 0,
                },
            )
            entry["message_count"] += summary.statistics.channel_message_counts.get(channel.id, 0)
    filled = [s.statistics for s in summaries if s.statistics.message_count]
    start = min((s.message_start_time for s in filled), default=0)
    end = max((s.message_end_time for s in filled), default=0)
    information = {
        "version": ROSBAG2_VERSION,
        "storage_identifier": "mcap",
        "relative_file_paths": [file.name for file in files],
        "starting_time": {"nanoseconds_since_epoch": start},
        "duration": {"nanoseconds": end - start},
        "message_count": sum(s.statistics.message_count for s in summaries),
        "topics_with_message_count": list(topics.values()),
        "compression_format": "",
        "compression_mode": "",
        "files": [
            {
                "path": file.name,
                "starting_time": {"nanoseconds_since_epoch": s.statistics.message_start_time},
                "duration": {
                    "nanoseconds": s.statistics.message_end_time - s.statistics.message_start_time
                },
                "message_count": s.statistics.message_count,
            }
            for file, s in zip(files, summaries, strict=True)
        ],
        "custom_data": {SESSION_KEY: json.dumps(metadata)},
        "ros_distro": "jazzy",
    }
    text = yaml.safe_dump({"rosbag2_bagfile_information": information}, sort_keys=False)
    temporary = path / f"{METADATA_FILE}.tmp"
    temporary.write_text(text)
    os.replace(temporary, path / METADATA_FILE)


def _type_hash(type_name: str) -> str:
    """REP-2011 hash of a type; empty where its definition is not installed here."""
    try:
        return typestore(type_name).hash_rihs01(type_name)
    except DataError:
        return ""


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """Whatever the parsers of a damaged bag raise within, as a `DataError`."""
    try:
        yield
    except GenforceError:
        raise
    except Exception as error:  # of mcap, rosbags, yaml, zstandard and struct
        raise DataError(
            f"{path}: not readable as a bag: {error or type(error).__name__}"
        ) from error


# --- repairing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repair:
    """What `repair` did."""

    files: tuple[str, ...]  # that were torn
    cut_bytes: int  # of torn chunks at their ends
    damaged_chunks: int  # unreadable chunks within


def is_closed(path: Path) -> bool:
    """Whether the bag was closed (or repaired)."""
    return (path / METADATA_FILE).is_file()


def repair(path: Path | str) -> Repair:
    """Make a whole bag of one whose writer died: cut off torn chunks, write index and metadata.

    In place, as only the end of a file is rewritten. Raises `DataError` where there is no bag or
    it is being recorded.
    """
    path = Path(path)
    with telling(path):
        return _repair(path)


def _repair(path: Path) -> Repair:
    torn, cut, damaged = [], 0, 0
    for file in _files_of(path):
        with file.open("r+b") as stream:
            if is_locked(stream):
                raise DataError(f"{path}: is being recorded; stop the recorder first")
            if is_finished(stream):
                continue
            torn.append(file.name)
            if (result := finish_torn(stream)) is None:
                file.unlink()  # killed before its first record
                continue
            cut, damaged = cut + result[0], damaged + result[1]
    if torn or not is_closed(path):
        files = _files_of(path)
        note = {"torn_files": torn, "cut_bytes": cut, "damaged_chunks": damaged}
        _write_metadata_yaml(path, files, read_session(files[0]) | {"repaired": note})
    return Repair(tuple(torn), cut, damaged)


def _files_of(path: Path) -> list[Path]:
    files = sorted(path.glob("*.mcap"), key=_number)
    if not files:
        raise DataError(f"{path}: not a bag (no .mcap file in it)")
    return files


def _number(file: Path) -> tuple[int, str]:
    """Place of a file in its bag; those of other programs may have no number."""
    number = file.stem.rpartition("_")[2]
    return (int(number) if number.isdecimal() else 0, file.name)


# --- reading ------------------------------------------------------------------------------------


class RawRecord(NamedTuple):
    """A message as it was sent."""

    topic: str
    stamp_ns: int  # of its header; the log time where it has none
    log_ns: int
    data: bytes


class Record(NamedTuple):
    """A deserialised message: attributes as in ROS, arrays as numpy arrays."""

    topic: str
    stamp_ns: int  # of its header; the log time where it has none
    log_ns: int
    message: Any


class BagReader:
    """Reads a bag in log order; a bag that was never closed is repaired first.

        with BagReader("runs/demo/bag") as bag:
            for topic, stamp_ns, log_ns, message in bag.messages(["/genforce/netft/wrench"]):
                ...

    Reads any rosbag2 folder, not only this project's; `metadata` is what the recorder was told of
    the session, empty for other bags. Raises `DataError`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"{self.path}: no such bag")
        if not is_closed(self.path):
            repair(self.path)
        with telling(self.path):
            self.metadata = _read_custom_data(self.path)
            for file in self.path.glob("*.mcap"):
                require_finished(file)
            self._reader = AnyReader([self.path])
            self._reader.open()

    @property
    def topics(self) -> dict[str, str]:
        """Type of each topic."""
        return {c.topic: c.msgtype for c in self._reader.connections}

    @property
    def specs(self) -> tuple[TopicSpec, ...]:
        """Each topic with what is known of its quality of service."""
        specs = {}
        for connection in self._reader.connections:
            profiles = getattr(connection.ext, "offered_qos_profiles", [])
            latched = any(p.durability == QosDurability.TRANSIENT_LOCAL for p in profiles)
            depth = max([TopicSpec._field_defaults["depth"], *(p.depth for p in profiles)])
            specs[connection.topic] = TopicSpec(
                connection.topic, connection.msgtype, latched, depth
            )
        return tuple(specs.values())

    @property
    def counts(self) -> dict[str, int]:
        """Messages of each topic."""
        counts: dict[str, int] = {}
        for connection in self._reader.connections:
            counts[connection.topic] = counts.get(connection.topic, 0) + connection.msgcount
        return counts

    @property
    def span_ns(self) -> tuple[int, int]:
        """First and last log time; (0, 0) for an empty bag."""
        if not self._reader.message_count:
            return 0, 0
        return self._reader.start_time, self._reader.end_time - 1

    def has_stamp(self, topic: str) -> bool:
        """Whether the messages of a topic begin with a header."""
        return has_header(self.topics[topic], self._reader.typestore)

    def raw(
        self,
        topics: Collection[str] | None = None,
        start_ns: int | None = None,
        stop_ns: int | None = None,
    ) -> Iterator[RawRecord]:
        """Messages as bytes, of these topics (default: all) and log times [start, stop)."""
        wanted = [c for c in self._reader.connections if topics is None or c.topic in topics]
        if not wanted:
            return
        with telling(self.path):
            stamped = {c.topic: self.has_stamp(c.topic) for c in wanted}
            for connection, log_ns, data in self._reader.messages(wanted, start_ns, stop_ns):
                topic = connection.topic
                stamp_ns = stamp_of(data) if stamped[topic] else log_ns
                yield RawRecord(topic, stamp_ns, log_ns, data)

    def deserialize(self, data: bytes, type_name: str) -> Any:
        """A message of one of the bag's types."""
        with telling(self.path):
            return self._reader.typestore.deserialize_cdr(data, type_name)

    def messages(
        self,
        topics: Collection[str] | None = None,
        start_ns: int | None = None,
        stop_ns: int | None = None,
    ) -> Iterator[Record]:
        """Deserialised messages of these topics (default: all) and log times [start, stop)."""
        types = self.topics
        for topic, stamp_ns, log_ns, data in self.raw(topics, start_ns, stop_ns):
            yield Record(topic, stamp_ns, log_ns, self.deserialize(data, types[topic]))

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def __enter__(self) -> BagReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read_custom_data(path: Path) -> dict[str, Any]:
    data = yaml.safe_load((path / METADATA_FILE).read_text())
    custom = data["rosbag2_bagfile_information"].get("custom_data") or {}
    return dict(json.loads(custom.get(SESSION_KEY, "{}")))


def session_bags(path: Path | str) -> list[Path]:
    """The bag and those of resumed runs beside it: `<name>`, `<name>_r1`, `<name>_r2`, ..."""
    path = Path(path)
    found = [path] if path.is_dir() else []
    number = 1
    while (resumed := path.with_name(f"{path.name}_r{number}")).is_dir():
        found.append(resumed)
        number += 1
    return found


def next_session_bag(path: Path | str) -> Path:
    """Where the next run of a session is recorded."""
    path = free = Path(path)
    number = 0
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}_r{number}")
    return free
