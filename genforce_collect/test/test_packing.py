"""The stored form of marker images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genforce_collect.errors import DataError
from genforce_collect.markers.packing import PACKED_BYTES, pack_mask, unpack_mask


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_packing_is_packbits_and_comes_back_whole(seed: int, density: float) -> None:
    mask = (np.random.default_rng(seed).random((480, 640)) < density).astype(np.uint8)
    packed = pack_mask(mask)
    assert packed.nbytes == PACKED_BYTES == 38_400
    assert np.array_equal(packed, np.packbits(mask.ravel()))
    assert np.array_equal(unpack_mask(packed), mask)
    assert np.array_equal(unpack_mask(packed.tobytes()), mask)


def test_any_nonzero_value_is_a_marker() -> None:
    mask = np.zeros((480, 640), np.uint8)
    mask[3, 5] = 255
    assert np.argwhere(unpack_mask(pack_mask(mask))).tolist() == [[3, 5]]


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(DataError, match="480"):
        pack_mask(np.zeros((640, 480), np.uint8))
    with pytest.raises(DataError, match="38400"):
        unpack_mask(np.zeros(100, np.uint8))
