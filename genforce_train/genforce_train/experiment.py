"""Does force carry over to a sensor without labels? genforce experiment homogeneous --quick

homogeneous     one gel, five marker layouts
softness        one layout, seven gels
heterogeneous   GelSight, TacTip and uSkin: dots, pins and taxels on other gels at other scales
sessions        recordings of one real sensor, within and across sessions, against ridge regression

For every ordered pair of sensors, what is learned from the source's labels is tested on the
target: the marker images of the source taken as if they were the target's (source-only), the gel's
displacement instead (field), the same after training on the source's contacts drawn anew with the
target's markers (redrawn) or on paired contacts, images translated to what the source would show
(m2m), and what was trained on the target's own labels (oracle). Paired contacts are the same
presses on both sensors; the target's own forces are never used, save for the presses that give its
force-depth curve (compensated), or where gels differ for two presses of each seen indenter with a
slide, by which the source's labels are carried (calibrated). What those alone teach, as labelled
contacts, is in the table too (slides), and so is what the source's and the target's own labels
teach in as many steps as the adapted model had, on the source and after.

Data are made where they are not given. Everything made is a file under --out and is not made
twice: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import permutations
from pathlib import Path
from typing import Any

from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import write_json
from genforce_train.cache import UNSEEN_INDENTERS, Cache, open_layout, split_contacts

Pair = tuple[str, str]
ROADS = ("field", "m2m", "compact")  # the gel's displacement; images carried by it, or painted
TRANSLATORS = {"m2m": "field", "compact": "compact"}  # backbones of the roads of images
PRESSED = ("sphere", "cylinder", "hexagon", "line")  # for the force-depth curves; all seen
LABELS = "labels.json"  # how good those are that pairs carry between gels
SHIPPED_FIELD = "models/field/field.safetensors"
SHIPPED_ENCODER = "models/encoder/encoder.safetensors"


@dataclass(frozen=True)
class Experiment:
    """Which sensors, which of their pairs make a quick run, and whether forces differ too."""

    sensors: tuple[str, ...]
    quick: tuple[Pair, ...]
    other_gels: bool = False  # forces at the same press differ, and are corrected
    other_shapes: bool = False  # and another geometry takes as long to learn as the source's took

    def pairs(self, sensors: Sequence[str] = (), quick: bool = False) -> list[Pair]:
        """The ordered pairs, of `sensors` alone where some are named."""
        pairs = list(self.quick if quick else permutations(self.sensors, 2))
        if sensors:
            pairs = [pair for pair in permutations(sensors, 2) if not quick or pair in pairs]
        return pairs


EXPERIMENTS = {
    "homogeneous": Experiment(
        ("array_1", "array_2", "circle_1", "circle_2", "diamond_1"),
        (("array_1", "circle_1"), ("circle_1", "diamond_1"), ("diamond_1", "array_1")),
    ),
    "softness": Experiment(
        tuple(f"ratio_{parts}" for parts in (6, 8, 10, 12, 14, 16, 18)),
        (("ratio_6", "ratio_18"), ("ratio_18", "ratio_6"), ("ratio_6", "ratio_12")),
        other_gels=True,
    ),
    "heterogeneous": Experiment(
        ("gelsight", "tactip", "uskin"),
        tuple(permutations(("gelsight", "tactip", "uskin"), 2)),
        other_gels=True,
        other_shapes=True,
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What a run is made of; kept beside its results, which mix with no other's."""

    experiment: str
    pairs: tuple[Pair, ...]
    field_model: str
    contacts: int  # an indenter, of the virtual collections
    roads: tuple[str, ...]  # of ROADS
    shots: tuple[int, ...]  # paired contacts a seen indenter
    steps: int
    adapt_steps: int
    m2m_steps: int
    seed: int
    encoder: str = SHIPPED_ENCODER  # through which road compact sees references
    painter_steps: int = 4  # of road compact for one of m2m, which begins from a trained network
    data: str = ""  # a layout with all the sensors; empty: virtual collections are made
    methods: tuple[str, ...] = ()  # names of those to compare with the oracle; empty: all
    refinements: int = 0  # of the displacement that force models read

    @property
    def sensors(self) -> tuple[str, ...]:
        """All sensors of the pairs, in order."""
        return tuple(dict.fromkeys(sensor for pair in self.pairs for sensor in pair))

    @property
    def compensated(self) -> bool:
        """Whether the sensors' gels differ, and force-depth curves correct for it."""
        return EXPERIMENTS[self.experiment].other_gels

    @property
    def redrawn(self) -> bool:
        """Whether the source's contacts are drawn anew with the target's markers: of one kind."""
        return "field" in self.roads and not EXPERIMENTS[self.experiment].other_shapes

    @property
    def calibrated(self) -> bool:
        """Whether presses with slides carry the labels of pairs."""
        return self.compensated and bool(self.shots)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `genforce experiment`."""
    add = parser.add_argument
    add("name", choices=[*EXPERIMENTS, "sessions"])
    add("--quick", action="store_true", help="few pairs, half the steps")
    add("-o", "--out", type=Path, help="folder (default: runs/experiments/NAME[_quick])")
    add("--data", default="", help="layout with all the sensors; made where not given")
    add("--sensors", nargs="+", default=[], help="these instead of all the experiment's")
    add("--field", default=SHIPPED_FIELD, help=f"field model (default: {SHIPPED_FIELD})")
    refined = "of its displacement, by the markers that it misses (default: 0)"
    add("--refinements", type=int, choices=range(5), default=0, help=refined)
    add("--roads", nargs="+", choices=ROADS, default=["field", "m2m"], help="default: field m2m")
    add("--methods", nargs="+", default=[], metavar="NAME", help="rows of the table; all without")
    add("--contacts", type=int, help="an indenter, of the data (16)")
    add("--shots", type=int, nargs="*", help="paired contacts an indenter to adapt from")
    add("--steps", type=int, help="of each force model")
    add("--recordings", nargs="+", default=[], metavar="FILE.h5", help="of sessions")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=-1, help="processes (default: one a core)")


def run(args: argparse.Namespace) -> int:
    """Body of `genforce experiment`; returns the exit code."""
    from genforce_train.experiment_report import report
    from genforce_train.experiment_sessions import run_sessions
    from genforce_train.memory import keep_freed_memory

    keep_freed_memory()
    if args.name == "sessions":
        out = args.out or Path("runs/experiments/sessions")
        print(run_sessions(args.recordings, args.field, out, args.seed))
        return 0
    recipe = recipe_of(args)
    out = args.out or Path("runs/experiments") / (args.name + "_quick" * args.quick)
    results = carry_out(recipe, out, args.jobs)
    labels = out / LABELS
    judged = json.loads(labels.read_text()) if labels.is_file() else []
    print(report(results, recipe, out, judged))
    return 0


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What the words of a command ask for. Raises `ConfigError` for sensors without a pair."""
    experiment = EXPERIMENTS[args.name]
    pairs = experiment.pairs(args.sensors, args.quick)
    if not pairs:
        raise ConfigError(
            f"--sensors {' '.join(args.sensors)}: no pair of them"
            f"{' in the quick run' if args.quick else ''}; name two of "
            f"{', '.join(experiment.sensors)}"
        )
    steps = args.steps or (500 if args.quick else 1000)
    return Recipe(
        experiment=args.name,
        pairs=tuple(pairs),
        field_model=args.field,
        contacts=args.contacts or 16,
        roads=tuple(args.roads),
        shots=tuple(args.shots if args.shots is not None else ((10,) if args.quick else (4, 10))),
        steps=steps,
        adapt_steps=steps if experiment.other_shapes else max(1, steps // 2),
        m2m_steps=max(1, steps // 2),
        seed=args.seed,
        data=args.data,
        methods=tuple(args.methods),
        refinements=args.refinements,
    )


def carry_out(recipe: Recipe, out: Path, workers: int = -1) -> list[dict[str, Any]]:
    """Make what is missing under `out`, in so many processes (-1: one a core); returns one result
    a pair, method and set of indenters.

    Raises `ConfigError` for methods that it has not, `DataError` for data without one of the
    sensors, its pairs or its unseen indenters.
    """
    from genforce_train.experiment_labels import judge_labels
    from genforce_train.experiment_work import Work, carry_out_all
    from genforce_train.train_encoder import load_encoder
    from genforce_train.train_field import load_field

    compared = methods(recipe)
    load_field(recipe.field_model)
    models = [recipe.field_model]
    if "compact" in recipe.roads and recipe.shots:
        load_encoder(recipe.encoder)
        models.append(recipe.encoder)
    pin(vars(recipe), models, out)
    data = recipe.data or str(_collect(recipe, out))
    cache = open_layout(data)
    _check(cache, recipe)
    curves = _curves(recipe, out) if recipe.compensated else {}
    if recipe.calibrated:
        _calibrate(recipe, out, cache)
        if not (out / LABELS).is_file():
            ways = out / "material", out / "calibration"
            write_json(out / LABELS, judge_labels(data, recipe.pairs, *ways))
    work = Work(recipe, data, out, curves)
    jobs = [(pair, method) for pair in recipe.pairs for method in compared]
    results = carry_out_all(work, jobs, workers)
    write_json(out / "results.json", results)
    return results


# --- methods ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to get at the target's forces."""

    name: str
    input: str = "field"  # what its force model reads: markers or field
    oracle: bool = False  # learned from the target's labels instead of the source's
    shots: int = 0  # paired contacts a seen indenter it was adapted from
    backbone: str = ""  # of what translates its images, trained on the pairs, to the source's
    compensated: bool = False  # by the force-depth curves
    calibrated: bool = False  # the pairs' labels, by the calibration contacts of both
    slides: bool = False  # adapted from the target's calibration contacts with its own labels
    redrawn: bool = False  # adapted from the source's contacts with the target's markers
    steps: int = 0  # of training, where not the recipe's

    @property
    def adapted(self) -> bool:
        """Whether its force model is trained on for each target."""
        return not self.backbone and bool(self.shots or self.slides or self.redrawn)


def methods(recipe: Recipe) -> list[Method]:
    """The methods that are compared, in the order of the table. Raises `ConfigError`."""
    found = [Method("source-only", "markers")]
    corrected = ", compensated" * recipe.compensated
    alone = Method(f"field, 0 pairs{corrected}", compensated=recipe.compensated)
    if "field" in recipe.roads:
        found.append(Method("field, 0 pairs"))
        if recipe.compensated:
            found.append(alone)
        if recipe.redrawn:
            name = f"field, redrawn{corrected}"
            found.append(Method(name, redrawn=True, compensated=recipe.compensated))
        for shots in recipe.shots:
            name = f"field, {shots} pairs"
            found.append(Method(name + corrected, shots=shots, compensated=recipe.compensated))
            if recipe.calibrated:
                found.append(Method(f"{name}, calibrated", shots=shots, calibrated=True))
        if recipe.calibrated:
            found.append(Method("field, slides", slides=True))
    for road, backbone in TRANSLATORS.items():
        if road in recipe.roads and recipe.shots:
            shots, compensated = max(recipe.shots), recipe.compensated
            name = f"{road}, {shots} pairs{corrected}"
            found.append(Method(name, "markers", False, shots, backbone, compensated))
    found.append(Method("oracle", "markers", oracle=True))
    if "field" in recipe.roads:
        found.append(Method("oracle on the field", oracle=True))
    if any(method.adapted for method in found):  # as long as the adapted models, in all
        steps = recipe.steps + recipe.adapt_steps
        longer = [
            replace(method, steps=steps) for method in found if method.oracle or method == alone
        ]
        found += [replace(method, name=f"{method.name}, {steps} steps") for method in longer]
    names = [method.name for method in found]
    if unknown := [name for name in recipe.methods if name not in names]:
        raise ConfigError(f"--methods '{unknown[0]}': not one of {', '.join(map(repr, names))}")
    chosen = {*(recipe.methods or names), "oracle"}  # all are compared with the oracle
    return [method for method in found if method.name in chosen]


# --- data ---------------------------------------------------------------------------------------


def _collect(recipe: Recipe, out: Path) -> Path:
    words = ["--sensors", *recipe.sensors, "--contacts", str(recipe.contacts)]
    _synth([*words, "--seed", str(recipe.seed), "-o", str(out / "data")])
    return out / "data"


def _curves(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Force over depth of every sensor, from one press of each of `PRESSED` in the middle.

    A ball alone would do between gels of one shape; on a dome its force against a flat punch's is
    another than on a flat gel.
    """
    from genforce_train.materials import ForceDepth

    folder = out / "material"
    words = ["--sensors", *recipe.sensors, "--indenters", *PRESSED, "--plan", "press"]
    _synth([*words, "--rate-hz", "150", "--seed", str(recipe.seed), "-o", str(out / "press")])
    cache = open_layout(out / "press")
    curves = {}
    for sensor in recipe.sensors:
        presses = [cache.contact(cache.keys[row]) for row in cache.select([sensor])]
        curves[sensor] = ForceDepth.fit(presses)
        curves[sensor].write(folder, sensor)
    return curves


def _calibrate(recipe: Recipe, out: Path, cache: Cache) -> None:
    """Presses with a slide of every seen indenter on every sensor."""
    words = ["--sensors", *recipe.sensors, "--indenters", *seen_indenters(cache)]
    words += ["--plan", "slide"]
    _synth([*words, "--seed", str(recipe.seed), "-o", str(out / "calibration")])


def seen_indenters(cache: Cache) -> list[str]:
    """Those whose contacts may be learned from."""
    return sorted({key.indenter for key in cache.keys} - set(UNSEEN_INDENTERS))


def _synth(words: list[str]) -> None:
    """`genforce synth` with these words; what is there is kept."""
    from genforce_sim import synth

    parser = argparse.ArgumentParser()
    synth.add_arguments(parser)
    synth.run(parser.parse_args(words))


def _check(cache: Cache, recipe: Recipe) -> None:
    """Raise before any training where the data cannot do."""
    if missing := [name for name in recipe.sensors if name not in cache.sensors]:
        raise DataError(
            f"{cache.folder}: no sensor {', '.join(missing)} in it; it has "
            f"{', '.join(cache.sensors)}"
        )
    for sensor in recipe.sensors:
        split = split_contacts(cache, cache.select([sensor]), recipe.seed, unseen=UNSEEN_INDENTERS)
        for name, part in (
            ("seen indenters to train on", split.train),
            ("seen indenters to test on (two each are needed)", split.validation),
            (f"unseen indenters ({', '.join(UNSEEN_INDENTERS)})", split.test),
        ):
            if not part:
                raise DataError(f"{cache.folder}: '{sensor}' has no contacts of {name}")
    from genforce_train.borrow import partners

    for source, target in recipe.pairs if recipe.shots else ():
        chosen = cache.select([target])
        seen = [row for row in chosen if cache.keys[row].indenter not in UNSEEN_INDENTERS]
        partners(cache, seen, source)


# --- bookkeeping --------------------------------------------------------------------------------


def pin(recipe: Mapping[str, Any], models: Iterable[str], out: Path) -> None:
    """Keep the recipe with the results, and which files its models were; refuse to mix two in one
    folder. Raises `DataError`."""
    try:
        files = {path: sha256(Path(path).read_bytes()).hexdigest() for path in models}
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    recipe = json.loads(json.dumps({**recipe, "files": files}))  # as it will be read
    path = out / "recipe.json"
    if path.is_file() and json.loads(path.read_text()) != recipe:
        raise DataError(f"{path}: made with other settings; choose another --out or remove it")
    write_json(path, recipe)
