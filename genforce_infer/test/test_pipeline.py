from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from genforce_collect.config import SensorConfig, load_sensor
from genforce_collect.errors import DataError
from genforce_collect.markers.packing import pack_mask
from genforce_collect.markers.quality import Flag
from genforce_collect.markers.segmentation import MarkerFrame, empty_frame
from genforce_infer.bundle import (
    TARGET_REFERENCE,
    Bundle,
    Distribution,
    InputSpec,
    MaterialCorrection,
    Uncertainty,
    write_bundle,
)
from genforce_infer.pipeline import REFERENCE_FRAMES, Estimate, ForcePipeline, State, image_of
from genforce_infer.postprocess import Options, Postprocess
from genforce_infer.runtime import Model
from genforce_msgs.msg import InferenceStatus

MakeBundle = Callable[..., Bundle]
MakeDots = Callable[..., MarkerFrame]
PERIOD_NS = 16_666_667
SHIFT = (12.0, -6.0)  # px, right and up


class Feed:
    """Gives frames to a pipeline at 60 fps."""

    def __init__(self, pipeline: ForcePipeline) -> None:
        self.pipeline = pipeline
        self.now_ns = 1_000_000_000

    def __call__(self, markers: MarkerFrame, times: int = 1) -> Estimate:
        for _ in range(times):
            self.now_ns += PERIOD_NS
            estimate = self.pipeline.process(markers, self.now_ns)
        return estimate


@pytest.fixture(scope="module")
def sensor() -> SensorConfig:
    return load_sensor("array_1")


@pytest.fixture
def make_feed(
    make_bundle: MakeBundle, make_dots: MakeDots, sensor: SensorConfig
) -> Callable[..., Feed]:
    """A feed whose pipeline already has its reference."""

    def make(options: Options | None = None, **changes: object) -> Feed:
        feed = Feed(ForcePipeline(Model(make_bundle(**changes)), sensor, options))
        feed(make_dots(), REFERENCE_FRAMES)
        return feed

    return make


MakeFeed = Callable[..., Feed]


def test_states_are_those_of_the_message() -> None:
    for state in State:
        assert getattr(InferenceStatus, f"STATE_{state.name}") == state


def test_the_first_good_frames_become_the_reference_and_give_no_wrench(
    make_bundle: MakeBundle, make_dots: MakeDots, sensor: SensorConfig
) -> None:
    feed = Feed(ForcePipeline(Model(make_bundle()), sensor))
    for _ in range(REFERENCE_FRAMES):
        estimate = feed(make_dots())
        assert (estimate.state, estimate.wrench) == (State.NO_REFERENCE, None)
    assert feed(make_dots()).state == State.OK


def test_without_auto_reference_it_waits_for_the_service(
    make_bundle: MakeBundle, make_dots: MakeDots, sensor: SensorConfig
) -> None:
    pipeline = ForcePipeline(Model(make_bundle()), sensor, auto_reference=False)
    feed = Feed(pipeline)
    with pytest.raises(DataError, match="0 good frames of array_1"):
        pipeline.set_reference()
    estimate = feed(make_dots(), 20)
    assert (estimate.state, estimate.wrench) == (State.NO_REFERENCE, None)
    assert "array_1/set_force_reference" in estimate.message
    pipeline.set_reference()
    assert feed(make_dots()).wrench is not None


def test_force_follows_the_markers(make_feed: MakeFeed, make_dots: MakeDots) -> None:
    feed = make_feed()
    estimate = feed(make_dots(SHIFT, spread=0.3), 20)
    assert estimate.state == State.OK
    assert estimate.in_contact
    assert estimate.wrench is not None
    fx, fy, fz, *torque = estimate.wrench
    assert fx > 0.05
    assert fy > 0.05
    assert fz < -0.05
    assert torque == [0, 0, 0]
    assert np.isnan(estimate.standard_deviation).all()


def test_the_wrench_is_exactly_zero_while_nothing_touches(
    make_feed: MakeFeed, make_dots: MakeDots
) -> None:
    feed = make_feed(Options(contact_threshold_n=0.1))
    touching = feed(make_dots(SHIFT), 20)
    assert touching.wrench is not None
    assert touching.in_contact
    free = feed(make_dots((0.3, 0.0)), 20)
    assert not free.in_contact
    assert free.wrench is not None
    assert (free.wrench == 0).all()


def test_contact_ends_below_the_force_at_which_it_began(make_bundle: MakeBundle) -> None:
    post = Postprocess(make_bundle().manifest, Options(contact_threshold_n=1.0))
    states = []
    for force in (0.9, 1.1, 0.9, 0.6, 0.4, 0.9):
        post.apply(np.array([0.0, 0.0, -force]), 0.01)
        states.append(post.in_contact)
    assert states == [False, True, True, True, False, False]


