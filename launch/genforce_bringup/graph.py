"""Which processes run together, with which parameters: the one description of every graph.

`launch/*.launch.py` turn it into launch_ros actions, `genforce up` into processes; neither knows
more about a node than what stands here.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from genforce_collect.config import load_cell, load_sensor
from genforce_collect.errors import ConfigError, DataError, DeviceError, SafetyError

NAMESPACE = "genforce"
VIRTUAL_STARTUP_S = 20.0
TOLD = frozenset(e.exit_code for e in (ConfigError, DataError, DeviceError, SafetyError))
RESTART_DELAY_S = 1.0
RESTARTS, RESTARTS_WITHIN_S = 5, 60.0  # a node that dies more often than that stays dead


@dataclass(frozen=True)
class Argument:
    """What a user may set on the command line as `name:=value`."""

    name: str
    default: str
    description: str


@dataclass(frozen=True)
class Process:
    """One executable of a package; `parameters` become ROS parameters, `arguments` its argv.

    `restart`: started again when it dies, for it neither moves the arm nor guards its motion.
    `leads`: ends before the others, which it needs to end well.
    """

    package: str
    executable: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    name: str = ""
    restart: bool = False
    leads: bool = False

    @property
    def label(self) -> str:
        """Unique name within a graph, for logs."""
        return self.name or self.executable


class Restarts:
    """Decides whether a process of a graph that ended is started again, or all others end too."""

    def __init__(self, processes: Iterable[Process]) -> None:
        self._deaths: dict[str, list[float]] = {p.label: [] for p in processes if p.restart}

    def allows(self, label: str, returncode: int, now: float | None = None) -> bool:
        """Call once an end; `now` is monotonic time (s)."""
        deaths = self._deaths.get(label)
        if deaths is None or returncode == 0:  # asked to end
            return False
        if not deaths and returncode in TOLD:  # its first start failed: that must be mended
            return False
        deaths.append(time.monotonic() if now is None else now)
        return sum(deaths[-1] - death < RESTARTS_WITHIN_S for death in deaths) <= RESTARTS


@dataclass(frozen=True)
class Graph:
    """A launchable set of processes."""

    name: str
    description: str
    arguments: tuple[Argument, ...]
    build: Callable[[Mapping[str, str]], list[Process]]

    def processes(self, given: Mapping[str, str]) -> list[Process]:
        """Processes for `given` arguments over the defaults. Raises `ConfigError`."""
        known = {argument.name: argument.default for argument in self.arguments}
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"{self.name}: unknown argument '{name}'; known are {', '.join(known)}"
                )
        values = known | dict(given)
        viewer = [_viewer(values)] if _switch(values.get(VIEW.name, "false"), VIEW.name) else []
        return [*self.build(values), *viewer]


def claim_cell(processes: Iterable[Process], keep: bool = True) -> None:
    """Keep the arm of these processes, if they drive one, to this process until it ends: two
    graphs would fight over robot and force sensor. Raises `DeviceError` where another has it.
    Without `keep`, only look.
    """
    for process in processes:
        if process.executable == "robot":
            host = load_cell(process.parameters["cell"]).robot.host
            # An abstract socket: no file is left behind, and the kernel frees it with the process.
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(f"\0genforce robot {host}")
            except OSError as error:
                claim.close()
                raise DeviceError(
                    f"robot {host} is driven by another graph on this machine; end that one first"
                ) from error
            if keep:
                claim.detach()
            claim.close()


CELL = Argument("cell", "virtual", "cell file, by name in config/cells or by path")
SENSOR = Argument("sensor", "array_1", "sensor file, by name in config/sensors or by path")
INDENTER = Argument("indenter", "sphere", "indenter on the tool, by name or path of a mesh")
PLAN = Argument(
    "plan",
    "",
    "of goals that name none: a file, press, press:DEPTH_MM, slide, random:COUNT:SEED; empty: the "
    "sensor's own",
)
VIEW = Argument("view", "false", "live view in the browser, on loopback: true or false")
SEED = Argument(
    "seed", "", "virtual cell only: instance of the sensor and noise; empty: the cell's own"
)
INFERENCE_INPUT = Argument(
    "input", "image", "what the estimator reads: image (segments itself), raw or markers"
)
PRESS = replace(PLAN, default="press")  # down to the sensor's plan.max_z_mm and up again
MARKERS_INPUT = replace(INFERENCE_INPUT, default="markers")  # the segmenter runs anyway


def _switch(text: str, name: str) -> bool:
    if text not in {"true", "false"}:
        raise ConfigError(f"'{name}' is true or false, found '{text}'")
    return text == "true"


def _virtual_cell(a: Mapping[str, str]) -> list[Process]:
    if load_cell(a["cell"]).simulation is None:
        raise ConfigError(
            f"cell '{a['cell']}' is not a virtual one: it has no 'simulation' section"
        )
    load_sensor(a["sensor"])
    names = ("cell", "sensor", "indenter", *(["seed"] if a["seed"] else []))
    arguments = tuple(text for name in names for text in (f"--{name}", a[name]))
    return [Process("genforce_sim", "virtual_cell", arguments=arguments)]


def _devices(a: Mapping[str, str]) -> list[Process]:
    """The drivers of a cell, with the virtual cell under them where the cell file is one."""
    cell = load_cell(a["cell"])
    sensor = load_sensor(a["sensor"])
    virtual = cell.simulation is not None
    # A virtual cell comes up beside its drivers; a real one must be there.
    patience = {"startup_wait_s": VIRTUAL_STARTUP_S} if virtual else {}
    driver = {"cell": a["cell"], **patience}
    processes = _virtual_cell(a) if virtual else []
    processes += [
        Process("genforce_collect", "robot", driver),
        Process("genforce_collect", "netft", driver),
    ]
    eye = "taxels" if sensor.kind == "taxels" else "camera"
    both = {**driver, "sensor": a["sensor"]}
    return [*processes, Process("genforce_collect", eye, both, restart=True)]


def _segmenter(a: Mapping[str, str]) -> Process:
    return Process("genforce_collect", "segmenter", {"sensor": a["sensor"]}, restart=True)


def _collect_indent(a: Mapping[str, str]) -> list[Process]:
    both = {"cell": a["cell"], "sensor": a["sensor"]}
    plan = {"plan": a["plan"]} if a.get("plan") else {}
    nodes = [
        *_devices(a),
        _segmenter(a),
        Process("genforce_collect", "recorder", {"sensor": a["sensor"]}, restart=True),
    ]
    # Its action appears last: where it is served, the cell is up.
    after = {"after": [node.executable for node in nodes if node.parameters]}
    return [*nodes, Process("genforce_collect", "indenter", both | plan | after, leads=True)]


def _estimator(a: Mapping[str, str]) -> Process:
    if not a["bundle"]:
        raise ConfigError("infer: 'bundle' is needed: bundle:=folder of an exported model")
    cell = load_cell(a["cell"])
    # A virtual cell shares the machine with the estimator, and says how late its data may be.
    age = {"stale_s": cell.limits.stale_s} if cell.simulation is not None else {}
    return Process(
        "genforce_infer",
        "force_estimator",
        {"sensor": a["sensor"], "bundle": a["bundle"], "input": a["input"], **age},
    )


def _infer(a: Mapping[str, str]) -> list[Process]:
    segmenter = [_segmenter(a)] if a["input"] == "markers" else []
    return [*_devices(a), *segmenter, _estimator(a)]


def _collect_and_infer(a: Mapping[str, str]) -> list[Process]:
    return [*_collect_indent(a), _estimator(a)]


def _replay(a: Mapping[str, str]) -> list[Process]:
    if not a["bag"]:
        raise ConfigError("replay: 'bag' is needed: bag:=folder of a recorded bag")
    try:
        rate = float(a["rate"])
    except ValueError as error:
        raise ConfigError(f"'rate' is a number, found '{a['rate']}'") from error
    if a["stamps"] not in ("original", "now"):
        raise ConfigError(f"'stamps' is original or now, found '{a['stamps']}'")
    parameters = {"bag": a["bag"], "rate": rate, "stamps": a["stamps"]}
    switches = {name: _switch(a[name], name) for name in ("loop", "paused", "clock")}
    return [Process("genforce_collect", "replay", parameters | switches)]


def _viewer(a: Mapping[str, str]) -> Process:
    return Process("genforce_collect", "viewer", {"sensor": a["sensor"]}, restart=True)


BAG = Argument("bag", "", "folder of the recorded bag to play")
RATE = Argument("rate", "1.0", "speed of the replay; 2 is twice as fast")
LOOP = Argument("loop", "false", "start again at the end: true or false")
PAUSED = Argument("paused", "false", "begin when replay/pause is called: true or false")
STAMPS = Argument("stamps", "original", "original, or now: moved to the time of the replay")
CLOCK = Argument("clock", "false", "publish the recorded time on /clock: true or false")
BUNDLE = Argument("bundle", "", "folder of the model bundle to serve")

GRAPHS = {
    graph.name: graph
    for graph in (
        Graph(
            "virtual_cell",
            "The virtual cell alone: protocol servers of robot, force sensor and camera.",
            (CELL, SENSOR, INDENTER, SEED),
            _virtual_cell,
        ),
        Graph(
            "collect_indent",
            "Drivers, segmenter, recorder and the indentation action.",
            (CELL, SENSOR, INDENTER, PLAN, SEED, VIEW),
            _collect_indent,
        ),
        Graph(
            "collect_force_depth",
            "The same for the force-depth curve of a gel: one press, recorded down and up.",
            (CELL, SENSOR, INDENTER, PRESS, SEED, VIEW),
            _collect_indent,
        ),
        Graph(
            "infer",
            "Drivers and the force estimator: a live force topic.",
            (CELL, SENSOR, INDENTER, SEED, BUNDLE, INFERENCE_INPUT, VIEW),
            _infer,
        ),
        Graph(
            "collect_and_infer",
            "Everything: collect with the force estimator running, to evaluate it live.",
            (CELL, SENSOR, INDENTER, SEED, BUNDLE, MARKERS_INPUT, VIEW),
            _collect_and_infer,
        ),
        Graph(
            "replay",
            "Play a bag back onto its topics.",
            (BAG, RATE, LOOP, PAUSED, STAMPS, CLOCK),
            _replay,
        ),
    )
}


def find_graph(name: str) -> Graph:
    """The graph of that name. Raises `ConfigError` naming the known ones."""
    if name not in GRAPHS:
        raise ConfigError(f"unknown graph '{name}'; known are {', '.join(GRAPHS)}")
    return GRAPHS[name]


def parse_assignments(words: list[str]) -> dict[str, str]:
    """`name:=value` words as a dict, as `ros2 launch` takes them. Raises `ConfigError`."""
    pairs = {}
    for word in words:
        name, found, value = word.partition(":=")
        if not found or not name:
            raise ConfigError(f"'{word}': expected name:=value")
        pairs[name] = value
    return pairs
