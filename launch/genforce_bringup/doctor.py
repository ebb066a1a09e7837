"""Look at the set-up and, with --cell, at each device of a cell; say what is wrong and what to do.

Example: genforce doctor --cell lab --sensor gelsight

Devices that a running graph holds are left alone. Nothing is moved and the robot's control is not
taken.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from genforce_bringup.graph import NAMESPACE, find_graph
from genforce_bringup.up import command_line
from genforce_collect.config import CellConfig, SensorConfig, load_cell, load_sensor
from genforce_collect.errors import DeviceError, GenforceError
from genforce_collect.recording import RecordingOptions

# import name -> distributions that may bring it
PACKAGES = {
    "numpy": ("numpy",),
    "scipy": ("scipy",),
    "cv2": ("opencv-python-headless", "opencv-python", "opencv-contrib-python"),
    "pydantic": ("pydantic",),
    "yaml": ("PyYAML",),
    "rtde_control": ("ur_rtde",),
    "pynetft": ("pynetft",),
    "websockets": ("websockets",),
    "rosbags": ("rosbags",),
    "mcap": ("mcap",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "torch": ("torch",),
}
PYTHON_RANGE = ((3, 10), (3, 12))  # ur_rtde has no wheels past it
ROOMY_BYTES = 10 << 30  # some hours of collection
DISCOVERY_S = 3.0  # for a graph on this machine to be seen
ON_TIME = 0.8  # part of the rate asked for that is enough
WATCH_S = 0.6  # a device is listened to for this long
STATE_VARIABLES = (  # of the RTDE stream, in the order of `ControllerState`
    "robot_mode",
    "safety_mode",
    "safety_status_bits",
    "runtime_state",
    "speed_scaling",
)
REMOTE = "switch from Local to Remote at the top right of the teach pendant"


@dataclass(frozen=True)
class Finding:
    """One line of the table; `state` is ok, note (works, but know it) or problem."""

    subject: str
    state: str
    found: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--cell", help="look at its devices too; by name or path")
    parser.add_argument("--sensor", default="array_1", help="sensor of the cell, by name or path")
    parser.add_argument("--timeout", type=float, default=3.0, help="patience with a device (s)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON only")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 without a problem, else 1."""
    console = Console(highlight=False, quiet=args.json)
    with console.status("looking"):
        findings = list(examine(args.cell, args.sensor, args.timeout))
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    console.print(_table(findings))
    problems = [finding for finding in findings if finding.state == "problem"]
    console.print(f"[red]{len(problems)} problems[/]" if problems else "[green]no problems[/]")
    return 1 if problems else 0


def examine(cell: str | None, sensor: str, timeout_s: float = 3.0) -> Iterator[Finding]:
    """Everything there is to look at, in turn; nothing raises."""
    yield _python()
    yield _packages()
    yield from _ros()
    yield _workspace(cell, sensor)
    yield _disk()
    if cell is None:
        return
    try:
        cell_config, sensor_config = load_cell(cell), load_sensor(sensor)
    except GenforceError as error:
        yield Finding("configuration", "problem", str(error), "genforce config check NAME")
        return
    files = f"cell {cell_config.name}, sensor {sensor_config.name}"
    yield Finding("configuration", "ok", files)
    start = f"genforce up virtual_cell cell:={cell} sensor:={sensor}"
    absent = start if cell_config.simulation is not None else ""
    yield from _devices(cell_config, sensor_config, timeout_s, absent)


# --- the machine --------------------------------------------------------------------------------


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if PYTHON_RANGE[0] <= sys.version_info[:2] <= PYTHON_RANGE[1]:
        return Finding("Python", "ok", found)
    return Finding("Python", "problem", found, "PYTHON=python3.12 make setup")


