"""Make synthetic data sets: deterministic by seed, resumable, over cores or a Dask cluster.

genforce synth --sensors array_1 circle_1 --indenters sphere cone     virtual collections
genforce synth --suite field --contacts 8000                          random sensors, true fields
genforce synth --suite pretrain                                       the 12-pattern sim/ grid

Collections are written in the training layout (img, force, depth), the pretraining grid as
sim/<indenter>/<pattern>/<x>_<y>_<z>.jpg, the field suite as shards of arrays. A run that was
killed goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError, DataError, DeviceError
from genforce_collect.processes import local_workers
from genforce_collect.trajectory import load_plan
from genforce_sim.collection import CollectionSpec, collection_tasks
from genforce_sim.fieldset import FieldSuite, write_shard
from genforce_sim.indenters import INDENTERS, load_indenter
from genforce_sim.pretrain import pretrain_tasks

KINDS = ("dots", "pins", "taxels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `genforce synth`."""
    add = parser.add_argument
    add("--suite", choices=["collections", "field", "pretrain"], default="collections")
    add("-o", "--out", type=Path, help="folder (default: runs/synth/SUITE)")
    add("--sensors", nargs="+", metavar="SENSOR", help="of collections (default: array_1)")
    add("--indenters", nargs="+", metavar="NAME|MESH", help="default: all 18")
    add("--contacts", type=int, help="per indenter, spread over the plan; field: in all (2000)")
    add("--plan", default="", help="of collections: press, slide, random:COUNT:SEED or a file")
    add("--rate-hz", type=float, default=30.0, help="frames a second of collections")
    add("--speed-mm-s", type=float, default=5.0, help="tip speed of collections")
    add("--truth", action="store_true", help="collections: keep the gel's displacement too")
    add("--perfect", action="store_true", help="collections: sensors as drawn, without noise")
    add("--instance", type=int, help="of collections: that of the virtual cell's seed (0)")
    add("--kinds", nargs="+", choices=KINDS, default=["dots"], help="of field")
    add("--frames", type=int, default=10, help="a contact of field (2 to 12)")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=-1, help="processes (default: one a core)")
    add("--scheduler", help="address of a Dask scheduler, e.g. tcp://host:8786")
    add("--quick", action="store_true", help="a small sample of the suite")


def run(args: argparse.Namespace) -> int:
    """Body of `genforce synth`; returns the exit code."""
    out: Path = args.out or Path("runs") / "synth" / args.suite
    tasks = list(_tasks(args, out))
    _pin_recipe(args, out)
    frames = _work_off(tasks, args)
    print(f"{out}: {frames} frames")
    return 0


def _tasks(args: argparse.Namespace, out: Path) -> Iterator[tuple[Any, ...]]:
    """Calls (function, arguments), each of which returns how many frames it answers for."""
    indenters = tuple(args.indenters or INDENTERS)
    for name in indenters:
        load_indenter(name)
    if args.contacts is not None and args.contacts < 1:
        raise ConfigError(f"--contacts {args.contacts}: must be at least 1")
    if args.suite == "pretrain":
        yield from pretrain_tasks(out, indenters, args.quick)
    elif args.suite == "field":
        if not 2 <= args.frames <= 12:
            raise ConfigError(f"--frames {args.frames}: must be 2 to 12")
        contacts = args.contacts or (64 if args.quick else 2000)
        suite = FieldSuite(contacts, args.seed, tuple(args.kinds), args.frames, indenters)
        yield from ((write_shard, (out, suite, shard)) for shard in range(suite.shards))
    else:
        for name in args.sensors or ["array_1"]:
            sensor = load_sensor(name)
            spec = CollectionSpec(
                sensor=sensor,
                plan=load_plan(args.plan, sensor),
                contacts=args.contacts or (4 if args.quick else None),
                seed=args.seed,
                rate_hz=args.rate_hz,
                speed_m_s=args.speed_mm_s * 1e-3,
                truth=args.truth,
                perfect=args.perfect,
                instance=args.instance,
            )
            yield from collection_tasks(out, spec, indenters)


# What changes nothing in the data, so that a run may go on with another value of it.
_FREE = {"out", "jobs", "scheduler"}


def _pin_recipe(args: argparse.Namespace, out: Path) -> None:
    """Keep the settings with the data; refuse to mix two kinds of data in one folder."""
    recipe = {k: v for k, v in sorted(vars(args).items()) if k not in _FREE}
    if recipe["instance"] is None:  # data that was made before there was this choice goes on
        del recipe["instance"]
    text = json.dumps({"genforce synth": recipe}, indent=1) + "\n"
    path = out / "recipe.json"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    elif path.read_text() != text:
        raise DataError(f"{path}: made with other settings; choose another --out or remove it")


def _work_off(tasks: list[tuple[Any, ...]], args: argparse.Namespace) -> int:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[frames]} frames"),
        TimeRemainingColumn(),
    )
    frames = 0
    with _backend(args.scheduler), Progress(*columns) as progress:
        bar = progress.add_task(args.suite, total=len(tasks), frames=0)
        calls = (joblib.delayed(work)(*arguments) for work, arguments in tasks)
        parallel = joblib.Parallel(n_jobs=args.jobs, return_as="generator_unordered")
        for done in parallel(calls):
            frames += done
            progress.update(bar, advance=1, frames=frames)
    return frames


@contextmanager
def _backend(scheduler: str | None) -> Iterator[None]:
    """Local processes, or the workers of a Dask cluster that share the output folder."""
    if scheduler is None:
        with local_workers():
            yield
        return
    try:
        from distributed import Client
    except ImportError:
        raise ConfigError(
            "--scheduler needs Dask: pip install -r requirements/cluster.txt"
        ) from None
    try:
        client = Client(scheduler, timeout=5)
    except (OSError, ValueError) as error:
        raise DeviceError(f"--scheduler {scheduler}: {error}") from error
    with client, joblib.parallel_config(backend="dask"):
        yield
