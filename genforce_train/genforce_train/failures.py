"""Where a model fails: its worst contacts with their frames, and errors by indenter and phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from genforce_collect.errors import DataError
from genforce_collect.html import (
    Picture,
    Pictures,
    Section,
    Table,
    bitmap,
    plot,
)
from genforce_collect.layout import unpack
from genforce_train.build import open_data
from genforce_train.cache import Cache
from genforce_train.checkpoint import Checkpoint
from genforce_train.evaluate import AXES, Scores, score
from genforce_train.models.force import MODELS
from genforce_train.pairs import Pairs
from genforce_train.train_force import ForceSettings, judged_labels, predict, source_of, split_of
from genforce_train.translate import translate
from genforce_train.translations import marker_errors, rms_length

PHASES = {2: "press", 3: "shear", 4: "shear back", 5: "release", 8: "down", 9: "up"}
CONTACT_N = 0.1  # measured force above which there is contact
FIRST_BGR, SECOND_BGR, BOTH_BGR = (80, 200, 80), (60, 60, 255), (255, 255, 255)


@dataclass(frozen=True)
class ForceErrors:
    """Forces over whole contacts: rows of `cache`, and predicted and measured (n, k) N of each.
    `rest` (m, k) N is what was predicted without contact."""

    cache: Cache
    contacts: Sequence[int]
    predicted: Sequence[np.ndarray]
    measured: Sequence[np.ndarray]
    rest: np.ndarray

    @property
    def scores(self) -> Scores:
        """Over all contacts."""
        return score(np.concatenate(self.predicted), np.concatenate(self.measured), self.rest)

    def of_peak(self) -> np.ndarray:
        """(contacts,) mean length of the force's error over the contact's largest force."""
        return np.array(
            [
                _length(ours - own).mean() / max(float(_length(own).max()), 1e-6)
                for ours, own in zip(self.predicted, self.measured, strict=True)
            ]
        )


def force_errors(
    saved: Checkpoint, use: str, data: str = "", sensors: Sequence[str] = ()
) -> ForceErrors:
    """What a force model says about contacts of one use ("train", "validation", "test"; "all").

    `data`, `sensors`: other than those it was trained on. Raises `DataError` where none are left.
    """
    changes: dict[str, Any] = {"data": data} if data else {}
    changes |= {"sensors": tuple(sensors)} if sensors else {}
    settings = ForceSettings.model_validate(saved.meta["settings"] | changes)
    cache = open_data(settings.data)
    split = split_of(settings, cache)
    uses = ("train", "validation", "test") if use == "all" else (use,)
    contacts = sorted(row for name in uses for row in getattr(split, name))
    if not contacts:
        raise DataError(
            f"{settings.data}: no contact for {use} with these settings; give --use, or --sensors "
            f"of {', '.join(cache.sensors)}"
        )
    net = MODELS[saved.meta["model"]](outputs=len(saved.meta["outputs"]))
    saved.restore_model(net)
    source, labels = source_of(settings, cache), judged_labels(settings, cache, contacts)
    predicted, measured, rest = predict(net, source, cache, contacts, saved.meta, wrench=labels)
    ends = np.cumsum(np.diff(cache.bounds)[contacts])[:-1]
    measured = measured[:, : predicted.shape[1]]
    return ForceErrors(cache, contacts, np.split(predicted, ends), np.split(measured, ends), rest)


def force_sections(errors: ForceErrors, worst: int) -> list[Section]:
    """Scores, confusion, errors by indenter and phase, and the worst contacts with frames."""
    rows = [
        (axis, f"{errors.scores.mae[axis]:.4f}", f"{errors.scores.r2[axis]:.3f}")
        for axis in errors.scores.mae
    ]
    order = np.argsort(-errors.of_peak())[:worst]
    pictures = [picture for number in order for picture in _contact_pictures(errors, int(number))]
    return [
        Section(
            "Scores", (Table(("axis", "MAE (N, N m)", "R²"), rows), Pictures([_scatter(errors)]))
        ),
        Section("Contact or none", (confusion(errors),)),
        Section("Where the errors are", (_pictures(_by_phase(errors)),)),
        Section("Worst contacts", (_pictures(*pictures),)),
    ]


def confusion(errors: ForceErrors) -> Table:
    """Frames with and without contact, as measured and as predicted."""
    measured = np.concatenate([_length(own) for own in errors.measured]) > CONTACT_N
    predicted = np.concatenate([_length(ours) for ours in errors.predicted]) > CONTACT_N
    measured = np.append(measured, np.zeros(len(errors.rest), bool))
    predicted = np.append(predicted, _length(errors.rest) > CONTACT_N)
    rows = [
        (name, *(str(int((predicted[chosen] == answer).sum())) for answer in (True, False)))
        for name, chosen in (("contact", measured), ("none", ~measured))
    ]
    caption = f"frames with more and less than {CONTACT_N} N"
    return Table(("measured", "predicted contact", "predicted none"), rows, caption)


def _by_phase(errors: ForceErrors) -> Picture:
    keys = [errors.cache.keys[row] for row in errors.contacts]
    phases = [
        np.array(errors.cache.array("phase")[errors.cache.rows(row)]) for row in errors.contacts
    ]
    indenters = sorted({key.indenter for key in keys})
    known = [phase for phase in PHASES if any((part == phase).any() for part in phases)]
    columns = known or [int(phases[0][0])]
    error = np.full((len(indenters), len(columns)), np.nan)
    for line, indenter in enumerate(indenters):
        for column, phase in enumerate(columns):
            parts = [
                _length(ours - own)[part == phase]
                for key, part, ours, own in zip(
                    keys, phases, errors.predicted, errors.measured, strict=True
                )
                if key.indenter == indenter
            ]
            if sum(map(len, parts)):
                error[line, column] = np.concatenate(parts).mean()

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        shown = axes.imshow(error, aspect="auto", cmap="magma_r", vmin=0)
        axes.set_xticks(range(len(columns)), [PHASES.get(p, "unknown") for p in columns])
        axes.set_yticks(range(len(indenters)), indenters)
        figure.colorbar(shown, label="mean |error| (N)")

    return plot(draw, "error of the force by indenter and phase", (6, 1.5 + 0.3 * len(indenters)))


def _scatter(errors: ForceErrors) -> Picture:
    predicted, measured = np.concatenate(errors.predicted), np.concatenate(errors.measured)

    def draw(figure: Any) -> None:
        for column, axis in enumerate(AXES[:3]):
            plane = figure.add_subplot(1, 3, column + 1)
            x, y = measured[:, column], predicted[:, column]
            plane.axline((0, 0), slope=1, color="0.6", linewidth=1)
            plane.scatter(x, y, s=4, alpha=0.4, linewidths=0)
            plane.set(xlabel=f"measured {axis} (N)", ylabel="predicted" if column == 0 else "")

    return plot(draw, "predicted over measured", (10, 3.4))


def _contact_pictures(errors: ForceErrors, number: int) -> list[Picture]:
    """Forces over the contact, and the frame with the largest error against the reference."""
    row, ours, own = errors.contacts[number], errors.predicted[number], errors.measured[number]
    key = errors.cache.keys[row]
    frame = int(_length(ours - own).argmax())

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for column, axis in enumerate(AXES[:3]):
            axes.plot(own[:, column], color=f"C{column}", label=f"{axis} measured")
            axes.plot(ours[:, column], color=f"C{column}", linestyle="--", label="predicted")
        axes.axvline(frame, color="0.6", linewidth=1)
        axes.set(xlabel="frame", ylabel="N")
        axes.legend(ncols=3, fontsize="x-small")

    mask = np.array(errors.cache.bits[errors.cache.rows(row)][frame])
    error = errors.of_peak()[number]
    return [
        plot(draw, f"{key}: mean error {100 * error:.1f} % of its peak", (5, 3)),
        overlay(mask, errors.cache.reference(key.sensor), f"{key}, frame {frame} over reference"),
    ]


# --- translations -------------------------------------------------------------------------------


def translation_sections(net: Any, pairs: Pairs, use: str, worst: int) -> list[Section]:
    """For every ordered pair of sensors the moments whose markers are farthest off."""
    sections = []
    for source, name in enumerate(pairs.sensors):
        for target, other in enumerate(pairs.sensors):
            moments = pairs.of(source, target, use) if source != target else np.empty(0, int)
            if not len(moments):
                continue
            masks, true = (
                pairs.images(np.full(len(moments), s), moments) for s in (source, target)
            )
            made = translate(net, masks, pairs.references[source], pairs.references[target])
            errors = [marker_errors(*images) for images in zip(made, true, strict=True)]
            rms = np.array([rms_length(error) for error in errors])
            pictures = [
                overlay(
                    made[n],
                    true[n],
                    f"{pairs.contacts[moments[n]]}: off by {rms[n]:.2f} px RMS "
                    f"(green: translated, red: true)",
                )
                for n in np.argsort(-np.nan_to_num(rms, nan=np.inf))[:worst]
            ]
            sections.append(Section(f"{name} → {other}", (_pictures(*pictures),)))
    return sections


def overlay(first: np.ndarray, second: np.ndarray, caption: str) -> Picture:
    """Two packed marker images (38400,) over each other: green and red, white where both are."""
    one, two = unpack(first) > 0, unpack(second) > 0
    image = np.zeros((*one.shape, 3), np.uint8)
    image[one], image[two], image[one & two] = FIRST_BGR, SECOND_BGR, BOTH_BGR
    return bitmap(cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), caption)


def _pictures(*pictures: Picture) -> Pictures:
    return Pictures(pictures)


def _length(forces: np.ndarray) -> np.ndarray:
    return np.linalg.norm(forces[:, :3], axis=1)
