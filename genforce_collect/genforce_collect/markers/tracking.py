"""Which marker of the reference is which marker now, through large shear.

A marker that moved by a pitch looks like its neighbour at rest, so the nearest marker is not
enough. Matching starts where it cannot err: in the largest connected set of markers that have one
near neighbour each and move alike, which on a pressed gel is the ground around the contact. From
there it grows inward, each time looking where the motion of the markers around predicts. What is
missing, merged or new stays unmatched.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import Delaunay, QhullError, cKDTree

from genforce_collect.markers.packing import HEIGHT, WIDTH

Points = NDArray[np.float32]

# All in units of the local pitch.
SEED_DISTANCE = 0.45
MAX_STEP = 0.35  # change of displacement from one marker to the next within a seed
SEARCH_RADIUS = 0.45
OUTLIER_DISTANCE = 0.7  # from the median displacement of the markers around
MAX_EDGE = 1.9
LONE_PITCH = 50.0  # px, for a marker without neighbours


@dataclass(frozen=True)
class Match:
    """index: (n,) int, the found marker of each reference marker, -1 where missing. points: (n, 2)
    float32 px, NaN where missing. displacement: points minus reference. extra: indices of found
    markers that belong to none."""

    index: NDArray[np.intp]
    points: Points
    displacement: Points
    extra: NDArray[np.intp]

    @property
    def matched(self) -> float:
        """Part of the reference's markers that were found, 0 to 1."""
        return float((self.index >= 0).mean()) if len(self.index) else 0.0


