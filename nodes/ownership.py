"""Who may write a node: the owner record in its directory, as one mount sees it.

A lock (system/locks) keeps out the processes that its file system tells of it.  The record
keeps out the others: machines that share the directory by a file system whose locks do
not reach them.

A mount reads the records of all nodes first (`refuse`), then writes its own on all of them
(`claim`), and only then reads a journal (if all owners have ended, the other way round:
store/claims).  Whoever owned a node until then looks at the record after each flush and
before it acknowledges anything.  What it acknowledged was
thus flushed before its record was replaced, so the new owner reads it.

A record that cannot be read, or is damaged, says nothing new if those of other nodes can be
read and none stands against the mount (`refusals`): it is replaced.  A running mount
replaces its own if a lock keeps out all others.

A record is replaced twice.  It is written in place: a machine that has the file open on a
network file system reads that from the server.  Then another file gets its name: on a
local file system one system call without I/O shows that the old one has no name any more.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..config.owner_record import (
    OWNER_BYTES,
    OWNER_NAME,
    OWNER_UNKNOWN,
    UNREAD,
    Mount,
    OwnerRecord,
    open_past_cache,
    read_owner,
    read_past_cache,
)
from ..errors import NodeBusyError, NodeError, NodeFencedError, UnreadOwnerError
from ..system import linux
from ..system.beneath import Directory
from .base import Node

logger = logging.getLogger(__name__)


class _OpenRecord:
    """An open record; the descriptor is closed when the last user lets go."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Ownership:
    """The owner record of an open node directory; methods raise NodeError and OSError."""

    def __init__(
        self,
        directory: Directory,
        path: Path,
        name: str,
        mount: Mount,
        *,
        locked: bool,
        read_only: bool,
    ) -> None:
        """Read the record; `locked`: a lock keeps out whoever its file system tells of it.

        NodeError if another version wrote the record, and the node may be written.
        """
        self._record: _OpenRecord | None = None
        """The record that this mount wrote."""
        self._directory, self._path, self._name, self._mount = directory, path, name, mount
        self._inode = os.fstat(directory.fd).st_ino
        self._mine = mount.record(self._inode).encode()
        self._is_local = linux.is_local(directory.fd)
        self._is_alone = locked and self._is_local
        self._writing = threading.RLock()
        self.found: OwnerRecord | None = None
        """The record as it was when the node was opened."""
        self._unread: UnreadOwnerError | None = None
        """Why that record is in doubt."""
        try:
            self.found = self._read()
            if self.found is not None and not self.found.is_intact:
                self._unread = self._damaged()
        except UnreadOwnerError as error:
            self.found, self._unread = UNREAD, error
        except NodeError:
            if not read_only and not mount.take_over:
                raise

    def _read(self) -> OwnerRecord | None:
        return read_owner(self._directory, self._path, past_cache=not self._is_local)

    def _damaged(self) -> UnreadOwnerError:
        return UnreadOwnerError(f"{self._path / OWNER_NAME} does not match its checksum.")

    def refuse(self) -> None:
        """Raise NodeBusyError if another mount owns the node, or may; UnreadOwnerError."""
        found, mine = self.found, self._mount
        if found is None or found.ended or mine.take_over or found.mount in mine.ended:
            return
        if self._unread is not None and mine.may_replace_unread:
            return
        if found == UNREAD:
            raise UnreadOwnerError(f"{self._unread} {OWNER_UNKNOWN}")
        if found.mount == mine.nonce:
            return
        if mine.process.shares_machine(found.process):
            is_copy = found.directory != mine.record(self._inode).directory
            if not is_copy and mine.process.sees_running(found.process):
                raise NodeBusyError(
                    f"Node {self._name} ({self._path}) is in use by process "
                    f"{found.process.number}, which serves another mount: unmount that first."
                )
            return  # its process has ended, or the lock says that it has
        raise NodeBusyError(
            f"Node {self._name} ({self._path}) is in use on another machine, by {_who(found)}, or "
            "was when it was copied: unmount the store there. If that machine never writes to "
            "the node again, mount once with -o take_over."
        )

    def claim(self) -> None:
        """Write this mount's record durably in the place of the one that was found.

        NodeBusyError if another mount has written its own since.
        """
        now = None if self._mount.take_over else self._read_if_possible()
        if now is not None and now != self.found and now.mount != self._mount.nonce:
            raise NodeBusyError(
                f"Another mount has begun to use node {self._name} ({self._path}) at the same "
                "time: try again."
            )
        if self._unread is not None and self._mount.may_replace_unread:
            logger.warning("%s It is written anew.", self._unread)
        self._put(self._mine)
        self._adopt()

    def _read_if_possible(self) -> OwnerRecord | None:
        """Return the record; UNREAD if it could not be read when the node was opened either."""
        try:
            return self._read()
        except UnreadOwnerError:
            if self._unread is None:
                raise
            return UNREAD

    def _put(self, content: bytes) -> None:
        """Replace the record; on a device without room in place only, which needs none.

        Whoever shares a file system that knows no link counts reads the record anyway; on a
        local one, the lock has kept out everybody else.
        """
        is_written = False
        with self._writing:
            with contextlib.suppress(OSError):  # it is damaged, a link, or may not be written
                _write(self._directory.open(OWNER_NAME, os.O_WRONLY), content)
                is_written = True
            try:
                self._replace(content)
            except OSError as error:
                if not is_written or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise

    def _replace(self, content: bytes) -> None:
        """Give the record's name to a new file."""
        draft = f".{OWNER_NAME}.{self._mount.nonce[:8]}"  # another machine may do the same
        with contextlib.suppress(FileNotFoundError):
            self._directory.unlink(draft)
        try:
            _write(self._directory.create(draft, os.O_WRONLY), content)
            self._directory.replace(draft, OWNER_NAME)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                self._directory.unlink(draft)
            raise

    def _adopt(self) -> None:
        """Watch the file that has the record's name now."""
        if self._is_local:
            fd = self._directory.open(OWNER_NAME, os.O_RDONLY)
        else:
            fd = open_past_cache(self._directory)
        self._record = _OpenRecord(fd)

    def is_sure(self) -> bool:
        """Return whether this mount owns the node, if that can be told at once; never raises."""
        record = self._record
        try:
            return self._is_local and record is not None and os.fstat(record.fd).st_nlink == 1
        except OSError:
            return False

    def check(self) -> None:
        """Raise NodeFencedError if another mount has claimed the node since `claim`."""
        if self._is_in_place() and self._reads_as_mine():
            return
        with self._writing:
            found = self._read_or_replace()
            if found is None:
                self._restore()
                found = self._read()
            if found is None or found.mount != self._mount.nonce:
                raise NodeFencedError(
                    f"Node {self._name} ({self._path}) was taken over by {_who(found)}: this "
                    "mount writes and acknowledges nothing more; unmount it."
                )
            self._adopt()

    def _read_or_replace(self) -> OwnerRecord | None:
        """Return the record of a node that is this mount's; one that is damaged is replaced."""
        try:
            found = self._read()
            if found is not None and not found.is_intact:
                raise self._damaged()
            return found
        except UnreadOwnerError as error:
            if not self._is_alone:  # another machine may be writing it
                raise
            logger.warning("%s It is written anew.", error)
            self._put(self._mine)
            return self._read()

    def _restore(self) -> None:
        """Write a record that somebody removed, unless another mount is quicker."""
        logger.info("Node %s (%s) lost its owner record.", self._name, self._path)
        with contextlib.suppress(FileExistsError):
            fd = self._directory.create(OWNER_NAME, os.O_WRONLY)
            try:
                _write(fd, self._mine)
            except BaseException:
                self._directory.unlink(OWNER_NAME)
                raise
            self._directory.sync()

    def _is_in_place(self) -> bool:
        """Return whether the file that this mount wrote still has the record's name."""
        if self._record is None:
            return False
        try:
            there = self._directory.look(OWNER_NAME)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._record.fd))

    def _reads_as_mine(self) -> bool:
        assert self._record is not None
        with contextlib.suppress(OSError):  # the server has removed the file
            if self._is_local:
                return os.pread(self._record.fd, OWNER_BYTES + 1, 0) == self._mine
            return read_past_cache(self._record.fd) == self._mine
        return False

    def give_back(self) -> None:
        """Restore the record that `claim` replaced."""
        self.check()
        if self.found is None:
            self._directory.unlink(OWNER_NAME)
        elif self._unread is None:
            self._put(self.found.encode())
        else:
            self._put(self._mount.record(self._inode, ended=True).encode())
        self._record = None

    def end(self) -> None:
        """Record that this mount has written its last byte, unless another owns the node."""
        if self._record is not None:
            self.check()
            self._put(self._mount.record(self._inode, ended=True).encode())
            self._record = None


