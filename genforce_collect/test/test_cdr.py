"""Serialised messages read and stamped without message objects, against those of rclpy."""

from __future__ import annotations

import pytest
from geometry_msgs.msg import PoseStamped, WrenchStamped
from rclpy.serialization import deserialize_message, serialize_message

from genforce_collect.cdr import doubles_of, set_stamp, stamp_of
from genforce_collect.nodes.common import from_stamp, to_stamp

STAMP_NS = 1_700_000_000_123_456_789
FRAMES = pytest.mark.parametrize("frame_id", ["", "a", "sensor", "seven77", "eight888"])


@FRAMES
def test_a_wrench_is_read_behind_a_header_of_any_length(frame_id):
    message = WrenchStamped()
    message.header.frame_id = frame_id
    message.header.stamp = to_stamp(STAMP_NS)
    numbers = (1.0, -2.0, 3.0, 0.1, -0.2, 0.3)
    force, torque = message.wrench.force, message.wrench.torque
    force.x, force.y, force.z, torque.x, torque.y, torque.z = numbers
    data = serialize_message(message)
    assert stamp_of(data) == STAMP_NS
    assert doubles_of(data, 6) == numbers
    assert doubles_of(data, 3) == numbers[:3]


@FRAMES
def test_another_stamp_changes_nothing_else(frame_id):
    message = PoseStamped()
    message.header.frame_id = frame_id
    message.pose.position.x, message.pose.orientation.w = 0.25, 0.5
    data = bytearray(serialize_message(message))
    set_stamp(data, STAMP_NS)
    stamped = deserialize_message(bytes(data), PoseStamped)
    assert from_stamp(stamped.header.stamp) == STAMP_NS
    assert (stamped.header.frame_id, stamped.pose) == (frame_id, message.pose)
    assert doubles_of(data, 7) == (0.25, 0, 0, 0, 0, 0, 0.5)
