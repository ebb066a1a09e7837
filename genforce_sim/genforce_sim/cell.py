"""The virtual cell: a robot controller, a force sensor and a tactile sensor around one elastomer.

Example: virtual_cell --cell virtual --sensor array_1 --indenter sphere
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import numpy as np

from genforce_collect.config import (
    CellConfig,
    SensorConfig,
    SimulationConfig,
    load_cell,
    load_sensor,
)
from genforce_collect.errors import ConfigError, DeviceError, GenforceError
from genforce_collect.geometry import compose, tip_pose
from genforce_collect.processes import call_at_end
from genforce_sim.devices.mjpeg_camera import MjpegCamera
from genforce_sim.devices.netft_box import NetftBox
from genforce_sim.devices.ur_controller import UrController
from genforce_sim.devices.uskin import UskinServer
from genforce_sim.solver import SolverProcess
from genforce_sim.world import World

FAILURE_POLL_S = 0.5
PARKED_HEIGHT_M = 0.02  # of the tip above the gel when the cell starts


class VirtualCell:
    """Every server of the cell, from `start` to `stop`; a context manager.

    The parts are open to tests, which provoke faults on them: `controller`, `netft`, `tactile`.
    """

    def __init__(
        self,
        cell: CellConfig,
        sensor: SensorConfig,
        indenter: str,
        seed: int | None = None,
        keep_truth: bool = False,
    ) -> None:
        """Without a `seed`, that of the cell file. Raises `ConfigError` where the cell file
        describes no virtual cell."""
        simulation = _simulation(cell)
        self._seed = simulation.seed if seed is None else seed
        self.controller = UrController(
            cell.robot.host,
            initial_pose=compose(cell.sensor_pose, tip_pose(0.0, 0.0, PARKED_HEIGHT_M)),
            time_scale=simulation.time_scale,
            tool=cell.robot.tcp,
        )
        self.world = World(
            SolverProcess(sensor, indenter, self._seed),
            cell.sensor_pose,
            self.controller.foresee,
            cell.camera.fps,
            simulation.time_scale,
            sensor.taxels.rows * sensor.taxels.columns,
            keep_truth,
        )
        self._has_taxels = sensor.kind == "taxels"
        self._cell = cell
        self._camera_port = simulation.camera_port

    def start(self) -> None:
        """Open every port and begin to move time. Raises `DeviceError` where a port is in use."""
        netft = self._cell.netft
        with ExitStack() as undo:
            self.controller.start()
            undo.callback(self.controller.stop)
            self.netft = NetftBox(
                netft.host,
                netft.rdt_port,
                netft.http_port,
                self.world.wrench,
                rate_hz=netft.rate_hz,
                seed=self._seed,
            )
            undo.callback(self.netft.close)
            self.tactile = self._serve_tactile()
            undo.pop_all()
        self.world.start()

    def _serve_tactile(self) -> MjpegCamera | UskinServer:
        if not self._has_taxels:
            return MjpegCamera(
                self._cell.netft.host, self._camera_port, self.world, self._cell.camera.fps
            )
        address = urlsplit(self._cell.uskin.url)
        if address.hostname is None or address.port is None:
            raise ConfigError(f"cell '{self._cell.name}': uskin.url must be ws://host:port")
        return UskinServer(
            address.hostname, address.port, self.world.taxels, self._cell.uskin.rate_hz
        )

    def stop(self) -> None:
        """Close every port."""
        self.tactile.close()
        self.netft.close()
        self.world.stop()
        self.controller.stop()

    def __enter__(self) -> VirtualCell:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()


def _simulation(cell: CellConfig) -> SimulationConfig:
    if cell.simulation is None:
        raise ConfigError(
            f"cell '{cell.name}' is not a virtual one: it has no 'simulation' section"
        )
    return cell.simulation


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cell until SIGINT or SIGTERM; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", default="virtual", help="cell, by name or path")
    parser.add_argument("--sensor", default="array_1", help="sensor, by name or path")
    parser.add_argument("--indenter", default="sphere", help="indenter, by name or mesh path")
    parser.add_argument(
        "--seed", type=int, help="instance of the sensor, and its noise; default: the cell's"
    )
    parser.add_argument(
        "--truth", type=Path, help="write what was simulated here at the end (.npz)"
    )
    words = sys.argv[1:] if argv is None else list(argv)
    # `ros2 launch` appends its own arguments.
    args = parser.parse_args(words[: words.index("--ros-args")] if "--ros-args" in words else words)
    stop = threading.Event()
    call_at_end(stop.set)
    try:
        cell = load_cell(args.cell)
        sensor = load_sensor(args.sensor)
        virtual = VirtualCell(cell, sensor, args.indenter, args.seed, args.truth is not None)
        source = cell.uskin.url if sensor.kind == "taxels" else cell.camera.source
        with virtual:
            print(
                f"virtual cell '{cell.name}': robot {cell.robot.host}, force sensor "
                f"{cell.netft.host}:{cell.netft.rdt_port}, sensor {source}",
                flush=True,
            )
            while not stop.wait(FAILURE_POLL_S):
                if virtual.world.failed:
                    raise DeviceError(virtual.world.failed)
    except GenforceError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if args.truth is not None:
        truth = virtual.world.truth()
        np.savez_compressed(
            args.truth,
            time_ns=truth["time_ns"],
            tip_pose=truth["tip_pose"],
            wrench=truth["wrench"],
            frame=truth["frame"],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
