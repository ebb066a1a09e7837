"""How good translated marker images are: where the markers lie, how far the masks overlap, and
how far the sets of images are apart.

Overlap alone misleads: a mask of markers at rest overlaps well with one of markers that moved a
little. What carries the force is the markers' displacement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genforce_collect.layout import unpack
from genforce_collect.markers.registration import marker_centres
from genforce_collect.markers.tracking import match
from genforce_train.cache import block_counts

FEATURE_CELLS = (15, 20)


@dataclass(frozen=True)
class TranslationScores:
    """Scores of translated against true marker images of the target.

    rms_px: error of the markers' displacement at 480x640, over all markers found in both, which is
    how far the two images' markers lie apart; moved_px: the same of the reference, as if nothing
    were translated, and what rms_px is where no marker is found; found: part of the truly visible
    markers that the translation shows; iou: of the masks; distance: Fréchet distance of local
    change (FID-like), 0 for equal distributions.
    """

    rms_px: float
    moved_px: float
    found: float
    iou: float
    distance: float
    frames: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def line(self) -> str:
        """For people."""
        return (
            f"markers off by {self.rms_px:.2f} px RMS of {self.moved_px:.2f} moved, "
            f"{100 * self.found:.1f} % found, IoU {self.iou:.3f}, "
            f"Fréchet distance {self.distance:.3f} ({self.frames} frames)"
        )


def score_translations(
    reference: np.ndarray, parts: Iterable[tuple[np.ndarray, np.ndarray]]
) -> TranslationScores:
    """Scores of translated and true marker images (n, 38400), packed, in parts as they come;
    `reference` (38400,) is the target's."""
    errors, moves, ious = [], [], []
    features: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for translated, true in parts:
        for ours, wanted in zip(translated, true, strict=True):
            errors.append(marker_errors(ours, wanted))
            moves.append(marker_errors(reference, wanted))
        ious += _overlaps(translated, true)
        for part, bits in zip(features, (translated, true), strict=True):
            part.append(change_features(bits, reference))
    error, moved_px = np.concatenate(errors), rms_length(np.concatenate(moves))
    found = bool(np.isfinite(error).any())
    return TranslationScores(
        rms_px=rms_length(error) if found else moved_px,
        moved_px=moved_px,
        found=float(np.isfinite(error[:, 0]).mean()),
        iou=float(np.mean(ious)),
        distance=frechet_distance(*(np.concatenate(part) for part in features)),
        frames=len(ious),
    )


def marker_errors(translated: np.ndarray, true: np.ndarray) -> NDArray[np.float32]:
    """How far each marker of a true image is off in a translated one, both packed (38400,):
    (markers, 2) px, NaN where it is not found."""
    places, found = (marker_centres(unpack(bits)) for bits in (true, translated))
    return match(places, found).displacement


def change_features(bits: np.ndarray, reference: np.ndarray) -> NDArray[np.float64]:
    """Local change of images (n, 38400) against their reference: (n, 300), of 8x8 px blocks."""
    change = block_counts(bits).astype(np.float64) - block_counts(reference[None])
    rows, columns = FEATURE_CELLS
    blocks = change.reshape(len(bits), rows, change.shape[1] // rows, columns, -1)
    return abs(blocks.mean((2, 4))).reshape(len(bits), -1) / 16


def frechet_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Fréchet distance of two normal distributions fitted to features (n, k) and (m, k):
    |mean difference|² + trace(C1 + C2 - 2 (C1 C2)^1/2); Heusel et al. 2017, on image features
    that need no pretrained network."""
    if min(len(first), len(second)) < 2:
        return float("nan")
    shift = first.mean(0) - second.mean(0)
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    # Eigenvalues of the product are those of a symmetric matrix, and stay real.
    root = np.linalg.cholesky(a + 1e-9 * np.eye(len(a)))
    eigenvalues = np.linalg.eigvalsh(root.T @ b @ root)
    cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * cross)


def _overlaps(first: np.ndarray, second: np.ndarray) -> list[float]:
    both = np.bitwise_count(first & second).sum(1)
    either = np.bitwise_count(first | second).sum(1)
    return (both / np.maximum(either, 1)).tolist()


def rms_length(displacement: np.ndarray) -> float:
    """Root mean square length of (n, 2), NaN left out; NaN where nothing else is there."""
    square = (displacement**2).sum(-1)
    known = square[np.isfinite(square)]
    return float(np.sqrt(known.mean())) if len(known) else float("nan")
