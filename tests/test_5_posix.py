"""A mounted store is a file system as POSIX programs know it.

With `--plain` the same tests run on a plain directory, which shows that they
ask for what the kernel's own file systems give.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import shutil
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Directory, Store, as_user, in_child, read_uncached

from fusestore import acl
from fusestore.acl import Entry, Tag

pytestmark = pytest.mark.mounted

KIB, MIB = 1 << 10, 1 << 20
ALICE, BOB, TEAM, CREW = 12001, 12002, 13001, 13002

NOREPLACE, EXCHANGE = 1, 2
AT_FDCWD = -100

libc = ctypes.CDLL(None, use_errno=True)


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


# --- types -------------------------------------------------------------------


def test_each_type_of_file_is_what_it_was_made_as(shared_mount: Path) -> None:
    (shared_mount / "file").write_bytes(b"x")
    (shared_mount / "directory").mkdir()
    (shared_mount / "link").symlink_to("file")
    os.mkfifo(shared_mount / "fifo", 0o640)
    os.mknod(shared_mount / "node", stat.S_IFREG | 0o600)
    os.mknod(shared_mount / "char", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(shared_mount / "block", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    types = {entry.name: stat.S_IFMT(os.lstat(entry).st_mode) for entry in os.scandir(shared_mount)}
    assert types == {
        "file": stat.S_IFREG,
        "directory": stat.S_IFDIR,
        "link": stat.S_IFLNK,
        "fifo": stat.S_IFIFO,
        "node": stat.S_IFREG,
        "char": stat.S_IFCHR,
        "block": stat.S_IFBLK,
    }
    assert os.stat(shared_mount / "char").st_rdev == os.makedev(1, 3)
    assert os.stat(shared_mount / "block").st_rdev == os.makedev(259, 70_000)


def test_directory_entries_tell_their_type(shared_mount: Path) -> None:
    (shared_mount / "directory").mkdir()
    (shared_mount / "file").touch()
    (shared_mount / "link").symlink_to("file")
    with os.scandir(shared_mount) as entries:
        found = {
            e.name: (e.is_dir(follow_symlinks=False), e.is_symlink(), e.inode()) for e in entries
        }
    for name, (is_directory, is_link, inode) in found.items():
        assert (is_directory, is_link) == (name == "directory", name == "link")
        assert inode == os.lstat(shared_mount / name).st_ino


def test_a_fifo_carries_bytes_between_processes(shared_mount: Path) -> None:
    os.mkfifo(shared_mount / "fifo")
    with subprocess.Popen(["cat", shared_mount / "fifo"], stdout=subprocess.PIPE) as reader:
        (shared_mount / "fifo").write_bytes(b"through the fifo")
        assert reader.stdout is not None
        assert reader.stdout.read() == b"through the fifo"


def test_a_socket_can_be_bound_and_reached(
    shared_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared_mount)  # a socket's path may have 107 bytes
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        assert stat.S_ISSOCK(os.lstat("socket").st_mode)
        client.connect("socket")
        peer, _ = server.accept()
        with peer:
            client.sendall(b"hello")
            assert peer.recv(5) == b"hello"


# --- modes and owners --------------------------------------------------------


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o755, 0o4755, 0o2755, 0o6777, 0o1777])
def test_chmod_sets_every_bit(shared_mount: Path, mode: int) -> None:
    for path in (shared_mount / "file", shared_mount / "directory"):
        path.mkdir() if path.name == "directory" else path.touch()
        path.chmod(mode)
        assert mode_of(path) == mode


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_the_umask_is_taken_off(shared_mount: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with opened(shared_mount / "file", os.O_CREAT | os.O_WRONLY, 0o666):
            pass
        os.mkdir(shared_mount / "directory", 0o777)
        os.mkfifo(shared_mount / "fifo", 0o666)
    finally:
        os.umask(before)
    assert mode_of(shared_mount / "file") == 0o666 & ~umask
    assert mode_of(shared_mount / "directory") == 0o777 & ~umask
    assert mode_of(shared_mount / "fifo") == 0o666 & ~umask


def test_set_id_and_sticky_bits_can_be_asked_for_at_creation(shared_mount: Path) -> None:
    with opened(shared_mount / "file", os.O_CREAT | os.O_WRONLY, 0o6755):
        pass
    os.mkdir(shared_mount / "directory", 0o1777)
    assert mode_of(shared_mount / "file") == 0o6755
    assert mode_of(shared_mount / "directory") == 0o1755


def test_a_file_opened_for_writing_stays_so_whatever_its_mode(shared_mount: Path) -> None:
    shared_mount.chmod(0o777)

    def body() -> None:
        with opened("file", os.O_CREAT | os.O_RDWR, 0o000) as fd:
            os.write(fd, b"mine")
            assert os.pread(fd, 10, 0) == b"mine"

    as_user(shared_mount, ALICE, body)
    assert mode_of(shared_mount / "file") == 0


def test_new_files_belong_to_who_makes_them(shared_mount: Path) -> None:
    shared_mount.chmod(0o777)

    def body() -> None:
        Path("file").touch()
        Path("directory").mkdir()
        os.symlink("file", "link")
        os.mkfifo("fifo")

    as_user(shared_mount, ALICE, body, gid=TEAM)
    for name in ("file", "directory", "link", "fifo"):
        found = os.lstat(shared_mount / name)
        assert (found.st_uid, found.st_gid) == (ALICE, TEAM)


def test_chown_changes_each_or_both(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    os.chown(path, ALICE, TEAM)
    assert (path.stat().st_uid, path.stat().st_gid) == (ALICE, TEAM)
    os.chown(path, BOB, -1)
    assert (path.stat().st_uid, path.stat().st_gid) == (BOB, TEAM)
    os.chown(path, -1, CREW)
    assert (path.stat().st_uid, path.stat().st_gid) == (BOB, CREW)
    os.chown(path, 0xFFFF_FFFE, 0xFFFF_FFFE)
    assert (path.stat().st_uid, path.stat().st_gid) == (0xFFFF_FFFE, 0xFFFF_FFFE)


def test_lchown_changes_the_link(shared_mount: Path) -> None:
    (shared_mount / "file").touch()
    (shared_mount / "link").symlink_to("file")
    os.lchown(shared_mount / "link", ALICE, TEAM)
    assert os.lstat(shared_mount / "link").st_uid == ALICE
    assert os.stat(shared_mount / "link").st_uid == 0


def test_others_may_not_chmod_or_chown(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    os.chown(path, ALICE, TEAM)
    with refused(errno.EPERM):
        as_user(shared_mount, BOB, lambda: os.chmod("file", 0o777))
    with refused(errno.EPERM):
        as_user(shared_mount, BOB, lambda: os.chown("file", BOB, -1))
    with refused(errno.EPERM):
        as_user(shared_mount, ALICE, lambda: os.chown("file", BOB, -1))
    with refused(errno.EPERM):
        as_user(shared_mount, ALICE, lambda: os.chown("file", -1, CREW), gid=TEAM)


def test_an_owner_may_give_a_file_to_a_group_of_his(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    os.chown(path, ALICE, TEAM)
    as_user(shared_mount, ALICE, lambda: os.chown("file", -1, CREW), gid=TEAM, groups=[CREW])
    assert path.stat().st_gid == CREW


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "groups", "allowed"),
    [
        (0o600, ALICE, ALICE, [], True),
        (0o600, BOB, BOB, [TEAM], False),
        (0o060, BOB, TEAM, [], True),
        (0o060, BOB, BOB, [CREW, TEAM], True),
        (0o060, ALICE, TEAM, [], False),
        (0o060, BOB, BOB, [CREW], False),
        (0o006, BOB, BOB, [], True),
        (0o006, BOB, BOB, [TEAM], False),
    ],
)
def test_the_mode_decides_who_may(
    shared_mount: Path, mode: int, uid: int, gid: int, groups: list[int], allowed: bool
) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"secret")
    os.chown(path, ALICE, TEAM)
    path.chmod(mode)

    def body() -> bytes:
        with opened("file", os.O_RDWR) as fd:
            return os.read(fd, 10)

    if allowed:
        assert as_user(shared_mount, uid, body, gid=gid, groups=groups) == b"secret"
    else:
        with refused(errno.EACCES):
            as_user(shared_mount, uid, body, gid=gid, groups=groups)


def test_a_closed_directory_hides_what_is_below(shared_mount: Path) -> None:
    below = shared_mount / "closed"
    below.mkdir()
    (below / "file").write_bytes(b"x")
    below.chmod(0o700)
    with refused(errno.EACCES):
        as_user(shared_mount, ALICE, lambda: Path("closed/file").read_bytes())
    below.chmod(0o711)
    assert as_user(shared_mount, ALICE, lambda: Path("closed/file").read_bytes()) == b"x"
    with refused(errno.EACCES):
        as_user(shared_mount, ALICE, lambda: os.listdir("closed"))
    below.chmod(0o744)
    with refused(errno.EACCES):
        as_user(shared_mount, ALICE, lambda: Path("closed/file").read_bytes())


def test_a_sticky_directory_keeps_others_files(shared_mount: Path) -> None:
    sticky = shared_mount / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    as_user(sticky, ALICE, lambda: Path("hers").touch())
    as_user(sticky, BOB, lambda: Path("his").touch())
    with refused(errno.EPERM):
        as_user(sticky, BOB, lambda: os.unlink("hers"))
    with refused(errno.EPERM):
        as_user(sticky, BOB, lambda: os.rename("hers", "stolen"))
    with refused(errno.EPERM):
        as_user(sticky, BOB, lambda: os.rename("his", "hers"))
    as_user(sticky, ALICE, lambda: os.unlink("hers"))
    assert names_in(sticky) == ["his"]


def test_a_setgid_directory_hands_its_group_down(shared_mount: Path) -> None:
    top = shared_mount / "top"
    top.mkdir()
    os.chown(top, 0, TEAM)
    top.chmod(0o2777)

    def body() -> None:
        Path("file").touch()
        Path("directory").mkdir()
        os.mkfifo("fifo")
        os.symlink("file", "link")

    as_user(top, ALICE, body)
    assert {os.lstat(top / name).st_gid for name in os.listdir(top)} == {TEAM}
    assert mode_of(top / "directory") & stat.S_ISGID
    assert not mode_of(top / "file") & stat.S_ISGID


# --- set-id bits -------------------------------------------------------------


def owned_by_alice(path: Path, mode: int) -> None:
    path.write_bytes(b"#!/bin/sh\n")
    os.chown(path, ALICE, TEAM)
    path.chmod(mode)


def write_a_byte() -> None:
    with opened("file", os.O_WRONLY) as fd:
        os.write(fd, b"!")


def write_a_byte_directly() -> None:
    with opened("file", os.O_WRONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4096) as page:
        os.write(fd, page)


def truncate_on_open() -> None:
    with opened("file", os.O_WRONLY | os.O_TRUNC):
        pass


CHANGES: dict[str, Callable[[], None]] = {
    "write": write_a_byte,
    "write with O_DIRECT": write_a_byte_directly,
    "truncate": lambda: os.truncate("file", 3),
    "O_TRUNC": truncate_on_open,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize(
    ("before", "after"), [(0o4777, 0o777), (0o2777, 0o777), (0o6777, 0o777), (0o777, 0o777)]
)
def test_set_id_bits_go_when_another_user_changes_the_bytes(
    shared_mount: Path, change: Callable[[], None], before: int, after: int
) -> None:
    owned_by_alice(shared_mount / "file", before)
    as_user(shared_mount, BOB, change)
    assert oct(mode_of(shared_mount / "file")) == oct(after)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_set_id_bits_stay_when_the_superuser_changes_the_bytes(
    shared_mount: Path, change: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    owned_by_alice(shared_mount / "file", 0o6755)
    monkeypatch.chdir(shared_mount)
    change()
    assert oct(mode_of(shared_mount / "file")) == oct(0o6755)


def test_set_id_bits_go_on_chown_by_the_owner(shared_mount: Path) -> None:
    owned_by_alice(shared_mount / "file", 0o6755)
    as_user(shared_mount, ALICE, lambda: os.chown("file", -1, CREW), gid=TEAM, groups=[CREW])
    assert oct(mode_of(shared_mount / "file")) == oct(0o755)


def test_set_id_bits_go_on_chown_by_the_superuser_too(shared_mount: Path) -> None:
    owned_by_alice(shared_mount / "file", 0o6755)
    os.chown(shared_mount / "file", BOB, CREW)
    assert oct(mode_of(shared_mount / "file")) == oct(0o755)


def test_setgid_goes_on_chmod_by_an_owner_outside_the_group(shared_mount: Path) -> None:
    owned_by_alice(shared_mount / "file", 0o755)
    as_user(shared_mount, ALICE, lambda: os.chmod("file", 0o2755))
    assert oct(mode_of(shared_mount / "file")) == oct(0o755)


def test_capabilities_go_when_the_bytes_change(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o777)
    net_raw = struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0)
    os.setxattr(path, "security.capability", net_raw)
    assert os.getxattr(path, "security.capability") == net_raw
    as_user(shared_mount, BOB, write_a_byte)
    with refused(errno.ENODATA):
        os.getxattr(path, "security.capability")


# --- ACLs --------------------------------------------------------------------

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


def test_an_acl_lets_in_whom_it_names(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"for Alice")
    os.setxattr(path, ACCESS, for_alice(6))
    assert os.getxattr(path, ACCESS) == for_alice(6)
    assert oct(mode_of(path)) == oct(0o660)
    assert as_user(shared_mount, ALICE, lambda: Path("file").read_bytes()) == b"for Alice"
    with refused(errno.EACCES):
        as_user(shared_mount, BOB, lambda: Path("file").read_bytes())


def test_chmod_changes_the_mask_of_an_acl(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"for Alice")
    os.setxattr(path, ACCESS, for_alice(6))
    path.chmod(0o600)
    assert os.getxattr(path, ACCESS) == acl.chmod(for_alice(6), 0o600)
    with refused(errno.EACCES):
        as_user(shared_mount, ALICE, lambda: Path("file").read_bytes())


def test_an_acl_that_says_no_more_than_the_mode_is_not_kept(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    os.setxattr(path, ACCESS, for_alice(6))
    plain = acl.format((Entry(Tag.USER_OBJ, 7), Entry(Tag.GROUP_OBJ, 1), Entry(Tag.OTHER, 4)))
    os.setxattr(path, ACCESS, plain)
    assert oct(mode_of(path)) == oct(0o714)
    with refused(errno.ENODATA):
        os.getxattr(path, ACCESS)


def test_removing_an_acl_leaves_the_mode(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()
    os.setxattr(path, ACCESS, for_alice(6))
    os.removexattr(path, ACCESS)
    assert oct(mode_of(path)) == oct(0o660)
    with refused(errno.ENODATA):
        os.getxattr(path, ACCESS)


def test_stored_acls_are_listed(shared_mount: Path) -> None:
    path = shared_mount / "directory"
    path.mkdir()
    os.setxattr(path, ACCESS, for_alice(6))
    os.setxattr(path, DEFAULT, for_alice(7))
    assert sorted(os.listxattr(path)) == [ACCESS, DEFAULT]


@pytest.mark.parametrize("mode", [0o666, 0o600, 0o777, 0o444])
def test_a_default_acl_is_inherited(shared_mount: Path, mode: int) -> None:
    top = shared_mount / "top"
    top.mkdir()
    default = for_alice(7, other=5, group=7)
    os.setxattr(top, DEFAULT, default)
    before = os.umask(0)
    try:
        with opened(top / "file", os.O_CREAT | os.O_WRONLY, mode):
            pass
        os.mkdir(top / "directory", mode)
        os.mkfifo(top / "fifo", mode)
        os.symlink("file", top / "link")
    finally:
        os.umask(before)
    for name, kind in (
        ("file", stat.S_IFREG),
        ("directory", stat.S_IFDIR),
        ("fifo", stat.S_IFIFO),
    ):
        full, access, below = acl.inherit(default, kind | mode, kind == stat.S_IFDIR)
        assert oct(os.lstat(top / name).st_mode) == oct(full)
        assert os.getxattr(top / name, ACCESS) == access
        if below is not None:
            assert os.getxattr(top / name, DEFAULT) == below
    assert as_user(shared_mount, ALICE, lambda: os.access("top/file", os.R_OK)) is bool(mode & 0o70)


def test_below_a_default_acl_no_more_is_granted_than_it_says(shared_mount: Path) -> None:
    top = shared_mount / "top"
    top.mkdir()
    default = for_alice(7, other=5, group=7)
    os.setxattr(top, DEFAULT, default)
    (top / "file").touch(0o666)
    most, _, _ = acl.inherit(default, 0o666, False)
    assert mode_of(top / "file") & ~most == 0
    permissions = {e.tag: e.permission for e in acl.parse(os.getxattr(top / "file", ACCESS))}
    assert permissions[Tag.USER] == 7
    assert mode_of(top / "file") >> 3 & 7 == permissions[Tag.MASK]


def test_a_default_acl_belongs_to_directories(shared_mount: Path) -> None:
    (shared_mount / "file").touch()
    with refused(errno.EACCES):
        os.setxattr(shared_mount / "file", DEFAULT, for_alice(7))


def test_an_ill_formed_acl_is_refused(shared_mount: Path) -> None:
    (shared_mount / "file").touch()
    with refused(errno.EINVAL):
        os.setxattr(shared_mount / "file", ACCESS, for_alice(7)[:-8])


def test_only_the_owner_sets_an_acl(shared_mount: Path) -> None:
    owned_by_alice(shared_mount / "file", 0o666)
    with refused(errno.EPERM):
        as_user(shared_mount, BOB, lambda: os.setxattr("file", ACCESS, for_alice(7)))
    as_user(shared_mount, ALICE, lambda: os.setxattr("file", ACCESS, for_alice(7)))


def test_cp_keeps_acls(shared_mount: Path) -> None:
    (shared_mount / "file").write_bytes(b"x")
    os.setxattr(shared_mount / "file", ACCESS, for_alice(6))
    subprocess.run(["cp", "-a", "file", "copy"], cwd=shared_mount, check=True)
    assert os.getxattr(shared_mount / "copy", ACCESS) == for_alice(6)


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


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


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


def fresh(path: Path) -> os.stat_result:
    """A file's attributes as the file system has them."""
    with opened(path, os.O_PATH) as fd:
        return os.fstat(fd)


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


