"""What fsck finds: one line of text, and the name of the fix that mends it.

A finding has a phase.  Those of a later phase may come from those of an earlier
one, so mending goes phase by phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from ..format.tables import TABLES


class Phase(IntEnum):
    """What must be right before the next phase can be judged."""

    NAMES = 1
    """Names and listings: each row can be read, each name has an inode, and is listed."""
    INODES = 2
    """Each inode has a name, and no directory is inside itself."""
    EXTENTS = 3
    """Extents belong to a file, are inside it, do not overlap, and their stripe exists; shards
    lie where nothing else does."""
    DERIVED = 4
    """What is counted or derived: links, live bytes, owners, quotas, segments, counters."""


Fix = Literal[
    "add_owner",
    "attach",
    "change",
    "count",
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


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be."""

    phase: Phase
    table: str
    text: str
    fix: Fix
    arguments: tuple[Any, ...]
    """What the fix is given, in its order."""
    fields: dict[str, Any]
    """What the fix is given by name."""

    def __str__(self) -> str:
        return f"{self.table}: {self.text}"


def finding(
    phase: Phase, table: str, text: str, fix: Fix, *arguments: Any, **fields: Any
) -> Finding:
    """A finding that `fix`, with these arguments, mends."""
    return Finding(phase, table, text, fix, arguments, fields)


def stale(key: bytes, why: str) -> Finding:
    """A row that something else has made needless."""
    text = f"a row is out of date: {why}"
    return finding(Phase.DERIVED, TABLES[key[:1]].name, text, "drop", key)
