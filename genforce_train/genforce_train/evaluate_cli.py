"""Look at where a trained model fails: worst contacts with their frames, errors by indenter and
phase, contact told from none; for a marker-to-marker model the worst translated frames.

Examples:
  genforce evaluate runs/train/force/best.safetensors --use test
  genforce evaluate runs/train/force/best.safetensors --data DATA --sensors circle_1 --use all
  genforce evaluate runs/train/m2m/best.safetensors --worst 8

Writes report.html, and scores.json beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genforce_train.checkpoint import Checkpoint

USES = ("test", "validation", "train", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `genforce evaluate`."""
    add = parser.add_argument
    add("model", type=Path, help="best.safetensors of `genforce train force` or `train m2m`")
    add("--use", choices=USES, help="contacts (default: test where there are some)")
    add("--data", default="", help="data set (default: what it was trained on)")
    add("--sensors", nargs="+", default=[], help="of that data set (default: those of training)")
    add("--worst", type=int, default=6, help="contacts or frames to show")
    add("-o", "--out", type=Path, help="folder (default: evaluation beside the model)")


def run(args: argparse.Namespace) -> int:
    """Body of `genforce evaluate`; returns the exit code."""
    from genforce_collect.errors import DataError
    from genforce_collect.html import PAGE_NAME, Page, Tone, Verdict, command, write_page
    from genforce_train.checkpoint import load_checkpoint  # torch takes seconds

    saved = load_checkpoint(args.model)
    kind = saved.meta.get("kind")
    if kind not in ("force", "m2m"):
        raise DataError(f"{args.model}: a {kind} checkpoint; force and m2m can be looked at")
    use = args.use or ("test" if saved.meta["settings"].get("unseen") else "validation")
    verdict, scores, sections = (_force if kind == "force" else _m2m)(saved, use, args)
    out: Path = args.out or args.model.parent / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    words = ["evaluate", args.model, "--use", use, "--worst", args.worst]
    words += ["--data", args.data] if args.data else []
    words += ["--sensors", *args.sensors] if args.sensors else []
    page = Page(
        kind="evaluation",
        title=f"{kind} model {args.model.parent.name}, contacts for {use}",
        command=command(*words),
        verdict=Verdict(Tone.PLAIN, verdict),
        facts={"sensors": ", ".join(saved.meta["sensors"]), "steps": str(saved.meta["step"])},
        sections=sections,
    )
    print(verdict)
    print(write_page(page, out / PAGE_NAME))
    return 0


def _force(saved: Checkpoint, use: str, args: argparse.Namespace) -> tuple:
    from genforce_train.failures import force_errors, force_sections

    errors = force_errors(saved, use, args.data, args.sensors)
    scores = errors.scores
    verdict = " · ".join(f"{axis} R² {scores.r2[axis]:.3f}" for axis in ("fx", "fy", "fz"))
    return verdict, scores.as_dict(), force_sections(errors, args.worst)


def _m2m(saved: Checkpoint, use: str, args: argparse.Namespace) -> tuple:
    from genforce_train.failures import translation_sections
    from genforce_train.train_m2m import M2mSettings, evaluate, pairs_of
    from genforce_train.translate import load_m2m
    from genforce_train.translations import TranslationScores

    changes = {"data": args.data} if args.data else {}
    changes |= {"sensors": tuple(args.sensors)} if args.sensors else {}
    pairs = pairs_of(M2mSettings.model_validate(saved.meta["settings"] | changes))
    net = load_m2m(args.model)[0]
    scores = evaluate(net, pairs, use)
    verdict = TranslationScores(**scores["mean"]).line()
    return verdict, scores, translation_sections(net, pairs, use, args.worst)
