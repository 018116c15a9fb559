"""Crash-safe changes of files and directories."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .beneath import Directory


def write_whole(file: Path, text: str, mode: int = 0o600) -> None:
    """Replace `file` as a whole, durable with its name; OSError if this fails.

    A link with its name is replaced, not followed.
    """
    write_whole_in(Directory.at(file.parent), file.name, text, mode)


def write_whole_in(directory: Directory, name: str, text: str, mode: int = 0o600) -> None:
    """Replace the file `name` in an open directory; as `write_whole`."""
    draft = f".{name}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        directory.unlink(draft)
    fd = directory.create(draft, os.O_WRONLY)
    try:
        with open(fd, "w", encoding="utf-8") as stream:
            os.fchmod(fd, mode)
            stream.write(text)
            stream.flush()
            os.fsync(fd)
        directory.replace(draft, name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            directory.unlink(draft)
        raise


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; OSError if this fails."""
    Directory.at(path).sync()
