"""The viewer's page, passed on so that a browser that shows it asks nothing beyond loopback.

Rerun's own page has a browser ask for fonts, examples, news and usage statistics elsewhere. What is
passed on leaves the fonts' links out and forbids the rest by a content security policy.
"""

from __future__ import annotations

import http.client
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TIMEOUT_S = 10.0
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "connect-src 'self' data: blob: http://127.0.0.1:* http://localhost:*",
    ]
)
_PASSED_ON = ("Content-Type", "Content-Length", "Content-Encoding", "rerun-final-length")
_LINK_ELSEWHERE = re.compile(rb"<link[^>]*https?://[^>]*>")


class PageServer:
    """Serves at a host and port, in a thread, what the viewer serves at another port of the host.
    Raises `OSError` where the port is taken."""

    def __init__(self, host: str, port: int, inner_port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                inner = http.client.HTTPConnection(host, inner_port, timeout=TIMEOUT_S)
                try:
                    inner.request("GET", self.path)
                    answer = inner.getresponse()
                    self._pass_on(answer)
                except (OSError, http.client.HTTPException):
                    self.close_connection = True  # the viewer, or who looked, is gone
                finally:
                    inner.close()

            def _pass_on(self, answer: http.client.HTTPResponse) -> None:
                headers = {name: value for name in _PASSED_ON if (value := answer.headers[name])}
                is_page = headers.get("Content-Type", "").startswith("text/html")
                page = _LINK_ELSEWHERE.sub(b"", answer.read()) if is_page else b""
                if is_page:
                    headers["Content-Length"] = headers["rerun-final-length"] = str(len(page))
                self.send_response(answer.status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Security-Policy", POLICY)
                self.end_headers()
                if is_page:
                    self.wfile.write(page)
                else:
                    shutil.copyfileobj(answer, self.wfile)

            def log_message(self, *_: object) -> None:
                """Nobody waits for a line a request."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
