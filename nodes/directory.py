"""A node that is a directory of a local file system.

    node.toml                 identity
    owner                     the mount that uses it, or did last (nodes/place)
    journal/00000001.log      journal segments
    shards/00000001.seg       shard segments

Room is allocated ahead of the bytes of shards, in steps, without changing the size.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Sequence

from typing_extensions import Buffer

from ..config.node_identity import IDENTITY_NAME
from ..config.owner_record import OWNER_NAME
from ..errors import (
    NodeError,
    NodeFullError,
)
from ..format.records import SegmentKind
from ..format.segment_numbers import (
    FOLDERS,
    segment_name,
    segment_path,
)
from ..system import linux
from .base import Space
from .journal_reserve import RESERVE_NAME
from .place import FULL, EndError
from .segment_files import DRAFT, Segment, SegmentFiles, rename_aside

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 4096
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)


def _drop_cached(descriptor: int, offset: int, length: int) -> None:
    """Drop durable bytes from the page cache, if the file system supports this."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


class DirectoryNode(SegmentFiles):
    """Keeps segments in a directory; see `base.Node` for the contract."""

    def write(
        self, kind: SegmentKind, segment: int, offset: int, buffers: Sequence[Buffer]
    ) -> None:
        """See Node."""
        with self._errors(f"write {segment_path(kind, segment)}"):
            target = self._segment(kind, segment, write=True, create=True)
            views = [memoryview(buffer).cast("B") for buffer in buffers]
            end = offset + sum(len(view) for view in views)
            with self._lock:
                if end > target.allocated:
                    self._allocate(kind, target, max(offset, target.allocated), end)
            while views:
                written = os.pwritev(target.fd, views, offset)
                if written == 0:
                    raise OSError(errno.EIO, "a write took no bytes")
                offset += written
                while views and written >= len(views[0]):
                    written -= len(views.pop(0))
                if written:
                    views[0] = views[0][written:]

    def _allocate(self, kind: SegmentKind, target: Segment, start: int, end: int) -> None:
        """Find room for start <= i < end before it is written, and more if there is much."""
        ahead = self._limits.shard_preallocate_bytes if kind is SegmentKind.SHARDS else 0
        if ahead and self._is_scarce(target.fd):
            ahead = 0
        try:
            linux.allocate(target.fd, start, end - start + ahead)
            end += ahead
        except OSError as error:
            if error.errno in FULL:
                if kind is SegmentKind.JOURNAL:
                    self._reserve.give(end - start)
                linux.allocate(target.fd, start, end - start)
            elif error.errno not in _UNSUPPORTED:
                raise
        target.allocated = end

    def _is_scarce(self, descriptor: int) -> bool:
        """Whether room is so scarce that none is to be allocated ahead."""
        found = os.fstatvfs(descriptor)
        return found.f_bavail * found.f_frsize < self._limits.scarce_bytes

    def read(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes:
        """See Node."""
        with self._errors(f"read {segment_path(kind, segment)}"):
            source = self._segment(kind, segment)
            data = os.pread(source.fd, length, offset)
            while len(data) < length:
                more = os.pread(source.fd, length - len(data), offset + len(data))
                if not more:
                    raise EndError(errno.ENODATA, f"it ends before byte {offset + length}")
                data += more
            return data

    def read_back(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes:
        """See Node."""
        with self._errors(f"read {segment_path(kind, segment)} back"):
            source = self._segment(kind, segment)
            os.fdatasync(source.fd)
            _drop_cached(source.fd, offset, length)
        return self.read(kind, segment, offset, length)

    def read_now(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes | None:
        """See Node."""
        source = self.opened(kind, segment)
        if source is None:
            return None
        buffer = bytearray(length)
        try:
            if os.preadv(source.fd, [buffer], offset, os.RWF_NOWAIT) == length:
                return buffer  # type: ignore[return-value]
        except OSError:
            pass
        return None

    def size(self, kind: SegmentKind, segment: int) -> int:
        """See Node."""
        with self._errors(f"examine {segment_path(kind, segment)}"):
            opened = self.opened(kind, segment)
            if opened is not None:
                return os.fstat(opened.fd).st_size
            return self._folder(kind).look_at_file(segment_name(kind, segment)).st_size

    def flush(self, kind: SegmentKind, segments: Sequence[int]) -> None:
        """See Node."""
        for segment in segments:
            try:
                with self._errors(f"flush {segment_path(kind, segment)}"):
                    target = self._segment(kind, segment)
                    os.fdatasync(target.fd)
                    if kind == SegmentKind.SHARDS:  # the mount's own cache has these bytes, too
                        _drop_cached(target.fd, 0, 0)
            except NodeFullError as error:  # what was written may be gone
                raise NodeError(str(error)) from error

    def is_shared(self, kind: SegmentKind, segment: int) -> bool:
        """See Node."""
        with self._errors(f"examine {segment_path(kind, segment)}"):
            return os.fstat(self._segment(kind, segment).fd).st_nlink > 1

    def truncate(self, kind: SegmentKind, segment: int, size: int) -> None:
        """See Node."""
        with self._errors(f"truncate {segment_path(kind, segment)}"):
            self._check_owner()
            try:
                target = self._segment(kind, segment, write=True)
            except OSError as error:
                if error.errno != errno.EMLINK:  # another name keeps the room
                    raise
                return
            os.ftruncate(target.fd, size)
            target.allocated = size

    def punch(self, segment: int, offset: int, length: int) -> None:
        """See Node."""
        start = -(-offset // _BLOCK_BYTES) * _BLOCK_BYTES
        end = (offset + length) // _BLOCK_BYTES * _BLOCK_BYTES
        if end <= start:
            return
        with self._errors(f"free room in {segment_path(SegmentKind.SHARDS, segment)}"):
            try:
                self._check_owner()
                target = self._segment(SegmentKind.SHARDS, segment, write=True)
                linux.punch_hole(target.fd, start, end - start)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno not in (*_UNSUPPORTED, errno.EMLINK):
                    raise

    def replace(self, kind: SegmentKind, segment: int, content: Buffer) -> None:
        """See Node."""
        name = segment_name(kind, segment)
        draft = name + DRAFT
        with self._errors(f"replace {segment_path(kind, segment)}"):
            self._check_owner()
            folder = self._folder(kind)
            if self._ours is not None and (kind, segment) not in self._ours and folder.has(name):
                raise OSError(errno.EEXIST, "another program has made it")
            with contextlib.suppress(FileNotFoundError):
                folder.unlink(draft)
            try:
                with open(folder.create(draft, os.O_WRONLY), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                with self._lock:
                    self._open.discard((kind, segment))  # else `check` would miss the old file
                    self._check_owner()
                    try:
                        folder.replace(draft, name)
                    except IsADirectoryError:  # it is somebody's: it stays, under another name
                        rename_aside(folder, name)
                        folder.replace(draft, name)
                    if self._ours is not None:
                        self._ours.add((kind, segment))
            except OSError:
                with contextlib.suppress(OSError):
                    folder.unlink(draft)
                raise

    def delete(self, kind: SegmentKind, segment: int) -> None:
        """See Node."""
        with self._errors(f"delete {segment_path(kind, segment)}"), self._lock:
            self._check_owner()
            folder, name = self._folder(kind), segment_name(kind, segment)
            try:
                folder.unlink(name)
            except IsADirectoryError:
                rename_aside(folder, name)
            except FileNotFoundError:
                pass
            folder.sync()
            self._open.discard((kind, segment))
            self._forget(kind, segment)

    def space(self) -> Space:
        """See Node."""
        device = self._stat()[0].st_dev
        with self._errors("report its free space"):
            found = os.statvfs(self.path)
        total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        return Space(device, total, free, found.f_favail if found.f_files else None)

    def keep_reserve(self, length: int) -> None:
        """See Node."""
        with self._errors("keep room for its journal"), self._lock:
            self._reserve.fill(length)

    def bytes_used(self) -> int:
        """See Node."""
        total = 0
        with self._errors("report its size"):
            for kind in FOLDERS:
                for entry in self._folder(kind).entries():
                    with contextlib.suppress(FileNotFoundError):  # it was deleted meanwhile
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        return total

    def held(self) -> dict[int, int]:
        """See Node."""
        kind, found = SegmentKind.SHARDS, dict[int, int]()
        for segment in self.segments(kind):
            with self._errors(f"examine {segment_path(kind, segment)}"):
                try:
                    seen = self._folder(kind).look_at_file(segment_name(kind, segment))
                except FileNotFoundError:  # it was deleted meanwhile
                    continue
                if seen.st_nlink == 1:
                    found[segment] = seen.st_blocks * 512
        return found

    def remove(self) -> None:
        """See Node.  The identity goes last."""
        with self._errors("be removed"):
            directory = self._top()
            with contextlib.suppress(FileNotFoundError):
                self._folder(SegmentKind.JOURNAL).unlink(RESERVE_NAME)
            for name, _ in reversed(FOLDERS.values()):
                directory.remove_folder(name)
            with contextlib.suppress(FileNotFoundError):
                directory.unlink(OWNER_NAME)
            directory.unlink(IDENTITY_NAME)
