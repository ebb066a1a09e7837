"""What a collection shows while it runs."""

from __future__ import annotations

from genforce_bringup.collect import stream_line
from genforce_msgs.msg import RecorderStatus

TOPICS = ["/genforce/netft/wrench", "/genforce/array_1/image/compressed", "/genforce/robot/state"]


def test_rates_and_losses_of_each_stream_are_told_as_they_come():
    status = RecorderStatus(topics=TOPICS, rate=[999.6, 30.1, 10.0], lost=[0, 0, 0])
    assert stream_line(status) == (
        "netft/wrench 1000 Hz  array_1/image/compressed 30 Hz  lost: nothing"
    )
    status.lost = [3, 0, 1]
    assert stream_line(status).endswith("lost: netft/wrench 3, robot/state 1")


def test_nothing_is_told_before_anything_is_recorded():
    assert stream_line(RecorderStatus()) == ""