# --- rename ------------------------------------------------------------------


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


RENAMES: list[tuple[str, str, int | None]] = [
    ("file", "nothing", None),
    ("file", "file", None),
    ("file", "link", None),
    ("link", "file", None),
    ("file", "empty", errno.EISDIR),
    ("link", "empty", errno.EISDIR),
    ("empty", "nothing", None),
    ("full", "nothing", None),
    ("empty", "empty", None),
    ("full", "empty", None),
    ("empty", "full", errno.ENOTEMPTY),
    ("full", "full", errno.ENOTEMPTY),
    ("full", "file", errno.ENOTDIR),
    ("empty", "link", errno.ENOTDIR),
    ("nothing", "nothing", errno.ENOENT),
    ("nothing", "file", errno.ENOENT),
]


@pytest.mark.parametrize("across", [False, True], ids=["within", "across"])
@pytest.mark.parametrize(("source", "target", "refusal"), RENAMES)
def test_rename(
    shared_mount: Path, source: str, target: str, refusal: int | None, across: bool
) -> None:
    first, second = shared_mount / "first", shared_mount / ("second" if across else "first")
    first.mkdir()
    second.mkdir(exist_ok=True)
    old, new = first / "old", second / "new"
    make(old, source)
    make(new, target)
    before = sorted(os.walk(shared_mount))
    if refusal is not None:
        with refused(refusal):
            os.rename(old, new)
        assert sorted(os.walk(shared_mount)) == before
        return
    inode = os.lstat(old).st_ino
    os.rename(old, new)
    assert not os.path.lexists(old)
    assert os.lstat(new).st_ino == inode
    if source == "full":
        assert names_in(new) == ["entry"]
    directories = int(source in ("empty", "full"))
    assert first.stat().st_nlink == 2 + (0 if across else directories)
    assert second.stat().st_nlink == 2 + directories