class Tracker:
    """Matches frame after frame with one reference, (n, 2) px; each frame starts from the last."""

    def __init__(self, reference: Points) -> None:
        self.reference = np.asarray(reference, np.float64).reshape(-1, 2)
        self._neighbours, self._pitch = _neighbourhood(self.reference)
        self._pairs, self._max_step = _pairs(self._neighbours, self._pitch)
        self._around = _padded(self._neighbours)
        self._tree = cKDTree(self.reference)
        self._last: NDArray[np.float64] | None = None

    def update(self, points: Points) -> Match:
        """Match the (m, 2) markers of the next frame."""
        found = np.asarray(points, np.float64).reshape(-1, 2)
        index = self._match(found, self._last)
        if self._last is not None and (index >= 0).mean() < 0.5:
            index = self._match(found, None)
        result = self._result(index, found)
        self._last = self._filled(result)
        return result

    def _match(
        self, found: NDArray[np.float64], prior: NDArray[np.float64] | None
    ) -> NDArray[np.intp]:
        count = len(self.reference)
        if not count or not len(found):
            return np.full(count, -1)
        tree = cKDTree(found)
        index = self._seed(prior, found, tree)
        self._grow(index, found, tree)
        self._drop_outliers(index, found)
        return index

    def _alike(
        self, prior: NDArray[np.float64] | None, found: NDArray[np.float64], tree: cKDTree
    ) -> tuple[NDArray[np.intp], NDArray[np.bool_], NDArray[np.bool_]]:
        """Nearest found marker of each one, whether it is near and mutual, and for each pair of
        neighbours whether both are and moved alike."""
        expected = self.reference if prior is None else self.reference + prior
        distance, nearest = tree.query(expected)
        _, back = (self._tree if prior is None else cKDTree(expected)).query(found)
        mutual = back[nearest] == np.arange(len(expected))
        good = mutual & (distance < SEED_DISTANCE * self._pitch)
        a, b = self._pairs
        residual = found[nearest] - expected
        step = np.linalg.norm(residual[a] - residual[b], axis=1)
        return nearest, good, good[a] & good[b] & (step < self._max_step)

    def _seed(
        self, prior: NDArray[np.float64] | None, found: NDArray[np.float64], tree: cKDTree
    ) -> NDArray[np.intp]:
        """Mutual nearest markers, of which the largest set that moves alike is kept."""
        nearest, good, alike = self._alike(prior, found, tree)
        index = np.where(good, nearest, -1)
        a, b = self._pairs[:, alike]
        links = coo_matrix((np.ones(len(a)), (a, b)), (len(good), len(good)))
        _, component = connected_components(links, directed=False)
        if good.any():
            largest = np.bincount(component[good]).argmax()
            index[component != largest] = -1
        return index

    def _grow(self, index: NDArray[np.intp], found: NDArray[np.float64], tree: cKDTree) -> None:
        taken = np.zeros(len(found), bool)
        taken[index[index >= 0]] = True
        neighbours = self._neighbours.tocsr()
        tried: set[int] = set()
        while True:
            matched = index >= 0
            support = neighbours @ matched.astype(float)
            frontier = [i for i in np.flatnonzero(~matched & (support >= 2)) if i not in tried]
            if not frontier:
                return
            offers = []
            for i in frontier:
                predicted = self._predict(i, index, found, neighbours)
                distance, candidate = tree.query(predicted)
                if distance < SEARCH_RADIUS * self._pitch[i] and not taken[candidate]:
                    offers.append((distance, i, candidate))
                else:
                    tried.add(i)
            for _, i, candidate in sorted(offers):
                if taken[candidate]:
                    tried.add(i)
                    continue
                index[i], taken[candidate] = candidate, True
                tried.difference_update(neighbours[[i]].indices)

    def _predict(
        self, i: int, index: NDArray[np.intp], found: NDArray[np.float64], neighbours: coo_matrix
    ) -> NDArray[np.float64]:
        """Where marker i should be by an affine fit to the matched markers two steps around."""
        near = neighbours[[i]].indices
        around = np.unique(neighbours[near].indices)
        around = around[index[around] >= 0]
        offset = (self.reference[around] - self.reference[i]) / self._pitch[i]
        motion = found[index[around]] - self.reference[around]
        weight = 1 / (0.3 + (offset**2).sum(axis=1))
        system = np.column_stack([np.ones(len(around)), offset])
        normal = system.T @ (weight[:, None] * system) + np.diag([0, 0.1, 0.1])
        return self.reference[i] + np.linalg.solve(normal, system.T @ (weight[:, None] * motion))[0]

    def _drop_outliers(self, index: NDArray[np.intp], found: NDArray[np.float64]) -> None:
        matched = index >= 0
        motion = np.full((len(index) + 1, 2), np.nan)
        motion[:-1][matched] = found[index[matched]] - self.reference[matched]
        around = motion[self._around]
        judged = matched & (np.isfinite(around[..., 0]).sum(axis=1) >= 3)
        typical = np.nanmedian(around[judged], axis=1)
        deviation = np.linalg.norm(motion[:-1][judged] - typical, axis=1)
        wrong = deviation > OUTLIER_DISTANCE * self._pitch[judged]
        index[np.flatnonzero(judged)[wrong]] = -1

    def _result(self, index: NDArray[np.intp], found: NDArray[np.float64]) -> Match:
        points = np.full((len(index), 2), np.nan)
        points[index >= 0] = found[index[index >= 0]]
        extra = np.setdiff1d(np.arange(len(found)), index)
        return Match(
            index,
            points.astype(np.float32),
            (points - self.reference).astype(np.float32),
            extra,
        )

    def _filled(self, match: Match) -> NDArray[np.float64] | None:
        """Displacement of every marker, that of the nearest matched one where missing."""
        known = np.flatnonzero(match.index >= 0)
        if not len(known):
            return None
        _, nearest = cKDTree(self.reference[known]).query(self.reference)
        return match.displacement[known[nearest]].astype(np.float64)


