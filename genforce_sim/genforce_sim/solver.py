"""A simulated sensor in two processes of its own: one solves the contact, the other reads it.

Both keep Python's global lock for milliseconds, and the device servers have to be on time every
millisecond: so they do not share an interpreter. And a frame takes longer than a contact: so it is
painted while the next contact is solved.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import struct
from multiprocessing.connection import Connection

import cv2
import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import SensorConfig
from genforce_collect.errors import DeviceError
from genforce_sim.sensor import ContactState, SimulatedSensor

JPEG_QUALITY = 90
PIPE_BYTES = 2**20  # some states, so that solving goes on while a frame takes long
_REQUEST = struct.Struct("<7d?")  # tip pose, dt, whether a reading is wanted
_WRENCH = struct.Struct("<6d")

Array = NDArray[np.float64]


class SolverProcess:
    """`SimulatedSensor(sensor, indenter, seed)` from `start` to `stop`.

    `solve` and `reading` may be called from one thread each.
    """

    def __init__(self, sensor: SensorConfig, indenter: str, seed: int) -> None:
        """Raises `ConfigError` on a bad indenter, here and not in the child."""
        SimulatedSensor(sensor, indenter, seed=seed)
        context = multiprocessing.get_context("spawn")
        self._near, far = context.Pipe()
        self._readings, read = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_serve, args=(far, read, sensor, indenter, seed), name="solver", daemon=True
        )

    def start(self) -> None:
        """Start the child."""
        self._process.start()

    def stop(self) -> None:
        """End the child."""
        self._near.close()
        self._process.join()

    def solve(self, tip_pose: Array, dt: float, wanted: bool) -> Array:
        """Move the tip to `tip_pose` (6,) m, rad in the sensor frame within `dt` s of gel time.

        Returns the wrench (6,) N, N·m; where a reading of this state is `wanted`, `reading` gives
        it later. Raises `DeviceError` where the child is gone.
        """
        try:
            self._near.send_bytes(_REQUEST.pack(*tip_pose, dt, wanted))
            return np.array(_WRENCH.unpack(self._near.recv_bytes()))
        except (OSError, EOFError) as error:
            raise DeviceError("the solver of the virtual cell ended") from error

    def reading(self) -> bytes:
        """Wait for the next reading that was wanted: a JPEG, or a taxel array's int32 counts.

        Raises `DeviceError` where the child is gone.
        """
        try:
            return self._readings.recv_bytes()
        except (OSError, EOFError) as error:
            raise DeviceError("the painter of the virtual cell ended") from error


def _serve(
    requests: Connection, readings: Connection, sensor: SensorConfig, indenter: str, seed: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    cv2.setNumThreads(1)
    simulated = SimulatedSensor(sensor, indenter, seed=seed)
    states, to_painter = multiprocessing.Pipe(duplex=False)
    fcntl.fcntl(to_painter.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    if os.fork() == 0:  # a copy of the sensor, at no cost
        requests.close()  # each process is to notice when the one before it ends
        to_painter.close()
        try:
            _paint(states, readings, simulated)
        finally:
            os._exit(0)
    readings.close()
    states.close()
    while True:
        try:
            *tip_pose, dt, wanted = _REQUEST.unpack(requests.recv_bytes())
            state = simulated.step(np.array(tip_pose), dt)
            requests.send_bytes(_WRENCH.pack(*state.wrench))
            if wanted:
                to_painter.send(state)
        except (EOFError, OSError):
            return


def _paint(states: Connection, readings: Connection, simulated: SimulatedSensor) -> None:
    while True:
        try:
            readings.send_bytes(_read(simulated, states.recv()))
        except (EOFError, OSError):
            return


def _read(simulated: SimulatedSensor, state: ContactState) -> bytes:
    if simulated.sensor.kind == "taxels":
        return simulated.taxels(state).astype("<i4").tobytes()
    image = simulated.render(state).image
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return encoded.tobytes()
