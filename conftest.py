"""Shared by all tests: every run gets its own DDS domain and its own loopback addresses, so that
runs side by side do not see each other and the standard device ports are free."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

import pytest

# importlib mode names test modules after their folders; without this, those folders would stand in
# for the packages of the same name.
import genforce_collect  # noqa: F401
import genforce_infer  # noqa: F401
import genforce_sim  # noqa: F401
import genforce_train  # noqa: F401

ROOT = Path(__file__).resolve().parent

# 101 domains fit below Linux's ephemeral ports; 0 is left to people.
os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ.setdefault("GENFORCE_CONFIG_PATH", str(ROOT / "launch" / "config"))
os.environ.setdefault("MPLBACKEND", "Agg")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start is to hear Ctrl-C

_hosts = itertools.count(2)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Once all is reported, end at once: a participant that a failed test has left makes Fast DDS
    wait in its destructors for ever."""

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(session.exitstatus))

    session.config.add_cleanup(end)


@pytest.fixture
def loopback_host() -> str:
    """A loopback address no other test uses, so that standard ports are free on it."""
    process = os.getpid()
    return f"127.{1 + process // 200 % 250}.{1 + process % 200}.{next(_hosts)}"


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Folder of real recordings kept beside the project; tests that need it skip without it."""
    folder = ROOT.parent / "shared" / "realdata"
    if not folder.is_dir():
        pytest.skip("no real recordings beside the project")
    return folder
