"""Access to files beneath a directory with untrusted contents, which never leaves it.

`open_file` and `read_small` do the same for a file by its path.

All names are single components.  Symbolic links are not followed.  No open waits (for a
writer of a fifo, or for a lease).  Only directories and regular files are opened, never
devices.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .process_limits import retried

_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
WRONG_KIND = (errno.ELOOP, errno.EINVAL)
"""The numbers of errors about a name of the wrong kind."""
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Directory:
    """An open directory; its descriptor is closed when the object is garbage.

    All methods raise OSError.  If a name is of the wrong kind, `strerror` is a clause that
    describes this.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)

    @classmethod
    def at(cls, path: Path) -> Directory:
        """Open a directory by a trusted path: links in the path are followed."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC
        return cls(retried(os.open, path, flags))

    def folder(self, name: str) -> Directory:
        """Open a subdirectory."""
        _expect(self.look(name), stat.S_IFDIR)
        flags = os.O_RDONLY | os.O_DIRECTORY | _FLAGS
        return Directory(retried(os.open, name, flags, dir_fd=self.fd))

    def make_folder(self, name: str) -> None:
        """Make a subdirectory (mode 0700) durably, unless the name exists."""
        try:
            os.mkdir(name, 0o700, dir_fd=self.fd)
        except FileExistsError:
            return
        self.sync()

    def open(self, name: str, flags: int) -> int:
        """Open a regular file; for writing, it must have no other name."""
        self.look_at_file(name)
        fd = retried(os.open, name, flags | _FLAGS, dir_fd=self.fd)
        try:
            found = os.fstat(fd)
            _expect(found, stat.S_IFREG)
            if flags & os.O_ACCMODE != os.O_RDONLY and found.st_nlink > 1:
                raise OSError(errno.EMLINK, f"it has {found.st_nlink} names (hard links), not one")
            os.set_blocking(fd, True)  # otherwise io_uring does not wait for a disk
        except BaseException:
            os.close(fd)
            raise
        return fd

    def create(self, name: str, flags: int) -> int:
        """Make a regular file (mode 0600) and open it; the name must not exist."""
        flags |= os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return retried(os.open, name, flags, 0o600, dir_fd=self.fd)

    def look(self, name: str) -> os.stat_result:
        """Return the attributes of a name."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def has(self, name: str) -> bool:
        """Whether something has the name."""
        try:
            self.look(name)
        except FileNotFoundError:
            return False
        return True

    def look_at_file(self, name: str) -> os.stat_result:
        """Return the attributes of a name, which must be a regular file."""
        found = self.look(name)
        _expect(found, stat.S_IFREG)
        return found

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """Yield all entries, in no order."""
        with retried(os.scandir, self.fd) as entries:
            yield from entries

    def replace(self, draft: str, name: str) -> None:
        """Rename a file durably; an existing file with the new name is replaced."""
        os.replace(draft, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.sync()

    def unlink(self, name: str) -> None:
        """Remove a name, not of a directory."""
        os.unlink(name, dir_fd=self.fd)

    def remove_folder(self, name: str) -> None:
        """Remove an empty directory."""
        os.rmdir(name, dir_fd=self.fd)

    def sync(self) -> None:
        """Make the names in the directory durable."""
        os.fsync(self.fd)


def open_file(path: Path, flags: int, *, follow: bool = False) -> int:
    """Open a regular file, which O_CREAT makes (mode 0600); OSError as for `Directory`.

    With `follow`, the path may be a symbolic link.
    """
    with suppress(FileNotFoundError):  # some devices act when they are opened
        _expect(os.stat(path, follow_symlinks=follow), stat.S_IFREG)
    fd = retried(os.open, path, flags | (_FLAGS & ~os.O_NOFOLLOW if follow else _FLAGS), 0o600)
    try:
        _expect(os.fstat(fd), stat.S_IFREG)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_small(path: Path, most: int, *, follow: bool = False) -> bytes:
    """Return the contents of a regular file of up to `most` bytes; errors as for `open_file`."""
    with open(open_file(path, os.O_RDONLY, follow=follow), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is longer than {most:,} bytes")
    return data


def _expect(found: os.stat_result, wanted: int) -> None:
    """Raise OSError unless a file is of the wanted kind."""
    kind = stat.S_IFMT(found.st_mode)
    if kind != wanted:
        number = errno.ELOOP if kind == stat.S_IFLNK else errno.EINVAL
        raise OSError(number, f"it is {_KINDS.get(kind, 'something else')}, not {_KINDS[wanted]}")
