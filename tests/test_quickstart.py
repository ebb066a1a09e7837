"""The commands of the quick start, run as they stand there, on a virtual cell of the test's own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from code_blocks import code_blocks

from genforce_infer.bundle import read_bundle

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "quickstart.md").read_text()
BY_HAND = PAGE.split("\n## The same by hand\n")[1].split("\n## ")[0]
# What makes the same commands short.
SHORTER = {"--contacts 20": "--contacts 4", "steps=600": "steps=120"}
FIRM_N = 1.5  # on the way to the 2 N that the example client holds


@pytest.fixture
def terminal(fast_cell: Path, tmp_path: Path):
    """Starts a block of the page in a shell of its own."""
    cell = yaml.safe_load(fast_cell.read_text())
    cell["simulation"]["time_scale"] = 1.0  # what a starved driver loses of a fast box is reported
    fast_cell.write_text(yaml.safe_dump(cell))

    def start(block: str) -> subprocess.Popen[str]:
        text = block.replace("source setup.bash", f"source {ROOT}/setup.bash")
        for old, new in (SHORTER | {"virtual": str(fast_cell)}).items():
            text = text.replace(old, new)
        return subprocess.Popen(
            ["bash", "-ec", text],
            cwd=tmp_path,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    return start


def is_firm(line: str) -> bool:
    """Whether a line of the watching script shows a firm press."""
    number, _, unit = line.strip().partition(" ")
    return unit == "N" and abs(float(number)) > FIRM_N


@contextlib.contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A terminal that is left with Ctrl-C."""
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)


def test_the_quick_start_leads_from_contacts_to_a_live_force(terminal, tmp_path):
    *made, serve, hold = code_blocks(BY_HAND, "bash")
    (watch,) = code_blocks(BY_HAND, "python")
    for block in made:
        process = terminal(block)
        text, _ = process.communicate(timeout=240)
        assert process.returncode == 0, text
    assert read_bundle(tmp_path / "runs/first/bundle").manifest.sensor == "array_1"
    script = tmp_path / "watch.py"
    script.write_text(watch)
    with (
        running(terminal(serve)),
        running(terminal(hold)),
        running(terminal(f"source setup.bash\nexec python {script}")) as watching,
    ):
        assert watching.stdout
        assert any(map(is_firm, watching.stdout)), "the force topic ended"
