"""A check of the pages of an LMDB file, before LMDB maps them.

LMDB trusts its pages.  After a bit flip in a length or an offset, it reads past the end
of its map, and a signal ends the process.  After a bit flip in the list of free pages,
it overwrites pages in use.  Therefore the tree of pages is walked once: each page is at
the place in its parent, each entry lies in its page, longer values lie in the file, and
no page is used twice, or used and free.  The contents of rows are not examined.

This follows liblmdb 0.9 on little-endian machines with 64 bits.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DamagedMetadataError
from ..system.beneath import open_file

_PAGE = struct.Struct("<QHHHH")
"""The page's number, padding, flags, the start and the end of its free room."""
_OVERFLOW = struct.Struct("<QHHI")
"""The page's number, padding, flags, and the number of pages that belong to it."""
_NODE = struct.Struct("<HHHH")
"""Two halves of a length or a page number, flags (in a branch: its third part), key length."""
_META = struct.Struct("<IIQQ48s48sQQ")
"""Magic, version, address, size of the map, two databases (free pages, unnamed), the last
page, the transaction."""
_DATABASE = struct.Struct("<IHHQQQQQ")
"""Page size or padding, flags, depth, branch, leaf and overflow pages, entries, root."""
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_META_FLAG, _BRANCH, _LEAF, _OVERFLOW_FLAG = 8, 1, 2, 4
_BIG, _SUBTREE = 1, 2
_NONE = 2**64 - 1
_PAGE_SIZES = {1 << bits for bits in range(8, 17)}


class _BrokenError(Exception):
    """The damage, for people."""


class _File:
    """A file that is read without a map: a bad sector is an OSError, not a signal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes that there are in a range; OSError."""
        return os.pread(self._fd, length, start)


