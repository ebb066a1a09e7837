"""Hold a normal force: press down while the live force is too small, back off while it is too big.

    python -m genforce_infer.examples.hold_force --ros-args -p sensor:=array_1 -p force_n:=2.0

The robot obeys a speed command for 0.1 s. As one is sent per wrench, the arm stands still as soon
as the estimator has nothing to say.
"""

import sys

from geometry_msgs.msg import TwistStamped, WrenchStamped
from rclpy.node import Node

from genforce_collect.nodes.common import NAMESPACE, declare, run, stream_qos

MAX_SPEED_M_S = 0.004


class HoldForce(Node):
    """Parameters: sensor; force_n to hold; gain (m/s per N)."""

    def __init__(self) -> None:
        super().__init__("hold_force", namespace=NAMESPACE)
        sensor = declare(self, "sensor", "array_1")
        self.target_n = declare(self, "force_n", 2.0)
        self.gain = declare(self, "gain", 1.0e-3)
        self.command = self.create_publisher(TwistStamped, "robot/speed_command", 10)
        self.create_subscription(WrenchStamped, f"{sensor}/wrench", self.act, stream_qos(60))

    def act(self, wrench: WrenchStamped) -> None:
        """Pressing gives Fz < 0, and the way down is z < 0, both in the sensor frame."""
        too_little_n = self.target_n + wrench.wrench.force.z
        speed = max(-MAX_SPEED_M_S, min(MAX_SPEED_M_S, -self.gain * too_little_n))
        twist = TwistStamped(header=wrench.header)
        twist.twist.linear.z = speed
        self.command.publish(twist)


def main() -> int:
    """Run the node."""
    return run(HoldForce)


if __name__ == "__main__":
    sys.exit(main())
