"""Damaged input from outside ends in an error that a user can mend, never in another."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genforce_bringup.config_cli import read_any
from genforce_collect.bags import BagReader, BagWriter, TopicSpec, repair
from genforce_collect.config import NetftConfig, TaxelsConfig, load_cell, load_sensor
from genforce_collect.devices import rtde
from genforce_collect.devices.ati_calibration import read_calibration
from genforce_collect.devices.netft import NetftSensor
from genforce_collect.devices.uskin import parse_sample
from genforce_collect.errors import ConfigError, DataError, DeviceError, GenforceError
from genforce_collect.layout import WRENCH_COLUMNS, read_columns, read_mask
from genforce_collect.markers.jpeg import decode_gray
from genforce_collect.trajectory import load_plan
from genforce_collect.verification import verify
from genforce_infer.bundle import InputSpec, Manifest, Normalisation, read_bundle, write_bundle

CONFIG = Path(__file__).parents[1] / "launch" / "config"
EXAMPLES = 30
PATIENCE_S = 20.0
POLL_S = 0.01  # how soon a server of a test ends

bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# What happens to a file on its way: where (as part of its length), and which bytes take the place
# of how many.
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=4
)
junk = st.binary(max_size=400)


def damaged(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for where, gone, new in changes:
        at = int(where * len(data))
        data = data[:at] + new + data[at + gone :]
    return data


tried: Counter[str] = Counter()  # inputs, by the error they may end in


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Tell the summary how many inputs a test tried."""
    before = tried.total()
    yield
    record_property("inputs tried", tried.total() - before)


def mends(read: Callable[[], Any], kind: type[GenforceError]) -> None:
    """It may succeed, or fail with an error of this kind that says something."""
    tried[kind.__name__] += 1
    try:
        read()
    except kind as error:
        said = str(error)
    else:
        return
    assert said


# --- configuration ------------------------------------------------------------------------------

TEXTS = [
    (CONFIG / "cells" / "virtual.yaml").read_bytes(),
    (CONFIG / "sensors" / "gelsight.yaml").read_bytes(),
    b"contacts:\n  - {x_mm: 0.0, y_mm: 0.0, depth_mm: 0.8}\n",
]


@bounded
@given(st.sampled_from(TEXTS), edits)
def test_damaged_configuration_files(tmp_path, text, changes):
    path = tmp_path / "file.yaml"
    path.write_bytes(damaged(text, changes))
    for read in (load_cell, load_sensor, read_any):
        mends(lambda read=read: read(str(path)), ConfigError)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


@bounded
@given(st.sampled_from(["cells/virtual", "sensors/gelsight"]), st.data())
def test_configuration_values_of_any_kind(tmp_path, name, data):
    content = yaml.safe_load((CONFIG / f"{name}.yaml").read_text())
    key = data.draw(st.sampled_from(sorted(content)))
    if isinstance(content[key], dict) and data.draw(st.booleans()):
        content[key][data.draw(st.sampled_from(sorted(content[key])))] = data.draw(values)
    else:
        content[key] = data.draw(values)
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(content))
    mends(lambda: read_any(str(path)), ConfigError)


def test_configuration_that_yaml_itself_chokes_on(tmp_path):
    path = tmp_path / "file.yaml"
    for text in (b"[" * 600, b"a: 2001-99-99", b"a: 0b_", b"\xff\xfe\x00", b"a: &a [*a]", b"\0"):
        path.write_bytes(text)
        with pytest.raises(ConfigError):
            load_cell(path)


@bounded
@given(st.text(max_size=20) | st.from_regex(r"random:[-0-9]{0,4}:[-0-9]{0,9}", fullmatch=True))
def test_plans_by_any_name(text):
    mends(lambda: load_plan(text, load_sensor("gelsight")), ConfigError)


AXIS = '<UserAxis Name="{}" values="1 2 3 4 5 6" max="12"/>'
CALIBRATION = (
    '<?xml version="1.0" encoding="utf-8"?><FTSensor Serial="FT0" BodyStyle="Nano17" NumGages="6">'
    '<Calibration PartNumber="SI-12-0.12" CalDate="1/1/2020" ForceUnits="N" TorqueUnits="N-mm" '
    'OutputRange="20" OutputBipolar="True">'
    + "".join(AXIS.format(name) for name in ("Fx", "Fy", "Fz", "Tx", "Ty", "Tz"))
    + "</Calibration></FTSensor>"
).encode()


def test_the_calibration_that_is_damaged_below_is_a_sound_one(tmp_path):
    path = tmp_path / "sound.cal"
    path.write_bytes(CALIBRATION)
    assert read_calibration(path).serial == "FT0"


