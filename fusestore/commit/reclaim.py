"""Freeing the room of deleted stripes on the nodes, after the checkpoint of the deletion.

Only rows of `reclaim` that are in a checkpoint are processed: before that, a replay
might still need the shards.  A shard segment without live shards in the tables is
deleted; in others, holes are punched in place of the dead payloads.  Headers are
never punched.  The rows of a node that is away stay.

Segments that are in no table are swept after the mount (stray_segments.py).  While the
history is in doubt (`Log.doubt`), a segment without live shards is punched, not deleted.
While a node holds another history, nothing is freed: that history needs the shards of
all nodes.

Nothing is freed against its own header, or without one.  The header names the shard; if the
row of its stripe has the shard at this place, it is in use, regardless of the counts.  Not
more is freed than the header has.  Where no header is, no shard was written, or the row is
wrong: nothing is punched there.  A shard whose header cannot be read is not freed, and keeps
its segment; another mount tries it again.
"""

from __future__ import annotations

import logging
from collections import defaultdict

import trio

from ..errors import NodeError, NodeIdentityError, NodeTimeoutError
from ..format import keys, stripe_rows
from ..format.records import Header, SegmentKind, record_length
from ..format.stripe_rows import LOST_STRIPE, Freed, ShardPlace
from ..log.log import Log
from ..members.member import Member
from ..write.shard_record import header_at, headers
from .last_look import LastLook
from .put_back import PutBack
from .stray_segments import StraySegments

logger = logging.getLogger(__name__)

Shards = list[tuple[int, Freed]]
"""Shards in a segment that are to be freed, by payload offset."""
Debt = dict[int, Shards]
"""By segment."""
Headers = list[tuple[int, Header]]
"""Shards in a segment, by payload offset."""


