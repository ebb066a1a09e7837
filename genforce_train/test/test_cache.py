"""The cache gives back what the layout holds, and networks see what the runtime will see."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genforce_collect.errors import DataError
from genforce_collect.layout import Layout, pack, unpack
from genforce_infer.preprocess import area_average
from genforce_train.cache import FORMAT, Cache, block_counts, open_layout, split_contacts
from genforce_train.sequences import area_images


@pytest.fixture
def layout(toy_contact, tmp_path):
    layout = Layout(tmp_path / "data")
    for indenter in ("sphere", "cone"):
        for number in range(5):
            layout.write(toy_contact(number, indenter=indenter, frames=8))
    rest = toy_contact(0, frames=4)
    layout.write_reference("toy", rest.bits[0])
    layout.write_rest("toy", rest.bits[:2], np.zeros((2, 6)))
    return layout


def test_layout_survives_the_cache_byte_for_byte(layout, tmp_path):
    cache = open_layout(layout.root)
    copy = Layout(tmp_path / "copy")
    for key in cache.keys:
        copy.write(cache.contact(key))
    for tree in ("img/toy/sphere", "force", "depth"):
        files = [p for p in (layout.root / tree).rglob("*") if p.is_file()]
        assert files
        for path in files:
            other = copy.root / path.relative_to(layout.root)
            assert other.read_bytes() == path.read_bytes(), path


def test_cache_is_rebuilt_when_a_contact_is_added(layout, toy_contact):
    assert len(open_layout(layout.root)) == 10
    layout.write(toy_contact(9, frames=8))
    assert len(open_layout(layout.root)) == 11


def test_damaged_contacts_are_named_and_the_rest_kept(layout):
    (layout.root / "img/toy/cone/2/0001.npy").unlink()
    cache = open_layout(layout.root)
    assert len(cache) == 9
    assert any("toy/cone/2" in problem for problem in cache.problems)


@pytest.mark.parametrize(
    "name", ["img/toy/cone/2/0001.npy", "force/toy/cone/2/timing.csv", "depth/toy/cone/2/inc_z.csv"]
)
def test_what_was_mended_is_read_again(layout, name):
    path = layout.root / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    (problem,) = open_layout(layout.root).problems
    assert "toy/cone/2" in problem
    path.write_bytes(whole)
    cache = open_layout(layout.root)
    assert (len(cache), cache.problems) == (10, [])


def test_labels_that_are_not_numbers_are_named_with_their_line(layout):
    path = layout.root / "force/toy/cone/2/ft.csv"
    lines = path.read_text().splitlines()
    lines[3] = "nan" + lines[3][lines[3].index(",") :]
    path.write_text("\n".join(lines))
    cache = open_layout(layout.root)
    assert len(cache) == 9
    with pytest.raises(DataError, match=r"toy/cone/2/ft.csv: NaN or infinite labels in line 4"):
        cache.require_finite_labels()


def test_sensor_without_reference_is_named(layout):
    with pytest.raises(DataError, match="other"):
        open_layout(layout.root).reference("other")


def test_rest_frames_are_kept(layout):
    bits, wrench = open_layout(layout.root).rest("toy")
    assert bits.shape == (2, 38400)
    assert not wrench.any()


def test_the_reference_stands_for_frames_at_rest_in_published_data(layout):
    shutil.rmtree(layout.rest)
    cache = open_layout(layout.root)
    bits, wrench = cache.rest("toy")
    np.testing.assert_array_equal(bits, cache.reference("toy")[None])
    assert wrench.shape == (1, 6)
    assert not wrench.any()


def test_what_is_said_of_contacts_is_read_again_where_it_changed(layout):
    assert open_layout(layout.root).sources[0] == {}
    key = open_layout(layout.root).keys[0]
    layout.write_provenance({"contacts": {str(key): {"labels_of": "left"}}})
    assert open_layout(layout.root).sources[0] == {"labels_of": "left"}


def test_processes_that_begin_together_make_the_cache_once(layout):
    script = f"""
