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

from ..format import stripe_rows
from ..format.stripe_rows import LOST_STRIPE, ShardPlace, Stripe
from ..log.log import Log
from ..log.owners import extents_of, owners_keys
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
        elif next(extents_of(view, number), None) is not None:
            found.needed.add(number)
        else:
            found.unused[number] = owners_keys(view, number)
            if view.get(stripe_rows.live_key(number)) is not None:
                found.unused[number].append(stripe_rows.live_key(number))
    return found


class LastLook:
    """The stripes that were looked at for one node."""

    def __init__(self, log: Log, put_back: PutBack) -> None:
        self._log = log
        self._put_back = put_back
        self._found = Looked()

    async def at(self, numbers: Iterable[int]) -> None:
        """Look at stripes, and put back those that files need; MetadataError."""
        log, found = self._log, self._found
        known = found.rows.keys() | found.unused.keys() | found.needed | {LOST_STRIPE}
        todo = deque(sorted({n for n in numbers if n not in known and n not in log.unsealed}))
        while todo:
            with log.engine.stored_view() as view:
                some = await threads.call(look_at, view, todo)
            unused = {n: keys for n, keys in some.unused.items() if not self._is_young(n)}
            log.apply({key: None for keys in unused.values() for key in keys})
            found.rows.update(some.rows)
            found.unused.update(unused)
            found.needed.update(some.needed)
            await self._put_back.stripes(some.needed)

    def _is_young(self, number: int) -> bool:
        """Whether a stripe is in use, and is younger than the checkpoint."""
        return number in self._log.unsealed or self._log.stripe(number) is not None

    def may_free(self, number: int) -> bool:
        """Whether a shard of a stripe may be freed, at a place that no row of the stripe names."""
        return number == LOST_STRIPE or number in self._found.rows or number in self._found.unused

    def is_needed(self, number: int) -> bool:
        """Whether files have bytes in a stripe without a row, which could not be put back."""
        return number in self._found.needed and self._log.stripe(number) is None

    def was_in_use(self, number: int, place: ShardPlace) -> bool:
        """Whether the row of a stripe in the checkpoint names a place."""
        row = self._found.rows.get(number)
        return row is not None and place in row.shards
