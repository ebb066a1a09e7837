"""The virtual Net F/T box as its clients see it: raw datagrams, and an unmodified pynetft."""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Iterator

import numpy as np
import pynetft
import pytest

from genforce_collect.errors import DeviceError
from genforce_sim.devices.netft_box import RANGE, RESOLUTION, NetftBox, Wire

pytestmark = pytest.mark.live

RDT, HTTP = 30049, 8081
WRENCH = np.array([1.0, -2.0, -3.0, 0.01, 0.02, -0.03])


class Hand:
    """What presses on the transducer; a test may move it."""

    def __init__(self) -> None:
        self.wrench = WRENCH

    def __call__(self, time: float) -> np.ndarray:
        return self.wrench


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def box(loopback_host, hand) -> Iterator[NetftBox]:
    with NetftBox(loopback_host, RDT, HTTP, hand, noise=0.0) as box:
        yield box


class RawClient:
    """One that speaks RDT by hand."""

    def __init__(self, host: str) -> None:
        self.box = (host, RDT)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.settimeout(2.0)

    def request(self, command: int, count: int = 0) -> None:
        self.socket.sendto(struct.pack(">HHI", 0x1234, command, count), self.box)

    def record(self) -> tuple[int, ...]:
        return struct.unpack(">III6i", self.socket.recv(64))

    def silent(self, seconds: float = 0.3) -> bool:
        """Whether the line is quiet, apart from what was under way."""
        self.socket.settimeout(0.05)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self.socket.recv(64)
            except TimeoutError:
                return True
        return False


@pytest.fixture
def raw(box, loopback_host) -> Iterator[RawClient]:
    client = RawClient(loopback_host)
    yield client
    client.socket.close()


@pytest.fixture
def client(box, loopback_host) -> Iterator[pynetft.Client]:
    config = pynetft.Config(sensor_host=loopback_host, rdt_port=RDT, http_port=HTTP)
    client = pynetft.Client(config, queue_size=4000)
    client.start()
    assert client.wait_for_first_sample(3.0)
    yield client
    client.stop()


def read(client: pynetft.Client, count: int) -> list[pynetft.Sample]:
    samples = client.samples(2.0)
    return [next(samples) for _ in range(count)]


