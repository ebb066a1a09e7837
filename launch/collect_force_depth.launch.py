"""The force-depth press: drivers, segmenter, recorder and the indentation action."""

from genforce_bringup.launching import describe


def generate_launch_description():
    return describe("collect_force_depth")
