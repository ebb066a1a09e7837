"""The genforce command: help, usage errors, exit codes."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from genforce_bringup.cli import COMMANDS, USAGE_EXIT_CODE


def genforce(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "genforce_bringup.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_lists_every_command():
    done = genforce("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_with_an_example(name):
    done = genforce(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"genforce {name}" in importlib.import_module(COMMANDS[name].module).__doc__
    assert done.stdout.count(f"genforce {name}") > 1  # in the usage, and in an example


def test_an_unknown_command_ends_with_a_usage_error():
    done = genforce("colect")
    assert done.returncode == USAGE_EXIT_CODE
    assert "unknown command 'colect'" in done.stderr


def test_an_error_is_one_line_where_to_read_on_and_an_exit_code():
    done = genforce("up", "collect_indent", "sensor:=nosuch")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown sensor 'nosuch': known are")
    _, help_ = done.stderr.splitlines()
    assert help_.startswith("help: ")
    assert help_.endswith("troubleshooting.md#set-up-and-configuration")
