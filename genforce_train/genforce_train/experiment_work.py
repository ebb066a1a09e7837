"""The models and scores of an experiment: each made once, a process a core, and kept as files."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from genforce_collect.layout import Layout, write_json
from genforce_collect.processes import local_workers
from genforce_train.cache import UNSEEN_INDENTERS, Cache, open_layout, split_contacts
from genforce_train.experiment import Method, Pair, Recipe, seen_indenters
from genforce_train.sequences import FrameSource

# What things take, in steps of a force model; only to tell how long the rest will take.
M2M_STEP, MAPS, REDRAWN, SCORES = 8.0, 1500.0, 1500.0, 60.0


@dataclass(frozen=True)
class Task:
    """Something to make: `name` and a function of no arguments that makes it."""

    name: str
    make: Callable[[], Any]
    cost: float


@dataclass(frozen=True)
class Training:
    """A model of a run, and the settings that it is trained with."""

    name: str
    stage: str  # force or m2m
    values: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What the methods of one run need, and where it is."""

    recipe: Recipe
    data: str
    out: Path
    curves: dict[str, Any]  # force over depth by sensor, where gels differ

    # --- models -------------------------------------------------------------------------------

    def learned(self, pair: Pair, method: Method) -> Training:
        """The force model of the source, or of the target where the method is an oracle."""
        sensor = pair[1] if method.oracle else pair[0]
        name = f"{sensor}_{method.input}" + f"_{method.steps}" * bool(method.steps)
        changes = {"steps": method.steps} if method.steps else {}
        return self._force(name, {"sensors": (sensor,), "input": method.input} | changes)

    def adapted(self, pair: Pair, method: Method) -> Training | None:
        """The source's model after training on the target's frames of paired contacts, with the
        labels that the source measured; of its calibration contacts, with its own; or on the
        source's contacts with the target's markers."""
        if not method.adapted:
            return None
        source, target = pair
        calibration = str(self.out / "calibration")
        changes: dict[str, Any] = {
            "sensors": (target,),
            "input": method.input,
            "init": str(self.checkpoint(self.learned(pair, method))),
            "steps": self.recipe.adapt_steps,
            "learning_rate": 1e-3,
        }
        name = f"{source}-{target}_{method.input}"
        if method.slides:
            changes |= {"data": calibration, "validation": 0.0}  # contacts that no one is tested on
            return self._force(f"{name}_slides", changes)
        if method.redrawn:
            return self._force(f"{name}_redrawn", changes | {"data": str(self.redrawn(pair))})
        changes |= {"labels_of": source, "few_shot": method.shots}
        name += f"_{method.shots}"
        if method.calibrated:
            changes |= {"calibration": calibration}
            name += "_calibrated"
        elif method.compensated:
            changes |= {"material": str(self.out / "material"), "material_target": target}
        return self._force(name, changes)

    def redrawn(self, pair: Pair) -> Path:
        """Data set of the source's contacts drawn anew with the target's markers."""
        return self.out / "redrawn" / "-".join(pair)

    def judged(self, pair: Pair, method: Method) -> Training:
        """The force model that is scored."""
        return self.adapted(pair, method) or self.learned(pair, method)

    def translator(self, method: Method) -> Training | None:
        """One marker-to-marker model for all the sensors, from so many pairs an indenter."""
        if not method.backbone:
            return None
        recipe = self.recipe
        steps = recipe.m2m_steps * (recipe.painter_steps if method.backbone == "compact" else 1)
        values: dict[str, Any] = {
            "data": self.data,
            "sensors": recipe.sensors,
            "unseen": UNSEEN_INDENTERS,
            "few_shot": method.shots,
            "backbone": method.backbone,
            "steps": steps,
            "evaluate_every": steps,
            "seed": recipe.seed,
        }
        if method.backbone == "field":
            values["field_model"] = recipe.field_model
        else:
            values["encoder"] = recipe.encoder
        return self._training(f"m2m_{method.backbone}_{method.shots}", "m2m", values)

    def _force(self, name: str, changes: dict[str, Any]) -> Training:
        values = {
            "data": self.data,
            "unseen": UNSEEN_INDENTERS,
            "field_model": self.recipe.field_model,
            "refinements": self.recipe.refinements,
            "steps": self.recipe.steps,
            "seed": self.recipe.seed,
        } | changes
        values["evaluate_every"] = values["steps"]  # none is chosen by a score on what is tested on
        if values["input"] == "markers":
            values |= {"field_model": "", "refinements": 0}
        return self._training(name, "force", values)

    def _training(self, name: str, stage: str, values: dict[str, Any]) -> Training:
        return Training(name, stage, values | {"out": str(self.out / "models" / name)})

    def checkpoint(self, training: Training) -> Path:
        """Where its model is, once it is trained."""
        return self.out / "models" / training.name / "best.safetensors"

    def trained(self, training: Training) -> bool:
        """Whether it is there and whole."""
        return (self.out / "models" / training.name / "metrics.json").is_file()  # written last

    # --- scores -------------------------------------------------------------------------------

    def score_file(self, pair: Pair, method: Method) -> Path:
        """Where the scores of a method on a pair are; those of an oracle are of its target."""
        name = f"{self.judged(pair, method).name}_on_{pair[1]}"
        name += f"_translated_{method.backbone}" if method.backbone else ""
        name += "_compensated" * self._gains(method)
        return self.out / "scores" / f"{name}.json"

    def score(self, pair: Pair, method: Method) -> None:
        """Write the scores of a method on a pair, for seen and unseen indenters, and pictures."""
        from genforce_train.carried import CarriedChanges
        from genforce_train.evaluate import of_peak, scatter, score
        from genforce_train.materials import runtime_correction

        source, target = pair
        cache, path = open_layout(self.data), self.score_file(pair, method)
        checkpoint = self.checkpoint(self.judged(pair, method))
        translator = self.translator(method)
        frames = None
        if translator is not None:
            frames = CarriedChanges(cache, self.checkpoint(translator), source)
        result: dict[str, Any] = {}
        for seen, contacts in tests(cache, target, self.recipe.seed).items():
            predicted, measured, rest = predict_with(checkpoint, cache, target, contacts, frames)
            ends = np.cumsum(np.diff(cache.bounds)[contacts])
            if self._gains(method):
                material = runtime_correction(*(self.curves[sensor] for sensor in pair))
                predicted = _corrected(predicted, ends, material)
            result[seen] = {
                **score(predicted, measured, rest).as_dict(),
                "fz_of_peak": of_peak(predicted[:, 2], measured[:, 2], ends),
                "checkpoint": str(checkpoint),
                "seed": self.recipe.seed,
            }
            picture = self.out / "pictures" / f"{path.stem}_{seen}.png"
            scatter(picture, predicted, measured, f"{path.stem}, {seen}")
        if translator:
            metrics = self.out / "models" / translator.name / "metrics.json"
            images = json.loads(metrics.read_text())["test"]
            result["unseen"]["images"] = images[f"{target}-{source}"]
        write_json(path, result)

    def _gains(self, method: Method) -> bool:
        """Whether its predictions are corrected, and not the labels it was trained on."""
        return method.compensated and (bool(method.backbone) or not method.shots)


