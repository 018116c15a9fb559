"""The kill -9 campaign: whatever the daemon is at, its death leaves one instant.

The fault model: the daemon is killed with SIGKILL, again and again, at random
moments and right when it commits, checkpoints, dumps the metadata, deletes old
journal, gives room back, unmounts, or mounts and replays.  The kernel, the disks
and the programs that use the mount live on; every byte that the daemon gave to the
kernel is there, in the order in which it gave it, and what it had in memory is
gone.  (That flushes reach the disk is for the tests with failing nodes.)

Worker processes do random operations, each in a directory of its own, and keep a
manifest outside of the mount: when each operation began and returned, on the one
monotonic clock.  What the next mount shows must be the tree at one instant: in the
directory of each worker the state after the first so many of its operations, such
that no operation is missing that had returned when one that is there began, or
when an fsync began that returned, whichever worker's.  The operation that was
under way when the daemon died may or may not have happened.  Compared are names,
bytes, sizes, modes, link counts, which names are one file, targets of symbolic
links, extended attributes, mtimes that were set; and nothing else may be there.

Each operation that changes something is one request to the daemon, and so all or
nothing; with one exception that is the kernel's.  A `write(2)` that begins inside of
a page which is not in the page cache, and goes on in the next page, is two requests:
up to the end of the page, and the rest (`Model.requests`).

The store lives on from kill to kill, so that damage adds up, and has to pass
`fusestore fsck` each time.  There are no rounds with `-o writeback`: there the
kernel sends bytes when it likes, in pieces that it chooses, behind operations on
names that came later.  Only what an fsync of the very file covered is sure then,
and no instant is promised; test_5_crash.py looks at that.

`--model-seed` chooses the operations, the moments and the delays.  The same seed
does not give the same interleaving; so the store and the manifests of a failure
stay in pytest's temporary directory.
"""

from __future__ import annotations

import copy
import ctypes
import errno
import itertools
import json
import mmap
import multiprocessing
import os
import random
import stat
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
from xxhash import xxh3_64_intdigest

from support.mounted_store import FUSESTORE, REPOSITORY, TRACEBACK, Directory, Store, is_mounted
from support.posixly import read_uncached
from support.processes import in_child

pytestmark = pytest.mark.mounted

KIB, MIB = 1 << 10, 1 << 20
PAGE_BYTES = mmap.PAGESIZE

WORKERS = 4
REGIONS = ("us-east-1", "us-west-1", "eu-west-1")

#: Seconds in which a moment comes under the load, a worker ends, a store heals.
PATIENCE_SECONDS = 120

#: What a program gets from a mount whose daemon died; EIO for a request that the daemon
#: was just being given.
DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)

#: mtimes below this many nanoseconds were set on purpose and are compared.
SET_ON_PURPOSE_NS = 10**18

ENTRIES_MAX = 28
DEPTH_MAX = 3
FILE_BYTES_MAX = 2 * MIB
NAMES = "abcdef"
ATTRIBUTES = ("user.a", "user.b", "user.c")

REGULAR, FOLDER, LINK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK

AT_FDCWD, RENAME_EXCHANGE = -100, 2
libc = ctypes.CDLL(None, use_errno=True)

Operation = list[Any]
"""Its name and its arguments, as in the manifest."""

#: Bytes are slices of this, so a seed and a size give them.
POOL = random.Random(0).randbytes(4 * MIB)
SEEDS = len(POOL) - MIB


def bytes_of(seed: int, size: int) -> bytes:
    """Random bytes; those of `seed + n` are the same from the n-th byte on."""
    return POOL[seed : seed + size]


# --- what should be there ----------------------------------------------------


class Entry(NamedTuple):
    """What is compared of one name."""

    mode: int
    links: int
    size: int
    mtime: int
    data: int
    attributes: tuple[tuple[str, int], ...]
    same_as: str
    """The first of all names of the inode."""


State = dict[str, Entry]
"""By path below the worker's directory, which itself is `.`."""


@dataclass(eq=False)
class Node:
    """An inode as it should be."""

    mode: int
    data: bytearray = field(default_factory=bytearray)
    """The bytes of a file, the target of a symbolic link."""
    mtime: int = 0
    attributes: dict[str, int] = field(default_factory=dict)
    digest: int | None = None

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)

    def changed(self) -> None:
        self.mtime, self.digest = 0, None


def parent_of(path: str) -> str:
    return os.path.dirname(path) or "."


def is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(top + "/")


