"""The report of a collection: one HTML page with plots, and the same figures as JSON.

Made from the bags alone, so it can be made again at any time:
`genforce bag report runs/collect/20260101-120000`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from genforce_collect.bags import BagReader, session_bags
from genforce_collect.cdr import doubles_of
from genforce_collect.errors import DataError
from genforce_collect.html import (
    PAGE_NAME,
    Notes,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Tone,
    Verdict,
    command,
    fault_count,
    plot,
    thumbnail,
    write_page,
)
from genforce_collect.trajectory import Phase
from genforce_collect.verification import BagReport, verify

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WRENCH = "geometry_msgs/msg/WrenchStamped"
POSE = "geometry_msgs/msg/PoseStamped"
IMAGE = "sensor_msgs/msg/CompressedImage"
STATE = "genforce_msgs/msg/RobotState"
DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"
CONTACT = "genforce_msgs/msg/Contact"

THUMBNAILS = 24
FULLY_LOADED = frozenset({Phase.SHEAR_DEC, Phase.UP})  # begin where the gel is loaded most


@dataclass(frozen=True)
class ContactSummary:
    """One attempt at a contact, from the recorded streams."""

    bag: str
    index: int
    whole: bool
    reason: str
    point_mm: tuple[float, float]
    commanded_depth_mm: float
    direction_deg: float | None
    reached_depth_mm: float  # deepest pose
    normal_force_n: float  # Fz of largest magnitude
    shear_force_n: float  # largest hypot(Fx, Fy)
    duration_s: float
    frames: int


@dataclass(frozen=True)
class Event:
    """Something that happened beside the plan."""

    time_s: float  # since the first message of the session
    what: str


@dataclass(frozen=True)
class SessionReport:
    """What the page shows."""

    session: str
    sensor: str
    indenter: str
    bags: tuple[BagReport, ...]
    contacts: tuple[ContactSummary, ...]
    asked: int
    events: tuple[Event, ...]

    @property
    def lost(self) -> int:
        """Messages their producers numbered that are in no bag."""
        return sum(topic.lost or 0 for bag in self.bags for topic in bag.topics)

    @property
    def duration_s(self) -> float:
        """Recorded time of all bags together."""
        return sum(bag.duration_s for bag in self.bags)

    @property
    def whole(self) -> frozenset[int]:
        """Plan indices that are whole in one bag or another."""
        return frozenset(c.index for c in self.contacts if c.whole)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "session": self.session,
            "sensor": self.sensor,
            "indenter": self.indenter,
            "contacts_asked": self.asked,
            "contacts_whole": len(self.whole),
            "lost": self.lost,
            "duration_s": self.duration_s,
            "bags": [bag.to_dict() for bag in self.bags],
            "contacts": [asdict(contact) for contact in self.contacts],
            "events": [asdict(event) for event in self.events],
        }


@dataclass
class _Streams:
    """What one pass over a bag collects."""

    wrench: list[tuple[float, ...]]  # stamp (ns), force (N)
    pose: list[tuple[float, ...]]  # stamp (ns), position (m)
    image_stamps: list[int]
    contacts: list[tuple[int, Any]]
    thumbnails: list[tuple[str, bytes]]
    events: list[tuple[int, str]]


def write_report(bag: Path | str, out: Path | str | None = None) -> tuple[Path, SessionReport]:
    """Write `report.html` and `report.json` of a bag and the resumed runs beside it.

    `out` is the folder, by default `<bag>_report` beside the bag. Returns the page's path and what
    it says. Raises `DataError`.
    """
    bags = session_bags(bag)
    if not bags:
        raise DataError(f"{bag}: no such bag")
    folder = Path(out) if out else bags[0].with_name(f"{bags[0].name}_report")
    folder.mkdir(parents=True, exist_ok=True)
    streams = [_read(path) for path in bags]
    report = _session_report([verify(path) for path in bags], streams)
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return write_page(_page(report, streams, bags), folder / PAGE_NAME), report


# --- reading ------------------------------------------------------------------------------------


def _read(path: Path) -> _Streams:
    streams = _Streams([], [], [], [], [], [])
    newest_image = b""
    with BagReader(path) as bag:
        types = bag.topics
        states: dict[str, str] = {}  # what each part last said is wrong with it
        for record in bag.raw():
            kind = types[record.topic]
            if kind == WRENCH and record.topic.endswith("netft/wrench"):
                streams.wrench.append((record.stamp_ns, *doubles_of(record.data, 3)))
            elif kind == POSE:
                streams.pose.append((record.stamp_ns, *doubles_of(record.data, 3)))
            elif kind == IMAGE:
                streams.image_stamps.append(record.stamp_ns)
                newest_image = record.data
            elif kind == CONTACT:
                message = bag.deserialize(record.data, kind)
                streams.contacts.append((record.stamp_ns, message))
                if message.phase == Phase.INVALID:
                    text = f"contact {message.index} broken off: {message.reason}"
                    streams.events.append((record.stamp_ns, text))
                elif message.phase in FULLY_LOADED and newest_image:
                    jpeg = bytes(bag.deserialize(newest_image, IMAGE).data)
                    streams.thumbnails.append((f"contact {message.index}", jpeg))
            elif kind == STATE:
                message = bag.deserialize(record.data, kind)
                wrong = "" if message.ready or message.moving else message.message
                streams.events += _change(states, "robot", wrong, record.stamp_ns)
            elif kind == DIAGNOSTICS:
                for status in bag.deserialize(record.data, kind).status:
                    wrong = status.message if status.level else ""
                    streams.events += _change(states, status.name, wrong, record.stamp_ns)
        streams.events += _metadata_events(bag)
    return streams


def _change(states: dict[str, str], part: str, wrong: str, ns: int) -> list[tuple[int, str]]:
    """The event, if there is one: a part that has become unwell, or well again."""
    before = states.get(part, "")
    states[part] = wrong
    return [(ns, f"{part}: {wrong or 'well again'}")] if wrong != before else []


def _metadata_events(bag: BagReader) -> list[tuple[int, str]]:
    first_ns, last_ns = bag.span_ns
    events = [(first_ns, f"recording began: {bag.path.name}")]
    if repaired := bag.metadata.get("repaired"):
        text = f"the recorder died; {repaired['cut_bytes']} bytes cut off"
    else:
        text = bag.metadata.get("error") or "recording ended"
    return [*events, (last_ns, text)]


def _session_report(bags: Sequence[BagReport], streams: Sequence[_Streams]) -> SessionReport:
    metadata = bags[0].metadata
    begun = min((t for s in streams for t, _ in s.events), default=0)
    contacts = [
        contact
        for bag, stream in zip(bags, streams, strict=True)
        for contact in _summaries(bag, stream)
    ]
    asked = {index for bag in bags for index in bag.metadata.get("contacts", [])}
    return SessionReport(
        session=str(metadata.get("session", "")),
        sensor=str(metadata.get("sensor", "")),
        indenter=str(metadata.get("indenter", "")),
        bags=tuple(bags),
        contacts=tuple(contacts),
        asked=len(asked),
        events=tuple(
            Event((ns - begun) * 1e-9, text)
            for ns, text in sorted(e for s in streams for e in s.events)
        ),
    )


def _summaries(bag: BagReport, streams: _Streams) -> list[ContactSummary]:
    wrench = np.array(streams.wrench, dtype=float).reshape(-1, 4)
    pose = np.array(streams.pose, dtype=float).reshape(-1, 4)
    images = np.array(streams.image_stamps, dtype=float)
    start_z = float(bag.metadata.get("plan", {}).get("start", [0, 0, 0])[2])
    messages = {int(m.index): m for _, m in streams.contacts}
    summaries = []
    for contact in bag.contacts:
        span = (contact.start_ns, contact.end_ns)
        forces, positions = _within(wrench, *span), _within(pose, *span)
        message = messages[contact.index]
        direction = float(np.degrees(message.direction))
        summaries.append(
            ContactSummary(
                bag=Path(bag.path).name,
                index=contact.index,
                whole=contact.whole,
                reason=contact.reason,
                point_mm=(message.point.x * 1e3, message.point.y * 1e3),
                commanded_depth_mm=message.depth * 1e3,
                direction_deg=None if np.isnan(direction) else direction,
                reached_depth_mm=(start_z - _extreme(positions[:, 3], min)) * 1e3,
                normal_force_n=_extreme(forces[:, 3], min),
                shear_force_n=_extreme(np.hypot(forces[:, 1], forces[:, 2]), max),
                duration_s=(span[1] - span[0]) * 1e-9,
                frames=int(((images >= span[0]) & (images <= span[1])).sum()),
            )
        )
    return summaries


def _within(rows: NDArray[np.float64], start_ns: float, end_ns: float) -> NDArray[np.float64]:
    return rows[(rows[:, 0] >= start_ns) & (rows[:, 0] <= end_ns)]


def _extreme(values: NDArray[np.float64], pick: Any) -> float:
    return float(pick(values)) if len(values) else 0.0


# --- the page -----------------------------------------------------------------------------------


def _page(report: SessionReport, streams: Sequence[_Streams], paths: Sequence[Path]) -> Page:
    whole = len(report.whole)
    good = whole == report.asked and all(bag.ok for bag in report.bags)
    return Page(
        kind="collection",
        title=f"Collection {report.session}",
        command=command("bag", "report", paths[0]),
        verdict=Verdict(
            Tone.GOOD if good else Tone.BAD,
            f"{whole} of {report.asked} contacts whole, {report.lost} messages lost",
        ),
        facts={
            "sensor": report.sensor,
            "indenter": report.indenter,
            "recorded": f"{report.duration_s:.0f} s, bags: {len(report.bags)}",
            "size": f"{sum(bag.size_bytes for bag in report.bags) / 1e6:.1f} MB",
        },
        sections=[
            *_problems(report),
            *_contacts(report, streams),
            Section(
                "Streams",
                (*map(_topic_table, report.bags), Pictures((_interval_plot(streams),))),
                command("bag", "verify", *paths),
            ),
            Section("Events", (_event_table(report),)),
            Section("Frames at full load", (Pictures(_thumbnails(streams), small=True),)),
        ],
    )


def _problems(report: SessionReport) -> list[Section]:
    problems = [problem for bag in report.bags for problem in bag.problems]
    return [Section("Problems", (Notes(problems, Tone.BAD),))] if problems else []


def _contacts(report: SessionReport, streams: Sequence[_Streams]) -> list[Section]:
    if not report.contacts:
        return []
    return [Section("Contacts", (Pictures(_contact_plots(report, streams)),))]


def _topic_table(bag: BagReport) -> Table:
    return Table(
        (
            "topic",
            "messages",
            "lost",
            "rate (Hz)",
            "longest gap (ms)",
            "delay p50 (ms)",
            "delay p99 (ms)",
        ),
        [
            (
                topic.name,
                str(topic.received),
                "-" if topic.lost is None else fault_count(topic.lost),
                f"{topic.rate_hz:.1f}",
                f"{topic.max_gap_s * 1e3:.1f}",
                f"{topic.delay_p50_s * 1e3:.2f}",
                f"{topic.delay_p99_s * 1e3:.2f}",
            )
            for topic in bag.topics
        ],
        caption=f"{Path(bag.path).name}: stamp to arrival at the recorder",
    )


def _event_table(report: SessionReport) -> Table:
    rows = [(f"{event.time_s:.2f}", event.what) for event in report.events]
    return Table(("time (s)", "event"), rows)


def _thumbnails(streams: Sequence[_Streams]) -> list[Picture]:
    found = [item for stream in streams for item in stream.thumbnails]
    chosen = found[:: max(1, -(-len(found) // THUMBNAILS))]
    return [small for name, jpeg in chosen if (small := thumbnail(jpeg, name))]


def _contact_plots(report: SessionReport, streams: Sequence[_Streams]) -> list[Picture]:
    plots = [
        plot(lambda figure: _draw_forces(figure, report), "Largest force of each contact"),
        plot(lambda figure: _draw_depths(figure, report), "Depth that each contact reached"),
        plot(
            lambda figure: _draw_coverage(figure, report), "Where, how deep and in which direction"
        ),
    ]
    if any(s.wrench and s.pose for s in streams):
        plots.append(
            plot(
                lambda figure: _draw_force_depth(figure, report, streams),
                "Normal force over depth, all whole contacts",
            )
        )
    return plots


def _draw_forces(figure: Figure, report: SessionReport) -> None:
    axes = figure.subplots()
    good = [contact for contact in report.contacts if contact.whole]
    index = [contact.index for contact in good]
    axes.plot(index, [-contact.normal_force_n for contact in good], ".", label="normal, -Fz")
    axes.plot(index, [contact.shear_force_n for contact in good], ".", label="shear")
    _mark_broken(axes, report)
    axes.set(xlabel="contact", ylabel="largest force (N)")
    axes.legend()


def _draw_depths(figure: Figure, report: SessionReport) -> None:
    axes = figure.subplots()
    good = [contact for contact in report.contacts if contact.whole]
    index = [contact.index for contact in good]
    axes.plot(index, [contact.commanded_depth_mm for contact in good], "_", label="commanded")
    axes.plot(index, [contact.reached_depth_mm for contact in good], ".", label="reached")
    _mark_broken(axes, report)
    axes.set(xlabel="contact", ylabel="depth (mm)")
    axes.legend()


def _mark_broken(axes: Axes, report: SessionReport) -> None:
    broken = [contact.index for contact in report.contacts if not contact.whole]
    for place, index in enumerate(broken):
        label = "broken off" if place == 0 else None
        axes.axvline(index, color="tab:red", lw=0.6, label=label)


def _draw_coverage(figure: Figure, report: SessionReport) -> None:
    axes = figure.subplots()
    for whole, colour, label in ((False, "tab:red", "broken off"), (True, "tab:green", "whole")):
        contacts = [contact for contact in report.contacts if contact.whole is whole]
        if not contacts:
            continue
        angle = np.radians(
            [np.nan if c.direction_deg is None else c.direction_deg for c in contacts]
        )
        points = np.array([c.point_mm for c in contacts])
        reach = 0.5 * np.array([c.commanded_depth_mm for c in contacts])
        axes.plot(
            points[:, 0] + reach * np.cos(angle),
            points[:, 1] + reach * np.sin(angle),
            ".",
            color=colour,
            label=label,
        )
    axes.set(aspect="equal", xlabel="x (mm)", ylabel="y (mm)")
    axes.margins(0.1)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw_force_depth(figure: Figure, report: SessionReport, streams: Sequence[_Streams]) -> None:
    axes = figure.subplots()
    for bag, stream in zip(report.bags, streams, strict=True):
        wrench, pose = np.array(stream.wrench), np.array(stream.pose)
        if not len(wrench) or not len(pose):
            continue
        start_z = float(bag.metadata.get("plan", {}).get("start", [0, 0, 0])[2])
        for contact in bag.contacts:
            if contact.whole:
                rows = _within(wrench, contact.start_ns, contact.end_ns)[::5]
                depth = (start_z - np.interp(rows[:, 0], pose[:, 0], pose[:, 3])) * 1e3
                axes.plot(depth, -rows[:, 3], lw=0.5, alpha=0.5, color="tab:blue")
    axes.set(xlabel="depth (mm)", ylabel="normal force, -Fz (N)")


def _interval_plot(streams: Sequence[_Streams]) -> Picture:
    return plot(
        lambda figure: _draw_intervals(figure, streams),
        "Intervals between the stamps of each stream, and their medians",
    )


def _draw_intervals(figure: Figure, streams: Sequence[_Streams]) -> None:
    axes = figure.subplots()
    for name in ("wrench", "pose", "image_stamps"):
        steps = [
            np.diff(np.array([row[0] if isinstance(row, tuple) else row for row in rows])) * 1e-6
            for stream in streams
            if len(rows := getattr(stream, name)) > 1
        ]
        if steps:
            values = np.clip(np.concatenate(steps), 1e-2, 1e3)
            label = f"{name.removesuffix('_stamps')}: {np.median(values):.2f} ms"
            axes.hist(
                values, bins=np.geomspace(1e-2, 1e3, 150).tolist(), histtype="step", label=label
            )
    axes.set(xscale="log", yscale="log", xlabel="interval (ms)", ylabel="samples")
    if axes.has_data():
        axes.legend()