def carry_out_all(
    work: Work, jobs: Sequence[tuple[Pair, Method]], workers: int
) -> list[dict[str, Any]]:
    """Make what is missing for these, and return one result a job and set of indenters."""
    _make(_rounds(work, jobs), workers)
    return [
        {"source": pair[0], "target": pair[1], "method": method.name, "indenters": seen, **scores}
        for pair, method in jobs
        for seen, scores in json.loads(work.score_file(pair, method).read_text()).items()
    ]


def tests(cache: Cache, target: str, seed: int) -> dict[str, list[int]]:
    """The contacts a method is tested on: those of unseen indenters, and those of seen ones that
    no model learns from (by number, so on no sensor)."""
    split = split_contacts(cache, cache.select([target]), seed, unseen=UNSEEN_INDENTERS)
    return {"seen": split.validation, "unseen": split.test}


def predict_with(
    checkpoint: Path,
    cache: Cache,
    sensor: str,
    contacts: list[int],
    frames: FrameSource | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a force checkpoint predicts for contacts of a sensor, as `train_force.predict`; it is
    shown `frames` instead of its usual inputs, where given."""
    from genforce_train.checkpoint import load_checkpoint
    from genforce_train.models.force import MODELS
    from genforce_train.train_force import ForceSettings, predict, source_of

    saved = load_checkpoint(checkpoint)
    net = MODELS[saved.meta["model"]](outputs=len(saved.meta["outputs"]))
    saved.restore_model(net)
    settings = ForceSettings.model_validate(saved.meta["settings"])
    frames = frames or source_of(settings.model_copy(update={"sensors": (sensor,)}), cache)
    return predict(net, frames, cache, contacts, saved.meta)


def _corrected(predicted: np.ndarray, ends: np.ndarray, material: Any) -> np.ndarray:
    """Predictions of whole contacts times the gain over load, as it is applied live."""
    from genforce_infer.postprocess import MaterialGain

    parts = []
    for part in np.split(predicted, ends[:-1]):
        gain = MaterialGain(material)
        parts.append(part * np.array([[gain(-float(fz))] for fz in part[:, 2]]))
    return np.concatenate(parts)


# --- processes ----------------------------------------------------------------------------------


def _rounds(work: Work, jobs: Sequence[tuple[Pair, Method]]) -> list[list[Task]]:
    """What is missing for these; each round needs what those before it make."""
    first: dict[str, Training] = {}
    adapted: dict[str, Training] = {}
    scores: dict[Path, tuple[Pair, Method]] = {}
    for pair, method in jobs:
        for training, trainings in (
            (work.learned(pair, method), first),
            (work.translator(method), first),
            (work.adapted(pair, method), adapted),
        ):
            if training is not None and not work.trained(training):
                trainings[training.name] = training
        if not (path := work.score_file(pair, method)).is_file():
            scores[path] = pair, method
    redrawn = [job[0] for job in jobs if job[1].redrawn and work.judged(*job).name in adapted]
    return [
        _map_tasks(work) if first or adapted else [],
        [
            *(_training_task(training) for training in first.values()),
            *(Task("-".join(pair), partial(_redraw, work, pair), REDRAWN) for pair in redrawn),
        ],
        [_training_task(training) for training in adapted.values()],
        [
            Task(f"scores of {path.stem}", partial(work.score, *job), SCORES)
            for path, job in scores.items()
        ],
    ]


def _map_tasks(work: Work) -> list[Task]:
    """What models read, made before two of them would make it at a time."""
    recipe = work.recipe
    makers = [partial(_change_maps, work.data)]
    if "field" in recipe.roads:
        data = [work.data] + [str(work.out / "calibration")] * recipe.calibrated
        makers += [partial(_fields, one, recipe) for one in data]
    return [Task("inputs", make, MAPS) for make in makers]


def _change_maps(data: str) -> None:
    from genforce_train.train_force import ForceSettings, source_of

    source_of(ForceSettings(data=data), open_layout(data))


def _fields(data: str, recipe: Recipe) -> None:
    from genforce_train.train_field import fields_of

    fields_of(recipe.field_model, open_layout(data), recipe.sensors, recipe.refinements)


def _redraw(work: Work, pair: Pair) -> None:
    """Draw the source's contacts of seen indenters anew with the target's markers, by the gel's
    displacement and the target's reference."""
    from genforce_train.translate import translate_data

    source, target = pair
    indenters = seen_indenters(open_layout(work.data))
    data, out, model = Layout(work.data), work.redrawn(pair), work.recipe.field_model
    translate_data(model, data, source, target, out, indenters=indenters, quiet=True)


def _training_task(training: Training) -> Task:
    cost = training.values["steps"] * (M2M_STEP if training.stage == "m2m" else 1.0)
    return Task(training.name, partial(_train, training), cost)


def _train(training: Training) -> None:
    from genforce_train import train_force, train_m2m

    _keep_command(training)
    if training.stage == "m2m":
        settings = train_m2m.M2mSettings.model_validate(training.values)
        train_m2m.train(settings, quiet=True)
    else:
        train_force.train(train_force.ForceSettings.model_validate(training.values), quiet=True)


def _keep_command(training: Training) -> None:
    """Write the command that trains with these settings beside its model."""

    def word(value: Any) -> str:
        return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)

    settings = (f"{key}={word(value)}" for key, value in training.values.items() if value != "")
    folder = Path(training.values["out"])
    folder.mkdir(parents=True, exist_ok=True)
    command = f"genforce train {training.stage} {' '.join(settings)}\n"
    (folder / "command.txt").write_text(command)


