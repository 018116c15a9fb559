"""The directory of a node: it is there, it is this node's, and this mount owns it.

The path may lead through links.  What lies beneath may be changed by others: it is opened name
by name from the directory's descriptor (system/beneath).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4
from weakref import WeakSet

from ..config.node_identity import IDENTITY_NAME, NodeIdentity, write_identity_in
from ..config.owner_record import OWNER_NAME, Mount, OwnerRecord
from ..errors import (
    FusestoreError,
    NodeBusyError,
    NodeError,
    NodeFullError,
    NodeIdentityError,
    NodeLacksError,
    NodeReadOnlyError,
)
from ..format.records import SegmentKind
from ..format.segment_numbers import FOLDERS
from ..system import locks, process_limits
from ..system.beneath import Directory
from .ownership import Ownership
from .recognition import recognize
from .unexpected import unexpected

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)

_open_nodes: WeakSet[NodePlace] = WeakSet()
_opening = threading.Lock()
"""Guards `_open_nodes`."""


def _check_writable(descriptor: int, found: os.stat_result) -> None:
    """Raise OSError if the file system of a directory is read-only.

    One that turned read-only after an error may not say that it is: only a change shows it.
    """
    try:
        os.utime(descriptor, ns=(found.st_atime_ns, found.st_mtime_ns))
    except OSError as error:
        if error.errno == errno.EROFS:
            raise


class EndError(OSError):
    """A file ends before the bytes that were wanted: nothing is unknown about them."""


class NodePlace:
    """The place of a node; `DirectoryNode` keeps segments in it."""

    def __init__(
        self,
        path: Path,
        identity: NodeIdentity,
        *,
        read_only: bool = False,
        owner: str = "",
        mount: Mount | None = None,
    ) -> None:
        """Use the directory of the node with this identity, which has been verified.

        If its file is damaged, it is written anew when the node is claimed.

        NodeBusyError if another owner than `owner`, the path of a store, has locked it;
        NodeReadOnlyError if it is to be written to, and its file system is read-only.
        `mount` becomes its owner with `claim`; without, the caller keeps others from writing.
        """
        self.path = path
        self._name = identity.node
        with self._errors("open"):
            self._directory: Directory | None = Directory.at(path)
            self._there = os.fstat(self._directory.fd)
            self._marker = self._directory.look(IDENTITY_NAME)
            if not read_only:
                _check_writable(self._directory.fd, self._there)
        self._identity, self._store = identity, owner
        self._damage = self._recognize()
        """What is wrong with its identity file, until that is written anew."""
        self._lock_held = self._locked(self._directory, owner, shared=read_only)
        self._owner: Ownership | None = None
        if mount is not None:
            with self._errors(f"read its file {OWNER_NAME}"):
                self._owner = Ownership(
                    self._directory,
                    path,
                    self._name,
                    mount,
                    locked=self._lock_held.is_held,
                    read_only=read_only,
                )
        self._is_claimed = False
        self._folders: dict[SegmentKind, os.stat_result] = {}
        """The folders that were there when the node was opened."""
        self._open_folders(make=not read_only)
        self._refuse_shared_folders()

    def _recognize(self) -> NodeError | None:
        """Return what is wrong with `node.toml`; NodeError if this is another directory now."""
        mine = self._identity
        found, damage = recognize(self._top(), self.path, mine.store, mine.node, mine.region)
        if found != mine:
            raise NodeIdentityError(
                f"Another directory has taken the place of {self.path} meanwhile."
            )
        if damage is not None:
            logger.warning(
                "%s The records beside it are those of node %s, and are used.", damage, self._name
            )
        return damage

    def _open_folders(self, *, make: bool) -> None:
        """Note which folders the node has."""
        for kind, (folder, _) in FOLDERS.items():
            with self._errors(f"open its folder {folder}"):
                if make:
                    self._top().make_folder(folder)
                with contextlib.suppress(FileNotFoundError):
                    opened = self._folder(kind)
                    self._folders[kind] = os.fstat(opened.fd)

    def _refuse_shared_folders(self) -> None:
        """Raise NodeBusyError if a folder is that of another open node.

        A disk, or a bind mount, is in the wrong place: each node would write among the
        segments of the other, and a sound node would be blamed.
        """
        with _opening:
            for other in _open_nodes:
                mine, its = self._identity, other._identity
                if (mine.store, mine.node) == (its.store, its.node):
                    continue
                for kind in self._folders:
                    if other._has_folder(kind, self._folders[kind]):
                        one, two = sorted([(self._name, self.path), (other._name, other.path)])
                        raise NodeBusyError(
                            f"Nodes {one[0]} ({one[1]}) and {two[0]} ({two[1]}) have the same "
                            f"folder {FOLDERS[kind][0]}: unmount what was mounted in the wrong "
                            "place."
                        )
            _open_nodes.add(self)

    def _has_folder(self, kind: SegmentKind, found: os.stat_result) -> bool:
        """Return whether a folder of this node is that one; one that is gone is no more."""
        known = self._folders.get(kind)
        if known is None or not os.path.samestat(known, found):
            return False
        try:
            return os.path.samestat(self._top().look(FOLDERS[kind][0]), found)
        except OSError:
            return False

    def _locked(self, directory: Directory, owner: str, *, shared: bool) -> locks.Lock:
        """Lock the directory or, if this is not supported, its identity file."""
        with self._errors("lock"):
            try:
                lock = locks.take(".", owner, shared=shared, dir_fd=directory.fd)
                if not lock.is_held:
                    lock = locks.take(IDENTITY_NAME, owner, shared=shared, dir_fd=directory.fd)
            except locks.LockedError as error:
                by = f"process {error.holder}" if error.holder else "another process"
                raise NodeBusyError(
                    f"Node {self._name} ({self.path}) is in use by {by}, which serves another "
                    "mount: unmount that first."
                ) from error
        if not lock.is_held:
            logger.warning(
                "Node %s (%s) cannot be locked: make sure that no other machine uses it.",
                self._name,
                self.path,
            )
        return lock

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind: type[NodeError] = NodeError
            reason = error.strerror or str(error)
            if error.errno in FULL:
                kind = NodeFullError
            elif error.errno == errno.EFBIG:
                kind, reason = NodeFullError, process_limits.file_too_large()
            elif error.errno == errno.ENOENT or isinstance(error, EndError):
                kind = NodeLacksError
            elif error.errno == errno.EROFS:
                kind = NodeReadOnlyError
            raise kind(f"Node {self._name} ({self.path}) cannot {what}: {reason}.") from error
        except FusestoreError:
            raise
        except MemoryError as error:
            raise NodeFullError(
                f"Node {self._name} ({self.path}) cannot {what}: the system refuses this process "
                "memory."
            ) from error
        except Exception as error:  # a bug costs this node, not the mount
            raise unexpected(self._name, error) from error

    def _top(self) -> Directory:
        """Return the open directory of the node; OSError if the node is closed."""
        directory = self._directory  # `close` may clear it
        if directory is None:
            raise OSError(errno.EBADF, "it is closed")
        return directory

    def _folder(self, kind: SegmentKind) -> Directory:
        """Return the open folder of a kind.

        OSError if it is no folder, not the one that was there, or the node is closed.
        """
        folder = self._top().folder(FOLDERS[kind][0])
        before = self._folders.get(kind)
        if before is not None:
            self._expect_same(kind, before, os.fstat(folder.fd))
        return folder

    @staticmethod
    def _expect_same(kind: SegmentKind, before: os.stat_result, now: os.stat_result) -> None:
        if not os.path.samestat(before, now):
            name = FOLDERS[kind][0]
            raise OSError(errno.ESTALE, f"another folder has taken the place of {name}")

    def _stat(self) -> tuple[os.stat_result, os.stat_result]:
        """Return the status of the directory and of its identity; NodeIdentityError."""
        try:
            return os.stat(self.path), os.stat(self.path / IDENTITY_NAME, follow_symlinks=False)
        except OSError as error:
            raise NodeIdentityError(
                f"Node {self._name} is gone from {self.path}: {error.strerror}."
            ) from error

    def _check_place(self) -> None:
        """NodeError unless the directory is still there, and this mount owns it."""
        there, now = self._stat()
        if not os.path.samestat(there, self._there) or not os.path.samestat(now, self._marker):
            raise NodeIdentityError(f"Node {self._name} at {self.path} was replaced by another.")
        with self._errors("check its folders"):
            for kind, before in self._folders.items():
                self._expect_same(kind, before, self._top().look(FOLDERS[kind][0]))
        owner = self._owner
        if owner is not None and self._is_claimed:
            with self._errors(f"read its file {OWNER_NAME}"):
                owner.check()

    @property
    def found_owner(self) -> OwnerRecord | None:
        """See Node."""
        return self._owner.found if self._owner is not None else None

    def refuse_owner(self) -> None:
        """See Node."""
        if self._owner is not None:
            self._owner.refuse()

    def claim(self) -> None:
        """See Node."""
        if self._owner is not None:
            with self._errors(f"write its file {OWNER_NAME}"):
                self._owner.claim()
            self._is_claimed = True
            if self._damage is not None:
                self._mend_identity()

    def _mend_identity(self) -> None:
        """Write `node.toml` anew; if this fails, the node is used as it is."""
        directory = self._top()
        try:
            write_identity_in(directory, replace(self._identity, incarnation=uuid4()))
        except OSError as error:
            logger.warning(
                "%s cannot be written anew: %s.", self.path / IDENTITY_NAME, error.strerror
            )
            return
        self._marker = directory.look(IDENTITY_NAME)
        before, self._lock_held = (
            self._lock_held,
            self._locked(directory, self._store, shared=False),
        )  # where directories cannot be locked, the file is
        before.release()
        self._damage = None

    def is_owned(self) -> bool:
        """See Node."""
        owner = self._owner  # `close` takes it from us
        return owner is None or owner.is_sure()

    def _check_owner(self) -> None:
        """NodeFencedError if another mount has claimed the node."""
        owner = self._owner
        if owner is not None and self._is_claimed and not owner.is_sure():
            with self._errors(f"read its file {OWNER_NAME}"):
                owner.check()

    def give_back(self) -> None:
        """See Node."""
        if self._owner is not None:
            with self._errors(f"write its file {OWNER_NAME}"):
                self._owner.give_back()
            self._is_claimed = False

    def disown(self) -> None:
        """See Node."""
        if self._owner is not None:
            with self._errors(f"write its file {OWNER_NAME}"):
                self._owner.end()
