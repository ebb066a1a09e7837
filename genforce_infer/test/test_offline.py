from __future__ import annotations

import argparse
import array
import csv
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from geometry_msgs.msg import WrenchStamped
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage

from genforce_collect.bags import BagReader, BagWriter, TopicSpec
from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError, DataError
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.registration import Registration
from genforce_collect.markers.segmentation import MarkerFrame
from genforce_collect.nodes.common import to_stamp
from genforce_infer import offline, pipeline, serve_cli
from genforce_infer.bundle import Bundle, InputSpec, Uncertainty
from genforce_infer.labelled import read_labelled
from genforce_infer.offline import infer_bag, interpolate
from genforce_infer.parity import compare
from genforce_infer.pipeline import REFERENCE_FRAMES, Engine, ForcePipeline, State, majority
from genforce_infer.postprocess import Options
from genforce_infer.quantize import make_variant
from genforce_infer.runtime import Model

MakeBundle = Callable[..., Bundle]
IMAGE, WRENCH = "/genforce/array_1/image/compressed", "/genforce/netft/wrench"
FRAMES = 80
T0, PERIOD_NS = 1_700_000_000_000_000_000, 20_000_000


@pytest.fixture
def bag(
    tmp_path: Path, make_dots: Callable[..., MarkerFrame], make_jpeg: Callable[..., bytes]
) -> Path:
    """Markers pushed to the right more and more; the force sensor's Fx rises at 0.01 N a frame."""
    writer = BagWriter(tmp_path / "bag", {"sensor": "array_1"})
    writer.add_topic(TopicSpec(IMAGE, "sensor_msgs/msg/CompressedImage"))
    writer.add_topic(TopicSpec(WRENCH, "geometry_msgs/msg/WrenchStamped"))
    for i in range(FRAMES):
        stamp = T0 + i * PERIOD_NS
        push = max(0, i - REFERENCE_FRAMES)
        image = CompressedImage(format="jpeg")
        image.data = array.array("B", make_jpeg(make_dots((0.25 * push, 0.0)), i))
        wrench = WrenchStamped()
        wrench.wrench.force.x = 0.01 * push
        for topic, message in ((IMAGE, image), (WRENCH, wrench)):
            message.header.stamp = to_stamp(stamp)
            writer.write(topic, serialize_message(message), stamp, stamp)
    writer.close()
    return tmp_path / "bag"


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    offline.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_every_frame_of_a_bag_gets_a_row_beside_its_label(
    bag: Path, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle(
        uncertainty=Uncertainty(base=(1.0, 1.0, 1.0), gain=(0.0, 0.0, 0.0)),
        contact_threshold_n=0.0,
    )
    out = tmp_path / "out"
    assert offline.run(parse(bag, "--infer", bundle.folder, "-o", out)) == 0
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [int(row["stamp_ns"]) for row in rows] == [T0 + i * PERIOD_NS for i in range(FRAMES)]
    assert [row["predicted_fx"] == "" for row in rows] == [
        i < REFERENCE_FRAMES for i in range(FRAMES)
    ]
    assert float(rows[-2]["measured_fx"]) == pytest.approx(0.01 * (FRAMES - 2 - REFERENCE_FRAMES))
    predicted = [float(row["predicted_fx"]) for row in rows[REFERENCE_FRAMES:]]
    assert np.corrcoef(predicted, np.arange(len(predicted)))[0, 1] > 0.98
    report = json.loads((out / "report.json").read_text())
    assert report["frames"] == FRAMES
    assert report["answered"] == FRAMES - REFERENCE_FRAMES
    assert set(report["mae_n"]) == {"fx", "fy", "fz", "total"}
    assert report["coverage"]["fx"] == 1.0
    assert set(report["r2"]) == {"fx"}
    page = (out / "report.html").read_text()
    assert f"{report['mae_n']['fx']:.3f}" in page
    assert page.count("data:image/png") == 2


def test_the_same_bag_gives_the_same_forces(bag: Path, make_bundle: MakeBundle) -> None:
    model = Model(make_bundle())
    runs = []
    for _ in range(2):
        pipeline = ForcePipeline(model, load_sensor("array_1"), Options(), stale_s=0.0)
        with BagReader(bag) as reader:
            runs.append(infer_bag(reader, pipeline))
    np.testing.assert_array_equal(runs[0].predicted, runs[1].predicted)
    assert (runs[0].state == State.OK).sum() == FRAMES - REFERENCE_FRAMES


def test_a_bag_without_the_sensors_frames_is_refused(bag: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(sensor="*")
    with pytest.raises(DataError, match="no frames on /genforce/circle_1/image/compressed"):
        offline.run(parse(bag, "--infer", bundle.folder, "--sensor", "circle_1"))


def test_labels_are_not_invented_where_the_force_sensor_was_silent() -> None:
    times = np.array([0, 10, 20, 200, 210]) * 1_000_000
    values = np.arange(5.0)[:, None]
    stamps = np.array([-1, 5, 20, 100, 205, 300]) * 1_000_000
    result = interpolate(stamps, times, values)[:, 0]
    np.testing.assert_allclose(result, [np.nan, 0.5, 2.0, np.nan, 3.5, np.nan])


def test_serve_runs_the_estimator_of_the_bundles_own_sensor(make_bundle: MakeBundle) -> None:
    words = ["serve", str(make_bundle().folder), "--set", "filter_hz:=20", "stale_s:=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "genforce_bringup.cli", *words],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stderr.readline() if process.stderr else ""
        assert "model moments" in line
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()


def test_serve_refuses_what_the_estimator_does_not_know(make_bundle: MakeBundle) -> None:
    parser = argparse.ArgumentParser()
    serve_cli.add_arguments(parser)
    folder = str(make_bundle().folder)
    with pytest.raises(ConfigError, match="unknown parameter speed"):
        serve_cli.run(parser.parse_args([folder, "--set", "speed:=3"]))
    with pytest.raises(ConfigError, match="say which with --sensor"):
        serve_cli.run(parser.parse_args([str(make_bundle("any", sensor="*").folder)]))


def test_a_bag_gives_the_frames_for_a_variant_and_others_to_judge_it_by(
    bag: Path, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle()
    with BagReader(bag) as reader:
        ranges, others = read_labelled(reader, load_sensor("array_1"), bundle.manifest, FRAMES)
    assert [len(part) for part in (*ranges.images, *others.images)] == [20] * 4
    # The stamps of the ends lie outside the force sensor's: there, no labels are known.
    assert len(ranges.measured) == 0
    np.testing.assert_allclose(np.diff(others.measured[0][:, 0]), 0.01, atol=1e-6)
    variant = make_variant(bundle, "fp16", tmp_path / "fp16")
    parity = compare(bundle, variant, others.images)
    assert parity.frames == 40
    assert not parity.problem("fp16")


def test_frames_to_judge_a_model_by_are_those_that_it_sees_when_it_serves(
    bag: Path, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = Registration(turn_rad=0.1, shift_px=(9.0, -4.0))
    monkeypatch.setattr(pipeline, "register", lambda *_: mounted)
    bundle = make_bundle(input=InputSpec(height=60, width=80, upright=True))
    sensor = load_sensor("array_1")
    with BagReader(bag) as reader:
        ranges, others = read_labelled(reader, sensor, bundle.manifest, FRAMES)
        front = Frontend(sensor)
        jpegs = [record.message.data.tobytes() for record in reader.messages([IMAGE])]
    masks = [front.process_jpeg(jpeg).mask for jpeg in jpegs]
    engine = Engine(Model(bundle), sensor, majority(masks[:REFERENCE_FRAMES]))
    served = []
    for mask in masks:
        engine.infer(mask)
        served.append(engine.stream.image[0].copy())
    judged = [ranges.images[0], others.images[0], ranges.images[1], others.images[1]]
    np.testing.assert_array_equal(np.concatenate(judged), served)
