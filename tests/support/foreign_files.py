"""What somebody else may leave in the directory of a node, and what must stay untouched."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

from fusestore.config.store_config import StoreConfig
from support.opened_store import limited

MIB = 1 << 20
VICTIM = b"# somebody else's\n" * 300
FILES = {name: random.Random(name).randbytes(2 * MIB + 77_000) for name in ("a", "b")}


class Outside:
    """What lies outside of the store, and must stay as it is."""

    def __init__(self, place: Path) -> None:
        self.file, self.folder = place / "victim", place / "folder"
        self.folder.mkdir(parents=True)
        self.file.write_bytes(VICTIM)
        for name in ("00000001.seg", "00000001.log", "node.toml"):
            (self.folder / name).write_bytes(VICTIM)
        self.before = self.seen()

    def seen(self) -> dict[str, tuple[bytes, int, int]]:
        paths = [self.file, *self.folder.iterdir()]
        return {str(p): (p.read_bytes(), p.stat().st_mode, p.stat().st_mtime_ns) for p in paths}

    def is_untouched(self) -> bool:
        return self.seen() == self.before


def odd_name(path: Path) -> None:
    """What was there has a name that is no text."""
    path.with_name("moved").rename(path.with_name(os.fsdecode(b"\xff\xfe")))


KINDS: dict[str, Callable[[Path, Outside], object]] = {
    "link to a file": lambda path, outside: path.symlink_to(outside.file),
    "link to a directory": lambda path, outside: path.symlink_to(outside.folder),
    "dangling link": lambda path, outside: path.symlink_to(outside.folder / "gone"),
    "hard link": lambda path, outside: path.hardlink_to(outside.file),
    "fifo": lambda path, outside: os.mkfifo(path),
    "socket": lambda path, outside: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path, outside: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "directory": lambda path, outside: path.mkdir(),
    "10 TB": lambda path, outside: (path.touch(), os.truncate(path, 10 << 40)),
    "garbage": lambda path, outside: path.write_bytes(random.Random(1).randbytes(70_000)),
    "empty": lambda path, outside: path.touch(),
    "odd name": lambda path, outside: odd_name(path),
}


def last(folder: Path) -> Path:
    return max(folder.iterdir())


def following(folder: Path) -> Path:
    found = last(folder)
    return found.with_name(f"{int(found.stem) + 1:08d}{found.suffix}")


PLACES: dict[str, Callable[[Path], list[Path]]] = {
    "node.toml": lambda node: [node / "node.toml"],
    "journal": lambda node: [node / "journal"],
    "shards": lambda node: [node / "shards"],
    "current journal segment": lambda node: [last(node / "journal")],
    "shard segment": lambda node: [min((node / "shards").iterdir())],
    "next segments": lambda node: [following(node / "journal"), following(node / "shards")],
}


def plant(kind: str, paths: list[Path], outside: Outside) -> None:
    for path in paths:
        if path.exists():
            path.rename(path.with_name("moved"))
        elif kind == "odd name":
            path.with_name("moved").touch()
        KINDS[kind](path, outside)
        moved = path.with_name("moved")
        if moved.exists():  # outside of the node, so that it does not look as if it had more
            moved.rename(outside.folder.parent / f"moved-{path.name}")


def quick(config: StoreConfig) -> StoreConfig:
    return limited(config, shard_segment_bytes=MIB, node_seconds_max=5.0, retry_seconds_min=0.1)