class Model:
    """The directory of one worker as it should be; a method for each operation."""

    def __init__(self) -> None:
        self.names = {".": Node(stat.S_IFDIR | 0o755)}

    def do(self, operation: Operation) -> None:
        name, *arguments = operation
        getattr(self, name)(*arguments)

    def requests(self, operation: Operation) -> list[Operation]:
        """The operation in the pieces of which a crash may find only the first."""
        name, path, *arguments = operation
        if name not in ("write", "append"):
            return [operation]
        *offsets, size, seed = arguments
        offset = offsets[0] if offsets else len(self.names[path].data)
        first = min(size, -offset % PAGE_BYTES or size)
        pieces = [["write", path, offset, first, seed]]
        if first < size:
            pieces.append(["write", path, offset + first, size - first, seed + first])
        return pieces

    def state(self) -> State:
        first: dict[int, str] = {}
        links: dict[int, int] = {}
        for path, node in sorted(self.names.items()):
            first.setdefault(id(node), path)
            links[id(node)] = links.get(id(node), 0) + 1
            if stat.S_ISDIR(node.mode):
                links[id(node)] += 1
                if path != ".":
                    links[id(self.names[parent_of(path)])] += 1
        found = {}
        for path, node in self.names.items():
            if node.digest is None:
                node.digest = xxh3_64_intdigest(bytes(node.data))
            found[path] = Entry(
                node.mode,
                links[id(node)],
                len(node.data),
                node.mtime,
                node.digest,
                tuple(sorted(node.attributes.items())),
                first[id(node)],
            )
        return found

    def create(self, path: str, mode: int) -> None:
        self.names[path] = Node(stat.S_IFREG | mode)

    def mkdir(self, path: str, mode: int) -> None:
        self.names[path] = Node(stat.S_IFDIR | mode)

    def symlink(self, target: str, path: str) -> None:
        self.names[path] = Node(stat.S_IFLNK | 0o777, bytearray(target.encode()))

    def link(self, path: str, new: str) -> None:
        self.names[new] = self.names[path]

    def unlink(self, path: str) -> None:
        del self.names[path]

    def orphan(self, path: str) -> None:
        del self.names[path]

    def rmdir(self, path: str) -> None:
        del self.names[path]

    def rename(self, path: str, new: str) -> None:
        if self.names.get(new) is self.names[path]:
            return  # two names of one file: POSIX has it that nothing happens
        moved = self._take(path)
        self.names.pop(new, None)
        self._put(new, moved)

    def exchange(self, path: str, other: str) -> None:
        one, two = self._take(path), self._take(other)
        self._put(other, one)
        self._put(path, two)

    def _take(self, top: str) -> dict[str, Node]:
        found = {path: node for path, node in self.names.items() if is_below(path, top)}
        for path in found:
            del self.names[path]
        return {path[len(top) :]: node for path, node in found.items()}

    def _put(self, top: str, nodes: dict[str, Node]) -> None:
        self.names.update({top + path: node for path, node in nodes.items()})

    def write(self, path: str, offset: int, size: int, seed: int) -> None:
        node = self.names[path]
        node.data.extend(bytes(max(0, offset - len(node.data))))
        node.data[offset : offset + size] = bytes_of(seed, size)
        node.changed()

    def append(self, path: str, size: int, seed: int) -> None:
        self.write(path, len(self.names[path].data), size, seed)

    def truncate(self, path: str, size: int) -> None:
        node = self.names[path]
        del node.data[size:]
        node.data.extend(bytes(size - len(node.data)))
        node.changed()

    def empty(self, path: str) -> None:
        self.truncate(path, 0)

    def chmod(self, path: str, mode: int) -> None:
        node = self.names[path]
        node.mode = node.kind | mode

    def utime(self, path: str, mtime: int) -> None:
        self.names[path].mtime = mtime

    def setxattr(self, path: str, name: str, size: int, seed: int) -> None:
        self.names[path].attributes[name] = xxh3_64_intdigest(bytes_of(seed, size))

    def removexattr(self, path: str, name: str) -> None:
        del self.names[path].attributes[name]

    def fsync(self, path: str) -> None:
        pass

    def fdatasync(self, path: str) -> None:
        pass


