"""What quotas count: the bytes and inodes below each directory that has one.

`Inode.quota_root` names the nearest directory with a quota (a directory's own, if
it has one), and a quota's row names the next one above it.  What lies below
counts for all of them: the bytes that extents hold, as in `du`, and inodes of any
kind.  A file that was unlinked counts until it is removed.

Everything here is part of a caller's transaction, so what is counted is as
true as what is done.  A quota is enforced once it is counted (quota_roots.py).
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CrossesQuotaError, QuotaError
from ..format import file_rows
from ..format.file_rows import NO_LIMIT, Inode, Quota, QuotaState
from ..log.log import Transaction


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes and inodes go from one quota to another, by its directory; 0 is none."""

    old: int
    new: int
    size: int
    files: int


def chain(get: Callable[[bytes], bytes | None], root: int) -> dict[int, Quota]:
    """The quotas that count what lies in `root`, by directory, the nearest first."""
    rows: dict[int, Quota] = {}
    while root and root not in rows:
        value = get(file_rows.quota_key(root))
        if value is None:
            break
        rows[root] = Quota.decode(value)
        root = rows[root].outer
    return rows


def shift(txn: Transaction, *moves: Move, enforce: bool = True) -> None:
    """Count what moves; QuotaError if a quota that is in force would be exceeded by it."""
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
        raise QuotaError(f"The quota of {row.bytes_max} bytes is used up.")
    if files > 0 and row.files_used > row.files_max:
        raise QuotaError(f"The quota of {row.files_max} files is used up.")


def put(txn: Transaction, ino: int, row: Quota) -> None:
    """Keep a row as long as it means something."""
    if row.state is QuotaState.GONE and row.files_used == 0:
        txn.delete(file_rows.quota_key(ino))
    else:
        txn.put(file_rows.quota_key(ino), row.encode())


def charge(txn: Transaction, root: int, size: int, files: int = 0) -> None:
    """Count what came to be below `root`, or (negative) went; QuotaError."""
    shift(txn, Move(0, root, size, files))


def room(get: Callable[[bytes], bytes | None], root: int) -> int:
    """The bytes that may still come to be below `root`."""
    rows = chain(get, root).values()
    left = [
        row.bytes_max - row.bytes_used
        for row in rows
        if row.state is QuotaState.ACTIVE and row.bytes_max != NO_LIMIT
    ]
    return max(min(left, default=NO_LIMIT), 0)


def counts_in(txn: Transaction, ino: int, inode: Inode) -> int:
    """The directory whose quota an inode itself counts for."""
    if inode.quota_root != ino:
        return inode.quota_root
    value = txn.get(file_rows.quota_key(ino))
    return Quota.decode(value).outer if value is not None else 0


def crossing(txn: Transaction, ino: int, inode: Inode, new: int) -> list[Move]:
    """What it takes for an inode to get a name in another quota; `inode` is changed, not put.

    CrossesQuotaError for a directory and for a file with more names: all that is
    below, or has a name elsewhere, would have to go along.
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
    """An inode that counts for a quota is removed, with all that it has."""
    charge(txn, counts_in(txn, ino, inode), -inode.allocated, -1)
    if inode.quota_root == ino:
        value = txn.get(file_rows.quota_key(ino))
        if value is not None:
            row = Quota.decode(value)
            row.state = QuotaState.GONE
            put(txn, ino, row)
