"""Cell and sensor files: what is wrong in them is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from genforce_collect.config import load_cell, load_sensor
from genforce_collect.errors import ConfigError

CONFIG = Path(__file__).parents[2] / "launch" / "config"


@pytest.mark.parametrize("path", sorted((CONFIG / "sensors").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sensor_file_is_valid_and_named_as_its_file(path):
    assert load_sensor(path).name == path.stem


@pytest.mark.parametrize("path", sorted((CONFIG / "cells").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_cell_file_is_valid_and_named_as_its_file(path):
    assert load_cell(path).name == path.stem


def changed_cell(tmp_path: Path, change) -> Path:
    data = yaml.safe_load((CONFIG / "cells" / "virtual.yaml").read_text())
    change(data)
    path = tmp_path / "cell.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["robot"].update(hostt="x"), r"robot\.hostt: unknown key"),
        (lambda d: d["robot"].pop("host"), r"robot\.host: missing"),
        (lambda d: d["limits"].update(stale_s=9.0), r"limits\.stale_s: .*less than or equal to 5"),
        (lambda d: d["limits"].update(stale_s="fast"), r"limits\.stale_s: .*number.*'fast'"),
        (lambda d: d["netft"].update(sign=2), r"netft\.sign: .*1 or -1"),
        (lambda d: d["robot"].update(tcp=[0, 0, float("nan"), 0, 0, 0]), r"robot\.tcp\.2"),
        (lambda d: d["limits"].update(workspace_min_m=[1, 1, 1]), "workspace_min_m must be below"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_file_and_range(tmp_path, change, message):
    path = changed_cell(tmp_path, change)
    with pytest.raises(ConfigError, match=message) as caught:
        load_cell(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "cell.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        load_cell(path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown sensor 'nosuch': known are .*array_1"):
        load_sensor("nosuch")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such cell file"):
        load_cell(tmp_path / "lab.yaml")
