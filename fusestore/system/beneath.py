"""Files beneath a directory whose content is somebody else's: nothing leads out of it.

All names are single components.  No symbolic link is followed, no open waits (on a fifo
for a writer, on a lease), and only a directory or a regular file is opened: a device is
looked at, never opened.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Directory:
    """An open directory; its descriptor is closed when the last user lets go.

    All methods raise OSError; its `strerror` is half a sentence where something else
    has the name.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)

    @classmethod
    def at(cls, path: Path) -> Directory:
        """Open a directory by a path that is to be trusted: links in it are followed."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC
        return cls(os.open(path, flags))

    def folder(self, name: str) -> Directory:
        """Open a directory in it."""
        _expect(self.look(name), stat.S_IFDIR)
        return Directory(os.open(name, os.O_RDONLY | os.O_DIRECTORY | _FLAGS, dir_fd=self.fd))

    def make_folder(self, name: str) -> None:
        """Make a directory in it (0700), durably, if nothing has the name."""
        try:
            os.mkdir(name, 0o700, dir_fd=self.fd)
        except FileExistsError:
            return
        self.sync()

    def open(self, name: str, flags: int) -> int:
        """Open a regular file in it; to be written to, it must have no other name."""
        self.look_at_file(name)
        fd = os.open(name, flags | _FLAGS, dir_fd=self.fd)
        try:
            found = os.fstat(fd)
            _expect(found, stat.S_IFREG)
            if flags & os.O_ACCMODE != os.O_RDONLY and found.st_nlink > 1:
                raise OSError(
                    errno.EMLINK, f"it has {found.st_nlink} names (hard links), and may have one"
                )
            os.set_blocking(fd, True)  # else the kernel's ring does not wait for a disk
        except BaseException:
            os.close(fd)
            raise
        return fd

    def create(self, name: str, flags: int) -> int:
        """Make a regular file in it (0600) and open it; nothing may have the name."""
        return os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self.fd)

    def look(self, name: str) -> os.stat_result:
        """What has the name."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def look_at_file(self, name: str) -> os.stat_result:
        """The same of a regular file."""
        found = self.look(name)
        _expect(found, stat.S_IFREG)
        return found

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """All names in it, in no order."""
        with os.scandir(self.fd) as entries:
            yield from entries

    def replace(self, draft: str, name: str) -> None:
        """Give a file in it another name, durably, in the place of what had that."""
        os.replace(draft, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.sync()

    def unlink(self, name: str) -> None:
        """Remove a name that is no directory's."""
        os.unlink(name, dir_fd=self.fd)

    def remove_folder(self, name: str) -> None:
        """Remove an empty directory."""
        os.rmdir(name, dir_fd=self.fd)

    def sync(self) -> None:
        """Make the names in it durable."""
        os.fsync(self.fd)


def _expect(found: os.stat_result, wanted: int) -> None:
    """OSError unless something is of the kind that is wanted."""
    kind = stat.S_IFMT(found.st_mode)
    if kind != wanted:
        number = errno.ELOOP if kind == stat.S_IFLNK else errno.EINVAL
        raise OSError(number, f"it is {_KINDS.get(kind, 'something else')}, not {_KINDS[wanted]}")