def _packages() -> Finding:
    missing, found = [], []
    for module, distributions in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            missing.append(module)
        found += [f"{name} {number}" for name in distributions if (number := _version(name))]
    if missing:
        return Finding("packages", "problem", f"missing: {', '.join(missing)}", "make setup")
    return Finding("packages", "ok", ", ".join(found))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _ros() -> Iterator[Finding]:
    try:
        importlib.import_module("rclpy")
        importlib.import_module("genforce_msgs.msg")
    except ImportError as error:
        yield Finding("ROS 2", "problem", str(error), "source setup.bash; make setup if it fails")
        return
    distro = os.environ.get("ROS_DISTRO", "wheels")
    middleware = os.environ.get("RMW_IMPLEMENTATION", "the default middleware")
    yield Finding("ROS 2", "ok", f"{distro}, {middleware}")
    domain = os.environ.get("ROS_DOMAIN_ID", "0")
    reach = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    if reach == "LOCALHOST":
        yield Finding("discovery", "ok", f"domain {domain}, this machine only")
    else:
        note = "other machines can see and command this graph; docs/security.md"
        yield Finding("discovery", "note", f"domain {domain}, {reach}", note)


def _workspace(cell: str | None, sensor: str) -> Finding:
    try:
        processes = find_graph("collect_indent").processes(
            {"cell": cell or "virtual", "sensor": sensor}
        )
        for process in processes:
            command_line(process)
    except GenforceError as error:
        return Finding("workspace", "problem", str(error), "make setup")
    names = ", ".join(process.label for process in processes)
    return Finding("workspace", "ok", f"built: {names}")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 2**30:.0f} GB free in {Path.cwd()}"
    if free < RecordingOptions().min_free_bytes:
        return Finding("disk", "problem", found, "make room: the recorder would refuse to begin")
    if free < ROOMY_BYTES:
        return Finding("disk", "note", found, "enough for a short collection only")
    return Finding("disk", "ok", found)


# --- the devices --------------------------------------------------------------------------------


def _devices(
    cell: CellConfig, sensor: SensorConfig, timeout_s: float, absent: str
) -> Iterator[Finding]:
    """`absent`: what to do about devices that are not there; empty: what their driver says."""
    held = published_topics()
    taxels = sensor.kind == "taxels"
    picture = f"{sensor.name}/{'taxels' if taxels else 'image/compressed'}"
    looks: list[tuple[str, str, Callable[[], Finding]]] = [
        ("robot", "robot/tcp_pose", lambda: _robot(cell, timeout_s)),
        ("force sensor", "netft/wrench", lambda: _wrench_sensor(cell, timeout_s)),
        (
            "uSkin" if taxels else "camera",
            picture,
            lambda: _uskin(cell, sensor, timeout_s) if taxels else _camera(cell, sensor, timeout_s),
        ),
    ]
    for subject, topic, look in looks:
        if f"/{NAMESPACE}/{topic}" in held:
            yield Finding(
                subject, "note", f"held by a running graph, as {topic}", "see /diagnostics"
            )
            continue
        try:
            yield look()
        except GenforceError as error:
            found, remedy = _split(str(error))
            yield Finding(subject, "problem", found, absent or remedy)


def _split(message: str) -> tuple[str, str]:
    """What is wrong and what to do; messages part them by a semicolon, or ask after a colon."""
    for separator in ("; ", ": "):
        found, parted, remedy = message.rpartition(separator)
        if parted and (separator == "; " or remedy.endswith("?")):
            return found, remedy
    return message, "docs/troubleshooting.md"


def published_topics() -> set[str]:
    """Absolute names of the topics that somebody publishes now; empty without ROS."""
    try:
        import rclpy
        from rclpy.signals import SignalHandlerOptions
    except ImportError:
        return set()
    context = rclpy.Context()
    rclpy.init(args=[], context=context, signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node(f"doctor_{os.getpid()}", context=context, enable_rosout=False)
    try:
        deadline = time.monotonic() + DISCOVERY_S
        found: set[str] = set()
        while time.monotonic() < deadline:
            names = [name for name, _ in node.get_topic_names_and_types()]
            found |= {
                name
                for name in names
                if name.startswith(f"/{NAMESPACE}/") and node.count_publishers(name)
            }
            time.sleep(0.1)
        return found
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)


