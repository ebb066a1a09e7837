"""What all training stages share: their common settings and the `Run` that carries them out.

A stage reads

    start(settings)
    net = ...
    run = Run(settings, net, meta, quiet)
    for step in run.steps():
        loss = ...                     # of run.share(batch), in run.autocast(), by run.model
        run.descend(loss)
        if run.due:
            error = run.once(...)      # in the first process
            run.keep(error, scores)    # best and last checkpoint, curves, patience
    run.finish(metrics)

and is resumed, precise to the bit on a CPU, because batches and noise are drawn from seed and step
alone. Under `accelerate launch` the same lines run in every process: each takes its share of the
batch, gradients are averaged, and the first one evaluates and writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import Field
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from genforce_collect.config import Section
from genforce_collect.errors import ConfigError, DataError
from genforce_collect.layout import write_json
from genforce_train.checkpoint import load_checkpoint, save_checkpoint
from genforce_train.models.force import parameters

_Batch = TypeVar("_Batch", np.ndarray, Tensor)
_Result = TypeVar("_Result")

CURVE_EVERY = 10  # steps from one point of the loss curve to the next
METRICS = "metrics.json"
NOISE_STREAM = 7  # apart from the streams that stages draw batches from


class RunSettings(Section):
    """Settings of every stage."""

    out: str = "runs/train"  # folder of checkpoints, metrics and curves
    steps: int = Field(1000, ge=1)
    budget_s: float = Field(0, ge=0)  # ends sooner after this time; 0: no limit, repeatable
    learning_rate: float = Field(3e-3, gt=0)  # at its peak; cosine to a hundredth of it
    warmup: int = Field(20, ge=0)  # steps
    weight_decay: float = Field(1e-2, ge=0)
    clip: float = Field(1.0, gt=0)  # norm of the gradient
    evaluate_every: int = Field(100, ge=1)  # steps; also how often checkpoints are written
    patience: int = Field(0, ge=0)  # evaluations without a better score before it ends; 0: never
    seed: int = Field(0, ge=0)
    threads: int = Field(1, ge=0)  # of the CPU; 0: all, faster where nothing else runs
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device computes it
    gradient_checkpointing: bool = False  # less memory, one more forward pass
    curves: Literal["tensorboard", "wandb", "none"] = "tensorboard"  # live, in <out>/curves
    resume: bool = False  # go on from <out>/last.safetensors


def start(settings: RunSettings) -> None:
    """Seed, threads and device. Raises `ConfigError` for a device that is not there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: no CUDA device there; use device=cpu")
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)


