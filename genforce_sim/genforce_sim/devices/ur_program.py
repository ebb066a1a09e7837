"""The control script that ur_rtde uploads, as the controller would run it.

The script is a loop over the commands that the client writes into input registers; this is the
same loop in Python, one `yield` for each `sync()`. Commands (register int 0) and their arguments
are those of the script of ur_rtde 1.6.5; those not listed here end the program, as a runtime
error ends a script, so that no client takes silence for success.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from genforce_collect.config import Pose
from genforce_collect.geometry import compose, invert
from genforce_sim.devices.ur_motion import Arm, Line, Servo, Speed, Stop

Steps = Generator[None, None, None]

READY, DONE = 1, 2  # output int register 0
MAX_REACH_M = 0.95  # of the flange from the base
STEADY_S = 0.5  # at rest for this long is steady
SERVO_LOOKAHEAD_S = (0.03, 0.2)  # what servoj accepts

_NO_COMMAND = 0
_MOVE_J, _MOVE_J_IK, _MOVE_L, _MOVE_L_FK = 1, 2, 3, 4
_ZERO_FT_SENSOR = 8
_SPEED_L, _SPEED_STOP = 10, 15
_SERVO_STOP, _SERVO_L = 16, 24
_SET_PAYLOAD, _SET_TCP, _GET_TCP_OFFSET = 17, 29, 40
_GET_TARGET_WAYPOINT = 28
_PROTECTIVE_STOP = 31
_STOP_L, _STOP_J = 33, 34
_SET_WATCHDOG = 35
_IS_POSE_SAFE = 36
_POSE_TRANS = 39
_MOVE_PATH = 45
_IS_STEADY = 47
_STOP_SCRIPT = 255
# The script answers READY at once to these, and runs them again in each cycle.
_REALTIME = {_SPEED_L, _SERVO_L}

_NUMBER = r"\s*([-+.\deE]+)\s*"
_WAYPOINT = re.compile(
    r"^\s*movel\(p\[" + ",".join([_NUMBER] * 6) + rf"\],a={_NUMBER},v={_NUMBER},r={_NUMBER}\)",
    re.MULTILINE,
)


class ScriptError(Exception):
    """What would end the script on a real controller."""


@dataclass
class Registers:
    """General purpose registers, as the script sees them."""

    input_int: list[int]
    input_double: list[float]
    output_int: list[int]
    output_double: list[float]

    @classmethod
    def cleared(cls, count: int) -> Registers:
        """`count` of each kind, all zero."""
        return cls([0] * count, [0.0] * count, [0] * count, [0.0] * count)


@dataclass
class Tool:
    """What the script can set about the tool."""

    tcp: Pose
    payload: float = 0.0  # kg
    payload_cog: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Program:
    """One uploaded script, run by calling `step` once a controller cycle."""

    def __init__(self, text: str, arm: Arm, tool: Tool, registers: Registers) -> None:
        self.watchdog_hz: float | None = None
        self.wants_protective_stop = False
        self.finished = False
        self._arm = arm
        self._tool = tool
        self._registers = registers
        self._path = [tuple(map(float, found)) for found in _WAYPOINT.findall(text)]
        self._main = self._run()
        self._thread: Steps | None = None  # the script's move_thrd or stop_thrd
        self._stopping = False  # it is stop_thrd
        self._continuous: str | None = None  # its speed_thrd or servo_thrd
        self._writes = 0
        self._operations = 0

    def step(self) -> None:
        """Run to the next `sync()`. Raises ScriptError; `finished` tells a regular end."""
        for steps in (self._thread, self._main):
            if steps is None:
                continue
            try:
                next(steps)
            except StopIteration:
                if steps is self._main:
                    self.finished = True
                elif steps is self._thread:
                    self._thread = None
                    self._stopping = False

    # --- the script's main loop ---

    def _run(self) -> Steps:
        self._signal_progress(None)
        executing = False
        while True:
            command = self._registers.input_int[0]
            if command in _REALTIME:
                self._execute_realtime(command)
                self._registers.output_int[0] = READY
            elif command == _NO_COMMAND:
                executing = False
                self._registers.output_int[0] = READY
            elif not executing:
                if command == _STOP_SCRIPT:
                    return
                yield from self._execute(command)
                self._registers.output_int[0] = DONE
                executing = True
            yield

    def _execute_realtime(self, command: int) -> None:
        doubles = self._registers.input_double
        if command == _SPEED_L:
            self._take_over("speedl")
            self._arm.start(Speed(_finite(doubles[:6]), _positive(doubles[6], "acceleration")))
        else:
            self._take_over("servoj")
            low, high = SERVO_LOOKAHEAD_S
            lookahead = min(max(doubles[9], low), high)
            self._arm.start(Servo(self._reachable(doubles[:6]), lookahead))

    def _execute(self, command: int) -> Steps:
        registers = self._registers
        doubles = registers.input_double
        asynchronous = registers.input_int[1] == 1
        if command in (_MOVE_L, _MOVE_J_IK):
            waypoint = (*doubles[:6], doubles[7], doubles[6])
            yield from self._move([waypoint], asynchronous)
        elif command == _MOVE_PATH:
            yield from self._move(self._path, asynchronous)
        elif command in (_STOP_L, _STOP_J):
            yield from self._stop(doubles[0], asynchronous)
        elif command in (_SPEED_STOP, _SERVO_STOP):
            self._continuous = None
            self._arm.start(Stop(_positive(doubles[0], "deceleration")))
            yield from self._until_idle()
        elif command == _SET_PAYLOAD:
            self._tool.payload = doubles[0]
            self._tool.payload_cog = (doubles[1], doubles[2], doubles[3])
        elif command == _SET_TCP:
            self._set_tcp(_finite(doubles[:6]))
        elif command == _GET_TCP_OFFSET:
            registers.output_double[:6] = self._tool.tcp
        elif command == _GET_TARGET_WAYPOINT:
            registers.output_double[:6] = self._arm.target
        elif command == _POSE_TRANS:
            registers.output_double[:6] = compose(_finite(doubles[:6]), _finite(doubles[6:12]))
        elif command == _IS_POSE_SAFE:
            registers.output_int[1] = int(math.hypot(*doubles[:3]) <= MAX_REACH_M)
        elif command == _IS_STEADY:
            registers.output_int[1] = int(self._arm.rest_time >= STEADY_S)
        elif command == _SET_WATCHDOG:
            self.watchdog_hz = _positive(doubles[0], "watchdog frequency")
        elif command == _PROTECTIVE_STOP:
            self.wants_protective_stop = True
        elif command != _ZERO_FT_SENSOR:
            raise ScriptError(f"command {command} is not part of the virtual controller")

    # --- motion ---

    def _move(self, waypoints: Sequence[tuple[float, ...]], asynchronous: bool) -> Steps:
        """Straight moves through (pose, acceleration, speed, ...); the arm rests at each."""
        lines = [
            Line(
                self._reachable(waypoint[:6]),
                speed=_positive(waypoint[7], "speed"),
                acceleration=_positive(waypoint[6], "acceleration"),
            )
            for waypoint in waypoints
        ]
        if not self._stopping:
            self._kill_thread()
        self._take_over("movel")
        if asynchronous:
            self._thread = self._begun(self._move_thread(lines))
            return
        for line in lines:
            self._arm.start(line)
            yield from self._until_idle()

    def _move_thread(self, lines: Sequence[Line]) -> Steps:
        for index, line in enumerate(lines):
            self._signal_progress(index, new=index == 0)
            self._arm.start(line)
            yield from self._until_idle()
        self._signal_progress(None)

    def _stop(self, deceleration: float, asynchronous: bool) -> Steps:
        stop = Stop(_positive(deceleration, "deceleration"))
        self._kill_thread()
        self._take_over("stopl")
        if asynchronous:
            self._thread = self._begun(self._stop_thread(stop))
            self._stopping = True
            return
        self._arm.start(stop)
        yield from self._until_idle()

    def _stop_thread(self, stop: Stop) -> Steps:
        self._signal_progress(0, new=True)
        self._arm.start(stop)
        yield from self._until_idle()
        self._signal_progress(None)

    @staticmethod
    def _begun(steps: Steps) -> Steps:
        """The progress of a thread must be there before the command is answered."""
        next(steps)
        return steps

    def _kill_thread(self) -> None:
        if self._thread is not None:
            self._thread = None
            self._stopping = False
            self._signal_progress(None)

    def _take_over(self, motion: str) -> None:
        """Two threads that move the arm end a script; only the same continuous motion goes on."""
        if self._thread is not None or self._continuous not in (None, motion):
            raise ScriptError(f"{motion}: another thread is already controlling the robot")
        if motion in ("speedl", "servoj"):
            self._continuous = motion

    def _until_idle(self) -> Steps:
        yield
        while not self._arm.idle:
            yield

    def _set_tcp(self, tcp: Pose) -> None:
        """The flange stays where it is, so the TCP is elsewhere now."""
        self._arm.pose = self._arm.target = other_tool_point(self._arm.pose, self._tool.tcp, tcp)
        self._tool.tcp = tcp

    def _reachable(self, values: Sequence[float]) -> Pose:
        pose = _finite(values)
        if math.hypot(*pose[:3]) > MAX_REACH_M:
            raise ScriptError("no inverse kinematics solution found")
        return pose

    def _signal_progress(self, progress: int | None, new: bool = False) -> None:
        """The asynchronous operation's word: bit 15 running, 14-0 progress, 22-16 write count,
        30-24 operation number; `progress` None says finished."""
        self._writes = (self._writes + 1) % 128
        if new:
            self._operations = (self._operations + 1) % 128
        word = self._operations << 24 | self._writes << 16
        if progress is not None:
            word |= 1 << 15 | min(progress, 32767)
        self._registers.output_int[2] = word


def other_tool_point(pose: Pose, tcp: Pose, other: Pose) -> Pose:
    """Where the tool point `other` is while the tool point `tcp` is at `pose`; both are poses in
    the flange frame."""
    if tcp == other:
        return pose
    return compose(compose(pose, invert(tcp)), other)


def _finite(values: Sequence[float]) -> Pose:
    if not all(map(math.isfinite, values)):
        raise ScriptError(f"not a number among {list(values)}")
    a, b, c, d, e, f = values
    return (a, b, c, d, e, f)


def _positive(value: float, what: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ScriptError(f"{what} must be above 0, got {value}")
    return value
