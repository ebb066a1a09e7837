"""Look at a simulated press: frame, marker mask, pressure, and force over time.

genforce sim view --sensor tactip --indenter moon -o press.mp4     a short video
genforce sim view --sensor array_1 --indenter part.stl -o press.png    its most loaded moment
genforce sim photo --sensor array_2 --indenter dots -o photo.png   the same, path-traced (Blender)
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import load_sensor
from genforce_collect.errors import ConfigError, DataError
from genforce_collect.trajectory import ContactPlan, Phase, Plan
from genforce_sim.collection import CollectionSpec, frame_tips
from genforce_sim.optics import HEIGHT_PX, WIDTH_PX
from genforce_sim.sensor import ContactState, Frame, SimulatedSensor

Array = NDArray[Any]

VIDEO_SUFFIXES = {".mp4", ".avi"}
PICTURE_SUFFIXES = {".png", ".jpg"}
_FPS = 30.0
_TOOL_DOWN = (math.pi, 0.0, 0.0)


@dataclass(frozen=True)
class Press:
    """A simulated contact, frame by frame."""

    sensor: SimulatedSensor
    times_s: Array  # (n,)
    phases: Array  # (n,)
    states: list[ContactState]
    frames: list[Frame]

    @property
    def forces(self) -> Array:
        """(n, 3) N on the gel."""
        return np.array([state.wrench[:3] for state in self.states])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `genforce sim`."""
    add = parser.add_argument
    add("action", choices=["view", "photo"])
    add("--sensor", default="array_1", help="name or file")
    add("--indenter", default="sphere", help="name or mesh")
    add("--at-mm", nargs=2, type=float, default=(0.0, 0.0), metavar=("X", "Y"))
    add("--depth-mm", type=float, help="default: the full depth of the sensor's plan")
    add("--shear-mm", type=float, help="default: that of the sensor's plan")
    add("--direction-deg", type=float, default=0.0)
    add("--seed", type=int, default=0, help="of the instance")
    add("-o", "--out", type=Path, default=Path("press.png"), help=".png, .jpg, .mp4 or .avi")