def look(top: Path) -> State:
    """What is there, with the bytes of files as the file system itself has them."""
    paths = ["."]
    for directory, directories, files in os.walk(top):
        paths += [
            os.path.relpath(os.path.join(directory, name), top) for name in directories + files
        ]
    first: dict[int, str] = {}
    found = {}
    for path in sorted(paths):
        place = top / path
        status = os.lstat(place)
        data, attributes = b"", []
        if stat.S_ISREG(status.st_mode):
            try:
                data = read_uncached(place)
            except OSError as error:
                error.add_note(f"when {place} was read")
                raise
            assert len(data) == status.st_size, f"{place}: {len(data)} of {status.st_size} bytes"
        elif stat.S_ISLNK(status.st_mode):
            data = os.readlink(place).encode()
        for name in os.listxattr(place, follow_symlinks=False):
            value = os.getxattr(place, name, follow_symlinks=False)
            attributes.append((name, xxh3_64_intdigest(value)))
        found[path] = Entry(
            status.st_mode,
            status.st_nlink,
            len(data),
            status.st_mtime_ns if status.st_mtime_ns < SET_ON_PURPOSE_NS else 0,
            xxh3_64_intdigest(data),
            tuple(sorted(attributes)),
            first.setdefault(status.st_ino, path),
        )
    return found


# --- a worker ----------------------------------------------------------------

Weights = dict[str, int]

EVERYTHING: Weights = {
    "create": 4,
    "mkdir": 2,
    "symlink": 1,
    "link": 2,
    "unlink": 2,
    "orphan": 1,
    "rmdir": 1,
    "rename": 4,
    "exchange": 1,
    "write": 8,
    "fill": 1,
    "append": 5,
    "truncate": 2,
    "empty": 1,
    "chmod": 1,
    "utime": 1,
    "setxattr": 2,
    "removexattr": 1,
    "fsync": 1,
    "fdatasync": 1,
}
NAMES_MOSTLY: Weights = EVERYTHING | {"rename": 12, "create": 10, "unlink": 6, "mkdir": 6}
BYTES_MOSTLY: Weights = EVERYTHING | {"write": 40, "fill": 8, "append": 20, "truncate": 5}
#: Attributes and small synced appends travel in the journal and make it grow fast.
JOURNAL_MOSTLY: Weights = EVERYTHING | {"setxattr": 30, "append": 15, "fsync": 15, "fdatasync": 10}
#: To be or-ed: a commit comes rarely, so that a crash takes a lot back.
UNSYNCED: Weights = {"fsync": 0, "fdatasync": 0}


class NothingToDoItToError(Exception):
    """The tree has nothing that the operation could be done to."""


