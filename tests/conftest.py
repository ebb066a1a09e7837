"""What the end-to-end tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

CELL = Path(__file__).parents[1] / "launch" / "config" / "cells" / "virtual.yaml"
TIME_SCALE = 2.0


@pytest.fixture
def fast_cell(tmp_path: Path, loopback_host: str) -> Path:
    """The virtual cell on addresses of its own, with time running faster."""
    data = yaml.safe_load(CELL.read_text())
    data["robot"]["host"] = data["netft"]["host"] = loopback_host
    data["camera"]["source"] = f"http://{loopback_host}:8080/stream.mjpg"
    data["simulation"]["time_scale"] = TIME_SCALE
    path = tmp_path / "fast.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line on the fuzz tests: how many inputs were tried, and on how many tests failed."""
    inputs = {
        report.nodeid: dict(report.user_properties)["inputs tried"]
        for report in terminalreporter.getreports("")  # of the teardowns
        if "inputs tried" in dict(report.user_properties)
    }
    if inputs:
        crashes = sum(report.nodeid in inputs for report in terminalreporter.getreports("failed"))
        terminalreporter.write_line(f"fuzz: {sum(inputs.values())} inputs tried, crashes {crashes}")
