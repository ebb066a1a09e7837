"""By how much labels come after the frames they belong to.

The force, read at a lag after each frame, is a Gaussian process of what the marker images show: a
linear one of the image's change from its reference (`image_changes`), and of that change's moving
average over the last half second, which stands for the gel's relaxation. Viscoelastic force leads
the deformation that goes with it, and without this memory would read as labels that come some ms
early (4 ms where 30 % of a simulated gel's stress relaxes). The lag is where the evidence
(marginal likelihood; Rasmussen & Williams, Gaussian Processes for Machine Learning, eq. 2.30) is
largest: that needs neither a model trained before nor many contacts.

Between frames, forces are known by a local line (Gaussian weights, most of them within a frame),
and the images are smoothed by the same weights: interpolated forces alone would hold less noise
than those at the frames, and draw the lag away from none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

from genforce_train.cache import Cache, block_counts

STEPS = 40  # of the lag to either side of none
FREE = 0.1  # part of its largest force below which a contact begins or ends without one
LEAST_FRAMES = 4  # of a contact, with labels at all lags
MOST_FRAMES = 1200  # of evenly chosen contacts: the cost grows with their cube
SMOOTHING = 0.8  # standard deviation of the weights, in periods of the frames
SIGNALS = (1e1, 1e2, 1e3, 1e4)  # variances of what images explain, over that of the noise
OFFSET = 0.1  # variance of a contact's own offset, over that of what images explain
LEAST_NOISE = 1e-8  # N^2
FOLDS = 8
CELLS = (15, 20)
CHANNELS = 4


@dataclass(frozen=True)
class Unit:
    """What lags are counted in, and how they are shown."""

    largest: float  # lag looked at
    largest_good: float
    memory: float  # of the gel
    shown: str
    factor: float

    @property
    def lags(self) -> np.ndarray:
        """(81,) lags looked at."""
        return np.linspace(-self.largest, self.largest, 2 * STEPS + 1)

    def text(self, lag: float, error: float = float("nan")) -> str:
        """A lag for people."""
        if np.isnan(lag):
            return "?"
        bound = "" if np.isnan(error) else f" ± {error * self.factor:.1f}"
        return f"{lag * self.factor:+.1f}{bound} {self.shown}"


UNITS = {
    "s": Unit(largest=0.1, largest_good=0.015, memory=0.5, shown="ms", factor=1e3),
    "frames": Unit(largest=3.0, largest_good=0.5, memory=15.0, shown="frames", factor=1.0),
}


@dataclass(frozen=True)
class Lag:
    """`best` > 0: the labels come that much too late against the frames (subtract it from the
    stamps of the wrench). `unit` is "s", or "frames" where there are no stamps; `error` is the
    standard error: by how much the best lag moves where an eighth of the contacts is left out, or
    what the evidence leaves open, whichever is larger. Both NaN where no contact is long enough."""

    unit: str
    best: float
    error: float
    contacts: int  # it was found with
    lags: list[float]
    evidence: list[float]  # log likelihood of each lag, less that of the best

    @classmethod
    def unknown(cls, unit: str = "s") -> Lag:
        """Of contacts that tell nothing."""
        return cls(unit, float("nan"), float("nan"), 0, [], [])

    @property
    def known(self) -> bool:
        """Whether the contacts say anything of their lag."""
        return self.error < UNITS[self.unit].largest / 4

    def __str__(self) -> str:
        return UNITS[self.unit].text(self.best, self.error) if self.known else "?"


def find_lag(cache: Cache, rows: Sequence[int], most_frames: int = MOST_FRAMES) -> Lag:
    """The lag of the labels of contacts of one sensor, by at most about so many of their frames.
    Raises `DataError` without a reference."""
    unit_name = unit_of(cache, rows)
    unit = UNITS[unit_name]
    forces, inputs = [], []
    groups: list[np.ndarray] = []
    for row in spread(cache, rows, most_frames):
        times, known = frame_times(cache, row, unit_name)
        if known.sum() < LEAST_FRAMES:
            continue
        part = cache.rows(row)
        force = np.array(cache.wrench[part, :3])
        width = SMOOTHING * float(np.median(np.diff(times)))
        at = np.clip(times[known, None] + unit.lags, times[0], times[-1])
        shifted = [_line_weights(times, column, width) @ force for column in at.T]
        changes = image_changes(cache.images(np.r_[part]), cache.reference(cache.keys[row].sensor))
        seen = np.concatenate([changes, _average(times, changes, unit.memory)], 1)
        forces.append(np.stack(shifted, 1))
        inputs.append(_line_weights(times, times[known], width) @ seen)
        groups.append(np.full(int(known.sum()), len(groups)))
    if not groups:
        return Lag.unknown(unit_name)
    evidence, without = _evidence(
        np.concatenate(inputs), np.concatenate(forces), np.concatenate(groups)
    )
    evidence -= evidence.max()
    best = _vertex(unit.lags, evidence)
    others = np.array([_vertex(unit.lags, curve) for curve in without])
    jackknife = others.std() * np.sqrt(max(len(others) - 1, 0)) if len(others) else 0.0
    return Lag(
        unit=unit_name,
        best=best,
        error=max(_posterior_deviation(unit.lags, evidence), float(jackknife)),
        contacts=len(groups),
        lags=unit.lags.round(6).tolist(),
        evidence=evidence.round(3).tolist(),
    )


def image_changes(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Frames (n, 120, 160) in 0..1 against a packed reference -> (n, 4 x 300) float32 local
    changes: how much, by sign, and along x and y (change times the reference's slope, as in
    optical flow)."""
    still = block_counts(reference[None])[0].astype(np.float32) / 16
    slope_y, slope_x = np.gradient(_blur(still[None])[0])
    change = _blur(images - still)
    channels = np.stack([change, abs(change), change * slope_x, change * slope_y], 1)
    rows, columns = still.shape[0] // CELLS[0], still.shape[1] // CELLS[1]
    cells = channels.reshape(len(images), CHANNELS, CELLS[0], rows, CELLS[1], columns).mean((3, 5))
    return cells.reshape(len(images), -1)


