"""What the plan, the robot, the streams and the nodes are doing, in words."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

from genforce_collect.trajectory import Phase

RATE_WINDOW_NS = 2_000_000_000
HEALTH = ("ok", "warning", "error", "stale")  # levels of diagnostic_msgs, in their order
PHASE_NAMES = {phase: phase.name.lower().replace("_", " ") for phase in Phase}


@dataclass(frozen=True)
class Change:
    """A lane (the plan's phase, the robot, a node) went into another state."""

    stamp_ns: int
    lane: str
    state: str
    text: str  # what a person should read about it; empty where the state says it all
    level: str  # INFO, WARN or ERROR


class Overview:
    """Takes the slow messages; says what changed, how fast the streams are, and all as a page."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[str, str]] = {}
        self._changes: list[Change] = []
        self._counts: defaultdict[str, deque[tuple[int, int]]] = defaultdict(deque)
        self._device_lost: dict[str, int] = {}
        self._plan: Any = None
        self._recorder: Any = None
        self._inference: Any = None

    # --- messages -------------------------------------------------------------------------------

    def contact(self, stamp_ns: int, message: Any) -> None:
        """Take a genforce_msgs/Contact."""
        self._plan = message
        phase = Phase(message.phase)
        text, level = "", "INFO"
        if phase == Phase.INVALID:
            text, level = f"contact {message.index} broken off: {message.reason}", "WARN"
        self._change(stamp_ns, "contact", PHASE_NAMES[phase], text, level)

    def robot(self, stamp_ns: int, message: Any) -> None:
        """Take a genforce_msgs/RobotState."""
        state = "moving" if message.moving else "ready" if message.ready else "not ready"
        text = f"robot: {message.message}" if state == "not ready" else ""
        self._change(stamp_ns, "arm", state, text, "ERROR" if text else "INFO")

    def recorder(self, stamp_ns: int, message: Any) -> None:
        """Take a genforce_msgs/RecorderStatus."""
        before = sum(self._recorder.lost) if self._recorder is not None else 0
        self._recorder = message
        lost = sum(message.lost)
        state = "error" if message.error else "recording" if message.recording else "idle"
        if message.error:
            self._change(stamp_ns, "recording", state, f"recorder: {message.error}", "ERROR")
        elif lost > before:
            self._changes.append(
                Change(stamp_ns, "recording", state, f"{lost - before} messages lost", "ERROR")
            )
        else:
            self._change(stamp_ns, "recording", state, "", "INFO")

    def stream(self, stamp_ns: int, message: Any) -> None:
        """Take a genforce_msgs/StreamTimes."""
        counts = self._counts[message.topic]
        total = int(message.first_seq) + len(message.stamp_ns)
        if counts and total < counts[-1][1]:
            counts.clear()  # its producer was started again
        counts.append((stamp_ns, total))
        while stamp_ns - counts[0][0] > RATE_WINDOW_NS:
            counts.popleft()
        lost = int(message.device_lost)
        if lost > self._device_lost.get(message.topic, 0):
            text = f"{short(message.topic)}: {lost} samples lost between device and driver"
            self._changes.append(Change(stamp_ns, "", "", text, "ERROR"))
        self._device_lost[message.topic] = lost

    def inference(self, stamp_ns: int, message: Any) -> None:
        """Take a genforce_msgs/InferenceStatus."""
        self._inference = message
        level = "INFO" if not message.message else "WARN"
        state = message.message or ("contact" if message.in_contact else "no contact")
        self._change(stamp_ns, "estimator", state, "", level)

    def diagnostics(self, stamp_ns: int, message: Any) -> None:
        """Take a diagnostic_msgs/DiagnosticArray."""
        for status in message.status:
            level = status.level if isinstance(status.level, int) else status.level[0]
            text = "" if level == 0 else f"{status.name}: {status.message}"
            names = ("INFO", "WARN", "ERROR", "ERROR")
            lane = f"node/{re.sub('[^a-zA-Z0-9_]+', '_', status.name)}"
            self._change(stamp_ns, lane, HEALTH[level], text, names[level])

    # --- answers --------------------------------------------------------------------------------

    def take_changes(self) -> list[Change]:
        """What changed since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def rates(self) -> dict[str, float]:
        """Samples a second of each stream by its short name, as its producer counts them."""
        found = {}
        for topic, counts in self._counts.items():
            (first_ns, first), (last_ns, last) = counts[0], counts[-1]
            if last_ns > first_ns:
                found[short(topic)] = (last - first) / ((last_ns - first_ns) * 1e-9)
        return found

    def page(self) -> str:
        """The state as Markdown."""
        parts = [self._plan_text(), self._recorder_text(), self._inference_text()]
        rates = self.rates()
        if rates:
            lost = self._lost()
            parts.append("| stream | Hz | lost |\n|---|---|---|")
            parts[-1] += "".join(
                f"\n| {name} | {rate:.1f} | {lost.get(name, 0)} |"
                for name, rate in sorted(rates.items())
            )
        troubled = {lane: s for lane, s in self._states.items() if s[1]}
        parts += [f"**{lane}**: {text}" for lane, (_, text) in troubled.items()]
        return "\n\n".join(part for part in parts if part)

    # --- the rest -------------------------------------------------------------------------------

    def _change(self, stamp_ns: int, lane: str, state: str, text: str, level: str) -> None:
        if self._states.get(lane) != (state, text):
            self._states[lane] = (state, text)
            self._changes.append(Change(stamp_ns, lane, state, text, level))

    def _lost(self) -> dict[str, int]:
        lost = {short(topic): count for topic, count in self._device_lost.items()}
        if self._recorder is not None:
            for topic, count in zip(self._recorder.topics, self._recorder.lost, strict=True):
                lost[short(topic)] = lost.get(short(topic), 0) + int(count)
        return lost

    def _plan_text(self) -> str:
        plan = self._plan
        if plan is None or plan.phase == Phase.IDLE:
            return "## no contact in progress"
        phase = PHASE_NAMES[Phase(plan.phase)]
        done = plan.index + (plan.phase == Phase.DONE)
        bar = "█" * round(20 * done / max(1, plan.total))
        return (
            f"## contact {plan.index + 1} of {plan.total}: {phase}\n\n"
            f"`{bar:░<20}` {plan.sensor}, {plan.indenter}, {plan.depth * 1e3:.2f} mm deep"
        )

    def _recorder_text(self) -> str:
        if self._recorder is None:  # a bag does not hold what its recorder said
            return ""
        if not self._recorder.recording:
            return "not recording"
        recorder = self._recorder
        return (
            f"recording {recorder.duration:.0f} s, {recorder.bytes_written / 1e6:.0f} MB, "
            f"**{sum(recorder.lost)} lost**, {recorder.bytes_free / 1e9:.0f} GB free"
        )

    def _inference_text(self) -> str:
        if self._inference is None:
            return ""
        status = self._inference
        return (
            f"estimator {status.model_id}: {status.latency * 1e3:.1f} ms from capture, "
            f"**{status.dropped} of {status.frames_in}** frames without a force"
        )


def short(topic: str) -> str:
    """A topic without the namespace all share."""
    return topic.removeprefix("/genforce/")
