"""`genforce up`: start a graph as plain processes, for machines without ros2 launch.

Example: genforce up collect_indent cell:=virtual sensor:=array_1 indenter:=sphere
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from ament_index_python.packages import PackageNotFoundError, get_package_prefix

from genforce_bringup.graph import (
    GRAPHS,
    NAMESPACE,
    Process,
    claim_cell,
    find_graph,
    parse_assignments,
)
from genforce_bringup.supervisor import Supervisor
from genforce_collect.errors import ConfigError
from genforce_collect.nodes.common import parameter_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    names = "\n".join(f"  {graph.name:18} {graph.description}" for graph in GRAPHS.values())
    parser.add_argument("graph", help=f"one of:\n{names}")
    parser.add_argument("arguments", nargs="*", metavar="name:=value", help="see --show-args")
    parser.add_argument("--show-args", action="store_true", help="list the graph's arguments")


def run(args: argparse.Namespace) -> int:
    """Run the graph until Ctrl-C or until one of its processes ends; the exit code says which."""
    graph = find_graph(args.graph)
    if args.show_args:
        for argument in graph.arguments:
            default = argument.default or "(none)"
            print(f"{argument.name:10} {argument.description} [default: {default}]")
        return 0
    processes = graph.processes(parse_assignments(args.arguments))
    claim_cell(processes)
    supervisor = Supervisor(processes, [command_line(process) for process in processes])
    return asyncio.run(supervisor.run())


def command_line(process: Process) -> list[str]:
    """Argument vector of a process, with its ROS namespace and parameters."""
    try:
        prefix = Path(get_package_prefix(process.package))
    except PackageNotFoundError as error:
        raise ConfigError(
            f"package {process.package} is not built; run make setup and source setup.bash"
        ) from error
    executable = prefix / "lib" / process.package / process.executable
    if not executable.exists():
        raise ConfigError(f"{executable}: no such executable; run make setup")
    command = [str(executable), *process.arguments]
    if process.parameters:
        command += ["--ros-args", "-r", f"__ns:=/{NAMESPACE}"]
        command += parameter_words(process.parameters)
    return command
