"""Rows that were lost come back from the journals, or from the shards, before anything is freed.

The fault model: rows are gone from the database alone, which has counted them out (a slip of
the program, not rot), or from the journals, too.  What the nodes hold is whole.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fusestore.config.store_config import StoreConfig, load
from fusestore.format import stripe_rows
from fusestore.format.stripe_rows import Stripe
from fusestore.rescue.fsck import fsck
from fusestore.rescue.recover import recover
from fusestore.store.opening import open_store
from support.filled_store import FILES, all_right, fill, shard_bytes
from support.logs import MENDED, NOT_IN_TABLES, SEGMENT_IN_USE, SEGMENT_KEPT
from support.metadata_rows import edit
from support.opened_store import Opened, make, opened

Rows = dict[bytes, bytes]


@pytest.fixture
async def config(tmp_path: Path) -> StoreConfig:
    config = make(tmp_path / "store")
    await fill(config)
    return config


def lose(*letters: bytes, every: int = 1) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for letter in letters:
            for key in sorted(key for key in rows if key.startswith(letter))[::every]:
                del rows[key]

    change.__name__ = "lose-" + b"-".join(letters).decode() + f"-{every}"
    return change


LOST = [
    lose(b"S", every=100),
    lose(b"S"),
    lose(b"S", b"V", b"G"),
    lose(b"G"),
    lose(b"E", every=3),
    lose(b"E", b"S"),
    lose(b"N", b"L"),
    lose(b"I", every=2),
    lose(b"M", b"O", b"V"),
]


def named(change: Callable[[Rows], None]) -> str:
    return change.__name__


@pytest.mark.parametrize("change", LOST, ids=named)
@pytest.mark.expects_log(MENDED)
async def test_fsck_puts_back_what_the_journals_have(
    config: StoreConfig, change: Callable[[Rows], None]
) -> None:
    before = shard_bytes(config)
    edit(config, change)
    async with open_store(config, background=False) as store:
        mended = await fsck(store, repair=True, at_rest=True)
        assert any("the journals have the right version" in text for text in mended["findings"])
        assert not any("lost" in text for text in mended["findings"])
        assert mended["left"] == []
        assert mended["lost_bytes"] == 0
    for _ in range(2):
        async with opened(config) as one:
            await one.checkpoint()
            await all_right(one)
            assert one.files.tree.lookup(1, b"lost+found") is None
            assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == []
    assert shard_bytes(config).items() >= before.items()


@pytest.mark.parametrize("change", LOST, ids=named)
@pytest.mark.expects_log(MENDED, SEGMENT_KEPT, NOT_IN_TABLES)
async def test_a_mount_before_fsck_destroys_nothing(
    config: StoreConfig, change: Callable[[Rows], None], tmp_path: Path
) -> None:
    """Somebody mounts it twice first; then fsck, or recover, has everything still."""
    before = shard_bytes(config)
    edit(config, change)
    for _ in range(2):
        async with opened(config) as one:
            await one.checkpoint()
    assert shard_bytes(config).items() >= before.items()
    shutil.copytree(config.store, tmp_path / "copy")
    async with open_store(config, background=False) as store:
        assert (await fsck(store, repair=True, at_rest=True))["left"] == []
    async with opened(config) as one:
        await one.checkpoint()
        await all_right(one)
    copy = load(tmp_path / "copy")
    shutil.rmtree(copy.metadata)
    recover(copy.store, [], None, accept_loss=False, progress=lambda message: None)
    async with opened(copy) as one:
        await all_right(one)


async def lose_stripes(config: StoreConfig, every: int = 1) -> None:
    """Rows of stripes are gone from the database and from the journals."""
    async with open_store(config, background=False) as store:
        keys = [key for key, _ in store.log.engine.scan(b"S", b"T")][::every]
        store.log.apply(dict.fromkeys(keys))


@pytest.mark.parametrize("code", ["2+1", "4+2", "1+2"])
@pytest.mark.parametrize("every", [1, 2, 100])
async def test_a_stripe_is_made_anew_from_its_shards(tmp_path: Path, code: str, every: int) -> None:
    config = make(tmp_path / "store", code)
    await fill(config)
    async with opened(config) as one:
        rows = dict(one.rows(b"S"))
    await lose_stripes(config, every)
    async with open_store(config, background=False) as store:
        mended = await fsck(store, repair=True, at_rest=True)
        assert any("of its shards are on the nodes" in text for text in mended["findings"])
        assert mended["left"] == []
        assert mended["lost_bytes"] == 0
    async with opened(config) as one:
        assert dict(one.rows(b"S")) == rows
        await all_right(one)


async def test_it_is_made_anew_without_a_node(tmp_path: Path) -> None:
    """The shards that are not there are owed, and rebuilt when their node is."""
    config = make(tmp_path / "store")
    await fill(config)
    await lose_stripes(config)
    away = config.nodes[0].path.with_suffix(".away")
    config.nodes[0].path.rename(away)
    async with open_store(config, background=False) as store:
        mended = await fsck(store, repair=True, at_rest=True)
        assert mended["lost_bytes"] == 0
    away.rename(config.nodes[0].path)
    async with opened(config) as one:
        await all_right(one)
        for member in one.store.log.members.all:
            await one.store.healer.heal(member)
        assert one.rows(b"M") == []
    for node in config.nodes[1:]:
        other = node.path.with_suffix(".away")
        node.path.rename(other)
        async with opened(config) as one:
            await all_right(one)
        other.rename(node.path)


async def test_nothing_is_given_up_while_a_node_is_away(tmp_path: Path) -> None:
    """One node has rotten shards; with those of the node that is away the stripes are whole."""
    config = make(tmp_path / "store")
    await fill(config)
    async with opened(config) as one:
        rows = dict(one.rows(b"S"))
    await lose_stripes(config)
    for path in (config.nodes[1].path / "shards").iterdir():
        data = bytearray(path.read_bytes())
        for offset in range(1000, len(data), 100_000):
            data[offset] ^= 1
        path.write_bytes(data)
    away = config.nodes[0].path.with_suffix(".away")
    config.nodes[0].path.rename(away)
    async with open_store(config, background=False) as store:
        found = await fsck(store, repair=True, at_rest=True)
        assert config.nodes[0].name in found["hindrances"][0]
        assert found["lost_bytes"] == 0
        assert found["left"]
    away.rename(config.nodes[0].path)
    async with open_store(config, background=False) as store:
        found = await fsck(store, repair=True, at_rest=True)
        assert found["left"] == found["hindrances"] == []
        assert found["lost_bytes"] == 0
    async with opened(config) as one:
        assert {key: Stripe.decode(value).checksums for key, value in one.rows(b"S")} == {
            key: Stripe.decode(value).checksums for key, value in rows.items()
        }
        await all_right(one)


@pytest.mark.parametrize("code", ["2+1", "4+2", "1+2"])
async def test_shards_of_another_history_hide_no_stripe(tmp_path: Path, code: str) -> None:
    """A copy of the store was used, and has other stripes of the same numbers."""
    config = make(tmp_path / "store", code)
    async with opened(config) as one:
        await one.put("base", b"base")
    shutil.copytree(config.store, tmp_path / "copy")
    copy = load(tmp_path / "copy")
    async with opened(copy) as one:
        await one.put("f0", bytes(reversed(FILES["f0"])))
    await fill(config)
    await lose_stripes(config)
    last = max((copy.nodes[0].path / "shards").iterdir())
    shutil.copy(last, config.nodes[0].path / "shards" / last.name.replace("0000000", "0000001"))
    async with open_store(config, background=False) as store:
        found = await fsck(store, repair=True, at_rest=True)
        assert found["left"] == []
        assert found["lost_bytes"] == 0
    async with opened(config) as one:
        await all_right(one)


async def test_what_cannot_be_made_anew_is_said_to_be_lost(tmp_path: Path) -> None:
    """Two of three shards of each stripe are rotten."""
    config = make(tmp_path / "store")
    await fill(config)
    await lose_stripes(config, every=100)
    for node in config.nodes[:2]:
        for path in (node.path / "shards").iterdir():
            data = bytearray(path.read_bytes())
            data[64 + 1000] ^= 1
            path.write_bytes(data)
    async with open_store(config, background=False) as store:
        mended = await fsck(store, repair=True, at_rest=True)
        assert mended["lost_bytes"] > 0
        assert mended["left"] == []


@pytest.mark.expects_log(SEGMENT_IN_USE)
async def test_a_count_that_is_too_low_deletes_no_segment(
    config: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A segment counts only what is freed of it; the other shards in it are in use."""
    before = shard_bytes(config)

    async def free_one(one: Opened) -> None:
        one.delete("f0")
        await one.files.removal.removed()
        for member in one.store.log.members.all:
            for state in member.shards.states.values():
                state.live = 64 + 450_048
        await one.checkpoint()
        await one.checkpoint()

    with caplog.at_level(logging.ERROR):
        async with opened(config) as one:
            await free_one(one)
    assert "has shards in use" in caplog.text
    assert shard_bytes(config).keys() >= before.keys()
    async with open_store(config, background=False) as store:
        assert (await fsck(store, repair=True, at_rest=True))["left"] == []
    async with opened(config) as one:
        for name in FILES.keys() - {"f0"}:
            assert await one.get(name) == FILES[name]


@pytest.mark.expects_log(SEGMENT_IN_USE)
async def test_a_debt_for_a_shard_that_is_in_use_frees_nothing(config: StoreConfig) -> None:
    async with opened(config) as one:
        number, row = next(one.store.log.batches())[1]
        length = row.shard_length
        debts = dict(stripe_rows.reclaim_row(place, length, number) for place in row.shards)
        one.store.log.apply(debts)
        await one.checkpoint()
        await one.checkpoint()
        assert one.rows(b"R") == []
        assert one.store.log.rows_in_doubt == len(debts)
        await all_right(one)
        for member in one.store.log.members.all:
            assert member.corrupt == 0
