"""What there is to see of a cell."""

from __future__ import annotations

WRENCH = "geometry_msgs/msg/WrenchStamped"


def topics(sensor: str) -> dict[str, str]:
    """Message type by topic; what a graph does not publish is not shown."""
    return {
        "/genforce/netft/wrench": WRENCH,
        f"/genforce/{sensor}/wrench": WRENCH,
        "/genforce/robot/tcp_pose": "geometry_msgs/msg/PoseStamped",
        f"/genforce/{sensor}/image/compressed": "sensor_msgs/msg/CompressedImage",
        f"/genforce/{sensor}/markers": "genforce_msgs/msg/Markers",
        "/genforce/contact": "genforce_msgs/msg/Contact",
        "/genforce/robot/state": "genforce_msgs/msg/RobotState",
        "/genforce/stream_times": "genforce_msgs/msg/StreamTimes",
        "/genforce/recorder/status": "genforce_msgs/msg/RecorderStatus",
        f"/genforce/{sensor}/inference": "genforce_msgs/msg/InferenceStatus",
        "/diagnostics": "diagnostic_msgs/msg/DiagnosticArray",
    }
