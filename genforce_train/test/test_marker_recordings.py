"""Recordings of marker displacements become contacts whose images and forces belong together."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from genforce_collect.errors import DataError
from genforce_collect.layout import ContactKey, Layout, unpack
from genforce_train import dataset_cli, experiment_sessions
from genforce_train.cache import open_layout, split_contacts
from genforce_train.checkpoint import save_checkpoint
from genforce_train.lag import image_changes
from genforce_train.marker_recordings import ImportConfig, import_recordings
from genforce_train.models.field import FieldNet

h5py = pytest.importorskip("h5py")

LEVER_MM = 60.0  # the gel over the transducer
FRAMES = 12


def write_session(path: Path, turn_deg: float = 180.0, presses: int = 6, seed: int = 0) -> Path:
    """A session as documented: presses at random places with shear, the readings turned about z and
    taken below the gel. Displacements follow the force with 0.5 mm/N and 0.1 mm/N."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(-6, 6.1, 2.0), np.arange(-5, 5.1, 2.0))
    rest = np.column_stack([x.ravel(), y.ravel(), 0.3 - 0.01 * (x.ravel() ** 2 + y.ravel() ** 2)])
    moved, wrench, stamps, numbers = [], [], [], []
    cos, sin = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    for press in range(presses):
        at = np.array([*rng.uniform(-3, 3, 2), LEVER_MM])
        push = np.array([*rng.uniform(-1, 1, 2), -4.0])
        near = np.exp(-((rest[:, :2] - at[:2]) ** 2).sum(1) / 8)
        for step in range(FRAMES):
            force = push * (step + 1) / FRAMES
            moved.append(near[:, None] * force * (0.5, 0.5, 0.1))
            torque = np.cross(at * 1e-3, force)
            wrench.append([*turn.T @ force, *turn.T @ torque])
            stamps.append(1.7e9 + 2 * press + 0.04 * step)
            numbers.append(press)
    with h5py.File(path, "w") as file:
        file["vision/dxyz"] = np.array(moved, np.float32)
        file["reference/xyz_ref"] = rest.astype(np.float32)
        file["force/values"] = np.array(wrench)
        file["force"].attrs["columns"] = "fx,fy,fz,mx,my,mz"
        file["vision/timestamp"] = np.array(stamps)
        file["force/timestamp"] = np.array(stamps) + 0.001
        file["force/segment_id"] = np.array(numbers, np.int32)
    return path


def edit(path: Path, **arrays: np.ndarray) -> None:
    with h5py.File(path, "a") as file:
        for name, values in arrays.items():
            del file[name.replace("__", "/")]
            file[name.replace("__", "/")] = values


def test_every_press_becomes_a_contact_of_its_session(tmp_path):
    a = write_session(tmp_path / "a.h5")
    b = write_session(tmp_path / "b.h5", presses=4, seed=1)
    report = import_recordings([a, b], tmp_path / "data")
    assert (len(report.written), report.frames) == (10, 10 * FRAMES)
    cache = open_layout(tmp_path / "data")
    assert not cache.problems
    split = split_contacts(cache, cache.select(["markers_ft"]), seed=0, unseen=["b"])
    assert {cache.keys[row].indenter for row in split.test} == {"b"}
    assert {cache.keys[row].indenter for row in split.train + split.validation} == {"a"}
    contact = cache.contact(ContactKey("markers_ft", "a", 3))
    assert contact.source["recording"] == "a.h5"
    np.testing.assert_allclose(contact.wrench_age, 0.001, atol=1e-6)
    np.testing.assert_allclose(np.diff(contact.stamp_ns) * 1e-9, 0.04, atol=1e-6)
    assert not (tmp_path / "data/force/markers_ft/a/3/pose.csv").exists()
    assert not (tmp_path / "data/depth").exists()


def test_markers_are_drawn_where_a_camera_behind_the_gel_sees_them(tmp_path):
    path = write_session(tmp_path / "a.h5")
    import_recordings([path], tmp_path / "data", ImportConfig(camera_distance_mm=1e9))
    with h5py.File(path) as file:
        place = file["reference/xyz_ref"][:] + file["vision/dxyz"][FRAMES - 1]
    contact = Layout(tmp_path / "data").read(ContactKey("markers_ft", "a", 0))
    mask = unpack(contact.bits[-1])
    u, v = 319.5 + 24 * place[:, 0], 239.5 - 24 * place[:, 1]
    assert mask[v.round().astype(int), u.round().astype(int)].all()
    assert mask.sum() == pytest.approx(len(place) * np.pi * (0.3 * 24) ** 2, rel=0.05)


