"""A packed, memory-mapped copy of labelled contacts: bits stay bits, any contact at once.

    <cache>/bits.npy      (frames, 38400) uint8     <cache>/index.json
    <cache>/<label>.npy   (frames, ...) one a field of `layout.Contact`
    <cache>/references.npy, rest_bits.npy, rest_wrench.npy
    <cache>/blocks.npy    (frames + frames at rest, 120, 160) uint8, their `block_counts`

It is built once from a layout folder, or from any stream of contacts (bags, simulation).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from genforce_collect.errors import DataError
from genforce_collect.layout import HEIGHT, NOT_FINITE, PACKED, WIDTH, Contact, ContactKey, Layout

FORMAT = 3
LABELS = {
    "wrench": (np.float64, (6,)),
    "pose": (np.float64, (6,)),
    "depth": (np.float64, ()),
    "phase": (np.uint8, ()),
    "stamp_ns": (np.int64, ()),
    "wrench_age": (np.float64, ()),
    "pose_age": (np.float64, ()),
    "flags": (np.uint32, ()),
}
UNSEEN_INDENTERS = ("sphere_s", "triangle", "pacman", "cone", "wave", "torus", "dots")
Progress = Callable[[str, int, int], None]
# Of each sensor by name: reference (38400,), rest frames (n, 38400) and their wrench (n, 6).
Sensors = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def silent(text: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


class Cache:
    """Random access to contacts, frames and references. Read-only; safe to share with workers."""

    def __init__(self, folder: str | Path) -> None:
        """Open a cache. Raises `DataError` where there is none or it is of another format."""
        self.folder = Path(folder)
        try:
            self._index = json.loads((self.folder / "index.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder}: not a data cache: {error}") from error
        if self._index.get("format") != FORMAT:
            raise DataError(f"{self.folder}: cache of another format; delete it, it is rebuilt")
        self.keys = [ContactKey(s, i, n) for s, i, n in self._index["keys"]]
        self.bounds = np.array(self._index["bounds"], np.int64)  # (contacts + 1,)
        self.problems: list[str] = self._index["problems"]  # contacts that were left out, and why
        self.sources: list[dict[str, Any]] = self._index["sources"]  # one a contact
        self._row = {key: row for row, key in enumerate(self.keys)}

    def __reduce__(self) -> tuple[type[Cache], tuple[Path]]:
        # A worker opens the files itself: memory maps would travel as copies of all they show.
        return Cache, (self.folder,)

    def __len__(self) -> int:
        """Number of contacts."""
        return len(self.keys)

    @property
    def frames(self) -> int:
        """Number of frames of all contacts."""
        return int(self.bounds[-1])

    @property
    def sensors(self) -> list[str]:
        """Sensors with a reference, in order."""
        return list(self._index["sensors"])

    @cached_property
    def bits(self) -> np.ndarray:
        """(frames, 38400) uint8, memory-mapped."""
        return self.array("bits")

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Frames of contacts, and after those the ones at rest, by number (k,) -> (k, 120, 160)
        float32: `genforce_infer.preprocess.area_average` of their marker images, exactly. Raises
        `IndexError` for numbers of none."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self._blocks)):
            raise IndexError(f"frames {rows.min()} to {rows.max()} of {len(self._blocks)}")
        images = np.empty((len(rows), *BLOCKS), np.float32)
        some = np.empty((AT_ONCE, *BLOCKS), np.uint8)
        for start in range(0, len(rows), AT_ONCE):
            image = images[start : start + AT_ONCE]
            counts = some[: len(image)]
            np.take(self._blocks, rows[start : start + AT_ONCE], 0, out=counts, mode="clip")
            np.copyto(image, counts)
            image *= SIXTEENTH
        return images

    @cached_property
    def _blocks(self) -> np.ndarray:
        return self.array("blocks")

    @cached_property
    def wrench(self) -> np.ndarray:
        """(frames, 6) N and N m, memory-mapped."""
        return self.array("wrench")

    def array(self, name: str) -> np.ndarray:
        """One of the cache's arrays, memory-mapped."""
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: damaged cache; delete {self.folder}: {error}") from error

    def require_finite_labels(self) -> None:
        """Raises `DataError` where contacts were left out for labels that are NaN or infinite: what
        else came of the program that wrote them may be wrong as well."""
        bad = [problem for problem in self.problems if NOT_FINITE in problem]
        if bad:
            more = f" (and {len(bad) - 1} more contacts)" if len(bad) > 1 else ""
            raise DataError(f"{bad[0]}{more}")

    def rows(self, contact: int) -> slice:
        """Frames of one contact."""
        return slice(int(self.bounds[contact]), int(self.bounds[contact + 1]))

    def contact(self, key: ContactKey) -> Contact:
        """One contact with all its fields."""
        row = self._row[key]
        labels = {name: np.array(self.array(name)[self.rows(row)]) for name in LABELS}
        return Contact(
            key=key,
            bits=np.array(self.bits[self.rows(row)]),
            source=self.sources[row],
            **labels,
        )

    def reference(self, sensor: str) -> np.ndarray:
        """Packed no-contact image (38400,). Raises `DataError` where the sensor has none."""
        if sensor not in self._index["sensors"]:
            raise DataError(
                f"{self.folder}: no reference of sensor '{sensor}'; record frames without contact"
            )
        return np.array(self.array("references")[self._index["sensors"].index(sensor)])

    def rest(self, sensor: str) -> tuple[np.ndarray, np.ndarray]:
        """Frames without contact: packed (n, 38400) and wrench (n, 6)."""
        start, stop = self.rest_rows(sensor)
        return np.array(self.array("rest_bits")[start:stop]), np.array(
            self.array("rest_wrench")[start:stop]
        )

    def rest_rows(self, sensor: str) -> tuple[int, int]:
        """First and last + 1 row of a sensor in `rest_bits` and `rest_wrench`."""
        start, stop = self._index["rest"][sensor]
        return int(start), int(stop)

    def sensor_numbers(self) -> np.ndarray:
        """Place in `sensors` of each frame's sensor, frames at rest last."""
        numbers = {name: number for number, name in enumerate(self.sensors)}
        result = np.zeros(self.frames + sum(b - a for a, b in self._index["rest"].values()), int)
        for row, key in enumerate(self.keys):
            result[self.rows(row)] = numbers.get(key.sensor, 0)
        for name, number in numbers.items():
            start, stop = self.rest_rows(name)
            result[self.frames + start : self.frames + stop] = number
        return result

    def select(
        self, sensors: Iterable[str] | None = None, indenters: Iterable[str] | None = None
    ) -> list[int]:
        """Contacts of these sensors and indenters (all without), in order."""
        sensors = None if sensors is None else set(sensors)
        indenters = None if indenters is None else set(indenters)
        return [
            row
            for row, key in enumerate(self.keys)
            if (sensors is None or key.sensor in sensors)
            and (indenters is None or key.indenter in indenters)
        ]


