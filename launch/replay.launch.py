"""Play a bag back onto its topics."""

from genforce_bringup.launching import describe


def generate_launch_description():
    return describe("replay")
