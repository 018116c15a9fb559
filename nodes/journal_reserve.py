"""Room that a node keeps for its journal: a file that is given up when the device is full.

The file `journal/reserve` holds no data.  When a journal segment finds no room, the file is
cut short by as much, or, if the device is out of inodes, becomes the segment.  So a commit
that deletes files succeeds although other programs took all of the device.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

from ..system import linux
from ..system.beneath import Directory

RESERVE_NAME = "reserve"
_STEP_BYTES = 1 << 20


class JournalReserve:
    """The file of one node; the caller holds the node's lock."""

    def __init__(self, folder: Callable[[], Directory]) -> None:
        """`folder` returns the open folder of the journal, or raises OSError."""
        self._folder = folder

    def fill(self, length: int) -> None:
        """Make the file as long as this, if the device has room and can reserve it."""
        with contextlib.suppress(OSError), self._opened(self._folder(), create=True) as fd:
            size = os.fstat(fd).st_size
            if size < length:
                linux.allocate(fd, size, length - size)
                os.ftruncate(fd, length)

    def give(self, length: int) -> bool:
        """Give up at least `length` bytes; return whether there were as many."""
        with contextlib.suppress(OSError), self._opened(self._folder()) as fd:
            size = os.fstat(fd).st_size
            if size >= length:
                os.ftruncate(fd, max(0, size - -(-length // _STEP_BYTES) * _STEP_BYTES))
                return True
        return False

    def become(self, name: str) -> bool:
        """Give the file this name, without its room; return whether it was there."""
        try:
            folder = self._folder()
            with self._opened(folder) as fd:
                os.ftruncate(fd, 0)
            folder.replace(RESERVE_NAME, name)
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def _opened(self, folder: Directory, *, create: bool = False) -> Iterator[int]:
        try:
            fd = folder.open(RESERVE_NAME, os.O_RDWR)
        except OSError as error:
            if not create or error.errno not in (errno.ENOENT, errno.EMLINK):
                raise
            with contextlib.suppress(FileNotFoundError):
                folder.unlink(RESERVE_NAME)  # its room is that of its other names, too
            fd = folder.create(RESERVE_NAME, os.O_RDWR)
        try:
            yield fd
        finally:
            os.close(fd)
