"""What a collection shows while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from genforce_bringup.cli import main
from genforce_bringup.collect import stream_line
from genforce_bringup.hints import PAGE
from genforce_msgs.msg import RecorderStatus

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
