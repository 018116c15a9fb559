"""Paths for people are found a piece of a directory at a time, and each directory is read once."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from fusestore.config.mkfs import make_store as new_store
from fusestore.config.store_config import StoreConfig
from fusestore.files.path_search import PathSearch
from fusestore.format.file_rows import ROOT, inode_key
from support.mounted_store import Store
from support.opened_store import Opened, opened

MakeStore = Callable[..., Store]
COUNT = 5000


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return new_store(tmp_path / "store")


def make(one: Opened, parent: int, name: bytes, kind: int = stat.S_IFREG) -> int:
    return one.files.tree.make(parent, name, kind | 0o755, 0, 0)[0]


async def test_paths_are_right(config: StoreConfig) -> None:
    async with opened(config) as one:
        tree = one.files.tree
        top = make(one, ROOT, b"top", stat.S_IFDIR)
        inner = make(one, top, b"in\nner", stat.S_IFDIR)
        wanted = {int(ROOT): "/", top: "/top", inner: "/top/in\nner"}
        for number in range(COUNT):
            wanted[make(one, inner, b"f%d" % number)] = f"/top/in\nner/f{number}"
        odd = make(one, ROOT, b"\xff")
        wanted[odd] = "/\udcff"
        tree.link(odd, inner, b"second")
        wanted[odd] = "/top/in\nner/second"
        tree.rename(inner, b"f7", ROOT, b"moved")
        moved = tree.lookup(ROOT, b"moved")
        assert moved is not None
        wanted[moved] = "/moved"
        wanted[1 << 40] = "/?"
        assert await tree.paths(wanted) == wanted
        assert await tree.paths([top]) == {top: "/top"}
        assert await tree.paths([]) == {}
        assert PathSearch(one.store.log, wanted).at_once() == wanted


async def test_a_large_directory_is_searched_in_pieces_while_it_changes(
    config: StoreConfig,
) -> None:
    async with opened(config) as one:
        tree = one.files.tree
        top = make(one, ROOT, b"top", stat.S_IFDIR)
        inos = [make(one, top, b"f%d" % number) for number in range(COUNT)]
        search = PathSearch(one.store.log, inos[-50:])
        chance = random.Random(1)
        steps = 0
        for _ in search.steps():
            steps += 1
            name = b"f%d" % chance.randrange(COUNT - 50)
            if tree.lookup(top, name) is not None:
                tree.unlink(top, name)
            make(one, top, b"new%d" % steps)
        assert steps >= COUNT / one.store.log.limits.walk_batch / 2
        numbers = range(COUNT - 50, COUNT)
        assert sorted(search.paths().values()) == [f"/top/f{number}" for number in numbers]


@pytest.mark.parametrize("count", [1, COUNT])
async def test_each_directory_is_read_once_for_all(config: StoreConfig, count: int) -> None:
    async with opened(config) as one:
        top = make(one, ROOT, b"top", stat.S_IFDIR)
        inos = [make(one, top, b"f%d" % number) for number in range(COUNT)]
        search = PathSearch(one.store.log, inos[-count:])
        steps = sum(1 for _ in search.steps())
        assert steps < (COUNT + count) / one.store.log.limits.walk_batch + 10


async def test_parents_that_form_a_circle_end_the_search(config: StoreConfig) -> None:
    async with opened(config) as one:
        a = make(one, ROOT, b"a", stat.S_IFDIR)
        b = make(one, a, b"b", stat.S_IFDIR)
        inode = one.files.tree.inode(a)
        inode.parent = b
        one.store.log.apply({inode_key(a): inode.encode()})
        with trio.fail_after(5):
            found = await one.files.tree.paths([b])
        assert found[b].endswith("/b")


ASK = """
import os, sys
while True:
    os.getxattr(sys.argv[1], "user.fusestore.policy")
"""


@pytest.mark.mounted
def test_a_large_directory_of_one_user_does_not_slow_down_others(make_store: MakeStore) -> None:
    store = make_store()
    store.mount()
    big = store.mountpoint / "big"
    big.mkdir()
    for number in range(30_000):
        os.mknod(big / f"{number:06}", stat.S_IFREG | 0o644)
    (big / "last").mkdir()
    store.cli("policy", "set", big / "last", "1+2")
    other = store.mountpoint / "other"
    other.mkdir()
    asking = subprocess.Popen([sys.executable, "-c", ASK, big / "last"])
    try:
        time.sleep(0.5)
        longest = 0.0
        for number in range(100):
            started = time.perf_counter()
            assert not (other / f"{number}").exists()
            longest = max(longest, time.perf_counter() - started)
        started = time.perf_counter()
        os.getxattr(big / "last", "user.fusestore.policy")
        search = time.perf_counter() - started
    finally:
        asking.kill()
        asking.wait()
    assert b'"set_on": "/big/last"' in os.getxattr(big / "last", "user.fusestore.policy")
    assert longest < search, "a look-up waited for a whole search"
