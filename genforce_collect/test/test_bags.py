"""A bag holds what was put in, whatever happens to its writer, and says exactly what is missing."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped, WrenchStamped
from hypothesis import given
from hypothesis import strategies as st
from mcap.reader import make_reader
from rclpy.serialization import serialize_message
from rosbags.highlevel import AnyReader
from sensor_msgs.msg import CompressedImage

from genforce_collect import bag_cli
from genforce_collect import recording as recording_module
from genforce_collect.accounting import UNNUMBERED_NS, StreamAccount
from genforce_collect.bags import (
    BagReader,
    BagWriter,
    TopicSpec,
    next_session_bag,
    repair,
    session_bags,
)
from genforce_collect.errors import DataError, GenforceError
from genforce_collect.recording import Recording, RecordingOptions
from genforce_collect.trajectory import Phase
from genforce_collect.verification import verify
from genforce_msgs.msg import (
    Contact,
    InferenceStatus,
    Markers,
    RobotState,
    StreamTimes,
    Taxels,
)

WRENCH = TopicSpec("/genforce/netft/wrench", "geometry_msgs/msg/WrenchStamped")
TIMES = TopicSpec("/genforce/stream_times", "genforce_msgs/msg/StreamTimes")
CONTACT = TopicSpec("/genforce/contact", "genforce_msgs/msg/Contact", latched=True)


def stamp(ns: int) -> Time:
    return Time(sec=ns // 1_000_000_000, nanosec=ns % 1_000_000_000)


def wrench(ns: int, force: float = 0.0) -> bytes:
    message = WrenchStamped()
    message.header.stamp = stamp(ns)
    message.wrench.force.z = force
    return serialize_message(message)


def times(topic: str, first: int, stamps: list[int], device_lost: int = 0) -> bytes:
    return serialize_message(
        StreamTimes(
            topic=topic,
            first_seq=first,
            stamp_ns=array("q", stamps),
            receive_ns=array("q", stamps),
            device_time=array("d", [math.nan] * len(stamps)),
            device_lost=device_lost,
        )
    )


def write_bag(path: Path, count: int = 3000) -> list[float]:
    """A bag of numbered wrenches, 1 ms apart."""
    writer = BagWriter(path, {"session": "s"})
    writer.add_topic(WRENCH)
    for i in range(count):
        writer.write(WRENCH.name, wrench(i * 1_000_000, float(i)), i * 1_000_000)
    writer.close()
    return [float(i) for i in range(count)]


def forces(path: Path) -> list[float]:
    with BagReader(path) as bag:
        return [record.message.wrench.force.z for record in bag.messages([WRENCH.name])]


# --- what is written is read ---------------------------------------------------------------------


def test_any_reader_reads_every_topic_of_the_design_with_its_own_definitions(tmp_path: Path):
    messages = {
        "/genforce/robot/tcp_pose": PoseStamped(),
        "/genforce/robot/state": RobotState(seq=7, message="ready"),
        "/genforce/netft/wrench": WrenchStamped(),
        "/genforce/s/image/compressed": CompressedImage(
            format="jpeg", data=array("B", b"\xff\xd8")
        ),
        "/genforce/s/taxels": Taxels(rows=4, cols=4, axes=3, counts=array("i", range(48))),
        "/genforce/s/markers": Markers(mask=array("B", bytes(38400)), x=array("f", [1.5])),
        "/genforce/contact": Contact(session="x", direction=math.nan),
        "/genforce/s/inference": InferenceStatus(latency=0.01),
        "/genforce/stream_times": StreamTimes(
            topic="/t",
            stamp_ns=array("q", [1]),
            receive_ns=array("q", [2]),
            device_time=array("d", [3.0]),
        ),
        "/diagnostics": DiagnosticArray(
            status=[DiagnosticStatus(name="n", values=[KeyValue(key="k", value="v")])]
        ),
    }
    writer = BagWriter(tmp_path / "bag", {"sensor": "s"})
    for name, message in messages.items():
        message.header.stamp = stamp(5_000_000_007)
        kind = type(message)
        package = kind.__module__.split(".")[0]
        writer.add_topic(TopicSpec(name, f"{package}/msg/{kind.__name__}"))
        writer.write(name, serialize_message(message), 6_000_000_000)
    writer.close()
    with AnyReader([tmp_path / "bag"]) as reader:
        read = {
            connection.topic: reader.deserialize(data, connection.msgtype)
            for connection, _, data in reader.messages()
        }
    assert read.keys() == messages.keys()
    assert read["/genforce/robot/state"].message == "ready"
    assert read["/genforce/s/taxels"].counts.tolist() == list(range(48))
    assert read["/diagnostics"].status[0].values[0].value == "v"
    with BagReader(tmp_path / "bag") as bag:
        assert {r.stamp_ns for r in bag.raw()} == {5_000_000_007}
        assert {r.log_ns for r in bag.raw()} == {6_000_000_000}
        assert bag.metadata["sensor"] == "s"


def test_splitting_loses_nothing_and_reads_as_one(tmp_path: Path):
    writer = BagWriter(tmp_path / "bag")
    writer.add_topic(WRENCH)
    for i in range(2000):
        if i in (500, 1500):
            writer.split()
        writer.write(WRENCH.name, wrench(i, float(i)), i)
    writer.close()
    assert len(list((tmp_path / "bag").glob("*.mcap"))) == 3
    assert forces(tmp_path / "bag") == [float(i) for i in range(2000)]


def test_an_existing_bag_is_never_overwritten(tmp_path: Path):
    write_bag(tmp_path / "bag", 10)
    with pytest.raises(DataError, match="exists already"):
        BagWriter(tmp_path / "bag")


def test_a_missing_definition_is_named(tmp_path: Path):
    writer = BagWriter(tmp_path / "bag")
    with pytest.raises(DataError, match="nowhere_msgs/msg/Nothing"):
        writer.add_topic(TopicSpec("/x", "nowhere_msgs/msg/Nothing"))
    writer.close()


# --- torn bags -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "bag"
    writer = BagWriter(path, {"session": "s"})
    writer.add_topic(WRENCH)
    for i in range(3000):
        writer.write(WRENCH.name, wrench(i * 1_000_000, float(i)), i * 1_000_000)
        if i % 100 == 99:
            writer._writer.flush()
    writer.close()
    return path


def test_a_bag_torn_anywhere_is_repaired_to_its_last_whole_chunk(whole_bag: Path, tmp_path: Path):
    (file,) = whole_bag.glob("*.mcap")
    data = file.read_bytes()
    for cut in sorted(random.Random(1).sample(range(300, len(data)), 40)):
        bag = tmp_path / "bag"
        shutil.rmtree(bag, ignore_errors=True)
        bag.mkdir()
        (bag / file.name).write_bytes(data[:cut])
        found = forces(bag)  # repairs on opening
        assert found == [float(i) for i in range(len(found))]
        assert len(found) % 100 == 0
        assert len(found) >= 3000 * (cut / len(data) - 0.1)
        with (bag / file.name).open("rb") as stream:
            reader = make_reader(stream, validate_crcs=True)
            assert sum(1 for _ in reader.iter_messages()) == len(found)
        assert repair(bag).files == ()  # nothing is left to do
        with BagReader(bag) as reopened:
            assert reopened.metadata["session"] == "s"
            assert reopened.metadata["repaired"]["torn_files"] == [file.name]


def test_a_copy_that_broke_off_is_named_with_what_to_do(whole_bag: Path, tmp_path: Path):
    bag = tmp_path / "bag"
    shutil.copytree(whole_bag, bag)
    (file,) = bag.glob("*.mcap")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(DataError, match=rf"{file.name}: is torn; copy it again, or run genforce"):
        BagReader(bag)
    assert repair(bag).files == (file.name,)
    assert forces(bag)


def test_a_damaged_chunk_costs_only_itself(whole_bag: Path, tmp_path: Path):
    bag = tmp_path / "bag"
    shutil.copytree(whole_bag, bag)
    (file,) = bag.glob("*.mcap")
    with file.open("rb") as stream:
        index = make_reader(stream).get_summary().chunk_indexes[10]
    data = bytearray(file.read_bytes())[:-20]
    middle = index.chunk_start_offset + index.chunk_length - 40
    data[middle : middle + 20] = bytes(20)
    file.write_bytes(data)
    (bag / "metadata.yaml").unlink()
    assert repair(bag).damaged_chunks == 1
    assert forces(bag) == [float(i) for i in range(3000) if not 1000 <= i < 1100]


def test_an_open_bag_is_not_presented_as_whole(tmp_path: Path):
    writer = BagWriter(tmp_path / "bag")
    writer.add_topic(WRENCH)
    writer.write(WRENCH.name, wrench(1), 1)
    assert not (tmp_path / "bag" / "metadata.yaml").exists()
    with pytest.raises(DataError, match="is being recorded"):
        BagReader(tmp_path / "bag")
    with pytest.raises(FileNotFoundError):
        AnyReader([tmp_path / "bag"]).open()
    writer.close()
    assert forces(tmp_path / "bag") == [0.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no such bag"),
        (lambda p: p.mkdir(), "not a bag"),
        (lambda p: (p.mkdir(), (p / "x_0.mcap").write_bytes(b"")), "not a bag"),
    ],
    ids=["missing", "empty folder", "empty file"],
)
def test_what_is_no_bag_is_named(tmp_path: Path, make: Callable[[Path], None], words: str):
    make(tmp_path / "bag")
    with pytest.raises(DataError, match=words):
        BagReader(tmp_path / "bag")


def test_a_killed_recorder_loses_at_most_the_last_second(tmp_path: Path):
    bag = tmp_path / "bag"
    script = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from genforce_collect.bags import TopicSpec
        from genforce_collect.recording import Recording
        recording = Recording(Path({str(bag)!r}), {{}})
        recording.add_topic(TopicSpec(*{tuple(WRENCH)!r}))
        recording.start()
        data = bytes.fromhex({wrench(0).hex()!r})
        while True:
            recording.put({WRENCH.name!r}, data)
            print(time.time_ns(), flush=True)
            time.sleep(0.005)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    put = [int(process.stdout.readline())]
    while put[-1] - put[0] < 2.5e9:
        put.append(int(process.stdout.readline()))
    process.kill()
    put += [int(line) for line in process.stdout if line.strip()]
    process.wait()
    with BagReader(bag) as reader:
        kept_until = reader.span_ns[1]
        kept = sum(reader.counts.values())
    assert put[-1] - kept_until < 1e9
    assert kept >= sum(ns < put[-1] - 1e9 for ns in put) > 0


# --- accounts ------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 60),
    lost=st.sets(st.integers(0, 59)),
    unreported=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 999),
)
def test_account_counts_exactly_what_did_not_arrive(
    count: int, lost: set[int], unreported: set[int], seed: int
):
    """In whatever order samples and reports come, and though reports get lost themselves."""
    rng = random.Random(seed)
    lost = {i for i in lost if i < count}
    stamps = [1000 + rng.randrange(40) for _ in range(count)]  # some are equal
    samples = [("sample", i) for i in range(count) if i not in lost]
    last = (count - 1) // 10
    reports = [("report", k) for k in range(last + 1) if k not in unreported or k in (0, last)]
    account = StreamAccount(start_ns=0)
    account.report(0, [])
    merged = sorted(reports)  # reports keep their order
    for sample in samples:
        merged.insert(rng.randrange(len(merged) + 1), sample)
    for kind, i in merged:
        if kind == "sample":
            account.sample(stamps[i])
        else:
            account.report(i * 10, stamps[i * 10 : i * 10 + 10][: count - i * 10])
    assert account.received == count - len(lost)
    assert account.lost(10_000) == len(lost)
    if len(reports) == last + 1:
        assert Counter(account.lost_stamps(10_000)) == Counter(stamps[i] for i in lost)


def test_account_leaves_out_what_came_before_the_start():
    account = StreamAccount(start_ns=100)
    account.report(40, [80, 90, 100, 110])
    account.sample(90)
    account.sample(110)
    assert account.lost(1000) == 1
    assert account.lost_stamps(1000) == [100]


def test_account_survives_a_restart_of_the_producer():
    account = StreamAccount(start_ns=0)
    account.report(500, [1, 2])
    account.report(0, [3, 4])
    for ns in (1, 2, 3, 4):
        account.sample(ns)
    assert account.lost(10) == 0


def test_account_of_a_stream_without_numbers_stays_small():
    account = StreamAccount(start_ns=100)
    for k in range(200):
        account.sample(100 + k * 1_000_000_000)
    assert account.received == 200
    assert len(account._open) <= UNNUMBERED_NS // 1_000_000_000 + 1


# --- a recording ---------------------------------------------------------------------------------


def record(
    path: Path,
    withhold: frozenset[int] = frozenset(),
    contacts: bool = False,
    options: RecordingOptions | None = None,
) -> Recording:
    """Half a second of a wrench stream with its reports; some samples never arrive."""
    recording = Recording(path, {}, options)
    for spec in (WRENCH, TIMES, CONTACT):
        recording.add_topic(spec)
    recording.start()
    pending: list[int] = []
    for i in range(500):
        now = time.time_ns()
        pending.append(now)
        if contacts and i % 100 == 10:
            recording.put(CONTACT.name, contact(i // 100, now, Phase.NORMAL_INC, 2 * (i // 100)))
        if i not in withhold:
            recording.put(WRENCH.name, wrench(now, float(i)))
        if contacts and i % 100 == 90:
            recording.put(CONTACT.name, contact(i // 100, now, Phase.DONE, 2 * (i // 100) + 1))
        if len(pending) == 50:
            recording.put(TIMES.name, times(WRENCH.name, i - 49, pending))
            pending = []
        time.sleep(0.001)
    return recording


def contact(index: int, ns: int, phase: Phase, seq: int) -> bytes:
    message = Contact(seq=seq, session="s", index=index, total=5, phase=int(phase))
    message.header.stamp = stamp(ns)
    return serialize_message(message)


def test_counts_are_exact_when_messages_are_withheld(tmp_path: Path):
    status = record(tmp_path / "bag", withhold=frozenset({3, 77, 78, 400})).finish()
    topics = {t.name: t for t in status.topics}
    assert (topics[WRENCH.name].received, topics[WRENCH.name].lost) == (496, 4)
    report = verify(tmp_path / "bag")
    found = {t.name: t for t in report.topics}
    assert (found[WRENCH.name].received, found[WRENCH.name].lost) == (496, 4)
    assert not report.ok
    assert any("4 messages lost" in problem for problem in report.problems)


def test_samples_lost_before_the_driver_are_reported_too(tmp_path: Path):
    writer = BagWriter(tmp_path / "bag")
    writer.add_topic(WRENCH)
    writer.add_topic(TIMES)
    for i, device_lost in enumerate([40, 40, 47]):  # 40 were lost before the recording
        writer.write(WRENCH.name, wrench(i + 1), i)
        writer.write(TIMES.name, times(WRENCH.name, i, [i + 1], device_lost), i)
    writer.close()
    report = verify(tmp_path / "bag")
    assert {t.name: t.device_lost for t in report.topics}[WRENCH.name] == 7
    assert any("7 samples lost between device and driver" in p for p in report.problems)


def test_a_contact_with_a_lost_sample_is_not_whole(tmp_path: Path):
    record(tmp_path / "bag", withhold=frozenset({150}), contacts=True).finish()
    report = verify(tmp_path / "bag")
    assert report.whole_contacts == {0, 2, 3, 4}
    (broken,) = [c for c in report.contacts if not c.whole]
    assert (broken.index, broken.reason) == (1, f"1 samples of {WRENCH.name} lost")


@pytest.mark.parametrize("step_s", [5, -5])
def test_a_step_of_the_system_time_costs_only_the_contact_it_falls_in(
    tmp_path: Path, monkeypatch, step_s: int
):
    real, step_ns = time.time_ns, [0]
    monkeypatch.setattr(time, "time_ns", lambda: real() + step_ns[0])
    recording = Recording(tmp_path / "bag", {})
    for spec in (WRENCH, TIMES, CONTACT):
        recording.add_topic(spec)
    recording.start()
    for i in range(300):
        if i == 150:
            step_ns[0] = step_s * 10**9
        now = time.time_ns()
        if i % 100 == 10:
            recording.put(CONTACT.name, contact(i // 100, now, Phase.NORMAL_INC, 2 * (i // 100)))
        recording.put(WRENCH.name, wrench(now, float(i)))
        recording.put(TIMES.name, times(WRENCH.name, i, [now]))
        if i % 100 == 90:
            recording.put(CONTACT.name, contact(i // 100, now, Phase.DONE, 2 * (i // 100) + 1))
        time.sleep(0.002)
    began = time.monotonic()
    recording.finish()
    assert time.monotonic() - began < 3
    with BagReader(tmp_path / "bag") as bag:
        values = [r.message.wrench.force.z for r in bag.messages([WRENCH.name])]
    assert values == sorted(values), "in the order of arrival"
    assert len(values) == 300
    whole = {c.index: c.whole for c in verify(tmp_path / "bag").contacts}
    assert whole == {0: True, 1: False, 2: True}


def test_closing_does_not_wait_for_a_stream_that_died_long_before(tmp_path: Path, monkeypatch):
    patience_s = 1000.0  # waited for, it would fail this test by its time limit
    monkeypatch.setattr(recording_module, "SETTLE_MAX_S", patience_s)
    real, step_ns = time.time_ns, [0]
    monkeypatch.setattr(time, "time_ns", lambda: real() + step_ns[0])
    recording = Recording(tmp_path / "bag", {})
    for spec in (WRENCH, TIMES, CONTACT):
        recording.add_topic(spec)
    recording.start()
    for i in range(2):  # the report of the second one died with the producer
        now = time.time_ns()
        recording.put(WRENCH.name, wrench(now))
        if i == 0:
            recording.put(TIMES.name, times(WRENCH.name, i, [now]))
    step_ns[0] = round(1.1 * patience_s * 1e9)
    recording.put(CONTACT.name, contact(0, time.time_ns(), Phase.NORMAL_INC, 0))
    topics = {topic.name: topic.received for topic in recording.finish().topics}
    assert topics == {WRENCH.name: 2, TIMES.name: 1, CONTACT.name: 1}


def test_contacts_of_an_earlier_recording_are_no_part_of_this_one(tmp_path: Path):
    recording = Recording(tmp_path / "bag", {})
    recording.add_topic(CONTACT)
    recording.start()
    earlier = recording.start_ns - 10**9  # kept by their publisher for whoever subscribes
    for seq, phase in enumerate((Phase.NORMAL_INC, Phase.DONE)):
        recording.put(CONTACT.name, contact(0, earlier + seq, phase, seq))
    for seq, phase in enumerate((Phase.NORMAL_INC, Phase.DONE), start=2):
        recording.put(CONTACT.name, contact(1, time.time_ns(), phase, seq))
    recording.finish()
    assert [found.index for found in verify(tmp_path / "bag").contacts] == [1]


def test_a_bag_splits_only_between_contacts(tmp_path: Path):
    options = RecordingOptions(split_bytes=1)
    record(tmp_path / "bag", contacts=True, options=options).finish()
    assert verify(tmp_path / "bag").ok
    for file in (tmp_path / "bag").glob("*.mcap"):
        with file.open("rb") as stream:
            messages = [channel.topic for _, channel, _ in make_reader(stream).iter_messages()]
        assert messages.count(CONTACT.name) in (0, 2)


def test_a_full_disk_ends_the_recording_with_a_readable_bag(tmp_path: Path):
    """The write fails for real: the process may not write more than 4 MB to a file."""
    script = textwrap.dedent(
        """
        import os, resource, signal, sys, time
        from pathlib import Path
        from genforce_collect.bags import TopicSpec
        from genforce_collect.recording import Recording, RecordingOptions
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
        recording = Recording(Path(sys.argv[1]), {}, RecordingOptions(compress=False))
        recording.add_topic(TopicSpec("/image", "sensor_msgs/msg/CompressedImage"))
        recording.start()
        put = 0
        while not recording.done:
            recording.put("/image", bytes(12) + os.urandom(20_000))
            time.sleep(0.002)
        print(recording.status().error)
        """
    )
    bag = tmp_path / "bag"
    done = subprocess.run(
        [sys.executable, "-c", script, str(bag)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert str(bag) in done.stdout
    assert "recording ended" in done.stdout
    with BagReader(bag) as reader:
        kept = sum(1 for _ in reader.raw())
    assert 100 <= kept <= 200


def test_recording_stops_before_the_disk_is_full(tmp_path: Path):
    with pytest.raises(GenforceError, match="free"):
        Recording(tmp_path / "bag", {}, RecordingOptions(min_free_bytes=2**60))
    assert not (tmp_path / "bag").exists()


def test_a_slow_disk_drops_by_count_and_says_so(tmp_path: Path):
    recording = Recording(tmp_path / "bag", {}, RecordingOptions(queue_bytes=1000))
    recording.add_topic(WRENCH)
    recording.add_topic(TIMES)
    recording.start()
    stamps = [time.time_ns() + i for i in range(500)]
    for ns in stamps:
        recording.put(WRENCH.name, wrench(ns))
    while recording._queue:
        time.sleep(0.01)
    recording.put(TIMES.name, times(WRENCH.name, 0, stamps))
    status = recording.finish()
    topic = next(t for t in status.topics if t.name == WRENCH.name)
    assert topic.received < 500
    assert topic.received + topic.lost == 500
    assert "too slow" in status.error


# --- sessions and the command line ---------------------------------------------------------------


def test_resumed_bags_are_found_beside_the_first(tmp_path: Path):
    for name in ("bag", "bag_r1", "bag_r2", "bag_r4"):
        write_bag(tmp_path / name, 1)
    assert [p.name for p in session_bags(tmp_path / "bag")] == ["bag", "bag_r1", "bag_r2"]


@pytest.mark.parametrize(
    ("there", "name"),
    [([], "bag"), (["bag"], "bag_r1"), (["bag_r1"], "bag"), (["bag", "bag_r2"], "bag_r1")],
)
def test_the_next_run_of_a_session_is_recorded_where_nothing_is(tmp_path, there, name):
    for folder in there:
        (tmp_path / folder).mkdir()
    assert next_session_bag(tmp_path / "bag") == tmp_path / name


def test_bag_command_reports_as_json_and_by_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record(tmp_path / "good", contacts=True).finish()
    record(tmp_path / "bad", withhold=frozenset({9})).finish()
    parser = argparse.ArgumentParser()
    bag_cli.add_arguments(parser)

    def call(*words: str) -> int:
        return bag_cli.run(parser.parse_args(words))

    assert call("verify", str(tmp_path / "good"), "--json") == 0
    (good,) = json.loads(capsys.readouterr().out)
    assert good["ok"]
    assert good["whole_contacts"] == [0, 1, 2, 3, 4]
    assert call("verify", str(tmp_path / "bad")) == 1
    assert "1 messages lost" in capsys.readouterr().out
    assert call("info", str(tmp_path / "good")) == 0
    assert call("repair", str(tmp_path / "good")) == 0
    assert "nothing to repair" in capsys.readouterr().out
