"""Force over depth of a gel, and what it does to labels taken on another.

Force over normalised depth is a polynomial for loading and one for unloading, fitted to a press.
A label taken on the source at depth d becomes that of the target by the ratio
`r(d) = target(d) / source(d)`, applied as `(r - 1) * weight + 1` where d exceeds a start depth.
Coefficients are kept as the published data set keeps them: `<sensor>_down.csv` and
`<sensor>_up.csv`, highest power first, as `numpy.poly1d` takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genforce_collect.errors import DataError
from genforce_collect.html import (
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Tone,
    Verdict,
    command,
    plot,
)
from genforce_collect.layout import LOADING, SHEAR_DEC, SHEAR_INC, Contact
from genforce_infer.bundle import MaterialCorrection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEARING = (SHEAR_INC, SHEAR_DEC)
DEGREE = 4
SMALLEST_FORCE_N = 0.02  # below it a ratio of forces says nothing
LARGEST_RATIO = 10.0
LEAST_SAMPLES = 3 * DEGREE


@dataclass(frozen=True)
class ForceDepth:
    """Normal force (N, positive into the gel) over normalised depth: polynomial coefficients,
    highest power first, for loading and unloading."""

    loading: tuple[float, ...]
    unloading: tuple[float, ...]

    def force(self, depth: np.ndarray, loading: np.ndarray) -> np.ndarray:
        """(n,) N at depths (n,), by whether each is on the way in."""
        down, up = np.polyval(self.loading, depth), np.polyval(self.unloading, depth)
        return np.where(loading, down, up)

    @classmethod
    def fit(cls, contacts: list[Contact]) -> ForceDepth:
        """Fit presses: least squares through zero force at zero depth. Raises `DataError`."""
        depth = np.concatenate([contact.depth for contact in contacts])
        force = np.concatenate([-contact.wrench[:, 2] for contact in contacts])
        way_in = np.concatenate([is_loading(contact.depth, contact.phase) for contact in contacts])
        curves = []
        for chosen, name in ((way_in, "loading"), (~way_in, "unloading")):
            touching = chosen & (depth > 0)
            if touching.sum() < LEAST_SAMPLES:
                raise DataError(
                    f"{contacts[0].key.sensor}: {touching.sum()} samples of {name} in the press; "
                    f"record it slower or deeper (at least {LEAST_SAMPLES})"
                )
            powers = depth[touching, None] ** np.arange(DEGREE, 0, -1)
            found, *_ = np.linalg.lstsq(powers, force[touching], rcond=None)
            curves.append((*found.tolist(), 0.0))
        return cls(*curves)

    @classmethod
    def read(cls, folder: str | Path, sensor: str) -> ForceDepth:
        """Read `<sensor>_down.csv` and `<sensor>_up.csv`. Raises `DataError`."""
        curves = []
        for name in ("down", "up"):
            path = Path(folder) / f"{sensor}_{name}.csv"
            try:
                coefficients = np.loadtxt(path, delimiter=",", ndmin=1)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: no force-depth coefficients: {error}") from error
            if coefficients.ndim != 1 or not np.isfinite(coefficients).all():
                raise DataError(f"{path}: expected one finite polynomial coefficient a line")
            curves.append(tuple(coefficients.tolist()))
        return cls(*curves)

    def write(self, folder: str | Path, sensor: str) -> None:
        """Write both coefficient files."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, curve in (("down", self.loading), ("up", self.unloading)):
            np.savetxt(Path(folder) / f"{sensor}_{name}.csv", curve, delimiter=",")