@pytest.mark.parametrize(
    ("flag", "state"),
    [
        (Flag.DECODE_ERROR, State.ERROR),
        (Flag.NO_MARKERS, State.ERROR),
        (Flag.WRONG_SIZE, State.ERROR),
        (Flag.ROTATED, State.ERROR),
        (Flag.WRONG_REFERENCE, State.ERROR),
        (Flag.BLURRED, State.LOW_QUALITY),
        (Flag.TOO_FEW, State.LOW_QUALITY),
        (Flag.SATURATED, State.LOW_QUALITY),
    ],
)
def test_a_bad_frame_is_answered_with_its_reason(
    make_feed: MakeFeed, make_dots: MakeDots, flag: Flag, state: State
) -> None:
    feed = make_feed()
    bad = empty_frame(flag) if state == State.ERROR else make_dots(flags=int(flag))
    estimate = feed(bad)
    assert estimate.state == state
    assert estimate.message not in ("", "good")
    assert (estimate.wrench is None) == (state == State.ERROR)
    assert feed(make_dots()).state == State.OK


def test_a_frozen_camera_stops_the_wrench(make_feed: MakeFeed, make_dots: MakeDots) -> None:
    feed = make_feed()
    frozen = make_dots(SHIFT, flags=int(Flag.REPEATED))
    assert feed(frozen).state == State.LOW_QUALITY
    estimate = feed(frozen, 20)
    assert (estimate.state, estimate.wrench) == (State.STALE, None)
    assert feed(make_dots(SHIFT)).wrench is not None


@pytest.mark.parametrize("age_s", [0.3, 5.0, -5.0])
def test_frames_of_another_time_are_not_used(make_feed: MakeFeed, age_s: float) -> None:
    pipeline = make_feed().pipeline
    now_ns = 10_000_000_000
    estimate = pipeline.age_problem(now_ns - int(age_s * 1e9), now_ns, False)
    assert estimate is not None
    assert (estimate.state, estimate.wrench) == (State.STALE, None)
    assert pipeline.age_problem(now_ns - 50_000_000, now_ns, False) is None


def test_a_reference_takes_no_frame_from_before_one_that_was_refused(
    make_feed: MakeFeed, make_dots: MakeDots
) -> None:
    feed = make_feed()
    feed(make_dots(SHIFT), REFERENCE_FRAMES)
    feed.pipeline.age_problem(0, 1_000_000_000, more_waiting=False)
    with pytest.raises(DataError, match="0 good frames of array_1"):
        feed.pipeline.set_reference()


def test_a_contact_before_a_pause_leaves_no_force_after_it(
    make_feed: MakeFeed, make_dots: MakeDots
) -> None:
    feed = make_feed(Options(gate=False, filter_hz=1.0), memory=0.9)
    assert feed(make_dots(SHIFT), 20).in_contact
    feed.pipeline.restart()
    with pytest.raises(DataError, match="0 good frames of array_1"):
        feed.pipeline.set_reference()
    feed.now_ns = 0  # nor is its clock compared with the one before
    estimate = feed(make_dots())
    assert estimate.state == State.OK
    assert not estimate.in_contact
    assert estimate.wrench is not None
    np.testing.assert_allclose(estimate.wrench, 0, atol=1e-6)


def test_a_raw_image_is_read_without_its_padding_and_in_its_order_of_colours() -> None:
    bgr = np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8)
    padded = np.zeros((4, 16), np.uint8)
    padded[:, :15] = bgr[..., ::-1].reshape(4, 15)
    message = SimpleNamespace(height=4, width=5, step=16, encoding="rgb8", data=padded.ravel())
    np.testing.assert_array_equal(image_of(message), bgr)
    message.encoding = "bayer_rggb8"
    with pytest.raises(DataError, match="known are mono8, bgr8, rgb8"):
        image_of(message)
    message.encoding, message.height = "rgb8", 5
    with pytest.raises(DataError, match="image of 64 bytes"):
        image_of(message)


def test_a_backlog_is_cleared_to_its_newest_frame(make_feed: MakeFeed) -> None:
    pipeline = make_feed().pipeline
    now_ns = 10_000_000_000
    ages_s = [0.1, 0.26, 0.24, 0.15, 0.05, 0.02, 0.1]
    waiting = [True, True, True, True, True, False, True]
    used = [
        pipeline.age_problem(now_ns - int(age_s * 1e9), now_ns, more) is None
        for age_s, more in zip(ages_s, waiting, strict=True)
    ]
    assert used == [True, False, False, False, False, True, True]


