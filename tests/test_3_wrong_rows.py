"""A row of a stripe that is wrong: its shards outvote it, and nothing of others is overwritten.

The fault model: a row has a wrong checksum, or a wrong place, and a checksum of its own that
is right: it was wrong before it was written.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fusestore.config.store_config import StoreConfig
from fusestore.errors import LostError
from fusestore.format import stripe_rows
from fusestore.format.stripe_rows import ShardPlace, Stripe
from fusestore.members.standing import State
from fusestore.rescue.fsck import fsck
from fusestore.store.opening import open_store
from support.filled_store import FILES, all_right, damage, fill, shard_bytes
from support.logs import (
    CORRUPT,
    DISAGREE,
    LOST_STRIPE,
    NOT_WHERE_ITS_ROW_SAYS,
    SCRUBBED,
    UNREAD_FILE,
    WRONG_ROW,
)
from support.opened_store import Opened, make, opened, scrub


async def change_rows(config: StoreConfig, change: Callable[[list[Stripe]], None]) -> list[Stripe]:
    """Change rows of stripes in the database and the journals; the rows before."""
    async with open_store(config, background=False) as store:
        found = list(store.log.engine.scan(b"S", b"T"))
        rows = [Stripe.decode(value) for _, value in found]
        before = list(rows)
        change(rows)
        store.log.apply({key: row.encode() for (key, _), row in zip(found, rows, strict=True)})
    return before


def flipped(row: Stripe, index: int, bit: int = 0) -> Stripe:
    """The row with a bit of a shard's checksums flipped."""
    sums = bytearray(row.checksums[index])
    sums[bit // 8] ^= 1 << bit % 8
    return Stripe(
        row.code,
        row.length,
        row.shards,
        (*row.checksums[:index], bytes(sums), *row.checksums[index + 1 :]),
    )


def all_up(one: Opened) -> bool:
    return all(m.state is State.UP and m.in_sync for m in one.store.log.members.all)


def rows_of(one: Opened) -> list[Stripe]:
    return [Stripe.decode(value) for _, value in one.rows(b"S")]


# --- a wrong checksum ----------------------------------------------------------


def one_bit(rows: list[Stripe]) -> None:
    rows[0] = flipped(rows[0], 0)


def last_block_of_the_parity(rows: list[Stripe]) -> None:
    row = rows[1]
    rows[1] = flipped(row, row.code.n - 1, 8 * len(row.checksums[0]) - 1)


def two_shards_of_a_stripe(rows: list[Stripe]) -> None:
    rows[0] = flipped(flipped(rows[0], 0, 5), 1, 77)


def every_checksum(rows: list[Stripe]) -> None:
    for index in range(rows[2].code.n):
        rows[2] = flipped(rows[2], index, index)


def several_stripes(rows: list[Stripe]) -> None:
    for number, row in enumerate(rows):
        rows[number] = flipped(row, number % row.code.n, number)


WRONG_CHECKSUMS = [
    one_bit,
    last_block_of_the_parity,
    two_shards_of_a_stripe,
    every_checksum,
    several_stripes,
]


@pytest.mark.parametrize("code", ["2+1", "4+2", "1+2"])
@pytest.mark.parametrize("change", WRONG_CHECKSUMS)
@pytest.mark.expects_log(DISAGREE, WRONG_ROW, SCRUBBED)
async def test_the_row_is_mended_and_no_disk_is_blamed(
    tmp_path: Path,
    code: str,
    change: Callable[[list[Stripe]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make(tmp_path / "store", code)
    await fill(config)
    right = await change_rows(config, change)
    async with opened(config) as one:
        await all_right(one)
        await one.store.repairer.healer.heal_all()
        assert (await scrub(one))["left"] == 0
        await all_right(one)
        assert all_up(one)
        assert rows_of(one) == right
        assert one.rows(b"M") == []
        assert one.store.log.rows_mended > 0
        status = await one.store.status()
        assert sum(node["checksum_failures"] for node in status["nodes"]) == 0
        assert status["rows_mended"] == one.store.log.rows_mended
        assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == []
    assert "replace its disk" not in caplog.text


@pytest.mark.parametrize("to", [False, True], ids=["in place", "to a new disk"])
@pytest.mark.parametrize("change", WRONG_CHECKSUMS)
@pytest.mark.expects_log(DISAGREE, WRONG_ROW, r"members\.member: Node \S+ moves to ")
async def test_repair_blames_neither_the_disk_nor_a_new_one(
    tmp_path: Path, change: Callable[[list[Stripe]], None], to: bool
) -> None:
    config = make(tmp_path / "store")
    await fill(config)
    right = await change_rows(config, change)
    async with opened(config) as one:
        for node in config.nodes:
            place = tmp_path / f"new-{node.name}" if to else None
            done = await one.store.repairer.repair(node.name, lambda message: None, to=place)
            assert (done["stripes_lost"], done["unrepairable"]) == (0, [])
        assert [row.checksums for row in rows_of(one)] == [row.checksums for row in right]
        assert all_up(one)
        status = await one.store.status()
        assert status["healthy"]
        assert sum(node["checksum_failures"] for node in status["nodes"]) == 0
        await all_right(one)


@pytest.mark.parametrize("change", WRONG_CHECKSUMS)
@pytest.mark.expects_log(DISAGREE, WRONG_ROW)
async def test_a_read_only_mount_reads_right(
    tmp_path: Path, change: Callable[[list[Stripe]], None]
) -> None:
    config = make(tmp_path / "store")
    await fill(config)
    await change_rows(config, change)
    async with open_store(config, read_only=True, background=False) as store:
        for number, row in (pair for batch in store.log.batches() for pair in batch):
            data = await store.reader.read_stripe(number, 0, row.length)
            assert bytes(data) in [FILES[name][: row.length] for name in FILES]


@pytest.mark.expects_log(CORRUPT, WRONG_ROW)
async def test_a_shard_that_is_gone_too_is_mended_where_enough_others_agree(
    tmp_path: Path,
) -> None:
    config = make(tmp_path / "store", "4+2")
    await fill(config)
    right = await change_rows(config, one_bit)
    gone = right[0].shards[0]
    damage(config, gone.node, gone.segment, gone.offset + 100)
    async with opened(config) as one:
        await all_right(one)
        await one.store.repairer.healer.heal_all()
        assert rows_of(one) == right
        assert one.rows(b"M") == []
        assert all_up(one)


@pytest.mark.expects_log(UNREAD_FILE, LOST_STRIPE)
async def test_a_node_is_not_blamed_for_what_nobody_can_decide(tmp_path: Path) -> None:
    """The shard whose checksum is wrong is gone: two others agree with anything."""
    config = make(tmp_path / "store")
    await fill(config)
    right = await change_rows(config, one_bit)
    node = config.nodes[right[0].shards[0].node - 1]
    shutil.rmtree(node.path)
    async with opened(config) as one:
        done = await one.store.repairer.repair(node.name, lambda message: None)
        assert len(done["unrepairable"]) == 1
        assert all_up(one)
        lost = done["unrepairable"][0][1:]
        for name, data in FILES.items():
            if name != lost:
                assert await one.get(name) == data
        with pytest.raises(LostError):
            await one.get(lost)


@pytest.mark.expects_log(CORRUPT)
async def test_a_rotten_shard_does_not_outvote_its_row(tmp_path: Path) -> None:
    config = make(tmp_path / "store")
    await fill(config)
    right = await change_rows(config, lambda rows: None)
    place = right[0].shards[0]
    damage(config, place.node, place.segment, place.offset + 100)
    async with opened(config) as one:
        await all_right(one)
        await one.store.repairer.healer.heal_all()
        assert rows_of(one) == right
        assert one.store.log.rows_mended == one.store.log.rows_in_doubt == 0
        assert sum(m.corrupt for m in one.store.log.members.all) > 0


# --- a wrong place --------------------------------------------------------------


def moved(row: Stripe, index: int, **change: int) -> Stripe:
    place = row.shards[index]
    fields = {"node": place.node, "segment": place.segment, "offset": place.offset, **change}
    return row.moved(index, ShardPlace(**fields))


def of_another_stripe(rows: list[Stripe]) -> None:
    """Its place is that of another stripe's shard on the same node."""
    place = rows[0].shards[0]
    other = next(s for row in rows[2:] for s in row.shards if s.node == place.node)
    rows[0] = moved(rows[0], 0, segment=other.segment, offset=other.offset)


def inside_another(rows: list[Stripe]) -> None:
    place = rows[1].shards[1]
    other = next(s for row in rows[3:] for s in row.shards if s.node == place.node)
    rows[1] = moved(rows[1], 1, segment=other.segment, offset=other.offset + 64 * 1001)


def into_zeros(rows: list[Stripe]) -> None:
    """Where it should lie there are zeros, which are the bytes of another."""
    number = len(rows) - 2
    place = rows[number].shards[0]
    other = next(s for s in rows[-1].shards if s.node == place.node)
    rows[number] = moved(rows[number], 0, segment=other.segment, offset=other.offset + 64 * 1001)


def before_another(rows: list[Stripe]) -> None:
    """It begins in front of another, in its own room, and would reach into that."""
    rows[0] = moved(rows[0], 0, offset=rows[0].shards[0].offset + 64 * 500)


WRONG_PLACES = [of_another_stripe, inside_another, into_zeros, before_another]


@pytest.mark.parametrize("change", WRONG_PLACES)
@pytest.mark.expects_log(NOT_WHERE_ITS_ROW_SAYS)
async def test_nothing_is_overwritten_where_something_else_lies(
    tmp_path: Path, change: Callable[[list[Stripe]], None], caplog: pytest.LogCaptureFixture
) -> None:
    config = make(tmp_path / "store")
    await fill(config)
    await change_rows(config, change)
    before = shard_bytes(config)
    with caplog.at_level(logging.ERROR):
        async with opened(config) as one:
            await all_right(one)
            found = [(await scrub(one))["found"] for _ in range(3)]
            assert found[1:] == [0, 0]
            await all_right(one)
            assert all_up(one)
            assert one.rows(b"M") == []
            status = await one.store.status()
            assert status["rows_in_doubt"] == one.store.log.rows_in_doubt == 1
            await one.checkpoint()
            await all_right(one)
    assert "the data there is kept" in caplog.text
    after = shard_bytes(config)
    for name, data in before.items():
        assert after[name][: len(data)] == data, name
    async with open_store(config, background=False) as store:
        mended = await fsck(store, repair=True, at_rest=True)
        assert mended["findings"]
        assert mended["left"] == []
    async with opened(config) as one:
        await all_right(one)


@pytest.mark.parametrize("change", WRONG_PLACES[:3])
async def test_fsck_finds_a_wrong_place_first(
    tmp_path: Path, change: Callable[[list[Stripe]], None]
) -> None:
    config = make(tmp_path / "store")
    await fill(config)
    await change_rows(config, change)
    async with open_store(config, background=False) as store:
        mended = await fsck(store, repair=True, at_rest=True)
        assert any("overlaps another shard" in text for text in mended["findings"])
        assert mended["left"] == []
    async with opened(config) as one:
        await all_right(one)
        await one.store.repairer.healer.heal_all()
        assert (await scrub(one))["found"] == 0
        assert one.store.log.rows_in_doubt == 0
        await all_right(one)


@pytest.mark.parametrize("change", WRONG_PLACES)
@pytest.mark.expects_log(CORRUPT, UNREAD_FILE, NOT_WHERE_ITS_ROW_SAYS)
async def test_a_drained_node_frees_no_place_of_another(
    tmp_path: Path, change: Callable[[list[Stripe]], None]
) -> None:
    """What a move leaves behind is freed only if it was that shard's."""
    config = make(tmp_path / "store")
    await fill(config)
    rows = await change_rows(config, change)
    wrong: list[Stripe] = list(rows)
    change(wrong)
    at = next(i for i, row in enumerate(rows) if row != wrong[i])
    index = next(i for i in range(3) if rows[at].shards[i] != wrong[at].shards[i])
    async with open_store(config, background=False) as store:
        number, row = next(store.log.batches())[at]
        target = store.log.members.by_id[row.shards[index].node % 3 + 1]
        await store.repairer.healer.rebuilder.move(target, [(number, row, index)])
        assert store.log.stripe(number) != row
        assert store.log.rows_in_doubt == 1
        assert list(store.log.engine.scan(b"R", b"S")) == []
    async with opened(config) as one:
        await one.checkpoint()
        await all_right(one)
        assert (await scrub(one))["found"] == 0


@pytest.mark.parametrize("what", ["payload", "header", "both", "most", "hole", "short", "gone"])
@pytest.mark.expects_log(NOT_WHERE_ITS_ROW_SAYS, SCRUBBED)
async def test_its_own_place_is_used_again(tmp_path: Path, what: str) -> None:
    """A shard that is rotten, torn or gone is written where it was, if that can be told."""
    config = make(tmp_path / "store")
    await fill(config)
    right = await change_rows(config, lambda rows: None)
    place, length = right[0].shards[0], right[0].shard_length
    path = config.nodes[place.node - 1].path / "shards" / f"{place.segment:08d}.seg"
    if what in ("payload", "both"):
        damage(config, place.node, place.segment, place.offset + 100)
    if what in ("header", "both"):
        damage(config, place.node, place.segment, place.offset - 60)
    if what == "most":
        with path.open("r+b") as file:
            file.seek(place.offset - 64)
            file.write(os.urandom(64 + length * 3 // 4))
    if what == "hole":
        with path.open("r+b") as file:
            file.seek(place.offset - 64)
            file.write(bytes(64 + 200_000))
    if what == "short":
        with path.open("r+b") as file:
            file.truncate(place.offset + length // 2)
    if what == "gone":
        path.unlink()
    async with opened(config) as one:
        await scrub(one)
        await all_right(one)
        assert one.rows(b"M") == []
        doubt = int(what == "most")  # nobody knows it any more
        assert one.store.log.rows_in_doubt == doubt
        key = stripe_rows.stripe_key(next(one.store.log.batches())[0][0])
        assert one.store.log.engine.get(key) is not None
        assert (rows_of(one) == right) is (doubt == 0)
