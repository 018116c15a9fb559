"""Rebuilt and moved shards: they are written, read back from the medium, and only then counted.

Healing, repair and moving share this.  A shard that is on its way does not count.  When
the node has returned the right bytes, one step adds the new place, and removes the
shard's row in `missing` or its old place.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import Buffer

from ..errors import LostError, NodeError, NodeFullError
from ..format import stripe_rows
from ..format.records import HEADER_BYTES, Header, SegmentKind, record_length
from ..format.store_rows import NEVER_WHOLE
from ..format.stripe_rows import ShardPlace, Stripe
from ..log.log import Log
from ..members.member import Member
from ..nodes.base import Node
from ..read.reader import Reader, verified
from ..write.shard_record import (
    can_be_read,
    can_be_rewritten,
    is_there,
    may_overwrite,
    shard_header,
    whole_payload,
    write_shard,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """A shard that was written but does not count yet."""

    number: int
    index: int
    row: Stripe
    """The stripe as it was read."""
    place: ShardPlace
    doubted: bool
    """The data at the place in the row is not known to belong to this shard."""


StripeShards = tuple[int, Stripe, list[int]]
"""A stripe's number, the stripe, and the indices of its shards on a node."""


class Rebuilder:
    """Gives nodes shards that they lack."""

    def __init__(self, log: Log, reader: Reader) -> None:
        self._log = log
        self._reader = reader
        self.told: set[int] = set()
        """Stripes that cannot be rebuilt now, and that were logged."""

    def cost(self, number: int) -> int:
        """Bytes of I/O that rebuilding a shard of a stripe takes."""
        row = self._log.stripe(number)
        return (row.code.k + 1) * row.shard_length if row is not None else 0

    async def rebuild(self, member: Member, wanted: dict[int, list[int]]) -> tuple[int, int]:
        """Rebuild shards by stripe; shards that cannot be rebuilt stay in `missing`; NodeError."""
        written: list[_Rebuilt] = []
        try:
            for number, indices in wanted.items():
                row = self._log.stripe(number)
                if row is not None:
                    await self._rewrite(member, number, row, indices, written)
            return await self._prove(member, written)
        except BaseException:
            for shard in written:
                self._give_back(member, shard)
            raise

    async def _rewrite(
        self, member: Member, number: int, row: Stripe, indices: list[int], written: list[_Rebuilt]
    ) -> None:
        """Compute shards of a stripe and write them; they do not count yet."""
        length = row.shard_length
        try:
            data = await self._reader.decode(number, row, indices, 0, length)
        except LostError as error:
            if self._log.stripe(number) is None:
                return  # it was freed meanwhile
            if number not in self.told:
                self.told.add(number)
                logger.error("%s", error)
            keys = [stripe_rows.missing_key(member.id, number, index) for index in indices]
            self._log.apply({key: b"" for key in keys if self._log.engine.get(key) is None})
            return
        now = self._log.stripe(number)
        if now is not None and now.checksums != row.checksums:
            row = now  # it was wrong, and the shards were right
            found = await member.call(not_intact, self._log, member, [(number, row, indices)])
            bad = found.get(number, [])
            good = [index for index in indices if index not in bad]
            self._log.apply({stripe_rows.missing_key(member.id, number, i): None for i in good})
            indices = bad
        for index in indices:
            await self._write(member, number, row, index, data[index], written)

    async def _write(
        self,
        member: Member,
        number: int,
        row: Stripe,
        index: int,
        data: Buffer,
        written: list[_Rebuilt],
        *,
        seen: bool = False,
    ) -> None:
        """Write a shard to its old place, or, if it was not on this node, to a new one.

        It also goes to a new place if other data lies at the place in the row, if that cannot
        be read (a bad sector may stay bad), or if the segment has other names.  `seen`: it was
        read there.
        """
        place = row.shards[index]
        stays = place.node == member.id and place.written
        doubted = False
        header = shard_header(row.code, row.length, number, index, row.checksums[index])
        if stays:
            stays = await member.call(can_be_rewritten, member, place, row.shard_length)
        looks = not seen and (stays or place.node != member.id)
        if looks and await self._is_taken(member, place, header, data):
            stays, doubted = False, self._note_doubt(place, header)
        if not stays:
            place = member.reserve(row.shard_length)
            member.shards.hold_back(place, row.shard_length)
        written.append(_Rebuilt(number, index, row, place, doubted))
        length = record_length(row.shard_length)
        if member.space and member.device.room < length + self._log.limits.reserve_bytes:
            takes_none = place == row.shards[index] and await member.call(is_there, member, place)
            if not takes_none:
                raise NodeFullError(f"Node {member.name} has no room for the shards that it lacks.")
        device = member.device.place(length)
        try:
            await member.call(write_shard, self._log, member, place, header, data)
        finally:
            device.land(length)

    async def _is_taken(
        self, member: Member, place: ShardPlace, header: Header, data: Buffer
    ) -> bool:
        """Return whether other data lies at a shard's place, which must then not be touched.

        The node that the shard leaves need not answer: the place is checked again before
        it is freed.  NodeError of `member`, which gets the shard.
        """
        owner = self._log.members.by_id.get(place.node)
        if not place.written or owner is None or owner.out_of_use:
            return False
        try:
            if owner is not member and not await owner.call(
                can_be_read, owner, place, header.payload_length
            ):
                return False  # what cannot be read is not freed
            return not await owner.call(may_overwrite, self._log, owner, place, header, data)
        except NodeError as error:
            if owner is member:
                raise
            owner.fail(error)
            return False

    def _note_doubt(self, place: ShardPlace, header: Header) -> bool:
        """Note that a row names a place that is taken; return whether the row may be wrong.

        A node without any commit of ours may hold another history, which was given up.  There
        the rows are right, and the place is freed like any other that a shard leaves.
        """
        owner = self._log.members.by_id[place.node]
        if owner.standing.holds == NEVER_WHOLE:
            return False
        self._log.rows_in_doubt += 1
        logger.error(
            "Shard %d of stripe %#x is not where its row says, in segment %d of node %s at %d: "
            "the data there is kept. Run 'fusestore fsck --repair'.",
            header.index,
            header.number,
            place.segment,
            owner.name,
            place.offset,
        )
        return True

    async def move(
        self, target: Member, shards: Sequence[tuple[int, Stripe, int]]
    ) -> tuple[int, int]:
        """Give shards (stripe, row, index) of other nodes to a node; (shards, bytes) moved.

        Once read back, each counts there, and its old place is to be reclaimed.  Hold
        `busy`.  LostError if a shard cannot be read, NodeError of the target.
        """
        written: list[_Rebuilt] = []
        try:
            for number, row, index in shards:
                length = row.shard_length
                data: Buffer | None = await self._reader.read_blocks(number, row, index, 0, length)
                seen = data is not None
                if data is None:
                    data = (await self._reader.decode(number, row, [index], 0, length))[index]
                    row = self._log.stripe(number) or row  # which may have been mended
                await self._write(target, number, row, index, data, written, seen=seen)
            return await self._prove(target, written)
        except BaseException:
            for shard in written:
                self._give_back(target, shard)
            raise

    async def _prove(self, member: Member, written: list[_Rebuilt]) -> tuple[int, int]:
        """Read rebuilt shards back; the right ones count from then on."""
        node = member.node
        segments = sorted({shard.place.segment for shard in written})
        await member.call(node.flush, SegmentKind.SHARDS, segments)
        for segment in filter(member.shards.is_full, segments):
            # A seal may still be writing to the range that it reserved.
            state = member.shards.states.get(segment)
            await member.call(_give_back_ahead, node, segment, state.size if state else 0)
        shards = total = 0
        while written:
            shard = written[-1]
            await self._read_back(member, shard)
            written.pop()
            if self._count(member, shard):
                shards, total = shards + 1, total + shard.row.shard_length
        return shards, total

    async def _read_back(self, member: Member, shard: _Rebuilt) -> None:
        """NodeError unless the node returns the bytes that were written."""
        row, place = shard.row, shard.place
        start, size = place.offset - HEADER_BYTES, HEADER_BYTES + row.shard_length
        data = await member.call(
            member.node.read_back, SegmentKind.SHARDS, place.segment, start, size
        )
        seed = self._log.shards(member.name, place.segment).seed(start)
        sums = row.checksums[shard.index]
        header = shard_header(row.code, row.length, shard.number, shard.index, sums)
        # The written bytes matched the row, so only the node can be at fault.
        if data[:HEADER_BYTES] != header.encode(seed) or not verified(
            row, shard.index, 0, data[HEADER_BYTES:]
        ):
            raise NodeError(
                f"Node {member.name} returned other bytes than were written: replace its disk."
            )

    def _count(self, member: Member, shard: _Rebuilt) -> bool:
        """Count a shard from now on; False if its stripe was freed or moved meanwhile."""
        number, index, row, place = shard.number, shard.index, shard.row, shard.place
        now, before = self._log.stripe(number), row.shards[index]
        key = stripe_rows.missing_key(before.node, number, index)
        if now is None or now.shards[index] != before:
            self._give_back(member, shard)
            self._log.apply({key: None})
            return False
        if place != before:
            member.shards.count(place, row.shard_length)
        changes = {stripe_rows.stripe_key(number): now.moved(index, place).encode(), key: None}
        if place != before and before.written and not shard.doubted:
            debt, length = stripe_rows.reclaim_row(before, row.shard_length, number)
            changes[debt] = length
        self._log.apply(changes)
        self._reader.forget(number)
        return True

    @staticmethod
    def _give_back(member: Member, shard: _Rebuilt) -> None:
        """Release the place that was reserved for a rebuilt shard."""
        row, place = shard.row, shard.place
        if place != row.shards[shard.index]:
            member.shards.count(place, row.shard_length)
            member.shards.release(place.segment, row.shard_length)


def _give_back_ahead(node: Node, segment: int, reserved: int) -> None:
    """In a thread: release the space allocated past the end of a segment that is complete."""
    size = node.size(SegmentKind.SHARDS, segment)
    if size >= reserved:  # else it would grow: what is past its end is quickly seen to be nothing
        node.truncate(SegmentKind.SHARDS, segment, size)


def not_intact(log: Log, member: Member, batch: list[StripeShards]) -> dict[int, list[int]]:
    """In a thread: the shards of a node that are missing or wrong, by stripe.

    A shard is also wrong if its header is: without the header, nobody could find the shard if
    the metadata were lost.
    """
    found = {}
    for number, row, here in batch:
        bad = [i for i in here if not _is_intact(log, member, number, row, i)]
        if bad:
            found[number] = bad
    return found


def _is_intact(log: Log, member: Member, number: int, row: Stripe, index: int) -> bool:
    if not row.shards[index].written:
        return False
    try:
        payload = whole_payload(log, member, number, row, index)
    except NodeError:
        return False
    return payload is not None and verified(row, index, 0, payload)
