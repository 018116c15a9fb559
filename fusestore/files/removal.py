"""Removal: files that have no name and that nobody uses go, many at a time, and soon.

`unlink` leaves a row of `orphans`; what a file had is taken away here, when no more
files come for a moment.  After a crash the next mount goes on.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Sequence

import trio

from ..format import file_rows, keys, tables
from ..format.file_rows import Inode
from ..log.log import Log, Transaction
from . import quota
from .contents import Contents

log = logging.getLogger(__name__)


class Removal:
    """Removes orphans, and ends removals and truncations that were left half done."""

    def __init__(self, log: Log, contents: Contents, nursery: trio.Nursery) -> None:
        self._log = log
        self._limits = log.limits
        self._contents = contents
        self._nursery = nursery
        self._dead: list[int] = []

    def remove(self, ino: int) -> None:
        """Remove an orphan that nobody uses any more, and all that it had, soon.

        Its row in `orphans` stays until then: after a crash the next mount does it.
        """
        self._dead.append(ino)
        if len(self._dead) == 1:
            self._nursery.start_soon(self._remove_soon)

    @property
    def removing(self) -> bool:
        """Whether something is to be removed that is still there."""
        return bool(self._dead)

    async def _remove_soon(self) -> None:
        """Remove what is dead, many at a time, once no more comes."""
        while self._dead:
            count = len(self._dead)
            await trio.sleep(self._limits.removal_pause_seconds)
            if not count < len(self._dead) < self._limits.removals_max:
                await self._remove_all()

    async def _remove_all(self) -> None:
        while self._dead and not self._log.broken:
            batch, self._dead = (
                self._dead[: self._limits.removal_batch],
                self._dead[self._limits.removal_batch :],
            )
            try:
                self._dead += self._remove(batch)
            except Exception:
                log.exception("inodes could not be removed; the next mount does it")
            await trio.lowlevel.checkpoint()
        if self._log.broken:
            self._dead.clear()

    async def removed(self, pauses: int = 1) -> None:
        """Return when what nobody uses any more is removed, what is just being let go, too."""
        await trio.sleep(pauses * self._limits.removal_pause_seconds)
        await self._remove_all()

    def _remove(self, inos: Sequence[int]) -> Sequence[int]:
        """Remove orphans, and all that they had, in one transaction; those that did not fit.

        Extents past the first TRIM_BATCH of a file are removed later.
        """
        trims: list[int] = []
        left: Sequence[int] = []
        with Transaction(self._log) as txn:
            for i, ino in enumerate(inos):
                if len(txn.changes) > self._limits.trim_batch:
                    left = inos[i:]
                    break
                value = txn.get(file_rows.inode_key(ino))
                if value is None:
                    continue
                inode = Inode.decode(value)
                if inode.nlink:
                    log.error("Inode %d is to be removed, and has a name: run fsck.", ino)
                    continue
                prefix = file_rows.xattr_key(ino, b"")
                for key, _ in list(txn.scan(prefix, keys.after(prefix))):
                    txn.delete(key)
                if stat.S_ISLNK(inode.mode):
                    txn.delete(file_rows.target_key(ino))
                txn.delete(file_rows.inode_key(ino))
                txn.delete(file_rows.orphan_key(ino))
                txn.files -= 1
                if inode.quota_root:
                    quota.leave(txn, ino, inode)
                if stat.S_ISREG(inode.mode) and self._contents.trim_batch(txn, ino, inode, 0):
                    txn.put(file_rows.trim_key(ino), bytes(8))
                    trims.append(ino)
        for ino in trims:
            self._nursery.start_soon(self._contents.trim, ino, 0)
        return left

    async def resume(self) -> None:
        """After a mount: end the trims, and remove the orphans, that were left behind."""
        engine = self._log.engine
        for key, value in list(engine.scan(file_rows.TRIMS_START, file_rows.TRIMS_END)):
            if tables.readable(key, value):
                ino, size = file_rows.decode_ino_key(key), int.from_bytes(value, "little")
                row = engine.get(file_rows.inode_key(ino))
                if size == (Inode.decode(row).size if row is not None else 0):
                    await self._contents.trim(ino, size)
                else:
                    log.error("A trim of inode %d is not of its size: run fsck.", ino)
        rows = engine.scan(file_rows.ORPHANS_START, file_rows.ORPHANS_END)
        orphans: Sequence[int] = [
            file_rows.decode_ino_key(key) for key, value in rows if tables.readable(key, value)
        ]
        while orphans:
            orphans = [
                *self._remove(orphans[: self._limits.removal_batch]),
                *orphans[self._limits.removal_batch :],
            ]
