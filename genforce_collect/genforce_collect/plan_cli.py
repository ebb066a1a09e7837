"""Look at an indentation plan before anything moves.

Examples:
  genforce plan preview --sensor array_1
  genforce plan preview --sensor tactip --cell lab --plan my_plan.yaml --out plan.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from rich.console import Console

from genforce_collect.config import CellConfig, SensorConfig, Vector3, load_cell, load_sensor
from genforce_collect.trajectory import (
    LOADED_PHASES,
    Plan,
    check_plan,
    load_plan,
    move_duration,
    plan_duration,
    plan_moves,
    to_sensor_frame,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("action", choices=["preview"])
    parser.add_argument("--sensor", default="array_1", help="sensor, by name or path")
    parser.add_argument("--cell", default="virtual", help="cell, by name or path")
    parser.add_argument(
        "--plan",
        default="",
        help="YAML plan, press, press:DEPTH_MM, slide, random:COUNT:SEED; default: the sensor's",
    )
    parser.add_argument("--out", type=Path, help="picture (default runs/plan_<sensor>.png)")


def run(args: argparse.Namespace) -> int:
    """Check the plan against cell and sensor, and draw it. Raises `SafetyError`, `ConfigError`."""
    cell, sensor = load_cell(args.cell), load_sensor(args.sensor)
    plan = load_plan(args.plan, sensor)
    check_plan(plan, cell.limits, sensor)
    moves = list(plan_moves(plan, plan.contacts, cell.speeds))
    seconds = plan_duration(plan, plan.contacts, cell.speeds)
    depths = sorted({round(c.depth_m * 1e3, 3) for c in plan.contacts})
    out = args.out or Path("runs") / f"plan_{sensor.name}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_plan(plan, cell, sensor, out)
    console = Console(highlight=False)
    console.print(
        f"{len(plan.contacts)} contacts at {len({c.point for c in plan.contacts})} points, depths "
        f"{depths[0]:g} to {depths[-1]:g} mm, {len(moves)} moves, "
        f"about {seconds // 60:.0f} min {seconds % 60:.0f} s on cell {cell.name}"
    )
    console.print(f"within the workspace and the gel; picture: {out}")
    return 0


def draw_plan(plan: Plan, cell: CellConfig, sensor: SensorConfig, path: Path) -> None:
    """Write a picture of a plan: from above over the gel, and the tip's height over time."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    figure, (above, side) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    width, height = sensor.gel.width_mm, sensor.gel.height_mm
    above.add_patch(Rectangle((-width / 2, -height / 2), width, height, fc="#eee", ec="0.4"))
    low, high = cell.limits.workspace_min_m, cell.limits.workspace_max_m
    above.add_patch(
        Rectangle(
            (low[0] * 1e3, low[1] * 1e3),
            (high[0] - low[0]) * 1e3,
            (high[1] - low[1]) * 1e3,
            fill=False,
            ls="--",
            ec="tab:red",
            label="workspace",
        )
    )
    deepest_last = sorted(plan.contacts, key=lambda contact: contact.depth_m, reverse=True)
    starts = np.array([to_sensor_frame(plan, (*c.point, 0.0)) for c in deepest_last]) * 1e3
    ends = np.array([to_sensor_frame(plan, c.phases[1][1]) for c in deepest_last]) * 1e3
    depths = np.array([c.depth_m for c in deepest_last]) * 1e3
    # Deeper arrows are wider and lie under the shallower ones that point the same way.
    arrows = above.quiver(
        *starts[:, :2].T,
        *(ends - starts)[:, :2].T,
        depths,
        angles="xy",
        scale_units="xy",
        scale=1,
        linewidths=2 * depths / depths.max(),
        edgecolor="face",
        width=0.003,
        cmap="viridis_r",
    )
    figure.colorbar(arrows, ax=above, label="depth (mm)", shrink=0.7)
    above.plot(*starts[:, :2].T, "k.", ms=3)
    above.set(aspect="equal", xlabel="x (mm)", ylabel="y (mm)", title=f"{sensor.name}, from above")
    above.legend(loc="upper right")

    times, heights = [0.0], [plan.clearance_m * 1e3]
    position: Vector3 = (0.0, 0.0, plan.clearance_m)
    for _, move in plan_moves(plan, plan.contacts, cell.speeds):
        distance = math.dist(position, move.target)
        seconds = move_duration(distance, move.speed_m_s, cell.speeds.acceleration_m_s2)
        times.append(times[-1] + seconds + plan.dwell_s * (move.phase in LOADED_PHASES))
        heights.append(move.target[2] * 1e3)
        position = move.target
    side.plot(times, heights, color="tab:blue", lw=0.7)
    side.axhline(0, color="0.5", lw=0.7)
    side.set(xlabel="time (s)", ylabel="z of the tip (mm)", title=f"{len(plan.contacts)} contacts")
    figure.savefig(path, dpi=120)
    plt.close(figure)
