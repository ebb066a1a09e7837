"""Windows of frames for recurrent training, read from the packed cache as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from genforce_collect.errors import DataError
from genforce_collect.layout import pack, unpack
from genforce_collect.markers.registration import AS_DRAWN, Registration
from genforce_infer.preprocess import area_average
from genforce_train.cache import Cache, block_counts, sole
from genforce_train.drawing import drawing_of

# Mirrored left-right and up-down, a scene is another valid one: signs of fx fy fz tx ty tz.
MIRROR_SIGNS = {
    -1: (-1.0, 1.0, 1.0, 1.0, -1.0, -1.0),
    -2: (1.0, -1.0, 1.0, -1.0, 1.0, -1.0),
}


# Frames (k,) of a cache -> their marker images and references (k, 2, 120, 160) in 0..1.
FrameReader = Callable[[np.ndarray], Tensor]


class FrameSource(Protocol):
    """Network inputs of frames. Frames 0..n-1 are those of contacts, then those at rest."""

    def images(self, frames: np.ndarray, sensors: np.ndarray) -> Tensor:
        """(k,) frames of (k,) sensors, as numbers -> (k, c, h, w) float32."""
        ...

    def mirror(self, images: Tensor, axis: int) -> Tensor:
        """The images of the scene mirrored along -1 (left-right) or -2 (up-down)."""
        ...


class MarkerSource:
    """Marker images (1, h, w) in 0..1 as they are."""

    def __init__(self, cache: Cache, size: tuple[int, int]) -> None:
        self._bits, self._rest, self._size = cache.bits, cache.array("rest_bits"), size

    def images(self, frames: np.ndarray, sensors: np.ndarray) -> Tensor:
        """See `FrameSource`."""
        masks = unpack(take(self._bits, self._rest, frames))
        images = np.stack([area_average(mask, self._size) for mask in masks])
        return torch.from_numpy(images[:, None])

    def mirror(self, images: Tensor, axis: int) -> Tensor:
        """See `FrameSource`."""
        return images.flip(axis)


class MapSource:
    """Maps (frames + rest frames, c, h, w) computed beforehand, e.g. displacement fields; `odd`
    names the map that changes its sign when the scene is mirrored along an axis."""

    def __init__(self, maps: np.ndarray, odd: dict[int, int]) -> None:
        self._maps, self._odd = maps, odd

    def images(self, frames: np.ndarray, sensors: np.ndarray) -> Tensor:
        """See `FrameSource`."""
        return torch.from_numpy(self._maps[frames].astype(np.float32))

    def mirror(self, images: Tensor, axis: int) -> Tensor:
        """See `FrameSource`."""
        images = images.flip(axis)
        images[:, self._odd[axis]] *= -1
        return images


def frame_images(cache: Cache) -> FrameReader:
    """Marker images and references of frames of a cache."""
    references = area_images(np.stack([cache.reference(name) for name in cache.sensors]))
    sensors = cache.sensor_numbers()

    def read(rows: np.ndarray) -> Tensor:
        images = torch.from_numpy(cache.images(rows))
        return torch.stack([images, references[sensors[rows]]], 1)

    return read


def mountings(cache: Cache) -> list[Registration]:
    """How the cameras of the sensors of a cache are mounted, by their references."""
    return [drawing_of(name, cache.reference(name)).mounting for name in cache.sensors]


def upright_images(cache: Cache) -> FrameReader:
    """As `frame_images`, but as the sensors as drawn would show them."""
    sensors, mounted = cache.sensor_numbers(), mountings(cache)

    def upright(bits: np.ndarray, numbers: np.ndarray) -> Tensor:
        for number in np.unique(numbers):
            if (mounting := mounted[number]) != AS_DRAWN:
                own = numbers == number
                bits[own] = [pack(mounting.upright(mask)) for mask in unpack(bits[own])]
        return area_images(bits)

    packed = np.stack([cache.reference(name) for name in cache.sensors])
    references = upright(packed, np.arange(len(packed)))

    def read(rows: np.ndarray) -> Tensor:
        numbers = sensors[rows]
        images = upright(take(cache.bits, cache.array("rest_bits"), rows), numbers)
        return torch.stack([images, references[numbers]], 1)

    return read


def maps_of(
    cache: Cache,
    front: nn.Module,
    shape: tuple[int, ...],
    name: str,
    reader: Callable[[Cache], FrameReader] = frame_images,
) -> np.ndarray:
    """Maps (frames + rest frames, *shape) float16 that `front` makes of what `reader` gives of a
    cache's frames, memory-mapped; computed once a cache and `name`."""
    path = cache.folder / f"{name}.npy"
    if not path.is_file():
        with sole(cache.folder):
            if not path.is_file():
                _write_maps(path, reader(cache), len(cache.sensor_numbers()), front, shape)
    return cache.array(name)


