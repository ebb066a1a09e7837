"""Marker masks to the image a network reads; the same code at training and at run time."""

from __future__ import annotations

import cv2
import numpy as np

IMAGE_STATISTICS = 10  # length of `image_statistics`


def area_average(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Part of each output pixel that is marker.

    `mask`: (H, W) bool or uint8, nonzero is marker; `size`: (height, width) of the result, not
    larger than the mask. Returns float32 (height, width) in 0..1. Where the sizes divide evenly
    the result is exact, so that it is the same on every machine.
    """
    height, width = size
    if mask.ndim != 2:
        raise ValueError(f"mask must have two dimensions, found shape {mask.shape}")
    if height > mask.shape[0] or width > mask.shape[1]:
        raise ValueError(f"area_average only shrinks: {mask.shape} to {size}")
    whole = (mask != 0).astype(np.float32)
    if mask.shape == (height, width):
        return whole
    return cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)


def network_mask(
    mask: np.ndarray, size: tuple[int, int], px_per_mm: float, wanted_px_per_mm: float | None
) -> np.ndarray:
    """One channel of a network's input, float32 `size`: the whole frame, or the window that shows
    the mask (at `px_per_mm`) at `wanted_px_per_mm`."""
    if wanted_px_per_mm is None:
        return area_average(mask, size)
    return at_scale(mask, size, px_per_mm, wanted_px_per_mm)


def at_scale(
    mask: np.ndarray, size: tuple[int, int], px_per_mm: float, wanted_px_per_mm: float
) -> np.ndarray:
    """`area_average` of the window about the image centre that shows the mask at another scale.

    The window is `size / wanted_px_per_mm` in mm, rounded to whole pixels of the mask; what lies
    outside the mask is empty. Returns float32 `size` in 0..1.
    """
    window = [max(1, round(n * px_per_mm / wanted_px_per_mm)) for n in size]
    cut = np.zeros(window, np.uint8)
    source, target = [], []
    for have, want in zip(mask.shape, window, strict=True):
        length = min(have, want)
        source.append(slice((have - length) // 2, (have - length) // 2 + length))
        target.append(slice((want - length) // 2, (want - length) // 2 + length))
    cut[tuple(target)] = mask[tuple(source)] != 0
    if window[0] < size[0] or window[1] < size[1]:
        return cv2.resize(cut.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
    return area_average(cut, size)


def image_statistics(image: np.ndarray) -> np.ndarray:
    """Ten numbers that say what kind of marker image this is, whatever touches it.

    `image`: (C, h, w) float32, the mask first and its reference second (a mask alone is compared
    with nothing). Returns float32 (10,): coverage; coverage by quadrant; part changed against the
    reference, whole and by sign; edge length; mean size proxy (coverage by edge length).
    """
    mask = image[0]
    reference = image[1] if len(image) > 1 else np.zeros_like(mask)
    change = mask - reference
    h, w = mask.shape[0] // 2, mask.shape[1] // 2
    edges = float(np.abs(mask[1:] - mask[:-1]).mean() + np.abs(mask[:, 1:] - mask[:, :-1]).mean())
    coverage = float(mask.mean())
    return np.array(
        [
            coverage,
            mask[:h, :w].mean(),
            mask[:h, w:].mean(),
            mask[h:, :w].mean(),
            mask[h:, w:].mean(),
            np.abs(change).mean(),
            np.maximum(change, 0).mean(),
            np.maximum(-change, 0).mean(),
            edges,
            coverage / (edges + 1e-6),
        ],
        np.float32,
    )
