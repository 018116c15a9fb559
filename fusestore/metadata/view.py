"""The rows for a reader: changes in memory above an LMDB transaction, and views of both.

A stored row ends with a checksum over its key and value.  No read and no scan
passes a row that does not match it (BadRowError), unless a view skips and notes such
rows.  Only fsck and the mending of rows use such views.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Self
from weakref import WeakSet

import lmdb
import trio
from sortedcontainers import SortedList

from ..errors import BadRowError, ClosedError, DamagedMetadataError, MetadataError
from ..format.records import Changes
from ..format.row_sums import RowSums, unseal
from ..format.tables import TABLES

SUMS = b"sums"
"""In the environment's unnamed database: the row of the sums of all rows."""


STORE_CLOSED = "The store is closed."
_OF_CLOSED = "closed/deleted/dropped"
"""In the message of LMDB's error for an object that was closed; it has no class of its own."""
_ROWS_A_LOOK = 1024
_NOT_DAMAGE = (
    lmdb.BadDbiError,
    lmdb.BadTxnError,
    lmdb.InvalidParameterError,
    lmdb.MemoryError,
    lmdb.ReadersFullError,
)


class ChangedRows(dict[bytes, bytes | None]):
    """Changed keys and their values; sorted only when an order is requested."""

    __slots__ = ("_fresh", "_order")

    def __init__(self, changes: Changes | None = None) -> None:
        super().__init__(changes or {})
        self._order: SortedList[bytes] = SortedList()
        self._fresh: list[bytes] = list(self)

    def take(self, changes: Changes) -> None:
        """Add changes."""
        for key in changes:
            if key not in self:
                self._fresh.append(key)
        self.update(changes)

    def irange(
        self, start: bytes, end: bytes, inclusive: tuple[bool, bool], reverse: bool = False
    ) -> Iterator[bytes]:
        """Yield the keys from start to end, in order."""
        if self._fresh:
            self._order.update(self._fresh)
            self._fresh = []
        keys: Iterator[bytes] = self._order.irange(start, end, inclusive, reverse)
        return keys


