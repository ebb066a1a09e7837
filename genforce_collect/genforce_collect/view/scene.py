"""Messages in, a scene in Rerun out; the same for a running graph and for a bag."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import rerun as rr

from genforce_collect.cdr import doubles_of, stamp_of
from genforce_collect.config import SensorConfig
from genforce_collect.trajectory import Phase
from genforce_collect.view.camera import CameraScene
from genforce_collect.view.layout import TIMELINE
from genforce_collect.view.overview import HEALTH, PHASE_NAMES, Overview
from genforce_collect.view.topics import topics

AXES = "xyz"
TRAIL_NS, TRAIL_STEP_NS = 2_000_000_000, 20_000_000
STATE_PERIOD_NS = 500_000_000
MM_PER_N = 2.0  # length of the force arrow
TOOL_RADIUS_MM, TOOL_LENGTH_MM = 1.5, 12.0  # as drawn; the indenter's shape is not told
GREY, RED, GREEN, ORANGE, BLUE = (
    (150, 150, 150), (230, 70, 70), (90, 220, 90), (255, 180, 0), (90, 150, 255),
)  # fmt: skip
STATE_COLOURS = {
    **dict.fromkeys(PHASE_NAMES.values(), ORANGE),
    **dict(zip(HEALTH, (GREEN, ORANGE, RED, GREY), strict=True)),
    **dict.fromkeys(("idle", "ready", "no contact"), GREY),
    **dict.fromkeys(("approach", "moving"), BLUE),
    **dict.fromkeys(("done", "recording", "contact"), GREEN),
    **dict.fromkeys(("invalid", "not ready"), RED),
}


class Scene:
    """Takes each message with `add`; what comes fast goes out as columns, at each `flush`.

    `deserialize(data, type)` makes a message of CDR bytes. The fast streams are read without it,
    and of the frames only those that are shown.
    """

    def __init__(
        self,
        recording: rr.RecordingStream,
        sensor: SensorConfig,
        deserialize: Callable[[bytes, str], Any],
        image_rate_hz: float = 10.0,
    ) -> None:
        self._recording = recording
        self._deserialize = deserialize
        self._camera = CameraScene(recording, sensor, image_rate_hz)
        self._overview = Overview()
        self._measured = _Columns(recording, [f"force/{axis}/measured" for axis in AXES])
        self._predicted = _Columns(recording, [f"force/{axis}/predicted" for axis in AXES])
        self._tip = _Columns(recording, [f"tip/{axis}" for axis in AXES])
        self._pose: tuple[float, ...] = ()
        self._force: tuple[float, ...] = (0.0, 0.0, 0.0)
        self._trail: deque[tuple[int, list[float]]] = deque()
        self._latest_ns = self._told_ns = 0
        self._lanes: set[str] = set()

        self.topics = topics(sensor.name)
        image, markers = (
            f"/genforce/{sensor.name}/image/compressed",
            f"/genforce/{sensor.name}/markers",
        )
        self._take_bytes: dict[str, Callable[[int, bytes], None]] = {
            "/genforce/netft/wrench": self._take_measured,
            f"/genforce/{sensor.name}/wrench": self._take_predicted,
            "/genforce/robot/tcp_pose": self._take_pose,
            image: self._take_image,
            markers: self._take_markers,
        }
        self._take_message: dict[str, Callable[[int, Any], None]] = {
            "/genforce/contact": self._take_contact,
            "/genforce/robot/state": self._overview.robot,
            "/genforce/stream_times": self._overview.stream,
            "/genforce/recorder/status": self._overview.recorder,
            f"/genforce/{sensor.name}/inference": self._overview.inference,
            "/diagnostics": self._overview.diagnostics,
        }
        self._draw_what_stays(sensor)

    def add(self, topic: str, data: bytes) -> None:
        """Take a message of one of `topics`, as CDR bytes."""
        stamp_ns = stamp_of(data)
        self._latest_ns = max(self._latest_ns, stamp_ns)
        if take := self._take_bytes.get(topic):
            take(stamp_ns, data)
        else:
            self._take_message[topic](stamp_ns, self._deserialize(data, self.topics[topic]))

    def flush(self) -> None:
        """Send what has come since the last call."""
        for columns in (self._measured, self._predicted, self._tip):
            columns.send()
        for change in self._overview.take_changes():
            self._set_time(change.stamp_ns)
            if change.state:
                self._draw_state(change.lane, change.state)
            if change.text:
                self._log("events", rr.TextLog(change.text, level=change.level))
        if self._pose:
            self._draw_tip()
        if self._latest_ns - self._told_ns >= STATE_PERIOD_NS:
            self._told_ns = self._latest_ns
            self._draw_overview()

    # --- messages -------------------------------------------------------------------------------

    def _take_measured(self, stamp_ns: int, data: bytes) -> None:
        self._force = doubles_of(data, 3)
        self._measured.append(stamp_ns, self._force)

    def _take_predicted(self, stamp_ns: int, data: bytes) -> None:
        self._predicted.append(stamp_ns, doubles_of(data, 3))

    def _take_pose(self, stamp_ns: int, data: bytes) -> None:
        self._pose = doubles_of(data, 7)
        place = [1e3 * value for value in self._pose[:3]]
        self._tip.append(stamp_ns, place)
        if not self._trail or stamp_ns - self._trail[-1][0] >= TRAIL_STEP_NS:
            self._trail.append((stamp_ns, place))

    def _take_image(self, stamp_ns: int, data: bytes) -> None:
        if self._camera.wants("image", stamp_ns):
            message = self._deserialize(data, "sensor_msgs/msg/CompressedImage")
            self._set_time(stamp_ns)
            self._camera.draw_image(bytes(message.data))

    def _take_markers(self, stamp_ns: int, data: bytes) -> None:
        if self._camera.wants("markers", stamp_ns):
            self._set_time(stamp_ns)
            self._camera.draw_markers(self._deserialize(data, "genforce_msgs/msg/Markers"))

    def _take_contact(self, stamp_ns: int, message: Any) -> None:
        if message.phase == Phase.APPROACH:
            self._camera.forget_reference()
        self._overview.contact(stamp_ns, message)

    # --- drawing --------------------------------------------------------------------------------

    def _draw_what_stays(self, sensor: SensorConfig) -> None:
        for axis in AXES:
            for source, colour, width in (("measured", GREY, 2.0), ("predicted", RED, 1.0)):
                lines = rr.SeriesLines(names=source, colors=colour, widths=width)
                self._log(f"force/{axis}/{source}", lines, static=True)
        for axis, colour in zip(AXES, (RED, GREEN, BLUE), strict=True):
            self._log(f"tip/{axis}", rr.SeriesLines(names=axis, colors=colour), static=True)
        gel = sensor.gel
        half = [gel.width_mm / 2, gel.height_mm / 2, gel.thickness_mm / 2]
        box = rr.Boxes3D(
            centers=[[0, 0, -half[2]]], half_sizes=[half], colors=BLUE, labels=sensor.name
        )
        self._log("cell/gel", box, static=True)
        # The tool's z points into the gel, so its body lies at negative z.
        body = rr.Capsules3D(
            lengths=TOOL_LENGTH_MM,
            radii=TOOL_RADIUS_MM,
            translations=[[0, 0, -TOOL_LENGTH_MM - TOOL_RADIUS_MM]],
            colors=GREY,
        )
        self._log("cell/tool/body", body, static=True)

    def _draw_tip(self) -> None:
        self._set_time(self._trail[-1][0])
        place = [1e3 * value for value in self._pose[:3]]
        while self._trail[-1][0] - self._trail[0][0] > TRAIL_NS:
            self._trail.popleft()
        pose = rr.Transform3D(translation=place, quaternion=rr.Quaternion(xyzw=self._pose[3:]))
        self._log("cell/tool", pose)
        trail = rr.LineStrips3D([[point for _, point in self._trail]], colors=GREEN)
        self._log("cell/trail", trail)
        force = [MM_PER_N * value for value in self._force]
        self._log("cell/force", rr.Arrows3D(origins=[place], vectors=[force], colors=ORANGE))

    def _draw_state(self, lane: str, state: str) -> None:
        if lane not in self._lanes:
            self._lanes.add(lane)
            configuration = rr.StateConfiguration(
                values=list(STATE_COLOURS), colors=list(STATE_COLOURS.values())
            )
            self._log(f"states/{lane}", configuration, static=True)
        self._log(f"states/{lane}", rr.StateChange(state=state))

    def _draw_overview(self) -> None:
        self._set_time(self._latest_ns)
        page = rr.TextDocument(self._overview.page(), media_type=rr.MediaType.MARKDOWN)
        self._log("state", page)
        for name, rate_hz in self._overview.rates().items():
            self._log(f"rate/{name}", rr.Scalars(rate_hz))

    def _set_time(self, stamp_ns: int) -> None:
        self._recording.set_time(TIMELINE, timestamp=np.datetime64(stamp_ns, "ns"))

    def _log(self, entity: str, what: Any, static: bool = False) -> None:
        self._recording.log(entity, what, static=static)


class _Columns:
    """Rows of numbers on their way to one entity a column."""

    def __init__(self, recording: rr.RecordingStream, entities: list[str]) -> None:
        self._recording = recording
        self._entities = entities
        self._stamps: list[int] = []
        self._rows: list[Any] = []

    def append(self, stamp_ns: int, row: Any) -> None:
        self._stamps.append(stamp_ns)
        self._rows.append(row)

    def send(self) -> None:
        if not self._stamps:
            return
        times = rr.TimeColumn(TIMELINE, timestamp=np.array(self._stamps, "datetime64[ns]"))
        for entity, column in zip(self._entities, np.array(self._rows).T, strict=True):
            values = rr.Scalars.columns(scalars=column)
            rr.send_columns(entity, [times], values, recording=self._recording)
        self._stamps, self._rows = [], []
