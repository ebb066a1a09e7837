"""Force models on recordings of a real sensor, within and across sessions, beside ridge regression.

    genforce experiment sessions --recordings A.h5 B.h5

Within a session a fifth of its presses, drawn by the seed, is the test; across sessions one whole
session is. Ridge regression reads the displacement of every marker, in three dimensions or in the
image plane alone; the models read marker images drawn from them. No model is chosen by what it
scores on a test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genforce_collect.errors import DataError
from genforce_collect.html import (
    PAGE_NAME,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Tone,
    Verdict,
    command,
    write_page,
)
from genforce_collect.layout import write_json
from genforce_train.cache import Cache, open_layout, split_contacts
from genforce_train.experiment import pin

TEST_PART = 0.2  # of the presses of a session
BASELINES = {"ridge": 3, "ridge, image plane": 2}  # axes of the displacement that each reads
RIDGES = 10.0 ** np.arange(-4, 4)  # relative to the mean variance of the inputs
FOLDS = 5
MODELS = {"compact": "markers", "field": "field"}  # what each reads
STEPS = 6000
# Presses are some ten frames long.
SHORT = {"windows": (4, 8), "frames": 64, "rest_frames": 2}


def run_sessions(recordings: Sequence[str], field_model: str, out: Path, seed: int) -> str:
    """Import, train and score; returns the table, also kept under `out`. Raises `DataError`."""
    from genforce_train.marker_recordings import import_recordings

    if not recordings:
        raise DataError("give --recordings A.h5 B.h5 ...: sessions on one sensor")
    pin({"seed": seed, "steps": STEPS}, [field_model, *recordings], out)
    import_recordings(recordings, out / "data")
    cache = open_layout(out / "data")
    displaced = _displacements(recordings, cache)
    sessions = sorted({key.indenter for key in cache.keys})
    results = []
    for train, test in [(s, s) for s in sessions] + [
        (a, b) for a in sessions for b in sessions if a != b
    ]:
        learned, held = _split(cache, train, test, seed)
        for method in (*BASELINES, *MODELS):
            path = out / "scores" / f"{train}_on_{test}_{method.replace(', ', '_')}.json"
            if not path.is_file():
                predicted = (
                    _ridge(cache, displaced[..., : BASELINES[method]], learned, held)
                    if method in BASELINES
                    else _network(cache, method, train, test, learned, held, field_model, out, seed)
                )
                _keep(path, cache, held, predicted)
            score = json.loads(path.read_text())
            results.append({"train": train, "test": test, "method": method, "seed": seed, **score})
    write_json(out / "results.json", results)
    scores = table(results)
    (out / "table.md").write_text(scores.markdown() + "\n")
    words = ["experiment", "sessions", "--recordings", *recordings, "--field", field_model]
    page = Page(
        kind="experiment",
        title=f"sessions: {len(sessions)} recordings of a real sensor, seed {seed}",
        command=command(*words, "-o", out, "--seed", seed),
        verdict=Verdict(Tone.PLAIN, "R² and errors on presses that no model has seen"),
        facts={"presses": str(len(cache.keys)), "frames": str(cache.frames)},
        sections=[
            Section("Within and across sessions", (scores,)),
            Section("Predicted over measured force", (Pictures(_pictures(out)),)),
        ],
    )
    write_page(page, out / PAGE_NAME)
    return scores.markdown()


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row a split and method."""
    heads = (
        "trained on → tested on",
        "method",
        "R² Fx / Fy / Fz",
        "MAE Fx / Fy / Fz (N)",
        "frames",
    )
    rows = []
    for result in results:
        r2 = " / ".join(f"{result['r2'][axis]:.3f}" for axis in ("fx", "fy", "fz"))
        mae = " / ".join(f"{result['mae'][axis]:.3f}" for axis in ("fx", "fy", "fz"))
        test = "itself" if result["train"] == result["test"] else result["test"]
        pair = f"{result['train']} → {test}"
        rows.append((pair, result["method"], r2, mae, str(result["frames"])))
    return Table(heads, rows)


