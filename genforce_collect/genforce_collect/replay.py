"""Play a bag back onto its topics: at any rate, looped, paused, with its own stamps or as if live.

Examples:
  genforce replay runs/demo/live_bag
  genforce replay runs/demo/live_bag --rate 0.25 --loop --topics /genforce/netft/wrench
  genforce replay runs/demo/live_bag --stamps now          # feed a live estimator
  genforce replay runs/demo/live_bag --clock               # for nodes with use_sim_time

Pause and go on with the service /genforce/replay/pause (std_srvs/SetBool).
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from genforce_collect.bags import BagReader, RawRecord
from genforce_collect.cdr import set_stamp
from genforce_collect.errors import ConfigError

CLOCK_PERIOD_NS = 10_000_000
BURST_S = 0.0005  # messages due within this are sent without sleeping in between


@dataclass(frozen=True)
class ReplayOptions:
    """What is played, and how."""

    bag: Path
    rate: float = 1.0
    loop: bool = False
    paused: bool = False
    topics: tuple[str, ...] = ()  # empty: all
    restamp: bool = False  # header stamps moved to the time of replay
    clock: bool = False

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ConfigError(f"rate: must be above 0, found {self.rate}")


class Player:
    """Sends a bag's messages when they are due. `play` runs in a thread of its own."""

    def __init__(
        self,
        options: ReplayOptions,
        publish: Callable[[str, bytes], None],
        publish_clock: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.options = options
        self.sent = 0
        self._publish, self._publish_clock = publish, publish_clock
        self._running = threading.Event()
        self._stopped = threading.Event()
        self.pause(options.paused)
        with BagReader(options.bag) as bag:
            self.specs = tuple(
                spec for spec in bag.specs if not options.topics or spec.name in options.topics
            )
            self.duration_s = (bag.span_ns[1] - bag.span_ns[0]) * 1e-9
            self._stamped = {spec.name for spec in self.specs if bag.has_stamp(spec.name)}
        if unknown := set(options.topics) - {spec.name for spec in self.specs}:
            raise ConfigError(f"{options.bag}: has no topic {', '.join(sorted(unknown))}")

    def pause(self, paused: bool) -> None:
        """Pause or go on."""
        if paused:
            self._running.clear()
        else:
            self._running.set()

    def stop(self) -> None:
        """End `play` soon."""
        self._stopped.set()
        self._running.set()

    def play(self) -> None:
        """Play until the end, or for ever where looped, or until `stop`."""
        while not self._stopped.is_set():
            self._play_once()
            if not self.options.loop:
                break

    def _play_once(self) -> None:
        with BagReader(self.options.bag) as bag:
            records = bag.raw([spec.name for spec in self.specs])
            clock_ns = 0
            for record, due in self._when_due(records):
                if self.options.clock and record.log_ns >= clock_ns:
                    self._publish_clock(record.log_ns)
                    clock_ns = record.log_ns + CLOCK_PERIOD_NS
                data = record.data
                if self.options.restamp and record.topic in self._stamped:
                    shift_ns = time.time_ns() - record.log_ns
                    late_ns = int((time.monotonic() - due) * 1e9)
                    data = restamped(data, record.stamp_ns + shift_ns - late_ns)
                self._publish(record.topic, data)
                self.sent += 1

    def _when_due(self, records: Iterator[RawRecord]) -> Iterator[tuple[RawRecord, float]]:
        """Each record when its time has come, with that time (monotonic, s)."""
        begun, first_ns = time.monotonic(), -1
        for record in records:
            if first_ns < 0:
                first_ns = record.log_ns
            due = begun + (record.log_ns - first_ns) * 1e-9 / self.options.rate
            if not self._running.is_set():
                paused_at = time.monotonic()
                self._running.wait()
                paused_s = time.monotonic() - paused_at
                begun, due = begun + paused_s, due + paused_s
            if (early := due - time.monotonic()) > BURST_S:
                self._stopped.wait(early)
            if self._stopped.is_set():
                return
            yield record, due


def restamped(data: bytes, stamp_ns: int) -> bytes:
    """A CDR message that begins with a header, with another stamp."""
    copy = bytearray(data)
    set_stamp(copy, stamp_ns)
    return bytes(copy)


# --- command line -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("bag", type=Path, help="folder of the bag")
    parser.add_argument("--rate", type=float, default=1.0, help="times real time (default 1)")
    parser.add_argument("--loop", action="store_true", help="begin again at the end")
    parser.add_argument("--paused", action="store_true", help="wait for the pause service")
    parser.add_argument("--topics", nargs="+", default=[], metavar="TOPIC", help="only these")
    parser.add_argument(
        "--stamps",
        choices=["original", "now"],
        default="original",
        help="header stamps as recorded, or moved to the time of replay",
    )
    parser.add_argument("--clock", action="store_true", help="publish the bag's time on /clock")


def run(args: argparse.Namespace) -> int:
    """Play until the end or Ctrl-C. Raises `ConfigError`, `DataError`."""
    from genforce_collect.nodes.replay import replay

    options = ReplayOptions(
        args.bag,
        args.rate,
        args.loop,
        args.paused,
        tuple(args.topics),
        args.stamps == "now",
        args.clock,
    )
    return replay(options)
