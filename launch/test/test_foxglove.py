"""Every topic and field that the Foxglove layout shows is one that a graph publishes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genforce_collect.nodes.messages import message_class
from genforce_collect.view.topics import topics

LAYOUT = json.loads((Path(__file__).parents[1] / "config/foxglove/genforce.json").read_text())
TOPICS = topics("array_1")


def texts(part: Any) -> Iterator[str]:
    """All strings of a part of the layout, keys among them."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from texts(item)
    elif isinstance(part, dict):
        for key, value in part.items():
            yield key
            yield from texts(value)


PATHS = sorted({text for text in texts(LAYOUT) if text.startswith("/")})


def panels(part: Any) -> Iterator[str]:
    """Panels that a layout places."""
    if isinstance(part, str):
        yield part
    else:
        yield from panels(part["first"])
        yield from panels(part["second"])


@pytest.mark.parametrize("path", PATHS)
def test_what_is_shown_is_published_and_has_the_field(path):
    topic, *fields = path.split(".")
    kind = message_class(TOPICS[topic])
    for field in fields:
        name, repeated = re.fullmatch(r"(\w+)(\[:\])?", field).groups()
        known = kind.get_fields_and_field_types()
        assert name in known, f"{path}: {kind.__name__} has {', '.join(known)}"
        assert bool(repeated) == known[name].startswith("sequence"), path
        if "/" in known[name] and not repeated:
            kind = message_class(known[name].replace("/", "/msg/"))


def test_what_matters_most_is_shown():
    shown = {path.split(".")[0] for path in PATHS}
    assert shown >= set(TOPICS) - {"/genforce/stream_times"}


def test_every_panel_is_placed_once():
    placed = list(panels(LAYOUT["layout"]))
    assert sorted(placed) == sorted(LAYOUT["configById"])