class Coherence:
    """Whether frames continue a reference, (n, 2) px in the view; quick enough for every frame, as
    the marker of the reference nearest to a point is looked up in a map, and nothing grows."""

    def __init__(self, reference: Points) -> None:
        self._reference = np.asarray(reference, np.float64).reshape(-1, 2)
        neighbours, pitch = _neighbourhood(self._reference)
        self._pairs, self._max_step = _pairs(neighbours, pitch)
        self._max_distance = SEED_DISTANCE * pitch
        u, v = _pixels(self._reference)
        elsewhere = np.ones((HEIGHT, WIDTH), np.uint8)
        elsewhere[v, u] = 0
        _, labels = cv2.distanceTransformWithLabels(
            elsewhere, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
        )
        index = np.zeros(labels.max() + 1, np.intp)
        index[labels[v, u]] = np.arange(len(self._reference))
        self._nearest = index[labels]

    def __call__(self, points: Points) -> float:
        """Part of the reference's pairs of neighbours, 0 to 1, that have counterparts among the
        (m, 2) points in the view which moved alike. Unlike layouts have few."""
        if not self._pairs.size or not len(points):
            return 0.0
        u, v = _pixels(points)
        nearest = self._nearest[v, u]
        motion = points - self._reference[nearest]
        distance = np.hypot(*motion.T)
        far_first = np.argsort(-distance)  # of several points at a marker, the nearest stays
        owner = np.full(len(self._reference), -1)
        owner[nearest[far_first]] = far_first
        good = (owner >= 0) & (distance[owner] < self._max_distance)
        a, b = self._pairs
        step = np.hypot(*(motion[owner[a]] - motion[owner[b]]).T)
        alike = good[a] & good[b] & (step < self._max_step)
        return float(np.count_nonzero(alike) / len(alike))


def match(reference: Points, points: Points) -> Match:
    """Match (m, 2) found markers with (n, 2) reference markers, px, from nothing."""
    return Tracker(reference).update(points)


def _pixels(points: Points) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Column and row, each (n,), of the pixel each of the (n, 2) points is in."""
    u, v = np.rint(points).astype(np.intp).T
    return u, v


def _pairs(
    neighbours: coo_matrix, pitch: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(2, k) neighbours, each pair once, and how differently the two may move (px)."""
    once = neighbours.row < neighbours.col
    pairs = np.stack([neighbours.row[once], neighbours.col[once]])
    return pairs, MAX_STEP * pitch[pairs].max(axis=0)


def _neighbourhood(points: NDArray[np.float64]) -> tuple[coo_matrix, NDArray[np.float64]]:
    """Symmetric graph of markers next to each other, and the pitch around each marker (px)."""
    count = len(points)
    if count < 4:
        graph = 1 - np.eye(count)
        pitch = np.full(count, LONE_PITCH)
        if count > 1:
            pitch = cKDTree(points).query(points, k=2)[0][:, 1]
        return coo_matrix(graph), pitch
    pitch = np.median(cKDTree(points).query(points, k=4)[0][:, 1:], axis=1)
    try:
        triangles = Delaunay(points).simplices
    except QhullError:  # all on a line
        order = np.argsort(points @ points.std(axis=0))
        triangles = np.column_stack([order[:-1], order[1:], order[:-1]])
    a = triangles[:, [0, 1, 2]].ravel()
    b = triangles[:, [1, 2, 0]].ravel()
    near = np.linalg.norm(points[a] - points[b], axis=1) < MAX_EDGE * np.maximum(pitch[a], pitch[b])
    near &= a != b
    a, b = np.concatenate([a[near], b[near]]), np.concatenate([b[near], a[near]])
    graph = coo_matrix((np.ones(len(a)), (a, b)), (count, count))
    graph.sum_duplicates()
    graph.data[:] = 1
    return graph, pitch


def _padded(graph: coo_matrix) -> NDArray[np.intp]:
    """(n, most) int: the neighbours of each of n markers, filled up with n."""
    rows = graph.tocsr()
    counts = np.diff(rows.indptr)
    padded = np.full((len(counts), int(counts.max(initial=0))), len(counts))
    padded[np.arange(padded.shape[1]) < counts[:, None]] = rows.indices
    return padded
