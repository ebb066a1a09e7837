"""Run an indentation plan on a cell and record it.

Examples:
  genforce collect --cell virtual --sensor array_1 --indenter sphere --contacts 20
  genforce collect --cell virtual --sensor array_1 --indenter sphere --force-depth
  genforce collect --attach --contacts 5      # by the nodes of genforce up collect_indent
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from genforce_bringup.session import CollectClient, RunningGraph
from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError, GenforceError
from genforce_collect.nodes.common import NAMESPACE
from genforce_collect.report import write_report
from genforce_collect.trajectory import Phase
from genforce_msgs.action import CollectIndent
from genforce_msgs.msg import RecorderStatus

STREAM_RATE_HZ = 12.0  # slower topics (states, reports) are no streams to watch
MIN_WHOLE = 0.75  # of the contacts asked for: with less, a collection has failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    nodes = parser.add_mutually_exclusive_group()
    nodes.add_argument("--cell", default="virtual", help="cell, by name or path")
    nodes.add_argument(
        "--attach", action="store_true", help="start no nodes: use those that are up already"
    )
    parser.add_argument("--sensor", default="array_1", help="sensor, by name or path")
    parser.add_argument("--indenter", default="sphere", help="indenter, by name or mesh path")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--plan",
        default="",
        help="YAML plan, press:DEPTH_MM, slide, random:COUNT:SEED; default: the sensor's own",
    )
    what.add_argument(
        "--force-depth", action="store_true", help="one press, down and up: the gel's curve"
    )
    parser.add_argument("--contacts", type=int, default=0, help="only the first N contacts")
    parser.add_argument("--out", type=Path, help="bag to write (default runs/collect/<time>)")
    parser.add_argument("--resume", action="store_true", help="leave out contacts already whole")
    parser.add_argument("--dry-run", action="store_true", help="everything but move")


def run(args: argparse.Namespace) -> int:
    """Run the plan; exit code 0 when every contact is whole and nothing was lost."""
    if args.contacts < 0:
        raise ConfigError(f"--contacts: must be 0 or more, found {args.contacts}")
    graph_name = "collect_force_depth" if args.force_depth else "collect_indent"
    folder = Path("runs", "force_depth" if args.force_depth else "collect")
    bag = args.out or folder / time.strftime("%Y%m%d-%H%M%S")
    bag.parent.mkdir(parents=True, exist_ok=True)
    if bag.exists() and not args.resume:
        raise ConfigError(f"{bag}: exists already; choose another --out or give --resume")
    goal = CollectIndent.Goal(
        sensor=load_sensor(args.sensor).name,
        indenter=args.indenter,
        plan="press" if args.force_depth else args.plan,  # whatever the plan of the nodes
        contacts=list(range(args.contacts)),
        bag=str(bag.resolve()),
        resume=args.resume,
        execute_motion=not args.dry_run,
    )
    arguments = {"cell": args.cell, "sensor": args.sensor, "indenter": args.indenter}
    log = bag.parent / f"{bag.name}.log"
    console = Console()
    running = nullcontext() if args.attach else RunningGraph(graph_name, arguments, log)
    with running as graph:
        with CollectClient(graph) as client:
            result = run_goal(client, goal, console)
        if graph:
            graph.end()
            if not result.success:  # the end of the graph may first have to close the bag
                graph.stop()
        page, report = write_report(Path(result.bag))
    result.contacts = len(report.whole)  # a recorder that died may not hold all that were counted
    print_result(result, console)
    console.print(f"report {page}", soft_wrap=True)
    return 0 if not result.invalid and not sum(result.lost) else 1


def run_goal(
    client: CollectClient, goal: CollectIndent.Goal, console: Console, title: str = "collect"
) -> CollectIndent.Result:
    """Run a goal with a live line on the contacts and one on what is recorded. Raises
    `GenforceError` with the server's reason."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    streams = Text()
    with Live(Group(progress, streams), console=console):
        task: TaskID = progress.add_task(title, total=None, state="starting")

        def show(feedback: CollectIndent.Feedback) -> None:
            progress.update(
                task,
                total=feedback.total,
                completed=feedback.index,
                state=f"{Phase(feedback.phase).name.lower():10} Fz {feedback.force:6.2f} N  "
                f"ETA {feedback.eta:4.0f} s",
            )
            streams.plain = stream_line(client.recorded)
            streams.style = "bold red" if sum(client.recorded.lost) else "dim"

        result = client.run(goal, show)
        progress.update(task, completed=result.contacts, state="done")
    if not console.is_terminal:
        console.line()  # which Rich ends its last line with on a terminal only
    if not result.success:
        if not result.invalid or result.contacts < MIN_WHOLE * len(goal.contacts):
            came = (
                f"; what came is in {result.bag}"
                if result.bag and Path(result.bag).is_dir()
                else ""
            )
            raise GenforceError(f"collection ended: {result.message}{came}")
        console.print(f"{result.message}; going on with the {result.contacts} that are")
    return result


def stream_line(status: RecorderStatus) -> str:
    """Rates of the streams being recorded, and what was lost of which."""
    names = [topic.removeprefix(f"/{NAMESPACE}/") for topic in status.topics]
    rates = [
        f"{name} {rate:.0f} Hz"
        for name, rate in zip(names, status.rate, strict=True)
        if rate >= STREAM_RATE_HZ
    ]
    lost = [f"{name} {count}" for name, count in zip(names, status.lost, strict=True) if count]
    return "  ".join([*rates, f"lost: {', '.join(lost) or 'nothing'}"]) if rates or lost else ""


def print_result(result: CollectIndent.Result, console: Console) -> None:
    """Print what the bag holds, topic by topic."""
    table = Table(title=f"{result.contacts} contacts in {result.bag}", title_justify="left")
    table.add_column("topic")
    table.add_column("messages", justify="right")
    table.add_column("lost", justify="right")
    for topic, received, lost in zip(result.topics, result.received, result.lost, strict=True):
        table.add_row(topic, str(received), str(lost))
    console.print(table)
