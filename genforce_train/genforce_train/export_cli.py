"""Write a trained model as a bundle, in the precision wanted, and check what that costs.

Examples:
  genforce export runs/train/force/best.safetensors
  genforce export runs/train/force/best.safetensors --precision int8 --check
  genforce export runs/demo/bundle --precision fp16 --check --bag runs/demo/live_bag
  genforce export runs/train/m2m/best.safetensors --force runs/demo/bundle --sensor circle_1
  genforce export runs/demo/bundle --material runs/press/dataset/material array_1 ratio_18

Without --precision a model that reads the gel's displacement becomes int8 where that loses at most
0.02 of R2 on contacts it has not learned from, as it is then faster on a CPU; any other fp32.
From a checkpoint, int8 takes its ranges from contacts of the training, and the check uses others;
from a bundle, which needs no torch, both come from a bag. A marker-to-marker model (`genforce train
m2m`) goes before a force bundle (--force), so that it reads another sensor (--sensor).
--material gives a bundle the gain that its forces need on another gel, from the curves of `genforce
dataset material`: of the gel the model knows, and of the one it serves.
--check prints how far the bundle is from what it was made from (fp32: the PyTorch model; fp16 and
int8: the fp32 bundle), keeps that in the manifest and fails where it is too far.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from genforce_collect.bags import BagReader
from genforce_collect.errors import ConfigError, DataError
from genforce_infer.bundle import (
    Bundle,
    Manifest,
    MaterialCorrection,
    read_bundle,
    write_bundle,
)
from genforce_infer.labelled import LabelledFrames, read_labelled
from genforce_infer.offline import sensor_of
from genforce_infer.parity import Parity, compare, with_parity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `genforce export`."""
    parser.add_argument(
        "model", type=Path, help="best.safetensors of `genforce train`, or an fp32 bundle"
    )
    parser.add_argument("-o", "--out", type=Path, help="folder (default: beside the model)")
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"))
    parser.add_argument("--check", action="store_true", help="parity report; fails beyond limits")
    parser.add_argument("--id", default="", help="model id (default: sensor, model and seed)")
    parser.add_argument("--data", default="", help="where its data set is now, if it was moved")
    parser.add_argument("--bag", type=Path, help="frames for a bundle; best with measured forces")
    parser.add_argument("--sensor", help="sensor file (default: that of the bag's session)")
    parser.add_argument("--force", type=Path, help="bundle to translate for, with --sensor")
    parser.add_argument("--frames", type=int, default=1500, help="of the bag, at most")
    parser.add_argument(
        "--material",
        nargs=3,
        metavar=("FOLDER", "KNOWN", "SERVED"),
        help="force-depth coefficients, and the sensors whose gels to carry forces between",
    )


def run(args: argparse.Namespace) -> int:
    """Body of `genforce export`; returns the exit code."""
    gain = None if args.material is None else _gain(*args.material)
    bundle = _export_bundle(args) if args.model.is_dir() else _export_checkpoint(args)
    if gain is not None:
        manifest = bundle.manifest.model_copy(update={"material": gain})
        bundle = _written(bundle, bundle.folder, manifest)
    print(f"{bundle.folder}: {bundle.manifest.model_id}")
    if not args.check:
        return 0
    parity = Parity.in_manifest(bundle.manifest)
    print(*parity.lines(), sep="\n")
    if problem := parity.problem(bundle.manifest.precision):
        raise DataError(f"{bundle.folder}: too far from what it was made from: {problem}")
    return 0


def _export_checkpoint(args: argparse.Namespace) -> Bundle:
    from genforce_train.export import export_force, labelled_frames  # torch takes seconds

    folder = args.model.parent / "bundle"
    if args.force is not None:
        return _export_translation(args, folder)
    if args.precision in ("fp16", "int8"):
        bundle = export_force(args.model, folder, args.id, args.data)
        return _variant(args, bundle, *labelled_frames(args.model, args.data))
    bundle = export_force(args.model, args.out or folder, args.id, args.data)
    if args.precision == "fp32" or bundle.manifest.mode != "field":
        return bundle
    return _faster(bundle, *labelled_frames(args.model, args.data))


def _export_translation(args: argparse.Namespace, folder: Path) -> Bundle:
    from genforce_train.export_translate import export_translate

    if args.sensor is None or args.precision not in (None, "fp32"):
        raise ConfigError("--force needs --sensor, the sensor to read, and is written as fp32")
    out = args.out or folder
    return export_translate(args.model, args.force, args.sensor, out, args.data, args.id)


def _export_bundle(args: argparse.Namespace) -> Bundle:
    bundle = read_bundle(args.model)
    if args.precision is None and args.material is not None:
        out = args.out or bundle.folder.with_name(f"{bundle.folder.name}-{args.material[-1]}")
        return _written(bundle, out, bundle.manifest)
    if args.precision not in ("fp16", "int8"):
        raise ConfigError(
            f"{args.model}: a bundle already; give --precision fp16 or int8, or --material"
        )
    if args.bag is None:
        if args.check or args.precision == "int8":
            raise ConfigError("a bundle has no frames for --check and int8: give --bag")
        return _variant(args, bundle, LabelledFrames(()), LabelledFrames(()))
    with BagReader(args.bag) as bag:
        sensor = sensor_of(bag, args.sensor)
        frames = read_labelled(bag, sensor, bundle.manifest, args.frames)
    return _variant(args, bundle, *frames)


def _faster(bundle: Bundle, ranges: LabelledFrames, others: LabelledFrames) -> Bundle:
    """The bundle in int8, written in its place, where that is right enough; else as it is."""
    from genforce_infer.quantize import make_variant  # a second to import

    with tempfile.TemporaryDirectory() as scratch:
        variant = make_variant(bundle, "int8", Path(scratch) / "int8", ranges.images)
        parity = compare(bundle, variant, others.images, others.measured)
        loss = max(parity.r2_loss.values(), default=np.inf)
        right = np.isfinite(loss) and not parity.problem("int8")
        print(f"R2 lost by int8: {loss:.3f} at most{'' if right else '; fp32 kept'}")
        if not right:
            return bundle
        return _written(variant, bundle.folder, with_parity(variant.manifest, parity))


def _variant(
    args: argparse.Namespace, bundle: Bundle, ranges: LabelledFrames, others: LabelledFrames
) -> Bundle:
    from genforce_infer.quantize import make_variant  # a second to import

    folder = args.out or bundle.folder.with_name(f"{bundle.folder.name}-{args.precision}")
    variant = make_variant(bundle, args.precision, folder, ranges.images)
    if not args.check:
        return variant
    parity = compare(bundle, variant, others.images, others.measured)
    return _written(variant, folder, with_parity(variant.manifest, parity))


def _gain(curves: str, known: str, served: str) -> MaterialCorrection:
    from genforce_train.materials import ForceDepth, runtime_correction

    return runtime_correction(ForceDepth.read(curves, known), ForceDepth.read(curves, served))


def _written(bundle: Bundle, folder: Path, manifest: Manifest) -> Bundle:
    """The bundle's files in a folder, with this manifest."""
    files = {name: bundle.path(name) for name in bundle.manifest.files}
    return write_bundle(folder, manifest, files)
