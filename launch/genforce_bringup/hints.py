"""Where the troubleshooting page speaks of an error."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from genforce_collect.errors import GenforceError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
MIN_LETTERS = 12  # that a quoted message must have to tell it from others


def tell(error: GenforceError) -> None:
    """Print an error for a person, and where the page speaks of it."""
    print(f"error: {error}", file=sys.stderr)
    if entry := entry_of(str(error)):
        print(f"help: {entry}", file=sys.stderr)


def entry_of(message: str, page: Path = PAGE) -> str | None:
    """Link to the section of the page that quotes this message, None where none does.

    The page quotes messages in backticks in the first column of its tables; `…` stands for
    anything.
    """
    if not page.is_file():  # installed without its documents
        return None
    title = ""
    for line in page.read_text().splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif line.startswith("| "):
            for quoted in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
                if _says(message, quoted):
                    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                    return f"{page}#{anchor}"
    return None


def _says(message: str, quoted: str) -> bool:
    parts = [part.strip() for part in quoted.split("…")]
    if sum(map(len, parts)) < MIN_LETTERS:
        return False
    return re.search(".*".join(map(re.escape, parts)), message, re.DOTALL) is not None
