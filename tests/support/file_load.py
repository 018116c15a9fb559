"""A file that is worked on without a pause, and compared with a copy in memory."""

from __future__ import annotations

import mmap
import os
import random
import threading
from pathlib import Path

from support.posixly import read_uncached

SIZE_MAX = 3 << 20


class Load(threading.Thread):
    """One file, and random operations on it that are compared with a copy in memory."""

    def __init__(self, path: Path, seed: str) -> None:
        super().__init__()
        self.path, self.chance = path, random.Random(seed)
        self.model = bytearray()
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.operations = 0

    def run(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT)
            try:
                while not self.stop.is_set():
                    self.step(fd)
                    self.operations += 1
                os.fsync(fd)
            finally:
                os.close(fd)
        except BaseException as error:
            self.error = error

    def step(self, fd: int) -> None:
        """One operation."""
        chance, size = self.chance, len(self.model)
        match chance.choice(("write", "write", "read", "read", "cut", "map", "sync", "drop")):
            case "write":
                at = chance.randrange(min(size, SIZE_MAX - 1) + 1)
                data = chance.randbytes(chance.choice((1, 100, 4096, 70_000, 400_000)))
                data = data[: SIZE_MAX - at]
                assert os.pwrite(fd, data, at) == len(data)
                self.model[at : at + len(data)] = data
            case "read" if size:
                at = chance.randrange(size)
                length = chance.randrange(1, 300_000)
                assert os.pread(fd, length, at) == self.model[at : at + length]
            case "cut":
                new = chance.randrange(SIZE_MAX)
                os.ftruncate(fd, new)
                self.model = self.model[:new] + bytes(max(0, new - size))
            case "map" if size:
                with mmap.mmap(fd, size) as mapped:
                    at = chance.randrange(size)
                    data = chance.randbytes(min(5000, size - at))
                    mapped[at : at + len(data)] = data
                    self.model[at : at + len(data)] = data
                    start = chance.randrange(size)
                    assert mapped[start : start + 9000] == self.model[start : start + 9000]
                    mapped.flush()
            case "sync":
                os.fsync(fd)
            case "drop":
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def end(self) -> None:
        """Stop, and compare all bytes."""
        self.stop.set()
        self.join(120)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        assert read_uncached(self.path) == bytes(self.model)
