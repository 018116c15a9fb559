"""fsck: names and listings agree, each name has an inode, and directories form a tree."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..format import file_rows
from ..format.file_rows import ROOT, Inode
from ..limits import NAME_BYTES_MAX
from .fsck_findings import Finding, Phase, finding
from .fsck_quotas import QuotaCheck
from .fsck_view import StoreView

_FORBIDDEN = {*b"/\0"}


@dataclass(slots=True)
class NameCheck:
    """Checks names, and counts those of each inode."""

    _store: StoreView
    _quotas: QuotaCheck
    links: Counter[int] = field(default_factory=Counter)
    """By inode: the number of its names."""
    directories: dict[int, int] = field(default_factory=dict)
    """By directory: its parent."""
    last_cookie: int = 0

    def names(self) -> Iterator[Finding]:
        """Each name is valid, and lies in a directory; its inode exists."""
        directory, parent = int(ROOT), self._store.inode(ROOT)
        if not _is_directory(parent):
            yield finding(Phase.NAMES, "inodes", "there is no root directory", "make_root")
        for key, value in self._store.table(b"N"):
            above, name = file_rows.decode_name_key(key)
            ino, cookie = file_rows.decode_name(value)
            self.last_cookie = max(self.last_cookie, cookie)
            if above != directory:
                directory, parent = above, self._store.inode(above)
            if parent is not None and not _is_directory(parent) and self._has_contents(above):
                text = f"{name!r} is in inode {above}, which is not a directory"
                yield finding(Phase.NAMES, "names", text, "unlink", above, name)
            elif parent is None or not _is_directory(parent):
                text = f"{name!r} is in directory {above}, which does not exist"
                yield finding(Phase.NAMES, "names", text, "restore", above, stat.S_IFDIR)
            elif not _is_possible(name):
                text = f"{name!r} in directory {above} is not a valid name"
                yield finding(Phase.NAMES, "names", text, "unlink", above, name)
            else:
                yield from self._name(above, parent, name, ino, cookie)

    def _has_contents(self, ino: int) -> bool:
        """Return whether an inode has rows that a directory does not have."""
        extents = self._store.table(file_rows.extent_key(ino, 0)[:9])
        has_target = self._store.rows.get(file_rows.target_key(ino)) is not None
        return has_target or next(extents, None) is not None

    def _name(
        self, above: int, parent: Inode, name: bytes, ino: int, cookie: int
    ) -> Iterator[Finding]:
        """Check a name in the directory `above`, whose inode is `parent`."""
        inode = self._store.inode(ino)
        if inode is None:
            text = f"{name!r} in directory {above} is inode {ino}, which does not exist"
            yield finding(Phase.NAMES, "names", text, "restore", ino)
            return
        self.links[ino] += 1
        self._quotas.named(ino, parent)
        if stat.S_ISDIR(inode.mode):
            if self.links[ino] > 1 or ino == ROOT:
                self.links[ino] -= 1
                text = f"directory {ino} has a second name, {name!r} in directory {above}"
                yield finding(Phase.NAMES, "names", text, "unlink", above, name)
                return
            self.directories[ino] = above
        listed = self._store.rows.get(file_rows.listing_key(above, cookie))
        if listed != file_rows.listing_value(ino, name):
            text = f"{name!r} in directory {above} is not in its listing"
            yield finding(Phase.NAMES, "names", text, "list_again", above, name)

    def listing(self) -> Iterator[Finding]:
        """Each row of a listing has its name."""
        for key, value in self._store.table(b"L"):
            parent = file_rows.decode_ino_key(key)
            cookie, ino, name = file_rows.decode_listing(key, value)
            entry = self._store.rows.get(file_rows.name_key(parent, name)) if name else b""
            if entry == file_rows.name_value(ino, cookie):
                continue
            text = f"directory {parent} lists {name!r} as inode {ino}, but has no such name"
            yield finding(Phase.NAMES, "listing", text, "name_again", parent, cookie)

    def loops(self) -> Iterator[Finding]:
        """Each directory with a name can be reached from the root."""
        good = {int(ROOT)}
        for ino in self.directories:
            path: list[int] = []
            place = ino
            while place not in good and place in self.directories and place not in path:
                path.append(place)
                place = self.directories[place]
            if place in path:
                text = f"directory {place} lies inside itself"
                above = self.directories[place]
                yield finding(Phase.INODES, "names", text, "detach", above, place)
            good.update(path)


def _is_directory(inode: Inode | None) -> bool:
    return inode is not None and stat.S_ISDIR(inode.mode)


def _is_possible(name: bytes) -> bool:
    """Return whether a name is valid."""
    return (
        bool(name)
        and name not in (b".", b"..")
        and len(name) <= NAME_BYTES_MAX
        and not _FORBIDDEN & {*name}
    )
