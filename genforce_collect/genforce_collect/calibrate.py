"""Measure a sensor from a few frames without contact, or a camera's latency from a bag.

Examples:
  genforce calibrate sensor frames/ --like gelsight --name mine --pitch-mm 1.5
  genforce calibrate sensor /dev/video2 --like tactip --name pins -o sensors/pins.yaml
  genforce calibrate latency runs/collect/20260101-120000
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import yaml

from genforce_collect.config import CameraConfig, SensorConfig, load_sensor, parse_section
from genforce_collect.devices.camera import Camera
from genforce_collect.devices.camera_sources import is_recording, recorded_frames
from genforce_collect.errors import DataError
from genforce_collect.latency import measure_latency
from genforce_collect.markers.calibration import Calibration, calibrate
from genforce_collect.markers.jpeg import decode_gray
from genforce_collect.markers.overlay import draw
from genforce_collect.markers.view import Gray, View

LIVE_TIMEOUT_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    actions = parser.add_subparsers(dest="what", required=True, metavar="sensor|latency")
    sensor = actions.add_parser("sensor", help="segmentation and scale, into a sensor file")
    sensor.add_argument("source", help="video, folder, image, or a camera as in a cell file")
    sensor.add_argument("--like", default="array_1", help="sensor whose gel and plan to take over")
    sensor.add_argument("--name", required=True, help="name of the new sensor")
    sensor.add_argument("--pitch-mm", type=float, help="distance of neighbouring markers at rest")
    sensor.add_argument("--frames", type=int, default=20, help="frames to look at")
    sensor.add_argument(
        "--whole-view", action="store_true", help="keep markers that the edge of the view may cut"
    )
    sensor.add_argument("-o", "--output", type=Path, help="sensor file to write (<name>.yaml)")
    latency = actions.add_parser("latency", help="camera latency, from contacts in a bag")
    latency.add_argument("bag", type=Path, help="bag with contacts, of markers and wrench")
    latency.add_argument("--sensor", help="sensor, where the bag holds several")


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises `GenforceError`."""
    return _sensor(args) if args.what == "sensor" else _latency(args)


def _sensor(args: argparse.Namespace) -> int:
    images = grab(args.source, args.frames)
    found = calibrate(images, args.whole_view)
    output = args.output or Path(f"{args.name}.yaml")
    sensor = sensor_like(load_sensor(args.like), args.name, found, args.pitch_mm)
    write_sensor(output, sensor)
    picture = output.with_suffix(".png")
    field_of_view = View(found.segmentation).field_of_view
    cv2.imwrite(str(picture), draw(found.view, found.frame, field_of_view))
    segmentation = found.segmentation
    print(
        f"{found.frame.count} {segmentation.polarity} markers of {segmentation.diameter_px} px, "
        f"{found.pitch_px:.1f} px apart, {sensor.px_per_mm:.2f} px/mm"
        + ("" if args.pitch_mm else f" (taken over from {args.like}; --pitch-mm measures it)")
    )
    print(f"wrote {output}; look at {picture}: every marker must have one dot, and nothing else")
    return 0


def grab(source: str, count: int) -> list[Gray]:
    """Grey frames: of a recording, evenly from all of it; of a camera, the next ones."""
    if is_recording(source):
        frames = list(recorded_frames(Path(source).expanduser()))
        frames = frames[:: max(1, len(frames) // count)][:count]
    else:
        frames = []
        camera = Camera(CameraConfig(source=source), lambda frame: frames.append(frame.jpeg))
        camera.start(LIVE_TIMEOUT_S)
        camera.wait_for(count, LIVE_TIMEOUT_S)
        camera.stop()
        frames = frames[:count]
    images = [image for data in frames if (image := decode_gray(data)) is not None]
    if not images:
        raise DataError(f"{source}: no frame of it can be decoded")
    return images


def sensor_like(
    sensor: SensorConfig, name: str, found: Calibration, pitch_mm: float | None
) -> SensorConfig:
    """The sensor with another name, and with the segmentation and scale that were found."""
    px_per_mm = found.pitch_px / pitch_mm if pitch_mm else sensor.px_per_mm
    values = sensor.model_dump() | {
        "name": name,
        "px_per_mm": round(px_per_mm, 3),
        "segmentation": found.segmentation.model_dump(),
    }
    return parse_section(values, SensorConfig, f"calibration of {name}")


def write_sensor(path: Path, sensor: SensorConfig) -> None:
    """Write a sensor file without the keys that stand at their defaults."""
    values = _plain(sensor.model_dump(exclude_defaults=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100))


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML knows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _latency(args: argparse.Namespace) -> int:
    found = measure_latency(args.bag, args.sensor)
    print(
        f"camera of {found.sensor}: {found.latency_s * 1e3:.1f} ms behind the force "
        f"(± {found.spread_s * 1e3:.1f} ms over {found.contacts} contacts); add it to "
        f"camera.latency_s of the cell file"
    )
    return 0
