"""A store and its daemon: what these commands are asked, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...watch.fields import Status
from .request import LookRequest, Request


@dataclass(frozen=True, slots=True)
class StatusRequest(LookRequest[Status]):
    """How does the store fare?"""

    command = "status"


@dataclass(frozen=True, slots=True)
class StopResult:
    """Everything is committed."""


@dataclass(frozen=True, slots=True)
class StopRequest(Request[StopResult]):
    """Unmount, commit everything and end."""

    command = "stop"
    mountpoint: str | None = None
    """Where it has to be mounted; None: anywhere."""


@dataclass(frozen=True, slots=True)
class LogLevelResult:
    """The level of the daemon's log."""

    level: str


@dataclass(frozen=True, slots=True)
class LogLevelRequest(Request[LogLevelResult]):
    """Change the level of the daemon's log, if one is given."""

    command = "log_level"
    level: str | None = None


@dataclass(frozen=True, slots=True)
class OperationCounts:
    """What became of a kind of operation."""

    operation: str
    count: int
    per_second: float
    bytes: int
    bytes_per_busy_second: float
    success_rate: float
    errors: dict[str, int]
    mean: float
    median: float
    p95: float
    p99: float
    """In seconds."""


@dataclass(frozen=True, slots=True)
class MetricsResult:
    """What was counted since the last reset."""

    since: float
    """Seconds since the epoch."""
    mounted_seconds: float
    operations: tuple[OperationCounts, ...]


MetricsAction = Literal["summary", "reset"]


@dataclass(frozen=True, slots=True)
class MetricsRequest(Request[MetricsResult]):
    """What was counted?  Or count from nothing on."""

    command = "metrics"
    action: MetricsAction = "summary"
