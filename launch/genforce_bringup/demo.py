"""Collect on the virtual cell, adapt a force model, and serve it live on contacts it never saw.

Example: genforce demo
Everything lands in runs/demo: report.html to look at, the figures of the table as summary.json.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from genforce_bringup.collect import run_goal
from genforce_bringup.demo_report import write_demo_report
from genforce_bringup.graph import claim_cell, find_graph
from genforce_bringup.live_report import LiveFigures, read_live_bag, save_picture
from genforce_bringup.session import CollectClient, RunningGraph
from genforce_collect.config import load_cell, load_sensor
from genforce_collect.errors import ConfigError
from genforce_collect.trajectory import build_plan
from genforce_msgs.action import CollectIndent
from genforce_sim.indenters import load_indenter

if TYPE_CHECKING:
    from genforce_train.train_force import ForceSettings

DEFAULT_OUT = Path("runs/demo")
SHIPPED = Path(__file__).resolve().parents[2] / "models" / "force"
ADAPTING_RATE = 2e-3  # begins from what is learned, so gentler than training
BEGUN = "demo.json"  # what a demo was asked for: its first file
SUMMARY = "summary.json"  # its last but the report
TRAINING_BUDGET_S = 120.0  # on a busy machine fewer steps, so that the demo stays short


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does; small enough for five minutes on two cores."""

    cell: str = "virtual"
    sensor: str = "array_1"
    indenter: str = "sphere"
    train_contacts: int = 40
    live_contacts: int = 12
    steps: int = 240  # of training
    seed: int = 0

    def words(self) -> list[str]:
        """Options of the command line that say the same, those left at their defaults left out."""
        names = {"train_contacts": "contacts", "live_contacts": "live"}
        return [
            word
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
            for word in (f"--{names.get(field.name, field.name)}", str(value))
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    defaults = DemoConfig()
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where all lands")
    parser.add_argument("--cell", default=defaults.cell, help="virtual cell, by name or path")
    parser.add_argument("--sensor", default=defaults.sensor, help="sensor, by name or path")
    parser.add_argument("--indenter", default=defaults.indenter, help="indenter on the tool")
    parser.add_argument("--contacts", type=int, default=defaults.train_contacts, help="to train on")
    parser.add_argument("--live", type=int, default=defaults.live_contacts, help="to evaluate on")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of training")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of plan and training")


def run(args: argparse.Namespace) -> int:
    """Run the demo; exit code 0 when it ran through and no message was lost."""
    config = DemoConfig(
        args.cell, args.sensor, args.indenter, args.contacts, args.live, args.steps, args.seed
    )
    console = Console()
    # Not inside the folder: that one is moved aside and made anew.
    with exclusive(args.out.with_name(f".{args.out.name}.lock")):
        return _run(config, args.out.resolve(), console)


def _run(config: DemoConfig, out: Path, console: Console) -> int:
    train_indices, live_indices = split_contacts(config)
    arguments = {"cell": config.cell, "sensor": config.sensor, "indenter": config.indenter}
    check_cell(config, arguments)
    make_room(out, config)
    # Not at the top: torch takes seconds to import, and --help should not.
    from genforce_train.build import build
    from genforce_train.export import export_force
    from genforce_train.train_force import train

    console.rule("1/4  collect on the virtual cell")
    goal = _goal(config, train_indices, out / "train_bag")
    with (
        RunningGraph("collect_indent", arguments, out / "collect.log") as graph,
        CollectClient(graph) as client,
    ):
        collected = run_goal(client, goal, console, "collect")

    console.rule("2/4  bag to data set")
    dataset = out / "dataset"
    report = build([out / "train_bag"], dataset)
    console.print(f"{len(report.written)} contacts, {report.frames} labelled frames in {dataset}")
    for problem in report.problems:
        console.print(f"left out: {problem}")

    console.rule("3/4  train and export")
    started = time.monotonic()
    settings = training(config, dataset, out / "force")
    if settings.init:
        console.print(f"begins from {settings.init}, of another {config.sensor}")
    train(settings)
    train_seconds = time.monotonic() - started
    bundle = out / "bundle"
    export_force(out / "force" / "best.safetensors", bundle)

    console.rule("4/4  live force on contacts the model never saw")
    goal = _goal(config, live_indices, out / "live_bag")
    arguments |= {"bundle": str(bundle)}
    with (
        RunningGraph("collect_and_infer", arguments, out / "live.log") as graph,
        CollectClient(graph) as client,
    ):
        live = run_goal(client, goal, console, "live")

    figures = read_live_bag(out / "live_bag", load_sensor(config.sensor).name)
    save_picture(figures, out / "force.png")
    summary = summarise(collected, live, figures, train_seconds, len(report.written))
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    words = [] if out == DEFAULT_OUT.resolve() else ["--out", str(out)]
    page = write_demo_report(summary, figures, [*words, *config.words()], out)
    print_summary(summary, out, console)
    console.print(f"report {page}", soft_wrap=True)
    return 0 if not any(summary["lost"].values()) else 1


def training(config: DemoConfig, dataset: Path, out: Path) -> ForceSettings:
    """How to train on the collected contacts: from the shipped model of such a sensor, if any."""
    from genforce_train.train_force import ForceSettings

    settings = ForceSettings(
        data=str(dataset),
        out=str(out),
        steps=config.steps,
        budget_s=TRAINING_BUDGET_S,
        seed=config.seed,
    )
    known = SHIPPED / f"{load_sensor(config.sensor).name}.safetensors"
    if not known.is_file():
        return settings
    return settings.model_copy(update={"init": str(known), "learning_rate": ADAPTING_RATE})


