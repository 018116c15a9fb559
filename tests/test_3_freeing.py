"""Nothing that a file needs is freed, whatever is wrong with counts, owners and rows of reclaim.

Wrong rows are put into the open store, and thereby into its journals: no comparison finds them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from fusestore.config.store_config import StoreConfig
from fusestore.errors import LostError
from fusestore.files.victims import find_waste
from fusestore.format import file_rows, stripe_rows
from fusestore.format.file_rows import Extent
from fusestore.format.records import HEADER_BYTES, Header, SegmentKind
from fusestore.format.segment_numbers import segment_path
from fusestore.format.stripe_rows import Freed, Live, ShardPlace
from fusestore.limits import STRIPE_BYTES
from fusestore.log.log import Log
from fusestore.members.member import Member
from fusestore.write.shard_record import header_at, write_shard
from support.cuts import mounted
from support.logs import (
    DROPPED,
    GONE,
    LOST_STRIPE,
    NO_STRIPE,
    OUT_OF_USE,
    SEGMENT_IN_USE,
    UNREAD_FILE,
)
from support.machine import Machine, told
from support.metadata_rows import check
from support.opened_store import Opened, crashed, healthy, loses_a_region, make, opened, scrub
from support.power_cut import Punched, write_disks

PUT_BACK = r"commit\.put_back: Stripe \S+ was to be freed, .* it is put back"
NOT_PUT_BACK = r"commit\.put_back: Stripe \S+ was to be freed, .* they are kept"
MISCOUNTED = r"log\.log: Stripe \S+ counts [\d]+ too few live bytes, and is kept"
UNKNOWN = r"log\.log: The live bytes of 1 stripe are unknown: nothing is freed of them"
NOT_COUNTED = r"log\.log: Stripe \S+ does not count its live bytes, and is kept"

CHANCE = random.Random(14)
STAYS, LEAVES = CHANCE.randbytes(300_000), CHANCE.randbytes(200_000)
OTHER = CHANCE.randbytes(700_000)


@pytest.fixture
async def config(tmp_path: Path) -> StoreConfig:
    """The files `kept` and `gone` share a stripe; that of `other` is in the same segments."""
    config = make(tmp_path / "store")
    async with opened(config) as one:
        await one.put("other", OTHER)
        one.store.writer.seal_all()
        await one.checkpoint()
        await one.put("kept", STAYS)
        await one.put("gone", LEAVES)
    return config


def stripe_of(one: Opened, name: str) -> int:
    """The stripe that has the first bytes of a file."""
    ino = one.files.tree.lookup(1, name.encode())
    assert ino is not None
    rows = one.store.log.engine.scan(file_rows.extent_key(ino, 0), file_rows.extent_key(ino + 1, 0))
    return Extent.decode(*next(rows)).stripe


def count_of(one: Opened, number: int) -> Live:
    value = one.store.log.engine.get(stripe_rows.live_key(number))
    assert value is not None
    return Live.decode(value)


def miscount(one: Opened, number: int, by: int) -> None:
    """Let the live bytes of a stripe be counted wrong."""
    count = count_of(one, number)
    wrong = count._replace(live=count.live + by)
    one.store.log.apply({stripe_rows.live_key(number): wrong.encode()})
    one.store.log.waste += wrong.waste - count.waste


async def delete(one: Opened, *names: str) -> None:
    for name in names:
        one.delete(name)
    await one.files.removal.removed()


async def until(one: Opened, done: Callable[[], bool]) -> None:
    """Make checkpoints until something is true."""
    with trio.fail_after(20):
        while not done():
            await one.checkpoint()


async def pause_freeing(one: Opened) -> None:
    """Let nothing be freed until `go_on`, or the next mount."""
    await one.store.reclaimer.passed(0)
    one.store.committer.checkpointer.on_checkpoint.remove(one.store.reclaimer.wake)


def go_on(one: Opened) -> None:
    one.store.committer.checkpointer.on_checkpoint.append(one.store.reclaimer.wake)


async def freed(one: Opened) -> None:
    """Wait until everything is freed, or kept."""
    await one.checkpoint()
    await until(one, lambda: not one.store.reclaimer.has_work)


async def mended(config: StoreConfig, files: dict[str, bytes], *, losses: int = 0) -> None:
    """fsck finds something and mends it; then all is right, and bears the loss of a region."""
    found = await check(config, repair=True)
    assert found["findings"]
    assert (found["left"], found["losses"]) == ([], losses)
    assert (await check(config))["clean"]
    async with opened(config) as one:
        for name, data in files.items():
            assert await one.get(name) == data
        await freed(one)
        assert one.rows(b"R") == []
        if not losses:
            one.check_counters()
        assert one.store.log.rows_in_doubt == 0
    assert (await check(config))["clean"]
    await loses_a_region(config, 1, files)


# --- wrong counts --------------------------------------------------------------------------------


@pytest.mark.expects_log(PUT_BACK, UNKNOWN)
async def test_a_stripe_that_counts_too_little_is_put_back(config: StoreConfig) -> None:
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        row = one.store.log.stripe(number)
        miscount(one, number, -len(STAYS))
        await delete(one, "gone")
        assert one.store.log.stripe(number) is None
        await until(one, lambda: one.store.log.stripe(number) is not None)
        assert one.store.log.stripe(number) == row
        assert await one.get("kept") == STAYS
        assert one.rows(b"R") == []
        assert count_of(one, number) == Live(0, len(STAYS) + len(LEAVES))
        status = await one.store.status()
        assert (status["healthy"], status["rows_in_doubt"]) == (False, 1)
        assert status["stripes_put_back"] == 1
    async with opened(config) as one:  # a mount remembers
        one.files.go_on()
        with trio.fail_after(10):
            while (await one.store.status())["healthy"]:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await scrub(one)  # it compares all rows with the journals, which have the same
        assert (await one.store.status())["rows_in_doubt"] == 1
    await mended(config, {"kept": STAYS, "other": OTHER})


@pytest.mark.expects_log(PUT_BACK)
async def test_a_stripe_that_was_put_back_is_not_freed_again(config: StoreConfig) -> None:
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        miscount(one, number, -len(STAYS))
        await delete(one, "gone")
        await until(one, lambda: one.store.log.stripe(number) is not None)
        await delete(one, "kept")
        await freed(one)
        assert one.store.log.stripe(number) is not None
        with one.store.log.engine.view() as view:
            found = find_waste(view, stripe_rows.LIVE_START, 100, set())
        assert number in found.doubted
        assert number not in [other for _, other in found.emptiest]
    await mended(config, {"other": OTHER})


@pytest.mark.expects_log(MISCOUNTED)
async def test_what_is_needed_by_the_checkpoint_alone_is_freed_after_the_next(
    config: StoreConfig,
) -> None:
    """A crash would lead back to the checkpoint, in which a file still has bytes in the stripe."""
    async with opened(config) as one:
        await pause_freeing(one)
        number = stripe_of(one, "kept")
        miscount(one, number, -len(STAYS))
        await delete(one, "gone")
        await one.checkpoint()
        await delete(one, "kept")
        passes = one.store.reclaimer.passes
        one.store.reclaimer.wake()
        await one.store.reclaimer.passed(passes)
        assert len(one.rows(b"R")) == 3
        go_on(one)
        await until(one, lambda: not one.rows(b"R"))
        assert one.store.log.stripes_put_back == 0
    assert (await check(config))["clean"]


@pytest.mark.expects_log(MISCOUNTED)
@pytest.mark.parametrize("left", [1, len(STAYS) // 2, len(STAYS) + len(LEAVES) - 1])
async def test_a_count_below_zero_keeps_the_stripe(config: StoreConfig, left: int) -> None:
    """The count is too low by one byte, or by a lot."""
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        miscount(one, number, left - count_of(one, number).live)
        await delete(one, "gone")
        assert await one.get("kept") == STAYS
        await delete(one, "kept")
        assert one.store.log.stripe(number) is not None
        assert count_of(one, number).live == 0
        assert one.store.log.rows_in_doubt == 1  # once, however often
        await freed(one)
        assert one.store.log.stripe(number) is not None
    await mended(config, {"other": OTHER})


@pytest.mark.parametrize("by", [1, 100_000, 1 << 40])
async def test_a_stripe_that_counts_too_much_is_kept(config: StoreConfig, by: int) -> None:
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        miscount(one, number, by)
        await delete(one, "gone")
        assert await one.get("kept") == STAYS
        await freed(one)
        assert one.store.log.stripe(number) is not None
    await mended(config, {"kept": STAYS, "other": OTHER})


@pytest.mark.expects_log(PUT_BACK)
@pytest.mark.parametrize("sealed_first", [False, True])
async def test_a_stripe_that_is_being_sealed_is_put_back(
    config: StoreConfig, sealed_first: bool
) -> None:
    """Its count is gone before it is sealed, which ends before or after its commit begins."""
    data = CHANCE.randbytes(3 * STRIPE_BYTES)
    async with opened(config) as one:
        ino = await one.put("sealing", b"")
        for start in range(0, len(data), STRIPE_BYTES):
            part = data[start : start + STRIPE_BYTES]
            await one.files.contents.write(ino, start, part)
        numbers = list(one.store.log.unsealed)
        for number in numbers:
            one.store.log.apply({stripe_rows.live_key(number): None})
        if sealed_first:
            await one.store.writer.sealer.idle()
        await until(one, lambda: all(one.store.log.stripe(number) for number in numbers))
        assert await one.get("sealing") == data
    await mended(config, {"kept": STAYS, "other": OTHER, "sealing": data})


@pytest.mark.expects_log(NOT_COUNTED)
async def test_tails_without_a_count_are_kept(config: StoreConfig, tmp_path: Path) -> None:
    async with opened(config) as one:
        await one.put("tail", b"in the commit")
        await one.store.committer.commit()
        one.store.log.apply({stripe_rows.live_key(stripe_of(one, "tail")): None})
        await one.store.committer.commit()
        after = crashed(config, tmp_path / "crashed")
    async with opened(after) as one:
        assert await one.get("tail") == b"in the commit"
    await mended(after, {"kept": STAYS, "gone": LEAVES, "tail": b"in the commit"})


@pytest.mark.expects_log(PUT_BACK)
@pytest.mark.parametrize("code", ["2+1", "1+2", "4+2"])
async def test_many_stripes_are_put_back(
    tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are more stripes than are looked at in one view."""
    monkeypatch.setattr("fusestore.commit.last_look.SLICE_STRIPES", 7)
    config = make(tmp_path / "store", code)
    files = {f"f{i}": CHANCE.randbytes(2000) for i in range(300)}
    async with opened(config) as one:
        for name, data in files.items():
            await one.put(name, data)
            one.store.writer.seal_all() if int(name[1:]) % 5 == 4 else None
    async with opened(config) as one:
        for key, value in one.rows(b"V"):
            number = stripe_rows.decode_stripe_key(key)
            miscount(one, number, 2000 - Live.decode(value).live)
        await delete(one, *(f"f{i}" for i in range(0, 300, 5)))
        await until(one, lambda: one.store.log.stripes_put_back == 60)
        left = {name: data for name, data in files.items() if int(name[1:]) % 5}
        for name, data in left.items():
            assert await one.get(name) == data
        assert one.store.log.counters.stripes == 60
    await mended(config, left)