def test_a_directory_cannot_go_below_itself(shared_mount: Path) -> None:
    (shared_mount / "a/b/c").mkdir(parents=True)
    with refused(errno.EINVAL):
        os.rename(shared_mount / "a", shared_mount / "a/b/c/a")
    with refused(errno.EINVAL):
        os.rename(shared_mount / "a", shared_mount / "a/new")
    with refused(errno.ENOTEMPTY):
        os.rename(shared_mount / "a/b/c", shared_mount / "a")
    assert (shared_mount / "a/b/c").is_dir()


def test_renaming_one_link_over_another_does_nothing(shared_mount: Path) -> None:
    (shared_mount / "one").write_bytes(b"x")
    os.link(shared_mount / "one", shared_mount / "two")
    os.rename(shared_mount / "one", shared_mount / "two")
    assert names_in(shared_mount) == ["one", "two"]
    os.rename(shared_mount / "one", shared_mount / "one")
    assert names_in(shared_mount) == ["one", "two"]


def test_a_renamed_directory_finds_its_new_parent(shared_mount: Path) -> None:
    (shared_mount / "a/moved").mkdir(parents=True)
    (shared_mount / "b").mkdir()
    os.rename(shared_mount / "a/moved", shared_mount / "b/moved")
    assert os.stat(shared_mount / "b/moved/..").st_ino == (shared_mount / "b").stat().st_ino


