"""The steps of a change to the tree; each reads or changes rows within a transaction."""

from __future__ import annotations

import stat

from ..errors import (
    ExistsError,
    NameTooLongError,
    NoEntryError,
    NotDirectoryError,
    StaleError,
)
from ..format import file_rows
from ..format.file_rows import Inode
from ..limits import NAME_BYTES_MAX
from ..log.log import Transaction
from ..metadata.engine import Engine
from . import quota


def inode_of(rows: Transaction | Engine, ino: int) -> Inode:
    """Return an inode; StaleError."""
    value = rows.get(file_rows.inode_key(ino))
    if value is None:
        raise StaleError(f"There is no inode {ino}.")
    return Inode.decode(value)


def folder_of(txn: Transaction, ino: int) -> Inode:
    """Return a directory's inode; NotDirectoryError, StaleError."""
    inode = inode_of(txn, ino)
    if not stat.S_ISDIR(inode.mode):
        raise NotDirectoryError("Not a directory.")
    return inode


def entry_of(txn: Transaction, parent: int, name: bytes) -> tuple[int, int]:
    """Return the inode and the cookie of an entry; NoEntryError."""
    value = txn.get(file_rows.name_key(parent, name))
    if value is None:
        raise NoEntryError("There is no such name.")
    return file_rows.decode_name(value)


def check_new(txn: Transaction, parent: int, name: bytes) -> None:
    """Raise the error, if any, that prevents a new entry in a directory."""
    if len(name) > NAME_BYTES_MAX:
        raise NameTooLongError(f"A name may have at most {NAME_BYTES_MAX} bytes.")
    if txn.get(file_rows.name_key(parent, name)) is not None:
        raise ExistsError("The name is taken.")
    if inode_of(txn, parent).nlink == 0:
        raise NoEntryError("The directory was deleted.")


def add_inode(txn: Transaction, ino: int, inode: Inode, parent: int, folder: Inode) -> None:
    """Put a new inode, and count it in the quota of its directory."""
    inode.parent = parent
    if folder.quota_root:
        inode.quota_root = folder.quota_root
        quota.charge(txn, folder.quota_root, 0, 1)
    txn.put(file_rows.inode_key(ino), inode.encode())
    txn.files += 1


def put_name(txn: Transaction, parent: int, name: bytes, ino: int, cookie: int) -> None:
    """Put an entry, or another inode into it."""
    txn.put(file_rows.name_key(parent, name), file_rows.name_value(ino, cookie))
    txn.put(file_rows.listing_key(parent, cookie), file_rows.listing_value(ino, name))


def drop_name(txn: Transaction, parent: int, name: bytes, cookie: int) -> None:
    """Delete an entry."""
    txn.delete(file_rows.name_key(parent, name))
    txn.delete(file_rows.listing_key(parent, cookie))


def drop_link(txn: Transaction, ino: int, inode: Inode, now: int) -> None:
    """Take a name from an inode; without names it is an orphan."""
    inode.nlink = 0 if stat.S_ISDIR(inode.mode) else inode.nlink - 1
    inode.ctime = now
    txn.put(file_rows.inode_key(ino), inode.encode())
    if inode.nlink == 0:
        txn.put(file_rows.orphan_key(ino), b"")


def touch(txn: Transaction, ino: int, folder: Inode, now: int) -> None:
    """Put a directory whose entries changed."""
    folder.mtime = folder.ctime = now
    txn.put(file_rows.inode_key(ino), folder.encode())
