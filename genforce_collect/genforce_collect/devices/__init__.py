"""Drivers of real devices; their virtual twins stand in genforce_sim.devices."""