def wait_for(condition, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_pynetft_reads_every_sample_at_1_khz_in_newtons(client):
    started = time.monotonic()
    samples = read(client, 1000)
    assert time.monotonic() - started < 2.0
    assert {b.rdt_sequence - a.rdt_sequence for a, b in itertools.pairwise(samples)} == {1}
    assert {b.ft_sequence - a.ft_sequence for a, b in itertools.pairwise(samples)} == {7}
    assert client.health().lost_count == 0
    assert samples[-1].force_unit is pynetft.ForceUnit.NEWTON
    assert samples[-1].torque_unit is pynetft.TorqueUnit.NEWTON_METER
    assert np.allclose(samples[-1].wrench, WRENCH, atol=RESOLUTION)


def test_readings_come_in_steps_of_the_transducers_resolution(loopback_host):
    rng = np.random.default_rng(0)
    with NetftBox(loopback_host, RDT, HTTP, lambda _: rng.uniform(-1, 1, 6) * RANGE):
        raw = RawClient(loopback_host)
        raw.request(2, 200)
        counts = np.array([raw.record()[3:] for _ in range(200)])
        raw.socket.close()
    steps = counts / 1e6 / RESOLUTION
    assert np.abs(steps - np.rint(steps)).max() < 0.1
    assert len(np.unique(counts[:, 0])) > 150


def test_noise_is_repeatable_and_has_the_deviation_asked_for(loopback_host):
    def run(seed: int) -> np.ndarray:
        with NetftBox(loopback_host, RDT, HTTP, lambda _: WRENCH, noise=2.0, seed=seed):
            raw = RawClient(loopback_host)
            raw.request(2, 300)
            counts = [raw.record()[3:] for _ in range(300)]
            raw.socket.close()
        return np.array(counts) / 1e6

    first, again, other = run(1), run(1), run(2)
    assert (first == again).all()
    assert (first != other).any()
    assert first.std(axis=0) == pytest.approx(2 * RESOLUTION, rel=0.2)


def test_the_last_requester_wins(box, raw, loopback_host):
    raw.request(2)
    assert raw.record()[0] == 1
    other = RawClient(loopback_host)
    other.request(2)
    assert other.record()[0] == 1
    assert raw.silent()
    other.socket.close()


def test_stop_ends_the_stream_and_a_new_start_counts_from_one(raw):
    raw.request(2)
    ft_before = raw.record()[1]
    raw.request(0)
    assert raw.silent()
    raw.socket.settimeout(2.0)
    raw.request(2)
    rdt, ft, *_ = raw.record()
    assert rdt == 1
    assert ft > ft_before


def test_a_request_for_n_records_gives_n(raw):
    raw.request(2, 5)
    assert [raw.record()[0] for _ in range(5)] == [1, 2, 3, 4, 5]
    assert raw.silent()


def test_a_malformed_request_is_ignored(raw):
    raw.socket.sendto(b"\x12\x35\x00\x02\x00\x00\x00\x00", raw.box)
    raw.socket.sendto(b"\x12\x34", raw.box)
    assert raw.silent()
    raw.socket.settimeout(2.0)
    raw.request(2)
    assert raw.record()[0] == 1


def test_bias_makes_the_present_load_zero(raw, hand):
    raw.request(2)
    raw.record()
    raw.request(0x42)
    assert wait_for(lambda: abs(raw.record()[3]) < 5000)
    hand.wrench = WRENCH + np.eye(6)[0]
    assert wait_for(lambda: abs(raw.record()[3] - 1_000_000) < 5000)


def test_the_rate_is_a_whole_part_of_7_khz_and_the_page_says_which(loopback_host):
    with NetftBox(loopback_host, RDT, HTTP, lambda _: WRENCH, rate_hz=400.0) as box:
        assert box.rate_hz == pytest.approx(7000 / 18, rel=0.06)
        with socket.create_connection((loopback_host, HTTP)) as connection:
            connection.sendall(b"GET /netftapi2.xml HTTP/1.0\r\n\r\n")
            page = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    assert page.startswith("HTTP/1.0 200")
    assert f"<comrdtrate>{box.rate_hz:.0f}</comrdtrate>" in page


def test_a_load_over_range_sets_the_saturation_bit_and_is_clipped(raw, hand):
    hand.wrench = np.array([0.0, 0.0, -20.0, 0.0, 0.0, 0.0])
    raw.request(2)
    record = raw.record()
    assert record[2] == 1 << 31 | 1 << 17
    assert record[5] == -17_000_000


def test_saturate_pins_the_gauges_until_it_is_switched_off(box, raw):
    box.saturate()
    raw.request(2)
    record = raw.record()
    assert record[2] == 1 << 31 | 1 << 17
    assert record[3:6] == (12_000_000, 12_000_000, 17_000_000)
    box.saturate(False)
    assert wait_for(lambda: raw.record()[2] == 0)


def test_a_latched_condition_clears_by_request(box, raw):
    box.status_error(1 << 16)
    raw.request(2)
    assert raw.record()[2] == 1 << 16
    raw.request(0x41)
    assert wait_for(lambda: raw.record()[2] == 0)


def test_a_frozen_counter_repeats_its_number(box, raw):
    raw.request(2)
    raw.record()
    box.freeze_counter()
    assert wait_for(lambda: len({raw.record()[1] for _ in range(10)}) == 1)
    box.freeze_counter(False)
    assert wait_for(lambda: len({raw.record()[1] for _ in range(10)}) == 10)


def test_lost_records_are_noticed_by_the_client(box, client):
    box.lose(0.2)
    assert wait_for(lambda: client.health().lost_count > 20)
    assert client.health().reconnect_count == 0


def test_swapped_and_doubled_records_are_noticed_by_the_client(box, client):
    box.reorder()
    assert wait_for(lambda: client.health().out_of_order_count == 1)
    box.duplicate()
    assert wait_for(lambda: client.health().duplicate_count == 1)


def test_a_muted_box_makes_the_client_reconnect_and_go_on(box, client):
    box.mute(0.3)
    assert wait_for(lambda: client.health().reconnect_count >= 1)
    before = client.health().received_count
    assert wait_for(lambda: client.health().received_count > before + 100)


def test_a_restarted_box_counts_from_zero_in_its_new_scale(box, client):
    before = read(client, 1)[0].ft_sequence
    box.restart(counts_per_force=500_000)
    assert wait_for(lambda: client.latest_sample().ft_sequence < before)
    assert client.health().calibration_change_count == 1
    sample = client.latest_sample()
    assert sample.raw_wrench[0] == pytest.approx(500_000, abs=5000)
    assert sample.force[0] == pytest.approx(1.0, abs=0.01)


def test_delayed_records_keep_their_order_and_their_device_times(box, client):
    box.delay(0.005)
    read(client, 500)
    assert client.health().out_of_order_count == 0
    lateness = [
        sample.received_at_ns
        + (time.time_ns() - time.monotonic_ns())
        - box.host_time_ns(sample.ft_sequence)
        for sample in read(client, 500)
    ]
    assert min(lateness) > -1e6
    assert 1e6 < np.median(lateness) < 1e8


def test_a_drifting_clock_ticks_slower(loopback_host):
    with NetftBox(loopback_host, RDT, HTTP, lambda _: WRENCH, drift=0.01) as box:
        second = box.host_time_ns(7000) - box.host_time_ns(0)
    assert second == pytest.approx(1.01e9, abs=1e6)


@pytest.mark.parametrize("key", ["rdt_port", "http_port"])
def test_a_port_in_use_is_named(loopback_host, box, key):
    ports = {"rdt_port": RDT + 1, "http_port": HTTP + 1} | {key: RDT if key == "rdt_port" else HTTP}
    with pytest.raises(DeviceError, match=rf"{loopback_host}:{ports[key]} \(netft.{key}\)"):
        NetftBox(loopback_host, **ports, read_wrench=lambda _: WRENCH)
    # and the other port was let go
    NetftBox(loopback_host, RDT + 1, HTTP + 1, lambda _: WRENCH).close()


def test_a_closed_box_can_be_opened_again_at_once(loopback_host):
    for _ in range(3):
        with NetftBox(loopback_host, RDT, HTTP, lambda _: WRENCH):
            raw = RawClient(loopback_host)
            raw.request(2)
            assert raw.record()[0] == 1
            raw.socket.close()


def test_the_wire_delivers_each_record_once_unless_told_otherwise():
    wire = Wire(seed=0)
    wire.delay_s = 0.01
    for i in range(1000):
        wire.send((b"%d" % i, ("client", 1)), now=i * 1e-3)
    assert [int(record) for record, _ in wire.arrivals(now=1e9)] == list(range(1000))
    assert wire.next_arrival == float("inf")
