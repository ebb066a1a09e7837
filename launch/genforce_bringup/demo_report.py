"""The page a demo ends with: what was recorded, learned and served, and how to look further."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genforce_bringup.live_report import LiveFigures
from genforce_collect.html import (
    PAGE_NAME,
    Cell,
    Notes,
    Page,
    Pictures,
    Section,
    Table,
    Tone,
    Verdict,
    command,
    fault_count,
    write_page,
)
from genforce_collect.report import write_report
from genforce_infer.agreement import agreement_plots
from genforce_train.evaluate import AXES


def write_demo_report(
    summary: dict[str, Any], figures: LiveFigures, words: Sequence[str], out: Path
) -> Path:
    """Write `out/report.html` and the reports of the two bags in it. `summary` is that of
    `summary.json`, `words` the demo's command line. Returns the page's path."""
    train_bag, live_bag, bundle = out / "train_bag", out / "live_bag", out / "bundle"
    bag_pages = [write_report(bag)[0] for bag in (train_bag, live_bag)]
    lost = sum(summary["lost"].values())
    latency = summary["latency_ms"]
    page = Page(
        kind="demo",
        title="Live force on contacts the model never saw",
        command=command("demo", *words),
        verdict=Verdict(
            Tone.BAD if lost else Tone.GOOD,
            f"{lost} messages lost; Fz R² {summary['r2']['fz']:.3f}, "
            f"mean error {summary['mae_n']['fz']:.3f} N",
        ),
        facts={
            "contacts trained": str(summary["contacts"]["train"]),
            "contacts live": str(summary["contacts"]["live"]),
            "training": f"{summary['train_seconds']} s",
            "live rate": f"{summary['rate_hz']:.1f} Hz",
            "frames answered": f"{summary['answered']} of {summary['frames']}",
            "latency p50": f"{latency['p50']:.1f} ms",
            "latency p99": f"{latency['p99']:.1f} ms",
        },
        sections=(
            Section(
                "Live force against the force sensor",
                (
                    _scores(summary),
                    Pictures(agreement_plots(figures.times, figures.measured, figures.predicted)),
                ),
                command("replay", live_bag, "--infer", bundle),
            ),
            Section(
                "Streams of both recordings",
                (_streams(summary),),
                command("bag", "verify", train_bag, live_bag),
            ),
            Section(
                "Look further",
                (
                    Notes(
                        [
                            Cell(
                                f"collection in {bag.name}", link=f"{page.parent.name}/{PAGE_NAME}"
                            )
                            for bag, page in zip((train_bag, live_bag), bag_pages, strict=True)
                        ]
                    ),
                ),
            ),
        ),
    )
    return write_page(page, out / PAGE_NAME)


def _scores(summary: dict[str, Any]) -> Table:
    rows = [
        (f"F{axis[1]}", f"{summary['r2'][axis]:.3f}", f"{summary['mae_n'][axis]:.3f}")
        for axis in AXES[:3]
    ]
    return Table(("axis", "R²", "mean error (N)"), rows)


def _streams(summary: dict[str, Any]) -> Table:
    rows = [
        (topic, str(count), fault_count(summary["lost"][topic]))
        for topic, count in sorted(summary["messages"].items())
    ]
    return Table(("topic", "messages", "lost"), rows)
