"""Experiments: what is made, made once, refused, and that no target label leaks."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import Layout
from genforce_train import experiment_work
from genforce_train.borrow import borrowed_wrench, partners
from genforce_train.cache import open_layout
from genforce_train.checkpoint import load_checkpoint, save_checkpoint
from genforce_train.evaluate import of_peak
from genforce_train.experiment import EXPERIMENTS, ROADS, Recipe, carry_out, methods
from genforce_train.experiment_report import curves, of_oracle, report
from genforce_train.models.encoder import MarkerEncoder
from genforce_train.models.field import FieldNet
from genforce_train.train_force import ForceSettings, split_of
from genforce_train.train_force import train as train_force
from genforce_train.train_m2m import M2mSettings, pairs_of

SENSORS = ("toy_a", "toy_b")


@pytest.fixture(scope="module")
def data(tmp_path_factory, toy_contact):
    return write(tmp_path_factory.mktemp("data"), toy_contact)


def write(root, toy_contact, label_scale=1.0, indenters=("sphere", "cone"), numbers=range(4)):
    """Two sensors whose contacts pair; `label_scale` is on the second one's labels."""
    layout = Layout(root)
    for sensor, scale in zip(SENSORS, (1.0, label_scale), strict=True):
        for indenter in indenters:
            for number in numbers:
                contact = toy_contact(number, sensor, indenter, frames=12)
                layout.write(replace(contact, wrench=contact.wrench * scale))
        rest = toy_contact(0, sensor, frames=4)
        layout.write_reference(sensor, rest.bits[0])
        layout.write_rest(sensor, rest.bits[:1].repeat(8, 0), np.zeros((8, 6)))
    return layout.root


