"""Record whatever of a session's topics is published, until Ctrl-C; needs no robot.

Examples:
  genforce record --sensor array_1 --out runs/free
  genforce record --out runs/free --seconds 30 --topics /tf /my/topic
"""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from genforce_collect import bag_cli
from genforce_collect.errors import ConfigError
from genforce_collect.recording import RecordingStatus

REFRESH_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--out", type=Path, help="bag to write (default runs/record/<time>)")
    parser.add_argument("--sensor", default="array_1", help="name of the sensor in the topics")
    parser.add_argument("--topics", nargs="+", default=[], metavar="TOPIC", help="these as well")
    parser.add_argument("--seconds", type=float, default=0.0, help="end by itself after this long")


def run(args: argparse.Namespace) -> int:
    """Record, then verify; exit code 0 when nothing was lost. Raises `GenforceError`."""
    from rclpy.parameter import Parameter

    from genforce_collect.nodes.common import run as run_node
    from genforce_collect.nodes.recorder import Recorder

    if args.seconds < 0:
        raise ConfigError(f"--seconds: must be 0 or more, found {args.seconds}")
    bag = (args.out or Path("runs/record") / time.strftime("%Y%m%d-%H%M%S")).absolute()
    bag.parent.mkdir(parents=True, exist_ok=True)
    parameters = [
        Parameter("sensor", value=args.sensor),
        Parameter("bag", value=str(bag)),
        Parameter("topics", value=args.topics or [""]),
    ]
    ended = threading.Event()

    def make_node() -> Recorder:
        recorder = Recorder(parameter_overrides=parameters)
        threading.Thread(target=_show, args=(recorder.status, args.seconds, ended)).start()
        return recorder

    try:
        code = run_node(make_node)
    finally:
        ended.set()
    return code or bag_cli.run(argparse.Namespace(action="verify", bags=[bag], json=False))


def _show(status: Callable[[], RecordingStatus], seconds: float, ended: threading.Event) -> None:
    """Keep a table on the terminal; end the process when the time is over or the disk is full."""
    with Live(console=Console(), refresh_per_second=4, transient=True) as live:
        while not ended.wait(REFRESH_S):
            now = status()
            live.update(_table(now))
            if (seconds and now.duration_s >= seconds) or not now.recording:
                signal.raise_signal(signal.SIGINT)
                return


def _table(status: RecordingStatus) -> Table:
    table = Table(
        title=f"{status.bag}  {status.duration_s:.0f} s  {status.bytes_written / 2**20:.1f} MB "
        f"({status.bytes_free / 2**30:.1f} GB free)  Ctrl-C ends  {status.error}",
        title_justify="left",
    )
    table.add_column("topic", overflow="fold")
    for column in ("messages", "lost", "Hz"):
        table.add_column(column, justify="right")
    for topic in status.topics:
        table.add_row(topic.name, str(topic.received), str(topic.lost), f"{topic.rate_hz:.1f}")
    return table
