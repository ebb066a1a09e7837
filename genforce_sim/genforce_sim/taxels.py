"""A magnetic taxel array (uSkin): magnets in the skin move, Hall sensors count."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Rest counts, their spread over taxels and the noise are those of a real uSkin at rest; the gains
# give its thousand counts at a firm touch.
REST_COUNTS = (33000.0, 33000.0, 37500.0)
REST_SPREAD = 350.0
NOISE_COUNTS = (2.1, 2.1, 2.2)
COUNTS_PER_MM = (2500.0, 2500.0, -6000.0)  # the z count grows as the magnet is pressed in


def draw_rest_counts(rng: np.random.Generator, taxels: int) -> Array:
    """Rest counts (taxels, 3) int32 of one instance."""
    return np.round(REST_COUNTS + rng.normal(0, REST_SPREAD, (taxels, 3))).astype(np.int32)


def counts_from(displacement_mm: Array, rest: Array, noise: np.random.Generator) -> Array:
    """Raw counts (taxels, 3) int32 of magnets displaced by (taxels, 3) mm in the sensor frame."""
    clean = rest + displacement_mm * np.array(COUNTS_PER_MM)
    return np.round(clean + noise.normal(0, NOISE_COUNTS, rest.shape)).astype(np.int32)
