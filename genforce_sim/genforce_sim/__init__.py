"""The virtual cell and the simulated sensor: elastomer contact, optics, protocol servers."""
