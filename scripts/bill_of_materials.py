"""The bill of materials: every package that is pinned, and every one that came with those.

    python scripts/bill_of_materials.py          # rewrites the tables of docs/dependencies.md
    python scripts/bill_of_materials.py --check  # says whether they are up to date

Licences are what the installed packages say of themselves.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "dependencies.md"
START, END = "<!-- made by scripts/bill_of_materials.py -->", "<!-- end -->"
UNKNOWN = "not stated"


def pinned(path: Path) -> list[Requirement]:
    """The requirements of a file that hold for this Python, those it includes left out."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return [entry for entry in found if entry.marker is None or entry.marker.evaluate()]


def licence(name: str) -> str:
    """Licence of an installed package, in short."""
    try:
        metadata = distribution(name).metadata
    except PackageNotFoundError:
        return "not installed here"
    classified = [
        text.split(" :: ")[-1]
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License :: ") and text.count(" :: ") > 1
    ]
    said = metadata.get("License-Expression") or ", ".join(classified) or metadata.get("License")
    first_line = (said or UNKNOWN).strip().splitlines()[0]
    return first_line if len(first_line) <= 60 else UNKNOWN


def direct_rows() -> list[str]:
    """A table row for each requirement."""
    return [
        f"| {entry.name} | {str(entry.specifier).lstrip('=')} | {path.name} |"
        for path in sorted((ROOT / "requirements").glob("*.txt"))
        for entry in sorted(pinned(path), key=lambda entry: entry.name.lower())
    ]


def normal(name: str) -> str:
    """Name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_rows() -> list[str]:
    """A table row for each installed package."""
    found = {normal(d.metadata["Name"]): d.version for d in distributions()}
    own = {name for name in found if name.startswith("genforce")}
    return [f"| {name} | {found[name]} | {licence(name)} |" for name in sorted(found.keys() - own)]


def direct_table() -> str:
    return "\n".join(["| package | version | file |", "|---|---|---|", *direct_rows()])


def main() -> int:
    head, _, rest = PAGE.read_text().partition(START)
    _, _, tail = rest.partition(END)
    if "--check" in sys.argv[1:]:
        missing = [row for row in direct_rows() if row not in rest]
        print("\n".join(missing) or "up to date")
        return bool(missing)
    installed = ["| package | version | licence |", "|---|---|---|", *installed_rows()]
    tables = ["## Pinned", direct_table(), "## Installed with them", "\n".join(installed)]
    PAGE.write_text("\n\n".join([head + START, *tables, END]) + tail)
    return 0


if __name__ == "__main__":
    sys.exit(main())
