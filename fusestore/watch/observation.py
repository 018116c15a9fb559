"""What a look at a mounted store sees; metrics, health and the status page are made of it."""

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
    """By node."""
    caches: dict[str, int]
    """Entries, by cache."""
    pending: int
    """Changes that the metadata database does not have yet."""
