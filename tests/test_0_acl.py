"""fusestore/acl.py does to modes and ACLs what the kernel does on ext4."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fusestore.errors import InvalidError
from fusestore.format import acl
from fusestore.format.acl import Entry, Tag

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"

names = itertools.count()


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory on a file system of the kernel's own that keeps ACLs."""
    directory = tmp_path_factory.mktemp("acl")
    trial = acl.format((Entry(Tag.USER_OBJ, 7), Entry(Tag.GROUP_OBJ, 5), Entry(Tag.OTHER, 5)))
    try:
        os.setxattr(directory, ACCESS, trial)
    except OSError as error:
        pytest.fail(
            f"the file system under {directory} keeps no POSIX ACLs ({error.strerror}); "
            "give pytest another one with --basetemp"
        )
    return directory


permission = st.integers(0, 7)
identity = st.integers(1, 60000)


@st.composite
def acls(draw: st.DrawFn) -> acl.Acl:
    """Well-formed ACLs, with and without named users and groups and a mask."""
    users = draw(st.lists(identity, max_size=3, unique=True))
    groups = draw(st.lists(identity, max_size=3, unique=True))
    mask = bool(users or groups) or draw(st.booleans())
    return (
        Entry(Tag.USER_OBJ, draw(permission)),
        *(Entry(Tag.USER, draw(permission), user) for user in sorted(users)),
        Entry(Tag.GROUP_OBJ, draw(permission)),
        *(Entry(Tag.GROUP, draw(permission), group) for group in sorted(groups)),
        *([Entry(Tag.MASK, draw(permission))] if mask else []),
        Entry(Tag.OTHER, draw(permission)),
    )


modes = st.integers(0, 0o7777)
quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def stored(path: Path, name: str) -> bytes | None:
    """The ACL that the kernel keeps for `path`, or None."""
    try:
        return os.getxattr(path, name)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return None


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def new_file(ground: Path, mode: int) -> Path:
    path = ground / f"f{next(names)}"
    path.touch()
    path.chmod(mode)
    return path


def new_directory(ground: Path, default: bytes) -> Path:
    path = ground / f"d{next(names)}"
    path.mkdir()
    os.setxattr(path, DEFAULT, default)
    return path


# --- the bytes ---------------------------------------------------------------


@given(acls())
@quick
def test_what_was_formatted_parses_to_the_same(entries: acl.Acl) -> None:
    assert acl.parse(acl.format(entries)) == entries


def test_the_layout_is_that_of_the_kernels_header() -> None:
    entries = (
        Entry(Tag.USER_OBJ, 7),
        Entry(Tag.USER, 6, 1000),
        Entry(Tag.GROUP_OBJ, 5),
        Entry(Tag.MASK, 4),
        Entry(Tag.OTHER, 0),
    )
    assert acl.format(entries) == struct.pack(
        "<I" + "HHI" * 5,
        2,
        *(1, 7, 0xFFFFFFFF),
        *(2, 6, 1000),
        *(4, 5, 0xFFFFFFFF),
        *(16, 4, 0xFFFFFFFF),
        *(32, 0, 0xFFFFFFFF),
    )


def test_the_id_of_an_entry_that_names_nobody_is_ignored() -> None:
    value = struct.pack("<I" + "HHI" * 3, 2, 1, 7, 0, 4, 5, 99, 32, 5, 1)
    assert acl.format(acl.parse(value)) == struct.pack(
        "<I" + "HHI" * 3, 2, 1, 7, 0xFFFFFFFF, 4, 5, 0xFFFFFFFF, 32, 5, 0xFFFFFFFF
    )


def raw(*entries: tuple[int, int, int], version: int = 2) -> bytes:
    return struct.pack("<I", version) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


OWNER, GROUP, OTHER = (1, 7, 0xFFFFFFFF), (4, 5, 0xFFFFFFFF), (32, 5, 0xFFFFFFFF)
MASK = (16, 7, 0xFFFFFFFF)

ILL_FORMED = {
    "no other": raw(OWNER, GROUP),
    "no owner": raw(GROUP, OTHER),
    "no owning group": raw(OWNER, OTHER),
    "two owners": raw(OWNER, OWNER, GROUP, OTHER),
    "two owning groups": raw(OWNER, GROUP, GROUP, OTHER),
    "two masks": raw(OWNER, GROUP, MASK, MASK, OTHER),
    "two others": raw(OWNER, GROUP, OTHER, OTHER),
    "named user without mask": raw(OWNER, (2, 7, 5), GROUP, OTHER),
    "named group without mask": raw(OWNER, GROUP, (8, 7, 5), OTHER),
    "user after group": raw(OWNER, GROUP, (2, 7, 5), MASK, OTHER),
    "mask after other": raw(OWNER, GROUP, OTHER, MASK),
    "permission of more than rwx": raw(OWNER, (4, 8, 0xFFFFFFFF), OTHER),
    "unknown tag": raw(OWNER, GROUP, (3, 7, 5), OTHER),
    "nobody's id": raw(OWNER, (2, 7, 0xFFFFFFFF), GROUP, MASK, OTHER),
    "half an entry": raw(OWNER, GROUP, OTHER)[:-4],
    "a byte too many": raw(OWNER, GROUP, OTHER) + b"\0",
    "half a header": b"\2\0",
    "another version": raw(OWNER, GROUP, OTHER, version=1),
}


