"""A trained model (models/array_1) on contacts of the virtual cell's sensor that it has not seen:
how right it is, what it knows of its errors, what int8 and fp16 cost. And how far ONNX Runtime is
from PyTorch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from bench_infer import AXES, compact_graph, field_stages, write
from rows import Row

from genforce_collect.config import load_sensor
from genforce_collect.trajectory import load_plan
from genforce_infer.bundle import Bundle, read_bundle
from genforce_infer.labelled import LabelledFrames
from genforce_infer.parity import parity_of, run_sequences
from genforce_infer.pipeline import ForcePipeline
from genforce_infer.preprocess import area_average
from genforce_infer.quantize import Precision, make_variant
from genforce_infer.runtime import Model
from genforce_sim.collection import CollectionSpec, frame_tips
from genforce_sim.sensor import SimulatedSensor

MODEL = Path(__file__).resolve().parent.parent / "models" / "array_1" / "bundle"
SENSOR, INDENTER = "array_1", "sphere"
CONTACTS, SEED = 8, 1  # the model's own plan has another seed
REST_FRAMES = 15
REST_POSE = np.array([0, 0, 1e-3, np.pi, 0, 0])


@dataclass(frozen=True)
class Recording:
    """What the pipeline made of one contact: marker images (T, 480, 640), forces (T, 3) N."""

    masks: list[np.ndarray]
    predicted: np.ndarray
    deviation: np.ndarray
    measured: np.ndarray


def bench() -> list[Row]:
    """Agreement, coverage, and parity of precisions."""
    bundle = read_bundle(MODEL)
    contacts = record(bundle)
    predicted, deviation, measured = (
        np.concatenate([getattr(contact, name) for contact in contacts])
        for name in ("predicted", "deviation", "measured")
    )
    errors = np.abs(predicted - measured)
    r2 = 1 - (errors**2).sum(0) / ((measured - measured.mean(0)) ** 2).sum(0)
    rows = [
        Row(f"force_model: R2 of F{axis}", float(v), "") for axis, v in zip("xyz", r2, strict=True)
    ]
    rows += [
        Row(
            f"force_model: errors within {times} stated deviation{'s' * (times > 1)}",
            100 * float((errors <= times * deviation).mean()),
            "%",
        )
        for times in (1, 2)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("int8", "fp16"):
            rows.append(cost_of(precision, bundle, contacts, Path(folder) / precision))
        rows += parity_rows(images_of(contacts[0]), Path(folder))
    return rows


def record(bundle: Bundle) -> list[Recording]:
    """Answer the frames of simulated contacts one after the other, as a camera shows them."""
    sensor = load_sensor(SENSOR)
    plan = load_plan(f"random:{CONTACTS}:{SEED}", sensor)
    spec = CollectionSpec(sensor, plan)
    simulated, noise = SimulatedSensor(sensor, INDENTER, seed=0), np.random.default_rng(SEED)
    pipeline = ForcePipeline(Model(bundle), sensor, stale_s=0)
    number, recordings = 0, []
    for contact in plan.contacts:
        tips, _ = frame_tips(spec, contact)
        poses = [REST_POSE] * REST_FRAMES + [np.array([*tip, np.pi, 0, 0]) for tip in tips]
        rows, masks = [], []
        for pose in poses:
            state = simulated.step(pose, 1 / spec.rate_hz)
            image = simulated.render(state, noise).image
            jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
            estimate = pipeline.process_jpeg(jpeg, round(number * 1e9 / spec.rate_hz))
            number += 1
            if estimate.wrench is not None:
                rows.append((estimate.wrench, estimate.standard_deviation, state.wrench))
                masks.append(pipeline.frontend.process_jpeg(jpeg).mask)
        predicted, deviation, measured = np.array(rows)[:, :, :3].transpose(1, 0, 2)
        recordings.append(Recording(masks, predicted, deviation, measured))
    return recordings


def images_of(contact: Recording) -> np.ndarray:
    """What a network reads over a contact, (T, 2, 120, 160)."""
    small = [area_average(mask, (120, 160)) for mask in contact.masks]
    return np.stack([np.stack([image, small[0]]) for image in small])


def cost_of(precision: Precision, bundle: Bundle, contacts: list[Recording], folder: Path) -> Row:
    """Largest loss of R2 of an axis, with ranges from every other contact, judged by the rest."""
    ranges, others = (
        LabelledFrames([images_of(c) for c in part], [c.measured for c in part])
        for part in (contacts[::2], contacts[1::2])
    )
    variant = make_variant(bundle, precision, folder, ranges.images)
    reference, changed = (run_sequences(b, others.images)[:, :3] for b in (bundle, variant))
    parity = parity_of(reference, changed, bundle.manifest.outputs[:3], others.measured)
    return Row(f"force_model: R2 lost by {precision}", max(parity.r2_loss.values()), "", "<= 0.02")


def parity_rows(images: np.ndarray, folder: Path) -> list[Row]:
    """Largest difference between ONNX Runtime and PyTorch over a contact, part of full scale."""
    import torch

    from genforce_train.export import ForceStep
    from genforce_train.models.field import FieldNet
    from genforce_train.models.force import ChangeMaps, CompactForceNet, FieldForceNet

    torch.manual_seed(SEED)
    compact, field, force = CompactForceNet(), FieldNet(), FieldForceNet()
    graph = compact_graph(folder / "compact.onnx", net=compact)
    rows = []
    direct = write(folder / "direct", "direct", {"force.onnx": graph})
    in_field = write(folder / "field", "field", field_stages(folder / "graphs", field, force))
    for name, step, bundle in (
        ("direct", ForceStep(ChangeMaps(), compact), direct),
        ("field", ForceStep(field, force), in_field),
    ):
        step.eval()
        state, forces = step.net.zero_state(), []
        with torch.inference_mode():
            for image in torch.from_numpy(images):
                answer, state, _ = step(image[None], state)
                forces.append(answer[0].numpy())
        parity = parity_of(np.array(forces), run_sequences(read_bundle(bundle), [images]), AXES)
        worst = max(parity.max_difference.values())
        rows.append(
            Row(f"force_model: {name}, ONNX against PyTorch, of full scale", worst, "", "<= 1e-4")
        )
    return rows
