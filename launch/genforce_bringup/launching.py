"""A graph as a launch description; the launch files are one call to `describe`."""

from __future__ import annotations

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.events.process import ProcessExited
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
    labels = {_node(process): process.label for process in processes}
    restarts = Restarts(processes)

    def on_exit(event: ProcessExited, _: LaunchContext) -> EmitEvent | None:
        label = labels[event.action]
        if restarts.allows(label, event.returncode):
            return None  # it comes back by itself, unless the shutdown comes before
        return EmitEvent(event=Shutdown(reason=f"{label} ended"))

    return [*labels, RegisterEventHandler(OnProcessExit(on_exit=on_exit))]


def _node(process: Process) -> Node:
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
    )
