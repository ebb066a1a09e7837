"""`genforce segment` and `genforce calibrate sensor`, on drawn and on real recordings."""

from __future__ import annotations

import argparse
import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rclpy.serialization import serialize_message

from genforce_collect import calibrate, segment
from genforce_collect.bags import BagWriter, TopicSpec
from genforce_collect.config import load_sensor
from genforce_collect.errors import DataError
from genforce_collect.markers.calibration import calibrate as find
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.packing import pack_mask, unpack_mask
from genforce_collect.markers.quality import Flag
from genforce_msgs.msg import Taxels

Draw = Callable[..., Any]


def command(module: Any, *words: object) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return int(module.run(parser.parse_args([str(word) for word in words])))


def write_frames(folder: Path, frames: list[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(frames):
        (folder / f"{number:04d}.jpg").write_bytes(data)


@pytest.fixture
def frames(draw_markers: Draw) -> list[bytes]:
    points = draw_markers().points
    return [
        draw_markers(points=points + np.array([shift, 0.0]), diameter=16, seed=seed).jpeg
        for seed, shift in enumerate(range(0, 16, 2))
    ]


def test_a_folder_becomes_packed_masks_and_the_same_ones_as_live(
    tmp_path: Path, frames: list[bytes]
) -> None:
    write_frames(tmp_path / "in", frames)
    (tmp_path / "in" / "ref.jpg").write_bytes(frames[0])
    out = tmp_path / "out"
    assert command(segment, tmp_path / "in", "--sensor", "array_1", "-o", out) == 0
    live = Frontend(load_sensor("array_1"))
    for number, data in enumerate(frames):
        packed = np.load(out / "frames" / f"{number:04d}.npy", allow_pickle=False)
        assert packed.tobytes() == pack_mask(live.process_jpeg(data).mask).tobytes()
    assert (out / "frames" / "last.csv").read_text() == f"frames/{len(frames) - 1:04d}.npy\n"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["frames"] == len(frames)
    assert summary["markers_median"] == 165
    assert summary["max_motion_px"] == pytest.approx(14, abs=0.5)
    overlay = cv2.VideoCapture(str(out / "overlay.mp4"))
    assert int(overlay.get(cv2.CAP_PROP_FRAME_COUNT)) == len(frames)


def test_the_phases_of_a_contact_are_numbered_on_with_the_last_of_each(
    tmp_path: Path, frames: list[bytes]
) -> None:
    for phase, part in (("shear_inc", frames[3:5]), ("normal_inc", frames[:3])):
        write_frames(tmp_path / "in" / phase, part)
    out = tmp_path / "out"
    command(segment, tmp_path / "in", "--sensor", "array_1", "-o", out, "--no-overlay")
    last = (out / "frames" / "last.csv").read_text().splitlines()
    assert last == ["frames/0002.npy", "frames/0004.npy"]
    assert not (out / "overlay.mp4").exists()


def test_the_reference_beside_the_frames_is_used_and_is_no_frame(
    tmp_path: Path, frames: list[bytes], draw_markers: Draw
) -> None:
    write_frames(tmp_path / "in", frames[:3])
    (tmp_path / "in" / "ref.jpg").write_bytes(frames[-1])
    out = tmp_path / "out"
    command(segment, tmp_path / "in", "--sensor", "array_1", "-o", out, "--no-overlay")
    assert json.loads((out / "summary.json").read_text())["frames"] == 3
    reference = unpack_mask(np.load(out / "reference.npy", allow_pickle=False))
    expected = Frontend(load_sensor("array_1")).process_jpeg(frames[-1]).mask
    assert np.array_equal(reference, expected)


def test_bad_frames_are_reported_and_the_run_goes_on(
    tmp_path: Path, frames: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    black = cv2.imencode(".jpg", np.zeros((480, 640), np.uint8))[1].tobytes()
    write_frames(tmp_path / "in", [*frames[:4], black, frames[4][:999], frames[5]])
    command(segment, tmp_path / "in", "--sensor", "array_1", "-o", tmp_path / "out", "--json")
    summary = json.loads(capsys.readouterr().out)
    assert summary["flagged_frames"] == [4, 5]
    assert summary["flagged"]["DECODE_ERROR"] == 1
    assert summary["counts"] == [165] * 4 + [0, 0, 165]


def taxel_bag(path: Path, samples: list[np.ndarray]) -> Path:
    topic = "/genforce/pad/taxels"
    writer = BagWriter(path)
    writer.add_topic(TopicSpec(topic, "genforce_msgs/msg/Taxels"))
    for number, counts in enumerate(samples):
        rows, cols, axes = counts.shape
        values = array("i", counts.ravel().tolist())
        message = Taxels(rows=rows, cols=cols, axes=axes, counts=values)
        writer.write(topic, serialize_message(message), number + 1)
    writer.close()
    return path


def test_a_video_that_breaks_off_is_named_and_its_good_part_kept(
    tmp_path: Path, frames: list[bytes]
) -> None:
    video, out = tmp_path / "clip.avi", tmp_path / "out"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 30, (640, 480))
    for data in frames:
        writer.write(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
    writer.release()
    words = (video, "--sensor", "array_1", "-o", out, "--no-overlay")
    assert command(segment, *words) == 0
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"clip\.avi: breaks off after (\d) of 8 frames") as caught:
        command(segment, *words)
    decoded = int(str(caught.value).split(" after ")[1][0])
    assert json.loads((out / "summary.json").read_text())["frames"] == decoded > 0


@pytest.mark.parametrize("axes", [1, 3])
def test_a_bag_of_taxels_is_drawn_as_live(tmp_path: Path, axes: int) -> None:
    rest = np.full((2, 5, axes), 30000, np.int32)
    pressed = rest.copy()
    pressed[1, 3, -1] += 2000
    bag = taxel_bag(tmp_path / "bag", [rest, pressed])
    out = tmp_path / "out"
    command(segment, bag, "-o", out)
    masks = [
        unpack_mask(np.load(out / "frames" / f"000{n}.npy", allow_pickle=False)) for n in (0, 1)
    ]
    before, after = (cv2.connectedComponentsWithStats(mask)[2][1:] for mask in masks)
    assert len(before) == len(after) == 10
    grown = after[:, cv2.CC_STAT_AREA] > 2 * before[:, cv2.CC_STAT_AREA].max()
    assert grown.sum() == 1
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["markers_median"], summary["flagged"]) == (10, {})
    with pytest.raises(DataError, match="--sam is for images"):
        command(segment, bag, "-o", out, "--sam", "a.onnx", "b.onnx")


def test_a_bag_without_that_topic_says_what_it_has(tmp_path: Path) -> None:
    bag = taxel_bag(tmp_path / "bag", [np.zeros((2, 2, 1), np.int32)])
    with pytest.raises(DataError, match=r"no topic /other, has /genforce/pad/taxels"):
        command(segment, bag, "-o", tmp_path / "out", "--topic", "/other")


def test_frames_of_which_none_is_good_are_compared_with_the_doubtful(
    tmp_path: Path, draw_markers: Draw
) -> None:
    overexposed = [draw_markers(gel=400, marker=120, slope=0.5, seed=n).jpeg for n in range(3)]
    write_frames(tmp_path / "in", overexposed)
    out = tmp_path / "out"
    command(segment, tmp_path / "in", "--sensor", "array_1", "-o", out, "--no-overlay")
    assert set(json.loads((out / "summary.json").read_text())["flagged"]) == {"SATURATED"}


@pytest.mark.parametrize(
    ("name", "words"), [("none.mp4", "no such video"), ("empty", "no images in the folder")]
)
def test_a_source_without_frames_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Exception, match=words):
        command(segment, tmp_path / name, "-o", tmp_path / "out")


