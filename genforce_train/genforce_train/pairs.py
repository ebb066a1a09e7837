"""Location-paired marker images: one contact as several sensors show it.

Of a data set in the training layout each contact gives four, matched by indenter and number: frame
0000 and the last frames of the first three phases. Of the simulated grid (`sim/<indenter>/
<pattern>/<x>_<y>_<z>.jpg`) each file gives one, matched by indenter and name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genforce_collect.errors import DataError
from genforce_collect.layout import UNKNOWN_PHASE, Contact, ContactKey, Layout, read_mask, unpack
from genforce_collect.markers.registration import marker_centres
from genforce_collect.markers.tracking import match
from genforce_train.build import open_data
from genforce_train.cache import Cache, Sensors, cached, split_contacts
from genforce_train.sequences import area_images

PAIRED_PHASES = 3


@dataclass(frozen=True)
class Pairs:
    """N moments of contacts on S sensors.

    rows (S, N) which frame of the cache a sensor shows at a moment, -1 where it has none;
    references (S, 38400); contacts (N,) names of what pressed where; uses ("train", "validation",
    "test") -> moments.
    """

    sensors: tuple[str, ...]
    cache: Cache
    rows: np.ndarray
    references: np.ndarray
    contacts: np.ndarray
    uses: dict[str, np.ndarray]

    def draw(
        self, rng: np.random.Generator, count: int, rest: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Random source and target sensors, never the same, and training moments, each (count,);
        a part `rest` of the moments is -1: no contact."""
        moments = rng.choice(self.uses["train"], count)
        priority = rng.random((len(self.sensors), count))
        priority[self.rows[:, moments] < 0] = -1
        order = np.argsort(-priority, axis=0)
        moments[rng.random(count) < rest] = -1
        return order[0], order[1], moments

    def inputs(self, sources: np.ndarray, targets: np.ndarray, moments: np.ndarray) -> Tensor:
        """(k, 4, 120, 160) in 0..1: source mask and reference, target reference and mask."""
        source, target = self._seen(sources, moments), self._seen(targets, moments)
        return torch.stack([source, self._rest[sources], self._rest[targets], target], 1)

    def _seen(self, sensors: np.ndarray, moments: np.ndarray) -> Tensor:
        images, touching = self._rest[sensors], moments >= 0
        rows = self.rows[sensors[touching], moments[touching]]
        images[touching] = torch.from_numpy(self.cache.images(rows))
        return images

    @cached_property
    def _rest(self) -> Tensor:
        return area_images(self.references)

    def images(self, sensors: np.ndarray, moments: np.ndarray) -> np.ndarray:
        """Packed marker images (k, 38400) of sensors at moments."""
        images = self.references[sensors]
        touching = moments >= 0
        images[touching] = self.cache.bits[self.rows[sensors[touching], moments[touching]]]
        return images

    def moves(self, sensors: np.ndarray, moments: np.ndarray) -> Tensor:
        """(k, m, 4) px: u, v where the markers of a sensor's reference rest, and u, v where they
        stand at a moment; NaN where one is not found, and after the last."""
        result = torch.full((len(sensors), max(map(len, self._resting)), 4), torch.nan)
        for row, sensor in enumerate(sensors.tolist()):
            moment = int(moments[row])
            rest = self._resting[sensor]
            if (sensor, moment) not in self._moved:
                image = self.images(np.array([sensor]), np.array([moment]))[0]
                moved = match(rest, marker_centres(unpack(image))).displacement
                self._moved[sensor, moment] = np.concatenate([rest, rest + moved], 1)
            result[row, : len(rest)] = torch.from_numpy(self._moved[sensor, moment])
        return result

    @cached_property
    def _resting(self) -> list[np.ndarray]:
        return [marker_centres(unpack(reference)) for reference in self.references]

    @cached_property
    def _moved(self) -> dict[tuple[int, int], np.ndarray]:
        return {}

    def of(self, source: int, target: int, use: str) -> np.ndarray:
        """Moments for this use (or "all") that both sensors show."""
        moments = np.arange(self.rows.shape[1]) if use == "all" else self.uses[use]
        return moments[(self.rows[[source, target]][:, moments] >= 0).all(0)]