@pytest.fixture(scope="module")
def field_model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("field") / "field.safetensors"
    save_checkpoint(path, FieldNet(), {"kind": "field"})
    return str(path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_checkpoint(path, MarkerEncoder(8), {"kind": "encoder", "width": 8})
    return str(path)


@pytest.fixture(scope="module")
def recipe(data, field_model, encoder):
    return Recipe(
        experiment="homogeneous",
        pairs=(SENSORS, SENSORS[::-1]),
        field_model=field_model,
        contacts=4,
        roads=ROADS,
        shots=(1,),
        steps=2,
        adapt_steps=1,
        m2m_steps=1,
        seed=0,
        encoder=encoder,
        painter_steps=2,
        data=str(data),
    )


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, carry_out(recipe, out, workers=1)


def test_every_pair_and_method_is_scored_once(recipe, finished):
    tmp_path, results = finished
    names = {method.name for method in methods(recipe)}
    assert len(results) == 2 * len(names) * 2  # pairs, methods, seen and unseen
    assert {result["method"] for result in results} == names
    made = sorted((*tmp_path.glob("models/*/*"), *tmp_path.glob("scores/*")))
    stamps = [path.stat().st_mtime_ns for path in made]
    lost = [tmp_path / "scores/toy_a_field_on_toy_b.json", tmp_path / "models/toy_b_field"]
    lost[0].unlink()
    (lost[1] / "metrics.json").unlink()  # as when it was killed in training
    assert carry_out(recipe, tmp_path, workers=2) == results  # and to the same numbers
    changed = [p for p, t in zip(made, stamps, strict=True) if p.stat().st_mtime_ns != t]
    assert changed
    assert all(p == lost[0] or p.parent == lost[1] for p in changed)


def test_no_model_learns_from_presses_it_is_tested_on(data, recipe, finished):
    out, _ = finished
    cache = open_layout(data)
    tested = {
        (cache.keys[row].indenter, cache.keys[row].number)
        for sensor in SENSORS
        for rows in experiment_work.tests(cache, sensor, recipe.seed).values()
        for row in rows
    }
    stages = set()
    for path in out.glob("models/*/best.safetensors"):
        saved = load_checkpoint(path).meta
        if saved["kind"] == "m2m":
            pairs = pairs_of(M2mSettings.model_validate(saved["settings"]))
            names = pairs.contacts[pairs.uses["train"]]
            learned = {(indenter, int(n)) for indenter, n in (name.split("/") for name in names)}
        else:
            settings = ForceSettings.model_validate(saved["settings"])
            own = open_layout(settings.data)
            keys = [own.keys[row] for row in split_of(settings, own).train]
            learned = {(key.indenter, key.number) for key in keys}
        assert learned
        assert not learned & tested, path.parent.name
        stages.add(path.parent.name.removeprefix("toy_a-toy_b_"))
    assert {"field_1", "field_redrawn", "m2m_field_1", "toy_a_field"} <= stages


def test_report_compares_with_the_oracle(recipe, finished):
    tmp_path, results = finished
    text = report(results, recipe, tmp_path)
    assert "toy_a → toy_b, field, 1 pairs" in text
    assert (tmp_path / "table.md").read_text() == text
    assert (tmp_path / "radar_unseen.png").is_file()
    assert "toy_a → toy_b, field, 1 pairs" in (tmp_path / "report.html").read_text()
    unseen = [result for result in results if result["indenters"] == "unseen"]
    oracles = [result for result in unseen if result["method"] == "oracle"]
    assert all(of_oracle(result, unseen) == 1 for result in oracles)
    poor = replace_mae(oracles[0], 2.0)
    assert of_oracle(poor, unseen) == pytest.approx(2)


def replace_mae(result, factor):
    return result | {"mae": {axis: factor * mae for axis, mae in result["mae"].items()}}


def test_adaptation_does_not_see_the_targets_labels(toy_contact, tmp_path):
    weights = []
    for scale in (1.0, 7.0):
        root = write(tmp_path / f"{scale}", toy_contact, scale, ("sphere",))
        settings = ForceSettings(
            data=str(root),
            out=str(tmp_path / f"out{scale}"),
            sensors=("toy_b",),
            labels_of="toy_a",
            few_shot=2,
            validation=0,
            steps=4,
            frames=16,
            windows=(8,),
            evaluate_every=1,
        )
        train_force(settings, quiet=True)
        weights.append(load_checkpoint(tmp_path / f"out{scale}/best.safetensors").model)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_borrowed_labels_follow_the_way_and_not_the_clock(toy_contact, tmp_path):
    layout = Layout(tmp_path)
    whole = toy_contact(0, "toy_a", frames=40)
    layout.write(whole)
    rows = np.r_[0, 1:40:2]  # fewer frames; the last of each phase is among them
    fields = ("bits", "wrench", "pose", "depth", "phase", "stamp_ns", "wrench_age", "pose_age")
    some = {name: getattr(whole, name)[rows] for name in (*fields, "flags")}
    layout.write(replace(whole, key=replace(whole.key, sensor="toy_b"), **some))
    for sensor in SENSORS:
        layout.write_reference(sensor, whole.bits[0])
    cache = open_layout(tmp_path)
    (target,) = cache.select(["toy_b"])
    (source,) = partners(cache, [target], "toy_a")
    # Where shear turns the toy's tip goes on for a frame: a tenth of the peak.
    np.testing.assert_allclose(
        borrowed_wrench(cache, target, source), whole.wrench[rows], atol=0.13
    )


def test_other_gels_are_compared_by_each_way_to_their_labels_and_as_much_training(recipe, finished):
    """By redrawn contacts of one kind, curves, slides; and the oracle in as many steps."""
    gels = replace(recipe, experiment="softness", roads=("field",), shots=(4, 10))
    names = [method.name for method in methods(gels)]
    assert names[3:9] == [
        "field, redrawn, compensated",
        "field, 4 pairs, compensated",
        "field, 4 pairs, calibrated",
        "field, 10 pairs, compensated",
        "field, 10 pairs, calibrated",
        "field, slides",
    ]
    assert names[-3:] == [
        "field, 0 pairs, compensated, 3 steps",
        "oracle, 3 steps",
        "oracle on the field, 3 steps",
    ]
    shapes = methods(replace(gels, experiment="heterogeneous"))
    assert not any(method.redrawn for method in shapes)
    some = replace(gels, methods=("field, 10 pairs, calibrated",))
    assert [method.name for method in methods(some)] == ["field, 10 pairs, calibrated", "oracle"]
    with pytest.raises(ConfigError, match="'field, 3 pairs': not one of 'source-only', 'field, 0"):
        methods(replace(gels, methods=("field, 3 pairs",)))
    results = [{**finished[1][0], "indenters": "unseen", "method": name} for name in names]
    assert b"PNG" in curves(results).data[:8]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": (("toy_a", "toy_c"),)}, "no sensor toy_c"),
        ({"field_model": "nowhere.safetensors"}, "nowhere.safetensors: no such checkpoint"),
        ({"encoder": "nowhere.safetensors"}, "nowhere.safetensors: no such checkpoint"),
    ],
)
def test_what_cannot_do_is_refused_by_name(recipe, tmp_path, changes, words):
    with pytest.raises(DataError, match=words):
        carry_out(replace(recipe, **changes), tmp_path)
    assert not list(tmp_path.glob("models/*"))  # before any training


