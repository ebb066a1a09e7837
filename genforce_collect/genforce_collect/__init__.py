"""Devices, marker segmentation, indentation plans, guard, clock and bags."""