def read_pairs(
    data: str | Path,
    sensors: Sequence[str] = (),
    indenters: Sequence[str] = (),
    unseen: Sequence[str] = (),
    per_indenter: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> Pairs:
    """The pairs of a data set; `per_indenter`: at most so many training contacts of each indenter.

    Raises `DataError` for sensors that are not there or share no contact, and empty splits.
    """
    data = Path(data)
    cache = open_images(data)
    chosen = list(sensors) or sorted({key.sensor for key in cache.keys})
    if missing := [name for name in chosen if name not in cache.sensors]:
        raise DataError(
            f"{data}: no sensor {', '.join(missing)} with a reference; known are "
            f"{', '.join(cache.sensors)}"
        )
    if len(chosen) < 2:
        raise DataError(f"{data}: pairs need two sensors, found {', '.join(chosen)}")
    number = {name: row for row, name in enumerate(chosen)}
    moments: dict[tuple[str, int], dict[int, list[int]]] = {}
    layout = Layout(data)
    for row in cache.select(chosen, indenters or None):
        key = cache.keys[row]
        frames = paired_frames(cache, layout, row)
        moments.setdefault((key.indenter, key.number), {})[number[key.sensor]] = frames
    shared = {contact: held for contact, held in moments.items() if len(held) > 1}
    alone = sorted(set(chosen) - {chosen[s] for held in shared.values() for s in held})
    if alone:
        problems = f" ({cache.problems[0]})" if cache.problems else ""
        raise DataError(
            f"{data}: {', '.join(alone)} shares no contact (same indenter and number) with "
            f"another sensor{problems}; record the same plan on it, or leave it out with sensors="
        )
    return _stack(cache, chosen, shared, unseen, per_indenter, validation, seed)


def paired_frames(cache: Cache, layout: Layout, contact: int) -> list[int]:
    """Frames of a contact that are paired with those of other sensors: the first, and the last of
    the first three phases. Raises `DataError` where the data set does not say which these are."""
    rows, key = cache.rows(contact), cache.keys[contact]
    if rows.stop - rows.start == 1:  # of the simulated grid
        return [rows.start]
    phase = np.array(cache.array("phase")[rows]).astype(int)
    if (phase != UNKNOWN_PHASE).all():
        ends = np.append(np.flatnonzero(np.diff(phase)), len(phase) - 1).tolist()
    else:
        ends = layout.read_last(key)
    if len(ends) < PAIRED_PHASES or max(ends) >= len(phase):
        raise DataError(
            f"{layout.root}: {key}: ends of phases at frames {ends} of {len(phase)}; at least "
            f"{PAIRED_PHASES} are needed (last.csv, or phase in timing.csv)"
        )
    return [rows.start + frame for frame in (0, *ends[:PAIRED_PHASES])]


def _stack(
    cache: Cache,
    sensors: list[str],
    shared: dict[tuple[str, int], dict[int, list[int]]],
    unseen: Sequence[str],
    per_indenter: int | None,
    validation: float,
    seed: int,
) -> Pairs:
    contacts = sorted(shared)
    first = {(key.indenter, key.number): row for row, key in reversed([*enumerate(cache.keys)])}
    split = split_contacts(
        cache, [first[contact] for contact in contacts], seed, validation, unseen, per_indenter
    )
    use_of = {
        (cache.keys[row].indenter, cache.keys[row].number): use
        for use in ("train", "validation", "test")
        for row in getattr(split, use)
    }
    columns, names = [], []
    for contact in contacts:
        held = shared[contact]
        for moment in range(len(next(iter(held.values())))):
            columns.append([held[s][moment] if s in held else -1 for s in range(len(sensors))])
            names.append(contact)
    uses = {
        use: np.array([n for n, name in enumerate(names) if use_of.get(name) == use], int)
        for use in ("train", "validation", "test")
    }
    if not len(uses["train"]):
        raise DataError(
            f"{cache.folder}: no pair left to train on; indenters are "
            f"{', '.join(sorted({indenter for indenter, _ in contacts}))}, unseen= keeps "
            f"{', '.join(unseen)} apart"
        )
    return Pairs(
        sensors=tuple(sensors),
        cache=cache,
        rows=np.array(columns).T,
        references=np.stack([cache.reference(name) for name in sensors]),
        contacts=np.array([f"{indenter}/{number}" for indenter, number in names]),
        uses=uses,
    )


# --- the simulated grid -------------------------------------------------------------------------


def open_images(data: str | Path) -> Cache:
    """The cache of labelled contacts (`open_data`), or of the grid: contacts of one frame,
    numbered by file name and without labels. Raises `DataError`."""
    root = Path(data)
    references = sorted(root.glob("*_ref.jpg"))
    if (root / "force").is_dir() or not references:
        return open_data(root)
    patterns = {path.stem.removesuffix("_ref"): read_mask(path) for path in references}
    paths = sorted(path for name in patterns for path in root.glob(f"*/{name}/*.jpg"))
    if not paths:
        raise DataError(f"{root}: no <indenter>/<pattern>/*.jpg there")
    names = sorted({path.stem for path in paths})
    numbers = {name: number for number, name in enumerate(names)}

    def contacts() -> Iterator[Contact]:
        for path in paths:
            indenter, pattern = path.parent.parent.name, path.parent.name
            yield _unlabelled(ContactKey(pattern, indenter, numbers[path.stem]), read_mask(path))

    def sensors() -> Sensors:
        none = np.empty((0, 6))
        return {name: (bits, bits[None][:0], none) for name, bits in patterns.items()}

    return cached(root / ".cache", root, [*references, *paths], contacts(), sensors)


def _unlabelled(key: ContactKey, bits: np.ndarray) -> Contact:
    zero, none = np.zeros(1), np.full((1, 6), np.nan)
    return Contact(
        key=key,
        bits=bits[None],
        wrench=none,
        pose=none,
        depth=zero,
        phase=np.full(1, UNKNOWN_PHASE, np.uint8),
        stamp_ns=np.zeros(1, np.int64),
        wrench_age=zero,
        pose_age=zero,
        flags=np.zeros(1, np.uint32),
    )