@dataclass(frozen=True)
class Split:
    """Contacts by use."""

    train: list[int]
    validation: list[int]
    test: list[int]


def split_contacts(
    cache: Cache,
    contacts: Sequence[int],
    seed: int,
    validation: float = 0.1,
    unseen: Sequence[str] = (),
    few_shot: int | None = None,
) -> Split:
    """Whole contacts by use: those of `unseen` indenters are the test set, a part of every other
    indenter's is for validation, and at most `few_shot` an indenter are for training.

    The same number of an indenter falls alike for every sensor of the cache, whichever of its
    contacts that sensor lacks: what one is tested on no other has learned from. Deterministic in
    seed and keys.
    """
    test = [row for row in contacts if cache.keys[row].indenter in set(unseen)]
    numbers: dict[str, Counter[int]] = {}
    for key in cache.keys:
        numbers.setdefault(key.indenter, Counter())[key.number] += 1
    held_numbers = {
        indenter: _held(seed, indenter, numbers[indenter], validation) for indenter in numbers
    }
    groups: dict[tuple[str, str], list[int]] = {}
    train, held = [], []
    for row in contacts:
        key = cache.keys[row]
        if key.indenter in set(unseen):
            continue
        if key.number in held_numbers[key.indenter]:
            held.append(row)
        else:
            groups.setdefault((key.sensor, key.indenter), []).append(row)
    for group in groups.values():
        train += sorted(group, key=lambda row: _draw(seed, cache.keys[row]))[:few_shot]
    return Split(sorted(train), sorted(held), sorted(test))


