"""Locks on directories and files themselves, which cannot be removed without the lock.

They use `flock(2)`.  A lock belongs to an owner (the path of a store) in this process.
The same owner may take it several times, for example when a node is reopened while
calls of the old one still hang.  No other owner can take it, in this process or in
another.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from .process_limits import retried

_UNSUPPORTED = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Errors of file systems without such locks; NFS needs a file that is open for writing."""


class LockedError(Exception):
    """Another process, or another store in this one, holds the lock; `holder` is its number."""

    def __init__(self, holder: int | None) -> None:
        super().__init__(holder)
        self.holder = holder


@dataclass(slots=True)
class _Held:
    owner: str
    fd: int
    count: int = 1


_held: dict[tuple[int, int], _Held] = {}
"""By device and inode."""
_dropped: deque[tuple[int, int]] = deque()
"""Keys of released locks, until the next call that holds the guard."""
_guard = threading.Lock()


class Lock:
    """A lock, held until `release`, or until the process ends."""

    __slots__ = ("_key",)

    def __init__(self, key: tuple[int, int] | None) -> None:
        self._key = key

    @property
    def is_held(self) -> bool:
        """Whether the file system supports such locks."""
        return self._key is not None

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        key, self._key = self._key, None
        if key is not None:
            _dropped.append(key)
            with _guard:
                _let_go_of_dropped()

    def __del__(self) -> None:
        # The collector may run while this thread holds the guard.  In that case, the next
        # call that holds the guard does the rest.
        if self._key is not None:
            _dropped.append(self._key)
            if _guard.acquire(blocking=False):
                try:
                    _let_go_of_dropped()
                finally:
                    _guard.release()


def _let_go_of_dropped() -> None:
    """With the guard held: close descriptors of locks that are no longer held."""
    while _dropped:
        key = _dropped.popleft()
        held = _held[key]
        held.count -= 1
        if held.count == 0:
            del _held[key]
            os.close(held.fd)


def take(path: Path | str, owner: str, *, shared: bool, dir_fd: int | None = None) -> Lock:
    """Lock a file or directory; LockedError if it is in use, OSError if it is missing.

    With `dir_fd` it is a name in that directory, and no link.  If the file system cannot
    lock it, the returned lock is not held.
    """
    fd = _open(path, shared, dir_fd)
    try:
        found = os.fstat(fd)
        key = found.st_dev, found.st_ino
        with _guard:
            _let_go_of_dropped()
            held = _held.get(key)
            if held is not None:
                if held.owner != owner:
                    raise LockedError(os.getpid())
                held.count += 1
                return Lock(key)
            if not _lock(fd, shared):
                return Lock(None)
            _held[key] = _Held(owner, fd)
            fd = -1
            return Lock(key)
    finally:
        if fd >= 0:
            os.close(fd)


def _open(path: Path | str, shared: bool, dir_fd: int | None) -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (0 if dir_fd is None else os.O_NOFOLLOW)
    if not shared:  # NFS locks only files that are open for writing
        try:
            return retried(os.open, path, os.O_RDWR | flags, dir_fd=dir_fd)
        except (IsADirectoryError, PermissionError):
            pass
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
    return retried(os.open, path, os.O_RDONLY | flags, dir_fd=dir_fd)


def _lock(fd: int, shared: bool) -> bool:
    """Lock the descriptor; return False if the file system does not support this."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(_holder(fd)) from None
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _holder(fd: int) -> int | None:
    """Return the id of a process that holds a lock on the open file, if the kernel knows it."""
    found = os.fstat(fd)
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    try:
        with open("/proc/locks") as locks:
            for line in locks:
                words = line.split()
                if "FLOCK" in words and device in words and "->" not in words:
                    return int(words[words.index(device) - 1])
    except (OSError, ValueError):
        pass
    return None
