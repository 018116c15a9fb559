"""Segments of nodes that no table names: those that crashes left are deleted, others are kept.

What a crash left was begun after the last sweep: `Zswept` has, by node, the number of the
first segment that no sweep has seen.  No number is used twice, and a segment is deleted
for good before its row is.  Therefore an older segment that no table names had a row,
which was lost, and the rows of its stripes may be lost, too: it is in quarantine until
`fsck --repair` ends with nothing lost or unreadable.

Of a newer segment the headers are read.  It is kept, too, if it has a whole shard of a
stripe that other rows name, and that has no row of its own.  A shard of which the row says
that it lies elsewhere is a copy that no commit has; it waits for the next mount while the
stripe may need it.

While the history is in doubt (`Log.doubt`) nothing is swept; status shows what is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import trio

from ..errors import NodeError, NodeIdentityError, NodeTimeoutError
from ..format import keys, store_rows, stripe_rows, tables
from ..format.file_rows import Extent
from ..format.records import Header, SegmentKind
from ..format.stripe_rows import RECLAIM_END, RECLAIM_START, Freed
from ..log.log import Log
from ..log.owners import owners_keys
from ..members.member import Member
from ..write.shard_record import headers, is_whole, may_be_ours

logger = logging.getLogger(__name__)

_Record = tuple[int, Header]
"""The offset of the payload, and the header."""


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a segment has of stripes that have no row, and of copies that may be needed."""

    named: list[_Record]
    """Records of stripes that other rows name."""
    unnamed: list[_Record]
    """Records whose stripe has no row, and is named by none."""
    is_needed: bool
    """A stripe whose row has a shard elsewhere may need the copy in the segment."""


