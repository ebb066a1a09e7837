"""Is a bag whole? Counts against the producers' numbers, gaps, delays, and contact by contact."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genforce_collect.accounting import StreamAccount
from genforce_collect.bags import BagReader, is_closed, telling
from genforce_collect.recording import CONTACT, NUMBERED, STREAM_TIMES
from genforce_collect.trajectory import LOADED_PHASES, Phase

IMAGE = "sensor_msgs/msg/CompressedImage"
# Streams without which a contact is worth nothing; the others can be made from these.
SOURCES = ("/robot/tcp_pose", "/netft/wrench", "/image/compressed", "/taxels")
TORN_GRACE_S = 0.2  # before a torn end, reports may have been written and their samples not
FROZEN_S = 0.5  # a camera that shows one picture for longer hangs
PICTURE_END = 2048  # bytes; pictures of a camera that does not hang differ here, by their noise
GAP_S = 0.25  # longest silence of a source within a contact, or five of its periods


@dataclass(frozen=True)
class TopicReport:
    """What a bag holds of one topic."""

    name: str
    type: str
    received: int
    lost: int | None  # None: its producer does not number its messages
    device_lost: int  # samples the device numbered that never reached its driver
    rate_hz: float
    max_gap_s: float  # between stamps
    delay_p50_s: float  # stamp to arrival at the recorder
    delay_p99_s: float
    out_of_order: int  # stamps earlier than the one before; 0 where several producers mix
    first_s: float  # first and last stamp, since the recording began
    last_s: float


@dataclass(frozen=True)
class ContactReport:
    """One attempt at a contact of the plan."""

    index: int
    start_ns: int  # stamps of its first loaded phase and of its end
    end_ns: int
    whole: bool
    reason: str  # why not


@dataclass(frozen=True)
class BagReport:
    """What `verify` found."""

    path: str
    size_bytes: int
    duration_s: float
    messages: int
    metadata: dict[str, Any]
    topics: tuple[TopicReport, ...]
    contacts: tuple[ContactReport, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing is lost, torn or unfinished."""
        return not self.problems

    @property
    def whole_contacts(self) -> frozenset[int]:
        """Plan indices with at least one whole attempt."""
        return frozenset(c.index for c in self.contacts if c.whole)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {
            "ok": self.ok,
            "whole_contacts": sorted(self.whole_contacts),
        }


@dataclass
class _Topic:
    type: str
    account: StreamAccount
    stamps: list[int] = field(default_factory=list)
    logs: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    device_lost: list[int] = field(default_factory=list)
    picture: bytes = b""  # the end of the newest one
    still: list[list[int]] = field(default_factory=list)  # first and last stamp of one picture

    def see(self, stamp_ns: int, data: bytes | memoryview) -> None:
        """An image came."""
        picture = bytes(data[-PICTURE_END:])
        if picture == self.picture:
            self.still[-1][1] = stamp_ns
        else:
            self.picture = picture
            self.still.append([stamp_ns, stamp_ns])


def verify(path: Path | str) -> BagReport:
    """Read a bag from end to end. A bag that was never closed is repaired first, and reported as
    such. Raises `DataError`.
    """
    path = Path(path)
    with telling(path):
        return _verify(path)


def _verify(path: Path) -> BagReport:
    was_closed = is_closed(path)
    with BagReader(path) as bag:
        metadata = bag.metadata
        first_ns, last_ns = bag.span_ns
        start_ns = int(metadata.get("start_ns") or first_ns)
        stop_ns = int(metadata.get("stop_ns") or last_ns - int(TORN_GRACE_S * 1e9))
        late_ns = metadata.get("late_start_ns", {})  # topics that came when recording had begun
        topics = {
            name: _Topic(kind, StreamAccount(late_ns.get(name, start_ns)))
            for name, kind in bag.topics.items()
        }
        contact_messages = _read(bag, topics)
    size = sum(file.stat().st_size for file in path.iterdir())
    reports = tuple(_topic_report(name, topics[name], start_ns, stop_ns) for name in sorted(topics))
    contacts = _contacts(contact_messages, topics, stop_ns)
    return BagReport(
        path=str(path),
        size_bytes=size,
        duration_s=(last_ns - first_ns) * 1e-9,
        messages=sum(report.received for report in reports),
        metadata=metadata,
        topics=reports,
        contacts=contacts,
        problems=tuple(_problems(metadata, was_closed, reports, contacts)),
    )


