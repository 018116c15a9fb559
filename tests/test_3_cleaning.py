"""Stripes that are mostly garbage are emptied; nothing that a file has is lost by it."""

from __future__ import annotations

import itertools
import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import trio

from fusestore.config.store_config import StoreConfig
from fusestore.errors import LostError, NoSpaceError
from fusestore.files import emptier
from fusestore.files.contents import Contents, Part
from fusestore.format import stripe_rows
from fusestore.format.erasure import Code
from fusestore.format.file_rows import ROOT
from fusestore.format.stripe_rows import Live
from fusestore.limits import STRIPE_BYTES
from fusestore.rescue.fsck import fsck
from support.logs import OUT_OF_USE
from support.opened_store import Opened, limited, make, opened

MIB = 1 << 20
KIB = 1 << 10


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return limited(make(tmp_path / "store"), waste_bytes_min=MIB, clean_look_seconds=0.02)


async def is_clean(one: Opened) -> None:
    """Nothing is wrong, and all counts are right."""
    one.check_counters()
    await one.store.committer.commit()
    assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == []


async def clean_all(one: Opened) -> None:
    """Clean until nothing is given back any more."""
    await one.store.committer.commit()
    while await one.files.cleaner.make_room():
        await one.store.committer.commit()


async def overwrite(one: Opened, name: str, model: bytearray, count: int, seed: int) -> None:
    """Overwrite pieces of 8 KiB at random."""
    chance = random.Random(seed)
    for _ in range(count):
        at, data = chance.randrange(len(model) // 8192) * 8192, chance.randbytes(8192)
        await one.put(name, data, at)
        model[at : at + 8192] = data


async def test_overwrites_at_random_keep_to_the_bound(config: StoreConfig) -> None:
    async with opened(config) as one:
        one.files.go_on()
        cleaning, model = one.files.cleaner, bytearray(random.Random(1).randbytes(8 * MIB))
        await one.put("f", bytes(model))
        most = 0
        for part in range(40):
            await overwrite(one, "f", model, 100, part)
            most = max(most, one.store.log.waste - 2 * cleaning.bound)
            await trio.sleep(0.005)
        assert most < 8 * MIB  # what is under way
        with trio.fail_after(30):
            while one.store.log.waste > cleaning.bound:
                await trio.lowlevel.checkpoint()
        assert one.files.emptier.freed > 10 * MIB
        assert await one.get("f") == model
        await is_clean(one)
    async with opened(config) as one:
        assert await one.get("f") == model
        await is_clean(one)


async def test_little_that_lives_keeps_no_room(config: StoreConfig) -> None:
    """Between files that go, one stays in each stripe; small stripes are merged, too."""
    async with opened(config) as one:
        kept = {}
        for number in range(30):
            await one.put("gone", random.Random(number).randbytes(900 * KIB))
            kept[f"stays {number}"] = random.Random(-number).randbytes(4096)
            await one.put(f"stays {number}", kept[f"stays {number}"])
            await one.store.committer.commit()
            one.delete("gone")
            await one.files.removal.removed()
        stripes = len(one.rows(b"S"))
        await clean_all(one)
        await one.checkpoint()
        assert len(one.rows(b"S")) <= 2 < stripes // 5
        assert one.store.log.waste < MIB
        for name, data in kept.items():
            assert await one.get(name) == data
        await is_clean(one)


@pytest.mark.parametrize("seed", range(4))
async def test_files_change_while_they_are_moved(config: StoreConfig, seed: int) -> None:
    chance = random.Random(seed)
    model: dict[str, bytearray] = {}
    async with opened(config) as one, trio.open_nursery() as nursery:
        cleaning = one.files.cleaner

        async def clean_for_ever() -> None:
            while True:
                await cleaning.make_room()
                await trio.lowlevel.checkpoint()

        nursery.start_soon(clean_for_ever)
        for _ in range(400):
            name = chance.choice("abcdef")
            kind = chance.choices(("write", "truncate", "delete", "commit"), (8, 2, 1, 2))[0]
            if kind == "write":
                at = chance.choice((0, chance.randrange(3 * MIB)))
                data = chance.randbytes(chance.choice((1, 5000, 70_000, 1_100_000)))
                await one.put(name, data, at)
                before = model.setdefault(name, bytearray())
                before.extend(bytes(max(0, at - len(before))))
                before[at : at + len(data)] = data
            elif kind == "truncate" and name in model:
                ino = one.files.tree.lookup(ROOT, name.encode())
                assert ino is not None
                size = chance.randrange(len(model[name]) + 1)
                await one.files.contents.truncate(ino, size)
                del model[name][size:]
            elif kind == "delete" and name in model:
                one.delete(name)
                del model[name]
            else:
                await one.store.committer.commit()
            if chance.random() < 0.1:
                for other, expected in model.items():
                    assert await one.get(other) == expected, other
        nursery.cancel_scope.cancel()
        await one.files.removal.removed()
        assert one.files.emptier.moved > 0
        await is_clean(one)
    async with opened(config) as one:
        for name, expected in model.items():
            assert await one.get(name) == expected
        await is_clean(one)


async def test_the_waste_is_counted_anew_at_a_mount(config: StoreConfig) -> None:
    async with opened(config) as one:
        model = bytearray(random.Random(1).randbytes(4 * MIB))
        await one.put("f", bytes(model))
        await one.store.committer.commit()
        await overwrite(one, "f", model, 40, 2)
    async with opened(config) as one:
        assert not one.store.log.waste_counted
        one.files.go_on()
        await overwrite(one, "f", model, 40, 3)
        while not one.store.log.waste_counted:
            await trio.lowlevel.checkpoint()
        await overwrite(one, "f", model, 40, 4)
        one.check_counters()
        assert one.store.log.waste > 100 * 8192


@pytest.mark.expects_log(OUT_OF_USE)
async def test_what_a_node_that_is_away_has_is_left_alone(config: StoreConfig) -> None:
    """A new stripe would have fewer shards than the old one, once the node is back."""
    away = config.nodes[2].path
    async with opened(config) as one:
        before = bytearray(random.Random(1).randbytes(4 * MIB))
        await one.put("before", bytes(before))
        await one.store.committer.commit()
        await overwrite(one, "before", before, 200, 1)
    away.rename(away.with_name("hidden"))
    async with opened(config) as one:
        whole = {n for n, _ in _sealed(one)}
        after = bytearray(random.Random(2).randbytes(4 * MIB))
        await one.put("after", bytes(after))
        await one.store.committer.commit()
        await overwrite(one, "after", after, 300, 2)
        await clean_all(one)
        assert whole <= {n for n, _ in _sealed(one)}
        assert one.files.emptier.freed > MIB
        assert await one.get("after") == after
        assert await one.get("before") == before
        one.check_counters()
    away.with_name("hidden").rename(away)
    async with opened(config) as one:
        await clean_all(one)
        assert await one.get("after") == after
        assert await one.get("before") == before


def _sealed(one: Opened) -> list[tuple[int, Live]]:
    return [
        (stripe_rows.decode_stripe_key(key), Live.decode(value)) for key, value in one.rows(b"V")
    ]


@pytest.mark.parametrize("wrong", [-1, 1, 5000])
@pytest.mark.expects_log(r"files\.emptier: Stripe \S+ counts \d+ live bytes, but files have")
async def test_a_stripe_whose_count_is_wrong_is_left_alone(config: StoreConfig, wrong: int) -> None:
    async with opened(config) as one:
        model = bytearray(random.Random(1).randbytes(STRIPE_BYTES))
        await one.put("f", bytes(model))
        await one.store.committer.commit()
        await overwrite(one, "f", model, 100, 1)
        await one.store.committer.commit()
        number, count = _sealed(one)[0]
        changed = count._replace(live=count.live + wrong)
        one.store.log.apply({stripe_rows.live_key(number): changed.encode()})
        one.store.log.waste_counted = False
        await clean_all(one)
        await clean_all(one)
        assert one.files.emptier.doubted == {number}
        assert one.store.log.stripe(number) is not None
        assert one.store.log.rows_in_doubt == 1
        assert await one.get("f") == model
        found = await fsck(one.store, repair=True, at_rest=False)
        assert len(found["findings"]) == 1
        assert found["left"] == []
        await is_clean(one)


async def test_nobody_waits_for_cleaning_that_gives_nothing_back(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emptier, "_is_gain", lambda *arguments: False)
    low = limited(config, config.limits, waste_bytes_min=256 * KIB, waste_percent_max=0)
    async with opened(low) as one:
        one.files.go_on()
        model = bytearray(random.Random(1).randbytes(4 * MIB))
        await one.put("f", bytes(model))
        with trio.fail_after(30):
            await overwrite(one, "f", model, 1500, 1)
        assert one.store.log.waste > 2 * one.files.cleaner.bound
        assert one.files.emptier.freed == 0
        assert await one.get("f") == model


async def test_small_stripes_that_cannot_be_larger_are_left_alone(config: StoreConfig) -> None:
    """Moving them would go on for ever."""
    async with opened(limited(config, stripe_bytes=64 * KIB, waste_bytes_min=MIB)) as one:
        data = random.Random(1).randbytes(4 * MIB)
        await one.put("f", data)
        with trio.fail_after(30):
            await clean_all(one)
        assert one.files.emptier.moved == 0
        assert await one.get("f") == data


async def littered(one: Opened) -> bytearray:
    """Return a file of which most bytes were overwritten."""
    model = bytearray(random.Random(1).randbytes(8 * MIB))
    await one.put("f", bytes(model))
    await one.store.committer.commit()
    await overwrite(one, "f", model, 2000, 1)
    await one.store.committer.commit()
    return model


async def test_a_request_that_needs_room_does_not_wait_for_the_pace(config: StoreConfig) -> None:
    slow = limited(config, clean_rate=1.0, clean_bytes=64 * KIB, waste_bytes_min=2 * MIB)
    async with opened(slow) as one:
        model = await littered(one)
        one.files.go_on()
        while not one.files.cleaner.is_running:
            await trio.lowlevel.checkpoint()
        await trio.sleep(0.1)  # it waits for its pace
        with trio.fail_after(3):
            assert await one.files.cleaner.make_room()
        assert one.files.cleaner.is_running
        assert await one.get("f") == model


@pytest.mark.parametrize("failures", [1, 2])
async def test_cleaning_that_found_no_room_goes_on(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """What was emptied before is made free first; later it is tried again by itself."""
    async with opened(config) as one:
        model, write, left = await littered(one), Contents.rewrite, [failures]

        def full(*args: Any, **options: Any) -> int:
            if left[0]:
                left[0] -= 1
                raise NoSpaceError("There is no room.")
            return write(*args, **options)

        monkeypatch.setattr(Contents, "rewrite", full)
        one.files.go_on()
        with trio.fail_after(10):
            while one.store.log.waste > one.files.cleaner.bound:
                await trio.lowlevel.checkpoint()
        assert left == [0]
        assert one.files.emptier.waits_for == ""
        assert one.files.cleaning_report.status()["state"] in {"idle", "running"}
        assert await one.get("f") == model
        await is_clean(one)


async def test_what_is_left_alone_is_counted_as_long_as_it_exists(config: StoreConfig) -> None:
    async with opened(config) as one:
        await littered(one)
        numbers = {number for number, _ in _sealed(one)}
        emptier = one.files.emptier
        emptier.absent |= numbers
        emptier.unreadable |= numbers
        await emptier.find(1)
        assert emptier.absent == emptier.unreadable == numbers
        one.delete("f")
        await one.files.removal.removed()
        await one.checkpoint()
        await emptier.find(1)
        assert not emptier.absent | emptier.unreadable


async def test_all_that_report_free_room_agree(config: StoreConfig) -> None:
    async with opened(config) as one:
        await littered(one)
        await one.files.emptier.find(1)
        reach = one.files.cleaner.within_reach
        assert reach() > 0
        with_garbage = one.store.log.usable()[1]
        one.store.log.room.within_reach = int
        assert with_garbage - one.store.log.usable()[1] == reach()
        one.store.log.room.within_reach = reach
        assert (await one.store.status())["bytes_free"] == one.files.space()[1]


async def test_bytes_that_are_to_be_moved_twice_are_counted_once(config: StoreConfig) -> None:
    async with opened(config) as one:
        model = await littered(one)
        numbers = deque(number for number, _ in _sealed(one))
        victims = await one.files.emptier.next(numbers)
        await one.files.emptier.empty([*victims, *victims], always=True)
        assert await one.get("f") == model
        await is_clean(one)


@pytest.mark.parametrize("second", [300, 200, 100])
async def test_parts_of_one_extent_keep_every_byte(config: StoreConfig, second: int) -> None:
    """They lie apart, touch, or overlap."""
    async with opened(config) as one:
        data = random.Random(1).randbytes(100_000)
        ino = await one.put("f", data)
        await one.store.committer.commit()
        extent = next(one.store.reader.extents(ino, 0, len(data)))
        places = [extent.part(50, 200), extent.part(second, second + 100)]
        parts = [Part(ino, place, data[place.offset : place.end]) for place in places]
        moved = one.files.contents.rewrite(Code(2, 1), parts)
        assert moved == (250 if second == 200 else 150)
        assert await one.get("f") == data
        await is_clean(one)


async def test_cleaning_that_waits_for_its_pace_begins_when_it_is_urgent(
    config: StoreConfig,
) -> None:
    slow = limited(config, clean_rate=1.0, waste_bytes_min=2 * MIB)
    async with opened(slow) as one:
        one.files.go_on()
        model = bytearray(random.Random(1).randbytes(8 * MIB))
        await one.put("f", bytes(model))
        with trio.fail_after(30):
            await overwrite(one, "f", model, 3000, 1)
        assert one.files.emptier.freed > 4 * MIB
        assert one.store.log.waste < 4 * one.files.cleaner.bound
        assert await one.get("f") == model


async def test_a_compaction_ends_while_others_overwrite(config: StoreConfig) -> None:
    async with opened(config) as one, trio.open_nursery() as nursery:
        one.files.go_on()
        model = await littered(one)

        async def overwrite_for_ever() -> None:
            for seed in itertools.count():
                await overwrite(one, "f", model, 20, seed)
                await trio.lowlevel.checkpoint()

        nursery.start_soon(overwrite_for_ever)
        compaction = one.files.cleaner.compact()
        with trio.fail_after(20):
            await one.files.cleaner.wait(compaction, lambda message: None)
        assert compaction.problem == ""
        nursery.cancel_scope.cancel()
    async with opened(config) as one:
        assert await one.get("f") == model
        await is_clean(one)


@pytest.mark.expects_log(r"files\.emptier: Stripe \S+ (is counted, but does not|counts \d+ bytes)")
@pytest.mark.parametrize("kind", ["no stripe", "length"])
async def test_other_wrong_counts_are_reported(config: StoreConfig, kind: str) -> None:
    async with opened(config) as one:
        model = await littered(one)
        number, count = _sealed(one)[0]
        if kind == "length":
            key, value = stripe_rows.live_key(number), count._replace(length=count.length - 1)
        else:
            key, value = stripe_rows.live_key(number + 900), Live(1, STRIPE_BYTES)
        one.store.log.apply({key: value.encode()})
        await clean_all(one)
        await clean_all(one)
        assert len(one.files.emptier.doubted) == 1
        assert not (await one.store.status())["healthy"]
        assert await one.get("f") == model


@pytest.mark.expects_log(r"read\.reader: .* cannot be read: Stripe \S+ is not in the metadata")
async def test_a_store_with_lost_rows_is_not_healthy(config: StoreConfig) -> None:
    async with opened(config) as one:
        await littered(one)
        number, _ = _sealed(one)[0]
        one.store.log.apply({stripe_rows.stripe_key(number): None})
        one.store.reader.forget(number)
        with pytest.raises(LostError):
            await one.get("f")
        assert not (await one.store.status())["healthy"]


async def test_two_that_count_the_waste_count_it_once(config: StoreConfig) -> None:
    async with opened(config) as one:
        await littered(one)
    async with opened(config) as one:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one.files.emptier.find, 1)
        one.check_counters()
