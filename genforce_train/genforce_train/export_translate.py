"""Write a marker-to-marker model with a force bundle behind it as one bundle: a sensor without
labels is served by the force model of another."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from genforce_collect.errors import ConfigError, DataError
from genforce_infer.bundle import TARGET_REFERENCE, Bundle, InputSpec, read_bundle, write_bundle
from genforce_infer.parity import parity_of, run_sequences, with_parity
from genforce_train.build import open_data
from genforce_train.cache import Cache
from genforce_train.export import OPSET, PARITY_CONTACTS, PARITY_FRAMES, export_graph
from genforce_train.models.m2m import Translator
from genforce_train.sequences import area_images, marker_images
from genforce_train.translate import know_sensor, load_m2m

STAGE = "translate.onnx"


class TranslateStep(nn.Module):
    """One frame of a marker-to-marker model, as it is exported: in the size and channels that the
    force model behind it reads."""

    def __init__(self, net: Translator, spec: InputSpec) -> None:
        super().__init__()
        self.net, self.size, self.with_reference = net, (spec.height, spec.width), spec.channels[1:]

    def forward(self, image: Tensor, target_reference: Tensor) -> Tensor:
        """(1, 2, 120, 160) and (1, 1, 120, 160) -> (1, c, h, w)."""
        image = self.net(image, target_reference).clamp(0, 1)
        if self.with_reference:
            image = torch.cat([image, target_reference], 1)
        if image.shape[2:] == self.size:
            return image
        return functional.interpolate(image, size=self.size, mode="bilinear", align_corners=False)


def export_translate(
    checkpoint: str | Path,
    force: str | Path,
    sensor: str,
    folder: str | Path,
    data: str = "",
    model_id: str = "",
) -> Bundle:
    """Write the bundle that reads `sensor`, translates to the sensor of the force bundle `force`,
    and uses its graphs. References are those of `data` (default: what the model was trained on).

    Raises `DataError` where a reference is missing, or the graph differs from the model.
    """
    bundle = read_bundle(force)
    manifest = bundle.manifest
    if manifest.mode != "direct":
        raise ConfigError(
            f"{force}: mode {manifest.mode}; a direct bundle goes behind a translation"
        )
    net, meta = load_m2m(checkpoint)
    cache = open_data(data or meta["settings"]["data"])
    own, target = cache.reference(sensor), cache.reference(manifest.sensor)
    for name, reference in ((sensor, own), (manifest.sensor, target)):
        know_sensor(net, name, reference)
    own_image, target_image = (area_images(bits[None])[None] for bits in (own, target))
    net.bind(own_image, target_image)
    step = TranslateStep(net, manifest.input).eval()
    height, width = net.size
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / STAGE
        example = torch.cat([own_image, own_image], 1), target_image
        inputs = ("image", "target_reference")
        export_graph(step, example, inputs, ("source_image",), graph)
        packed = io.BytesIO()
        np.save(packed, target)
        files: dict[str, Path | bytes] = {
            STAGE: graph,
            TARGET_REFERENCE: packed.getvalue(),
            **{name: bundle.path(name) for name in manifest.files},
        }
        whole = manifest.model_copy(
            update={
                "model_id": model_id or f"{sensor}-{meta['model']}-{manifest.model_id}",
                "mode": "translate",
                "sensor": sensor,
                "input": InputSpec(height=height, width=width),
                "stages": (STAGE, *manifest.stages),
                "opset": OPSET,
                "metrics": {"translation": meta.get("scores", {})},
                "provenance": {"translation": meta["settings"], "force": manifest.provenance},
            }
        )
        draft = write_bundle(Path(scratch) / "bundle", whole, files)
        images = _images(cache, sensor)
        with torch.inference_mode():
            translated = [
                torch.cat([step(image[None], target_image) for image in sequence]).numpy()
                for sequence in images
            ]
        parity = parity_of(
            run_sequences(bundle, translated),
            run_sequences(draft, [sequence.numpy() for sequence in images]),
            manifest.outputs,
        )
        if problem := parity.problem("fp32"):
            raise DataError(f"{checkpoint}: the exported graph is not the model: {problem}")
        return write_bundle(folder, with_parity(whole, parity), files)


def _images(cache: Cache, sensor: str) -> list[Tensor]:
    """Frames (n, 2, 120, 160) of some contacts of a sensor; its reference where it has none."""
    reference = cache.reference(sensor)
    contacts = cache.select([sensor])
    chosen = contacts[:: max(1, len(contacts) // PARITY_CONTACTS)][:PARITY_CONTACTS]
    frames = [np.array(cache.bits[cache.rows(row)][:PARITY_FRAMES]) for row in chosen]
    return [
        marker_images(bits, np.tile(reference, (len(bits), 1)))
        for bits in frames or [reference[None]]
    ]
