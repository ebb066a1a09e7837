"""The stored form of a marker image: `numpy.packbits` over 480×640 pixels, row-major."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from genforce_collect.errors import DataError

HEIGHT, WIDTH = 480, 640
PACKED_BYTES = HEIGHT * WIDTH // 8


def pack_mask(mask: NDArray[np.generic]) -> NDArray[np.uint8]:
    """(480, 640) mask, nonzero = marker, as 38,400 uint8. Raises `DataError` on another shape."""
    if mask.shape != (HEIGHT, WIDTH):
        raise DataError(f"marker mask of shape {mask.shape}: must be ({HEIGHT}, {WIDTH})")
    return np.packbits(mask)


def unpack_mask(packed: NDArray[np.uint8] | bytes) -> NDArray[np.uint8]:
    """38,400 packed bytes as a (480, 640) uint8 mask of 0 and 1. Raises `DataError`."""
    data = np.frombuffer(packed, np.uint8) if isinstance(packed, bytes) else np.asarray(packed)
    if data.dtype != np.uint8 or data.size != PACKED_BYTES:
        raise DataError(
            f"packed marker mask of {data.size} {data.dtype} values: must be {PACKED_BYTES} uint8"
        )
    return np.unpackbits(data.ravel()).reshape(HEIGHT, WIDTH)
