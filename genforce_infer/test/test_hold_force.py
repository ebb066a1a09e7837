from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rclpy
from geometry_msgs.msg import TwistStamped, WrenchStamped
from rclpy.experimental import EventsExecutor

from genforce_collect.nodes.common import NAMESPACE, spin_until, stream_qos
from genforce_infer.examples.hold_force import HoldForce

pytestmark = pytest.mark.live

RATE_HZ = 60.0
STIFFNESS_N_M = 3000.0
DELAY_FRAMES = 2


class Spring:
    """A gel that answers the commanded speed like a spring, two frames late."""

    def __init__(self, height_m: float) -> None:
        self.node = rclpy.create_node("spring", namespace=NAMESPACE)
        self.height_m = height_m
        self.speed = 0.0
        self.fz = [0.0] * (DELAY_FRAMES + 1)
        self.wrench = self.node.create_publisher(WrenchStamped, "array_1/wrench", stream_qos(60))
        self.node.create_subscription(TwistStamped, "robot/speed_command", self.move, 10)

    def move(self, twist: Any) -> None:
        self.speed = twist.twist.linear.z
        self.height_m += self.speed / RATE_HZ
        self.fz.append(min(0.0, STIFFNESS_N_M * self.height_m))
        self.send()

    def send(self) -> None:
        message = WrenchStamped()
        message.wrench.force.z = self.fz[-1 - DELAY_FRAMES]
        self.wrench.publish(message)


@pytest.fixture
def executor() -> Iterator[EventsExecutor]:
    rclpy.init(args=["--ros-args", "-p", "force_n:=2"])
    executor = EventsExecutor()
    yield executor
    executor.shutdown()
    rclpy.try_shutdown()


@pytest.mark.parametrize("height_m", [1e-3, -1.5e-3])
def test_it_settles_at_the_force_from_above_and_from_too_deep(
    executor: EventsExecutor, height_m: float
) -> None:
    spring, hold = Spring(height_m), HoldForce()
    executor.add_node(spring.node)
    executor.add_node(hold)
    assert spin_until(
        executor,
        lambda: (
            spring.wrench.get_subscription_count() > 0 and hold.command.get_subscription_count() > 0
        ),
        10,
    )
    spring.send()
    assert spin_until(executor, lambda: len(spring.fz) > 600, 20)
    settled = np.array(spring.fz[-120:])
    assert np.sqrt(np.mean((settled + 2.0) ** 2)) < 0.02
    for node in (spring.node, hold):
        node.destroy_node()
