"""Run the benchmarks, print one table, write runs/bench.json (see README.md beside this file)."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rows import Row

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "runs" / "bench.json"
console = Console()


def main() -> int:
    """Exit code 0, 1 when a benchmark failed, 2 for an unknown name."""
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description="Run the benchmarks of GenForce.")
    parser.add_argument(
        "--only", metavar="NAME", choices=known, help=f"just one of: {', '.join(known)}"
    )
    only = parser.parse_args().only
    keep_to_ourselves()
    rows: list[Row] = []
    failed: list[str] = []
    for name in [only] if only else known:
        started = time.monotonic()
        try:
            with console.status(f"{name} …"):
                rows += importlib.import_module(f"bench_{name}").bench()
            console.print(f"{name}: {time.monotonic() - started:.0f} s")
        except KeyboardInterrupt:
            failed.append(name)
            break
        except Exception:
            failed.append(name)
            console.print(f"[red]{name}: failed[/red]")
            traceback.print_exc()
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(
        json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n"
    )
    console.print(table(rows), f"written to {REPORT}")
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def keep_to_ourselves() -> None:
    """An own DDS domain, so that no other cell on this machine is heard or disturbed."""
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"


def table(rows: list[Row]) -> Table:
    """The figures as people read them."""
    view = Table("what", "value", "unit", "goal", "", "baseline", "ratio")
    for column in (1, 5, 6):
        view.columns[column].justify = "right"
    marks = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: ""}
    for row in rows:
        view.add_row(
            row.name,
            figure(row.value),
            row.unit,
            row.goal,
            marks[row.met],
            figure(row.baseline),
            figure(row.ratio),
        )
    return view


def figure(value: float | None) -> str:
    """Four significant digits, without exponent where that is shorter."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
