"""Show cell, sensor and plan files with their defaults, or check them.

Example: genforce config show lab
         genforce config check lab gelsight my_plan.yaml
         genforce config list

A cell and sensors that are checked together must also fit: the sensor's plan stays in the cell's
workspace, on the gel, and does not press through it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from genforce_bringup.hints import tell
from genforce_collect.config import (
    CellConfig,
    Section,
    SensorConfig,
    find_config,
    known_configs,
    parse_section,
    read_mapping,
)
from genforce_collect.errors import ConfigError, GenforceError
from genforce_collect.trajectory import PlanFile, build_plan, check_plan

MODELS: dict[str, type[Section]] = {"cells": CellConfig, "sensors": SensorConfig, "plans": PlanFile}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("action", choices=["show", "check", "list"])
    parser.add_argument("files", nargs="*", metavar="NAME|PATH", help="cell, sensor or plan files")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when every file is sound. Raises `ConfigError`."""
    if args.action == "list":
        for kind in ("cells", "sensors"):
            print(f"{kind}: {', '.join(known_configs(kind)) or 'none'}")
        return 0
    if not args.files:
        raise ConfigError(f"genforce config {args.action}: name a cell, a sensor or a .yaml file")
    if args.action == "show":
        for name in args.files:
            path, section = read_any(name)
            print(f"# {path}\n{as_yaml(section)}", end="")
        return 0
    return _check(args.files)


def read_any(name_or_path: str) -> tuple[Path, Section]:
    """A cell, sensor or plan file by name or path; its keys say which. Raises `ConfigError`."""
    path = _find(name_or_path)
    data = read_mapping(path)
    kind = "sensors" if "gel" in data or "kind" in data else "plans"
    if "robot" in data or "netft" in data:
        kind = "cells"
    return path, parse_section(data, MODELS[kind], str(path))


def as_yaml(section: Section) -> str:
    """The section with all defaults, as a file that reads back the same."""
    data = section.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)


def _find(name_or_path: str) -> Path:
    if Path(name_or_path).suffix in {".yaml", ".yml"}:
        return find_config("cells", name_or_path)
    found = [known_configs(kind).get(name_or_path) for kind in ("cells", "sensors")]
    paths = [path for path in found if path is not None]
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise ConfigError(f"'{name_or_path}' is a cell and a sensor; give the path of one of them")
    known = [*known_configs("cells"), *known_configs("sensors")]
    raise ConfigError(f"unknown cell or sensor '{name_or_path}': known are {', '.join(known)}")


def _check(names: list[str]) -> int:
    sound: list[Any] = []
    code = 0
    for name in names:
        try:
            path, section = read_any(name)
        except ConfigError as error:
            tell(error)
            code = error.exit_code
            continue
        sound.append(section)
        print(f"ok: {path}")
    for pair, problem in _misfits(sound):
        print(f"error: {pair}: {problem}" if problem else f"ok: {pair}: the plan fits", flush=True)
        code = max(code, problem.exit_code if problem else 0)
    return code


def _misfits(sections: list[Section]) -> Iterator[tuple[str, GenforceError | None]]:
    """Each cell with each sensor, and why the sensor's plan cannot run there."""
    cells = [section for section in sections if isinstance(section, CellConfig)]
    sensors = [section for section in sections if isinstance(section, SensorConfig)]
    for cell in cells:
        for sensor in sensors:
            problem = None
            try:
                check_plan(build_plan(sensor.plan), cell.limits, sensor)
            except GenforceError as error:
                problem = error
            yield f"sensor {sensor.name} in cell {cell.name}", problem