class Plan:
    """Chooses random operations that succeed; a method for each gives its arguments."""

    def __init__(self, model: Model, randomness: random.Random, weights: Weights) -> None:
        self.model = model
        self.random = randomness
        self.kinds, self.weights = list(weights), list(weights.values())
        self.attribute_bytes = 60_000

    def next(self) -> Operation:
        while True:
            (kind,) = self.random.choices(self.kinds, self.weights)
            try:
                arguments = getattr(self, kind)()
            except NothingToDoItToError:
                continue
            return ["write" if kind == "fill" else kind, *arguments]

    # -- what arguments are made of

    def seed(self) -> int:
        return self.random.randrange(SEEDS)

    def pick(self, *kinds: int, top: bool = False) -> str:
        """A name of one of these kinds, the first ones more often."""
        paths = sorted(
            path
            for path, node in self.model.names.items()
            if node.kind in kinds and (top or path != ".")
        )
        if not paths:
            raise NothingToDoItToError
        return paths[int(len(paths) * self.random.random() ** 2)]

    def place(self) -> str:
        """A path, free or not, in a directory that is there."""
        directories = sorted(
            path
            for path, node in self.model.names.items()
            if node.kind == stat.S_IFDIR and path.count("/") + 1 < DEPTH_MAX
        )
        return os.path.normpath(
            os.path.join(self.random.choice(directories), self.random.choice(NAMES))
        )

    def fresh(self) -> str:
        """A path that is free."""
        path = self.place()
        if path in self.model.names or len(self.model.names) >= ENTRIES_MAX:
            raise NothingToDoItToError
        return path

    def is_empty(self, path: str) -> bool:
        return all(other == path or not is_below(other, path) for other in self.model.names)

    def size(self, path: str) -> int:
        return len(self.model.names[path].data)

    # -- names

    def create(self) -> Operation:
        return [self.fresh(), self.random.choice([0o644, 0o600, 0o400, 0o755])]

    def mkdir(self) -> Operation:
        return [self.fresh(), self.random.choice([0o755, 0o700, 0o500])]

    def symlink(self) -> Operation:
        return [f"{self.seed()}" + "x" * self.random.choice([1, 30, 3000]), self.fresh()]

    def link(self) -> Operation:
        return [self.pick(REGULAR, LINK), self.fresh()]

    def unlink(self) -> Operation:
        return [self.pick(REGULAR, LINK)]

    def orphan(self) -> Operation:
        path = self.pick(REGULAR)
        if list(self.model.names.values()).count(self.model.names[path]) > 1:
            raise NothingToDoItToError
        return [path]

    def rmdir(self) -> Operation:
        path = self.pick(FOLDER)
        if not self.is_empty(path):
            raise NothingToDoItToError
        return [path]

    def rename(self) -> Operation:
        path, new = self.pick(REGULAR, LINK, FOLDER), self.place()
        there = self.model.names.get(new)
        folder = self.model.names[path].kind == FOLDER
        if (
            is_below(new, path)
            or is_below(path, new)
            or (there and (folder != (there.kind == FOLDER) or not self.is_empty(new)))
        ):
            raise NothingToDoItToError
        return [path, new]

    def exchange(self) -> Operation:
        path, other = self.pick(REGULAR, LINK, FOLDER), self.pick(REGULAR, LINK, FOLDER)
        if is_below(path, other) or is_below(other, path):
            raise NothingToDoItToError
        return [path, other]

    # -- bytes

    def write(self) -> Operation:
        """Anywhere in a file, or behind its end."""
        path = self.pick(REGULAR)
        end = self.size(path) + self.random.choice([0, 0, 0, 5000, 100_000])
        offset = min(self.random.randrange(end + 1), FILE_BYTES_MAX)
        size = self.random.choice([3, 3, 900, 4 * KIB, 30_000, 64 * KIB, 120_000])
        return [path, offset, size, self.seed()]

    def fill(self) -> Operation:
        """A whole stripe at once."""
        return [self.pick(REGULAR), self.random.choice([0, MIB]), MIB, self.seed()]

    def append(self) -> Operation:
        path = self.pick(REGULAR)
        if self.size(path) >= FILE_BYTES_MAX:
            raise NothingToDoItToError
        return [path, self.random.choice([1, 70, 4 * KIB, 20_000, 30_000, 100_000]), self.seed()]

    def truncate(self) -> Operation:
        path = self.pick(REGULAR)
        size = self.size(path)
        return [path, self.random.choice([size // 2, max(0, size - 10), size + 5000, 4 * KIB])]

    def empty(self) -> Operation:
        return [self.pick(REGULAR)]

    # -- attributes

    def chmod(self) -> Operation:
        path = self.pick(REGULAR, FOLDER, top=True)
        return [path, self.random.choice([0o755, 0o700, 0o611, 0o1777])]

    def utime(self) -> Operation:
        return [self.pick(REGULAR), self.random.randrange(1, SET_ON_PURPOSE_NS)]

    def setxattr(self) -> Operation:
        path, name = self.pick(REGULAR, FOLDER, top=True), self.random.choice(ATTRIBUTES)
        size = min(self.random.choice([0, 5, 300, 60_000]), self.attribute_bytes)
        return [path, name, size, self.seed()]

    def removexattr(self) -> Operation:
        path = self.pick(REGULAR, FOLDER, top=True)
        names = sorted(self.model.names[path].attributes)
        if not names:
            raise NothingToDoItToError
        return [path, self.random.choice(names)]

    # -- what makes it durable

    def fsync(self) -> Operation:
        return [self.pick(REGULAR, FOLDER, top=True)]

    def fdatasync(self) -> Operation:
        return [self.pick(REGULAR, top=False)]


class Hands:
    """Does operations in the current directory; a method for each."""

    def __init__(self) -> None:
        self.open_orphans: deque[int] = deque()
        self.buffer = mmap.mmap(-1, MIB)
        """Of whole pages, so that a write of 1 MiB is one request."""

    def do(self, operation: Operation) -> None:
        name, *arguments = operation
        getattr(self, name)(*arguments)

    def create(self, path: str, mode: int) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, path)

    def link(self, path: str, new: str) -> None:
        os.link(path, new, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def orphan(self, path: str) -> None:
        """Unlink a file that stays open for a while, and is written."""
        fd = os.open(path, os.O_RDWR)
        self.open_orphans.append(fd)
        os.unlink(path)
        os.pwrite(fd, POOL[:100_000], 0)
        if len(self.open_orphans) > 3:
            os.close(self.open_orphans.popleft())

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def rename(self, path: str, new: str) -> None:
        os.rename(path, new)

    def exchange(self, path: str, other: str) -> None:
        old, new = path.encode(), other.encode()
        if libc.renameat2(AT_FDCWD, old, AT_FDCWD, new, RENAME_EXCHANGE):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def write(self, path: str, offset: int, size: int, seed: int) -> None:
        with opened(path, os.O_WRONLY) as fd:
            self.buffer[:size] = bytes_of(seed, size)
            with memoryview(self.buffer) as view:
                is_whole(os.pwrite(fd, view[:size], offset), size)

    def append(self, path: str, size: int, seed: int) -> None:
        with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            is_whole(os.write(fd, bytes_of(seed, size)), size)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(path, size)

    def empty(self, path: str) -> None:
        with opened(path, os.O_WRONLY | os.O_TRUNC):
            pass

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def utime(self, path: str, mtime: int) -> None:
        os.utime(path, ns=(mtime, mtime))

    def setxattr(self, path: str, name: str, size: int, seed: int) -> None:
        os.setxattr(path, name, bytes_of(seed, size))

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(path, name)

    def fsync(self, path: str) -> None:
        with opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)

    def fdatasync(self, path: str) -> None:
        with opened(path, os.O_RDONLY) as fd:
            os.fdatasync(fd)


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def is_whole(done: int, size: int) -> None:
    """A write of two requests is cut short when the daemon dies in between."""
    if done < size:
        raise OSError(errno.EIO, f"{done} of {size} bytes were written")


class Event(Protocol):
    """What of multiprocessing's events is used."""

    def set(self) -> None: ...

    def is_set(self) -> bool: ...


def work(top: Path, manifest: Path, plan: Plan, stop: Event) -> None:
    """A worker process: do operations until one fails, and note what was done when."""
    os.chdir(top)
    os.umask(0)
    hands = Hands()
    log = os.open(manifest, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)

    def note(kind: str, what: object = None) -> None:
        os.write(log, json.dumps([kind, time.monotonic_ns(), what]).encode() + b"\n")

    while not stop.is_set():
        operation = plan.next()
        note("begins", operation)
        try:
            hands.do(operation)
        except OSError as error:
            note("failed", error.errno)
            return
        note("returned")
        plan.model.do(operation)
    note("stopped")


# --- what was there ----------------------------------------------------------

NEVER = 2**63


@dataclass
class Step:
    """A request that a worker's operation made: when that began, and when it returned."""

    operation: Operation
    began: int
    returned: int


def last_line(manifest: Path) -> tuple[str, int, Any]:
    """How a worker ended: `failed`, with an errno, or `stopped`; and when."""
    kind, when, what = json.loads(manifest.read_text().splitlines()[-1])
    return kind, when, what


def noted(manifest: Path) -> Iterator[tuple[Operation, int, int]]:
    """Each operation of a manifest, when it began, and when it returned, or NEVER."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for (kind, began, operation), (then, returned, _) in itertools.pairwise(lines):
        if kind == "begins":
            yield operation, began, returned if then == "returned" else NEVER


class History:
    """What one worker did between a mount and a kill."""

    def __init__(self, start: Model, manifest: Path) -> None:
        self.start = start
        self.manifest = manifest
        self.steps: list[Step] = []
        self.synced = 0
        """When the last fsync that returned began."""
        model = copy.deepcopy(start)
        self.states = [model.state()]
        """Before the first step, and after each."""
        for operation, began, returned in noted(manifest):
            if operation[0] in ("fsync", "fdatasync"):
                self.synced = began if returned < NEVER else self.synced
                continue
            for request in model.requests(operation):
                self.steps.append(Step(request, began, returned))
                model.do(request)
                self.states.append(model.state())

    def model(self, steps: int) -> Model:
        """What should be there after so many steps."""
        model = copy.deepcopy(self.start)
        for step in self.steps[:steps]:
            model.do(step.operation)
        return model

    def newest(self, steps: int) -> int:
        """When the last of so many steps began."""
        return self.steps[steps - 1].began if steps else 0

    def oldest_missing(self, steps: int) -> int:
        """When the first one that is not among so many steps returned."""
        return self.steps[steps].returned if steps < len(self.steps) else NEVER


def instant(histories: list[History], found: list[State], synced: int) -> list[int]:
    """How many steps of each worker were done at the one instant that is there.

    `synced` is a time at which everything that had returned was sure.
    """
    synced = max(synced, *(history.synced for history in histories))
    candidates = [
        [number for number, state in enumerate(history.states) if state == there]
        for history, there in zip(histories, found, strict=True)
    ]
    for chosen in itertools.product(*candidates):
        pairs = list(zip(histories, chosen, strict=True))
        there = max(synced, *(history.newest(steps) for history, steps in pairs))
        if there <= min(history.oldest_missing(steps) for history, steps in pairs):
            return list(chosen)
    lines = [f"What is there was never the tree; all was sure that had returned at {synced}."]
    for history, numbers, state in zip(histories, candidates, found, strict=True):
        sure = sum(step.returned < synced for step in history.steps)
        lines.append(
            f"{history.manifest}: {sure} of {len(history.steps)} steps are sure, the directory "
            f"is as after {numbers or 'none of them'}"
        )
        for number in numbers:
            lines.append(
                f"  the last of {number} steps began at {history.newest(number)}, "
                f"the next one returned at {history.oldest_missing(number)}"
            )
        if not numbers:
            lines += nearest(history, state, sure)
    pytest.fail("\n".join(lines))


def nearest(history: History, found: State, sure: int) -> list[str]:
    """How what is there differs from the state that is most like it."""

    def differing(number: int) -> list[str]:
        state = history.states[number]
        return sorted(p for p in found.keys() | state.keys() if found.get(p) != state.get(p))

    number = min(range(len(history.states)), key=lambda number: len(differing(number)))
    lines = [f"  most like the state after {number} steps (at least {sure} are due), but for:"]
    for path in differing(number)[:10]:
        lines += [
            f"    {path}: found    {found.get(path)}",
            f"    {path}: expected {history.states[number].get(path)}",
        ]
    around = range(max(0, number - 3), min(len(history.steps), number + 3))
    return [*lines, *(f"    step {i + 1}: {history.steps[i].operation}" for i in around)]


# --- moments -----------------------------------------------------------------

Files = dict[str, os.stat_result]


def files_in(directory: Path) -> Files:
    found = {}
    for entry in os.scandir(directory):
        try:
            found[entry.name] = os.stat(entry.path)
        except FileNotFoundError:
            pass  # deleted meanwhile
    return found


def grew(before: Files, now: Files) -> bool:
    return any(n in before and now[n].st_size > before[n].st_size for n in now)


def came(before: Files, now: Files) -> bool:
    return bool(now.keys() - before.keys())


def went(before: Files, now: Files) -> bool:
    return bool(before.keys() - now.keys())


def was_written(before: Files, now: Files) -> bool:
    return before["data.mdb"].st_mtime_ns != now["data.mdb"].st_mtime_ns


def lost_blocks(before: Files, now: Files) -> bool:
    return went(before, now) or any(
        n in before and now[n].st_blocks < before[n].st_blocks for n in now
    )


@dataclass(frozen=True)
class Moment:
    """What is seen in the store's files when the daemon is at something."""

    directory: str
    """Below the store; `*` is one of the regions."""
    comes: Callable[[Files, Files], bool]
    """Told the files before and now, whether it is now."""
    delay: float
    """The daemon is killed at most so many seconds later."""

    def wait(self, store: Path, randomness: random.Random) -> None:
        directory = store / self.directory.replace("*", randomness.choice(REGIONS))
        deadline = time.monotonic() + PATIENCE_SECONDS
        before = files_in(directory)
        while not self.comes(before, now := files_in(directory)):
            assert time.monotonic() < deadline, f"nothing happens in {directory}: {now}"
            before = now
            time.sleep(0.0003)
        time.sleep(randomness.uniform(0, self.delay))


MOMENTS = {
    "commit": Moment("*/journal", grew, 0.004),
    "checkpoint": Moment("metadata", was_written, 0.03),
    "metadata dump": Moment("*/journal", came, 0.1),
    "journal deleted": Moment("*/journal", went, 0.01),
    "reclaim": Moment("*/shards", lost_blocks, 0.02),
}
KINDS = ["any", "mount", "umount", *MOMENTS]


# --- the campaign ------------------------------------------------------------


def check(store: Store) -> None:
    """An unmounted store must be without any fault."""
    store.cli("fsck", store.store)


def heal(store: Store) -> None:
    """Wait until every node has all that it should have."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (status := store.status())["healthy"]:
        assert time.monotonic() < deadline, status
        time.sleep(0.1)


@dataclass
class Load:
    """Workers at work, and what they note."""

    processes: list[ForkProcess]
    manifests: list[Path]
    stop: Event

    def join(self) -> None:
        """Wait until the workers have ended; they must have ended well."""
        for process, manifest in zip(self.processes, self.manifests, strict=True):
            process.join(PATIENCE_SECONDS)
            assert process.exitcode is not None, f"the worker of {manifest} hangs"
            assert process.exitcode == 0, f"the worker of {manifest} had an error, see above"


class Campaign:
    """Loads and kills on one store."""

    def __init__(self, store: Store, base: Path, seed: str) -> None:
        self.store = store
        self.base = base
        self.random = random.Random(seed)
        self.models = [Model() for _ in range(WORKERS)]
        self.kills = self.rounds = self.steps = 0
        store.mount()
        for worker in range(WORKERS):
            self.top(worker).mkdir(0o755)
        store.umount()

    def top(self, worker: int) -> Path:
        return self.store.mountpoint / f"w{worker}"

    def round(self, kind: str) -> None:
        """A load, kills, and a look."""
        self.rounds += 1
        self.store.mount()
        with self.load(rarely_synced=kind not in MOMENTS and self.random.random() < 0.5) as load:
            if kind == "umount":
                synced = self.kill_at_umount(load)
            else:
                self.kill_under(load, kind)
                synced = 0
        self.store.clear_mount()
        assert not os.listdir(self.store.mountpoint), "something was written below the mount"
        if kind == "mount":
            for _ in range(3):
                self.kill_at_mount()
        self.store.mount()
        self.look_back(load, synced)
        if self.random.random() < 0.3:
            self.kill()
            self.store.clear_mount()
            self.store.mount()
            self.look_again()
        heal(self.store)
        self.store.umount()
        check(self.store)

    @contextmanager
    def load(self, rarely_synced: bool) -> Iterator[Load]:
        """Workers at work; none is left."""
        context = multiprocessing.get_context("fork")
        load = Load([], [], context.Event())
        # Two of them see to it that every moment comes.
        kinds = [JOURNAL_MOSTLY, BYTES_MOSTLY]
        kinds += self.random.choices([EVERYTHING, NAMES_MOSTLY, *kinds], k=WORKERS - 2)
        if rarely_synced:
            kinds = [EVERYTHING, *(weights | UNSYNCED for weights in kinds[1:])]
        try:
            for worker, weights in enumerate(self.random.sample(kinds, WORKERS)):
                manifest = self.base / f"round{self.rounds:03}-w{worker}.jsonl"
                randomness = random.Random(self.random.random())
                plan = Plan(copy.deepcopy(self.models[worker]), randomness, weights)
                process = context.Process(
                    target=work, args=(self.top(worker), manifest, plan, load.stop), daemon=True
                )
                process.start()
                load.processes.append(process)
                load.manifests.append(manifest)
            yield load
        finally:
            for process in load.processes:
                process.kill()
                process.join(PATIENCE_SECONDS)

    # -- kills

    def kill(self) -> None:
        assert self.store.alive(), "the daemon died by itself"
        self.kills += 1
        self.store.kill(clear=False)

    def kill_under(self, load: Load, kind: str) -> None:
        """Kill the daemon while the workers work."""
        time.sleep(self.random.uniform(0.05, 2))
        if kind in MOMENTS:
            MOMENTS[kind].wait(self.store.store, self.random)
        killed = time.monotonic_ns()
        self.kill()
        load.join()
        for manifest in load.manifests:
            kind, when, number = last_line(manifest)
            assert kind == "failed", f"{manifest}: {kind}, though the daemon was dead"
            assert number in DEAD, f"{manifest}: {errno.errorcode[number]}"
            assert when > killed, f"{manifest}: failed before the daemon was killed at {killed}"

    def kill_at_umount(self, load: Load) -> int:
        """Kill the daemon while it is unmounted; the time at which what had returned is sure."""
        time.sleep(self.random.uniform(0.05, 2))
        load.stop.set()
        load.join()
        for manifest in load.manifests:
            kind, _, number = last_line(manifest)
            assert kind == "stopped", f"{manifest}: {errno.errorcode[number]}"
        began = time.monotonic_ns()
        umount = subprocess.Popen(
            [*FUSESTORE, "umount", str(self.store.mountpoint)],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            # First the mount goes, then what is left is committed and checkpointed.
            while is_mounted(self.store.mountpoint) and umount.poll() is None:
                time.sleep(0.001)
            time.sleep(self.random.uniform(0, 0.06))
            self.kills += 1
            self.store.kill(clear=False)
            return began if umount.wait(PATIENCE_SECONDS) == 0 else 0
        finally:
            umount.kill()
            umount.wait()

    def kill_at_mount(self) -> None:
        """Kill the daemon while it mounts, or when it just has."""
        log = self.base / "mounts.log"
        with log.open("ab") as output:
            daemon = subprocess.Popen(
                [*FUSESTORE, "mount", "--foreground", self.store.store, self.store.mountpoint],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            lock = self.store.store / "fusestore.lock"
            while lock.read_text() != f"{daemon.pid}\n":
                assert daemon.poll() is None, f"no mount: {log.read_text()}"
                assert time.monotonic() < deadline, f"{lock} is not taken"
                time.sleep(0.001)
            time.sleep(self.random.uniform(0, 0.3))
            assert daemon.poll() is None, f"no mount: {log.read_text()}"
            self.kills += 1
        finally:
            daemon.kill()
            daemon.wait()
            self.store.clear_mount()
        assert TRACEBACK not in log.read_text(), log.read_text()

    # -- looks

    def look(self) -> list[State]:
        """What is in the directories of the workers; there is nothing else."""
        tops = [self.top(worker) for worker in range(WORKERS)]
        assert sorted(os.listdir(self.store.mountpoint)) == [top.name for top in tops]
        assert os.stat(self.store.mountpoint).st_nlink == 2 + WORKERS
        found = [look(top) for top in tops]
        inodes = sum(len({entry.same_as for entry in state.values()}) for state in found)
        assert self.store.status()["files"] == 1 + inodes
        return found

    def look_back(self, load: Load, synced: int) -> None:
        """Compare what is there with what the workers did, and go on from it."""
        histories = [
            History(model, manifest)
            for model, manifest in zip(self.models, load.manifests, strict=True)
        ]
        steps = instant(histories, self.look(), synced)
        self.models = [h.model(number) for h, number in zip(histories, steps, strict=True)]
        self.steps += sum(steps)
        for manifest in load.manifests:
            manifest.unlink()

    def look_again(self) -> None:
        """After a crash without any change it is the same."""
        for worker, found in enumerate(self.look()):
            expected = self.models[worker].state()
            assert found == expected, f"{self.top(worker)} changed by a crash alone"


def kinds_of_kill(randomness: random.Random) -> Iterator[str]:
    """All kinds, in an order of chance, again and again."""
    while True:
        yield from randomness.sample(KINDS, len(KINDS))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "number", [0, *(pytest.param(number, marks=pytest.mark.long) for number in range(1, 8))]
)
def test_kills_at_any_moment_leave_one_instant(
    make_store: Callable[..., Store],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    long: bool,
    number: int,
) -> None:
    """25 kills of each of 8 stores with `--long`, else about 4 of one."""
    model_seed = request.config.getoption("--model-seed")
    seed = f"{model_seed}/{number}"
    campaign = Campaign(make_store(), tmp_path, seed)
    kinds = kinds_of_kill(random.Random(seed))
    kind = ""
    try:
        while campaign.kills < (25 if long else 4):
            kind = next(kinds)
            campaign.round(kind)
            print(f"{kind}: {campaign.kills} kills, {campaign.steps} steps")
    except (Exception, pytest.fail.Exception) as error:
        if not campaign.store.alive():
            campaign.store.clear_mount()
        error.add_note(
            f"in round {campaign.rounds} ({kind}), kill {campaign.kills} of campaign {seed}; "
            f"to repeat: pytest {'--long ' * long}--model-seed {model_seed} "
            f"'{request.node.nodeid}'; the store and the manifests are in {tmp_path}"
        )
        raise


@pytest.mark.parametrize("weights", [EVERYTHING, NAMES_MOSTLY, BYTES_MOSTLY, JOURNAL_MOSTLY])
def test_without_a_kill_the_model_is_right(
    mounted: Store | Directory, request: pytest.FixtureRequest, weights: Weights
) -> None:
    """What the campaign compares with is what happens, on a plain directory, too."""
    top = mounted.mountpoint / "top"
    top.mkdir(0o755)
    plan = Plan(Model(), random.Random(request.config.getoption("--model-seed")), weights)
    plan.attribute_bytes = 300  # plain file systems do not take much more

    def body() -> None:
        os.chdir(top)
        os.umask(0)
        hands = Hands()
        for _ in range(1000):
            operation = plan.next()
            hands.do(operation)
            plan.model.do(operation)
        assert look(top) == plan.model.state()

    in_child(body)
