"""Train a model: genforce train force data=FOLDER [SETTINGS.yaml] [key=value ...]

Stages: encoder, field, m2m, force. Settings of a stage and their defaults:
genforce train force --settings
"""

from __future__ import annotations

import argparse
import importlib

from genforce_train.config import read_settings
from genforce_train.memory import keep_freed_memory

STAGES = ("encoder", "field", "m2m", "force")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `genforce train`."""
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("words", nargs="*", metavar="SETTINGS.yaml | key=value")
    parser.add_argument("--settings", action="store_true", help="print all settings and exit")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Body of `genforce train`; returns the exit code."""
    stage = importlib.import_module(f"genforce_train.train_{args.stage}")
    model = getattr(stage, f"{args.stage.capitalize()}Settings")
    if args.settings:
        for name, field in model.model_fields.items():
            print(f"{name}={'(needed)' if field.is_required() else field.default}")
        return 0
    settings = read_settings(model, args.words)
    keep_freed_memory()
    metrics = stage.train(settings, args.quiet)
    print(stage.summary(metrics))
    print(f"\n{settings.out}/best.safetensors")
    return 0