class Run:
    """One training run of one network, and of its rival where the loss is adversarial.

    `meta` goes into the checkpoints; it keeps `step`, `best` and `stale` and whatever a stage adds
    (`restored` names what a resumed run takes back from the checkpoint). `groups`: parameters with
    a `ratio` of the learning rate each; all alike without.
    """

    def __init__(
        self,
        settings: RunSettings,
        net: nn.Module,
        meta: dict[str, Any],
        quiet: bool = False,
        groups: list[dict[str, Any]] | None = None,
        rival: nn.Module | None = None,
        restored: Iterable[str] = (),
    ) -> None:
        """Raises `DataError` where there is nothing to resume, or of another architecture."""
        self.settings, self.out = settings, Path(settings.out)
        self._accelerator = Accelerator(cpu=settings.device == "cpu", mixed_precision="no")
        self.device = self._accelerator.device
        self.main = self._accelerator.is_main_process
        self._quiet = quiet or not self.main
        self._half = uses_bf16(settings.precision, settings.device)
        if settings.gradient_checkpointing:
            recompute_blocks(net)
        self.net = net.to(self.device)
        self.rival = rival.to(self.device) if rival is not None else None
        groups = groups or [{"params": _trained(net)}]
        self.optimiser = _adamw(groups, settings)
        self.rival_optimiser = None
        if self.rival is not None:
            self.rival_optimiser = _adamw([{"params": _trained(self.rival)}], settings)
        self.meta = meta | {
            "settings": settings.model_dump(),
            "parameters": parameters(net),
            "step": 0,
            "best": math.inf,
            "stale": 0,
        }
        if settings.resume:
            self._resume({"step", "best", "stale", *restored})
        self.model: nn.Module = self._accelerator.prepare_model(self.net)
        self.rival_model = self.rival and self._accelerator.prepare_model(self.rival)
        self.due = False
        self.seconds = 0.0
        self.finished = 0.0  # part of the training that is done, 0 to 1
        self._stop = False
        self._loss = math.nan

    # --- the loop -----------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Numbers of the steps to do. `due` is set in those after which to evaluate."""
        settings, started = self.settings, time.monotonic()
        if not settings.resume:
            self._begin()
        elif self._out_of_patience():
            return
        with show_progress(self._quiet) as report, self._curves() as self._write:
            for step in range(int(self.meta["step"]), settings.steps):
                self.finished = self._done(step, time.monotonic() - started)
                rate = settings.learning_rate * schedule(step, self.finished, settings.warmup)
                for group in self._groups():
                    group["lr"] = rate * group["ratio"]
                # What a step draws depends on its number alone, so that a resumed run repeats it.
                torch.manual_seed(int(self.rng(step, NOISE_STREAM).integers(2**62)))
                last = step + 1 == settings.steps or self.finished >= 1
                self.due = last or (step + 1) % settings.evaluate_every == 0
                self.meta["step"] = step + 1
                yield step
                if self.due or step % CURVE_EVERY == 0:
                    self._write({"loss": self._loss, "learning_rate": rate}, step)
                report(max(self.finished, (step + 1) / settings.steps), self._loss)
                self.seconds = time.monotonic() - started
                if self._stop or last:
                    return

    def rng(self, step: int, stream: int = 0) -> np.random.Generator:
        """Random numbers of a step, the same in every process and every run with this seed."""
        return np.random.default_rng([self.settings.seed, step, stream])

    def share(self, rows: _Batch) -> _Batch:
        """This process's part of a batch that all processes have drawn alike. Raises `ConfigError`
        where the parts would differ: gradients are averaged over the processes, not the samples."""
        processes = self._accelerator.num_processes
        if len(rows) % processes:
            raise ConfigError(
                f"{processes} processes cannot share a batch of {len(rows)} evenly; choose so many "
                f"that it can be divided by"
            )
        return rows[self._accelerator.process_index :: processes]

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where it is on."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._half)

    def descend(self, loss: Tensor, rival: bool = False) -> None:
        """One step of the optimiser down the gradient of a loss."""
        net, optimiser = self.net, self.optimiser
        if rival:
            assert self.rival is not None
            assert self.rival_optimiser is not None
            net, optimiser = self.rival, self.rival_optimiser
        else:
            self._loss = float(loss.detach())
        optimiser.zero_grad()
        self._accelerator.backward(loss)
        trained = [p for p in net.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, self.settings.clip)
        optimiser.step()

    def keep(self, error: float, scores: Mapping[str, Any] | None = None) -> None:
        """Write the last checkpoint, and the best one where `error` is the least so far.

        Call it in every process, with what `once` gave all of them. Raises `DataError` where the
        training has diverged."""
        if not math.isfinite(error):
            raise DataError(
                f"{self.out}: error {error} after step {self.meta['step']}, the training has "
                f"diverged; learning_rate={self.settings.learning_rate:g} may be too high"
            )
        if self.main:
            self.meta["scores"] = dict(scores or {})
            if error < self.meta["best"]:
                self.meta |= {"best": error, "stale": 0}
                save_checkpoint(self.best, self.net, self.meta)
            else:
                self.meta["stale"] += 1
            self._save_last()
            self._write({"error": error, **flat(scores or {})}, int(self.meta["step"]))
        self._stop = self._agreed(self._out_of_patience())

    def once(self, work: Callable[[], _Result]) -> _Result:
        """The result of work that the first process does, in all of them."""
        return self._agreed(work() if self.main else None)

    def restore_best(self) -> dict[str, Any]:
        """Give the network its best weights, in the first process, which wrote them and is to score
        them; returns what was kept with them, in all."""
        return self.once(self._load_best)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Keep the final metrics beside the best checkpoint and in it."""
        if self.main:
            meta = self._load_best()
            save_checkpoint(self.best, self.net, meta | {"metrics": metrics})
            write_json(self.out / METRICS, metrics)

    @property
    def best(self) -> Path:
        """Checkpoint with the least error."""
        return self.out / "best.safetensors"

    @property
    def last(self) -> Path:
        """Checkpoint that a resumed run goes on from."""
        return self.out / "last.safetensors"

    def _load_best(self) -> dict[str, Any]:
        saved = load_checkpoint(self.best)
        saved.restore_model(self.net)
        return saved.meta

    def _begin(self) -> None:
        if self.main:  # what an earlier run left here is not this one's
            self.best.unlink(missing_ok=True)
            (self.out / METRICS).unlink(missing_ok=True)
        self._save_last()  # so that it can be resumed from the first step on

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return bool(patience and self.meta["stale"] >= patience)

    def _save_last(self) -> None:
        if self.main:
            others: dict[str, Any] = {}
            if self.rival is not None and self.rival_optimiser is not None:
                others = {"rival": self.rival, "rival_optimiser": self.rival_optimiser}
            save_checkpoint(self.last, self.net, self.meta, self.optimiser, others)

    def _groups(self) -> list[dict[str, Any]]:
        rival = self.rival_optimiser.param_groups if self.rival_optimiser else []
        return [*self.optimiser.param_groups, *rival]

    def _done(self, step: int, spent_s: float) -> float:
        done = step / self.settings.steps
        if self.settings.budget_s:
            done = max(done, self._agreed(spent_s / self.settings.budget_s))
        return done

    def _agreed(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        return broadcast_object_list([value])[0]

    def _resume(self, names: set[str]) -> None:
        saved = load_checkpoint(self.last)
        saved.restore_model(self.net)
        saved.restore_optimiser(self.optimiser)
        if self.rival is not None and self.rival_optimiser is not None:
            saved.restore_model(self.rival, "rival")
            saved.restore_optimiser(self.rival_optimiser, "rival_optimiser")
        self.meta |= {name: saved.meta[name] for name in names}

    @contextmanager
    def _curves(self) -> Iterator[Any]:
        """Gives a function of (values by name, step) that draws them."""
        if self.settings.curves == "none" or not self.main:
            yield lambda values, step: None
        elif self.settings.curves == "wandb":
            try:
                import wandb
            except ImportError:
                raise ConfigError("curves=wandb needs it: pip install wandb") from None
            with wandb.init(dir=self.out, config=self.settings.model_dump()) as board:
                yield lambda values, step: board.log(values, step=step)
        else:
            from torch.utils.tensorboard import SummaryWriter

            step = int(self.meta["step"])
            with SummaryWriter(self.out / "curves", purge_step=step, flush_secs=5) as writer:

                def write(values: Mapping[str, float], step: int) -> None:
                    for name, value in values.items():
                        writer.add_scalar(name, value, step)

                yield write


def flat(scores: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested scores by dotted name."""
    found: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = float(value)
    return found


