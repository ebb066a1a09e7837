"""Labels of paired contacts: the same press, by indenter and number, on two sensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genforce_collect.errors import DataError
from genforce_train.cache import Cache


def partners(cache: Cache, contacts: Sequence[int], sensor: str) -> list[int]:
    """The contacts of `sensor` that pair with these. Raises `DataError` where one has none."""
    found = {
        (cache.keys[row].indenter, cache.keys[row].number): row for row in cache.select([sensor])
    }
    rows = []
    for row in contacts:
        key = cache.keys[row]
        if (key.indenter, key.number) not in found:
            raise DataError(
                f"{cache.folder}: {key} has no pair on '{sensor}'; collect both sensors with one "
                f"plan, or leave it out (indenters=...)"
            )
        rows.append(found[key.indenter, key.number])
    return rows


def borrowed_wrench(cache: Cache, contact: int, partner: int) -> np.ndarray:
    """(n, 6) N and N m: the wrench of `partner` where its tip had come as far as that of
    `contact`. Raises `DataError` as `borrowed`."""
    return borrowed(cache, contact, partner, np.array(cache.wrench[cache.rows(partner)]))


def borrowed(cache: Cache, contact: int, partner: int, values: np.ndarray) -> np.ndarray:
    """(n, k) of `values` (m, k) of the frames of `partner`, where its tip had come as far as that
    of `contact`.

    Progress is the way the tip has gone in a phase over the phase's whole way, so contacts of
    other speed, rate and size match. Raises `DataError` where their phases differ.
    """
    progress, phase = _progress(cache, contact)
    theirs, their_phase = _progress(cache, partner)
    if (found := set(phase.tolist())) != set(their_phase.tolist()):
        raise DataError(
            f"{cache.folder}: {cache.keys[contact]} and {cache.keys[partner]} have other phases "
            f"({sorted(found)} and {sorted(set(their_phase.tolist()))}); they are no pair"
        )
    result = np.empty((len(phase), values.shape[1]))
    for number in found:
        mine, their = phase == number, their_phase == number
        for axis in range(values.shape[1]):
            result[mine, axis] = np.interp(progress[mine], theirs[their], values[their, axis])
    return result


def _progress(cache: Cache, contact: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) part of its phase's way that the tip has gone, 0 to 1, and (n,) phase."""
    rows = cache.rows(contact)
    tip, phase = np.array(cache.array("pose")[rows])[:, :3], np.array(cache.array("phase")[rows])
    progress = np.ones(len(tip))
    for number in np.unique(phase):
        frames = np.flatnonzero(phase == number)
        start, end = tip[max(frames[0] - 1, 0)], tip[frames[-1]]
        way = max(float(np.linalg.norm(end - start)), 1e-9)
        gone = np.linalg.norm(tip[frames] - start, axis=1) / way
        progress[frames] = np.maximum.accumulate(gone)
    return progress, phase
