"""One elastomer, one clock: from the arm's pose to the wrench and the frame of the same instant.

A contact takes milliseconds to solve, while wrench and frame must be those of *now*. The arm's
controller knows where it will be, so each instant is solved `HORIZON_S` ahead: when its time
comes, its wrench and its frame are ready, and both belong to the same state of the gel. Only a
command that arrives within the horizon makes pose and gel differ, for that long. On a busy host a
frame may be painted late, as cameras deliver theirs; its time of capture stays true.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import Pose
from genforce_collect.errors import DeviceError
from genforce_collect.geometry import compose, invert
from genforce_sim.solver import SolverProcess

HORIZON_S = 0.05  # solving and painting the worst contact must fit in
MAX_UNREAD = 8  # frames being painted; a busy host may make them late, but no later
MIN_SOLVE_RATE_HZ = 60.0
WRENCH_HISTORY = 64

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Shot:
    """A camera frame."""

    capture_ns: int  # host system time
    jpeg: bytes


class World:
    """Solves the contact ahead of time, in a thread of its own between `start` and `stop`.

    Its sensor is read either by `next_shot`, a camera, or by `taxels`, an array of that many.
    `keep_truth` keeps all that is solved, which takes memory as long as it runs.

    `foresee(horizon_s)` gives the tip pose (6,) in the base frame at that time from now if no
    command comes; `sensor_pose` places the sensor frame in the base frame.
    """

    def __init__(
        self,
        solver: SolverProcess,
        sensor_pose: Pose,
        foresee: Callable[[float], Array],
        fps: float,
        time_scale: float = 1.0,
        taxels: int = 0,
        keep_truth: bool = False,
    ) -> None:
        self.fps = fps
        self.late = 0  # solutions that were not ready at their time
        self.failed = ""  # why time stands still
        self._solver = solver
        self._base_to_sensor = invert(sensor_pose)
        self._foresee = foresee
        self._time_scale = time_scale
        self._solves_per_frame = max(1, math.ceil(MIN_SOLVE_RATE_HZ / fps))
        self._period_s = 1.0 / (fps * self._solves_per_frame)
        self._wrenches: deque[tuple[float, Array]] = deque(
            [(-math.inf, np.zeros(6))], maxlen=WRENCH_HISTORY
        )
        self._unread: deque[float] = deque()  # when the readings that were asked for are due
        self._shots: queue.Queue[tuple[float, bytes]] = queue.Queue(maxsize=MAX_UNREAD)
        self._counts: NDArray[np.int32] = np.zeros((taxels, 3), np.int32)
        self._keep_truth = keep_truth
        self._truth: list[tuple[float, Array, Array, bool]] = []
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=work.__name__, daemon=True)
            for work in (self._keep_ahead, self._take_readings)
        ]

    def start(self) -> None:
        """Begin to solve."""
        self._solver.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads."""
        self._stopping.set()
        self._threads[0].join()
        self._solver.stop()
        self._threads[1].join()

    def wrench(self, time_s: float | None = None) -> Array:
        """Wrench (6,) N, N·m on the gel, in the sensor frame, now or at a monotonic host time (s)
        of the last second."""
        time_s = time.monotonic() if time_s is None else time_s
        later = None
        for at, wrench in reversed(tuple(self._wrenches)):  # a copy: the world goes on
            if at <= time_s:
                if later is None or math.isinf(at):
                    return wrench
                share = (time_s - at) / (later[0] - at)
                return (1 - share) * wrench + share * later[1]
            later = (at, wrench)
        return self._wrenches[0][1]

    def next_shot(self, timeout_s: float = 1.0) -> Shot | None:
        """Wait for the next frame's time of capture; None where none comes within the timeout."""
        try:
            due, jpeg = self._shots.get(timeout=timeout_s)
        except queue.Empty:
            return None
        wait = due - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        return Shot(_system_ns(due), jpeg)

    def taxels(self) -> NDArray[np.int32]:
        """Newest counts (taxels, 3) of a taxel array whose time has come."""
        while not self._shots.empty() and self._shots.queue[0][0] <= time.monotonic():
            self._counts = np.frombuffer(self._shots.get_nowait()[1], "<i4").reshape(-1, 3)
        return self._counts

    def truth(self) -> dict[str, Array]:
        """What was solved, if kept: time_ns (N,) host system time, tip_pose (N, 6) sensor frame,
        wrench (N, 6) N, N·m, frame (N,) bool: whether the camera looked."""
        rows = list(self._truth)
        return {
            "time_ns": np.array([_system_ns(row[0]) for row in rows], dtype=np.int64),
            "tip_pose": np.array([row[1] for row in rows]).reshape(-1, 6),
            "wrench": np.array([row[2] for row in rows]).reshape(-1, 6),
            "frame": np.array([row[3] for row in rows], dtype=bool),
        }

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except DeviceError as error:
            if not self._stopping.is_set():
                self.failed = str(error)

    def _keep_ahead(self) -> None:
        start = time.monotonic() + HORIZON_S
        tick, solved = 0, -1
        while not self._stopping.is_set():
            due = start + tick * self._period_s
            ahead = due - time.monotonic()
            if ahead > HORIZON_S:
                time.sleep(ahead - HORIZON_S)
                ahead = due - time.monotonic()
            if ahead < 0:  # too late for this instant: leave it out
                self.late += 1
                tick += max(1, math.ceil(-ahead / self._period_s))
                continue
            self._solve(due, ahead, (tick - solved) * self._period_s, tick)
            tick, solved = tick + 1, tick

    def _solve(self, due: float, ahead: float, elapsed_s: float, tick: int) -> None:
        tip = np.array(compose(self._base_to_sensor, self._foresee(ahead).tolist()))
        wanted = tick % self._solves_per_frame == 0 and len(self._unread) < MAX_UNREAD
        if wanted:
            self._unread.append(due)
        wrench = self._solver.solve(tip, elapsed_s * self._time_scale, wanted)
        self._wrenches.append((due, wrench))
        if self._keep_truth:
            self._truth.append((due, tip, wrench, wanted))

    def _take_readings(self) -> None:
        while True:
            reading = self._solver.reading()
            shot = (self._unread.popleft(), reading)
            try:
                self._shots.put_nowait(shot)
            except queue.Full:  # nobody looks: keep the newest
                self._shots.get_nowait()
                self._shots.put_nowait(shot)


def _system_ns(monotonic_s: float) -> int:
    return time.time_ns() + round((monotonic_s - time.monotonic()) * 1e9)
