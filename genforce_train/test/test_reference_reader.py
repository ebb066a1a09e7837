"""The published rules, written out anew here, read what is built; and what others laid out by them
is read, checked and judged here."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from genforce_collect.layout import Layout, unpack
from genforce_train import dataset_cli
from genforce_train.build import build
from genforce_train.cache import open_layout, split_contacts


class ReferenceReader:
    """Reads a data set by its published description alone; nothing of the project is used."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def mask(self, path: Path) -> np.ndarray:
        return np.unpackbits(np.load(path)).reshape(480, 640)

    def images(self, contact: str) -> list[np.ndarray]:
        names = sorted((self.root / "img" / contact).glob("*.npy"))
        assert [path.name for path in names] == [f"{i:04d}.npy" for i in range(len(names))]
        return [self.mask(path) for path in names]

    def forces(self, contact: str) -> np.ndarray:
        with (self.root / "force" / contact / "ft.csv").open() as file:
            rows = list(csv.DictReader(file))
        names = ("Fx(N)", "Fy(N)", "Fz(N)", "Tx(Nmm)", "Ty(Nmm)", "Tz(Nmm)")
        return np.array([[float(row[name]) for name in names] for row in rows])

    def depths(self, contact: str) -> list[np.ndarray]:
        folder = self.root / "depth" / contact
        return [np.loadtxt(folder / name, ndmin=1) for name in ("inc_z.csv", "dec_z.csv")]

    def pair_frames(self, contact: str) -> list[Path]:
        """Frame 0000 and the last frames of the first three phases."""
        last = (self.root / "img" / contact / "last.csv").read_text().split()[:3]
        return [self.root / "img" / contact / "0000.npy", *(self.root / "img" / p for p in last)]

    def reference(self, sensor: str) -> np.ndarray:
        return self.mask(self.root / "img" / f"{sensor}_ref.npy")


def test_the_published_rules_read_what_is_built(bags, tmp_path):
    for sensor in ("left", "right"):
        bags.write(tmp_path / sensor, numbers=(0, 1), sensor=sensor)
    build([tmp_path / "left", tmp_path / "right"], tmp_path / "data")
    theirs, ours = ReferenceReader(tmp_path / "data"), Layout(tmp_path / "data")
    assert len(ours.contacts()) == 4
    for key in ours.contacts():
        contact, name = ours.read(key), f"{key.sensor}/{key.indenter}/{key.number}"
        np.testing.assert_array_equal(theirs.images(name), unpack(contact.bits))
        forces = theirs.forces(name)
        np.testing.assert_allclose(forces[:, :3], contact.wrench[:, :3], atol=1e-9)
        np.testing.assert_allclose(forces[:, 3:], contact.wrench[:, 3:] * 1e3, atol=1e-9)
        loading, unloading = theirs.depths(name)
        np.testing.assert_allclose(np.r_[loading, unloading], contact.depth, atol=1e-9)
        assert len(loading) == np.isin(contact.phase, (2, 3)).sum()
        assert len(theirs.images(name)) == len(forces)
    np.testing.assert_array_equal(theirs.reference("left"), unpack(ours.read_reference("left")))


def test_the_published_rules_find_four_pairs_a_contact(bags, tmp_path):
    for sensor in ("left", "right"):
        bags.write(tmp_path / sensor, numbers=(0,), sensor=sensor)
    build([tmp_path / "left", tmp_path / "right"], tmp_path / "data")
    theirs = ReferenceReader(tmp_path / "data")
    pairs = [theirs.pair_frames(f"{sensor}/sphere/0") for sensor in ("left", "right")]
    assert [len(frames) for frames in pairs] == [4, 4]
    for one, other in zip(*pairs, strict=True):
        # The same displacement looks the same on both, within the frame's time.
        same = (theirs.mask(one) == theirs.mask(other)).mean()
        assert same > 0.99


def write_published(root: Path, contacts, images: str, suffix: str, depth: bool) -> None:
    """Lay contacts out as the published sets are: no stamps, no rest, no pose."""
    for contact in contacts:
        key = contact.key
        folder = root / images / key.sensor / key.indenter / str(key.number)
        folder.mkdir(parents=True)
        for number, mask in enumerate(unpack(contact.bits)):
            write_mask(folder / f"{number:04d}{suffix}", mask)
        ends = [f"{key}/{number:04d}{suffix}\n" for number in contact.last_frames()]
        lists = root / images.replace("npy", "npy_csv") / str(key)
        lists.mkdir(parents=True, exist_ok=True)
        (lists / "last.csv").write_text("".join(ends))
        force = root / "force" / str(key)
        force.mkdir(parents=True)
        scaled = contact.wrench * (1, 1, 1, 1e3, 1e3, 1e3)
        np.savetxt(
            force / "ft.csv",
            scaled,
            fmt="%.5f",
            delimiter=",",
            header="Fx(N),Fy(N),Fz(N),Tx(Nmm),Ty(Nmm),Tz(Nmm)",
            comments="",
        )
        if depth:
            place = root / "depth" / str(key)
            place.mkdir(parents=True)
            deepest = int(np.argmax(contact.depth)) + 1
            np.savetxt(place / "inc_z.csv", contact.depth[:deepest])
            np.savetxt(place / "dec_z.csv", contact.depth[deepest:])
    for sensor in {contact.key.sensor for contact in contacts}:
        write_mask(root / "img" / f"{sensor}_ref{suffix}", unpack(contacts[0].bits[0]))


def write_mask(path: Path, mask: np.ndarray) -> None:
    if path.suffix == ".jpg":
        cv2.imwrite(str(path), mask * 255)
    else:
        np.save(path, np.packbits(mask))


@pytest.mark.parametrize(
    ("images", "suffix", "depth"),
    [("img/npy", ".npy", False), ("img", ".npy", True), ("img", ".jpg", True)],
    ids=["homogeneous", "softness", "heterogeneous"],
)
def test_published_sets_are_read_checked_and_audited(
    toy_contact, tmp_path, capsys, images, suffix, depth
):
    contacts = [
        toy_contact(number, sensor="a", indenter=indenter)
        for indenter in ("sphere", "cone")
        for number in range(5)
    ]
    write_published(tmp_path / "data", contacts, images, suffix, depth)
    parser = argparse.ArgumentParser()
    dataset_cli.add_arguments(parser)
    assert dataset_cli.run(parser.parse_args(["check", str(tmp_path / "data")])) == 0
    printed = capsys.readouterr().out
    assert "trusted" in printed
    report = json.loads((tmp_path / "data/report.json").read_text())
    assert [group["contacts"] for group in report["groups"]] == [5] * 2
    assert {audit["unit"] for audit in report["audits"]} == {"frames"}
    cache = open_layout(tmp_path / "data")
    assert not cache.problems
    contact = cache.contact(contacts[0].key)
    np.testing.assert_allclose(contact.wrench, contacts[0].wrench, atol=1e-5)
    assert np.isfinite(contact.depth).all() == depth
    split = split_contacts(cache, cache.select(["a"]), seed=0, unseen=["cone"])
    assert {cache.keys[row].indenter for row in split.test} == {"cone"}
    assert Layout(tmp_path / "data").read_last(contacts[0].key) == contacts[0].last_frames()
