"""What a bundle says about its own errors, fitted from data the model was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.optimize import nnls

from genforce_collect.errors import DataError
from genforce_infer.bundle import Axis, Distribution, Statistics, Uncertainty

BINS = 12
ONE_SIGMA = 0.6827  # part of a normal distribution within one standard deviation
SMALLEST_STD = 1e-3  # of the widest direction: narrower ones are noise
MINIMUM_SAMPLES = 100


def fit_uncertainty(
    predicted: np.ndarray,
    measured: np.ndarray,
    outputs: Sequence[Axis],
    force_std: np.ndarray | None = None,
    contacts: np.ndarray | None = None,
) -> Uncertainty:
    """Standard deviation per axis from held-out contacts.

    `predicted`, `measured`: (N, A) in N and N m. The squared error is fitted as
    base^2 + (gain * |F|)^2 over bins of |F| (predicted, first three axes), then scaled so that
    68 % of the samples lie within one standard deviation. With `force_std` (N, A), the model's own
    estimate in the same units, a factor per axis is fitted likewise. `contacts` (N,) says which
    contact each sample is of: `coverage` is then that of each half of the contacts by what was
    fitted on the other half, else that of the samples it was fitted on. Raises `DataError` on too
    few samples.
    """
    predicted, measured = np.asarray(predicted, float), np.asarray(measured, float)
    if len(predicted) < MINIMUM_SAMPLES or predicted.shape != measured.shape:
        raise DataError(
            f"uncertainty needs {MINIMUM_SAMPLES} samples of the same shape, found "
            f"{predicted.shape} predicted and {measured.shape} measured"
        )
    errors = predicted - measured
    size = np.linalg.norm(predicted[:, :3], axis=1)
    base, gain = np.zeros(errors.shape[1]), np.zeros(errors.shape[1])
    bins = np.array_split(np.argsort(size), BINS)
    loads = np.array([np.mean(size[b] ** 2) for b in bins])
    for axis in range(errors.shape[1]):
        variances = np.array([np.mean(errors[b, axis] ** 2) for b in bins])
        # Relative weights: without them the largest forces alone decide.
        weights = 1 / np.maximum(variances, 1e-12)
        terms = np.stack([np.ones(BINS), loads], 1) * weights[:, None]
        squares, _ = nnls(terms, variances * weights)
        base[axis], gain[axis] = np.sqrt(squares)
    spread = np.hypot(base, gain * size[:, None])
    scale = _scale_to_coverage(errors, spread)
    fitted = Uncertainty(
        base=tuple(np.maximum(base * scale, 1e-9).tolist()),
        gain=tuple((gain * scale).tolist()),
        factor=None
        if force_std is None
        else tuple(_scale_to_coverage(errors, np.asarray(force_std)).tolist()),
    )
    if contacts is None:
        cover = coverage_of(fitted, predicted, measured, outputs, force_std)
    else:
        cover = _cross_coverage(predicted, measured, outputs, force_std, contacts)
    return fitted.model_copy(update={"coverage": cover})


def _cross_coverage(
    predicted: np.ndarray,
    measured: np.ndarray,
    outputs: Sequence[Axis],
    force_std: np.ndarray | None,
    contacts: np.ndarray,
) -> dict[Axis, tuple[float, float]]:
    """Coverage of each half of the contacts by what was fitted on the other one; nothing where a
    half is too small."""
    even = np.unique(contacts, return_inverse=True)[1] % 2 == 0
    if min(even.sum(), (~even).sum()) < MINIMUM_SAMPLES:
        return {}
    halves = []
    for rows, others in ((even, ~even), (~even, even)):
        own, theirs = (
            (predicted[r], measured[r], outputs, None if force_std is None else force_std[r])
            for r in (rows, others)
        )
        halves.append(coverage_of(fit_uncertainty(*theirs), *own))
    share = float(even.mean())
    first, second = halves
    return {
        axis: (
            share * first[axis][0] + (1 - share) * second[axis][0],
            share * first[axis][1] + (1 - share) * second[axis][1],
        )
        for axis in outputs
    }


def coverage_of(
    uncertainty: Uncertainty,
    predicted: np.ndarray,
    measured: np.ndarray,
    outputs: Sequence[Axis],
    force_std: np.ndarray | None = None,
) -> dict[Axis, tuple[float, float]]:
    """Part of the samples within one and within two standard deviations, per axis."""
    errors = np.abs(np.asarray(predicted) - np.asarray(measured))
    if uncertainty.factor is not None and force_std is not None:
        spread = np.asarray(uncertainty.factor) * force_std
    else:
        size = np.linalg.norm(np.asarray(predicted)[:, :3], axis=1)[:, None]
        spread = np.hypot(uncertainty.base, np.asarray(uncertainty.gain) * size)
    one, two = (errors <= spread).mean(0), (errors <= 2 * spread).mean(0)
    return {axis: (float(one[i]), float(two[i])) for i, axis in enumerate(outputs)}


def fit_distribution(
    features: np.ndarray, source: Literal["features", "image"], quantile: float = 0.999
) -> tuple[Distribution, Statistics]:
    """Training statistics of features (N, K): `quantile` of the samples score at most 1.

    Raises `DataError` on too few samples.
    """
    features = np.asarray(features, float)
    if len(features) < MINIMUM_SAMPLES:
        raise DataError(f"statistics need {MINIMUM_SAMPLES} feature samples, found {len(features)}")
    mean = features.mean(0)
    variances, directions = np.linalg.eigh(np.cov(features - mean, rowvar=False))
    std = np.sqrt(np.maximum(variances, 0))
    whitening = directions.T / np.maximum(std, SMALLEST_STD * max(std.max(), 1e-12))[:, None]
    distances = np.linalg.norm((features - mean) @ whitening.T, axis=1)
    threshold = float(max(np.quantile(distances, quantile), 1e-9))
    statistics = Statistics(mean.astype(np.float32), whitening.astype(np.float32))
    return Distribution(source=source, threshold=threshold), statistics


def _scale_to_coverage(errors: np.ndarray, spread: np.ndarray) -> np.ndarray:
    ratio = np.abs(errors) / np.maximum(spread, 1e-12)
    return np.quantile(ratio, ONE_SIGMA, axis=0)
