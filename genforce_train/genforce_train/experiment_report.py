"""Tables and pictures of an experiment's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genforce_collect.html import (
    PAGE_NAME,
    PLOT_GREY,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Tone,
    Verdict,
    command,
    plot,
    write_page,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORCES = ("fx", "fy", "fz")
SCORES = ("R² Fx / Fy / Fz", "MAE Fx / Fy / Fz / total (N)", "Fz of peak", "error / oracle's")
Result = dict[str, Any]


def report(results: Sequence[Result], recipe: Any, out: Path, judged: Sequence[Result] = ()) -> str:
    """Write a page, tables and pictures beside the results; returns the tables as Markdown.
    `judged`: of carried labels, see `judge_labels`."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    tables: dict[str, Table] = {}
    pictures: dict[str, Picture] = {}
    for indenters in ("unseen", "seen"):
        chosen = [result for result in results if result["indenters"] == indenters]
        tables[f"Mean over pairs, {indenters} indenters"] = means(chosen, methods)
        pictures[f"radar_{indenters}"] = radar(chosen, methods, f"{indenters} indenters")
    unseen = [result for result in results if result["indenters"] == "unseen"]
    tables["Each pair, unseen indenters"] = each(unseen)
    if any("images" in result for result in unseen):
        tables["Translated images, unseen indenters"] = images(unseen)
    if judged:
        tables["Labels of paired contacts against those measured, seen indenters"] = labels(judged)
    if len(recipe.shots) > 1:
        pictures["few_shot"] = curves(unseen)
    for name, picture in pictures.items():
        (out / f"{name}.png").write_bytes(picture.data)
    title = f"{recipe.experiment}: {len(recipe.pairs)} pairs, seed {recipe.seed}"
    parts = [f"## {title}", *(f"\n{name}\n\n{table.markdown()}" for name, table in tables.items())]
    text = "\n".join(parts) + "\n"
    (out / "table.md").write_text(text)
    write_page(_page(title, tables, pictures, recipe, out), out / PAGE_NAME)
    return text


def _page(
    title: str, tables: Mapping[str, Table], pictures: Mapping[str, Picture], recipe: Any, out: Path
) -> Page:
    words: list[object] = ["experiment", recipe.experiment, "-o", out, "--seed", recipe.seed]
    words += ["--contacts", recipe.contacts, "--steps", recipe.steps, "--shots", *recipe.shots]
    words += ["--roads", *recipe.roads, *(["--data", recipe.data] if recipe.data else [])]
    words += ["--refinements", recipe.refinements] if recipe.refinements else []
    return Page(
        kind="experiment",
        title=title,
        command=command(*words, "--field", recipe.field_model),
        verdict=Verdict(Tone.PLAIN, "R² and errors on contacts that no model has seen"),
        facts={
            "pairs": str(len(recipe.pairs)),
            "contacts an indenter": str(recipe.contacts),
            "steps": str(recipe.steps),
            "seed": str(recipe.seed),
        },
        sections=[
            Section("Pictures", (Pictures([*pictures.values()]),)),
            *(Section(name, (table,)) for name, table in tables.items()),
        ],
    )


def means(results: Sequence[Result], methods: Sequence[str]) -> Table:
    """One row a method: the mean over pairs."""
    rows = []
    for method in methods:
        own = [result for result in results if result["method"] == method]
        scores = np.mean([_numbers(result) for result in own], axis=0)
        ratio = np.mean([of_oracle(result, results) for result in own])
        rows.append(_row(method, scores, float(ratio)))
    return Table(("method", *SCORES), rows)


def each(results: Sequence[Result]) -> Table:
    """One row a pair and method."""
    rows = []
    for result in results:
        name = f"{result['source']} → {result['target']}, {result['method']}"
        rows.append(_row(name, _numbers(result), of_oracle(result, results)))
    return Table(("pair, method", *SCORES), rows)


