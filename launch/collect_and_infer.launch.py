"""Collect with the force estimator running."""

from genforce_bringup.launching import describe


def generate_launch_description():
    return describe("collect_and_infer")
