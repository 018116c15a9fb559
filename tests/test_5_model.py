"""Random sequences of operations on a mounted store and on a plain directory are the same.

Each operation is done on both sides; what it answers, errno included, must be
equal, and so must the two trees in the end, byte for byte.  Not compared is
what two file systems may well see differently: sizes and blocks of directories,
atime, inode numbers, and the order of a listing.

The sequences come from `--model-seed`, which is printed at the head of the run,
so that a failure comes again; with `--long` there are many more of them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from support.mounted_store import Store

pytestmark = [pytest.mark.mounted, pytest.mark.not_plain]

KIB, MIB = 1 << 10, 1 << 20
AT_FDCWD = -100

#: Times before this many nanoseconds were set on purpose and are compared.
SET_ON_PURPOSE_NS = 10**18

libc = ctypes.CDLL(None, use_errno=True)

# --- what a sequence is made of ----------------------------------------------

Operation = tuple[Any, ...]

#: Few names, so that operations meet; the last one takes 254 bytes.
NAMES = ("a", "b", "c", "d", "\u00fc" * 127)


@dataclass(frozen=True)
class Place:
    """A path that is chosen when its turn comes, so that most operations find something."""

    known: int
    """Which of the names that exist by then, in order; what it is does not matter."""
    below: str | None
    """With a name: that name in the directory of the known one."""

    def resolve(self, names: list[str]) -> str:
        known = names[self.known % len(names)]
        if self.below is None:
            return known
        return os.path.normpath(os.path.join(os.path.dirname(known), self.below))


@dataclass(frozen=True)
class Slot:
    """One of the files that are open by then."""

    number: int

    def resolve(self, open_slots: list[int]) -> int:
        return open_slots[self.number % len(open_slots)] if open_slots else self.number


known_paths = st.builds(Place, st.integers(0, 30), st.none())
new_paths = st.builds(Place, st.integers(0, 30), st.sampled_from(NAMES))
below_paths = st.builds(
    Place, st.integers(0, 30), st.sampled_from([f"{a}/{b}" for a in NAMES[:3] for b in NAMES[:2]])
)
paths = st.one_of(known_paths, known_paths, known_paths, new_paths, below_paths)
fresh_paths = st.one_of(new_paths, new_paths, below_paths, known_paths)
new_slots = st.integers(0, 2)
slots = st.builds(Slot, new_slots)
sizes = st.one_of(
    st.integers(0, 200),
    st.integers(0, 70 * KIB),
    st.sampled_from([4096, 64 * KIB, 65 * KIB, MIB - 1, MIB, MIB + 1]),
)
offsets = st.one_of(
    st.integers(0, 300),
    st.integers(0, 200 * KIB),
    st.integers(0, 3 * MIB),
    st.sampled_from([0, 4096, 64 * KIB, MIB - 1, MIB, 2 * MIB]),
)
patterns = st.integers(0, 2**32)
modes = st.sampled_from([0o644, 0o600, 0o755, 0o4755, 0o2775, 0o1777, 0o000])
open_flags = st.sampled_from(
    [
        os.O_RDWR,
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_RDWR | os.O_CREAT | os.O_TRUNC,
        os.O_RDWR | os.O_TRUNC,
        os.O_RDWR | os.O_APPEND,
        os.O_RDWR | os.O_CREAT | os.O_APPEND,
        os.O_WRONLY | os.O_CREAT,
        os.O_RDONLY,
        os.O_RDONLY | os.O_NOFOLLOW,
    ]
)
attribute_names = st.sampled_from(["user.a", "user.b", "trusted.a", "security.a", "wrong.a"])
attribute_values = st.binary(max_size=100) | st.just(b"long" * 50)


def operation(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Operation]:
    return st.tuples(st.just(name), *arguments)


NOTHING: Operation = ("nothing",)
"""What hypothesis makes of the steps that a failure does not need."""

operations = st.one_of(
    st.just(NOTHING),
    operation("open", new_slots, paths, open_flags, modes),
    operation("open", new_slots, paths, open_flags, modes),
    operation("write", slots, offsets, sizes, patterns),
    operation("write", slots, offsets, sizes, patterns),
    operation("append", slots, sizes, patterns),
    operation("read", slots, offsets, sizes),
    operation("ftruncate", slots, offsets),
    operation("store_in_map", slots, offsets, st.binary(min_size=1, max_size=100)),
    operation("fsync", slots),
    operation("close", slots),
    operation("put", fresh_paths, sizes, patterns),
    operation("get", paths),
    operation("get_direct", paths),
    operation("truncate", paths, offsets),
    operation("mkdir", fresh_paths, modes),
    operation("mkdir", fresh_paths, st.just(0o755)),
    operation("mknod", fresh_paths, st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR])),
    operation("rmdir", paths),
    operation("unlink", paths),
    operation("link", paths, fresh_paths),
    operation("symlink", st.sampled_from([*NAMES[:4], "a/b", "b/a", "x" * 3000]), fresh_paths),
    operation("readlink", paths),
    operation("rename", paths, paths | fresh_paths, st.sampled_from([0, 0, 0, 1, 2, 2, 3])),
    operation("chmod", paths, modes),
    operation("chown", paths, st.integers(0, 2), st.integers(0, 2)),
    operation("utime", paths, st.integers(0, SET_ON_PURPOSE_NS - 1)),
    operation(
        "setxattr",
        paths,
        attribute_names,
        attribute_values,
        st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
    ),
    operation("getxattr", paths, attribute_names),
    operation("removexattr", paths, attribute_names),
    operation("stat", paths),
    operation("list", paths),
    operation("sync_directory", paths),
)
#: Rare, because it takes long.
REMOUNT: Operation = ("remount",)


#: What is there at the start of each sequence, so that it has something to work on.
BEGINNING: list[Operation] = [
    ("mkdir", "a", 0o755),
    ("mkdir", "a/b", 0o755),
    ("put", "b", 5000, 1),
    ("put", "a/a", MIB + 7, 2),
    ("open", 0, "b", os.O_RDWR, 0),
    ("open", 1, "a/c", os.O_RDWR | os.O_CREAT, 0o644),
]


def bytes_of(pattern: int, size: int) -> bytes:
    return random.Random(pattern).randbytes(size)


# --- doing it ----------------------------------------------------------------


@dataclass
class Side:
    """One of the two trees, and the files that are open in it."""

    top: Path
    times: bool
    """Whether mtime is compared: with the writeback cache it is the kernel's own affair."""
    open_files: dict[int, int] = field(default_factory=dict)

    def do(self, operation: Operation) -> object:
        """What the operation answers: its result, or the name of its errno."""
        name, *arguments = operation
        try:
            return getattr(self, name)(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def resolve(self, operation: Operation) -> Operation:
        """The operation with its paths and slots chosen."""
        names = ["."]
        for directory, directories, files in os.walk(self.top):
            directories.sort()
            names += [
                os.path.relpath(os.path.join(directory, name), self.top)
                for name in sorted([*directories, *files])
            ]
        return tuple(
            argument.resolve(names)
            if isinstance(argument, Place)
            else argument.resolve(sorted(self.open_files))
            if isinstance(argument, Slot)
            else argument
            for argument in operation
        )

    def at(self, path: str) -> str:
        return f"{self.top}/{path}"

    # -- open files

    def open(self, slot: int, path: str, flags: int, mode: int) -> str:
        # Without O_NONBLOCK, a fifo would wait for its other end.
        fd = os.open(self.at(path), flags | os.O_NONBLOCK, mode)
        kind = os.fstat(fd).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            os.close(fd)
            return "special"
        self.close(slot)
        self.open_files[slot] = fd
        return "opened"

    def close(self, slot: int) -> None:
        if slot in self.open_files:
            os.close(self.open_files.pop(slot))

    def close_all(self) -> None:
        for slot in list(self.open_files):
            self.close(slot)

    def fd(self, slot: int) -> int:
        if slot not in self.open_files:
            raise OSError(errno.EBADF, "not open")
        return self.open_files[slot]

    def write(self, slot: int, offset: int, size: int, pattern: int) -> object:
        done = os.pwrite(self.fd(slot), bytes_of(pattern, size), offset)
        return done, os.fstat(self.fd(slot)).st_size

    def append(self, slot: int, size: int, pattern: int) -> object:
        fd = self.fd(slot)
        end = os.lseek(fd, 0, os.SEEK_END)
        return os.write(fd, bytes_of(pattern, size)), os.fstat(fd).st_size - end

    def read(self, slot: int, offset: int, size: int) -> object:
        return os.pread(self.fd(slot), size, offset)

    def ftruncate(self, slot: int, size: int) -> object:
        os.ftruncate(self.fd(slot), size)
        return os.fstat(self.fd(slot)).st_size

    def store_in_map(self, slot: int, offset: int, data: bytes) -> object:
        fd = self.fd(slot)
        size = os.fstat(fd).st_size if stat.S_ISREG(os.fstat(fd).st_mode) else 0
        if offset + len(data) > size:
            return "past the end"
        with mmap.mmap(fd, size) as view:
            view[offset : offset + len(data)] = data
            view.flush()
        return os.pread(fd, len(data) + 20, offset)

    def fsync(self, slot: int) -> None:
        os.fsync(self.fd(slot))

    # -- files by name

    def put(self, path: str, size: int, pattern: int) -> None:
        if self._special(path):
            raise OSError(errno.ENXIO, "a special file")
        with open(self.at(path), "wb", buffering=0) as file:
            file.write(bytes_of(pattern, size))

    def get(self, path: str) -> object:
        if self._special(path):
            return "special"
        return Path(self.at(path)).read_bytes()

    def get_direct(self, path: str) -> object:
        if self._special(path):
            return "special"
        fd = os.open(self.at(path), os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 4 * MIB) as buffer:
                return buffer[: os.readv(fd, [buffer])]
        finally:
            os.close(fd)

    def _special(self, path: str) -> bool:
        try:
            kind = os.stat(self.at(path)).st_mode
        except OSError:
            return False
        return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.at(path), size)

    # -- names

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self.at(path), mode)

    def mknod(self, path: str, kind: int) -> None:
        device = os.makedev(1, 3) if kind == stat.S_IFCHR else 0
        os.mknod(self.at(path), kind | 0o644, device)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.at(path))

    def unlink(self, path: str) -> None:
        os.unlink(self.at(path))

    def link(self, path: str, new: str) -> None:
        os.link(self.at(path), self.at(new), follow_symlinks=False)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.at(path))

    def readlink(self, path: str) -> object:
        return os.readlink(self.at(path))

    def rename(self, path: str, new: str, flags: int) -> None:
        old, target = os.fsencode(self.at(path)), os.fsencode(self.at(new))
        if libc.renameat2(AT_FDCWD, old, AT_FDCWD, target, flags):
            raise OSError(ctypes.get_errno(), "renameat2")

    # -- attributes

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self.at(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.lchown(self.at(path), uid, gid)

    def utime(self, path: str, time_ns: int) -> None:
        os.utime(self.at(path), ns=(time_ns, time_ns), follow_symlinks=False)

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self.at(path), name, value, flags)

    def getxattr(self, path: str, name: str) -> object:
        return os.getxattr(self.at(path), name)

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(self.at(path), name)

    def stat(self, path: str) -> object:
        return self.visible(os.lstat(self.at(path)))

    def list(self, path: str) -> object:
        return sorted(os.listdir(self.at(path)))

    def sync_directory(self, path: str) -> None:
        fd = os.open(self.at(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def visible(self, status: os.stat_result) -> tuple[object, ...]:
        """What of a file's attributes must be the same on both sides."""
        on_purpose = status.st_mtime_ns < SET_ON_PURPOSE_NS
        return (
            oct(status.st_mode),
            status.st_nlink,
            (status.st_uid, status.st_gid),
            status.st_rdev,
            None if stat.S_ISDIR(status.st_mode) else status.st_size,
            (status.st_mtime_ns if on_purpose else "now") if self.times else None,
        )

    # -- all of it

    def tree(self) -> dict[str, tuple[object, ...]]:
        """Every name below the top with all that both sides must agree on."""
        found: dict[str, tuple[object, ...]] = {}
        links: dict[int, list[str]] = {}
        for directory, directories, files in os.walk(self.top):
            directories.sort()
            for name in sorted([*directories, *files]):
                path = os.path.join(directory, name)
                place = os.path.relpath(path, self.top)
                status = os.lstat(path)
                content: object = None
                if stat.S_ISREG(status.st_mode):
                    content = Path(path).read_bytes()
                elif stat.S_ISLNK(status.st_mode):
                    content = os.readlink(path)
                attributes = {
                    key: os.getxattr(path, key, follow_symlinks=False)
                    for key in sorted(os.listxattr(path, follow_symlinks=False))
                }
                links.setdefault(status.st_ino, []).append(place)
                found[place] = (self.visible(status), attributes, content)
        found["(hard links)"] = tuple(sorted(map(tuple, links.values())))
        return found


def differences(mounted: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """One line for each name that is not the same on both sides."""
    return [
        f"{name}: mounted {shortened(mounted.get(name))}, plain {shortened(plain.get(name))}"
        for name in sorted(mounted.keys() | plain.keys())
        if mounted.get(name) != plain.get(name)
    ]


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) < 400 else f"{text[:200]}…{text[-200:]}"


# --- the tests ---------------------------------------------------------------


@contextmanager
def both(mounted: Path, plain: Path, times: bool) -> Iterator[tuple[Side, Side]]:
    """Two empty trees, removed afterwards."""
    sides = Side(mounted, times), Side(plain, times)
    before = os.umask(0o022)
    try:
        for side in sides:
            side.top.mkdir()
        yield sides
    finally:
        os.umask(before)
        for side in sides:
            side.close_all()
            shutil.rmtree(side.top, ignore_errors=True)


def compare(sequence: list[Operation], sides: tuple[Side, Side], store: Store) -> None:
    """Do the whole sequence on both sides."""
    mounted, plain = sides
    done: list[Operation] = []
    for unresolved in [*BEGINNING, *sequence]:
        if unresolved == NOTHING:
            continue
        step = plain.resolve(unresolved)
        if step == REMOUNT:
            mounted.close_all()
            plain.close_all()
            store.remount(*store.options)
            done.append(step)
            continue
        here, there = mounted.do(step), plain.do(step)
        if here != there:
            pytest.fail(
                f"step {len(done)}, {shortened(step)}:\n"
                f"mounted: {shortened(here)}\nplain:   {shortened(there)}\n"
                "after " + "\n      ".join(map(shortened, done))
            )
        done.append(step)
    found = differences(mounted.tree(), plain.tree())
    assert not found, "\n".join([*found, "after", *map(shortened, done)])


@pytest.fixture(params=[(), ("writeback",)], ids=["write-through", "writeback"])
def store(request: pytest.FixtureRequest, make_store: Callable[..., Store]) -> Store:
    made = make_store()
    made.mount(*request.param)
    return made


def check(
    store: Store,
    plain: Path,
    seed_number: int,
    sequences: int,
    steps: st.SearchStrategy[list[Operation]],
) -> None:
    """Compare `sequences` sequences drawn from `steps`."""
    count = 0

    @seed(seed_number)
    @settings(
        max_examples=sequences,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
    )
    @given(steps)
    def run(sequence: list[Operation]) -> None:
        nonlocal count
        count += 1
        store.revive()  # so that a daemon that died does so again in each attempt to shrink
        places = store.mountpoint / f"m{count}", plain / f"p{count}"
        with both(*places, "writeback" not in store.options) as sides:
            compare(sequence, sides, store)

    run()


@pytest.mark.timeout(3600)
def test_a_mounted_store_behaves_as_a_plain_directory(
    store: Store, tmp_path: Path, request: pytest.FixtureRequest, long: bool
) -> None:
    check(
        store,
        tmp_path,
        request.config.getoption("--model-seed"),
        3000 if long else 150,
        st.lists(operations, min_size=20, max_size=80),
    )


@pytest.mark.timeout(3600)
def test_so_it_does_with_remounts_between(
    store: Store, tmp_path: Path, request: pytest.FixtureRequest, long: bool
) -> None:
    part = st.lists(operations, min_size=8, max_size=30)
    check(
        store,
        tmp_path,
        request.config.getoption("--model-seed") + 1,
        100 if long else 4,
        st.lists(part, min_size=2, max_size=4).map(
            lambda parts: [step for steps in parts for step in [*steps, REMOUNT]]
        ),
    )
