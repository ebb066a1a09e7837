"""The tables of docs/results.md are those of the figures kept beside it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from genforce_collect.errors import DataError

DOCS = Path(__file__).parents[1] / "docs"
SCORES = dict.fromkeys(("fx", "fy", "fz", "tx"), 0.9876543)


@pytest.fixture
def make_results():
    spec = importlib.util.spec_from_file_location("make_results", DOCS / "make_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_on_the_page_are_what_was_measured(make_results):
    page = make_results.PAGE.read_text()
    shown = {match[1] for match in make_results.BLOCK.findall(page)}
    assert shown == {path.stem for path in make_results.FIGURES.glob("*.json")}
    assert make_results.written(page) == page


def test_figures_name_no_path_of_one_machine(make_results):
    for path in make_results.FIGURES.glob("*.json"):
        recipe = json.loads(path.read_text())["recipe"]
        assert not [value for value in recipe.values() if str(value).startswith("/")], path


def test_a_finished_experiment_changes_its_own_tables_alone(make_results, tmp_path, monkeypatch):
    monkeypatch.setattr(make_results, "FIGURES", tmp_path / "figures")
    result = {"r2": SCORES, "mae": SCORES, "mae_total_n": 0.5, "fz_of_peak": 0.25, "seed": 3}
    results = [
        result | {"source": "a", "target": "b", "method": method, "indenters": indenters}
        for method in ("field, 0 pairs", "oracle")
        for indenters in ("seen", "unseen")
    ]
    recipe = {"experiment": "softness", "seed": 3, "data": str(DOCS.parent / "runs/data")}
    folder = tmp_path / "softness"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "recipe.json").write_text(json.dumps(recipe))
    judged = {"source": "a", "target": "b", "labels": "calibrated", "r2": SCORES, "error": SCORES}
    (folder / "labels.json").write_text(json.dumps([judged]))
    make_results.take(folder)
    kept = json.loads((make_results.FIGURES / "softness.json").read_text())
    assert kept["recipe"] == recipe | {"data": "runs/data"}
    page = "a\n\n<!-- softness: mean, unseen -->\n| old |\n| --- |\n\n| other |\n"
    text = make_results.written(page)
    assert "| old |" not in text
    assert text.endswith(" |\n\n| other |\n")
    assert "| field, 0 pairs | 0.988 / 0.988 / 0.988 | 0.988" in text
    assert make_results.written(text) == text
    text = make_results.written("<!-- softness: labels -->\n")
    assert "| a → b, calibrated | 0.988 / 0.988 / 0.988 | 98.8 / 98.8 / 98.8 % |" in text
    with pytest.raises(DataError, match="each, all"):
        make_results.written(page.replace("mean, unseen", "each, all"))
    shutil.rmtree(make_results.FIGURES)
    with pytest.raises(DataError, match="no such table"):
        make_results.written(page)
