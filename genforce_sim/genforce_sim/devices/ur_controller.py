"""A virtual UR5e controller that the unmodified ur_rtde client talks to.

It serves RTDE (30004), the script interface (30003) and the dashboard (29999) on one loopback
address, runs the control script that ur_rtde uploads (`ur_program`) and moves a tool pose
(`ur_motion`) at 500 Hz. What it does not have is joints: joint positions stay at a fixed home
pose, and joint moves end the program with an error.
"""

from __future__ import annotations

import copy
import errno
import re
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from genforce_collect.config import Pose
from genforce_collect.devices import rtde
from genforce_collect.errors import DeviceError
from genforce_collect.geometry import IDENTITY, interpolate
from genforce_sim.devices.ur_motion import PROTECTIVE_DECELERATION, Arm, Stop
from genforce_sim.devices.ur_program import (
    Program,
    Registers,
    ScriptError,
    Tool,
    other_tool_point,
)
from genforce_sim.devices.ur_variables import INPUT_TYPES, OUTPUT_TYPES, REGISTERS

SCRIPT_PORT, DASHBOARD_PORT = 30003, 29999
CYCLE_S = 0.002
FREQUENCY_HZ = round(1 / CYCLE_S)
VERSION = (5, 13, 1, 0)  # major, minor, bugfix, build
HISTORY_S = 10.0
MAX_LATE_S = 5.0  # a host that stood still longer is not caught up with
FORESEEN_STEP_S = 0.01
MAX_BACKLOG = 1 << 16  # bytes a client may leave unread before it misses data packages
HOME_JOINTS = (0.0, -1.5708, 1.5708, -1.5708, -1.5708, 0.0)

STOPPED, PLAYING, PAUSED = 1, 2, 4  # runtime_state
NORMAL, PROTECTIVE_STOP, ROBOT_EMERGENCY_STOP = 1, 3, 7  # safety_mode
POWER_OFF, RUNNING = 3, 7  # robot_mode
_SAFETY_BITS = {
    NORMAL: 1 << 0,
    PROTECTIVE_STOP: 1 << 2 | 1 << 10,
    ROBOT_EMERGENCY_STOP: 1 << 6 | 1 << 7 | 1 << 10,
}
_SAFETY_NAMES = {
    NORMAL: "NORMAL",
    PROTECTIVE_STOP: "PROTECTIVE_STOP",
    ROBOT_EMERGENCY_STOP: "ROBOT_EMERGENCY_STOP",
}
_STATE_NAMES = {STOPPED: "STOPPED", PLAYING: "PLAYING", PAUSED: "PAUSED"}
_INPUT_REGISTER = re.compile(r"input_(int|double)_register_(\d+)$")