def _write_maps(
    path: Path, images: FrameReader, count: int, front: nn.Module, shape: tuple[int, ...]
) -> None:
    partial = path.with_suffix(".partial")
    maps = np.lib.format.open_memmap(partial, "w+", np.float16, (count, *shape))
    with torch.inference_mode():
        for start in range(0, count, 64):
            rows = np.arange(start, min(start + 64, count))
            maps[rows] = front(images(rows)).numpy()
    maps.flush()
    del maps
    partial.replace(path)


def marker_images(masks: np.ndarray, references: np.ndarray) -> Tensor:
    """Packed images (n, 38400) and their references -> (n, 2, 120, 160) in 0..1."""
    return torch.stack([area_images(masks), area_images(references)], 1)


def area_images(bits: np.ndarray) -> Tensor:
    """Packed images (n, 38400) -> (n, 120, 160) in 0..1; those of a cache: `Cache.images`."""
    return torch.from_numpy(block_counts(bits)) / 16


def take(first: np.ndarray, second: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of two arrays as if they were one."""
    result = np.empty((len(rows), *first.shape[1:]), first.dtype)
    late = rows >= len(first)
    result[~late] = first[rows[~late]]
    result[late] = second[rows[late] - len(first)]
    return result


@dataclass(frozen=True)
class Sequences:
    """Contacts as sequences of frames, each with frames at rest before and after, force zero."""

    frames: list[np.ndarray]  # a contact's frames, -1 where any frame at rest may stand
    sensors: list[int]  # number of the contact's sensor
    rest: dict[int, np.ndarray]  # frames at rest by sensor
    wrench: np.ndarray  # (frames of contacts, 6) N and N m

    @classmethod
    def of(
        cls, cache: Cache, contacts: Sequence[int], rest_frames: int, wrench: np.ndarray
    ) -> Sequences:
        """Raises `DataError` for a sensor without frames at rest."""
        numbers = {name: number for number, name in enumerate(cache.sensors)}
        rest = {}
        for name in sorted({cache.keys[row].sensor for row in contacts}):
            if name not in numbers:
                cache.reference(name)
            start, stop = cache.rest_rows(name)
            if start == stop and rest_frames:
                raise DataError(f"{cache.folder}: no frames at rest of '{name}'; build it again")
            rest[numbers[name]] = cache.frames + np.arange(start, stop)
        margin = np.full(rest_frames, -1)
        return cls(
            frames=[np.concatenate([margin, np.r_[cache.rows(row)], margin]) for row in contacts],
            sensors=[numbers[cache.keys[row].sensor] for row in contacts],
            rest=rest,
            wrench=wrench,
        )

    def windows(
        self, rng: np.random.Generator, count: int, steps: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Random windows: frames (count, steps), sensors (count,), wrench (count, steps, 6)."""
        chosen = rng.integers(len(self.frames), size=count)
        rows = np.empty((count, steps), np.int64)
        for window, contact in zip(rows, chosen, strict=True):
            frames = self.frames[contact]
            start = rng.integers(max(1, len(frames) - steps + 1))
            part = frames[start : start + steps]
            window[: len(part)] = part
            window[len(part) :] = -1
        sensors = np.array([self.sensors[contact] for contact in chosen])
        return self._fill(rng, rows, sensors)

    def whole(self, contact: int, lead: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One contact after `lead` frames at rest, like `windows`."""
        frames = self.frames[contact]
        rows = np.concatenate([np.full(lead, -1), frames[frames >= 0]])[None]
        sensors = np.array([self.sensors[contact]])
        return self._fill(np.random.default_rng(0), rows, sensors)

    def _fill(
        self, rng: np.random.Generator, rows: np.ndarray, sensors: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        resting = rows < 0
        wrench = np.where(resting[..., None], 0.0, self.wrench[np.maximum(rows, 0)])
        for number, window in enumerate(rows):
            free = resting[number]
            if free.any():
                window[free] = rng.choice(self.rest[int(sensors[number])], int(free.sum()))
        return rows, sensors, wrench
