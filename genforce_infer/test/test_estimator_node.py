from __future__ import annotations

import array
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import pytest
import rclpy
from geometry_msgs.msg import WrenchStamped
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.experimental import EventsExecutor
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import Trigger

from genforce_collect.errors import ConfigError, DataError, GenforceError
from genforce_collect.markers.packing import pack_mask
from genforce_collect.markers.segmentation import MarkerFrame
from genforce_collect.nodes.common import NAMESPACE, spin_until, stream_qos, to_stamp
from genforce_infer.bundle import Bundle
from genforce_infer.nodes.force_estimator import ForceEstimator
from genforce_infer.pipeline import REFERENCE_FRAMES, State
from genforce_msgs.msg import InferenceStatus, Markers
from genforce_msgs.srv import LoadModel

pytestmark = pytest.mark.live

MakeBundle = Callable[..., Bundle]
SHIFT = (12.0, -6.0)
TIMEOUT_S = 40.0  # of a machine that does other things too


class Camera:
    """The far side of an estimator: sends frames, keeps the answers."""

    def __init__(
        self, executor: EventsExecutor, make_jpeg: Callable[..., bytes], sensor: str
    ) -> None:
        self.sensor = sensor
        self.node = rclpy.create_node("camera", namespace=NAMESPACE, use_global_arguments=False)
        self.executor = executor
        executor.add_node(self.node)
        self.make_jpeg = make_jpeg
        self.sent = 0
        self.last_stamp_ns = 0
        self.wrenches: list[Any] = []
        self.statuses: list[Any] = []
        qos = stream_qos(60)
        create = self.node.create_publisher
        self.images = create(CompressedImage, f"{sensor}/image/compressed", qos)
        self.raw = create(Image, f"{sensor}/image", qos)
        self.markers = create(Markers, f"{sensor}/markers", qos)
        subscribe = self.node.create_subscription
        subscribe(WrenchStamped, f"{sensor}/wrench", self.wrenches.append, qos)
        subscribe(InferenceStatus, f"{sensor}/inference", self.statuses.append, qos)

    def connect(self, publisher: Any) -> None:
        """Wait until the estimator hears this publisher and we hear the estimator."""
        assert spin_until(
            self.executor,
            lambda: (
                publisher.get_subscription_count() > 0
                and self.node.count_publishers(f"{self.sensor}/inference") > 0
            ),
            TIMEOUT_S,
        )

    def _stamp(self, message: Any, age_s: float) -> Any:
        self.last_stamp_ns = max(time.time_ns() - int(age_s * 1e9), self.last_stamp_ns + 1)
        message.header.stamp = to_stamp(self.last_stamp_ns)
        message.header.frame_id = self.sensor
        self.sent += 1
        return message

    def image(self, frame: MarkerFrame | bytes, age_s: float = 0.0) -> None:
        data = frame if isinstance(frame, bytes) else self.make_jpeg(frame, self.sent)
        message = CompressedImage(format="jpeg", data=array.array("B", data))
        self.images.publish(self._stamp(message, age_s))

    def raw_image(self, frame: MarkerFrame) -> None:
        jpeg = np.frombuffer(self.make_jpeg(frame, self.sent), np.uint8)
        gray = cv2.imdecode(jpeg, cv2.IMREAD_GRAYSCALE)
        message = Image(height=480, width=640, step=640, encoding="mono8")
        message.data = array.array("B", gray.tobytes())
        self.raw.publish(self._stamp(message, 0.0))

    def mask(self, frame: MarkerFrame) -> None:
        message = Markers(
            height=480,
            width=640,
            mask=array.array("B", pack_mask(frame.mask).tobytes()),
            x=array.array("f", frame.x),
            y=array.array("f", frame.y),
            flags=frame.flags,
        )
        self.markers.publish(self._stamp(message, 0.0))

    def answered(self) -> list[Any]:
        """All statuses, once every frame sent has one."""
        assert spin_until(self.executor, lambda: len(self.statuses) >= self.sent, TIMEOUT_S)
        return self.statuses

    def call(self, service_type: type, name: str, request: Any) -> Any:
        client = self.node.create_client(service_type, name)
        assert spin_until(self.executor, client.service_is_ready, TIMEOUT_S)
        future = client.call_async(request)
        assert spin_until(self.executor, future.done, TIMEOUT_S)
        self.node.destroy_client(client)
        return future.result()