def split_contacts(config: DemoConfig) -> tuple[list[int], list[int]]:
    """Plan indices to train on and to evaluate on: disjoint, drawn by seed."""
    total = len(build_plan(load_sensor(config.sensor).plan).contacts)
    wanted = config.train_contacts + config.live_contacts
    if config.train_contacts < 1 or config.live_contacts < 1 or wanted > total:
        raise ConfigError(
            f"--contacts and --live: 1 or more each and {total} at most together, found {wanted}"
        )
    drawn = np.random.default_rng(config.seed).permutation(total)
    train, live = drawn[: config.train_contacts], drawn[config.train_contacts : wanted]
    return sorted(train.tolist()), sorted(live.tolist())


def check_cell(config: DemoConfig, arguments: Mapping[str, str]) -> None:
    """Raise `ConfigError` or `DeviceError` where the graph of the demo could not run."""
    if load_cell(config.cell).simulation is None:
        raise ConfigError(
            f"cell '{config.cell}' is not a virtual one, and the demo moves no real arm; "
            f"genforce collect does"
        )
    load_indenter(config.indenter)
    claim_cell(find_graph("collect_indent").processes(arguments), keep=False)


def make_room(out: Path, config: DemoConfig) -> None:
    """Begin a demo in `out`, keeping the one before as `<out>.previous`: the last that ran through,
    where there is one. Raises `ConfigError` where either is not a demo's."""
    previous = out.with_name(f"{out.name}.previous")
    for folder in (out, previous):
        if not _is_demos(folder):
            raise ConfigError(f"{folder}: was made by no demo; move it, or choose another --out")
    if out.exists():
        broken_off = not (out / SUMMARY).is_file() and (previous / SUMMARY).is_file()
        shutil.rmtree(out if broken_off else previous, ignore_errors=True)
        if not broken_off:
            out.rename(previous)
    out.mkdir(parents=True)
    (out / BEGUN).write_text(json.dumps(asdict(config), indent=2) + "\n")


def _is_demos(folder: Path) -> bool:
    """Whether a demo made it, or nothing is there yet."""
    if folder.is_dir() and any(folder.iterdir()):
        return (folder / BEGUN).is_file() or (folder / SUMMARY).is_file()
    return folder.is_dir() or not folder.exists()


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file while the demo runs. Raises `ConfigError` when another demo does."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    holder: IO[str]
    with lock.open("a+") as holder:
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder.seek(0)
            raise ConfigError(
                f"another demo is running (process {holder.read().strip()}); wait for it, or "
                f"end it with Ctrl-C"
            ) from error
        holder.truncate(0)
        holder.write(str(os.getpid()))
        holder.flush()
        yield


def _goal(config: DemoConfig, indices: list[int], bag: Path) -> CollectIndent.Goal:
    return CollectIndent.Goal(
        sensor=load_sensor(config.sensor).name,
        indenter=config.indenter,
        contacts=indices,
        bag=str(bag),
        execute_motion=True,
    )


def summarise(
    collected: CollectIndent.Result,
    live: CollectIndent.Result,
    figures: LiveFigures,
    train_seconds: float,
    train_contacts: int,
) -> dict:
    """The figures of `summary.json`; messages and lost add up both recordings. `train_contacts` is
    how many came into the data set."""
    messages: dict[str, int] = {}
    lost: dict[str, int] = {}
    for result in (collected, live):
        for topic, received, gone in zip(result.topics, result.received, result.lost, strict=True):
            messages[topic] = messages.get(topic, 0) + received
            lost[topic] = lost.get(topic, 0) + gone
    return {
        "contacts": {"train": train_contacts, "live": live.contacts},
        "messages": messages,
        "lost": lost,
        "train_seconds": round(train_seconds, 1),
        **asdict(figures.score),
    }


def print_summary(summary: dict, out: Path, console: Console) -> None:
    """Print the table a person reads."""
    streams = Table(title="streams, both recordings", title_justify="left")
    streams.add_column("topic")
    streams.add_column("messages", justify="right")
    streams.add_column("lost", justify="right")
    for topic, count in sorted(summary["messages"].items()):
        streams.add_row(topic, str(count), str(summary["lost"][topic]))
    console.print(streams)

    table = Table(title="live force on unseen contacts", title_justify="left")
    for column in ("", "Fx", "Fy", "Fz"):
        table.add_column(column, justify="right")
    for label, key, digits in (("R²", "r2", 3), ("MAE (N)", "mae_n", 3)):
        table.add_row(label, *(f"{summary[key][axis]:.{digits}f}" for axis in ("fx", "fy", "fz")))
    console.print(table)
    latency = summary["latency_ms"]
    console.print(
        f"contacts {summary['contacts']['train']} trained, {summary['contacts']['live']} live · "
        f"training {summary['train_seconds']} s · live {summary['rate_hz']:.1f} Hz, "
        f"{summary['answered']} of {summary['frames']} frames answered · "
        f"latency p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms"
    )
    for what, name in (("picture", "force.png"), ("figures", SUMMARY)):
        console.print(f"{what} {out / name}", soft_wrap=True)
