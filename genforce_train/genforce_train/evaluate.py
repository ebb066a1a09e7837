"""How good a force model is: error and R² per axis, pictures of predicted over measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

AXES = ("fx", "fy", "fz", "tx", "ty", "tz")


@dataclass(frozen=True)
class Scores:
    """Scores of predicted against measured wrenches, per axis in the order of `AXES`.

    mae: N or N m; r2: 1 - residual / variance of the measured; mae_total_n: of the force vector's
    length; rest_n: largest |force| predicted without contact, per force axis.
    """

    mae: dict[str, float]
    r2: dict[str, float]
    mae_total_n: float
    frames: int
    rest_n: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """One line an axis, for people."""
        rows = [
            f"{axis}  MAE {self.mae[axis]:8.4f} {'N  ' if axis[0] == 'f' else 'N m'}"
            f"  R² {self.r2[axis]:6.3f}"
            for axis in self.mae
        ]
        return [*rows, f"|f| MAE {self.mae_total_n:8.4f} N    ({self.frames} frames)"]


def score(predicted: np.ndarray, measured: np.ndarray, rest: np.ndarray | None = None) -> Scores:
    """Scores of (n, k) against (n, >= k); `rest` (m, k) is what was predicted without contact."""
    axes = AXES[: predicted.shape[1]]
    measured = measured[:, : len(axes)]
    error = predicted - measured
    variance = ((measured - measured.mean(0)) ** 2).sum(0)
    r2 = 1 - (error**2).sum(0) / np.maximum(variance, 1e-12)
    length = np.linalg.norm(predicted[:, :3], axis=1) - np.linalg.norm(measured[:, :3], axis=1)
    return Scores(
        mae={axis: float(value) for axis, value in zip(axes, abs(error).mean(0), strict=True)},
        r2={axis: float(value) for axis, value in zip(axes, r2, strict=True)},
        mae_total_n=float(abs(length).mean()),
        frames=len(predicted),
        rest_n=None
        if rest is None or not len(rest)
        else {axis: float(v) for axis, v in zip(axes[:3], abs(rest[:, :3]).max(0), strict=True)},
    )


def scatter(
    path: str | Path,
    predicted: np.ndarray,
    measured: np.ndarray,
    title: str,
    labels: Sequence[str] = ("measured (N)", "predicted (N)"),
) -> None:
    """Write a picture of predicted over measured Fx, Fy, Fz."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores = score(predicted, measured)
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for column, axis in enumerate(AXES[:3]):
        plot = figure.add_subplot(1, 3, column + 1)
        x, y = measured[:, column], predicted[:, column]
        low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
        plot.plot([low, high], [low, high], color="0.6", linewidth=1)
        plot.scatter(x, y, s=4, alpha=0.4, linewidths=0)
        plot.set_title(f"F{axis[1]}: R² {scores.r2[axis]:.3f}, MAE {scores.mae[axis]:.3f} N")
        plot.set_xlabel(labels[0])
        plot.set_ylabel(labels[1] if column == 0 else "")
        plot.set_aspect("equal")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def of_peak(predicted: np.ndarray, measured: np.ndarray, ends: np.ndarray) -> float:
    """Mean over contacts of their mean absolute error over their peak; contacts are (n,) parts that
    end before `ends`."""
    parts = zip(*(np.split(values, ends[:-1]) for values in (predicted, measured)), strict=True)
    return float(np.mean([abs(ours - own).mean() / abs(own).max() for ours, own in parts]))