def _held(seed: int, indenter: str, holders: Counter[int], part: float) -> set[int]:
    """Numbers of an indenter's contacts that nothing is trained on: so large a part of them, of
    those that most sensors hold."""
    count = max(1, round(part * len(holders))) if part and len(holders) > 1 else 0

    def order(number: int) -> tuple[int, bytes]:
        return -holders[number], _draw(seed, ContactKey("", indenter, number))

    return set(sorted(holders, key=order)[:count])


def _draw(seed: int, key: ContactKey) -> bytes:
    return hashlib.sha256(f"{seed}/{key.indenter}/{key.number}".encode()).digest()


# --- building ---------------------------------------------------------------------------------


def open_layout(
    root: str | Path, cache: str | Path | None = None, progress: Progress = silent
) -> Cache:
    """The cache of a layout folder (kept in `<root>/.cache`), built where it is absent or older
    than what it holds. Contacts that cannot be read are left out and named in `problems`."""
    layout = Layout(root)
    folder = Path(cache) if cache else layout.root / ".cache"
    keys = layout.contacts()
    if not keys:
        raise DataError(f"{layout.root}: no contacts there; `genforce dataset build` makes them")
    problems: list[str] = []

    def contacts() -> Iterable[Contact]:
        for done, key in enumerate(keys):
            progress(f"packing {key}", done, len(keys))
            try:
                yield layout.read(key)
            except DataError as error:
                problems.append(str(error))
        progress("packed", len(keys), len(keys))

    def sensors() -> Sensors:
        found = {}
        for sensor in layout.sensors():
            try:
                reference, (bits, wrench) = layout.read_reference(sensor), layout.read_rest(sensor)
                if not len(bits):  # published data sets have no frames at rest
                    bits, wrench = reference[None], np.zeros((1, 6))
                found[sensor] = (reference, bits, wrench)
            except DataError as error:
                problems.append(str(error))
        return found

    trees = (layout.images, layout.forces, layout.depths)
    made_of = [tree / str(key) for key in keys for tree in trees]
    made_of += [layout.rest / sensor for sensor in layout.sensors()]
    made_of += sorted({*layout.images.glob("*_ref.*"), *(layout.root / "img").glob("*_ref.*")})
    made_of.append(layout.provenance_path)
    return cached(folder, layout.root, made_of, contacts(), sensors, problems)


