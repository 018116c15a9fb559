"""fsck: stripes with too few shards on the nodes to be read.

The tables may all be consistent while files cannot be read.  No fix of rows restores
shards.  Therefore this is reported, but is not a finding that can be mended.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..format import stripe_rows
from ..format.records import HEADER_BYTES
from ..format.stripe_rows import ShardPlace, Stripe
from ..text import counted
from .fsck_view import StoreView


def unreadable(view: StoreView) -> list[str]:
    """Return a sentence about the stripes that lack too many shards, if any exist."""
    count = sum(1 for _ in short_stripes(view))
    if not count:
        return []
    away = [name for node, name in view.nodes.items() if node not in view.segment_bytes]
    why = f" while {', '.join(away)} cannot be read" if away else ""
    what = f"{counted(count, 'stripe has', 'stripes have')} too few shards to be read{why}"
    return [f"unreadable: {what}; 'fusestore risk' names their files"]


def short_stripes(view: StoreView) -> Iterator[int]:
    """Yield the stripes with fewer shards than it takes to read them."""
    owed = {stripe_rows.decode_missing_key(key) for key, _ in view.table(b"M")}
    for key, value in view.table(b"S"):
        number, row = stripe_rows.decode_stripe_key(key), Stripe.decode(value)
        good = sum(
            (place.node, number, index) not in owed and _is_there(view, place, row.shard_length)
            for index, place in enumerate(row.shards)
        )
        if good < row.code.k:
            yield number


def _is_there(view: StoreView, place: ShardPlace, length: int) -> bool:
    """Return whether the segment of a shard is on its node, and long enough."""
    size = view.segment_bytes.get(place.node, {}).get(place.segment, 0)
    return place.written and place.offset >= HEADER_BYTES and place.offset + length <= size
