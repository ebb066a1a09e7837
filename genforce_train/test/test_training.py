"""What all stages share: a run repeats, resumes wherever it was killed, is shared by processes, and
says what is wrong before it begins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from genforce_collect.errors import ConfigError, DataError
from genforce_train.checkpoint import load_checkpoint
from genforce_train.models.encoder import MarkerEncoder
from genforce_train.models.force import CompactForceNet, PaperForceNet
from genforce_train.training import Run, RunSettings, recompute_blocks, start

STEPS = 12


def toy_settings(out, **changes) -> RunSettings:
    few = {"steps": STEPS, "evaluate_every": 5, "learning_rate": 0.1, "curves": "none"}
    return RunSettings(out=str(out), **(few | changes))


def toy_train(settings: RunSettings, killed_at: int | None = None) -> Run:
    """Fits a plane with noise of its own, as a VAE has."""
    start(settings)
    net = nn.Linear(2, 1)
    run = Run(settings, net, {"kind": "toy"}, quiet=True)
    for step in run.steps():
        if step == killed_at:
            return run
        points = torch.from_numpy(run.share(run.rng(step).normal(size=(8, 2)))).float()
        noise = 0.1 * torch.randn(len(points), 1)
        with run.autocast():
            predicted = run.model(points + noise)
        run.descend((predicted.float() - points.sum(1, keepdim=True)).square().mean())
        if run.due:
            error = float((net.weight.detach() - 1).abs().sum())
            run.keep(error, {"weight": {"error": error}})
    run.finish({"step": run.meta["step"]})
    return run


def last_state(run: Run):
    return load_checkpoint(run.last)


@pytest.mark.parametrize("killed_at", [0, 1, 4, 5, 7, 11])
def test_a_run_killed_at_any_step_resumes_to_the_same_state(killed_at, tmp_path):
    whole = last_state(toy_train(toy_settings(tmp_path / "whole")))
    settings = toy_settings(tmp_path / "killed")
    toy_train(settings, killed_at)
    resumed = last_state(toy_train(settings.model_copy(update={"resume": True})))
    for part, tensors in whole.parts.items():
        for name, value in tensors.items():
            assert torch.equal(resumed.parts[part][name], value), f"{part}.{name}"
    for name in ("step", "best", "stale", "scores"):
        assert resumed.meta[name] == whole.meta[name]


def test_patience_ends_a_run_that_gets_no_better(tmp_path):
    run = toy_train(toy_settings(tmp_path, learning_rate=1e-12, patience=1, evaluate_every=3))
    assert run.meta["step"] == 6
    assert load_checkpoint(run.best).meta["step"] == 3
    assert load_checkpoint(run.best).meta["metrics"] == {"step": 6}


def test_a_run_that_patience_ended_is_not_trained_on_by_resuming_it(tmp_path):
    settings = toy_settings(tmp_path, learning_rate=1e-12, patience=1, evaluate_every=3)
    before = last_state(toy_train(settings))
    after = last_state(toy_train(settings.model_copy(update={"resume": True})))
    assert after.meta["step"] == before.meta["step"] == 6


def test_a_run_that_diverges_says_so_and_shows_no_earlier_runs_model(tmp_path):
    earlier = toy_train(toy_settings(tmp_path))
    assert earlier.best.is_file()
    with pytest.raises(DataError, match=r"after step 5, .* diverged; learning_rate=1e\+30"):
        toy_train(toy_settings(tmp_path, learning_rate=1e30, warmup=0))
    assert not earlier.best.exists()
    assert not (tmp_path / "metrics.json").exists()


def test_a_batch_that_processes_cannot_share_evenly_is_refused(tmp_path):
    run = Run(toy_settings(tmp_path), nn.Linear(2, 1), {}, quiet=True)
    run._accelerator = SimpleNamespace(num_processes=3, process_index=1)
    assert run.share(np.arange(6)).tolist() == [1, 4]
    with pytest.raises(ConfigError, match="3 processes cannot share a batch of 8"):
        run.share(np.arange(8))


def test_curves_are_there_to_look_at_while_it_trains(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy_train(toy_settings(tmp_path, curves="tensorboard"))
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert {"loss", "learning_rate", "error", "weight.error"} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("error")] == [5, 10, 12]


def test_mixed_precision_computes_in_bfloat16(tmp_path):
    start(toy_settings(tmp_path))
    run = Run(toy_settings(tmp_path, precision="bf16"), nn.Linear(2, 1), {}, quiet=True)
    with run.autocast():
        assert run.model(torch.zeros(1, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [PaperForceNet, MarkerEncoder])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    torch.manual_seed(0)
    net = kind()
    image = torch.rand(1, 1, *net.size)
    image = image[:, None] if kind is PaperForceNet else image

    def gradients():
        net.zero_grad()
        torch.manual_seed(1)
        net(image)[0].square().sum().backward()
        return [parameter.grad.clone() for parameter in net.parameters() if parameter.requires_grad]

    plain = gradients()
    recompute_blocks(net)
    for once, twice in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(once, twice, atol=1e-6, rtol=1e-4)


@pytest.mark.timeout(300)
def test_two_processes_train_as_one_does(paired_data, blank_field, tmp_path):
    fresh = tmp_path / "data"  # whose cache both begin to make
    shutil.copytree(paired_data, fresh, ignore=shutil.ignore_patterns(".cache*"))
    words = [
        f"field_model={blank_field}",
        "steps=3",
        "batch=4",
        "evaluate_every=3",
        "precision=fp32",
        "curves=none",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    for out, data, words_before in ((one, paired_data, []), (two, fresh, launch)):
        command = [sys.executable, *words_before, "-m", "genforce_bringup.cli", "train", "m2m"]
        finished = subprocess.run(
            [*command, *words, f"data={data}", f"out={out}", "--quiet"],
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
    alone, shared = (load_checkpoint(out / "last.safetensors") for out in (one, two))
    assert shared.meta["step"] == 3
    for name, value in alone.model.items():
        torch.testing.assert_close(shared.model[name], value, atol=2e-4, rtol=1e-3)


# --- bad input ----------------------------------------------------------------------------------


def test_what_is_not_there_is_named(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            start(toy_settings(tmp_path, device="cuda"))
    with pytest.raises(DataError, match=r"last\.safetensors: no such checkpoint"):
        toy_train(toy_settings(tmp_path, resume=True))
    settings = toy_settings(tmp_path, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="CompactForceNet is too small"):
        Run(settings, CompactForceNet(), {}, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ConfigError, match="pip install wandb"):
            toy_train(toy_settings(tmp_path, curves="wandb"))


def test_a_checkpoint_of_another_architecture_is_not_resumed(tmp_path):
    toy_train(toy_settings(tmp_path))
    with pytest.raises(DataError, match="another architecture"):
        Run(toy_settings(tmp_path, resume=True), nn.Linear(3, 1), {}, quiet=True)