@contextmanager
def estimator(bundle: Bundle, **parameters: object) -> Iterator[ForceEstimator]:
    given = {"sensor": "array_1", "bundle": bundle.folder, "stale_s": 5.0} | parameters
    arguments = [f"{name}:={value}" for name, value in given.items()]
    rclpy.init(args=["--ros-args", *(text for a in arguments for text in ("-p", a))])
    try:
        node = ForceEstimator()
        try:
            yield node
        finally:
            node.close()
            node.destroy_node()
    finally:
        rclpy.try_shutdown()


@pytest.fixture
def make_camera(make_jpeg: Callable[..., bytes]) -> Iterator[Callable[..., Camera]]:
    executors = []

    def make(node: ForceEstimator, *sensors: str) -> Any:
        executor = EventsExecutor()
        executors.append(executor)
        executor.add_node(node)
        cameras = [Camera(executor, make_jpeg, sensor) for sensor in sensors or ("array_1",)]
        return cameras if sensors else cameras[0]

    yield make
    for executor in executors:
        executor.shutdown()


MakeCamera = Callable[..., Any]
MakeDots = Callable[..., MarkerFrame]


def test_every_frame_is_answered_once_in_order_with_its_own_stamp(
    make_bundle: MakeBundle, make_camera: MakeCamera, make_dots: MakeDots
) -> None:
    with estimator(make_bundle()) as node:
        camera = make_camera(node)
        camera.connect(camera.images)
        for i in range(40):
            camera.image(make_dots(SHIFT if i >= 10 else (0, 0), spread=0.02 if i >= 10 else 0))
        statuses = camera.answered()
        assert [s.seq for s in statuses] == list(range(1, 41))
        assert {s.state for s in statuses[:REFERENCE_FRAMES]} == {State.NO_REFERENCE}
        assert {s.state for s in statuses[REFERENCE_FRAMES:]} == {State.OK}
        assert len(camera.wrenches) == 40 - REFERENCE_FRAMES
        stamps = [(s.header.stamp.sec, s.header.stamp.nanosec) for s in statuses]
        assert stamps == sorted(set(stamps))
        assert stamps[REFERENCE_FRAMES:] == [
            (w.header.stamp.sec, w.header.stamp.nanosec) for w in camera.wrenches
        ]
        last, status = camera.wrenches[-1], statuses[-1]
        assert last.header.frame_id == "array_1"
        assert last.wrench.force.x > 0.01
        assert status.in_contact
        assert (status.model_id, status.provider) == ("moments", "cpu")
        assert (status.frames_in, status.frames_out, status.dropped) == (
            40,
            40 - REFERENCE_FRAMES,
            REFERENCE_FRAMES,
        )
        assert status.latency >= status.queue_age > 0
        assert min(status.decode_time, status.segment_time, status.inference_time) > 0


def test_all_inputs_give_the_same_force(
    make_bundle: MakeBundle, make_camera: MakeCamera, make_dots: MakeDots
) -> None:
    forces = []
    for source in ("image", "raw", "markers"):
        with estimator(make_bundle(), input=source) as node:
            camera = make_camera(node)
            send, publisher = {
                "image": (camera.image, camera.images),
                "raw": (camera.raw_image, camera.raw),
                "markers": (camera.mask, camera.markers),
            }[source]
            camera.connect(publisher)
            for i in range(30):
                send(make_dots(SHIFT if i >= 10 else (0, 0)))
            camera.answered()
            force = camera.wrenches[-1].wrench.force
            forces.append([force.x, force.y, force.z])
    np.testing.assert_allclose(forces[1], forces[0], rtol=0.02, atol=1e-3)
    np.testing.assert_allclose(forces[2], forces[0], rtol=0.1, atol=0.02)