def images(results: Sequence[Result]) -> Table:
    """How good the images of the translated methods are: one row a pair."""
    rows = []
    for result in results:
        if scores := result.get("images"):
            name = f"{result['target']} → {result['source']}, {result['method']}"
            numbers = (scores["rms_px"], scores["moved_px"]), (scores["iou"], scores["distance"])
            rows.append(
                (name, *map("{:.2f}".format, numbers[0]), *map("{:.3f}".format, numbers[1]))
            )
    heads = ("markers off (px RMS)", "moved (px RMS)", "IoU", "distance")
    return Table(("target → source, method", *heads), rows)


def labels(judged: Sequence[Result]) -> Table:
    """How good labels are that pairs carry: one row a way, the mean over pairs, and one a pair."""
    ways: dict[str, list[Result]] = {}
    for one in judged:
        ways.setdefault(one["labels"], []).append(one)
    rows = [_label_row(f"mean, {way}", ones) for way, ones in ways.items()]
    rows += [_label_row(f"{o['source']} → {o['target']}, {o['labels']}", [o]) for o in judged]
    return Table(("pair, labels", SCORES[0], "error Fx / Fy / Fz"), rows)


def _label_row(name: str, ones: Sequence[Result]) -> tuple[str, ...]:
    r2, error = (
        np.mean([[one[score][axis] for axis in FORCES] for one in ones], axis=0)
        for score in ("r2", "error")
    )
    return (
        name,
        " / ".join(map("{:.3f}".format, r2)),
        f"{' / '.join(map('{:.1f}'.format, 100 * error))} %",
    )


def of_oracle(result: Result, results: Sequence[Result]) -> float:
    """Error over that of the oracle on the same target: mean over the axes of their MAE."""
    oracle = next(
        other
        for other in results
        if other["method"] == "oracle" and other["target"] == result["target"]
    )
    return float(np.mean([result["mae"][axis] / oracle["mae"][axis] for axis in FORCES]))


def _numbers(result: Result) -> list[float]:
    r2, mae = ([result[name][axis] for axis in FORCES] for name in ("r2", "mae"))
    return [*r2, *mae, result["mae_total_n"], result["fz_of_peak"]]


def _row(name: str, numbers: Sequence[float], ratio: float) -> tuple[str, ...]:
    r2 = " / ".join(f"{value:.3f}" for value in numbers[:3])
    mae = " / ".join(f"{value:.3f}" for value in numbers[3:7])
    return name, r2, mae, f"{100 * numbers[7]:.1f} %", f"{ratio:.2f}"


def radar(results: Sequence[Result], methods: Sequence[str], what: str) -> Picture:
    """Error of shear and normal force: a spoke a pair, a line a method."""
    pairs = list(dict.fromkeys((result["source"], result["target"]) for result in results))
    angles = np.linspace(0, 2 * np.pi, len(pairs) + 1)

    def draw(figure: Figure) -> None:
        for number, (title, axes) in enumerate((("shear", ("fx", "fy")), ("normal", ("fz",)))):
            axis: Any = figure.add_subplot(2, 1, number + 1, projection="polar")
            for method in methods:
                errors = {
                    (result["source"], result["target"]): np.mean([result["mae"][a] for a in axes])
                    for result in results
                    if result["method"] == method
                }
                line = [errors[pair] for pair in pairs]
                axis.plot(angles, [*line, line[0]], marker=".", label=method)
            axis.set_xticks(angles[:-1], [f"{a}\n→ {b}" for a, b in pairs], fontsize=7)
            axis.set_rscale("symlog", linthresh=0.05)
            axis.set_title(f"MAE of {title} force (N)")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center")

    return plot(draw, f"Errors of each pair, {what}", (5.4, 10.5))


def curves(results: Sequence[Result]) -> Picture:
    """Error over the number of paired contacts, a line a pair; of calibrated labels, where there
    are both."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        words = result["method"].split(", ")
        if words[0] == "field" and words[1].endswith("pairs"):
            shots = int(words[1].split()[0])
            pair = f"{result['source']} → {result['target']}"
            points = dict(lines.get(pair, [])) | {shots: of_oracle(result, results)}
            lines[pair] = sorted(points.items())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for pair, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=pair)
        axes.axhline(1.0, color=PLOT_GREY, linewidth=1)
        axes.set(xlabel="paired contacts an indenter", ylabel="error / oracle's")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)

    return plot(draw, "Error over the number of paired contacts")