# --- owners --------------------------------------------------------------------------------------


async def test_owners_go_when_a_stripe_was_looked_at(config: StoreConfig) -> None:
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        owners = [key for key, _ in one.rows(b"O") if stripe_rows.decode_stripe_key(key) == number]
        await delete(one, "kept", "gone")
        assert owners
        assert {key for key, _ in one.rows(b"O")} >= set(owners)
        async with one.store.committer.lock:
            await one.store.committer.commit_now()
        await freed(one)
        assert not {key for key, _ in one.rows(b"O")} & set(owners)
        assert one.rows(b"R") == []
    assert (await check(config))["clean"]


async def test_owners_of_what_is_to_be_freed_are_no_finding(config: StoreConfig) -> None:
    async with opened(config) as one:
        await pause_freeing(one)
        await delete(one, "kept", "gone")
        await one.checkpoint()
        assert one.rows(b"R")
    assert (await check(config))["clean"]


def drop_owners(one: Opened, number: int) -> None:
    keys = [key for key, _ in one.rows(b"O") if stripe_rows.decode_stripe_key(key) == number]
    assert keys
    one.store.log.apply(dict.fromkeys(keys))


async def test_without_owners_a_stripe_with_the_right_count_is_kept(config: StoreConfig) -> None:
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        drop_owners(one, number)
        await delete(one, "gone")
        await freed(one)
        assert await one.get("kept") == STAYS
    await mended(config, {"kept": STAYS, "other": OTHER})


