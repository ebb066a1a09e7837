"""What all child processes share."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

# In the environment of what ends last: SIGINT, which ros2 launch sends to all at once, is ignored.
ENDS_LAST = "GENFORCE_ENDS_LAST"


def end_with_parent() -> None:
    """For a child before it does anything else: a killed parent leaves nothing behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def local_workers() -> AbstractContextManager[Any]:
    """While it is entered, joblib works in processes of one thread each that end with this one."""
    import joblib  # only where work is shared out

    return joblib.parallel_config("loky", inner_max_num_threads=1, initializer=end_with_parent)


def call_at_end(end: Callable[[], object]) -> None:
    """For the main thread: call `end` on SIGTERM, and on SIGINT unless `ENDS_LAST` is set."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: end())
    if ENDS_LAST in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
