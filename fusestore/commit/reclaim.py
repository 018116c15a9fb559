"""Freeing the room of deleted stripes on the nodes, after the checkpoint of the deletion.

Only rows of `reclaim` that are in a checkpoint are processed: before that, a replay
might still need the shards.  A shard segment without live shards in the tables is
deleted; in others, holes are punched in place of the dead payloads.  Headers are
never punched.  The rows of a node that is away stay.

Segments that are in no table are swept after the mount (stray_segments.py).  While the
history is in doubt (`Log.doubt`), a segment without live shards is punched, not deleted.
While a node holds another history, nothing is freed: that history needs the shards of
all nodes.

Nothing is freed against its own header.  The header names the shard; if the row of its
stripe has the shard at this place, it is in use, regardless of the counts.  A shard whose
header cannot be read is not freed, and keeps its segment; another mount tries it again.
"""

from __future__ import annotations

import logging
from collections import defaultdict

import trio

from ..errors import NodeError, NodeIdentityError, NodeTimeoutError
from ..format import keys, stripe_rows
from ..format.records import Header, SegmentKind, record_length
from ..format.stripe_rows import ShardPlace
from ..log.log import Log
from ..members.member import Member
from ..write.shard_record import header_at, headers
from .stray_segments import StraySegments

logger = logging.getLogger(__name__)

Debt = dict[int, list[tuple[int, int]]]
"""By segment: (payload offset, payload length)."""
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
        self._unreadable: set[bytes] = set()
        """Keys of rows of `reclaim` whose shards have headers that cannot be read."""

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
            for member in self._log.members.writable:
                if not self._log.keeps_all:
                    await self._reclaim(member)
            self._ended = self.passes
            self._passed.unpark_all()

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
            key not in self._unreadable
            for prefix in prefixes
            for key, _ in engine.scan(prefix, keys.after(prefix))
        )

    async def _reclaim(self, member: Member) -> None:
        engine = self._log.engine
        prefix = stripe_rows.reclaim_key(member.id, 0, 0)[:3]
        debt: Debt = defaultdict(list)
        for key, value in engine.scan_stored(prefix, keys.after(prefix)):
            if engine.get(key) is not None and key not in self._unreadable:
                _, segment, offset = stripe_rows.decode_reclaim_key(key)
                debt[segment].append((offset, int.from_bytes(value, "little")))
        for segment, shards in debt.items():
            dead = sum(record_length(length) for _, length in shards)
            state = member.shards.states.get(segment)
            drop = state is not None and state.live == dead and not self._log.doubt
            if drop and segment == member.shards.current:
                member.shards.roll()  # before any await: nothing more is written there
            try:
                whole = await member.call(self._all_headers, member, segment) if drop else None
                if whole is None:
                    drop = False
                    shards, found = await member.call(self._headers_of, member, segment, shards)
                else:
                    found = whole
                alive = self._alive(member, segment, found)
                if alive:
                    shards, drop = self._spare(member, segment, shards, alive), False
                if drop and state is not None and state.live == dead:
                    await self._drop(member, segment, shards)
                    continue
                for start in range(0, len(shards), self._limits.reclaim_batch):
                    part = shards[start : start + self._limits.reclaim_batch]
                    await self._punch(member, segment, part)
            except NodeError as error:
                member.fail(error)
                return

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

    def _headers_of(
        self, member: Member, segment: int, shards: list[tuple[int, int]]
    ) -> tuple[list[tuple[int, int]], Headers]:
        """In a thread: those of some shards that may be freed, and their headers; NodeError."""
        readable, found = list[tuple[int, int]](), list[tuple[int, Header]]()
        for offset, length in shards:
            try:
                header = header_at(self._log, member, segment, offset)
            except (NodeIdentityError, NodeTimeoutError):
                raise
            except NodeError as error:
                if member.out_of_use:
                    raise
                logger.warning("%s The shard there is not freed.", error)
                self._unreadable.add(stripe_rows.reclaim_key(member.id, segment, offset))
                continue
            readable.append((offset, length))
            if header is not None:
                found.append((offset, header))
        return readable, found

    def _alive(self, member: Member, segment: int, found: Headers) -> set[int]:
        """Payload offsets of the records that are shards at the place in their stripe's row."""
        alive = set()
        for offset, header in found:
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
