from __future__ import annotations

import numpy as np
import pytest

from genforce_collect.errors import DataError
from genforce_infer.calibrate import coverage_of, fit_distribution, fit_uncertainty
from genforce_infer.postprocess import OutOfDistribution, standard_deviation

AXES = ("fx", "fy", "fz")


def labelled(seed: int, samples: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forces, predictions with an error that grows with the force, and its true deviation."""
    rng = np.random.default_rng(seed)
    forces = rng.uniform([-2, -2, -8], [2, 2, 0], (samples, 3))
    size = np.linalg.norm(forces, axis=1)[:, None]
    spread = np.hypot([0.02, 0.03, 0.05], np.array([0.01, 0.01, 0.04]) * size)
    return forces, forces + rng.normal(0, 1, forces.shape) * spread, spread


def test_the_deviation_covers_other_contacts_as_it_says() -> None:
    measured, predicted, _ = labelled(0)
    fitted = fit_uncertainty(predicted, measured, AXES)
    measured, predicted, spread = labelled(1)
    for one, two in coverage_of(fitted, predicted, measured, AXES).values():
        assert one == pytest.approx(0.683, abs=0.03)
        assert two == pytest.approx(0.954, abs=0.02)
    stated = np.stack([standard_deviation(fitted, f, None) for f in predicted])
    np.testing.assert_allclose(stated, spread, rtol=0.25)


def test_coverage_is_that_of_contacts_it_was_not_fitted_on() -> None:
    measured, predicted, _ = labelled(0, 400)
    contacts = np.repeat(np.arange(4), 100)
    predicted[contacts % 2 == 0] += (
        1.0  # half of the contacts are off, which the others cannot know
    )
    same = fit_uncertainty(predicted, measured, AXES)
    other = fit_uncertainty(predicted, measured, AXES, contacts=contacts)
    assert same.coverage["fx"][0] == pytest.approx(0.683, abs=0.01)
    assert other.coverage["fx"][0] == pytest.approx(0.5, abs=0.05)
    assert (other.base, other.gain) == (same.base, same.gain)
    too_few = fit_uncertainty(predicted, measured, AXES, contacts=np.repeat([0, 1], [350, 50]))
    assert too_few.coverage == {}


def test_an_overconfident_model_is_corrected_by_its_factor() -> None:
    measured, predicted, spread = labelled(0)
    fitted = fit_uncertainty(predicted, measured, AXES, force_std=spread / 3)
    assert fitted.factor == pytest.approx((3.0, 3.0, 3.0), rel=0.05)
    assert fitted.coverage["fz"][0] == pytest.approx(0.683, abs=0.001)


def test_samples_like_the_training_data_score_below_one_and_others_above() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(0, 1, (6, 6))
    train = rng.normal(0, 1, (5000, 6)) @ mixing
    score = OutOfDistribution(*fit_distribution(train, "image")).score
    alike = [score(f) for f in rng.normal(0, 1, (1000, 6)) @ mixing]
    other = [score(f) for f in rng.normal(0, 1, (1000, 6)) @ mixing + 8 * mixing[0]]
    assert np.mean(np.array(alike) < 1) > 0.99
    assert np.mean(np.array(other) > 1) > 0.99


def test_constant_features_are_no_reason_to_fail() -> None:
    features = np.random.default_rng(0).normal(0, 1, (200, 3))
    features[:, 1] = 0.5
    score = OutOfDistribution(*fit_distribution(features, "image")).score(features[0])
    assert 0 <= score <= 1


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DataError, match="needs 100 samples"):
        fit_uncertainty(np.zeros((5, 3)), np.zeros((5, 3)), AXES)
    with pytest.raises(DataError, match="need 100 feature samples"):
        fit_distribution(np.zeros((5, 3)), "image")