class StraySegments:
    """The segments on the nodes that the tables do not have."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._first: dict[int, int] = {}
        """By node that was not swept yet: the first segment that this mount began."""
        self._swept: set[int] = set()
        """Nodes that were swept in this mount, with nothing left that has to wait."""
        self.found: dict[int, dict[int, int]] = {}
        """By node that was not swept yet: such segments, and their bytes."""

    @property
    def any_found(self) -> bool:
        """Whether there are stray segments that were not swept."""
        return any(self.found.values())

    def note(self, member: Member, segments: dict[int, int]) -> None:
        """Note the stray segments of a node, and their bytes, when the store is opened."""
        self.found[member.id] = segments
        self._first[member.id] = member.shards.current

    def unmounting(self) -> None:
        """The tables will have all segments of the nodes that were swept."""
        for member in self._log.members.writable:
            if member.id in self._swept:
                self._set_swept(member, member.shards.unused)

    def release(self) -> None:
        """Nothing lacks what is kept: let the next mount judge all of it."""
        for member in self._log.members.all:
            if self.found.get(member.id):
                self._set_swept(member, 0)

    async def sweep(self) -> None:
        """Delete what crashes left on the nodes that can be written to; MetadataError.

        Rows that cannot be read may name what is stray: nothing is deleted then.
        """
        if not self._may_free:
            return
        if self.any_found:
            await self._note_in_use()
        for member in self._log.members.writable:
            try:
                await self._sweep_node(member)
            except NodeError as error:
                member.fail(error)
        if self._may_free:
            self.found.clear()

    @property
    def _may_free(self) -> bool:
        return bool(self.found) and not self._log.doubt and not self._log.keeps_all

    async def _freed(self) -> set[int]:
        """Stripes that are to be freed: they may still have owners."""
        freed = set[int]()
        for rows in self._rows(RECLAIM_START, RECLAIM_END):
            freed.update(Freed.decode(value).stripe for _, value in rows)
            await trio.lowlevel.checkpoint()
        return freed

    async def _note_in_use(self) -> None:
        """Take those out in which stripes have shards: only rows of `segments` are lost."""
        for batch in self._log.batches():
            if not self.any_found:
                break
            for _, row in batch:
                for place in row.shards:
                    strays = self.found.get(place.node, {})
                    if place.written and place.segment in strays:
                        del strays[place.segment]
                        logger.error(
                            "Segment %d of node %s is in use but not in the tables: run "
                            "'fusestore fsck --repair'.",
                            place.segment,
                            self._log.members.by_id[place.node].name,
                        )
            await trio.lowlevel.checkpoint()

    async def _sweep_node(self, member: Member) -> None:
        """Delete what crashes left on a node; NodeError, MetadataError."""
        await member.call(member.node.drop_aside)
        looked: dict[int, _Contents] = {}
        waits = False
        for segment in self.found.get(member.id, ()):
            try:
                contents = await self._looked_at(member, segment)
            except (NodeIdentityError, NodeTimeoutError):
                raise
            except NodeError as error:  # one bad sector does not cost the node
                logger.warning("%s The segment is kept.", error)
                waits = True
                continue
            if contents is not None:
                looked[segment] = contents
        if any(found.named for found in looked.values()):
            freed = await self._freed()  # after the look: a stripe may be freed at any moment
            for found in looked.values():
                gone = [one for one in found.named if one[1].number in freed]
                found.unnamed.extend(one for one in gone if not self._is_counted(one[1].number))
                found.named[:] = [one for one in found.named if one not in found.unnamed]
        numbers = {header.number for found in looked.values() for _, header in found.unnamed}
        lacking = await self._named_by_extents(numbers)
        for segment, found in looked.items():
            known = [*found.named, *(one for one in found.unnamed if one[1].number in lacking)]
            if await member.call(_any_whole, member, segment, known):
                _keep(member, segment)
            elif found.is_needed:
                waits = True
            elif self._may_free:
                await member.call(member.node.delete, SegmentKind.SHARDS, segment)
        if self._may_free and member.id in self._first and not waits:
            self._set_swept(member, max(member.shards.swept, self._first[member.id]))
            self._swept.add(member.id)

    async def _looked_at(self, member: Member, segment: int) -> _Contents | None:
        """What a segment has, or None if it is kept whatever it has; NodeError."""
        if not await member.call(may_be_ours, self._log, member, segment):
            logger.warning(
                "Segment %d of node %s is not of this store: it is ignored.", segment, member.name
            )
            return None
        if segment < member.shards.swept:
            _keep(member, segment)
            return None
        return self._judge(member, await member.call(self._headers, member, segment))

    def _set_swept(self, member: Member, first: int) -> None:
        if member.shards.swept != first:
            member.shards.swept = first
            rows = {one.id: one.shards.swept for one in self._log.members.all if one.shards.swept}
            self._log.apply({store_rows.SWEPT_KEY: store_rows.encode_swept(rows)})

    def _headers(self, member: Member, segment: int) -> list[_Record]:
        """In a thread: the records in a segment; NodeError."""
        return list(headers(self._log, member, segment))

    def _judge(self, member: Member, records: list[_Record]) -> _Contents:
        found = _Contents([], [], any(self._is_needed(header) for _, header in records))
        for record in records:
            number = record[1].number
            if number not in self._log.unsealed and self._log.stripe(number) is None:
                (found.named if self._is_named(number) else found.unnamed).append(record)
        return found

    def _is_needed(self, header: Header) -> bool:
        """Whether a stripe whose row has a shard elsewhere may need this copy of it."""
        number, row = header.number, self._log.stripe(header.number)
        if row is None:
            return False
        there = [
            index
            for index, place in enumerate(row.shards)
            if self._log.has_shard(number, index, place)
        ]
        return header.index not in there and len(there) < row.code.k

    def _is_named(self, number: int) -> bool:
        """Whether rows that begin with the number of a stripe say that it is in use."""
        return self._is_counted(number) or bool(owners_keys(self._log.engine, number))

    def _is_counted(self, number: int) -> bool:
        return self._log.engine.get(stripe_rows.live_key(number)) is not None

    async def _named_by_extents(self, numbers: set[int]) -> set[int]:
        """Those of some stripes in which files have bytes."""
        named: set[int] = set()
        for rows in self._rows(b"E", keys.after(b"E")) if numbers else ():
            stripes = {
                Extent.decode(key, value).stripe
                for key, value in rows
                if tables.readable(key, value)
            }
            named |= stripes & numbers
            await trio.lowlevel.checkpoint()
        return named

    def _rows(self, start: bytes, end: bytes) -> Iterator[list[tuple[bytes, bytes]]]:
        """The rows start <= key < end, some at a time; others may run in between."""
        while rows := list(
            islice(self._log.engine.scan(start, end), self._log.limits.repair_scan_rows)
        ):
            yield rows
            start = rows[-1][0] + b"\0"


def _any_whole(member: Member, segment: int, records: list[_Record]) -> bool:
    """In a thread: whether one of some shards is what its header says, or unreadable; NodeError."""
    try:
        return any(is_whole(member, segment, offset, header) for offset, header in records)
    except (NodeIdentityError, NodeTimeoutError):
        raise
    except NodeError as error:
        logger.warning("%s", error)
        return True


def _keep(member: Member, segment: int) -> None:
    logger.error(
        "Segment %d of node %s is in no table, but no crash left it: rows were lost. It is kept "
        "until 'fusestore fsck --repair' has put them back, or shows that no file needs them.",
        segment,
        member.name,
    )
