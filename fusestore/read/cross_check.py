"""Deciding between a stripe's row and its shards when they disagree.

The row has a checksum of each block of each shard, and thereby defines the shards.
But a row can be wrong, too.  Each shard lies in a record with its own checksum, and the
code links the shards of a stripe.  k + 1 consistent shards, each of which matches its
own record, are therefore right, and a row that differs is wrong.  k shards would not be
enough: any k shards are consistent.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from ..errors import NodeError, NodeLacksError
from ..format import erasure
from ..format.records import block_checksums
from ..format.stripe_rows import Stripe
from ..log.log import Log
from ..write.shard_record import whole_payload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Agreed:
    """The stripe on which k + 1 shards agree."""

    row: Stripe
    """The row, with the checksums of these shards and of those decoded from them."""
    shards: dict[int, bytes]
    """Complete payloads on the nodes, by index."""


async def cross_check(log: Log, number: int, row: Stripe) -> Agreed | None:
    """Read all shards of a stripe; return their agreement, None if too few agree."""
    found: dict[int, bytes] = {}
    for index, place in enumerate(row.shards):
        member = log.members.by_id.get(place.node)
        if not place.written or member is None or member.out_of_use:
            continue
        try:
            payload = await member.call(whole_payload, log, member, number, row, index)
        except NodeLacksError:  # its row may have changed meanwhile
            continue
        except NodeError as error:
            logger.warning("%s", error)
            continue
        if payload is not None:
            found[index] = payload
    k, length = row.code.k, row.shard_length
    if len(found) <= k:
        return None
    chosen = dict(list(found.items())[:k])
    every = erasure.rebuild(row.code, length, chosen, list(range(row.code.n)))
    if any(every[index] != payload for index, payload in found.items()):
        return None
    sums = tuple(block_checksums(every[index], length) for index in range(row.code.n))
    return Agreed(replace(row, checksums=sums), found)