def test_capture_time_that_jumps_back_is_told(make_feed: MakeFeed, make_dots: MakeDots) -> None:
    feed = make_feed()
    feed.now_ns -= 5_000_000_000
    estimate = feed(make_dots(SHIFT))
    assert estimate.state == State.LOW_QUALITY
    assert "jumped back by 4.983 s" in estimate.message
    assert feed(make_dots(SHIFT)).state == State.OK


def test_nan_never_leaves(
    tmp_path: Path, models: SimpleNamespace, make_dots: MakeDots, sensor: SensorConfig
) -> None:
    bundle = write_bundle(tmp_path / "nan", models.manifest(state=()), {"force.onnx": models.nan()})
    feed = Feed(ForcePipeline(Model(bundle), sensor))
    estimate = feed(make_dots(), 10)
    assert (estimate.state, estimate.wrench) == (State.ERROR, None)
    assert "NaN" in estimate.message


def test_field_mode_serves_any_layout_at_its_own_scale(
    tmp_path: Path, models: SimpleNamespace, make_dots: MakeDots, sensor: SensorConfig
) -> None:
    manifest = models.manifest(
        mode="field",
        stages=("field.onnx", "force.onnx"),
        state=(),
        sensor="*",
        input=InputSpec(height=models.height, width=models.width, px_per_mm=4.0),
    )
    model = Model(write_bundle(tmp_path / "field", manifest, models.field()))
    far = sensor.model_copy(update={"name": "far", "px_per_mm": sensor.px_per_mm / 2})
    near_force, far_force = [], []
    for config, forces in ((sensor, near_force), (far, far_force)):
        feed = Feed(ForcePipeline(model, config, Options(gate=False)))
        for markers in (make_dots(), make_dots(SHIFT)):
            if config is far:  # the same gel from twice the distance
                small = cv2.resize(markers.mask, (320, 240), interpolation=cv2.INTER_AREA)
                mask = np.zeros((480, 640), np.uint8)
                mask[120:360, 160:480] = small
                markers = MarkerFrame(mask, markers.x, markers.y)
            estimate = feed(markers, REFERENCE_FRAMES + 1)
        assert estimate.wrench is not None
        forces.append(estimate.wrench[:3])
    assert near_force[0][0] > 0.01
    np.testing.assert_allclose(near_force, far_force, rtol=0.15, atol=1e-3)


@pytest.fixture
def translating(tmp_path: Path, models: SimpleNamespace, make_dots: MakeDots) -> Model:
    """A model of another sensor behind a translation."""
    manifest = models.manifest(mode="translate", stages=("translate.onnx", "force.onnx"))
    reference = io.BytesIO()
    np.save(reference, pack_mask(make_dots((5.0, 5.0)).mask))
    files = {**models.translate(), TARGET_REFERENCE: reference.getvalue()}
    return Model(write_bundle(tmp_path / "translate", manifest, files))


def test_from_the_first_frame_after_the_reference_on_each_has_a_wrench_of_its_own(
    translating: Model, make_dots: MakeDots, sensor: SensorConfig
) -> None:
    feed = Feed(ForcePipeline(translating, sensor, Options(gate=False)))
    for _ in range(REFERENCE_FRAMES):
        assert feed(make_dots()).wrench is None
    wrenches = [feed(make_dots((4.0 * i, 0.0))).wrench for i in range(1, 9)]
    forces = [wrench[0] for wrench in wrenches if wrench is not None]
    assert len(forces) == len(wrenches)
    assert forces == sorted(set(forces)), "each follows its own frame"


def test_translation_feeds_the_source_sensors_model(
    translating: Model, make_dots: MakeDots, make_feed: MakeFeed
) -> None:
    translated = make_feed()
    translated.pipeline.swap(translating, translated.pipeline.prepare(translating))
    direct = make_feed()
    a, b = (feed(make_dots(SHIFT), 20) for feed in (translated, direct))
    assert a.wrench is not None
    assert b.wrench is not None
    assert b.wrench[0] > 0.05
    np.testing.assert_allclose(a.wrench, b.wrench, rtol=1e-3)
    assert a.translate_time_s > 0
    assert b.translate_time_s == 0


def test_a_model_for_another_sensor_is_refused(
    make_bundle: MakeBundle, sensor: SensorConfig
) -> None:
    with pytest.raises(DataError, match="reads sensor 'circle_1', not 'array_1'"):
        ForcePipeline(Model(make_bundle(sensor="circle_1")), sensor)
    ForcePipeline(Model(make_bundle(sensor="*")), sensor)


