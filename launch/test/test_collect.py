"""What a collection shows while it runs."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from genforce_bringup import collect, session
from genforce_bringup.cli import main
from genforce_bringup.collect import stream_line
from genforce_bringup.hints import PAGE
from genforce_collect.errors import GenforceError
from genforce_msgs.action import CollectIndent
from genforce_msgs.msg import RecorderStatus

VIRTUAL = Path(__file__).parents[1] / "config" / "cells" / "virtual.yaml"
TOPICS = ["/genforce/netft/wrench", "/genforce/array_1/image/compressed", "/genforce/robot/state"]


def test_rates_and_losses_of_each_stream_are_told_as_they_come():
    status = RecorderStatus(topics=TOPICS, rate=[999.6, 30.1, 10.0], lost=[0, 0, 0])
    assert stream_line(status) == (
        "netft/wrench 1000 Hz  array_1/image/compressed 30 Hz  lost: nothing"
    )
    status.lost = [3, 0, 1]
    assert stream_line(status).endswith("lost: netft/wrench 3, robot/state 1")


def test_nothing_is_told_before_anything_is_recorded():
    assert stream_line(RecorderStatus()) == ""


def test_a_mistake_in_a_cell_file_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cell = tmp_path / "cell.yaml"
    cell.write_text("name: mine\nrobot: {hosst: 10.0.0.2}\n")
    bag = tmp_path / "bag"
    assert main(["collect", "--cell", str(cell), "--out", str(bag)]) == 2
    error, help_ = capsys.readouterr().err.splitlines()
    assert "robot.hosst: unknown key" in error
    assert help_ == f"help: {PAGE}#set-up-and-configuration"
    assert list(tmp_path.iterdir()) == [cell]  # not even a log was begun


def test_a_graph_that_waits_is_not_taken_for_one_of_ones_own(
    tmp_path: Path, loopback_host: str, capsys: pytest.CaptureFixture[str]
):
    """It would run the plan, and the command would have said that it was refused."""
    cell = tmp_path / "cell.yaml"
    cell.write_text(VIRTUAL.read_text().replace("127.0.0.2", loopback_host))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(f"\0genforce robot {loopback_host}")
        assert main(["collect", "--cell", str(cell), "--out", str(tmp_path / "bag")]) == 3
    assert f"robot {loopback_host} is driven by another graph" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [cell]


def test_attaching_needs_a_graph_that_is_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(session, "DISCOVERY_TIMEOUT_S", 0.5)
    assert main(["collect", "--attach", "--out", str(tmp_path / "bag")]) == 3
    assert "start one: genforce up collect_indent" in capfd.readouterr().err


def test_a_force_depth_curve_is_one_press_whatever_graph_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    class Client:
        def __init__(self, graph: object) -> None:
            pass

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def end(_: Client, goal: CollectIndent.Goal, *__: object) -> None:
        asked.append(goal)
        raise GenforceError("enough")

    monkeypatch.setattr(collect, "CollectClient", Client)
    monkeypatch.setattr(collect, "run_goal", end)
    for words in (["--force-depth"], ["--plan", "slide"], []):
        assert main(["collect", "--attach", "--out", str(tmp_path / "bag"), *words]) == 1
    assert [goal.plan for goal in asked] == ["press", "slide", ""]


def test_a_cell_is_not_taken_where_nodes_have_theirs(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["collect", "--attach", "--cell", "lab"])
    assert "--cell: not allowed with argument --attach" in capsys.readouterr().err
