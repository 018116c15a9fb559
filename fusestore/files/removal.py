"""Removal of files that have no name and are not in use, in batches.

`unlink` leaves a row of `orphans`.  When no more files follow for a moment, the rows of
a file are removed here.  After a crash the next mount continues.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Sequence

import trio

from ..errors import MetadataError
from ..format import file_rows, keys, tables
from ..format.file_rows import Inode
from ..log.log import Log, Transaction
from . import quota
from .contents import Contents

logger = logging.getLogger(__name__)


class Removal:
    """Removes orphans, and completes interrupted removals and truncations."""

    def __init__(self, log: Log, contents: Contents, nursery: trio.Nursery) -> None:
        self._log = log
        self._limits = log.limits
        self._contents = contents
        self._nursery = nursery
        self._dead: list[int] = []
        self._bytes = 0
        """Bytes of the files that wait."""

    def remove(self, ino: int) -> None:
        """Remove an orphan that is no longer in use, and all of its rows, soon.

        Its row in `orphans` stays until then: after a crash the next mount removes it.
        """
        self._dead.append(ino)
        value = self._log.engine.get(file_rows.inode_key(ino))
        self._bytes += Inode.decode(value).allocated if value else 0
        if len(self._dead) == 1:
            self._nursery.start_soon(self._remove_soon)

    @property
    def removing(self) -> bool:
        """Whether an orphan still waits for its removal."""
        return bool(self._dead)

    async def _remove_soon(self) -> None:
        """Remove the waiting orphans in batches, once no more follow, or they have many bytes."""
        while self._dead:
            count = len(self._dead)
            await trio.sleep(self._limits.removal_pause_seconds)
            if (
                not count < len(self._dead) < self._limits.removals_max
                or self._bytes >= self._limits.removal_bytes_max
            ):
                self._bytes = 0
                await self._remove_all()

    async def _remove_all(self) -> None:
        while self._dead:
            batch, self._dead = (
                self._dead[: self._limits.removal_batch],
                self._dead[self._limits.removal_batch :],
            )
            try:
                self._dead += self._remove(batch)
            except Exception:
                logger.exception("inodes could not be removed; the next mount will remove them")
            await trio.lowlevel.checkpoint()

    async def removed(self, pauses: int = 1) -> None:
        """Return when all orphans that are not in use are removed, including recent ones."""
        await trio.sleep(pauses * self._limits.removal_pause_seconds)
        await self._remove_all()

    def _remove(self, inos: Sequence[int]) -> Sequence[int]:
        """Remove orphans and all of their rows in one transaction; return those that did not fit.

        Extents of a file past the first `trim_batch` are removed later.
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
                    logger.error(
                        "Inode %d is not removed, because it has a name: run 'fusestore fsck'.", ino
                    )
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
            self._nursery.start_soon(self._trim, ino)
        return left

    async def _trim(self, ino: int) -> None:
        """Let go of the rest of a file that is gone."""
        try:
            await self._contents.trim(ino, 0)
        except MetadataError as error:
            logger.error("The rest of inode %d is removed by the next mount: %s", ino, error)
            self._log.on_damage()

    async def resume(self) -> None:
        """Complete the trims and remove the orphans that the last mount left."""
        engine = self._log.engine
        for key, value in list(engine.scan(file_rows.TRIMS_START, file_rows.TRIMS_END)):
            if tables.readable(key, value):
                ino, size = file_rows.decode_ino_key(key), int.from_bytes(value, "little")
                row = engine.get(file_rows.inode_key(ino))
                if size == (Inode.decode(row).size if row is not None else 0):
                    await self._contents.trim(ino, size)
                else:
                    logger.error(
                        "A trim of inode %d does not match its size: run 'fusestore fsck'.", ino
                    )
        rows = engine.scan(file_rows.ORPHANS_START, file_rows.ORPHANS_END)
        orphans: Sequence[int] = [
            file_rows.decode_ino_key(key) for key, value in rows if tables.readable(key, value)
        ]
        while orphans:
            orphans = [
                *self._remove(orphans[: self._limits.removal_batch]),
                *orphans[self._limits.removal_batch :],
            ]
