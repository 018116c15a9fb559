"""Extended attributes and times of a mounted store are those of POSIX.

With `--plain` the same tests run on a plain directory, which shows that they
ask for what the kernel's own file systems give.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.mounted_store import Directory, Store
from support.posixly import (
    ALICE,
    AT_FDCWD,
    BOB,
    KIB,
    Timespec,
    fresh,
    libc,
    opened,
    owned_by_alice,
    refused,
    tick,
)
from support.processes import as_user

pytestmark = pytest.mark.mounted


# --- extended attributes -----------------------------------------------------


@pytest.mark.parametrize("name", ["user.colour", "trusted.colour", "security.colour"])
def test_attributes_are_kept(shared_mount: Path, name: str) -> None:
    for path in (shared_mount / "file", shared_mount / "directory"):
        path.mkdir() if path.name == "directory" else path.touch()
        with refused(errno.ENODATA):
            os.getxattr(path, name)
        for value in (b"red", b"", bytes(range(256)), b"blue" * 500):
            os.setxattr(path, name, value)
            assert os.getxattr(path, name) == value
        assert os.listxattr(path) == [name]
        os.removexattr(path, name)
        assert os.listxattr(path) == []
        with refused(errno.ENODATA):
            os.removexattr(path, name)


@pytest.mark.parametrize("name", ["user.", "trusted.", "security."])
def test_a_namespace_alone_is_no_name(shared_mount: Path, name: str) -> None:
    path = shared_mount / "file"
    path.touch()
    for attempt in (
        lambda: os.setxattr(path, name, b"1"),
        lambda: os.getxattr(path, name),
        lambda: os.removexattr(path, name),
    ):
        with refused(errno.EINVAL):
            attempt()
    assert os.listxattr(path) == []


def test_create_and_replace_do_what_they_say(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    with refused(errno.ENODATA):
        os.setxattr(path, "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    with refused(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    assert os.getxattr(path, "user.a") == b"1"
    os.setxattr(path, "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"3"


def test_a_short_buffer_is_told(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    os.setxattr(path, "user.a", b"0123456789")
    name, value = os.fsencode(path), ctypes.create_string_buffer(5)
    assert libc.getxattr(name, b"user.a", None, 0) == 10
    assert libc.getxattr(name, b"user.a", value, 5) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert libc.listxattr(name, None, 0) == len("user.a") + 1
    assert libc.listxattr(name, value, 5) == -1
    assert ctypes.get_errno() == errno.ERANGE


def test_attribute_names_have_up_to_255_bytes(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    name = b"user." + bytes(range(1, 251))
    os.setxattr(path, name, b"long")
    assert os.getxattr(path, name) == b"long"
    assert [os.fsencode(listed) for listed in os.listxattr(path)] == [name]
    with refused(errno.ERANGE):
        os.setxattr(path, name + b"x", b"longer")


@pytest.mark.not_plain
def test_attribute_values_have_up_to_64_kib(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    value = random.Random(1).randbytes(64 * KIB)
    os.setxattr(path, "user.large", value)
    assert os.getxattr(path, "user.large") == value
    with refused(errno.E2BIG):
        os.setxattr(path, "user.larger", value + b"x")
    assert os.listxattr(path) == ["user.large"]


@pytest.mark.not_plain
def test_the_attributes_of_an_inode_have_up_to_one_mib(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    value = bytes(64 * KIB)
    for number in range(15):
        os.setxattr(path, f"user.{number}", value)
    for number in (15, 16):
        with refused(errno.ENOSPC):
            os.setxattr(path, f"user.{number}", value)
    os.setxattr(path, "user.15", value[: 60 * KIB])
    with refused(errno.ENOSPC):
        os.setxattr(path, "user.15", value)
    os.setxattr(path, "user.15", b"short")
    os.removexattr(path, "user.3")
    os.setxattr(path, "user.17", value)
    for number in (0, 1, 17):
        os.setxattr(path, f"user.{number}", value)  # of the same length
    assert len(os.listxattr(path)) == 16


def test_many_attributes_are_listed_or_refused_in_time(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    names = [f"user.{number:0>240}" for number in range(300)]
    kept = []
    full = None
    for name in names:
        try:
            os.setxattr(path, name, b"")
        except OSError as error:
            full = error.errno
            break
        kept.append(name)
    assert full in (None, errno.ENOSPC, errno.E2BIG)
    assert kept
    assert sorted(os.listxattr(path)) == kept


def test_attributes_belong_to_the_inode(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    os.setxattr(path, "user.a", b"1")
    os.link(path, shared_mount / "other")
    os.rename(path, shared_mount / "third")
    assert os.getxattr(shared_mount / "other", "user.a") == b"1"
    os.setxattr(shared_mount / "other", "user.a", b"2")
    assert os.getxattr(shared_mount / "third", "user.a") == b"2"


def test_symbolic_links_and_fifos_take_no_user_attributes(shared_mount: Path) -> None:
    (shared_mount / "link").symlink_to("nowhere")
    os.mkfifo(shared_mount / "fifo")
    with refused(errno.EPERM):
        os.setxattr(shared_mount / "link", "user.a", b"1", follow_symlinks=False)
    with refused(errno.EPERM):
        os.setxattr(shared_mount / "fifo", "user.a", b"1")
    os.setxattr(shared_mount / "link", "trusted.a", b"1", follow_symlinks=False)
    assert os.getxattr(shared_mount / "link", "trusted.a", follow_symlinks=False) == b"1"


def test_only_the_superuser_sees_trusted_attributes(shared_mount: Path) -> None:
    owned_by_alice(shared_mount / "file", 0o644)
    os.setxattr(shared_mount / "file", "trusted.a", b"1")
    with refused(errno.ENODATA):
        as_user(shared_mount, ALICE, lambda: os.getxattr("file", "trusted.a"))
    with refused(errno.EPERM):
        as_user(shared_mount, ALICE, lambda: os.setxattr("file", "trusted.a", b"1"))


def test_there_are_no_other_namespaces(shared_mount: Path) -> None:
    (shared_mount / "file").touch()
    for name in ("colour", "other.colour", "system.colour"):
        with refused(errno.EOPNOTSUPP):
            os.setxattr(shared_mount / "file", name, b"1")
        with refused(errno.EOPNOTSUPP):
            os.getxattr(shared_mount / "file", name)
        with refused(errno.EOPNOTSUPP):
            os.removexattr(shared_mount / "file", name)


@pytest.mark.not_plain
def test_without_attributes_none_can_be_had_and_none_is_lost(
    make_store: Callable[..., Store],
) -> None:
    store = make_store()
    file = store.mountpoint / "file"
    store.mount()
    file.write_bytes(b"o" * 2000)
    os.setxattr(file, "user.colour", b"red")
    capability = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
    powers = {how: store.mountpoint / how for how in ("kept", "write", "cut", "empty", "give")}
    for path in powers.values():
        path.write_bytes(b"program")
        os.setxattr(path, "security.capability", capability)
    store.remount("noxattr", "writeback")
    with powers["write"].open("r+b") as program:
        program.write(b"P")
    os.truncate(powers["cut"], 3)
    powers["empty"].write_bytes(b"")
    os.chown(powers["give"], ALICE, ALICE)
    with refused(errno.ENOTSUP):
        os.getxattr(file, "user.colour")
    with refused(errno.ENOTSUP):
        os.setxattr(file, "user.colour", b"blue")
    with refused(errno.ENOTSUP):
        os.removexattr(file, "user.colour")
    with refused(errno.ENOTSUP):
        os.listxattr(file)
    for command in (
        ["inspect", file],
        ["policy", "get", file],
        ["policy", "set", store.mountpoint, "1+2"],
    ):
        done = store.cli(*command, check=False)
        assert done.returncode == 2
        assert "mount the store without this option" in done.stderr
    with file.open("r+b", buffering=0) as opened_file:
        for _ in range(1000):
            opened_file.write(b"n")
    store.remount()
    assert file.read_bytes() == b"n" * 1000 + b"o" * 1000
    assert os.getxattr(file, "user.colour") == b"red"
    assert [how for how in powers if os.listxattr(powers[how])] == ["kept"]


# --- times -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("atime", "mtime"),
    [
        (0, 1),
        (1_234_567_890_123_456_789, 987_654_321_987_654_321),
        (2**31 * 10**9 + 1, 2**33 * 10**9 + 999_999_999),
        (-1, -(10**9) * 86_400 * 365 - 1),
    ],
)
def test_times_are_kept_to_the_nanosecond(
    mounted: Store | Directory, atime: int, mtime: int
) -> None:
    top = mounted.mountpoint
    (top / "file").touch()
    (top / "directory").mkdir()
    (top / "link").symlink_to("file")
    for name in ("file", "directory", "link"):
        os.utime(top / name, ns=(atime, mtime), follow_symlinks=False)
    mounted.remount()
    for name in ("file", "directory", "link"):
        found = os.lstat(top / name)
        assert (found.st_atime_ns, found.st_mtime_ns) == (atime, mtime)


def test_one_time_can_be_left_alone_or_set_to_now(shared_mount: Path) -> None:
    now, omit = (1 << 30) - 1, (1 << 30) - 2
    path = shared_mount / "file"
    path.touch()
    os.utime(path, ns=(5, 7))
    for atime, mtime in (((0, omit), (11, 13)), ((0, omit), (0, now))):
        times = (Timespec * 2)(Timespec(*atime), Timespec(*mtime))
        assert libc.utimensat(AT_FDCWD, os.fsencode(path), times, 0) == 0
        found = path.stat()
        assert found.st_atime_ns == 5
        if mtime == (11, 13):
            assert found.st_mtime_ns == 11 * 10**9 + 13
        else:
            assert abs(found.st_mtime_ns - time.time_ns()) < 10 * 10**9


def test_who_may_write_may_touch_but_not_date_back(shared_mount: Path) -> None:
    owned_by_alice(shared_mount / "file", 0o666)
    as_user(shared_mount, BOB, lambda: os.utime("file"))
    with refused(errno.EPERM):
        as_user(shared_mount, BOB, lambda: os.utime("file", ns=(1, 1)))
    (shared_mount / "file").chmod(0o644)
    with refused(errno.EACCES):
        as_user(shared_mount, BOB, lambda: os.utime("file"))


def append_a_byte(path: Path) -> None:
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"x")


FILE_CHANGES: dict[str, tuple[Callable[[Path], object], bool, bool]] = {
    # name: (what is done, whether mtime moves, whether ctime moves)
    "write": (append_a_byte, True, True),
    "truncate": (lambda path: os.truncate(path, 1), True, True),
    "truncate to the same size": (lambda path: os.truncate(path, 4), True, True),
    "chmod": (lambda path: os.chmod(path, 0o600), False, True),
    "chown": (lambda path: os.chown(path, ALICE, -1), False, True),
    "link": (lambda path: os.link(path, path.with_name("second")), False, True),
    "rename": (lambda path: os.rename(path, path.with_name("file2")), False, True),
    "setxattr": (lambda path: os.setxattr(path, "user.a", b"1"), False, True),
    "utime": (lambda path: os.utime(path, ns=(1, 2)), True, True),
    "read": (lambda path: path.read_bytes(), False, False),
}


@pytest.mark.parametrize(
    ("change", "mtime", "ctime"), FILE_CHANGES.values(), ids=FILE_CHANGES.keys()
)
def test_a_change_of_a_file_moves_its_times(
    shared_mount: Path, change: Callable[[Path], object], mtime: bool, ctime: bool
) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"four")
    before = fresh(path)
    tick()
    change(path)
    after = fresh(path if path.exists() else path.with_name("file2"))
    assert (after.st_mtime_ns != before.st_mtime_ns) is mtime
    assert (after.st_ctime_ns > before.st_ctime_ns) is ctime


DIRECTORY_CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda path: (path / "new").touch(),
    "mkdir": lambda path: (path / "new").mkdir(),
    "symlink": lambda path: (path / "new").symlink_to("x"),
    "link": lambda path: os.link(path / "file", path / "new"),
    "unlink": lambda path: os.unlink(path / "file"),
    "rmdir": lambda path: os.rmdir(path / "directory"),
    "rename within": lambda path: os.rename(path / "file", path / "new"),
    "rename out of it": lambda path: os.rename(path / "file", path.with_name("outside")),
    "rename into it": lambda path: os.rename(path.with_name("beside"), path / "new"),
}


@pytest.mark.parametrize("change", DIRECTORY_CHANGES.values(), ids=DIRECTORY_CHANGES.keys())
def test_a_change_in_a_directory_moves_its_times(
    shared_mount: Path, change: Callable[[Path], object]
) -> None:
    path = shared_mount / "top"
    path.mkdir()
    (path / "file").touch()
    (path / "directory").mkdir()
    (shared_mount / "beside").touch()
    before = fresh(path)
    tick()
    change(path)
    after = fresh(path)
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns
