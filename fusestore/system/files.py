"""Files and directories that survive a crash: replaced whole, durable with their names."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, text: str, mode: int = 0o600) -> None:
    """Replace `file`, durable with its name; OSError when it fails."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as stream:
            os.fchmod(fd, mode)
            stream.write(text)
            stream.flush()
            os.fsync(fd)
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_directory(file.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; OSError when it fails."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
