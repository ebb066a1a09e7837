"""Training learns, repeats, resumes, and what it exports runs the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import Layout
from genforce_infer.bundle import read_bundle
from genforce_infer.runtime import Model
from genforce_train.cache import open_layout
from genforce_train.checkpoint import load_checkpoint, save_checkpoint
from genforce_train.config import read_settings
from genforce_train.evaluate import score
from genforce_train.export import export_force
from genforce_train.models.force import MODELS, CompactForceNet, PaperForceNet, parameters
from genforce_train.sequences import marker_images
from genforce_train.train_force import ForceSettings, predict, source_of, train


@pytest.fixture(scope="module")
def data(toy_contact, tmp_path_factory):
    layout = Layout(tmp_path_factory.mktemp("data"))
    for number in range(10):
        layout.write(toy_contact(number))
    rest = toy_contact(0, frames=4)
    layout.write_reference("toy", rest.bits[0])
    layout.write_rest("toy", rest.bits[:1].repeat(8, 0), np.zeros((8, 6)))
    open_layout(layout.root)
    return layout.root


def settings(data, out, **changes) -> ForceSettings:
    few = {"steps": 6, "frames": 16, "windows": (8,), "evaluate_every": 3, "threads": 1}
    return ForceSettings(data=str(data), out=str(out), **(few | changes))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    changes = {"steps": 50, "frames": 48, "windows": (8, 16), "evaluate_every": 25}
    return out, train(settings(data, out, **changes), quiet=True)


def test_training_learns_unseen_contacts(trained):
    _, metrics = trained
    assert metrics["contacts"]["validation"] == 1
    assert metrics["train"]["r2"]["fz"] > 0.8
    assert metrics["validation"]["r2"]["fz"] > 0.7


def test_a_bag_is_trained_on_as_it_was_recorded(bags, tmp_path):
    bags.write(tmp_path / "bag", numbers=(0, 1, 2))
    metrics = train(settings(tmp_path / "bag", tmp_path / "out"), quiet=True)
    assert metrics["contacts"] == {"train": 2, "validation": 1, "test": 0}
    assert (tmp_path / "out/best.safetensors").is_file()


def test_exported_bundle_gives_the_forces_of_the_model(trained, data, tmp_path):
    out, _ = trained
    export_force(out / "best.safetensors", tmp_path / "bundle")
    model = Model(read_bundle(tmp_path / "bundle"), provider="cpu")
    manifest = model.manifest
    saved = load_checkpoint(out / "best.safetensors")
    net = CompactForceNet(outputs=len(manifest.outputs))
    saved.restore_model(net)
    cache = open_layout(data)
    source = source_of(ForceSettings.model_validate(saved.meta["settings"]), cache)
    expected, _, rest = predict(net, source, cache, [3], saved.meta)
    stream, answers = model.stream(), []
    reference = cache.reference("toy")
    for bits in [*[reference] * 6, *cache.bits[cache.rows(3)]]:
        stream.image[:] = marker_images(bits[None], reference[None]).numpy()
        force = stream.step()["force"][0].copy()
        answers.append(force * manifest.normalisation.scale + manifest.normalisation.offset)
    np.testing.assert_allclose(np.array(answers)[6:], expected - rest.mean(0), atol=5e-3)
    assert manifest.rate_hz == pytest.approx(30, abs=0.1)
    assert manifest.sensor == "toy"


def test_one_seed_gives_one_result(data, tmp_path):
    first = train(settings(data, tmp_path / "a"), quiet=True)
    again = train(settings(data, tmp_path / "b"), quiet=True)
    assert first["train"] == again["train"]


def test_training_goes_on_from_what_its_init_answers(trained, data, tmp_path):
    out, metrics = trained
    changes = {"init": str(out / "best.safetensors"), "few_shot": 1, "learning_rate": 1e-9}
    again = train(settings(data, tmp_path, **changes), quiet=True)
    before, after = metrics["validation"]["mae"], again["validation"]["mae"]
    assert after == pytest.approx(before, rel=1e-3)


def test_killed_training_resumes_to_the_same_result(data, tmp_path):
    changes = {"steps": 15, "evaluate_every": 1}
    whole = train(settings(data, tmp_path / "whole", **changes), quiet=True)
    chosen = settings(data, tmp_path / "killed", **changes)
    (tmp_path / "settings.json").write_text(chosen.model_dump_json())
    program = (
        "import sys; from genforce_train.train_force import *; "
        "train(ForceSettings.model_validate_json(open(sys.argv[1]).read()), quiet=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "settings.json")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "killed" / "last.safetensors"
    deadline = time.monotonic() + 60
    while not checkpoint.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert load_checkpoint(checkpoint).meta["step"] < 15
    resumed = train(chosen.model_copy(update={"resume": True}), quiet=True)
    assert resumed["train"] == whole["train"]


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_streaming_frame_by_frame_equals_the_whole_sequence(kind):
    torch.manual_seed(0)
    net = MODELS[kind](outputs=3).eval()
    images = torch.rand(1, 3, len(net.channels), *net.size)
    with torch.inference_mode():
        whole, _ = net(images)
        state, steps = net.zero_state(), []
        for frame in images[0]:
            force, state, _ = net.step(frame[None], state)
            steps.append(force)
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-5, rtol=1e-4)


def test_paper_model_has_its_published_size():
    assert parameters(PaperForceNet()) == pytest.approx(6.53e6, rel=0.001)


def test_unknown_settings_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"stepz.*known are out, steps"):
        read_settings(ForceSettings, ["data=x", "stepz=3"])


def test_settings_come_from_a_file_and_words_over_it(tmp_path):
    (tmp_path / "s.yaml").write_text("data: here\nsteps: 10\nunseen: [cone]\n")
    read = read_settings(ForceSettings, [str(tmp_path / "s.yaml"), "steps=20", "sensors=a,b"])
    assert (read.data, read.steps, read.unseen, read.sensors) == ("here", 20, ("cone",), ("a", "b"))


def test_settings_out_of_range_name_the_key():
    with pytest.raises(ConfigError, match="learning_rate"):
        read_settings(ForceSettings, ["data=x", "learning_rate=-1"])


def test_a_sensor_that_is_not_there_is_named_before_training(data, tmp_path):
    with pytest.raises(DataError, match="known sensors are toy"):
        train(settings(data, tmp_path, sensors=("other",)), quiet=True)


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", torch.nn.Linear(2, 2), {"kind": "force"})
    with pytest.raises(DataError, match="another architecture"):
        load_checkpoint(tmp_path / "x.safetensors").restore_model(CompactForceNet())
    (tmp_path / "y.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="damaged"):
        load_checkpoint(tmp_path / "y.safetensors")


def test_scores_of_perfect_and_constant_predictions():
    measured = np.random.default_rng(0).normal(size=(50, 6))
    perfect = score(measured, measured)
    assert perfect.r2["fz"] == 1
    assert perfect.mae_total_n == 0
    constant = score(np.tile(measured.mean(0), (50, 1)), measured)
    assert constant.r2["fx"] == pytest.approx(0)


def test_metrics_are_kept_with_the_model(trained):
    out, metrics = trained
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (out / "scatter_validation.png").stat().st_size > 1000
    assert load_checkpoint(out / "best.safetensors").meta["metrics"]["steps"] == 50