def cached(
    folder: Path,
    root: Path,
    made_of: Iterable[Path],
    contacts: Iterable[Contact],
    sensors: Callable[[], Sensors],
    problems: list[str] | None = None,
) -> Cache:
    """The cache at `folder` if the files and folders under `root` that it was made of are still the
    same, else a new one (see `write_cache`); processes that begin together wait for one of them."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for path in filter(Path.exists, made_of):
        digest.update(f"{path.relative_to(root)}\n".encode())
        files = sorted(os.scandir(path), key=lambda file: file.name) if path.is_dir() else [path]
        for file in files:
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    fingerprint = digest.hexdigest()
    if found := _current(folder, fingerprint):
        return found
    with sole(folder):
        found = _current(folder, fingerprint)
        return found or write_cache(folder, contacts, sensors, problems, fingerprint)


def _current(folder: Path, fingerprint: str) -> Cache | None:
    try:
        found = Cache(folder)
    except DataError:
        return None
    return found if found._index["fingerprint"] == fingerprint else None


def write_cache(
    folder: str | Path,
    contacts: Iterable[Contact],
    sensors: Callable[[], Sensors],
    problems: list[str] | None = None,
    fingerprint: str = "",
) -> Cache:
    """Write a cache from contacts as they come, and then of what is known of their sensors. Memory
    stays that of one contact."""
    folder = Path(folder)
    with drafted(folder) as draft:
        _fill(draft, contacts, sensors, [] if problems is None else problems, fingerprint)
    return Cache(folder)


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Wait until no other process makes something in `folder`, and keep it to oneself."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = os.open(folder.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # network file systems have no lock of a folder
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `folder`; nothing of it stays where filling
    it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".partial", f"{folder.name}.", folder.parent) as scratch:
        draft = Path(scratch) / "new"
        draft.mkdir()
        yield draft
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        draft.rename(folder)


def _fill(
    draft: Path,
    contacts: Iterable[Contact],
    sensors: Callable[[], Sensors],
    problems: list[str],
    fingerprint: str,
) -> None:
    types = {"bits": (np.uint8, (PACKED,)), **LABELS}
    writers = {name: _Appender(draft / f"{name}.npy", *kind) for name, kind in types.items()}
    blocks = _Appender(draft / "blocks.npy", np.uint8, BLOCKS)
    keys, bounds, sources = [], [0], []
    for contact in contacts:
        for name, writer in writers.items():
            writer.append(getattr(contact, name))
        blocks.append(block_counts(contact.bits))
        keys.append([contact.key.sensor, contact.key.indenter, contact.key.number])
        bounds.append(bounds[-1] + len(contact))
        sources.append(contact.source)
    for writer in writers.values():
        writer.close()
    known = sensors()
    names = sorted(known)
    rest = [known[name][1:] for name in names]
    rest_bounds = np.cumsum([0, *(len(bits) for bits, _ in rest)]).tolist()
    for bits, _ in rest:
        blocks.append(block_counts(bits))
    blocks.close()
    empty = [(np.empty((0, PACKED), np.uint8), np.empty((0, 6)))]
    references = np.array([known[name][0] for name in names], np.uint8).reshape(-1, PACKED)
    np.save(draft / "references.npy", references)
    np.save(draft / "rest_bits.npy", np.concatenate([bits for bits, _ in rest or empty]))
    np.save(draft / "rest_wrench.npy", np.concatenate([wrench for _, wrench in rest or empty]))
    index = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "keys": keys,
        "bounds": bounds,
        "sources": sources,
        "sensors": names,
        "rest": {name: rest_bounds[i : i + 2] for i, name in enumerate(names)},
        "problems": problems,
    }
    (draft / "index.json").write_text(json.dumps(index))


class _Appender:
    """Grows a .npy file row by row; the shape in its header is set when it is closed."""

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
        self._file = path.open("wb+")
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._rows = 0
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self._rows += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        # NumPy pads the header so that the row count can be rewritten in place.
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, *self._shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


# --- network inputs ---------------------------------------------------------------------------


def block_counts(bits: np.ndarray) -> np.ndarray:
    """Packed images (n, 38400) -> (n, 120, 160) uint8: set pixels of each 4x4 block, 0 to 16."""
    counts = np.empty((len(bits), BLOCKS[0], BLOCKS[1] // 2, 2), np.uint8)
    for start in range(0, len(bits), AT_ONCE):
        words = np.array(bits[start : start + AT_ONCE], order="C").view(np.uint64)
        # Counts within each nibble, eight bytes at a time (SWAR), then of four rows of pixels.
        words -= (words >> ONE) & PAIRS
        words = (words & NIBBLE_PAIRS) + ((words >> TWO) & NIBBLE_PAIRS)
        rows = words.reshape(-1, BLOCKS[0], 4, WIDTH // 64)
        two_rows = rows[:, :, :2] + rows[:, :, 2:]
        for side, half in enumerate((two_rows >> FOUR, two_rows)):
            half &= NIBBLES
            four_rows = half[:, :, 0] + half[:, :, 1]
            counts[start : start + AT_ONCE, ..., side] = four_rows.view(np.uint8)
    return counts.reshape(-1, *BLOCKS)


BLOCKS = HEIGHT // 4, WIDTH // 4
AT_ONCE = 16  # images that the processor's cache holds
SIXTEENTH = np.float32(1 / 16)
ONE, TWO, FOUR = np.uint64(1), np.uint64(2), np.uint64(4)
PAIRS = np.uint64(0x5555555555555555)
NIBBLE_PAIRS = np.uint64(0x3333333333333333)
NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
