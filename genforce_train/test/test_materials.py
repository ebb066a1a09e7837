"""Force-depth curves turn labels of one gel into those of another."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

from genforce_collect.errors import DataError
from genforce_collect.layout import Layout
from genforce_train import dataset_cli
from genforce_train.cache import open_layout
from genforce_train.materials import ForceDepth, ratios, runtime_correction
from genforce_train.train_force import ForceSettings, judged_labels

SOFT = ForceDepth((1.0, 2.0, 0.0), (0.8, 1.6, 0.0))
HARD = ForceDepth((2.0, 4.0, 0.0), (2.4, 4.8, 0.0))


def press(contact, curve: ForceDepth, sensor: str):
    """A contact that only goes down and up, with the force of a curve."""
    depth = np.concatenate([np.linspace(0, 1, 20), np.linspace(1, 0, 20)])
    loading = np.arange(40) < 20
    wrench = np.zeros((40, 6))
    wrench[:, 2] = -curve.force(depth, loading)
    rows = np.arange(40) % len(contact)
    return replace(
        contact,
        key=replace(contact.key, sensor=sensor),
        **{
            name: getattr(contact, name)[rows]
            for name in ("bits", "pose", "wrench_age", "pose_age", "flags")
        },
        wrench=wrench,
        depth=depth,
        phase=np.where(loading, 8, 9).astype(np.uint8),
        stamp_ns=np.arange(40) * 33_000_000,
    )


def test_fit_finds_loading_and_unloading(toy_contact):
    found = ForceDepth.fit([press(toy_contact(0), SOFT, "soft")])
    depth = np.linspace(0, 1, 9)
    for way in (True, False):
        loading = np.full(9, way)
        np.testing.assert_allclose(
            found.force(depth, loading), SOFT.force(depth, loading), atol=1e-6
        )


def test_corrected_labels_are_those_of_the_target():
    depth, loading = np.linspace(0.1, 1, 30), np.arange(30) % 2 == 0
    factor = ratios(SOFT, HARD, depth, loading)
    np.testing.assert_allclose(SOFT.force(depth, loading) * factor, HARD.force(depth, loading))
    np.testing.assert_allclose(factor * ratios(HARD, SOFT, depth, loading), 1)


def test_predictions_for_another_gel_are_judged_by_what_it_would_have_measured(
    toy_contact, tmp_path
):
    layout = Layout(tmp_path / "data")
    contact = press(toy_contact(0), SOFT, "soft")
    layout.write(contact)
    layout.write_reference("soft", contact.bits[0])
    for name, curve in (("soft", SOFT), ("hard", HARD)):
        curve.write(tmp_path / "material", name)
    settings = ForceSettings(
        data=str(layout.root), material=str(tmp_path / "material"), material_target="hard"
    )
    cache = open_layout(layout.root)
    expected = press(toy_contact(0), HARD, "soft").wrench
    np.testing.assert_allclose(judged_labels(settings, cache, [0]), expected, atol=1e-5)
    measured = settings.model_copy(update={"material_target": "soft"})
    np.testing.assert_allclose(judged_labels(measured, cache, [0]), contact.wrench, atol=1e-5)


def test_start_and_weight_bound_the_correction():
    depth, loading = np.array([0.3, 0.6]), np.array([True, True])
    np.testing.assert_allclose(ratios(SOFT, HARD, depth, loading, start=0.5, weight=0.5), [1, 1.5])


def test_runtime_correction_scales_the_predicted_load():
    found = runtime_correction(SOFT, HARD)
    np.testing.assert_allclose(found.loading, 2, rtol=0.02)
    np.testing.assert_allclose(found.unloading, 3, rtol=0.02)


def test_coefficients_are_kept_in_the_published_form(tmp_path):
    SOFT.write(tmp_path, "soft")
    down = np.poly1d(np.loadtxt(tmp_path / "soft_down.csv", delimiter=","))
    assert down(0.5) == pytest.approx(1.25)
    assert ForceDepth.read(tmp_path, "soft") == SOFT
    with pytest.raises(DataError, match="hard_down"):
        ForceDepth.read(tmp_path, "hard")


def test_material_command_fits_every_sensor_pressed(toy_contact, tmp_path, capsys):
    layout = Layout(tmp_path)
    for sensor, curve in (("soft", SOFT), ("hard", HARD)):
        contact = press(toy_contact(0), curve, sensor)
        layout.write(contact)
        layout.write_reference(sensor, contact.bits[0])
    parser = argparse.ArgumentParser()
    dataset_cli.add_arguments(parser)
    assert dataset_cli.run(parser.parse_args(["material", str(tmp_path), "--json"])) == 0
    forces = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert forces == pytest.approx({"soft": 3.0, "hard": 6.0}, abs=1e-4)
    page = (tmp_path / "material/report.html").read_text()
    assert "data:image/png" in page
    assert "1.0000" in page  # R² of the fit
    assert ForceDepth.read(tmp_path / "material", "hard").loading == pytest.approx(
        (0, 0, *HARD.loading), abs=1e-3
    )


def test_curves_come_from_presses_alone(toy_contact, tmp_path):
    layout = Layout(tmp_path)
    pressed, sheared = press(toy_contact(0), SOFT, "toy"), toy_contact(1, frames=40)
    layout.write(sheared)
    layout.write_reference("toy", sheared.bits[0])
    parser = argparse.ArgumentParser()
    dataset_cli.add_arguments(parser)
    words = parser.parse_args(["material", str(tmp_path)])
    with pytest.raises(DataError, match="--force-depth"):
        dataset_cli.run(words)
    layout.write(pressed)
    assert dataset_cli.run(words) == 0
    found = ForceDepth.read(tmp_path / "material", "toy")
    assert sum(found.loading) == pytest.approx(3.0, abs=1e-4)


def test_the_correction_at_run_time_undoes_that_of_the_labels():
    depth = np.linspace(0.1, 1, 40)
    found = runtime_correction(HARD, SOFT)
    for way, gains in ((True, found.loading), (False, found.unloading)):
        loading = np.full(40, way)
        load = HARD.force(depth, loading)
        corrected = load * np.interp(load, found.load_n, gains)
        np.testing.assert_allclose(corrected, SOFT.force(depth, loading), rtol=0.02)


def test_a_press_of_too_few_samples_is_named(toy_contact):
    contact = press(toy_contact(0), SOFT, "soft")
    short = replace(contact, depth=contact.depth[:6], wrench=contact.wrench[:6])
    with pytest.raises(DataError, match=r"soft: .* samples"):
        ForceDepth.fit([replace(short, phase=contact.phase[:6])])
