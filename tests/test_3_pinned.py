"""Room that no hole gives back comes back with its segments, on nodes that cannot punch, too."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import trio

from fusestore.config.store_config import StoreConfig
from fusestore.rescue.fsck import fsck
from fusestore.system import linux
from support.opened_store import Opened, limited, make, opened

KIB, MIB = 1 << 10, 1 << 20
FILES = 60


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return limited(
        make(tmp_path / "store"),
        waste_bytes_min=2 * MIB,
        clean_look_seconds=0.02,
        users_away_seconds=0.0,
        pinned_look_seconds=0.1,
        shard_segment_bytes=4 * MIB,
    )


@pytest.fixture
def no_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system refuses holes."""

    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes")

    monkeypatch.setattr(linux, "punch_hole", refuse)


async def sparse(one: Opened) -> dict[str, bytes]:
    """Whole stripes go, and leave every sixth; they are full, and no other garbage is there."""
    chance = random.Random(1)
    kept = {}
    for number in range(FILES):
        data = chance.randbytes(MIB)
        await one.put(f"f{number}", data)
        await one.store.committer.commit()
        if number % 6 == 0:
            kept[f"f{number}"] = data
    for number in range(FILES):
        if f"f{number}" not in kept:
            one.delete(f"f{number}")
    await one.files.removal.removed()
    await one.checkpoint()
    return kept


def held(config: StoreConfig) -> int:
    """The bytes of the shards on the disks of all nodes."""
    found = [path for node in config.nodes for path in (node.path / "shards").iterdir()]
    return sum(path.stat().st_blocks * 512 for path in found)


async def check(one: Opened, kept: dict[str, bytes]) -> None:
    for name, data in kept.items():
        assert await one.get(name) == data
    one.check_counters()
    await one.store.committer.commit()
    assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == []


async def until_held(config: StoreConfig, most: int) -> None:
    with trio.fail_after(60):
        while held(config) > most:  # noqa: ASYNC110
            await trio.sleep(0.05)


@pytest.mark.usefixtures("no_holes")
async def test_the_background_deletes_segments_that_pin_much(config: StoreConfig) -> None:
    async with opened(config) as one:
        kept = await sparse(one)
        assert held(config) > 80 * MIB
        one.files.go_on()
        await one.put("more", b"x")
        await one.store.committer.commit()
        await until_held(config, 45 * MIB)
        assert one.files.emptier.pinned is not None
        await check(one, kept)
    async with opened(config) as one:
        await check(one, kept)


@pytest.mark.usefixtures("no_holes")
async def test_a_compaction_gives_all_of_it_back(config: StoreConfig) -> None:
    quiet = limited(config, config.limits, pinned_look_seconds=1e9, waste_bytes_min=1 << 30)
    async with opened(quiet) as one:
        kept = await sparse(one)
        one.files.go_on()
        compaction = one.files.cleaner.compact()
        with trio.fail_after(60):
            await one.files.cleaner.wait(compaction, lambda message: None)
        assert compaction.problem == ""
        assert held(config) < 15 * MIB + 3 * 8 * MIB  # in use, and what is being filled
        assert one.files.cleaning_report.status()["pinned"] < 2 * MIB
        moved = one.files.emptier.moved
        again = one.files.cleaner.compact()
        with trio.fail_after(60):
            await one.files.cleaner.wait(again, lambda message: None)
        assert one.files.emptier.moved == moved  # it ends
        await check(one, kept)


@pytest.mark.usefixtures("no_holes")
async def test_a_request_that_finds_no_room_gets_it(config: StoreConfig) -> None:
    async with opened(config) as one:
        kept = await sparse(one)
        before = held(config)
        assert await one.files.cleaner.make_room()
        await one.checkpoint()
        await one.checkpoint()
        assert held(config) < before - 8 * MIB
        await check(one, kept)


async def test_no_room_stays_allocated_behind_a_full_segment(config: StoreConfig) -> None:
    async with opened(config) as one:
        for number in range(20):  # the segment is flushed before the next begins
            await one.put(f"f{number}", bytes(MIB))
            await one.store.committer.commit()
        for member in one.store.log.members.all:
            held = member.node.held()
            full = [n for n in held if member.shards.is_full(n)]
            assert len(full) == 2
            for segment in full:
                assert held[segment] < member.shards.states[segment].size + 16 * KIB


async def test_where_holes_give_room_back_nothing_is_moved(config: StoreConfig) -> None:
    async with opened(config) as one:
        kept = await sparse(one)
        one.files.go_on()
        await one.put("more", b"x")
        await one.store.committer.commit()
        with trio.fail_after(10):
            while one.files.emptier.pinned is None:
                await trio.lowlevel.checkpoint()
        await trio.sleep(0.3)
        assert one.files.emptier.moved == 0
        await check(one, kept)


@pytest.mark.expects_log("files that are not segments of this store")
@pytest.mark.usefixtures("no_holes")
async def test_a_segment_with_another_name_is_not_emptied(config: StoreConfig) -> None:
    """Its room would not come back."""
    async with opened(config) as one:
        kept = await sparse(one)
    for node in config.nodes:
        for path in (node.path / "shards").iterdir():
            os.link(path, path.with_name(path.name + ".backup"))
    async with opened(config) as one:
        one.files.go_on()
        compaction = one.files.cleaner.compact()
        with trio.fail_after(60):
            await one.files.cleaner.wait(compaction, lambda message: None)
        assert one.files.emptier.moved == 0
        await check(one, kept)


@pytest.mark.usefixtures("no_holes")
@pytest.mark.parametrize("seed", range(3))
async def test_files_change_while_segments_are_emptied(config: StoreConfig, seed: int) -> None:
    chance = random.Random(seed)
    model: dict[str, bytes] = {}
    async with opened(config) as one, trio.open_nursery() as nursery:

        async def unpin() -> None:
            while True:
                await one.files.cleaner.make_room()
                await one.store.committer.commit()
                await trio.lowlevel.checkpoint()

        nursery.start_soon(unpin)
        for _ in range(150):
            name = chance.choice("abcdefgh")
            if chance.random() < 0.3 and name in model:
                one.delete(name)
                del model[name]
            elif name not in model:
                model[name] = chance.randbytes(chance.choice((3000, 90_000, 1 << 20)))
                await one.put(name, model[name])
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    async with opened(config) as one:
        await check(one, model)


@pytest.mark.usefixtures("no_holes")
async def test_segments_without_holes_are_short(tmp_path: Path) -> None:
    config = make(tmp_path / "store")
    async with opened(config) as one:
        for number in range(40):
            await one.put(f"f{number}", bytes(MIB))
        await one.store.committer.commit()
        for member in one.store.log.members.all:
            sizes = [state.size for state in member.shards.states.values()]
            assert max(sizes) < 9 * MIB
            assert len(sizes) >= 3
        assert one.files.cleaner.within_reach() == 0
