"""fsck: each inode has a valid form, a name, and matching rows in other tables."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..format import file_rows
from ..format.erasure import Code
from ..format.file_rows import ROOT, Inode
from ..format.tables import TABLES
from ..limits import FILE_BYTES_MAX
from ..text import counted
from .fsck_findings import Finding, Phase, finding, stale
from .fsck_names import NameCheck
from .fsck_quotas import QuotaCheck
from .fsck_view import StoreView

_FILE_TYPES = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK}
_FILE_TYPES |= {stat.S_IFCHR, stat.S_IFBLK}


@dataclass(slots=True)
class InodeCheck:
    """Checks inodes, counts them, and notes which of them lack extents."""

    _store: StoreView
    _names: NameCheck
    _quotas: QuotaCheck
    files: int = 0
    last_ino: int = 0
    short: dict[int, int] = field(default_factory=dict)
    """By inode: counted bytes without extents."""

    def inodes(self) -> Iterator[Finding]:
        """Each inode has a valid type, as many links as names, and its directory's quota."""
        inside = Counter(self._names.directories.values())
        for key, value in self._store.table(b"I"):
            ino, inode = file_rows.decode_ino_key(key), Inode.decode(value)
            self.last_ino = max(self.last_ino, ino)
            self.files += 1
            kind = stat.S_IFMT(inode.mode)
            if kind not in _FILE_TYPES:
                text = f"inode {ino} has an unknown type ({kind:#o})"
                yield finding(Phase.INODES, "inodes", text, "retype", ino)
                continue
            yield from self._links(ino, inode, inside[ino])
            yield from self._quotas.inode(ino, inode)
            if inode.allocated and not self._has_extents(ino):
                yield from self.allocated(ino, inode, 0)
            yield from self._form(ino, inode)

    def _links(self, ino: int, inode: Inode, subdirectories: int) -> Iterator[Finding]:
        names = 1 if ino == ROOT else self._names.links[ino]
        orphan = self._store.has(file_rows.orphan_key(ino))
        expected = 0
        if names:
            expected = 2 + subdirectories if stat.S_ISDIR(inode.mode) else names
            if orphan:
                text = f"inode {ino} is to be removed, but has a name"
                key = file_rows.orphan_key(ino)
                yield finding(Phase.DERIVED, "orphans", text, "drop", key)
        elif not orphan:
            yield finding(Phase.INODES, "inodes", f"inode {ino} has no name", "attach", ino)
            return
        if inode.nlink != expected:
            text = f"inode {ino} counts {inode.nlink} links, but has {expected}"
            yield finding(Phase.DERIVED, "inodes", text, "change", ino, nlink=expected)
        above = ROOT if ino == ROOT else self._names.directories.get(ino)
        if stat.S_ISDIR(inode.mode) and above is not None and inode.parent != above:
            text = f"directory {ino} has directory {inode.parent} as its parent, but is in {above}"
            yield finding(Phase.DERIVED, "inodes", text, "change", ino, parent=above)

    def _has_extents(self, ino: int) -> bool:
        return next(self._store.table(file_rows.extent_key(ino, 0)[:9]), None) is not None

    def allocated(self, ino: int, inode: Inode, held: int) -> Iterator[Finding]:
        """An inode counts the bytes of its extents."""
        if inode.allocated != held:
            if inode.allocated > held:
                self.short[ino] = inode.allocated - held
            text = (
                f"inode {ino} counts {counted(inode.allocated, 'byte')} of extents, but has {held}"
            )
            yield finding(Phase.DERIVED, "inodes", text, "change", ino, allocated=held)

    def _form(self, ino: int, inode: Inode) -> Iterator[Finding]:
        """Fields that must fit the type."""
        kind, code = stat.S_IFMT(inode.mode), Code(inode.k, inode.m)
        if not (code.is_possible or (kind != stat.S_IFREG and code.n == 0)):
            text = f"inode {ino} has an invalid code ({code})"
            yield finding(Phase.DERIVED, "inodes", text, "recode", ino)
        if inode.size > FILE_BYTES_MAX:
            text = f"inode {ino} has an invalid size of {counted(inode.size, 'byte')}"
            yield finding(Phase.INODES, "inodes", text, "resize", ino)
        if kind == stat.S_IFLNK:
            target = self._store.row(file_rows.target_key(ino))
            if target is None:
                text = f"symbolic link {ino} has no target"
                yield finding(Phase.INODES, "targets", text, "lose_target", ino)
            elif len(target) != inode.size:
                size = counted(inode.size, "byte")
                text = f"symbolic link {ino} has {size}, but its target {len(target)}"
                yield finding(Phase.DERIVED, "inodes", text, "change", ino, size=len(target))

    def attributes(self) -> Iterator[Finding]:
        """Extended attributes, and targets of symbolic links, belong to an inode."""
        last = -1
        for letter in (b"X", b"Q"):
            for key, _ in self._store.table(letter):
                ino = file_rows.decode_ino_key(key)
                if ino == last:
                    continue
                last, inode = ino, self._store.inode(ino)
                if inode is None:
                    text = f"a row belongs to inode {ino}, which does not exist"
                    yield finding(Phase.INODES, TABLES[letter].name, text, "restore", ino)
                elif letter == b"Q" and not stat.S_ISLNK(inode.mode):
                    text = f"a row belongs to inode {ino}, which is not a symbolic link"
                    yield finding(Phase.INODES, TABLES[letter].name, text, "drop", key)

    def orphans(self) -> Iterator[Finding]:
        """Each inode that is to be removed exists."""
        for key, _ in self._store.table(b"U"):
            ino = file_rows.decode_ino_key(key)
            if self._store.inode(ino) is None:
                yield stale(key, f"inode {ino} does not exist")

    def trims(self) -> Iterator[Finding]:
        """Each trim begins at the end of its inode."""
        for key, value in self._store.table(b"D"):
            inode = self._store.inode(file_rows.decode_ino_key(key))
            size = inode.size if inode is not None else 0
            if int.from_bytes(value, "little") != size:
                yield stale(key, f"its inode ends at {size}")
