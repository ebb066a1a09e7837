"""A virtual uSkin: taxel counts as JSON over a websocket, as XELA's server sends them.

    {"message": 17, "time": 1760000000.125, "sensors": 1,
     "1": {"sensor": "1", "model": "XR1944", "taxels": 16, "data": "80E8,80E7,9286,..."}}

`data` holds x, y, z of every taxel in turn, 16-bit hexadecimal. The sensor samples more slowly than
the server sends, so most messages repeat the counts of the one before.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from genforce_collect.errors import DeviceError

REPEATS = 4  # messages a sample of the real sensor is sent in
BACKLOG_S = 2.5  # a client that stalls for less loses nothing
_IDLE_S = 0.1
_COUNT_LIMIT = 0xFFFF


class UskinServer:
    """Serves `sample()` -> (taxels, 3) counts to any number of clients until `close`.

    The fault methods may be called at any time from any thread.
    """

    def __init__(
        self,
        host: str,
        port: int,
        sample: Callable[[], NDArray[Any]],
        rate_hz: float = 100.0,
        repeats: int = REPEATS,
    ) -> None:
        """Open the port and start serving. Raises `DeviceError` where the port is in use."""
        self.sent = 0
        self._sample = sample
        self._rate_hz = rate_hz
        self._repeats = repeats
        self._frozen = self._stalled = False
        self._garble = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()  # guards the clients
        self._clients: set[queue.Queue[str]] = set()
        try:
            self._server = serve(self._serve_client, host, port, compression=None)
        except OSError as error:
            raise DeviceError(
                f"virtual uSkin: cannot listen on {host}:{port} ({error.strerror}): "
                f"stop what uses it or choose another port"
            ) from error
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("uskin-ws", self._server.serve_forever), ("uskin-pump", self._pump))
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> UskinServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up on all clients and free the port."""
        self._closed.set()
        self._server.shutdown()
        for thread in self._threads:
            thread.join()

    # --- faults -------------------------------------------------------------------------------

    def freeze(self, on: bool = True) -> None:
        """Repeat the last counts in every message."""
        self._frozen = on

    def stall(self, on: bool = True) -> None:
        """Keep the connections open and send nothing."""
        self._stalled = on

    def garble(self, messages: int) -> None:
        """Cut each of the next messages off in the middle."""
        self._garble = messages

    # --- serving ------------------------------------------------------------------------------

    def _pump(self) -> None:
        start = time.monotonic()
        data = ""
        for number in itertools.count():
            if self._closed.wait(max(0.0, start + number / self._rate_hz - time.monotonic())):
                return
            if not data or (number % self._repeats == 0 and not self._frozen):
                data = encode_counts(self._sample())
            if self._stalled:
                continue
            text = _message(number, data)
            if self._garble:
                self._garble -= 1
                text = text[: len(text) // 2]
            self.sent += 1
            with self._lock:
                for client in self._clients:
                    with contextlib.suppress(queue.Full):
                        client.put_nowait(text)

    def _serve_client(self, connection: ServerConnection) -> None:
        client: queue.Queue[str] = queue.Queue(round(BACKLOG_S * self._rate_hz))
        with self._lock:
            self._clients.add(client)
        try:
            while not self._closed.is_set():
                with contextlib.suppress(queue.Empty):
                    connection.send(client.get(timeout=_IDLE_S))
        except ConnectionClosed:
            return
        finally:
            with self._lock:
                self._clients.discard(client)


def encode_counts(counts: NDArray[Any]) -> str:
    """(taxels, 3) counts as comma-separated 16-bit hexadecimal; out of range is cut off."""
    return ",".join(f"{count:04X}" for count in np.clip(counts, 0, _COUNT_LIMIT).ravel().tolist())


def _message(number: int, data: str) -> str:
    taxels = (data.count(",") + 1) // 3
    sensor = {"sensor": "1", "model": "XR1944", "taxels": taxels, "data": data}
    return json.dumps({"message": number, "time": time.time(), "sensors": 1, "1": sensor})
