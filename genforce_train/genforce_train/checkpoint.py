"""Checkpoints in safetensors: weights, optimisers and step in one file that is never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genforce_collect.errors import DataError


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds. `meta` is plain JSON (model, settings, step, scores); `parts`
    are tensors by the name of what they belong to: `model`, `optimiser`, and what a stage adds."""

    path: Path
    meta: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]

    @property
    def model(self) -> dict[str, Tensor]:
        """The weights of the model."""
        return self.parts.get("model", {})

    def sha256(self) -> str:
        """What tells these weights from all others, whatever else the file says."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def restore_model(self, model: nn.Module, part: str = "model") -> None:
        """Load the weights. Raises `DataError` where they are of another architecture."""
        found = self.parts.get(part, {})
        try:
            missing, unexpected = model.load_state_dict(found, strict=False)
        except RuntimeError as error:  # tensors of other shapes
            raise self._other(model, " ".join(str(error).split())[:200]) from error
        missing = [name for name in missing if name in own_state(model)]
        if missing or unexpected:
            raise self._other(model, f"without {missing[:2]}, with {unexpected[:2]}")

    def restore_optimiser(self, optimiser: torch.optim.Optimizer, part: str = "optimiser") -> None:
        """Load the optimiser's moments, one set a parameter in their order."""
        state = optimiser.state_dict()
        state["state"] = {}
        for name, value in self.parts.get(part, {}).items():
            number, field = name.split(".", 1)
            state["state"].setdefault(int(number), {})[field] = value
        optimiser.load_state_dict(state)

    def _other(self, model: nn.Module, reason: str) -> DataError:
        return DataError(
            f"{self.path}: weights of another architecture ({reason}); "
            f"give the checkpoint of a {type(model).__name__}"
        )


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps of a model: all but the parts named in its `frozen_base`, which came
    from a folder of weights that stays beside it; of those only what was trained."""
    base = tuple(f"{part}." for part in getattr(model, "frozen_base", ()))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    return {
        name: value
        for name, value in model.state_dict().items()
        if name in trained or not name.startswith(base)
    }


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    meta: dict[str, Any],
    optimiser: torch.optim.Optimizer | None = None,
    others: Mapping[str, nn.Module | torch.optim.Optimizer] | None = None,
) -> None:
    """Write a checkpoint; the one it replaces stays whole until the new one is on disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[str, nn.Module | torch.optim.Optimizer] = {"model": model, **(others or {})}
    if optimiser is not None:
        parts["optimiser"] = optimiser
    tensors: dict[str, Tensor] = {}
    for part, owner in parts.items():
        state = own_state(owner) if isinstance(owner, nn.Module) else _moments(owner)
        # Cloned: two names of one tensor may not stand in one file.
        tensors |= {f"{part}.{name}": value.detach().clone() for name, value in state.items()}
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"meta": json.dumps(meta)})
    os.replace(partial, path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint. Raises `DataError` where it is absent or damaged."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; train one first or give its path")
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part, rest = name.split(".", 1)
                parts.setdefault(part, {})[rest] = file.get_tensor(name)
    except (SafetensorError, ValueError, OSError) as error:
        raise DataError(f"{path}: damaged checkpoint: {error}") from error
    return Checkpoint(path, meta, parts)


def _moments(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}.{field}": value
        for number, fields in optimiser.state_dict()["state"].items()
        for field, value in fields.items()
        if isinstance(value, Tensor)
    }