class UrController:
    """A UR5e on a loopback address; a context manager, or `start` and `stop`.

    `on_cycle(pose, dt)` is called at 500 Hz from the controller's thread with the pose (6,) of the
    mounted tool's tip in the base frame (m, rotation vector rad) and the robot time since the last
    call (s). `initial_pose` is that tip's pose at the start; `tool` is where the tip sits on the
    flange, and the active TCP until a client sets another. With `time_scale` the robot lives that
    much faster than the host: motions take less host time, while the streams, their timestamps,
    the speeds in them and the watchdog keep host time. `unlock_delay_s` is how long a protective
    stop cannot be unlocked.
    """

    def __init__(
        self,
        host: str,
        on_cycle: Callable[[NDArray[np.float64], float], None] | None = None,
        initial_pose: Sequence[float] = (0.4, -0.1, 0.3, 3.141592653589793, 0.0, 0.0),
        time_scale: float = 1.0,
        tool: Sequence[float] = IDENTITY,
        unlock_delay_s: float = 5.0,
        remote_control: bool = True,
    ) -> None:
        self.host = host
        self.remote_control = remote_control
        self._speed_slider = 1.0
        self._log: deque[str] = deque(maxlen=1000)
        self._on_cycle = on_cycle
        self._time_scale = time_scale
        self._unlock_delay_s = unlock_delay_s
        self._mounted_tool = _pose(tool)
        self._tool = Tool(tcp=self._mounted_tool)
        self._arm = Arm(_pose(initial_pose))
        self._registers = Registers.cleared(REGISTERS)
        self._program: Program | None = None
        self._runtime_state = STOPPED
        self._safety_mode = NORMAL
        self._robot_mode = RUNNING
        self._stopped_at = 0.0
        self._last_input = 0.0
        self._silent_until = 0.0
        self._down_until = 0.0
        self._history: deque[tuple[int, Pose]] = deque(maxlen=round(HISTORY_S / CYCLE_S))
        self._values = _constant_values()
        self._selector: selectors.BaseSelector | None = None
        self._clients: set[_Client] = set()
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    # --- life ---

    def start(self) -> None:
        """Open the ports and run. Raises DeviceError where a port is taken."""
        self._selector = selectors.DefaultSelector()
        try:
            for port, make in (
                (rtde.PORT, _RtdeClient),
                (SCRIPT_PORT, _ScriptClient),
                (DASHBOARD_PORT, _DashboardClient),
            ):
                listener = _listen(self.host, port)
                self._selector.register(listener, selectors.EVENT_READ, make)
        except DeviceError:
            self._close()
            raise
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="ur-controller", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close every connection and port."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._close()

    def __enter__(self) -> UrController:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _close(self) -> None:
        if self._selector is None:
            return
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._selector = None
        self._clients.clear()

    # --- reading from the same process ---

    def get_pose(self, time_ns: int | None = None) -> NDArray[np.float64]:
        """Pose (6,) of the mounted tool's tip in the base frame, now or at a host system time of
        the last 10 s, interpolated. Raises ValueError for a time outside that."""
        with self._lock:
            if time_ns is None:
                return np.array(self._tip())
            history = list(self._history)
        for (t0, before), (t1, after) in pairwise(history):
            if t0 <= time_ns <= t1:
                return np.array(interpolate(before, after, (time_ns - t0) / (t1 - t0)))
        raise ValueError(f"no pose is kept for host time {time_ns} ns")

    def foresee(self, horizon_s: float) -> NDArray[np.float64]:
        """Pose of the mounted tool's tip in the base frame after `horizon_s` of host time, if no
        command arrives until then."""
        with self._lock:
            arm = copy.deepcopy(self._arm)
            tcp = self._tool.tcp
        steps = max(1, round(horizon_s / FORESEEN_STEP_S))
        for _ in range(steps):
            arm.step(horizon_s / steps * self._pace)
        return np.array(other_tool_point(arm.pose, tcp, self._mounted_tool))

    @property
    def _pace(self) -> float:
        """Time of the arm's motions per host time."""
        return self._time_scale * self._speed_slider

    def is_moving(self) -> bool:
        """The arm is not at rest."""
        return self._arm.rest_time == 0

    def is_program_running(self) -> bool:
        """A control script is playing."""
        return self._runtime_state == PLAYING

    def get_log(self) -> list[str]:
        """What the teach pendant's log would say, oldest first."""
        return list(self._log)

    def set_speed_slider(self, fraction: float) -> None:
        """The teach pendant's slider, 0 to 1: every motion is that much slower."""
        self._speed_slider = fraction

    # --- faults ---

    def drop_link(self, duration_s: float = 0.0) -> None:
        """Cut every connection, and new ones for `duration_s`; the robot goes on."""
        with self._lock:
            self._down_until = time.monotonic() + duration_s
            for client in list(self._clients):
                self._drop(client)

    def freeze(self, duration_s: float) -> None:
        """Neither hear nor answer for `duration_s`, with every connection left open."""
        with self._lock:
            self._silent_until = time.monotonic() + duration_s

    def protective_stop(self) -> None:
        """Stop as on a collision: the program pauses until unlocked and played again."""
        with self._lock:
            if self._safety_mode == NORMAL:
                self._safety_mode = PROTECTIVE_STOP
                self._stopped_at = time.monotonic()
                self._log.append("protective stop")
                self._pause()

    def emergency_stop(self) -> None:
        """Push the robot's emergency stop button: power off, program ended."""
        with self._lock:
            self._safety_mode = ROBOT_EMERGENCY_STOP
            self._robot_mode = POWER_OFF
            self._end_program("emergency stop")

    def release_emergency_stop(self) -> None:
        """What the operator does after one: release, power on, release the brakes."""
        with self._lock:
            self._safety_mode = NORMAL
            self._robot_mode = RUNNING

    def kill_script(self) -> None:
        """End the control script, as a runtime error in it would."""
        with self._lock:
            self._end_program("killed")

    # --- the cycle ---

    def _run(self) -> None:
        """Cycle after cycle on an absolute schedule; those a busy host held up are made up for."""
        start = time.monotonic()
        self._last_input = start
        cycle = 0
        while not self._stopping.is_set():
            early_s = start + cycle * CYCLE_S - time.monotonic()
            if early_s > 0:
                time.sleep(early_s)
            elif early_s < -MAX_LATE_S:
                skipped = int(-early_s / CYCLE_S)
                self._log.append(f"the host stood still: {skipped} cycles left out")
                cycle += skipped
            with self._lock:
                late_s = time.monotonic() - (start + cycle * CYCLE_S)
                self._cycle(cycle, time.time_ns() - round(late_s * 1e9))
            cycle += 1

    def _cycle(self, cycle: int, stamp_ns: int) -> None:
        now = time.monotonic()
        if now >= self._silent_until:
            self._serve()
        self._check_watchdog(now)
        if self._program is not None and self._runtime_state == PLAYING:
            self._step_program(self._program)
        self._arm.step(CYCLE_S * self._pace)
        tip = self._tip()
        self._history.append((stamp_ns, tip))
        if self._on_cycle is not None:
            self._on_cycle(np.array(tip), CYCLE_S * self._time_scale)
        if now >= self._silent_until:
            self._stream(cycle)

    def _check_watchdog(self, now: float) -> None:
        if self._program is None or self._runtime_state != PLAYING:
            return
        minimum_hz = self._program.watchdog_hz
        if minimum_hz is not None and now - self._last_input > 1 / minimum_hz:
            self._end_program("watchdog: no input from the client")

    def _step_program(self, program: Program) -> None:
        try:
            program.step()
        except ScriptError as error:
            self._end_program(str(error))
            return
        if program.wants_protective_stop:
            program.wants_protective_stop = False
            self.protective_stop()
        if program.finished:
            self._end_program("ended")

    def _tip(self) -> Pose:
        return other_tool_point(self._arm.pose, self._tool.tcp, self._mounted_tool)

    # --- program ---

    def load_script(self, text: str) -> None:
        """A script arrived on port 30003: it replaces the running program."""
        if self._program is not None:
            self._end_program("replaced by another script")
        if not re.match(r"\s*def rtde_control\(\)", text):
            self._log.append(f"not run, no ur_rtde control script: {text[:60]!r}")
        elif self._robot_mode != RUNNING or self._safety_mode != NORMAL:
            self._log.append("script refused: the robot is not in normal operation")
        else:
            self._program = Program(text, self._arm, self._tool, self._registers)
            self._runtime_state = PLAYING
            self._last_input = time.monotonic()

    def _end_program(self, reason: str) -> None:
        self._log.append(f"program: {reason}")
        self._program = None
        self._runtime_state = STOPPED
        self._registers.output_int[0] = 0
        self._arm.start(Stop(PROTECTIVE_DECELERATION))

    def _pause(self) -> None:
        if self._runtime_state == PLAYING:
            self._runtime_state = PAUSED
        self._arm.suspend()

    def dashboard(self, request: str) -> str:
        """The answer to one line on the dashboard port."""
        command = request.strip().lower()
        if command == "play":
            return self._play()
        if command == "stop":
            self._end_program("stopped from the dashboard")
            return "Stopped"
        if command == "pause":
            self._pause()
            return "Pausing program"
        if command == "unlock protective stop":
            return self._unlock()
        answers = {
            "polyscopeversion": "URSoftware {}.{}.{}.{} (virtual)".format(*VERSION),
            "get serial number": "20235500000",
            "get robot model": "UR5",
            "is in remote control": str(self.remote_control).lower(),
            "robotmode": f"Robotmode: {'RUNNING' if self._robot_mode == RUNNING else 'POWER_OFF'}",
            "safetymode": f"Safetymode: {_SAFETY_NAMES[self._safety_mode]}",
            "safetystatus": f"Safetystatus: {_SAFETY_NAMES[self._safety_mode]}",
            "programstate": f"{_STATE_NAMES[self._runtime_state]} rtde_control",
            "running": f"Program running: {str(self._runtime_state == PLAYING).lower()}",
            "close popup": "closing popup",
            "close safety popup": "closing safety popup",
            "quit": "Disconnected",
        }
        return answers.get(command, f'could not understand: "{request.strip()}"')

    def _play(self) -> str:
        if self._program is None or self._safety_mode != NORMAL:
            return "Failed to execute: play"
        if self._runtime_state == PAUSED:
            self._arm.resume()
            self._last_input = time.monotonic()
        self._runtime_state = PLAYING
        return "Starting program"

    def _unlock(self) -> str:
        if self._safety_mode == PROTECTIVE_STOP:
            if time.monotonic() - self._stopped_at < self._unlock_delay_s:
                return (
                    f"Cannot unlock protective stop until {self._unlock_delay_s:g}s after "
                    "occurrence. Always inspect cause of protective stop before unlocking"
                )
            self._safety_mode = NORMAL
        return "Protective stop releasing"

    # --- RTDE ---

    def claim_inputs(self, client: _RtdeClient, names: Sequence[str]) -> list[str]:
        """Types of input variables, NOT_FOUND, or IN_USE where another connection has them."""
        taken: set[str] = set()
        for other in self._clients:
            if isinstance(other, _RtdeClient) and other is not client:
                taken |= other.inputs
        return [
            rtde.IN_USE if name in taken else INPUT_TYPES.get(name, rtde.NOT_FOUND)
            for name in names
        ]

    def write_inputs(self, names: Sequence[str], values: Sequence[tuple[float, ...]]) -> None:
        """Input variables as a client sent them."""
        for name, value in zip(names, values, strict=True):
            if match := _INPUT_REGISTER.match(name):
                index = int(match[2])
                if match[1] == "double":
                    self._registers.input_double[index] = value[0]
                else:
                    self._registers.input_int[index] = int(value[0])
                    if index == 0:
                        self._last_input = time.monotonic()

    def _stream(self, cycle: int) -> None:
        """Send the state of this cycle to every started RTDE connection whose turn it is."""
        due = [
            client
            for client in self._clients
            if isinstance(client, _RtdeClient) and client.wants(cycle)
        ]
        if not due:
            return
        arm, values, scale = self._arm, self._values, self._pace
        values["timestamp"] = (cycle * CYCLE_S,)
        values["actual_TCP_pose"] = arm.pose
        values["target_TCP_pose"] = arm.pose
        twist = arm.twist if scale == 1 else tuple(scale * value for value in arm.twist)
        values["actual_TCP_speed"] = twist
        values["target_TCP_speed"] = twist
        values["target_speed_fraction"] = (self._speed_slider,)
        values["runtime_state"] = (self._runtime_state,)
        values["robot_mode"] = (self._robot_mode,)
        values["safety_mode"] = (self._safety_mode,)
        values["safety_status"] = (self._safety_mode,)
        values["safety_status_bits"] = (_SAFETY_BITS[self._safety_mode],)
        values["robot_status_bits"] = (
            (self._robot_mode == RUNNING) | (self._runtime_state == PLAYING) << 1,
        )
        values["payload"] = (self._tool.payload,)
        values["payload_cog"] = self._tool.payload_cog
        for kind, registers in (
            ("int", self._registers.output_int),
            ("double", self._registers.output_double),
        ):
            for index in range(6):
                values[f"output_{kind}_register_{index}"] = (registers[index],)
        for client in due:
            client.send_state(values)

    # --- sockets ---

    def _serve(self) -> None:
        assert self._selector is not None
        for key, _ in self._selector.select(0):
            if isinstance(key.data, type):
                self._accept(key.fileobj, key.data)  # type: ignore[arg-type]
                continue
            client: _Client = key.data
            try:
                received = client.socket.recv(1 << 16)
                if received:
                    client.receive(received)
            except BlockingIOError:
                continue
            except (OSError, ValueError):
                received = b""
            if not received:
                self._drop(client)
        for client in [client for client in self._clients if client.unsent]:
            client.flush()

    def _accept(self, listener: socket.socket, make: type[_Client]) -> None:
        connection, _ = listener.accept()
        if time.monotonic() < self._down_until:
            connection.close()
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = make(self, connection)
        self._clients.add(client)
        assert self._selector is not None
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _drop(self, client: _Client) -> None:
        assert self._selector is not None
        self._selector.unregister(client.socket)
        client.socket.close()
        self._clients.discard(client)


