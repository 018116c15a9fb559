"""The findings of fsck: each has a line of text, and the name of its fix.

A finding has a phase.  Findings of a later phase may result from those of an earlier
one.  Therefore mending proceeds phase by phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from ..format.tables import TABLES


class Phase(IntEnum):
    """The rows that must be right before the next phase can be judged."""

    NAMES = 1
    """Names and listings: each row can be read, each name has an inode, and is listed."""
    INODES = 2
    """Each inode has a name, and no directory is inside itself."""
    EXTENTS = 3
    """Extents belong to a file, lie inside it, do not overlap, and their stripe exists; shards
    do not overlap other shards."""
    DERIVED = 4
    """Counts and derived rows: links, live bytes, owners, quotas, segments, counters."""


Fix = Literal[
    "add_owner",
    "attach",
    "change",
    "count",
    "cut_extent",
    "detach",
    "drop",
    "drop_owners",
    "free",
    "list_again",
    "lose_extent",
    "lose_target",
    "make_root",
    "move_extent",
    "name_again",
    "owe",
    "owe_all",
    "put_extent",
    "put_stripe",
    "recode",
    "resize",
    "restore",
    "retype",
    "set_live",
    "set_quota",
    "set_segment",
    "unlink",
    "unwrite",
]
"""The methods of Mender that mend a finding."""


LOSSES: frozenset[Fix] = frozenset({"lose_extent", "lose_target"})
"""Fixes that give up what is nowhere: they only record the loss."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An error in the tables."""

    phase: Phase
    table: str
    text: str
    fix: Fix
    arguments: tuple[Any, ...]
    """The positional arguments of the fix."""
    fields: dict[str, Any]
    """The keyword arguments of the fix."""

    def __str__(self) -> str:
        return f"{self.table}: {self.text}"


def finding(
    phase: Phase, table: str, text: str, fix: Fix, *arguments: Any, **fields: Any
) -> Finding:
    """Return a finding that `fix`, with these arguments, mends."""
    return Finding(phase, table, text, fix, arguments, fields)


def stale(key: bytes, why: str) -> Finding:
    """Return the finding of a row that is out of date."""
    text = f"a row is out of date: {why}"
    return finding(Phase.DERIVED, TABLES[key[:1]].name, text, "drop", key)
