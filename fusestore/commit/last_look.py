"""The last look at stripes before their room is freed: does a file have bytes in them after all?

The count of live bytes says when a stripe is free.  It is denormalised: if it is wrong, a
stripe is about to be freed that files still need.  Therefore the owners of a freed stripe
stay until its extents were looked at here, for all of its shards at once.  Then the owners
go.  A stripe that is needed is put back (put_back.py).

This looks at the last checkpoint, which holds the freeing: a crash leads back to it.  No
extent can come to point at a freed stripe later, because no number is used twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..format import file_rows, keys, stripe_rows
from ..format.stripe_rows import LOST_STRIPE, OWNER, ShardPlace, Stripe
from ..log.log import Log
from ..log.owners import extents_in, owners_keys
from ..metadata.view import View
from ..system import threads
from .put_back import PutBack

SLICE_SECONDS = 0.2
"""How long one view is used: while it is open, the database keeps the pages that it needs."""
SLICE_STRIPES = 256
"""How many stripes are looked at in one view, as the event loop then removes their owners."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What a checkpoint says about stripes."""

    rows: dict[int, Stripe] = field(default_factory=dict)
    """The stripes that have a row."""
    unused: dict[int, list[bytes]] = field(default_factory=dict)
    """Those that have none, and in which no file has bytes; and keys of rows that are left."""
    needed: set[int] = field(default_factory=set)
    """Those that have none, although files have bytes in them."""


def look_at(view: View, numbers: deque[int]) -> Looked:
    """Take stripes from `numbers` and look at them; runs in a thread."""
    ends, found = time.monotonic() + SLICE_SECONDS, Looked()
    for _ in range(SLICE_STRIPES):
        if not numbers or time.monotonic() > ends:
            break
        number = numbers.popleft()
        value = view.get(stripe_rows.stripe_key(number))
        if value is not None:
            found.rows[number] = Stripe.decode(value)
        elif _is_needed(view, number):
            found.needed.add(number)
        else:
            found.unused[number] = owners_keys(view, number)
            if view.get(stripe_rows.live_key(number)) is not None:
                found.unused[number].append(stripe_rows.live_key(number))
    return found


def _is_needed(view: View, number: int) -> bool:
    """Return whether an extent points at a stripe.

    Most of its files are gone, and only those are looked at that have an extent there.
    """
    prefix = stripe_rows.owners_prefix(number)
    for _, packed in view.scan(prefix, keys.after(prefix)):
        for ino, offset, length, _ in OWNER.iter_unpack(packed):
            low, high = (file_rows.extent_key(ino, at) for at in (offset, offset + length))
            if view.has_stored(low, high) and any(
                extent.stripe == number for extent in extents_in(view, ino, offset, offset + length)
            ):
                return True
    return False


class LastLook:
    """The stripes that were looked at in one pass."""

    def __init__(self, log: Log, put_back: PutBack) -> None:
        self._log = log
        self._put_back = put_back
        self._rows: dict[int, Stripe] = {}
        self._unused = {LOST_STRIPE}
        self._needed: set[int] = set()

    def begin_node(self) -> None:
        """Look again at stripes that had a row: they may have been freed since."""
        self._rows.clear()

    async def at(self, numbers: Iterable[int]) -> None:
        """Look at stripes, and put back those that files need; MetadataError."""
        log = self._log
        todo = deque(sorted({number for number in numbers if self._is_unknown(number)}))
        while todo:
            with log.engine.stored_view() as view:
                found = await threads.call(look_at, view, todo)
            unused = {n: keys for n, keys in found.unused.items() if not self._is_young(n)}
            log.apply({key: None for keys in unused.values() for key in keys})
            self._rows.update(found.rows)
            self._unused.update(unused)
            self._needed.update(found.needed)
            await self._put_back.stripes(found.needed)

    def _is_unknown(self, number: int) -> bool:
        known = number in self._unused or number in self._rows or number in self._needed
        return not known and number not in self._log.unsealed

    def _is_young(self, number: int) -> bool:
        """Whether a stripe is in use, and is younger than the checkpoint."""
        return number in self._log.unsealed or self._log.stripe(number) is not None

    def may_free(self, number: int) -> bool:
        """Whether a shard of a stripe may be freed, at a place that no row of the stripe names."""
        return number in self._unused or number in self._rows

    def was_in_use(self, number: int, place: ShardPlace) -> bool:
        """Whether the row of a stripe in the checkpoint names a place."""
        row = self._rows.get(number)
        return row is not None and place in row.shards
