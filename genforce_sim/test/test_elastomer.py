"""Contact of the bonded layer against closed-form solutions and conservation laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import fft

from genforce_collect.config import GelConfig
from genforce_sim.compliance import Grid, layer_compliance
from genforce_sim.elastomer import Elastomer, RigidMotion
from genforce_sim.indenters import Indenter, load_indenter

Array = NDArray[Any]

MODULUS_MPA = 0.25
# Sum of 1/r over a square lattice on a neutral background: what a contact on a periodic domain
# feels of its images.
LATTICE_SUM = 3.90026492


def gel(
    thickness_mm: float = 4.0,
    poisson: float = 0.48,
    friction: float = 0.0,
    relaxation: float = 0.0,
    width_mm: float = 25.0,
) -> GelConfig:
    return GelConfig.model_validate(
        {
            "width_mm": width_mm,
            "height_mm": width_mm,
            "thickness_mm": thickness_mm,
            "youngs_modulus_pa": MODULUS_MPA * 1e6,
            "poisson_ratio": poisson,
            "friction": friction,
            "relaxation_ratio": relaxation,
        }
    )


def half_space(width_mm: float, poisson: float) -> GelConfig:
    """A layer whose uniform compliance cancels the periodic images of the contact; its other
    wavenumbers are those of a half-space."""
    contact = LATTICE_SUM * width_mm * (1 - poisson**2) / math.pi
    uniform = (1 + poisson) * (1 - 2 * poisson) / (1 - poisson)
    return gel(thickness_mm=contact / uniform, poisson=poisson, width_mm=width_mm)


def pressed(config: GelConfig, cells: int, face: Callable[[Array, Array], Array]) -> float:
    """Force (N) under a rigid face."""
    grid = Grid(cells, cells, config.width_mm / cells)
    elastomer = Elastomer(config, grid, tolerance=1e-4)
    elastomer.step(face, RigidMotion(), 0.0)
    return -float(elastomer.wrench[2])


def walk(elastomer: Elastomer, indenter: Indenter, path: Array, dt_s: float = 0.02) -> Array:
    """Forces (n, 3) N along tip positions (n, 3) mm."""
    forces, last = [], path[0]
    for tip in path:

        def face(x: Array, y: Array, tip: Array = tip) -> Array:
            return indenter.behind_tip(x - tip[0], y - tip[1]) + np.float32(tip[2])

        elastomer.step(face, RigidMotion(shift_mm=(tip[0] - last[0], tip[1] - last[1])), dt_s)
        forces.append(elastomer.wrench[:3])
        last = tip
    return np.array(forces)


def line(*corners: tuple[float, float, float], step_mm: float = 0.1) -> Array:
    """Positions along straight lines between corners."""
    points = [np.array(corners[:1])]
    for a, b in itertools.pairwise(corners):
        count = math.ceil(math.dist(a, b) / step_mm)
        points.append(np.linspace(a, b, count + 1)[1:])
    return np.concatenate(points)


def live_gel(**properties: Any) -> Elastomer:
    """A gel on the grid of the live cell."""
    return Elastomer(gel(**properties), Grid.over(30.0, 30.0, 0.3125))


# --- against closed forms ---------------------------------------------------------------------


def test_the_normal_compliance_is_the_classical_one_of_a_bonded_layer() -> None:
    k, h, poisson = np.array([0.01, 0.1, 0.5, 1.0, 3.0, 10.0]), 4.0, 0.45
    a, kappa = k * h, 3 - 4 * poisson
    mu = MODULUS_MPA / (2 * (1 + poisson))
    classical = (1 - poisson) / (mu * k) * (2 * kappa * np.sinh(2 * a) - 4 * a)
    classical /= 2 * kappa * np.cosh(2 * a) + kappa**2 + 1 + 4 * a**2
    assert layer_compliance(k, h, MODULUS_MPA, poisson).zz == pytest.approx(classical, rel=1e-9)


def test_surface_compliance_is_reciprocal_and_the_base_does_not_move() -> None:
    k = np.linspace(0, 12, 50)
    surface = layer_compliance(k, 4.0, MODULUS_MPA, 0.47)
    assert surface.lz == pytest.approx(surface.zl, abs=1e-9)
    base = layer_compliance(k, 4.0, MODULUS_MPA, 0.47, depth_mm=4.0)
    for part in base:
        assert np.abs(part).max() < 1e-9


@pytest.mark.parametrize("poisson", [0.3, 0.45])
def test_a_sphere_on_a_half_space_gives_hertz(poisson: float) -> None:
    radius, depth = 20.0, 0.1
    force = pressed(
        half_space(20.0, poisson), 128, lambda x, y: (x**2 + y**2) / (2 * radius) - depth
    )
    hertz = 4 / 3 * MODULUS_MPA / (1 - poisson**2) * math.sqrt(radius) * depth**1.5
    assert force == pytest.approx(hertz, rel=0.01)


def test_a_flat_punch_converges_to_its_closed_form_with_the_grid() -> None:
    radius, depth, poisson = 3.0, 0.05, 0.3

    def face(x: Array, y: Array) -> Array:
        return np.where(x**2 + y**2 <= radius**2, -depth, 10.0)

    exact = 2 * radius * depth * MODULUS_MPA / (1 - poisson**2)
    errors = [
        abs(pressed(half_space(20.0, poisson), cells, face) / exact - 1) for cells in (64, 256)
    ]
    assert errors[0] < 0.03
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("chi", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_a_thin_bonded_layer_stiffens_as_published(chi: float) -> None:
    """Garcia and Garcia (2018), who corrected the higher terms of Dimitriadis et al. (2002)."""
    radius, depth, poisson = 20.0, 0.05, 0.4999
    thickness = math.sqrt(radius * depth) / chi
    width = max(8 * thickness, 10.0)
    cells = int(fft.next_fast_len(round(width / 0.12)))
    force = pressed(
        gel(thickness, poisson, width_mm=width),
        cells,
        lambda x, y: (x**2 + y**2) / (2 * radius) - depth,
    )
    hertz = 4 / 3 * MODULUS_MPA / (1 - poisson**2) * math.sqrt(radius) * depth**1.5
    correction = 1 + 1.133 * chi + 1.497 * chi**2 + 1.469 * chi**3 + 0.755 * chi**4
    assert force == pytest.approx(hertz * correction, rel=0.03)


# --- friction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("indenter", ["sphere", "moon", "dots"])
def test_shear_never_exceeds_friction_times_pressure(indenter: str) -> None:
    elastomer = live_gel(friction=0.5)
    path = line((0, 0, 0.1), (0, 0, -0.9), (1.5, 0, -0.9), (-0.5, 0.8, -0.4))
    force = walk(elastomer, load_indenter(indenter), path)
    shear = np.hypot(force[:, 0], force[:, 1])
    assert (shear <= 0.5 * -force[:, 2] * (1 + 1e-4) + 1e-6).all()
    assert shear.max() > 0.45 * -force[shear.argmax(), 2]  # most of it slides
    local = np.hypot(*elastomer.traction[:2])
    assert (local <= 0.5 * -elastomer.traction[2] * (1 + 1e-4) + 1e-7).all()


def test_before_sliding_part_of_the_contact_sticks() -> None:
    elastomer = live_gel(friction=0.8)
    walk(elastomer, load_indenter("sphere"), line((0, 0, 0.1), (0, 0, -0.9), (0.3, 0, -0.9)))
    pressure = -elastomer.traction[2]
    mobilised = np.hypot(*elastomer.traction[:2])[pressure > 0] / (0.8 * pressure[pressure > 0])
    assert 0.1 < (mobilised < 0.95).mean() < 0.98


def test_gel_under_a_sticking_tip_moves_with_it_and_pulls_it_back() -> None:
    elastomer = live_gel(friction=2.5)
    path = line((0, 0, 0.1), (0, 0, -0.6), (0.4, 0, -0.6))
    force = walk(elastomer, load_indenter("cylinder"), path)
    row, column = np.array(elastomer.displacement.shape[1:]) // 2
    assert elastomer.displacement[0, row, column] == pytest.approx(0.4, abs=0.02)
    assert force[-1, 0] > 0.3  # N, what the indenter does to the gel


@pytest.mark.parametrize(("friction", "relaxation"), [(0.0, 0.0), (0.3, 0.0), (0.8, 0.2)])
@pytest.mark.parametrize("indenter", ["sphere", "cylinder"])
def test_a_closed_loop_never_yields_energy(
    indenter: str, friction: float, relaxation: float
) -> None:
    elastomer = live_gel(friction=friction, relaxation=relaxation)
    corners = [(0, 0, 0.1), (0, 0, -1), (1, 0, -1), (1, 0.7, -0.6), (0.5, -0.5, -1.1)]
    path = line(*corners, (0, 0, -0.7), (0, 0, 0.1))
    force = walk(elastomer, load_indenter(indenter), path)
    work = np.cumsum(((force[1:] + force[:-1]) / 2 * np.diff(path, axis=0)).sum(axis=1))
    assert work.min() > -0.01 * work.max()
    assert work[-1] > (0.05 * work.max() if friction else -0.01 * work.max())


# --- time -------------------------------------------------------------------------------------


def test_force_at_rest_relaxes_to_the_equilibrium_ratio() -> None:
    elastomer = live_gel(relaxation=0.3)
    indenter = load_indenter("sphere")
    down = np.array([[0.0, 0.0, -0.8]])
    start = walk(elastomer, indenter, down.repeat(8, axis=0), dt_s=0.0)[-1, 2]
    halfway = walk(elastomer, indenter, down.repeat(10, axis=0), dt_s=0.05)[-1, 2]
    end = walk(elastomer, indenter, down.repeat(20, axis=0), dt_s=0.5)[-1, 2]
    assert halfway / start == pytest.approx(0.7 + 0.3 * math.exp(-1), abs=0.01)
    assert end / start == pytest.approx(0.7, abs=0.005)


def test_unloading_gives_less_force_than_loading_and_the_gel_recovers() -> None:
    elastomer = live_gel(relaxation=0.25)
    path = line((0, 0, 0.1), (0, 0, -1), (0, 0, 0.1))
    force = walk(elastomer, load_indenter("sphere"), path, dt_s=0.05)
    half = len(path) // 2
    assert -force[half + 4, 2] < 0.95 * -force[half - 4, 2]
    walk(elastomer, load_indenter("sphere"), np.array([[0, 0, 1.0]]).repeat(12, axis=0), dt_s=1.0)
    assert np.abs(elastomer.displacement).max() < 1e-3


def test_the_result_does_not_depend_on_the_step() -> None:
    forces = []
    for step in (0.2, 0.05):
        path = line((0, 0, 0), (0, 0, -1), (1, 0, -1), step_mm=step)
        elastomer = live_gel(friction=0.8, relaxation=0.15)
        forces.append(walk(elastomer, load_indenter("sphere"), path, dt_s=step / 5)[-1])
    assert forces[0] == pytest.approx(forces[1], abs=0.03 * np.abs(forces[1]).max())


def test_there_is_no_force_beyond_the_edge_of_the_gel() -> None:
    elastomer = live_gel()
    force = walk(elastomer, load_indenter("sphere_s"), np.array([[14.6, 0, -0.5]]))
    assert force[-1] == pytest.approx([0, 0, 0], abs=1e-12)
