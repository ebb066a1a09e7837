"""Force of a press and a slide by what a few calibration contacts of a sensor say of it.

The labels of one sensor do not fit another that is pressed in the same way: its gel is softer,
thicker or a dome. What it would have measured follows from contacts like those of `--plan slide`,
one or more of each indenter: pressed in, slid sideways, slid back, lifted, with the force on it.

The normal force is a polynomial of depth for each indenter, for loading and for unloading. A dome
is entered later off its apex: by its sag, for which its radius is known. Shear needs no curve of
its own. By the theorem of Jäger (1998) and Ciavarella (1998) a normal force P and a slide s give

    Q(d, s) = friction * (P(d) - P(d - s / (friction * yielding)))

for a contact of any shape, as far as the indenter has gone in at all (d below 0: P = 0, it slips),
`yielding` being the ratio of normal to shear stiffness; a slide back takes twice the force of half
the way off (Masing). One number of the sensor and one an indenter are fitted to the slides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import NORMAL_DEC, NORMAL_INC, SHEAR_DEC, SHEAR_INC
from genforce_sim.elastomer import dome_height
from genforce_train.borrow import borrowed
from genforce_train.cache import Cache

PHASES = (NORMAL_INC, SHEAR_INC, SHEAR_DEC, NORMAL_DEC)
DEGREE = 4  # of force over depth
SLIGHT_SHEAR_N = 1.0  # a difference between measured and modelled shear below it hardly carries
SLIGHT_LOAD_N = 0.3  # likewise of moments, below this normal force


@dataclass(frozen=True)
class Course:
    """How the tip of one contact goes: (n,) each, and the direction (2,) it slides in."""

    depth_mm: np.ndarray  # below the gel's surface where the tip is
    slid_mm: np.ndarray  # from where it was pressed in
    phase: np.ndarray
    direction: np.ndarray

    def during(self, phase: int) -> np.ndarray:
        """Numbers of the frames of a phase."""
        return np.flatnonzero(self.phase == phase)


@dataclass(frozen=True)
class Indented:
    """One indenter on one gel. Polynomials give N over mm, highest power first."""

    loading: np.ndarray
    unloading: np.ndarray
    full_mm: float  # depth from which it was unloaded
    slid: float  # part of the normal force that a whole slide leaves
    returned: float  # and the way back
    yielding: float = 1.0  # normal over shear stiffness

    def load(self, depth_mm: np.ndarray) -> np.ndarray:
        """(n,) N, pressed in so far."""
        return np.maximum(np.polyval(self.loading, np.maximum(depth_mm, 0)), 0)

    def shear(self, depth_mm: np.ndarray, slid_mm: np.ndarray, friction: float) -> np.ndarray:
        """(n,) N at depths after slides; see the module."""
        back = depth_mm - slid_mm / (friction * self.yielding)
        return friction * (self.load(depth_mm) - self.load(back))

    def left(self, part: np.ndarray) -> np.ndarray:
        """(n,) part of the force of loading that is left while unloading, at parts of the depth
        from which it is unloaded."""
        depth = part * self.full_mm
        return np.clip(np.polyval(self.unloading, depth) / np.maximum(self.load(depth), 1e-9), 0, 1)


@dataclass(frozen=True)
class Calibration:
    """What calibration contacts say of a sensor."""

    sensor: str
    friction: float
    indenters: dict[str, Indented]

    @classmethod
    def fit(cls, cache: Cache, sensor: str) -> Calibration:
        """Fit the contacts of a sensor. Raises `DataError` where there are none, or without a
        slide."""
        rows: dict[str, list[int]] = {}
        for row in cache.select([sensor]):
            rows.setdefault(cache.keys[row].indenter, []).append(row)
        if not rows:
            raise DataError(f"{cache.folder}: no calibration contact of '{sensor}'")
        slides: dict[str, list[tuple[Course, np.ndarray]]] = {}
        for name, contacts in rows.items():
            slides[name] = [(course_of(cache, row), _wrench(cache, row)) for row in contacts]
        indenters = {name: _indented(contacts) for name, contacts in slides.items()}
        friction, yieldings = _shear_fit(indenters, slides)
        found = {
            name: replace(one, yielding=float(yielding))
            for (name, one), yielding in zip(indenters.items(), yieldings, strict=True)
        }
        return cls(sensor, friction, found)

    def force(self, course: Course, indenter: str) -> np.ndarray:
        """(n, 3) N of a contact. Raises `DataError` for an indenter without calibration."""
        if indenter not in self.indenters:
            raise DataError(
                f"no calibration contact of {indenter} on '{self.sensor}'; there are those of "
                f"{', '.join(self.indenters)}"
            )
        model = self.indenters[indenter]
        down, out, back, up = map(course.during, PHASES)
        depth, slid = course.depth_mm, course.slid_mm
        way = max(float(slid[out[-1]]), 1e-9)
        load, shear = np.zeros(len(depth)), np.zeros(len(depth))
        load[down] = model.load(depth[down])
        load[out] = model.load(depth[out]) * (1 + (model.slid - 1) * slid[out] / way)
        part = slid[back] / way
        load[back] = model.load(depth[back]) * (
            model.returned + (model.slid - model.returned) * part
        )
        part = np.clip(depth[up] / max(float(depth[back[-1]]), 1e-9), 0, 1)
        load[up] = model.load(depth[up]) * model.left(part)
        shear[out] = model.shear(depth[out], slid[out], self.friction)
        taken = model.shear(depth[back], (way - slid[back]) / 2, self.friction)
        shear[back] = shear[out[-1]] - 2 * taken
        shear[up] = shear[back[-1]] * np.minimum(1, load[up] / max(load[back[-1]], 1e-9))
        return np.column_stack([shear[:, None] * course.direction, -load])


def carried_wrench(
    cache: Cache, contact: int, partner: int, source: Calibration, target: Calibration
) -> np.ndarray:
    """(n, 6) N and N m that the target would have measured in `contact`: the force of its own
    calibration and, in proportion, what the source measured in `partner` beyond the source's, of
    normal force where both gels have one shape; and moments about the tip in proportion to it."""
    indenter = cache.keys[contact].indenter
    wrench = _wrench(cache, partner)
    modelled = source.force(course_of(cache, partner), indenter)
    ours = target.force(course_of(cache, contact), indenter)
    about_tip = wrench[:, 3:] - np.cross(_tip(cache, partner), wrench[:, :3])
    rest = borrowed(cache, contact, partner, np.column_stack([wrench[:, :3] - modelled, about_tip]))
    shear, their_shear = (np.hypot(*force[:, :2].T).max() for force in (ours, modelled))
    load, their_load = (-force[:, 2].min() for force in (ours, modelled))
    ours[:, :2] += rest[:, :2] * _proportion(shear, their_shear, SLIGHT_SHEAR_N)
    loads = rest[:, 2:] * _proportion(load, their_load, SLIGHT_LOAD_N)
    if _dome_mm(source.sensor) == _dome_mm(target.sensor):  # a dome's is not true of a flat gel
        ours[:, 2] += loads[:, 0]
    return np.column_stack([ours, np.cross(_tip(cache, contact), ours) + loads[:, 1:]])


def course_of(cache: Cache, contact: int) -> Course:
    """How the tip of a contact goes. Raises `DataError` where it does not press and slide."""
    rows, key = cache.rows(contact), cache.keys[contact]
    phase, tip = np.array(cache.array("phase")[rows]), _tip(cache, contact) * 1e3
    if missing := set(PHASES) - set(phase.tolist()):
        raise DataError(
            f"{cache.folder}: {key} has no phase {', '.join(map(str, sorted(missing)))}; labels "
            f"are carried for contacts that press, slide, slide back and lift"
        )
    if not np.isfinite(tip).all():
        raise DataError(f"{cache.folder}: {key} has no pose to carry labels by")
    before, after = np.flatnonzero(phase == NORMAL_INC)[-1], np.flatnonzero(phase == SHEAR_INC)[-1]
    way = tip[after, :2] - tip[before, :2]
    return Course(
        depth_mm=np.maximum(_surface_mm(key.sensor, tip) - tip[:, 2], 0),
        slid_mm=np.linalg.norm(tip[:, :2] - tip[before, :2], axis=1),
        phase=phase,
        direction=way / max(float(np.linalg.norm(way)), 1e-9),
    )


def _indented(contacts: Sequence[tuple[Course, np.ndarray]]) -> Indented:
    """The curves of one indenter; how it yields to shear is not known yet."""
    deepest, wrench = max(contacts, key=lambda contact: float(contact[0].depth_mm.max()))
    _, out, back, up = map(deepest.during, PHASES)
    loading = _polynomial(
        np.concatenate([course.depth_mm[course.during(NORMAL_INC)] for course, _ in contacts]),
        np.concatenate([-force[course.during(NORMAL_INC), 2] for course, force in contacts]),
    )
    unloading = _polynomial(deepest.depth_mm[up], -wrench[up, 2])
    full = float(deepest.depth_mm[back[-1]])
    pressed = Indented(loading, unloading, full, 1.0, 1.0).load(deepest.depth_mm)
    left = -wrench[:, 2] / np.maximum(pressed, 1e-9)
    return Indented(loading, unloading, full, float(left[out[-1]]), float(left[back[-1]]))


def _polynomial(depth_mm: np.ndarray, load: np.ndarray) -> np.ndarray:
    """(DEGREE + 1,) coefficients through zero force at zero depth, by least squares."""
    powers = depth_mm[:, None] ** np.arange(DEGREE, 0, -1)
    return np.append(np.linalg.lstsq(powers, load, rcond=None)[0], 0.0)


def _shear_fit(
    indenters: dict[str, Indented], slides: dict[str, list[tuple[Course, np.ndarray]]]
) -> tuple[float, np.ndarray]:
    """Friction of the sensor and how each indenter yields, that fit all slides best."""
    names = list(indenters)

    def misses(values: np.ndarray) -> np.ndarray:
        parts = []
        for name, yielding in zip(names, values[1:], strict=True):
            model = replace(indenters[name], yielding=yielding)
            for course, wrench in slides[name]:
                out = course.during(SHEAR_INC)
                measured = wrench[out, :2] @ course.direction
                found = model.shear(course.depth_mm[out], course.slid_mm[out], values[0])
                parts.append((found - measured) / max(float(measured.max()), 1e-2))
        return np.concatenate(parts)

    low, high = [0.1] + [0.2] * len(names), [2.0] + [10.0] * len(names)
    found = least_squares(misses, [0.7] + [2.0] * len(names), bounds=(low, high)).x
    return float(found[0]), found[1:]


def _proportion(ours: float, theirs: float, slight: float) -> float:
    """How much of a difference on the source is one on the target: by the ratio of the two forces,
    and less where the source's is slight."""
    return ours * theirs / (theirs**2 + slight**2)


def _surface_mm(sensor: str, tip_mm: np.ndarray) -> np.ndarray:
    """(n,) height of the gel's surface at rest, where the tip is."""
    return dome_height(tip_mm[:, 0], tip_mm[:, 1], _dome_mm(sensor))


def _dome_mm(sensor: str) -> float | None:
    """Radius of a sensor's gel, none where it is flat."""
    with contextlib.suppress(ConfigError):  # a data set of others has no sensor files: flat
        return load_sensor(sensor).gel.dome_radius_mm
    return None


def _tip(cache: Cache, contact: int) -> np.ndarray:
    """(n, 3) m, sensor frame."""
    return np.array(cache.array("pose")[cache.rows(contact)])[:, :3]


def _wrench(cache: Cache, contact: int) -> np.ndarray:
    """(n, 6) N and N m. Raises `DataError` for labels that are no numbers."""
    wrench = np.array(cache.wrench[cache.rows(contact)])
    if not np.isfinite(wrench).all():
        raise DataError(f"{cache.folder}: {cache.keys[contact]} has labels that are no numbers")
    return wrench
