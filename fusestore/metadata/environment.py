"""LMDB's environment: its file is locked, opened, widened, and opened anew after a failure.

The unnamed database holds the sums of all rows; the rows are in a database of their own.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import lmdb

from ..errors import ClosedError, MetadataError, StoreBusyError
from ..format.row_sums import RowSums, seal
from ..limits import Limits
from ..system import linux, locks
from ..system.process_limits import can_map, mappable, retried
from .pages import check_pages
from .view import STORE_CLOSED, SUMS

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


class _Closed:
    """Stands for an object of LMDB after the environment was closed."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ClosedError(STORE_CLOSED)


CLOSED: Any = _Closed()


class Environment:
    """The environment in a directory; one process writes to it, or several read it."""

    _env: lmdb.Environment

    def __init__(self, directory: Path, *, read_only: bool, limits: Limits, owner: str) -> None:
        """Open or create it; MetadataError if it cannot be used, StoreBusyError if it is in use."""
        self.directory = directory
        self._limits = limits
        self._is_dead = False
        """It can only be closed, and opened anew."""
        self._lock = self._own(owner, shared=read_only)
        try:
            self.rows_found = check_pages(directory / DATABASE)
            """Rows in the pages when it was opened; LMDB's count may be wrong."""
            self.map_bytes = mappable(limits.map_bytes)
            self._open(read_only)
            if self._lock is None:
                self._lock = self._own(owner, shared=read_only)
        except (lmdb.Error, OSError) as error:
            raise self.not_opened(error) from error

    def not_opened(self, error: Exception) -> MetadataError:
        """Return the error to raise if the environment cannot be opened or first read."""
        # LMDB names the directory of links; see `_made`.
        reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
        is_lost = isinstance(error, _ROTTEN) or reason == os.strerror(errno.EIO)
        hint = " Move it away and run 'fusestore recover'." if is_lost else ""
        return MetadataError(f"The metadata in {self.directory} cannot be opened: {reason}.{hint}")

    def _own(self, owner: str, *, shared: bool) -> locks.Lock | None:
        """Lock the database's file, if it exists; a copy of it has its own lock."""
        try:
            return locks.take(self.directory / DATABASE, owner, shared=shared)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MetadataError(
                f"The metadata in {self.directory} cannot be locked: {error.strerror}."
            ) from error
        except locks.LockedError as error:
            by = f"process {error.holder}" if error.holder else "another process"
            raise StoreBusyError(f"The metadata in {self.directory} is in use by {by}.") from error

    def close(self, *, keeps_readers: bool) -> None:
        """Let go of it; it stays open for readers that still use it.  Later use: ClosedError."""
        if not keeps_readers:
            self._env.close()
        self._env = CLOSED
        if self._lock is not None:
            self._lock.release()

    # --- opening -------------------------------------------------------------

    def _open(self, read_only: bool) -> None:
        self._env = self._made(read_only)
        self.main = self._env.open_db(None)
        self.rows = self._open_rows(read_only)

    def _made(self, read_only: bool) -> lmdb.Environment:
        """Open LMDB, with the file of its locks in memory.

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
                os.symlink(self.directory.absolute() / DATABASE, Path(links, DATABASE))
                os.symlink(f"/proc/self/fd/{lock}", Path(links, DATABASE_LOCK))
                return self._made_in(links, read_only)
        return self._made_in(os.fspath(self.directory), read_only)

    def _made_in(self, directory: str, read_only: bool) -> lmdb.Environment:
        return lmdb.open(
            directory,
            map_size=self.map_bytes,
            subdir=True,
            create=not read_only,
            readonly=read_only,
            max_dbs=1,
            lib_version=0,
            mode=0o600,
        )

    def _open_rows(self, read_only: bool) -> Any:
        """Return the database of the rows; that of an early version is converted.

        Early versions stored the rows in the unnamed database, without checksums.
        """
        with self._env.begin() as txn:
            entries = txn.stat(self.main)["entries"]
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
            old = [key for key in txn.cursor(self.main).iternext(values=False) if key != ROWS]
            for key in old:
                stored = seal(key, txn.pop(key) or b"")
                sums.add(key, stored)
                txn.put(key, stored, db=rows)
            txn.put(SUMS, seal(SUMS, sums.encode()))

    # --- using ---------------------------------------------------------------

    def begin(self, *, write: bool = False) -> lmdb.Transaction[bytes]:
        """Begin a transaction on the rows; lmdb.Error."""
        return self._env.begin(write=write, db=self.rows)

    def preallocate(self, coming: int) -> None:
        """Keep room for deletes, which need new pages even on a full disk; OSError."""
        ahead = self._limits.metadata_preallocate_bytes
        used = (self._env.info()["last_pgno"] + 1) * self._page_bytes
        if self.bytes_used >= used + ahead // 2 + coming:
            return
        descriptor = retried(os.open, self.directory / DATABASE, os.O_RDWR)
        try:
            linux.allocate(descriptor, 0, used + ahead + 2 * coming)
        except OSError as error:
            # Only a precaution: the transaction itself may still find room.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(descriptor)

    @property
    def _page_bytes(self) -> int:
        return int(self._env.stat()["psize"])

    @property
    def bytes_used(self) -> int:
        """The size of the database on disk."""
        return (self.directory / DATABASE).stat().st_blocks * 512

    def bytes_in_use(self, txn: lmdb.Transaction[bytes]) -> int:
        """Return the bytes of the pages that hold rows."""
        pages = 0
        for database in (self.main, self.rows):
            found = txn.stat(database)
            pages += found["branch_pages"] + found["leaf_pages"] + found["overflow_pages"]
        return pages * self._page_bytes

    # --- after a failure -----------------------------------------------------

    def unusable(self, error: Exception) -> MetadataError:
        """Return the error to raise after one of LMDB or the disk."""
        self._is_dead = self._is_dead or isinstance(error, lmdb.PanicError)
        if isinstance(error, lmdb.MapFullError):
            return MetadataError(
                f"The metadata in {self.directory} needs more than {self.map_bytes >> 20} MiB of "
                "address space, which 'ulimit -v' or the processor limits."
            )
        return MetadataError(
            f"The metadata in {self.directory} cannot be read or written: {error}. Look at its "
            "disk and its free space."
        )

    def can_improve(self, failure: Exception | None) -> bool:
        """Return whether `improve` helps after a failure."""
        if isinstance(failure, lmdb.MapFullError):
            return can_map(2 * self.map_bytes)  # the old map goes only after this
        return self._is_dead

    def improve(self, failure: Exception | None) -> None:
        """Open it anew, or its map wider, once no transaction is open; lmdb.Error or OSError."""
        if isinstance(failure, lmdb.MapFullError):
            self.map_bytes *= 2
            self._env.set_mapsize(self.map_bytes)
        else:
            self._env.close()
            self._open(read_only=False)
            self._is_dead = False
