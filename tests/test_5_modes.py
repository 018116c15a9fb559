"""Types, modes, owners and ACLs of a mounted store are those of POSIX.

With `--plain` the same tests run on a plain directory, which shows that they
ask for what the kernel's own file systems give.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fusestore.format import acl
from fusestore.format.acl import Entry, Tag
from support.posixly import (
    ACCESS,
    ALICE,
    BOB,
    CREW,
    DEFAULT,
    TEAM,
    for_alice,
    mode_of,
    names_in,
    opened,
    owned_by_alice,
    refused,
)
from support.processes import as_user

pytestmark = pytest.mark.mounted


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


EMPTY_ACL = b"\2\0\0\0"


@pytest.mark.parametrize("name", [ACCESS, DEFAULT])
def test_an_acl_that_is_not_there_can_be_removed(shared_mount: Path, name: str) -> None:
    """As often as one likes: an empty ACL is none, and programs set one to clear it."""
    path = shared_mount / "directory"
    path.mkdir(0o751)
    for acl_of in (b"", EMPTY_ACL, for_alice(6)):
        for _ in range(2):
            if acl_of:
                os.setxattr(path, name, acl_of)
            os.removexattr(path, name)
            os.removexattr(path, name)
            assert os.listxattr(path) == []
            with refused(errno.ENODATA):
                os.getxattr(path, name)
    for other in ("user.a", "trusted.a", "security.a"):
        with refused(errno.ENODATA):
            os.removexattr(path, other)


def test_programs_that_clear_acls_do_not_fail(shared_mount: Path, tmp_path: Path) -> None:
    source = shared_mount / "source"
    (source / "with/below").mkdir(parents=True)
    (source / "file").touch()
    os.setxattr(source / "with", ACCESS, for_alice(6))
    os.setxattr(source / "file", ACCESS, for_alice(6))
    (shared_mount / "unpacked").mkdir()
    for command in (
        ["tar", "--acls", "-C", source, "-cf", tmp_path / "archive.tar", "."],
        ["tar", "--acls", "-C", shared_mount / "unpacked", "-xpf", tmp_path / "archive.tar"],
        ["cp", "-a", source, shared_mount / "copied"],
        ["setfacl", "-k", source / "with/below"],
        ["setfacl", "-Rb", shared_mount / "copied"],
        ["setfacl", "-Rb", shared_mount / "copied"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), command
    for name in ("with", "file"):
        assert os.getxattr(shared_mount / "unpacked" / name, ACCESS) == for_alice(6)
        assert os.listxattr(shared_mount / "copied" / name) == []


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
