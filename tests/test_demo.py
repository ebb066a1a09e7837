"""The main job end to end: collect, train, serve live, on a virtual cell that runs fast."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from rosbags.highlevel import AnyReader

from genforce_bringup.cli import main
from genforce_bringup.demo import DemoConfig, make_room, training
from genforce_collect.errors import ConfigError
from genforce_collect.verification import verify
from genforce_train.checkpoint import load_checkpoint
from genforce_train.models.force import MODELS

pytestmark = pytest.mark.live

TOPICS = {
    "/genforce/robot/tcp_pose",
    "/genforce/robot/state",
    "/genforce/netft/wrench",
    "/genforce/array_1/image/compressed",
    "/genforce/array_1/markers",
    "/genforce/contact",
    "/genforce/stream_times",
}
LIVE_TOPICS = TOPICS | {"/genforce/array_1/wrench", "/genforce/array_1/inference"}


def demo(cell: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "genforce_bringup.cli", "demo"),
            *("--cell", str(cell), "--out", str(out), *words),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_force_learned_from_collected_contacts_is_served_live(fast_cell, tmp_path):
    out = tmp_path / "demo"
    process = demo(fast_cell, out, "--contacts", "8", "--live", "3", "--steps", "80")
    text, _ = process.communicate(timeout=280)
    assert process.returncode == 0, text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["contacts"] == {"train": 8, "live": 3}
    assert not any(summary["lost"].values())
    assert summary["answered"] == summary["frames"]
    assert summary["r2"]["fz"] > 0.5  # eight contacts do not make a good model, but a model
    assert (out / "force.png").stat().st_size > 10_000
    page = (out / "report.html").read_text()
    assert f"{summary['r2']['fz']:.3f}" in page
    assert "train_bag_report/report.html" in page
    assert (out / "train_bag_report/report.html").is_file()
    for bag, topics in ((out / "train_bag", TOPICS), (out / "live_bag", LIVE_TOPICS)):
        assert_nothing_lost(bag)
        with AnyReader([bag]) as reader:
            assert topics <= set(reader.topics)
            assert all(reader.topics[topic].msgcount for topic in topics)


def test_training_begins_from_the_shipped_model_of_such_a_sensor(tmp_path):
    saved = load_checkpoint(training(DemoConfig(), tmp_path, tmp_path).init)
    assert saved.meta["sensors"] == ["array_1"]
    saved.restore_model(MODELS[saved.meta["model"]](outputs=len(saved.meta["outputs"])))
    assert not training(DemoConfig(sensor="circle_2"), tmp_path, tmp_path).init


def test_ctrl_c_stops_the_robot_closes_the_bag_and_leaves_no_process(fast_cell, tmp_path):
    out = tmp_path / "demo"
    process = demo(fast_cell, out, "--contacts", "100", "--live", "1")
    try:
        wait_until(lambda: any((out / "train_bag").glob("*.mcap")), process, 90)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) > 5
        time.sleep(3)  # into the first contacts
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, text
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert_nothing_lost(out / "train_bag")


def test_a_second_demo_is_refused_while_one_runs(fast_cell, tmp_path):
    out = tmp_path / "demo"
    first = demo(fast_cell, out)
    try:
        wait_until((tmp_path / ".demo.lock").exists, first, 60)
        second = demo(fast_cell, out)
        text, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"another demo is running (process {first.pid})" in text
    finally:
        os.kill(first.pid, signal.SIGINT)
        first.communicate(timeout=60)


def begin_demo(out: Path, seed: int, whole: bool) -> None:
    make_room(out, DemoConfig(seed=seed))
    if whole:
        (out / "summary.json").touch()


def seed_of(folder: Path) -> int:
    return json.loads((folder / "demo.json").read_text())["seed"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--cell", "lab"), 2, "cell 'lab' is not a virtual one"),
        (("--indenter", "sphre"), 2, "unknown indenter 'sphre'"),
        (("--contacts", "0"), 2, "--contacts and --live: 1 or more each"),
        ((), 3, "is driven by another graph"),
    ],
)
def test_a_demo_that_cannot_run_leaves_the_one_before_in_place(
    fast_cell, tmp_path, capsys, words, code, text
):
    out = tmp_path / "demo"
    begin_demo(out, 1, whole=True)
    host = yaml.safe_load(fast_cell.read_text())["robot"]["host"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(f"\0genforce robot {host}")
        assert main(["demo", "--cell", str(fast_cell), "--out", str(out), *words]) == code
    assert text in capsys.readouterr().err
    assert seed_of(out) == 1
    assert not out.with_name("demo.previous").exists()


def test_an_unfinished_demo_does_not_push_out_a_whole_one(tmp_path):
    out, previous = tmp_path / "demo", tmp_path / "demo.previous"
    begin_demo(out, 1, whole=True)
    begin_demo(out, 2, whole=False)
    assert seed_of(previous) == 1
    begin_demo(out, 3, whole=True)
    assert seed_of(previous) == 1
    begin_demo(out, 4, whole=False)
    assert (seed_of(out), seed_of(previous)) == (4, 3)


@pytest.mark.parametrize("name", ["demo", "demo.previous"])
def test_a_folder_of_others_is_never_moved_or_removed(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=rf"{name}: was made by no demo"):
        make_room(tmp_path / "demo", DemoConfig())
    assert (tmp_path / name / "thesis.tex").exists()


def assert_nothing_lost(bag: Path) -> None:
    """By count of producers' numbers; a starved machine may lose datagrams before them."""
    assert {topic.name: topic.lost for topic in verify(bag).topics if topic.lost} == {}


def wait_until(done, process: subprocess.Popen[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)
