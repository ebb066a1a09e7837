"""Which way up a constellation of markers at rest is seen, told by what makes a real array unique.

An array that is regular by design is never quite so: dots are off by a part of their pitch, and
some are missing. Seen the right way up, the markers lie on their known places but for the noise and
what an affine map takes off (a camera put back a little differently); seen another way, they
lie off by the array's own irregularity. An array without any cannot tell.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from genforce_collect.markers.packing import HEIGHT, WIDTH

Points = NDArray[np.floating]

NEAR = 0.3  # pitches; how far a marker may be from its place to agree
GOOD_AGREEMENT = 0.6  # part of both layouts' markers that coincide
NOISE_PX = 0.15  # of a centroid
CLEAR = 2.0  # times as far from their places the markers must be the other ways
_CENTRE = np.array([WIDTH - 1, HEIGHT - 1]) / 2
# Quarter turns, then those of the mirror image.
_QUARTER = np.array([[0, -1], [1, 0]])
_WAYS = [
    np.linalg.matrix_power(_QUARTER, turns) @ mirror
    for mirror in (np.eye(2), np.diag([-1, 1]))
    for turns in range(4)
]


class Way(Enum):
    """How markers are seen against their known places."""

    UPRIGHT = "upright"
    TURNED = "turned or mirrored"
    SYMMETRIC = "upright, or turned: the array is too regular to tell"
    ELSE = "another layout"


def way_up(places: Points, seen: Points, *, half_turn_only: bool = False) -> Way:
    """How (m, 2) markers are seen of which the (n, 2) places are known, px in the view, at rest.
    Of the ways to turn and mirror them, all are tried or, in a quarter of the time, a half turn."""
    ways = _WAYS[0:4:2] if half_turn_only else _WAYS
    distance = np.array([_distance(places, _CENTRE + (seen - _CENTRE) @ way.T) for way in ways])
    upright, other = distance[0], distance[1:].min()
    if not np.isfinite(distance.min()):
        return Way.ELSE
    if other >= CLEAR * upright:
        return Way.UPRIGHT
    return Way.TURNED if upright >= CLEAR * other else Way.SYMMETRIC


def _distance(places: Points, seen: Points) -> float:
    """Mean distance (px) of markers from their places, not below the noise, where one without the
    other counts as far away; infinite where too few agree."""
    if min(len(places), len(seen)) < 4:
        return np.inf
    tree = cKDTree(seen)
    far = NEAR * float(np.median(cKDTree(places).query(places, k=2)[0][:, 1]))
    nearest = tree.query(places)[1]
    distance, nearest = tree.query(places + np.median(seen[nearest] - places, axis=0))
    near = distance < far
    agreeing = len(np.unique(nearest[near]))
    total = len(places) + len(seen) - agreeing
    if agreeing < GOOD_AGREEMENT * total:
        return np.inf
    system = np.column_stack([places[near], np.ones(near.sum())])
    found = seen[nearest[near]]
    fit = np.linalg.lstsq(system, found, rcond=None)[0]
    residual = np.minimum(far, np.linalg.norm(system @ fit - found, axis=1))
    return max(NOISE_PX, float(residual.mean()) + far * (1 - agreeing / total))