def test_a_file_that_is_renamed_over_lives_on_for_who_has_it_open(shared_mount: Path) -> None:
    (shared_mount / "old").write_bytes(b"old")
    (shared_mount / "new").write_bytes(b"new")
    with opened(shared_mount / "new", os.O_RDWR) as fd:
        os.rename(shared_mount / "old", shared_mount / "new")
        assert os.pread(fd, 10, 0) == b"new"
        assert os.fstat(fd).st_nlink == 0
        os.pwrite(fd, b"NEW", 0)
        assert (shared_mount / "new").read_bytes() == b"old"


@pytest.mark.parametrize("target", ["file", "link", "empty", "full"])
@pytest.mark.parametrize("source", ["file", "full"])
def test_noreplace_replaces_nothing(shared_mount: Path, source: str, target: str) -> None:
    make(shared_mount / "old", source)
    make(shared_mount / "new", target)
    with refused(errno.EEXIST):
        renameat2(shared_mount / "old", shared_mount / "new", NOREPLACE)
    assert names_in(shared_mount) == ["new", "old"]
    renameat2(shared_mount / "old", shared_mount / "free", NOREPLACE)
    assert names_in(shared_mount) == ["free", "new"]


@pytest.mark.parametrize("second", ["file", "link", "empty", "full"])
@pytest.mark.parametrize("first", ["file", "link", "empty", "full"])
def test_exchange_swaps_anything(shared_mount: Path, first: str, second: str) -> None:
    a, b = shared_mount / "a", shared_mount / "b"
    a.mkdir()
    b.mkdir()
    make(a / "one", first)
    make(b / "two", second)
    inodes = os.lstat(a / "one").st_ino, os.lstat(b / "two").st_ino
    renameat2(a / "one", b / "two", EXCHANGE)
    assert (os.lstat(b / "two").st_ino, os.lstat(a / "one").st_ino) == inodes
    assert a.stat().st_nlink == 2 + (second in ("empty", "full"))
    assert b.stat().st_nlink == 2 + (first in ("empty", "full"))
    if first == "full":
        assert os.stat(b / "two/..").st_ino == b.stat().st_ino


def test_exchange_needs_two(shared_mount: Path) -> None:
    make(shared_mount / "one", "file")
    with refused(errno.ENOENT):
        renameat2(shared_mount / "one", shared_mount / "two", EXCHANGE)
    with refused(errno.ENOENT):
        renameat2(shared_mount / "two", shared_mount / "one", EXCHANGE)


def test_exchange_makes_no_loops(shared_mount: Path) -> None:
    (shared_mount / "a/b").mkdir(parents=True)
    make(shared_mount / "a/b/file", "file")
    with refused(errno.EINVAL):
        renameat2(shared_mount / "a", shared_mount / "a/b/file", EXCHANGE)
    with refused(errno.EINVAL):
        renameat2(shared_mount / "a/b/file", shared_mount / "a", EXCHANGE)


def test_contradictory_flags_are_refused(shared_mount: Path) -> None:
    make(shared_mount / "one", "file")
    make(shared_mount / "two", "file")
    for flags in (NOREPLACE | EXCHANGE, 1 << 10):
        with refused(errno.EINVAL):
            renameat2(shared_mount / "one", shared_mount / "two", flags)


# --- links -------------------------------------------------------------------


def test_hard_links_are_one_file(shared_mount: Path) -> None:
    one, two = shared_mount / "one", shared_mount / "directory/two"
    two.parent.mkdir()
    one.write_bytes(b"first")
    os.link(one, two)
    assert one.stat().st_ino == two.stat().st_ino
    assert one.stat().st_nlink == two.stat().st_nlink == 2
    two.write_bytes(b"second")
    assert one.read_bytes() == b"second"
    one.unlink()
    assert two.stat().st_nlink == 1
    assert two.read_bytes() == b"second"


def test_what_cannot_be_linked(shared_mount: Path) -> None:
    make(shared_mount / "file", "file")
    make(shared_mount / "directory", "empty")
    with refused(errno.EPERM):
        os.link(shared_mount / "directory", shared_mount / "new")
    with refused(errno.EEXIST):
        os.link(shared_mount / "file", shared_mount / "directory")
    with refused(errno.EEXIST):
        os.link(shared_mount / "file", shared_mount / "file")
    with refused(errno.ENOENT):
        os.link(shared_mount / "nothing", shared_mount / "new")


def test_every_type_but_directories_can_be_linked(shared_mount: Path) -> None:
    os.mkfifo(shared_mount / "fifo")
    make(shared_mount / "link", "link")
    os.link(shared_mount / "fifo", shared_mount / "fifo2")
    os.link(shared_mount / "link", shared_mount / "link2", follow_symlinks=False)
    assert os.lstat(shared_mount / "fifo2").st_nlink == 2
    assert os.readlink(shared_mount / "link2") == "nowhere"


@pytest.mark.long
def test_an_inode_has_65000_links(shared_mount: Path) -> None:
    (shared_mount / "0").touch()
    for number in range(1, 65_000):
        os.link(shared_mount / "0", shared_mount / str(number))
    with refused(errno.EMLINK):
        os.link(shared_mount / "0", shared_mount / "last")
    assert (shared_mount / "0").stat().st_nlink == 65_000
    os.unlink(shared_mount / "1")
    os.link(shared_mount / "0", shared_mount / "last")


def test_link_counts_of_directories_count_their_directories(shared_mount: Path) -> None:
    top = shared_mount / "top"
    top.mkdir()
    assert top.stat().st_nlink == 2
    for name in "abc":
        (top / name).mkdir()
    (top / "file").touch()
    assert top.stat().st_nlink == 5
    (top / "a").rmdir()
    os.rename(top / "b", shared_mount / "b")
    assert top.stat().st_nlink == 3
    (shared_mount / "empty").mkdir()
    os.rename(top / "c", shared_mount / "empty")
    assert top.stat().st_nlink == 2


@pytest.mark.parametrize("length", [1, 59, 60, 255, 1023, 4095])
def test_symbolic_links_keep_their_target(shared_mount: Path, length: int) -> None:
    target = random.Random(length).randbytes(length).replace(b"\0", b"/")
    os.symlink(target, os.fsencode(shared_mount / "link"))
    assert os.readlink(os.fsencode(shared_mount / "link")) == target
    assert os.lstat(shared_mount / "link").st_size == length


def test_a_target_of_4096_bytes_is_too_long(shared_mount: Path) -> None:
    with refused(errno.ENAMETOOLONG):
        os.symlink("x" * 4096, shared_mount / "link")