@dataclass(slots=True)
class _Walk:
    """One walk over the pages of a transaction."""

    data: _File
    size: int
    """The size of a page, in bytes."""
    last: int
    """The last page of the transaction."""
    used: set[int] = field(default_factory=set)
    keys: int = 0
    """Entries of the databases whose keys were checked."""

    def tree(
        self,
        root: int,
        depth: int,
        entries: list[tuple[int, bytes]] | None = None,
        low: bytes = b"",
        high: bytes | None = None,
    ) -> None:
        """Check a database's pages; (flags, value) of each entry goes to `entries`, if given.

        Without `entries` all keys must be such that low <= key < high.
        """
        if root == _NONE:
            return
        page = self._use(root, 1)
        number, _, flags, lower, upper = _PAGE.unpack_from(page)
        if number != root or not 16 <= lower <= upper <= self.size or lower % 2:
            raise _BrokenError(f"page {root} is invalid")
        pointers = struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16)
        if not pointers or min(pointers) < upper or max(pointers) > self.size - _NODE.size:
            raise _BrokenError(f"an entry of page {root} lies outside of it")
        if depth == 1 and flags == _LEAF:
            self._leaf(root, page, pointers, entries, low, high)
        elif depth > 1 and flags == _BRANCH and len(pointers) > 1:
            children = [self._child(root, page, at) for at in pointers]
            bounds = [low, *(key for key, _ in children[1:]), high]
            for number, (_, child) in enumerate(children):
                self.tree(child, depth - 1, entries, bounds[number] or b"", bounds[number + 1])
        else:
            raise _BrokenError(f"page {root} has the wrong kind")

    def _child(self, root: int, page: bytes, at: int) -> tuple[bytes, int]:
        """Return the least key of a child, and its page."""
        one, two, three, length = _NODE.unpack_from(page, at)
        start = at + _NODE.size
        if start + length > self.size:
            raise _BrokenError(f"an entry of page {root} reaches past its end")
        return page[start : start + length], one | two << 16 | three << 32

    def _leaf(
        self,
        root: int,
        page: bytes,
        pointers: tuple[int, ...],
        entries: list[tuple[int, bytes]] | None,
        low: bytes,
        high: bytes | None,
    ) -> None:
        unpack, end, before = _NODE.unpack_from, self.size, None
        if entries is None:
            self.keys += len(pointers)
        for at in pointers:
            one, two, flags, length = unpack(page, at)
            start = at + 8 + length
            stop = start + (8 if flags & _BIG else one | two << 16)
            if stop > end or not length:
                raise _BrokenError(f"an entry of page {root} reaches past its end")
            if entries is None:
                key = page[at + 8 : start]
                if key < low or (before is not None and key <= before):
                    raise _BrokenError(f"a key of page {root} is not in order")
                before = key
            value = page[start:stop]
            if flags & _BIG:
                value = self._long(int.from_bytes(value, "little"), one | two << 16)
            if entries is not None:
                entries.append((flags, value))
        if before is not None and high is not None and before >= high:
            raise _BrokenError(f"a key of page {root} is not in order")

    def _long(self, first: int, length: int) -> bytes:
        """Return a value with its own pages."""
        number, _, flags, count = _OVERFLOW.unpack_from(self._use(first, 1))
        if number != first or flags != _OVERFLOW_FLAG or 16 + length > count * self.size:
            raise _BrokenError(f"page {first} is invalid")
        if count > 1:
            self._use(first + 1, count - 1)
        return self.data.read(first * self.size + 16, length)

    def _use(self, first: int, count: int) -> bytes:
        """Mark pages as used, and return the first; _BrokenError if used or not in the file."""
        if first < 2 or first + count - 1 > self.last:
            raise _BrokenError(f"page {first} does not exist")
        if (first + count) * self.size > self.data.size:
            raise _BrokenError(f"the file ends before page {first + count - 1}")
        for page in range(first, first + count):
            if page in self.used:
                raise _BrokenError(f"page {page} is used twice")
            self.used.add(page)
        return self.data.read(first * self.size, self.size)

    def free(self, value: bytes) -> None:
        """Check a list of free pages: its length, and its numbers."""
        numbers = struct.unpack(f"<{len(value) // 8}Q", value[: len(value) // 8 * 8])
        if not numbers or numbers[0] > len(numbers) - 1:
            raise _BrokenError("a list of free pages is invalid")
        for page in numbers[1 : numbers[0] + 1]:
            if not 2 <= page <= self.last:
                raise _BrokenError(f"page {page}, which is free, is not in the file")
            if page in self.used:
                raise _BrokenError(f"page {page} is used and free, or free twice")
            self.used.add(page)


def check_pages(file: Path) -> int:
    """Check the pages of a database without a writer; DamagedMetadataError, OSError.

    This also shows that they can be read: LMDB maps them, and a bad sector in a map ends the
    process.  A missing or empty file is valid: LMDB creates it.  Return how many entries the
    pages of the named databases have.
    """
    try:
        fd = open_file(file, os.O_RDONLY, follow=True)
    except FileNotFoundError:
        return 0
    with open(fd, "rb") as opened:
        if not os.fstat(fd).st_size:
            return 0
        try:
            return _check(_File(opened.fileno()))
        except (_BrokenError, struct.error, RecursionError) as error:
            raise DamagedMetadataError(
                f"The metadata in {file.parent} is damaged and cannot be opened ({error}): move "
                "it away and run 'fusestore recover'."
            ) from None


def _check(data: _File) -> int:
    newest = max((_meta(data, 0), _meta(data, _page_size(data))), key=lambda meta: meta[-1])
    free, main, last, _ = newest
    walk = _Walk(data, _page_size(data), last)
    lists: list[tuple[int, bytes]] = []
    named: list[tuple[int, bytes]] = []
    walk.tree(free[-1], free[2], lists)
    walk.tree(main[-1], main[2], named)
    for flags, value in named:
        if flags & _SUBTREE:
            below = _DATABASE.unpack(value)
            walk.tree(below[-1], below[2])
    # This comes last, when the pages in use are known.
    for _, value in lists:
        walk.free(value)
    return walk.keys


def _page_size(data: _File) -> int:
    *_, free, _, _, _ = _META.unpack(data.read(_PAGE.size, _META.size))
    size: int = _DATABASE.unpack(free)[0]
    if size not in _PAGE_SIZES:
        raise _BrokenError("its first page is invalid")
    return size


def _meta(data: _File, at: int) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Return the database of free pages, the unnamed one, the last page, and the transaction."""
    _, _, flags, _, _ = _PAGE.unpack(data.read(at, _PAGE.size))
    magic, version, _, _, free, main, last, transaction = _META.unpack(
        data.read(at + _PAGE.size, _META.size)
    )
    if flags != _META_FLAG or magic != _MAGIC or version != _VERSION:
        raise _BrokenError("its first pages are invalid")
    return _DATABASE.unpack(free), _DATABASE.unpack(main), last, transaction