def is_loading(depth: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """(n,) whether frames are on the way in: by their phase, or up to the deepest without one."""
    if (phase < 10).all():
        return np.isin(phase, LOADING)
    return np.arange(len(depth)) <= int(np.argmax(depth))


def ratios(
    source: ForceDepth,
    target: ForceDepth,
    depth: np.ndarray,
    loading: np.ndarray,
    start: float = 0.0,
    weight: float = 1.0,
) -> np.ndarray:
    """(n,) factors that turn forces taken on the source into those on the target.

    `start` (normalised depth) and `weight` (0 to 1) are the method's two parameters.
    """
    below = source.force(depth, loading)
    ratio = np.ones_like(below)
    sound = abs(below) > SMALLEST_FORCE_N
    ratio[sound] = target.force(depth, loading)[sound] / below[sound]
    ratio = np.clip(ratio, 1 / LARGEST_RATIO, LARGEST_RATIO)
    return np.where(depth > start, (ratio - 1) * weight + 1, 1.0)


def runtime_correction(
    source: ForceDepth, target: ForceDepth, nodes: int = 24
) -> MaterialCorrection:
    """The same correction at run time, where the depth is not known but the load is: gain over the
    normal load that a model of the source predicts."""
    depth = np.linspace(0.02, 1.0, nodes)
    loads = np.maximum.accumulate(np.polyval(source.loading, depth))
    unique = np.flatnonzero(np.diff(loads, prepend=-1.0) > 1e-6)
    gains = []
    for curve_of in (True, False):
        way = np.full(nodes, curve_of)
        # While unloading, the depth of a load is that of the unloading curve.
        found = np.interp(loads, np.maximum.accumulate(source.force(depth, way)), depth)
        gains.append(ratios(source, target, found, way))
    return MaterialCorrection(
        load_n=tuple(loads[unique].tolist()),
        loading=tuple(gains[0][unique].tolist()),
        unloading=tuple(gains[1][unique].tolist()),
    )


def is_press(contact: Contact) -> bool:
    """Whether a contact goes down and up alone; one of unknown phases may."""
    return not np.isin(contact.phase, SHEARING).any()


def r_squared(curve: ForceDepth, contacts: list[Contact]) -> float:
    """R² of the normal force of contacts by a curve."""
    force = np.concatenate([-contact.wrench[:, 2] for contact in contacts])
    found = np.concatenate(
        [curve.force(c.depth, is_loading(c.depth, c.phase)) for c in contacts],
    )
    return float(1 - ((force - found) ** 2).sum() / ((force - force.mean()) ** 2).sum())


def report_page(
    curves: dict[str, ForceDepth], contacts: dict[str, list[Contact]], root: Path
) -> Page:
    """The fits over the samples they were made from, by sensor; `root` is the data set."""
    rows = [
        (
            sensor,
            str(len(contacts[sensor])),
            f"{np.polyval(curve.loading, 1.0):.3f}",
            f"{np.polyval(curve.loading, 0.5):.3f}",
            f"{np.polyval(curve.unloading, 0.5):.3f}",
            f"{r_squared(curve, contacts[sensor]):.4f}",
        )
        for sensor, curve in curves.items()
    ]
    heads = ("sensor", "presses", "at full depth (N)", "half, loading (N)", "half, unloading (N)")
    return Page(
        kind="material",
        title=f"Force over depth, {root.resolve().name}",
        command=command("dataset", "material", root),
        verdict=Verdict(Tone.PLAIN, f"polynomials of degree {DEGREE} for {', '.join(curves)}"),
        sections=(
            Section("Curves", (Table((*heads, "R²"), rows),)),
            Section(
                "Fits over their samples",
                (Pictures([_plot(s, curves[s], contacts[s]) for s in curves]),),
            ),
        ),
    )


def _plot(sensor: str, curve: ForceDepth, contacts: list[Contact]) -> Picture:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        ways = ((True, "loading", "-", "C0"), (False, "unloading", "--", "C1"))
        for loading, name, line, colour in ways:
            for contact in contacts:
                chosen = is_loading(contact.depth, contact.phase) == loading
                force = -contact.wrench[chosen, 2]
                axes.plot(contact.depth[chosen], force, ".", color=colour, alpha=0.3)
            depth = np.linspace(0, max(contact.depth.max() for contact in contacts), 50)
            force = curve.force(depth, np.full(50, loading))
            axes.plot(depth, force, line, color=colour, label=name)
        axes.set(xlabel="depth over full depth", ylabel="normal force (N)")
        axes.legend()

    return plot(draw, f"{sensor}: measured (dots) and fitted (lines)")