def unit_of(cache: Cache, rows: Sequence[int]) -> str:
    """What lags of these contacts are counted in: "s" where all have stamps."""
    stamps = cache.array("stamp_ns")
    stamped = all((np.diff(stamps[cache.rows(row)]) > 0).all() for row in rows)
    return "s" if stamped else "frames"


def frame_times(cache: Cache, row: int, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) times of a contact's frames since its first, in the unit of the lags, and which of them
    have labels on both sides up to the largest lag. Beyond a contact's end without force there is
    none either, so labels are known there as well."""
    part = cache.rows(row)
    stamps = np.array(cache.array("stamp_ns")[part])
    times = np.arange(len(stamps), dtype=float)
    if unit == "s":
        times = (stamps - stamps[0]) * 1e-9
    force = np.linalg.norm(cache.wrench[part, :3], axis=1)
    begins_free, ends_free = force[[0, -1]] <= FREE * force.max()
    largest = UNITS[unit].largest
    known = np.ones(len(times), bool) if begins_free else times >= largest
    return times, known & (ends_free | (times <= times[-1] - largest))


def spread(cache: Cache, rows: Sequence[int], frames: int) -> list[int]:
    """Contacts evenly chosen of these, with about as many frames in all."""
    held = sum(cache.rows(row).stop - cache.rows(row).start for row in rows)
    count = max(1, min(len(rows), len(rows) * frames // max(held, 1)))
    return [rows[place] for place in np.linspace(0, len(rows) - 1, count).round().astype(int)]


def scaled(inputs: np.ndarray, floor: float) -> np.ndarray:
    """Inputs (n, k x 1200) centred and divided by their deviations, each no smaller than `floor`
    of its channel's: what hardly ever changes must not outweigh the rest where it does."""
    deviation = inputs.std(0).reshape(-1, CELLS[0] * CELLS[1])
    typical = np.sqrt((deviation**2).mean(1, keepdims=True))
    scale = np.sqrt(deviation**2 + (floor * typical) ** 2).ravel() + 1e-9
    return np.asarray((inputs - inputs.mean(0)) / scale)