@pytest.mark.parametrize("value", ILL_FORMED.values(), ids=ILL_FORMED.keys())
def test_an_ill_formed_acl_is_refused_here_and_by_the_kernel(ground: Path, value: bytes) -> None:
    with pytest.raises(InvalidError):
        acl.parse(value)
    with pytest.raises(OSError) as caught:
        os.setxattr(new_file(ground, 0o644), ACCESS, value)
    assert caught.value.errno in (errno.EINVAL, errno.EOPNOTSUPP)


@given(st.binary(max_size=60) | st.binary(max_size=48).map(lambda tail: b"\2\0\0\0" + tail))
@quick
def test_any_bytes_parse_or_are_refused(value: bytes) -> None:
    try:
        entries = acl.parse(value)
    except InvalidError:
        return
    assert acl.parse(acl.format(entries)) == entries


@given(acls(), st.integers(0, 12), st.integers(0, 255))
@quick
def test_a_damaged_acl_is_refused_exactly_when_the_kernel_refuses_it(
    ground: Path, entries: acl.Acl, place: int, byte: int
) -> None:
    value = bytearray(acl.format(entries))
    value[place * 4 % len(value)] = byte
    path = new_file(ground, 0o644)
    try:
        os.setxattr(path, ACCESS, bytes(value))
    except OSError:
        with pytest.raises(InvalidError):
            acl.parse(bytes(value))
    else:
        assert acl.access_to_mode(bytes(value), 0o644) == (mode_of(path), stored(path, ACCESS))


# --- an access ACL and the mode ----------------------------------------------


@given(acls(), modes)
@example((Entry(Tag.USER_OBJ, 6), Entry(Tag.GROUP_OBJ, 4), Entry(Tag.OTHER, 0)), 0o644)
@quick
def test_setting_an_access_acl_sets_the_mode(ground: Path, entries: acl.Acl, mode: int) -> None:
    path = new_file(ground, mode)
    os.setxattr(path, ACCESS, acl.format(entries))
    assert acl.access_to_mode(acl.format(entries), mode) == (mode_of(path), stored(path, ACCESS))


def test_the_type_of_the_inode_stays_in_the_mode() -> None:
    entries = (Entry(Tag.USER_OBJ, 6), Entry(Tag.GROUP_OBJ, 4), Entry(Tag.OTHER, 0))
    mode, _ = acl.access_to_mode(acl.format(entries), stat.S_IFDIR | 0o1777)
    assert mode == stat.S_IFDIR | 0o1640


def test_an_acl_without_entries_takes_the_stored_one_away(ground: Path) -> None:
    path = new_file(ground, 0o751)
    full = (
        Entry(Tag.USER_OBJ, 6),
        Entry(Tag.USER, 7, 1000),
        Entry(Tag.GROUP_OBJ, 4),
        Entry(Tag.MASK, 5),
        Entry(Tag.OTHER, 0),
    )
    os.setxattr(path, ACCESS, acl.format(full))
    assert mode_of(path) == 0o650
    os.setxattr(path, ACCESS, acl.format(()))
    assert acl.access_to_mode(acl.format(()), 0o650) == (mode_of(path), stored(path, ACCESS))


# --- chmod -------------------------------------------------------------------


@given(acls(), modes, modes)
@quick
def test_chmod_rewrites_a_stored_access_acl(
    ground: Path, entries: acl.Acl, before: int, after: int
) -> None:
    path = new_file(ground, before)
    os.setxattr(path, ACCESS, acl.format(entries))
    was = stored(path, ACCESS)
    path.chmod(after)
    assert mode_of(path) == after
    assert stored(path, ACCESS) == (None if was is None else acl.chmod(was, after))


# --- a new inode below a directory with a default ACL ------------------------


@given(acls(), st.integers(0, 0o777))
@quick
def test_a_new_file_inherits(ground: Path, default: acl.Acl, mode: int) -> None:
    parent = new_directory(ground, acl.format(default))
    path = parent / "file"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, mode))
    got, access, below = acl.inherit(acl.format(default), stat.S_IFREG | mode, False)
    assert got == path.stat().st_mode
    assert access == stored(path, ACCESS)
    assert below is None


@given(acls(), st.integers(0, 0o1777))
@quick
def test_a_new_directory_inherits_and_passes_on(ground: Path, default: acl.Acl, mode: int) -> None:
    parent = new_directory(ground, acl.format(default))
    path = parent / "directory"
    path.mkdir(mode)
    got, access, below = acl.inherit(acl.format(default), stat.S_IFDIR | mode, True)
    assert got == path.stat().st_mode
    assert access == stored(path, ACCESS)
    assert below == stored(path, DEFAULT)


@given(acls(), st.integers(0, 0o777))
@quick
def test_a_new_fifo_inherits(ground: Path, default: acl.Acl, mode: int) -> None:
    parent = new_directory(ground, acl.format(default))
    path = parent / "fifo"
    os.mkfifo(path, mode)
    got, access, _ = acl.inherit(acl.format(default), stat.S_IFIFO | mode, False)
    assert got == path.stat().st_mode
    assert access == stored(path, ACCESS)


def test_a_symbolic_link_inherits_nothing(ground: Path) -> None:
    default = acl.format((Entry(Tag.USER_OBJ, 1), Entry(Tag.GROUP_OBJ, 0), Entry(Tag.OTHER, 0)))
    path = new_directory(ground, default) / "link"
    path.symlink_to("anywhere")
    assert acl.inherit(default, stat.S_IFLNK | 0o777, False) == (path.lstat().st_mode, None, None)


def test_a_default_acl_without_entries_is_none() -> None:
    mode = stat.S_IFREG | 0o640
    assert acl.inherit(acl.format(()), mode, False) == (mode, None, None)