def refusals(mount: Mount, nodes: Mapping[str, Node]) -> dict[str, NodeError]:
    """By name: the nodes that another mount owns, or may, and why.

    A record that is damaged, or cannot be read, is no reason if those of other nodes can,
    and none of them stands against this mount: whoever used the node alone is fenced like
    any owner.
    """
    mount.note_ended(node.found_owner for node in nodes.values())
    read = {name: n for name, n in nodes.items() if not n.found_owner or n.found_owner.is_intact}
    unread = {name: node for name, node in nodes.items() if name not in read}
    refused = dict(_refused(read))
    is_known = any(node.found_owner is not None for node in read.values())
    mount.may_replace_unread = not refused and (is_known or not unread)
    return {**refused, **dict(_refused(unread))}


def _refused(nodes: Mapping[str, Node]) -> Iterator[tuple[str, NodeError]]:
    for name, node in nodes.items():
        try:
            node.refuse_owner()
        except NodeError as error:
            yield name, error


def _write(fd: int, content: bytes) -> None:
    with open(fd, "wb", buffering=0) as stream:
        stream.write(content)
        os.fsync(fd)


def _who(record: OwnerRecord | None) -> str:
    if record is None:
        return "another mount"
    host = record.process.host if record.process.host.isprintable() else "an unnamed machine"
    since = record.since if record.since.isprintable() else "a time that is not known"
    return f"process {record.process.number} of {host}, since {since}"