def _make(rounds: Iterable[list[Task]], workers: int) -> None:
    """Make all tasks of a round, then those of the next, so many at a time, the longest first."""
    rounds = [sorted(tasks, key=lambda task: -task.cost) for tasks in rounds]
    clock = _Clock([task.cost for tasks in rounds for task in tasks])
    with local_workers(), warnings.catch_warnings():
        # A worker that has grown, by mapped files too, is replaced between two tasks.
        warnings.filterwarnings("ignore", "A worker stopped", UserWarning)
        for tasks in filter(None, rounds):
            parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered")
            for name, cost in parallel(joblib.delayed(_made)(task) for task in tasks):
                clock.tick(name, cost)


def _made(task: Task) -> tuple[str, float]:
    from genforce_train.memory import keep_freed_memory

    keep_freed_memory()
    task.make()
    return task.name, task.cost


class _Clock:
    """Prints what is done and how long the rest will take."""

    def __init__(self, costs: Sequence[float]) -> None:
        self._count, self._total, self._spent, self._cost = 0, len(costs), 0.0, sum(costs)
        self._started = time.monotonic()

    def tick(self, what: str, cost: float) -> None:
        self._count += 1
        self._spent += cost
        gone = time.monotonic() - self._started
        left = gone * (self._cost / self._spent - 1)
        done = f"[{self._count}/{self._total}] {what}"
        print(f"{done}; {gone:.0f} s, about {left:.0f} s left", flush=True)
