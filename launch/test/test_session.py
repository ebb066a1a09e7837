"""What is told of a graph that ended, and how Ctrl-C reaches a collection."""

from __future__ import annotations

import os
import signal

import pytest

from genforce_bringup.session import interruptions, why_ended

CAMERA_CAME_BACK = """\
12:00:01 camera | error: camera /dev/video0: cannot be opened
12:00:01 graph  | camera died (exit code 3): starting it again
"""


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("", "the graph ended without a word"),
        ("error: robot 10.0.0.1 is driven by another graph", "robot 10.0.0.1 is driven by"),
        (
            CAMERA_CAME_BACK + "12:00:09 graph  | robot ended (exit code -9): ending all\n",
            "robot ended (exit code -9): ending all",
        ),
        (
            CAMERA_CAME_BACK
            + "12:00:08 robot  | error: robot 10.0.0.1 does not answer\n"
            + "12:00:09 graph  | robot ended (exit code 3): ending all\n"
            + "12:00:09 netft  | error: netft: no records\n",
            "robot 10.0.0.1 does not answer",
        ),
    ],
)
def test_the_reason_is_that_of_the_part_whose_end_ended_all(log: str, why: str):
    assert why_ended(log).startswith(why)


@pytest.fixture
def in_background():
    """As of a process that a script began with `&`: its shell has it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_heard_in_the_background_too_and_raised_where_nobody_acts_on_it(in_background):
    heard = False

    def collect() -> None:
        nonlocal heard
        with interruptions() as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            heard = interrupted.wait(1)

    with pytest.raises(KeyboardInterrupt):
        collect()
    assert heard
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_error_in_an_interrupted_collection_is_not_covered_up():
    def collect() -> None:
        with interruptions():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        collect()
