"""The field model learns the gel's displacement, and force models read it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import Layout, pack
from genforce_collect.markers.registration import register
from genforce_infer.bundle import read_bundle
from genforce_infer.parity import Parity
from genforce_infer.pipeline import Engine
from genforce_infer.runtime import Model
from genforce_sim.fieldset import FieldSuite, write_shard
from genforce_sim.optics import Imperfections
from genforce_sim.sensor import SimulatedSensor
from genforce_train.cache import open_layout
from genforce_train.checkpoint import load_checkpoint, save_checkpoint
from genforce_train.export import export_force
from genforce_train.models.field import PX_PER_MM, FieldNet, FlowMaps
from genforce_train.models.force import ChangeMaps
from genforce_train.models.refined import RefinedField
from genforce_train.sequences import marker_images
from genforce_train.train_field import FieldSettings, FieldShards, fields_of, load_field
from genforce_train.train_field import train as train_field
from genforce_train.train_force import ForceSettings
from genforce_train.train_force import train as train_force


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    folder = tmp_path_factory.mktemp("field")
    suite = FieldSuite(64, 0, ("dots",), 2, ("sphere",))
    for shard in range(2):
        write_shard(folder / "data", suite, shard)
    settings = FieldSettings(
        data=str(folder / "data"),
        out=str(folder / "out"),
        validation=1,
        steps=20,
        batch=8,
        evaluate_every=10,
        threads=1,
    )
    return folder, train_field(settings, quiet=True)


def test_field_training_beats_no_displacement(field):
    _, metrics = field
    scores = metrics["validation"]
    assert scores["rmse_mm"]["z"] < scores["signal_mm"]["z"]


def trained_bundle(layout, field_model, folder, steps, refinements=0):
    settings = ForceSettings(
        data=str(layout.root),
        out=str(folder / "out"),
        input="field",
        field_model=str(field_model),
        refinements=refinements,
        steps=steps,
        frames=16,
        windows=(8,),
        evaluate_every=steps,
        threads=1,
    )
    train_force(settings, quiet=True)
    return export_force(folder / "out/best.safetensors", folder / "bundle")


@pytest.mark.parametrize("refinements", [0, 1])
def test_force_on_the_field_exports_as_two_stages(field, toy_contact, tmp_path, refinements):
    folder, _ = field
    layout = Layout(tmp_path / "data")
    for number in range(4):
        layout.write(toy_contact(number, frames=12))
    rest = toy_contact(0, frames=4)
    layout.write_reference("toy", rest.bits[0])
    layout.write_rest("toy", rest.bits[:1].repeat(8, 0), np.zeros((8, 6)))
    field_model = folder / "out/best.safetensors"
    bundle = trained_bundle(layout, field_model, tmp_path, 4, refinements)
    assert bundle.manifest.mode == "field"
    assert bundle.manifest.input.px_per_mm == pytest.approx(6.75)
    assert not Parity.in_manifest(bundle.manifest).problem("fp32")
    stream = Model(read_bundle(tmp_path / "bundle"), provider="cpu").stream()
    assert np.isfinite(stream.step()["force"]).all()
    assert open_layout(layout.root).array("rest_bits").shape[0] == 8


def test_a_field_model_that_was_trained_anew_is_not_taken_for_the_one_read_by(
    field, toy_contact, tmp_path
):
    layout = Layout(tmp_path / "data")
    for number in range(4):
        layout.write(toy_contact(number, frames=12))
    layout.write_reference("toy", toy_contact(0, frames=1).bits[0])
    field_model = tmp_path / "field.safetensors"
    shutil.copy(field[0] / "out/best.safetensors", field_model)
    trained_bundle(layout, field_model, tmp_path, 2)
    saved = load_checkpoint(field_model)
    net = load_field(field_model)
    save_checkpoint(field_model, net, saved.meta | {"note": "the same weights"})
    export_force(tmp_path / "out/best.safetensors", tmp_path / "same")
    net.head.bias.data += 1
    save_checkpoint(field_model, net, saved.meta)
    with pytest.raises(DataError, match=r"field.safetensors: trained anew since"):
        export_force(tmp_path / "out/best.safetensors", tmp_path / "other")


def test_training_and_serving_see_a_sensor_as_it_is_drawn(
    field, toy_contact, tmp_path, monkeypatch
):
    folder, _ = field
    sensor = load_sensor("array_1")
    mounted = Imperfections(turn_deg=1.5, scale=1.02, shift_px=(1.5, -1.0))
    gel = SimulatedSensor(sensor, "sphere", 0, mounted)
    still = gel.reference.mask
    down = [0, 0, -0.8e-3, np.pi, 0, 0]
    pressed = gel.mask(gel.step(np.array(down), 0.1))
    layout = Layout(tmp_path / "data")
    for number in range(2):
        contact = toy_contact(number, "array_1", frames=8)
        layout.write(replace(contact, bits=pack(pressed)[None].repeat(8, 0)))
    layout.write_reference("array_1", pack(still))
    layout.write_rest("array_1", pack(still)[None].repeat(8, 0), np.zeros((8, 6)))
    field_model = folder / "out/best.safetensors"
    bundle = trained_bundle(layout, field_model, tmp_path, steps=1)

    how = register(still.astype(np.uint8), sensor)
    assert how.scale == pytest.approx(1.02, abs=2e-3)
    bits = [pack(how.upright(mask.astype(np.uint8)))[None] for mask in (pressed, still)]
    seen = marker_images(*bits)
    with torch.inference_mode():
        expected = load_field(field_model)(seen)[0].numpy()
    trained_on = fields_of(field_model, open_layout(layout.root), ["array_1"])
    np.testing.assert_allclose(trained_on[0], expected, atol=1e-3)

    engine = Engine(Model(bundle, provider="cpu"), sensor, still.astype(np.uint8))
    engine.infer(pressed.astype(np.uint8))
    np.testing.assert_allclose(engine.stream.image, seen.numpy(), atol=1e-6)

    other = sensor.model_copy(update={"layout": load_sensor("circle_1").layout})
    monkeypatch.setattr("genforce_train.drawing.load_sensor", lambda name: other)
    changed = fields_of(field_model, open_layout(layout.root), ["array_1"])
    assert not np.array_equal(changed, trained_on), "a sensor file that changed counts at once"


@pytest.mark.parametrize("front", [ChangeMaps(), FlowMaps()])
def test_front_ends_see_nothing_where_nothing_moved(front):
    still = torch.rand(1, 1, 120, 160)
    maps = front(torch.cat([still, still], 1))
    moved = maps[:, :4] if maps.shape[1] == 5 else maps
    torch.testing.assert_close(moved, torch.zeros_like(moved), atol=1e-5, rtol=0)


def test_optical_flow_finds_a_small_shift():
    rows, columns = torch.meshgrid(torch.arange(120.0), torch.arange(160.0), indexing="ij")

    def markers(x: float, y: float) -> torch.Tensor:
        wave = torch.cos((columns - x) * 0.7) * torch.cos((rows - y) * 0.7)
        return (0.5 + 0.5 * wave)[None, None]

    flow = FlowMaps()(torch.cat([markers(0.6, -0.4), markers(0, 0)], 1))
    inner = flow[0, :, 3:-3, 3:-3].mean((1, 2))
    torch.testing.assert_close(inner, torch.tensor([0.6, -0.4]), atol=0.1, rtol=0)


def test_mirrored_scene_has_mirrored_change_maps():
    images = torch.rand(2, 2, 120, 160)
    for axis, odd in ChangeMaps.odd.items():
        maps = ChangeMaps()(images).flip(axis)
        maps[:, odd] *= -1
        torch.testing.assert_close(ChangeMaps()(images.flip(axis)), maps, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("times", [1, 2])
def test_what_a_field_model_misses_is_added_by_refinement(times):
    blind = FieldNet().eval()
    torch.nn.init.zeros_(blind.head.weight)
    with torch.no_grad():
        blind.head.bias[:] = torch.tensor([0.0, 0.05, 0.02]) / blind.unit_mm
    still = torch.rand(120, 160, generator=torch.Generator().manual_seed(0)).round()
    images = torch.stack([still.roll(1, 1), still])[None]  # moved right by 4 px of the whole image
    refined = RefinedField(blind, times)(images)[0, :, 2:-2, 2:-2].mean((1, 2)).tolist()
    assert refined == pytest.approx([4 / PX_PER_MM, 0.0, 0.02], abs=0.05 / times)


def test_refinements_of_what_a_model_does_not_read_are_refused(tmp_path):
    settings = ForceSettings(data=str(tmp_path), refinements=1)
    with pytest.raises(ConfigError, match="refinements are of the displacement; give input=field"):
        train_force(settings)


def test_too_few_shards_are_named(tmp_path):
    with pytest.raises(DataError, match="genforce synth"):
        FieldShards(tmp_path, slice(None))


def test_a_force_checkpoint_is_no_field_model(tmp_path):
    from genforce_train.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "x.safetensors", FieldNet(), {"kind": "force"})
    with pytest.raises(DataError, match="expected a field"):
        load_field(tmp_path / "x.safetensors")


def test_field_input_without_a_field_model_says_what_is_missing(tmp_path):
    settings = ForceSettings(data=str(tmp_path), input="field")
    with pytest.raises(ConfigError, match="field_model"):
        train_force(settings, quiet=True)