def test_symbolic_links_are_followed_and_loops_told(shared_mount: Path) -> None:
    (shared_mount / "directory").mkdir()
    (shared_mount / "directory/file").write_bytes(b"x")
    (shared_mount / "way").symlink_to("directory")
    (shared_mount / "one").symlink_to("two")
    (shared_mount / "two").symlink_to("one")
    assert (shared_mount / "way/file").read_bytes() == b"x"
    with refused(errno.ELOOP):
        (shared_mount / "one").read_bytes()
    with refused(errno.ELOOP):
        os.open(shared_mount / "way", os.O_RDONLY | os.O_NOFOLLOW)


# --- files without a name, directories without a place -----------------------


def test_an_unlinked_file_lives_while_it_is_open(shared_mount: Path) -> None:
    path = shared_mount / "file"
    data = random.Random(3).randbytes(3 * MIB + 17)
    path.write_bytes(data)
    with opened(path, os.O_RDWR) as fd:
        os.unlink(path)
        assert not path.exists()
        assert os.fstat(fd).st_nlink == 0
        assert os.fstat(fd).st_size == len(data)
        assert os.pread(fd, len(data), 0) == data
        os.pwrite(fd, b"more", len(data))
        os.fsync(fd)
        os.ftruncate(fd, 2 * MIB)
        os.fchmod(fd, 0o600)
        os.utime(fd, ns=(1, 2))
        os.setxattr(fd, "user.a", b"1")
        assert os.pread(fd, 4 * MIB, 0) == data[: 2 * MIB]
        assert os.getxattr(fd, "user.a") == b"1"
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
        path.write_bytes(b"a new one")
        assert os.pread(fd, 10, 0) == data[:10]
    assert path.read_bytes() == b"a new one"


def test_an_unlinked_file_is_shared_by_all_who_have_it_open(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"one")
    with opened(path, os.O_RDWR) as first, opened(path, os.O_RDWR) as second:
        os.unlink(path)
        os.pwrite(first, b"two", 0)
        assert os.pread(second, 10, 0) == b"two"


def test_the_space_of_an_unlinked_file_comes_back_on_close(shared_mount: Path) -> None:
    path = shared_mount / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.unlink(path)
        os.write(fd, bytes(MIB))
    assert names_in(shared_mount) == []


def test_a_removed_directory_is_empty_and_takes_nothing(shared_mount: Path) -> None:
    (shared_mount / "gone").mkdir()

    def body() -> None:
        os.chdir(shared_mount / "gone")
        os.rmdir(shared_mount / "gone")
        assert os.listdir(".") == []
        assert os.stat(".").st_nlink == 0
        with refused(errno.ENOENT):
            os.getcwd()
        with refused(errno.ENOENT):
            Path("file").touch()
        with refused(errno.ENOENT):
            Path("directory").mkdir()
        with refused(errno.ENOENT):
            os.symlink("x", "link")
        with refused(errno.ENOENT):
            os.link(shared_mount / "other", "link")
        with refused(errno.ENOENT):
            os.rename(shared_mount / "other", "file")

    (shared_mount / "other").touch()
    in_child(body)


def test_only_empty_directories_are_removed(shared_mount: Path) -> None:
    make(shared_mount / "full", "full")
    make(shared_mount / "file", "file")
    with refused(errno.ENOTEMPTY):
        os.rmdir(shared_mount / "full")
    with refused(errno.ENOTDIR):
        os.rmdir(shared_mount / "file")
    with refused(errno.EISDIR):
        os.unlink(shared_mount / "full")
    with refused(errno.ENOENT):
        os.rmdir(shared_mount / "nothing")
    with refused(errno.EINVAL):
        os.rmdir(f"{shared_mount}/full/.")
    with refused(errno.ENOTEMPTY):
        os.rmdir(f"{shared_mount}/full/..")


# --- opening -----------------------------------------------------------------


def test_excl_makes_a_file_only_once(shared_mount: Path) -> None:
    path = shared_mount / "file"
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    with opened(path, flags), refused(errno.EEXIST):
        os.open(path, flags)
    (shared_mount / "link").symlink_to("new")
    with refused(errno.EEXIST):
        os.open(shared_mount / "link", flags)


def test_excl_lets_one_of_many_win(shared_mount: Path) -> None:
    script = (
        "import os, sys\n"
        "won = 0\n"
        "for number in range(50):\n"
        "    try:\n"
        "        os.close(os.open(f'{sys.argv[1]}/{number}', os.O_CREAT | os.O_EXCL))\n"
        "        won += 1\n"
        "    except FileExistsError:\n"
        "        pass\n"
        "print(won)\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", script, shared_mount], stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    assert sum(int(worker.communicate()[0]) for worker in workers) == 50
    assert len(names_in(shared_mount)) == 50


def test_trunc_empties_a_file(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"a long line")
    tick()
    before = path.stat().st_mtime_ns
    with opened(path, os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
    assert path.read_bytes() == b""
    assert path.stat().st_mtime_ns > before
    path.write_bytes(b"short")
    assert path.read_bytes() == b"short"


def test_append_writes_at_the_end_whatever_the_position(shared_mount: Path) -> None:
    path = shared_mount / "file"
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as fd:
        os.write(fd, b"one")
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"two")
        os.pwrite(fd, b"three", 0)
        os.truncate(path, 8)
        os.write(fd, b"four")
    assert path.read_bytes() == b"onetwothfour"


def test_appending_processes_lose_nothing(shared_mount: Path) -> None:
    script = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        "for number in range(300):\n"
        "    os.write(fd, f'{sys.argv[2]}:{number:04}\\n'.encode())\n"
    )
    path = shared_mount / "log"
    path.touch()
    workers = [subprocess.Popen([sys.executable, "-c", script, path, name]) for name in "ab"]
    assert [worker.wait() for worker in workers] == [0, 0]
    lines = path.read_text().splitlines()
    for name in "ab":
        mine = [line for line in lines if line.startswith(name)]
        assert mine == [f"{name}:{number:04}" for number in range(300)]
    assert len(lines) == 600


def test_directories_cannot_be_written_to(shared_mount: Path) -> None:
    with refused(errno.EISDIR):
        os.open(shared_mount, os.O_WRONLY)
    with refused(errno.EISDIR):
        os.open(shared_mount, os.O_CREAT | os.O_RDONLY)
    with refused(errno.ENOTDIR):
        make(shared_mount / "file", "file")
        os.open(shared_mount / "file", os.O_DIRECTORY)
    with opened(shared_mount, os.O_RDONLY) as fd, refused(errno.EISDIR):
        os.read(fd, 1)


def test_a_missing_name_is_told(shared_mount: Path) -> None:
    make(shared_mount / "file", "file")
    with refused(errno.ENOENT):
        os.stat(shared_mount / "nothing")
    with refused(errno.ENOENT):
        os.open(shared_mount / "nothing", os.O_RDONLY)
    with refused(errno.ENOENT):
        (shared_mount / "nothing/file").touch()
    with refused(errno.ENOTDIR):
        os.stat(shared_mount / "file/below")
    with refused(errno.ENOENT):
        os.unlink(shared_mount / "nothing")
    (shared_mount / "nothing").touch()
    assert (shared_mount / "nothing").exists()


