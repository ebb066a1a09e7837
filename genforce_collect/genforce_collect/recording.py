"""One bag being recorded: a bounded queue, a thread that writes, and an account of every stream.

The thread that receives only appends to the queue (`put`); packing, compressing and writing, the
accounts and the watch on the disk belong to the writer thread.
"""

from __future__ import annotations

import collections
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genforce_collect.accounting import StreamAccount
from genforce_collect.bags import BagWriter, TopicSpec, has_header, repair, typestore
from genforce_collect.cdr import stamp_of
from genforce_collect.errors import GenforceError
from genforce_collect.trajectory import Phase

STREAM_TIMES = "genforce_msgs/msg/StreamTimes"
CONTACT = "genforce_msgs/msg/Contact"
NUMBERED = frozenset({CONTACT, "genforce_msgs/msg/RobotState"})  # carry `seq`; not in StreamTimes
BETWEEN_CONTACTS = frozenset({Phase.IDLE, Phase.DONE, Phase.INVALID})

WAKE_PERIOD_S = 0.05
STATUS_PERIOD_S = 0.2
RATE_WINDOW_S = 0.5
LIVE_GRACE_S = 1.0  # younger samples may still be on their way
SETTLE_MIN_S = 0.25  # at the end: time for the last reports (10 Hz) to arrive
SETTLE_MAX_S = 1.5


@dataclass(frozen=True)
class RecordingOptions:
    """How a bag is written."""

    compress: bool = True
    split_bytes: int = 4 * 2**30
    min_free_bytes: int = 500 * 2**20
    queue_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class TopicStatus:
    """Of one topic, so far."""

    name: str
    received: int
    lost: int
    rate_hz: float


@dataclass(frozen=True)
class RecordingStatus:
    """A snapshot."""

    recording: bool
    bag: str
    duration_s: float
    bytes_written: int
    bytes_free: int
    topics: tuple[TopicStatus, ...]
    error: str


class _Topic:
    """Writer's view of a topic."""

    def __init__(self, spec: TopicSpec, start_ns: int) -> None:
        self.spec = spec
        self.account = StreamAccount(start_ns)
        self.log_ns = 0  # when its newest message was received
        self.stamped = has_header(spec.type, typestore(spec.type))
        self.late = False
        self.late_start_ns = 0
        self.begun = False  # a message of this recording has come
        self.next_seq: int | None = None
        self.skipped = 0
        self.rate_hz = 0.0
        self.rate_count = 0

    def lost(self, until_ns: int) -> int:
        return self.account.lost(until_ns) + self.skipped


