"""Bags become the training layout, whole contacts only, with labels at the frames' stamps."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from genforce_collect.errors import DataError
from genforce_collect.layout import ContactKey, Layout, pack, unpack
from genforce_train.build import (
    BagContents,
    BuildConfig,
    Stream,
    _Markers,
    _Samples,
    build,
    join,
    majority,
    open_data,
)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20_000])


def write_lines(root: Path, *rows: str) -> None:
    text = "\n".join(["Fx(N),Fy(N),Fz(N)", *rows])
    (root / "force/toy/sphere/0/ft.csv").write_text(text)


def tree_bytes(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_labels_are_those_of_the_stamp_of_each_frame(bags, tmp_path):
    truth = bags.write(tmp_path / "bag", numbers=(3, 4))
    build([tmp_path / "bag"], tmp_path / "data")
    for key in Layout(tmp_path / "data").contacts():
        contact = Layout(tmp_path / "data").read(key)
        expected = truth.tip_mm(contact.stamp_ns) * (1.5, 1.5, 4.0)
        assert np.isin(contact.stamp_ns, truth.frame_stamps).all()
        np.testing.assert_allclose(contact.wrench[:, :3], expected, atol=0.02)
        np.testing.assert_allclose(
            contact.pose[:, :3] * 1e3, truth.tip_mm(contact.stamp_ns), atol=5e-3
        )
        assert contact.wrench_age.max() <= 0.5e-3 + 1e-9
        assert len(contact) in (29, 30, 31)


def test_layout_is_the_published_one(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0,))
    build([tmp_path / "bag"], tmp_path / "data")
    root = tmp_path / "data"
    images = sorted((root / "img/toy/sphere/0").glob("*.npy"))
    assert images[0].name == "0000.npy"
    first = np.load(images[0])
    assert first.shape == (38400,)
    assert first.dtype == np.uint8
    header, *rows = (root / "force/toy/sphere/0/ft.csv").read_text().splitlines()
    assert header == "Fx(N),Fy(N),Fz(N),Tx(Nmm),Ty(Nmm),Tz(Nmm)"
    assert len(rows) == len(images)
    last = np.loadtxt(root / "img/toy/sphere/0/last.csv", dtype=str)
    assert len(last) == 4
    assert Path(last[-1]).name == images[-1].name
    depths = [np.loadtxt(root / f"depth/toy/sphere/0/{n}.csv") for n in ("inc_z", "dec_z")]
    assert sum(map(len, depths)) == len(images)
    reference = np.load(root / "img/toy_ref.npy")
    assert np.unpackbits(reference).reshape(480, 640).sum() > 0
    assert {path.name for path in (root / "force/toy/sphere").iterdir()} == {"0"}


def test_broken_off_contacts_are_left_out(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0, 1, 2), broken=(1,))
    report = build([tmp_path / "bag"], tmp_path / "data")
    assert [key.number for key in Layout(tmp_path / "data").contacts()] == [0, 2]
    assert report.broken_off == 1


def test_same_bags_give_the_same_bytes_and_more_bags_add_contacts(bags, tmp_path):
    bags.write(tmp_path / "a", numbers=(0, 1))
    bags.write(tmp_path / "b", numbers=(2,))
    build([tmp_path / "a"], tmp_path / "one")
    report = build([tmp_path / "a", tmp_path / "b"], tmp_path / "one")
    assert (len(report.written), len(report.kept)) == (1, 2)
    build([tmp_path / "a", tmp_path / "b"], tmp_path / "two")
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")
    provenance = json.loads((tmp_path / "one/provenance.json").read_text())
    assert set(provenance["bags"]) == {"a", "b"}
    assert provenance["contacts"]["toy/sphere/2"]["bag"] == "b"


def test_force_replaces_what_is_there(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0,))
    build([tmp_path / "bag"], tmp_path / "data")
    label = tmp_path / "data/force/toy/sphere/0/ft.csv"
    original = label.read_bytes()
    label.write_text("Fx(N),Fy(N),Fz(N)\n")
    build([tmp_path / "bag"], tmp_path / "data")
    assert label.read_bytes() != original
    build([tmp_path / "bag"], tmp_path / "data", force=True)
    assert label.read_bytes() == original


def test_of_what_several_bags_hold_the_first_counts_also_with_force(bags, tmp_path):
    bags.write(tmp_path / "a", numbers=(0,))
    bags.write(tmp_path / "b", numbers=(0, 1))
    build([tmp_path / "a", tmp_path / "b"], tmp_path / "data")
    before = tree_bytes(tmp_path / "data")
    build([tmp_path / "a", tmp_path / "b"], tmp_path / "data", force=True)
    assert tree_bytes(tmp_path / "data") == before


@pytest.mark.parametrize("broken", ["write_rest", "write_reference", "write_provenance", "write"])
def test_a_build_that_was_broken_off_is_mended_by_building_again(
    bags, tmp_path, monkeypatch, broken
):
    bags.write(tmp_path / "bag", numbers=(0, 1))
    build([tmp_path / "bag"], tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Layout, broken, interrupted(getattr(Layout, broken)))
        with pytest.raises(KeyboardInterrupt):
            build([tmp_path / "bag"], tmp_path / "data")
    build([tmp_path / "bag"], tmp_path / "data")
    assert tree_bytes(tmp_path / "data") == tree_bytes(tmp_path / "whole")


def interrupted(work):
    """Does its work, and is interrupted at the end of it."""

    def wrapper(*args, **kwargs):
        work(*args, **kwargs)
        raise KeyboardInterrupt

    return wrapper


def test_unusable_frames_are_dropped_and_counted(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0,), flags=lambda frame: 1024 if frame == 20 else 0)
    build([tmp_path / "bag"], tmp_path / "data")
    contact = Layout(tmp_path / "data").read(ContactKey("toy", "sphere", 0))
    assert contact.source["unusable_frames"] == 1
    assert contact.flags.max() == 0


def test_contact_in_a_gap_of_the_wrench_is_named_and_the_others_kept(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0, 1), wrench_gap_s=(0.8, 1.0))
    report = build([tmp_path / "bag"], tmp_path / "data")
    assert [key.number for key in report.written] == [1]
    assert "toy/sphere/0" in report.problems[0]
    assert "wrench" in report.problems[0]


def test_missing_reference_is_named(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0,), rest=False)
    report = build([tmp_path / "bag"], tmp_path / "data")
    assert any("no reference" in problem for problem in report.problems)
    with pytest.raises(DataError, match="toy_ref"):
        Layout(tmp_path / "data").read_reference("toy")


def test_a_reference_is_kept_unless_forced_and_made_again_where_it_is_missing(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0,))
    layout = Layout(tmp_path / "data")
    mine = np.zeros(38400, np.uint8)
    layout.write_reference("toy", mine)
    build([tmp_path / "bag"], layout.root)
    np.testing.assert_array_equal(layout.read_reference("toy"), mine)
    build([tmp_path / "bag"], layout.root, force=True)
    made = layout.read_reference("toy")
    assert made.any()
    (layout.root / "img/toy_ref.npy").unlink()
    build([tmp_path / "bag"], layout.root)
    np.testing.assert_array_equal(layout.read_reference("toy"), made)


def test_a_bag_of_another_cell_is_named_and_the_others_are_built(bags, tmp_path):
    bags.write(tmp_path / "a", numbers=(0,), cell="virtual")
    bags.write(tmp_path / "b", numbers=(1,), cell="lab")
    bags.write(tmp_path / "d", numbers=(3,), cell="virtual")
    paths = [tmp_path / name for name in "abcd"]  # there is no c
    report = build(paths, tmp_path / "data")
    assert [problem.split(":")[0] for problem in report.problems] == list(map(str, paths[1:3]))
    assert "'lab'" in report.problems[0]
    layout = Layout(tmp_path / "data")
    assert [key.number for key in layout.contacts()] == [0, 3]
    assert list(layout.provenance()["bags"]) == ["a", "d"]
    with pytest.raises(DataError, match=str(tmp_path / "c")):
        build(paths[2:3], tmp_path / "nothing")


def test_memory_does_not_grow_with_the_length_of_a_bag():
    samples, markers = _Samples(6), _Markers(None)
    data, image = bytes(100), SimpleNamespace(flags=0, mask=np.zeros(38400, np.uint8))
    tracemalloc.start()
    for stamp in range(50_000):  # 2.8 MB
        samples.add(stamp, data)
    for stamp in range(200):  # 7.7 MB
        markers.add(stamp, image)
    stream, frames = samples.stream("none"), markers.frames()
    values, age = stream.at(np.arange(0, 50_000, 500))
    assert (values.shape, age.max(), frames.bits[50:60].shape) == ((100, 6), 0, (10, 38400))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_samples_that_come_out_of_order_are_brought_in_order():
    rng = np.random.default_rng(0)
    order, values = rng.permutation(600), rng.random((600, 6))
    bits = rng.integers(0, 256, (600, 38400), np.uint8)
    samples, markers = _Samples(6), _Markers(None)
    for row in order:
        samples.add(int(row), b"header" + values[row].tobytes())
        markers.add(int(row), SimpleNamespace(flags=row, mask=bits[row]))
    stream, frames = samples.stream("none"), markers.frames()
    for found, expected in (
        (stream.stamp_ns, np.arange(600)),
        (stream.values, values),
        (frames.stamp_ns, np.arange(600)),
        (frames.flags, np.arange(600)),
        (frames.bits, bits),
    ):
        np.testing.assert_array_equal(found, expected)


def test_between_the_two_quaternions_of_a_rotation_is_that_rotation():
    turn = np.array([0.0, 0.0, np.sin(0.4), np.cos(0.4)])
    values = np.zeros((2, 7))
    values[:, 3:] = turn, -turn
    pose, _ = Stream(np.array([0, 10]), values).at(np.array([2, 5]))
    np.testing.assert_allclose(pose[:, 3:], [turn, turn])


def test_a_bag_without_markers_is_segmented_from_its_images(bags, tmp_path):
    bags.write(tmp_path / "live", numbers=(0,))
    bags.write(tmp_path / "images", numbers=(0,), markers=False, images=True)
    build([tmp_path / "live"], tmp_path / "a")
    build([tmp_path / "images"], tmp_path / "b")
    key = ContactKey("toy", "sphere", 0)
    live, found = Layout(tmp_path / "a").read(key), Layout(tmp_path / "b").read(key)
    assert found.source["segmented"]
    np.testing.assert_array_equal(found.wrench, live.wrench)
    masks, expected = unpack(found.bits), unpack(live.bits)
    assert (masks & expected).sum() / (masks | expected).sum() > 0.8


def test_markers_are_found_anew_where_that_is_asked_for(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0,), images=True, flags=lambda frame: 64)
    assert build([tmp_path / "bag"], tmp_path / "a").problems
    report = build([tmp_path / "bag"], tmp_path / "b", BuildConfig(resegment=True))
    assert len(report.written) == 1
    assert not report.problems


def test_images_of_an_unknown_sensor_need_its_settings(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0,), markers=False, images=True, sensor_config=False)
    with pytest.raises(DataError, match="--sensor"):
        build([tmp_path / "bag"], tmp_path / "data")
    config = BuildConfig(sensor=bags.sensor("toy"))
    assert len(build([tmp_path / "bag"], tmp_path / "data", config).written) == 1


def test_bags_are_a_source_for_training_like_the_layout_built_from_them(bags, tmp_path):
    bags.write(tmp_path / "bags/a", numbers=(0, 1))
    bags.write(tmp_path / "bags/b", numbers=(1, 2))
    build([tmp_path / "bags/a", tmp_path / "bags/b"], tmp_path / "data")
    straight, through = open_data(tmp_path / "bags"), open_data(tmp_path / "data")
    assert straight.keys == through.keys
    np.testing.assert_array_equal(straight.bits, through.bits)
    np.testing.assert_array_equal(straight.array("stamp_ns"), through.array("stamp_ns"))
    for name in ("wrench", "pose", "depth", "wrench_age"):
        np.testing.assert_allclose(straight.array(name), through.array(name), atol=1e-6)
    np.testing.assert_array_equal(straight.reference("toy"), through.reference("toy"))
    np.testing.assert_array_equal(straight.rest("toy")[0], through.rest("toy")[0])
    assert [source["bag"] for source in straight.sources] == ["a", "a", "b"]
    assert len(open_data(tmp_path / "bags/b")) == 2


def test_bags_are_read_again_only_after_they_changed(bags, tmp_path, monkeypatch):
    bags.write(tmp_path / "bags/a", numbers=(0,))
    open_data(tmp_path / "bags")
    reads = []
    read = BagContents.read
    monkeypatch.setattr(BagContents, "read", lambda *words: reads.append(words) or read(*words))
    open_data(tmp_path / "bags")
    assert not reads
    bags.write(tmp_path / "bags/b", numbers=(1,))
    assert len(open_data(tmp_path / "bags")) == 2
    assert len(reads) == 2


def test_damaged_parts_of_bags_are_named_and_the_rest_is_trained_on(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0, 1), wrench_gap_s=(0.8, 1.0), rest=False)
    cache = open_data(tmp_path / "bag")
    assert [key.number for key in cache.keys] == [1]
    assert any("wrench" in problem for problem in cache.problems)
    assert any("no reference" in problem for problem in cache.problems)
    bags.write(tmp_path / "mixed/a", numbers=(0,), cell="virtual")
    bags.write(tmp_path / "mixed/b", numbers=(1,), cell="lab")
    with pytest.raises(DataError, match="'lab', 'virtual'"):
        open_data(tmp_path / "mixed")
    assert {path.name for path in (tmp_path / "mixed").iterdir()} == {"a", "b"}
    with pytest.raises(DataError, match="no contacts"):
        open_data(tmp_path / "nothing")


def test_a_folder_that_is_no_bag_is_named(tmp_path):
    with pytest.raises(DataError, match="nothing"):
        BagContents.read(tmp_path / "nothing")


def test_frames_carry_the_phase_that_was_active(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0,))
    bag = BagContents.read(tmp_path / "bag")
    contact = join(bag, bag.attempts[0])
    start = bag.attempts[0].starts_ns[0]
    quarter = (contact.stamp_ns - start) // 250_000_000
    np.testing.assert_array_equal(contact.phase, quarter + 2)


def test_written_contact_reads_back_the_same(toy_contact, tmp_path):
    layout = Layout(tmp_path)
    contact = toy_contact(2)
    layout.write(contact)
    again = layout.read(contact.key)
    np.testing.assert_array_equal(again.bits, contact.bits)
    np.testing.assert_allclose(again.wrench, contact.wrench, atol=1e-6)
    np.testing.assert_allclose(again.depth, contact.depth, atol=1e-6)
    np.testing.assert_array_equal(again.stamp_ns, contact.stamp_ns)
    np.testing.assert_array_equal(again.phase, contact.phase)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "img/toy/sphere/0/0003.npy").unlink(), "23 frames for 24 rows"),
        (lambda root: (root / "img/toy/sphere/0/0003.npy").write_bytes(b"\x93NUMPY"), "0003.npy"),
        (
            lambda root: (root / "force/toy/sphere/0/ft.csv").write_text("Fx(lb),Fy(N),Fz(N)\n"),
            "columns Fx",
        ),
        (
            lambda root: (root / "force/toy/sphere/0/ft.csv").write_text("Fy(N),Fx(N),Fz(N)\n"),
            "columns Fy",
        ),
        (
            lambda root: (root / "force/toy/sphere/0/ft.csv").write_text("Fx(N),Fy(N),Fz(N)\n"),
            "no rows|frames for 0 rows",
        ),
        (lambda root: truncate(root / "img/toy/sphere/0/0003.npy"), "0003.npy"),
        (lambda root: (root / "force/toy/sphere/0/pose.csv").write_text("X(m)\n"), "pose.csv"),
        (
            lambda root: write_lines(root, "1,2,3", "1,two,3"),
            r"ft\.csv: line 3: .*'two'",
        ),
        (lambda root: write_lines(root, "1,2,3", "1,2"), r"ft\.csv: line 3: 2 values in 3 columns"),
        (
            lambda root: np.save(
                root / "img/toy/sphere/0/0003.npy", np.zeros((240, 320), np.uint8)
            ),
            r"0003\.npy: marker image of shape \(240, 320\)",
        ),
    ],
)
def test_damage_is_named_with_its_file(toy_contact, tmp_path, damage, message):
    layout = Layout(tmp_path)
    contact = toy_contact(0)
    layout.write(contact)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        layout.read(contact.key)


def test_three_column_labels_and_jpeg_frames_of_others_are_read(toy_contact, tmp_path):
    import cv2

    contact = toy_contact(0)
    images = tmp_path / "img/npy/toy/sphere/0"
    images.mkdir(parents=True)
    for number, mask in enumerate(unpack(contact.bits)):
        cv2.imwrite(str(images / f"{number:04d}.jpg"), mask * 255)
    force = tmp_path / "force/toy/sphere/0"
    force.mkdir(parents=True)
    rows = "".join(f"{row[0]:f},{row[1]:f},{row[2]:f}\n" for row in contact.wrench)
    (force / "ft.csv").write_text("Fx(N),Fy(N),Fz(N)\n" + rows)
    again = Layout(tmp_path).read(contact.key)
    assert (again.bits != contact.bits).mean() < 0.01
    np.testing.assert_allclose(again.wrench[:, :3], contact.wrench[:, :3], atol=1e-5)


def test_majority_outvotes_a_speck():
    masks = np.zeros((3, 480, 640), np.uint8)
    masks[:, 100:110, 100:110] = 1
    masks[1, 0, 0] = 1
    assert unpack(majority(pack(masks))).sum() == 100
