"""Small file systems of their own, for stores that are to be full."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

MIB = 1 << 20


class Disks:
    """File systems below a directory; they need root."""

    def __init__(self, base: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounts file systems")
        self._base = base
        self._mounted: list[Path] = []

    def tmpfs(self, name: str, mib: int, inodes: int = 0) -> Path:
        """Mount a tmpfs; `inodes`: how many it may have, 0 for no limit."""
        place = self._place(name)
        options = f"size={mib}m,nr_inodes={inodes}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True)
        self._mounted.append(place)
        return place

    def bind(self, source: Path, place: Path) -> None:
        """Let a directory be another one."""
        subprocess.run(["mount", "--bind", source, place], check=True)
        self._mounted.append(place)

    def unmount(self, place: Path) -> None:
        """Take a file system away, whoever uses it."""
        subprocess.run(["umount", "-l", place], check=True)
        self._mounted.remove(place)

    def remount_tmpfs(self, place: Path, mib: int) -> Path:
        """Mount another tmpfs where one was."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", place], check=True)
        self._mounted.append(place)
        return place

    def ext4(self, name: str, mib: int) -> Path:
        """Mount an ext4 on a loop device."""
        place, image = self._place(name), self._base / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(mib * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
        self._mounted.append(place)
        return place

    def _place(self, name: str) -> Path:
        place = self._base / name
        place.mkdir()
        return place

    def clean_up(self) -> None:
        """Unmount all."""
        for place in reversed(self._mounted):
            subprocess.run(["umount", "-l", place], check=False)


def free(place: Path) -> int:
    """The free bytes of a file system."""
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def fill(path: Path) -> None:
    """Write a file until its file system is full to the last byte."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (MIB, 4096, 1):
            block = bytes(size)
            try:
                while os.write(fd, block) == size:
                    pass
            except OSError:
                continue
    finally:
        os.close(fd)
