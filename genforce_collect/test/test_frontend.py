"""One front end: what it flags, and that it always gives the same answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest

from genforce_collect.config import SensorConfig, load_sensor
from genforce_collect.markers.frontend import Frontend
from genforce_collect.markers.orientation import Way
from genforce_collect.markers.packing import pack_mask
from genforce_collect.markers.quality import Flag, explain
from genforce_collect.markers.reference import ReferenceTaker
from genforce_msgs.msg import Markers

Draw = Callable[..., Any]


@pytest.fixture
def sensor() -> SensorConfig:
    return load_sensor("array_1")


@pytest.fixture
def frontend(sensor: SensorConfig, draw_markers: Draw) -> Frontend:
    frontend = Frontend(sensor)
    frontend.set_reference(frontend.process_jpeg(draw_markers(diameter=16).jpeg))
    return frontend


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image)[1].tobytes()


def test_flags_are_those_of_the_message() -> None:
    assert {flag.name: flag.value for flag in Flag} == {
        name.removeprefix("FLAG_"): getattr(Markers, name)
        for name in dir(Markers)
        if name.startswith("FLAG_")
    }


def test_every_flag_has_a_reason_in_words() -> None:
    assert explain(0) == "good"
    assert len({explain(flag) for flag in Flag} - {"good"}) == len(Flag)


def test_the_same_bytes_give_the_same_bytes_in_any_instance_and_order(
    sensor: SensorConfig, frontend: Frontend, draw_markers: Draw
) -> None:
    frames = [draw_markers(diameter=16, seed=seed).jpeg for seed in range(1, 5)]
    other = Frontend(sensor)
    other.set_reference(frontend.reference)
    there = [frontend.process_jpeg(data) for data in frames]
    back = [other.process_jpeg(data) for data in reversed(frames)][::-1]
    for a, b in zip(there, back, strict=True):
        assert pack_mask(a.mask).tobytes() == pack_mask(b.mask).tobytes()
        assert all(
            getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in ("x", "y", "area")
        )
        assert (a.flags, a.expected, a.contrast) == (b.flags, b.expected, b.contrast)


def test_a_good_frame_has_no_flags(frontend: Frontend, draw_markers: Draw) -> None:
    frame = frontend.process_jpeg(draw_markers(diameter=16, seed=1).jpeg)
    assert (explain(frame.flags), frame.count, frame.expected) == ("good", 165, 165)
    assert frame.sharpness == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xd9"])
def test_what_is_no_image_is_flagged(frontend: Frontend, data: bytes) -> None:
    frame = frontend.process_jpeg(data)
    assert frame.flags & Flag.DECODE_ERROR
    assert (frame.count, frame.expected) == (0, 165)
    assert not frame.mask.any()


def test_a_cut_off_jpeg_is_flagged_and_not_half_read(
    frontend: Frontend, draw_markers: Draw
) -> None:
    data = draw_markers(diameter=16, seed=1).jpeg
    assert frontend.process_jpeg(data[: len(data) // 2]).flags & Flag.DECODE_ERROR


def test_a_repeated_frame_is_flagged(frontend: Frontend, draw_markers: Draw) -> None:
    data = draw_markers(diameter=16, seed=1).jpeg
    assert not frontend.process_jpeg(data).flags
    assert frontend.process_jpeg(data).flags == Flag.REPEATED


def test_a_lens_cap_is_flagged(frontend: Frontend) -> None:
    frame = frontend.process_jpeg(jpeg(np.zeros((480, 640), np.uint8)))
    wanted = Flag.NO_MARKERS | Flag.TOO_FEW | Flag.SATURATED | Flag.LOW_CONTRAST
    assert frame.flags & wanted == wanted


def test_motion_blur_is_flagged(frontend: Frontend, draw_markers: Draw) -> None:
    image = cv2.blur(draw_markers(diameter=16).image, (1, 11))
    assert frontend.process_jpeg(jpeg(image)).flags == Flag.BLURRED


def test_a_camera_turned_by_180_degrees_is_flagged(
    sensor: SensorConfig, draw_markers: Draw
) -> None:
    points = draw_markers().points
    points = points[np.arange(len(points)) % 7 != 0]  # a layout that shows which way is up
    picture = draw_markers(points=points, diameter=16)
    frontend = Frontend(sensor)
    frontend.set_reference(frontend.process_jpeg(picture.jpeg))
    turned = jpeg(cv2.rotate(picture.image, cv2.ROTATE_180))
    assert frontend.process_jpeg(turned).flags & Flag.ROTATED


@pytest.mark.parametrize("code", [cv2.ROTATE_180, "mirror", None])
def test_a_camera_turned_before_the_reference_is_told_by_the_places_of_the_sensor_file(
    sensor: SensorConfig, draw_markers: Draw, code: int | str | None
) -> None:
    jitter = np.random.default_rng(0).normal(0, 0.8, (165, 2))  # near-symmetric, as real arrays
    picture = draw_markers(points=draw_markers().points + jitter, diameter=16)
    places = tuple(map(tuple, np.round(Frontend(sensor).process_image(picture.image).points, 1)))
    looks = sensor.segmentation.model_copy(update={"markers_px": places})
    frontend = Frontend(sensor.model_copy(update={"segmentation": looks}))
    image = picture.image
    if code is not None:
        image = cv2.flip(image, 1) if code == "mirror" else cv2.rotate(image, code)
    reference = frontend.process_image(image)
    frontend.set_reference(reference)
    is_upright = code is None
    assert frontend.way_up(reference) is (Way.UPRIGHT if is_upright else Way.TURNED)
    assert bool(frontend.process_image(image).flags & Flag.ROTATED) is not is_upright


def test_a_near_symmetric_array_turned_later_is_flagged_and_a_regular_one_cannot_tell(
    sensor: SensorConfig, draw_markers: Draw
) -> None:
    jitter = np.random.default_rng(1).normal(0, 1.5, (165, 2))
    for points, way in (
        (draw_markers().points + jitter, Way.UPRIGHT),
        (draw_markers().points, Way.SYMMETRIC),
    ):
        image = draw_markers(points=points, diameter=16).image
        frontend = Frontend(sensor)
        reference = frontend.process_image(image)
        frontend.set_reference(reference)
        assert frontend.way_up(reference) is way
        flags = frontend.process_image(cv2.rotate(image, cv2.ROTATE_180)).flags
        assert flags == (Flag.ROTATED if way is Way.UPRIGHT else 0)


def test_the_places_of_another_sensor_do_not_match(
    sensor: SensorConfig, draw_markers: Draw
) -> None:
    other = tuple((20.0 + 31.0 * i, 20.0 + 29.0 * j) for i in range(19) for j in range(15))
    looks = sensor.segmentation.model_copy(update={"markers_px": other})
    frontend = Frontend(sensor.model_copy(update={"segmentation": looks}))
    frame = frontend.process_image(draw_markers(diameter=16).image)
    frontend.set_reference(frame)
    assert frontend.process_image(draw_markers(diameter=16).image).flags == Flag.WRONG_REFERENCE


def test_the_reference_of_another_sensor_is_flagged(frontend: Frontend, draw_markers: Draw) -> None:
    turns = np.arange(165) * 2.4  # a spiral
    points = 14.0 * np.sqrt(turns)[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    points = points * [1.1, 0.8] + [319.5, 239.5]
    assert (
        frontend.process_jpeg(draw_markers(points=points, diameter=16).jpeg).flags
        & Flag.WRONG_REFERENCE
    )


def test_sliding_the_whole_gel_is_no_wrong_reference(
    frontend: Frontend, draw_markers: Draw
) -> None:
    picture = draw_markers(points=draw_markers().points + np.array([0.0, 14.0]), diameter=16)
    assert not frontend.process_jpeg(picture.jpeg).flags & (Flag.WRONG_REFERENCE | Flag.ROTATED)


def test_missing_and_surplus_markers_are_flagged(frontend: Frontend, draw_markers: Draw) -> None:
    points = draw_markers().points
    few = frontend.process_jpeg(draw_markers(points=points[:140], diameter=16).jpeg)
    assert few.flags & Flag.TOO_FEW
    more = np.concatenate([points, points[:30] + 20.0])
    assert frontend.process_jpeg(draw_markers(points=more, diameter=16).jpeg).flags & Flag.TOO_MANY


def test_only_good_frames_become_the_reference(sensor: SensorConfig, draw_markers: Draw) -> None:
    frontend = Frontend(sensor)
    taker = ReferenceTaker(frontend, wanted=3)
    taker.begin()
    black = jpeg(np.zeros((480, 640), np.uint8))
    good = [draw_markers(diameter=16, seed=seed).jpeg for seed in range(3)]
    stream = [black, good[0], good[0][:900], good[1], b"", good[2]]
    taken = [taker.offer(frontend.process_jpeg(data)) for data in stream]
    assert taken == [False, False, False, False, False, True]
    assert frontend.reference is not None
    assert frontend.reference.count == 165
