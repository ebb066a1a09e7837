"""Imports run one way: msgs <- collect <- infer <- train, collect <- sim <- train."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "genforce_collect": {"genforce_msgs"},
    "genforce_sim": {"genforce_msgs", "genforce_collect"},
    "genforce_infer": {"genforce_msgs", "genforce_collect"},
    "genforce_train": {"genforce_msgs", "genforce_collect", "genforce_sim", "genforce_infer"},
}
WITHOUT_TORCH = ("genforce_collect", "genforce_infer")


def imported(package: str) -> set[tuple[str, str]]:
    """(file, top-level package) of every import of a package's own code, tests left out."""
    found = set()
    for path in (ROOT / package / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            else:
                continue
            found |= {(str(path.relative_to(ROOT)), name.split(".")[0]) for name in names}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_the_layers_below_it(package):
    above = {
        (path, name)
        for path, name in imported(package)
        if name.startswith("genforce_") and name not in ALLOWED[package] | {package}
    }
    assert not above


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_collection_and_inference_run_without_torch(package):
    assert not {(path, name) for path, name in imported(package) if name == "torch"}


def test_only_the_live_view_needs_its_viewer():
    files = {path for package in ALLOWED for path, name in imported(package) if name == "rerun"}
    assert files
    assert all(path.startswith("genforce_collect/genforce_collect/view/") for path in files)
