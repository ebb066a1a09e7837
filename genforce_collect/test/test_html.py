"""Reports are whole in one file, safe against what they show, and listed below `runs`."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from genforce_collect.html import (
    Cell,
    Notes,
    Page,
    Pictures,
    Section,
    Table,
    Tone,
    Verdict,
    bitmap,
    command,
    plot,
    render,
    thumbnail,
    write_page,
)

NASTY = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "br"}


class Tree(HTMLParser):
    """Fails on tags that are not closed in order; collects every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


WHOLE = Verdict(Tone.GOOD, "all whole")


def page(title="Collection 1", verdict=WHOLE):
    checks = np.indices((48, 64)).sum(0).astype(np.uint8)
    line = plot(lambda figure: figure.subplots().plot([0, 1]), "a line")
    small = thumbnail(checks, "rest")
    assert small
    return Page(
        kind="collection",
        title=title,
        command=command("bag", "report", "runs/a b"),
        verdict=verdict,
        facts={"sensor": NASTY},
        sections=(
            Section(
                "Streams",
                (
                    Table(
                        ("topic", "messages", "lost"),
                        [(NASTY, "1 000", Cell("3", Tone.BAD)), ("b", "2", "-")],
                    ),
                    Pictures((line, bitmap(checks, "rest"))),
                    Pictures((small,), small=True),
                    Notes([NASTY, Cell("the bag", link="bag/report.html")], Tone.BAD),
                ),
                command("bag", "verify", "x"),
            ),
        ),
    )


def test_a_page_is_well_formed_and_needs_no_other_file():
    tree = Tree(render(page()))
    embedded = [a for a in tree.addresses if a.startswith("data:image/")]
    assert len(embedded) == 3
    assert set(tree.addresses) - set(embedded) == {"bag/report.html"}


def test_what_a_page_shows_is_not_run():
    text = render(page(title=NASTY))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_numbers_stand_under_each_other_and_names_do_not():
    text = render(page())
    heads = re.findall(r"<th( class=\"number\")?>(\w+)", text)
    assert heads == [("", "topic"), (' class="number"', "messages"), (' class="number"', "lost")]


def test_commands_can_be_pasted_into_a_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("bag", "report", tmp_path / "my bag") == "genforce bag report 'my bag'"
    assert command("bag", "report", Path("/data/bag")) == "genforce bag report /data/bag"


def test_a_row_of_another_length_than_the_head_is_refused():
    with pytest.raises(ValueError, match="2 cells"):
        Table(("a", "b", "c"), [("1", "2")])


def test_a_thumbnail_keeps_the_shape_of_what_it_shows():
    jpeg = cv2.imencode(".jpg", np.zeros((480, 960, 3), np.uint8))[1].tobytes()
    small = thumbnail(jpeg, "")
    assert small
    decoded = cv2.imdecode(np.frombuffer(small.data, np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (160, 320, 3)
    assert thumbnail(b"no jpeg", "") is None
    assert thumbnail(b"", "") is None


def test_reports_below_runs_are_listed_newest_first_with_their_verdicts(tmp_path):
    runs = tmp_path / "runs"
    for folder in ("a", "b/deep", "b/deep/er/than/looked"):
        (runs / folder).mkdir(parents=True, exist_ok=True)
    write_page(page("First"), runs / "a/report.html")
    os.utime(runs / "a/report.html", (0, 0))
    (runs / "a/other.html").write_text("no report")
    write_page(page(NASTY, Verdict(Tone.BAD, "2 lost")), runs / "b/deep/report.html")
    write_page(page("Hidden"), runs / "b/deep/er/than/looked/report.html")
    text = (runs / "index.html").read_text()
    assert Tree(text).addresses == ["b/deep/report.html", "a/report.html"]
    assert "2 lost" in text
    assert "&lt;script&gt;" in text
    assert "Hidden" not in text
    assert not list(runs.rglob(".*"))


def test_a_report_elsewhere_makes_no_list(tmp_path):
    write_page(page(), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