def test_hot_swap_takes_over_with_a_settled_state(
    make_bundle: MakeBundle, make_feed: MakeFeed, make_dots: MakeDots
) -> None:
    feed = make_feed(memory=0.9)
    before = feed(make_dots(SHIFT), 100)
    model = Model(make_bundle("new", memory=0.9, model_id="new"))
    engine = feed.pipeline.prepare(model)
    between = feed(make_dots(SHIFT), 3)
    feed.pipeline.swap(model, engine)
    after = feed(make_dots(SHIFT))
    assert feed.pipeline.model.manifest.model_id == "new"
    assert before.wrench is not None
    assert between.wrench is not None
    assert after.wrench is not None
    assert after.in_contact
    # 35 frames at memory 0.9 leave 2.5 % of the contact's start.
    np.testing.assert_allclose(after.wrench, between.wrench, rtol=0.03)


def test_a_model_swapped_in_before_the_reference_serves_after_it(
    make_bundle: MakeBundle, make_dots: MakeDots, sensor: SensorConfig
) -> None:
    pipeline = ForcePipeline(Model(make_bundle()), sensor)
    model = Model(make_bundle("new"))
    engine = pipeline.prepare(model)
    assert engine is None
    feed = Feed(pipeline)
    feed(make_dots(), REFERENCE_FRAMES)
    pipeline.swap(model, engine)
    assert feed(make_dots()).state == State.OK


def test_a_new_reference_is_the_new_zero(make_feed: MakeFeed, make_dots: MakeDots) -> None:
    feed = make_feed()
    assert feed(make_dots(SHIFT), 20).in_contact
    feed.pipeline.set_reference()
    estimate = feed(make_dots(SHIFT), 20)
    assert not estimate.in_contact
    assert feed(make_dots(), 20).in_contact


def test_uncertainty_grows_with_the_force(make_feed: MakeFeed, make_dots: MakeDots) -> None:
    feed = make_feed(uncertainty=Uncertainty(base=(0.1, 0.1, 0.2), gain=(0.05, 0.05, 0.1)))
    free = feed(make_dots())
    loaded = feed(make_dots((40.0, 0.0)), 30)
    np.testing.assert_allclose(free.standard_deviation[:3], [0.1, 0.1, 0.2], rtol=0.01)
    assert (loaded.standard_deviation[:3] > free.standard_deviation[:3]).all()
    assert np.isnan(loaded.standard_deviation[3:]).all()


def test_unusual_features_score_out_of_distribution(
    make_feed: MakeFeed, make_dots: MakeDots
) -> None:
    feed = make_feed(out_of_distribution=Distribution(source="features", threshold=0.5))
    assert feed(make_dots((2.0, 0.0))).out_of_distribution < 1
    assert feed(make_dots((60.0, 0.0))).out_of_distribution > 1


def test_material_correction_follows_loading_and_unloading(make_bundle: MakeBundle) -> None:
    material = MaterialCorrection(load_n=(0.0, 10.0), loading=(1.0, 2.0), unloading=(1.0, 1.5))
    manifest = make_bundle(material=material).manifest
    post = Postprocess(manifest, Options(material=True, gate=False))
    loads = [5.0, 10.0, 9.8, 5.0, 5.1, 8.0]
    gains = [post.apply(np.array([0, 0, -load]), 0.01)[2] / -load for load in loads]
    np.testing.assert_allclose(gains, [1.5, 2.0, 1.98, 1.25, 1.255, 1.8], atol=1e-9)
    off = Postprocess(manifest, Options(gate=False))
    assert off.apply(np.array([0.0, 0.0, -5.0]), 0.01)[2] == -5.0


def test_drift_is_removed_between_contacts_only(make_bundle: MakeBundle) -> None:
    manifest = make_bundle().manifest
    options = Options(drift_time_s=1.0, contact_threshold_n=0.5, gate=False)
    post = Postprocess(manifest, options)
    offset, pressing = np.array([0.1, 0.0, -0.2]), np.array([0.0, 0.0, -3.0])
    for _ in range(600):
        rest = post.apply(offset, 1 / 60)
    np.testing.assert_allclose(rest, 0, atol=1e-3)
    np.testing.assert_allclose(post.drift, offset, atol=1e-3)
    for _ in range(600):
        pressed = post.apply(offset + pressing, 1 / 60)
    np.testing.assert_allclose(pressed, pressing, atol=1e-3)


def test_the_filter_has_the_delay_it_states(make_bundle: MakeBundle) -> None:
    options = Options(filter_hz=3.0, gate=False, contact_threshold_n=0.0)
    post = Postprocess(make_bundle().manifest, options)
    step_s = 0.001
    for i in range(3000):  # a ramp of 1 N/s comes out late by the delay
        force = post.apply(np.array([0.0, 0.0, -i * step_s]), step_s)
    delay_s = (3000 - 1) * step_s + force[2]
    assert options.filter_delay_s == pytest.approx(0.0531, abs=1e-4)
    assert delay_s == pytest.approx(options.filter_delay_s, abs=2 * step_s)
