"""Labels are carried to another gel by presses with slides, and by nothing else of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import Layout
from genforce_train.borrow import partners
from genforce_train.cache import open_layout
from genforce_train.calibration import Calibration, carried_wrench, course_of
from genforce_train.checkpoint import load_checkpoint
from genforce_train.experiment_labels import judge_labels
from genforce_train.experiment_report import labels
from genforce_train.materials import ForceDepth
from genforce_train.train_force import ForceSettings, train

# What a flat punch feels: (N/mm normal, normal over shear stiffness, friction).
HARD, SOFT = (8.0, 2.0, 0.5), (2.0, 1.3, 0.9)
FRAMES = 10  # a phase
TURN = np.array([np.cos(0.7), np.sin(0.7)])  # where it slides to


def punch(
    toy_contact, sensor, gel, number=0, depth=1.0, slide=1.0, turn=TURN, at=(0.0, 0.0), indenter="x"
):
    """A contact of a flat punch on a gel, by the laws of springs and friction."""
    stiffness, yielding, friction = gel
    n = FRAMES
    ramp, one, no = np.linspace(1 / n, 1, n), np.ones(n), np.zeros(n)
    pressed = depth * np.concatenate([ramp, one, one, 1 - ramp])
    slid = slide * np.concatenate([no, ramp, 1 - ramp, no])
    load = stiffness * pressed
    stick, slip = stiffness / yielding, friction * stiffness * depth
    out = np.minimum(stick * slide * ramp, slip)
    back = np.maximum(out[-1] - stick * slide * ramp, -slip)
    shear = np.concatenate([no, out, back, back[-1] * (1 - ramp)])
    base = toy_contact(number, sensor, indenter, frames=4 * n)
    tip = np.column_stack([np.outer(slid, turn) + at, -pressed]) * 1e-3
    force = np.column_stack([np.outer(shear, turn), -load])
    return replace(
        base,
        pose=np.column_stack([tip, np.zeros((4 * n, 3))]),
        wrench=np.column_stack([force, np.cross(tip, force)]),
        depth=pressed,
        phase=np.repeat(np.array([2, 3, 4, 5], np.uint8), n),
    )


def cache_of(root, contacts):
    layout = Layout(root)
    for contact in contacts:
        layout.write(contact)
        layout.write_reference(contact.key.sensor, contact.bits[0])
    return open_layout(root)


def slides(root, toy_contact, gels):
    """What `--plan slide` gives of each gel."""
    return cache_of(
        root,
        [
            punch(toy_contact, sensor, gel, number, depth)
            for sensor, gel in gels.items()
            for number, depth in enumerate((0.25, 1.0))
        ],
    )


@pytest.fixture(scope="module")
def calibration(tmp_path_factory, toy_contact):
    root = tmp_path_factory.mktemp("slides")
    return slides(root, toy_contact, {"hard": HARD, "soft": SOFT})


@pytest.mark.parametrize(("sensor", "gel"), [("hard", HARD), ("soft", SOFT)])
def test_slides_tell_stiffness_yielding_and_friction(calibration, sensor, gel):
    found = Calibration.fit(calibration, sensor)
    assert found.friction == pytest.approx(gel[2], rel=0.02)
    assert found.indenters["x"].yielding == pytest.approx(gel[1], rel=0.02)
    assert found.indenters["x"].load(np.array([0.5])) == pytest.approx(gel[0] / 2, rel=0.01)


def test_carried_labels_are_those_the_target_would_have_measured(
    calibration, toy_contact, tmp_path
):
    """Of another depth, slide and direction than were calibrated."""
    press = {"number": 7, "depth": 0.6, "slide": 0.8, "turn": np.array([-0.6, 0.8]), "at": (2, 1)}
    truth = punch(toy_contact, "soft", SOFT, **press)
    unknown = replace(truth, wrench=np.zeros_like(truth.wrench))
    cache = cache_of(tmp_path, [punch(toy_contact, "hard", HARD, **press), unknown])
    (contact,) = cache.select(["soft"])
    (partner,) = partners(cache, [contact], "hard")
    hard, soft = (Calibration.fit(calibration, sensor) for sensor in ("hard", "soft"))
    carried = carried_wrench(cache, contact, partner, hard, soft)
    np.testing.assert_allclose(carried[:, :3], truth.wrench[:, :3], atol=0.06)
    np.testing.assert_allclose(carried[:, 3:], truth.wrench[:, 3:], atol=3e-4)


def test_shear_that_no_calibration_knows_of_is_carried_in_proportion(
    calibration, toy_contact, tmp_path
):
    press = punch(toy_contact, "hard", HARD)
    across = np.zeros_like(press.wrench)
    out = slice(FRAMES, 2 * FRAMES)
    across[out, :2] = np.outer(np.linspace(0, 0.5, FRAMES), [-TURN[1], TURN[0]])
    cache = cache_of(
        tmp_path, [replace(press, wrench=press.wrench + across), punch(toy_contact, "soft", SOFT)]
    )
    (contact,) = cache.select(["soft"])
    hard, soft = (Calibration.fit(calibration, sensor) for sensor in ("hard", "soft"))
    carried = carried_wrench(cache, contact, *partners(cache, [contact], "hard"), hard, soft)
    found = carried[out, :2][-1] @ [-TURN[1], TURN[0]]
    # 1.54 N of the soft gel's to 4 N of the hard one's.
    assert found == pytest.approx(0.5 * 1.54 / 4, rel=0.1)


@pytest.mark.parametrize(("name", "part"), [("soft", 1.0), ("tactip", 0.0)])
def test_load_that_no_calibration_knows_of_is_carried_to_gels_of_one_shape(
    toy_contact, tmp_path, name, part
):
    """A tenth more on the source is one on the target, but not on a dome."""
    gels = {"hard": HARD, name: SOFT}
    known = slides(tmp_path / "slides", toy_contact, gels)
    press = punch(toy_contact, "hard", HARD)
    more = np.where(np.arange(6) == 2, 1.1, 1.0)
    contacts = [replace(press, wrench=press.wrench * more), punch(toy_contact, name, SOFT)]
    cache = cache_of(tmp_path / "data", contacts)
    (contact,) = cache.select([name])
    hard, soft = (Calibration.fit(known, sensor) for sensor in gels)
    carried = carried_wrench(cache, contact, *partners(cache, [contact], "hard"), hard, soft)
    found = carried[FRAMES - 1, 2] / soft.force(course_of(cache, contact), "x")[FRAMES - 1, 2]
    assert found == pytest.approx(1 + 0.1 * part, rel=0.01)


def test_a_dome_is_entered_later_off_its_apex(toy_contact, tmp_path):
    radius = load_sensor("tactip").gel.dome_radius_mm
    at = punch(toy_contact, "tactip", SOFT, at=(5.0, 0.0), depth=2.0)
    cache = cache_of(tmp_path, [at])
    course = course_of(cache, 0)
    sag = radius - np.sqrt(radius**2 - 25)
    assert course.depth_mm[FRAMES - 1] == pytest.approx(2 - sag, abs=1e-6)
    assert course.depth_mm[0] == 0


def test_what_cannot_be_carried_is_named(calibration, toy_contact, tmp_path):
    with pytest.raises(DataError, match="no calibration contact of 'other'"):
        Calibration.fit(calibration, "other")
    cache = cache_of(tmp_path, [punch(toy_contact, "soft", SOFT, indenter="cone")])
    soft = Calibration.fit(calibration, "soft")
    with pytest.raises(DataError, match=r"no calibration contact of cone on 'soft'; .* of x"):
        soft.force(course_of(cache, 0), "cone")
    press = punch(toy_contact, "soft", SOFT)
    press.phase[:] = np.repeat(np.array([8, 9], np.uint8), 2 * FRAMES)
    pressed = cache_of(tmp_path / "press", [press])
    with pytest.raises(DataError, match="soft/x/0 has no phase 2, 3, 4, 5"):
        Calibration.fit(pressed, "soft")
    with pytest.raises(ConfigError, match="labels_of=SENSOR"):
        train(ForceSettings(data=str(tmp_path), calibration=str(tmp_path)))


def test_labels_are_judged_by_what_the_target_measured(calibration, toy_contact, tmp_path):
    data = [
        punch(toy_contact, sensor, gel, number, depth)
        for sensor, gel in (("hard", HARD), ("soft", SOFT))
        for number, depth in enumerate((0.4, 0.7, 1.0))
    ]
    root = tmp_path / "data"
    cache_of(root, data)
    for sensor in ("hard", "soft"):
        presses = [contact for contact in data if contact.key.sensor == sensor]
        ForceDepth.fit(presses).write(tmp_path / "material", sensor)
    judged = judge_labels(
        str(root), [("hard", "soft")], tmp_path / "material", calibration.folder.parent
    )
    error = {one["labels"]: one["error"] for one in judged}
    assert error["as they are"]["fz"] == pytest.approx(HARD[0] / SOFT[0] - 1)
    assert error["compensated"]["fz"] == pytest.approx(0, abs=0.03)
    assert error["compensated"]["fx"] > 0.3  # friction differs, and no press tells
    assert max(error["calibrated"].values()) < 0.05
    table = labels(judged).markdown()
    assert "| hard → soft, as they are |" in table
    assert table.count(" 300.0 %") == 2  # the pair, and the mean of this one


def test_training_takes_the_carried_labels(calibration, toy_contact, tmp_path):
    """From labels of the target that are none, what is learned are its forces."""
    contacts = []
    for number, depth in enumerate((0.4, 1.0)):
        contacts.append(punch(toy_contact, "hard", HARD, number, depth))
        unknown = punch(toy_contact, "soft", SOFT, number, depth)
        contacts.append(replace(unknown, wrench=np.zeros_like(unknown.wrench)))
    layout = Layout(tmp_path / "data")
    for sensor in ("hard", "soft"):
        layout.write_rest(sensor, contacts[0].bits[:1].repeat(4, 0), np.zeros((4, 6)))
    cache_of(layout.root, contacts)
    train(
        ForceSettings(
            data=str(layout.root),
            out=str(tmp_path / "out"),
            sensors=("soft",),
            labels_of="hard",
            calibration=str(calibration.folder.parent),
            validation=0,
            steps=1,
            frames=8,
            windows=(8,),
            curves="none",
        ),
        quiet=True,
    )
    scale = load_checkpoint(tmp_path / "out/best.safetensors").meta["scale"]
    truth = np.concatenate([punch(toy_contact, "soft", SOFT, depth=d).wrench for d in (0.4, 1.0)])
    assert scale[2] == pytest.approx(np.sqrt((truth[:, 2] ** 2).mean()), rel=0.02)
