"""One owner: a store's nodes and its metadata are used by one mount at a time."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fusestore.config.mkfs import make_store
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import DamagedMetadataError, NotDurableError, StoreBusyError
from fusestore.format import store_rows
from fusestore.format.erasure import Code
from fusestore.format.row_sums import seal, unseal
from fusestore.metadata.environment import DATABASE
from fusestore.rescue.recover import recover
from fusestore.store.opening import open_store
from fusestore.system import locks
from support.metadata_rows import check, edit
from support.opened_store import healthy, opened, scrub


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


def rewrite_position(config: StoreConfig, change: Callable[[bytes], bytes]) -> None:
    """Change the stored row of the log's position in the file, in each page that has it."""
    database = config.metadata / DATABASE
    before = database.read_bytes()
    places = [found.end() for found in re.finditer(re.escape(store_rows.LOG_KEY), before)]
    assert places
    with database.open("r+b", buffering=0) as file:
        for place in places:  # a node of a page: the length of the value is before the key
            start = place - len(store_rows.LOG_KEY) - 8
            length = int.from_bytes(before[start : start + 2], "little")
            stored = before[place : place + length]
            if int.from_bytes(before[start + 6 : start + 8], "little") == len(store_rows.LOG_KEY):
                changed = change(stored)
                assert len(changed) == length
                file.seek(place)
                file.write(changed)


def of_another_mount(stored: bytes) -> bytes:
    """An intact row of the next epoch."""
    value = unseal(store_rows.LOG_KEY, stored)
    if value is None:
        return stored  # a page that is not in use
    position = store_rows.LogPosition.decode(value)
    after = replace(position, epoch=position.epoch + 1)
    return seal(store_rows.LOG_KEY, after.encode())


def flipped_at(place: int) -> Callable[[bytes], bytes]:
    """Flip a bit of the byte at `place` of a row."""

    def flipped(stored: bytes) -> bytes:
        changed = bytearray(stored)
        changed[place] ^= 4
        return bytes(changed)

    return flipped


async def test_a_checkpoint_notices_that_another_has_written(config: StoreConfig) -> None:
    """The lock is gone with the file system that had it, or the file was replaced in place."""
    noticed = False
    with pytest.raises(ExceptionGroup):
        async with opened(config) as one:
            await one.put("f", b"one")
            await one.checkpoint()
            rewrite_position(config, of_another_mount)
            await one.put("g", b"two")
            with pytest.raises(NotDurableError, match="Another process has written the metadata"):
                await one.checkpoint()
            with pytest.raises(NotDurableError):
                await one.store.committer.commit()
            noticed = True
    assert noticed


POSITION_ROTS = pytest.mark.expects_log(
    "ERROR fusestore.metadata.engine: .*5a6c6f67 does not match its checksum. The mount knows"
)
"""`Zlog` in hexadecimal digits."""


@POSITION_ROTS
@pytest.mark.parametrize("place", [1, 9, -8, -1])
async def test_a_damaged_position_is_no_other_mount(config: StoreConfig, place: int) -> None:
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
        await one.checkpoint()
        rewrite_position(config, flipped_at(place))
        await one.put("g", b"two" * 10_000)
        await one.checkpoint()
        await healthy(one)
    assert (await check(config))["clean"]
    async with opened(config) as one:
        assert await one.get("f") == b"one" * 10_000
        assert await one.get("g") == b"two" * 10_000


@POSITION_ROTS
@pytest.mark.parametrize("how", ["scrub", "mend", "fsck"])
async def test_a_check_of_an_open_store_has_its_position_written_anew(
    config: StoreConfig, how: str
) -> None:
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
        await one.checkpoint()
        rewrite_position(config, flipped_at(2))
        one.store.log.engine.thaw()  # readers see the database as the last checkpoint left it
        if how == "scrub":
            await scrub(one)
        elif how == "mend":
            await one.store.rows.mend()
        else:
            found, wrong = await one.store.rows.compare()
            assert found.is_right
            assert not wrong
        assert (await one.store.status())["healthy"]
    assert (await check(config))["clean"]


@pytest.mark.parametrize("place", [1, -1, None])
async def test_a_damaged_position_at_rest_needs_recover(
    config: StoreConfig, place: int | None
) -> None:
    """No journal says at which commit the database stands."""
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
    if place is not None:
        rewrite_position(config, flipped_at(place))
    else:
        edit(config, lambda rows: rows.pop(store_rows.LOG_KEY))
    advice = "move the metadata away, and run 'fusestore recover'"
    for read_only in (False, True):
        with pytest.raises(DamagedMetadataError, match=advice):
            async with open_store(config, read_only=read_only):
                pass
    for repairs in (False, True):
        with pytest.raises(DamagedMetadataError, match=advice):
            await check(config, repair=repairs)
    config.metadata.rename(config.store / "damaged")
    recover(config.store, (), None, accept_loss=False, progress=lambda message: None)
    async with opened(config) as one:
        assert await one.get("f") == b"one" * 10_000
        await healthy(one)


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
