"""Stripes that are mostly garbage are emptied; nothing that a file has is lost by it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from fusestore.config.store_config import StoreConfig
from fusestore.files import cleaner
from fusestore.format import stripe_rows
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
        assert cleaning.freed > 10 * MIB
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
        assert cleaning.moved > 0
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
        assert one.files.cleaner.freed > MIB
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
@pytest.mark.expects_log(r"files\.cleaner: Stripe \S+ counts \d+ live bytes, but files have")
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
        assert one.files.cleaner.doubted == {number}
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
    monkeypatch.setattr(cleaner, "_is_gain", lambda *arguments: False)
    low = limited(config, config.limits, waste_bytes_min=256 * KIB, waste_percent_max=0)
    async with opened(low) as one:
        one.files.go_on()
        model = bytearray(random.Random(1).randbytes(4 * MIB))
        await one.put("f", bytes(model))
        with trio.fail_after(30):
            await overwrite(one, "f", model, 1500, 1)
        assert one.store.log.waste > 2 * one.files.cleaner.bound
        assert one.files.cleaner.freed == 0
        assert await one.get("f") == model


async def test_small_stripes_that_cannot_be_larger_are_left_alone(config: StoreConfig) -> None:
    """Moving them would go on for ever."""
    async with opened(limited(config, stripe_bytes=64 * KIB, waste_bytes_min=MIB)) as one:
        data = random.Random(1).randbytes(4 * MIB)
        await one.put("f", data)
        with trio.fail_after(30):
            await clean_all(one)
        assert one.files.cleaner.moved == 0
        assert await one.get("f") == data
