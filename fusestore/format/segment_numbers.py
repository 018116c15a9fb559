"""The names and numbers of segments; impossible numbers are rejected.

A folder on a node may contain files that no store made.  Their names and numbers must
not affect the number of the next segment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import NodeError
from .records import SegmentKind

SEGMENT_MAX = 2**32 - 2
GAP_MAX = 1_000_000
"""The greatest distance of a number from the last number in the metadata: each mount that crashed
before it was recorded has used one or a few numbers."""
MOUNT_MAX = 1 << 27
"""The numbers that must be left for one mount: 1 PiB of journal, 8 PiB of shards on a node."""
LISTED_MAX = 4_000_000
"""The most segments of one kind that are listed on a node: 256 TiB of shards."""

FOLDERS = {SegmentKind.JOURNAL: ("journal", "log"), SegmentKind.SHARDS: ("shards", "seg")}
"""By kind: the folder of a node that holds the segments, and the suffix of their names."""

_NAME = re.compile(r"([0-9]{8,10})\.([a-z]+)", re.ASCII)


def segment_name(kind: SegmentKind, segment: int) -> str:
    """Return the name of a segment in the folder of its kind."""
    return f"{segment:08d}.{FOLDERS[kind][1]}"


def segment_path(kind: SegmentKind, segment: int) -> str:
    """Return the path of a segment relative to its node."""
    return f"{FOLDERS[kind][0]}/{segment_name(kind, segment)}"


def segment_number(name: str, suffix: str) -> int | None:
    """Return the number of the segment with this name in the folder of its kind, or None."""
    found = _NAME.fullmatch(name)
    if found is None or found[2] != suffix:
        return None
    number = int(found[1])
    return number if 1 <= number <= SEGMENT_MAX and found[1] == f"{number:08d}" else None


def reachable(found: Iterable[int], known: Iterable[int]) -> list[int]:
    """Return the numbers `found`, in ascending order, that the store can have reached.

    The `known` numbers, at least one, certainly belong to the store.  The distance is
    measured from the greatest of them alone, because stray files must not add up to a
    greater distance.
    """
    last = max(known)
    return sorted(number for number in found if number <= last + GAP_MAX)


def following(known: Iterable[int]) -> int:
    """Return the number after all `known` ones, at least one; NodeError if too few are left.

    Called when a store or a node is opened.  A store uses a number for each segment, and
    stray files take at most GAP_MAX of them at each mount.
    """
    number = max(known) + 1
    if number > SEGMENT_MAX - MOUNT_MAX:
        raise NodeError(f"The numbers of segments are used up: the next one is {number:,}.")
    return number