@pytest.mark.expects_log(NO_STRIPE, LOST_STRIPE)
async def test_without_owners_a_wrong_count_loses_bytes_and_fsck_says_which(
    config: StoreConfig,
) -> None:
    """Two rows are wrong at the same time: nothing leads to the extent.  No wrong byte is read."""
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        drop_owners(one, number)
        miscount(one, number, -len(STAYS))
        await delete(one, "gone")
        await freed(one)
        with pytest.raises(LostError):
            await one.get("kept")
    found = await check(config, repair=True)
    assert (found["left"], found["losses"], found["lost_bytes"]) == ([], 1, len(STAYS))
    async with opened(config) as one:
        with pytest.raises(LostError):
            await one.get("kept")
        assert await one.get("other") == OTHER
        status = await one.store.status()
        assert (status["healthy"], status["lost_bytes"]) == (False, len(STAYS))
        await one.put("kept", OTHER[:1000])  # a part of the file is written anew
        status = await one.store.status()
        assert (status["healthy"], status["lost_bytes"]) == (False, len(STAYS) - 1000)
        one.delete("kept")  # lost bytes are not counted
        await one.files.removal.removed()
        status = await one.store.status()
        assert (status["healthy"], status["lost_bytes"]) == (True, 0)
    assert (await check(config))["clean"]


