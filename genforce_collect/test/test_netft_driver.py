"""The force/torque driver against the virtual Net F/T box: what it promises, fault by fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from genforce_collect.clock import ClockMapper
from genforce_collect.config import NetftConfig
from genforce_collect.devices.netft import LossCount, NetftSensor
from genforce_collect.devices.wrench import WrenchSample, mean_at_rest, sensor_frame_matrix
from genforce_collect.errors import DeviceError
from genforce_sim.devices.netft_box import NetftBox

pytestmark = pytest.mark.live

RDT, HTTP = 30049, 8081
WRENCH = np.array([1.0, -2.0, -3.0, 0.01, 0.02, -0.03])


class Bench:
    """A box, what presses on its transducer, and the driver that reads it."""

    def __init__(self, host: str) -> None:
        self.wrench = WRENCH
        self.config = NetftConfig(host=host, rdt_port=RDT, http_port=HTTP)
        self.box = NetftBox(host, RDT, HTTP, lambda _: self.wrench)
        self.samples: list[WrenchSample] = []
        self.sensor = NetftSensor(self.config, self.samples.append)
        self.sensor.start()
        assert self.wait_samples(20)

    def close(self) -> None:
        self.sensor.stop()
        self.box.close()

    def wait_samples(self, count: int, timeout_s: float = 5.0) -> bool:
        wanted = len(self.samples) + count
        return wait_for(lambda: len(self.samples) >= wanted, timeout_s)

    def wait_message(self, text: str) -> bool:
        return wait_for(lambda: text in self.sensor.health().message)

    def newest(self) -> np.ndarray:
        return np.array(self.samples[-1].wrench)


@pytest.fixture
def bench(loopback_host) -> Iterator[Bench]:
    bench = Bench(loopback_host)
    yield bench
    bench.close()


def wait_for(condition: Callable[[], object], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


# --- samples ----------------------------------------------------------------------------------


def test_every_sample_is_delivered_in_order_at_1_khz(bench):
    assert bench.wait_samples(1500)
    samples = bench.samples[-1400:]
    assert set(np.diff([sample.seq for sample in samples])) == {7}
    assert np.diff([sample.device_time for sample in samples]) == pytest.approx(1e-3)
    health = bench.sensor.health()
    assert health.usable
    assert health.message == ""
    assert 500 < health.rate_hz < 2000
    assert health.lost == 0
    assert bench.newest() == pytest.approx(WRENCH, abs=0.02)


def test_a_stall_of_the_receiver_loses_nothing(bench):
    stalled = threading.Event()
    go_on = threading.Event()
    seqs: list[int] = []

    def receive(sample: WrenchSample) -> None:
        seqs.append(sample.seq)
        if len(seqs) == 100:
            stalled.set()
            go_on.wait(5.0)

    bench.sensor.stop()
    sensor = NetftSensor(bench.config, receive)
    sensor.start()
    assert stalled.wait(3.0)
    assert wait_for(lambda: sensor._client.health().received_count > 1500)
    go_on.set()
    assert wait_for(lambda: len(seqs) > 1500)
    sensor.stop()
    assert set(np.diff(seqs)) == {7}
    assert sensor.lost == 0


def test_arrival_times_are_host_system_time(bench):
    assert bench.wait_samples(100)
    late_s = [
        (sample.receive_ns - bench.box.host_time_ns(sample.seq)) / 1e9
        for sample in bench.samples[-50:]
    ]
    assert min(late_s) > -0.001
    assert np.median(late_s) < 0.1


def test_stamps_are_right_to_a_millisecond_in_spite_of_2_ms_of_jitter(bench):
    bench.box.delay(0.002)
    assert bench.wait_samples(100)
    mapper = ClockMapper()
    first = len(bench.samples)
    assert bench.wait_samples(2500)
    errors_ms = [
        (mapper.update(sample.device_time, sample.receive_ns) - bench.box.host_time_ns(sample.seq))
        / 1e6
        for sample in bench.samples[first:]
    ]
    assert np.percentile(np.abs(errors_ms[500:]), 95) < 1.0
    assert bench.sensor.lost == 0


def test_the_wrench_comes_in_the_sensor_frame(loopback_host):
    config = NetftConfig(
        host=loopback_host, rotation=(np.pi, 0, 0), origin_m=(0, 0, -0.02), sign=-1
    )
    matrix = sensor_frame_matrix(config)
    assert matrix @ [1, 2, 3, 0, 0, 0] == pytest.approx([-1, 2, 3, 0.04, 0.02, 0])
    assert matrix @ [0, 0, 0, 1, 2, 3] == pytest.approx([0, 0, 0, -1, 2, 3])


def test_a_box_that_counts_in_other_units_gives_the_same_newtons(bench):
    bench.sensor._scale_to_si("lbf", "N-mm")
    assert bench.sensor._units_to_sensor @ [1, 0, 0, 0, 0, 1000] == pytest.approx(
        [4.4482216, 0, 0, 0, 0, 1]
    )
    with pytest.raises(DeviceError, match="unknown units"):
        bench.sensor._scale_to_si("unknown", "N-m")


# --- tare -------------------------------------------------------------------------------------


def test_a_tare_zeroes_the_load_and_is_recorded(bench):
    tare = bench.sensor.tare(100)
    assert bench.wait_samples(50)
    assert bench.newest() == pytest.approx(np.zeros(6), abs=0.02)
    assert bench.sensor.tare_taken is tare
    assert tare.wrench == pytest.approx(WRENCH, abs=0.005)
    assert tare.samples == 100
    assert abs(tare.stamp_ns - time.time_ns()) < 5e9
    bench.wrench = WRENCH + np.eye(6)[2]
    assert wait_for(lambda: abs(bench.newest()[2] - 1.0) < 0.02)


def test_a_tare_is_refused_while_the_load_moves(bench):
    stop = threading.Event()

    def shake() -> None:
        while not stop.wait(0.002):
            bench.wrench = WRENCH + 0.2 * np.eye(6)[1] * np.sin(200 * time.monotonic())

    shaker = threading.Thread(target=shake)
    shaker.start()
    try:
        with pytest.raises(DeviceError, match="Fy scatters"):
            bench.sensor.tare(200)
    finally:
        stop.set()
        shaker.join()
    assert bench.sensor.tare_taken is None


def test_a_tare_is_refused_when_samples_stay_away(bench):
    bench.box.mute(30.0)
    with pytest.raises(DeviceError, match="of 50 samples came in"):
        bench.sensor.tare()


def test_a_tare_is_refused_on_an_error_status(bench):
    bench.box.status_error(0x80000004)
    assert wait_for(lambda: bench.samples[-1].status)
    with pytest.raises(DeviceError, match="internal temperature error"):
        bench.sensor.tare(1)


def test_noise_of_a_sensor_at_rest_does_not_hinder_a_tare():
    noise = np.random.default_rng(0).standard_normal((50, 6)) * np.repeat([1 / 320, 1 / 64e3], 3)
    assert mean_at_rest(WRENCH + noise, 0).wrench == pytest.approx(WRENCH, abs=0.003)


# --- faults -----------------------------------------------------------------------------------


def test_lost_records_are_counted_exactly(bench):
    assert bench.wait_samples(50)
    bench.box.lose(0.1)
    assert bench.wait_samples(500)
    bench.box.lose(0.0)
    assert bench.wait_samples(100)
    first, last = bench.samples[0], bench.samples[-1]
    sent = (last.seq - first.seq) // 7 + 1
    received = bench.samples.index(last) + 1
    assert sent - received > 10
    assert wait_for(lambda: bench.sensor.lost == sent - received)
    assert bench.sensor.health().usable


def test_a_late_record_is_left_out_and_counted(bench):
    bench.box.reorder()
    assert wait_for(lambda: dict(bench.sensor.health().details)["out of order"] == "1")
    assert bench.sensor.lost == 1
    assert (np.diff([sample.seq for sample in bench.samples]) > 0).all()


def test_a_doubled_record_is_delivered_once(bench):
    bench.box.duplicate()
    assert wait_for(lambda: dict(bench.sensor.health().details)["duplicate"] == "1")
    assert bench.sensor.lost == 0
    assert (np.diff([sample.seq for sample in bench.samples]) > 0).all()


def test_silence_is_reported_and_ends_with_a_reconnection(bench):
    bench.box.mute(1.0)
    assert bench.wait_message("no records")
    assert not bench.sensor.health().usable
    assert wait_for(lambda: bench.sensor.health().usable)
    assert bench.wait_samples(100)
    assert 500 < bench.sensor.lost < 3000


def test_a_frozen_counter_is_reported_and_its_samples_are_not_delivered(bench):
    bench.box.freeze_counter()
    assert bench.wait_message("its counter stands still")
    assert not bench.sensor.health().usable
    delivered = len(bench.samples)
    assert not bench.wait_samples(2, timeout_s=0.3)
    bench.box.freeze_counter(False)
    assert wait_for(lambda: bench.sensor.health().usable)
    assert len(bench.samples) > delivered


def test_saturation_is_delivered_at_once_and_named(bench):
    bench.wrench = np.array([0, 0, -30.0, 0, 0, 0])
    assert wait_for(lambda: bench.samples[-1].status == 0x80020000)
    assert bench.newest()[2] == pytest.approx(-17.0)
    assert bench.wait_message("transducer saturated")
    assert not bench.sensor.health().usable
    bench.wrench = WRENCH
    assert wait_for(lambda: bench.sensor.health().usable)


@pytest.mark.parametrize(
    ("status", "cause"),
    [(0x82000000, "halted by configuration errors"), (0x80800000, "does not fit the calibration")],
)
def test_a_status_error_is_named_by_its_bit_until_it_clears(bench, status, cause):
    bench.box.status_error(status)
    assert bench.wait_message(cause)
    assert f"0x{status:08x}" in bench.sensor.health().message
    assert not bench.sensor.health().usable
    bench.box.status_error(0)
    assert wait_for(lambda: bench.sensor.health().usable)


def test_a_latched_condition_is_a_warning_only(bench):
    bench.box.status_error(0x80010000)
    assert bench.wait_message("monitor condition latched")
    assert bench.sensor.health().usable
    assert bench.wait_samples(100)


def test_a_restart_with_another_calibration_gives_the_same_newtons(bench):
    before = bench.samples[-1].seq
    bench.box.restart(counts_per_force=250_000)
    assert wait_for(lambda: bench.samples[-1].seq < before)
    assert bench.wait_samples(50)
    assert bench.newest() == pytest.approx(WRENCH, abs=0.02)
    details = dict(bench.sensor.health().details)
    assert (details["box restarts"], details["calibration changes"]) == ("1", "1")
    assert bench.sensor.lost < 1000


def test_another_rate_than_asked_for_is_reported(loopback_host):
    config = NetftConfig(host=loopback_host, rdt_port=RDT, http_port=HTTP, rate_hz=1000)
    with NetftBox(loopback_host, RDT, HTTP, lambda _: WRENCH, rate_hz=500):
        sensor = NetftSensor(config, lambda sample: None)
        sensor.start()
        try:
            assert wait_for(
                lambda: "sends 500 Hz, netft.rate_hz is 1000" in sensor.health().message
            )
            assert sensor.health().usable
            assert sensor.lost == 0
        finally:
            sensor.stop()


def test_an_unreachable_box_is_named_with_its_page(loopback_host):
    config = NetftConfig(host=loopback_host, http_port=HTTP)
    with pytest.raises(
        DeviceError, match=rf"{loopback_host}: no configuration page on port {HTTP}"
    ):
        NetftSensor(config, lambda sample: None).start(timeout_s=0.5)


def test_a_box_without_rdt_is_named_with_its_port(loopback_host):
    config = NetftConfig(host=loopback_host, rdt_port=RDT + 1, http_port=HTTP)
    with (
        NetftBox(loopback_host, RDT, HTTP, lambda _: WRENCH),
        pytest.raises(DeviceError, match=rf"{loopback_host}: no records from port {RDT + 1}"),
    ):
        NetftSensor(config, lambda sample: None).start(timeout_s=0.5)


def test_a_receiver_that_raises_ends_the_stream_with_its_reason(bench):
    def receive(sample: WrenchSample) -> None:
        if sensor.received > 100:
            raise RuntimeError("the disk is full")

    bench.sensor.stop()
    sensor = NetftSensor(bench.config, receive)
    sensor.start()
    assert wait_for(lambda: "the disk is full" in sensor.health().message)
    assert not sensor.health().usable
    sensor.stop()


def test_a_stopped_sensor_starts_again(bench):
    bench.sensor.stop()
    assert not bench.wait_samples(1, timeout_s=0.2)
    bench.sensor.start()
    assert bench.wait_samples(100)


# --- counting ---------------------------------------------------------------------------------


def test_losses_are_counted_across_sessions_and_not_across_restarts():
    losses = LossCount()
    for rdt in (1, 2, 3, 5):  # 4 is lost
        losses.update(rdt, 700 + 7 * rdt)
    assert losses.total == 1
    losses.update(1, 700 + 7 * 10)  # a new session: 6 to 9 are lost
    assert losses.total == 5
    losses.update(2, 700 + 7 * 11)
    losses.update(1, 7)  # the box restarted
    losses.update(2, 14)
    assert losses.total == 5
    losses.update(3, 28)  # set to half the rate
    losses.update(4, 42)
    losses.update(5, 56)
    total = losses.total
    losses.update(6, 70)
    assert losses.total == total
    assert losses.ticks == 14


def test_the_counter_of_the_box_may_wrap():
    losses = LossCount()
    for rdt in range(1, 10):
        losses.update(rdt, (2**32 - 30 + 7 * rdt) % 2**32)
    assert losses.total == 0