def _read(bag: BagReader, topics: dict[str, _Topic]) -> list[Any]:
    contact_messages = []
    types = bag.topics
    for name, stamp_ns, log_ns, data in bag.raw():
        topic = topics[name]
        topic.stamps.append(stamp_ns)
        topic.logs.append(log_ns)
        topic.account.sample(stamp_ns)
        if topic.type == IMAGE:
            topic.see(stamp_ns, data)
        elif topic.type == STREAM_TIMES:
            report = bag.deserialize(data, types[name])
            if reported := topics.get(report.topic):
                reported.account.report(int(report.first_seq), report.stamp_ns.tolist())
                reported.device_lost.append(int(report.device_lost))
        elif topic.type in NUMBERED:
            message = bag.deserialize(data, types[name])
            topic.numbers.append(int(message.seq))
            if topic.type == CONTACT:
                contact_messages.append((stamp_ns, message))
    return contact_messages


def _topic_report(name: str, topic: _Topic, start_ns: int, stop_ns: int) -> TopicReport:
    stamps = np.array(topic.stamps, dtype=np.int64)
    steps = np.diff(stamps) * 1e-9
    delays = (np.array(topic.logs, dtype=np.int64) - stamps) * 1e-9
    lost: int | None = None
    if topic.type in NUMBERED:
        lost = _skipped(topic.numbers)
    elif topic.account.reported:
        lost = topic.account.lost(stop_ns)
    span_s = float(stamps[-1] - stamps[0]) * 1e-9 if len(stamps) > 1 else 0.0
    empty = not len(stamps)
    return TopicReport(
        name=name,
        type=topic.type,
        received=len(stamps),
        lost=lost,
        device_lost=int(np.maximum(np.diff(topic.device_lost), 0).sum()),
        rate_hz=len(steps) / span_s if span_s > 0 else 0.0,
        max_gap_s=float(steps.max()) if len(steps) else 0.0,
        delay_p50_s=0.0 if empty else float(np.percentile(delays, 50)),
        delay_p99_s=0.0 if empty else float(np.percentile(delays, 99)),
        out_of_order=0 if lost is None else int((steps < 0).sum()),
        first_s=0.0 if empty else float(stamps[0] - start_ns) * 1e-9,
        last_s=0.0 if empty else float(stamps[-1] - start_ns) * 1e-9,
    )


def _skipped(numbers: list[int]) -> int:
    """Missing numbers of a sequence; a restart of the producer begins a new one."""
    steps = np.diff(np.array(numbers, dtype=np.int64))
    return int(np.maximum(steps - 1, 0).sum())


def _contacts(
    messages: list[Any], topics: dict[str, _Topic], stop_ns: int
) -> tuple[ContactReport, ...]:
    streams = {
        name: np.sort(np.array(topic.stamps, dtype=np.int64))
        for name, topic in topics.items()
        if name.endswith(SOURCES) and topic.account.reported
    }
    lost = {
        name: np.array(topic.account.lost_stamps(stop_ns), dtype=np.int64)
        for name, topic in topics.items()
    }
    frozen = {
        name: np.array([s for s in topic.still if s[1] - s[0] > FROZEN_S * 1e9]).reshape(-1, 2)
        for name, topic in topics.items()
    }
    reports: list[ContactReport] = []
    current: tuple[int, int] | None = None  # index and start of the contact being made
    for stamp_ns, message in messages:
        index = int(message.index)
        if message.phase in LOADED_PHASES:
            if current is not None and current[0] != index:
                reports.append(ContactReport(*current, stamp_ns, False, "broken off"))
                current = None
            current = current or (index, stamp_ns)
        elif message.phase == Phase.DONE and current is not None:
            fault = _fault_within(current[1], stamp_ns, streams, lost, frozen)
            reports.append(ContactReport(*current, stamp_ns, not fault, fault))
            current = None
        elif message.phase == Phase.INVALID:
            if current is not None:
                reports.append(ContactReport(*current, stamp_ns, False, message.reason))
                current = None
            else:
                _withdraw(reports, index, message.reason)
    if current is not None:
        reports.append(ContactReport(*current, current[1], False, "not finished"))
    return tuple(reports)


