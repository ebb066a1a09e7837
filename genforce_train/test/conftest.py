"""A toy sensor for the tests: a grid of discs that follows depth and shear, with a linear force,
and bags of it with the messages and topics a collection records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from genforce_collect.bags import BagWriter, TopicSpec, typestore
from genforce_collect.config import SegmentationConfig, SensorConfig, load_sensor
from genforce_collect.layout import Contact, ContactKey, Layout, pack, unpack

START_NS = 1_700_000_000_000_000_000
PHASES = (2, 3, 4, 5)
STIFFNESS_N_MM = (1.5, 1.5, -4.0)


def draw(displacement_mm: np.ndarray, centre_px: tuple[float, float] = (320, 240)) -> np.ndarray:
    """(480, 640) uint8 marker image of a gel pushed by (x, y, z) mm at a point."""
    u, v = np.meshgrid(np.arange(60, 600, 48.0), np.arange(48, 460, 48.0))
    near = np.exp(-((u - centre_px[0]) ** 2 + (v - centre_px[1]) ** 2) / (2 * 90.0**2))
    x, y, z = displacement_mm
    u = u + near * (20 * x - 0.12 * z * (u - centre_px[0]))
    v = v + near * (-20 * y - 0.12 * z * (v - centre_px[1]))
    image = np.zeros((480, 640), np.uint8)
    rows, columns = np.mgrid[-9:10, -9:10]
    disc = rows**2 + columns**2 <= 64
    for cu, cv in zip(u.ravel().round().astype(int), v.ravel().round().astype(int), strict=True):
        image[(cv + rows[disc]).clip(0, 479), (cu + columns[disc]).clip(0, 639)] = 1
    return image


def path_of(number: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Tip displacement (frames, 3) mm and phase (frames,) of one contact; it varies by number."""
    depth = 0.4 + 0.6 * ((number * 7) % 5) / 4
    angle = 2 * np.pi * ((number * 3) % 8) / 8
    t = np.linspace(0, 4, frames, endpoint=False)
    z = depth * np.clip(np.minimum(t, 4 - t), 0, 1)
    shear = 0.8 * np.clip(np.minimum(t - 1, 3 - t), 0, 1)
    path = np.stack([shear * np.cos(angle), shear * np.sin(angle), -z], 1)
    return path, np.array(PHASES, np.uint8)[t.astype(int)]


@pytest.fixture(scope="session")
def toy_contact() -> Callable[..., Contact]:
    """Make a contact of the toy sensor: (number, sensor, indenter, frames) -> Contact."""

    def make(
        number: int, sensor: str = "toy", indenter: str = "sphere", frames: int = 24
    ) -> Contact:
        path, phase = path_of(number, frames)
        wrench = np.zeros((frames, 6))
        wrench[:, :3] = path * STIFFNESS_N_MM * np.array([1, 1, -1])
        stamps = START_NS + (np.arange(frames) * 33_333_333).astype(np.int64)
        pose = np.zeros((frames, 6))
        pose[:, :3] = path * 1e-3
        pose[:, 3] = np.pi
        return Contact(
            key=ContactKey(sensor, indenter, number),
            bits=pack(np.stack([draw(p) for p in path])),
            wrench=wrench,
            pose=pose,
            depth=-path[:, 2],
            phase=phase,
            stamp_ns=stamps,
            wrench_age=np.full(frames, 0.0002),
            pose_age=np.full(frames, 0.0004),
            flags=np.zeros(frames, np.uint32),
        )

    return make


@pytest.fixture(scope="session")
def paired_data(toy_contact, tmp_path_factory) -> Path:
    """Two sensors with the same contacts; the second one's image is moved to the right by 6 px."""
    layout = Layout(tmp_path_factory.mktemp("pairs"))
    for sensor, columns in (("left", 0), ("right", 6)):

        def moved(bits: np.ndarray, columns: int = columns) -> np.ndarray:
            return pack(np.roll(unpack(bits), columns, axis=-1))

        for number in range(6):
            contact = toy_contact(number, sensor, "cone" if number > 3 else "sphere", frames=12)
            contact.bits[:] = moved(contact.bits)
            layout.write(contact)
        rest = moved(toy_contact(0, frames=1).bits)
        layout.write_reference(sensor, rest[0])
        layout.write_rest(sensor, rest.repeat(8, 0), np.zeros((8, 6)))
    return layout.root