@pytest.mark.parametrize("turn_deg", [0, 90, 180, 270])
def test_readings_are_turned_so_that_force_and_gel_go_the_same_way(tmp_path, turn_deg):
    path = write_session(tmp_path / "a.h5", turn_deg=-turn_deg)
    report = import_recordings([path], tmp_path / "data")
    assert report.turn_deg == (-turn_deg) % 360
    straight = write_session(tmp_path / "straight.h5", turn_deg=0)
    import_recordings([straight], tmp_path / "straight")
    key = ContactKey("markers_ft", "a", 2)
    found = Layout(tmp_path / "data").read(key)
    expected = Layout(tmp_path / "straight").read(ContactKey("markers_ft", "straight", 2))
    np.testing.assert_allclose(found.wrench, expected.wrench, atol=2e-6)


def test_torques_are_moved_to_the_gel(tmp_path):
    path = write_session(tmp_path / "a.h5")
    config = ImportConfig(origin_mm=(0.0, 0.0, -LEVER_MM))
    import_recordings([path], tmp_path / "data", config)
    wrench = Layout(tmp_path / "data").read(ContactKey("markers_ft", "a", 0)).wrench
    place = np.random.default_rng(0).uniform(-3, 3, 2)
    np.testing.assert_allclose(wrench[:, 3] / wrench[:, 2] * 1e3, place[1], atol=0.02)
    np.testing.assert_allclose(-wrench[:, 4] / wrench[:, 2] * 1e3, place[0], atol=0.02)


def test_what_is_there_is_kept_and_the_same_files_give_the_same_bytes(tmp_path):
    a, b = write_session(tmp_path / "a.h5"), write_session(tmp_path / "b.h5", seed=1)
    import_recordings([a], tmp_path / "data")
    label = tmp_path / "data/force/markers_ft/a/0/ft.csv"
    original = label.read_bytes()
    label.write_text("mine")
    report = import_recordings([a, b], tmp_path / "data")
    assert (len(report.kept), len(report.written)) == (6, 6)
    assert label.read_text() == "mine"
    import_recordings([a, b], tmp_path / "data", force=True)
    assert label.read_bytes() == original
    import_recordings([a, b], tmp_path / "again")
    files = [path for path in sorted((tmp_path / "data").rglob("*")) if path.is_file()]
    assert len(files) > 12
    for path in files:
        other = tmp_path / "again" / path.relative_to(tmp_path / "data")
        assert other.read_bytes() == path.read_bytes()


