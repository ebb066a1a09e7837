"""ur_rtde's control interface in a process of its own.

The interface can wait for ever in a constructor that holds Python's global lock, and after a lost
link its own reconnection fights for the robot. In a child process neither matters: the child is
killed and the controller's watchdog stops the arm. A small process also meets the watchdog's
deadline on a busy host, where a node full of callbacks does not.

`ControlProcess` is the near side; the far side runs one command at a time, a JSON array a line:
`[number, method, *arguments]` on its stdin, `[number, result, error]` on its stdout. Every line
says that the near side lives: without one for `LEASE_S`, or at the end of stdin, the arm stops.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

from genforce_collect.errors import DeviceError

LEASE_S = 0.5
URGENT = -10  # nice value
STUCK_S = 20.0  # the far side ends itself when one command takes longer
START_S = 10.0
CALL_S = 8.0
END_S = 3.0  # to end the script: a controller that is gone never answers
SCRIPT_START_S = 5.0
STOP_DECELERATION = 2.0  # m/s^2


class ControlProcess:
    """Takes control of a robot: uploads ur_rtde's script, then runs `Controls` methods there.

    Not thread-safe. Raises DeviceError where control cannot be had.
    """

    def __init__(self, host: str, frequency_hz: float, kick_period_s: float) -> None:
        self._host = host
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, host, str(frequency_hz), str(kick_period_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # ur_rtde's own chatter
            start_new_session=True,  # Ctrl-C is for the parent, which stops the robot first
        )
        self._answer = b""
        try:
            self._wait(START_S)
        except BaseException:
            self.kill()
            raise

    def call(self, method: str, *arguments: Any, timeout_s: float = CALL_S) -> Any:
        """Result of one method of `Controls`. Raises DeviceError where it failed or hung; the
        process is of no more use then."""
        self._number += 1
        line = json.dumps([self._number, method, *arguments]).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError as error:
            raise DeviceError(f"robot {self._host}: the control process ended") from error
        return self._wait(timeout_s)

    def close(self) -> None:
        """Let the far side end the control script and disconnect."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(END_S + 1.0)
        except (OSError, subprocess.TimeoutExpired):
            self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def kill(self) -> None:
        """End it at once; the controller's watchdog stops the arm."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _wait(self, timeout_s: float) -> Any:
        """The answer to the newest command."""
        deadline = time.monotonic() + timeout_s
        while True:
            while b"\n" in self._answer:
                line, _, self._answer = self._answer.partition(b"\n")
                number, result, error = json.loads(line)
                if error is not None:
                    raise DeviceError(f"robot {self._host}: {error}")
                if number == self._number:
                    return result
            assert self._process.stdout is not None
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                raise DeviceError(f"robot {self._host} did not carry out a command in time")
            if not (data := os.read(self._process.stdout.fileno(), 1 << 16)):
                raise DeviceError(f"robot {self._host}: the control process ended")
            self._answer += data


class Controls:
    """What can be asked of the far side. Poses and twists are in the base frame (m, rad, s)."""

    def __init__(self, host: str, frequency_hz: float) -> None:
        from rtde_control import RTDEControlInterface

        self._rtde = RTDEControlInterface(host, frequency_hz)
        self._speeding = False
        self._leased = True
        self._watchdog_s = math.inf
        self._alive_at = time.monotonic()
        self._late = False

    def configure(
        self, tcp: list[float], payload_kg: float, cog_m: list[float], watchdog_hz: float
    ) -> bool:
        """Set tool and payload, and have the controller end the script without `keep_alive`."""
        self._watchdog_s = 1 / watchdog_hz
        return bool(
            self._rtde.setTcp(tcp)
            and self._rtde.setPayload(payload_kg, cog_m)
            and self._rtde.setWatchdog(watchdog_hz)
        )

    def beat(self) -> bool:
        """Renew the lease; tells whether this process was too late for the watchdog since."""
        late, self._late = self._late, False
        return late

    def keep_alive(self, leased: bool) -> None:
        """Keep the controller's watchdog quiet; stop the arm when the lease runs out."""
        now = time.monotonic()
        self._late |= now - self._alive_at > self._watchdog_s
        self._alive_at = now
        if not self._rtde.isProgramRunning():
            return
        if self._leased and not leased:
            self.stop(STOP_DECELERATION)
        self._leased = leased
        self._rtde.kickWatchdog()

    def move(self, target: list[float], speed: float, acceleration: float) -> int | None:
        """Begin a straight move; returns its operation number, or None where it was refused."""
        if not self._rtde.moveL(target, speed, acceleration, asynchronous=True):
            return None
        return int(self._rtde.getAsyncOperationProgressEx().operationId())

    def speed(self, twist: list[float], acceleration: float) -> bool:
        """Take on a twist and keep it."""
        self._speeding = bool(self._rtde.speedL(twist, acceleration))
        return self._speeding

    def stop(self, deceleration: float) -> None:
        """Begin to brake."""
        if self._speeding:
            self._speeding = False
            self._rtde.speedStop(deceleration)
        else:
            self._rtde.stopL(deceleration, asynchronous=True)

    def settled(self) -> bool:
        """No move or stop is under way."""
        return not self._rtde.getAsyncOperationProgressEx().isAsyncOperationRunning()

    def reupload(self) -> bool:
        """Send the control script again, after it ended; returns whether it runs."""
        self._speeding = False
        self._rtde.reuploadScript()
        deadline = time.monotonic() + SCRIPT_START_S
        while not self._rtde.isProgramRunning():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def end(self) -> None:
        """Brake, and end the script."""
        if self._rtde.isProgramRunning():
            self.stop(STOP_DECELERATION)
            self._rtde.stopScript()


def main() -> int:
    """The far side: `python -m genforce_collect.devices.ur_control HOST HZ KICK_PERIOD_S`."""
    host, frequency_hz, kick_period_s = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # ur_rtde writes to stdout
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # not allowed everywhere
        os.setpriority(os.PRIO_PROCESS, 0, URGENT)

    def answer(number: int, result: Any = None, error: str | None = None) -> None:
        answers.write(json.dumps([number, result, error]) + "\n")
        answers.flush()

    faulthandler.dump_traceback_later(STUCK_S, exit=True)  # works while the global lock is held
    try:
        controls = Controls(host, frequency_hz)
    except RuntimeError as error:
        answer(0, error=" ".join(str(error).split()))
        return 1
    answer(0)
    asked = b""
    asked_at = time.monotonic()
    with contextlib.suppress(BrokenPipeError):
        while True:
            faulthandler.dump_traceback_later(STUCK_S, exit=True)
            if select.select([0], [], [], kick_period_s)[0]:
                if not (data := os.read(0, 1 << 16)):
                    break
                asked += data
                asked_at = time.monotonic()
            *lines, asked = asked.split(b"\n")
            for line in lines:
                number, method, *arguments = json.loads(line)
                try:
                    answer(number, getattr(controls, method)(*arguments))
                except RuntimeError as error:
                    answer(number, error=" ".join(str(error).split()))
            controls.keep_alive(leased=time.monotonic() - asked_at < LEASE_S)
    faulthandler.dump_traceback_later(END_S, exit=True)
    controls.end()
    os._exit(0)  # ur_rtde's destructor would wait half a second for nothing


if __name__ == "__main__":
    sys.exit(main())
