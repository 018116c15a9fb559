"""Rows of files: inodes, names, extents, attributes, quotas, and pending removals.

There is one function per key, and one dataclass per value.  `tables` lists all tables.
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
"""The first cookie of an entry; `.` and `..` have smaller cookies."""
TIME_MIN, TIME_MAX = -(1 << 63), (1 << 63) - 1
"""The times that an inode can have, in ns since the epoch: the years 1677 to 2262."""


@dataclass(slots=True)
class Inode:
    """Attributes of a file; times in ns since the epoch, sizes in bytes."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    allocated: int
    """Bytes that extents of this inode hold, without holes."""
    atime: int
    mtime: int
    ctime: int
    rdev: int = 0
    generation: int = 0
    parent: int = 0
    """The parent of a directory; for other inodes the directory of the newest name."""
    quota_root: int = 0
    """The nearest directory with a quota, which may be this directory itself; 0: none."""
    k: int = 0
    m: int = 0
    """The code of new bytes, or of new files below a directory; 0+0: inherited."""

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
    """The place of `length` bytes of a file from `offset` on, in a stripe."""

    offset: int
    length: int
    stripe: int
    stripe_offset: int

    _STRUCT = struct.Struct("<IQI")

    @property
    def end(self) -> int:
        """The file offset of the first byte after the extent."""
        return self.offset + self.length

    def encode(self) -> bytes:
        """The row's value; the offset is in the key."""
        return self._STRUCT.pack(self.length, self.stripe, self.stripe_offset)

    @classmethod
    def decode(cls, key: bytes, value: bytes) -> Self:
        """Read a row."""
        return cls(Q.unpack_from(key, 9)[0], *cls._STRUCT.unpack(value))

    def part(self, start: int, end: int) -> Extent:
        """Return the part of the extent with the file's bytes start <= i < end."""
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
    """Return the inode of a row of `orphans`, `trims`, `quotas` or `inodes`."""
    return Ino(Q.unpack_from(key, 1)[0])


NO_LIMIT = (1 << 64) - 1


class QuotaState(IntEnum):
    """The stages of a quota, from being set to being removed."""

    COUNTING = 1
    """The inodes below its directory are being counted; it is not enforced yet."""
    ACTIVE = 2
    CLEARING = 3
    """The inodes below its directory are being returned to the quota above."""
    GONE = 4
    """The quota is cleared, but still counts unnamed files until the last one is removed."""


@dataclass(slots=True)
class Quota:
    """The limits of a directory, and the use of them; the directory itself does not count."""

    bytes_max: int = NO_LIMIT
    files_max: int = NO_LIMIT
    bytes_used: int = 0
    """Bytes that extents of files below hold, including those below inner quotas."""
    files_used: int = 0
    """Inodes of any kind."""
    outer: int = 0
    """The next directory above with a quota, which also counts this use; 0: none."""
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
"""The largest number of an inode or cookie that the kernel accepts."""