@bounded
@given(edits)
def test_damaged_calibrations(tmp_path, changes):
    path = tmp_path / "damaged.cal"
    path.write_bytes(damaged(CALIBRATION, changes))
    mends(lambda: read_calibration(path), ConfigError)


# --- devices ------------------------------------------------------------------------------------


@bounded
@given(junk)
def test_rtde_frames_of_any_bytes(data):
    tried["frames"] += 1
    with contextlib.suppress(ValueError):  # the error that its reader is told to expect
        for kind, payload in rtde.take_frames(bytearray(data)):
            assert 0 <= kind <= 255
            assert payload in data


SET_UP = [
    rtde.frame(rtde.REQUEST_PROTOCOL_VERSION, b"\x01"),
    rtde.frame(rtde.SETUP_OUTPUTS, b"\x01DOUBLE,VECTOR6D"),
    rtde.frame(rtde.START, b"\x01"),
    rtde.frame(rtde.DATA, b"\x01" + struct.pack(">7d", *range(7))),
]


@settings(bounded, max_examples=25)
@given(edits)
def test_rtde_controllers_that_answer_nonsense(loopback_host, changes):
    answer = damaged(b"".join(SET_UP), changes)
    with socket.create_server((loopback_host, rtde.PORT)) as server:

        def talk() -> None:
            with contextlib.suppress(OSError), server.accept()[0] as client:
                client.sendall(answer)
                client.shutdown(socket.SHUT_WR)
                while client.recv(1000):
                    pass

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()

        def read() -> None:
            stream = rtde.RtdeStream(loopback_host, ("timestamp", "pose"), 500.0, 2.0)
            with contextlib.closing(stream):
                for _ in stream.samples(2.0):
                    pass

        mends(read, DeviceError)
        thread.join(5.0)
        assert not thread.is_alive()


RECORD = struct.pack(">3I6i", 1, 1, 0, 1000, 2000, 3000, 4, 5, 6)
PAGE = (
    b'<?xml version="1.0" encoding="utf-8"?>\n<netft>\n<runstat>0x00000000</runstat>\n'
    b"<runrate>7000</runrate>\n<prodname>Net F/T Nano17</prodname>\n<cfgcpf>1000000</cfgcpf>\n"
    b"<cfgcpt>1000000</cfgcpt>\n<scfgfu>N</scfgfu>\n<scfgtu>Nm</scfgtu>\n"
    b"<comrdtrate>1000</comrdtrate>\n<comrdtbsiz>1</comrdtbsiz>\n</netft>\n"
)


