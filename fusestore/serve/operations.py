"""The FUSE interface: decode a request, call the file system, build the reply.

pyfuse3 ends the mount on any exception but FUSEError.  Therefore every handler is
wrapped: an error of the file system becomes its errno; any other exception is logged
with a traceback and answered with EIO.  The handles of files are inode numbers.  Only
this module, fuse_device.py, the daemon and the null file system of the benchmark import
pyfuse3.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from .. import errors
from ..files.attributes import CODE, POLICY
from ..files.filesystem import FileSystem
from ..files.tree import Change
from ..format.file_rows import Inode
from ..limits import NAME_BYTES_MAX
from ..system import linux
from ..tally import Tallies, Tally
from .lookups import Lookups

logger = logging.getLogger(__name__)

CACHED_SECONDS = 300
"""How long the kernel may cache names and attributes; they change only through this mount."""
_RENAME_WHITEOUT = 4
"""See renameat2(2); pyfuse3 has no name for it."""
_UMOUNT = "umount"
"""umount(8) asks for the type of the file system before it unmounts.  The answer waits for a
commit: the kernel does not tell a FUSE daemon of the end of a mount before umount(2) returns."""
_BLOCK_BYTES = 4096
_FOLDER_BYTES = 4096

ERRNO: dict[type[errors.FusestoreError], int] = {
    errors.NoEntryError: errno.ENOENT,
    errors.StaleError: errno.ESTALE,
    errors.ExistsError: errno.EEXIST,
    errors.NotDirectoryError: errno.ENOTDIR,
    errors.IsDirectoryError: errno.EISDIR,
    errors.NotEmptyError: errno.ENOTEMPTY,
    errors.NameTooLongError: errno.ENAMETOOLONG,
    errors.TooManyLinksError: errno.EMLINK,
    errors.FileTooLargeError: errno.EFBIG,
    errors.RowTooLargeError: errno.E2BIG,
    errors.InvalidError: errno.EINVAL,
    errors.NotPermittedError: errno.EPERM,
    errors.NotSupportedError: errno.EOPNOTSUPP,
    errors.NoAttributeError: pyfuse3.ENOATTR,
    errors.AttributeTooLargeError: errno.ENOSPC,
    errors.NoSpaceError: errno.ENOSPC,
    errors.NoMemoryLeftError: errno.ENOMEM,
    errors.ShortageError: errno.ENOSPC,
    errors.QuotaError: errno.EDQUOT,
    errors.CrossesQuotaError: errno.EXDEV,
    errors.ReadOnlyError: errno.EROFS,
    errors.LostError: errno.EIO,
    errors.NotDurableError: errno.EIO,
}

_Handler = TypeVar("_Handler", bound=Callable[..., Awaitable[Any]])
_NOT_OFFERED = FUSEError(errno.ENOSYS)
"""After this answer the kernel does not send the request again."""

_RETRIED = (errors.BacklogError, errors.QuotaError, errors.NoSpaceError)

TALLIES: Tallies = {}
"""Counts of the requests that this process has answered, by handler."""


async def _again(
    handler: Callable[..., Awaitable[Any]], args: tuple[Any, ...], error: errors.FusestoreError
) -> Any:
    """Call a handler again once there may be the room that it lacked; raise `error` if not."""
    made, mount, tries = False, args[0], 0
    if not isinstance(mount, Operations):
        raise error
    until = trio.current_time() + mount.full_seconds_max
    while True:
        if isinstance(error, errors.BacklogError):
            await mount.catch_up()
        elif isinstance(error, errors.QuotaError):
            if made:
                raise error
            await mount.remove_deleted()  # a deleted file counts until it is removed
            made = True
        elif trio.current_time() < until and await mount.make_room(again=tries > 0):
            tries += 1
        else:
            raise error
        try:
            return await handler(*args)
        except _RETRIED as other:
            error = other


def _answered(handler: _Handler) -> _Handler:
    """Turn the errors of a handler into an errno, and count its requests."""
    tally = TALLIES.setdefault(handler.__name__, Tally())
    add = tally.times.add

    @functools.wraps(handler)
    async def wrapper(*args: Any) -> Any:
        started = perf_counter_ns()
        try:
            try:
                return await handler(*args)
            except _RETRIED as error:
                return await _again(handler, args, error)
        except FUSEError as error:
            tally.answered(error.errno)
            raise
        except errors.FusestoreError as error:
            number = ERRNO.get(type(error))
            if number is None:
                logger.error("%s: %s", handler.__name__, error)
                number = errno.EIO
            if isinstance(error, errors.MetadataError):
                args[0].found_damage()
            tally.answered(number)
            raise FUSEError(number) from None
        except Exception:
            logger.exception("%s failed with an unexpected error", handler.__name__)
            tally.answered(errno.EIO)
            raise FUSEError(errno.EIO) from None
        finally:
            add(perf_counter_ns() - started)

    return cast("_Handler", wrapper)


@dataclass(slots=True)
class _Listing:
    """An open directory, and the end of its listing: a cookie."""

    directory: int
    end: int


class Operations(pyfuse3.Operations):
    """The handlers of a mounted store."""

    supports_dot_lookup = True

    def __init__(self, files: FileSystem, *, writeback: bool = False, xattrs: bool = True) -> None:
        super().__init__()
        self.enable_writeback_cache = writeback
        self.enable_acl = self._has_xattrs = xattrs
        self._files = files
        self._tree = files.tree
        self._contents = files.contents
        self._removal = files.removal
        self._attributes = files.attributes
        self._known = Lookups()
        self._listings: dict[int, _Listing] = {}
        """The open directories, by file handle."""
        self._next_listing = 1
        self._orphans: set[int] = set()
        """Inodes without a name that the kernel has not forgotten."""
        self._cut_short: set[int] = set()
        """Files for which a quota cut a write short: write(2) reports this to its caller, but the
        kernel does not report it for a write through a map, so fsync must."""

    # --- replies -------------------------------------------------------------

    @staticmethod
    def _attr(ino: int, inode: Inode) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = ino
        entry.generation = inode.generation
        entry.entry_timeout = entry.attr_timeout = CACHED_SECONDS
        entry.st_mode = inode.mode
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_size = _FOLDER_BYTES if stat.S_ISDIR(inode.mode) else inode.size
        entry.st_blksize = _BLOCK_BYTES
        entry.st_blocks = (inode.allocated + 511) // 512
        entry.st_atime_ns = inode.atime
        entry.st_mtime_ns = inode.mtime
        entry.st_ctime_ns = inode.ctime
        return entry

    def _entry(self, ino: int, inode: Inode) -> EntryAttributes:
        """Build a reply that makes the kernel know an inode."""
        self._known.add(ino)
        return self._attr(ino, inode)

    def _lost(self, ino: int, inode: Inode) -> None:
        """Handle the loss of a name; remove the inode after its last one, when not in use."""
        if inode.nlink == 0:
            if ino in self._known:
                self._orphans.add(ino)
            else:
                self._removal.remove(ino)

    def found_damage(self) -> None:
        """A request failed on damaged metadata: the store repairs it soon."""
        self._files.log.on_damage()

    async def catch_up(self) -> None:
        """Wait until the metadata database has most of the names and attributes."""
        await self._files.catch_up()

    @property
    def full_seconds_max(self) -> float:
        """How long a request that finds no room is tried again."""
        return self._files.log.limits.full_seconds_max

    async def make_room(self, *, again: bool) -> bool:
        """Wait for the room of deleted files; return whether a request is to be tried again.

        With `again`, it was tried again before.
        """
        asked, before = trio.current_time(), self._files.log.counters.files
        await self.remove_deleted()
        removed = self._files.log.counters.files < before
        return await self._files.make_room(removed=removed, asked=asked, again=again)

    async def remove_deleted(self) -> None:
        """Wait until inodes that have no name and are not in use are removed.

        The kernel reports the end of the use a little later than the loss of the name.
        """
        for pauses in (1, 2, 4, 8, 16):
            if self._orphans or self._removal.removing:
                await self._removal.removed(pauses)

    # --- names ---------------------------------------------------------------

    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        ino = self._tree.lookup(parent_inode, name)
        if ino is None:
            entry = EntryAttributes()
            entry.st_ino = 0
            entry.entry_timeout = CACHED_SECONDS
            return entry
        return self._entry(ino, self._tree.inode(ino))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, count in inode_list:
            if not self._known.forget(ino, count):
                continue
            self._cut_short.discard(ino)
            if ino in self._orphans:
                self._orphans.discard(ino)
                self._removal.remove(ino)

    @_answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attr(inode, self._tree.inode(inode))

    @_answered
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        if fields.update_size or fields.update_uid or fields.update_gid:
            self._will_change(inode)
        if fields.update_size:
            await self._contents.truncate(inode, attr.st_size)
        change = Change(
            attr.st_mode if fields.update_mode else None,
            attr.st_uid if fields.update_uid else None,
            attr.st_gid if fields.update_gid else None,
            attr.st_atime_ns if fields.update_atime else None,
            attr.st_mtime_ns if fields.update_mtime else None,
            attr.st_ctime_ns if fields.update_ctime else None,
        )
        if fields.update_size and change == Change():
            return self._attr(inode, self._tree.inode(inode))
        return self._attr(inode, self._tree.change(inode, change))

    @_answered
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self._tree.target(inode)

    @_answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        made = self._tree.make(parent_inode, name, mode, ctx.uid, ctx.gid, rdev=rdev)
        return self._entry(*made)

    @_answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        mode = stat.S_IFDIR | stat.S_IMODE(mode)
        return self._entry(*self._tree.make(parent_inode, name, mode, ctx.uid, ctx.gid))

    @_answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        made = self._tree.make(
            parent_inode, name, stat.S_IFLNK | 0o777, ctx.uid, ctx.gid, target=target
        )
        return self._entry(*made)

    @_answered
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(inode, self._tree.link(inode, new_parent_inode, new_name))

    @_answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._lost(*self._tree.unlink(parent_inode, name))

    @_answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._lost(*self._tree.rmdir(parent_inode, name))

    @_answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        if flags & ~(pyfuse3.RENAME_EXCHANGE | pyfuse3.RENAME_NOREPLACE | _RENAME_WHITEOUT):
            raise FUSEError(errno.EINVAL)
        if flags & pyfuse3.RENAME_EXCHANGE:
            self._tree.exchange(parent_inode_old, name_old, parent_inode_new, name_new)
            return
        lost = self._tree.rename(
            parent_inode_old,
            name_old,
            parent_inode_new,
            name_new,
            replace=not flags & pyfuse3.RENAME_NOREPLACE,
            whiteout=(ctx.uid, ctx.gid) if flags & _RENAME_WHITEOUT else None,
        )
        if lost is not None:
            self._lost(*lost)

    # --- directories ---------------------------------------------------------

    @_answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        fh = self._next_listing
        self._next_listing += 1
        self._listings[fh] = _Listing(inode, self._tree.listing_end)
        return fh

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        tree, listing = self._tree, self._listings[fh]
        if start_id == 0:
            listing.end = tree.listing_end
        directory = listing.directory
        inode = tree.inode(directory)
        dots = ((1, directory, b"."), (2, inode.parent, b".."))
        for cookie, ino, name in dots[min(start_id, 2) :]:
            entry = self._attr(ino, tree.inode(ino) if cookie == 2 else inode)
            if not pyfuse3.readdir_reply(token, name, entry, cookie):
                return
        for cookie, ino, name in tree.entries(directory, start_id, listing.end):
            if not pyfuse3.readdir_reply(token, name, self._attr(ino, tree.inode(ino)), cookie):
                return
            self._known.add(ino)

    @_answered
    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    @_answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._files.commit()

    # --- files ---------------------------------------------------------------

    @_answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        mode = stat.S_IFREG | stat.S_IMODE(mode)
        ino, inode = self._tree.make(parent_inode, name, mode, ctx.uid, ctx.gid)
        return FileInfo(fh=ino, keep_cache=True), self._entry(ino, inode)

    @_answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & os.O_TRUNC:
            self._will_change(inode)
            await self._contents.truncate(inode, 0)
            self._drop_set_id(inode, ctx)
        return FileInfo(fh=inode, keep_cache=True)

    def _drop_set_id(self, ino: int, ctx: RequestContext) -> None:
        """Drop set-id bits unless root truncates: with O_TRUNC the kernel leaves this to us."""
        mode = self._tree.inode(ino).mode
        bits = stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0)
        if ctx.uid != 0 and mode & bits:
            self._tree.change(ino, Change(mode=mode & ~bits))

    def _will_change(self, ino: int) -> None:
        """Drop the capability of a file that changes; without attributes the kernel cannot."""
        if not self._has_xattrs:
            self._attributes.drop_capability(ino)

    @_answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        data = await self._contents.read(fh, off, size)
        TALLIES["read"].size += len(data)
        return cast("bytes", data)  # pyfuse3 takes any contiguous buffer

    @_answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self._will_change(fh)
        written = await self._contents.write(fh, off, buf, whole=self.enable_writeback_cache)
        if written < len(buf):
            self._cut_short.add(fh)
        TALLIES["write"].size += written
        return written

    async def flush(self, fh: int) -> None:
        raise _NOT_OFFERED  # saves one request for each close

    @_answered
    async def release(self, fh: int) -> None:
        pass

    @_answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._files.commit()
        if fh in self._cut_short:
            self._cut_short.discard(fh)
            raise FUSEError(errno.EDQUOT)

    # --- extended attributes -------------------------------------------------

    def _need_xattrs(self) -> None:
        """Refuse if attributes are off, so that the kernel stops asking before each write."""
        if not self._has_xattrs:
            raise _NOT_OFFERED

    @_answered
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        self._need_xattrs()
        if name == POLICY:
            return await self._attributes.policy(inode)
        return self._attributes.get(inode, name)

    @_answered
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        self._need_xattrs()
        return self._attributes.names(inode)

    @_answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        self._need_xattrs()
        if name == CODE:
            self._attributes.check_setter(inode, ctx.uid, value)
        may_keep_sgid = ctx.uid == 0
        if not may_keep_sgid and name.startswith(b"system."):
            group = self._tree.inode(inode).gid
            may_keep_sgid = group == ctx.gid or group in pyfuse3.get_sup_groups(ctx.pid)
        self._attributes.set(inode, name, value, may_keep_sgid=may_keep_sgid)

    @_answered
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self._need_xattrs()
        if name == CODE:
            self._attributes.check_setter(inode, ctx.uid, None)
        self._attributes.remove(inode, name)

    # --- the file system -----------------------------------------------------

    @_answered
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        if linux.process_name(ctx.pid) == _UMOUNT and not self._files.log.read_only:
            with contextlib.suppress(errors.FusestoreError):  # the log has it
                await self._files.commit()
        total, free = self._files.space()
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = _BLOCK_BYTES
        found.f_blocks = total // _BLOCK_BYTES
        found.f_bfree = found.f_bavail = free // _BLOCK_BYTES
        found.f_files, found.f_ffree = self._files.inodes(free)
        found.f_favail = found.f_ffree
        found.f_namemax = NAME_BYTES_MAX
        return found