async def test_fsck_mends_a_wrong_count_and_missing_owners_before_they_meet(
    config: StoreConfig,
) -> None:
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        drop_owners(one, number)
        miscount(one, number, -len(STAYS))
    assert (await check(config, repair=True))["left"] == []
    async with opened(config) as one:
        await delete(one, "gone")
        await freed(one)
        assert await one.get("kept") == STAYS
    assert (await check(config))["clean"]


# --- rows of reclaim -----------------------------------------------------------------------------


def owe(one: Opened, number: int, *, early: bool = False) -> None:
    """Rows of reclaim for the present places of a stripe's shards."""
    row = one.store.log.stripe(number)
    assert row is not None
    for place in row.shards:
        key, value = stripe_rows.reclaim_row(place, row.shard_length, number)
        one.store.log.apply({key: value[:4] if early else value})


@pytest.mark.parametrize("own", [False, True])
async def test_a_row_of_reclaim_inside_of_a_living_payload_frees_nothing(
    config: StoreConfig, own: bool
) -> None:
    """No shard begins there; it names the stripe that lies there, or none."""
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        row = one.store.log.stripe(number)
        assert row is not None
        for place in row.shards:
            inside = ShardPlace(place.node, place.segment, place.offset + 4096)
            named = number if own else number + 9000
            key, value = stripe_rows.reclaim_row(inside, row.shard_length - 8192, named)
            one.store.log.apply({key: value})
        await freed(one)
    async with opened(config) as one:
        assert await one.get("kept") == STAYS
        assert await one.get("other") == OTHER
    await mended(config, {"kept": STAYS, "other": OTHER})


