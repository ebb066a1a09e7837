"""How far a bundle is from what it was made from, on the same frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from pydantic import TypeAdapter

from genforce_collect.errors import DataError
from genforce_infer.bundle import Axis, Bundle, Manifest
from genforce_infer.runtime import Model

# What a bundle may differ from what it was made from: fp32 from PyTorch, the others from fp32.
MAX_DIFFERENCE = {"fp32": 1e-4, "fp16": 1e-2}  # part of full scale
MAX_R2_LOSS = {"fp16": 0.02, "int8": 0.02}
VARIES_N = 1e-6  # standard deviation (N or N m) below which a force is constant


@dataclass(frozen=True)
class Parity:
    """How far a bundle is from another on the same frames, per axis.

    `max_difference`, `mean_difference`: part of full scale, the largest |force| of the reference
    bundle on these frames. `r2`: of the two against each other. With measured forces, `r2_loss` is
    what the variant costs on the axes that vary: R2 of the reference minus that of the variant."""

    frames: int
    max_difference: dict[Axis, float]
    mean_difference: dict[Axis, float]
    r2: dict[Axis, float]
    r2_loss: dict[Axis, float]

    @classmethod
    def in_manifest(cls, manifest: Manifest) -> Parity:
        """The report among its metrics."""
        return TypeAdapter(cls).validate_python(manifest.metrics["parity"])

    def lines(self) -> list[str]:
        """The report as a table of text."""
        head = f"{'axis':>4} {'max diff %FS':>13} {'mean diff %FS':>14} {'R2':>9} {'R2 loss':>9}"
        rows = [
            f"{axis:>4} {100 * self.max_difference[axis]:13.4f} "
            f"{100 * self.mean_difference[axis]:14.4f} {self.r2[axis]:9.5f} "
            + (f"{self.r2_loss[axis]:9.5f}" if axis in self.r2_loss else f"{'-':>9}")
            for axis in self.r2
        ]
        return [head, *rows, f"{self.frames} frames"]

    def problem(self, precision: str) -> str:
        """What is beyond the limits of this precision; empty where nothing is."""
        return ", ".join(
            f"{name} of {axis} {value:.1e} > {limits[precision]:.0e}"
            for name, values, limits in (
                ("max difference", self.max_difference, MAX_DIFFERENCE),
                ("R2 loss", self.r2_loss, MAX_R2_LOSS),
            )
            for axis, value in values.items()
            if value > limits.get(precision, np.inf)
        )


def with_parity(manifest: Manifest, parity: Parity) -> Manifest:
    """The manifest with a parity report among its metrics."""
    return manifest.model_copy(update={"metrics": {**manifest.metrics, "parity": asdict(parity)}})


def compare(
    reference: Bundle,
    variant: Bundle,
    images: Sequence[np.ndarray],
    measured: Sequence[np.ndarray] = (),
) -> Parity:
    """Run both bundles over sequences (T, C, H, W), states carried from zero in each; `measured`:
    sequences (T, A) of forces in the order of the outputs. Raises `DataError` without frames."""
    if not images:
        raise DataError("parity needs frames: give a data set")
    a, b = (run_sequences(bundle, images) for bundle in (reference, variant))
    return parity_of(a, b, reference.manifest.outputs, measured)


def parity_of(
    reference: np.ndarray,
    variant: np.ndarray,
    outputs: Sequence[Axis],
    measured: Sequence[np.ndarray] = (),
) -> Parity:
    """`Parity` of forces (N, A) however they were computed, as by PyTorch and by a bundle."""
    full_scale = np.maximum(np.abs(reference).max(0), 1e-9)
    difference = np.abs(variant - reference) / full_scale

    def named(values: np.ndarray) -> dict[Axis, float]:
        return {axis: float(v) for axis, v in zip(outputs, values, strict=True)}

    loss: dict[Axis, float] = {}
    if measured:
        truth = np.concatenate(list(measured))
        varies = dict(zip(outputs, truth.std(0) > VARIES_N, strict=True))
        loss = named(_r2(truth, reference) - _r2(truth, variant))
        loss = {axis: value for axis, value in loss.items() if varies[axis]}
    return Parity(
        len(reference),
        named(difference.max(0)),
        named(difference.mean(0)),
        named(_r2(reference, variant)),
        loss,
    )


def run_sequences(bundle: Bundle, images: Sequence[np.ndarray]) -> np.ndarray:
    """Forces (sum of T, A) in N and N m of a bundle on sequences (T, C, H, W), on the CPU."""
    model = Model(bundle, "cpu")
    stream = model.stream()
    scale, offset = bundle.manifest.normalisation.scale, bundle.manifest.normalisation.offset
    forces = []
    for sequence in images:
        stream.reset()
        for image in sequence:
            stream.image[0] = image
            forces.append(stream.step()["force"][0])
    return np.array(forces, np.float64) * scale + offset


def _r2(truth: np.ndarray, guess: np.ndarray) -> np.ndarray:
    rest = ((truth - guess) ** 2).sum(0)
    total = ((truth - truth.mean(0)) ** 2).sum(0)
    return 1 - rest / np.maximum(total, 1e-30)