def test_bad_frames_are_answered_with_an_error_and_no_wrench(
    make_bundle: MakeBundle,
    make_camera: MakeCamera,
    make_dots: MakeDots,
    make_jpeg: Callable[..., bytes],
) -> None:
    good = make_jpeg(make_dots(SHIFT), 0)
    small = np.zeros((240, 320), np.uint8)
    with estimator(make_bundle()) as node:
        camera = make_camera(node)
        camera.connect(camera.images)
        for _ in range(REFERENCE_FRAMES):
            camera.image(make_dots())
        camera.answered()
        black = np.zeros((480, 640), np.uint8)
        for bad in (b"", b"no jpeg", good[: len(good) // 2], cv2_jpeg(small), cv2_jpeg(black)):
            camera.image(bad)
        assert {s.state for s in camera.answered()[REFERENCE_FRAMES:]} == {State.ERROR}
        assert all(s.message for s in camera.statuses)
        assert not camera.wrenches
        camera.image(good)
        assert camera.answered()[-1].state == State.OK
        assert len(camera.wrenches) == 1


def cv2_jpeg(gray: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", gray)[1].tobytes()


def test_old_frames_get_no_wrench_and_silence_is_told(
    make_bundle: MakeBundle, make_camera: MakeCamera, make_dots: MakeDots
) -> None:
    with estimator(make_bundle(), stale_s=0.5) as node:
        camera = make_camera(node)
        camera.connect(camera.images)
        camera.image(make_dots(), age_s=3.0)
        status = camera.answered()[-1]
        assert status.state == State.STALE
        assert "3.0" in status.message
        assert not camera.wrenches
        assert spin_until(camera.executor, lambda: node._channels[0].silent, TIMEOUT_S)
        assert node._channels[0].diagnostics().message == "STALE no frames are arriving"
        response = camera.call(Trigger, "array_1/set_force_reference", Trigger.Request())
        assert not response.success
        assert "no frames of array_1" in response.message


def test_set_reference_is_a_service(
    make_bundle: MakeBundle, make_camera: MakeCamera, make_dots: MakeDots
) -> None:
    with estimator(make_bundle(), auto_reference=False) as node:
        camera = make_camera(node)
        camera.connect(camera.images)
        for _ in range(REFERENCE_FRAMES):
            camera.image(make_dots())
        assert camera.answered()[-1].state == State.NO_REFERENCE
        response = camera.call(Trigger, "array_1/set_force_reference", Trigger.Request())
        assert response.success, response.message
        camera.image(make_dots())
        assert camera.answered()[-1].state == State.OK


def test_hot_swap_answers_every_frame_and_a_broken_bundle_changes_nothing(
    make_bundle: MakeBundle, make_camera: MakeCamera, make_dots: MakeDots
) -> None:
    bundle, new = make_bundle(), make_bundle("new", model_id="new")
    broken = make_bundle("broken")
    broken.path("force.onnx").write_bytes(b"broken")
    with estimator(bundle) as node:
        camera = make_camera(node)
        camera.connect(camera.images)
        timer = camera.node.create_timer(1 / 60, lambda: camera.image(make_dots()))
        assert spin_until(camera.executor, lambda: len(camera.wrenches) > 10, TIMEOUT_S)
        answer = camera.call(
            LoadModel, "array_1/load_model", LoadModel.Request(bundle=str(broken.folder))
        )
        assert not answer.success
        assert "sha256 differs" in answer.message
        answer = camera.call(
            LoadModel, "array_1/load_model", LoadModel.Request(bundle=str(new.folder))
        )
        assert (answer.success, answer.model_id) == (True, "new")
        count = len(camera.statuses)
        assert spin_until(camera.executor, lambda: len(camera.statuses) > count + 5, TIMEOUT_S)
        camera.node.destroy_timer(timer)
        statuses = camera.answered()
        assert [s.seq for s in statuses] == list(range(1, camera.sent + 1))
        assert {s.state for s in statuses[REFERENCE_FRAMES:]} == {State.OK}
        ids = [s.model_id for s in statuses]
        switch = ids.index("new")
        assert ids == ["moments"] * switch + ["new"] * (len(ids) - switch)


def test_services_answer_and_go_on_whatever_goes_wrong_in_one(
    make_bundle: MakeBundle, make_camera: MakeCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("odd")

    for name in ("_load_model", "_set_reference"):
        monkeypatch.setattr(ForceEstimator, name, fail)
    with estimator(make_bundle()) as node:
        camera = make_camera(node)
        for kind, name in ((LoadModel, "load_model"), (Trigger, "set_force_reference")) * 2:
            answer = camera.call(kind, f"array_1/{name}", kind.Request())
            assert not answer.success
            assert answer.message == "internal error: RuntimeError('odd')"


def test_whatever_keeps_it_from_starting_is_told(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(ForceEstimator, "_open", fail)
    with pytest.raises(RuntimeError, match="odd"), estimator(make_bundle()):
        pass


def test_two_estimators_on_one_topic_leave_one_and_say_so(
    make_bundle: MakeBundle, make_camera: MakeCamera, make_dots: MakeDots
) -> None:
    with estimator(make_bundle()) as node:
        camera = make_camera(node)
        other = ForceEstimator()
        camera.executor.add_node(other)
        try:
            assert spin_until(
                camera.executor, lambda: camera.images.get_subscription_count() == 2, TIMEOUT_S
            )
            timer = camera.node.create_timer(1 / 30, lambda: camera.image(make_dots()))
            channels = [n._channels[0] for n in (node, other)]
            assert spin_until(
                camera.executor,
                lambda: [bool(c.rival) for c in channels].count(True) == 1,
                TIMEOUT_S,
            )
            before = len(camera.wrenches), len(camera.statuses)
            assert spin_until(
                camera.executor, lambda: len(camera.statuses) > before[1] + 40, TIMEOUT_S
            )
            camera.node.destroy_timer(timer)
            wrenches = len(camera.wrenches) - before[0]
            statuses = camera.statuses[before[1] :]
            refused = [s for s in statuses if s.state == State.ERROR]
            assert wrenches == pytest.approx(len(refused), abs=4)
            assert "another estimator publishes /genforce/array_1/wrench" in refused[-1].message
        finally:
            other.close()
            other.destroy_node()


def test_several_sensors_share_a_model_and_do_not_mix(
    make_bundle: MakeBundle, make_camera: MakeCamera, make_dots: MakeDots
) -> None:
    with estimator(make_bundle(sensor="*"), sensor="array_1,circle_1") as node:
        left, right = make_camera(node, "array_1", "circle_1")
        for camera in (left, right):
            camera.connect(camera.images)
        for i in range(30):
            left.image(make_dots(SHIFT if i > 10 else (0, 0)))
            right.image(make_dots((-SHIFT[0], 0.0) if i > 10 else (0, 0)))
        for camera in (left, right):
            assert [s.seq for s in camera.answered()] == list(range(1, 31))
            assert len(camera.wrenches) == 30 - REFERENCE_FRAMES
            assert {w.header.frame_id for w in camera.wrenches} == {camera.sensor}
        assert left.wrenches[-1].wrench.force.x > 0.02
        assert right.wrenches[-1].wrench.force.x < -0.02


def test_deactivation_ends_the_wrench_and_activation_brings_it_back(
    make_bundle: MakeBundle, make_camera: MakeCamera, make_dots: MakeDots
) -> None:
    with estimator(make_bundle()) as node:
        camera = make_camera(node)
        camera.connect(camera.images)
        for _ in range(10):
            camera.image(make_dots())
        camera.answered()
        node.trigger_deactivate()
        assert spin_until(
            camera.executor, lambda: camera.images.get_subscription_count() == 0, TIMEOUT_S
        )
        node.trigger_activate()
        camera.connect(camera.images)
        camera.statuses.clear()
        camera.sent = 0
        camera.image(make_dots())
        assert camera.answered()[0].seq == 1
        assert camera.statuses[0].state == State.OK
        node.trigger_deactivate()
        node.trigger_cleanup()
        node.trigger_configure()
        node.trigger_activate()
        camera.connect(camera.images)


def test_a_contact_before_a_deactivation_is_over_after_it(
    make_bundle: MakeBundle, make_camera: MakeCamera, make_dots: MakeDots
) -> None:
    with estimator(make_bundle(memory=0.9)) as node:
        camera = make_camera(node)
        camera.connect(camera.images)
        for i in range(30):
            camera.image(make_dots(SHIFT if i >= REFERENCE_FRAMES else (0, 0)))
        assert camera.answered()[-1].in_contact
        node.trigger_deactivate()
        node.trigger_activate()
        camera.connect(camera.images)
        camera.image(make_dots())
        assert not camera.answered()[-1].in_contact


def test_shut_down_it_neither_listens_nor_serves(
    make_bundle: MakeBundle, make_camera: MakeCamera
) -> None:
    with estimator(make_bundle()) as node:
        camera = make_camera(node)
        camera.connect(camera.images)
        client = camera.node.create_client(LoadModel, "array_1/load_model")
        assert spin_until(camera.executor, client.service_is_ready, TIMEOUT_S)
        node.trigger_shutdown()
        assert spin_until(
            camera.executor,
            lambda: camera.images.get_subscription_count() == 0 and not client.service_is_ready(),
            TIMEOUT_S,
        )


@pytest.mark.parametrize(
    ("changes", "parameters", "error", "text"),
    [
        ({"sensor": "circle_1"}, {}, DataError, "reads sensor 'circle_1', not 'array_1'"),
        ({"kind": "field"}, {}, DataError, "is a field model"),
        ({}, {"input": "video"}, ConfigError, "must be image, raw, markers, not 'video'"),
        ({}, {"sensor": "nothing"}, ConfigError, "unknown sensor 'nothing'"),
        ({}, {"provider": "cuda"}, GenforceError, "cuda: not in this onnxruntime"),
        ({}, {"realtime_priority": 100}, ConfigError, "must be 0 to 99, not 100"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(
    make_bundle: MakeBundle,
    changes: dict[str, object],
    parameters: dict[str, object],
    error: type[GenforceError],
    text: str,
) -> None:
    with pytest.raises(error, match=text), estimator(make_bundle(**changes), **parameters):
        pass


def test_a_manager_can_activate_it_with_a_right_bundle_only(
    make_bundle: MakeBundle, make_camera: MakeCamera
) -> None:
    configure, activate = Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE
    for sensor, wanted in (
        ("circle_1", {configure: False}),
        ("array_1", {configure: True, activate: True}),
    ):
        with estimator(make_bundle(sensor=sensor), autostart=False) as node:
            camera = make_camera(node)
            for transition, success in wanted.items():
                request = ChangeState.Request(transition=Transition(id=transition))
                answer = camera.call(ChangeState, "force_estimator/change_state", request)
                assert answer.success == success


def test_the_process_ends_cleanly_on_sigterm_and_with_one_line_on_a_bad_bundle(
    make_bundle: MakeBundle,
) -> None:
    bundle = make_bundle()
    process = start(bundle)
    try:
        line = process.stderr.readline()
        while line and "ready in" not in line:
            line = process.stderr.readline()
        assert "model moments" in line
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
    bundle.path("force.onnx").unlink()
    process = start(bundle)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == DataError.exit_code
    assert err.splitlines()[-1].startswith("error: ")
    assert "force.onnx: missing" in err


def test_frames_go_before_ordinary_processes_and_loading_does_not(
    make_bundle: MakeBundle,
) -> None:
    trial = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    if subprocess.run([sys.executable, "-c", trial], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs the right to a real-time priority")
    process = start(make_bundle(), "realtime_priority:=5")
    try:
        while "ready in" not in (line := process.stderr.readline()):
            assert line
        deadline = time.monotonic() + TIMEOUT_S
        while (ordinary := policies(process.pid).count(os.SCHED_OTHER)) != 1:
            assert time.monotonic() < deadline, ordinary
            time.sleep(0.1)
        assert policies(process.pid).count(os.SCHED_FIFO) > 3
    finally:
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0


def policies(pid: int) -> list[int]:
    """How each thread of a process is scheduled."""
    return [os.sched_getscheduler(int(task)) for task in os.listdir(f"/proc/{pid}/task")]


def test_a_priority_that_is_not_permitted_is_refused(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with (
        pytest.raises(ConfigError, match="realtime_priority: not permitted to this user"),
        estimator(make_bundle(), realtime_priority=5),
    ):
        pass


def start(bundle: Bundle, *more: str) -> Any:
    assignments = ["sensor:=array_1", f"bundle:={bundle.folder}", *more]
    parameters = [text for assignment in assignments for text in ("-p", assignment)]
    return subprocess.Popen(
        [sys.executable, "-m", "genforce_infer.nodes.force_estimator", "--ros-args", *parameters],
        stderr=subprocess.PIPE,
        text=True,
    )
