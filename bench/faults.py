"""Run the tests that docs/faults.md names and print its table with what became of each.

    python bench/faults.py              # all: minutes
    python bench/faults.py --only Camera

Exit code 1 where one failed. The table is written to runs/faults.json as well.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "faults.md"
RESULTS = ROOT / "runs" / "faults.xml"
REPORT = ROOT / "runs" / "faults.json"
OUTCOMES = ("failure", "error", "skipped")  # as JUnit's XML names them


@dataclass
class Fault:
    """A row of the page."""

    part: str
    fault: str
    outcome: str
    tests: list[str]
    verdict: str = ""


def main() -> int:
    """Run and print."""
    faults = list(read_page(PAGE.read_text()))
    parts = list(dict.fromkeys(fault.part for fault in faults))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PART", choices=parts, help=f"one of: {parts}")
    only = parser.parse_args().only
    faults = [fault for fault in faults if only in (None, fault.part)]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.unlink(missing_ok=True)
    tests = dict.fromkeys(test for fault in faults for test in fault.tests)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={RESULTS}"]
    subprocess.run([*command, *map(node_id, tests)], cwd=ROOT, check=False)
    results = read_results(RESULTS)
    for fault in faults:
        found = [results.get(test.split("::")[1], ["missing"]) for test in fault.tests]
        fault.verdict = verdict([outcome for outcomes in found for outcome in outcomes])
    REPORT.write_text(json.dumps([asdict(f) for f in faults], indent=1, ensure_ascii=False) + "\n")
    Console().print(table(faults), f"written to {REPORT}")
    return int(any(fault.verdict != "passed" for fault in faults))


def read_page(text: str) -> Iterator[Fault]:
    """The rows, each under the heading it stands under."""
    part = ""
    for line in text.splitlines():
        if line.startswith("## "):
            part = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and "::" in cells[-1]:
            yield Fault(part, cells[0], cells[1], re.findall(r"`([^`]+)`", cells[2]))


def node_id(test: str) -> str:
    """`file.py::test` with the folder it lies in."""
    file, name = test.split("::")
    path = next(path for path in ROOT.glob(f"*/**/{file}") if ".venv" not in path.parts)
    return f"{path.relative_to(ROOT)}::{name}"


def read_results(path: Path) -> dict[str, list[str]]:
    """Outcomes of each test, one a parameter."""
    results: dict[str, list[str]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in OUTCOMES), "passed")
        results.setdefault(case.attrib["name"].split("[")[0], []).append(outcome)
    return results


def verdict(outcomes: list[str]) -> str:
    """Passed where all are; else the first that is not."""
    return next((outcome for outcome in outcomes if outcome != "passed"), "passed")


def table(faults: list[Fault]) -> Table:
    """The page's table with the verdicts."""
    view = Table("part", "fault", "outcome", "tests", "", show_lines=True)
    colours = {"passed": "green", "skipped": "yellow"}
    for fault in faults:
        colour = colours.get(fault.verdict, "red")
        view.add_row(
            fault.part,
            fault.fault,
            fault.outcome,
            str(len(fault.tests)),
            f"[{colour}]{fault.verdict}",
        )
    return view


if __name__ == "__main__":
    sys.exit(main())
