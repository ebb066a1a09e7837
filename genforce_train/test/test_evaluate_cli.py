"""Evaluation shows where a model fails, with frames."""

from __future__ import annotations

import json

import numpy as np
import pytest

from genforce_bringup.cli import main
from genforce_train.failures import CONTACT_N, ForceErrors, confusion
from genforce_train.train_force import ForceSettings
from genforce_train.train_force import train as train_force
from genforce_train.train_m2m import M2mSettings
from genforce_train.train_m2m import train as train_m2m


def test_force_evaluation_names_the_worst_contacts_with_their_frames(paired_data, tmp_path, capsys):
    settings = ForceSettings(
        data=str(paired_data),
        out=str(tmp_path),
        sensors=("left",),
        unseen=("cone",),
        steps=4,
        frames=16,
        windows=(8,),
        evaluate_every=4,
        curves="none",
    )
    metrics = train_force(settings, quiet=True)
    model = str(tmp_path / "best.safetensors")
    assert main(["evaluate", model, "--worst", "1"]) == 0
    page = (tmp_path / "evaluation/report.html").read_text()
    assert "left/cone/4" in page or "left/cone/5" in page
    assert page.count("data:image/png;base64,") == 4  # scatter, phases, curves, frame
    scores = json.loads((tmp_path / "evaluation/scores.json").read_text())
    assert scores["mae"]["fz"] == pytest.approx(metrics["test"]["mae"]["fz"], rel=1e-5)
    assert main(["evaluate", model, "--sensors", "right", "--use", "all", "-o", str(tmp_path)]) == 0
    assert "right/" in (tmp_path / "report.html").read_text()
    assert main(["evaluate", model, "--sensors", "nobody"]) != 0
    assert "left, right" in capsys.readouterr().err


def test_translation_evaluation_shows_the_worst_frames(paired_data, blank_field, tmp_path):
    settings = M2mSettings(
        data=str(paired_data),
        out=str(tmp_path),
        field_model=str(blank_field),
        steps=1,
        batch=2,
        unseen=("cone",),
        curves="none",
    )
    train_m2m(settings, quiet=True)
    assert main(["evaluate", str(tmp_path / "best.safetensors"), "--worst", "2"]) == 0
    page = (tmp_path / "evaluation/report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # two frames each way
    assert "left → right" in page


def test_confusion_counts_frames_with_and_without_contact():
    strong, weak = np.array([[0, 0, -1.0]]), np.array([[0, 0, CONTACT_N / 2]])
    errors = ForceErrors(
        cache=None,
        contacts=[0],
        predicted=[np.concatenate([strong, weak, strong])],
        measured=[np.concatenate([strong, strong, weak])],
        rest=weak,
    )
    assert [list(row) for row in confusion(errors).rows] == [
        ["contact", "1", "1"],
        ["none", "1", "1"],
    ]
