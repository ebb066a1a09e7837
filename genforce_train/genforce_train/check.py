"""What a data set holds and what is wrong with it, for people (HTML) and programs (JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genforce_collect.html import (
    Cell,
    Notes,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Tone,
    Verdict,
    bitmap,
    command,
    fault_count,
    plot,
    write_page,
)
from genforce_collect.layout import unpack
from genforce_train.audit import NOT_TRUSTED, Audit
from genforce_train.audit_page import audit_section
from genforce_train.cache import Cache
from genforce_train.lag import Lag, find_lag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SATURATED_FRAMES = 5  # in a row with exactly one value, at the end of the range
LAG_FRAMES = 400  # of a group, to find its lag by


@dataclass(frozen=True)
class Group:
    """One sensor pressed by one indenter. Forces in N; ages in s (NaN without timing)."""

    sensor: str
    indenter: str
    contacts: int
    missing: int  # contacts that other sensors have with this indenter
    frames: int
    shortest: int  # frames of a contact
    longest: int
    force_min: tuple[float, float, float]
    force_max: tuple[float, float, float]
    duplicate_frames: int  # same image as the frame before, while the force changed
    saturated_contacts: int
    wrench_age_max: float
    flagged_frames: int
    lag: float  # > 0: labels come late. NaN where the contacts do not tell
    lag_error: float
    lag_unit: str  # "s", or "frames" where there are no stamps
    lag_text: str


@dataclass(frozen=True)
class Report:
    """What `check` found."""

    root: str
    groups: list[Group]
    problems: list[str]
    audits: list[Audit]
    untested: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "root": self.root,
            "groups": [
                {name: None if value != value else value for name, value in asdict(group).items()}
                for group in self.groups
            ],
            "problems": self.problems,
            "audits": [audit.as_dict() for audit in self.audits],
            "untested": self.untested,
        }

    def lines(self) -> list[str]:
        """For people."""
        rows = [
            f"{g.sensor:12} {g.indenter:12} {g.contacts:4} contacts {g.frames:6} frames   "
            f"Fx {g.force_min[0]:6.2f}..{g.force_max[0]:5.2f}  "
            f"Fy {g.force_min[1]:6.2f}..{g.force_max[1]:5.2f}  "
            f"Fz {g.force_min[2]:6.2f}..{g.force_max[2]:5.2f} N"
            + f"  lag {g.lag_text}"
            + (f"  {g.missing} contacts missing" if g.missing else "")
            + (f"  {g.duplicate_frames} duplicate frames" if g.duplicate_frames else "")
            + (f"  {g.saturated_contacts} saturated contacts" if g.saturated_contacts else "")
            for g in self.groups
        ]
        return [*rows, *(audit.line() for audit in self.audits), *self.untested, *self.problems]


def check(
    cache: Cache, root: str | Path, audits: list[Audit], untested: Sequence[str] = ()
) -> Report:
    """Count and measure everything in a data set. `untested` says which labels no audit could
    judge and why."""
    names = sorted({(key.sensor, key.indenter) for key in cache.keys})
    groups = [_group(cache, sensor, indenter) for sensor, indenter in names]
    return Report(str(root), groups, list(cache.problems), audits, list(untested))


def _group(cache: Cache, sensor: str, indenter: str) -> Group:
    rows = cache.select([sensor], [indenter])
    numbers = {cache.keys[row].number for row in cache.select(indenters=[indenter])}
    lag = Lag.unknown()
    if sensor in cache.sensors:
        lag = find_lag(cache, rows, LAG_FRAMES)
    duplicates = saturated = flagged = 0
    lengths, lowest, highest, ages = [], [], [], []
    for row in rows:
        part = cache.rows(row)
        bits, force = cache.bits[part], np.array(cache.wrench[part, :3])
        same = (bits[1:] == bits[:-1]).all(1)
        moved = np.abs(np.diff(force, axis=0)).max(1, initial=0) > 0.02
        duplicates += int((same & moved).sum())
        saturated += _saturates(force)
        flagged += int((cache.array("flags")[part] != 0).sum())
        ages.append(np.max(cache.array("wrench_age")[part], initial=-np.inf))
        lengths.append(len(force))
        lowest.append(force.min(0))
        highest.append(force.max(0))
    low, high = np.min(lowest, 0).round(6).tolist(), np.max(highest, 0).round(6).tolist()
    return Group(
        sensor=sensor,
        indenter=indenter,
        contacts=len(rows),
        missing=len(numbers) - len(rows),
        frames=sum(lengths),
        shortest=min(lengths),
        longest=max(lengths),
        force_min=(low[0], low[1], low[2]),
        force_max=(high[0], high[1], high[2]),
        duplicate_frames=duplicates,
        saturated_contacts=saturated,
        wrench_age_max=float(np.max(ages)),
        flagged_frames=flagged,
        lag=lag.best if lag.known else np.nan,
        lag_error=lag.error,
        lag_unit=lag.unit,
        lag_text=str(lag),
    )


def _saturates(force: np.ndarray) -> bool:
    """Whether an axis stays at exactly its extreme for several frames: the transducer's limit."""
    if len(force) < SATURATED_FRAMES:
        return False
    largest = abs(force).max(0)
    stuck = (abs(force) == largest) & (largest > 0.5)
    runs = np.lib.stride_tricks.sliding_window_view(stuck, SATURATED_FRAMES, axis=0)
    return bool(runs.all(-1).any())


