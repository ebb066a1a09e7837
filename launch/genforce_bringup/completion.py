"""Tab completion of `genforce` in bash, through argcomplete; `setup.bash` turns it on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

from genforce_collect.config import known_configs

KINDS = {"cell": "cells", "sensor": "sensors", "sensors": "sensors", "like": "sensors"}


def is_asked() -> bool:
    """Whether the shell wants completions rather than the command run."""
    return "_ARGCOMPLETE" in os.environ


def complete(modules: Mapping[str, str]) -> None:
    """Answer the shell and exit. `modules` of the subcommands; only the one typed is imported."""
    import argcomplete

    typed = os.environ.get("COMP_LINE", "").split()
    parser = argparse.ArgumentParser(prog="genforce")
    commands = parser.add_subparsers()
    for name, module in modules.items():
        command = commands.add_parser(name)
        if name in typed[1:2]:
            import_module(module).add_arguments(command)
            _complete_values(command)
    argcomplete.autocomplete(parser)


def _complete_values(parser: argparse.ArgumentParser) -> None:
    """Names of cells and sensors where an option takes one."""
    for action in parser._actions:  # argparse keeps no public list of them
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_values(inner)
        elif kind := KINDS.get(action.dest):
            action.completer = partial(_names, kind)  # type: ignore[attr-defined]


def _names(kind: str, **_: Any) -> list[str]:
    return list(known_configs(kind))
