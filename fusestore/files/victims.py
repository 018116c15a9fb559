"""The stripes that cleaning empties: those that give back most for what must be written.

These functions read a view of the tables, in a thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..format import stripe_rows
from ..format.file_rows import Extent
from ..format.stripe_rows import LIVE_END, Live, Stripe
from ..log.owners import extents_of
from ..metadata.view import View

WRITTEN_FOR_FREED_MAX = 8
"""At most so many bytes are written to free one."""


_ROWS_A_SLICE = 100_000

Rated = tuple[float, int]
"""The bytes that are written for each that emptying a stripe frees, and the stripe."""


@dataclass(frozen=True, slots=True)
class Waste:
    """What cleaning could give back in a part of the stripes."""

    total: int
    """Bytes, of all stripes."""
    doubted: set[int]
    """Stripes whose live bytes are unknown until fsck has counted them."""
    emptiest: list[Rated]
    """The stripes that give back most for what must be written, the best first."""
    left: set[int]
    """The stripes that were to be left out, and exist."""
    end: bytes | None
    """Where the next part begins."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A stripe that may be emptied."""

    number: int
    count: Live
    row: Stripe
    extents: list[tuple[int, Extent]]
    """Inode and extent of each file that has bytes in it."""


def find_waste(
    view: View, start: bytes, most: int, without: set[int], below: int | None = None
) -> Waste:
    """Walk through counts of stripes; return `most` of the emptiest, except `without`.

    With `below`, only of those with lower numbers.
    """
    total, doubted, left, end = 0, set[int](), set[int](), None

    def rated() -> Iterator[Rated]:
        nonlocal total, end
        for rows, (key, value) in enumerate(view.scan(start, LIVE_END)):
            if rows == _ROWS_A_SLICE:
                end = key
                return
            count = Live.decode(value)
            number, waste = stripe_rows.decode_stripe_key(key), count.waste
            if count.live == 0:
                doubted.add(number)
            total += waste
            if number in without:
                left.add(number)
            elif below is not None and number >= below:
                continue
            elif waste and count.live <= waste * WRITTEN_FOR_FREED_MAX:
                yield count.live / waste, number

    emptiest = heapq.nsmallest(most, rated())
    return Waste(total, doubted, emptiest, left, end)


def look_at(view: View, numbers: Iterable[int]) -> tuple[list[Victim], dict[int, str]]:
    """Return stripes with the extents that point at them, and what is wrong with others.

    Those that are gone are left out.
    """
    found, wrong = list[Victim](), dict[int, str]()
    for number in numbers:
        value = view.get(stripe_rows.live_key(number))
        if value is None:
            continue
        count, row = Live.decode(value), view.get(stripe_rows.stripe_key(number))
        if row is None:
            wrong[number] = "is counted, but does not exist"
            continue
        victim = Victim(number, count, Stripe.decode(row), list(extents_of(view, number)))
        live = sum(extent.length for _, extent in victim.extents)
        if count.length != victim.row.length:
            wrong[number] = f"counts {count.length} bytes, but has {victim.row.length}"
        elif count.live != live:
            wrong[number] = f"counts {count.live} live bytes, but files have {live}"
        else:
            found.append(victim)
    return found, wrong
