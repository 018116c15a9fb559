"""A tree of files as it was acknowledged, and the work on it that a client does.

The client is a process of its own, so that it can be killed when the mount hangs.  It does one
operation after another and reports how each ended.  The model follows: an fsync that returned
acknowledges everything before it.  Of a path that changed since, a crash may leave any content
that it had since, whole or in part: a write of many requests can end between two of them.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from support.mounted_store import sync
from support.posixly import read_uncached

MIB = 1 << 20
PAGE_BYTES = 4096
FOLDERS = ("a", "b", "a/c")
FILES_MAX = 24
TREE_BYTES_MAX = 16 * MIB
SIZES = (0, 1, 100, 5000, 5000, 40_000, 200_000, 1_500_000)
FILLER = "filler"
POOL = random.Random(0).randbytes(4 * MIB)
FILL_BLOCK = POOL[:MIB]

Content = bytes | None
"""The bytes of a file; None: there is no file."""
Kind = Literal["put", "patch", "cut", "unlink", "rename", "sync", "read"]


class BrokenPromiseError(AssertionError):
    """The store did what it must not do."""


# --- a process that can be given up ---------------------------------------------


class Child:
    """A forked process that reports what it does, and is killed when it is late."""

    def __init__(self, body: Callable[[Callable[[Any], None]], None]) -> None:
        reader, writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(reader)
            with os.fdopen(writer, "wb", buffering=0) as pipe:

                def report(what: Any) -> None:
                    pipe.write(pickle.dumps(what))

                try:
                    body(report)
                except BaseException as error:
                    pipe.write(pickle.dumps(error))
                os._exit(0)
        os.close(writer)
        self._reader = reader

    def reports(self, seconds: float) -> tuple[list[Any], bool]:
        """What it reported until it ended, and whether it ended in time."""
        until, parts = time.monotonic() + seconds, []
        while True:
            ready = select.select([self._reader], [], [], max(0.0, until - time.monotonic()))[0]
            part = os.read(self._reader, MIB) if ready else b""
            if not part:
                break
            parts.append(part)
        if not ready:
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._reader)
        return list(_unpickled(b"".join(parts))), bool(ready)


def _unpickled(data: bytes) -> Iterator[Any]:
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        try:
            yield pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            return  # it was killed while it reported


def in_time(seconds: float, what: str, body: Callable[[], Any]) -> Any:
    """What `body` returns in a process of its own; BrokenPromiseError when it takes longer."""
    found, ended = Child(lambda report: report(body())).reports(seconds)
    if not ended or not found:
        raise BrokenPromiseError(
            f"{what} hangs for {seconds:.0f} s" if not ended else f"{what} died"
        )
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


# --- operations ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """What the client does."""

    kind: Kind
    path: str
    to: str = ""
    offset: int = 0
    size: int = 0
    seed: int = 0

    @property
    def data(self) -> bytes:
        """The bytes that it writes."""
        return POOL[self.seed : self.seed + self.size]

    def paths(self) -> set[str]:
        """What it changes or reads."""
        return {self.path, self.to} - {"", "."} if self.kind != "sync" else set()


Outcome = bytes | int | None
"""0: it succeeded; an errno; bytes that were read; None: it is not known."""


def do(top: Path, operation: Operation) -> bytes | int:
    """Do an operation; the bytes that it read, or 0; OSError."""
    path = top / operation.path
    match operation.kind:
        case "put" | "patch":
            how = os.O_TRUNC if operation.kind == "put" else 0
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | how)
            try:
                data, done = memoryview(operation.data), 0
                while done < len(data):
                    done += os.pwrite(fd, data[done : done + MIB], operation.offset + done)
            finally:
                os.close(fd)
        case "cut":
            os.truncate(path, operation.size)
        case "unlink":
            path.unlink()
        case "rename":
            path.rename(top / operation.to)
        case "sync":
            sync(path)
        case "read":
            return read_uncached(path)
    return 0


class Client:
    """A process that does operations; it skips paths on which one failed."""

    def __init__(self, top: Path, operations: Sequence[Operation]) -> None:
        self._operations = operations

        def body(report: Callable[[Any], None]) -> None:
            failed: set[str] = set()
            for operation in operations:
                if failed & operation.paths():
                    failed |= operation.paths()
                    report("skipped")
                    continue
                try:
                    report(do(top, operation))
                except OSError as error:
                    failed |= operation.paths()
                    report(error.errno)

        self._child = Child(body)

    def outcomes(self, seconds: float) -> tuple[list[tuple[Operation, Outcome]], bool]:
        """How each operation ended that was begun, and whether all ended in time."""
        reports, ended = self._child.reports(seconds)
        for report in reports:
            if isinstance(report, BaseException):
                raise report
        found: list[tuple[Operation, Outcome]] = [
            (operation, report)
            for operation, report in zip(self._operations, reports, strict=False)
            if report != "skipped"
        ]
        if len(reports) < len(self._operations):
            found.append((self._operations[len(reports)], None))
        return found, ended


# --- the model ------------------------------------------------------------------------


@dataclass
class Model:
    """What the mount must show now, and what a crash may leave."""

    live: dict[str, Content] = field(default_factory=dict)
    """By path, also those that were deleted since the last fsync."""
    since: dict[str, list[Content]] = field(default_factory=dict)
    """What a path had since the last fsync that returned, from then on; only changed paths."""
    open: set[str] = field(default_factory=set)
    """Paths of which it is not known how the last change ended."""

    def choose(self, chance: random.Random, count: int) -> list[Operation]:
        """Choose operations as if each succeeded."""
        sizes = {path: len(data) for path, data in self.live.items() if data is not None}
        for path in self.open:
            sizes.pop(path, None)
        return [self._choose(chance, sizes) for _ in range(count)]

    def _choose(self, chance: random.Random, sizes: dict[str, int]) -> Operation:
        kinds: list[Kind] = ["put", "put", "put", "patch", "patch", "cut", "unlink", "rename"]
        kind: Kind = chance.choice([*kinds, "read", "read", "sync", "sync", "sync"])
        if len(sizes) >= FILES_MAX or sum(sizes.values()) > TREE_BYTES_MAX:
            kind = "unlink"
        if not sizes and kind != "sync":
            kind = "put"
        if kind == "sync":
            return Operation(kind, ".")
        seed, size = chance.randrange(len(POOL) // 2), chance.choice(SIZES)
        new = f"{chance.choice(FOLDERS)}/{chance.randrange(40)}"
        if kind == "put":
            path = new if chance.random() < 0.7 or not sizes else chance.choice(sorted(sizes))
            sizes[path] = size
            return Operation(kind, path, size=size, seed=seed)
        path = chance.choice(sorted(sizes))
        match kind:
            case "patch":
                offset = chance.randrange(sizes[path] + 1)
                sizes[path] = max(sizes[path], offset + size)
                return Operation(kind, path, offset=offset, size=size, seed=seed)
            case "cut":
                sizes[path] = size
                return Operation(kind, path, size=size)
            case "unlink":
                del sizes[path]
            case "rename":
                if new == path:
                    return Operation("read", path)
                sizes[new] = sizes.pop(path)
                return Operation(kind, path, to=new)
        return Operation(kind, path)

    def follow(self, operation: Operation, outcome: Outcome) -> None:
        """Take note of how an operation ended; BrokenPromiseError if it read what it must not."""
        if operation.kind == "read":
            if isinstance(outcome, bytes):
                self._compare(operation.path, outcome)
            return
        if operation.kind == "sync":
            if outcome == 0:
                self.acknowledged()
            return
        for path, new in self._effects(operation):
            before = self.live.get(path)
            self.since.setdefault(path, [before])
            self.since[path].append(new)
            self.live[path] = new
            if outcome == 0:
                self.open.discard(path)
            else:
                self.open.add(path)

    def _effects(self, operation: Operation) -> list[tuple[str, Content]]:
        old = self.live.get(operation.path) or b""
        match operation.kind:
            case "put":
                return [(operation.path, operation.data)]
            case "patch":
                end = operation.offset + operation.size
                return [(operation.path, old[: operation.offset] + operation.data + old[end:])]
            case "cut":
                return [(operation.path, old[: operation.size].ljust(operation.size, b"\0"))]
            case "unlink":
                return [(operation.path, None)]
            case _:
                return [(operation.path, None), (operation.to, old)]

    def acknowledged(self) -> None:
        """All that was done is safe now."""
        for path in [path for path in self.since if path not in self.open]:
            del self.since[path]

    def found(self, tree: dict[str, Content | int], crashed: bool) -> None:
        """Compare with the tree that a mount shows; after a crash it is the truth from now on."""
        for path in sorted({*tree, *self.live} - {FILLER}):
            found = tree.get(path)
            if isinstance(found, int):
                raise BrokenPromiseError(f"{path} cannot be read: {errno.errorcode[found]}")
            if crashed or path in self.open:
                versions = self.since.get(path, [self.live.get(path)])
                if not may_be(found, versions):
                    raise BrokenPromiseError(f"{path} {_differ(found, versions)}")
                self.live[path] = found
                if crashed:
                    self.since.pop(path, None)
                elif path in self.since:
                    self.since[path].append(found)
                self.open.discard(path)
            else:
                self._compare(path, found)
        for path in [p for p, data in self.live.items() if data is None and p not in self.since]:
            del self.live[path]

    def _compare(self, path: str, found: Content) -> None:
        if path not in self.open and found != self.live.get(path):
            raise BrokenPromiseError(f"{path} {_differ(found, [self.live.get(path)])}")


def may_be(found: Content, versions: Sequence[Content]) -> bool:
    """Whether a crash may leave this of a path that had these contents, one after another."""
    if found in versions:
        return True
    some = [version for version in versions if version is not None]
    if found is None or not some or len(found) > max(map(len, some)):
        return False
    return all(
        any(version[at : at + len(block)] == block for version in some)
        for at in range(0, len(found), PAGE_BYTES)
        if (block := found[at : at + PAGE_BYTES])
    )


def _differ(found: Content, versions: Sequence[Content]) -> str:
    def text(content: Content) -> str:
        return "nothing" if content is None else f"{len(content)} bytes"

    wanted = versions[-1]
    where = ""
    if found is not None and wanted is not None:
        at = next((i for i, (x, y) in enumerate(zip(found, wanted, strict=False)) if x != y), None)
        where = f", which differ at {at}" if at is not None else ""
        if at is not None and not any(found[at : at + PAGE_BYTES]):
            where += " (zeros)"
    return f"has {text(found)}{where}, not {' or '.join(map(text, versions))}"


def tree_of(top: Path) -> dict[str, Content | int]:
    """All files below a directory, read past the page cache; an errno where that failed."""
    found: dict[str, Content | int] = {}

    def failed(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(top, onerror=failed):
        for name in names:
            path = Path(folder, name)
            try:
                found[str(path.relative_to(top))] = read_uncached(path)
            except OSError as error:
                found[str(path.relative_to(top))] = error.errno or errno.EIO
    return found
