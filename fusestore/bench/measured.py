"""A figure that a workload reached, and what it can be held against."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Limit(Enum):
    """What bounds a rate."""

    WRITTEN = "the disk less parity, or the null daemon"
    """The least of raw × k / (k + m) and null."""
    READ = "the disk or the null daemon"
    """The least of raw and null."""
    NULL = "the null daemon"


@dataclass(frozen=True, slots=True)
class Goal:
    """What a store ought to reach at least: a rate, or so many times the rate of a target."""

    least: float
    times: str | None = None
    """A target's name."""

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
        """Whether more is better."""
        return self.unit.endswith("/s")
