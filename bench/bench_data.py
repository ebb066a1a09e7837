"""Data sets: how fast frames load, what building costs, and how true joined labels are.

Loading reads frames of random markers from the packed cache in random order, on two threads with
the memory settings of training. In turn with it works a reader of one file a frame, as the
published code reads them: `numpy.load` of the frame's `.npy` (in the page cache),
`numpy.unpackbits` to 480x640, OpenCV's shrinking by area to 120x160, a float tensor; on one thread.

Building and joining use a bag of a collection on the virtual cell, recorded by the nodes of a real
one; what the cell simulated is the truth. A frame's stamp is compared with the instant its camera
looked, its joined force with the gel's at that instant.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from rows import Row

from genforce_bringup.session import CollectClient, RunningGraph
from genforce_collect.bags import BagReader
from genforce_collect.config import find_config, load_cell
from genforce_collect.layout import Contact, ContactKey, Layout, pack, read_mask, unpack
from genforce_infer.preprocess import area_average
from genforce_msgs.action import CollectIndent
from genforce_train.build import BagContents, build, join
from genforce_train.cache import Cache, open_layout, write_cache
from genforce_train.lag import find_lag
from genforce_train.memory import keep_freed_memory

CONTACTS, FRAMES = 8, 250
BATCH = 125
ONE_FILE_FRAMES = 256
PASSES = 7
PRESSES = 10
SHIFTS_S = (-0.05, -0.02, 0.0, 0.02, 0.05)
LEAST_WHOLE = 3  # what a machine with much else to do breaks off says nothing of the join
HOST = "127.51.9"
CELL_STARTUP_S = 30.0


def bench() -> list[Row]:
    """Loader, build and join."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        return [*_loading(folder / "data"), *_joining(folder)]


# --- loading --------------------------------------------------------------------------------------


def _loading(root: Path) -> list[Row]:
    layout = Layout(root)
    rng = np.random.default_rng(0)
    for number in range(CONTACTS):
        layout.write(_contact(number, rng))
    layout.write_reference("s", pack(np.zeros((480, 640))))
    cache = open_layout(root)
    paths = [path for key in cache.keys for path in layout.frame_paths(key)][:ONE_FILE_FRAMES]
    keep_freed_memory()
    one_file_s, packed_s = [], []
    with ThreadPoolExecutor(2) as pool:
        _one_by_one(paths)
        _pass(cache, pool, rng)
        before = _own_memory_mb()
        for _ in range(PASSES):
            one_file_s.append(_seconds(lambda: _one_by_one(paths)) / len(paths))
            packed_s.append(_seconds(lambda: _pass(cache, pool, rng)) / cache.frames)
        growth = _own_memory_mb() - before
    one_file, packed = (1 / float(np.median(times)) for times in (one_file_s, packed_s))
    return [
        Row(
            "data: frames loaded to float tensors at 120x160, 2 threads",
            packed,
            "1/s",
            goal=">= 20000",
            baseline=one_file,
            ratio=packed / one_file,
        ),
        Row(
            "data: loading against one file a frame",
            packed / one_file,
            "times",
            goal=">= 20",
        ),
        Row(f"data: memory that {PASSES} more passes take", growth, "MB", goal="<= 10"),
    ]


def _pass(cache: Cache, pool: ThreadPoolExecutor, rng: np.random.Generator) -> None:
    """Every frame once, in batches of a random order, each thread on its half of them."""
    batches = rng.permutation(cache.frames).reshape(2, -1, BATCH)

    def load(share: np.ndarray) -> None:
        for rows in share:
            torch.from_numpy(cache.images(rows))

    for _ in pool.map(load, batches):
        pass


