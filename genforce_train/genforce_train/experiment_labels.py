"""How good are labels that paired contacts carry to another gel? Told before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genforce_train.build import open_data
from genforce_train.cache import UNSEEN_INDENTERS
from genforce_train.evaluate import AXES
from genforce_train.train_force import ForceSettings, training_labels


def judge_labels(
    data: str, pairs: Sequence[tuple[str, str]], material: Path, calibration: Path
) -> list[dict[str, Any]]:
    """Labels carried to the target of each pair against what it measured, by way: as they are, by
    force-depth curves, by presses with slides; all contacts of seen indenters.

    r2 and error, the sum of absolute errors over that of absolute forces, are by axis."""
    cache = open_data(data)
    results = []
    for source, target in pairs:
        contacts = [
            row
            for row in cache.select([target])
            if cache.keys[row].indenter not in UNSEEN_INDENTERS
        ]
        frames = np.concatenate([np.r_[cache.rows(row)] for row in contacts])
        measured = np.array(cache.wrench)[frames, :3]
        ways: dict[str, dict[str, str]] = {
            "as they are": {},
            "compensated": {"material": str(material), "material_target": target},
            "calibrated": {"calibration": str(calibration)},
        }
        for way, how in ways.items():
            settings = ForceSettings.model_validate(
                {"data": data, "sensors": (target,), "labels_of": source, **how}
            )
            miss = training_labels(settings, cache, contacts)[frames, :3] - measured
            error = abs(miss).sum(0) / abs(measured).sum(0)
            r2 = 1 - (miss**2).sum(0) / ((measured - measured.mean(0)) ** 2).sum(0)
            scores = {
                name: dict(zip(AXES[:3], values.tolist(), strict=True))
                for name, values in (("r2", r2), ("error", error))
            }
            results.append({"source": source, "target": target, "labels": way, **scores})
    return results
