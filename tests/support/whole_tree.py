"""A whole tree of a store as it reads, and files by their names."""

from __future__ import annotations

import random
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusestore.config.store_config import StoreConfig
from fusestore.errors import LostError
from fusestore.format import file_rows
from fusestore.format.file_rows import ROOT, Extent
from support.opened_store import Opened, opened


@dataclass(frozen=True)
class State:
    """A whole tree at one instant."""

    names: dict[bytes, tuple[Any, ...]]
    """By path, in the order of listing: all that is said of it but its bytes."""
    contents: dict[int, bytes | None]
    """By inode: a file's bytes, None where they are lost."""


def walk(one: Opened) -> dict[bytes, int]:
    """Every path, and its inode; directories before what is in them."""
    found = {b"": int(ROOT)}
    todo = [b""]
    while todo:
        folder = todo.pop()
        for _, ino, name in list(one.files.tree.entries(found[folder], 0)):
            assert one.files.tree.lookup(found[folder], name) == ino
            found[folder + b"/" + name] = ino
            if stat.S_ISDIR(one.files.tree.inode(ino).mode):
                todo.append(folder + b"/" + name)
    return found


def data_ranges(one: Opened, ino: int) -> tuple[tuple[int, int], ...]:
    """Where a file has bytes; the rest are holes."""
    ranges: list[tuple[int, int]] = []
    start, end = file_rows.extent_key(ino, 0), file_rows.extent_key(ino + 1, 0)
    for key, value in one.store.log.engine.scan(start, end):
        extent = Extent.decode(key, value)
        if ranges and ranges[-1][1] == extent.offset:
            ranges[-1] = (ranges[-1][0], extent.end)
        else:
            ranges.append((extent.offset, extent.end))
    return tuple(ranges)


def describe(one: Opened, ino: int) -> tuple[Any, ...]:
    """All that is said of an inode but its bytes."""
    inode = one.files.tree.inode(ino)
    target = one.files.tree.target(ino) if stat.S_ISLNK(inode.mode) else b""
    names = one.files.attributes.names(ino)
    values = tuple((name, one.files.attributes.get(ino, name)) for name in names)
    return ino, replace(inode), target, values, data_ranges(one, ino)


def tree_of(one: Opened) -> dict[bytes, tuple[Any, ...]]:
    return {path: describe(one, ino) for path, ino in walk(one).items()}


async def look(one: Opened) -> State:
    """The tree as it reads."""
    names = tree_of(one)
    contents: dict[int, bytes | None] = {}
    for ino, inode, *_ in names.values():
        if stat.S_ISREG(inode.mode) and ino not in contents:
            try:
                contents[ino] = bytes(await one.files.contents.read(ino, 0, 1 << 40))
            except LostError:
                contents[ino] = None
    return State(names, contents)


def difference(found: State, expected: State) -> str:
    """What differs, for people."""
    lines = [f"gone: {path!r}" for path in expected.names.keys() - found.names.keys()]
    lines += [f"come up: {path!r}" for path in found.names.keys() - expected.names.keys()]
    for path in found.names.keys() & expected.names.keys():
        if found.names[path] != expected.names[path]:
            lines.append(f"{path!r}: {found.names[path]} in place of {expected.names[path]}")
    for ino, data in expected.contents.items():
        got = found.contents.get(ino)
        if got != data:
            size = None if got is None else len(got)
            lines.append(f"inode {ino}: {size} bytes that differ")
    return "\n".join(lines) or "the order of names"


def one_of(found: State, possible: Sequence[State]) -> State:
    """The state that was found; AssertionError when it is none that may be."""
    for state in possible:
        if state == found and list(state.names) == list(found.names):
            return state
    raise AssertionError(
        f"none of {len(possible)} states; to the last:\n{difference(found, possible[-1])}"
    )


Files = dict[str, bytes | None]
"""By name: a file's bytes, None where they are lost."""


def made(seed: str, *names: str, size: int = 150_000) -> dict[str, bytes]:
    """Random files."""
    return {name: random.Random(f"{seed}/{name}").randbytes(size) for name in names}


async def put(one: Opened, files: dict[str, bytes]) -> None:
    """Let files have these bytes, durably; each in a commit, and so a stripe, of its own."""
    for name, data in files.items():
        ino = await one.put(name, b"")
        await one.files.contents.truncate(ino, 0)
        await one.put(name, data)
        await one.store.committer.commit()


async def write(config: StoreConfig, files: dict[str, bytes]) -> None:
    """A mount in which files are written."""
    async with opened(config) as one:
        await put(one, files)


async def read_files(one: Opened) -> Files:
    state = await look(one)
    return {
        path[1:].decode(): state.contents[row[0]] for path, row in list(state.names.items())[1:]
    }


async def read(config: StoreConfig) -> Files:
    async with opened(config) as one:
        return await read_files(one)
