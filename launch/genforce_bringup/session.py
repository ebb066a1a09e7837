"""Run a graph beside this process and drive its collection action: what collect and demo share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import rclpy
from rclpy.action import ActionClient
from rclpy.experimental import EventsExecutor
from rclpy.signals import SignalHandlerOptions

from genforce_bringup.graph import claim_cell, find_graph
from genforce_bringup.supervisor import LAST_WORDS_S, LEADERS_S
from genforce_collect.errors import DeviceError, GenforceError
from genforce_collect.nodes.common import (
    LATCHED_QOS,
    NAMESPACE,
    SPIN_TIMEOUT_S,
    await_answer,
    spin_until,
)
from genforce_collect.processes import end_with_parent
from genforce_msgs.action import CollectIndent
from genforce_msgs.msg import RecorderStatus

# A graph kills what does not end; killed itself, it would leave that behind, on its ports.
STOP_TIMEOUT_S = LEADERS_S + LAST_WORDS_S + 60.0
SERVER_TIMEOUT_S = 90.0  # the end of the graph is noticed before
DISCOVERY_TIMEOUT_S = 10.0  # for a graph that runs already
NOT_IN_TIME = "the collection action did not come up; see the graph's log"
NOBODY_COLLECTS = "no graph that collects is up; start one: genforce up collect_indent"
NOT_ANSWERED = "the collection action does not answer; see the graph's log"
ACCEPT_TIMEOUT_S = 10.0
CANCEL_TIMEOUT_S = 10.0


class RunningGraph:
    """`genforce up GRAPH …` as a child with its output in a log file; ends with this object.

    Raises `ConfigError` where cell, sensor or bundle are not what the graph takes, `DeviceError`
    where another graph drives the arm: that one would answer in place of this one.
    """

    def __init__(self, graph: str, arguments: Mapping[str, str], log: Path) -> None:
        claim_cell(find_graph(graph).processes(arguments), keep=False)
        self._log = log
        self._asked_to_end = False
        words = [f"{name}:={value}" for name, value in arguments.items()]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "genforce_bringup.cli", "up", graph, *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Its own session: Ctrl-C reaches this process first, which then ends the graph.
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def __enter__(self) -> RunningGraph:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raise `DeviceError` with what the graph said last if it has ended."""
        code = self._process.poll()
        if code is not None:
            why = why_ended(self._log.read_text(errors="replace"))
            raise DeviceError(f"{why} (exit code {code}; log: {self._log})")

    def end(self) -> None:
        """Ask all processes of the graph to end, and do not wait for it."""
        if not self._asked_to_end:
            self._asked_to_end = True
            self._process.terminate()

    def stop(self) -> None:
        """End all processes of the graph: politely, then for good."""
        self.end()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def why_ended(log: str) -> str:
    """Why a graph ended, by its log: the last error of the process whose end ended all, or of the
    command itself where nothing had begun."""
    lines = [line.partition("|") for line in log.splitlines()]
    errors = [
        ((head.split() or [""])[-1], (text or head).split("error:", 1)[1].strip())
        for head, _, text in lines
        if "error:" in (text or head)
    ]
    for _, _, text in lines:
        if text.endswith(": ending all"):
            label = text.split()[0]
            return next((e for who, e in reversed(errors) if who == label), text.strip())
    return errors[0][1] if errors else "the graph ended without a word"


class CollectClient:
    """Client of the `collect_indent` action of a graph: the one given, or, with None, one that was
    started before."""

    def __init__(self, graph: RunningGraph | None) -> None:
        self._graph = graph
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node(f"collect_client_{os.getpid()}", namespace=NAMESPACE)
        self._executor = EventsExecutor()
        self._executor.add_node(self._node)
        self._client = ActionClient(self._node, CollectIndent, "collect_indent")
        self.recorded = RecorderStatus()  # the newest
        self._node.create_subscription(
            RecorderStatus, "recorder/status", self._on_recorded, LATCHED_QOS
        )

    def _on_recorded(self, status: RecorderStatus) -> None:
        self.recorded = status

    def __enter__(self) -> CollectClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._client.destroy()
        self._node.destroy_node()
        self._executor.shutdown()
        rclpy.try_shutdown()

    def run(
        self, goal: CollectIndent.Goal, on_feedback: Callable[[CollectIndent.Feedback], None]
    ) -> CollectIndent.Result:
        """Send the goal and wait for its result; Ctrl-C cancels it, waits for the bag and raises
        `KeyboardInterrupt`.

        Raises `DeviceError` when the graph dies or the action server does not come up.
        """
        with interruptions() as interrupted:
            return self._run(goal, on_feedback, interrupted)

    def _run(
        self,
        goal: CollectIndent.Goal,
        on_feedback: Callable[[CollectIndent.Feedback], None],
        interrupted: threading.Event,
    ) -> CollectIndent.Result:
        deadline = time.monotonic() + (SERVER_TIMEOUT_S if self._graph else DISCOVERY_TIMEOUT_S)
        while not (
            self._client.server_is_ready() and await_answer(self._executor, self._node, "indenter")
        ):
            if interrupted.is_set():
                raise KeyboardInterrupt
            if self._graph:
                self._graph.check()
            if time.monotonic() > deadline:
                raise DeviceError(NOT_IN_TIME if self._graph else NOBODY_COLLECTS)
            self._executor.spin_once(timeout_sec=SPIN_TIMEOUT_S)
        sent = self._client.send_goal_async(
            goal, feedback_callback=lambda message: on_feedback(message.feedback)
        )
        # Only what has been accepted can be cancelled, so Ctrl-C waits for that.
        if not spin_until(self._executor, sent.done, ACCEPT_TIMEOUT_S):
            raise DeviceError(NOT_ANSWERED)
        handle = sent.result()
        if not handle.accepted:
            raise GenforceError("the collection was refused: another one is running")
        finished = handle.get_result_async()
        try:
            return self._wait(finished, interrupted).result
        except KeyboardInterrupt:
            handle.cancel_goal_async()
            spin_until(self._executor, finished.done, CANCEL_TIMEOUT_S)
            raise

    def _wait(self, future: Any, interrupted: threading.Event) -> Any:
        while not future.done():
            if interrupted.is_set():
                raise KeyboardInterrupt
            if self._graph:
                self._graph.check()
            elif not self._client.server_is_ready():
                raise DeviceError("the graph that collects has ended; its own output says why")
            self._executor.spin_once(timeout_sec=SPIN_TIMEOUT_S)
        return future.result()


@contextmanager
def interruptions() -> Iterator[threading.Event]:
    """Ctrl-C as an event to look at; `KeyboardInterrupt` at the end where nobody acted on it.

    Raised inside a callback of the executor, `KeyboardInterrupt` may come out of it as another
    error. And a shell has what a script starts in the background ignore SIGINT: nothing that moves
    an arm may.
    """
    came = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
    if came.is_set():
        raise KeyboardInterrupt
