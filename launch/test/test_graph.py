"""Graphs: one description, two ways to start it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from genforce_bringup.graph import GRAPHS, VIEW, claim_cell, find_graph, parse_assignments
from genforce_bringup.up import command_line
from genforce_collect.errors import ConfigError, DeviceError

pytestmark = pytest.mark.live

LAUNCH_FILES = Path(__file__).parents[1]


def test_every_graph_has_a_launch_file_of_its_name():
    assert {path.name.removesuffix(".launch.py") for path in LAUNCH_FILES.glob("*.launch.py")} == {
        *GRAPHS
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_every_process_of_a_graph_is_installed(name):
    given = {key: "/some/folder" for key in ("bundle", "bag") if key in _arguments(name)}
    for process in GRAPHS[name].processes(given):
        command = command_line(process)
        assert Path(command[0]).exists()


@pytest.mark.parametrize("name", GRAPHS)
def test_every_argument_says_what_it_is_for(name):
    assert all(argument.description for argument in GRAPHS[name].arguments)


def test_processes_of_a_graph_have_different_labels():
    labels = [process.label for process in GRAPHS["collect_indent"].processes({})]
    assert len(labels) == len(set(labels))


def test_the_force_depth_graph_presses_where_a_goal_names_no_plan():
    def plan(graph: str, **given: str) -> str:
        indenter = GRAPHS[graph].processes(given)[-1]
        return indenter.parameters.get("plan", "")

    assert plan("collect_force_depth") == "press"
    assert plan("collect_force_depth", plan="press:0.4") == "press:0.4"
    assert plan("collect_indent") == ""


@pytest.mark.parametrize("name", [n for n, graph in GRAPHS.items() if VIEW in graph.arguments])
def test_the_live_view_is_one_process_more_and_may_die_without_the_graph(name):
    given = {"bundle": "/some/folder"} if "bundle" in _arguments(name) else {}
    without = GRAPHS[name].processes(given | {"sensor": "circle_1"})
    *rest, viewer = GRAPHS[name].processes(given | {"sensor": "circle_1", "view": "true"})
    assert rest == without
    assert (viewer.executable, viewer.parameters["sensor"]) == ("viewer", "circle_1")
    assert viewer.restart


def test_the_virtual_cell_has_the_seed_of_its_file_unless_another_is_given():
    def words(**given: str) -> tuple[str, ...]:
        return GRAPHS["virtual_cell"].processes(given)[0].arguments

    assert "--seed" not in words()
    assert words(seed="0")[-2:] == ("--seed", "0")


def test_a_switch_that_is_neither_on_nor_off_is_refused():
    with pytest.raises(ConfigError, match="'view' is true or false, found 'yes'"):
        GRAPHS["collect_indent"].processes({"view": "yes"})


def test_an_unknown_argument_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown argument 'sensr'; known are cell, sensor"):
        GRAPHS["collect_indent"].processes({"sensr": "array_1"})


def test_an_unknown_graph_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown graph 'colect'; known are virtual_cell"):
        find_graph("colect")


def test_a_word_without_an_assignment_is_refused():
    with pytest.raises(ConfigError, match="'sensor=array_1': expected name:=value"):
        parse_assignments(["sensor=array_1"])


def test_one_graph_at_a_time_drives_an_arm(tmp_path, loopback_host):
    text = (LAUNCH_FILES / "config" / "cells" / "virtual.yaml").read_text()
    cell = tmp_path / "cell.yaml"
    cell.write_text(text.replace("127.0.0.2", loopback_host))
    claim = (
        "from genforce_bringup.graph import GRAPHS, claim_cell\n"
        f"claim_cell(GRAPHS['infer'].processes({{'cell': {str(cell)!r}, 'bundle': 'b'}}))\n"
        "print(flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline()
    processes = GRAPHS["collect_indent"].processes({"cell": str(cell)})
    with pytest.raises(DeviceError, match=f"robot {loopback_host} is driven by another graph"):
        claim_cell(processes, keep=False)
    claim_cell(GRAPHS["virtual_cell"].processes({"cell": str(cell)}))
    other.kill()
    other.communicate()
    claim_cell(processes, keep=False)  # which leaves it free
    claim_cell(processes)


def test_a_virtual_cell_is_not_started_for_a_real_one(tmp_path):
    text = (LAUNCH_FILES / "config" / "cells" / "virtual.yaml").read_text()
    lab = tmp_path / "lab.yaml"
    lab.write_text(text.split("simulation:")[0])
    executables = [p.executable for p in GRAPHS["collect_indent"].processes({"cell": str(lab)})]
    assert "virtual_cell" not in executables
    with pytest.raises(ConfigError, match="not a virtual one"):
        GRAPHS["virtual_cell"].processes({"cell": str(lab)})


def test_infer_without_a_bundle_says_so():
    with pytest.raises(ConfigError, match="bundle:=folder"):
        GRAPHS["infer"].processes({})


def _arguments(name: str) -> set[str]:
    return {argument.name for argument in GRAPHS[name].arguments}