def schedule(step: int, finished: float, warmup: int) -> float:
    """Part of the learning rate: linear warm-up, then a cosine to a hundredth."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(finished, 1.0)))
    return cosine * min(1.0, (step + 1) / (warmup + 1))


def _trained(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _adamw(groups: list[dict[str, Any]], settings: RunSettings) -> torch.optim.AdamW:
    groups = [{"ratio": 1.0, **group} for group in groups]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def recompute_blocks(net: nn.Module) -> None:
    """Gradient checkpointing: the activations within each of the network's blocks (its
    `blocks()`) are computed anew in the backward pass. Raises `ConfigError` where it has none."""
    blocks = getattr(net, "blocks", None)
    if blocks is None:
        raise ConfigError(
            f"gradient_checkpointing: a {type(net).__name__} is too small for it; leave it false"
        )
    for block in blocks():
        inner = block.forward

        def forward(*inputs: Tensor, inner: Any = inner) -> Tensor:
            if not torch.is_grad_enabled():
                return inner(*inputs)
            return recompute(inner, *inputs, use_reentrant=False)

        block.forward = forward


def train_mode(net: nn.Module, settled: bool) -> None:
    """Training mode; once settled, batch norms keep their measured statistics, so that the model
    that learns is the model that will run."""
    net.train()
    if settled:
        for module in norms(net):
            module.eval()


def measure_norms(net: nn.Module, batches: Iterable[Tensor], device: torch.device) -> None:
    """Set the statistics of the batch norms to their average over these inputs."""
    for module in norms(net):
        module.reset_running_stats()
        module.momentum = None
    net.train()
    with torch.no_grad():
        for batch in batches:
            net(batch.to(device))


def norms(net: nn.Module) -> list[Any]:
    """Its batch norms."""
    return [
        module for module in net.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    ]


def uses_bf16(precision: str, device: str) -> bool:
    """Whether to compute in bfloat16; precision "auto" asks the processor."""
    if precision != "auto":
        return precision == "bf16"
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@contextmanager
def show_progress(quiet: bool) -> Iterator[Any]:
    """A bar with loss and time left; gives a function of (part done, loss)."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=quiet) as progress:
        task = progress.add_task("training", total=1.0, loss=float("nan"))
        yield lambda done, loss: progress.update(task, completed=done, loss=loss)
