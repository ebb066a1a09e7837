"""A live force topic."""

from genforce_bringup.launching import describe


def generate_launch_description():
    return describe("infer")