@pytest.mark.expects_log(
    r"commit\.reclaim: A row frees \d+ bytes of stripe .* only these are freed"
)
async def test_a_row_of_reclaim_that_is_too_long_frees_its_shard_only(config: StoreConfig) -> None:
    async with opened(config) as one:
        await pause_freeing(one)
        await delete(one, "gone", "kept")
        for key, value in one.rows(b"R"):
            changed = Freed.decode(value)
            one.store.log.apply({key: changed._replace(length=changed.length * 3).encode()})
        go_on(one)
        await freed(one)
        assert not (await one.store.status())["healthy"]
    async with opened(config) as one:
        assert await one.get("other") == OTHER


@pytest.mark.expects_log(SEGMENT_IN_USE)
@pytest.mark.parametrize("early", [False, True])
async def test_a_row_of_reclaim_for_a_living_stripe_frees_nothing(
    config: StoreConfig, early: bool
) -> None:
    async with opened(config) as one:
        owe(one, stripe_of(one, "kept"), early=early)
        await freed(one)
        assert one.rows(b"R") == []
        assert one.store.log.rows_in_doubt == 3
        assert await one.get("kept") == STAYS
    assert (await check(config))["clean"]


@pytest.mark.parametrize("early", [False, True])
async def test_fsck_drops_a_row_of_reclaim_for_a_living_stripe(
    config: StoreConfig, early: bool
) -> None:
    async with opened(config) as one:
        await pause_freeing(one)
        owe(one, stripe_of(one, "kept"), early=early)
    await mended(config, {"kept": STAYS, "gone": LEAVES, "other": OTHER})


async def test_a_row_of_reclaim_for_a_living_stripe_that_is_then_deleted(
    config: StoreConfig,
) -> None:
    """Its rows are those that free it."""
    async with opened(config) as one:
        await pause_freeing(one)
        owe(one, stripe_of(one, "kept"))
        await one.checkpoint()
        await delete(one, "kept", "gone")  # the checkpoint does not have this
        one.store.reclaimer.wake()
        await one.store.reclaimer.passed(1)
        assert len(one.rows(b"R")) == 3
        go_on(one)
        await freed(one)
        assert one.rows(b"R") == []
    assert (await check(config))["clean"]


async def test_early_rows_of_reclaim_are_worked_off(config: StoreConfig) -> None:
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        await pause_freeing(one)
        await delete(one, "kept", "gone")
        for key, value in one.rows(b"R"):
            one.store.log.apply({key: value[:4]})
        drop_owners(one, number)  # an early version did
    async with opened(config) as one:
        await freed(one)
        assert one.rows(b"R") == []
        assert await one.get("other") == OTHER
    assert (await check(config))["clean"]


async def moved(one: Opened, number: int, index: int) -> ShardPlace:
    """Write a shard once more, behind the others of its node; return the old place."""
    log = one.store.log
    row = log.stripe(number)
    assert row is not None
    old = row.shards[index]
    member = log.members.by_id[old.node]
    place = member.reserve(row.shard_length)
    new = ShardPlace(old.node, place.segment, place.offset)
    start = new.offset - HEADER_BYTES
    header, data = await member.call(_record, log, member, old, row.shard_length)
    seed = log.shards(member.name, new.segment).seed(start)
    await member.call(
        member.node.write, SegmentKind.SHARDS, new.segment, start, [header.encode(seed), data]
    )
    member.shards.dirty.add(new.segment)
    key, value = stripe_rows.reclaim_row(old, row.shard_length, number)
    log.apply({stripe_rows.stripe_key(number): row.moved(index, new).encode(), key: value})
    one.store.reader.forget(number)
    return old


