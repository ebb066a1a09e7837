"""Marker images are translated from sensor to sensor, and what is exported runs the same."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import Layout, pack, unpack
from genforce_collect.markers.registration import Registration
from genforce_infer.bundle import read_bundle
from genforce_infer.parity import Parity
from genforce_infer.runtime import Model
from genforce_train.cache import open_layout
from genforce_train.checkpoint import save_checkpoint
from genforce_train.drawing import Drawing
from genforce_train.export import export_force
from genforce_train.export_translate import export_translate
from genforce_train.losses import pixel_places, place_loss
from genforce_train.models.field import PX_PER_MM, FieldNet
from genforce_train.models.m2m import FieldTranslator, _to_gel, _to_image
from genforce_train.pairs import read_pairs
from genforce_train.sequences import area_images
from genforce_train.train_force import ForceSettings
from genforce_train.train_force import train as train_force
from genforce_train.train_m2m import M2mSettings, train
from genforce_train.translate import load_m2m, load_translator, translate, translate_data
from genforce_train.translations import frechet_distance, score_translations

SENSORS = ("left", "right")  # of paired_data; the second one's image is moved to the right
MOVED_PX = 6


def shifted(bits: np.ndarray, columns: int) -> np.ndarray:
    return pack(np.roll(unpack(bits), columns, axis=-1))


@pytest.fixture(scope="module")
def data(paired_data):
    return paired_data


def settings(data, out, blank_field, **changes) -> M2mSettings:
    few = {"steps": 6, "batch": 4, "evaluate_every": 3, "unseen": ("cone",), "curves": "none"}
    return M2mSettings(
        data=str(data), out=str(out), field_model=str(blank_field), **(few | changes)
    )


@pytest.fixture(scope="module")
def trained(data, blank_field, tmp_path_factory):
    out = tmp_path_factory.mktemp("m2m")
    return out, train(settings(data, out, blank_field, steps=40, evaluate_every=20), quiet=True)


def test_pairs_are_the_first_frame_and_the_ends_of_three_phases(data):
    pairs = read_pairs(data, unseen=("cone",))
    assert pairs.sensors == SENSORS
    assert {use: len(moments) for use, moments in pairs.uses.items()} == {
        "train": 12,
        "validation": 4,
        "test": 8,
    }
    assert (np.diff(pairs.rows[0].reshape(-1, 4), axis=1) == [2, 3, 3]).all()
    assert set(pairs.contacts[pairs.uses["test"]]) == {"cone/4", "cone/5"}


def test_paired_images_show_one_contact(data):
    pairs = read_pairs(data)
    moments = np.arange(8)
    left, right = (pairs.images(np.full(8, sensor), moments) for sensor in (0, 1))
    assert (shifted(left, MOVED_PX) == right).all()


def test_few_shot_takes_so_many_contacts_of_each_indenter(data):
    pairs = read_pairs(data, per_indenter=1, validation=0)
    assert sorted(name.split("/")[0] for name in set(pairs.contacts[pairs.uses["train"]])) == [
        "cone",
        "sphere",
    ]


def test_translation_learned_from_pairs_beats_the_reference(trained):
    _, metrics = trained
    for pair in ("left-right", "right-left"):
        assert metrics["validation"][pair]["rms_px"] < metrics["validation"][pair]["moved_px"]


def test_a_uniform_displacement_moves_the_markers_by_it():
    net = FieldTranslator()
    torch.nn.init.zeros_(net.field.head.weight)
    with torch.no_grad():
        net.field.head.bias[:] = torch.tensor([0.3, -0.2, 0.0]) / net.field.unit_mm
    net.eval()
    reference = torch.zeros(1, 1, 480, 640)
    reference[..., 200:220, 300:320] = 1
    moved = net.whole(torch.zeros(1, 2, 120, 160), reference)[0, 0]
    rows, columns = np.nonzero(moved.detach().numpy() > 0.5)
    assert columns.mean() == pytest.approx(309.5 + 0.3 * PX_PER_MM, abs=0.5)
    assert rows.mean() == pytest.approx(209.5 + 0.2 * PX_PER_MM, abs=0.5)  # y is up


@pytest.mark.parametrize("first", [0, 280])
def test_markers_that_the_network_misses_are_followed(first):
    """All of them, or those from a column on, where the others stay."""
    net = FieldTranslator().eval()
    torch.nn.init.zeros_(net.field.head.weight)
    torch.nn.init.zeros_(net.field.head.bias)
    reference, moved = np.zeros((480, 640), np.uint8), np.zeros((480, 640), np.uint8)
    for row in range(40, 460, 40):
        for column in range(40, 620, 40):
            cv2.circle(reference, (column, row), 8, 1, -1)
            there = (column + 6, row + 3) if column >= first else (column, row)
            cv2.circle(moved, there, 8, 1, -1)
    mask, still = pack(moved[None]), pack(reference)
    scores = score_translations(still, [(translate(net, mask, still, still), mask)])
    assert scores.rms_px < 0.05 * scores.moved_px


def test_place_loss_is_how_far_markers_are_put_from_where_they_stand():
    moves = torch.tensor([[[300.0, 200.0, 306.0, 203.0], [torch.nan] * 4]])
    places = pixel_places((120, 160))
    assert place_loss(places, moves).item() == pytest.approx(6 + 3 - 1, abs=1e-3)  # smooth: - 1/2
    there = places - torch.tensor([6.0, 3.0]).view(1, 2, 1, 1)
    assert place_loss(there, moves).item() == pytest.approx(0, abs=1e-3)


def test_moves_are_those_of_the_markers(data):
    pairs = read_pairs(data)
    moves = pairs.moves(np.array([0, 0]), np.array([-1, 2]))
    moved = (moves[:, :, 2:] - moves[:, :, :2]).norm(dim=2)
    assert moved[0].nan_to_num().max() < 0.01
    assert moved[1].nan_to_num().max() > 2


def test_a_displacement_that_varies_is_inverted():
    """Each marker goes to X + u(X), not to where the field at its new place would send it."""
    net = FieldTranslator().eval()
    columns = (torch.arange(40) + 0.5) * 16 - 320
    field = torch.zeros(1, 3, 30, 40)
    field[:, 0] = 0.25 * columns / PX_PER_MM  # everything stretched by a quarter
    net.field.forward = lambda images: field
    reference = torch.zeros(1, 1, 480, 640)
    reference[..., 236:244, 416:424] = 1  # 100 px right of the centre
    moved = net.whole(torch.zeros(1, 2, 120, 160), reference)[0, 0].detach().numpy() > 0.5
    assert np.nonzero(moved)[1].mean() - 319.5 == pytest.approx(125, abs=0.5)


def sees_0_3_mm():
    """A translator whose network sees all move by 0.3 mm to the right, and two references."""
    net = FieldTranslator().eval()
    torch.nn.init.zeros_(net.field.head.weight)
    with torch.no_grad():
        net.field.head.bias[:] = torch.tensor([0.3, 0.0, 0.0]) / net.field.unit_mm
    generator = torch.Generator().manual_seed(0)
    return net, *(torch.rand(120, 160, generator=generator).round() for _ in range(2))


def test_a_sensor_of_another_scale_shows_the_same_millimetres():
    net, own, other = sees_0_3_mm()
    net.know(own, Drawing(20.0))
    net.know(other, Drawing(30.0))
    image = torch.stack([own.roll(2, 1), own])[None]  # 8 px of the whole image
    shift = -net.origins(image, other[None, None])[0, 0].detach().mean() * 320
    # It sees 0.3 mm * 27 px/mm in an image of 20 px/mm.
    assert float(shift) == pytest.approx(0.3 * PX_PER_MM / 20 * 30, abs=0.3)


def test_what_a_turned_camera_sees_move_is_turned_back():
    net, own, other = sees_0_3_mm()
    net.refinements = 0
    net.know(own, Drawing(mounting=Registration(turn_rad=0.2, scale=1.1)))
    net.know(other, Drawing())
    origins = net.origins(torch.stack([own, own])[None], other[None, None])[0].detach()
    right, down = (-origins.mean((1, 2)) * 320 / PX_PER_MM).tolist()
    assert right == pytest.approx(0.3 / 1.1 * np.cos(0.2), abs=2e-3)
    assert down == pytest.approx(-0.3 / 1.1 * np.sin(0.2), abs=2e-3)


def test_known_sensors_are_told_by_their_reference_and_strangers_taken_as_drawn(trained, data):
    net, meta = load_m2m(trained[0] / "best.safetensors")
    assert meta["sensors"] == list(SENSORS)
    references = area_images(np.stack([open_layout(data).reference(name) for name in SENSORS]))
    known = net.placements(references[:, None])
    assert not torch.equal(known[0], known[1])
    stranger = net.placements(torch.ones(1, 1, 120, 160))
    torch.testing.assert_close(stranger[0, 2:], torch.zeros(9), atol=1e-4, rtol=0)


def test_half_precision_does_not_move_the_cameras(trained, data):
    net, _ = load_m2m(trained[0] / "best.safetensors")
    with torch.no_grad():
        net.placements.learned[:, :6] += torch.tensor([0.01, -0.02, 0.02, 0.01, 0.005, -0.003])
        references = area_images(open_layout(data).reference("left")[None])[None]
        with torch.autocast("cpu", torch.bfloat16):
            at = net.placements(references)
            back = _to_image(_to_gel(net.coarse, at), at)
    assert 320 * (back - net.coarse).abs().max() < 0.01  # px


def test_exported_translation_runs_as_the_model_and_the_force_model_behind_it(
    trained, data, tmp_path
):
    force = ForceSettings(
        data=str(data),
        out=str(tmp_path / "force"),
        sensors=("left",),
        steps=4,
        frames=16,
        windows=(8,),
        evaluate_every=4,
    )
    train_force(force, quiet=True)
    export_force(tmp_path / "force/best.safetensors", tmp_path / "direct")
    bundle = export_translate(
        trained[0] / "best.safetensors", tmp_path / "direct", "right", tmp_path / "bundle"
    )
    manifest = read_bundle(tmp_path / "bundle").manifest
    assert (manifest.mode, manifest.sensor) == ("translate", "right")
    assert manifest.stages == ("translate.onnx", "force.onnx")
    assert Parity.in_manifest(manifest).problem("fp32") == ""
    assert (bundle.target_reference == unpack(open_layout(data).reference("left"))).all()
    assert np.isfinite(Model(bundle, "cpu").stream().step()["force"]).all()
    with pytest.raises(ConfigError, match="direct bundle"):
        export_translate(
            trained[0] / "best.safetensors", tmp_path / "bundle", "right", tmp_path / "again"
        )


def test_translated_frames_keep_their_number_and_size(trained, data):
    cache = open_layout(data)
    net, _ = load_m2m(trained[0] / "best.safetensors")
    bits = np.array(cache.bits[:5])
    left, right = (cache.reference(name) for name in SENSORS)
    whole = translate(net, bits, left, right)
    assert whole.shape == bits.shape
    assert (translate(net, bits, left, right, batch=2) == whole).all()


def test_one_seed_gives_one_result_also_when_resumed(data, blank_field, tmp_path):
    whole = train(settings(data, tmp_path / "a", blank_field), quiet=True)
    train(settings(data, tmp_path / "b", blank_field, steps=6, patience=0), quiet=True)
    again = train(settings(data, tmp_path / "b", blank_field), quiet=True)
    assert again["validation"] == whole["validation"]


@pytest.mark.parametrize("suffix", [".npy", ".jpg"])
def test_a_translated_data_set_keeps_the_labels_and_trains(suffix, trained, data, tmp_path):
    checkpoint = trained[0] / "best.safetensors"

    def run():
        return translate_data(
            checkpoint, Layout(data), "left", "right", tmp_path, suffix=suffix, quiet=True
        )

    assert (run().contacts, run().written) == (6, 0)  # the second finds all there
    before = Layout(tmp_path).read(Layout(tmp_path).contacts()[2])
    (tmp_path / "force" / str(before.key) / "ft.csv").unlink()  # as if killed while writing it
    assert run().written == 1
    again = Layout(tmp_path).read(before.key)
    assert str(before.key).startswith("right/")
    np.testing.assert_array_equal(again.bits, before.bits)
    cache, source = open_layout(tmp_path), Layout(data).read(replace(before.key, sensor="left"))
    np.testing.assert_allclose(again.wrench, source.wrench, atol=1e-9)
    assert cache.sensors == ["right"]
    assert cache.sources[0]["labels_of"] == "left"
    assert (cache.reference("right") == open_layout(data).reference("right")).all()
    assert len(cache.rest("right")[0]) == 8


def test_a_translation_in_parts_remembers_whose_labels_each_has(trained, data, tmp_path):
    checkpoint = trained[0] / "best.safetensors"
    for indenter in ("sphere", "cone"):
        translate_data(
            checkpoint, Layout(data), "left", "right", tmp_path, indenters=[indenter], quiet=True
        )
    cache = open_layout(tmp_path)
    assert {key.indenter for key in cache.keys} == {"sphere", "cone"}
    assert all(source["labels_of"] == "left" for source in cache.sources)


def test_a_field_model_translates_without_any_pair(data, blank_field, tmp_path):
    """A blank one, so that all is by what the source's markers are seen to miss."""
    translate_data(blank_field, Layout(data), "left", "right", tmp_path, quiet=True)
    made, true = Layout(tmp_path), Layout(data)
    still = true.read_reference("right")
    pairs = [(made.read(key).bits, true.read(key).bits) for key in made.contacts()]
    scores = score_translations(still, pairs)
    assert scores.rms_px < 0.7 * scores.moved_px
    assert made.contacts() == [key for key in true.contacts() if key.sensor == "right"]


