"""The read path: a file's extents, the shards they touch, every byte verified.

Bytes in memory are copied from there.  Otherwise the blocks of a range are read
from the data shards, at first without blocking, then through the ring or in a thread, and checked
against the checksums in the metadata.  If a shard is missing or bad, the same
blocks of any k others are read and decoded, and the damage is noted for healing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice

import trio

from ..bounded_cache import LeastRecentlyUsed
from ..errors import LostError, NodeError, NodeTimeoutError
from ..format import erasure, file_rows, keys, stripe_rows
from ..format.file_rows import Extent
from ..format.records import SegmentKind, block_checksums
from ..format.stripe_rows import LOST_STRIPE, Stripe
from ..limits import BLOCK_BYTES
from ..log.log import Log
from ..members.member import Member
from ..write.shard_record import whole_payload
from .cross_check import Agreed, cross_check

logger = logging.getLogger(__name__)

_SUM_BYTES = 8
COMBINATIONS_MAX = 64
"""Combinations of k shards that are tried, each time that one more shard is read."""


class Reader:
    """Reads files and stripes of an open store."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._limits = log.limits
        rows_max = log.limits.stripes_cached_max
        self._cache: LeastRecentlyUsed[int, Stripe] = LeastRecentlyUsed(rows_max)
        self._told: LeastRecentlyUsed[tuple[int, int], bool] = LeastRecentlyUsed(rows_max)
        """Files (inodes) and their stripes that were logged as lost."""
        self.errors = 0
        """Reads that were answered with EIO."""
        self.degraded = 0
        """Ranges that were decoded because a shard was missing or bad."""

    @property
    def cached(self) -> int:
        """Decoded rows of stripes in memory."""
        return len(self._cache)

    # --- files ---------------------------------------------------------------

    def extents(self, ino: int, start: int, end: int) -> Iterator[Extent]:
        """The parts of a file's extents that lie in start <= i < end, in order."""
        engine = self._log.engine
        first = engine.last(file_rows.extent_key(ino, 0), file_rows.extent_key(ino, start))
        if first is not None:
            extent = Extent.decode(*first)
            if extent.end > start:
                yield extent.part(start, end)
        low, high = file_rows.extent_key(ino, start + 1), file_rows.extent_key(ino, end)
        for key, value in engine.scan(low, high):
            yield Extent.decode(key, value).part(start, end)

    def owners(self, number: int) -> set[int]:
        """Inodes of the files that have bytes in a stripe."""
        prefix = stripe_rows.owners_prefix(number)
        found = set()
        for _, packed in self._log.engine.scan(prefix, keys.after(prefix)):
            for ino, offset, length, _ in stripe_rows.OWNER.iter_unpack(packed):
                extents = self.extents(ino, offset, offset + length)
                if any(extent.stripe == number for extent in extents):
                    found.add(ino)
        return found

    async def read(self, ino: int, start: int, end: int) -> bytes | bytearray | memoryview:
        """The file's bytes start <= i < end; holes are zeros; LostError."""
        if end <= start:
            return b""
        extents = list(self.extents(ino, start, end))
        if len(extents) == 1 and extents[0].length == end - start:
            return await self._read_extent(ino, extents[0])
        result = bytearray(end - start)
        for extent in extents:
            at = extent.offset - start
            result[at : at + extent.length] = await self._read_extent(ino, extent)
        return result

    async def _read_extent(self, ino: int, extent: Extent) -> bytes | memoryview:
        start, end = extent.stripe_offset, extent.stripe_offset + extent.length
        try:
            return await self.read_stripe(extent.stripe, start, end)
        except LostError as error:
            again = list(self.extents(ino, extent.offset, extent.end))
            if again == [extent]:  # otherwise it was overwritten or moved meanwhile
                await self._lost(ino, extent, error)
                raise
        return memoryview(await self.read(ino, extent.offset, extent.end))

    async def _lost(self, ino: int, extent: Extent, error: LostError) -> None:
        """Log that bytes of a file are lost, once for each stripe of a file."""
        self.errors += 1
        known = extent.stripe in self._log.unsealed or self.stripe(extent.stripe) is not None
        if not known and extent.stripe != LOST_STRIPE:
            self._log.note_lost_row(extent.stripe)
        if not self._told.get((ino, extent.stripe)):
            self._told[ino, extent.stripe] = True
            path = (await self._log.paths_of([ino]))[ino]
            where = f"{path}, bytes {extent.offset} to {extent.end}"
            logger.error("%s cannot be read: %s", where, error)

    # --- stripes -------------------------------------------------------------

    def stripe(self, number: int) -> Stripe | None:
        """A sealed stripe's row."""
        row = self._cache.get(number)
        if row is None:
            value = self._log.engine.get(stripe_rows.stripe_key(number))
            if value is None:
                return None
            row = self._cache[number] = Stripe.decode(value)
        return row

    def forget(self, number: int) -> None:
        """Drop cached data of a stripe whose row has changed or is gone."""
        self._cache.discard(number)

    async def read_stripe(self, number: int, start: int, end: int) -> bytes | memoryview:
        """A stripe's bytes start <= i < end; LostError."""
        unsealed = self._log.unsealed.get(number)
        if unsealed is not None:
            return unsealed.bytes(start, end)
        row = self.stripe(number)
        if row is None:
            raise LostError(f"Stripe {number:#x} is not in the metadata.")
        try:
            return await self._read_shards(number, row, start, end)
        except LostError:
            self.forget(number)
            if number not in self._log.unsealed and self.stripe(number) == row:
                raise
        # A mount that continued sealed it anew, at other places.
        return await self.read_stripe(number, start, end)

    async def _read_shards(
        self, number: int, row: Stripe, start: int, end: int
    ) -> bytes | memoryview:
        """Return the bytes start <= i < end of a sealed stripe, from its data shards."""
        length = row.shard_length
        first, last = start // length, (end - 1) // length
        if first == last:
            return await self._read_shard(
                number, row, first, start - first * length, end - first * length
            )
        parts = []
        for index in range(first, last + 1):
            low, high = max(start - index * length, 0), min(end - index * length, length)
            parts.append(await self._read_shard(number, row, index, low, high))
        return b"".join(parts)

    async def _read_shard(
        self, number: int, row: Stripe, index: int, start: int, end: int
    ) -> memoryview:
        """Return the bytes start <= i < end of a data shard, read or decoded."""
        low = start // BLOCK_BYTES * BLOCK_BYTES
        high = min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, row.shard_length)
        blocks: bytes | bytearray | None = await self.read_blocks(number, row, index, low, high)
        if blocks is None:
            blocks = (await self.decode(number, row, [index], low, high))[index]
            self.degraded += 1
        return memoryview(blocks)[start - low : end - low]

    async def read_blocks(
        self, number: int, row: Stripe, index: int, low: int, high: int, *, patient: bool = False
    ) -> bytes | bytearray | None:
        """Return complete blocks of a shard, verified; None if they are missing, late or bad.

        With `patient`, a slow node has as much time as for a write.
        """
        place = row.shards[index]
        member = self._log.members.by_id[place.node]
        if not place.written or not member.is_open:
            return None
        if member.out_of_use and not self._log.broken:
            return None  # when too few nodes are up, every node that answers is used
        standing = member.standing
        is_slow = member.calls.left_behind or standing.is_slow(trio.current_time())
        if (standing.doubted or is_slow) and not patient:
            return None
        seconds = self._limits.node_seconds_max if patient else self._limits.read_seconds_max
        try:
            data = await member.read(
                SegmentKind.SHARDS, place.segment, place.offset + low, high - low, seconds
            )
        except NodeTimeoutError as error:
            logger.warning("%s Others are read for a while.", error)
            member.standing.answered_late(trio.current_time())
            return None
        except NodeError as error:
            await self._failed(member, number, row, index, error)
            return None
        if verified(row, index, low, data):
            return data
        if not self._is_current(number, row, index):
            return None
        what = f"Shard {index} of stripe {number:#x} on node {member.name} is corrupt."
        if await self._vouched_for(member, number, row, index):
            what = f"Shard {index} of stripe {number:#x} and its row disagree."
        elif self._is_current(number, row, index):
            member.corrupt += 1
        self._damaged(number, row, index, what)
        return None

    async def _vouched_for(self, member: Member, number: int, row: Stripe, index: int) -> bool:
        """Return whether a shard matches its own record, and its disk is not at fault."""
        try:
            arguments = (self._log, member, number, row, index)
            return await member.call(whole_payload, *arguments) is not None
        except NodeError:
            return False

    async def _failed(
        self, member: Member, number: int, row: Stripe, index: int, error: NodeError
    ) -> None:
        """Handle a failed read: the fault is the node's, or only this shard's."""
        try:
            await member.call(member.node.check)
        except NodeError as gone:
            member.fail(gone)
        else:
            self._damaged(number, row, index, str(error))

    def _damaged(self, number: int, row: Stripe, index: int, reason: str) -> None:
        """Note a bad shard for healing, unless it was freed or moved meanwhile."""
        if not self._is_current(number, row, index):
            return
        key = stripe_rows.missing_key(row.shards[index].node, number, index)
        if self._log.engine.get(key) is None:
            logger.warning("%s It is decoded from others.", reason)
            if not self._log.read_only and not self._log.broken:
                self._log.apply({key: b""})

    def _is_current(self, number: int, row: Stripe, index: int) -> bool:
        """Return whether a shard has not been freed or moved since its row was read."""
        now = self._log.stripe(number)
        if now is not None and now.shards[index] == row.shards[index]:
            return True
        self.forget(number)
        return False

    async def decode(
        self, number: int, row: Stripe, wanted: list[int], low: int, high: int
    ) -> dict[int, bytearray]:
        """Decode the same blocks of the shards `wanted` from any k others; LostError.

        The result must match the checksums in the row.  If it does not, one of the k is
        wrong although it matches its own checksum, and others are used.
        """
        others = [index for index in range(row.code.n) if index not in wanted]
        found = await self._gather(number, row, others, wanted, low, high)
        if found is not None:
            return found
        # Shards with different bad blocks may together still give every block.
        result: dict[int, bytearray] = {index: bytearray() for index in wanted}
        for start in range(low, high, BLOCK_BYTES):
            end = min(start + BLOCK_BYTES, high)
            every = range(row.code.n)
            found = await self._gather(number, row, every, wanted, start, end, patient=True)
            if found is None:
                agreed = await cross_check(self._log, number, row)
                if agreed is not None and agreed.row.checksums != row.checksums:
                    self._mend(number, row, agreed)
                    return await self.decode(number, agreed.row, wanted, low, high)
                nodes = ", ".join(self._log.members.by_id[p.node].name for p in row.shards)
                raise LostError(
                    f"Stripe {number:#x} has fewer than the {row.code.k} good shards that it "
                    f"needs, or they are inconsistent (nodes {nodes}): repair the nodes that are "
                    "not up."
                )
            for index in wanted:
                result[index] += found[index]
        return result

    def _mend(self, number: int, row: Stripe, agreed: Agreed) -> None:
        """Mend the wrong row of a stripe: set the checksums on which its shards agree."""
        self.forget(number)
        now = self._log.stripe(number)
        if now is None or now.checksums != row.checksums:
            return  # freed, or mended meanwhile
        logger.error(
            "The row of stripe %#x is wrong: its shards agree on other checksums. It is mended.",
            number,
        )
        self._log.rows_mended += 1
        if self._log.read_only or self._log.broken:
            self._cache[number] = agreed.row
            return
        mended = replace(now, checksums=agreed.row.checksums)
        changes: dict[bytes, bytes | None] = {stripe_rows.stripe_key(number): mended.encode()}
        for index in agreed.shards:
            place = row.shards[index]
            if now.shards[index] == place:
                changes[stripe_rows.missing_key(place.node, number, index)] = None
        self._log.apply(changes)

    async def reads_without(self, number: int, row: Stripe, without: Sequence[int]) -> bool:
        """Return whether a stripe can be decoded without some shards, and the result is right."""
        length = row.shard_length
        if await self._decodes(number, row, without, 0, length):
            return True
        for start in range(0, length, BLOCK_BYTES):
            end = min(start + BLOCK_BYTES, length)
            if not await self._decodes(number, row, without, start, end):
                return False
        return True

    async def _decodes(
        self, number: int, row: Stripe, without: Sequence[int], low: int, high: int
    ) -> bool:
        sources = [index for index in range(row.code.n) if index not in without]
        return await self._gather(number, row, sources, list(without), low, high) is not None

    async def _gather(
        self,
        number: int,
        row: Stripe,
        sources: Iterable[int],
        wanted: list[int],
        low: int,
        high: int,
        *,
        patient: bool = False,
    ) -> dict[int, bytearray] | None:
        """Return the blocks of the shards `wanted` from k good ones of `sources`.

        None if there are too few, or no k of them give blocks that match the row.
        """
        present: dict[int, bytes | bytearray] = {}
        for index in sources:
            data = await self.read_blocks(number, row, index, low, high, patient=patient)
            if data is None:
                continue
            for others in islice(combinations(present, row.code.k - 1), COMBINATIONS_MAX):
                chosen = {**{other: present[other] for other in others}, index: data}
                found = erasure.rebuild(row.code, high - low, chosen, wanted)
                if all(verified(row, i, low, blocks) for i, blocks in found.items()):
                    return found
            present[index] = data
        return None


def verified(row: Stripe, index: int, low: int, data: bytes | bytearray) -> bool:
    """Return whether blocks of a shard from offset `low` on match the stripe's checksums."""
    first = low // BLOCK_BYTES * _SUM_BYTES
    found = block_checksums(data, len(data))
    return row.checksums[index][first : first + len(found)] == found