def _record(log: Log, member: Member, place: ShardPlace, length: int) -> tuple[Header, bytes]:
    header = header_at(log, member, place.segment, place.offset)
    assert header is not None
    return header, member.node.read(SegmentKind.SHARDS, place.segment, place.offset, length)


async def test_the_old_place_of_a_moved_shard_is_freed(config: StoreConfig) -> None:
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        old = await moved(one, number, 0)
        await freed(one)
        assert one.rows(b"R") == []
        assert one.store.log.stripes_put_back == one.store.log.rows_in_doubt == 0
        member = one.store.log.members.by_id[old.node]
        data = member.node.read(SegmentKind.SHARDS, old.segment, old.offset + 8192, 8192)
        assert data == bytes(8192)
        assert await one.get("kept") == STAYS
        assert one.store.reader.degraded == 0
    assert (await check(config))["clean"]


@pytest.mark.expects_log(PUT_BACK)
async def test_a_stripe_is_put_back_whose_shards_were_moved(config: StoreConfig) -> None:
    """There are rows of reclaim for old places and for new ones: it needs one of each."""
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        await pause_freeing(one)
        await moved(one, number, 0)
        await moved(one, number, 2)
        miscount(one, number, -len(STAYS))
        await delete(one, "gone")
        assert len(one.rows(b"R")) == 5
        go_on(one)
        await until(one, lambda: one.store.log.stripe(number) is not None)
        await freed(one)
        assert one.rows(b"R") == []
        assert await one.get("kept") == STAYS
        assert one.store.reader.degraded == 0
    await mended(config, {"kept": STAYS, "other": OTHER})


# --- nodes that are away, and shards that cannot be read -----------------------------------------


@pytest.mark.expects_log(PUT_BACK, GONE, OUT_OF_USE)
async def test_a_stripe_is_put_back_without_a_node(config: StoreConfig, tmp_path: Path) -> None:
    """The node gets its shard anew when it is back, and frees the place that it had."""
    node = config.nodes[0].path
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        node.rename(tmp_path / "away")
        await one.put("late", b"late")
        await one.checkpoint()
        miscount(one, number, -len(STAYS))
        await delete(one, "gone")
        await until(one, lambda: one.store.log.stripe(number) is not None)
        assert await one.get("kept") == STAYS
        assert len(one.rows(b"R")) == 1
    (tmp_path / "away").rename(node)
    async with opened(config) as one:
        await healthy_but_for_counts(one)
        await freed(one)
        assert one.rows(b"R") == one.rows(b"M") == []
    await mended(config, {"kept": STAYS, "other": OTHER, "late": b"late"})


async def healthy_but_for_counts(one: Opened) -> None:
    with trio.fail_after(30):
        while one.rows(b"M") or not all(m.in_sync for m in one.store.log.members.all):
            one.store.comeback.wake()
            await trio.sleep(0.02)


@pytest.mark.expects_log(GONE, OUT_OF_USE)
async def test_what_was_freed_while_a_node_was_away_is_freed_there_later(
    config: StoreConfig, tmp_path: Path
) -> None:
    node = config.nodes[0].path
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        node.rename(tmp_path / "away")
        await one.put("late", b"late")
        await one.checkpoint()
        await delete(one, "kept", "gone")
        await freed(one)
        assert [key[1:3] for key, _ in one.rows(b"R")] == [b"\0\1"]
        assert not any(stripe_rows.decode_stripe_key(key) == number for key, _ in one.rows(b"O"))
    (tmp_path / "away").rename(node)
    async with opened(config) as one:
        await healthy(one)
        await until(one, lambda: one.rows(b"R") == [])
        assert await one.get("other") == OTHER
    assert (await check(config))["clean"]


