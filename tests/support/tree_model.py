"""The tree of a store: as a mount shows it, and as it is to be."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import trio
import xxhash

from fusestore.format.file_rows import ROOT
from support.opened_store import Opened

Entry = tuple[int, int, int, bytes, tuple[tuple[bytes, bytes], ...], str, int, int]
"""mode, links, size, digest of bytes, attributes and digests, first path of it, mtime, ctime."""

State = dict[str, Entry]
"""A whole tree, by path; the root is the empty path."""


def digest(data: bytes) -> bytes:
    """What stands for a file's bytes."""
    return xxhash.xxh3_128_digest(data)


async def observe(one: Opened) -> State:
    """The tree that a mounted store shows, all of it read, once removals have ended."""
    while one.rows(b"D"):
        await trio.lowlevel.checkpoint()
    tree, first = one.files.tree, dict[int, str]()
    state: State = {}

    async def walk(ino: int, path: str) -> None:
        inode = tree.inode(ino)
        size, data = inode.size, b""
        if stat.S_ISREG(inode.mode):
            data = bytes(await one.files.contents.read(ino, 0, 1 << 40))
            assert len(data) == size, path
        elif stat.S_ISLNK(inode.mode):
            data = tree.target(ino)
        values = one.files.attributes
        attributes = tuple(sorted((n, digest(values.get(ino, n))) for n in values.names(ino)))
        times = (inode.mtime, inode.ctime) if path else (0, 0)
        seen = first.setdefault(ino, path)
        state[path] = (inode.mode, inode.nlink, size, digest(data), attributes, seen, *times)
        if stat.S_ISDIR(inode.mode):
            listed = list(tree.entries(ino, 0))
            assert len({name for _, _, name in listed}) == len(listed), path
            for _, child, name in sorted(listed, key=lambda entry: entry[2]):
                assert tree.lookup(ino, name) == child
                await walk(child, f"{path}/{name.decode()}")

    await walk(int(ROOT), "")
    one.check_counters()
    return state


def differences(found: State, wanted: State) -> str:
    """How two trees differ, for people."""
    lines = []
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            lines.append(f"  {path or '/'}: {found.get(path)} is not {wanted.get(path)}")
    return "\n".join(lines)


def match(found: State, states: list[State], oldest: int, newest: int) -> int:
    """Which of the states that may be seen was found; AssertionError when it is none of them."""
    for number in range(newest, oldest - 1, -1):
        if found == states[number]:
            return number
    others = [number for number, state in enumerate(states) if state == found]
    closest = min(
        range(oldest, newest + 1),
        key=lambda number: sum(
            found.get(path) != states[number].get(path) for path in found.keys() | states[number]
        ),
    )
    raise AssertionError(
        f"not one of the states {oldest} to {newest}, but {others or 'none that there ever was'}; "
        f"against {closest}:\n{differences(found, states[closest])}"
    )


class Model:
    """What the tree is to be; inode numbers are the store's own."""

    def __init__(self) -> None:
        self.paths: dict[str, int] = {"": int(ROOT)}
        self.modes: dict[int, int] = {int(ROOT): stat.S_IFDIR | 0o755}
        self.data: dict[int, bytes] = {}
        self.attributes: dict[int, dict[bytes, bytes]] = {}

    def freeze(self, one: Opened) -> State:
        """The state now; the times are the store's own."""
        links: dict[int, int] = {}
        first: dict[int, str] = {}
        for path, ino in self._walk(""):
            first.setdefault(ino, path)
            links[ino] = links.get(ino, 0) + (2 if self.is_directory(ino) else 1)
            if self.is_directory(ino) and path:
                links[self.paths[path.rpartition("/")[0]]] += 1
        state: State = {}
        for path, ino in self.paths.items():
            data = self.data.get(ino, b"")
            inode = one.files.tree.inode(ino)
            state[path] = (
                self.modes[ino],
                links[ino],
                len(data),
                digest(data),
                tuple(sorted((n, digest(v)) for n, v in self.attributes.get(ino, {}).items())),
                first[ino],
                inode.mtime if path else 0,
                inode.ctime if path else 0,
            )
        return state

    def _walk(self, path: str) -> Iterator[tuple[str, int]]:
        """All below a path, in the order of a listing."""
        yield path, self.paths[path]
        children = [
            other for other in self.paths if other and other.rpartition("/")[0] == path != other
        ]
        for child in sorted(children):
            yield from self._walk(child)

    def is_directory(self, ino: int) -> bool:
        """Whether an inode is a directory."""
        return stat.S_ISDIR(self.modes[ino])

    def directories(self) -> list[str]:
        """Paths of directories."""
        return [path for path, ino in self.paths.items() if self.is_directory(ino)]

    def others(self) -> list[str]:
        """Paths of what is no directory."""
        return [path for path, ino in self.paths.items() if not self.is_directory(ino)]

    def files(self) -> list[str]:
        """Paths of files."""
        return [path for path in self.others() if stat.S_ISREG(self.modes[self.paths[path]])]

    def is_empty(self, path: str) -> bool:
        """Whether nothing lies in a directory."""
        return not any(other.startswith(path + "/") for other in self.paths)

    def move(self, old: str, new: str) -> None:
        """Rename, over what is there."""
        self.paths.pop(new, None)
        for path in [path for path in self.paths if path == old or path.startswith(old + "/")]:
            self.paths[new + path[len(old) :]] = self.paths.pop(path)
