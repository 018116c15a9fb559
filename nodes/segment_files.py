"""The segments of a node: which files of its folders they are, and their descriptors.

Segments are opened without O_APPEND (with it Linux ignores the offset of
pwritev).  A segment and its directory entry are durable before its first byte is written.
A descriptor stays open as long as it is used: a segment that is deleted or
dropped from the cache can still be read by its holders.

Others may change the files: one that is not a segment, by its name or its kind, is
neither used nor deleted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from itertools import count
from pathlib import Path

from ..bounded_cache import LeastRecentlyUsed
from ..config.node_identity import NodeIdentity
from ..config.owner_record import Mount
from ..errors import NodeError
from ..format.records import SegmentKind
from ..format.segment_numbers import (
    FOLDERS,
    LISTED_MAX,
    segment_name,
    segment_number,
    segment_path,
)
from ..limits import DEFAULTS, Limits
from ..system import linux, process_limits
from ..system.beneath import Directory
from .base import Strays
from .journal_reserve import RESERVE_NAME, JournalReserve
from .place import FULL, NodePlace

logger = logging.getLogger(__name__)

_NOT_TO_BE_WRITTEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EMLINK)
"""Errors after which a file may still be readable, as may a file with several names."""
_KEPT = ".kept"
"""The suffix of a segment that was set aside; a number follows."""
DRAFT = ".new"
"""The suffix of a segment that is being replaced."""
_STRAYS_NAMED_MAX = 10


def rename_aside(folder: Directory, name: str) -> None:
    """Rename an entry durably to a name that nothing has."""
    taken = {e.name for e in folder.entries() if e.name.startswith(name + _KEPT)}
    kept = next(n for n in (f"{name}{_KEPT}{i}" for i in count(1)) if n not in taken)
    folder.replace(name, kept)


def _number(kind: SegmentKind, entry: os.DirEntry[str]) -> int | None:
    """Return the number of the segment with this name in the folder of its kind, or None."""
    number = segment_number(entry.name, FOLDERS[kind][1])
    # A file in place of a journal segment may hide one: reading it fails.
    # The places of shards are in their rows.
    if kind is SegmentKind.JOURNAL or (number is not None and entry.is_file(follow_symlinks=False)):
        return number
    return None


def _is_temporary(kind: SegmentKind, entry: os.DirEntry[str]) -> bool:
    """Return whether a file is a segment set aside, the draft of one, or the reserve."""
    if kind is SegmentKind.JOURNAL and entry.name == RESERVE_NAME:
        return entry.is_file(follow_symlinks=False)
    base = entry.name.removesuffix(DRAFT).partition(_KEPT)[0]
    is_ours = base != entry.name and segment_number(base, FOLDERS[kind][1]) is not None
    return is_ours and entry.is_file(follow_symlinks=False)


class Segment:
    """An open segment; the descriptor is closed after its last use."""

    __slots__ = ("allocated", "fd", "refused")

    def __init__(self, fd: int, refused: OSError | None = None) -> None:
        self.fd = fd
        self.refused = refused
        """Why it is open for reading only, although the node is not."""
        self.allocated = os.fstat(fd).st_size

    def __del__(self) -> None:
        os.close(self.fd)


class SegmentFiles(NodePlace):
    """The segments of a node that is a directory."""

    def __init__(
        self,
        path: Path,
        identity: NodeIdentity,
        *,
        read_only: bool = False,
        limits: Limits = DEFAULTS,
        owner: str = "",
        mount: Mount | None = None,
    ) -> None:
        """Use the directory of a node; see `NodePlace`."""
        super().__init__(path, identity, read_only=read_only, owner=owner, mount=mount)
        self._ours: set[tuple[SegmentKind, int]] | None = None
        """Once the node is claimed: the segments that were there, or were made since."""
        self.has_holes = True
        self._flags = os.O_RDONLY if read_only else os.O_RDWR
        self._limits = limits
        self._lock = threading.RLock()
        self._reserve = JournalReserve(lambda: self._folder(SegmentKind.JOURNAL))
        self._open = self._none_open()
        process_limits.register(self)
        self._strays: frozenset[str] = frozenset()
        """Names that were logged as ignored."""

    def _none_open(self) -> LeastRecentlyUsed[tuple[SegmentKind, int], Segment]:
        return LeastRecentlyUsed(self._limits.open_segments_max)

    def check(self) -> None:
        """See Node."""
        self._check_place()
        with self._errors("check its segments"), self._lock:
            for (kind, segment), opened in self._open.items():
                if os.fstat(opened.fd).st_nlink == 0:
                    raise NodeError(
                        f"Node {self._name} ({self.path}) lost {segment_path(kind, segment)}: "
                        "it was deleted."
                    )

    def claim(self) -> None:
        """See Node."""
        super().claim()
        if self._is_claimed:
            there = {(kind, segment) for kind in SegmentKind for segment in self.segments(kind)}
            self._ours = there

    def give_back(self) -> None:
        """See Node."""
        super().give_back()
        self._ours = None

    def segments(self, kind: SegmentKind) -> list[int]:
        """See Node."""
        found, strays = list[int](), list[str]()
        with self._errors("list its segments"):
            try:
                folder = self._folder(kind)
            except FileNotFoundError:
                return []
            for entry in folder.entries():
                number = _number(kind, entry)
                if number is not None:
                    found.append(number)
                elif len(strays) < _STRAYS_NAMED_MAX and not _is_temporary(kind, entry):
                    strays.append(entry.name)
                if len(found) > LISTED_MAX:
                    raise OSError(errno.EOVERFLOW, f"it has more than {LISTED_MAX:,}")
            self._ignore(kind, strays)
        return sorted(found)

    def strays(self) -> Strays:
        """See Node."""
        count, names = 0, list[str]()
        with self._errors("list its files"):
            for kind in FOLDERS:
                with contextlib.suppress(FileNotFoundError):
                    for entry in self._folder(kind).entries():
                        if _number(kind, entry) is None and not _is_temporary(kind, entry):
                            count += 1
                            if len(names) < _STRAYS_NAMED_MAX:
                                names.append(ascii(f"{FOLDERS[kind][0]}/{entry.name}"))
        return Strays(count, tuple(sorted(names)))

    def _ignore(self, kind: SegmentKind, strays: list[str]) -> None:
        """Log once that files which do not belong to this store are ignored."""
        names = {f"{FOLDERS[kind][0]}/{name}" for name in strays}
        new, self._strays = names - self._strays, self._strays | names
        if new:
            logger.warning(
                "Node %s (%s) has files that are not segments of this store, and are ignored: %s.",
                self._name,
                self.path,
                ", ".join(map(ascii, sorted(new))),
            )

    def _segment(
        self, kind: SegmentKind, segment: int, *, write: bool = False, create: bool = False
    ) -> Segment:
        """Return the open segment, for writing if requested; OSError if it cannot be opened."""
        with self._lock:
            found = self._open.get((kind, segment))
            if found is None or (write and found.refused):
                found = self._open_anew(kind, segment, create=create)
                if write and found.refused:
                    raise found.refused
                self._open[kind, segment] = found
            if create and self._ours is not None and (kind, segment) not in self._ours:
                self._check_owner()
                raise OSError(errno.EEXIST, "another program has made it")
            return found

    def _open_anew(self, kind: SegmentKind, segment: int, *, create: bool) -> Segment:
        folder, name = self._folder(kind), segment_name(kind, segment)
        try:
            return self._opened(folder, name)
        except FileNotFoundError:
            if not create:
                raise
        self._check_owner()
        made = Segment(self._create(kind, folder, name))
        if self._ours is not None:
            self._ours.add((kind, segment))
        if kind is SegmentKind.SHARDS:
            self.has_holes = linux.gives_holes(made.fd)
        os.fsync(made.fd)
        folder.sync()
        return made

    def close_unused(self) -> None:
        """Close all segments but those that may be written to; see `process_limits`."""
        if not self._lock.acquire(blocking=False):  # a thread that hangs may hold it
            return
        try:
            keys = [key for key, _ in self._open.items()]
            newest = {kind: max((n for k, n in keys if k is kind), default=0) for kind in FOLDERS}
            for kind, segment in keys:
                if segment != newest[kind]:
                    self._open.discard((kind, segment))
        finally:
            self._lock.release()

    def _create(self, kind: SegmentKind, folder: Directory, name: str) -> int:
        try:
            return folder.create(name, self._flags)
        except OSError as error:
            is_journal = kind is SegmentKind.JOURNAL
            if error.errno not in FULL or not is_journal or not self._reserve.become(name):
                raise
            return folder.open(name, self._flags)

    def _opened(self, folder: Directory, name: str) -> Segment:
        try:
            return Segment(folder.open(name, self._flags))
        except OSError as error:
            if self._flags == os.O_RDONLY or error.errno not in _NOT_TO_BE_WRITTEN:
                raise
            return Segment(folder.open(name, os.O_RDONLY), error.with_traceback(None))

    def opened(self, kind: SegmentKind, segment: int) -> Segment | None:
        """See Node."""
        if not self._lock.acquire(blocking=False):  # a thread that hangs may hold it
            return self._open.peek((kind, segment))
        try:
            return self._open.get((kind, segment))
        finally:
            self._lock.release()

    def _forget(self, kind: SegmentKind, segment: int) -> None:
        """A segment is gone: another with its number has to be made anew."""
        if self._ours is not None:
            self._ours.discard((kind, segment))

    def set_aside(self, kind: SegmentKind, segment: int) -> None:
        """See Node."""
        name = segment_name(kind, segment)
        with self._errors(f"set {segment_path(kind, segment)} aside"), self._lock:
            self._check_owner()
            self._open.discard((kind, segment))
            rename_aside(self._folder(kind), name)
            self._forget(kind, segment)

    def drop_aside(self) -> None:
        """See Node."""
        with self._errors("remove segments that were set aside"):
            for kind in SegmentKind:
                folder = self._folder(kind)
                kept = (entry for entry in folder.entries() if _KEPT in entry.name)
                for name in [entry.name for entry in kept if _is_temporary(kind, entry)]:
                    folder.unlink(name)
                folder.sync()

    def close(self) -> None:
        """See Node."""
        # Without the lock: a hanging thread may hold it, and its files stay open.
        self._open, self._directory, self._owner = self._none_open(), None, None
        self._lock_held.release()
