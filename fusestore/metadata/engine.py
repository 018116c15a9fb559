"""The metadata engine: ordered keys and values, in LMDB below a table in memory.

Changes go to a sorted table in memory; a checkpoint writes them to LMDB in one
transaction with a full sync, in a thread of its own.  Reads look into the
memory first, then into an LMDB read transaction that is renewed after each
checkpoint.  Therefore the database is never ahead of the journals, operations do
not pause for a checkpoint, and a failed transaction loses nothing: its changes
are still in memory, and the next checkpoint writes them.

LMDB has no checksums.  Therefore each stored value ends with a checksum over
its key and itself, and is verified whenever it is read from the database: no read, no scan
and no `last` passes a row that does not match (BadRowError).  Rows in memory are not
verified.

All methods but `write` and `space` run on the event loop of a mounted store, without an
await in between; a scan must be read to its end, or dropped, before the next change.
Only the modules of this folder import lmdb.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakSet

import lmdb

from ..errors import FencedError
from ..format import tables
from ..format.records import Changes
from ..format.row_sums import CHECKSUM_BYTES, RowSums, seal, unseal
from ..limits import DEFAULTS, Limits
from ..nodes.base import Space
from .environment import CLOSED, Environment
from .view import (
    SUMS,
    ChangedRows,
    View,
    damaged,
    decode_sums,
    merged_rows,
    rows_below,
    value_of,
    verified_rows,
)

logger = logging.getLogger(__name__)


class Engine:
    """Ordered keys of at most 511 bytes with values of at most 64 KiB."""

    def __init__(
        self,
        directory: Path,
        *,
        read_only: bool = False,
        limits: Limits = DEFAULTS,
        owner: str = "",
        guard: bytes = b"",
    ) -> None:
        """Open or create the environment in `directory`; MetadataError if it cannot be used.

        StoreBusyError if another owner than `owner`, the path of a store, uses it.  If the
        key `guard` has an intact value that this engine did not write, all writing ends.
        """
        self._env = Environment(directory, read_only=read_only, limits=limits, owner=owner)
        self._guard = guard
        self.limits = limits
        self._active = ChangedRows()
        self._frozen: ChangedRows | None = None
        self._to_recount = False
        self._failure: Exception | None = None
        """What the last write failed with."""
        self._views: WeakSet[View] = WeakSet()
        """Open views: threads may be reading them."""
        try:
            self._begin_reading()
        except lmdb.Error as error:
            raise self._env.not_opened(error) from error
        self.rows_found = self._env.rows_found
        self._guarded = {self._stored_guard(self._txn)}
        """Values of the guard that this engine read or wrote, or may have written."""

    def _begin_reading(self) -> None:
        self._txn = self._env.begin()
        self._cursor = self._txn.cursor()
        self.bytes_in_use = self._env.bytes_in_use(self._txn)

    def _end_reading(self) -> None:
        self._cursor.close()
        self._txn.abort()

    def _stored_guard(self, txn: lmdb.Transaction[bytes]) -> bytes | None:
        return txn.get(self._guard) if self._guard else None

    def close(self) -> None:
        """Close the environment; changes that no checkpoint wrote are dropped.

        Any later use is a ClosedError.  While a thread still reads a view, the environment
        stays open.
        """
        self._end_reading()
        self._txn = self._cursor = CLOSED
        self._env.close(keeps_readers=bool(self._views))

    def after_failure(self) -> None:
        """When `write` has failed: open the environment anew, or its map wider, if that helps.

        Views that are open prevent this; then the next failure tries again.  MetadataError.
        """
        failure, self._failure = self._failure, None
        if self._views or not self._env.can_improve(failure):
            return
        try:
            self._end_reading()
            self._env.improve(failure)
            self._begin_reading()
        except (lmdb.Error, OSError) as error:
            raise self._env.unusable(error) from error

    # --- reading -------------------------------------------------------------

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, or None."""
        try:
            return self._active[key]
        except KeyError:
            pass
        if self._frozen is not None:
            try:
                return self._frozen[key]
            except KeyError:
                pass
        try:
            stored = self._txn.get(key)
        except lmdb.Error as error:
            raise damaged(error) from error
        return None if stored is None else value_of(key, stored)

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values with start <= key < end, in order."""
        overlays = [self._active] if self._frozen is None else [self._active, self._frozen]
        return merged_rows(overlays, self._txn, start, end)

    def scan_stored(self, start: bytes, end: bytes) -> list[tuple[bytes, bytes]]:
        """Return the rows start <= key < end as of the last checkpoint."""
        return list(verified_rows(self._txn, start, end, None))

    def view(self, prefix: bytes = b"") -> View:
        """Return the current rows whose keys start with `prefix`, for a thread; close it soon."""
        overlays = [self._active] if self._frozen is None else [self._active, self._frozen]
        try:
            parts = [rows_below(overlay, prefix) for overlay in overlays]
            return View(parts, self._env.begin(), self._env.main, self._views)
        except lmdb.Error as error:
            raise self._env.unusable(error) from error

    def stored_view(self) -> View:
        """Return the rows as of the last checkpoint, for a thread; close it soon."""
        try:
            return View([], self._env.begin(), self._env.main, self._views)
        except lmdb.Error as error:
            raise self._env.unusable(error) from error

    def last(self, start: bytes, end: bytes) -> tuple[bytes, bytes] | None:
        """Return the greatest key with start <= key <= end, and its value, or None."""
        while True:
            best = next(self._active.irange(start, end, (True, True), reverse=True), None)
            if self._frozen is not None:
                other = next(self._frozen.irange(start, end, (True, True), reverse=True), None)
                if other is not None and (best is None or other > best):
                    best = other
            stored = self._last_stored(end)
            if stored is not None and stored[0] >= start and (best is None or stored[0] > best):
                return stored[0], value_of(*stored)
            if best is None:
                return None
            value = self.get(best)
            if value is not None:
                return best, value
            if best == start:
                return None
            end = _before(best)

    def _last_stored(self, end: bytes) -> tuple[bytes, bytes] | None:
        """Return the greatest row of the database with key <= end."""
        cursor = self._cursor
        try:
            if cursor.set_range(end):
                found = cursor.key() == end or cursor.prev()
            else:
                found = cursor.last()
            return cursor.item() if found else None
        except lmdb.Error as error:
            raise damaged(error) from error

    @property
    def rows_stored(self) -> int:
        """The number of rows in the database, according to LMDB."""
        return self._txn.stat(self._env.rows)["entries"]

    # --- changing ------------------------------------------------------------

    def apply(self, changes: Changes) -> None:
        """Apply absolute puts and deletes, visible at once; RowTooLargeError applies none."""
        tables.check_lengths(changes)
        self._active.take(changes)

    @property
    def changed_keys(self) -> int:
        """The number of keys changed since the last freeze."""
        return len(self._active)

    @property
    def frozen(self) -> bool:
        """Whether a checkpoint is under way."""
        return self._frozen is not None

    # --- checkpoint ----------------------------------------------------------

    def freeze(self) -> None:
        """Set the changes so far aside for a checkpoint; later changes are kept apart."""
        if self._frozen is not None:
            raise RuntimeError("a checkpoint is under way")
        self._frozen, self._active = self._active, ChangedRows()

    def take_back(self) -> None:
        """Undo `freeze`: there will be no checkpoint of what was set aside."""
        assert self._frozen is not None
        self._frozen.take(self._active)
        self._active, self._frozen = self._frozen, None

    def unstored(self) -> dict[bytes, bytes | None]:
        """Return all changes since the last checkpoint."""
        return {**(self._frozen or {}), **self._active}

    def amend(self, changes: Changes) -> None:
        """Add to the changes that were set aside; later changes stay newer.

        RowTooLargeError: nothing was added.
        """
        tables.check_lengths(changes)
        assert self._frozen is not None
        self._frozen.take(changes)

    def write(self) -> None:
        """Write the changes that were set aside, with a full sync; MetadataError if this fails.

        Runs in a thread.  After an error it may be called again.
        """
        assert self._frozen is not None
        changes = sorted(self._frozen.items())
        puts = [(key, seal(key, value)) for key, value in changes if value is not None]
        deletes = [key for key, value in changes if value is None]
        guard = self._frozen.get(self._guard)
        attempt = seal(self._guard, guard) if guard is not None else None
        try:
            self._env.preallocate(sum(len(key) + len(value) for key, value in puts))
            with self._env.begin(write=True) as txn:
                self._check_guard(txn)
                sums = self._sums(txn)
                _change(txn, puts, deletes, sums)
                if self._to_recount:
                    sums = RowSums.of(txn.cursor())
                txn.put(SUMS, seal(SUMS, sums.encode()), db=self._env.main)
                if attempt is not None:
                    self._guarded.add(attempt)
            self._guarded = {attempt} if attempt is not None else self._guarded
        except (lmdb.Error, OSError) as error:
            self._failure = error
            raise self._env.unusable(error) from error
        self._to_recount = False

    def _check_guard(self, txn: lmdb.Transaction[bytes]) -> None:
        """Raise FencedError if another process has written the guard.

        A guard that does not match its checksum is damage: nobody wrote it.
        """
        stored = self._stored_guard(txn)
        if stored in self._guarded:
            return
        if stored is None or unseal(self._guard, stored) is not None:
            raise FencedError(
                f"Another process has written the metadata in {self._env.directory}: this "
                "mount has ended, and its uncommitted changes are only in memory."
            )
        logger.error(
            "The metadata in %s is damaged: row %s does not match its checksum. The mount knows "
            "its value, and writes it anew.",
            self._env.directory,
            self._guard.hex(),
        )
        self._to_recount = True

    def recount(self) -> None:
        """Let the next checkpoint count all rows again, because the counts are wrong."""
        self._to_recount = True

    def _sums(self, txn: lmdb.Transaction[bytes]) -> RowSums:
        """Return the sums of the last checkpoint; if they are damaged, count the rows."""
        sums = decode_sums(txn.get(SUMS, db=self._env.main))
        if sums is None:
            self._to_recount = True
        return sums or RowSums()

    def thaw(self) -> None:
        """Forget the changes that were set aside, after they were written."""
        self._frozen = None
        self._end_reading()
        self._begin_reading()

    def space(self) -> tuple[Space, int]:
        """The room on the database's device, and the free bytes within its file; OSError.

        Runs in a thread.
        """
        spare = self.bytes_used - self.bytes_in_use
        found, about = os.statvfs(self._env.directory), os.stat(self._env.directory)
        free = found.f_bavail * found.f_frsize
        return Space(about.st_dev, found.f_blocks * found.f_frsize, free), max(0, spare)

    @property
    def bytes_used(self) -> int:
        """The size of the database on disk."""
        return self._env.bytes_used


def _change(
    txn: lmdb.Transaction[bytes],
    puts: list[tuple[bytes, bytes]],
    deletes: list[bytes],
    sums: RowSums,
) -> None:
    """Put and delete stored rows, both in order, and count them."""
    more: defaultdict[int, int] = defaultdict(int)
    rows: defaultdict[int, int] = defaultdict(int)
    number = int.from_bytes
    with txn.cursor() as cursor:
        before = cursor.get
        for key, stored in puts:
            old = before(key)
            if old is None:
                rows[key[0]] += 1
            else:
                more[key[0]] -= number(old[-CHECKSUM_BYTES:], "big")
            more[key[0]] += number(stored[-CHECKSUM_BYTES:], "big")
        for start in range(0, len(puts), 500):
            cursor.putmulti(puts[start : start + 500])
        for key in deletes:
            old = before(key)
            if old is not None:
                cursor.delete()
                rows[key[0]] -= 1
                more[key[0]] -= number(old[-CHECKSUM_BYTES:], "big")
    for letter in rows.keys() | more.keys():
        sums.change(bytes([letter]), rows[letter], more[letter])


def _before(key: bytes) -> bytes:
    """Return a key less than `key`, and not less than any smaller key of the same length."""
    number = int.from_bytes(key, "big") - 1
    return number.to_bytes(len(key), "big")
