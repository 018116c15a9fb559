"""When a stripe's row and its shards disagree: which of them is wrong.

The row has a checksum of each block of each shard, and so decides what a shard must be.
But a row can be wrong, too.  Each shard lies in a record with a checksum of its own, and
the code ties the shards of a stripe together.  So k + 1 shards that fit together, each of
which its own record vouches for, are right, and a row that says otherwise is
wrong: k shards alone fit together whatever they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from ..errors import NodeError
from ..format import erasure
from ..format.records import block_checksums
from ..format.stripe_rows import Stripe
from ..log.log import Log
from ..write.shard_record import whole_payload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Agreed:
    """What k + 1 shards of a stripe agree on."""

    row: Stripe
    """With the checksums of these shards, and of those that they give."""
    shards: dict[int, bytes]
    """Whole payloads that lie on nodes, by index."""


async def cross_check(log: Log, number: int, row: Stripe) -> Agreed | None:
    """What the shards of a stripe agree on, read as a whole; None if they do not, or too few."""
    found: dict[int, bytes] = {}
    for index, place in enumerate(row.shards):
        member = log.members.by_id.get(place.node)
        if not place.written or member is None or member.out_of_use:
            continue
        try:
            payload = await member.call(whole_payload, log, member, number, row, index)
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
