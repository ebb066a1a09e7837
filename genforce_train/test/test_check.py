"""Data sets are measured and their labels tested before anyone trains on them."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace

import numpy as np
import pytest

from genforce_collect.errors import DataError
from genforce_collect.layout import ContactKey, Layout, pack, unpack
from genforce_train import dataset_cli
from genforce_train.audit import CANNOT_TELL, ENOUGH_CONTACTS, NOT_TRUSTED, audit
from genforce_train.cache import open_layout
from genforce_train.check import check, write_html
from genforce_train.lag import find_lag


def write(root, contacts):
    layout = Layout(root)
    for contact in contacts:
        layout.write(contact)
    layout.write_reference("toy", contacts[0].bits[0])
    layout.write_rest("toy", contacts[0].bits[:1], np.zeros((1, 6)))
    return layout


@pytest.fixture(scope="module")
def contacts(toy_contact):
    return [toy_contact(number, frames=24) for number in range(12)]


def late(contact, shift_s):
    times = (contact.stamp_ns - contact.stamp_ns[0]) * 1e-9
    wrench = np.stack([np.interp(times - shift_s, times, row) for row in contact.wrench.T], 1)
    return replace(contact, wrench=wrench)


def test_true_labels_are_trusted(contacts, tmp_path):
    found = audit(open_layout(write(tmp_path, contacts).root), "toy")
    assert found.trusted
    assert found.r2 > 0.7
    assert found.r2_shuffled < 0.3
    assert found.r2_shifted < found.r2


def test_labels_that_come_late_are_found_with_their_lag(contacts, tmp_path):
    shifted = open_layout(write(tmp_path, [late(c, 0.05) for c in contacts]).root)
    found = audit(shifted, "toy")
    assert found.verdict == NOT_TRUSTED
    assert found.lag.best == pytest.approx(0.05, abs=0.005)
    assert 0 < found.lag.error < 0.005
    assert found.r2 < found.r2_best_lag
    assert "±" in found.line()
    assert "late" in found.reason


def test_the_lag_of_labels_without_stamps_is_counted_in_frames(contacts, tmp_path):
    # The published data have no stamps: here labels come 1.5 frames late.
    period_s = (contacts[0].stamp_ns[1] - contacts[0].stamp_ns[0]) * 1e-9
    bare = [replace(late(c, 1.5 * period_s), stamp_ns=np.zeros(len(c), np.int64)) for c in contacts]
    found = audit(open_layout(write(tmp_path, bare).root), "toy")
    assert found.lag.unit == "frames"
    assert found.verdict == NOT_TRUSTED
    assert found.lag.best == pytest.approx(1.5, abs=0.15)


@pytest.mark.parametrize("shift_s", [-0.05, -0.02, 0.0, 0.02, 0.05])
def test_two_contacts_tell_their_lag(contacts, tmp_path, shift_s):
    layout = write(tmp_path, [late(contact, shift_s) for contact in contacts[1:3]])
    cache = open_layout(layout.root)
    assert find_lag(cache, cache.select()).best == pytest.approx(shift_s, abs=0.005)


def test_a_gel_that_relaxes_reads_as_no_lag(contacts, tmp_path):
    # A sixth of the stress relaxes within half a second, so force runs ahead of the deformation.
    def relaxed(contact):
        strain, past = contact.wrench, np.zeros_like(contact.wrench)
        for row in range(1, len(past)):
            past[row] = past[row - 1] + (strain[row] - past[row - 1]) / 15
        return replace(contact, wrench=strain - past / 6)

    cache = open_layout(write(tmp_path, [relaxed(contact) for contact in contacts]).root)
    assert find_lag(cache, cache.select()).best == pytest.approx(0, abs=0.002)


def test_contacts_too_short_to_shift_are_left_out_of_an_audit(contacts, tmp_path):
    columns = [field.name for field in fields(contacts[0]) if field.name not in ("key", "source")]
    short = [
        replace(
            contact,
            key=replace(contact.key, number=100 + number),
            **{name: getattr(contact, name)[:3] for name in columns},
        )
        for number, contact in enumerate(contacts[:2])
    ]
    cache = open_layout(write(tmp_path, contacts + short).root)
    assert audit(cache, "toy").contacts == len(contacts)
    assert str(find_lag(cache, cache.select()[-2:])) == "?"


def test_contacts_another_sensor_lacks_are_counted(contacts, tmp_path):
    layout = write(tmp_path, contacts[:3])
    layout.write(replace(contacts[0], key=ContactKey("other", "sphere", 0)))
    layout.write_reference("other", contacts[0].bits[0])
    cache = open_layout(layout.root)
    report = check(cache, layout.root, [])
    assert {group.sensor: group.missing for group in report.groups} == {"toy": 0, "other": 2}
    write_html(report, cache, tmp_path / "check.html")
    assert "4 contacts: 2 missing" in (tmp_path / "check.html").read_text()


def shuffled(contacts):
    rng = np.random.default_rng(0)
    return [replace(c, wrench=c.wrench[rng.permutation(len(c))]) for c in contacts]


def test_shuffled_labels_are_not_trusted(toy_contact, tmp_path):
    many = [toy_contact(number, frames=18) for number in range(ENOUGH_CONTACTS)]
    found = audit(open_layout(write(tmp_path, shuffled(many)).root), "toy")
    assert found.verdict == NOT_TRUSTED


def test_an_audit_says_that_it_cannot_tell_and_what_it_needs(contacts, tmp_path):
    few = audit(open_layout(write(tmp_path / "few", contacts[:3]).root), "toy")
    assert few.verdict == CANNOT_TELL
    assert "3 contacts" in few.reason
    assert "needs 8" in few.reason
    assert few.as_dict()["r2"] is None
    # Labels that a model of few contacts finds nothing in may be wrong, or the contacts too few.
    weak = audit(open_layout(write(tmp_path / "weak", shuffled(contacts)).root), "toy")
    assert weak.verdict == CANNOT_TELL
    assert f"needs {ENOUGH_CONTACTS}" in weak.reason


def test_a_pixel_that_changes_in_one_contact_alone_does_not_carry_the_model_away(
    contacts, tmp_path
):
    # So do taxels drawn as discs: a cell that is still in training may be anything elsewhere.
    noise = np.random.default_rng(0)
    speckled = []
    for contact in contacts:
        images = unpack(contact.bits)
        images[:, :40, 10 * contact.key.number : 10 * contact.key.number + 30] ^= (
            noise.random((len(contact), 40, 30)) < 0.5
        )
        speckled.append(replace(contact, bits=pack(images)))
    found = audit(open_layout(write(tmp_path, speckled).root), "toy")
    assert found.r2 > 0.5


def test_check_counts_what_is_there_and_what_is_wrong(contacts, tmp_path):
    rng = np.random.default_rng(0)
    noisy = [
        replace(c, wrench=c.wrench + rng.normal(0, 0.01, c.wrench.shape)) for c in contacts[:3]
    ]
    frozen = noisy[1].bits.copy()
    frozen[2:6] = frozen[2]
    clipped = noisy[2].wrench.copy()
    clipped[:, 2] = np.maximum(clipped[:, 2], -1.0)
    layout = write(
        tmp_path, [noisy[0], replace(noisy[1], bits=frozen), replace(noisy[2], wrench=clipped)]
    )
    (layout.root / "img/toy/sphere/0/0005.npy").unlink()
    cache = open_layout(layout.root)
    report = check(cache, layout.root, [])
    (group,) = report.groups
    assert (group.contacts, group.frames) == (2, 48)
    assert group.duplicate_frames >= 3
    assert group.saturated_contacts == 1
    assert group.force_min[2] == pytest.approx(noisy[1].wrench[:, 2].min(), abs=1e-5)
    assert any("toy/sphere/0" in problem for problem in report.problems)
    write_html(report, cache, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png" in page
    assert "toy/sphere/0" in page


def dataset(*words: object) -> int:
    parser = argparse.ArgumentParser()
    dataset_cli.add_arguments(parser)
    return dataset_cli.run(parser.parse_args([str(word) for word in words]))


def test_what_a_build_leaves_out_is_named_and_makes_it_an_error(bags, tmp_path, capsys):
    bags.write(tmp_path / "bag", numbers=(0, 1), wrench_gap_s=(0.8, 1.0))
    words = ("build", tmp_path / "bag", tmp_path / "none", "-o", tmp_path / "data")
    assert dataset(*words) == DataError.exit_code
    printed = capsys.readouterr().out
    assert "1 contacts with" in printed
    assert f"left out: {tmp_path}/bag: contact toy/sphere/0: nearest wrench" in printed
    assert f"left out: {tmp_path}/none" in printed
    with pytest.raises(DataError, match="none"):
        dataset("build", tmp_path / "none", "-o", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_commands_build_check_and_audit(bags, tmp_path, capsys):
    bags.write(tmp_path / "bag", numbers=tuple(range(8)))
    assert dataset("build", tmp_path / "bag", "-o", tmp_path / "data") == 0
    assert "8 contacts" in capsys.readouterr().out
    assert dataset("check", tmp_path / "data") == 0
    report = json.loads((tmp_path / "data/report.json").read_text())
    assert report["groups"][0]["contacts"] == 8
    assert report["groups"][0]["lag"] == pytest.approx(0, abs=0.005)
    assert dataset("audit", tmp_path / "data", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["verdict"] == "trusted"
    # One way of estimating a lag: what an audit finds, a check of the same contacts finds.
    assert found["best_lag"] == report["groups"][0]["lag"]
    assert json.loads((tmp_path / "data/audit/report.json").read_text()) == [found]
    page = (tmp_path / "data/audit/report.html").read_text()
    assert "Labels of data" in page
    assert "data:image/png" in page
