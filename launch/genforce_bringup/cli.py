"""The `genforce` command: one subcommand a module, imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass

from genforce_bringup import completion, hints
from genforce_collect.errors import GenforceError


@dataclass(frozen=True)
class Command:
    """A subcommand; its module has `add_arguments(parser)` and `run(args) -> int`."""

    module: str
    help: str


COMMANDS = {
    "demo": Command("genforce_bringup.demo", "collect, train and serve live on the virtual cell"),
    "up": Command("genforce_bringup.up", "start a graph of nodes"),
    "doctor": Command("genforce_bringup.doctor", "look at set-up and devices, say what is wrong"),
    "config": Command("genforce_bringup.config_cli", "show and check cell, sensor and plan files"),
    "collect": Command("genforce_bringup.collect", "run an indentation plan and record it"),
    "record": Command("genforce_collect.record_cli", "record topics without a robot"),
    "plan": Command("genforce_collect.plan_cli", "preview an indentation plan"),
    "bag": Command("genforce_collect.bag_cli", "inspect, verify and repair bags"),
    "replay": Command("genforce_bringup.replay_cli", "play a bag back, or run a model over it"),
    "view": Command("genforce_collect.view.command", "see a running cell or a bag in the browser"),
    "segment": Command("genforce_collect.segment", "markers of a video, folder or bag"),
    "calibrate": Command("genforce_collect.calibrate", "measure a sensor or a latency"),
    "dataset": Command("genforce_train.dataset_cli", "build, check and audit data sets"),
    "train": Command("genforce_train.train_cli", "train a model"),
    "experiment": Command("genforce_train.experiment", "how well force carries over: the tables"),
    "translate": Command("genforce_train.translate_cli", "a data set as another sensor sees it"),
    "evaluate": Command("genforce_train.evaluate_cli", "where a trained model fails"),
    "export": Command("genforce_train.export_cli", "write a trained model as a bundle"),
    "serve": Command("genforce_infer.serve_cli", "serve a bundle as a live force topic"),
    "build-engine": Command("genforce_infer.engine_cli", "TensorRT engine for this GPU"),
    "synth": Command("genforce_sim.synth", "make synthetic data sets"),
    "sim": Command("genforce_sim.view", "look at a simulated press"),
}

USAGE_EXIT_CODE = 64


def main(argv: list[str] | None = None) -> int:
    """Entry point of `genforce`; returns the exit code."""
    if completion.is_asked():
        completion.complete({name: command.module for name, command in COMMANDS.items()})
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in {"-h", "--help"}:
        print(_overview())
        return 0 if words else USAGE_EXIT_CODE
    name, *rest = words
    if name not in COMMANDS:
        print(f"error: unknown command '{name}'; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE_EXIT_CODE
    module = importlib.import_module(COMMANDS[name].module)
    parser = argparse.ArgumentParser(
        prog=f"genforce {name}",
        description=module.__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    try:
        return int(module.run(args))
    except GenforceError as error:
        hints.tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _overview() -> str:
    lines = ["usage: genforce COMMAND [options]     (genforce COMMAND --help for more)", ""]
    width = max(map(len, COMMANDS))
    lines += [f"  {name:{width}} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "example: genforce demo"])


if __name__ == "__main__":
    sys.exit(main())
