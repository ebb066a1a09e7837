"""Thin ROS 2 nodes: parameters, interfaces, callbacks."""
