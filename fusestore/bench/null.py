"""The upper limit of pyfuse3: a file system in memory that only answers requests.

It has no coding, no metadata store and no durability.  No pyfuse3 daemon on this machine
can be faster, so results of a store are given as shares of it.  Bytes past the first MiB
of a file are dropped, and read as zeros, so that the measurement does not depend on the
memory of this daemon.

    python -m fusestore.bench.null MOUNTPOINT      prints "ready" when it is mounted
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext

from ..limits import MIB

KEPT_BYTES_MAX = MIB
"""How many bytes of each file are kept."""
CACHED_SECONDS = 300
"""How long the kernel may cache names and attributes; the same as for a store."""
_ZEROS = memoryview(bytes(2 * MIB))
_FREE_BLOCKS = 1 << 30


@dataclass(slots=True)
class _Node:
    """A file, directory or symbolic link."""

    ino: int
    mode: int
    parent: int
    size: int = 0
    data: bytearray = field(default_factory=bytearray)
    entries: dict[bytes, int] = field(default_factory=dict)
    mtime: int = field(default_factory=time.time_ns)
    named: bool = True


class NullOperations(pyfuse3.Operations):
    """Handlers that keep everything in dictionaries."""

    supports_dot_lookup = False

    def __init__(self) -> None:
        super().__init__()
        root = pyfuse3.ROOT_INODE
        self._nodes = {root: _Node(root, stat.S_IFDIR | 0o755, root)}
        self._next = root + 1

    # --- names ---------------------------------------------------------------

    @staticmethod
    def _attr(node: _Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.ino
        entry.st_mode = node.mode
        entry.st_size = node.size
        entry.st_nlink = 1
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = node.mtime
        entry.attr_timeout = entry.entry_timeout = CACHED_SECONDS
        return entry

    def _make(self, parent: int, name: bytes, mode: int) -> _Node:
        node = _Node(self._next, mode, parent)
        self._next += 1
        self._nodes[node.ino] = node
        self._nodes[parent].entries[name] = node.ino
        return node

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        ino = self._nodes[parent_inode].entries.get(name)
        if ino is None:
            entry = EntryAttributes()
            entry.st_ino = 0
            entry.entry_timeout = CACHED_SECONDS
            return entry
        return self._attr(self._nodes[ino])

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, _ in inode_list:
            node = self._nodes.get(ino)
            if node is not None and not node.named:
                del self._nodes[ino]

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._attr(self._make(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode)))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        node = self._make(parent_inode, name, stat.S_IFLNK | 0o777)
        node.data += target
        return self._attr(node)

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return bytes(self._nodes[inode].data)

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._nodes[self._nodes[parent_inode].entries.pop(name)].named = False

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        if self._nodes[self._nodes[parent_inode].entries[name]].entries:
            raise FUSEError(errno.ENOTEMPTY)
        await self.unlink(parent_inode, name, ctx)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        entries = self._nodes[parent_inode_new].entries
        if name_new in entries:
            self._nodes[entries[name_new]].named = False
        entries[name_new] = self._nodes[parent_inode_old].entries.pop(name_old)

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        entries = list(self._nodes[fh].entries.items())[start_id:]
        for cookie, (name, ino) in enumerate(entries, start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._attr(self._nodes[ino]), cookie):
                break

    async def releasedir(self, fh: int) -> None:
        pass

    # --- attributes ----------------------------------------------------------

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attr(self._nodes[inode])

    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self._nodes[inode]
        if fields.update_size:
            self._truncate(node, attr.st_size)
        if fields.update_mode:
            node.mode = attr.st_mode
        if fields.update_mtime:
            node.mtime = attr.st_mtime_ns
        return self._attr(node)

    @staticmethod
    def _truncate(node: _Node, size: int) -> None:
        node.size = size
        del node.data[size:]

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        raise FUSEError(pyfuse3.ENOATTR)

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = 4096
        found.f_blocks = found.f_bfree = found.f_bavail = _FREE_BLOCKS
        found.f_files = found.f_ffree = found.f_favail = _FREE_BLOCKS
        found.f_namemax = 255
        return found

    # --- bytes ---------------------------------------------------------------

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        node = self._make(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode))
        return FileInfo(fh=node.ino, keep_cache=True), self._attr(node)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & os.O_TRUNC:
            self._truncate(self._nodes[inode], 0)
        return FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        node = self._nodes[fh]
        size = max(0, min(size, node.size - off))
        if off + size <= len(node.data):
            return bytes(memoryview(node.data)[off : off + size])
        return _ZEROS[:size]  # type: ignore[return-value]  # any buffer works

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        node, end = self._nodes[fh], off + len(buf)
        if end <= KEPT_BYTES_MAX:
            if off > len(node.data):
                node.data += bytes(off - len(node.data))
            node.data[off:end] = buf
        node.size = max(node.size, end)
        return len(buf)

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        pass

    async def fsync(self, fh: int, datasync: bool) -> None:
        pass

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass


def main(mountpoint: str) -> None:
    """Mount, print "ready", and serve until unmounted."""
    options = {*pyfuse3.default_options, "fsname=null", "subtype=fusestore-null"}
    pyfuse3.init(NullOperations(), mountpoint, options)
    try:
        print("ready", flush=True)
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main(sys.argv[1])