class View:
    """The rows as of one instant; for any thread, but only one.

    While it is open, the database keeps the pages that it needs.
    """

    def __init__(
        self,
        overlays: Sequence[ChangedRows],
        txn: lmdb.Transaction[bytes],
        main: Any,
        views: WeakSet[View],
    ) -> None:
        self._overlays, self._txn, self._main, self._views = overlays, txn, main, views
        self._cursor: lmdb.Cursor[bytes] | None = None
        self.passes_over: set[bytes] | None = None
        """If set, rows that do not match their checksum are added here, and count as missing."""
        views.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._cursor is not None:
            self._cursor.close()
        self._txn.abort()
        self._views.discard(self)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, or None."""
        for overlay in self._overlays:
            if key in overlay:
                return overlay[key]
        found = self.stored(key)
        return None if found is None else _value_if_good(key, found, self.passes_over)

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values with start <= key < end, in order."""
        return _until_cancelled(
            merged_rows(self._overlays, self._txn, start, end, self.passes_over)
        )

    # --- the database alone --------------------------------------------------

    def has_changed(self, key: bytes) -> bool:
        """Return whether a row has changed since the last checkpoint."""
        return any(key in overlay for overlay in self._overlays)

    def stored(self, key: bytes) -> bytes | None:
        """Return a row of the database: its value and its checksum, not verified."""
        try:
            return self._txn.get(key)
        except lmdb.Error as error:
            raise damaged(error) from error

    def has_stored(self, start: bytes, end: bytes) -> bool:
        """Return whether the database has a row with start <= key < end; the row is not verified.

        Much faster than a scan that finds nothing.
        """
        try:
            if self._cursor is None:
                self._cursor = self._txn.cursor()
            return self._cursor.set_range(start) and self._cursor.key() < end
        except lmdb.Error as error:
            raise damaged(error) from error

    def all_stored(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield all rows of the database, in order, not verified."""
        return _until_cancelled(stored_rows(self._txn, b"", b"\xff"))

    def sums(self) -> RowSums | None:
        """Return the sums of the last checkpoint; None if they cannot be read."""
        try:
            return decode_sums(self._txn.get(SUMS, db=self._main))
        except lmdb.Error as error:
            raise damaged(error) from error


def _until_cancelled(rows: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Yield rows; in a trio thread whose task is cancelled, raise Cancelled soon.

    Otherwise a long check would hold up an unmount.
    """
    for count, row in enumerate(rows):
        if count % _ROWS_A_LOOK == 0:
            with suppress(RuntimeError):  # it is not a trio thread
                trio.from_thread.check_cancelled()
        yield row


def damaged(error: lmdb.Error) -> MetadataError:
    """Return the error for a database that LMDB cannot read, or that is closed."""
    if _OF_CLOSED in str(error):
        return ClosedError(STORE_CLOSED)
    if isinstance(error, _NOT_DAMAGE):  # the database could not be opened anew after a failure
        return MetadataError(f"The metadata cannot be read: {error}.")
    return DamagedMetadataError(
        f"The metadata database is damaged ({error}): unmount the store, move the metadata "
        "away, and run 'fusestore recover'."
    )


def bad_row(key: bytes) -> BadRowError:
    """Return the error for a row that does not match its checksum."""
    table = TABLES[key[:1]].name if key[:1] in TABLES else "super"
    return BadRowError(
        f"Row {key.hex()} of {table} in the metadata does not match its checksum: "
        "run 'fusestore fsck --repair'."
    )


def value_of(key: bytes, stored: bytes) -> bytes:
    """Return the value of a stored row; BadRowError."""
    value = unseal(key, stored)
    if value is None:
        raise bad_row(key)
    return value


def _value_if_good(key: bytes, stored: bytes, passes_over: set[bytes] | None) -> bytes | None:
    """Return the value of a stored row; None for a bad row that is skipped; BadRowError."""
    value = unseal(key, stored)
    if value is None:
        if passes_over is None:
            raise bad_row(key)
        passes_over.add(key)
    return value


def decode_sums(stored: bytes | None) -> RowSums | None:
    value = unseal(SUMS, stored) if stored is not None else None
    try:
        return RowSums.decode(value) if value is not None else None
    except struct.error:
        return None


def stored_rows(
    txn: lmdb.Transaction[bytes], start: bytes, end: bytes
) -> Iterator[tuple[bytes, bytes]]:
    """Yield the rows of the database with start <= key < end, not verified."""
    try:
        cursor = txn.cursor()
        if not cursor.set_range(start):
            return
        for key, stored in cursor:
            if key >= end:
                return
            yield key, stored
    except lmdb.Error as error:
        raise damaged(error) from error


def verified_rows(
    txn: lmdb.Transaction[bytes], start: bytes, end: bytes, passes_over: set[bytes] | None
) -> Iterator[tuple[bytes, bytes]]:
    """Yield the rows of the database with start <= key < end."""
    for key, stored in stored_rows(txn, start, end):
        value = _value_if_good(key, stored, passes_over)
        if value is not None:
            yield key, value


def merged_rows(
    overlays: Sequence[ChangedRows],
    txn: lmdb.Transaction[bytes],
    start: bytes,
    end: bytes,
    passes_over: set[bytes] | None = None,
) -> Iterator[tuple[bytes, bytes]]:
    """Yield rows of the database below the overlays; the first overlay is the newest."""
    walks: list[list[Any]] = []
    for overlay in overlays:
        keys = overlay.irange(start, end, (True, False))
        first = next(keys, None)
        if first is not None:
            walks.append([first, keys, overlay])
    if not walks:
        yield from verified_rows(txn, start, end, passes_over)
        return
    stored = stored_rows(txn, start, end)
    below = next(stored, None)
    while walks or below is not None:
        # If keys are equal, the first walk (the newest) wins.
        key = min(walk[0] for walk in walks) if walks else None
        if below is not None and (key is None or below[0] < key):
            value = _value_if_good(*below, passes_over)
            if value is not None:
                yield below[0], value
            below = next(stored, None)
            continue
        if below is not None and below[0] == key:
            below = next(stored, None)
        value = None
        found = False
        for walk in list(walks):
            if walk[0] == key:
                if not found:
                    value, found = walk[2][key], True
                walk[0] = next(walk[1], None)
                if walk[0] is None:
                    walks.remove(walk)
        if value is not None and key is not None:
            yield key, value


def rows_below(overlay: ChangedRows, prefix: bytes) -> ChangedRows:
    """Return a copy of the rows whose keys start with `prefix`."""
    if not prefix:
        return ChangedRows(overlay)
    end = (int.from_bytes(prefix, "big") + 1).to_bytes(len(prefix), "big")
    return ChangedRows({key: overlay[key] for key in overlay.irange(prefix, end, (True, False))})