def _withdraw(reports: list[ContactReport], index: int, reason: str) -> None:
    """A contact found out to be invalid after it was done."""
    for i in range(len(reports) - 1, -1, -1):
        if reports[i].index == index:
            reports[i] = dataclasses.replace(reports[i], whole=False, reason=reason)
            return


def _fault_within(
    start_ns: int,
    end_ns: int,
    streams: dict[str, NDArray[np.int64]],
    lost: dict[str, NDArray[np.int64]],
    frozen: dict[str, NDArray[np.int64]],
) -> str:
    """Why the streams do not cover the interval; empty if they do."""
    if end_ns <= start_ns:
        return "the system time was set back"
    for name, stamps in lost.items():
        count = int(((stamps >= start_ns) & (stamps <= end_ns)).sum())
        if count:
            return f"{count} samples of {name} lost"
    for name, spans in frozen.items():
        if ((spans[:, 0] < end_ns) & (spans[:, 1] > start_ns)).any():
            return f"{name} is frozen"
    for name, stamps in streams.items():
        if reason := silence(stamps, start_ns, end_ns):
            return f"{name} {reason}"
        # The samples behind the end may have been cut off with a torn end.
        period_s = float(np.median(np.diff(stamps))) * 1e-9 if len(stamps) > 1 else 1.0
        if not len(stamps) or (end_ns - stamps[-1]) * 1e-9 > max(3 * period_s, 0.03):
            return f"{name} ends before the contact"
    return ""


def silence(stamps: NDArray[np.int64], start_ns: int, end_ns: int) -> str:
    """Why a stream does not cover an interval; empty if it does. `stamps` are sorted, in ns."""
    period_s = float(np.median(np.diff(stamps))) * 1e-9 if len(stamps) > 1 else 0.0
    first, last = np.searchsorted(stamps, [start_ns, end_ns])
    inside = np.concatenate([[start_ns], stamps[first:last], [end_ns]])
    gap_s = float(np.diff(inside).max()) * 1e-9
    return f"silent for {gap_s:.2f} s" if gap_s > max(GAP_S, 5 * period_s) else ""


def _problems(
    metadata: dict[str, Any],
    was_closed: bool,
    topics: tuple[TopicReport, ...],
    contacts: tuple[ContactReport, ...],
) -> list[str]:
    problems = []
    if metadata.get("error"):
        problems.append(str(metadata["error"]))
    if repaired := metadata.get("repaired"):
        when = "earlier" if was_closed else "now"
        problems.append(
            f"the recorder died; repaired {when}, {repaired['cut_bytes']} bytes of its last "
            "moments were cut off"
        )
    problems += [f"{t.name}: {t.lost} messages lost" for t in topics if t.lost]
    problems += [
        f"{t.name}: {t.device_lost} samples lost between device and driver"
        for t in topics
        if t.device_lost
    ]
    problems += [f"{t.name}: {t.out_of_order} stamps go back" for t in topics if t.out_of_order]
    whole = {c.index for c in contacts if c.whole}
    problems += [
        f"contact {index} is not whole: {reason}"
        for index, reason in {c.index: c.reason for c in contacts}.items()
        if index not in whole
    ]
    return problems
