"""Translation with a trained marker-to-marker model: of images, and of whole data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import ContactKey, Layout, pack, unpack
from genforce_train.checkpoint import load_checkpoint
from genforce_train.drawing import drawing_of
from genforce_train.models.m2m import (
    CompactTranslator,
    FieldTranslator,
    Translator,
)
from genforce_train.models.sd_turbo import SdTurboTranslator
from genforce_train.sequences import area_images, marker_images
from genforce_train.train_field import load_field

BACKBONES: dict[str, type[Translator]] = {
    "field": FieldTranslator,
    "compact": CompactTranslator,
    "sd_turbo": SdTurboTranslator,
}


@dataclass(frozen=True)
class Translated:
    """What a run of `translate_data` left: contacts in all, and those it made itself."""

    contacts: int
    written: int


def load_m2m(checkpoint: str | Path) -> tuple[Translator, dict[str, Any]]:
    """The model of a checkpoint, ready to run, and the checkpoint's `meta`. Raises `DataError`."""
    saved = load_checkpoint(checkpoint)
    if saved.meta.get("kind") != "m2m":
        raise DataError(f"{checkpoint}: a {saved.meta.get('kind')} checkpoint, expected one of m2m")
    net = BACKBONES[saved.meta["model"]](**saved.meta["shape"])
    saved.restore_model(net)
    return net.eval(), saved.meta


def translator_by(field_model: str | Path) -> FieldTranslator:
    """What translates by a field model alone, without a pair. Raises `DataError`."""
    net = FieldTranslator()
    net.field = load_field(field_model)
    return net.eval()


def load_translator(checkpoint: str | Path) -> Translator:
    """The marker-to-marker model of a checkpoint, or what translates by a field model's."""
    if load_checkpoint(checkpoint).meta.get("kind") == "field":
        return translator_by(checkpoint)
    return load_m2m(checkpoint)[0]


def know_sensor(net: Translator, name: str, reference: np.ndarray) -> None:
    """Tell a model of a sensor: its packed reference, and its file where there is one."""
    net.know(area_images(reference[None])[0], drawing_of(name, reference))


def translate(
    net: Translator,
    masks: np.ndarray,
    source_reference: np.ndarray,
    target_reference: np.ndarray,
    batch: int = 64,
) -> np.ndarray:
    """Packed marker images (n, 38400) of a source as the target would show them, packed;
    references (38400,)."""
    device = next(net.parameters()).device
    net.eval()
    result = np.empty_like(masks)
    whole = torch.from_numpy(unpack(target_reference)).float().to(device)
    with torch.inference_mode():
        for first in range(0, len(masks), batch):
            part = masks[first : first + batch]
            source = marker_images(part, np.tile(source_reference, (len(part), 1))).to(device)
            images = net.whole(source, whole.expand(len(part), 1, -1, -1))
            result[first : first + batch] = pack((images[:, 0] > 0.5).cpu().numpy())
    return result


def translate_data(
    checkpoint: str | Path,
    data: Layout,
    source: str,
    target: str,
    out: str | Path,
    reference: np.ndarray | None = None,
    indenters: Sequence[str] | None = None,
    suffix: str = ".npy",
    batch: int = 64,
    device: str = "cpu",
    quiet: bool = False,
) -> Translated:
    """Write the contacts of `source`, labels and all, as `target` would have seen them, by a
    marker-to-marker model or by a field model.

    `reference` (38400,) is the target's; without, that of the data set. Contacts that are there
    already are left. Raises `DataError` where the source has no contacts, a reference is missing,
    or `out` was made otherwise.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device there; use cpu")
    net = load_translator(checkpoint)
    keys = [
        key
        for key in data.contacts()
        if key.sensor == source and (indenters is None or key.indenter in indenters)
    ]
    if not keys:
        raise DataError(
            f"{data.root}: no contact of '{source}' with these indenters; sensors are "
            f"{', '.join(data.sensors())}"
        )
    own = data.read_reference(source)
    wanted = data.read_reference(target) if reference is None else reference
    know_sensor(net, source, own)
    know_sensor(net, target, wanted)
    net.to(device)
    layout = Layout(out)
    _pin(layout, checkpoint, data, keys, target, wanted)
    written = 0
    for key in track(keys, "translating", disable=quiet):
        made = replace(key, sensor=target)
        if layout.holds(made):
            continue
        contact = data.read(key)
        bits = translate(net, contact.bits, own, wanted, batch)
        layout.write(replace(contact, key=made, bits=bits), suffix)
        written += 1
    rest, wrench = data.read_rest(target) if reference is None else (own[:0], own[:0])
    if not len(rest):
        rest, wrench = data.read_rest(source)
        rest = translate(net, rest, own, wanted, batch)
    layout.write_rest(target, rest, wrench)
    layout.write_reference(target, wanted)
    return Translated(len(keys), written)


def _pin(
    layout: Layout,
    checkpoint: str | Path,
    data: Layout,
    keys: list[ContactKey],
    target: str,
    reference: np.ndarray,
) -> None:
    """Keep beside the result what it was made of; refuse to mix two kinds of it in one folder."""
    source = keys[0].sensor
    digest = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    made_of: dict[str, Any] = {
        "data": str(data.root),
        "source": source,
        "target": target,
        "model": digest,
        "reference": hashlib.sha256(reference.tobytes()).hexdigest(),
    }
    known = layout.provenance()
    if known.get("translated", made_of) != made_of or (layout.contacts() and not known):
        raise DataError(f"{layout.root}: holds other contacts; choose another --out or remove it")
    own = data.provenance().get("contacts", {})
    contacts = {
        str(replace(key, sensor=target)): own.get(str(key), {}) | {"labels_of": source}
        for key in keys
    }
    contacts = known.get("contacts", {}) | contacts
    layout.write_provenance({"translated": made_of, "contacts": contacts})
