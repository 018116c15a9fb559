"""Linux system calls that Python's os module does not offer."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from cffi import FFI

_ffi = FFI()
_ffi.cdef(
    """
    int fallocate(int fd, int mode, int64_t offset, int64_t length);
    struct statfs { long type; char rest[248]; };
    int fstatfs(int fd, struct statfs *found);
    int mallopt(int parameter, int value);
    int malloc_trim(size_t pad);
    int mount(const char *source, const char *target, const char *type, unsigned long flags,
              const void *data);
    """
)
_libc = _ffi.dlopen(None)
_unwinder: object = None

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1
_KEPT_BYTES = 32 << 20
"""Free memory at the end of the heap that is not returned to the kernel."""
_REMOUNT = 32
_LOCAL = {
    *(0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E),
    *(0x01021994, 0x858458F6, 0x794C7630, 0x3153464A, 0x52654973, 0x3434),
    *(0x4D44, 0x2011BAB0, 0x7366746E),
}
"""The types of file systems whose files no other machine writes: ext4, XFS, Btrfs, F2FS, ZFS,
bcachefs, tmpfs, ramfs, overlayfs, JFS, ReiserFS, NILFS, FAT, exFAT, NTFS."""


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(descriptor, mode, offset, length) != 0:
        raise OSError(_ffi.errno, os.strerror(_ffi.errno))


def allocate(descriptor: int, offset: int, length: int) -> None:
    """Reserve room for `length` bytes at `offset` without changing the file's size."""
    _fallocate(descriptor, _KEEP_SIZE, offset, length)


def process_name(pid: int) -> str:
    """Return the name of a process, as `ps -o comm` does; empty if it cannot be read."""
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def keep_one_heap() -> None:
    """Make all threads allocate from one heap, which keeps a little of its free memory.

    Separate heaps keep their peak sizes.
    """
    with contextlib.suppress(AttributeError):  # only glibc has several heaps
        _libc.mallopt(_ARENA_MAX, 1)
        # Or a copy of the data of each write may be in memory that the kernel must clear first.
        _libc.mallopt(_MMAP_THRESHOLD, _KEPT_BYTES // 4)
        _libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def return_memory() -> None:
    """Return free memory of the heap to the kernel."""
    with contextlib.suppress(AttributeError):  # only glibc keeps much of it
        _libc.malloc_trim(0)


def load_unwinder() -> None:
    """Load what glibc needs when a thread ends, and aborts without, before memory is short."""
    global _unwinder
    with contextlib.suppress(OSError):
        _unwinder = _unwinder or _ffi.dlopen("libgcc_s.so.1")


def is_local(descriptor: int) -> bool:
    """Return whether an open file is known to lie where only this kernel writes."""
    found = _ffi.new("struct statfs *")
    return bool(_libc.fstatfs(descriptor, found) == 0 and found.type & 0xFFFFFFFF in _LOCAL)


def remount(mountpoint: Path, flags: int) -> None:
    """Give a mount other flags: MS_RDONLY and so on, see mount(2); OSError."""
    if _libc.mount(_ffi.NULL, os.fsencode(mountpoint), _ffi.NULL, _REMOUNT | flags, _ffi.NULL):
        raise OSError(_ffi.errno, os.strerror(_ffi.errno))


def gives_holes(descriptor: int) -> bool:
    """Return whether the file system of an empty file that is open for writing makes holes."""
    try:
        punch_hole(descriptor, 0, 4096)
    except OSError as error:
        return error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS)
    return True


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Release the whole blocks in a range; the range then reads as zeros."""
    _fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