def _evidence(
    inputs: np.ndarray, forces: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log evidence (lags,) of forces (n, lags, 3) given inputs (n, k) of contacts `groups` (n,),
    and that without each fold of the contacts (folds, lags)."""
    count, lags, axes = forces.shape
    channels = inputs.reshape(count, -1, CELLS[0] * CELLS[1])
    # The change is none at rest, so it is not centred; its average keeps the change's scale.
    norm = np.sqrt((channels[:, :CHANNELS] ** 2).sum(2).mean(0)) + 1e-9
    flat = (channels / np.tile(norm, 2)[:, None]).reshape(count, -1)
    gram = flat @ flat.T
    gram += OFFSET * (1 + (groups[:, None] == groups))
    folds = min(FOLDS, int(groups.max()) + 1)
    held = [groups % folds == fold for fold in range(folds)] if folds > 1 else []
    columns = forces.reshape(count, -1)
    best = np.full(axes, -np.inf)
    curves = np.zeros((1 + len(held), lags, axes))
    for signal in SIGNALS:
        lower = cholesky(signal * gram + np.eye(count), lower=True)
        white = solve_triangular(lower, columns, lower=True)
        squares = (white**2).sum(0).reshape(lags, axes)
        level = np.log(np.diag(lower)).sum()
        score = _log_evidence(squares, count, level)
        better = score.max(0) > best
        if not better.any():
            continue
        best[better] = score.max(0)[better]
        curves[0][:, better] = score[:, better]
        inverse = cho_solve((lower, True), np.eye(count))
        answers = inverse @ columns
        for number, out in enumerate(held, 1):
            # Of the inverse's block and answers follow those of the process without these frames.
            block = inverse[np.ix_(out, out)]
            less = (answers[out] * np.linalg.solve(block, answers[out])).sum(0)
            left = squares - less.reshape(lags, axes)
            curves[number][:, better] = _log_evidence(left, count - int(out.sum()), 0.0)[:, better]
    total = curves.sum(2)
    return total[0], total[1:]


def _log_evidence(squares: np.ndarray, count: int, level: float) -> np.ndarray:
    # With the noise's variance at its most likely value.
    return -0.5 * count * np.log(squares / count + LEAST_NOISE) - level


def _line_weights(times: np.ndarray, at: np.ndarray, width: float) -> np.ndarray:
    """(m, n) weights of samples at `times` (n,) in local lines' values at (m,) instants."""
    away = times - at[:, None]
    squares = (away / width) ** 2
    weight = np.exp(-0.5 * (squares - squares.min(1, keepdims=True)))
    zeroth, first = weight.sum(1), (weight * away).sum(1)
    # The small term keeps a line of one sample level.
    second = (weight * away**2).sum(1) + 1e-3 * width**2 * zeroth
    weight *= second[:, None] - away * first[:, None]
    return np.asarray(weight / weight.sum(1, keepdims=True))


def _posterior_deviation(lags: np.ndarray, evidence: np.ndarray) -> float:
    # A smoothed frame shares its noise with its neighbours: so many count as one.
    alike = 2 * np.sqrt(np.pi) * SMOOTHING
    likely = np.exp((evidence - evidence.max()) / alike)
    likely /= likely.sum()
    return float(np.sqrt((likely * (lags - (likely * lags).sum()) ** 2).sum()))


def _average(times: np.ndarray, values: np.ndarray, memory: float) -> np.ndarray:
    """(n, k) values averaged over what came before, with weights that fall by e in `memory`."""
    result = np.zeros_like(values)
    for row in range(1, len(times)):
        kept = np.exp((times[row - 1] - times[row]) / memory)
        between = (values[row] + values[row - 1]) / 2
        result[row] = kept * result[row - 1] + (1 - kept) * between
    return result


def _blur(images: np.ndarray) -> np.ndarray:
    """(n, h, w) smoothed by (1 2 1) twice along both axes."""
    for axis in (1, 2):
        for _ in range(2):
            images = (np.roll(images, 1, axis) + 2 * images + np.roll(images, -1, axis)) / 4
    return images


def _vertex(lags: np.ndarray, curve: np.ndarray) -> float:
    """Top of the parabola through the best lag and its neighbours: finer than the lags' step."""
    reach, best = 4, int(curve.argmax())
    if best < reach or best >= len(lags) - reach:
        return float(lags[best])
    near = slice(best - reach, best + reach + 1)
    bend, slope, _ = np.polyfit(lags[near] - lags[best], curve[near], 2)
    shift = -slope / (2 * bend) if bend < 0 else 0.0
    bound = reach * (lags[1] - lags[0])
    return float(lags[best] + np.clip(shift, -bound, bound))
