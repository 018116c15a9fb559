"""The file system of an open store: names, attributes and contents."""

from __future__ import annotations

import trio

from ..errors import ShortageError
from ..format.file_rows import NO_LIMIT
from ..store.store import Store
from .attributes import Attributes
from .cleaner import Cleaner
from .cleaning_report import CleaningReport
from .contents import Contents
from .emptier import Emptier
from .quota_roots import QuotaRoots
from .recode import Recoder
from .removal import Removal
from .rewriter import Rewriter
from .tree import Tree

INODE_BYTES = 4096
"""Free bytes for each inode that `df -i` estimates to be free."""


class FileSystem:
    """The parts of the file system, and its total size."""

    def __init__(self, store: Store, nursery: trio.Nursery) -> None:
        self.log = store.log
        self.tree = Tree(store.log)
        store.log.paths_of = self.tree.paths
        self.contents = Contents(store.log, store.reader, store.writer)
        self.removal = Removal(store.log, self.contents, nursery)
        self.attributes = Attributes(
            store.log, self.tree, store.reader, allow_unsafe=store.config.allow_unsafe
        )
        self.quotas = QuotaRoots(store.log, self.tree, nursery)
        rewriter = Rewriter(store.log, store.reader, store.writer, self.contents)
        self.recoder = Recoder(store, self.tree, self.contents, rewriter, nursery)
        self.emptier = Emptier(store.log, rewriter, store.room_maker.pay)
        self.cleaner = Cleaner(store.log, store.writer, self.emptier)
        self.cleaning_report = CleaningReport(store.log, self.cleaner, self.emptier)
        self.contents.hold_up = self.cleaner.hold_up
        store.room_maker.clean = self.cleaner.make_room
        store.log.room.within_reach = self.cleaner.within_reach
        self._nursery = nursery
        self._committer = store.committer
        self.make_room = store.room_maker.make_room
        self.catch_up = store.room_maker.catch_up

    async def begin(self) -> None:
        """Make the root of a new store; complete the removals that the last mount left."""
        if not self.log.read_only:
            self.tree.make_root()
            await self.removal.resume()

    async def commit(self) -> None:
        """Return when every change made before the call is durable, with all of its shards.

        NotDurableError; ShortageError if it waits for room, or is durable but lacks shards for
        which a node in use had no room.
        """
        shortage = await self._committer.commit(reports=True)
        if shortage:
            raise ShortageError(shortage)

    def go_on(self) -> None:
        """Begin the work in the background: cleaning, and what the last mount did not complete."""
        if not self.log.read_only:
            self.quotas.resume()
            self.recoder.resume()
            self._nursery.start_soon(self.cleaner.run)

    def space(self) -> tuple[int, int]:
        """Return (total, free) bytes of file data in the default code, within the root's quota.

        What cleaning gives back when it is needed is free.
        """
        total, free = self.log.usable()
        total = max(total, self.log.counters.file_bytes + free)
        row = self.quotas.of_root()
        if row is not None and row.bytes_max < total:
            return row.bytes_max, max(0, min(free, row.bytes_max - row.bytes_used))
        return total, free

    def inodes(self, free_bytes: int) -> tuple[int, int]:
        """Return (total, free) inodes by the root's quota, or estimated from the free bytes."""
        row = self.quotas.of_root()
        if row is not None and row.files_max != NO_LIMIT:
            return row.files_max, max(0, row.files_max - row.files_used)
        guess = free_bytes // INODE_BYTES
        return self.log.counters.files + guess, guess
