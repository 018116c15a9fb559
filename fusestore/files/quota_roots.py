"""Setting and clearing quotas of directories while the tree is in use.

A walk visits all inodes below the directory, a few in each transaction, until each
names the right directory in `Inode.quota_root`.  A new inode takes the value of its
parent.  A file that moves between the visited and the other part is counted like any
other move.  Until the walk has ended, no directory can be moved into or out of the
tree (EXDEV), because it may contain inodes of both kinds.  An interrupted walk restarts
at the next mount; it only looks at inodes that are already done.
"""

from __future__ import annotations

import logging
import stat
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import trio

from ..errors import FusestoreError, NoEntryError, NotDirectoryError, UsageError
from ..format import file_rows
from ..format.file_rows import NO_LIMIT, ROOT, Inode, Quota, QuotaState
from ..log.log import Log, Transaction
from . import quota
from .quota import Move
from .tree import Tree
from .walk import Walk

logger = logging.getLogger(__name__)

_UNFINISHED = (QuotaState.COUNTING, QuotaState.CLEARING)


class QuotaRoots:
    """The quotas of an open store."""

    def __init__(self, log: Log, tree: Tree, nursery: trio.Nursery) -> None:
        self._log = log
        self._tree = tree
        self._nursery = nursery
        self._running = False
        self._changed = trio.Event()
        """Set, and replaced, when a walk has ended."""

    # --- commands ------------------------------------------------------------

    def set(self, ino: int, bytes_max: int | None, files_max: int | None) -> None:
        """Set or change the quota of a directory; None leaves a limit unchanged.

        The quota is in force once the inodes below are counted: see `wait`.
        """
        with self._log.transaction(grows=64) as txn:
            inode = self._tree.inode(ino)
            if not stat.S_ISDIR(inode.mode):
                raise NotDirectoryError("Only a directory can have a quota.")
            if inode.nlink == 0:
                raise NoEntryError("The directory was deleted.")
            row = self._row(ino) or Quota()
            if row.state in (QuotaState.CLEARING, QuotaState.GONE):
                row.state = QuotaState.COUNTING
                row.bytes_max = row.files_max = NO_LIMIT
            row.bytes_max = row.bytes_max if bytes_max is None else bytes_max
            row.files_max = row.files_max if files_max is None else files_max
            txn.put(file_rows.quota_key(ino), row.encode())
        self.resume()

    async def clear(self, ino: int) -> None:
        """Remove the quota of a directory; UsageError if it has none."""
        row = self._row(ino)
        if row is None or row.state in (QuotaState.CLEARING, QuotaState.GONE):
            path = (await self._tree.paths([ino]))[ino]
            raise UsageError(f"{path} has no quota of its own.")
        with self._log.transaction() as txn:
            row.state = QuotaState.CLEARING
            txn.put(file_rows.quota_key(ino), row.encode())
        self.resume()

    async def wait(self, ino: int) -> None:
        """Return when the change of a directory's quota is complete, or has failed for now."""
        while self._running and (row := self._row(ino)) and row.state in _UNFINISHED:
            await self._changed.wait()

    async def above(self, ino: int) -> list[dict[str, Any]]:
        """Return the quotas that apply to an inode and to inodes below it, the nearest first."""
        inode = self._tree.inode(ino)
        rows = quota.chain(self._log.engine.get, inode.quota_root)
        row = self._row(ino)
        if row is not None and ino not in rows and row.state is QuotaState.COUNTING:
            rows = {ino: row, **rows}  # counting has not begun yet
        return await self._messages(rows)

    async def all(self) -> list[dict[str, Any]]:
        """Return all quotas in the order of their paths."""
        rows = self._log.engine.scan(file_rows.QUOTAS_START, file_rows.QUOTAS_END)
        found = {file_rows.decode_ino_key(key): Quota.decode(value) for key, value in rows}
        messages = await self._messages(
            {ino: row for ino, row in found.items() if row.state is not QuotaState.GONE}
        )
        return sorted(messages, key=lambda message: str(message["path"]))

    async def _messages(self, rows: Mapping[int, Quota]) -> list[dict[str, Any]]:
        paths = await self._tree.paths(rows)
        return [
            {
                "path": paths[ino],
                "state": row.state.name.lower(),
                "bytes_max": None if row.bytes_max == NO_LIMIT else row.bytes_max,
                "bytes_used": row.bytes_used,
                "files_max": None if row.files_max == NO_LIMIT else row.files_max,
                "files_used": row.files_used,
            }
            for ino, row in rows.items()
        ]

    def of_root(self) -> Quota | None:
        """Return the quota of the root directory if it is in force."""
        row = self._row(ROOT)
        return row if row is not None and row.state is QuotaState.ACTIVE else None

    def _row(self, ino: int) -> Quota | None:
        value = self._log.engine.get(file_rows.quota_key(ino))
        return Quota.decode(value) if value is not None else None

    # --- the work ------------------------------------------------------------

    def resume(self) -> None:
        """Start or continue the walks that are not complete."""
        self._fence()
        if not self._running:
            self._running = True
            self._nursery.start_soon(self._run)

    async def _run(self) -> None:
        """Count and clear until nothing is left to do."""
        try:
            while unfinished := self._unfinished():
                await self._walk(*unfinished[0])
                self._tell()
        except FusestoreError as error:
            logger.error("A quota is not in force yet: %s The next mount will continue.", error)
        finally:
            self._running = False
            self._tell()

    def _tell(self) -> None:
        self._fence()
        self._changed.set()
        self._changed = trio.Event()

    def _unfinished(self) -> list[tuple[int, QuotaState]]:
        rows = self._log.engine.scan(file_rows.QUOTAS_START, file_rows.QUOTAS_END)
        found = [(file_rows.decode_ino_key(key), Quota.decode(value).state) for key, value in rows]
        return [one for one in found if one[1] in _UNFINISHED]

    def _fence(self) -> None:
        self._tree.fenced = {ino for ino, _ in self._unfinished()}

    async def _walk(self, top: int, state: QuotaState) -> None:
        """Make each inode below `top` name the quota that counts it from now on."""
        with Walk(self._tree, top) as walk:
            if not self._begin(top, state):
                return
            for step in walk.steps():
                row, value = self._row(top), self._log.engine.get(file_rows.inode_key(top))
                if row is None or row.state is not state or value is None:
                    return  # changed or removed meanwhile
                with self._log.transaction() as txn:
                    self._take(txn, walk, Inode.decode(value).quota_root, step)
                await trio.lowlevel.checkpoint()
            # No await since the last step: nothing can have been moved.
            with self._log.transaction() as txn:
                row = self._row(top)
                if row is not None and row.state is state:
                    counted = state is QuotaState.COUNTING
                    row.state = QuotaState.ACTIVE if counted else QuotaState.GONE
                    quota.put(txn, top, row)

    def _begin(self, top: int, state: QuotaState) -> bool:
        """Make the directory itself name its quota, or the one above; False if it is gone."""
        with self._log.transaction() as txn:
            row, value = self._row(top), txn.get(file_rows.inode_key(top))
            if row is None:
                return False
            if value is None:
                row.state = QuotaState.GONE
                quota.put(txn, top, row)
                return False
            inode = Inode.decode(value)
            before = above = quota.counts_in(txn, top, inode)
            if inode.nlink and top != ROOT:  # else nothing is above it
                above = self._tree.inode(inode.parent).quota_root
            below = Move(row.outer, above, row.bytes_used, row.files_used)
            quota.shift(txn, below, Move(before, above, 0, 1), enforce=False)
            row.outer = above
            inode.quota_root = top if state is QuotaState.COUNTING else above
            txn.put(file_rows.inode_key(top), inode.encode())
            txn.put(file_rows.quota_key(top), row.encode())
        return True

    def _take(
        self, txn: Transaction, walk: Walk, root: int, entries: list[tuple[int, int]]
    ) -> None:
        """Make some entries, and new inodes below them, count for `root`."""
        moves: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for folder, ino in entries:
            value = txn.get(file_rows.inode_key(ino))
            if value is None or self._tree.inode(folder).quota_root != root:
                continue
            inode = Inode.decode(value)
            inner = self._row(ino) if inode.quota_root == ino else None
            if inner is not None:
                old, size, files = inner.outer, inner.bytes_used, inner.files_used + 1
                inner.outer = root
                txn.put(file_rows.quota_key(ino), inner.encode())
            else:
                old, size, files = inode.quota_root, inode.allocated, 1
                inode.quota_root = root
                txn.put(file_rows.inode_key(ino), inode.encode())
                if stat.S_ISDIR(inode.mode):
                    walk.enter(ino)
            moves[old][0] += size
            moves[old][1] += files
        shifts = [Move(old, root, *found) for old, found in moves.items() if old != root]
        quota.shift(txn, *shifts, enforce=False)
