"""The virtual cell alone."""

from genforce_bringup.launching import describe


def generate_launch_description():
    return describe("virtual_cell")
