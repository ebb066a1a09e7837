"""What other tools read of a data set is what the data set holds."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from genforce_collect.errors import DataError
from genforce_collect.layout import Layout, unpack
from genforce_train import dataset_cli
from genforce_train.cache import open_layout


@pytest.fixture
def layout(toy_contact, tmp_path):
    layout = Layout(tmp_path / "data")
    for sensor in ("left", "right"):
        for number in range(3):
            layout.write(toy_contact(number, sensor=sensor, frames=10 + number))
        rest = toy_contact(0, sensor=sensor, frames=4)
        layout.write_reference(sensor, rest.bits[0])
        layout.write_rest(sensor, rest.bits[:2], np.full((2, 6), 0.01))
    return layout


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    dataset_cli.add_arguments(parser)
    return dataset_cli.run(parser.parse_args(list(map(str, words))))


def unmeasured(contact):
    """The contact as one of a recording without pose, depth, stamps and phases."""
    count = len(contact)
    return replace(
        contact,
        pose=np.full((count, 6), np.nan),
        depth=np.full(count, np.nan),
        phase=np.full(count, 255, np.uint8),
        stamp_ns=np.zeros(count, np.int64),
    )


class TestParquet:
    def test_every_number_and_pixel_comes_back(self, layout, tmp_path, capsys):
        parquet = pytest.importorskip("pyarrow.parquet")
        assert run("export", layout.root, "--format", "parquet", "-o", tmp_path / "out") == 0
        assert "6 contacts with 66 frames" in capsys.readouterr().out
        cache = open_layout(layout.root)
        for sensor in ("left", "right"):
            file = parquet.ParquetFile(tmp_path / f"out/frames/{sensor}.parquet")
            assert file.num_row_groups == 3
            for group, row in enumerate(cache.select([sensor])):
                contact = cache.contact(cache.keys[row])
                table = file.read_row_group(group).to_pydict()
                assert set(table["sensor"]) == {sensor}
                assert set(table["indenter"]) == {contact.key.indenter}
                assert set(table["contact"]) == {contact.key.number}
                assert table["frame"] == list(range(len(contact)))
                assert table["stamp_ns"] == contact.stamp_ns.tolist()
                for names, expected in (
                    (("fx", "fy", "fz", "tx", "ty", "tz"), contact.wrench),
                    (("x", "y", "z", "rx", "ry", "rz"), contact.pose),
                ):
                    found = np.array([table[name] for name in names]).T
                    np.testing.assert_array_equal(found, expected)
                for name in ("phase", "depth", "wrench_age", "pose_age", "flags"):
                    np.testing.assert_array_equal(table[name], getattr(contact, name))
                images = [np.frombuffer(image, np.uint8) for image in table["marker_image"]]
                np.testing.assert_array_equal(images, contact.bits)
            rest = parquet.read_table(tmp_path / f"out/rest/{sensor}.parquet").to_pydict()
            assert rest["fz"] == [0.01, 0.01]
        references = parquet.read_table(tmp_path / "out/references.parquet").to_pydict()
        assert references["sensor"] == ["left", "right"]
        assert references["marker_image"][0] == cache.reference("left").tobytes()

    def test_columns_say_what_they_are(self, layout, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        run("export", layout.root, "--format", "parquet", "-o", tmp_path / "out")
        schema = parquet.read_schema(tmp_path / "out/frames/left.parquet")
        for field in schema:
            assert field.metadata[b"description"], field.name
        units = {field.name: field.metadata[b"unit"].decode() for field in schema}
        assert (units["fz"], units["tz"], units["z"], units["rz"]) == ("N", "N m", "m", "rad")

    def test_what_was_not_measured_is_null(self, toy_contact, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        contact = unmeasured(toy_contact(0))
        Layout(tmp_path / "data").write(contact)
        run("export", tmp_path / "data", "--format", "parquet", "-o", tmp_path / "out")
        table = parquet.read_table(tmp_path / "out/frames/toy.parquet")
        for name in ("x", "depth", "phase", "stamp_ns"):
            assert table[name].null_count == len(contact)
        assert table["fz"].null_count == 0

    def test_nothing_is_overwritten_without_force(self, layout, tmp_path):
        pytest.importorskip("pyarrow")
        words = ("export", layout.root, "--format", "parquet", "-o", tmp_path / "out")
        run(*words)
        file = tmp_path / "out/references.parquet"
        file.write_text("mine")
        with pytest.raises(DataError, match="--force"):
            run(*words)
        assert file.read_text() == "mine"
        run(*words, "--force")
        assert file.read_bytes().startswith(b"PAR1")

    def test_force_replaces_exports_alone(self, layout):
        words = ("export", layout.root, "--format", "parquet", "-o", layout.root, "--force")
        with pytest.raises(DataError, match="no export"):
            run(*words)
        assert len(layout.contacts()) == 6


class TestLeRobot:
    """Run where lerobot is installed: an environment of its own, see requirements/lerobot.txt."""

    def export(self, root: Path, out: Path, *words: str):
        module = pytest.importorskip("lerobot.datasets.lerobot_dataset")
        assert run("export", root, "--format", "lerobot", "-o", out, *words) == 0
        return lambda sensor: module.LeRobotDataset(f"genforce/{sensor}", root=out / sensor)

    def test_its_own_reader_gives_back_frames_and_labels(self, layout, tmp_path):
        opened = self.export(layout.root, tmp_path / "out")
        cache = open_layout(layout.root)
        for sensor in ("left", "right"):
            dataset = opened(sensor)
            rows = cache.select([sensor])
            assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (3, 33, 30)
            assert_same(dataset, [cache.contact(cache.keys[row]) for row in rows])
            reference = cv2.imread(str(tmp_path / f"out/{sensor}/reference.png"), 0)
            np.testing.assert_array_equal(reference > 0, unpack(cache.reference(sensor)))

    def test_what_was_not_measured_has_no_feature(self, toy_contact, tmp_path):
        pytest.importorskip("lerobot")
        contact = unmeasured(toy_contact(0))
        Layout(tmp_path / "data").write(contact)
        Layout(tmp_path / "data").write_reference("toy", contact.bits[0])
        with pytest.raises(DataError, match="--fps"):
            run("export", tmp_path / "data", "--format", "lerobot", "-o", tmp_path / "out")
        dataset = self.export(tmp_path / "data", tmp_path / "out", "--fps", "40")("toy")
        ours = {name for name in dataset.features if name.startswith("observation")}
        assert ours == {"observation.images.markers", "observation.wrench"}
        assert dataset.fps == 40

    def test_without_the_library_its_environment_is_named(self, layout, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "lerobot.datasets.lerobot_dataset", None)
        with pytest.raises(DataError, match=r"requirements/lerobot\.txt"):
            run("export", layout.root, "--format", "lerobot", "-o", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


def assert_same(dataset, contacts) -> None:
    index = 0
    for episode, contact in enumerate(contacts):
        for number in range(len(contact)):
            frame = dataset[index]
            assert int(frame["episode_index"]) == episode
            assert int(frame["frame_index"]) == number
            assert frame["task"] == f"press {contact.key.sensor} with {contact.key.indenter}"
            image = frame["observation.images.markers"].numpy()
            assert image.shape == (3, 480, 640)
            np.testing.assert_array_equal(image[0] > 0.5, unpack(contact.bits[number]))
            for name, expected in (
                ("observation.wrench", contact.wrench),
                ("observation.state", contact.pose),
                ("observation.depth", contact.depth[:, None]),
                ("observation.phase", contact.phase[:, None]),
                ("observation.stamp", (contact.stamp_ns - contact.stamp_ns[0])[:, None] * 1e-9),
            ):
                found = np.atleast_1d(frame[name].numpy())
                np.testing.assert_allclose(found, expected[number], atol=1e-6, err_msg=name)
            index += 1


def test_damaged_contacts_are_named_and_the_others_exported(layout, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    (layout.root / "img/left/sphere/1/0001.npy").unlink()
    words = ("export", layout.root, "--format", "parquet", "-o", tmp_path / "out")
    assert run(*words) == DataError.exit_code
    printed = capsys.readouterr().out
    assert "5 contacts" in printed
    assert "left/sphere/1" in printed
