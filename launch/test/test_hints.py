"""An error of a command leads to its entry of the troubleshooting page, and tab completes."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from genforce_bringup.cli import COMMANDS, main
from genforce_bringup.hints import PAGE, entry_of
from genforce_collect.config import known_configs


def test_an_error_leads_to_the_section_that_quotes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "collect_indent", "sensor:=nosuch"]) == 2
    error, help_ = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert help_ == f"help: {PAGE}#set-up-and-configuration"


@pytest.mark.parametrize(
    ("message", "section"),
    [
        ("robot 10.0.0.2: force Fz = -13 N is beyond 12 N", "robot"),
        ("netft: tare refused: Fz scatters by 0.3 N", "force-sensor"),
        ("a/b: sha256 differs from the manifest's (x)", "data-sets-and-models"),
    ],
)
def test_what_changes_in_a_message_does_not_matter(message: str, section: str) -> None:
    assert entry_of(message) == f"{PAGE}#{section}"


def test_a_message_that_the_page_does_not_quote_has_no_entry() -> None:
    assert entry_of("something else entirely") is None


def completions(line: str, answer: Path) -> set[str]:
    """What the shell would offer at the end of a line."""
    code = "from genforce_bringup.cli import main; main()"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash"}
    place = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    env = os.environ | asked | place | {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, "-c", code], env=env, timeout=60)
    return {word.strip() for word in answer.read_text().split("\n")}


def test_tab_completes_commands_options_and_names(tmp_path: Path) -> None:
    completed = partial(completions, answer=tmp_path / "answer")
    assert completed("genforce ") >= set(COMMANDS)
    assert "segment" in completed("genforce seg")
    assert "--sensor" in completed("genforce segment --se")
    assert completed("genforce segment --sensor ") >= set(known_configs("sensors"))
    assert "virtual" in completed("genforce collect --cell ")
