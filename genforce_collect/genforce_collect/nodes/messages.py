"""Message classes by the name of their type."""

from __future__ import annotations

import importlib
from typing import Any

from genforce_collect.errors import ConfigError


def message_class(type_name: str) -> Any:
    """Python class of `package/msg/Name`. Raises `ConfigError` where it is not installed."""
    package, _, name = type_name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"message type {type_name} is not installed") from error