def write_html(report: Report, cache: Cache, path: Path) -> None:
    """One page with everything in it: counts, problems, forces, the audit of the labels, and each
    sensor's reference and deepest frame."""
    root = Path(report.root)
    contacts = sum(group.contacts for group in report.groups)
    missing = sum(group.missing for group in report.groups)
    untrusted = [audit.sensor for audit in report.audits if audit.verdict == NOT_TRUSTED]
    doubts = [f"{len(report.problems)} problems"] * bool(report.problems)
    doubts += [f"{missing} missing"] * bool(missing)
    doubts += [f"labels of {', '.join(untrusted)} not trusted"] * bool(untrusted)
    sections = [Section("Problems", (Notes(report.problems, Tone.BAD),))] if report.problems else []
    sections.append(Section("Contents", (_contents(report), Pictures([_force_plot(cache)]))))
    if report.audits or report.untested:
        made_by = command("dataset", "audit", root)
        sections.append(audit_section(report.audits, report.untested, made_by))
    sections.append(
        Section("Frames at rest and at the largest normal force", (Pictures(_frames(cache)),))
    )
    page = Page(
        kind="data set",
        title=f"Data set {root.resolve().name}",
        command=command("dataset", "check", root),
        verdict=Verdict(
            Tone.BAD if doubts else Tone.GOOD,
            f"{contacts} contacts: {'; '.join(doubts) or 'nothing found wrong'}",
        ),
        facts={
            "sensors": ", ".join(sorted({group.sensor for group in report.groups})),
            "indenters": str(len({group.indenter for group in report.groups})),
            "frames": str(sum(group.frames for group in report.groups)),
        },
        sections=sections,
    )
    write_page(page, path)


def _contents(report: Report) -> Table:
    rows: list[tuple[str | Cell, ...]] = [
        (
            group.sensor,
            group.indenter,
            str(group.contacts),
            fault_count(group.missing),
            str(group.frames),
            f"{group.shortest}…{group.longest}",
            *(
                f"{low:.2f} … {high:.2f}"
                for low, high in zip(group.force_min, group.force_max, strict=True)
            ),
            group.lag_text,
            fault_count(group.duplicate_frames),
            fault_count(group.saturated_contacts),
        )
        for group in report.groups
    ]
    heads = ("sensor", "indenter", "contacts", "missing", "frames", "frames a contact")
    ranges = ("Fx (N)", "Fy (N)", "Fz (N)", "lag of the labels")
    return Table((*heads, *ranges, "duplicate frames", "saturated contacts"), rows)


def _force_plot(cache: Cache) -> Picture:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for column, name in enumerate(("Fx", "Fy", "Fz")):
            axes.hist(cache.wrench[:, column], bins=120, histtype="step", label=name)
        axes.set(xlabel="force (N)", ylabel="frames", yscale="log")
        axes.legend()

    return plot(draw, "Forces of all frames")


def _frames(cache: Cache) -> list[Picture]:
    pictures = []
    for sensor in cache.sensors:
        rows = cache.select([sensor])
        if not rows:
            continue
        part = cache.rows(max(rows, key=lambda row: -cache.wrench[cache.rows(row), 2].min()))
        deepest = part.start + int(np.argmin(cache.wrench[part, 2]))
        force = f"Fz {cache.wrench[deepest, 2]:.2f} N"
        pictures.append(bitmap(unpack(cache.reference(sensor)) * 255, f"{sensor}: at rest"))
        pictures.append(bitmap(unpack(np.array(cache.bits[deepest])) * 255, f"{sensor}: {force}"))
    return pictures