def test_another_translation_does_not_go_into_the_same_folder(trained, data, tmp_path):
    checkpoint = trained[0] / "best.safetensors"
    translate_data(checkpoint, Layout(data), "left", "right", tmp_path, quiet=True)
    with pytest.raises(DataError, match="holds other contacts"):
        translate_data(checkpoint, Layout(data), "right", "left", tmp_path, quiet=True)
    moved = np.roll(Layout(data).read_reference("right"), 1)
    with pytest.raises(DataError, match="holds other contacts"):
        translate_data(
            checkpoint, Layout(data), "left", "right", tmp_path, reference=moved, quiet=True
        )
    with pytest.raises(DataError, match="no contact of 'nobody'"):
        translate_data(checkpoint, Layout(data), "nobody", "left", tmp_path / "b", quiet=True)


# --- scores -------------------------------------------------------------------------------------


def test_scores_of_a_perfect_translation_and_of_none(toy_contact):
    contact = toy_contact(1)
    still = toy_contact(0, frames=1).bits[0]
    perfect = score_translations(still, [(contact.bits, contact.bits)])
    assert (perfect.rms_px, perfect.found, perfect.iou) == (0, 1, 1)
    assert perfect.distance == pytest.approx(0, abs=1e-4)
    none = score_translations(still, [(np.tile(still, (len(contact), 1)), contact.bits)])
    assert none.rms_px == pytest.approx(none.moved_px)
    assert none.rms_px > 1
    assert none.distance > 0.01


