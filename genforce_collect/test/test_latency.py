"""Camera latency from contacts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from genforce_collect.latency import contact_spans, lag_s
from genforce_collect.trajectory import Phase


@pytest.mark.parametrize("lag", [0.0, 0.012, 0.08])
@pytest.mark.parametrize("fps", [30, 60])
def test_the_lag_of_a_camera_is_found_to_a_fraction_of_a_frame(lag: float, fps: int) -> None:
    rng = np.random.default_rng(0)
    force_t = np.arange(0, 9, 0.001)
    phase = np.interp(force_t % 3, [0, 0.5, 1.0, 1.4, 1.8, 2.3, 3.0], [0, 0, 1, 1, 1, 0, 0])
    sideways = np.interp(force_t % 3, [0, 1.0, 1.4, 1.8, 3.0], [0, 0, 1, 0, 0])
    force = np.stack([1.5 * sideways, -0.5 * sideways, -4 * phase**1.5], axis=1)
    image_t = np.arange(0.2, 8.8, 1 / fps) + 0.004
    moved = 6 * np.interp(image_t - lag, force_t, phase + 0.5 * sideways)
    motion = moved + rng.normal(0, 0.05, len(moved))
    noisy = force + rng.normal(0, 0.02, force.shape)
    assert lag_s(force_t, noisy, image_t, motion) == pytest.approx(lag, abs=0.004)


def test_a_press_without_shear_is_a_contact_too() -> None:
    phases = [Phase.APPROACH, Phase.DOWN, Phase.UP, Phase.DONE]
    phases += [Phase.APPROACH, Phase.NORMAL_INC, Phase.SHEAR_INC, Phase.INVALID]
    phases += [Phase.APPROACH, Phase.NORMAL_INC, Phase.NORMAL_DEC, Phase.DONE]
    messages = [
        ("", second * 10**9, 0, SimpleNamespace(phase=int(phase)))
        for second, phase in enumerate(phases)
    ]
    reader = SimpleNamespace(topics=["/genforce/contact"], messages=lambda _: messages)
    assert contact_spans(reader) == [(1.0, 3.0), (9.0, 11.0)]
