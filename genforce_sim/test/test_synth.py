"""Synthetic data sets: what is written, that it repeats, resumes, and can be read."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError, DataError, DeviceError, SafetyError
from genforce_collect.layout import Layout
from genforce_collect.markers.packing import unpack_mask
from genforce_sim import synth
from genforce_sim.fieldset import read_field_shard
from genforce_sim.sensor import SimulatedSensor


def make(*words: str | Path) -> None:
    parser = argparse.ArgumentParser()
    synth.add_arguments(parser)
    assert synth.run(parser.parse_args([*map(str, words), "--jobs", "1"])) == 0


def digest(root: Path) -> dict[str, str]:
    """Every file of a tree with its hash."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("collection")
    words = ["--sensors", "array_1", "uskin", "--indenters", "sphere", "moon"]
    make(*words, "--contacts", "3", "--truth", "-o", root)
    return root


def test_a_collection_reads_back_as_labelled_contacts(collection: Path) -> None:
    layout = Layout(collection)
    assert layout.sensors() == ["array_1", "uskin"]
    keys = layout.contacts()
    assert len(keys) == 2 * 2 * 3
    for key in keys:
        contact = layout.read(key)
        assert len(contact) > 8
        assert len(contact.last_frames()) == 4
        assert contact.wrench[contact.depth.argmax(), 2] < -0.05
        assert 0.2 < contact.depth.max() <= 1.0
        path = collection / "truth" / key.sensor / key.indenter / f"{key.number}.npy"
        assert np.load(path).shape == (len(contact), 3, 30, 40)
    assert layout.read_reference("array_1").shape == (38400,)
    rest_frames, rest_wrench = layout.read_rest("array_1")
    assert len(rest_frames) == len(rest_wrench) == 8
    assert np.abs(rest_wrench[:, :3]).max() < 0.05


def test_contacts_on_the_same_spot_are_paired_exactly(collection: Path) -> None:
    layout = Layout(collection)
    keys = [key for key in layout.contacts() if key.sensor == "array_1"]
    assert len(keys) == 6
    for key in keys:
        array, uskin = layout.read(key), layout.read(replace(key, sensor="uskin"))
        assert array.depth == pytest.approx(uskin.depth)
        assert array.phase.tolist() == uskin.phase.tolist()
        assert array.wrench[:, :3].min() != uskin.wrench[:, :3].min()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    collection: Path, tmp_path: Path
) -> None:
    words = ["--sensors", "array_1", "--indenters", "sphere", "--contacts", "3", "--truth"]
    make(*words, "-o", tmp_path / "again")
    make(*words, "--seed", "1", "-o", tmp_path / "other")
    whole = digest(collection)
    again, other = digest(tmp_path / "again"), digest(tmp_path / "other")
    contact = "force/array_1/sphere/0/ft.csv"
    assert all(whole[name] == again[name] for name in again if name != "recipe.json")
    assert again[contact] != other[contact]
    assert again["img/array_1_ref.npy"] != other["img/array_1_ref.npy"]


def test_an_instance_is_that_of_the_virtual_cell(collection: Path, tmp_path: Path) -> None:
    words = ["--sensors", "array_1", "--indenters", "sphere", "--contacts", "1"]
    make(*words, "--instance", "0", "-o", tmp_path)
    shown = unpack_mask(Layout(tmp_path).read_reference("array_1")) != 0
    cell = SimulatedSensor(load_sensor("array_1"), "sphere", seed=0).reference.mask
    drawn = unpack_mask(Layout(collection).read_reference("array_1")) != 0
    assert (shown & cell).sum() / (shown | cell).sum() > 0.95
    assert (drawn & cell).sum() / (drawn | cell).sum() < 0.9


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    words = ["--sensors", "array_1", "--indenters", "cone", "--contacts", "10"]
    make(*words, "-o", tmp_path / "whole")
    killed = tmp_path / "killed"
    code = (
        "import argparse, sys; from genforce_sim import synth; p = argparse.ArgumentParser();"
        "synth.add_arguments(p); synth.run(p.parse_args(sys.argv[1:]))"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, *words, "-o", str(killed), "--jobs", "2"],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(killed.glob("force/*/*/*/ft.csv"))) < 2:
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.005)
    workers = psutil.Process(run.pid).children()
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1]  # nobody writes beside the run to come
    assert len(list(killed.glob("force/*/*/*/ft.csv"))) < 10
    make(*words, "-o", killed)
    assert digest(killed) == digest(tmp_path / "whole")


