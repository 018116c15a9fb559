"""Names, links and listings of a mounted store are those of POSIX.

With `--plain` the same tests run on a plain directory, which shows that they
ask for what the kernel's own file systems give.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.posixly import (
    EXCHANGE,
    MIB,
    NOREPLACE,
    libc,
    make,
    names_in,
    opened,
    refused,
    renameat2,
)
from support.processes import in_child

pytestmark = pytest.mark.mounted


# --- rename ------------------------------------------------------------------


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


LIVELY: dict[str, Callable[[Path, str, int], object]] = {
    "renames within": lambda top, name, n: os.rename(top / name, top / f"renamed-{n}"),
    "renames over": lambda top, name, n: os.rename(top / name, top / "over"),
    "renames out and in": lambda top, name, n: (
        os.rename(top / name, top.parent / "out"),
        os.rename(top.parent / "out", top / f"in-{n}"),
    ),
    "exchanges": lambda top, name, n: renameat2(top / name, top / "partner", EXCHANGE),
    "makes one beside": lambda top, name, n: (top / f"beside-{n}").touch(),
    "makes and removes": lambda top, name, n: (
        (top / f"short-{n}").touch(),
        os.unlink(top / f"short-{n}"),
        (top / f"made-{n}").mkdir(),
    ),
    "links": lambda top, name, n: os.link(top / name, top / f"link-{n}"),
    "removes and makes anew": lambda top, name, n: (os.unlink(top / name), (top / name).touch()),
}


@pytest.mark.parametrize("action", LIVELY.values(), ids=LIVELY.keys())
def test_a_listing_ends_whatever_is_done_meanwhile(
    shared_mount: Path, action: Callable[[Path, str, int], object]
) -> None:
    top = shared_mount / "top"
    top.mkdir()
    for number in range(300):
        (top / f"f{number}").touch()
    (top / "partner").touch()
    count = 0
    for entry in os.scandir(top):
        if entry.name == "partner":
            continue
        action(top, entry.name, count)
        count += 1
        assert count <= 302


def test_a_renamed_entry_is_in_each_listing_exactly_once(shared_mount: Path) -> None:
    """Under one of its names: a reader of a mail folder must not miss a message."""
    for number in range(1000):
        (shared_mount / f"{number}").touch()
    chance = random.Random(5)
    left = [str(number) for number in range(1000)]
    seen = []
    for count, entry in enumerate(os.scandir(shared_mount)):
        seen.append(entry.inode())
        if count % 2:
            name = left.pop(chance.randrange(len(left)))
            os.rename(shared_mount / name, shared_mount / f"{name}:2,S")
    assert len(seen) == len(set(seen)) == 1000


def test_a_listing_that_begins_anew_has_what_was_made_meanwhile(shared_mount: Path) -> None:
    (shared_mount / "one").touch()
    stream = libc.opendir(os.fsencode(shared_mount))
    try:
        for count in range(3):
            (shared_mount / f"new-{count}").touch()
            libc.rewinddir(stream)
            names = set()
            while entry := libc.readdir(stream):
                names.add(entry.contents.name.decode())
            assert names == {".", "..", "one", *(f"new-{n}" for n in range(count + 1))}
    finally:
        libc.closedir(stream)


def test_two_readers_of_a_directory_have_an_end_each(shared_mount: Path) -> None:
    for number in range(2000):
        (shared_mount / f"{number:04}").touch()
    first = os.scandir(shared_mount)
    one = [next(first).name]
    for number in range(2000, 2100):
        (shared_mount / f"{number:04}").touch()
    second = os.scandir(shared_mount)
    two = [next(second).name]
    for number in range(2100, 2200):
        (shared_mount / f"{number:04}").touch()
        one.append(next(first).name)
        two.append(next(second).name)
    one += [entry.name for entry in first]
    two += [entry.name for entry in second]
    assert len(one) == len(set(one))
    assert len(two) == len(set(two))
    old = {f"{number:04}" for number in range(2000)}
    assert set(one) >= old
    assert set(two) >= old | {f"{number:04}" for number in range(2000, 2100)}


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_rm_removes_a_large_directory_while_it_is_read(shared_mount: Path, count: int) -> None:
    top = shared_mount / "top"
    top.mkdir()
    for number in range(count):
        os.mknod(top / f"{number:06}", stat.S_IFREG | 0o644)
    reader = os.scandir(top)
    next(reader)
    subprocess.run(["rm", "-r", top], check=True)
    assert len(list(reader)) < count
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
for _function in (libc.readdir, libc.telldir, libc.rewinddir, libc.closedir):
    _function.argtypes = [ctypes.c_void_p]
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
