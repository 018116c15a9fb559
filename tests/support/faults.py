"""A node that fails as real ones do.

The fault model: from its n-th operation on, or only at it, a node's write,
flush or read raises EIO or ENOSPC; a failed write may have left a part of its
bytes; a node may be gone for good.  Not modelled: a node that lies about a
flush.
"""

from __future__ import annotations

import builtins
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from typing_extensions import Buffer

from fusestore.config import node_identity, owner_record
from fusestore.errors import NodeError, NodeFullError
from fusestore.format.records import HEADER_BYTES, SegmentKind
from fusestore.members import member
from fusestore.nodes.base import Node
from fusestore.system import strict_toml


class FaultyNode:
    """Passes everything on to a node, until it is told not to."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.operations = 0
        self.fail_at: int | None = None
        self.for_good = True
        self.full = False

    def _count(self) -> bool:
        """Whether this operation is to fail."""
        self.operations += 1
        if self.fail_at is None:
            return False
        if self.for_good:
            return self.operations >= self.fail_at
        return self.operations == self.fail_at

    def _error(self) -> NodeError:
        return NodeFullError("no room, as told") if self.full else NodeError("failed, as told")

    def write(
        self, kind: SegmentKind, segment: int, offset: int, buffers: Sequence[Buffer]
    ) -> None:
        """Write all, or a part and fail."""
        if self._count():
            whole = b"".join(bytes(buffer) for buffer in buffers)
            self.node.write(kind, segment, offset, [whole[: len(whole) // 2]])
            raise self._error()
        self.node.write(kind, segment, offset, buffers)

    def flush(self, kind: SegmentKind, segments: Sequence[int]) -> None:
        """Flush, or fail."""
        if segments and self._count():
            raise self._error()
        self.node.flush(kind, segments)

    def read(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes:
        """Read, or fail."""
        if self._count():
            raise self._error()
        return self.node.read(kind, segment, offset, length)

    def read_now(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes | None:
        """Never have it at hand, so that every read counts."""
        return None

    def opened(self, kind: SegmentKind, segment: int) -> None:
        """Be asked for everything."""

    def check(self) -> None:
        """Fail when the node is gone for good."""
        if self.fail_at is not None and self.for_good and self.operations >= self.fail_at:
            raise self._error()
        self.node.check()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.node, name)


class BadSectors:
    """Places on disks that cannot be read: every read that touches one fails with EIO.

    They belong to the files that are there when they are named, not to their paths: a
    file that is written anew lies elsewhere.  With `remaps`, a place that is written can be
    read again, as disks do it.  Not modelled: what is read through a map (LMDB's pages).
    Use as a context manager.
    """

    def __init__(self, *, remaps: bool = False) -> None:
        self._remaps = remaps
        self._bad: list[tuple[int, int, int, int]] = []
        self._kept: list[BinaryIO] = []
        self._patches = pytest.MonkeyPatch()

    def add(self, path: Path, start: int, end: int) -> None:
        """Let start <= i < end of a file be unreadable."""
        self._kept.append(path.open("rb"))  # else another file may get the inode's number
        about = path.stat()
        self._bad.append((about.st_dev, about.st_ino, start, end))

    def clear(self, path: Path | None = None) -> None:
        """All can be read again, or all of a file."""
        about = path.stat() if path is not None else None
        self._bad = [
            bad
            for bad in self._bad
            if about is not None and bad[:2] != (about.st_dev, about.st_ino)
        ]

    def _is_bad(self, descriptor: int, offset: int, length: int) -> bool:
        about = os.fstat(descriptor)
        return any(
            (device, inode) == (about.st_dev, about.st_ino)
            and offset < end
            and offset + length > start
            for device, inode, start, end in self._bad
        )

    def _check(self, descriptor: int, offset: int, length: int) -> None:
        if self._is_bad(descriptor, offset, length):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _written(self, descriptor: int, offset: int, length: int) -> None:
        """A disk puts other sectors in the place of bad ones that are written."""
        about = os.fstat(descriptor)
        left = []
        for device, inode, start, end in self._bad:
            if (device, inode) != (about.st_dev, about.st_ino):
                left.append((device, inode, start, end))
                continue
            before, after = min(end, offset), max(start, offset + length)
            left += [(device, inode, a, b) for a, b in ((start, before), (after, end)) if a < b]
        self._bad = left

    def __enter__(self) -> BadSectors:
        pread, preadv, pwritev = os.pread, os.preadv, os.pwritev
        operation, opened = member.read_operation, builtins.open

        def bad_pread(descriptor: int, length: int, offset: int) -> bytes:
            self._check(descriptor, offset, length)
            return pread(descriptor, length, offset)

        def bad_preadv(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
            self._check(descriptor, offset, sum(map(len, buffers)))
            return preadv(descriptor, buffers, offset, flags)

        def noted_pwritev(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
            written = pwritev(descriptor, buffers, offset, flags)
            if self._remaps:
                self._written(descriptor, offset, written)
            return written

        def bad_operation(descriptor: int, offset: int, buffer: Any) -> Any:
            bad = self._is_bad(descriptor, offset, len(buffer))
            return operation(-1 if bad else descriptor, offset, buffer)

        def bad_open(file: Any, mode: str = "rb", buffering: int = -1) -> Any:
            stream = opened(file, mode, buffering)
            if "r" in mode and self._is_bad(stream.fileno(), 0, 1 << 40):
                stream.close()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return stream

        self._patches.setattr(os, "pread", bad_pread)
        self._patches.setattr(os, "preadv", bad_preadv)
        self._patches.setattr(os, "pwritev", noted_pwritev)
        self._patches.setattr(member, "read_operation", bad_operation)
        for module in (strict_toml, node_identity, owner_record):
            self._patches.setattr(module, "open", bad_open, raising=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.undo()
        for file in self._kept:
            file.close()


class SlowNode:
    """Passes everything on; a write of a shard elsewhere than at `but` waits for a gate."""

    def __init__(self, node: Any, gate: threading.Event, but: int) -> None:
        self.node, self.gate, self.but = node, gate, but

    def write(
        self, kind: SegmentKind, segment: int, offset: int, buffers: Sequence[Buffer]
    ) -> None:
        """Write, a shard when the gate is open."""
        if kind is SegmentKind.SHARDS and offset + HEADER_BYTES != self.but:
            self.gate.wait(20)
        self.node.write(kind, segment, offset, buffers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.node, name)


class HangingNode:
    """Passes everything on to a node; while it hangs, what may block does."""

    def __init__(self, node: Any, after: int | None = None) -> None:
        """With `after` it hangs by itself once it was asked so many things."""
        self.node = node
        self.awake = threading.Event()
        self.awake.set()
        self.left = after

    def hang(self) -> None:
        """From now on nothing returns."""
        self.awake.clear()

    def read_now(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes | None:
        """Never have it at hand."""
        return None

    def opened(self, kind: SegmentKind, segment: int) -> None:
        """Be asked for everything."""

    def close(self) -> None:
        """Not a call of the medium."""
        self.node.close()

    def is_owned(self) -> bool:
        """Not a call of the medium, either."""
        return bool(self.node.is_owned())

    def refuse_owner(self) -> None:
        """Nor is this."""
        self.node.refuse_owner()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.node, name)
        if not callable(method):
            return method

        def wait(*arguments: Any) -> Any:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    self.left = None
                    self.hang()
            assert self.awake.wait(60)
            return method(*arguments)

        return wait