def test_the_field_suite_holds_masks_with_the_true_displacement(tmp_path: Path) -> None:
    words = ["--suite", "field", "--contacts", "3", "--frames", "6"]
    make(*words, "--kinds", "dots", "pins", "taxels", "-o", tmp_path)
    shard = read_field_shard(tmp_path / "fields" / "00000")
    assert shard["masks"].shape == (18, 38400)
    assert shard["displacement"].shape == (18, 3, 30, 40)
    assert shard["contact"].tolist() == np.repeat([0, 1, 2], 6).tolist()
    assert shard["references"].shape == (3, 38400)
    assert np.abs(shard["displacement"]).max() > 100  # um
    assert len({bytes(reference) for reference in shard["references"]}) > 1
    assert shard["wrench"][:, 2].min() < -0.05
    facts = json.loads((tmp_path / "fields" / "00000" / "contacts.json").read_text())
    assert [contact["number"] for contact in facts] == [0, 1, 2]


def test_the_pretraining_grid_has_the_original_names(tmp_path: Path) -> None:
    make("--suite", "pretrain", "--quick", "--indenters", "sphere", "-o", tmp_path)
    images = sorted((tmp_path / "sim").rglob("*.jpg"))
    assert len(images) == 12 + 2 * 5 * 12
    image = cv2.imread(str(tmp_path / "sim" / "sphere" / "Array1" / "0_0_1.5.jpg"), 0)
    rest = cv2.imread(str(tmp_path / "sim" / "Array1_ref.jpg"), 0)
    assert image.shape == rest.shape == (480, 640)
    assert ((image > 50) != (rest > 50)).mean() > 0.005


def test_a_dask_cluster_gives_the_same_bytes(tmp_path: Path, loopback_host: str) -> None:
    from distributed import LocalCluster

    words = ["--sensors", "array_2", "--indenters", "sphere", "--contacts", "2"]
    make(*words, "-o", tmp_path / "local")
    with LocalCluster(
        n_workers=1, threads_per_worker=1, host=loopback_host, dashboard_address=None
    ) as cluster:
        make(*words, "-o", tmp_path / "dask", "--scheduler", cluster.scheduler_address)
    assert digest(tmp_path / "dask") == digest(tmp_path / "local")


def test_bad_requests_are_refused_before_anything_is_made(
    tmp_path: Path, collection: Path, loopback_host: str
) -> None:
    out = ["-o", tmp_path / "nothing"]
    with pytest.raises(ConfigError, match="unknown indenter"):
        make("--indenters", "ball", *out)
    with pytest.raises(ConfigError, match="unknown sensor"):
        make("--sensors", "array_9", *out)
    with pytest.raises(ConfigError, match="--contacts 0"):
        make("--contacts", "0", *out)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(DataError, match="other settings"):
        make("--sensors", "array_1", "--contacts", "5", "-o", collection)
    with pytest.raises(DeviceError, match="--scheduler"):
        make("--quick", "--scheduler", f"tcp://{loopback_host}:1", *out)


def test_a_press_deeper_than_the_gel_names_the_contact(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("contacts: [{x_mm: 0, y_mm: 0, depth_mm: 4.5, direction_deg: 0}]\n")
    with pytest.raises(SafetyError, match=r"contact 0 presses 4\.50 mm deep"):
        make("--plan", plan, "-o", tmp_path / "out")
    plan.write_text("contacts: [{x_mm: 12, y_mm: 0, depth_mm: 1, direction_deg: 0}]\n")
    with pytest.raises(SafetyError, match="beyond the edge of the gel"):
        make("--plan", plan, "-o", tmp_path / "out")
