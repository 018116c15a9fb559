"""Requests and results of the commands for a store and its daemon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...watch.fields import Status
from .request import LookRequest, Request


@dataclass(frozen=True, slots=True)
class StatusRequest(LookRequest[Status]):
    """Ask for the state of the store."""

    command = "status"


@dataclass(frozen=True, slots=True)
class CompactResult:
    """The progress of a compaction, or its result."""

    state: Literal["running", "done"]
    problem: str
    """A sentence that explains why it ended early; or empty."""
    waste: int | None
    """Bytes of garbage that are left; None: not counted yet."""
    freed: int
    moved: int
    """Bytes given back since it began, and bytes written for them."""
    doubtful_stripes: int
    unreadable_stripes: int
    absent_stripes: int
    """Stripes left alone: by wrong counts, for bytes that cannot be read, for absent nodes."""


@dataclass(frozen=True, slots=True)
class CompactRequest(Request[CompactResult]):
    """Clean until no stripe gives back enough for what must be written."""

    command = "compact"
    wait: bool = False
    """Answer when it has ended, and what it gave back is free."""


@dataclass(frozen=True, slots=True)
class StopResult:
    """Everything is committed."""


@dataclass(frozen=True, slots=True)
class StopRequest(LookRequest[StopResult]):
    """Unmount, commit everything and exit."""

    command = "stop"
    mountpoint: str | None = None
    """The mount point to unmount; None: any."""


@dataclass(frozen=True, slots=True)
class LogLevelResult:
    """The log level of the daemon."""

    level: str


@dataclass(frozen=True, slots=True)
class LogLevelRequest(LookRequest[LogLevelResult]):
    """Ask for the log level of the daemon, and change it if one is given."""

    command = "log_level"
    level: str | None = None


@dataclass(frozen=True, slots=True)
class OperationCounts:
    """Counts, durations and results of a kind of operation."""

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
    """The counts since the last reset."""

    since: float
    """Seconds since the epoch."""
    mounted_seconds: float
    operations: tuple[OperationCounts, ...]


MetricsAction = Literal["summary", "reset"]


@dataclass(frozen=True, slots=True)
class MetricsRequest(LookRequest[MetricsResult]):
    """Ask for the counts, or set them to zero."""

    command = "metrics"
    action: MetricsAction = "summary"
