"""Counting for quotas: the bytes and inodes below each directory with a quota.

`Inode.quota_root` names the nearest directory with a quota; a directory with a quota
names itself.  The row of a quota names the next quota above it.  An inode below
counts for all of them.  Quotas count the bytes that extents hold, as in `du`, and
inodes of any kind.  An unlinked file counts until it is removed.

All functions work in the caller's transaction, so the counts change together with
the tree.  A quota is enforced once it is counted (quota_roots.py).
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CrossesQuotaError, QuotaError
from ..format import file_rows
from ..format.file_rows import NO_LIMIT, Inode, Quota, QuotaState
from ..log.log import Transaction
from ..text import counted


@dataclass(frozen=True, slots=True)
class Move:
    """A move of bytes and inodes from one quota to another, named by directory; 0 is none."""

    old: int
    new: int
    size: int
    files: int


def chain(get: Callable[[bytes], bytes | None], root: int) -> dict[int, Quota]:
    """Return `root` and the quotas above it by directory, the nearest first."""
    rows: dict[int, Quota] = {}
    while root and root not in rows:
        value = get(file_rows.quota_key(root))
        if value is None:
            break
        rows[root] = Quota.decode(value)
        root = rows[root].outer
    return rows


def shift(txn: Transaction, *moves: Move, enforce: bool = True) -> None:
    """Count moves; QuotaError if they would exceed a quota in force."""
    rows: dict[int, Quota] = {}
    grown: dict[int, list[int]] = {}
    for move in moves:
        for root, sign in ((move.old, -1), (move.new, 1)):
            found = chain(txn.get, root)
            rows.update(found)
            for ino in found:
                size, files = grown.get(ino, (0, 0))
                grown[ino] = [size + sign * move.size, files + sign * move.files]
    for ino, (size, files) in grown.items():
        if size or files:
            row = rows[ino]
            row.bytes_used += size
            row.files_used += files
            if enforce and row.state is QuotaState.ACTIVE:
                _check(row, size, files)
            put(txn, ino, row)


def _check(row: Quota, size: int, files: int) -> None:
    if size > 0 and row.bytes_used > row.bytes_max:
        raise QuotaError(f"The quota of {counted(row.bytes_max, 'byte')} is used up.")
    if files > 0 and row.files_used > row.files_max:
        raise QuotaError(f"The quota of {counted(row.files_max, 'file')} is used up.")


def put(txn: Transaction, ino: int, row: Quota) -> None:
    """Write a row; delete it if the quota is gone and counts nothing."""
    if row.state is QuotaState.GONE and row.files_used == 0:
        txn.delete(file_rows.quota_key(ino))
    else:
        txn.put(file_rows.quota_key(ino), row.encode())


def charge(txn: Transaction, root: int, size: int, files: int = 0) -> None:
    """Count new bytes and inodes below `root`, or removed ones if negative; QuotaError."""
    shift(txn, Move(0, root, size, files))


def room(get: Callable[[bytes], bytes | None], root: int) -> int:
    """Return how many more bytes may be stored below `root`."""
    rows = chain(get, root).values()
    left = [
        row.bytes_max - row.bytes_used
        for row in rows
        if row.state is QuotaState.ACTIVE and row.bytes_max != NO_LIMIT
    ]
    return max(min(left, default=NO_LIMIT), 0)


def counts_in(txn: Transaction, ino: int, inode: Inode) -> int:
    """Return the directory whose quota counts the inode itself."""
    if inode.quota_root != ino:
        return inode.quota_root
    value = txn.get(file_rows.quota_key(ino))
    return Quota.decode(value).outer if value is not None else 0


def crossing(txn: Transaction, ino: int, inode: Inode, new: int) -> list[Move]:
    """Return the moves when an inode gets a name in another quota; changes `inode`, no row.

    CrossesQuotaError for a directory, and for a file with several names: everything
    below the directory, and every other name, would have to move, too.
    """
    old = counts_in(txn, ino, inode)
    if old == new:
        return []
    if stat.S_ISDIR(inode.mode):
        raise CrossesQuotaError("A directory cannot be moved from one quota to another: copy it.")
    if inode.nlink > 1:
        raise CrossesQuotaError("A file with other names cannot be moved to another quota.")
    inode.quota_root = new
    return [Move(old, new, inode.allocated, 1)]


def leave(txn: Transaction, ino: int, inode: Inode) -> None:
    """Discount an inode that is removed, with its bytes, from its quota."""
    charge(txn, counts_in(txn, ino, inode), -inode.allocated, -1)
    if inode.quota_root == ino:
        value = txn.get(file_rows.quota_key(ino))
        if value is not None:
            row = Quota.decode(value)
            row.state = QuotaState.GONE
            put(txn, ino, row)
