"""A store that is opened in the process of the test, and its file system."""

from __future__ import annotations

import shutil
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio
import trio.testing

from fusestore.config.mkfs import make_store
from fusestore.config.node_identity import read_identity, write_identity
from fusestore.config.store_config import CONFIG_NAME, StoreConfig, load
from fusestore.files.filesystem import FileSystem
from fusestore.format import file_rows, keys, stripe_rows
from fusestore.format.erasure import Code
from fusestore.format.file_rows import ROOT, Inode
from fusestore.format.stripe_rows import Live
from fusestore.limits import DEFAULTS, STRIPE_BYTES, Limits
from fusestore.store.opening import open_store
from fusestore.store.store import Store
from support.faults import FaultyNode

REGIONS = ("us-east-1", "us-west-1", "eu-west-1")
HEALTHY_SECONDS_MAX = 60


@dataclass
class Opened:
    """An open store and its file system."""

    store: Store
    files: FileSystem

    async def put(self, name: str, data: bytes, offset: int = 0) -> int:
        """Write to the file `name`, made when it is not there; its inode."""
        ino = self.files.tree.lookup(ROOT, name.encode())
        if ino is None:
            ino, _ = self.files.tree.make(ROOT, name.encode(), stat.S_IFREG | 0o644, 0, 0)
        for start in range(0, len(data), STRIPE_BYTES):
            part = data[start : start + STRIPE_BYTES]
            assert await self.files.contents.write(ino, offset + start, part) == len(part)
        return ino

    async def get(self, name: str) -> bytes:
        """All bytes of a file."""
        ino = self.files.tree.lookup(ROOT, name.encode())
        assert ino is not None
        return bytes(await self.files.contents.read(ino, 0, 1 << 40))

    def delete(self, name: str) -> None:
        """Unlink a file that nobody uses."""
        ino, _ = self.files.tree.unlink(ROOT, name.encode())
        self.files.removal.remove(ino)

    async def checkpoint(self) -> None:
        """Commit and checkpoint, then let what waits for it run."""
        async with self.store.committer.lock:
            await self.store.committer.commit_now(checkpoint=True)
        await trio.testing.wait_all_tasks_blocked(0.05)

    def rows(self, table: bytes) -> list[tuple[bytes, bytes]]:
        """All rows of a table, by its letter."""
        return list(self.store.log.engine.scan(table, keys.after(table)))

    def check_counters(self) -> None:
        """`live`, `allocated` and the counters against the extents."""
        live: dict[int, int] = {}
        for key, value in self.rows(b"E"):
            extent = file_rows.Extent.decode(key, value)
            live[extent.stripe] = live.get(extent.stripe, 0) + extent.length
        found = {
            stripe_rows.decode_stripe_key(key): Live.decode(value) for key, value in self.rows(b"V")
        }
        assert {number: count.live for number, count in found.items()} == live
        for number, count in found.items():
            row = self.store.log.stripe(number)
            assert row is None or row.length == count.length
        if self.store.log.waste_counted:
            assert self.store.log.waste == sum(count.waste for count in found.values())
        counters = self.store.log.counters
        assert counters.file_bytes == sum(live.values())
        assert counters.files == len(self.rows(b"I"))
        inodes = [Inode.decode(value) for _, value in self.rows(b"I")]
        assert sum(inode.allocated for inode in inodes) == sum(live.values())


def make(path: Path, code: str = "2+1", limits: Limits = DEFAULTS) -> StoreConfig:
    """A new store of one node in each of three regions."""
    regions = [(name, None) for name in REGIONS]
    return limited(make_store(path, regions, Code.parse(code), None, False), limits)


def make_with_two_nodes_a_region(path: Path, code: str) -> StoreConfig:
    """A new store of two nodes in each of three regions."""
    names = [(f"{region}-{letter}", None) for region in REGIONS for letter in "ab"]
    config = make_store(path, names, Code.parse(code), None, True)
    text = (path / CONFIG_NAME).read_text()
    for node in config.nodes:
        line = f'name = "{node.name}"\n'
        assert text.count(line) == 1
        text = text.replace(f'region = "{node.name}"\n', "")
        text = text.replace(line, f'{line}region = "{node.name[:-2]}"\n')
        identity = read_identity(node.path)
        write_identity(node.path, replace(identity, region=node.name[:-2]))
    (path / CONFIG_NAME).write_text(text)
    return load(path)


def limited(config: StoreConfig, limits: Limits = DEFAULTS, **changes: float) -> StoreConfig:
    """A store with these limits, or with some others than the defaults."""
    return replace(config, limits=replace(limits, **changes))


async def loses_a_region(config: StoreConfig, region: int, files: dict[str, bytes]) -> None:
    """Without a region, all files read right."""
    shutil.rmtree(config.nodes[region].path)
    async with opened(config) as one:
        for name, data in files.items():
            assert await one.get(name) == data


@asynccontextmanager
async def opened(
    config: StoreConfig, faults: bool = False, **options: bool
) -> AsyncIterator[Opened]:
    """Open the store with these options of a mount; with `faults`, its nodes are FaultyNodes."""
    async with open_store(config, **options) as store, trio.open_nursery() as nursery:
        files = FileSystem(store, nursery)
        await files.begin()
        if faults:
            for member in store.log.members.all:
                assert member.node is not None
                member.node = FaultyNode(member.node)
        yield Opened(store, files)
        nursery.cancel_scope.cancel()


def crashed(config: StoreConfig, to: Path) -> StoreConfig:
    """The store as a crash right now would leave it."""
    shutil.copytree(config.store, to, ignore=shutil.ignore_patterns("*.sock"))
    return load(to)


async def healthy(one: Opened) -> None:
    """Wait until nothing is missing anywhere."""
    with trio.fail_after(HEALTHY_SECONDS_MAX):
        while not (await one.store.status())["healthy"]:
            one.store.comeback.wake()
            await trio.sleep(0.02)


async def repair(one: Opened, name: str, *, discard_history: bool = False) -> dict[str, Any]:
    """What `fusestore repair` does."""
    return await one.store.repairer.repair(
        name, lambda message: None, discard_history=discard_history
    )


async def scrub(one: Opened) -> dict[str, int]:
    """What `fusestore scrub` does; its result."""
    return await one.store.scrubber.command(
        "start", None, wait=True, alone=False, progress=lambda message: None
    )