@contextlib.contextmanager
def force_sensor_box(host: str, page: bytes, record: bytes) -> Iterator[NetftConfig]:
    """A box whose page and whose records are these bytes."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    def send() -> None:
        with contextlib.suppress(OSError):
            _, client = stream.recvfrom(100)
            for number in range(1, 21):
                stream.sendto(struct.pack(">I", number) + record[4:], client)

    with (
        ThreadingHTTPServer((host, 0), Page) as web,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stream,
    ):
        stream.bind((host, 0))
        stream.settimeout(PATIENCE_S)
        for work in (partial(web.serve_forever, POLL_S), send):
            threading.Thread(target=work, daemon=True).start()
        yield NetftConfig(host=host, http_port=web.server_port, rdt_port=stream.getsockname()[1])
        web.shutdown()


def test_the_box_that_is_damaged_below_is_a_sound_one(loopback_host):
    arrived = threading.Event()
    with force_sensor_box(loopback_host, PAGE, RECORD) as config:
        sensor = NetftSensor(config, lambda _: arrived.set())
        sensor.start(PATIENCE_S)
        assert arrived.wait(PATIENCE_S)
        sensor.stop()


@settings(bounded, max_examples=25)
@given(st.sampled_from(["page", "record"]), edits, junk, st.booleans())
def test_force_sensor_boxes_that_answer_nonsense(loopback_host, part, changes, other, is_junk):
    content = {"page": PAGE, "record": RECORD}
    content[part] = other if is_junk else damaged(content[part], changes)
    with force_sensor_box(loopback_host, **content) as config:
        sensor = NetftSensor(config, lambda _: None)
        try:
            mends(lambda: sensor.start(0.3), DeviceError)
        finally:
            sensor.stop()


USKIN = json.dumps({"message": 1, "time": 2.5, "1": {"data": ",".join(["1f40"] * 48)}})


@bounded
@given(junk | edits.map(lambda changes: damaged(USKIN.encode(), changes)) | st.text(max_size=60))
def test_uskin_messages_of_any_kind(text):
    mends(lambda: parse_sample(text, TaxelsConfig()), DataError)


@bounded
@given(values)
def test_uskin_messages_of_any_structure(value):
    for message in (value, {"1": value}, {"1": {"data": value}}):
        mends(lambda message=message: parse_sample(json.dumps(message), TaxelsConfig()), DataError)


def test_uskin_messages_nested_without_end():
    with pytest.raises(DataError):
        parse_sample("[" * 100_000, TaxelsConfig())


@bounded
@given(junk)
def test_frames_of_any_bytes(data):
    tried["frames"] += 1
    assert decode_gray(data) is None or decode_gray(b"\xff\xd8" + data) is None


# --- files --------------------------------------------------------------------------------------

TOPIC = TopicSpec("/genforce/netft/wrench", "geometry_msgs/msg/WrenchStamped")


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bags") / "bag"
    writer = BagWriter(path, {"session": "fuzz", "start_ns": 1})
    writer.add_topic(TOPIC)
    for number in range(60):
        stamp = struct.pack("<4xiI", 10, number) + struct.pack("<I", 7) + b"sensor\0\0"
        writer.write(TOPIC.name, stamp + struct.pack("<6d", *range(6)), number + 1, number + 1)
    writer.close(stop_ns=100)
    return path


def test_the_bag_that_is_damaged_below_is_a_sound_one(bag):
    assert verify(bag).messages == 60


@settings(bounded, max_examples=60)
@given(st.booleans(), st.booleans(), edits)
def test_damaged_bags(tmp_path, bag, closed, metadata_too, changes):
    copy = tmp_path / "bag"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bag, copy)
    (file,) = copy.glob("*.mcap")
    file.write_bytes(damaged(file.read_bytes(), changes))
    listing = copy / "metadata.yaml"
    if not closed:
        listing.unlink()
    elif metadata_too:
        listing.write_bytes(damaged(listing.read_bytes(), changes))

    def read_all() -> None:
        with BagReader(copy) as reader:
            for record in reader.messages():
                assert record.topic

    for read in (lambda: repair(copy), lambda: verify(copy), read_all):
        mends(read, DataError)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    tensor = onnx.helper.make_tensor_value_info
    image = tensor("image", onnx.TensorProto.FLOAT, (1, 2, 8, 8))
    force = tensor("force", onnx.TensorProto.FLOAT, (1, 3))
    weights = onnx.numpy_helper.from_array(np.zeros((128, 3), np.float32), "w")
    nodes = [
        onnx.helper.make_node("Flatten", ["image"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "w"], ["force"]),
    ]
    graph = onnx.helper.make_graph(nodes, "force", [image], [force], [weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    manifest = Manifest(
        model_id="fuzz",
        sensor="array_1",
        input=InputSpec(height=8, width=8),
        normalisation=Normalisation(scale=(1, 1, 1), offset=(0, 0, 0)),
        opset=17,
    )
    write_bundle(folder, manifest, {"force.onnx": model.SerializeToString()})
    return folder


@settings(bounded, max_examples=60)
@given(st.sampled_from(["manifest.json", "force.onnx"]), st.booleans(), edits)
def test_damaged_bundles(tmp_path, bundle, name, forged, changes):
    copy = tmp_path / "bundle"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle, copy)
    content = damaged((copy / name).read_bytes(), changes)
    (copy / name).write_bytes(content)
    if forged and name == "force.onnx":  # with a hash that fits, the graph itself is looked at
        manifest = Manifest.model_validate_json((copy / "manifest.json").read_text())
        with contextlib.suppress(GenforceError):
            write_bundle(copy, manifest, {"force.onnx": content})
    mends(lambda: read_bundle(copy), DataError)


@bounded
@given(st.sampled_from(["packed", "image", "objects"]), edits)
def test_damaged_masks(tmp_path, kind, changes):
    path = tmp_path / "mask.npy"
    arrays = {
        "packed": np.zeros(38400, np.uint8),
        "image": np.zeros((480, 640), bool),
        "objects": np.array([{}, []], object),
    }
    np.save(path, arrays[kind], allow_pickle=True)
    head = path.read_bytes()[:200]  # where the format is told; what follows is plain data
    path.write_bytes(damaged(head, changes) + path.read_bytes()[200:])
    mends(lambda: read_mask(path), DataError)


def test_pickled_masks_are_refused(tmp_path):
    path = tmp_path / "mask.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError):
        read_mask(path)


@bounded
@given(edits)
def test_damaged_label_files(tmp_path, changes):
    path = tmp_path / "ft.csv"
    text = ",".join(WRENCH_COLUMNS) + "\n" + "1,2,3,4,5,6\n" * 5
    path.write_bytes(damaged(text.encode(), changes))
    mends(lambda: read_columns(path, WRENCH_COLUMNS), DataError)