def test_a_checkpoint_of_another_kind_is_refused_before_training(recipe, tmp_path):
    path = tmp_path / "force.safetensors"
    save_checkpoint(path, FieldNet(), {"kind": "force"})
    with pytest.raises(DataError, match="expected a field"):
        carry_out(replace(recipe, field_model=str(path)), tmp_path / "out")
    assert not list(tmp_path.glob("out/models/*"))


@pytest.mark.parametrize(
    ("indenters", "numbers", "words"),
    [
        (("sphere",), range(4), "unseen indenters"),
        (("cone",), range(4), "seen indenters to train on"),
        (("sphere", "cone"), range(1), "two each are needed"),
    ],
)
def test_empty_splits_are_refused_by_name(recipe, toy_contact, tmp_path, indenters, numbers, words):
    root = write(tmp_path / "data", toy_contact, 1.0, indenters, numbers)
    with pytest.raises(DataError, match=words):
        carry_out(replace(recipe, data=str(root)), tmp_path / "out")


def test_contacts_without_pairs_are_refused_by_name(recipe, toy_contact, tmp_path):
    root = write(tmp_path / "data", toy_contact)
    Layout(root).write(toy_contact(9, "toy_b", "sphere", frames=12))
    with pytest.raises(DataError, match="toy_b/sphere/9 has no pair on 'toy_a'"):
        carry_out(replace(recipe, data=str(root)), tmp_path / "out")


def test_two_recipes_do_not_mix(recipe, finished):
    with pytest.raises(DataError, match="other settings"):
        carry_out(replace(recipe, seed=1), finished[0])


@pytest.mark.parametrize(
    ("name", "pairs"), [("homogeneous", 20), ("softness", 42), ("heterogeneous", 6)]
)
def test_experiments_are_over_all_ordered_pairs(name, pairs):
    assert len(set(EXPERIMENTS[name].pairs())) == pairs
    assert set(EXPERIMENTS[name].quick) <= set(EXPERIMENTS[name].pairs())


def test_a_killed_experiment_leaves_no_worker_that_trains_on(tmp_path):
    code = (
        "import time; from pathlib import Path; from functools import partial\n"
        "from genforce_train.experiment_work import Task, _make\n"
        "def work(out):\n    Path(out).touch(); time.sleep(60)\n"
        f"outs = [f'{tmp_path}/{{name}}' for name in 'ab']\n"
        "_make([[Task(out, partial(work, out), 1.0) for out in outs]], 2)"
    )
    run = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(run.pid).children()
    run.kill()
    run.wait()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_error_of_peak_is_by_contact():
    measured = np.array([-1.0, -2.0, -4.0, -4.0])
    assert of_peak(measured + 0.2, measured, np.array([2, 4])) == pytest.approx(
        (0.2 / 2 + 0.2 / 4) / 2
    )


def test_ridge_regression_finds_a_linear_sensor(toy_contact, tmp_path):
    from genforce_train.experiment_sessions import _ridge

    root = write(tmp_path, toy_contact, indenters=("sphere",), numbers=range(12))
    cache = open_layout(root)
    contacts = cache.select(["toy_a"])
    weights = np.random.default_rng(0).normal(size=(3, 9))
    displaced = np.array(cache.wrench)[:, :3] @ weights
    found = _ridge(cache, displaced, contacts[:9], contacts[9:])
    true = np.concatenate([cache.wrench[cache.rows(row)] for row in contacts[9:]])[:, :3]
    np.testing.assert_allclose(found, true, atol=0.02 * abs(true).max())