class Reclaimer:
    """Processes `reclaim` in the background."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._limits = log.limits
        self._wake = trio.Event()
        self.passes = 0
        """How many passes have begun."""
        self._ended = 0
        self._passed = trio.lowlevel.ParkingLot()
        """Tasks that wait for the end of a pass."""
        self.strays = StraySegments(log)
        self._kept: set[bytes] = set()
        """Keys of rows of `reclaim` whose shards have headers that cannot be read, or are of
        stripes that cannot be put back; until a node is back."""
        self._writable: set[int] = set()
        """Nodes that could be written to in the last pass."""
        self._put_back = PutBack(log)

    def wake(self) -> None:
        """Run soon: a checkpoint has been made."""
        self._wake.set()

    async def run(self) -> None:
        """Reclaim after each checkpoint, until cancelled."""
        while True:
            await self.strays.sweep()
            await self._wake.wait()
            self._wake = trio.Event()
            self.passes += 1
            self._note_nodes()
            look = LastLook(self._log, self._put_back)
            for member in self._log.members.writable:
                if not self._log.keeps_all:
                    await self._reclaim(member, look)
            self._ended = self.passes
            self._passed.unpark_all()

    def _note_nodes(self) -> None:
        """Try again what was kept, if a node is back."""
        writable = {member.id for member in self._log.members.writable}
        if not writable <= self._writable:
            self._kept.clear()
        self._writable = writable

    async def passed(self, passes: int) -> None:
        """Return when a pass that began after the first `passes` passes has ended."""
        while self._ended <= passes:
            await self._passed.park()

    @property
    def has_work(self) -> bool:
        """Whether shards on nodes in use are to be freed."""
        engine = self._log.engine
        prefixes = (stripe_rows.reclaim_key(m.id, 0, 0)[:3] for m in self._log.members.writable)
        return not self._log.keeps_all and any(
            key not in self._kept
            for prefix in prefixes
            for key, _ in engine.scan(prefix, keys.after(prefix))
        )

    def _debt(self, member: Member) -> Debt:
        """Return what is to be freed on a node according to the last checkpoint."""
        engine = self._log.engine
        prefix = stripe_rows.reclaim_key(member.id, 0, 0)[:3]
        debt: Debt = defaultdict(list)
        for key, value in engine.scan_stored(prefix, keys.after(prefix)):
            if engine.get(key) is not None and key not in self._kept:
                _, segment, offset = stripe_rows.decode_reclaim_key(key)
                debt[segment].append((offset, Freed.decode(value)))
        return debt

    async def _reclaim(self, member: Member, look: LastLook) -> None:
        debt = self._debt(member)
        look.begin_node()
        await look.at(freed.stripe for shards in debt.values() for _, freed in shards)
        for segment, shards in debt.items():
            for offset, freed in shards:
                if freed.stripe in self._put_back.failed:
                    self._kept.add(stripe_rows.reclaim_key(member.id, segment, offset))
            due = [(offset, freed) for offset, freed in shards if look.may_free(freed.stripe)]
            try:
                if due:
                    await self._free(member, segment, due, look)
            except NodeError as error:
                member.fail(error)
                return

    async def _free(self, member: Member, segment: int, shards: Shards, look: LastLook) -> None:
        """Free shards in a segment, or all of it; NodeError."""
        dead = sum(record_length(freed.length) for _, freed in shards)
        state = member.shards.states.get(segment)
        drop = state is not None and state.live == dead and not self._log.doubt
        if drop and segment == member.shards.current:
            member.shards.roll()  # before any await: nothing more is written there
        whole = await member.call(self._all_headers, member, segment) if drop else None
        if whole is None:
            drop = False
            shards, found = await member.call(self._headers_of, member, segment, shards)
        else:
            found = whole
        await look.at(header.number for _, header in found)
        shards, is_free = self._unused(member, segment, shards, found, look)
        if drop and is_free and state is not None and state.live == dead:
            await self._drop(member, segment, shards)
            return
        payloads = {at: header.payload_length for at, header in found}
        self._say_wrong(member, segment, shards, found)
        for start in range(0, len(shards), self._limits.reclaim_batch):
            part = shards[start : start + self._limits.reclaim_batch]
            await self._punch(member, segment, part, payloads)

    def _unused(
        self, member: Member, segment: int, shards: Shards, found: Headers, look: LastLook
    ) -> tuple[Shards, bool]:
        """Return the shards that may be freed, and whether nothing else is in the segment.

        `found` are the headers in the segment, or at least those of the shards.
        """
        there = {offset: header.number for offset, header in found}
        kept, alive = set(), set()
        for offset, number in [*there.items(), *((at, freed.stripe) for at, freed in shards)]:
            place, row = ShardPlace(member.id, segment, offset), self._log.stripe(number)
            if row is not None and place in row.shards:
                alive.add(offset)
            elif not look.may_free(number) or look.was_in_use(number, place):
                kept.add(offset)
                if number in self._put_back.failed:
                    self._kept.add(stripe_rows.reclaim_key(member.id, segment, offset))
        if alive:
            self._say_alive(member, segment, shards, alive)
        left = [shard for shard in shards if shard[0] not in kept | alive]
        return left, not (kept or alive)

    def _all_headers(self, member: Member, segment: int) -> Headers | None:
        """In a thread: all shards in a segment; None if a part is unreadable; NodeError."""
        try:
            return list(headers(self._log, member, segment))
        except (NodeIdentityError, NodeTimeoutError):
            raise
        except NodeError as error:
            if member.out_of_use:
                raise
            logger.warning("%s The segment is kept.", error)
            return None

    def _headers_of(self, member: Member, segment: int, shards: Shards) -> tuple[Shards, Headers]:
        """In a thread: those of some shards that may be freed, and their headers; NodeError."""
        readable, found = list[tuple[int, Freed]](), list[tuple[int, Header]]()
        for offset, freed in shards:
            try:
                header = header_at(self._log, member, segment, offset)
            except (NodeIdentityError, NodeTimeoutError):
                raise
            except NodeError as error:
                if member.out_of_use:
                    raise
                logger.warning("%s The shard there is not freed.", error)
                self._kept.add(stripe_rows.reclaim_key(member.id, segment, offset))
                continue
            readable.append((offset, freed))
            if header is not None:
                found.append((offset, header))
        return readable, found

    def _say_alive(self, member: Member, segment: int, shards: Shards, alive: set[int]) -> None:
        """Free no shard that is where the row of its stripe has it, and say so."""
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

    def _say_wrong(self, member: Member, segment: int, shards: Shards, found: Headers) -> None:
        """Report rows that name another stripe, or another length, than the header there."""
        headers_at = dict(found)
        for offset, freed in shards:
            header = headers_at.get(offset)
            if header is None or freed.stripe == LOST_STRIPE:
                continue
            if freed != (header.payload_length, header.number):
                self._log.rows_in_doubt += 1
                logger.error(
                    "A row frees %d bytes of stripe %#x at byte %d of segment %d of node %s, where "
                    "%d bytes of stripe %#x are: only these are freed. Run 'fusestore fsck "
                    "--repair'.",
                    freed.length,
                    freed.stripe,
                    offset,
                    segment,
                    member.name,
                    header.payload_length,
                    header.number,
                )

    async def _drop(self, member: Member, segment: int, shards: Shards) -> None:
        """Delete a segment without live shards."""
        await member.call(member.node.delete, SegmentKind.SHARDS, segment)
        self._paid(member, segment, shards)
        member.shards.states.pop(segment, None)

    async def _punch(
        self, member: Member, segment: int, shards: Shards, payloads: dict[int, int]
    ) -> None:
        """Make holes of the payloads of shards; `payloads` are their lengths by their headers."""
        node = member.node

        def punch() -> None:
            for offset, freed in shards:
                node.punch(segment, offset, min(freed.length, payloads.get(offset, 0)))

        await member.call(punch)
        self._paid(member, segment, shards)

    def _paid(self, member: Member, segment: int, shards: Shards) -> None:
        self._log.apply(
            {stripe_rows.reclaim_key(member.id, segment, offset): None for offset, _ in shards}
        )
        for _, freed in shards:
            member.shards.release(segment, freed.length)
        member.shards.changed.add(segment)
