"""Runs the processes of a graph side by side: tells whose each line is, starts again what may be
started again, and ends all when one of the others ends.

The leaders of a graph end first, while what they need is still there: the tip is out of the gel and
the bag is closed before robot and recorder go.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from genforce_bringup.graph import RESTART_DELAY_S, Process, Restarts
from genforce_collect.processes import end_with_parent

LEADERS_S = 12.0  # for a retreat and a bag to be closed
LAST_WORDS_S = 5.0  # between SIGTERM and SIGKILL
LONGEST_LINE = 2**20
RELAY_S = 0.5  # for what a process said last


class Supervisor:
    """One run of a graph. `commands` are the argument vectors of its `processes`."""

    def __init__(self, processes: Sequence[Process], commands: Sequence[Sequence[str]]) -> None:
        self._commands = {p.label: c for p, c in zip(processes, commands, strict=True)}
        self._leaders = {process.label for process in processes if process.leads}
        self._restarts = Restarts(processes)
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._ending = asyncio.Event()
        self._returncode = 0
        self._width = max(map(len, self._commands))

    async def run(self) -> int:
        """Run until SIGINT, SIGTERM, SIGHUP or the end of a process that is not started again,
        whose exit code it returns."""
        loop = asyncio.get_running_loop()
        signums = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            signums.append(signal.SIGHUP)
        for signum in signums:
            loop.add_signal_handler(signum, self._end, 128 + signum, f"{signum.name} received")
        tasks = {label: loop.create_task(self._keep(label)) for label in self._commands}
        await self._ending.wait()
        self._signal(self._leaders, signal.SIGTERM)
        await _ended((tasks[label] for label in self._leaders), LEADERS_S)
        self._signal(tasks, signal.SIGTERM)
        await _ended(tasks.values(), LAST_WORDS_S)
        self._signal(tasks, signal.SIGKILL)
        await asyncio.gather(*tasks.values())
        return self._returncode

    async def _keep(self, label: str) -> None:
        """Run a process, and again as long as it may be started again."""
        while not self._ending.is_set():
            code = await self._run_once(label)
            if self._ending.is_set():
                self._say("", f"{label} ended (exit code {code})")
            elif self._restarts.allows(label, code):
                self._say("", f"{label} died (exit code {code}): starting it again")
                with suppress(asyncio.TimeoutError):  # not the built-in one before Python 3.11
                    await asyncio.wait_for(self._ending.wait(), RESTART_DELAY_S)
            else:
                self._end(code, f"{label} ended (exit code {code}): ending all")

    async def _run_once(self, label: str) -> int:
        process = await asyncio.create_subprocess_exec(
            *self._commands[label],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=_environment(),
            limit=LONGEST_LINE,
            start_new_session=True,  # Ctrl-C reaches this process, which then ends the others
            preexec_fn=end_with_parent,
        )
        self._running[label] = process
        assert process.stdout is not None
        relay = asyncio.create_task(self._relay(label, process.stdout))
        with suppress(ProcessLookupError):
            await _end_of(process.pid)
            os.killpg(process.pid, signal.SIGKILL)  # what it started is not to outlive it
        code = await process.wait()
        del self._running[label]
        await asyncio.wait([relay], timeout=RELAY_S)
        relay.cancel()
        return code

    async def _relay(self, label: str, lines: asyncio.StreamReader) -> None:
        async for line in lines:
            self._say(label, line.decode(errors="replace").rstrip("\n"))

    def _end(self, returncode: int, why: str) -> None:
        if not self._ending.is_set():
            self._returncode = returncode
            self._ending.set()
        self._say("", why)

    def _signal(self, labels: Iterable[str], signum: signal.Signals) -> None:
        for label in labels:
            if process := self._running.get(label):
                with suppress(ProcessLookupError):
                    process.send_signal(signum)

    def _say(self, label: str, text: str) -> None:
        head = f"{time.strftime('%H:%M:%S')} {label or 'graph':{self._width}} | "
        if sys.stdout.isatty():
            colour = 31 + [*self._commands, ""].index(label) % 6
            head = f"\033[{colour}m{head}\033[0m"
        try:
            print(f"{head}{text}", flush=True)
        except OSError:  # the terminal is closed, or the reader of a pipe ended first
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, sys.stdout.fileno())
            os.close(silence)


async def _ended(tasks: Iterable[asyncio.Task[None]], timeout_s: float) -> None:
    if waiting := list(tasks):
        await asyncio.wait(waiting, timeout=timeout_s)


async def _end_of(pid: int) -> None:
    """Wait for the end of a process; asyncio's own `wait` would also wait for all that hold its
    output open, such as its children. Raises ProcessLookupError where it is gone already."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    descriptor = os.pidfd_open(pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _environment() -> dict[str, str]:
    # One process a core's worth of threads each would fight over two cores.
    return os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
