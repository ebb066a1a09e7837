"""The spectral solver against the finite-strain reference, where both should agree."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from genforce_collect.config import GelConfig
from genforce_collect.errors import ConfigError
from genforce_sim import mpm
from genforce_sim.compliance import Grid
from genforce_sim.elastomer import Elastomer, RigidMotion
from genforce_sim.indenters import load_indenter

GEL = GelConfig.model_validate(
    {
        "width_mm": 10.0,
        "height_mm": 10.0,
        "thickness_mm": 4.0,
        "youngs_modulus_pa": 1.45e5,
        "poisson_ratio": 0.45,
        "friction": 0.0,
        "relaxation_ratio": 0.0,
    }
)
DEPTH_MM = 0.3


def test_a_shallow_press_agrees_with_the_spectral_solver(tmp_path: Path) -> None:
    pytest.importorskip("taichi")
    indenter = load_indenter("sphere")
    reference = mpm.press(GEL, indenter, DEPTH_MM, cell_mm=0.5)

    elastomer = Elastomer(GEL, Grid.over(15.0, 15.0, 0.2))
    for depth in (0.1, 0.2, DEPTH_MM):

        def face(x: np.ndarray, y: np.ndarray, depth: float = depth) -> np.ndarray:
            return indenter.behind_tip(x, y) - np.float32(depth)

        elastomer.step(face, RigidMotion(), 0.0)
    place = reference.rest_mm[reference.surface]
    column = place[:, 0] / 0.2 + (elastomer.grid.columns - 1) / 2
    row = place[:, 1] / 0.2 + (elastomer.grid.rows - 1) / 2
    field = np.ascontiguousarray(np.moveaxis(elastomer.displacement, 0, -1))
    spectral = cv2.remap(
        field, column[None].astype(np.float32), row[None].astype(np.float32), cv2.INTER_LINEAR
    )[0]
    inner = np.hypot(place[:, 0], place[:, 1]) < 3.0
    difference = np.abs(reference.surface_displacement_mm - spectral)[inner]
    assert difference.max() < 0.1 * np.abs(spectral).max()
    assert reference.force_n[2] == pytest.approx(elastomer.wrench[2], rel=0.1)

    reference.save(tmp_path / "press.npz")
    saved = np.load(tmp_path / "press.npz", allow_pickle=False)
    assert saved["p_xpos_list"][-1].shape == reference.rest_mm.shape


def test_a_depth_beyond_the_gel_and_an_unknown_device_are_refused() -> None:
    indenter = load_indenter("sphere")
    with pytest.raises(ConfigError, match="within the 4 mm gel"):
        mpm.press(GEL, indenter, 4.0)
    with pytest.raises(ConfigError, match="must be cpu or gpu"):
        mpm.press(GEL, indenter, 0.3, device="tpu")
