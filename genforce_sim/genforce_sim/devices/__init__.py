"""Protocol servers: what the unmodified device clients talk to on the virtual cell."""
