"""One look for every report: a page of frozen blocks, rendered to one HTML file by one template.

A page has no other files and asks no server for anything: pictures are inlined, and the style knows
light, dark and narrow screens. Each page and each section names the command that makes its numbers.

    page = Page(
        kind="collection",
        title="Collection 20260101-120000",
        command=command("bag", "report", bag),
        verdict=Verdict(Tone.GOOD, "20 of 20 contacts whole"),
        facts={"sensor": "array_1", "duration": "212 s"},
        sections=(
            Section("Streams", (Table(("topic", "messages"), rows),)),
            Section("Forces", (Pictures((plot(draw, "normal force of each contact"),)),)),
        ),
    )
    write_page(page, folder / "report.html")

`write_page` also brings `runs/index.html` up to date where the page lies in a folder `runs`.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import cv2
import jinja2
import numpy as np

PAGE_NAME = "report.html"
RUNS = "runs"
DEEPEST = 3  # folders below `runs` in which a report is looked for
HEAD_BYTES = 4096  # the beginning of a page, which holds its summary
NUMBER = re.compile(r"[-+−]?\d[\d\s.,…%+−-]*|-|")
THUMBNAIL_PX = 320
PLOT_INCHES = (5.4, 3.4)  # read at the width of a phone as well
PLOT_DPI = 144
# Readable on white and on black, so that one transparent picture serves both.
PLOT_GREY = "#808080"
PLOT_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "text.color": PLOT_GREY,
    "axes.edgecolor": PLOT_GREY,
    "axes.labelcolor": PLOT_GREY,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": PLOT_GREY,
    "grid.alpha": 0.25,
    "xtick.color": PLOT_GREY,
    "ytick.color": PLOT_GREY,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


class Tone(Enum):
    """How a reader should take something."""

    PLAIN = ""
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True)
class Verdict:
    """The answer of a page in a few words."""

    tone: Tone
    text: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than its text; `link` is relative to the page."""

    text: str
    tone: Tone = Tone.PLAIN
    link: str = ""


def fault_count(count: int) -> Cell:
    """A number that ought to be zero."""
    return Cell(str(count), Tone.BAD if count else Tone.PLAIN)


@dataclass(frozen=True)
class Table:
    """Column heads with their units; rows as long as they are. The first column is for names."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    block: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{len(row)} cells for the columns {list(self.columns)}")

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers only, and read better from the right."""
        return [all(map(NUMBER.fullmatch, column)) for column in zip(*self._texts, strict=True)]

    def markdown(self) -> str:
        """The table for a terminal or a text."""
        lines = [self.columns, ["---"] * len(self.columns), *self._texts]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    @property
    def _texts(self) -> list[list[str]]:
        return [[cell if isinstance(cell, str) else cell.text for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Picture:
    """An encoded image and what it shows."""

    data: bytes
    caption: str
    mime: str = "image/png"

    @property
    def source(self) -> str:
        """The picture as an URL that holds it."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side as far as they fit; `small` for thumbnails."""

    pictures: Sequence[Picture]
    small: bool = False
    block: ClassVar[str] = "pictures"


@dataclass(frozen=True)
class Notes:
    """Sentences, one an item."""

    items: Sequence[str | Cell]
    tone: Tone = Tone.PLAIN
    block: ClassVar[str] = "notes"


@dataclass(frozen=True)
class Section:
    """A part of a page; `command` makes its numbers where that is another than the page's."""

    title: str
    blocks: Sequence[Table | Pictures | Notes]
    command: str = ""


@dataclass(frozen=True)
class Page:
    """A report. `kind` is what it reports on (collection, data set, …), for the list of reports."""

    kind: str
    title: str
    command: str
    verdict: Verdict
    facts: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[Section] = ()


def command(*words: object) -> str:
    """A `genforce` command line as a reader would type it from where this process runs."""
    here = Path.cwd()
    texts = []
    for word in words:
        if isinstance(word, Path) and word.is_absolute() and word.is_relative_to(here):
            word = word.relative_to(here)
        texts.append(str(word))
    return shlex.join(["genforce", *texts])


def write_page(page: Page, path: Path) -> Path:
    """Write a page, and the list of reports of the folder `runs` it lies in. Returns its path."""
    _write(path, render(page))
    if runs := runs_folder(path):
        write_index(runs)
    return path


def render(page: Page) -> str:
    """The page as HTML."""
    summary = {
        "kind": page.kind,
        "title": page.title,
        "tone": page.verdict.tone.value,
        "verdict": page.verdict.text,
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return _template().render(page=page, summary=json.dumps(summary), made=summary["made"])


# --- pictures -----------------------------------------------------------------------------------


def plot(
    draw: Callable[[Any], None], caption: str, size: tuple[float, float] = PLOT_INCHES
) -> Picture:
    """What `draw` draws into a new matplotlib figure of that size (inches), in the pages' style."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="png", dpi=PLOT_DPI, transparent=True)
    return Picture(buffer.getvalue(), caption)


def thumbnail(image: np.ndarray | bytes, caption: str) -> Picture | None:
    """A small JPEG of an (H, W) or (H, W, 3) BGR uint8 image, or of an encoded one; None where
    that cannot be decoded."""
    pixels = _decoded(image) if isinstance(image, bytes) else image
    if pixels is None:
        return None
    height = round(pixels.shape[0] * THUMBNAIL_PX / pixels.shape[1])
    small = cv2.resize(pixels, (THUMBNAIL_PX, height), interpolation=cv2.INTER_AREA)
    return Picture(cv2.imencode(".jpg", small)[1].tobytes(), caption, "image/jpeg")


def _decoded(encoded: bytes) -> np.ndarray | None:
    return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR) if encoded else None


def bitmap(image: np.ndarray, caption: str) -> Picture:
    """An (H, W) uint8 image without loss."""
    return Picture(cv2.imencode(".png", image)[1].tobytes(), caption)


# --- the list of reports ------------------------------------------------------------------------


def runs_folder(path: Path) -> Path | None:
    """The folder `runs` that holds `path`; the outermost of several."""
    return next((p for p in reversed(path.resolve().parents) if p.name == RUNS), None)


def write_index(runs: Path) -> Path:
    """Write `index.html`, the list of the reports in a folder, newest first. Returns its path."""
    found = sorted(_summaries(runs), key=lambda item: item[0].stat().st_mtime_ns, reverse=True)
    rows = [
        (
            Cell(summary["title"], link=path.relative_to(runs).as_posix()),
            summary["kind"],
            Cell(summary["verdict"], Tone(summary["tone"])),
            summary["made"],
        )
        for path, summary in found
    ]
    page = Page(
        kind="index",
        title="Reports",
        command="",
        verdict=Verdict(Tone.PLAIN, f"{len(rows)} in {runs.name}/"),
        sections=(Section("", (Table(("report", "kind", "verdict", "made"), rows),)),),
    )
    index = runs / "index.html"
    _write(index, render(page))
    return index


def _summaries(folder: Path, depth: int = DEEPEST) -> Iterator[tuple[Path, dict[str, str]]]:
    """Reports at most `depth` folders below, with the summary each carries in its head."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            if depth:
                yield from _summaries(Path(entry), depth - 1)
        elif entry.name == PAGE_NAME:
            with open(entry, encoding="utf-8", errors="replace") as file:
                head = re.search(r'<meta name="genforce" content="(.*?)">', file.read(HEAD_BYTES))
            if head:
                yield Path(entry), json.loads(html.unescape(head[1]))


def _write(path: Path, text: str) -> None:
    """Replace a file at once, so that a reader never sees half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("genforce_collect", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
