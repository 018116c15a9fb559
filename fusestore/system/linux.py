"""Linux system calls that Python's os module does not offer."""

from __future__ import annotations

import contextlib
import os

from cffi import FFI

_ffi = FFI()
_ffi.cdef(
    """
    int fallocate(int fd, int mode, int64_t offset, int64_t length);
    struct statx { uint32_t mask, block_size; uint64_t attributes; uint32_t links;
                   char rest[236]; };
    int mallopt(int parameter, int value);
    int statx(int folder, const char *path, int flags, unsigned int mask, struct statx *found);
    """
)
_libc = _ffi.dlopen(None)

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_ARENA_MAX = -8
_EMPTY_PATH, _DONT_SYNC, _LINKS = 0x1000, 0x4000, 4


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(descriptor, mode, offset, length) != 0:
        raise OSError(_ffi.errno, os.strerror(_ffi.errno))


def allocate(descriptor: int, offset: int, length: int) -> None:
    """Reserve room for `length` bytes at `offset` without changing the file's size."""
    _fallocate(descriptor, _KEEP_SIZE, offset, length)


def keep_one_heap() -> None:
    """Make all threads allocate from one heap: separate heaps keep their peak sizes."""
    with contextlib.suppress(AttributeError):  # only glibc has several heaps
        _libc.mallopt(_ARENA_MAX, 1)


def is_linked(descriptor: int) -> bool:
    """Return whether an open file still has a name, without a request to its device or server."""
    found = _ffi.new("struct statx *")
    flags = _EMPTY_PATH | _DONT_SYNC
    return bool(_libc.statx(descriptor, b"", flags, _LINKS, found) == 0 and found.links)


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Release the whole blocks in a range; the range then reads as zeros."""
    _fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
