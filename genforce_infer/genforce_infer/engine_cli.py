"""Build the TensorRT engines of a bundle on this machine's NVIDIA GPU.

They are kept by GPU, TensorRT version and sha256 of the model; the estimator then starts with them
by itself.

Example: genforce build-engine runs/demo/bundle
"""

from __future__ import annotations

import argparse

from genforce_infer.bundle import read_bundle
from genforce_infer.runtime import build_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("bundle", help="folder of a model bundle")


def run(args: argparse.Namespace) -> int:
    """Build and say where."""
    print(build_engine(read_bundle(args.bundle)))
    return 0