import sys, time
from genforce_train import cache
fill = cache._fill
def slowly(*args):
    print("made", flush=True)
    time.sleep(0.5)
    fill(*args)
cache._fill = slowly
assert len(cache.open_layout({str(layout.root)!r})) == 10
"""
    words = [sys.executable, "-c", script]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert "".join(process.communicate()[0] for process in both) == "made\n"
    assert [process.returncode for process in both] == [0, 0]


def test_workers_read_the_same_cache_without_copies_of_it(layout):
    cache = open_layout(layout.root)
    expected = [cache.contact(key) for key in cache.keys]
    assert len(pickle.dumps(cache)) < 1000  # though its frames are mapped by now
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        found = list(pool.map(Cache.contact, [cache] * len(cache), cache.keys))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.bits, other.bits)
        np.testing.assert_array_equal(one.wrench, other.wrench)


def test_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no contacts"):
        open_layout(tmp_path)


def test_splits_are_disjoint_by_contact_and_repeat_with_the_seed(layout):
    cache = open_layout(layout.root)
    rows = cache.select()
    first = split_contacts(cache, rows, seed=3, validation=0.2, unseen=["cone"])
    again = split_contacts(cache, rows, seed=3, validation=0.2, unseen=["cone"])
    assert first == again
    assert sorted(first.train + first.validation + first.test) == rows
    assert {cache.keys[row].indenter for row in first.test} == {"cone"}
    assert len(split_contacts(cache, rows, 3, 0.2, ["cone"], few_shot=2).train) == 2


def test_no_sensor_learns_from_what_another_is_tested_on_whichever_contacts_it_lacks(
    layout, toy_contact
):
    layout.write_reference("other", layout.read_reference("toy"))
    for number in range(5):
        layout.write(toy_contact(number, "other", frames=8))
    cache = open_layout(layout.root)
    whole = split_contacts(cache, cache.select(["other"]), 0, 0.4)
    for row in whole.validation[:1] + whole.train[:1]:  # one that was held out, and another
        shutil.rmtree(layout.forces / str(cache.keys[row]))
    cache = open_layout(layout.root)
    own, other = (
        split_contacts(cache, cache.select([s], ["sphere"]), 0, 0.4) for s in ("toy", "other")
    )
    tested = {cache.keys[row].number for row in (*own.validation, *other.validation)}
    learned = {cache.keys[row].number for row in (*own.train, *other.train)}
    assert other.validation
    assert not tested & learned


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.9))
def test_training_input_is_the_runtime_input(seed, density):
    mask = np.random.default_rng(seed).random((480, 640)) < density
    expected = area_average(mask, (120, 160))
    np.testing.assert_array_equal(block_counts(pack(mask)[None])[0] / np.float32(16), expected)
    np.testing.assert_array_equal(area_images(pack(mask)[None])[0], expected)
    np.testing.assert_array_equal(unpack(pack(mask)), mask)


def test_frames_load_in_any_order_and_number(layout):
    cache = open_layout(layout.root)
    bits = np.concatenate([cache.bits, cache.rest("toy")[0]])
    expected = np.stack([area_average(mask, (120, 160)) for mask in unpack(bits)])
    rows = np.random.default_rng(1).integers(0, len(bits), 37)
    np.testing.assert_array_equal(cache.images(np.arange(len(bits))), expected)
    np.testing.assert_array_equal(cache.images(rows), expected[rows])
    assert cache.images(rows[:0]).shape == (0, 120, 160)
    for beyond in (-1, len(bits)):
        with pytest.raises(IndexError, match=f"of {len(bits)}"):
            cache.images(np.array([3, beyond]))


def test_cache_of_an_older_format_is_rebuilt(layout):
    index = open_layout(layout.root).folder / "index.json"
    index.write_text(index.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    (index.parent / "blocks.npy").unlink()
    with pytest.raises(DataError, match="another format"):
        Cache(index.parent)
    assert len(open_layout(layout.root).images(np.arange(10))) == 10
