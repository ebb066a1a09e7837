"""`genforce sim view`: a picture or a video of a press."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import pytest

from genforce_collect.errors import ConfigError
from genforce_sim import view


def look(*words: str | Path) -> None:
    parser = argparse.ArgumentParser()
    view.add_arguments(parser)
    assert view.run(parser.parse_args(["view", *map(str, words)])) == 0


def test_a_picture_shows_the_most_loaded_moment(tmp_path: Path) -> None:
    look("--sensor", "tactip", "--indenter", "moon", "--depth-mm", "2", "-o", tmp_path / "p.png")
    picture = cv2.imread(str(tmp_path / "p.png"))
    assert picture.shape == (960, 1280, 3)
    pressure = picture[480:, :640]
    assert (pressure.max(axis=2) > 150).mean() > 0.005


def test_a_video_has_a_frame_for_every_instant(tmp_path: Path) -> None:
    look("--depth-mm", "0.5", "--shear-mm", "0.5", "-o", tmp_path / "p.mp4")
    video = cv2.VideoCapture(str(tmp_path / "p.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 13
    assert video.read()[0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--depth-mm", "4.2"], "below the 4 mm of gel of array_1"),
        (["--at-mm", "13", "0"], "beside the gel of array_1"),
        (["-o", "press.gif"], "must end with"),
    ],
)
def test_a_press_the_gel_cannot_take_is_refused(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        look(*words)
