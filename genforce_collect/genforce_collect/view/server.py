"""Rerun's web viewer and the server of its data, as one child process on loopback, and the page."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import urllib.parse
from pathlib import Path

from genforce_collect.errors import ConfigError, DeviceError
from genforce_collect.processes import end_with_parent
from genforce_collect.view.page import PageServer

HOST = "127.0.0.1"
MEMORY = "512MB"  # of the server: about 20 minutes of a collection to scrub back through
STARTUP_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0


class ViewServer:
    """Serves a page at `address` and takes data at `data_address`; ends with this object.

    The library itself would serve on all interfaces; its command can be told to stay on loopback.
    """

    def __init__(self, port: int) -> None:
        """`port` is that of the page, the one above it that of the data. Raises `ConfigError`
        where one is taken, `DeviceError` where the server does not come up."""
        self.data_address = f"rerun+http://{HOST}:{port + 1}/proxy"
        quoted = urllib.parse.quote(self.data_address, safe="")
        self.address = f"http://{HOST}:{port}/?url={quoted}&hide_welcome_screen"
        for taken in (port, port + 1):
            _check_free(taken)
        inner = _free_port()
        command = _command()
        self._home = tempfile.TemporaryDirectory(prefix="genforce_view_")
        environment = os.environ | {"XDG_CONFIG_HOME": self._home.name}
        # Nobody's lab should report to anyone because somebody looked at it.
        subprocess.run(
            [command, "analytics", "disable"], env=environment, check=True, capture_output=True
        )
        self._process = subprocess.Popen(
            [
                *(command, "--serve-web", "--bind", HOST),
                *("--web-viewer-port", str(inner), "--port", str(port + 1)),
                *("--server-memory-limit", MEMORY),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )
        self._page: PageServer | None = None
        try:
            for awaited in (inner, port + 1):
                self._wait_for(awaited)
            self._page = PageServer(HOST, port, inner)
        except OSError as error:
            self.stop()
            raise DeviceError(f"live view: port {port} cannot be used ({error})") from error
        except DeviceError:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Process number of the server."""
        return self._process.pid

    def stop(self) -> None:
        """End the server."""
        if self._page is not None:
            self._page.stop()
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._home.cleanup()

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DeviceError(f"the server of the live view did not come up on port {port}")
            try:
                with socket.create_connection((HOST, port), timeout=1):
                    return
            except OSError:
                time.sleep(0.05)


def _command() -> str:
    """The server's executable; the console script of the same name would be a process more."""
    import rerun_cli

    return str(Path(str(rerun_cli.__file__)).with_name("rerun"))


def _free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"live view: port {port} cannot be used ({error}); choose another with --port or "
                f"the parameter 'port'"
            ) from error
