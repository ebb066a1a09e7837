"""Translate a labelled data set to another sensor: what the target would have seen, with the labels
of the source, in the layout that `genforce train force` reads.

Examples:
  genforce translate runs/train/m2m/best.safetensors DATA --source array_1 --target circle_1 -o OUT
  genforce train force data=OUT sensors=circle_1

  genforce translate models/field/field.safetensors DATA --source array_1 --target circle_1 -o OUT
  genforce train force data=OUT sensors=circle_1 input=field \
      field_model=models/field/field.safetensors init=FORCE_MODEL_OF_array_1

A marker-to-marker model has learned from paired contacts; a field model needs none. The target's
reference image is that of the data set, or --reference. A run that was stopped goes on with the
contacts that are missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from genforce_collect.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `genforce translate`."""
    add = parser.add_argument
    add("model", type=Path, help="best.safetensors of `genforce train m2m`, or of `train field`")
    add("data", type=Path, help="data set in the training layout")
    add("--source", required=True, help="sensor whose contacts are translated")
    add("--target", required=True, help="sensor they are translated to; name of the result")
    add("--reference", type=Path, help="no-contact image of the target (.npy or .jpg)")
    add("--indenters", nargs="+", help="default: all")
    add("-o", "--out", type=Path, help="data set to write (default: runs/translate/SOURCE-TARGET)")
    add("--format", choices=["npy", "jpg"], default="npy", help="of the marker images")
    add("--batch", type=int, default=64, help="frames at a time")
    add("--device", choices=["cpu", "cuda"], default="cpu")


def run(args: argparse.Namespace) -> int:
    """Body of `genforce translate`; returns the exit code."""
    from genforce_collect.layout import Layout, read_mask
    from genforce_train.translate import translate_data  # torch takes seconds

    if args.batch < 1:
        raise DataError(f"--batch {args.batch}: must be at least 1")
    out = args.out or Path("runs/translate") / f"{args.source}-{args.target}"
    done = translate_data(
        args.model,
        Layout(args.data),
        args.source,
        args.target,
        out,
        reference=read_mask(args.reference) if args.reference else None,
        indenters=args.indenters,
        suffix=f".{args.format}",
        batch=args.batch,
        device=args.device,
    )
    print(f"{out}: {done.contacts} contacts of {args.target}, {done.written} new")
    return 0
