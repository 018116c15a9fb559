"""One owner: a store's nodes and its metadata are used by one mount at a time."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest

from fusestore.config.mkfs import make_store
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import NotDurableError, StoreBusyError
from fusestore.format import store_rows
from fusestore.format.erasure import Code
from fusestore.rescue.recover import recover
from fusestore.store.opening import open_store
from fusestore.system import locks
from support.opened_store import opened


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    """A store whose regions lie beside it."""
    regions = [(name, tmp_path / "regions" / name) for name in ("a", "b", "c")]
    (tmp_path / "regions").mkdir()
    return make_store(tmp_path / "store", regions, Code(2, 1))


def copy_of(config: StoreConfig, name: str = "copy") -> StoreConfig:
    """A copy of the store's directory, which names the same regions."""
    place = config.store.with_name(name)
    shutil.copytree(config.store, place, ignore=shutil.ignore_patterns("*.sock"))
    return load(place)


async def test_a_copy_is_not_opened_while_the_store_is(config: StoreConfig) -> None:
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
        await one.store.committer.commit()
        copy = copy_of(config)
        for read_only in (False, True):
            with pytest.raises(StoreBusyError, match="is in use by process"):
                async with open_store(copy, read_only=read_only):
                    pass
        shutil.rmtree(copy.metadata)
        with pytest.raises(StoreBusyError, match="is in use by process"):
            recover(copy.store, (), None, accept_loss=True, progress=lambda message: None)
        await one.put("g", b"two" * 10_000)
        await one.store.committer.commit()
    async with opened(config) as one:
        assert await one.get("f") == b"one" * 10_000
        assert await one.get("g") == b"two" * 10_000


async def test_one_region_in_common_is_enough_to_refuse(
    config: StoreConfig, tmp_path: Path
) -> None:
    """Without it the copy would begin a history of its own, and take the region later."""
    async with opened(config) as one:
        await one.put("f", b"one")
        await one.store.committer.commit()
        copy = copy_of(config)
        nodes = []
        for node in copy.nodes[:2]:
            shutil.copytree(node.path, tmp_path / "copied" / node.name)
            nodes.append(replace(node, path=tmp_path / "copied" / node.name))
        copy = replace(copy, nodes=(*nodes, copy.nodes[2]))
        with pytest.raises(StoreBusyError, match=r"Node c .* is in use"):
            async with opened(copy):
                pass


@pytest.mark.parametrize("how", ["symbolic link", "relative", "dots"])
async def test_another_name_of_a_region_is_the_same_region(
    config: StoreConfig, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "names").symlink_to(tmp_path / "regions")
    monkeypatch.chdir(tmp_path)
    base = {
        "symbolic link": tmp_path / "names",
        "relative": Path("regions"),
        "dots": tmp_path / "store" / ".." / "regions",
    }[how]
    async with opened(config) as one:
        await one.put("f", b"one")
        await one.store.committer.commit()
        copy = copy_of(config)
        nodes = tuple(replace(node, path=base / node.name) for node in copy.nodes)
        with pytest.raises(StoreBusyError, match="is in use by process"):
            async with opened(replace(copy, nodes=nodes)):
                pass


async def test_the_metadata_is_locked_as_well(config: StoreConfig, tmp_path: Path) -> None:
    """Two stores that share their metadata, and nothing else."""
    async with opened(config) as one:
        await one.put("f", b"one")
        await one.store.committer.commit()
        copy = copy_of(config)
        nodes = []
        for node in copy.nodes:
            shutil.copytree(node.path, tmp_path / "copied" / node.name)
            nodes.append(replace(node, path=tmp_path / "copied" / node.name))
        other = replace(copy, nodes=tuple(nodes), metadata=config.metadata)
        with pytest.raises(StoreBusyError, match=r"metadata in .* is in use"):
            async with opened(other):
                pass


async def test_locks_end_with_the_mount(config: StoreConfig) -> None:
    for _ in range(2):
        async with opened(config) as one:
            await one.put("f", b"one")
    copy = copy_of(config)
    async with opened(copy) as one:
        assert await one.get("f") == b"one"
    shutil.rmtree(config.nodes[0].path)
    config.nodes[0].path.mkdir()
    async with opened(config) as one:
        await one.store.repairer.repair("a", lambda message: None)
    async with opened(copy) as one:
        assert await one.get("f") == b"one"


async def test_a_node_that_returns_may_be_in_use_by_then(
    config: StoreConfig, tmp_path: Path
) -> None:
    """It was away when the store was mounted, and somebody else has it."""
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
    copy = copy_of(config)
    nodes = []
    for node in copy.nodes[:2]:
        shutil.copytree(node.path, tmp_path / "copied" / node.name)
        nodes.append(replace(node, path=tmp_path / "copied" / node.name))
    copy = replace(copy, nodes=(*nodes, copy.nodes[2]))
    away = tmp_path / "away"
    config.nodes[2].path.rename(away)
    async with opened(config) as one:
        away.rename(config.nodes[2].path)
        async with opened(copy) as other:
            await one.store.comeback.catch_up(None)
            member = one.store.log.members.all[2]
            for _ in range(3):
                member.standing.is_due(float("inf"))
                member.standing._retry_at = 0.0
                await one.store.comeback.catch_up(None)
            assert member.out_of_use
            assert "is in use by process" in member.standing.error
            assert await other.get("f") == b"one" * 10_000


async def test_a_checkpoint_notices_that_another_has_written(config: StoreConfig) -> None:
    """The lock is gone with the file system that had it, or the file was replaced in place."""
    with pytest.raises(ExceptionGroup):
        async with opened(config) as one:
            await one.put("f", b"one")
            await one.checkpoint()
            # The same process may not open it twice by the library: from another one.
            pid = os.fork()
            if pid == 0:
                try:
                    env = lmdb.open(str(config.metadata), max_dbs=0, map_size=1 << 30)
                    with env.begin(write=True) as txn:
                        value = store_rows.LogPosition.decode(txn.get(store_rows.LOG_KEY))
                        value.epoch += 1
                        txn.put(store_rows.LOG_KEY, value.encode())
                    env.close()
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0
            await one.put("g", b"two")
            with pytest.raises(NotDurableError, match="Another process has written the metadata"):
                await one.checkpoint()
            with pytest.raises(NotDurableError):
                await one.store.committer.commit()


def test_a_lock_that_is_dropped_anywhere_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may drop a lock in the middle of taking another, in the same thread."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    dropped = [locks.take(tmp_path / "one", "store", shared=False)]
    real = locks._lock

    def collect(fd: int, shared: bool) -> bool:
        dropped.clear()
        return real(fd, shared)

    with monkeypatch.context() as patch:
        patch.setattr(locks, "_lock", collect)
        second = locks.take(tmp_path / "two", "store", shared=False)
    again = locks.take(tmp_path / "one", "another store", shared=False)
    with pytest.raises(locks.LockedError):
        locks.take(tmp_path / "two", "another store", shared=False)
    for lock in (second, again):
        lock.release()
        lock.release()
    locks.take(tmp_path / "two", "another store", shared=False).release()