def test_descriptors_open_for_one_thing_do_no_other(shared_mount: Path) -> None:
    make(shared_mount / "file", "file")
    with opened(shared_mount / "file", os.O_RDONLY) as fd:
        with refused(errno.EBADF):
            os.write(fd, b"x")
        with refused(errno.EINVAL):
            os.ftruncate(fd, 0)
    with opened(shared_mount / "file", os.O_WRONLY) as fd, refused(errno.EBADF):
        os.read(fd, 1)


def test_a_file_written_and_never_closed_reads_back(shared_mount: Path) -> None:
    path = shared_mount / "file"
    with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"still open")
        assert path.read_bytes() == b"still open"
        assert read_uncached(path) == b"still open"


# --- bytes -------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "O_DIRECT"])
def test_random_writes_read_back(shared_mount: Path, direct: bool) -> None:
    randomness = random.Random(11)
    path = shared_mount / "file"
    expected = bytearray()
    grain = 4 * KIB if direct else 1
    with (
        opened(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)) as fd,
        mmap.mmap(-1, 2 * MIB) as buffer,
    ):
        for number in range(150):
            offset = randomness.randrange(6 * MIB // grain) * grain
            length = min(2 * MIB, grain + int(randomness.expovariate(1 / 60_000)) // grain * grain)
            buffer[:length] = randomness.randbytes(length)
            assert os.pwritev(fd, [memoryview(buffer)[:length]], offset) == length
            expected.extend(bytes(max(0, offset + length - len(expected))))
            expected[offset : offset + length] = buffer[:length]
            if number % 50 == 49:
                os.fsync(fd)
            if number % 10 == 9:
                assert read_uncached(path) == expected
    assert path.read_bytes() == expected


def test_reads_past_the_end_are_short(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"0123456789")
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 100, 4) == b"456789"
        assert os.pread(fd, 100, 10) == b""
        assert os.pread(fd, 100, 2**62) == b""
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4096) as page:
        assert os.preadv(fd, [page], 0) == 10
        assert os.preadv(fd, [page], 4096) == 0


def test_a_large_file_in_odd_pieces(shared_mount: Path) -> None:
    data = random.Random(12).randbytes(9 * MIB + 12_345)
    path = shared_mount / "file"
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 77_777):
            file.write(data[start : start + 77_777])
    assert path.read_bytes() == data
    assert read_uncached(path) == data
    shutil.copyfile(path, shared_mount / "copy")
    assert read_uncached(shared_mount / "copy") == data


def test_truncated_bytes_never_come_back(shared_mount: Path) -> None:
    path = shared_mount / "file"
    for size in (10, 5000, 100_000, 3 * MIB):
        path.write_bytes(b"\xff" * size)
        with opened(path, os.O_RDWR) as fd:
            os.fsync(fd)
        os.truncate(path, size // 3)
        os.truncate(path, size * 2)
        kept = size // 3
        assert path.read_bytes() == b"\xff" * kept + bytes(size * 2 - kept)
        assert read_uncached(path) == b"\xff" * kept + bytes(size * 2 - kept)
    os.truncate(path, 0)
    with opened(path, os.O_WRONLY) as fd:
        os.pwrite(fd, b"end", 50_000)
    assert read_uncached(path) == bytes(50_000) + b"end"


def test_holes_read_as_zeros_and_take_no_space(shared_mount: Path) -> None:
    path = shared_mount / "sparse"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 1 << 32)
        assert os.fstat(fd).st_blocks * 512 < MIB
        os.pwrite(fd, b"island", 3 << 30)
        os.fsync(fd)
        assert os.pread(fd, 100, (3 << 30) - 50) == bytes(50) + b"island" + bytes(44)
        assert os.pread(fd, MIB, 1 << 30) == bytes(MIB)
        assert 0 < os.fstat(fd).st_blocks * 512 < MIB
        assert os.fstat(fd).st_size == 1 << 32


def test_blocks_grow_and_shrink_with_the_bytes(shared_mount: Path) -> None:
    path = shared_mount / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, bytes(range(256)) * 4096 * 4, 0)
        os.fsync(fd)
        assert 4 * MIB <= fresh(path).st_blocks * 512 < 5 * MIB
        os.ftruncate(fd, MIB)
        os.fsync(fd)
        assert MIB <= fresh(path).st_blocks * 512 < 2 * MIB
        os.ftruncate(fd, 0)
        assert fresh(path).st_blocks == 0


@pytest.mark.not_plain
def test_files_have_up_to_2_to_the_63_bytes(mounted: Store) -> None:
    path = mounted.mountpoint / "huge"
    last = 2**63 - 2
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 2**63 - 1)
        assert os.fstat(fd).st_size == 2**63 - 1
        os.ftruncate(fd, 0)
        assert os.pwrite(fd, b"z", last) == 1
        assert os.fstat(fd).st_size == 2**63 - 1
        assert os.pread(fd, 1, last) == b"z"
        assert os.pread(fd, 10, 2**62) == bytes(10)
        os.pwrite(fd, b"middle", 2**40 + 1)
        with refused(errno.EFBIG, errno.EINVAL):
            os.pwrite(fd, b"x", 2**63 - 1)
        with refused(errno.EINVAL):
            os.ftruncate(fd, -1)
        with refused(errno.EINVAL):
            os.pwrite(fd, b"x", -1)
        os.fsync(fd)
    mounted.remount("allow_other")
    assert path.stat().st_size == 2**63 - 1
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 6, last - 5) == bytes(5) + b"z"
        assert os.pread(fd, 8, 2**40) == b"\0middle\0"


def test_negative_offsets_are_refused(shared_mount: Path) -> None:
    with opened(shared_mount / "file", os.O_RDWR | os.O_CREAT) as fd:
        with refused(errno.EINVAL):
            os.pwrite(fd, b"x", -1)
        with refused(errno.EINVAL):
            os.ftruncate(fd, -1)
    assert (shared_mount / "file").stat().st_size == 0


def test_the_file_size_limit_of_a_process_holds(shared_mount: Path) -> None:
    def body() -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with opened(shared_mount / "file", os.O_RDWR | os.O_CREAT) as fd:
            assert os.write(fd, bytes(8192)) == 5000
            with refused(errno.EFBIG):
                os.write(fd, b"x")
            with refused(errno.EFBIG):
                os.ftruncate(fd, 6000)

    in_child(body)
    assert (shared_mount / "file").stat().st_size == 5000


def test_posix_fallocate_makes_room(shared_mount: Path) -> None:
    path = shared_mount / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"kept", 0)
        os.posix_fallocate(fd, 0, 300_000)
    assert path.read_bytes() == b"kept" + bytes(299_996)


