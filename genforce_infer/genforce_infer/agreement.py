"""Pictures of how well predicted force agrees with the force sensor's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genforce_collect.html import PLOT_GREY, Picture, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOUR = "C3"


def draw_course(
    axes: Axes, times_s: np.ndarray, measured: np.ndarray, predicted: np.ndarray
) -> None:
    """Both forces over time: (N,) s, and (N,) N each, NaN where there is none."""
    axes.plot(times_s, measured, color=PLOT_GREY, lw=2.5, label="measured (force sensor)")
    axes.plot(times_s, predicted, color=COLOUR, lw=1, label="predicted")


def draw_scatter(axes: Axes, measured: np.ndarray, predicted: np.ndarray) -> None:
    """Predicted over measured force, (N,) N each, with the line on which they agree."""
    axes.plot(measured, predicted, ".", color=COLOUR, ms=3)
    both = np.concatenate([measured, predicted])
    limits = [float(np.nanmin(both)), float(np.nanmax(both))]
    axes.plot(limits, limits, color=PLOT_GREY, lw=1)


def agreement_plots(
    times_s: np.ndarray, measured: np.ndarray, predicted: np.ndarray
) -> list[Picture]:
    """Forces over time and over each other, axis by axis: (N,) s, (N, 3) N each."""

    def courses(figure: Figure) -> None:
        rows = figure.subplots(3, 1, sharex=True)
        for column, axes in enumerate(rows):
            draw_course(axes, times_s, measured[:, column], predicted[:, column])
            axes.set_ylabel(f"F{'xyz'[column]} (N)")
        rows[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
        rows[-1].set_xlabel("time (s)")

    def scatters(figure: Figure) -> None:
        rows = figure.subplots(3, 1)
        for column, axes in enumerate(rows):
            draw_scatter(axes, measured[:, column], predicted[:, column])
            axes.set_ylabel(f"F{'xyz'[column]} predicted (N)")
        rows[-1].set_xlabel("measured (N)")

    return [
        plot(courses, "Force over time", (5.4, 6.0)),
        plot(scatters, "Predicted over measured force, and the line of agreement", (5.4, 6.0)),
    ]
