"""Node: UR arm → `robot/tcp_pose`, `robot/state`; moves it, and guards every motion.

Action `robot/move_linear`, topic `robot/speed_command`, services `robot/stop`, `robot/recover`; all
poses and twists are in the sensor frame. The guard sees every sample of `netft/wrench` and of the
arm's own stream, and what the force sensor says of itself: a breach of the cell's limits stops the
arm at once, too much force also backs it off, and motion is refused until the data are good again.

Parameters: `cell` (name or path), `guard_wrench` (default true; false for a cell without a
force/torque sensor).
"""

from __future__ import annotations

import concurrent.futures
import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Pose as PoseMessage
from geometry_msgs.msg import PoseStamped, TwistStamped, WrenchStamped
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from std_msgs.msg import Header
from std_srvs.srv import Trigger

from genforce_collect.cdr import doubles_of, stamp_of
from genforce_collect.clock import NS, ClockMapper
from genforce_collect.config import Pose, Vector3, load_cell
from genforce_collect.devices.ur import SPEED_COMMAND_S, PoseSample, UrRobot
from genforce_collect.devices.ur_control import STOP_DECELERATION
from genforce_collect.devices.wrench import SENSOR_STATUS, STATUS_SATURATION
from genforce_collect.errors import GenforceError, SafetyError
from genforce_collect.geometry import (
    SensorFrame,
    distance,
    quaternion_from_rotvec,
    rotvec_from_quaternion,
)
from genforce_collect.nodes.common import (
    LATCHED_QOS,
    DriverNode,
    NumberStream,
    run,
    stream_qos,
    to_stamp,
    values_of,
)
from genforce_collect.safety import (
    STOPPED_ON_REQUEST,
    Breach,
    BreachKind,
    check_age,
    check_position,
    check_speed,
    check_target,
    check_tracking,
    check_wrench,
    retreat,
    stopping_point,
    tool_speed,
)
from genforce_msgs.action import MoveLinear
from genforce_msgs.msg import RobotState

WRENCH_RATE_HZ = 7000.0  # the fastest a sensor may be set to
HEARTBEAT_PERIOD_S = 0.02  # also how often data ages are looked at
STATE_PERIOD_S = 0.1
FEEDBACK_PERIOD_S = 0.1
RESULT_KEPT_S = 30  # for the client to fetch; the default of 15 min would fill with moves
SPEED_ACCELERATION_M_S2 = 0.5
SPEED_PAUSE_S = 0.3  # without speed commands, after one was refused or stopped


@dataclass(frozen=True)
class _Motion:
    """What the guard watches: where it began, and whether force ends it."""

    start: Vector3
    by_speed: bool = False
    retreating: bool = False


