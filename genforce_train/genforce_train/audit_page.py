"""The audit of a data set's labels as a page, and as a section of other pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genforce_collect.html import (
    PLOT_GREY,
    Cell,
    Notes,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Tone,
    Verdict,
    command,
    plot,
)
from genforce_train.audit import CANNOT_TELL, NOT_TRUSTED, TRUSTED, Audit
from genforce_train.lag import UNITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TONES = {TRUSTED: Tone.GOOD, NOT_TRUSTED: Tone.BAD, CANNOT_TELL: Tone.PLAIN}
EXPLANATION = (
    "R² is that of a quick model on contacts it has not seen, mean over Fx, Fy, Fz; it must be far "
    "better than on labels shuffled within each contact.",
    "The lag is that under which forces follow from the images best, positive where labels come "
    "late; the gel's relaxation is accounted for.",
)


def audit_page(audits: Sequence[Audit], problems: Sequence[str], root: Path) -> Page:
    """The report of `genforce dataset audit`; `problems` says what could not be audited."""
    by_verdict = {name: [a.sensor for a in audits if a.verdict == name] for name in TONES}
    told = [f"{name}: {', '.join(sensors)}" for name, sensors in by_verdict.items() if sensors]
    bad = bool(by_verdict[NOT_TRUSTED] or problems or not audits)
    tone = Tone.BAD if bad else Tone.PLAIN if by_verdict[CANNOT_TELL] else Tone.GOOD
    return Page(
        kind="audit",
        title=f"Labels of {root.resolve().name}",
        command=command("dataset", "audit", root),
        verdict=Verdict(tone, "; ".join(told) or "no labels to audit"),
        facts={
            "contacts": str(sum(audit.contacts for audit in audits)),
            "frames": str(sum(audit.frames for audit in audits)),
        },
        sections=(audit_section(audits, problems),),
    )


def audit_section(audits: Sequence[Audit], problems: Sequence[str], made_by: str = "") -> Section:
    """Scores and lags of the labels by sensor, with what they mean."""
    blocks: list[Table | Pictures | Notes] = []
    if audits:
        blocks.append(_table(audits))
    if drawn := [audit for audit in audits if audit.lag.evidence]:
        scored = [audit for audit in drawn if not np.isnan(audit.r2)]
        pictures = [_evidence_plot(drawn), *([_score_plot(scored)] if scored else [])]
        blocks += [Pictures(pictures), Notes(EXPLANATION)]
    if problems:
        blocks.append(Notes(problems, Tone.BAD))
    title = "Are the labels those of the frames, and at their time?"
    return Section(title, blocks, made_by)


def _table(audits: Sequence[Audit]) -> Table:
    rows: list[tuple[str | Cell, ...]] = [
        (
            audit.sensor,
            Cell(audit.verdict, TONES[audit.verdict]),
            audit.reason,
            *(
                "" if np.isnan(score) else f"{score:.3f}"
                for score in (audit.r2, audit.r2_shuffled, audit.r2_shifted)
            ),
            str(audit.lag),
            str(audit.contacts),
        )
        for audit in audits
    ]
    heads = ("sensor", "verdict", "why", "R²", "R², shuffled", "R², shifted", "lag", "contacts")
    return Table(heads, rows)


def _evidence_plot(audits: Sequence[Audit]) -> Picture:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for audit in audits:
            unit = UNITS[audit.lag.unit]
            lags = np.array(audit.lag.lags) * unit.factor
            axes.plot(lags, audit.lag.evidence, label=f"{audit.sensor} ({unit.shown})")
        axes.axvline(0, color=PLOT_GREY, lw=0.8)
        axes.set(xlabel="lag of the labels", ylabel="log likelihood")
        axes.legend()

    return plot(draw, "How likely each lag is, less the likeliest")


def _score_plot(audits: Sequence[Audit]) -> Picture:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = np.arange(len(audits))
        scores = {
            "as they are": [audit.r2 for audit in audits],
            "shifted": [audit.r2_shifted for audit in audits],
            "shuffled": [audit.r2_shuffled for audit in audits],
        }
        for number, (name, values) in enumerate(scores.items()):
            axes.bar(places + 0.27 * (number - 1), values, 0.25, label=name)
        axes.set_xticks(places, [audit.sensor for audit in audits])
        axes.axhline(0, color=PLOT_GREY, lw=0.8)
        axes.set(ylabel="R² on contacts not seen")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(scores))

    return plot(draw, "Labels as they are, shifted in time and shuffled within contacts")
