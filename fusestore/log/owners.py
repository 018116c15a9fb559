"""The extents that point at a stripe: the stripe's owners say where they may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ..format import file_rows, keys, stripe_rows
from ..format.file_rows import Extent
from ..format.stripe_rows import OWNER


class Rows(Protocol):
    """The tables as of some instant."""

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values with start <= key < end, in order."""


def extents_of(rows: Rows, number: int) -> Iterator[tuple[int, Extent]]:
    """Yield the extents that point at a stripe, each with the inode of its file."""
    prefix = stripe_rows.owners_prefix(number)
    seen = set()
    for _, packed in rows.scan(prefix, keys.after(prefix)):
        for ino, offset, length, _ in OWNER.iter_unpack(packed):
            for extent in extents_in(rows, ino, offset, offset + length):
                if extent.stripe == number and (ino, extent.offset) not in seen:
                    seen.add((ino, extent.offset))
                    yield ino, extent


def extents_in(rows: Rows, ino: int, start: int, end: int) -> Iterator[Extent]:
    """Yield the extents of a file that begin in start <= i < end."""
    low, high = file_rows.extent_key(ino, start), file_rows.extent_key(ino, end)
    for key, value in rows.scan(low, high):
        yield Extent.decode(key, value)


def owners_keys(rows: Rows, number: int) -> list[bytes]:
    """Return the keys of the owners' rows of a stripe."""
    prefix = stripe_rows.owners_prefix(number)
    return [key for key, _ in rows.scan(prefix, keys.after(prefix))]
