"""Driver of a Universal Robots arm: ur_rtde commands it, an RTDE stream reads it.

`UrRobot` keeps the link up and never blocks its caller. One thread does everything with ur_rtde's
control interface in turn (`ur_control`), another reads the stream (`rtde`). Moves are always
asynchronous ones, because a blocking `moveL` cannot be interrupted, and after a lost link the
interface is made anew, because ur_rtde's own reconnection does not settle.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from genforce_collect.config import Pose, RobotConfig
from genforce_collect.devices.rtde import RtdeStream
from genforce_collect.devices.ur_control import STOP_DECELERATION, ControlProcess
from genforce_collect.errors import DeviceError, GenforceError, SafetyError
from genforce_collect.geometry import angle, distance

DASHBOARD_PORT = 29999
SILENCE_S = 1.0  # a stream that stands still this long is a lost link
BEAT_PERIOD_S = 0.05  # of this driver's sign of life to its control process
HEARTBEAT_S = 0.5  # a caller that does not beat for this long is taken for dead
SPEED_COMMAND_S = 0.1  # how long a speed command holds
STANDSTILL_S = 2.0  # any stop is over by then
UNLOCK_S = 8.0  # a controller refuses to unlock for 5 s after a protective stop
UNLOCK_RETRY_S = 0.1
RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # between attempts to bring a lost link up again
LATE_S = 1.0  # a script that ends so soon after a late sign of life was ended by the watchdog
ARRIVED_M = 5e-4
ARRIVED_RAD = math.radians(0.5)

_ROBOT_RUNNING = 7  # robot_mode
_SAFETY_NORMAL, _SAFETY_REDUCED = 1, 2  # safety_mode
_PROGRAM_PLAYING = 2  # runtime_state
_PROTECTIVE_BIT, _EMERGENCY_BITS = 1 << 2, 1 << 5 | 1 << 6 | 1 << 7  # safety_status_bits

_VARIABLES = (
    "timestamp",
    "actual_TCP_pose",
    "target_TCP_pose",
    "actual_TCP_speed",
    "robot_mode",
    "safety_mode",
    "safety_status_bits",
    "runtime_state",
    "speed_scaling",
    "output_int_register_2",
)


class ControllerState(NamedTuple):
    """The controller's own account of itself, in its own numbers."""

    robot_mode: int
    safety_mode: int
    safety_bits: int
    runtime_state: int
    speed_scaling: float

    @property
    def protective_stopped(self) -> bool:
        """Held after a collision or a limit, until unlocked."""
        return bool(self.safety_bits & _PROTECTIVE_BIT)

    @property
    def emergency_stopped(self) -> bool:
        """An emergency stop button is or was pushed."""
        return bool(self.safety_bits & _EMERGENCY_BITS)

    @property
    def program_running(self) -> bool:
        """The control script lives."""
        return self.runtime_state == _PROGRAM_PLAYING

    @property
    def stop_problem(self) -> str:
        """What holds the arm itself, with the remedy; empty where nothing does."""
        if self.emergency_stopped:
            return "emergency stop: release the button, power on, release the brakes, recover"
        if self.protective_stopped:
            return "protective stop: look for its cause, then recover"
        if self.robot_mode != _ROBOT_RUNNING:
            return "the arm is not running: power on, release the brakes, recover"
        if self.safety_mode not in (_SAFETY_NORMAL, _SAFETY_REDUCED):
            return f"safety mode {self.safety_mode}: clear it on the teach pendant, recover"
        return ""

    @property
    def problem(self) -> str:
        """Why the arm would not move, with the remedy; empty when it would."""
        if problem := self.stop_problem:
            return problem
        return "" if self.program_running else "the control script is not running: recover"


class PoseSample(NamedTuple):
    """One cycle of the controller, in the base frame."""

    device_time: float  # s since the controller started
    receive_ns: int  # host system time of arrival
    tcp_pose: Pose  # measured (m, rotation vector rad)
    tcp_target: Pose  # commanded
    tcp_speed: Pose  # m/s, rad/s
    state: ControllerState
    operation: int  # number of ur_rtde's newest asynchronous operation
    operating: bool  # it is under way


class _Move:
    """A move on its way from `move_linear` to its end."""

    def __init__(self, target: Pose, speed: float, acceleration: float) -> None:
        self.target = target
        self.speed = speed
        self.acceleration = acceleration
        self.operation: int | None = None
        self.future: Future[None] = Future()


