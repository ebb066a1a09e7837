"""What is told of a graph that ended."""

from __future__ import annotations

import pytest

from genforce_bringup.session import why_ended

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
