"""Inspect, verify and repair bags, and report on them.

Examples:
  genforce bag info runs/collect/20260101-120000
  genforce bag verify runs/demo/train_bag runs/demo/live_bag --json
  genforce bag repair runs/collect/20260101-120000
  genforce bag report runs/collect/20260101-120000
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genforce_collect.bags import BagReader, is_closed, repair
from genforce_collect.report import write_report
from genforce_collect.verification import BagReport, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("action", choices=sorted(_ACTIONS), help="what to do with each bag")
    parser.add_argument("bags", nargs="+", type=Path, metavar="BAG", help="folder of a bag")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when all is well, 1 when `verify` found a problem. Raises `DataError`."""
    console = Console(quiet=args.json, highlight=False, soft_wrap=True)
    results = [_ACTIONS[args.action](path, console) for path in args.bags]
    if args.json:
        print(json.dumps(results, indent=2))
    return 0 if all(result.get("ok", True) for result in results) else 1


def _info(path: Path, console: Console) -> dict[str, Any]:
    with BagReader(path) as bag:
        first_ns, last_ns = bag.span_ns
        about: dict[str, Any] = {
            "path": str(path),
            "start": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(first_ns * 1e-9)),
            "duration_s": (last_ns - first_ns) * 1e-9,
            "size_bytes": sum(file.stat().st_size for file in path.iterdir()),
            "topics": {
                name: {"type": kind, "messages": bag.counts[name]}
                for name, kind in sorted(bag.topics.items())
            },
            "metadata": bag.metadata,
        }
    session = about["metadata"]
    console.print(
        f"[bold]{path}[/]  {about['start']}  {about['duration_s']:.1f} s  "
        f"{about['size_bytes'] / 2**20:.1f} MB"
    )
    if session.get("session"):
        console.print(
            f"session {session['session']}: sensor {session.get('sensor')}, indenter "
            f"{session.get('indenter')}, {len(session.get('contacts', []))} contacts asked for"
        )
    table = Table()
    table.add_column("topic", overflow="fold")
    table.add_column("type", overflow="fold")
    table.add_column("messages", justify="right")
    for name, topic in about["topics"].items():
        table.add_row(name, topic["type"], str(topic["messages"]))
    console.print(table)
    return about


def _verify(path: Path, console: Console) -> dict[str, Any]:
    report = verify(path)
    _print_report(report, console)
    return report.to_dict()


def _print_report(report: BagReport, console: Console) -> None:
    table = Table(title=f"{report.path}  {report.duration_s:.1f} s", title_justify="left")
    table.add_column("topic", overflow="fold")
    columns = ("messages", "lost", "Hz", "gap ms", "delay p50 ms", "p99 ms")
    for column in columns:
        table.add_column(column, justify="right")
    for topic in report.topics:
        lost = "-" if topic.lost is None else str(topic.lost + topic.device_lost)
        table.add_row(
            topic.name.removeprefix("/genforce/"),
            str(topic.received),
            f"[red]{lost}[/]" if topic.lost or topic.device_lost else lost,
            f"{topic.rate_hz:.1f}",
            f"{topic.max_gap_s * 1e3:.1f}",
            f"{topic.delay_p50_s * 1e3:.2f}",
            f"{topic.delay_p99_s * 1e3:.2f}",
        )
    console.print(table)
    asked = len(report.metadata.get("contacts", []))
    if asked:
        console.print(f"{len(report.whole_contacts)} of {asked} contacts whole")
    for problem in report.problems:
        console.print(f"[red]problem:[/] {problem}")
    console.print("[green]whole: nothing lost[/]" if report.ok else "[red]not whole[/]")


def _repair(path: Path, console: Console) -> dict[str, Any]:
    was_closed = is_closed(path)
    done = repair(path)
    if was_closed and not done.files:
        console.print(f"{path}: nothing to repair")
    else:
        console.print(
            f"{path}: repaired; {done.cut_bytes} bytes of a torn end cut off"
            + (f", {done.damaged_chunks} unreadable chunks left out" if done.damaged_chunks else "")
        )
    return {"path": str(path)} | dataclasses.asdict(done)


def _report(path: Path, console: Console) -> dict[str, Any]:
    page, _ = write_report(path)
    console.print(f"{page}")
    return {"path": str(path), "report": str(page)}


_ACTIONS = {"info": _info, "verify": _verify, "repair": _repair, "report": _report}