class _SpeedCommand(NamedTuple):
    twist: Pose
    acceleration: float
    until: float  # monotonic (s)


class UrRobot:
    """One arm. `connect`, then call `heartbeat` more often than every 0.5 s: without it a motion
    is stopped. Should this process die, its control process stops the arm, and should that die
    too, or the network, the controller's watchdog does.

    `on_sample` gets every controller sample once, in order, on the reader's thread; `on_change`
    is told, on either thread, when `problem`, `moving` or the controller's state may have changed.
    Futures end with SafetyError where a motion was refused or stopped, DeviceError where the
    robot failed.
    """

    def __init__(
        self,
        config: RobotConfig,
        on_sample: Callable[[PoseSample], None] = lambda sample: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.lost_samples = 0  # controller cycles that never arrived
        self._config = config
        self._on_sample = on_sample
        self._on_change = on_change
        self._sample: PoseSample | None = None
        self._link_problem = "not connected"
        self._control: ControlProcess | None = None
        self._stream: RtdeStream | None = None
        self._reader: threading.Thread | None = None
        self._commander: threading.Thread | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._beat = 0.0
        self._late_at: float | None = None
        self._lock = threading.Lock()  # for what callers and both threads share, from here on
        self._stop_reason: str | None = None
        self._jobs: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._move: _Move | None = None
        self._speed_command: _SpeedCommand | None = None
        self._speed_until = 0.0
        self._speeding = False

    # --- state ---

    @property
    def sample(self) -> PoseSample | None:
        """The newest controller sample; None before the first."""
        return self._sample

    @property
    def connected(self) -> bool:
        """Samples are arriving."""
        return not self._link_problem

    @property
    def problem(self) -> str:
        """Why a motion would be refused, in one line with the remedy; empty when ready."""
        if self._link_problem or self._sample is None:
            return self._link_problem or "no sample yet"
        if problem := self._sample.state.problem:
            return problem
        return "" if self._control is not None else "not in control of the robot: recover"

    @property
    def obstacle(self) -> str:
        """Why `recover` would fail: what only a person can mend; empty where it may be tried."""
        if self._link_problem or self._sample is None:
            return self._link_problem or "no sample yet"
        state = self._sample.state
        unlockable = state.protective_stopped and not state.emergency_stopped
        return "" if unlockable else state.stop_problem

    @property
    def moving(self) -> bool:
        """A motion of this driver is in progress."""
        return self._move is not None or self._speeding

    # --- life ---

    def connect(self) -> None:
        """Bring the link up; from then on it is kept up. Raises DeviceError naming the remedy."""
        self._closing.clear()
        self.heartbeat()
        try:
            self._establish()
        except DeviceError:
            self._let_go()
            raise
        self._commander = threading.Thread(target=self._command, name="ur-control", daemon=True)
        self._commander.start()

    def close(self) -> None:
        """Stop the robot, end the control script, let go of the controller."""
        self._closing.set()
        self._wake.set()
        if self._commander is not None:
            self._commander.join()
            self._commander = None

    def heartbeat(self) -> None:
        """The caller is alive."""
        self._beat = time.monotonic()

    # --- commands, from any thread ---

    def move_linear(
        self, target: Sequence[float], speed: float, acceleration: float
    ) -> Future[None]:
        """Straight to a TCP pose in the base frame (m, rad; m/s, m/s^2); done on arrival.

        It begins once the arm rests from a stop before it. Raises SafetyError on values that are
        no pose, speed or acceleration.
        """
        move = _Move(
            _six(target, "target"),
            _positive(speed, "speed"),
            _positive(acceleration, "acceleration"),
        )
        return self._submit(lambda: self._begin_move(move), move.future)

    def command_speed(self, twist: Sequence[float], acceleration: float) -> None:
        """Keep a TCP twist along base axes (m/s, rad/s; m/s^2) for 0.1 s; repeat it to go on.

        Raises SafetyError where it is refused.
        """
        command = _SpeedCommand(
            _six(twist, "speed"),
            _positive(acceleration, "acceleration"),
            time.monotonic() + SPEED_COMMAND_S,
        )
        if problem := self.problem or ("a move is in progress" if self._move else ""):
            raise SafetyError(f"speed command refused: {problem}")
        with self._lock:
            self._speed_command = command
        self._wake.set()

    def stop(self, reason: str) -> None:
        """Brake now: everything submitted before fails with `reason`."""
        with self._lock:
            self._stop_reason = reason
            self._speed_command = None
            dropped = list(self._jobs)
            self._jobs.clear()
        self._wake.set()
        for _, future in dropped:
            _fail(future, SafetyError(reason))

    def recover(self) -> Future[None]:
        """Make the robot ready again: unlock a protective stop, start the control script anew,
        and wait for a pose read after that."""
        future: Future[None] = Future()

        def recover() -> None:
            self._recover()
            future.set_result(None)

        return self._submit(recover, future)

    def _submit(self, job: Callable[[], None], future: Future[None]) -> Future[None]:
        with self._lock:
            refused = self._link_problem or ("closing" if self._closing.is_set() else "")
            if not refused:
                self._jobs.append((job, future))
        if refused:
            _fail(future, DeviceError(refused))
        self._wake.set()
        return future

    # --- the control thread ---

    def _command(self) -> None:
        attempt = 0
        while not self._closing.is_set():
            if self._link_problem:
                self._let_go()
                if self._closing.wait(RETRY_S[min(attempt, len(RETRY_S) - 1)]):
                    break
                attempt += 1
                self._try_again()
                continue
            attempt = 0
            self._wake.wait(BEAT_PERIOD_S)
            self._wake.clear()
            try:
                self._tick()
            except DeviceError as error:
                self._set_link_problem(str(error))
        self._let_go()

    def _try_again(self) -> None:
        try:
            self._establish()
        except DeviceError as error:
            self._set_link_problem(str(error))

    def _tick(self) -> None:
        """A stop first, then the speed command, then one job, then a sign of life."""
        with self._lock:
            reason, self._stop_reason = self._stop_reason, None
        if reason is None and self.moving and time.monotonic() - self._beat > HEARTBEAT_S:
            reason = f"no heartbeat for {HEARTBEAT_S} s"
        if reason is not None:
            self._brake(reason)
        elif self._speed_command is not None or self._speeding:
            self._drive()
        self._run_job()
        self._stay_alive()

    def _stay_alive(self) -> None:
        """Tell the control process. A script that ended because that process came too late for
        the watchdog, on a busy host, is started anew unless the arm was to move."""
        if self._control is None:
            return
        if self._control.call("beat"):
            self._late_at = time.monotonic()
        if self._late_at is None or self._sample is None or self.moving:
            return
        state = self._sample.state
        if time.monotonic() - self._late_at > LATE_S or state.stop_problem:
            self._late_at = None
        elif not state.program_running:
            self._late_at = None
            self._recover()

    def _obeying(self) -> ControlProcess | None:
        """The interface, where the controller would carry out a command; else ur_rtde waits."""
        return None if self.problem else self._control

    def _run_job(self) -> None:
        with self._lock:
            if self._stop_reason is not None or not self._jobs:
                return
            job, future = self._jobs.popleft()
            if self._jobs:
                self._wake.set()
        try:
            job()
        except GenforceError as error:
            _fail(future, error)

    def _brake(self, reason: str) -> None:
        if control := self._obeying():
            control.call("stop", STOP_DECELERATION)
        self._speeding = False
        self._end_move(SafetyError(reason))
        self._on_change()

    def _drive(self) -> None:
        """Follow the newest speed command; brake when it runs out."""
        with self._lock:
            command, self._speed_command = self._speed_command, None
        now = time.monotonic()
        if command is not None and now < command.until:
            self._speed_until = command.until
            if control := self._obeying():
                if not self._speeding:
                    self._settle(control)
                    self._speeding = True
                    self._on_change()
                control.call("speed", command.twist, command.acceleration)
        elif self._speeding and now > self._speed_until:
            self._brake("the speed command ran out")

    def _begin_move(self, move: _Move) -> None:
        if self.moving:
            raise SafetyError("move refused: another motion is in progress")
        control = self._obeying()
        if control is None:
            raise DeviceError(f"move refused: {self.problem}")
        self._settle(control)
        operation = control.call("move", move.target, move.speed, move.acceleration)
        if operation is None:
            raise DeviceError(f"move refused: {self.problem or 'by the controller'}")
        move.operation = operation
        self._move = move
        self._on_change()

    def _end_move(self, error: GenforceError | None) -> None:
        with self._lock:
            move, self._move = self._move, None
        if move is None:
            return
        if error is None:
            move.future.set_result(None)
        else:
            _fail(move.future, error)
        self._on_change()

    def _settle(self, control: ControlProcess) -> None:
        """Wait for the end of the stop before: two motions at once end the control script."""
        deadline = time.monotonic() + STANDSTILL_S
        while not control.call("settled"):
            if time.monotonic() > deadline:
                raise DeviceError("the arm does not come to rest")
            time.sleep(0.002)

    def _recover(self) -> None:
        if self.moving:
            raise SafetyError("recovery refused: a motion is in progress")
        if obstacle := self.obstacle:
            raise DeviceError(obstacle)
        assert self._sample is not None  # that would have been an obstacle
        state = self._sample.state
        if state.protective_stopped:
            self._unlock()
        if self._control is None:
            self._control = self._take_control()
        elif not state.program_running:
            self._ask("stop")  # a paused program would go on with its move
            if not self._control.call("reupload"):
                raise DeviceError("the control script does not start: look at the teach pendant")
        self._configure(self._control)
        self._await_ready()

    def _unlock(self) -> None:
        deadline = time.monotonic() + UNLOCK_S
        while True:
            answer = self._ask("close safety popup", "unlock protective stop")[1]
            sample = self._sample
            if sample is not None and not sample.state.protective_stopped:
                return
            if time.monotonic() > deadline:
                raise DeviceError(f"the protective stop cannot be unlocked: {answer}")
            time.sleep(UNLOCK_RETRY_S)

    def _await_ready(self) -> None:
        """Until a sample that arrived from now on says so."""
        start_ns = time.time_ns()
        deadline = time.monotonic() + STANDSTILL_S
        while self.problem or self._sample is None or self._sample.receive_ns <= start_ns:
            if self._link_problem or time.monotonic() > deadline:
                raise DeviceError(f"the robot did not recover: {self.problem}")
            time.sleep(0.002)

    # --- the link ---

    def _establish(self) -> None:
        host, timeout_s = self._config.host, self._config.connect_timeout_s
        remote, mode, safety = self._ask("is in remote control", "robotmode", "safetystatus")
        if "true" not in remote.lower():
            raise DeviceError(
                f"robot {host} is not in remote control: switch from Local to Remote at the top "
                "right of the teach pendant"
            )
        if mode.endswith("RUNNING") and safety.endswith(("NORMAL", "REDUCED")):
            self._control = self._take_control()
            self._configure(self._control)
        self._stream = RtdeStream(host, _VARIABLES, self._config.frequency_hz, timeout_s)
        self._sample = None
        first = threading.Event()
        self._reader = threading.Thread(
            target=self._read, args=(self._stream, first), name="ur-stream", daemon=True
        )
        self._reader.start()
        if not first.wait(timeout_s):
            raise DeviceError(f"robot {host} sends no samples: restart its controller")

    def _take_control(self) -> ControlProcess:
        try:
            return ControlProcess(
                self._config.host,
                self._config.frequency_hz,
                kick_period_s=1 / (4 * self._config.watchdog_hz),
            )
        except DeviceError as error:
            if "already in use" in str(error):
                raise DeviceError(
                    f"robot {self._config.host} is controlled by another program: end that first"
                ) from error
            raise

    def _configure(self, control: ControlProcess) -> None:
        config = self._config
        if not control.call(
            "configure",
            config.tcp,
            config.payload_kg,
            config.payload_cog_m,
            config.watchdog_hz,
        ):
            raise DeviceError(f"robot {config.host} did not take TCP, payload and watchdog")

    def _ask(self, *commands: str) -> list[str]:
        return ask_dashboard(self._config.host, *commands, timeout_s=self._config.connect_timeout_s)

    def _let_go(self) -> None:
        """Fail what is pending, brake where that is possible, drop every connection."""
        reason = self._link_problem or "the driver is closing"
        with self._lock:
            dropped = list(self._jobs)
            self._jobs.clear()
            self._speed_command = None
            self._stop_reason = None
        for _, future in dropped:
            _fail(future, DeviceError(reason))
        self._speeding = False
        self._end_move(DeviceError(reason))
        control, self._control = self._control, None
        if control is not None:
            if self._link_problem:
                control.kill()
            else:
                control.close()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.join()
        self._set_link_problem(self._link_problem or "not connected")

    def _set_link_problem(self, problem: str) -> None:
        if problem != self._link_problem:
            self._link_problem = problem
            self._wake.set()
            self._on_change()

    # --- the reader thread ---

    def _read(self, stream: RtdeStream, first: threading.Event) -> None:
        before: PoseSample | None = None
        alive_at = time.monotonic()
        try:
            for receive_ns, values in stream.samples(SILENCE_S):
                sample = _to_sample(receive_ns, values)
                if before is not None and sample.device_time <= before.device_time:
                    if time.monotonic() - alive_at > SILENCE_S:
                        raise DeviceError(
                            f"robot {self._config.host}: the controller's clock stands still"
                        )
                    continue
                alive_at = time.monotonic()
                self._take(sample, before)
                before = sample
                first.set()
        except DeviceError as error:
            if self._stream is stream:
                self._set_link_problem(str(error))

    def _take(self, sample: PoseSample, before: PoseSample | None) -> None:
        self._sample = sample
        if before is None:
            self._set_link_problem("")
        else:
            cycles = (sample.device_time - before.device_time) * self._config.frequency_hz
            self.lost_samples += max(0, round(cycles) - 1)
        if self._move is not None:
            self._follow(self._move, sample)
        self._on_sample(sample)
        if before is not None and sample.state != before.state:
            self._on_change()

    def _follow(self, move: _Move, sample: PoseSample) -> None:
        """End the move with the controller's."""
        if problem := sample.state.problem:
            self._end_move(DeviceError(problem))
        elif sample.operation == move.operation and not sample.operating:
            left = distance(sample.tcp_pose, move.target)
            if left > ARRIVED_M or angle(sample.tcp_pose, move.target) > ARRIVED_RAD:
                self._end_move(DeviceError(f"the move ended {left * 1e3:.1f} mm from its target"))
            else:
                self._end_move(None)


def ask_dashboard(host: str, *commands: str, timeout_s: float) -> list[str]:
    """Answers of the dashboard server, one line to each command. Raises DeviceError."""
    where = f"robot {host}:{DASHBOARD_PORT}"
    try:
        with socket.create_connection((host, DASHBOARD_PORT), timeout_s) as connection:
            lines = connection.makefile("rw", encoding="utf-8", newline="\n")
            answers = [lines.readline()]  # the greeting
            for command in commands:
                lines.write(command + "\n")
                lines.flush()
                answers.append(lines.readline().strip())
    except OSError as error:
        raise DeviceError(
            f"{where} does not answer ({error.strerror or error}): is the controller on, "
            "and robot.host right?"
        ) from error
    if not all(answers):
        raise DeviceError(f"{where} closed the connection: is it a UR controller?")
    return answers[1:]


def _to_sample(receive_ns: int, values: tuple[tuple[float, ...], ...]) -> PoseSample:
    time_s, pose, target, speed, mode, safety, bits, runtime, scaling, word = values
    state = ControllerState(int(mode[0]), int(safety[0]), int(bits[0]), int(runtime[0]), scaling[0])
    operation = int(word[0])
    return PoseSample(
        time_s[0],
        receive_ns,
        pose,  # type: ignore[arg-type]
        target,  # type: ignore[arg-type]
        speed,  # type: ignore[arg-type]
        state,
        operation >> 24 & 127,
        bool(operation & 1 << 15),
    )


def _six(values: Sequence[float], what: str) -> Pose:
    """Lengths are checked here: ur_rtde sends what it is given, and never returns."""
    numbers = tuple(map(float, values))
    if len(numbers) != 6 or not all(map(math.isfinite, numbers)):
        raise SafetyError(f"{what}: expected 6 finite numbers, found {list(values)}")
    a, b, c, d, e, f = numbers
    return (a, b, c, d, e, f)


def _positive(value: float, what: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise SafetyError(f"{what}: expected a number above 0, found {value}")
    return float(value)


def _fail(future: Future[None], error: GenforceError) -> None:
    with contextlib.suppress(Exception):  # it may have ended just now
        future.set_exception(error)
