"""Rows about files: inodes, names, extents, attributes, quotas, and what is owed to files.

One function a key, one dataclass a value; `tables` has the list of all tables.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NewType, Self

from .keys import QQ, Q

Ino = NewType("Ino", int)
ROOT = Ino(1)
FIRST_COOKIE = 16
"""Cookies below belong to `.` and `..`."""


@dataclass(slots=True)
class Inode:
    """Attributes of a file; times in ns since the epoch, sizes in bytes."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    allocated: int
    """Bytes that extents of this inode hold; holes excluded."""
    atime: int
    mtime: int
    ctime: int
    rdev: int = 0
    generation: int = 0
    parent: int = 0
    """A directory's parent; for others the directory that it was last linked in."""
    quota_root: int = 0
    """The nearest directory with a quota, for a directory itself included; 0: none."""
    k: int = 0
    m: int = 0
    """The code of new bytes, for a directory of new files; 0+0 is the store's default."""

    _STRUCT = struct.Struct("<IIIIQQqqqQIQQBB")

    def encode(self) -> bytes:
        """The row's value."""
        return self._STRUCT.pack(
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.size,
            self.allocated,
            self.atime,
            self.mtime,
            self.ctime,
            self.rdev,
            self.generation,
            self.parent,
            self.quota_root,
            self.k,
            self.m,
        )

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        return cls(*cls._STRUCT.unpack(value))


def inode_key(ino: int) -> bytes:
    return b"I" + Q.pack(ino)


def name_key(parent: int, name: bytes) -> bytes:
    return b"N" + Q.pack(parent) + name


def decode_name_key(key: bytes) -> tuple[int, bytes]:
    """(parent, name)."""
    return Q.unpack_from(key, 1)[0], key[9:]


def name_value(ino: int, cookie: int) -> bytes:
    return QQ.pack(ino, cookie)


def decode_name(value: bytes) -> tuple[int, int]:
    """(ino, cookie)."""
    return QQ.unpack(value)


def listing_key(parent: int, cookie: int) -> bytes:
    return b"L" + QQ.pack(parent, cookie)


def listing_value(ino: int, name: bytes) -> bytes:
    return Q.pack(ino) + name


def decode_listing(key: bytes, value: bytes) -> tuple[int, int, bytes]:
    """(cookie, ino, name)."""
    return Q.unpack_from(key, 9)[0], Q.unpack_from(value)[0], value[8:]


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes of a file at `offset` lie at `stripe_offset` of `stripe`."""

    offset: int
    length: int
    stripe: int
    stripe_offset: int

    _STRUCT = struct.Struct("<IQI")

    @property
    def end(self) -> int:
        """The offset of the first byte after it."""
        return self.offset + self.length

    def encode(self) -> bytes:
        """The row's value; the offset is in the key."""
        return self._STRUCT.pack(self.length, self.stripe, self.stripe_offset)

    @classmethod
    def decode(cls, key: bytes, value: bytes) -> Self:
        """Read a row."""
        return cls(Q.unpack_from(key, 9)[0], *cls._STRUCT.unpack(value))

    def part(self, start: int, end: int) -> Extent:
        """The extent of what it has of the file's bytes start <= i < end."""
        first = max(start, self.offset)
        return Extent(
            first,
            min(end, self.end) - first,
            self.stripe,
            self.stripe_offset + first - self.offset,
        )


def extent_key(ino: int, offset: int) -> bytes:
    return b"E" + QQ.pack(ino, offset)


def xattr_key(ino: int, name: bytes) -> bytes:
    return b"X" + Q.pack(ino) + name


def target_key(ino: int) -> bytes:
    return b"Q" + Q.pack(ino)


ORPHANS_START, ORPHANS_END = b"U", b"V"


def orphan_key(ino: int) -> bytes:
    return b"U" + Q.pack(ino)


TRIMS_START, TRIMS_END = b"D", b"E"


def trim_key(ino: int) -> bytes:
    return b"D" + Q.pack(ino)


def decode_ino_key(key: bytes) -> Ino:
    """The inode of a row of `orphans`, `trims`, `quotas` or `inodes`."""
    return Ino(Q.unpack_from(key, 1)[0])


NO_LIMIT = (1 << 64) - 1


class QuotaState(IntEnum):
    """How far a quota is from being in force, or from being gone."""

    COUNTING = 1
    """What lies below its directory is being counted; it is not enforced yet."""
    ACTIVE = 2
    CLEARING = 3
    """What lies below its directory is being given back to the quota above."""
    GONE = 4
    """Kept for files without a name in its directory, until the last of them is removed."""


@dataclass(slots=True)
class Quota:
    """What may lie below a directory, and what does; that directory itself does not count."""

    bytes_max: int = NO_LIMIT
    files_max: int = NO_LIMIT
    bytes_used: int = 0
    """What extents of the files below hold, those below inner quotas included."""
    files_used: int = 0
    """Inodes of any kind."""
    outer: int = 0
    """The next directory above with a quota, which this one's use counts for, too; 0: none."""
    state: QuotaState = QuotaState.COUNTING

    _STRUCT = struct.Struct("<QQqqQB")

    def encode(self) -> bytes:
        """The row's value."""
        return self._STRUCT.pack(
            self.bytes_max,
            self.files_max,
            self.bytes_used,
            self.files_used,
            self.outer,
            self.state,
        )

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read the row's value."""
        row = cls(*cls._STRUCT.unpack(value))
        row.state = QuotaState(row.state)
        return row


QUOTAS_START, QUOTAS_END = b"B", b"C"


def quota_key(ino: int) -> bytes:
    return b"B" + Q.pack(ino)


NUMBER_MAX = (1 << 63) - 1
"""Of inodes and cookies: what the kernel takes."""