def test_data_and_holes_can_be_sought(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(b"x" * 10_000)
    with opened(path, os.O_RDONLY) as fd:
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 10_000
        with refused(errno.ENXIO):
            os.lseek(fd, 10_000, os.SEEK_DATA)


# --- mmap --------------------------------------------------------------------


def test_shared_maps_read_and_write_the_file(shared_mount: Path) -> None:
    path = shared_mount / "file"
    data = bytearray(random.Random(5).randbytes(2 * MIB + 100))
    path.write_bytes(data)
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, len(data)) as view:
        assert view[:] == data
        for place in (0, 4095, MIB - 1, 2 * MIB, len(data) - 1):
            view[place] = data[place] = 255 - data[place]
        assert os.pread(fd, len(data), 0) == data
        view.flush()
        os.pwrite(fd, b"by write", 5000)
        data[5000:5008] = b"by write"
        assert view[4990:5010] == data[4990:5010]
    assert path.read_bytes() == data
    assert read_uncached(path) == data


def test_a_map_outlives_its_descriptor_and_its_name(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(bytes(8192))
    os.link(path, shared_mount / "second")
    with opened(path, os.O_RDWR) as fd:
        view = mmap.mmap(fd, 8192)
    with view:
        os.unlink(path)
        view[100:103] = b"abc"
        view.flush()
    assert read_uncached(shared_mount / "second")[100:103] == b"abc"


def test_two_processes_share_a_map(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.write_bytes(bytes(4096))

    def body() -> None:
        with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 4096) as view:
            view[7] = 7

    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 4096) as view:
        in_child(body)
        assert view[7] == 7


def test_programs_run_from_the_mount(shared_mount: Path) -> None:
    shutil.copy("/bin/echo", shared_mount / "echo")
    done = subprocess.run([shared_mount / "echo", "hello"], capture_output=True, check=True)
    assert done.stdout == b"hello\n"


# --- locks -------------------------------------------------------------------


def test_locks_keep_processes_apart(shared_mount: Path) -> None:
    path = shared_mount / "file"
    path.touch()

    def taken(lock: Callable[[int, int], object]) -> bool:
        def body() -> bool:
            with opened(path, os.O_RDWR) as fd:
                try:
                    lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
                return False

        return in_child(body)

    for lock in (fcntl.flock, fcntl.lockf):
        with opened(path, os.O_RDWR) as fd:
            lock(fd, fcntl.LOCK_EX)
            assert taken(lock)
            lock(fd, fcntl.LOCK_UN)
            assert not taken(lock)


# --- names -------------------------------------------------------------------


def test_names_are_any_bytes_but_slash_and_nul(shared_mount: Path) -> None:
    top = os.fsencode(shared_mount)
    letters = bytes(set(range(256)) - {0, ord("/")})
    names = {letters[:127] + b"x", letters[127:], b"\xff" * 255, b" ", b"\n", b"...", b"-rf", b"*"}
    for name in names:
        with opened(os.path.join(top, name), os.O_CREAT | os.O_WRONLY) as fd:  # type: ignore[arg-type]
            os.write(fd, name)
    assert set(os.listdir(top)) == names
    for name in names:
        with open(os.path.join(top, name), "rb") as file:
            assert file.read() == name
        os.rename(os.path.join(top, name), os.path.join(top, name[:200] + b"2"))
    assert set(os.listdir(top)) == {name[:200] + b"2" for name in names}


def test_names_that_differ_in_one_bit_differ(shared_mount: Path) -> None:
    for name in ("name", "Name", "nam\u00e9", "name\u0301", "n\u00e4me", "na\u0308me"):
        (shared_mount / name).write_text(name)
    assert len(names_in(shared_mount)) == 6
    assert all((shared_mount / name).read_text() == name for name in names_in(shared_mount))


def test_names_have_up_to_255_bytes(shared_mount: Path) -> None:
    fits, long = "x" * 255, "x" * 256
    (shared_mount / fits).touch()
    (shared_mount / fits).rename(shared_mount / ("y" * 255))
    (shared_mount / fits).mkdir()
    for attempt in (
        (shared_mount / long).touch,
        (shared_mount / long).mkdir,
        lambda: (shared_mount / long).symlink_to("x"),
        lambda: os.mkfifo(shared_mount / long),
        lambda: os.link(shared_mount / ("y" * 255), shared_mount / long),
        lambda: os.rename(shared_mount / fits, shared_mount / long),
        lambda: os.stat(shared_mount / long),
        lambda: os.unlink(shared_mount / long),
    ):
        with refused(errno.ENAMETOOLONG):
            attempt()


def test_deep_trees(shared_mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared_mount)
    for _ in range(60):  # deeper than any one path can name
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    Path("bottom").write_bytes(b"deep")
    assert Path("bottom").read_bytes() == b"deep"
    os.chdir(shared_mount)
    shutil.rmtree("d" * 250)
    assert names_in(shared_mount) == []


# --- space -------------------------------------------------------------------


def test_statfs_is_plausible(shared_mount: Path) -> None:
    found = os.statvfs(shared_mount)
    assert found.f_namemax == 255
    assert found.f_bsize >= 512
    assert found.f_frsize >= 512
    assert 0 < found.f_bavail <= found.f_bfree <= found.f_blocks
    assert 0 < found.f_ffree <= found.f_files


@pytest.mark.not_plain
def test_statfs_counts_the_code_and_each_device_once(shared_mount: Path) -> None:
    below = os.statvfs("/tmp" if shared_mount.is_relative_to("/tmp") else shared_mount.parents[4])
    device = below.f_bavail * below.f_frsize
    found = os.statvfs(shared_mount)
    usable = found.f_bavail * found.f_frsize
    assert 0.55 * device < usable <= 0.68 * device


def test_statfs_shrinks_by_what_is_written(shared_mount: Path) -> None:
    def free() -> int:
        found = os.statvfs(shared_mount)
        return found.f_bfree * found.f_frsize

    taken = 0.0
    for attempt in range(4):  # others write to the same device
        before = free()
        with opened(shared_mount / f"file{attempt}", os.O_WRONLY | os.O_CREAT) as fd:
            for number in range(48):
                os.write(fd, random.Random(number).randbytes(MIB))
            os.fsync(fd)
        taken = (before - free()) / MIB
        if 40 <= taken <= 80:
            return
    pytest.fail(f"48 MiB took {taken:.1f} MiB of the free space")


# --- listing -----------------------------------------------------------------


def test_a_listing_has_each_stable_entry_once_while_others_come_and_go(
    shared_mount: Path,
) -> None:
    stable = {f"stable-{number:05}" for number in range(3000)}
    for number in range(3000):
        (shared_mount / f"stable-{number:05}").touch()
        (shared_mount / f"going-{number:05}").touch()
    seen = []
    with os.scandir(shared_mount) as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            if count < 3000:
                (shared_mount / f"coming-{count:05}").touch()
                os.unlink(shared_mount / f"going-{2999 - count:05}")
            if count > 20_000:
                break
    assert len(seen) == len(set(seen))
    assert {name for name in seen if name.startswith("stable")} == stable


def test_removing_what_is_listed_removes_all(shared_mount: Path) -> None:
    for number in range(2000):
        (shared_mount / str(number)).touch()
    with os.scandir(shared_mount) as entries:
        for entry in entries:
            os.unlink(entry)
    assert names_in(shared_mount) == []


