"""Look at a running cell, or at a recorded bag, in the browser.

Examples:
  genforce view --sensor array_1          # beside a graph that runs
  genforce view runs/demo/live_bag        # scrub through what was recorded
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genforce_collect.bags import BagReader
from genforce_collect.config import SensorConfig, load_sensor
from genforce_collect.errors import ConfigError, DataError
from genforce_collect.processes import call_at_end

if TYPE_CHECKING:
    from genforce_collect.view.scene import Scene
    from genforce_collect.view.server import ViewServer

DEFAULT_PORT = 9090
DEFAULT_IMAGE_RATE_HZ = 10.0
FLUSH_EVERY_NS = 100_000_000  # of a bag's time, as of a running cell's


@dataclass(frozen=True)
class View:
    """A scene and the server that shows it."""

    scene: Scene
    server: ViewServer
    recording: Any

    @property
    def address(self) -> str:
        """Of the page."""
        return self.server.address

    def close(self) -> None:
        """Send what is left, and end the server."""
        self.scene.flush()
        self.recording.disconnect()
        self.server.stop()


def open_view(
    sensor: SensorConfig,
    port: int,
    deserialize: Callable[[bytes, str], Any],
    image_rate_hz: float = DEFAULT_IMAGE_RATE_HZ,
) -> View:
    """Start the server of the viewer and a scene in it. Raises `ConfigError` where Rerun is not
    installed or a port is taken."""
    try:
        import rerun as rr
    except ImportError as error:
        raise ConfigError(
            "the live view needs Rerun (Python 3.11 or newer): pip install -r requirements/view.txt"
        ) from error
    from genforce_collect.view.layout import layout
    from genforce_collect.view.scene import Scene
    from genforce_collect.view.server import ViewServer

    server = ViewServer(port)
    recording = rr.RecordingStream("genforce")
    recording.connect_grpc(server.data_address, default_blueprint=layout(sensor))
    return View(Scene(recording, sensor, deserialize, image_rate_hz), server, recording)


def show_bag(path: Path, sensor_name: str | None, port: int) -> View:
    """A view of a whole bag. Raises `DataError`, `ConfigError`."""
    with BagReader(path) as bag:
        name = sensor_name or bag.metadata.get("sensor")
        if not name:
            raise DataError(f"{path}: the bag does not say its sensor; give --sensor")
        view = open_view(load_sensor(str(name)), port, bag.deserialize)
        sent_ns = 0
        for record in bag.raw(set(view.scene.topics) & set(bag.topics)):
            view.scene.add(record.topic, record.data)
            if record.log_ns - sent_ns > FLUSH_EVERY_NS:
                sent_ns = record.log_ns
                view.scene.flush()
        view.scene.flush()
    return view


# --- command line -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("bag", nargs="?", type=Path, help="recorded bag; default: what runs now")
    parser.add_argument("--sensor", help="sensor, by name or path (default array_1, or the bag's)")
    parser.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        help="of the page, on loopback; the one above it carries the data",
    )


def run(args: argparse.Namespace) -> int:
    """Serve the view until Ctrl-C."""
    if args.bag:
        view = show_bag(args.bag, args.sensor, args.port)
        print(f"{args.bag}: {view.address}\nCtrl-C ends", flush=True)
        ended = threading.Event()
        call_at_end(ended.set)
        ended.wait()
        view.close()
        return 0
    from genforce_collect.nodes.common import parameter_words
    from genforce_collect.nodes.viewer import main

    parameters = {"sensor": args.sensor or "array_1", "port": args.port}
    sys.argv = ["viewer", "--ros-args", *parameter_words(parameters)]
    return main()
