"""Names and attributes: directories, links, modes, owners, times.

Every method is synchronous and runs as one transaction.  It checks everything before
it changes anything, so an error leaves no change.  The kernel checks permissions
(`default_permissions`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import trio

from ..errors import (
    CrossesQuotaError,
    ExistsError,
    InvalidError,
    IsDirectoryError,
    NameTooLongError,
    NoEntryError,
    NotDirectoryError,
    NotEmptyError,
    NotPermittedError,
    TooManyLinksError,
)
from ..format import acl, file_rows
from ..format.file_rows import ROOT, Inode
from ..limits import LINKS_MAX, NAME_BYTES_MAX, TARGET_BYTES_MAX
from ..log.log import Log, Transaction
from ..system import clock
from . import quota
from .codes import Codes
from .path_search import PathSearch
from .tree_steps import (
    add_inode,
    check_new,
    drop_link,
    drop_name,
    entry_of,
    folder_of,
    inode_of,
    put_name,
    touch,
)


@dataclass(frozen=True, slots=True)
class Change:
    """The fields that setattr sets; None leaves a field unchanged; times are in ns."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime: int | None = None
    mtime: int | None = None
    ctime: int | None = None


class Tree:
    """The directory tree of an open store."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.limits = log.limits
        self.codes = Codes(log)
        self.fenced: set[int] = set()
        """Trees that directories cannot be moved into or out of for now, by their top."""
        self.on_move: list[Callable[[int], None]] = []
        """Called with each inode that got another parent: a walk of the tree could miss it."""

    def make_root(self) -> None:
        """Make the root directory of a new store; the user of the first mount owns it."""
        if self._log.engine.get(file_rows.inode_key(ROOT)) is None:
            now = clock.now()
            owner = os.getuid(), os.getgid()
            root = Inode(stat.S_IFDIR | 0o755, *owner, 2, 0, 0, now, now, now, parent=ROOT)
            self._log.apply({file_rows.inode_key(ROOT): root.encode()})

    # --- looking -------------------------------------------------------------

    def inode(self, ino: int) -> Inode:
        """Return the attributes of an inode; StaleError."""
        return inode_of(self._log.engine, ino)

    def lookup(self, parent: int, name: bytes) -> int | None:
        """Return the inode with a name in a directory, or None; accepts `.` and `..`."""
        if len(name) > NAME_BYTES_MAX:
            raise NameTooLongError(f"A name may have at most {NAME_BYTES_MAX} bytes.")
        if name == b".":
            return parent
        if name == b"..":
            return self.inode(parent).parent
        value = self._log.engine.get(file_rows.name_key(parent, name))
        return file_rows.decode_name(value)[0] if value is not None else None

    def entries(
        self, ino: int, after: int, end: int | None = None
    ) -> Iterator[tuple[int, int, bytes]]:
        """Yield (cookie, ino, name) of the entries with after < cookie < end, in order."""
        start = file_rows.listing_key(ino, max(after + 1, file_rows.FIRST_COOKIE))
        stop = file_rows.listing_key(ino + 1, 0) if end is None else file_rows.listing_key(ino, end)
        for key, value in self._log.engine.scan(start, stop):
            yield file_rows.decode_listing(key, value)

    @property
    def listing_end(self) -> int:
        """The end of a listing that begins now, past the cookies of all entries.

        Without it, a listing during which entries are made would have no end.
        """
        return self._log.counters.next_cookie

    def target(self, ino: int) -> bytes:
        """Return the target of a symbolic link; InvalidError if it is not one."""
        value = self._log.engine.get(file_rows.target_key(ino))
        if value is None:
            raise InvalidError("Not a symbolic link.")
        return value

    async def paths(self, inos: Iterable[int]) -> dict[int, str]:
        """Return paths of inodes from the root for messages; `?` stands for unknown names.

        An inode does not know its names: directories are searched, each once, some entries at
        a time, because they can have millions.
        """
        search = PathSearch(self._log, inos)
        for _ in search.steps():
            await trio.lowlevel.checkpoint()
        return search.paths()

    def lies_below(self, ino: int, top: int) -> bool:
        """Return whether `ino` is `top`, or its parents lead to `top`."""
        while ino != top:
            value = self._log.engine.get(file_rows.inode_key(ino))
            if value is None or ino == ROOT:
                return False
            ino = Inode.decode(value).parent
        return True

    # --- making --------------------------------------------------------------

    def make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        *,
        rdev: int = 0,
        target: bytes | None = None,
    ) -> tuple[int, Inode]:
        """Make an inode of any type with a new name; return its number and attributes."""
        if target is not None and not 0 < len(target) <= TARGET_BYTES_MAX:
            raise NameTooLongError(f"A link target may have at most {TARGET_BYTES_MAX} bytes.")
        with self._log.transaction(grows=len(name) + len(target or b"")) as txn:
            folder = folder_of(txn, parent)
            check_new(txn, parent, name)
            now = clock.now()
            directory = stat.S_ISDIR(mode)
            if folder.mode & stat.S_ISGID:
                gid = folder.gid
                if directory:
                    mode |= stat.S_ISGID
            ino = self._new_ino()
            default = txn.get(file_rows.xattr_key(parent, acl.DEFAULT))
            if default is not None:
                mode, access, inherited = acl.inherit(default, mode, directory)
                if access is not None:
                    txn.put(file_rows.xattr_key(ino, acl.ACCESS), access)
                if inherited is not None:
                    txn.put(file_rows.xattr_key(ino, acl.DEFAULT), inherited)
            inode = Inode(mode, uid, gid, 2 if directory else 1, 0, 0, now, now, now, rdev)
            if target is not None:
                inode.size = len(target)
                txn.put(file_rows.target_key(ino), target)
            elif stat.S_ISREG(mode):
                code = self.codes.of(parent)
                inode.k, inode.m = code.k, code.m
            add_inode(txn, ino, inode, parent, folder)
            put_name(txn, parent, name, ino, self._new_cookie())
            folder.nlink += directory
            touch(txn, parent, folder, now)
        return ino, inode

    def link(self, ino: int, parent: int, name: bytes) -> Inode:
        """Give an inode one more name; return its attributes."""
        with self._log.transaction(grows=len(name)) as txn:
            folder = folder_of(txn, parent)
            check_new(txn, parent, name)
            inode = inode_of(txn, ino)
            if stat.S_ISDIR(inode.mode):
                raise NotPermittedError("A directory cannot have a second name.")
            if inode.nlink == 0:
                raise NoEntryError("The file was deleted.")
            if inode.nlink >= LINKS_MAX:
                raise TooManyLinksError(f"A file may have at most {LINKS_MAX} names.")
            if inode.quota_root != folder.quota_root:
                raise CrossesQuotaError("All names of a file must be in the same quota.")
            now = clock.now()
            inode.nlink += 1
            inode.ctime = now
            inode.parent = parent
            txn.put(file_rows.inode_key(ino), inode.encode())
            put_name(txn, parent, name, ino, self._new_cookie())
            touch(txn, parent, folder, now)
        return inode

    # --- removing ------------------------------------------------------------

    def unlink(self, parent: int, name: bytes) -> tuple[int, Inode]:
        """Remove a name of an inode, not of a directory; return the inode.

        After its last name the inode is an orphan.
        """
        with self._log.transaction() as txn:
            folder = folder_of(txn, parent)
            ino, cookie = entry_of(txn, parent, name)
            inode = inode_of(txn, ino)
            if stat.S_ISDIR(inode.mode):
                raise IsDirectoryError("Use rmdir to remove a directory.")
            now = clock.now()
            drop_name(txn, parent, name, cookie)
            drop_link(txn, ino, inode, now)
            touch(txn, parent, folder, now)
        return ino, inode

    def rmdir(self, parent: int, name: bytes) -> tuple[int, Inode]:
        """Remove an empty directory; return the inode, now an orphan."""
        with self._log.transaction() as txn:
            folder = folder_of(txn, parent)
            ino, cookie = entry_of(txn, parent, name)
            inode = inode_of(txn, ino)
            if not stat.S_ISDIR(inode.mode):
                raise NotDirectoryError("Not a directory.")
            self._check_empty(ino)
            now = clock.now()
            drop_name(txn, parent, name, cookie)
            drop_link(txn, ino, inode, now)
            folder.nlink -= 1
            touch(txn, parent, folder, now)
            self.codes.forget(ino)
        return ino, inode

    # --- renaming ------------------------------------------------------------

    def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        *,
        replace: bool = True,
        whiteout: tuple[int, int] | None = None,
    ) -> tuple[int, Inode] | None:
        """Rename an entry; replace an existing entry unless `replace` is false.

        With `whiteout`, a (uid, gid), the old name becomes a device 0:0 of this owner, which
        hides a name of a lower layer of overlayfs.  Return the inode whose name was replaced,
        or None.
        """
        with self._log.transaction(rewrites=True) as txn:
            folders = {parent: folder_of(txn, parent)}
            folders.setdefault(new_parent, folder_of(txn, new_parent))
            ino, cookie = entry_of(txn, parent, name)
            inode = inode_of(txn, ino)
            directory = stat.S_ISDIR(inode.mode)
            if directory:
                self._check_outside(ino, new_parent)
                self._check_fences(parent, new_parent)
            now = clock.now()
            lost: tuple[int, Inode] | None = None
            found = txn.get(file_rows.name_key(new_parent, new_name))
            if found is None:
                check_new(txn, new_parent, new_name)
                # In the same directory it keeps its place, so that each listing has it once.
                keeps_place = new_parent == parent and whiteout is None
                new_cookie = cookie if keeps_place else self._new_cookie()
            elif not replace:
                raise ExistsError("The new name is taken.")
            else:
                there, new_cookie = file_rows.decode_name(found)
                if there == ino:
                    return None
                lost = there, self._replaced(txn, there, directory, folders[new_parent], now)
            drop_name(txn, parent, name, cookie)
            put_name(txn, new_parent, new_name, ino, new_cookie)
            if directory:
                folders[parent].nlink -= 1
                folders[new_parent].nlink += 1
                self.codes.forget()
            if inode.quota_root != folders[new_parent].quota_root:
                root = folders[new_parent].quota_root
                quota.shift(txn, *quota.crossing(txn, ino, inode, root))
            if whiteout is not None:
                device = self._new_ino()
                hider = Inode(stat.S_IFCHR, *whiteout, 1, 0, 0, now, now, now)
                add_inode(txn, device, hider, parent, folders[parent])
                put_name(txn, parent, name, device, cookie)
            inode.ctime, inode.parent = now, new_parent
            txn.put(file_rows.inode_key(ino), inode.encode())
            for number, folder in folders.items():
                touch(txn, number, folder, now)
        self._moved(ino)
        return lost

    def _replaced(
        self, txn: Transaction, ino: int, directory: bool, folder: Inode, now: int
    ) -> Inode:
        """Take the name in `folder` from an inode for another; return the inode without it."""
        old = inode_of(txn, ino)
        if directory and not stat.S_ISDIR(old.mode):
            raise NotDirectoryError("A directory can replace only a directory.")
        if not directory and stat.S_ISDIR(old.mode):
            raise IsDirectoryError("Only a directory can replace a directory.")
        if directory:
            self._check_empty(ino)
            folder.nlink -= 1
        drop_link(txn, ino, old, now)
        return old

    def exchange(self, parent: int, name: bytes, new_parent: int, new_name: bytes) -> None:
        """Exchange two entries of any type."""
        with self._log.transaction(rewrites=True) as txn:
            folders = {parent: folder_of(txn, parent)}
            folders.setdefault(new_parent, folder_of(txn, new_parent))
            one, one_cookie = entry_of(txn, parent, name)
            two, two_cookie = entry_of(txn, new_parent, new_name)
            if one == two:
                return
            now = clock.now()
            moves = (
                (one, parent, new_parent, new_name, two_cookie),
                (two, new_parent, parent, name, one_cookie),
            )
            inodes = {ino: inode_of(txn, ino) for ino in (one, two)}
            crossing: list[quota.Move] = []
            for ino, _, to, _, _ in moves:
                if stat.S_ISDIR(inodes[ino].mode):
                    self._check_outside(ino, to)
                    self._check_fences(parent, new_parent)
                if inodes[ino].quota_root != folders[to].quota_root:
                    crossing += quota.crossing(txn, ino, inodes[ino], folders[to].quota_root)
            quota.shift(txn, *crossing)
            for ino, origin, to, new, cookie in moves:
                inode = inodes[ino]
                put_name(txn, to, new, ino, cookie)
                if stat.S_ISDIR(inode.mode):
                    folders[origin].nlink -= 1
                    folders[to].nlink += 1
                inode.ctime, inode.parent = now, to
                txn.put(file_rows.inode_key(ino), inode.encode())
            for number, folder in folders.items():
                touch(txn, number, folder, now)
        self.codes.forget()
        self._moved(one)
        self._moved(two)

    # --- attributes ----------------------------------------------------------

    def change(self, ino: int, change: Change) -> Inode:
        """Set attributes; return the changed inode."""
        with self._log.transaction(rewrites=True) as txn:
            inode = inode_of(txn, ino)
            if change.mode is not None:
                inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(change.mode)
                key = file_rows.xattr_key(ino, acl.ACCESS)
                access = txn.get(key)
                if access is not None:
                    txn.put(key, acl.chmod(access, inode.mode))
            if change.uid is not None:
                inode.uid = change.uid
            if change.gid is not None:
                inode.gid = change.gid
            if change.atime is not None:
                inode.atime = self._stamp(change.atime)
            if change.mtime is not None:
                inode.mtime = self._stamp(change.mtime)
            inode.ctime = clock.now() if change.ctime is None else self._stamp(change.ctime)
            txn.put(file_rows.inode_key(ino), inode.encode())
        return inode

    # --- shared steps --------------------------------------------------------

    def _new_ino(self) -> int:
        """Take a number that no inode has had."""
        self._log.counters.next_ino += 1
        return self._log.counters.next_ino - 1

    def _new_cookie(self) -> int:
        """Take a cookie that no entry has had."""
        self._log.counters.next_cookie += 1
        return self._log.counters.next_cookie - 1

    @staticmethod
    def _stamp(time: int) -> int:
        """Return the nearest time to one from the kernel that an inode can have."""
        clock.came(time)
        return min(max(time, file_rows.TIME_MIN), file_rows.TIME_MAX)

    def _moved(self, ino: int) -> None:
        for tell in self.on_move:
            tell(ino)

    def _check_empty(self, ino: int) -> None:
        if next(self.entries(ino, 0), None) is not None:
            raise NotEmptyError("The directory has entries.")

    def _check_outside(self, ino: int, place: int) -> None:
        """Raise InvalidError if the directory `place` is `ino` or lies below it."""
        while place != ROOT:
            if place == ino:
                raise InvalidError("A directory cannot be moved into itself.")
            place = self.inode(place).parent

    def _check_fences(self, parent: int, new_parent: int) -> None:
        """Raise CrossesQuotaError if a directory cannot be moved from one to the other now."""
        for top in self.fenced:
            if self.lies_below(parent, top) != self.lies_below(new_parent, top):
                raise CrossesQuotaError("A quota is being counted or cleared: try again later.")