def test_frechet_distance_of_shifted_normals_is_their_shift():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(4000, 3))
    assert frechet_distance(first, first + np.array([2, 0, 0])) == pytest.approx(4, rel=1e-3)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sensors": ("left",)}, "two sensors"),
        ({"sensors": ("left", "nobody")}, "no sensor nobody"),
        ({"unseen": ("cone", "sphere")}, "no pair left to train on"),
        ({"field_model": "nowhere.safetensors"}, "no such checkpoint"),
    ],
)
def test_what_cannot_be_trained_is_said_before_training(
    changes, message, data, blank_field, tmp_path
):
    given = settings(data, tmp_path / "out", blank_field).model_copy(update=changes)
    with pytest.raises(DataError, match=message):
        train(given, quiet=True)
    assert not (tmp_path / "out").exists()


def test_sensors_without_common_contacts_are_named(toy_contact, tmp_path):
    layout = Layout(tmp_path)
    for sensor, number in (("left", 0), ("right", 1)):
        contact = toy_contact(number, sensor, frames=12)
        layout.write(contact)
        layout.write_reference(sensor, contact.bits[0])
    with pytest.raises(DataError, match="left, right shares no contact"):
        read_pairs(tmp_path)


def test_a_force_checkpoint_is_no_translation(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", FieldNet(), {"kind": "force"})
    for load in (load_m2m, load_translator):
        with pytest.raises(DataError, match="expected one of m2m"):
            load(tmp_path / "x.safetensors")