class RobotNode(DriverNode):
    """Publishes straight from the arm's stream thread; the guard acts on whichever thread sees."""

    def __init__(self) -> None:
        super().__init__("robot")
        cell = load_cell(str(self.declare_parameter("cell", "virtual").value))
        self._guard_wrench = bool(self.declare_parameter("guard_wrench", True).value)
        self._limits = cell.limits
        self._acceleration = min(cell.speeds.acceleration_m_s2, cell.limits.acceleration_m_s2)
        self._retreat_speed = min(cell.speeds.transfer_m_s, cell.limits.speed_m_s)
        self._frame = SensorFrame(cell.sensor_pose)
        self._host = cell.robot.host

        self._device_clock = ClockMapper()
        self._pose: Pose | None = None  # of the TCP in the sensor frame
        self._pose_at: float | None = None
        self._wrench: tuple[float, ...] = ()
        self._wrench_at: float | None = None
        self._sensor_fault: Breach | None = None  # why the newest wrenches are worth nothing
        self._motion: _Motion | None = None
        self._motion_lock = threading.Lock()
        self._stops = 0
        self._speed_until = 0.0
        self._speed_barred_until = 0.0
        self._moves: dict[bytes, concurrent.futures.Future[None]] = {}  # by goal
        self._goal: tuple[ServerGoalHandle, Pose] | None = None  # the move in progress
        self._state_count = 0
        self._state_lock = threading.Lock()

        template = PoseStamped(header=Header(frame_id="sensor"))
        self._stream = NumberStream(self, template, "robot/tcp_pose", cell.robot.frequency_hz)
        self._state = self.create_publisher(RobotState, "robot/state", LATCHED_QOS)
        self._robot = UrRobot(cell.robot, self._on_sample, self._publish_state)

        if self._guard_wrench:
            self.create_subscription(
                WrenchStamped,
                "netft/wrench",
                self._on_wrench,
                stream_qos(WRENCH_RATE_HZ),
                raw=True,
            )
            self.create_subscription(
                DiagnosticArray, "/diagnostics", self._on_diagnostics, stream_qos(10)
            )
        self.create_subscription(TwistStamped, "robot/speed_command", self._on_speed_command, 1)
        self.create_service(Trigger, "robot/stop", self._on_stop)
        self.create_service(Trigger, "robot/recover", self._on_recover)
        self._server = ActionServer(
            self,
            MoveLinear,
            "robot/move_linear",
            execute_callback=self._answer,
            goal_callback=lambda _: GoalResponse.ACCEPT,
            handle_accepted_callback=self._begin,
            cancel_callback=self._on_cancel,
            result_timeout=RESULT_KEPT_S,
        )
        self.create_timer(HEARTBEAT_PERIOD_S, self._watch)
        self.create_timer(STATE_PERIOD_S, self._publish_state)
        self.create_timer(FEEDBACK_PERIOD_S, self._publish_feedback)
        self.start()

    def connect(self) -> None:
        self._robot.connect()

    def disconnect(self) -> None:
        """Stop the arm and let go of it."""
        self._robot.stop("the robot node lets go of the arm")
        self._robot.close()
        self._stream.flush()

    # --- streams ---

    def _on_sample(self, sample: PoseSample) -> None:
        stamp_ns = self._device_clock.update(sample.device_time, sample.receive_ns)
        pose = self._frame.from_base(sample.tcp_pose)
        self._pose, self._pose_at = pose, _taken_at(stamp_ns)
        motion = self._motion
        if motion is not None:
            rest: Sequence[float] = pose
            if motion.by_speed:  # a move has a target in the box; this has to be able to stop there
                velocity = self._frame.twist_from_base(sample.tcp_speed)[:3]
                rest = stopping_point(pose, velocity, STOP_DECELERATION)
            self._trip(
                check_position(self._limits, rest, motion.start)
                or check_tracking(self._limits, sample.tcp_pose, sample.tcp_target)
            )
        numbers = (*pose[:3], *quaternion_from_rotvec(pose[3:]))
        stream = self._stream
        stream.device_lost = self._robot.lost_samples
        stream.offset, stream.drift = self._device_clock.offset, self._device_clock.drift
        stream.publish_numbers(stamp_ns, numbers, sample.receive_ns, sample.device_time)

    def _on_wrench(self, message: bytes) -> None:
        wrench = doubles_of(message, 6)
        self._wrench, self._wrench_at = wrench, _taken_at(stamp_of(message))
        motion = self._motion
        if motion is not None and not motion.retreating:
            self._trip(check_wrench(self._limits, wrench[:3], wrench[3:]))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name != "netft":
                continue
            self._sensor_fault = fault = _sensor_fault(status)
            motion = self._motion
            if motion is not None and not motion.retreating:
                self._trip(fault)

    def _on_speed_command(self, message: TwistStamped) -> None:
        linear, angular = message.twist.linear, message.twist.angular
        twist = (linear.x, linear.y, linear.z, angular.x, angular.y, angular.z)
        try:
            self._command_speed(twist)
        except GenforceError as error:
            self._speed_barred_until = time.monotonic() + SPEED_PAUSE_S
            self.get_logger().warning(f"speed command refused: {error}", throttle_duration_sec=1.0)

    def _command_speed(self, twist: Pose) -> None:
        if time.monotonic() < self._speed_barred_until:
            raise SafetyError(f"pause for {SPEED_PAUSE_S} s after one that was refused or stopped")
        motion = self._motion
        if motion is not None and not motion.by_speed:
            raise SafetyError("a move is in progress")
        breach = self._data_breach() or check_speed(self._limits, tool_speed(twist))
        if breach is None and motion is None:
            breach = check_position(self._limits, self._position())
        if breach is not None:
            self._trip(breach)
            raise SafetyError(breach.text)
        with self._motion_lock:
            if self._motion is None:
                self._motion = _Motion(self._position(), by_speed=True)
            self._speed_until = time.monotonic() + SPEED_COMMAND_S
            self._robot.command_speed(self._frame.twist_to_base(twist), SPEED_ACCELERATION_M_S2)

    # --- guard ---

    def _watch(self) -> None:
        """Heartbeat, and what no sample can tell: that none came."""
        self._robot.heartbeat()
        motion = self._motion
        if motion is None:
            return
        self._trip(self._age_breach(motion.retreating))
        if motion.by_speed and time.monotonic() > self._speed_until and not self._robot.moving:
            self._end_motion(motion)

    def _trip(self, breach: Breach | None) -> None:
        """Stop the motion in progress, once; back off where the tip presses too hard."""
        if breach is None:
            return
        with self._motion_lock:
            motion, self._motion = self._motion, None
        if motion is None:
            return
        self._robot.stop(breach.text)
        self._stops += 1
        self._speed_barred_until = time.monotonic() + SPEED_PAUSE_S
        if breach.kind.pressed and self._limits.retract_m > 0:
            self._retreat()
        self.get_logger().error(f"stopped: {breach.text}")

    def _retreat(self) -> None:
        assert self._pose is not None  # there is none only before any motion
        target = (*retreat(self._limits, self._pose), *self._pose[3:])
        try:
            self._start(
                target, self._retreat_speed, self._limits.acceleration_m_s2, retreating=True
            )
        except GenforceError as error:
            self.get_logger().error(f"no retreat: {error}")

    def _age_breach(self, retreating: bool = False) -> Breach | None:
        now = time.monotonic()
        breach = check_age(self._limits, "robot/tcp_pose", self._pose_at, now)
        if breach is None and self._guard_wrench and not retreating:
            breach = check_age(self._limits, "netft/wrench", self._wrench_at, now)
        return breach

    def _data_breach(self) -> Breach | None:
        """Why motion would be refused whatever its target."""
        breach = self._age_breach()
        if breach is None and self._guard_wrench:
            breach = self._sensor_fault or check_wrench(
                self._limits, self._wrench[:3], self._wrench[3:]
            )
        return breach

    def _position(self) -> Vector3:
        assert self._pose is not None  # as long as ages are checked first
        return self._pose[:3]

    # --- moves ---

    def _start(
        self, target: Pose, speed: float, acceleration: float, retreating: bool = False
    ) -> concurrent.futures.Future[None]:
        """Begin a straight move to `target` in the sensor frame, under guard."""
        motion = _Motion(self._position(), retreating=retreating)
        with self._motion_lock:
            if self._motion is not None:
                raise SafetyError("move refused: another motion is in progress")
            # Under the lock: a stop of this motion must not overtake it.
            ended = self._robot.move_linear(self._frame.to_base(target), speed, acceleration)
            self._motion = motion
        ended.add_done_callback(lambda _: self._end_motion(motion))
        return ended

    def _end_motion(self, motion: _Motion) -> None:
        with self._motion_lock:
            if self._motion is motion:
                self._motion = None
        self._publish_state()

    def _begin(self, handle: ServerGoalHandle) -> None:
        """Begin the move of an accepted goal. It is executed, and thereby answered, when the move
        has ended: the executor would poll a coroutine that awaits this, without a pause."""
        goal = handle.request
        try:
            target = _pose_of(goal.pose)
            acceleration = goal.acceleration or self._acceleration
            breach = self._data_breach() or check_target(
                self._limits, target, goal.speed, acceleration
            )
            if breach is not None:
                raise SafetyError(f"move refused: {breach.text}")
            move = self._start(target, goal.speed, acceleration)
            self._goal = (handle, target)
        except GenforceError as error:
            move = concurrent.futures.Future()
            move.set_exception(error)
        self._moves[bytes(handle.goal_id.uuid)] = move
        move.add_done_callback(lambda _: handle.execute())

    def _answer(self, handle: ServerGoalHandle) -> MoveLinear.Result:
        error = self._moves.pop(bytes(handle.goal_id.uuid)).exception()
        if self._goal is not None and self._goal[0] is handle:
            self._goal = None
        if error is None:
            handle.succeed()
        elif handle.is_cancel_requested:
            handle.canceled()
        else:
            handle.abort()
        result = MoveLinear.Result(success=error is None, message=str(error or ""))
        if self._pose is not None:
            _fill_pose(result.pose, self._pose)
        return result

    def _on_cancel(self, _: ServerGoalHandle) -> CancelResponse:
        with self._motion_lock:
            motion = self._motion
        if motion is not None and not motion.retreating:  # the guard may have ended that move
            self._robot.stop("the move was cancelled")
        return CancelResponse.ACCEPT

    def _on_stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._motion_lock:
            self._motion = None
        self._robot.stop(STOPPED_ON_REQUEST)
        state = self._state_now()  # whoever moves the arm is to know, also where it rests just now
        state.ready, state.message = False, STOPPED_ON_REQUEST
        self._send_state(state)
        response.success = self._robot.connected
        response.message = "stopping" if response.success else self._robot.problem
        return response

    def _on_recover(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        # Answered at once: this takes seconds, and the executor has the guard to run meanwhile.
        obstacle = self._robot.obstacle
        if not obstacle:
            self._robot.recover().add_done_callback(self._recovered)
        response.success = not obstacle
        response.message = obstacle or "recovering; robot/state says when the robot is ready"
        return response

    def _recovered(self, recovered: concurrent.futures.Future[None]) -> None:
        if error := recovered.exception():
            self.get_logger().error(f"not recovered: {error}")
        self._publish_state()

    def _publish_feedback(self) -> None:
        if self._goal is not None and self._pose is not None:
            handle, target = self._goal
            handle.publish_feedback(MoveLinear.Feedback(remaining=distance(self._pose, target)))

    # --- reports ---

    def _publish_state(self) -> None:
        self._send_state(self._state_now())

    def _state_now(self) -> RobotState:
        robot = self._robot
        moving = robot.moving or self._motion is not None
        problem = robot.problem
        if not problem and (breach := self._data_breach()):
            problem = breach.text
        state = RobotState(
            connected=robot.connected,
            ready=not problem and not moving,
            moving=moving,
            pose_age=math.inf if self._pose_at is None else time.monotonic() - self._pose_at,
            message=problem or ("moving" if moving else ""),
        )
        if robot.sample is not None:
            controller = robot.sample.state
            state.protective_stopped = controller.protective_stopped
            state.emergency_stopped = controller.emergency_stopped
            state.program_running = robot.connected and controller.program_running
            state.robot_mode = controller.robot_mode
            state.safety_mode = controller.safety_mode
            state.runtime_state = controller.runtime_state
            state.speed_scaling = controller.speed_scaling
        return state

    def _send_state(self, state: RobotState) -> None:
        with self._state_lock:  # keeps the numbering in publishing order
            state.header.stamp = to_stamp(time.time_ns())
            state.seq = self._state_count
            self._state_count += 1
            self._state.publish(state)

    def diagnose(self) -> None:
        robot, clock = self._robot, self._device_clock
        problem = robot.problem
        values = {
            "samples": str(self._stream.count),
            "lost": str(robot.lost_samples),
            "guard_stops": str(self._stops),
            "clock_offset_s": f"{clock.offset:.6f}",
            "clock_drift_ppm": f"{clock.drift * 1e6:.1f}",
            "clock_restarts": f"{clock.restarts} {clock.last_restart}".strip(),
        }
        self._diagnostics.publish(
            DiagnosticStatus.ERROR if problem else DiagnosticStatus.OK,
            problem,
            f"ur {self._host}",
            values,
        )


def _sensor_fault(status: DiagnosticStatus) -> Breach | None:
    """What the force sensor says of its samples, where it says that they are wrong."""
    word = int(values_of(status).get(SENSOR_STATUS, "0"), 16)
    if status.level != DiagnosticStatus.ERROR or not word:
        return None
    pressed = bool(word & STATUS_SATURATION)
    return Breach(BreachKind.FORCE if pressed else BreachKind.DATA, status.message)


def _taken_at(stamp_ns: int) -> float:
    """Monotonic time (s) of a stamp: what waited in a queue is as old as it is."""
    return time.monotonic() - max(0, time.time_ns() - stamp_ns) / NS


def _fill_pose(message: PoseMessage, pose: Pose) -> None:
    position, orientation = message.position, message.orientation
    position.x, position.y, position.z = pose[:3]
    orientation.x, orientation.y, orientation.z, orientation.w = quaternion_from_rotvec(pose[3:])


def _pose_of(message: PoseMessage) -> Pose:
    position, orientation = message.position, message.orientation
    quaternion = (orientation.x, orientation.y, orientation.z, orientation.w)
    try:
        rotvec = rotvec_from_quaternion(quaternion)
    except ValueError as error:
        raise SafetyError(f"move refused: target: {error}") from error
    return (position.x, position.y, position.z, *rotvec)


def main() -> int:
    """Entry point of the executable `robot`."""
    return run(RobotNode)


if __name__ == "__main__":
    sys.exit(main())
