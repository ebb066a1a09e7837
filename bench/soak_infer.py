"""Serve 60 frames a second for an hour; once a minute a line with memory, latency and losses.

    python bench/soak_infer.py --minutes 60

writes runs/soak_infer.log and ends with 1 where memory grew by more than 5 MB after the first
minute or a frame went unanswered.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TextIO

import numpy as np
from bench_infer import MODELS, RATE_HZ, Rig, contact_frames, ms

LOG = Path(__file__).resolve().parent.parent / "runs" / "soak_infer.log"
MAX_GROWTH_MB = 5.0


def main() -> int:
    """Exit code 0 where nothing grew and nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--bundle", type=Path, default=MODELS / "array_1" / "bundle")
    args = parser.parse_args()
    os.environ["ROS_DOMAIN_ID"] = "101"  # tests and benchmarks draw theirs from 1 to 100
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as log, Rig(args.bundle, contact_frames()) as rig:
        lines = soak(rig, args.minutes, log)
    growth_mb = lines[-1] - lines[0]
    unanswered = rig.sent - rig.statuses[-1].frames_in if rig.statuses else rig.sent
    print(f"memory grew by {growth_mb:.1f} MB, {unanswered} frames unanswered; {LOG}")
    return int(growth_mb > MAX_GROWTH_MB or unanswered > 0)


def soak(rig: Rig, minutes: int, log: TextIO) -> list[float]:
    """Feed frames; memory (MB) after each minute."""
    memory = []
    for minute in range(minutes):
        if rig.statuses:
            del rig.statuses[:-1], rig.ages_ms[:]
        end = time.monotonic() + 60
        rig.feed(lambda end=end: time.monotonic() > end)
        memory.append(rig.memory_mb())
        latency = ms(rig.statuses, lambda s: s.latency)
        last = rig.statuses[-1]
        line = (
            f"{minute + 1:4d} min  {memory[-1]:7.1f} MB  p50 {np.percentile(latency, 50):6.2f} ms"
            f"  p99 {np.percentile(latency, 99):6.2f} ms  sent {rig.sent}"
            f"  answered {last.frames_in}  without wrench {last.dropped}  at {RATE_HZ:.0f} Hz"
        )
        print(line, file=log, flush=True)
        print(line, flush=True)
    return memory


if __name__ == "__main__":
    sys.exit(main())
