"""Which numbers segments have: what a name says, and what a store can have come to.

A folder on a node may hold files that no store made.  Neither a name nor a number
of theirs may decide where segments go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SEGMENT_MAX = 2**32 - 2
GAP_MAX = 1_000_000
"""A store goes on at most so far from the last number that its metadata knows: each mount that a
crash ended before it was noted has taken one or a few."""

_NAME = re.compile(r"([0-9]{8,10})\.([a-z]+)", re.ASCII)


def segment_number(name: str, suffix: str) -> int | None:
    """The number of the segment with this name in a folder of its run; None for other names."""
    found = _NAME.fullmatch(name)
    if found is None or found[2] != suffix:
        return None
    number = int(found[1])
    return number if 1 <= number <= SEGMENT_MAX and found[1] == f"{number:08d}" else None


def reachable(found: Iterable[int], known: Iterable[int]) -> list[int]:
    """The numbers `found`, in ascending order, up to the first that is too far from what is known.

    The `known` numbers, one at least, are the store's for certain.  From the greatest of
    them on, each number must be near the one before.
    """
    last = max(known)
    kept = []
    for number in sorted(found):
        if number - last > GAP_MAX:
            break
        kept.append(number)
        last = max(last, number)
    return kept
