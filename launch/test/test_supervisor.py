"""Processes of a graph: started again where they may be, ended together, the leaders first."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from genforce_bringup.graph import RESTARTS, RESTARTS_WITHIN_S, Process, Restarts
from genforce_bringup.supervisor import Supervisor

pytestmark = pytest.mark.live

CAMERA = Process("p", "camera", restart=True)
ROBOT = Process("p", "robot")
LEADER = Process("p", "indenter", leads=True)
KILLED, TRACEBACK, DEVICE_ERROR = -signal.SIGKILL, 1, 3


def script(text: str) -> list[str]:
    return [sys.executable, "-c", f"import os, pathlib, signal, sys, time\n{text}"]


def run(processes: Sequence[Process], *scripts: str) -> int:
    async def supervised() -> int:
        return await Supervisor(processes, [script(text) for text in scripts]).run()

    return asyncio.run(asyncio.wait_for(supervised(), 60))


# --- the decision ---


@pytest.mark.parametrize("code", [KILLED, -signal.SIGSEGV, TRACEBACK])
def test_what_neither_moves_nor_guards_the_arm_is_started_again(code: int):
    assert Restarts([CAMERA]).allows("camera", code)


@pytest.mark.parametrize("code", [0, DEVICE_ERROR, KILLED, TRACEBACK])
def test_a_robot_node_is_never_started_again(code: int):
    assert not Restarts([CAMERA, ROBOT]).allows("robot", code)


def test_a_node_that_says_at_its_start_what_to_mend_stays_down():
    assert not Restarts([CAMERA]).allows("camera", DEVICE_ERROR)
    restarts = Restarts([CAMERA])
    assert restarts.allows("camera", KILLED)
    assert restarts.allows("camera", DEVICE_ERROR), "it was up before: the device may return"


def test_a_node_that_dies_again_and_again_stays_down():
    restarts = Restarts([CAMERA])
    assert all(restarts.allows("camera", KILLED, now=float(i)) for i in range(RESTARTS))
    assert not restarts.allows("camera", KILLED, now=RESTARTS_WITHIN_S - 1)
    assert restarts.allows("camera", KILLED, now=3 * RESTARTS_WITHIN_S), "once in a while is fine"


# --- the processes ---


def test_a_killed_process_comes_back_and_the_others_do_not_notice(tmp_path: Path):
    camera = (
        f"starts = pathlib.Path({str(tmp_path / 'starts')!r})\n"
        "starts.open('a').write('x')\n"
        "if len(starts.read_text()) < 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)"
    )
    robot = f"time.sleep(5); sys.exit(len(open({str(tmp_path / 'starts')!r}).read()))"
    assert run([CAMERA, ROBOT], camera, robot) == 3


def test_the_end_of_one_that_is_not_started_again_ends_all_with_its_code(tmp_path: Path):
    died = tmp_path / "ended"
    camera = (
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(died)!r}, 'w'), sys.exit(0)))\n"
        "time.sleep(60)"
    )
    assert run([CAMERA, ROBOT], camera, "time.sleep(1); sys.exit(7)") == 7
    assert died.exists(), "it was asked to end, not killed"


def test_the_leader_ends_before_what_it_needs(tmp_path: Path):
    note = (
        f"order = {str(tmp_path / 'order')!r}\n"
        "def end(*_):\n"
        "    time.sleep({delay}); open(order, 'a').write('{name} '); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "time.sleep(60)"
    )
    leader, robot = note.format(delay=1.0, name="leader"), note.format(delay=0, name="robot")
    run([CAMERA, ROBOT, LEADER], "time.sleep(1.5); sys.exit(3)", robot, leader)
    assert (tmp_path / "order").read_text().split() == ["leader", "robot"]


def test_a_process_that_does_not_end_is_killed():
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    began = time.monotonic()
    assert run([CAMERA, ROBOT], stubborn, "time.sleep(1); sys.exit(7)") == 7
    assert time.monotonic() - began < 20


def test_what_a_killed_process_had_started_ends_with_it(tmp_path: Path):
    note = tmp_path / "pid"
    robot = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run([ROBOT], robot) == KILLED
    child = int(note.read_text())
    _, alive = psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], 10)
    assert not alive


def start(child: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A supervisor in a process of its own, and its child, which prints its pid first."""
    text = (
        "import asyncio, sys\nfrom genforce_bringup.graph import Process\n"
        "from genforce_bringup.supervisor import Supervisor\n"
        f"argv = {script(child)!r}\n"
        "sys.exit(asyncio.run(Supervisor([Process('p', 'one')], [argv]).run()))"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert supervisor.stdout is not None
    return supervisor, psutil.Process(int(supervisor.stdout.readline().split("|")[1]))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_graph_ends_in_order_although_nobody_reads_its_output(tmp_path: Path, signum: int):
    """Ctrl-C ends the reader of `genforce up ... | tee log` too; a closed terminal sends SIGHUP."""
    asked = tmp_path / "asked"
    supervisor, child = start(
        f"signal.signal(signal.SIGTERM, lambda *_: (print('last words'), time.sleep(0.5),\n"
        f"    pathlib.Path({str(asked)!r}).touch(), sys.exit(0)))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    assert supervisor.stdout is not None
    supervisor.stdout.close()
    supervisor.send_signal(signum)
    assert supervisor.wait(20) == 128 + signum
    assert asked.exists(), "it had the time to end by itself"
    assert not child.is_running()


def test_what_processes_say_to_nobody_does_not_hold_them_up(tmp_path: Path):
    done = tmp_path / "done"
    supervisor, _ = start(
        "print(os.getpid(), flush=True)\n"
        "time.sleep(1)\n"
        "for _ in range(5000): print('x' * 100)\n"
        f"pathlib.Path({str(done)!r}).touch()"
    )
    assert supervisor.stdout is not None
    supervisor.stdout.close()
    supervisor.wait(20)
    assert done.exists()


def test_a_killed_supervisor_leaves_nothing_behind():
    supervisor, child = start("print(os.getpid(), flush=True); time.sleep(60)")
    supervisor.kill()
    supervisor.wait()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()
