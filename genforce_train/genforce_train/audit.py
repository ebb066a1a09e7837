"""Can the labels be trusted? A quick model against shuffled and against shifted labels.

A ridge regression of force on local image changes must do far better on contacts it has not seen
with the labels as they are than with labels shuffled within their contacts, and the labels must
come at their frames' time (`lag`). What too few contacts cannot decide, an audit says it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from genforce_train.cache import Cache
from genforce_train.lag import (
    LEAST_FRAMES,
    UNITS,
    Lag,
    find_lag,
    frame_times,
    image_changes,
    scaled,
    spread,
)

FOLDS = 8
RIDGE = 100.0  # on scaled inputs
LEVEL = 100.0  # input that stands for a constant, hardly held back by the ridge
FLOOR = 0.3  # of a deviation that inputs are divided by, over that of their kind
CLEAR_GAIN = 0.3  # R² above chance and above shuffled labels that makes them believable
LEAST_CONTACTS = 8
# So many show a model what it needs, in simulated collections of every kind of sensor: R² of good
# labels was 0.3 to 0.9 with 16 contacts, 0.7 to 0.95 with 32.
ENOUGH_CONTACTS = 24
MOST_FRAMES = 4000  # of evenly chosen contacts
TRUSTED, NOT_TRUSTED, CANNOT_TELL = "trusted", "not trusted", "cannot tell"


@dataclass(frozen=True)
class Audit:
    """R² is the mean over Fx, Fy, Fz of contacts the model has not seen; NaN with too few of them.
    Labels are `shifted` by half the largest lag looked at, early and late: the better of both."""

    sensor: str
    verdict: str  # TRUSTED, NOT_TRUSTED or CANNOT_TELL
    reason: str
    contacts: int
    frames: int
    r2: float
    r2_shuffled: float
    r2_shifted: float
    r2_best_lag: float
    lag: Lag

    @property
    def trusted(self) -> bool:
        """Whether the labels hold what the images show, at the right time."""
        return self.verdict == TRUSTED

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON; what is not known is null."""
        found: dict[str, Any] = asdict(self)
        lag = found.pop("lag")
        renamed = {
            "unit": lag["unit"],
            "best_lag": lag["best"],
            "lag_error": lag["error"],
            "lag_contacts": lag["contacts"],
            "lags": lag["lags"],
            "evidence_by_lag": lag["evidence"],
        }
        found |= {"trusted": self.trusted} | renamed
        return {name: None if value != value else value for name, value in found.items()}

    def line(self) -> str:
        """For people."""
        scores = ""
        if not np.isnan(self.r2):
            scores = (
                f"; R² {self.r2:.3f}, labels shuffled {self.r2_shuffled:.3f}, "
                f"shifted {self.r2_shifted:.3f}"
            )
        return (
            f"{self.sensor}: {self.verdict}: {self.reason}{scores}; lag {self.lag} "
            f"({self.contacts} contacts, {self.frames} frames)"
        )


def audit(cache: Cache, sensor: str, contacts: Sequence[int] | None = None, seed: int = 0) -> Audit:
    """Audit the labels of one sensor. Raises `DataError` for one without a reference.

    Contacts too short to be shifted within are left out.
    """
    rows = list(cache.select([sensor]) if contacts is None else contacts)
    lag = find_lag(cache, rows)
    unit = UNITS[lag.unit]
    lags = np.array([0.0, -unit.largest / 2, unit.largest / 2, lag.best if lag.known else 0.0])
    rng = np.random.default_rng(seed)
    reference = cache.reference(sensor)
    inputs, labels = [], []
    groups: list[np.ndarray] = []
    for row in spread(cache, rows, MOST_FRAMES):
        times, known = frame_times(cache, row, lag.unit)
        count = int(known.sum())
        if count < LEAST_FRAMES:
            continue
        part = cache.rows(row)
        force = np.array(cache.wrench[part, :3])
        at = times[known, None] + lags
        shifted = [np.interp(at, times, force[:, axis]) for axis in range(3)]
        shuffled = force[known][rng.permutation(count)]
        labels.append(np.concatenate([np.stack(shifted, -1).reshape(count, -1), shuffled], 1))
        inputs.append(image_changes(cache.images(np.r_[part][known]), reference))
        groups.append(np.full(count, len(groups)))
    r2 = np.full(len(lags) + 1, np.nan)
    if len(groups) >= LEAST_CONTACTS:
        y = np.concatenate(labels)
        predicted = _held_out(np.concatenate(inputs), y, np.concatenate(groups) % FOLDS)
        left = ((predicted - y) ** 2).sum(0) / np.maximum(((y - y.mean(0)) ** 2).sum(0), 1e-12)
        r2 = 1 - left.reshape(-1, 3).mean(1)
    verdict, reason = _verdict(len(groups), float(r2[0]), float(r2[-1]), lag)
    return Audit(
        sensor=sensor,
        verdict=verdict,
        reason=reason,
        contacts=len(groups),
        frames=sum(map(len, groups)),
        r2=float(r2[0]),
        r2_shuffled=float(r2[-1]),
        r2_shifted=float(r2[1:3].max()),
        r2_best_lag=float(r2[3]),
        lag=lag,
    )


def _verdict(contacts: int, r2: float, r2_shuffled: float, lag: Lag) -> tuple[str, str]:
    """What the scores say, and why."""
    unit = UNITS[lag.unit]
    if contacts < LEAST_CONTACTS:
        reason = f"{contacts} contacts long enough to shift their labels, needs {LEAST_CONTACTS}"
        return CANNOT_TELL, reason
    if r2 - max(r2_shuffled, 0.0) <= CLEAR_GAIN:
        found = f"a model of {contacts} contacts tells too little of others (R² {r2:.2f})"
        if contacts < ENOUGH_CONTACTS:
            return CANNOT_TELL, f"{found}, needs {ENOUGH_CONTACTS}"
        return NOT_TRUSTED, f"{found}: labels of other frames, or of another sensor"
    if not lag.known or lag.error > unit.largest_good:
        bound = f"± {lag.error * unit.factor:.0f} {unit.shown}"
        return CANNOT_TELL, f"the lag is known to {bound} only, needs more or longer contacts"
    if abs(lag.best) > unit.largest_good + lag.error:
        late = "late" if lag.best > 0 else "early"
        beyond = "or more " if abs(lag.best) >= unit.largest else ""
        return NOT_TRUSTED, f"labels come {unit.text(abs(lag.best))} {beyond}{late}"
    return TRUSTED, "labels are those of the frames, at their time"


def _held_out(inputs: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Ridge predictions (n, k) of labels (n, k), each by a model of the other folds, and within
    the range of the labels: what extrapolates beyond them knows nothing.

    The error on a fold left out follows from that of the fit to all and the fit's leverage H:
    `(I - H)^-1` times it, on that fold (as for the PRESS statistic).
    """
    x = np.column_stack([scaled(inputs, FLOOR), np.full(len(inputs), LEVEL)])
    factor = cho_factor(x.T @ x + RIDGE * np.eye(x.shape[1]))
    error = labels - x @ cho_solve(factor, x.T @ labels)
    for number in range(FOLDS):
        out = fold == number
        leverage = x[out] @ cho_solve(factor, x[out].T)
        error[out] = np.linalg.solve(np.eye(int(out.sum())) - leverage, error[out])
    return np.clip(labels - error, labels.min(0), labels.max(0))
