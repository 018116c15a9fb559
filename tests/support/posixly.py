"""What the tests of POSIX behaviour share: errnos, system calls, small looks at files."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusestore.format import acl
from fusestore.format.acl import Entry, Tag

KIB, MIB = 1 << 10, 1 << 20
ALICE, BOB, TEAM, CREW = 12001, 12002, 13001, 13002

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
AT_FDCWD = -100

libc = ctypes.CDLL(None, use_errno=True)


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """The block must end with an OSError of one of the errnos."""
    with pytest.raises(OSError) as caught:
        yield
    names = [errno.errorcode[number] for number in numbers]
    assert errno.errorcode[caught.value.errno or 0] in names


def renameat2(source: Path | str, target: Path | str, flags: int) -> None:
    done = libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags)
    if done:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def opened(path: Path | str, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def mode_of(path: Path | str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def names_in(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def tick() -> None:
    """Wait until the kernel's coarse clock has moved."""
    time.sleep(0.02)


def owned_by_alice(path: Path, mode: int) -> None:
    path.write_bytes(b"#!/bin/sh\n")
    os.chown(path, ALICE, TEAM)
    path.chmod(mode)


ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def for_alice(permission: int, other: int = 0, group: int = 4) -> bytes:
    """An ACL that gives Alice `permission`."""
    return acl.format(
        (
            Entry(Tag.USER_OBJ, 6),
            Entry(Tag.USER, permission, ALICE),
            Entry(Tag.GROUP_OBJ, group),
            Entry(Tag.MASK, permission | group),
            Entry(Tag.OTHER, other),
        )
    )


def fresh(path: Path) -> os.stat_result:
    """A file's attributes as the file system has them."""
    with opened(path, os.O_PATH) as fd:
        return os.fstat(fd)


def make(path: Path, kind: str) -> None:
    """Make something of the kind that a test's table names."""
    if kind == "file":
        path.write_bytes(path.name.encode())
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind in ("empty", "full"):
        path.mkdir()
        if kind == "full":
            (path / "entry").touch()
    else:
        assert kind == "nothing"


def read_uncached(path: Path | str) -> bytes:
    """The bytes of a file, asked of the file system itself (O_DIRECT), not of the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    parts = []
    try:
        with mmap.mmap(-1, 1 << 20) as buffer:
            while got := os.readv(fd, [buffer]):
                parts.append(buffer[:got])
    finally:
        os.close(fd)
    return b"".join(parts)
