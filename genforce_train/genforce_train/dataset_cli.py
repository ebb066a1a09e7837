"""Build, check and audit data sets, exchange them with other tools.

genforce dataset build BAG... -o DIR     bags to the training layout; adds what is not there
genforce dataset check DIR               counts, ranges, faults; DIR/report.html and report.json
genforce dataset audit DIR               are the labels those of the frames, and at their time?
                                         DIR/audit
genforce dataset material DIR            force over depth of presses: DIR/material
genforce dataset import FILE.h5... -o DIR    recordings of marker displacements and forces
genforce dataset export DIR --format parquet -o OUT    for other tools; or --format lerobot
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

from rich.progress import Progress

from genforce_collect.config import load_sensor
from genforce_collect.errors import DataError
from genforce_collect.html import PAGE_NAME, write_page
from genforce_train.audit import Audit, audit
from genforce_train.audit_page import audit_page
from genforce_train.build import BuildConfig, build, open_data
from genforce_train.cache import Cache, drafted
from genforce_train.check import check, write_html


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `genforce dataset`."""
    stages = parser.add_subparsers(dest="stage", required=True)
    sub = stages.add_parser("build", help="bags to the training layout")
    sub.add_argument("bags", nargs="+", type=Path, metavar="BAG")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--force", action="store_true", help="replace contacts that are there")
    sub.add_argument(
        "--resegment", action="store_true", help="find the markers anew in the recorded images"
    )
    sub.add_argument("--sensor", help="to find them by, name or path (default: as recorded)")
    sub = stages.add_parser(
        "import",
        help="recordings of marker displacements to the training layout",
        description="example: genforce dataset import session_a.h5 session_b.h5 -o runs/real",
    )
    sub.add_argument("recordings", nargs="+", type=Path, metavar="FILE.h5")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    sub.add_argument("--force", action="store_true", help="replace contacts that are there")
    sub.add_argument("--sensor", help="its name in the data set (markers_ft)")
    sub.add_argument("--px-per-mm", type=float, metavar="N", help="scale of the images (24)")
    sub.add_argument("--marker-mm", type=float, metavar="N", help="diameter as drawn (0.6)")
    sub.add_argument(
        "--turn-deg",
        type=int,
        choices=(0, 90, 180, 270),
        help="from the axes of the readings to those of the markers; found without it",
    )
    sub.add_argument(
        "--origin-mm",
        type=float,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="origin of the transducer in the sensor frame (0 0 0)",
    )
    sub = stages.add_parser(
        "export",
        help="to a format of other tools",
        description="example: genforce dataset export runs/first/dataset --format parquet -o out",
    )
    sub.add_argument("root", type=Path, metavar="DIR")
    sub.add_argument("--format", required=True, choices=("lerobot", "parquet"))
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="OUT")
    sub.add_argument("--fps", type=int, help="lerobot: rate of frames that have no stamps")
    sub.add_argument("--force", action="store_true", help="replace OUT")
    for name, text in (
        ("check", "count, measure, find faults"),
        ("audit", "test the labels against the frames"),
        ("material", "fit force over depth"),
    ):
        sub = stages.add_parser(name, help=text)
        sub.add_argument("root", type=Path, metavar="DIR")
        sub.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Body of `genforce dataset`; returns the exit code."""
    stages = {
        "build": _build,
        "import": _import,
        "export": _export,
        "check": _check,
        "audit": _audit,
        "material": _material,
    }
    return stages[args.stage](args)


def _build(args: argparse.Namespace) -> int:
    sensor = load_sensor(args.sensor) if args.sensor else None
    with Progress() as progress:
        task = progress.add_task("reading", total=None)
        report = build(
            args.bags,
            args.out,
            BuildConfig(resegment=args.resegment, sensor=sensor),
            force=args.force,
            progress=lambda text, done, total: progress.update(
                task, description=text, completed=done, total=total
            ),
        )
    print(
        f"{args.out}: {len(report.written)} contacts with {report.frames} frames written, "
        f"{len(report.kept)} were there, {report.broken_off} broken off in the bags"
    )
    for problem in report.problems:
        print(f"left out: {problem}")
    if not report.written and not report.kept:
        raise DataError(f"{args.out}: no whole contact in the bags given")
    return DataError.exit_code if report.problems else 0


def _import(args: argparse.Namespace) -> int:
    from genforce_train.marker_recordings import ImportConfig, import_recordings

    names = ("sensor", "px_per_mm", "marker_mm", "turn_deg", "origin_mm")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if "origin_mm" in given:
        given["origin_mm"] = tuple(given["origin_mm"])
    report = import_recordings(args.recordings, args.out, ImportConfig(**given), args.force)
    print(
        f"{args.out}: {len(report.written)} contacts with {report.frames} frames written, "
        f"{len(report.kept)} were there; readings turned by {report.turn_deg} degrees"
    )
    for problem in report.problems:
        print(f"left out: {problem}")
    return DataError.exit_code if report.problems else 0


def _export(args: argparse.Namespace) -> int:
    cache = _open(args.root)
    if args.out.exists() and not (args.force and _is_export(args.out)):
        remedy = "--force replaces it" if _is_export(args.out) else "and no export; name another"
        raise DataError(f"{args.out}: is there already, {remedy}")
    with drafted(args.out) as draft:
        _exporter(args)(cache, draft)
    print(f"{args.out}: {len(cache)} contacts with {cache.frames} frames written")
    for problem in cache.problems:
        print(f"left out: {problem}")
    return DataError.exit_code if cache.problems else 0


def _is_export(folder: Path) -> bool:
    marks = ("references.parquet", "*/meta/info.json")  # of Parquet and of LeRobot
    return any(next(folder.glob(mark), None) for mark in marks)


def _exporter(args: argparse.Namespace) -> Callable[[Cache, Path], list[Path]]:
    if args.format == "lerobot":
        from genforce_train.export_lerobot import export_lerobot

        return functools.partial(export_lerobot, fps=args.fps)
    try:
        from genforce_train.export_parquet import export_parquet
    except ImportError as error:
        raise DataError(
            f"writing Parquet needs pyarrow: pip install -r requirements/exchange.txt ({error})"
        ) from error
    return export_parquet


def _check(args: argparse.Namespace) -> int:
    cache = _open(args.root)
    audits, untested = _audits(cache)
    report = check(cache, args.root, audits, untested)
    (args.root / "report.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    write_html(report, cache, args.root / PAGE_NAME)
    print(json.dumps(report.as_dict()) if args.json else "\n".join(report.lines()))
    return DataError.exit_code if report.problems else 0


def _audit(args: argparse.Namespace) -> int:
    audits, problems = _audits(_open(args.root))
    folder = args.root / "audit"
    folder.mkdir(exist_ok=True)
    found = [item.as_dict() for item in audits]
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    write_page(audit_page(audits, problems, args.root), folder / PAGE_NAME)
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join([item.line() for item in audits] + problems))
        print(f"{PAGE_NAME} and report.json in {folder}")
    return 0 if audits and all(item.trusted for item in audits) else DataError.exit_code


def _material(args: argparse.Namespace) -> int:
    from genforce_train.materials import ForceDepth, is_press, report_page

    cache = _open(args.root)
    folder = args.root / "material"
    presses = {}
    for sensor in sorted({key.sensor for key in cache.keys}):
        contacts = [cache.contact(cache.keys[row]) for row in cache.select([sensor])]
        presses[sensor] = [contact for contact in contacts if is_press(contact)]
        if not presses[sensor]:
            raise DataError(
                f"{args.root}: every contact of '{sensor}' is sheared; record a press: "
                f"genforce collect --force-depth"
            )
    curves = {sensor: ForceDepth.fit(contacts) for sensor, contacts in presses.items()}
    for sensor, curve in curves.items():
        curve.write(folder, sensor)
    write_page(report_page(curves, presses, args.root), folder / PAGE_NAME)
    forces = {sensor: float(sum(curve.loading)) for sensor, curve in curves.items()}
    if args.json:
        print(json.dumps(forces))
    else:
        print("\n".join(f"{name}: {force:.3f} N at full depth" for name, force in forces.items()))
        print(f"coefficients and {PAGE_NAME} in {folder}")
    return 0


def _audits(cache: Cache) -> tuple[list[Audit], list[str]]:
    audits, problems = [], []
    for sensor in sorted({key.sensor for key in cache.keys}):
        try:
            audits.append(audit(cache, sensor))
        except DataError as error:
            problems.append(str(error))
    return audits, problems


def _open(root: Path) -> Cache:
    with Progress() as progress:
        task = progress.add_task("reading", total=None)
        return open_data(
            root,
            progress=lambda text, done, total: progress.update(
                task, description=text, completed=done, total=total
            ),
        )
