"""Tables of results.md, written from what experiments measured and from nothing else.

    genforce experiment softness                              # leaves results.json, labels.json
    python docs/make_results.py runs/experiments/softness     # takes it, writes the tables anew
    python docs/make_results.py                               # the tables alone
    python docs/make_results.py --check                       # fails where they differ

A table of the page stands below a comment that says of which experiment and what it shows, e.g.
`<!-- softness: mean, unseen -->`; see `VIEWS`. The figures are kept in docs/results/, one file an
experiment, by the name of its folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from genforce_collect.errors import DataError
from genforce_collect.html import Table
from genforce_train.experiment import EXPERIMENTS, LABELS
from genforce_train.experiment_report import FORCES, Result, each, images, labels, means, of_oracle

PAGE = Path(__file__).parent / "results.md"
FIGURES = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- (\w+): ([\w, ]+) -->\n)((?:\|.*\n)*)")
DIGITS = 5  # that are kept; tables show three


def mean(results: Sequence[Result]) -> Table:
    """One row a method, over the pairs."""
    return means(results, list(dict.fromkeys(result["method"] for result in results)))


def softer(results: Sequence[Result]) -> Table:
    """The same of the pairs from a harder to a softer gel."""
    order = EXPERIMENTS["softness"].sensors.index
    return mean([one for one in results if order(one["source"]) < order(one["target"])])


def by_pair(results: Sequence[Result]) -> Table:
    """One row a pair, one column a method: R² of the three axes, and error over the oracle's."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    cells: dict[str, dict[str, str]] = {}
    for one in results:
        r2 = " / ".join(f"{one['r2'][axis]:.2f}" for axis in FORCES)
        row = cells.setdefault(f"{one['source']} → {one['target']}", {})
        row[one["method"]] = f"{r2}, {of_oracle(one, results):.2f}"
    rows = [(pair, *(row[method] for method in methods)) for pair, row in cells.items()]
    return Table(("pair", *methods), rows)


def of(
    indenters: str, table: Callable[[Sequence[Result]], Table], figures: dict[str, Any]
) -> Table:
    """A table of the results on seen or unseen indenters alone."""
    return table([one for one in figures["results"] if one["indenters"] == indenters])


VIEWS: dict[str, Callable[[dict[str, Any]], Table]] = {
    f"{name}, {indenters}": partial(of, indenters, table)
    for name, table in (
        ("mean", mean),
        ("mean to softer", softer),
        ("pairs", by_pair),
        ("each", each),
        ("images", images),
    )
    for indenters in ("unseen", "seen")
}
VIEWS["labels"] = lambda figures: labels(figures["labels"])


def take(folder: Path) -> None:
    """Keep what the tables need of an experiment's folder."""
    files = (folder / name for name in ("results.json", "recipe.json", LABELS))
    results, recipe, judged = (
        json.loads(file.read_text()) if file.is_file() else [] for file in files
    )
    kept = [
        {name: result[name] for name in ("source", "target", "method", "indenters")}
        | {score: {axis: result[score][axis] for axis in FORCES} for score in ("r2", "mae")}
        | {name: result[name] for name in ("mae_total_n", "fz_of_peak", "images") if name in result}
        for result in results
    ]
    FIGURES.mkdir(exist_ok=True)
    rows = {
        name: ",\n".join(json.dumps(_rounded(one)) for one in ones)
        for name, ones in (("results", kept), ("labels", judged))
    }
    parts = ",\n".join(f'"{name}": [\n{lines}\n]' for name, lines in rows.items())
    made_by = json.dumps(recipe).replace(f"{ROOT}/", "")  # paths as from the project's folder
    text = f'{{"recipe": {made_by},\n{parts}}}\n'
    (FIGURES / f"{folder.resolve().name}.json").write_text(text)


def written(page: str) -> str:
    """The page with its tables anew. Raises `DataError` for a table of nothing that is there."""

    def table(match: re.Match[str]) -> str:
        head, experiment, view, _ = match.groups()
        path = FIGURES / f"{experiment}.json"
        if view not in VIEWS or not path.is_file():
            raise DataError(f"{head.strip()}: no such table; there are {'; '.join(VIEWS)}")
        return f"{head}{VIEWS[view](json.loads(path.read_text())).markdown()}\n"

    return BLOCK.sub(table, page)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def main() -> int:
    """Returns the exit code."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="of experiments that are done")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where tables differ")
    args = parser.parse_args()
    for folder in args.folders:
        take(folder)
    page = PAGE.read_text()
    if args.check:
        return int(written(page) != page)
    PAGE.write_text(written(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
