"""What a benchmark reports."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

_COMPARE = {"<=": operator.le, ">=": operator.ge}
_GOAL = re.compile(r"(<=|>=) ([-+\d.e]+)")


@dataclass(frozen=True)
class Row:
    """One figure, measured.

    `goal` is empty or reads "<= 5" or ">= 1000", in `unit`. `baseline` is the same figure by the
    method this one replaces, and `ratio` how many times better than that it is.
    """

    name: str
    value: float
    unit: str
    goal: str = ""
    baseline: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.goal and not _GOAL.fullmatch(self.goal):
            raise ValueError(f"{self.name}: goal must read '<= 5' or '>= 5', not {self.goal!r}")

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if not self.goal:
            return None
        sign, limit = self.goal.split()
        return bool(_COMPARE[sign](self.value, float(limit)))
