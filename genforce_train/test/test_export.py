from __future__ import annotations

import argparse

import numpy as np
import pytest

from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import Layout
from genforce_infer.bundle import read_bundle
from genforce_infer.parity import Parity
from genforce_train import export, export_cli
from genforce_train.materials import ForceDepth
from genforce_train.train_force import ForceSettings, train


@pytest.fixture(scope="module")
def checkpoint(toy_contact, tmp_path_factory):
    """A compact model of the toy sensor that has learned a little."""
    folder = tmp_path_factory.mktemp("export")
    layout = Layout(folder / "data")
    for number in range(8):
        layout.write(toy_contact(number))
    rest = toy_contact(0, frames=4)
    layout.write_reference("toy", rest.bits[0])
    layout.write_rest("toy", rest.bits[:1].repeat(8, 0), np.zeros((8, 6)))
    settings = ForceSettings(
        data=str(layout.root),
        out=str(folder / "force"),
        steps=40,
        frames=48,
        windows=(8,),
        validation=0.25,
        evaluate_every=20,
        threads=1,
    )
    train(settings, quiet=True)
    return folder / "force" / "best.safetensors"


def genforce_export(*words):
    parser = argparse.ArgumentParser()
    export_cli.add_arguments(parser)
    return export_cli.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_precision_comes_with_its_parity_report(checkpoint, tmp_path, capsys, precision):
    out = tmp_path / precision
    assert genforce_export(checkpoint, "--precision", precision, "--check", "-o", out) == 0
    manifest = read_bundle(out).manifest
    assert manifest.precision == precision
    parity = Parity.in_manifest(manifest)
    assert parity.frames == 48  # both held-out contacts
    limit = 1e-4 if precision == "fp32" else 0.1
    assert all(parity.max_difference[axis] < limit for axis in ("fx", "fy", "fz"))
    assert set(parity.r2_loss) == (set() if precision == "fp32" else {"fx", "fy", "fz"})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[2:-1]] == list(manifest.outputs)


@pytest.mark.parametrize(("limit", "precision"), [(np.inf, "int8"), (-1.0, "fp32")])
def test_a_bundle_becomes_int8_where_that_is_right_enough(
    checkpoint, tmp_path, monkeypatch, limit, precision
):
    monkeypatch.setitem(Parity.problem.__globals__["MAX_R2_LOSS"], "int8", limit)
    bundle = export.export_force(checkpoint, tmp_path / "bundle")
    export_cli._faster(bundle, *export.labelled_frames(checkpoint))
    manifest = read_bundle(bundle.folder).manifest
    assert manifest.precision == precision
    assert bool(Parity.in_manifest(manifest).r2_loss) == (precision == "int8")


def test_a_bundle_is_given_the_gain_to_another_gel(checkpoint, tmp_path):
    curves = tmp_path / "material"
    ForceDepth((4.0, 0.0), (2.0, 0.0)).write(curves, "hard")
    ForceDepth((2.0, 0.0), (1.5, 0.0)).write(curves, "soft")
    known = export.export_force(checkpoint, tmp_path / "known")
    assert genforce_export(known.folder, "--material", curves, "hard", "soft") == 0
    served = read_bundle(tmp_path / "known-soft").manifest
    assert read_bundle(known.folder).manifest.material is None
    assert served.model_copy(update={"material": None}) == known.manifest
    np.testing.assert_allclose(served.material.loading, 0.5)
    np.testing.assert_allclose(served.material.unloading, 0.75)
    with pytest.raises(DataError, match=r"other_down\.csv"):
        genforce_export(known.folder, "--material", curves, "hard", "other")
    assert not (tmp_path / "known-other").exists()


def test_a_variant_too_far_from_its_bundle_is_an_error(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(Parity.problem.__globals__["MAX_R2_LOSS"], "int8", -1.0)
    with pytest.raises(DataError, match="too far from what it was made from: R2 loss of fx"):
        genforce_export(checkpoint, "--precision", "int8", "--check", "-o", tmp_path / "int8")


def test_a_graph_that_is_not_the_model_is_not_written(checkpoint, tmp_path, monkeypatch):
    stepwise = export._stepwise
    monkeypatch.setattr(export, "_stepwise", lambda *args: stepwise(*args) + 0.01)
    with pytest.raises(DataError, match="not the model: max difference of f"):
        export.export_force(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_alone_has_no_frames_to_check_by(checkpoint, tmp_path):
    bundle = export.export_force(checkpoint, tmp_path / "bundle").folder
    assert genforce_export(bundle, "--precision", "fp16", "-o", tmp_path / "fp16") == 0
    with pytest.raises(ConfigError, match="give --bag"):
        genforce_export(bundle, "--precision", "int8")
    with pytest.raises(ConfigError, match="a bundle already"):
        genforce_export(bundle)