def _robot(cell: CellConfig, timeout_s: float) -> Finding:
    from genforce_collect.devices.rtde import RtdeStream
    from genforce_collect.devices.ur import ControllerState, ask_dashboard

    config = cell.robot
    remote, model = ask_dashboard(
        config.host, "is in remote control", "get robot model", timeout_s=timeout_s
    )
    stream = RtdeStream(config.host, STATE_VARIABLES, config.frequency_hz, timeout_s)
    try:
        samples = stream.samples(timeout_s)
        _, values = next(samples)
        state = ControllerState(*(value for (value,) in values))  # type: ignore[arg-type]
        rate_hz = _rate(samples)
    finally:
        stream.close()
    found = f"{config.host}: {model}, {rate_hz:.0f} of {config.frequency_hz:.0f} Hz"
    if "true" not in remote.lower():
        return Finding("robot", "problem", f"{found}, not in remote control", REMOTE)
    if state.stop_problem:
        what, _, remedy = state.stop_problem.partition(": ")
        return Finding("robot", "problem", f"{found}, {what}", remedy)
    return _by_rate("robot", found, rate_hz >= ON_TIME * config.frequency_hz)


def _by_rate(subject: str, found: str, on_time: bool) -> Finding:
    if on_time:
        return Finding(subject, "ok", found)
    return Finding(subject, "note", found, "too few: look at the network, and for a busy machine")


def _rate(samples: Iterator[object]) -> float:
    began = time.monotonic()
    count = 0
    while (elapsed_s := time.monotonic() - began) < WATCH_S:
        next(samples)
        count += 1
    return count / elapsed_s


def _wrench_sensor(cell: CellConfig, timeout_s: float) -> Finding:
    from genforce_collect.nodes.netft import make_sensor

    sensor = make_sensor(cell.netft, lambda sample: None)
    sensor.start(timeout_s)
    try:
        time.sleep(WATCH_S)
        health = sensor.health()
    finally:
        sensor.stop()
    found = f"{sensor.name}: {health.rate_hz:.0f} Hz, {health.lost} lost"
    what, _, remedy = health.message.partition("; ")
    if not health.usable:
        return Finding("force sensor", "problem", what or found, remedy)
    if what:
        return Finding("force sensor", "note", what, remedy)
    return _by_rate("force sensor", found, not health.lost)


def _camera(cell: CellConfig, sensor: SensorConfig, timeout_s: float) -> Finding:
    from genforce_collect.devices.camera import Camera
    from genforce_collect.markers.frontend import Frontend
    from genforce_collect.markers.quality import explain

    frames: list[bytes] = []
    camera = Camera(cell.camera, lambda frame: frames.append(frame.jpeg))
    camera.start(timeout_s)
    try:
        before = len(frames)
        time.sleep(WATCH_S)
        rate_hz = (len(frames) - before) / WATCH_S
        health = camera.health()
    finally:
        camera.stop()
    markers = Frontend(sensor).process_jpeg(frames[-1])
    found = (
        f"{cell.camera.source}: {rate_hz:.0f} of {cell.camera.fps:.0f} Hz, {markers.count} markers "
        f"of {sensor.name}"
    )
    if not health.usable:
        raise DeviceError(health.message)
    if markers.flags:
        remedy = "genforce calibrate sensor; see docs/adding_a_sensor.md"
        return Finding("camera", "problem", f"{found}, {explain(markers.flags)}", remedy)
    return _by_rate("camera", found, rate_hz >= ON_TIME * cell.camera.fps)


def _uskin(cell: CellConfig, sensor: SensorConfig, timeout_s: float) -> Finding:
    from genforce_collect.devices.uskin import Uskin

    device = Uskin(cell.uskin, sensor.taxels, lambda sample: None)
    device.start(timeout_s)
    try:
        time.sleep(WATCH_S)
        health = device.health()
    finally:
        device.stop()
    if not health.usable:
        raise DeviceError(health.message)
    found = f"{cell.uskin.url}: {health.rate_hz:.0f} Hz, {health.fresh_hz:.0f} of them new"
    return Finding("uSkin", "ok", found)


def _table(findings: list[Finding]) -> Table:
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    table = Table("", "", "found", "remedy", show_edge=False)
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.subject, state, finding.found, finding.remedy)
    return table
