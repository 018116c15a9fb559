"""An observation of a mounted store: the source of metrics, health and the status page."""

from __future__ import annotations

from dataclasses import dataclass

from ..tally import Histogram, Tallies
from .fields import MountStatus, Status


@dataclass(frozen=True, slots=True)
class Observation:
    """A store at one instant."""

    status: Status
    mount: MountStatus
    tallies: Tallies
    commits: Histogram
    checkpoints: Histogram
    flushes: list[tuple[str, Histogram]]
    """Durations of flushes, by node."""
    caches: dict[str, int]
    """Numbers of entries, by cache."""
    pending: int
    """Changes that wait for the metadata database."""
