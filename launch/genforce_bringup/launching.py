"""A graph as a launch description; the launch files are one call to `describe`.

At the end launch sends SIGINT to all processes at once, as does the terminal at Ctrl-C. Where some
lead, the others ignore it: SIGTERM ends them when the leaders have ended, as under `Supervisor`.
"""

from __future__ import annotations

import signal

from launch import Action, LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.events.process import ProcessExited, SignalProcess
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from genforce_bringup.graph import (
    NAMESPACE,
    RESTART_DELAY_S,
    Graph,
    Process,
    Restarts,
    claim_cell,
    find_graph,
)
from genforce_bringup.supervisor import LAST_WORDS_S, LEADERS_S
from genforce_collect.processes import ENDS_LAST


def describe(graph_name: str) -> LaunchDescription:
    """Launch description of a graph: its arguments, and a node for each of its processes."""
    graph = find_graph(graph_name)
    declared = [
        DeclareLaunchArgument(a.name, default_value=a.default, description=a.description)
        for a in graph.arguments
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_nodes, args=[graph])])


def _nodes(context: LaunchContext, graph: Graph) -> list[Node | RegisterEventHandler]:
    given = {a.name: LaunchConfiguration(a.name).perform(context) for a in graph.arguments}
    processes = graph.processes(given)
    claim_cell(processes)
    leaders = {process.label for process in processes if process.leads}
    labels = {
        _node(process, ends_last=bool(leaders) and not process.leads): process.label
        for process in processes
    }
    restarts = Restarts(processes)

    def is_ours(action: Action) -> bool:
        return action in labels

    def on_exit(event: ProcessExited, _: LaunchContext) -> list[EmitEvent]:
        label = labels[event.action]
        if restarts.allows(label, event.returncode):
            return []  # it comes back by itself, unless the shutdown comes before
        end = [Shutdown(reason=f"{label} ended")]
        if leaders == {label}:  # the last of them
            end.append(SignalProcess(signal_number=signal.SIGTERM, process_matcher=is_ours))
        leaders.discard(label)
        return [EmitEvent(event=event) for event in end]

    return [*labels, RegisterEventHandler(OnProcessExit(on_exit=on_exit))]


def _node(process: Process, ends_last: bool) -> Node:
    return Node(
        package=process.package,
        executable=process.executable,
        name=process.name or None,
        namespace=NAMESPACE,
        parameters=[dict(process.parameters)] if process.parameters else None,
        arguments=list(process.arguments),
        output="screen",
        respawn=process.restart,
        respawn_delay=RESTART_DELAY_S,
        additional_env={ENDS_LAST: "1"} if ends_last else {},
        sigterm_timeout=str(LEADERS_S),
        sigkill_timeout=str(LAST_WORDS_S),
    )
