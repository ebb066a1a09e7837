"""Serve a model bundle as a live force topic, /genforce/<sensor>/wrench.

Examples:
  genforce serve runs/demo/bundle
  genforce serve models/force/array_1 models/force/circle_1   # two sensors, one node
"""

from __future__ import annotations

import argparse
import sys

import yaml

from genforce_collect.errors import ConfigError
from genforce_infer.bundle import read_bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("bundle", nargs="+", help="bundle for each sensor, or one for all")
    parser.add_argument("--sensor", nargs="+", help="sensor files; default: the bundles' own")
    parser.add_argument("--input", choices=("image", "raw", "markers"), default="image")
    parser.add_argument("--provider", choices=("auto", "tensorrt", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="name:=value",
        help="other parameters of the estimator, such as filter_hz:=20",
    )


def run(args: argparse.Namespace) -> int:
    """Run the node in this process until Ctrl-C."""
    bundles = [read_bundle(folder) for folder in args.bundle]
    sensors = args.sensor or [bundle.manifest.sensor for bundle in bundles]
    if "*" in sensors:
        raise ConfigError("this bundle serves any sensor: say which with --sensor")
    parameters = {
        "sensor": ",".join(sensors),
        "bundle": ",".join(args.bundle),
        "input": args.input,
        "provider": args.provider,
        **_assignments(args.set),
    }
    # Not at the top: ROS takes a second to import, and --help should not.
    from genforce_collect.nodes.common import parameter_words
    from genforce_infer.nodes.force_estimator import PARAMETERS, main

    if unknown := sorted(set(parameters) - set(PARAMETERS)):
        raise ConfigError(f"unknown parameter {unknown[0]}; known are {', '.join(PARAMETERS)}")
    sys.argv = ["force_estimator", "--ros-args", *parameter_words(parameters)]
    return main()


def _assignments(texts: list[str]) -> dict[str, object]:
    given: dict[str, object] = {}
    for text in texts:
        name, separator, value = text.partition(":=")
        if not separator:
            raise ConfigError(f"--set {text}: write name:=value")
        given[name] = yaml.safe_load(value)
    return given
