"""The codes of files: a file keeps the code that its directory, or one above, gives it."""

from __future__ import annotations

import stat

from ..bounded_cache import LeastRecentlyUsed
from ..errors import NotPermittedError
from ..format import file_rows, store_rows
from ..format.erasure import Code
from ..format.file_rows import ROOT
from ..log.log import Log, Transaction
from ..system import clock
from .tree_steps import inode_of


class Codes:
    """The codes of an open store."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._given: LeastRecentlyUsed[int, Code] = LeastRecentlyUsed(log.limits.codes_cached_max)
        """Cached codes that directories give to new files."""

    def policy(self, directory: int) -> tuple[Code, int]:
        """Return the code of new files below a directory, and the directory that sets it, or 0."""
        ino = directory
        while True:
            inode = inode_of(self._log.engine, ino)
            if inode.k:
                return Code(inode.k, inode.m), ino
            if ino == ROOT:
                return self._log.code, 0
            ino = inode.parent

    def of(self, ino: int) -> Code:
        """Return the code of new bytes of a file; for a directory, that of new files below it."""
        passed = []
        while (code := self._given.get(ino)) is None:
            inode = inode_of(self._log.engine, ino)
            if stat.S_ISDIR(inode.mode):
                passed.append(ino)
            if inode.k:
                code = Code(inode.k, inode.m)
                break
            if ino == ROOT:
                code = self._log.code
                break
            ino = inode.parent
        for directory in passed:
            self._given[directory] = code
        return code

    def set(self, directory: int, code: Code | None) -> None:
        """Set the code of new files below a directory; None makes it inherit again."""
        with self._log.transaction(rewrites=True) as txn:
            inode = inode_of(txn, directory)
            if not stat.S_ISDIR(inode.mode):
                raise NotPermittedError("Only the code of a directory can be set.")
            inode.k, inode.m = (code.k, code.m) if code else (0, 0)
            inode.ctime = clock.now()
            txn.put(file_rows.inode_key(directory), inode.encode())
            if code is not None:
                self.note(txn, code)
        self._given.clear()

    @staticmethod
    def note(txn: Transaction, code: Code) -> None:
        """Record that a code is in use: `status` names codes that do not survive a lost region."""
        known = store_rows.decode_codes(txn.get(store_rows.CODES_KEY))
        if code not in known:
            txn.put(store_rows.CODES_KEY, store_rows.encode_codes([*known, code]))

    def forget(self, directory: int | None = None) -> None:
        """Let go of what is cached for a directory that is gone, or of all after a move."""
        if directory is None:
            self._given.clear()
        else:
            self._given.discard(directory)
