"""The pictures of a demo: its forces, and the live view and reports in a browser without a screen.

    python docs/make_screenshots.py runs/demo              # all of them, into docs/images
    python docs/make_screenshots.py runs/demo -o /tmp/shots --only live_view

Needs the folder of a demo, Chromium (Debian: apt install chromium), and for the live view
requirements/view.txt. The browser draws on the CPU, so that any machine gives the same pictures.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from websockets.sync.client import connect

from genforce_collect.errors import ConfigError, GenforceError

IMAGES = Path(__file__).parent / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # Rerun draws with WebGL; without a GPU the browser must be told to do that on the CPU.
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
)
STARTUP_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 120.0  # a picture drawn on the CPU of a busy machine
SHOWN_TIMEOUT_S = 600.0  # for the live view to load its program and the data
SETTLE_TIMEOUT_S = 15.0  # for it to draw another moment
MARKERS, MOTION, PREDICTED = (90, 220, 90), (0, 180, 255), (70, 70, 230)  # BGR
SHOWN = {MARKERS: 200, MOTION: 100, PREDICTED: 200}  # pixels of each that a contact shows at least
TIMELINE_Y, TIMELINE_X = 883, range(500, 1150, 50)  # where the line of time can be clicked
FREE_PORT = 0


@dataclass
class Browser:
    """A page of a headless Chromium, driven by its debugging protocol."""

    socket: Any
    requests: dict[str, str] = field(default_factory=dict)  # address the page asked for, by number
    _number: Iterator[int] = field(default_factory=itertools.count)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Answer of a command of the protocol. Raises `GenforceError` where it is refused."""
        number = next(self._number)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = self._receive()
            if message.get("id") == number:
                if "error" in message:
                    raise GenforceError(f"browser: {method}: {message['error']['message']}")
                return dict(message["result"])

    def open(self, address: str, width: int, height: int, dark: bool = False) -> None:
        """Open an address in a window of that size (CSS px) and wait until it is loaded."""
        mobile = width < 600
        self.call("Network.enable")
        self.call("Page.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        while self.evaluate("document.readyState") != "complete":
            if time.monotonic() > deadline:
                raise GenforceError(f"browser: {address} did not load")
            time.sleep(0.1)

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    def screenshot(self) -> np.ndarray:
        """(H, W, 3) BGR uint8 of the window."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    def click(self, x: int, y: int) -> None:
        """Press and release the left button there (CSS px)."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def wait(self, seconds: float) -> None:
        """Let the page go on, and note what it asks for."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                self._receive(left)
            except TimeoutError:
                return

    @property
    def requested(self) -> list[str]:
        """Addresses the page asked for, but for those that its own policy stopped."""
        return list(self.requests.values())

    def _receive(self, timeout: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.socket.recv(timeout=timeout))
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests[parameters["requestId"]] = parameters["request"]["url"]
        elif method == "Network.loadingFailed" and parameters.get("blockedReason") == "csp":
            self.requests.pop(parameters["requestId"], None)
        return message


def find_browser() -> str:
    """Path of a Chromium. Raises `ConfigError` where there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise ConfigError("no Chromium found; install one (Debian: apt install chromium)")


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium of its own, ended afterwards."""
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                *(find_browser(), *FLAGS, f"--user-data-dir={profile}"),
                *(f"--remote-debugging-port={port}", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with connect(_page_socket(port), max_size=None) as channel:
                yield Browser(channel)
        finally:
            process.terminate()
            process.wait()


def _page_socket(port: int) -> str:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=2) as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            return str(pages[0]["webSocketDebuggerUrl"])
        except (OSError, IndexError) as error:
            if time.monotonic() > deadline:
                raise GenforceError("the browser did not come up") from error
            time.sleep(0.1)


def free_port() -> int:
    """A port of loopback that nobody listens on, nor on the one above it."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", FREE_PORT))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


# --- the pictures -------------------------------------------------------------------------------


@contextmanager
def viewing(bag: Path) -> Iterator[str]:
    """Address of the live view of a bag."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "genforce_bringup.cli", "view", str(bag), "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        if "http://" not in line:
            raise GenforceError(f"genforce view {bag} ended without an address")
        yield line[line.index("http://") :].strip()
    finally:
        process.terminate()
        process.wait()


def live_view(demo: Path, page: Browser) -> np.ndarray:
    """The live view of the demo's live collection, at the moment of most motion of those tried."""
    with viewing(demo / "live_bag") as address:
        page.open(address, 1400, 900)
        deadline = time.monotonic() + SHOWN_TIMEOUT_S
        while True:
            pictures = []
            for x in TIMELINE_X:
                page.click(x, TIMELINE_Y)
                pictures.append(settled(page))
            best = max(pictures, key=lambda picture: pixels(picture, MOTION))
            if shows(best, SHOWN):
                return best
            if time.monotonic() > deadline:
                raise GenforceError(f"the live view of {demo / 'live_bag'} shows no contact")


def settled(page: Browser) -> np.ndarray:
    """The window, once it has stopped to change."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    page.wait(2)
    picture = page.screenshot()
    while True:
        page.wait(1)
        before, picture = picture, page.screenshot()
        if np.array_equal(before, picture) or time.monotonic() > deadline:
            return picture


def pixels(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels of a picture have about that colour (BGR)."""
    return int((abs(picture.astype(int) - colour).max(axis=-1) <= 25).sum())


def shows(picture: np.ndarray, colours: Mapping[tuple[int, int, int], int]) -> bool:
    """Whether a picture has at least so many pixels of about each colour (BGR)."""
    return all(pixels(picture, colour) >= least for colour, least in colours.items())


def demo_force(demo: Path, _: Browser) -> np.ndarray:
    """The demo's own picture of its forces."""
    return cv2.imread(str(demo / "force.png"))


def report(demo: Path, page: Browser) -> np.ndarray:
    """The demo's report on a wide screen."""
    page.open(f"file://{(demo / 'report.html').resolve()}", 1200, 900)
    return page.screenshot()


def report_phone(demo: Path, page: Browser) -> np.ndarray:
    """The report of its live collection on a phone in the dark."""
    path = (demo / "live_bag_report" / "report.html").resolve()
    page.open(f"file://{path}", 390, 844, dark=True)
    return page.screenshot()


SCREENSHOTS: dict[str, Callable[[Path, Browser], np.ndarray]] = {
    "demo_force": demo_force,
    "live_view": live_view,
    "report": report,
    "report_phone": report_phone,
}


def main() -> int:
    """Take the screenshots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="folder of a demo")
    parser.add_argument("-o", "--out", type=Path, default=IMAGES, help="default: docs/images")
    parser.add_argument("--only", nargs="+", choices=[*SCREENSHOTS], default=[*SCREENSHOTS])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in args.only:
            with browser() as page:
                picture = SCREENSHOTS[name](args.demo, page)
            path = args.out / f"{name}.png"
            colours = Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
            colours.quantize(256).save(path, optimize=True)
            print(f"{path}: {picture.shape[1]}x{picture.shape[0]}, {path.stat().st_size} bytes")
    except GenforceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