@pytest.fixture(scope="session")
def blank_field(tmp_path_factory) -> Path:
    """Checkpoint of a field model that knows nothing: no displacement anywhere."""
    import torch

    from genforce_train.checkpoint import save_checkpoint
    from genforce_train.models.field import FieldNet

    torch.manual_seed(0)
    net = FieldNet()
    torch.nn.init.zeros_(net.head.weight)
    torch.nn.init.zeros_(net.head.bias)
    path = tmp_path_factory.mktemp("field") / "field.safetensors"
    save_checkpoint(path, net, {"kind": "field"})
    return path


class BagFactory:
    """Writes a bag of a collection: wrench at 1 kHz, pose at 500 Hz, markers at 30 Hz."""

    def __init__(self) -> None:
        self.store = typestore(
            "geometry_msgs/msg/WrenchStamped",
            "geometry_msgs/msg/PoseStamped",
            "genforce_msgs/msg/Contact",
            "genforce_msgs/msg/Markers",
            "sensor_msgs/msg/CompressedImage",
        )
        self.types = self.store.types

    def sensor(self, name: str) -> SensorConfig:
        """What the toy sensor would have in its sensor file."""
        return load_sensor("array_1").model_copy(
            update={"name": name, "segmentation": SegmentationConfig(diameter_px=17.0)}
        )

    def message(self, name: str, **fields: object) -> object:
        return self.types[name](**fields)

    def header(self, stamp_ns: int, frame: str = "sensor") -> object:
        stamp = self.message(
            "builtin_interfaces/msg/Time",
            sec=int(stamp_ns // 10**9),
            nanosec=int(stamp_ns % 10**9),
        )
        return self.message("std_msgs/msg/Header", stamp=stamp, frame_id=frame)

    def vector(self, kind: str, values: np.ndarray) -> object:
        x, y, z = map(float, values)
        return self.message(f"geometry_msgs/msg/{kind}", x=x, y=y, z=z)

    def write(
        self,
        path: Path,
        numbers: tuple[int, ...] = (0, 1),
        sensor: str = "toy",
        broken: tuple[int, ...] = (),
        rest: bool = True,
        flags: Callable[[int], int] = lambda frame: 0,
        wrench_gap_s: tuple[float, float] | None = None,
        label_shift_s: float = 0.0,
        cell: str = "virtual",
        markers: bool = True,
        images: bool = False,
        sensor_config: bool = True,
    ) -> SimpleNamespace:
        """Contacts of 4 phases of 0.25 s with 0.5 s of approach before each; `images` of the
        camera beside the markers or, without `markers`, instead of them."""
        stamp, spans = START_NS, []
        for number in numbers:
            spans.append((number, stamp + 500_000_000))
            stamp += 1_500_000_000
        end = stamp + 200_000_000

        def tip_mm(at_ns: np.ndarray) -> np.ndarray:
            tip = np.zeros((len(at_ns), 3))
            tip[:, 2] = 2.0
            for number, start in spans:
                dense, _ = path_of(number, 1000)
                inside = (at_ns >= start) & (at_ns < start + 10**9)
                index = (at_ns[inside] - start) / 1e6
                tip[inside] = np.stack(
                    [np.interp(index, np.arange(1000), dense[:, axis]) for axis in range(3)], 1
                )
            return tip

        metadata: dict[str, object] = {"cell_config": {"name": cell}}
        if sensor_config:
            metadata["sensor_config"] = self.sensor(sensor).model_dump(mode="json")
        path.parent.mkdir(exist_ok=True)
        writer = BagWriter(path, metadata)
        self._contacts(writer, spans, sensor, broken, len(numbers))
        times = np.arange(START_NS, end, 1_000_000)
        tip = tip_mm(times + int(label_shift_s * 1e9))
        wrench = np.where(tip[:, 2:] < 0, tip, 0) * STIFFNESS_N_MM * np.array([1, 1, -1])
        topic = self._topic(writer, "/genforce/netft/wrench", "geometry_msgs/msg/WrenchStamped")
        for t, force in zip(times, wrench, strict=True):
            seconds = (t - START_NS) * 1e-9
            if wrench_gap_s and wrench_gap_s[0] <= seconds < wrench_gap_s[1]:
                continue
            topic(
                t,
                header=self.header(t),
                wrench=self.message(
                    "geometry_msgs/msg/Wrench",
                    force=self.vector("Vector3", force),
                    torque=self.vector("Vector3", np.zeros(3)),
                ),
            )
        topic = self._topic(writer, "/genforce/robot/tcp_pose", "geometry_msgs/msg/PoseStamped")
        down = self.message("geometry_msgs/msg/Quaternion", x=1.0, y=0.0, z=0.0, w=0.0)
        times = np.arange(START_NS, end, 2_000_000)
        for t, point in zip(times, tip_mm(times), strict=True):
            pose = self.message(
                "geometry_msgs/msg/Pose",
                position=self.vector("Point", point * 1e-3),
                orientation=down,
            )
            topic(t, header=self.header(t), pose=pose)
        times = np.arange(START_NS + 7_000_000, end, 33_333_333)
        if markers:
            self._markers(writer, sensor, times, tip_mm(times), rest, flags)
        if images:
            self._images(writer, sensor, times, tip_mm(times))
        writer.close()
        return SimpleNamespace(path=path, frame_stamps=times, tip_mm=tip_mm)

    def _topic(self, writer: BagWriter, name: str, kind: str) -> Callable[..., None]:
        writer.add_topic(TopicSpec(name, kind))

        def send(stamp_ns: int, **fields: object) -> None:
            data = self.store.serialize_cdr(self.message(kind, **fields), kind)
            writer.write(name, bytes(data), int(stamp_ns))

        return send

    def _contacts(
        self,
        writer: BagWriter,
        spans: list[tuple[int, int]],
        sensor: str,
        broken: tuple[int, ...],
        total: int,
    ) -> None:
        send = self._topic(writer, "/genforce/contact", "genforce_msgs/msg/Contact")
        seq = 0
        for number, start in spans:
            steps = [(1, -500), *((phase, 250 * i) for i, phase in enumerate(PHASES))]
            steps.append((7, 600) if number in broken else (6, 1000))
            for phase, offset_ms in steps:
                if number in broken and phase < 6 and offset_ms > 600:
                    continue
                send(
                    start + offset_ms * 1_000_000,
                    header=self.header(start + offset_ms * 1_000_000),
                    seq=seq,
                    session="s0",
                    sensor=sensor,
                    indenter="sphere",
                    index=number,
                    total=total,
                    phase=phase,
                    point=self.vector("Point", np.zeros(3)),
                    depth=0.001,
                    direction=0.0,
                    target=self.vector("Point", np.zeros(3)),
                    reason="",
                )
                seq += 1

    def _markers(
        self,
        writer: BagWriter,
        sensor: str,
        times: np.ndarray,
        tips: np.ndarray,
        rest: bool,
        flags: Callable[[int], int],
    ) -> None:
        send = self._topic(writer, f"/genforce/{sensor}/markers", "genforce_msgs/msg/Markers")
        empty = np.zeros(0, np.float32)
        for number, (t, tip) in enumerate(zip(times, tips, strict=True)):
            if not rest and tip[2] > 0:
                continue
            send(
                t,
                header=self.header(t, f"{sensor}_camera"),
                seq=number,
                height=480,
                width=640,
                mask=pack(draw(tip if tip[2] < 0 else np.zeros(3))),
                x=empty,
                y=empty,
                area=empty,
                expected=0,
                flags=flags(number),
                contrast=1.0,
                saturation=0.0,
                sharpness=1.0,
            )

    def _images(self, writer: BagWriter, sensor: str, times: np.ndarray, tips: np.ndarray) -> None:
        topic = f"/genforce/{sensor}/image/compressed"
        send = self._topic(writer, topic, "sensor_msgs/msg/CompressedImage")
        noise = np.random.default_rng(0)
        for t, tip in zip(times, tips, strict=True):
            grey = 200 - 150 * draw(tip if tip[2] < 0 else np.zeros(3))
            grey += noise.integers(0, 8, grey.shape, np.uint8)
            encoded = cv2.imencode(".jpg", grey.astype(np.uint8))[1]
            send(t, header=self.header(t, f"{sensor}_camera"), format="jpeg", data=encoded.ravel())


@pytest.fixture(scope="session")
def bags() -> BagFactory:
    return BagFactory()
