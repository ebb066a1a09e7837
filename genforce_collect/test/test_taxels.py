"""The uSkin's websocket client, its node, and its drawing as markers."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from genforce_collect.config import TaxelsConfig, UskinConfig, load_sensor
from genforce_collect.devices.uskin import TaxelSample, Uskin, parse_sample
from genforce_collect.errors import DataError, DeviceError
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.quality import Flag
from genforce_collect.markers.taxels import render_taxels
from genforce_collect.nodes.common import NAMESPACE, spin_until, stream_qos
from genforce_msgs.msg import Taxels

pytestmark = pytest.mark.live

PORT = 5000
REST = np.full(48, 33000)
TIMEOUT_S = 15.0
NODE = [sys.executable, "-m", "genforce_collect.nodes.taxels", "--ros-args"]


class Server:
    """Sends texts one after the other, as the reading program of a uSkin does."""

    def __init__(self, host: str, texts: Iterator[str], period_s: float = 0.005) -> None:
        self.url = f"ws://{host}:{PORT}"
        self._texts, self._period_s = texts, period_s
        self._server = serve(self._send, host, PORT)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _send(self, connection: ServerConnection) -> None:
        try:
            for text in self._texts:
                connection.send(text)
                time.sleep(self._period_s)
        except ConnectionClosed:
            return

    def close(self) -> None:
        self._server.shutdown()


def text(counts: np.ndarray, number: int | None = None) -> str:
    message: dict[str, Any] = {"1": {"data": ",".join(f"{count:X}" for count in counts)}}
    return json.dumps(message if number is None else message | {"message": number, "time": 0.01})


def noisy(number: int) -> np.ndarray:
    return REST + np.random.default_rng(number).integers(-3, 4, 48)


@pytest.fixture
def taken() -> list[TaxelSample]:
    return []


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.01)


@pytest.fixture
def client(taken: list[TaxelSample]) -> Iterator[Callable[..., Uskin]]:
    started: list[Any] = []

    def make(host: str, texts: Iterator[str]) -> Uskin:
        server = Server(host, texts)
        started.append(server.close)
        device = Uskin(UskinConfig(url=server.url, rate_hz=200), TaxelsConfig(), taken.append)
        started.append(device.stop)
        device.start()
        return device

    yield make
    for end in reversed(started):
        end()


def test_every_message_becomes_a_sample(
    loopback_host: str, client: Callable[..., Uskin], taken: list[TaxelSample]
) -> None:
    device = client(loopback_host, (text(noisy(n), n) for n in itertools.count()))
    wait(lambda: len(taken) >= 30)
    for number, sample in enumerate(list(taken)):
        assert sample.seq == number
        assert np.array_equal(sample.counts, noisy(number))
    health = device.health()
    assert (health.message, health.usable, health.lost, health.repeated) == ("", True, 0, 0)


def test_repeated_samples_are_marked_and_stale_ones_called_so(
    loopback_host: str, client: Callable[..., Uskin], taken: list[TaxelSample]
) -> None:
    device = client(loopback_host, (text(noisy(min(n // 4, 10)), n) for n in itertools.count()))
    wait(lambda: len(taken) >= 40)
    assert [sample.repeated for sample in taken[:40]] == [n % 4 != 0 for n in range(40)]
    wait(lambda: "stand still" in device.health().message)
    assert not device.health().usable


def test_lost_and_malformed_messages_are_counted_and_left_out(
    loopback_host: str, client: Callable[..., Uskin], taken: list[TaxelSample]
) -> None:
    numbers = itertools.chain(range(5), range(8, 15))
    texts = [text(noisy(n), n) for n in numbers]
    texts[2:2] = ["no json", "{}", '{"1": {"data": "12,zz"}}', text(REST[:10])]
    device = client(loopback_host, itertools.chain(texts, (text(noisy(n)) for n in range(99, 999))))
    wait(lambda: len(taken) >= 12)
    assert device.health().malformed == 4
    assert device.lost == 3
    assert [sample.seq for sample in taken[:12]] == list(range(12))


def test_a_server_that_hangs_up_is_taken_up_again(
    loopback_host: str, client: Callable[..., Uskin], taken: list[TaxelSample]
) -> None:
    numbers = iter(range(10_000))
    device = client(
        loopback_host, (text(noisy(n)) for _, n in zip(range(20), numbers, strict=False))
    )
    wait(lambda: device.health().reconnects >= 1)
    assert len(taken) == 20


def test_a_missing_server_is_named_with_its_remedy(loopback_host: str) -> None:
    url = f"ws://{loopback_host}:{PORT}"
    with pytest.raises(DeviceError, match=r"uskin\.url") as caught:
        Uskin(UskinConfig(url=url), TaxelsConfig(), lambda _: None).start()
    assert url in str(caught.value)


def test_z_only_arrays_are_read() -> None:
    config = TaxelsConfig(rows=2, columns=3, axes=1, port="2")
    counts, _ = parse_sample('{"2": {"data": "A,B,C,D,E,FFFF"}}', config)
    assert counts == (10, 11, 12, 13, 14, 65535)
    with pytest.raises(DataError, match="sensor file says 6"):
        parse_sample('{"2": {"data": "A,B"}}', config)


# --- drawing ----------------------------------------------------------------------------------


def test_at_rest_the_discs_stand_on_the_grid_of_the_real_rendering(realdata: Path) -> None:
    image = cv2.imread(str(realdata / "patterns" / "uskin_ref.jpg"), cv2.IMREAD_GRAYSCALE)
    _, _, _, centres = cv2.connectedComponentsWithStats(np.uint8(image > 50))
    frame = render_taxels(REST, REST, TaxelsConfig())
    drawn = frame.points[np.lexsort((frame.x, frame.y))]
    real = centres[1:][np.lexsort((centres[1:, 0], np.round(centres[1:, 1] / 96)))]
    assert np.abs(drawn - real).max() < 1.5


def test_shear_moves_and_pressure_grows_a_disc_up_to_their_limits() -> None:
    counts = REST.reshape(16, 3).copy()
    counts[5] += [1000, 500, 900]
    counts[6] += [9000, -9000, 99000]
    counts[7, 2] -= 5000
    frame = render_taxels(counts.ravel(), REST, TaxelsConfig())
    rest = render_taxels(REST, REST, TaxelsConfig())
    move = frame.points - rest.points
    assert move[5] == pytest.approx([0.5 * 128, -0.25 * 96])
    assert move[6] == pytest.approx([0.8 * 128, 0.8 * 96])
    assert not move[[0, 1, 2, 3, 4, 7]].any()
    assert frame.area[5] / rest.area[5] == pytest.approx(10)
    assert frame.area[6] / rest.area[6] == pytest.approx(60)
    assert frame.area[7] == rest.area[7]
    drawn = np.bincount(cv2.connectedComponents(frame.mask)[1].ravel())[1:]
    assert sorted(drawn)[:13] == pytest.approx([float(rest.area[0])] * 13, rel=0.1)


def test_the_front_end_takes_the_first_sample_as_rest_and_flags_a_repeated_one() -> None:
    frontend = Frontend(load_sensor("uskin"))
    assert frontend.process_taxels(REST).flags == 0
    assert frontend.process_taxels(REST).flags == Flag.REPEATED
    assert frontend.process_taxels(REST[:9]).flags & Flag.WRONG_SIZE
    assert frontend.process_taxels(REST + 500).count == 16


def test_a_real_trial_is_drawn_and_its_repeats_are_seen(realdata: Path) -> None:
    rows = np.loadtxt(realdata / "uskin" / "trial_xela_sensor1.csv", delimiter=",", skiprows=1)
    frontend = Frontend(load_sensor("uskin"))
    frames = [frontend.process_taxels(row.astype(np.int32)) for row in rows]
    repeated = np.mean([bool(frame.flags & Flag.REPEATED) for frame in frames])
    assert 0.6 < repeated < 0.9
    assert all(frame.count == 16 and frame.mask.any() for frame in frames)


# --- node -------------------------------------------------------------------------------------


def test_the_node_publishes_every_sample_with_its_shape(loopback_host: str) -> None:
    server = Server(loopback_host, (text(noisy(n), n) for n in itertools.count()), 0.01)
    rclpy.init(args=[])
    node = rclpy.create_node("listener", namespace=NAMESPACE)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    got: list[Any] = []
    node.create_subscription(Taxels, "uskin/taxels", got.append, stream_qos(100))
    process = subprocess.Popen(
        [*NODE, "-p", f"url:={server.url}", "-p", "sensor:=uskin"],
        env=os.environ,
    )
    try:
        assert spin_until(executor, lambda: len(got) >= 30, TIMEOUT_S)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 0
        server.close()
        node.destroy_node()
        executor.shutdown()
        rclpy.try_shutdown()
    first = got[0].seq
    for offset, message in enumerate(got):
        assert message.seq == first + offset
        assert np.array_equal(message.counts, noisy(message.seq))
        assert (message.rows, message.cols, message.axes) == (4, 4, 3)
