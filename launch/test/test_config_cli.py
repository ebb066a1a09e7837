"""genforce config: what is shown reads back, what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from genforce_bringup.cli import main
from genforce_bringup.config_cli import as_yaml, read_any
from genforce_collect.config import load_cell

CONFIG = Path(__file__).parents[1] / "config"
FILES = sorted(CONFIG.glob("*/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_shown_reads_back_the_same(path, tmp_path):
    _, section = read_any(str(path))
    copy = tmp_path / path.name
    copy.write_text(as_yaml(section))
    assert read_any(str(copy))[1] == section


def test_show_names_the_file_and_fills_in_the_defaults(capsys):
    assert main(["config", "show", "lab"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"# {CONFIG / 'cells' / 'lab.yaml'}\n")
    assert yaml.safe_load(shown)["robot"]["frequency_hz"] == 500.0


def test_the_real_cell_is_no_virtual_one_and_stays_below_the_transducers_rating():
    cell = load_cell("lab")
    assert cell.simulation is None
    assert all(f <= rated for f, rated in zip(cell.limits.force_n, (12, 12, 17), strict=True))
    assert all(t <= 0.12 for t in cell.limits.torque_nm)


def test_a_sound_cell_with_a_sensor_whose_plan_fits_is_ok(capsys):
    assert main(["config", "check", "lab", "gelsight"]) == 0
    assert "ok: sensor gelsight in cell lab: the plan fits" in capsys.readouterr().out


def test_a_plan_that_leaves_the_workspace_is_named(tmp_path, capsys):
    data = yaml.safe_load((CONFIG / "cells" / "lab.yaml").read_text())
    data["limits"]["workspace_max_m"] = [0.001, 0.001, 0.05]
    cell = tmp_path / "narrow.yaml"
    cell.write_text(yaml.safe_dump(data))
    assert main(["config", "check", str(cell), "gelsight"]) == 4
    assert "outside the workspace" in capsys.readouterr().out


def test_every_fault_of_every_file_is_told_at_once(tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\nrobot: {host: a, frequncy_hz: 10}\nlimits: 3\n")
    assert main(["config", "check", str(bad), "lab"]) == 2
    printed = capsys.readouterr()
    assert str(bad) in printed.err
    assert "robot.frequncy_hz: unknown key" in printed.err
    assert "netft: missing" in printed.err
    assert "ok: " in printed.out


def test_a_plan_file_is_told_from_a_cell_and_a_sensor(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("random: {count: 3, seed: 1}\n")
    assert len(read_any(str(plan))[1].plan().contacts) == 3


def test_an_unknown_name_is_answered_with_the_known_ones(capsys):
    assert main(["config", "show", "gelsigth"]) == 2
    assert "known are lab, virtual" in capsys.readouterr().err


def test_list_names_every_file(capsys):
    assert main(["config", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(path.stem in listed for path in FILES)
