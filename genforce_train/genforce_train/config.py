"""Settings of the training scripts: defaults, a YAML file over them, key=value over that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml

from genforce_collect.config import Section, parse_section
from genforce_collect.errors import ConfigError

_Config = TypeVar("_Config", bound=Section)


def read_settings(model: type[_Config], words: Sequence[str]) -> _Config:
    """Settings from `file.yaml` and `key=value` words, later over earlier.

    Raises `ConfigError` for an unknown key or a value out of range, naming what is allowed.
    """
    values: dict[str, Any] = {}
    for word in words:
        if "=" in word:
            key, text = word.split("=", 1)
            values[key] = _value(key, text)
        else:
            values |= _file(Path(word))
    unknown = sorted(set(values) - set(model.model_fields))
    if unknown:
        raise ConfigError(
            f"unknown setting {', '.join(unknown)}; known are {', '.join(model.model_fields)}"
        )
    for name, value in values.items():
        several = get_origin(model.model_fields[name].annotation) is tuple
        if several and not isinstance(value, list | tuple):
            values[name] = [value]  # so that sensors=array_1 needs no brackets
    return parse_section(values, model, "settings")


def _file(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a YAML file or key=value") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings")
    return data


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(f"[{text}]" if "," in text and text[:1] not in "[{" else text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text}: not a valid value") from error
