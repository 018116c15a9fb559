"""Freeing the room of deleted stripes on the nodes, after the checkpoint of the deletion.

Only rows of `reclaim` that are in a checkpoint are processed: before that, a replay
might still need the shards.  A shard segment without live shards in the tables is
deleted; in others, holes are punched in place of the dead payloads.  Headers are
never punched.  The rows of a node that is away stay.

Segments that a crash left behind are in no commit.  They are deleted after the mount,
and only if no stripe has a shard in them: a lost row of `segments` must not cost the
shards that it counts.  While the history is in doubt (`Log.doubt`) they are in
quarantine: kept, and shown by status; and a segment without live shards is punched,
not deleted.  While a node holds another history, nothing is freed: that history needs
the shards of all nodes.

Nothing is freed against its own header.  The header names the shard; if the row of its
stripe has the shard at this place, it is in use, regardless of the counts.
"""

from __future__ import annotations

import logging
from collections import defaultdict

import trio

from ..errors import NodeError
from ..format import keys, stripe_rows
from ..format.records import Header, SegmentKind, record_length
from ..format.stripe_rows import ShardPlace
from ..log.log import Log
from ..members.member import Member
from ..write.shard_record import header_at, headers, is_whole, may_be_ours

logger = logging.getLogger(__name__)

Debt = dict[int, list[tuple[int, int]]]
"""By segment: (payload offset, payload length)."""