def test_segments_that_cannot_be_used_are_named_and_the_others_kept(tmp_path):
    path = write_session(tmp_path / "a.h5")
    with h5py.File(path) as file:
        wrench, stamps = file["force/values"][:], file["vision/timestamp"][:]
        numbers = file["force/segment_id"][:]
    wrench[3] = np.nan
    stamps[FRAMES + 2] = stamps[FRAMES + 1]
    numbers[2 * FRAMES : 3 * FRAMES] = -1
    numbers[3 * FRAMES] = 99
    edit(path, force__values=wrench, vision__timestamp=stamps, force__segment_id=numbers)
    report = import_recordings([path], tmp_path / "data")
    assert [key.number for key in report.written] == [3, 4, 5]
    texts = "\n".join(report.problems)
    for words in ("segment 0: holds NaN", "segment 1: stamps", "belong to no", "segment 99: 1 fr"):
        assert words in texts


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("force__values", np.zeros((72, 3)), r"force/values is \(72, 3\)"),
        ("vision__timestamp", np.zeros(71), "vision/timestamp"),
        ("reference__xyz_ref", np.zeros((4, 3)), "reference/xyz_ref"),
        ("vision__dxyz", np.array([b"text"]), "vision/dxyz"),
    ],
)
def test_another_structure_is_named(tmp_path, name, values, message):
    path = write_session(tmp_path / "a.h5")
    edit(path, **{name: values})
    with pytest.raises(DataError, match=message):
        import_recordings([path], tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_other_columns_missing_data_sets_and_other_files_are_named(tmp_path):
    path = write_session(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        file["force"].attrs["columns"] = "fz,fx,fy,mx,my,mz"
    with pytest.raises(DataError, match="fz,fx,fy"):
        import_recordings([path], tmp_path / "data")
    with h5py.File(path, "a") as file:
        del file["force/segment_id"]
    with pytest.raises(DataError, match="no data set 'force/segment_id'"):
        import_recordings([path], tmp_path / "data")
    (tmp_path / "text.h5").write_text("nothing of the kind")
    with pytest.raises(DataError, match="not a readable HDF5"):
        import_recordings([tmp_path / "text.h5"], tmp_path / "data")


def test_a_session_of_another_sensor_needs_another_name(tmp_path):
    a, b = write_session(tmp_path / "a.h5"), write_session(tmp_path / "b.h5")
    with h5py.File(b) as file:
        rest = file["reference/xyz_ref"][:]
    edit(b, reference__xyz_ref=rest + 2)
    import_recordings([a], tmp_path / "data")
    with pytest.raises(DataError, match="--sensor"):
        import_recordings([b], tmp_path / "data")
    with pytest.raises(DataError, match="px_per_mm"):
        import_recordings([a], tmp_path / "data", ImportConfig(px_per_mm=20))
    import_recordings([b], tmp_path / "data", ImportConfig(sensor="other"))
    assert Layout(tmp_path / "data").sensors() == ["markers_ft", "other"]


def test_import_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    dataset_cli.add_arguments(parser)
    words = ["import", str(write_session(tmp_path / "a.h5")), "-o", str(tmp_path / "data")]
    assert dataset_cli.run(parser.parse_args([*words, "--origin-mm", "0", "0", "-60"])) == 0
    assert "6 contacts with 72 frames" in capsys.readouterr().out


def test_forces_of_real_sessions_are_found_in_their_images(realdata, tmp_path):
    paths = sorted((realdata / "markers_ft").glob("*.h5"))
    report = import_recordings(paths, tmp_path / "data", ImportConfig(origin_mm=(0, 0, -LEVER_MM)))
    assert report.turn_deg == 180
    assert not report.problems
    cache = open_layout(tmp_path / "data")
    assert len(cache) == 416
    rows = cache.select(indenters=[paths[0].stem])
    split = split_contacts(cache, rows, seed=0, validation=0.2)
    frames = [
        np.concatenate([np.r_[cache.rows(row)] for row in part])
        for part in (split.train, split.validation)
    ]
    x = image_changes(cache.images(np.arange(cache.frames)), cache.reference("markers_ft"))
    x = (x - x[frames[0]].mean(0)) / (x[frames[0]].std(0) + 1e-6)
    y = np.array(cache.wrench[:, :3])
    gram = x[frames[0]].T @ x[frames[0]] + 100 * np.eye(x.shape[1])
    level = y[frames[0]].mean(0)
    found = x[frames[1]] @ np.linalg.solve(gram, x[frames[0]].T @ (y[frames[0]] - level)) + level
    rest = ((found - y[frames[1]]) ** 2).sum(0)
    r2 = 1 - rest / ((y[frames[1]] - y[frames[1]].mean(0)) ** 2).sum(0)
    assert r2[0] > 0.85
    assert r2[1] > 0.85
    assert r2[2] > 0.6


def test_sessions_are_scored_within_and_across(tmp_path, monkeypatch):
    field_model = str(tmp_path / "field.safetensors")
    save_checkpoint(field_model, FieldNet(), {"kind": "field"})
    monkeypatch.setattr(experiment_sessions, "STEPS", 2)
    files = [
        str(write_session(tmp_path / f"{name}.h5", presses=12, seed=seed))
        for seed, name in enumerate("ab")
    ]
    text = experiment_sessions.run_sessions(files, field_model, tmp_path / "out", 0)
    assert text.count("| ridge |") == text.count("| ridge, image plane |") == 4
    assert text.count("| compact |") == text.count("| field |") == 4
    results = json.loads((tmp_path / "out/results.json").read_text())
    ridge = {(r["train"], r["test"]): r for r in results if r["method"] == "ridge"}
    assert ridge["a", "a"]["frames"] == 2 * 12  # a fifth of its presses
    assert ridge["a", "b"]["frames"] == 12 * 12
    assert ridge["a", "a"]["r2"]["fz"] > 0.5
    for path in tmp_path.glob("out/models/*/best.safetensors"):
        path.unlink()  # what is scored is not made again
    assert experiment_sessions.run_sessions(files, field_model, tmp_path / "out", 0) == text
    for others, seed in ((files, 1), (files[:1], 0)):
        with pytest.raises(DataError, match="made with other settings"):
            experiment_sessions.run_sessions(others, field_model, tmp_path / "out", seed)
