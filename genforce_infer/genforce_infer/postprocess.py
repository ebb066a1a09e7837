"""From a model's raw forces to those that are published: correction, drift, filter, gate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from genforce_infer.bundle import (
    Distribution,
    Manifest,
    MaterialCorrection,
    Statistics,
    Uncertainty,
)

MAX_STEP_S = 0.1  # a longer gap between frames counts as this long in filter and drift
TURN_RATIO = 0.05  # of the peak load: a smaller change is noise, not a turn
RELEASE_RATIO = 0.5  # contact ends below this part of the threshold at which it begins


@dataclass(frozen=True)
class Options:
    """What is done to the forces of a model; everything that changes them beyond `gate` is off
    by default and shows in the diagnostics when on."""

    gate: bool = True  # exactly zero while nothing touches
    contact_threshold_n: float | None = None  # None: the bundle's
    material: bool = False  # apply the bundle's material correction
    drift_time_s: float = 0.0  # time constant of the no-contact drift estimate; 0: off
    filter_hz: float = 0.0  # corner of the low-pass; 0: off

    @property
    def filter_delay_s(self) -> float:
        """Delay of the low-pass for slow signals: 1 / (2 pi corner)."""
        return 1.0 / (2 * math.pi * self.filter_hz) if self.filter_hz > 0 else 0.0


class Postprocess:
    """The chain raw -> material -> drift -> low-pass -> gate, with its memory."""

    def __init__(self, manifest: Manifest, options: Options) -> None:
        self.options = options
        self.manifest = manifest
        self.reset()

    def reset(self) -> None:
        """Forget filter, drift and contact, as after a new reference."""
        self.drift = np.zeros(len(self.manifest.outputs))
        self.release()

    def release(self) -> None:
        """Forget filter and contact, as after a pause."""
        self.in_contact = False
        self._filtered: np.ndarray | None = None
        material = self.manifest.material if self.options.material else None
        self._gain = MaterialGain(material) if material is not None else None

    def apply(self, force: np.ndarray, step_s: float) -> np.ndarray:
        """`force` (A,) in N or N m, `step_s` the time since the last frame. Returns (A,)."""
        step_s = min(max(step_s, 0.0), MAX_STEP_S)
        if self._gain is not None:
            force = force * self._gain(-float(force[self.manifest.outputs.index("fz")]))
        corrected = force - self.drift
        self._touch(corrected)
        if self.options.drift_time_s > 0 and not self.in_contact:
            self.drift = self.drift + min(1.0, step_s / self.options.drift_time_s) * corrected
        corrected = self._low_pass(corrected, step_s)
        if self.options.gate and not self.in_contact:
            return np.zeros_like(corrected)
        return corrected

    def _touch(self, force: np.ndarray) -> None:
        threshold = self.options.contact_threshold_n
        if threshold is None:
            threshold = self.manifest.contact_threshold_n
        size = float(np.linalg.norm(force[:3]))
        self.in_contact = size > threshold * (RELEASE_RATIO if self.in_contact else 1.0)

    def _low_pass(self, force: np.ndarray, step_s: float) -> np.ndarray:
        if self.options.filter_hz <= 0:
            return force
        if self._filtered is None or not self.in_contact:
            self._filtered = force
        else:
            weight = 1.0 - math.exp(-2 * math.pi * self.options.filter_hz * step_s)
            self._filtered = self._filtered + weight * (force - self._filtered)
        return self._filtered


class MaterialGain:
    """The gain of a material correction frame by frame; remembers whether the load falls."""

    def __init__(self, material: MaterialCorrection) -> None:
        self.material = material
        self._peak_n = 0.0
        self._low_n = 0.0
        self._unloading = False

    def __call__(self, load_n: float) -> float:
        """Factor on the forces of a frame whose predicted normal load (-Fz) is `load_n`."""
        load_n = max(0.0, load_n)
        if self._unloading:
            self._low_n = min(self._low_n, load_n)
            if load_n > self._low_n + TURN_RATIO * self._peak_n:
                self._unloading, self._peak_n = False, load_n
        else:
            self._peak_n = max(self._peak_n, load_n)
            if load_n < (1 - TURN_RATIO) * self._peak_n:
                self._unloading, self._low_n = True, load_n
        gains = self.material.unloading if self._unloading else self.material.loading
        return float(np.interp(load_n, self.material.load_n, gains))


def standard_deviation(
    uncertainty: Uncertainty | None, force: np.ndarray, force_std: np.ndarray | None
) -> np.ndarray:
    """Per axis, in the units of `force` (A,): `force_std` (A,) is the graph's own estimate in the
    same units. NaN where nothing is known."""
    if uncertainty is None:
        return np.full(len(force), np.nan)
    if uncertainty.factor is not None and force_std is not None:
        return np.asarray(uncertainty.factor) * force_std
    size = np.linalg.norm(force[:3])
    return np.hypot(uncertainty.base, np.asarray(uncertainty.gain) * size)


class OutOfDistribution:
    """Mahalanobis distance to the training data over the threshold: > 1 is outside it."""

    def __init__(self, distribution: Distribution, statistics: Statistics) -> None:
        self.source = distribution.source
        self._mean = statistics.mean
        self._whitening = statistics.whitening / np.float32(distribution.threshold)

    def score(self, features: np.ndarray) -> float:
        """`features` (K,) -> score >= 0."""
        return float(np.linalg.norm(self._whitening @ (features - self._mean)))
