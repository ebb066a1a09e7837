"""The 18 indenters, meshes of any origin, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh

from genforce_collect.errors import ConfigError
from genforce_sim.indenters import INDENTERS, REACH_MM, load_indenter


@pytest.mark.parametrize("name", sorted(INDENTERS))
def test_every_indenter_of_the_set_has_its_tip_at_the_origin_height(name: str) -> None:
    height = load_indenter(name).height_mm
    assert height.min() == pytest.approx(0.0, abs=1e-3)
    assert height.max() == pytest.approx(REACH_MM, abs=0.1)
    assert len(INDENTERS) == 18


def save(tmp_path: Path, mesh: trimesh.Trimesh, name: str = "part.stl") -> Path:
    path = tmp_path / name
    mesh.export(path)
    return path


def ball_on_a_plate() -> trimesh.Trimesh:
    ball = trimesh.creation.icosphere(subdivisions=4, radius=5.0)
    plate = trimesh.creation.box(extents=(16, 16, 4))
    return trimesh.util.concatenate([ball, plate.apply_translation([0, 0, -7])])


def test_a_mesh_presses_like_the_shape_it_is(tmp_path: Path) -> None:
    mesh = load_indenter(save(tmp_path, ball_on_a_plate()))
    sphere = load_indenter("sphere")
    x = np.linspace(-3, 3, 41, dtype=np.float32)[None]
    assert mesh.behind_tip(x, 0 * x) == pytest.approx(sphere.behind_tip(x, 0 * x), abs=0.03)


def test_a_mesh_need_not_be_watertight(tmp_path: Path) -> None:
    whole = ball_on_a_plate()
    open_mesh = trimesh.Trimesh(whole.vertices, whole.faces[:-1], process=False)
    assert not open_mesh.is_watertight
    load_indenter(save(tmp_path, open_mesh))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (np.diag([1 / 25.4] * 3 + [1]), "inches"),
        (np.diag([0.001] * 3 + [1]), "metres"),
        (np.diag([1, -1, -1, 1]), r"tip must point along \+z"),
        (np.diag([4, 4, 4, 1]), "at most 12 mm"),
        (trimesh.transformations.translation_matrix([30, 0, 0]), "centre it"),
    ],
)
def test_a_mesh_that_is_no_tip_in_millimetres_is_refused(
    tmp_path: Path, change: np.ndarray, complaint: str
) -> None:
    path = save(tmp_path, ball_on_a_plate().apply_transform(change))
    with pytest.raises(ConfigError, match=complaint) as refusal:
        load_indenter(path)
    assert str(path) in str(refusal.value)


def test_an_empty_or_unreadable_mesh_is_refused(tmp_path: Path) -> None:
    for name, content in (("empty.stl", b""), ("noise.obj", b"\x00\xff not a mesh")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            load_indenter(tmp_path / name)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown indenter 'ball'.*sphere_s"):
        load_indenter("ball")


def test_real_parts_agree_with_the_generated_ones(realdata: Path) -> None:
    for path in sorted((realdata / "indenters").glob("*.stl")):
        part, ours = load_indenter(path).height_mm, load_indenter(path.stem).height_mm
        area = (np.minimum(part, ours) < 3).sum()
        differ = (np.abs(np.minimum(part, 3) - np.minimum(ours, 3)) > 0.3).sum()
        assert differ < (0.3 if path.stem == "random" else 0.03) * area, path.stem
