"""A figure of a workload, with its limit and its goal."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Limit(Enum):
    """The limit of a rate."""

    WRITTEN = "the disk less parity, or the null daemon"
    """The lesser of raw × k / (k + m) and null."""
    READ = "the disk or the null daemon"
    """The lesser of raw and null."""
    NULL = "the null daemon"


@dataclass(frozen=True, slots=True)
class Goal:
    """The least that a store should reach: a rate, or a multiple of the rate of a target."""

    least: float
    times: str | None = None
    """The name of that target."""

    def __str__(self) -> str:
        return f"{self.least:g} × {self.times}" if self.times else f"{self.least:,.0f}"


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure of one run."""

    figure: str
    unit: str
    value: float
    limit: Limit | None = None
    goal: Goal | None = None

    @property
    def is_rate(self) -> bool:
        """Whether a larger figure is better."""
        return self.unit.endswith("/s")