@pytest.mark.expects_log(PUT_BACK, NOT_PUT_BACK, GONE, OUT_OF_USE, NO_STRIPE, UNREAD_FILE)
async def test_what_cannot_be_put_back_is_kept_until_a_node_is_back(
    config: StoreConfig, tmp_path: Path
) -> None:
    """One shard is damaged, another is on a node that is away."""
    node = config.nodes[0].path
    async with opened(config) as one:
        number = stripe_of(one, "kept")
        row = one.store.log.stripe(number)
        assert row is not None
        (place,) = (place for place in row.shards if place.node == 2)
        path = config.nodes[1].path / "shards" / f"{place.segment:08}.seg"
        with path.open("r+b") as file:
            file.seek(place.offset + 1000)
            file.write(b"damaged")
        node.rename(tmp_path / "away")
        await one.put("late", b"late")
        await one.checkpoint()
        miscount(one, number, -len(STAYS))
        await delete(one, "gone")
        await freed(one)
        assert one.store.log.stripe(number) is None
        assert len(one.rows(b"R")) == 3
        assert one.store.log.rows_in_doubt == 1
        await freed(one)
        assert one.store.log.rows_in_doubt == 1
        (tmp_path / "away").rename(node)
        await healthy_but_for_counts(one)
        await until(one, lambda: one.store.log.stripe(number) is not None)
        await healthy_but_for_counts(one)
        assert await one.get("kept") == STAYS
    await mended(config, {"kept": STAYS, "other": OTHER})