class Reclaimer:
    """Processes `reclaim` in the background."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._limits = log.limits
        self._wake = trio.Event()
        self.strays: dict[int, dict[int, int]] = {}
        """By node: its segments that are not in the tables, and their bytes."""

    def wake(self) -> None:
        """Run soon: a checkpoint has been made."""
        self._wake.set()

    async def run(self) -> None:
        """Reclaim after each checkpoint, until cancelled."""
        while True:
            if self.strays and not self._log.doubt and not self._log.keeps_all:
                await self._sweep()
            await self._wake.wait()
            self._wake = trio.Event()
            for member in self._log.members.writable:
                if not self._log.keeps_all:
                    await self._reclaim(member)

    async def _sweep(self) -> None:
        """Delete the segments that are in no commit, if no stripe is found in them."""
        for batch in self._log.batches():
            if not any(self.strays.values()):
                break
            for _, row in batch:
                for place in row.shards:
                    strays = self.strays.get(place.node, {})
                    if place.written and place.segment in strays:
                        del strays[place.segment]
                        logger.error(
                            "Segment %d of node %d is in use but not in the tables: run "
                            "'fusestore fsck --repair'.",
                            place.segment,
                            place.node,
                        )
            await trio.lowlevel.checkpoint()
        for member in self._log.members.writable:
            try:
                await member.call(member.node.drop_aside)
                for segment in self.strays.pop(member.id, ()):
                    if not await member.call(may_be_ours, self._log, member, segment):
                        logger.warning(
                            "Segment %d of node %s is not of this store: it is ignored.",
                            segment,
                            member.name,
                        )
                    elif await self._is_left_over(member, segment):
                        await member.call(member.node.delete, SegmentKind.SHARDS, segment)
                    else:
                        logger.error(
                            "Segment %d of node %s is in no table, but has complete shards that no "
                            "crash left behind: it is kept. Run 'fusestore fsck'.",
                            segment,
                            member.name,
                        )
            except NodeError as error:
                member.fail(error)
        self.strays.clear()

    async def _is_left_over(self, member: Member, segment: int) -> bool:
        """Return whether a segment has only shards that the last mount left or freed; NodeError.

        A complete shard of an earlier mount, or of a stripe that other rows name, was in
        use: its row was lost.
        """
        found = await member.call(lambda: list(headers(self._log, member, segment)))
        for offset, header in found:
            known = header.epoch < self._log.position.epoch - 1 or self._is_known(header.number)
            if known and await member.call(is_whole, member, segment, offset, header):
                return False
        return True

    def _is_known(self, number: int) -> bool:
        """Return whether other rows name a stripe that has no row."""
        engine, prefix = self._log.engine, stripe_rows.owners_key(number, 0)[:9]
        return (
            engine.get(stripe_rows.live_key(number)) is not None
            or next(engine.scan(prefix, keys.after(prefix)), None) is not None
        )

    async def _reclaim(self, member: Member) -> None:
        engine = self._log.engine
        prefix = stripe_rows.reclaim_key(member.id, 0, 0)[:3]
        debt: Debt = defaultdict(list)
        for key, value in engine.scan_stored(prefix, keys.after(prefix)):
            if engine.get(key) is not None:
                _, segment, offset = stripe_rows.decode_reclaim_key(key)
                debt[segment].append((offset, int.from_bytes(value, "little")))
        for segment, shards in debt.items():
            dead = sum(record_length(length) for _, length in shards)
            state = member.shards.states.get(segment)
            drop = state is not None and state.live == dead and not self._log.doubt
            try:
                alive = await self._alive(member, segment, None if drop else shards)
                if alive:
                    shards, drop = self._spare(member, segment, shards, alive), False
                if drop:
                    if segment == member.shards.current:
                        member.shards.roll()
                    await self._drop(member, segment, shards)
                    continue
                for start in range(0, len(shards), self._limits.reclaim_batch):
                    part = shards[start : start + self._limits.reclaim_batch]
                    await self._punch(member, segment, part)
            except NodeError as error:
                member.fail(error)
                return

    async def _alive(
        self, member: Member, segment: int, shards: list[tuple[int, int]] | None
    ) -> set[int]:
        """Payload offsets of records that are shards at the place in their stripe's row.

        Among some shards, or all in the segment; NodeError.
        """

        def look() -> list[tuple[int, Header]]:
            if shards is None:
                return list(headers(self._log, member, segment))
            found = ((at, header_at(self._log, member, segment, at)) for at, _ in shards)
            return [(at, header) for at, header in found if header is not None]

        alive = set()
        for offset, header in await member.call(look):
            stripe = self._log.stripe(header.number)
            place = ShardPlace(member.id, segment, offset)
            if stripe is not None and stripe.shards[header.index : header.index + 1] == (place,):
                alive.add(offset)
        return alive

    def _spare(
        self, member: Member, segment: int, shards: list[tuple[int, int]], alive: set[int]
    ) -> list[tuple[int, int]]:
        """The shards that may be freed, if some in their segment are alive."""
        self._log.rows_in_doubt += 1
        logger.error(
            "Segment %d of node %s was to be freed, but has shards in use: they are kept. "
            "Run 'fusestore fsck --repair'.",
            segment,
            member.name,
        )
        self._log.apply(
            {
                stripe_rows.reclaim_key(member.id, segment, offset): None
                for offset, _ in shards
                if offset in alive
            }
        )
        return [shard for shard in shards if shard[0] not in alive]

    async def _drop(self, member: Member, segment: int, shards: list[tuple[int, int]]) -> None:
        """Delete a segment without live shards."""
        await member.call(member.node.delete, SegmentKind.SHARDS, segment)
        self._paid(member, segment, shards)
        member.shards.states.pop(segment, None)

    async def _punch(self, member: Member, segment: int, shards: list[tuple[int, int]]) -> None:
        node = member.node

        def punch() -> None:
            for offset, length in shards:
                node.punch(segment, offset, length)

        await member.call(punch)
        self._paid(member, segment, shards)

    def _paid(self, member: Member, segment: int, shards: list[tuple[int, int]]) -> None:
        self._log.apply(
            {stripe_rows.reclaim_key(member.id, segment, offset): None for offset, _ in shards}
        )
        for _, length in shards:
            member.shards.release(segment, length)
        member.shards.changed.add(segment)
