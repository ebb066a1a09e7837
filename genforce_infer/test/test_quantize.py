from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from genforce_collect.errors import DataError
from genforce_collect.markers.segmentation import MarkerFrame
from genforce_infer.bundle import Bundle, write_bundle
from genforce_infer.parity import Parity, compare, parity_of, run_sequences, with_parity
from genforce_infer.preprocess import area_average
from genforce_infer.quantize import Precision, make_variant

MakeBundle = Callable[..., Bundle]


@pytest.fixture(scope="module")
def images(make_dots: Callable[..., MarkerFrame], models: SimpleNamespace) -> list[np.ndarray]:
    """Two pushes in different directions, (T, 2, H, W) each."""
    size = (models.height, models.width)
    reference = area_average(make_dots().mask, size)
    return [
        np.stack(
            [
                np.stack([area_average(make_dots((x * i, y * i), 0.01 * i).mask, size), reference])
                for i in range(15)
            ]
        )
        for x, y in ((2.0, 1.0), (-1.0, 2.0))
    ]


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 5e-3), ("int8", 0.15)])
@pytest.mark.parametrize("mode", ["direct", "field"])
def test_variants_give_nearly_the_same_force(
    tmp_path: Path,
    models: SimpleNamespace,
    images: list[np.ndarray],
    precision: Precision,
    limit: float,
    mode: str,
) -> None:
    if mode == "direct":
        manifest, files = models.manifest(), {"force.onnx": models.force()}
    else:
        stages = ("field.onnx", "force.onnx")
        manifest = models.manifest(mode="field", stages=stages, state=())
        files = models.field()
    bundle = write_bundle(tmp_path / "fp32", manifest, files)
    variant = make_variant(bundle, precision, tmp_path / precision, images)
    assert variant.manifest.precision == precision
    assert variant.manifest.provenance["made_from"] == "moments"
    assert variant.manifest.files != bundle.manifest.files
    parity = compare(bundle, variant, images)
    assert parity.frames == 30
    for axis in ("fx", "fy"):
        assert parity.max_difference[axis] < limit
        assert parity.r2[axis] > 0.99


def test_a_bundle_equals_itself(make_bundle: MakeBundle, images: list[np.ndarray]) -> None:
    bundle = make_bundle()
    measured = [run_sequences(bundle, images)]
    parity = compare(bundle, bundle, images, measured)
    assert set(parity.max_difference.values()) == {0.0}
    assert set(parity.r2_loss.values()) == {0.0}
    assert len(parity.lines()) == 5


def test_the_cost_of_a_variant_is_told_against_measured_forces() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (500, 3))
    parity = parity_of(truth, truth + np.array([0.0, 0.1, 0.0]), ("fx", "fy", "fz"), [truth])
    assert parity.r2_loss["fx"] == 0
    assert parity.r2_loss["fy"] == pytest.approx(0.01, rel=0.2)
    assert parity.max_difference["fy"] == pytest.approx(0.1 / np.abs(truth[:, 1]).max())


def test_what_is_beyond_the_limits_is_named(models: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (500, 3)) * [1, 1, 0]  # nothing is known of an axis that never moved
    parity = parity_of(truth, truth + np.array([0, 0.2, 0]), ("fx", "fy", "fz"), [truth])
    assert set(parity.r2_loss) == {"fx", "fy"}
    assert parity.problem("int8") == f"R2 loss of fy {parity.r2_loss['fy']:.1e} > 2e-02"
    assert "max difference of fy" in parity.problem("fp32")
    assert "of fx" not in parity.problem("fp32")
    assert Parity.in_manifest(with_parity(models.manifest(), parity)) == parity


def test_variants_of_variants_and_int8_without_images_are_refused(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bundle = make_bundle()
    with pytest.raises(DataError, match="int8 needs images"):
        make_variant(bundle, "int8", tmp_path / "int8")
    variant = make_variant(bundle, "fp16", tmp_path / "fp16")
    with pytest.raises(DataError, match="already fp16"):
        make_variant(variant, "int8", tmp_path / "int8")
