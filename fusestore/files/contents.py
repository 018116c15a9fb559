"""File contents: extents, and how writes, truncations and removals change them.

A write appends its bytes to a stripe, points extents at them, and releases the bytes
that they replace.  A truncation or removal of many extents runs in batches.  A row of
`trims` records the rest of the work.  Until it is complete, nothing else changes the
file, so that old bytes can never reappear.
"""

from __future__ import annotations

import logging
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

import trio

from ..bounded_cache import LeastRecentlyUsed
from ..errors import FileTooLargeError, IsDirectoryError, QuotaError, StaleError
from ..format import file_rows
from ..format.erasure import Code
from ..format.file_rows import Extent, Inode
from ..limits import FILE_BYTES_MAX
from ..log.log import Log, Transaction
from ..read.reader import Reader
from ..system import clock
from ..write.writer import Writer
from . import quota

logger = logging.getLogger(__name__)

Data = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a file that are to get another place."""

    ino: int
    extent: Extent
    """Their place when they were read."""
    data: Data | None
    """None: they are in memory, and may change."""

    @property
    def length(self) -> int:
        """How many bytes move."""
        return self.extent.length

    def first(self, length: int) -> Part:
        """Return its first bytes."""
        offset = self.extent.offset
        data = self.data[:length] if self.data is not None else None
        return replace(self, extent=self.extent.part(offset, offset + length), data=data)


@dataclass(frozen=True, slots=True)
class _Run:
    """Parts of a file that lie one behind the other, and move together."""

    ino: int
    offset: int
    data: bytearray = field(default_factory=bytearray)
    extents: list[Extent] = field(default_factory=list)


class Contents:
    """Reads, writes and cuts files."""

    def __init__(self, log: Log, reader: Reader, writer: Writer) -> None:
        self._log = log
        self._limits = log.limits
        self._reader = reader
        self._writer = writer
        self._tails: LeastRecentlyUsed[int, Extent] = LeastRecentlyUsed(log.limits.tail_extents_max)
        """The last written extent of an inode, for writes that continue behind it."""
        self.hold_up: Callable[[int], Awaitable[None]] | None = None
        """Lets a write of so many bytes wait while there is too much waste; cleaning sets this."""
        self._trimming: dict[int, trio.Event] = {}
        """By inode, the event that is set when a truncation of many extents is complete."""

    # --- reading and writing -------------------------------------------------

    async def read(self, ino: int, offset: int, size: int) -> Data:
        """Read up to `size` bytes from `offset`; fewer only at the end of the file."""
        self._log.used_at = trio.current_time()
        value = self._log.engine.get(file_rows.inode_key(ino))
        if value is None:
            raise StaleError(f"There is no inode {ino}.")
        return await self._reader.read(ino, offset, min(offset + size, Inode.decode(value).size))

    async def write(self, ino: int, offset: int, data: Data, *, whole: bool = False) -> int:
        """Write `data`, and return how many bytes were written.

        If a quota has no room for all of `data`, the write ends at a block, or is refused if
        `whole` is set.  NoSpaceError, QuotaError, ReadOnlyError.
        """
        end = offset + len(data)
        if end > FILE_BYTES_MAX:
            raise FileTooLargeError(f"A file may have at most {FILE_BYTES_MAX} bytes.")
        if not data:
            return 0
        self._log.used_at = trio.current_time()
        if self.hold_up is not None:
            await self.hold_up(len(data))
        await self._writer.room(len(data))
        if ino in self._trimming:
            await self.settled(ino)
        with self._log.transaction() as txn:
            inode = self._inode(txn, ino)
            inode.mtime = inode.ctime = clock.now()
            if offset < inode.size and self._overwrite(ino, offset, data):
                txn.put(file_rows.inode_key(ino), inode.encode())
                return len(data)
            if inode.quota_root:
                data = self._within_quota(txn, ino, inode, offset, data, whole)
                end = offset + len(data)
            code = Code(inode.k, inode.m)
            self._log.take_room(len(data), code)
            if offset < inode.size:
                self._cut(txn, ino, inode, offset, end)
            for piece in self._writer.append(txn, code, ino, offset, data):
                offset = self._point(txn, ino, offset, *piece)
            inode.allocated += len(data)
            inode.size = max(inode.size, end)
            txn.put(file_rows.inode_key(ino), inode.encode())
        return len(data)

    def _within_quota(
        self, txn: Transaction, ino: int, inode: Inode, offset: int, data: Data, whole: bool
    ) -> Data:
        """Return the part of `data` that fits the quota, and charge the quota; QuotaError."""
        root, end, at = inode.quota_root, offset + len(data), offset
        left = quota.room(txn.get, root)
        extents = list(self._reader.extents(ino, offset, end)) if offset < inode.size else []
        for start, stop in [*((extent.offset, extent.end) for extent in extents), (end, end)]:
            if start - at > left:
                end = max(
                    (at + left) // self._limits.quota_block_bytes * self._limits.quota_block_bytes,
                    offset,
                )
                break
            left, at = left - (start - at), stop
        if end == offset or (whole and end < offset + len(data)):
            raise QuotaError("The quota is used up.")
        held = sum(max(extent.part(offset, end).length, 0) for extent in extents)
        quota.charge(txn, root, end - offset - held)
        return data if end == offset + len(data) else memoryview(data)[: end - offset]

    def _overwrite(self, ino: int, offset: int, data: Data) -> bool:
        """Replace bytes in memory that no commit holds yet."""
        if not self._writer.can_overwrite:
            return False
        end = offset + len(data)
        for extent in self._reader.extents(ino, offset, end):
            return extent.length == len(data) and self._writer.overwrite(
                extent.stripe, extent.stripe_offset, data
            )
        return False

    def _point(
        self, txn: Transaction, ino: int, offset: int, stripe: int, at: int, length: int
    ) -> int:
        """Point an extent at bytes of a stripe, or extend the last one; return the next offset."""
        tail = self._tails.get(ino)
        if (
            tail is not None
            and tail.end == offset
            and tail.stripe == stripe
            and tail.stripe_offset + tail.length == at
        ):
            extent = Extent(tail.offset, tail.length + length, stripe, tail.stripe_offset)
        else:
            extent = Extent(offset, length, stripe, at)
        txn.put(file_rows.extent_key(ino, extent.offset), extent.encode())
        self._tails[ino] = extent
        return extent.end

    def _cut(self, txn: Transaction, ino: int, inode: Inode, start: int, end: int) -> None:
        """Release the file's bytes start <= i < end; changes `inode`, not its row."""
        self._tails.discard(ino)
        low, at = file_rows.extent_key(ino, 0), file_rows.extent_key(ino, start)
        rows = list(txn.scan(file_rows.extent_key(ino, start + 1), file_rows.extent_key(ino, end)))
        first = txn.last(low, at)
        if first is not None:
            rows.insert(0, first)
        for key, value in rows:
            self._cut_extent(txn, ino, inode, Extent.decode(key, value), start, end)

    @staticmethod
    def _cut_extent(
        txn: Transaction, ino: int, inode: Inode, extent: Extent, start: int, end: int
    ) -> None:
        """Release an extent's bytes start <= i < end; keep its other bytes."""
        gone = extent.part(start, end)
        if gone.length <= 0:
            return
        if extent.offset < start:
            left = extent.part(extent.offset, start)
            txn.put(file_rows.extent_key(ino, left.offset), left.encode())
        else:
            txn.delete(file_rows.extent_key(ino, extent.offset))
        if extent.end > end:
            right = extent.part(end, extent.end)
            txn.put(file_rows.extent_key(ino, right.offset), right.encode())
        txn.let_go(extent.stripe, gone.length)
        inode.allocated -= gone.length

    # --- rewriting ------------------------------------------------------------

    async def settled(self, ino: int) -> None:
        """Wait for the end of a running truncation of a file."""
        while ino in self._trimming:
            await self._trimming[ino].wait()

    def has(self, ino: int, extent: Extent) -> bool:
        """Whether a file still has all bytes of this extent at the same place."""
        return self._row_of(ino, extent) is not None

    def _row_of(self, ino: int, extent: Extent) -> bytes | None:
        """Return the key of the row with all bytes of an extent; None if there is none."""
        at = file_rows.extent_key(ino, extent.offset)
        if self._log.engine.get(at) == extent.encode():
            return at
        row = self._log.engine.last(file_rows.extent_key(ino, 0), at)
        if row is None or Extent.decode(*row).part(extent.offset, extent.end) != extent:
            return None
        return row[0]

    def set_code(self, ino: int, code: Code) -> None:
        """Set the code of new bytes of a file; its times do not change."""
        with self._log.transaction(rewrites=True) as txn:
            inode = self._inode(txn, ino)
            inode.k, inode.m = code.k, code.m
            txn.put(file_rows.inode_key(ino), inode.encode())

    def rewrite(self, code: Code, parts: Iterable[Part], *, in_reserve: bool = False) -> int:
        """Write bytes of files to stripes of a code; return how many have moved.

        `parts` are in the order of inodes and offsets.  Those that have changed since they were
        read stay where they are, and so does one that overlaps the one before.  With
        `in_reserve`, they may use half of the reserve, because others become free.
        NoSpaceError.
        """
        runs = list[_Run]()
        rows = set[bytes]()
        end = (0, 0)  # the inode and the offset behind the last part
        for part in parts:
            begin, row = (part.ino, part.extent.offset), self._row_of(part.ino, part.extent)
            if row is None or begin < end or (row in rows and begin != end):
                continue
            data = self._unchanged(part)
            if data is None:
                continue
            if not runs or begin != end:
                runs.append(_Run(*begin))
            runs[-1].data.extend(data)
            runs[-1].extents.append(part.extent)
            rows.add(row)
            end = (part.ino, part.extent.end)
        length = sum(len(run.data) for run in runs)
        with self._log.transaction() as txn:
            self._log.take_room(length, code, in_reserve=in_reserve)
            self._leave(txn, runs)
            for run in runs:
                offset = run.offset
                for start in range(0, len(run.data), self._limits.stripe_bytes):
                    piece = memoryview(run.data)[start : start + self._limits.stripe_bytes]
                    for place in self._writer.append(
                        txn, code, run.ino, offset, piece, rewritten=True
                    ):
                        offset = self._point(txn, run.ino, offset, *place)
        return length

    def _leave(self, txn: Transaction, runs: Iterable[_Run]) -> None:
        """Release the places of bytes that get others.

        Most are whole rows, which needs no search; others are cut out of theirs.
        """
        left = Counter[int]()
        for run in runs:
            self._tails.discard(run.ino)
            keys = [file_rows.extent_key(run.ino, extent.offset) for extent in run.extents]
            if all(
                self._log.engine.get(key) == extent.encode()
                for key, extent in zip(keys, run.extents, strict=True)
            ):
                txn.changes.update(dict.fromkeys(keys))
                for extent in run.extents:
                    left[extent.stripe] += extent.length
            else:
                inode = self._inode(txn, run.ino)
                self._cut(txn, run.ino, inode, run.offset, run.offset + len(run.data))
        for stripe, length in left.items():
            txn.let_go(stripe, length)

    def _unchanged(self, part: Part) -> Data | None:
        """Return the bytes of a part; None if its file is being cut, or they are gone."""
        ino, extent = part.ino, part.extent
        if ino in self._trimming:
            return None
        if self._log.engine.get(file_rows.inode_key(ino)) is None:  # it is being removed
            return None
        if part.data is not None:
            return part.data
        unsealed = self._log.unsealed.get(extent.stripe)
        at = extent.stripe_offset
        return unsealed.bytes(at, at + extent.length) if unsealed else None

    # --- truncating ----------------------------------------------------------

    async def truncate(self, ino: int, size: int) -> None:
        """Set a file's size: release bytes past it; new bytes are a hole."""
        if size > FILE_BYTES_MAX:
            raise FileTooLargeError(f"A file may have at most {FILE_BYTES_MAX} bytes.")
        await self.settled(ino)
        value = self._log.engine.get(file_rows.inode_key(ino))
        cuts = value is not None and size < Inode.decode(value).size
        with self._log.transaction(rewrites=not cuts) as txn:
            inode = self._inode(txn, ino)
            shrinks, before = size < inode.size, inode.allocated
            inode.mtime = inode.ctime = clock.now()
            inode.size = size
            more = shrinks and self.trim_batch(txn, ino, inode, size)
            if inode.quota_root:
                quota.charge(txn, inode.quota_root, inode.allocated - before)
            txn.put(file_rows.inode_key(ino), inode.encode())
            if more:
                txn.put(file_rows.trim_key(ino), size.to_bytes(8, "little"))
                self._trimming[ino] = trio.Event()
        if more:
            # Complete this even if the caller is cancelled: the file cannot be used before.
            with trio.CancelScope(shield=True):
                await self.trim(ino, size)

    def trim_batch(self, txn: Transaction, ino: int, inode: Inode, size: int) -> bool:
        """Release some of the bytes past `size`; return whether more are left."""
        self._tails.discard(ino)
        if size > 0:
            key = file_rows.extent_key(ino, size - 1)
            first = txn.last(file_rows.extent_key(ino, 0), key)
            if first is not None:
                extent = Extent.decode(*first)
                self._cut_extent(txn, ino, inode, extent, size, max(extent.end, size))
        start, end = file_rows.extent_key(ino, size), file_rows.extent_key(ino + 1, 0)
        rows = list(islice(txn.scan(start, end), self._limits.trim_batch + 1))
        for key, value in rows[: self._limits.trim_batch]:
            extent = Extent.decode(key, value)
            self._cut_extent(txn, ino, inode, extent, extent.offset, extent.end)
        return len(rows) > self._limits.trim_batch

    async def trim(self, ino: int, size: int) -> None:
        """Release all bytes past `size`; the inode may already be removed."""
        more = True
        while more:
            await trio.lowlevel.checkpoint()
            with Transaction(self._log) as txn:
                value = txn.get(file_rows.inode_key(ino))
                inode = Inode.decode(value) if value is not None else _GONE
                before = inode.allocated
                more = self.trim_batch(txn, ino, inode, size)
                if value is not None:
                    if inode.quota_root:
                        quota.charge(txn, inode.quota_root, inode.allocated - before)
                    txn.put(file_rows.inode_key(ino), inode.encode())
                if not more:
                    txn.delete(file_rows.trim_key(ino))
        event = self._trimming.pop(ino, None)
        if event is not None:
            event.set()

    @staticmethod
    def _inode(txn: Transaction, ino: int) -> Inode:
        value = txn.get(file_rows.inode_key(ino))
        if value is None:
            raise StaleError(f"There is no inode {ino}.")
        inode = Inode.decode(value)
        if stat.S_ISDIR(inode.mode):
            raise IsDirectoryError("A directory has no contents.")
        return inode


_GONE = Inode(0, 0, 0, 0, 0, 0, 0, 0, 0)
"""Stands for a removed inode whose extents are still being released."""