class Dirent(ctypes.Structure):
    _fields_ = (
        ("ino", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("length", ctypes.c_ushort),
        ("type", ctypes.c_ubyte),
        ("name", ctypes.c_char * 256),
    )


libc.opendir.restype = ctypes.c_void_p
libc.readdir.restype = ctypes.POINTER(Dirent)
libc.readdir.argtypes = libc.telldir.argtypes = libc.closedir.argtypes = [ctypes.c_void_p]
libc.telldir.restype = ctypes.c_long
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


def test_a_place_in_a_listing_can_be_returned_to(shared_mount: Path) -> None:
    for number in range(500):
        (shared_mount / f"{number:03}").touch()
    stream = libc.opendir(os.fsencode(shared_mount))
    try:
        listing: list[tuple[int, bytes]] = []
        while True:
            place = libc.telldir(stream)
            entry = libc.readdir(stream)
            if not entry:
                break
            listing.append((place, entry.contents.name))
        assert len({name for _, name in listing}) == 502
        assert len({place for place, _ in listing}) == 502
        for place, name in random.Random(1).sample(listing, 100):
            libc.seekdir(stream, place)
            assert libc.readdir(stream).contents.name == name
        place, _ = listing[250]
        gone = {name for _, name in listing[252:260]}
        for name in gone - {b".", b".."}:
            os.unlink(os.fsencode(shared_mount) + b"/" + name)
        libc.seekdir(stream, place)
        rest = []
        while entry := libc.readdir(stream):
            rest.append(entry.contents.name)
        assert set(rest) == {name for _, name in listing[250:]} - gone
    finally:
        libc.closedir(stream)


def test_dot_and_dot_dot_are_listed(shared_mount: Path) -> None:
    (shared_mount / "below").mkdir()
    listing = subprocess.run(
        ["ls", "-aif", shared_mount / "below"], capture_output=True, check=True, text=True
    ).stdout
    found = {name: int(number) for number, name in (line.split() for line in listing.splitlines())}
    assert found == {
        ".": (shared_mount / "below").stat().st_ino,
        "..": shared_mount.stat().st_ino,
    }


@pytest.mark.parametrize(
    "count",
    [20_000, pytest.param(500_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])],
)
def test_a_large_directory_lists_right_and_in_linear_time(
    shared_mount: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared_mount)
    for number in range(count):
        os.mknod(f"{number:06}", stat.S_IFREG | 0o644)

    def seconds_to_list() -> float:
        start = time.perf_counter()
        names = os.listdir(".")
        taken = time.perf_counter() - start
        assert len(names) == count
        assert set(names) == {f"{number:06}" for number in range(count)}
        return taken

    assert seconds_to_list() < count / 2000
    for number in range(1, count, 2):
        os.unlink(f"{number:06}")
    names = os.listdir(".")
    assert sorted(names) == [f"{number:06}" for number in range(0, count, 2)]
    for number in range(0, count, 2):
        os.unlink(f"{number:06}")
    assert os.listdir(".") == []


# --- remount -----------------------------------------------------------------


def snapshot(top: Path) -> dict[str, tuple[object, ...]]:
    """All that a tree shows: attributes, targets, bytes, extended attributes."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(top):
        for name in [".", *directories, *files]:
            path = os.path.join(directory, name)
            s = os.lstat(path)
            content: object = None
            if stat.S_ISLNK(s.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(s.st_mode):
                content = Path(path).read_bytes()
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            }
            found[path] = (
                *(s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_rdev, s.st_size),
                *(s.st_mtime_ns, s.st_ctime_ns, s.st_blocks, content, attributes),
            )
    return found


def test_a_remount_keeps_everything(mounted: Store | Directory) -> None:
    top = mounted.mountpoint / "tree"
    (top / "a/b").mkdir(parents=True)
    (top / "a/file").write_bytes(random.Random(1).randbytes(2 * MIB + 5))
    (top / "a/small").write_bytes(b"small")
    (top / "a/empty").touch()
    os.link(top / "a/file", top / "a/b/linked")
    os.symlink("../nowhere/" + "x" * 200, top / "a/link")
    os.mkfifo(top / "fifo")
    os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(10, 200))
    os.chown(top / "a/small", ALICE, TEAM)
    os.chmod(top / "a/small", 0o6711)
    os.chmod(top / "a/b", 0o1755)
    os.setxattr(top / "a/small", "user.colour", b"red")
    os.setxattr(top / "a", DEFAULT, for_alice(7))
    os.setxattr(top / "a/empty", ACCESS, for_alice(6))
    os.utime(top / "a/small", ns=(1, 1_234_567_890_123_456_789))
    os.truncate(top / "a/empty", 10 * MIB)
    with opened(top / "a/file", os.O_WRONLY) as fd:
        os.pwrite(fd, b"overwritten", MIB - 5)
    before = snapshot(top)
    for _ in range(2):
        mounted.remount("allow_other")
        assert snapshot(top) == before


@pytest.mark.not_plain
def test_a_read_only_mount_changes_nothing(mounted: Store) -> None:
    (mounted.mountpoint / "file").write_bytes(b"kept")
    mounted.remount("ro")
    assert (mounted.mountpoint / "file").read_bytes() == b"kept"
    for attempt in (
        lambda: (mounted.mountpoint / "file").write_bytes(b"x"),
        (mounted.mountpoint / "new").touch,
        lambda: os.unlink(mounted.mountpoint / "file"),
        lambda: os.chmod(mounted.mountpoint / "file", 0o600),
    ):
        with refused(errno.EROFS):
            attempt()


@pytest.mark.not_plain
@pytest.mark.parametrize("option", ["nosuid", "nodev", "noexec", "noatime"])
def test_mount_options_reach_the_kernel(make_store: Callable[..., Store], option: str) -> None:
    store = make_store()
    store.mount(option)
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    (line,) = (line for line in lines if line.split()[4] == str(store.mountpoint))
    assert option in line.split()[5].split(",")


@pytest.mark.not_plain
def test_virtual_attributes_answer_and_are_not_listed(shared_mount: Path) -> None:
    (shared_mount / "file").write_bytes(b"x")
    assert b'"size"' in os.getxattr(shared_mount / "file", "user.fusestore.layout")
    assert os.getxattr(shared_mount, "user.fusestore.code") == b"2+1"
    assert os.listxattr(shared_mount / "file") == []
    assert os.listxattr(shared_mount) == []


@pytest.mark.not_plain
def test_a_directorys_code_is_inherited(shared_mount: Path) -> None:
    def code(path: Path) -> bytes:
        return os.getxattr(path, "user.fusestore.code")

    top = shared_mount / "top"
    top.mkdir()
    (top / "before").write_bytes(b"x")
    os.setxattr(top, "user.fusestore.code", b"1+2")
    (top / "below").mkdir()
    (top / "below/file").write_bytes(b"y" * 100_000)
    assert code(top) == code(top / "below") == code(top / "below/file") == b"1+2"
    assert code(top / "before") == b"2+1"
    assert read_uncached(top / "below/file") == b"y" * 100_000
    for bad in (b"", b"2", b"+", b"0+1", b"two+one", b"4+1", b"2+0"):
        with refused(errno.EINVAL):
            os.setxattr(top, "user.fusestore.code", bad)
    assert code(top) == b"1+2"
