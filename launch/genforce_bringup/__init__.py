"""Which nodes run together: graphs, launch files, configuration and the genforce command."""