class Recording:
    """Records from `start` until `finish`; `put` from one thread only.

    Construction creates the bag, which takes a moment; nothing that is stamped after `start` is
    missed if `put` is called for everything received from before `start` on. Raises `DataError`
    where the bag cannot be created, and `GenforceError` where the disk is too full to begin. A
    disk that fills up later ends the recording: its `error` then says so, and what was written is
    closed and readable.
    """

    def __init__(
        self, path: Path, metadata: dict[str, Any], options: RecordingOptions | None = None
    ) -> None:
        self._options = options or RecordingOptions()
        self.path = path
        if (free := _free_bytes(path.parent)) < self._options.min_free_bytes:
            raise GenforceError(
                f"{path.parent}: only {free >> 20} MB free, {self._options.min_free_bytes >> 20} "
                "MB are needed to begin; make room or record elsewhere"
            )
        self.start_ns = 0
        self._writer = BagWriter(path, metadata, self._options.compress)
        self._queue: collections.deque[tuple[_Topic, bytes, int]] = collections.deque()
        self._bytes_put = 0  # only the receiving thread changes this
        self._log_ns = 0  # and this: when the newest message was received
        self._bytes_taken = 0  # and only the writer this
        self._topics: dict[str, _Topic] = {}
        self._new_topics: collections.deque[_Topic] = collections.deque()
        self._stop_ns: int | None = None  # the last stamp that is waited for
        self._stop_at = 0.0  # and since when, in monotonic time
        self._rated_at = time.monotonic()
        self._between_contacts = True
        self._error = ""
        self._closed = False
        self._status = self._snapshot(recording=True, free=free)
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bag writer", daemon=True)

    def start(self) -> None:
        """Samples stamped from now on are accounted for."""
        self._rated_at, start_ns = time.monotonic(), time.time_ns()
        for topic in self._topics.values():
            topic.account = StreamAccount(start_ns)
        self.start_ns = start_ns  # opens `put`
        self._thread.start()

    def add_topic(self, spec: TopicSpec) -> None:
        """Announce a topic before its first message. Raises `DataError` for an unknown type.

        What a topic announced after `start` had sent before its first message arrived is no part
        of the recording.
        """
        topic = _Topic(spec, self.start_ns)
        topic.late = self.start_ns > 0
        self._topics[spec.name] = topic
        self._new_topics.append(topic)

    def put(self, topic: str, data: bytes) -> None:
        """Queue a CDR message as received now. Never blocks: what exceeds the queue is dropped,
        and counted as lost by its number.
        """
        if not self.start_ns or self._closed:
            return
        if self._bytes_put - self._bytes_taken > self._options.queue_bytes:
            self._error = self._error or "the disk is too slow: messages were dropped"
            return
        self._bytes_put += len(data)
        # Readers sort by this: the order of arrival is to survive a system time that is set back.
        self._log_ns = max(time.time_ns(), self._log_ns + 1)
        self._queue.append((self._topics[topic], data, self._log_ns))

    @property
    def done(self) -> bool:
        """Whether the bag is closed."""
        return not self._thread.is_alive()

    def status(self) -> RecordingStatus:
        """The latest snapshot, at most a second old; the final one once `done`."""
        return self._status

    def request_stop(self) -> None:
        """Samples stamped from now on are not waited for; `put` goes on until `done`."""
        if self._stop_ns is None:
            self._stop_at = time.monotonic()
            self._stop_ns = time.time_ns()

    def finish(self) -> RecordingStatus:
        """Stop, wait until the bag is closed, and return the final status."""
        self.request_stop()
        self._thread.join()
        return self._status

    # --- the writer thread ---

    def _run(self) -> None:
        next_snapshot = time.monotonic()
        try:
            self._writer.annotate(start_ns=self.start_ns)
            while not self._may_close():
                self._write_queue()
                self._writer.tick()
                if time.monotonic() >= next_snapshot:
                    next_snapshot += STATUS_PERIOD_S
                    free = _free_bytes(self.path)
                    self._status = self._snapshot(recording=True, free=free)
                    if free < self._options.min_free_bytes:
                        self._error = f"the disk is full ({free >> 20} MB left): recording ended"
                        self.request_stop()
                        break
                self._wake.wait(WAKE_PERIOD_S)
            self._write_queue()
            late = {t.spec.name: t.late_start_ns for t in self._topics.values() if t.late_start_ns}
            self._writer.close(stop_ns=self._stop_ns, late_start_ns=late, error=self._error)
        except OSError as error:
            self._give_up(error.strerror or str(error))
        except Exception as error:  # a thread that dies silently would look like a good end
            self._give_up(repr(error))
        self._closed = True
        self.request_stop()
        self._status = self._snapshot(recording=False, free=_free_bytes(self.path.parent))

    def _may_close(self) -> bool:
        if self._stop_ns is None:
            return False
        waited_s = time.monotonic() - self._stop_at
        if waited_s < SETTLE_MIN_S:
            return False
        if waited_s > SETTLE_MAX_S or self._error:
            return True
        topics = list(self._topics.values())
        # A producer that died long before the others' newest message sends no more.
        awaited_ns = max((topic.log_ns for topic in topics), default=0) - int(SETTLE_MAX_S * 1e9)
        return all(t.log_ns < awaited_ns or t.account.settled(self._stop_ns) for t in topics)

    def _write_queue(self) -> None:
        self._announce_topics()
        while self._queue:
            topic, data, log_ns = self._queue.popleft()
            self._announce_topics()
            self._bytes_taken += len(data)
            stamp_ns = stamp_of(data) if topic.stamped else log_ns
            if topic.spec.latched and not topic.begun and stamp_ns < self.start_ns:
                continue  # what its publisher keeps of earlier recordings
            topic.begun, topic.log_ns = True, log_ns
            self._writer.write(topic.spec.name, data, log_ns, stamp_ns)
            if topic.late and not topic.late_start_ns:
                topic.late_start_ns = stamp_ns
                topic.account = StreamAccount(stamp_ns)
            topic.account.sample(stamp_ns)
            if topic.spec.type == STREAM_TIMES:
                self._note_report(data)
            elif topic.spec.type in NUMBERED:
                self._note_number(topic, data)
            if self._between_contacts and self._writer.file_bytes > self._options.split_bytes:
                self._writer.split()

    def _announce_topics(self) -> None:
        while self._new_topics:
            self._writer.add_topic(self._new_topics.popleft().spec)

    def _note_report(self, data: bytes) -> None:
        report: Any = typestore(STREAM_TIMES).deserialize_cdr(data, STREAM_TIMES)
        if topic := self._topics.get(report.topic):
            topic.account.report(int(report.first_seq), report.stamp_ns.tolist())

    def _note_number(self, topic: _Topic, data: bytes) -> None:
        message: Any = typestore(topic.spec.type).deserialize_cdr(data, topic.spec.type)
        if topic.next_seq is not None and message.seq > topic.next_seq:
            topic.skipped += message.seq - topic.next_seq
        topic.next_seq = message.seq + 1
        if topic.spec.type == CONTACT:
            self._between_contacts = message.phase in BETWEEN_CONTACTS

    def _snapshot(self, recording: bool, free: int) -> RecordingStatus:
        now_ns = time.time_ns()
        until_ns = self._stop_ns if self._stop_ns else now_ns - int(LIVE_GRACE_S * 1e9)
        topics = list(self._topics.values())
        elapsed_s = time.monotonic() - self._rated_at
        if elapsed_s >= RATE_WINDOW_S:
            self._rated_at += elapsed_s
            for topic in topics:
                topic.rate_hz = (topic.account.received - topic.rate_count) / elapsed_s
                topic.rate_count = topic.account.received
        return RecordingStatus(
            recording,
            str(self.path),
            (now_ns - self.start_ns) * 1e-9,
            self._writer.size_bytes,
            free,
            tuple(
                TopicStatus(t.spec.name, t.account.received, t.lost(until_ns), t.rate_hz)
                for t in topics
            ),
            self._error,
        )

    def _give_up(self, reason: str) -> None:
        self._error = f"cannot write {self.path}: {reason}: recording ended"
        self._writer.abandon()
        try:
            repair(self.path)
        except (OSError, GenforceError):
            self._error += "; make room and run genforce bag repair"


def _free_bytes(path: Path) -> int:
    try:
        status = os.statvfs(path)
    except OSError as error:
        raise GenforceError(f"{path}: {error.strerror}") from error
    return status.f_bavail * status.f_frsize