class _Client:
    """One connection; subclasses speak its protocol."""

    def __init__(self, controller: UrController, connection: socket.socket) -> None:
        self.controller = controller
        self.socket = connection
        self.unsent = bytearray()
        self._received = bytearray()

    def receive(self, data: bytes) -> None:
        """Take in bytes; ValueError ends the connection."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Send now or, where the client is slow to read, later."""
        self.unsent += data
        self.flush()

    def flush(self) -> None:
        """Send what the connection takes; a broken one ends at the next read."""
        try:
            del self.unsent[: self.socket.send(self.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent.clear()


class _RtdeClient(_Client):
    def __init__(self, controller: UrController, connection: socket.socket) -> None:
        super().__init__(controller, connection)
        self.inputs: set[str] = set()
        self._input_recipes: list[rtde.Recipe] = []
        self._output_recipe: rtde.Recipe | None = None
        self._every = 1
        self._started = False

    def receive(self, data: bytes) -> None:
        self._received += data
        for kind, payload in rtde.take_frames(self._received):
            if kind == rtde.DATA:
                self._take_data(payload)
            else:
                self.send(rtde.frame(kind, self._answer(kind, payload)))

    def wants(self, cycle: int) -> bool:
        """A data package is due in this cycle."""
        return self._started and cycle % self._every == 0

    def send_state(self, values: dict[str, tuple[float, ...]]) -> None:
        """One data package; a client that does not read misses it whole."""
        if self._output_recipe is not None and len(self.unsent) < MAX_BACKLOG:
            self.send(rtde.frame(rtde.DATA, b"\x01" + self._output_recipe.pack(values)))

    def _answer(self, kind: int, payload: bytes) -> bytes:
        if kind == rtde.REQUEST_PROTOCOL_VERSION:
            return bytes([payload == struct.pack(">H", rtde.PROTOCOL_VERSION)])
        if kind == rtde.GET_CONTROLLER_VERSION:
            return struct.pack(">4I", *VERSION)
        if kind == rtde.SETUP_OUTPUTS:
            return self._set_outputs(payload)
        if kind == rtde.SETUP_INPUTS:
            return self._set_inputs(payload)
        if kind in (rtde.START, rtde.PAUSE):
            self._started = kind == rtde.START
            return b"\x01"
        raise ValueError(f"RTDE frame of type {kind}")

    def _set_outputs(self, payload: bytes) -> bytes:
        (frequency,) = struct.unpack_from(">d", payload)
        names = _names(payload[8:])
        types = [OUTPUT_TYPES.get(name, rtde.NOT_FOUND) for name in names]
        if rtde.NOT_FOUND not in types:
            self._output_recipe = rtde.Recipe(names, types)
            self._every = max(1, round(FREQUENCY_HZ / frequency)) if frequency > 0 else 1
        return b"\x01" + ",".join(types).encode()

    def _set_inputs(self, payload: bytes) -> bytes:
        names = _names(payload)
        types = self.controller.claim_inputs(self, names)
        if rtde.NOT_FOUND in types or rtde.IN_USE in types:
            return b"\x00" + ",".join(types).encode()
        self._input_recipes.append(rtde.Recipe(names, types))
        self.inputs.update(names)
        return bytes([len(self._input_recipes)]) + ",".join(types).encode()

    def _take_data(self, payload: bytes) -> None:
        number = payload[0] if payload else 0
        if not 1 <= number <= len(self._input_recipes):
            raise ValueError(f"data for unknown recipe {number}")
        recipe = self._input_recipes[number - 1]
        self.controller.write_inputs(recipe.names, recipe.unpack(payload[1:]))


class _ScriptClient(_Client):
    def receive(self, data: bytes) -> None:
        self._received += data
        while (end := _end_of_script(self._received)) is not None:
            self.controller.load_script(self._received[:end].decode(errors="replace"))
            del self._received[:end]


class _DashboardClient(_Client):
    def __init__(self, controller: UrController, connection: socket.socket) -> None:
        super().__init__(controller, connection)
        self.send(b"Connected: Universal Robots Dashboard Server\n")

    def receive(self, data: bytes) -> None:
        self._received += data
        while b"\n" in self._received:
            line, _, rest = self._received.partition(b"\n")
            self._received = rest
            self.send(self.controller.dashboard(line.decode(errors="replace")).encode() + b"\n")


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise DeviceError(
                f"{host}:{port} is in use: stop the other virtual cell, "
                "or give this one another robot.host in its cell file"
            ) from error
        raise DeviceError(
            f"cannot open {host}:{port}: {error.strerror}; "
            "robot.host of a virtual cell must be an address of this machine, such as 127.0.0.2"
        ) from error
    listener.setblocking(False)
    return listener


def _end_of_script(text: bytearray) -> int | None:
    """End of the first whole script: a `def` block up to its `end`, or one line."""
    if text.lstrip().startswith(b"def "):
        end = text.find(b"\nend\n")
        return None if end < 0 else end + len(b"\nend\n")
    end = text.find(b"\n")
    return None if end < 0 else end + 1


def _names(payload: bytes) -> list[str]:
    return [name for name in payload.decode().split(",") if name]


def _pose(values: Sequence[float]) -> Pose:
    x, y, z, rx, ry, rz = map(float, values)
    return (x, y, z, rx, ry, rz)


def _constant_values() -> dict[str, tuple[float, ...]]:
    """Every output variable, with what an idle arm reports where nothing is simulated."""
    values: dict[str, tuple[float, ...]] = {
        name: (0,) * rtde.TYPES[kind][1] for name, kind in OUTPUT_TYPES.items()
    }
    running_joint = 253
    values |= {
        "actual_q": HOME_JOINTS,
        "target_q": HOME_JOINTS,
        "joint_mode": (running_joint,) * 6,
        "joint_temperatures": (30.0,) * 6,
        "actual_joint_voltage": (48.0,) * 6,
        "actual_main_voltage": (48.0,),
        "actual_robot_voltage": (48.0,),
        "actual_robot_current": (0.5,),
        "actual_tool_accelerometer": (0.0, 0.0, -9.81),
        "speed_scaling": (1.0,),
    }
    return values