# --- calibration ------------------------------------------------------------------------------


@pytest.mark.parametrize(("polarity", "gel", "marker"), [("dark", 180, 60), ("light", 20, 150)])
@pytest.mark.parametrize("diameter", [8, 14, 24])
def test_polarity_size_and_pitch_are_found_out(
    draw_markers: Draw, polarity: str, gel: float, marker: float, diameter: float
) -> None:
    picture = draw_markers(diameter=diameter, gel=gel, marker=marker, slope=0.4)
    found = find([picture.image])
    assert found.segmentation.polarity == polarity
    assert found.segmentation.diameter_px == pytest.approx(diameter, rel=0.07)
    assert found.pitch_px == pytest.approx(40, rel=0.02)


def test_calibration_writes_a_sensor_file_that_works(
    tmp_path: Path, draw_markers: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [draw_markers(diameter=12, seed=seed).jpeg for seed in range(5)]
    write_frames(tmp_path / "in", frames)
    path = tmp_path / "mine.yaml"
    code = command(
        calibrate, "sensor", tmp_path / "in", "--name", "mine", "--pitch-mm", 2, "-o", path
    )
    assert code == 0
    sensor = load_sensor(path)
    assert sensor.name == "mine"
    assert sensor.px_per_mm == pytest.approx(20, rel=0.02)
    assert Frontend(sensor).process_jpeg(frames[0]).count == 165
    assert cv2.imread(str(path.with_suffix(".png"))).shape == (960, 1280, 3)
    assert "165 dark markers" in capsys.readouterr().out


def test_frames_without_markers_are_refused(draw_markers: Draw) -> None:
    blank = draw_markers(points=np.zeros((0, 2)), noise=1).image
    with pytest.raises(DataError, match="no markers"):
        find([blank])


# --- foundation model -------------------------------------------------------------------------


def small_sam(folder: Path) -> tuple[Path, Path]:
    """Two ONNX files of EfficientSAM's signature: a box's mask is the box itself, 2 px smaller."""
    image = helper.make_tensor_value_info("batched_images", TensorProto.FLOAT, [1, 3, "h", "w"])
    embeddings = helper.make_tensor_value_info(
        "image_embeddings", TensorProto.FLOAT, [1, 1, "h", "w"]
    )
    reduce_axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    encoder = helper.make_graph(
        [helper.make_node("ReduceMean", ["batched_images", "axes"], ["image_embeddings"])],
        "encoder",
        [image],
        [embeddings],
        [reduce_axes],
    )
    u, v = np.meshgrid(np.arange(640, dtype=np.float32), np.arange(480, dtype=np.float32))
    pixels = np.stack([u, v], axis=-1)[None, None]
    constants = {
        "pixels": pixels,
        "inset": np.float32(2),
        "first": np.int64(0),
        "second": np.int64(1),
        "to_pixels": np.array([1, -1, 1, 1, 2], np.int64),
        "last": np.array([-1], np.int64),
        "one_mask": np.array([2], np.int64),
        "zero": np.float32(0),
    }
    nodes = [
        ("Gather", ["batched_point_coords", "first"], "low", {"axis": 2}),
        ("Gather", ["batched_point_coords", "second"], "high", {"axis": 2}),
        ("Reshape", ["low", "to_pixels"], "low5", {}),
        ("Reshape", ["high", "to_pixels"], "high5", {}),
        ("Sub", ["pixels", "low5"], "over_low", {}),
        ("Sub", ["high5", "pixels"], "under_high", {}),
        ("Min", ["over_low", "under_high"], "inside2", {}),
        ("ReduceMin", ["inside2", "last"], "inside1", {"keepdims": 0}),
        ("Sub", ["inside1", "inset"], "inside", {}),
        ("Unsqueeze", ["inside", "one_mask"], "output_masks", {}),
        ("ReduceMean", ["batched_point_labels", "last"], "mean_label", {"keepdims": 1}),
        # Everything the signature names is used, or the exporter would drop it.
        ("Cast", ["orig_im_size"], "size", {"to": TensorProto.FLOAT}),
        ("ReduceMax", ["size"], "size_max", {"keepdims": 0}),
        ("ReduceMax", ["image_embeddings"], "brightest", {"keepdims": 0}),
        ("Add", ["size_max", "brightest"], "used", {}),
        ("Mul", ["used", "zero"], "nothing", {}),
        ("Add", ["mean_label", "nothing"], "iou_predictions", {}),
    ]
    decoder = helper.make_graph(
        [helper.make_node(op, inputs, [output], **extra) for op, inputs, output, extra in nodes],
        "decoder",
        [
            embeddings,
            helper.make_tensor_value_info(
                "batched_point_coords", TensorProto.FLOAT, [1, "q", 2, 2]
            ),
            helper.make_tensor_value_info("batched_point_labels", TensorProto.FLOAT, [1, "q", 2]),
            helper.make_tensor_value_info("orig_im_size", TensorProto.INT64, [2]),
        ],
        [
            helper.make_tensor_value_info("output_masks", TensorProto.FLOAT, [1, "q", 1, 480, 640]),
            helper.make_tensor_value_info("iou_predictions", TensorProto.FLOAT, [1, "q", 1]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    paths = folder / "encoder.onnx", folder / "decoder.onnx"
    for graph, path in zip((encoder, decoder), paths, strict=True):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 9
        onnx.checker.check_model(model)
        onnx.save(model, path)
    return paths


def test_boxes_around_the_markers_prompt_the_foundation_model(
    tmp_path: Path, frames: list[bytes]
) -> None:
    write_frames(tmp_path / "in", frames[:2])
    out = tmp_path / "out"
    command(
        segment, tmp_path / "in", "--sensor", "array_1", "-o", out, "--no-overlay",
        "--sam", *small_sam(tmp_path),
    )  # fmt: skip
    mask = unpack_mask(np.load(out / "frames" / "0000.npy", allow_pickle=False))
    own = Frontend(load_sensor("array_1")).process_jpeg(frames[0])
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    assert count - 1 == own.count
    for x, y in own.points:
        _, _, width, height, area = stats[labels[round(y), round(x)]]
        assert area == width * height  # a box, as this model draws them
        assert width == pytest.approx(2 * (0.9 * 16 - 2), abs=2)


def test_a_file_that_is_no_such_model_is_named(tmp_path: Path, frames: list[bytes]) -> None:
    write_frames(tmp_path / "in", frames[:2])
    encoder, decoder = small_sam(tmp_path)
    with pytest.raises(DataError, match=r"decoder\.onnx.*batched_images"):
        command(segment, tmp_path / "in", "-o", tmp_path / "out", "--sam", decoder, encoder)


# --- real recordings --------------------------------------------------------------------------


def segmented(source: Path, folder: Path) -> dict[str, Any]:
    command(segment, source, "-o", folder, "--no-overlay")
    return dict(json.loads((folder / "summary.json").read_text()))


@pytest.mark.parametrize("clip", ["empty", "half", "full"])
def test_a_real_gel_keeps_its_count_through_grasp_and_shear(
    realdata: Path, tmp_path: Path, clip: str
) -> None:
    (source,) = (realdata / "gelsight").glob(f"{clip}_*.mp4")
    summary = segmented(source, tmp_path)
    assert summary["within_2_percent"] >= 0.95
    assert summary["tracked"] >= 0.98
    assert summary["flagged_frames"][:2] == [0, 1]  # overexposed
    assert set(summary["flagged"]) == {"SATURATED"}


@pytest.mark.parametrize(("folder", "pins"), [("raw640", 331), ("pins127", 127)])
def test_every_pin_of_a_real_tactip_is_found(
    realdata: Path, tmp_path: Path, folder: str, pins: int
) -> None:
    counts = np.array(segmented(realdata / "tactip" / folder, tmp_path)["counts"])
    assert (np.abs(counts - pins) <= 0.01 * pins).mean() >= 0.95


def test_a_real_camera_turned_by_180_degrees_is_flagged_and_an_upright_one_is_not(
    realdata: Path,
) -> None:
    (source,) = (realdata / "gelsight").glob("half_*.mp4")
    images = list(segment.read_source(source))[2:60:4]
    sensor = segment.find_out(images)
    frontend = Frontend(sensor)
    frontend.set_reference(segment.find_reference(images[:1], sensor))
    for image in images:
        upright = cv2.imdecode(np.frombuffer(image.data, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert not frontend.process_image(upright).flags & (Flag.ROTATED | Flag.WRONG_REFERENCE)
        assert frontend.process_image(cv2.rotate(upright, cv2.ROTATE_180)).flags & Flag.ROTATED


def test_another_real_sensor_does_not_match_the_reference(realdata: Path) -> None:
    fine, coarse = (
        list(segment.read_source(realdata / "tactip" / name)) for name in ("raw640", "pins127")
    )
    frontend = Frontend(segment.find_out(fine))
    frontend.set_reference(segment.find_reference(fine, frontend.sensor))
    for image in coarse:
        frame = frontend.process_jpeg(image.data)
        assert frame.flags & (Flag.WRONG_REFERENCE | Flag.TOO_FEW)
        assert frame.flags & Flag.WRONG_SIZE
