"""Segments in no table: those of crashes and faults are freed, those with lost rows are kept.

Crashes are copies of the store while it is open (`crashed`); lost rows are gone from the
database, which has counted them out (`edit`), and from the journals, too, where the test says
so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from fusestore.config.store_config import StoreConfig
from fusestore.format import store_rows, stripe_rows
from fusestore.format.records import SegmentKind
from fusestore.format.stripe_rows import ShardPlace, Stripe
from fusestore.rescue.recover import recover
from fusestore.store.opening import open_store
from fusestore.write.shard_record import shard_header, write_shard
from support.filled_store import FILES, all_right, damage, fill, shard_bytes
from support.logs import FOREIGN_FILES, LOST_STRIPE, SEGMENT_KEPT
from support.metadata_rows import Rows, check, edit
from support.opened_store import crashed, make, opened

Change = Callable[[Rows], None]


@pytest.fixture
async def config(tmp_path: Path) -> StoreConfig:
    config = make(tmp_path / "store")
    await fill(config)
    return config


async def crashed_in_work(config: StoreConfig, to: Path) -> StoreConfig:
    """A crash with whole stripes on the nodes that no commit has."""
    async with opened(config) as one:
        await one.checkpoint()
        await one.put("lost", bytes(range(256)) * 20_000)
        with trio.fail_after(20):
            while len(one.rows(b"S")) < len(FILES) + 4:  # noqa: ASYNC110
                await trio.sleep(0.01)
        return crashed(config, to)


async def swept(config: StoreConfig) -> dict[str, bytes]:
    """What lies on the nodes after two mounts."""
    for _ in range(2):
        async with opened(config) as one:
            await one.checkpoint()
            await all_right(one)
    return shard_bytes(config)


async def crashed_unswept(config: StoreConfig, to: Path) -> StoreConfig:
    """A crash of a mount before it has swept."""
    async with open_store(config, background=False) as store:
        async with store.committer.lock:
            await store.committer.commit_now(checkpoint=True)
        return crashed(config, to)


@pytest.mark.parametrize("crashes", [1, 2, 5])
async def test_what_a_crash_left_is_freed_however_many_follow(
    config: StoreConfig, tmp_path: Path, crashes: int
) -> None:
    before = shard_bytes(config)
    crash = await crashed_in_work(config, tmp_path / "crash0")
    assert shard_bytes(crash).keys() > before.keys()
    for number in range(1, crashes):
        crash = await crashed_unswept(crash, tmp_path / f"crash{number}")
    assert await swept(crash) == before
    assert (await check(crash))["clean"]


@pytest.mark.parametrize("mounts", [1, 3])
async def test_what_a_node_that_was_away_holds_is_freed(
    config: StoreConfig, tmp_path: Path, mounts: int
) -> None:
    """It is away for some mounts after the crash."""
    before = shard_bytes(config)
    crash = await crashed_in_work(config, tmp_path / "crash")
    node = crash.nodes[2].path
    node.rename(tmp_path / "away")
    for _ in range(mounts):
        async with opened(crash) as one:
            await one.checkpoint()
    (tmp_path / "away").rename(node)
    assert await swept(crash) == before


@pytest.mark.parametrize(
    ("length", "zeros"), [(1, 200_000), (5, 200_000), (40, 200_000), (55, 200_000), (60, 0)]
)
async def test_a_torn_header_is_what_a_crash_left(
    config: StoreConfig, tmp_path: Path, length: int, zeros: int
) -> None:
    before = shard_bytes(config)
    crash = await crashed_in_work(config, tmp_path / "crash")
    for name in shard_bytes(crash).keys() - before.keys():
        node, _, segment = name.partition("/")
        path = crash.store / node / "shards" / segment
        path.write_bytes(path.read_bytes()[:length] + bytes(zeros))
    assert await swept(crash) == before


@pytest.mark.expects_log(FOREIGN_FILES)
async def test_the_first_segment_of_another_store_is_not_freed(
    config: StoreConfig, tmp_path: Path
) -> None:
    other = make(tmp_path / "other")
    await fill(other)
    theirs = other.nodes[0].path / "shards" / "00000001.seg"
    to = config.nodes[0].path / "shards" / "00000009.seg"
    shutil.copy(theirs, to)
    await swept(config)
    assert to.read_bytes() == theirs.read_bytes()


# --- copies that no commit has -------------------------------------------------------------


async def a_copy(config: StoreConfig) -> str:
    """A shard lies in a segment of its node that no row names, too; its name."""
    node = config.nodes[0]
    async with opened(config) as one:
        number, row = next(one.store.log.batches())[0]
        member = one.store.log.members.by_id[row.shards[0].node]
        node = member.config
        place = ShardPlace(member.id, 30, 64)
        payload = member.node.read(
            SegmentKind.SHARDS, row.shards[0].segment, row.shards[0].offset, row.shard_length
        )
        header = shard_header(row.code, row.length, number, 0, row.checksums[0])
        write_shard(one.store.log, member, place, header, payload)
    return f"{node.name}/00000030.seg"


async def test_a_copy_that_a_crash_left_is_freed(config: StoreConfig) -> None:
    name = await a_copy(config)
    assert name in shard_bytes(config)
    assert name not in await swept(config)


@pytest.mark.expects_log(LOST_STRIPE)
async def test_a_copy_waits_while_its_stripe_may_need_it(
    config: StoreConfig, tmp_path: Path
) -> None:
    """The shard is damaged, and another node is away: it may be the one that is missing."""
    name = await a_copy(config)
    away = next(node.path for node in config.nodes if node.name != name.partition("/")[0])

    def owe(rows: Rows) -> None:
        key = min(key for key in rows if key[:1] == b"S")
        row, number = Stripe.decode(rows[key]), stripe_rows.decode_stripe_key(key)
        damage(config, row.shards[0].node, row.shards[0].segment, row.shards[0].offset + 1000)
        rows[stripe_rows.missing_key(row.shards[0].node, number, 0)] = b""

    edit(config, owe)
    away.rename(tmp_path / "away")
    async with opened(config) as one:
        await one.checkpoint()
    assert (config.store / name.replace("/", "/shards/")).exists()
    (tmp_path / "away").rename(away)
    assert name not in await swept(config)


# --- lost rows ---------------------------------------------------------------------------------


def lose(*letters: bytes) -> Change:
    def change(rows: Rows) -> None:
        for key in [key for key in rows if key[:1] in letters]:
            del rows[key]

    return change


@pytest.mark.parametrize("letters", ["SVG", "SVOG", "SVOGE", "SVOGENLI"])
@pytest.mark.expects_log(SEGMENT_KEPT)
async def test_what_lost_its_rows_is_kept_after_an_unmount(
    config: StoreConfig, tmp_path: Path, letters: str
) -> None:
    """Whatever else is lost: an unmount leaves no segment that no table names."""
    before = shard_bytes(config)
    edit(config, lose(*(bytes([letter]) for letter in letters.encode())))
    for _ in range(3):
        async with opened(config) as one:
            await one.checkpoint()
    assert shard_bytes(config).items() >= before.items()
    shutil.rmtree(config.metadata)
    recover(config.store, [], None, accept_loss=False, progress=lambda message: None)
    async with opened(config) as one:
        await all_right(one)


@pytest.mark.parametrize("letters", ["SG", "SVG", "SOG", "SVOG"])
@pytest.mark.expects_log(SEGMENT_KEPT)
async def test_what_lost_its_rows_is_kept_after_a_crash(
    config: StoreConfig, tmp_path: Path, letters: str
) -> None:
    """Of the last mount, too, while any row names the stripe."""
    async with opened(config) as one:
        await one.put("new", FILES["f1"])
        await one.checkpoint()
        crash = crashed(config, tmp_path / "crash")
    before = shard_bytes(crash)
    edit(crash, lose(*(bytes([letter]) for letter in letters.encode())))
    for _ in range(3):
        async with opened(crash) as one:
            await one.checkpoint()
    assert shard_bytes(crash).items() >= before.items()


@pytest.mark.expects_log(SEGMENT_KEPT)
async def test_what_is_kept_is_freed_when_fsck_found_nothing(
    config: StoreConfig, tmp_path: Path
) -> None:
    """A node was copied back with a segment that was deleted since."""
    old = shard_bytes(config)
    async with opened(config) as one:
        for name in FILES:
            one.delete(name)
        await one.files.removal.removed()
        await one.checkpoint()
        await one.checkpoint()
    assert not shard_bytes(config)
    for name, data in old.items():
        node, _, segment = name.partition("/")
        (config.store / node / "shards" / segment).write_bytes(data)
    for _ in range(2):
        async with opened(config) as one:
            await one.checkpoint()
        assert shard_bytes(config) == old
    assert (await check(config, repair=True))["clean"]
    async with opened(config) as one:
        await one.checkpoint()
    assert not shard_bytes(config)


async def test_no_number_of_a_segment_is_used_twice(config: StoreConfig) -> None:
    """Also when all segments are gone, with their rows."""
    async with opened(config) as one:
        for name in FILES:
            one.delete(name)
        await one.files.removal.removed()
        await one.checkpoint()
        await one.checkpoint()
        last = {member.id: member.shards.current for member in one.store.log.members.all}
    assert not shard_bytes(config)
    async with opened(config) as one:
        assert one.rows(b"G") == []
        for member in one.store.log.members.all:
            assert member.shards.current >= last[member.id]
        value = one.store.log.engine.get(store_rows.SWEPT_KEY)
        assert store_rows.decode_swept(value).keys() == last.keys()
