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

All methods but `write` run on the event loop, without an await in between; a scan must
be read to its end, or dropped, before the next change.
Only this module and `view` import lmdb.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn
from weakref import WeakSet

import lmdb

from ..errors import (
    ClosedError,
    FencedError,
    MetadataError,
    StoreBusyError,
)
from ..format import tables
from ..format.records import Changes
from ..format.row_sums import CHECKSUM_BYTES, RowSums, seal, unseal
from ..limits import DEFAULTS, Limits
from ..nodes.base import Space
from ..system import linux, locks
from ..system.process_limits import can_map, mappable, retried
from .pages import check_pages
from .view import (
    STORE_CLOSED,
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

DATABASE, DATABASE_LOCK = "data.mdb", "lock.mdb"
"""The files that LMDB creates in the directory."""
ROWS = b"rows"
"""In the environment's unnamed database: the name of the database of the rows."""
_ROTTEN = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
)


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
        self._directory = directory
        self._guard = guard
        self._lock = self._own(owner, shared=read_only)
        self.limits = limits
        self._active = ChangedRows()
        self._frozen: ChangedRows | None = None
        self._to_recount = False
        self._failure: Exception | None = None
        """What the last write failed with."""
        self._is_dead = False
        """The environment can only be closed, and opened anew."""
        self._views: WeakSet[View] = WeakSet()
        """Open views: threads may be reading them."""
        try:
            self.rows_found = check_pages(directory / DATABASE)
            """Rows in the pages when the database was opened; LMDB's count may be wrong."""
            self._map_bytes = mappable(limits.map_bytes)
            self._env = self._open(read_only)
            if self._lock is None:
                self._lock = self._own(owner, shared=read_only)
            self._main = self._env.open_db(None)
            self._rows = self._open_rows(read_only)
            self._txn = self._begin()
            self._cursor = self._txn.cursor()
            self.bytes_in_use = self._count_bytes()
        except (lmdb.Error, OSError) as error:
            # LMDB names the directory of links; see `_open`.
            reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
            is_lost = isinstance(error, _ROTTEN) or reason == os.strerror(errno.EIO)
            hint = " Move it away and run 'fusestore recover'." if is_lost else ""
            raise MetadataError(
                f"The metadata in {directory} cannot be opened: {reason}.{hint}"
            ) from error
        self._guarded = {self._stored_guard(self._txn)}
        """Values of the guard that this engine read or wrote, or may have written."""

    def _own(self, owner: str, *, shared: bool) -> locks.Lock | None:
        """Lock the database's file, if it exists; a copy of it has its own lock."""
        try:
            return locks.take(self._directory / DATABASE, owner, shared=shared)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MetadataError(
                f"The metadata in {self._directory} cannot be locked: {error.strerror}."
            ) from error
        except locks.LockedError as error:
            by = f"process {error.holder}" if error.holder else "another process"
            raise StoreBusyError(f"The metadata in {self._directory} is in use by {by}.") from error

    def _stored_guard(self, txn: lmdb.Transaction[bytes]) -> bytes | None:
        return txn.get(self._guard) if self._guard else None

    def close(self) -> None:
        """Close the environment; changes that no checkpoint wrote are dropped.

        Any later use is a ClosedError.  While a thread still reads a view, the environment
        stays open.
        """
        self._cursor.close()
        self._txn.abort()
        if not self._views:
            self._env.close()
        closed: Any = _Closed()
        self._env = self._txn = self._cursor = closed
        if self._lock is not None:
            self._lock.release()

    # --- the environment -----------------------------------------------------

    def _open(self, read_only: bool) -> lmdb.Environment:
        """Open the environment, with the file of LMDB's locks in memory.

        Every reader writes to that file.  On a disk that is frozen, as backup tools do, this
        would stop the event loop.  Other processes need no such locks: they cannot open the
        environment (`_own`), or all of them only read it.  If there is no place for links to
        both files, the file of the locks is beside the database.
        """
        for place in (None, "/dev/shm"):
            with suppress(OSError), ExitStack() as until:
                made = TemporaryDirectory(
                    prefix="fusestore-", dir=place, ignore_cleanup_errors=True
                )
                links = until.enter_context(made)
                lock = os.memfd_create(DATABASE_LOCK)
                until.callback(os.close, lock)
                os.symlink(self._directory.absolute() / DATABASE, Path(links, DATABASE))
                os.symlink(f"/proc/self/fd/{lock}", Path(links, DATABASE_LOCK))
                return self._open_in(links, read_only)
        return self._open_in(os.fspath(self._directory), read_only)

    def _open_in(self, directory: str, read_only: bool) -> lmdb.Environment:
        return lmdb.open(
            directory,
            map_size=self._map_bytes,
            subdir=True,
            create=not read_only,
            readonly=read_only,
            max_dbs=1,
            lib_version=0,
            mode=0o600,
        )

    def after_failure(self) -> None:
        """When `write` has failed: open the environment anew, or its map wider, if that helps.

        Views that are open prevent this; then the next failure tries again.  MetadataError.
        """
        failure, self._failure = self._failure, None
        full = isinstance(failure, lmdb.MapFullError)
        if self._views or not (full or self._is_dead):
            return
        if full and not can_map(2 * self._map_bytes):  # the old map goes only after this
            return
        try:
            self._cursor.close()
            self._txn.abort()
            if full:
                self._map_bytes *= 2
                self._env.set_mapsize(self._map_bytes)
            else:
                self._env.close()
                self._env = self._open(read_only=False)
                self._is_dead = False
                self._main = self._env.open_db(None)
                self._rows = self._open_rows(read_only=False)
            self._txn = self._begin()
            self._cursor = self._txn.cursor()
        except (lmdb.Error, OSError) as error:
            raise _unusable(self._directory, error) from error

    def _begin(self, *, write: bool = False) -> lmdb.Transaction[bytes]:
        return self._env.begin(write=write, db=self._rows)

    def _open_rows(self, read_only: bool) -> Any:
        """Return the database of the rows; that of an early version is converted.

        Early versions stored the rows in the unnamed database, without checksums.
        """
        with self._env.begin() as txn:
            entries = txn.stat(self._main)["entries"]
            is_new = entries == 0
            is_old = entries > 0 and txn.get(ROWS) is None
        if is_old and read_only:
            raise OSError(
                errno.EROFS, "an early version wrote it: mount it read-write once to convert it"
            )
        rows = self._env.open_db(ROWS, create=is_new or is_old)
        if is_old:
            self._convert(rows)
        return rows

    def _convert(self, rows: Any) -> None:
        """Give the rows of an early version checksums, in one transaction."""
        with self._env.begin(write=True) as txn:
            sums = RowSums()
            old = [key for key in txn.cursor(self._main).iternext(values=False) if key != ROWS]
            for key in old:
                stored = seal(key, txn.pop(key) or b"")
                sums.add(key, stored)
                txn.put(key, stored, db=rows)
            txn.put(SUMS, seal(SUMS, sums.encode()))

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
            return View(parts, self._begin(), self._main, self._views)
        except lmdb.Error as error:
            raise _unusable(self._directory, error) from error

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
        return self._txn.stat(self._rows)["entries"]

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
            self._preallocate(sum(len(key) + len(value) for key, value in puts))
            with self._begin(write=True) as txn:
                self._check_guard(txn)
                sums = self._sums(txn)
                _change(txn, puts, deletes, sums)
                if self._to_recount:
                    sums = RowSums.of(txn.cursor())
                txn.put(SUMS, seal(SUMS, sums.encode()), db=self._main)
                if attempt is not None:
                    self._guarded.add(attempt)
            self._guarded = {attempt} if attempt is not None else self._guarded
        except lmdb.MapFullError as error:
            self._failure = error
            raise MetadataError(
                f"The metadata in {self._directory} needs more than {self._map_bytes >> 20} MiB of "
                "address space, which 'ulimit -v' or the processor limits."
            ) from error
        except (lmdb.Error, OSError) as error:
            self._failure = error
            self._is_dead = self._is_dead or isinstance(error, lmdb.PanicError)
            raise _unusable(self._directory, error) from error
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
                f"Another process has written the metadata in {self._directory}: this "
                "mount has ended, and its uncommitted changes are only in memory."
            )
        logger.error(
            "The metadata in %s is damaged: row %s does not match its checksum. The mount knows "
            "its value, and writes it anew.",
            self._directory,
            self._guard.hex(),
        )
        self._to_recount = True

    def recount(self) -> None:
        """Let the next checkpoint count all rows again, because the counts are wrong."""
        self._to_recount = True

    def _sums(self, txn: lmdb.Transaction[bytes]) -> RowSums:
        """Return the sums of the last checkpoint; if they are damaged, count the rows."""
        sums = decode_sums(txn.get(SUMS, db=self._main))
        if sums is None:
            self._to_recount = True
        return sums or RowSums()

    def _preallocate(self, coming: int) -> None:
        """Keep room for deletes, which need new pages even on a full disk."""
        info = self._env.info()
        used = (info["last_pgno"] + 1) * self._env.stat()["psize"]
        path = self._directory / DATABASE
        want = used + self.limits.metadata_preallocate_bytes + 2 * coming
        if (
            path.stat().st_blocks * 512
            >= used + self.limits.metadata_preallocate_bytes // 2 + coming
        ):
            return
        descriptor = retried(os.open, path, os.O_RDWR)
        try:
            linux.allocate(descriptor, 0, want)
        except OSError as error:
            # Only a precaution: the transaction itself may still find room.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(descriptor)

    def thaw(self) -> None:
        """Forget the changes that were set aside, after they were written."""
        self._frozen = None
        self._cursor.close()
        self._txn.abort()
        self._txn = self._begin()
        self._cursor = self._txn.cursor()
        self.bytes_in_use = self._count_bytes()

    def _count_bytes(self) -> int:
        """The bytes of the pages that hold rows."""
        pages = 0
        for database in (self._main, self._rows):
            found = self._txn.stat(database)
            pages += found["branch_pages"] + found["leaf_pages"] + found["overflow_pages"]
        return pages * int(self._env.stat()["psize"])

    def space(self) -> tuple[Space, int]:
        """The room on the database's device, and the free bytes within its file; OSError.

        Runs in a thread.
        """
        spare = self.bytes_used - self.bytes_in_use
        found, about = os.statvfs(self._directory), os.stat(self._directory)
        free = found.f_bavail * found.f_frsize
        return Space(about.st_dev, found.f_blocks * found.f_frsize, free), max(0, spare)

    @property
    def bytes_used(self) -> int:
        """The size of the database on disk."""
        return (self._directory / DATABASE).stat().st_blocks * 512


class _Closed:
    """Stands for the objects of LMDB after the environment was closed."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ClosedError(STORE_CLOSED)


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


def _unusable(directory: Path, error: Exception) -> MetadataError:
    return MetadataError(
        f"The metadata in {directory} cannot be read or written: {error}. Look at its disk and its "
        "free space."
    )