@pytest.mark.expects_log(NOT_PUT_BACK, NO_STRIPE)
async def test_fsck_puts_back_what_the_mount_could_not(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(config) as one:
        with monkeypatch.context() as patch:
            patch.setattr("fusestore.commit.put_back.read_whole", lambda *_: None)
            miscount(one, stripe_of(one, "kept"), -len(STAYS))
            await delete(one, "gone")
            await freed(one)
            assert len(one.rows(b"R")) == 3
    await mended(config, {"kept": STAYS, "other": OTHER})


# --- segments ------------------------------------------------------------------------------------


def count_only_what_is_freed(one: Opened) -> None:
    """Let each segment count no live shards but those that are to be freed."""
    dead: dict[tuple[int, int], int] = {}
    for key, value in one.rows(b"R"):
        segment = stripe_rows.decode_segment_key(key)
        length = stripe_rows.Freed.decode(value).length
        dead[segment] = dead.get(segment, 0) + HEADER_BYTES + length
    for (node, segment), length in dead.items():
        one.store.log.members.by_id[node].shards.states[segment].live = length


@pytest.fixture
async def together(tmp_path: Path) -> StoreConfig:
    """A store whose files lie in stripes of their own, in the same segments."""
    config = make(tmp_path / "store")
    async with opened(config) as one:
        for name, data in (("kept", STAYS), ("gone", LEAVES)):
            await one.put(name, data)
            one.store.writer.seal_all()
            await one.checkpoint()
    return config


@pytest.mark.expects_log(NOT_PUT_BACK, NO_STRIPE)
@pytest.mark.parametrize("has_owners", [False, True])
async def test_a_segment_with_a_shard_of_a_stripe_whose_row_is_lost_is_kept(
    together: StoreConfig, has_owners: bool
) -> None:
    """Nothing says that the shard is in use but an extent; without owners, there must be doubt."""
    async with opened(together) as one:
        log, number = one.store.log, stripe_of(one, "kept")
        await delete(one, "gone")
        count_only_what_is_freed(one)
        log.apply({stripe_rows.stripe_key(number): None})
        if not has_owners:
            drop_owners(one, number)
            log.position = replace(log.position, doubt="The test doubts it.")
        await freed(one)
        assert one.rows(b"R") == []
        assert log.rows_in_doubt == has_owners
    await mended(together, {"kept": STAYS})


async def test_a_copy_of_a_stripe_that_is_to_be_freed_is_what_a_crash_left(
    config: StoreConfig, tmp_path: Path
) -> None:
    """Its owners are still there, but nobody needs it."""
    async with opened(config) as one:
        await pause_freeing(one)
        log, number = one.store.log, stripe_of(one, "kept")
        row = log.stripe(number)
        assert row is not None
        await delete(one, "kept", "gone")
        await one.checkpoint()
        member, place = log.members.by_id[row.shards[0].node], row.shards[0]
        header, data = await member.call(_record, log, member, place, row.shard_length)
        copy = ShardPlace(member.id, member.shards.current + 1, HEADER_BYTES)
        write_shard(log, member, copy, header, data)
        after = crashed(config, tmp_path / "crashed")
    path = after.nodes[0].path / segment_path(SegmentKind.SHARDS, copy.segment)
    assert path.exists()
    async with opened(after) as one:
        await freed(one)
        assert one.rows(b"R") == []
        assert not path.exists()
    assert (await check(after))["clean"]


async def test_fsck_drops_the_count_of_a_stripe_that_is_gone(config: StoreConfig) -> None:
    async with opened(config) as one:
        one.store.log.apply({stripe_rows.live_key(5): Live(0).encode()})
    await mended(config, {"kept": STAYS, "gone": LEAVES, "other": OTHER})


# --- reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["freed", "moved"])
async def test_a_read_of_what_is_being_freed_is_no_damage(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async with opened(config) as one:
        log, reader, number = one.store.log, one.store.reader, stripe_of(one, "kept")
        row = log.stripe(number)
        assert row is not None
        if how == "freed":
            await delete(one, "kept", "gone")
        else:
            for index in range(3):
                await moved(one, number, index)
        await freed(one)
        for index in range(3):
            assert await reader.read_blocks(number, row, index, 0, row.shard_length) is None
        assert [member.corrupt for member in log.members.all] == [0, 0, 0]
        assert one.rows(b"M") == []
        if how == "moved":
            assert await one.get("kept") == STAYS


# --- cuts ----------------------------------------------------------------------------------------


@pytest.mark.expects_log(PUT_BACK, NO_STRIPE, DROPPED, MISCOUNTED)
@pytest.mark.parametrize("seed", range(2))
def test_wherever_the_power_is_cut_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    """One stripe is freed and punched, and another one, which is needed, is put back.

    Each of the two runs is cut under every second event.
    """
    config = make(tmp_path / "store", "2+1")
    chance = random.Random(seed)
    begun = 0

    async def main() -> None:
        nonlocal begun
        async with opened(config) as one:
            for name, data in (("kept", STAYS), ("gone", LEAVES)):
                await one.put(name, data)
            one.store.writer.seal_all()
            await one.put("dead", OTHER)
            one.store.writer.seal_all()
            await one.put("other", OTHER)
            one.store.writer.seal_all()
            await one.checkpoint()
            begun = len(machine.tape.events)
            number = stripe_of(one, "kept")
            miscount(one, number, -len(STAYS))
            await delete(one, "gone", "dead")
            await until(one, lambda: one.store.log.stripe(number) is not None)
            await freed(one)

    with Machine(config, chance) as machine:
        machine.run(main)
    events = machine.tape.events
    assert any(isinstance(event, Punched) for event in events[begun:])
    for at in range(begun + seed, len(events), 2):
        with told(f"cut under event {at}:\n{machine.tape.around(at)}"):
            disks = machine.tape.cut(at, chance)
            after = write_disks(disks, config, tmp_path / f"cut{at}")
            trio.run(_all_is_kept, after)


async def _all_is_kept(config: StoreConfig) -> None:
    async with mounted(config, accept_loss=False) as one:
        number = stripe_of(one, "kept")
        await until(one, lambda: one.store.log.stripe(number) is not None)
        await freed(one)
        assert await one.get("kept") == STAYS
        assert await one.get("other") == OTHER
    assert (await check(config, repair=True))["left"] == []
    assert (await check(config))["clean"]
    async with opened(config) as one:
        assert await one.get("kept") == STAYS
        assert await one.get("other") == OTHER
