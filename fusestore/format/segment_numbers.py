"""The numbers of segments: parsing names, and rejecting impossible numbers.

A folder on a node may contain files that no store made.  Their names and numbers must
not affect the number of the next segment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SEGMENT_MAX = 2**32 - 2
GAP_MAX = 1_000_000
"""The greatest distance of a number from the last number in the metadata: each mount that crashed
before it was recorded has used one or a few numbers."""

_NAME = re.compile(r"([0-9]{8,10})\.([a-z]+)", re.ASCII)


def segment_number(name: str, suffix: str) -> int | None:
    """Return the number of the segment with this name in the folder of its run, or None."""
    found = _NAME.fullmatch(name)
    if found is None or found[2] != suffix:
        return None
    number = int(found[1])
    return number if 1 <= number <= SEGMENT_MAX and found[1] == f"{number:08d}" else None


def reachable(found: Iterable[int], known: Iterable[int]) -> list[int]:
    """Return the numbers `found` in ascending order, up to the first that is too far away.

    The `known` numbers, at least one, certainly belong to the store.  From the greatest of
    them on, each number must be near the previous one.
    """
    last = max(known)
    kept = []
    for number in sorted(found):
        if number - last > GAP_MAX:
            break
        kept.append(number)
        last = max(last, number)
    return kept