def run(args: argparse.Namespace) -> int:
    """Body of `genforce sim view`; returns the exit code."""
    suffix = args.out.suffix.lower()
    if suffix not in VIDEO_SUFFIXES | PICTURE_SUFFIXES:
        raise ConfigError(f"--out {args.out}: must end with .png, .jpg, .mp4 or .avi")
    if args.action == "photo" and suffix in VIDEO_SUFFIXES:
        raise ConfigError(f"--out {args.out}: a photo must end with .png or .jpg")
    press = simulate(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    moment = int(np.linalg.norm(press.forces, axis=1).argmax())
    if args.action == "photo":
        from genforce_sim.blender import render_photo

        _write_picture(args.out, render_photo(press.sensor, press.states[moment]))
    elif suffix in PICTURE_SUFFIXES:
        _write_picture(args.out, Pictures(press).at(moment))
    else:
        _write_video(args.out, Pictures(press))
    peak = np.abs(press.forces).max(axis=0)
    print(f"{args.out}: {len(press.frames)} frames, peak |F| {np.round(peak, 2).tolist()} N")
    return 0


def simulate(args: argparse.Namespace) -> Press:
    """The press that was asked for. Raises `ConfigError` for one that the gel cannot take."""
    config = load_sensor(args.sensor)
    depth = config.plan.max_z_mm if args.depth_mm is None else args.depth_mm
    shear = config.plan.radius_mm if args.shear_mm is None else args.shear_mm
    if not 0 < depth < config.gel.thickness_mm:
        raise ConfigError(
            f"--depth-mm {depth:g}: must be above 0 and below the {config.gel.thickness_mm:g} mm "
            f"of gel of {config.name}"
        )
    half = np.array([config.gel.width_mm, config.gel.height_mm]) / 2
    if (np.abs(args.at_mm) > half).any():
        raise ConfigError(
            f"--at-mm {args.at_mm[0]:g} {args.at_mm[1]:g}: beside the gel of {config.name}, "
            f"which ends at {half[0]:g} and {half[1]:g} mm"
        )
    contact = ContactPlan(
        index=0,
        point=(args.at_mm[0] * 1e-3, args.at_mm[1] * 1e-3),
        depth_m=depth * 1e-3,
        direction_rad=math.radians(args.direction_deg),
        radius_m=shear * 1e-3,
    )
    start = config.plan.start_mm
    plan = Plan((contact,), (start[0] * 1e-3, start[1] * 1e-3, start[2] * 1e-3), 0.0, 0.0)
    tips, phases = frame_tips(CollectionSpec(config, plan, rate_hz=_FPS), contact)
    sensor = SimulatedSensor(config, args.indenter, args.seed)
    states, frames = [], []
    for tip in tips:
        state = sensor.step(np.array([*tip, *_TOOL_DOWN]), 1 / _FPS)
        states.append(state)
        frames.append(sensor.render(state))
    return Press(sensor, np.arange(len(tips)) / _FPS, phases, states, frames)


class Pictures:
    """The panels of a press: frame and mask above, pressure and force below."""

    def __init__(self, press: Press) -> None:
        self._press = press
        self._peak_mpa = max(float(max(s.pressure_mpa.max() for s in press.states)), 1e-6)
        self._plot, self._cursor = _force_plot(press)

    def __len__(self) -> int:
        return len(self._press.frames)

    def at(self, moment: int) -> Array:
        """Panels (960, 1280, 3) of one frame."""
        frame = self._press.frames[moment]
        mask = np.repeat(frame.mask[..., None] * np.uint8(255), 3, axis=2)
        plot = self._plot.copy()
        column = round(self._cursor(float(self._press.times_s[moment])))
        cv2.line(plot, (column, 0), (column, HEIGHT_PX), (0, 0, 0), 1)
        top = np.hstack([frame.image, mask])
        return np.vstack([top, np.hstack([self._pressure(moment), plot])])

    def _pressure(self, moment: int) -> Array:
        """Pressure in colour, with the in-plane displacement of the gel as lines (drawn 2 : 1)."""
        press = self._press
        state, sensor = press.states[moment], press.sensor
        scale = sensor.sensor.px_per_mm * sensor.grid.cell_mm
        to_image = np.array(
            [
                [scale, 0, (WIDTH_PX - 1) / 2 - scale * (sensor.grid.columns - 1) / 2],
                [0, -scale, (HEIGHT_PX - 1) / 2 + scale * (sensor.grid.rows - 1) / 2],
            ]
        )
        level = np.clip(state.pressure_mpa / self._peak_mpa * 255, 0, 255).astype(np.uint8)
        grown = cv2.warpAffine(level, to_image, (WIDTH_PX, HEIGHT_PX))
        panel = cv2.applyColorMap(grown, cv2.COLORMAP_INFERNO)
        step = np.array([1, -1]) * sensor.sensor.px_per_mm * 2
        for row in range(1, 30, 2):
            for column in range(1, 40, 2):
                start = np.array([column, row]) * 16 + 8
                end = start + state.displacement[:2, row, column] * step
                cv2.line(panel, start.tolist(), np.round(end).astype(int).tolist(), (180, 180, 90))
        text = f"pressure, up to {self._peak_mpa * 1e3:.0f} kPa; displacement 2:1"
        cv2.putText(panel, text, (10, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (220, 220, 220))
        return panel


def _force_plot(press: Press) -> tuple[Array, Any]:
    """Force over time (480, 640, 3), and the function from a time to its column."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=100, layout="tight")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for force, name in zip(press.forces.T, ("Fx", "Fy", "Fz"), strict=True):
        axes.plot(press.times_s, force, label=name)
    for start in np.flatnonzero(np.diff(press.phases)) + 1:
        axes.axvline(press.times_s[start], color="0.85", zorder=0)
    names = " / ".join(Phase(phase).name.lower() for phase in dict.fromkeys(press.phases.tolist()))
    axes.set(xlabel=f"time (s): {names}", ylabel="force on the gel (N)")
    axes.legend(loc="lower right")
    canvas.draw()
    picture = cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR)
    transform = axes.transData
    return picture, lambda time_s: transform.transform((time_s, 0.0))[0]


def _write_picture(path: Path, picture: Array) -> None:
    if not cv2.imwrite(str(path), picture):
        raise DataError(f"{path}: could not be written")


def _write_video(path: Path, pictures: Pictures) -> None:
    codec = "mp4v" if path.suffix.lower() == ".mp4" else "MJPG"
    size = (2 * WIDTH_PX, 2 * HEIGHT_PX)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), _FPS, size)
    if not writer.isOpened():
        raise DataError(f"{path}: this OpenCV cannot write {codec} video; try .avi")
    for moment in range(len(pictures)):
        writer.write(pictures.at(moment))
    writer.release()