def _one_by_one(paths: list[Path]) -> None:
    for path in paths:
        torch.from_numpy(area_average(unpack(read_mask(path)), (120, 160)))


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _own_memory_mb() -> float:
    """Memory of this process without the pages of files it maps."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _contact(number: int, rng: np.random.Generator) -> Contact:
    bits = pack(rng.random((FRAMES, 480, 640), dtype=np.float32) < 0.15)
    zero = np.zeros(FRAMES)
    return Contact(
        key=ContactKey("s", "sphere", number),
        bits=bits,
        wrench=np.zeros((FRAMES, 6)),
        pose=np.zeros((FRAMES, 6)),
        depth=zero,
        phase=np.full(FRAMES, 2, np.uint8),
        stamp_ns=np.arange(FRAMES),
        wrench_age=zero,
        pose_age=zero,
        flags=np.zeros(FRAMES, np.uint32),
    )


# --- building and joining -------------------------------------------------------------------------


def _joining(folder: Path) -> list[Row]:
    bag, truth = _collect(folder)
    with BagReader(bag) as reader:
        seconds = (reader.span_ns[1] - reader.span_ns[0]) * 1e-9
    build([bag], folder / "warm")
    started = time.perf_counter()
    build([bag], folder / "built")
    speed = seconds / (time.perf_counter() - started)
    cache = open_layout(folder / "built")
    stamps, force = np.array(cache.array("stamp_ns")), np.array(cache.wrench[:, :3])
    true_ns, true_force = truth["time_ns"], truth["wrench"][:, :3]
    # Stamps in s from the first instant simulated: ns since 1970 do not fit a double.
    at, true_at = (stamps - true_ns[0]) * 1e-9, (true_ns - true_ns[0]) * 1e-9
    looked = true_at[truth["frame"]]
    nearest = abs(at[:, None] - looked).argmin(1)
    late = at - looked[nearest]
    expected = np.stack([np.interp(looked[nearest], true_at, axis) for axis in true_force.T], 1)
    at_stamp = np.stack([np.interp(at, true_at, axis) for axis in true_force.T], 1)
    return [
        Row("data: build against the bag's duration", speed, "times", goal=">= 5"),
        Row(
            "data: stamps of frames against the camera's instants, p99",
            float(np.percentile(abs(late), 99)) * 1e3,
            "ms",
            goal="<= 1",
        ),
        Row(
            "data: force error of the join alone, RMS", _rms(force - at_stamp), "N", goal="<= 0.02"
        ),
        Row("data: force error of labels, stamps included, RMS", _rms(force - expected), "N"),
        Row(
            "data: lag found of labels shifted by up to 50 ms, worst error",
            max(abs(_lag_error_s(bag, cache, shift_s)) for shift_s in SHIFTS_S) * 1e3,
            "ms",
            goal="<= 5",
        ),
    ]


def _lag_error_s(bag: Path, cache: Cache, shift_s: float) -> float:
    """Of the lag found where the wrench of a bag comes so much too late."""
    contents = BagContents.read(bag)
    stamps = np.asarray(contents.wrench.stamp_ns) + round(shift_s * 1e9)
    shifted = replace(contents, wrench=replace(contents.wrench, stamp_ns=stamps))
    joined = [join(shifted, attempt) for attempt in contents.attempts]
    sensors = {name: (cache.reference(name), *cache.rest(name)) for name in cache.sensors}
    with tempfile.TemporaryDirectory() as scratch:
        late = write_cache(Path(scratch) / "cache", joined, lambda: sensors)
        return find_lag(late, late.select()).best - shift_s


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt((error**2).mean()))


def _collect(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A bag, and what the cell simulated meanwhile."""
    settings = find_config("cells", "virtual").read_text().replace("127.0.0.", f"{HOST}.")
    cells = {"simulated": yaml.safe_load(settings), "recorded": yaml.safe_load(settings)}
    del cells["recorded"]["simulation"]  # or the graph would bring up a cell of its own
    for name, cell in cells.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(cell))
    goal = CollectIndent.Goal(
        sensor="array_1",
        indenter="sphere",
        contacts=list(range(PRESSES)),
        bag=str(folder / "bag"),
        execute_motion=True,
    )
    truth = folder / "truth.npz"
    with _cell(folder / "simulated.yaml", truth):
        arguments = {"cell": str(folder / "recorded.yaml"), "sensor": "array_1"}
        with (
            RunningGraph("collect_indent", arguments, folder / "graph.log") as graph,
            CollectClient(graph) as client,
        ):
            result = client.run(goal, lambda feedback: None)
    if result.contacts < LEAST_WHOLE:
        raise RuntimeError(f"collection ended: {result.message}")
    with np.load(truth, allow_pickle=False) as arrays:
        return folder / "bag", dict(arrays)


@contextmanager
def _cell(path: Path, truth: Path) -> Iterator[None]:
    load_cell(path)
    words = [sys.executable, "-m", "genforce_sim.cell", "--cell", str(path), "--truth", str(truth)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if "virtual cell" not in process.stdout.readline():
                raise RuntimeError("the virtual cell did not come up")
            yield
        finally:
            process.terminate()
            process.wait(CELL_STARTUP_S)
