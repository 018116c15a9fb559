"""The checksum of a stored row, and the sums over the rows of each table.

LMDB has no checksums.  Therefore each value in the database ends with the xxh3-64 of the
key and the value, seeded with the length of the key.  This detects damaged rows, and rows
under a wrong key, when they are read.  It does not detect lost rows and old versions of
rows.  Therefore the database also stores, for each table, the number of its rows and the
sum of their checksums.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

from xxhash import xxh3_64_digest

CHECKSUM_BYTES = 8
_SUM = struct.Struct("<cQQ")
_MASK = (1 << 64) - 1


def seal(key: bytes, value: bytes) -> bytes:
    """Return the stored bytes of a row: its value, and its checksum, big-endian."""
    return value + xxh3_64_digest(key + value, len(key))


def unseal(key: bytes, stored: bytes) -> bytes | None:
    """Return the value of a stored row; None if it does not match its checksum."""
    value = stored[:-CHECKSUM_BYTES]
    return value if stored.endswith(xxh3_64_digest(key + value, len(key))) else None


@dataclass(slots=True)
class RowSums:
    """By letter of the table: the number of rows, and the sum of their checksums modulo 2^64."""

    tables: dict[bytes, tuple[int, int]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of rows of all tables."""
        return sum(rows for rows, _ in self.tables.values())

    def add(self, key: bytes, stored: bytes) -> None:
        """Add a stored row to the sums."""
        self.change(key[:1], 1, int.from_bytes(stored[-CHECKSUM_BYTES:], "big"))

    def change(self, letter: bytes, more_rows: int, more: int) -> None:
        """Add to the number of rows and to the sum of a table; both may be negative."""
        rows, total = self.tables.get(letter, (0, 0))
        self.tables[letter] = rows + more_rows, (total + more) & _MASK

    def encode(self) -> bytes:
        """Encode the sums for storage."""
        return b"".join(
            _SUM.pack(letter, max(rows, 0), total)
            for letter, (rows, total) in sorted(self.tables.items())
            if rows or total
        )

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Decode stored sums; struct.error."""
        return cls({letter: (rows, total) for letter, rows, total in _SUM.iter_unpack(value)})

    @classmethod
    def of(cls, stored: Iterable[tuple[bytes, bytes]]) -> Self:
        """Compute the sums of stored rows."""
        sums = cls()
        for key, value in stored:
            sums.add(key, value)
        return sums

    def differing(self, other: RowSums) -> Iterator[bytes]:
        """Yield the letters of tables with another number of rows or another sum."""
        for letter in sorted(self.tables.keys() | other.tables.keys()):
            if self.tables.get(letter, (0, 0)) != other.tables.get(letter, (0, 0)):
                yield letter
