"""Play a bag back onto its topics, or run a model over it offline.

Examples:
  genforce replay runs/demo/live_bag
  genforce replay runs/demo/live_bag --rate 0.25 --loop
  genforce replay runs/demo/live_bag --infer runs/demo/bundle   # predictions beside the labels
"""

from __future__ import annotations

import argparse

from genforce_collect import replay
from genforce_infer import offline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    replay.add_arguments(parser)
    offline.add_options(parser.add_argument_group("with --infer, offline"), required=False)


def run(args: argparse.Namespace) -> int:
    """Play, or infer where a bundle is given; returns the exit code."""
    return offline.run(args) if args.infer else replay.run(args)