def _pictures(out: Path) -> list[Picture]:
    paths = sorted((out / "pictures").glob("*.png"))
    return [Picture(path.read_bytes(), path.stem.replace("_", " ")) for path in paths]


def _split(cache: Cache, train: str, test: str, seed: int) -> tuple[list[int], list[int]]:
    """Contacts to learn from, and to test on."""
    own = split_contacts(cache, cache.select(indenters=[train]), seed, TEST_PART)
    held = own.validation if train == test else cache.select(indenters=[test])
    if not own.train or not held:
        raise DataError(f"{cache.folder}: session {train} has too few presses to hold some out")
    return own.train, held


def _ridge(cache: Cache, displaced: np.ndarray, learned: list[int], held: list[int]) -> np.ndarray:
    """Forces (n, 3) of the held contacts by linear regression; the ridge is chosen by folds over
    whole presses."""
    displaced = displaced.reshape(cache.frames, -1)
    wrench = np.array(cache.wrench)[:, :3]
    folds = [learned[start::FOLDS] for start in range(FOLDS)]

    def error(ridge: float) -> float:
        total = 0.0
        for fold in folds:
            others = _rows(cache, [row for row in learned if row not in fold])
            weights = _fit(displaced[others], wrench[others], ridge)
            rows = _rows(cache, fold)
            total += float(((_apply(displaced[rows], weights) - wrench[rows]) ** 2).sum())
        return total

    rows = _rows(cache, learned)
    weights = _fit(displaced[rows], wrench[rows], min(RIDGES, key=error))
    return _apply(displaced[_rows(cache, held)], weights)


def _fit(inputs: np.ndarray, outputs: np.ndarray, ridge: float) -> np.ndarray:
    """(k + 1, 3) weights, the last row constant."""
    inputs = np.column_stack([inputs, np.ones(len(inputs))])
    penalty = ridge * len(inputs) * inputs[:, :-1].var(0).mean() * np.eye(inputs.shape[1])
    penalty[-1, -1] = 0
    return np.asarray(np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ outputs))


def _apply(inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.asarray(inputs @ weights[:-1] + weights[-1])


def _network(
    cache: Cache,
    method: str,
    train: str,
    test: str,
    learned: list[int],
    held: list[int],
    field_model: str,
    out: Path,
    seed: int,
) -> np.ndarray:
    from genforce_train.experiment_work import predict_with
    from genforce_train.train_force import ForceSettings
    from genforce_train.train_force import train as train_force

    folder = out / "models" / f"{train}_{method}"
    if not (folder / "metrics.json").is_file():
        values: dict[str, Any] = {
            "data": str(out / "data"),
            "out": str(folder),
            "indenters": (train,),
            "validation": TEST_PART,
            "steps": STEPS,
            "evaluate_every": STEPS,  # once, at the end: none is chosen by a score
            "seed": seed,
            "input": MODELS[method],
            **SHORT,
        }
        if method == "field":
            values["field_model"] = field_model
        train_force(ForceSettings.model_validate(values))
    (sensor,) = {cache.keys[row].sensor for row in held}
    return predict_with(folder / "best.safetensors", cache, sensor, held)[0][:, :3]


def _keep(path: Path, cache: Cache, held: list[int], predicted: np.ndarray) -> None:
    from genforce_train.evaluate import scatter, score

    measured = np.array(cache.wrench)[_rows(cache, held)]
    scatter(path.parents[1] / "pictures" / f"{path.stem}.png", predicted, measured, path.stem)
    write_json(path, score(predicted, measured).as_dict())


def _displacements(recordings: Sequence[str], cache: Cache) -> np.ndarray:
    """(frames, markers, 3) mm of the cache's frames."""
    from genforce_train.marker_recordings import read_recording

    by_name = {recording.name: recording for recording in map(read_recording, recordings)}
    parts = []
    for key in cache.keys:
        recording = by_name[key.indenter]
        parts.append(recording.displacement_mm[recording.segment == key.number])
    return np.concatenate(parts)


def _rows(cache: Cache, contacts: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.r_[cache.rows(row)] for row in contacts])
