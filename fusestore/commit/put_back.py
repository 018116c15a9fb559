"""Stripes that were to be freed although files have bytes in them are put back.

The row of such a stripe is gone.  It is made anew from the records at the places that are
to be freed.  Its count of live bytes is wrong, and is set to 0: nothing is freed of it, and
it is not cleaned, until fsck has counted.  What cannot be put back, because too few of the
shards can be read, keeps its places; it is tried again with other nodes, or after a mount.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection

from ..errors import NodeError, NodeIdentityError, NodeTimeoutError
from ..format import stripe_rows
from ..format.stripe_rows import RECLAIM_END, RECLAIM_START, Freed, Live, ShardPlace
from ..log.log import Log
from ..log.owners import extents_of
from ..members.member import Member
from ..metadata.view import View
from ..read.stripe_from_shards import RestoredStripe, WholeShard, read_whole, restored_row
from ..system import threads
from ..write.shard_record import header_at

logger = logging.getLogger(__name__)


class PutBack:
    """Puts stripes back that were to be freed."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.failed: dict[int, set[int]] = {}
        """By stripe that could not be put back: the nodes that could be read."""

    async def stripes(self, numbers: Collection[int]) -> None:
        """Put back stripes that have no row; MetadataError."""
        log = self._log
        nodes = {member.id for member in log.members.all if not member.out_of_use}
        todo = {number for number in numbers if not nodes <= self.failed.get(number, set())}
        if not todo:
            return
        with log.engine.stored_view() as view:
            places = await threads.call(_places_of, view, todo)
        for number in sorted(todo):
            if next(extents_of(log.engine, number), None) is None:
                continue  # the next checkpoint has no extent either
            shards = await self._whole(number, places[number])
            restored = await threads.call(restored_row, log, number, shards)
            if restored is not None:
                self.failed.pop(number, None)
                self._put(number, restored)
                continue
            if number not in self.failed:
                log.doubted.add(number)
                log.rows_in_doubt += 1
                logger.error(
                    "Stripe %#x was to be freed, but files have bytes in it. Too few of its shards "
                    "can be read to put it back: they are kept. Run 'fusestore fsck --repair'.",
                    number,
                )
            self.failed[number] = nodes

    async def _whole(self, number: int, places: list[ShardPlace]) -> list[WholeShard]:
        """Return the shards of a stripe that match their headers, at some places."""
        found = []
        for place in places:
            member = self._log.members.by_id.get(place.node)
            if member is None or member.out_of_use:
                continue
            try:
                shard = await member.call(_read, self._log, member, place, number)
            except (NodeIdentityError, NodeTimeoutError) as error:
                member.fail(error)
                continue
            except NodeError as error:
                logger.warning("%s", error)
                continue
            if shard is not None:
                found.append(shard)
        return found

    def _put(self, number: int, restored: RestoredStripe) -> None:
        """Let a stripe have its row again, and free no place that the row names."""
        log, row = self._log, restored.row
        freed = [stripe_rows.reclaim_key(p.node, p.segment, p.offset) for p in restored.whole]
        if log.stripe(number) is not None or any(log.engine.get(key) is None for key in freed):
            return  # it has changed meanwhile
        changes: dict[bytes, bytes | None] = dict.fromkeys(freed)
        changes[stripe_rows.stripe_key(number)] = row.encode()
        changes[stripe_rows.live_key(number)] = Live(0, row.length).encode()
        for index, place in enumerate(row.shards):
            if not place.written:
                changes[stripe_rows.missing_key(place.node, number, index)] = b""
        log.apply(changes)
        log.counters.stripes += 1
        log.doubted.add(number)
        log.rows_in_doubt += 1
        log.stripes_put_back += 1
        logger.error(
            "Stripe %#x was to be freed, but files have bytes in it: it is put back, and its "
            "count of live bytes is wrong. Run 'fusestore fsck --repair'.",
            number,
        )


def _places_of(view: View, numbers: Collection[int]) -> dict[int, list[ShardPlace]]:
    """In a thread: the places of some stripes' shards that are to be freed."""
    found: dict[int, list[ShardPlace]] = defaultdict(list)
    for key, value in view.scan(RECLAIM_START, RECLAIM_END):
        number = Freed.decode(value).stripe
        if number in numbers:
            found[number].append(ShardPlace(*stripe_rows.decode_reclaim_key(key)))
    return found


def _read(log: Log, member: Member, place: ShardPlace, number: int) -> WholeShard | None:
    """In a thread: the shard of a stripe at a place, if it is whole; NodeError."""
    header = header_at(log, member, place.segment, place.offset)
    if header is None or header.number != number:
        return None
    return read_whole(member, place, header)
