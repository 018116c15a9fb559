"""Defragmenting: what lies in many small pieces is rewritten in order; all else is left alone.

No mount: a store is opened in the process.
"""

from __future__ import annotations

import random
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from fusestore.config.mkfs import make_store
from fusestore.config.store_config import StoreConfig
from fusestore.files.attributes import CODE
from fusestore.files.fragments import fragmented, window
from fusestore.format.erasure import Code
from fusestore.format.file_rows import ROOT, Extent
from fusestore.limits import DEFAULTS, Limits
from support.metadata_rows import check
from support.opened_store import Opened, crashed, limited, opened

KIB, MIB = 1 << 10, 1 << 20
C42 = Code(4, 2)


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make_store(tmp_path / "store")


def extents(one: Opened, ino: int) -> list[Extent]:
    return list(one.store.reader.extents(ino, 0, 1 << 62))


def codes(one: Opened, ino: int) -> set[str]:
    """The codes of the stripes that a file has bytes in."""
    found = set()
    for extent in extents(one, ino):
        stripe = one.store.log.unsealed.get(extent.stripe) or one.store.log.stripe(extent.stripe)
        assert stripe is not None
        found.add(str(stripe.code))
    return found


async def content(one: Opened, ino: int) -> bytes:
    return bytes(await one.files.contents.read(ino, 0, 1 << 50))


async def defragment(one: Opened, ino: int, to: Code | None = None) -> dict[str, Any]:
    await one.files.recoder.start(ino, to, None, defragment=True)
    with trio.fail_after(120):
        return await one.files.recoder.wait(lambda progress: None)


async def overwrite(one: Opened, ino: int, data: bytearray, piece: int, seed: int = 1) -> None:
    """Overwrite all of a file in pieces, in random order, with a commit now and then."""
    chance = random.Random(seed)
    offsets = list(range(0, len(data), piece))
    chance.shuffle(offsets)
    for number, offset in enumerate(offsets):
        new = chance.randbytes(min(piece, len(data) - offset))
        await one.files.contents.write(ino, offset, new)
        data[offset : offset + len(new)] = new
        if number % 97 == 0:
            await one.store.committer.commit()


# --- what is fragmented -----------------------------------------------------------------------


def placed(*pieces: tuple[int, int], start: int = 0) -> list[Extent]:
    """Extents of these (length, stripe); those of a stripe follow each other in it."""
    found, at, used = [], start, dict[int, int]()
    for length, stripe in pieces:
        found.append(Extent(at, length, stripe, used.get(stripe, 0)))
        used[stripe] = used.get(stripe, 0) + length
        at += length
    return found


def runs(rows: list[Extent], limits: Limits = DEFAULTS, *, more: bool = False) -> Any:
    found, end = fragmented(rows, limits, more=more)
    return [(run.start, run.end) for run in found], end


PIECES = [(8 * KIB, 100 + number % 7) for number in range(128)]


@pytest.mark.parametrize(
    "rows",
    [
        placed((1, 5)),
        placed((8 * KIB, 5), (8 * KIB, 6)),
        placed(*[(MIB, number) for number in range(1, 5)]),
        placed((300 * KIB, 1), *[(MIB, number) for number in range(2, 5)], (5, 6)),
        placed(*[(700 * KIB, number) for number in range(1, 5)]),
        placed(*[(4 * KIB, 9)] * 100),
        [Extent(number << 30, 4 * KIB, 9, number * 4 * KIB) for number in range(100)],
        [Extent(number << 13, 8 * KIB, 0, 0) for number in range(100)],
    ],
    ids=["one", "two", "whole", "begun in another", "long", "grown", "sparse", "lost"],
)
def test_these_are_not_fragmented(rows: list[Extent]) -> None:
    assert runs(rows) == ([], rows[-1].end)


def test_what_is_fragmented_is_found_between_whole_stripes() -> None:
    rows = placed((MIB, 1), *PIECES, (MIB, 2), (MIB, 3))
    assert runs(rows) == ([(MIB, 2 * MIB)], 4 * MIB)
    few = placed((MIB, 1), (4 * KIB, 4), (90 * KIB, 5), (4 * KIB, 6), (MIB, 2))
    assert runs(few) == ([(MIB, MIB + 98 * KIB)], few[-1].end)
    islands = [Extent(i << 30, 4 * KIB, 9, (99 - i) * 4 * KIB) for i in range(100)]
    assert runs(islands) == ([(0, islands[-1].end)], islands[-1].end)


def test_a_run_that_goes_on_ends_with_a_whole_stripe_or_is_left_for_later() -> None:
    rows = placed(*PIECES, (8 * KIB, 6), (20 * KIB, 7))
    assert runs(rows) == ([(0, rows[-1].end)], rows[-1].end)
    assert runs(rows, more=True) == ([(0, MIB)], MIB)
    odd = placed((1000, 3), *PIECES)
    assert runs(odd, more=True) == ([(0, MIB)], MIB)
    begun = placed((MIB, 1), *PIECES)
    assert runs(begun, more=True) == ([], MIB)
    tiny = placed(*[(100, 1 + number % 7) for number in range(1000)])
    assert runs(tiny, more=True) == ([(0, 100_000)], 100_000)


def test_a_window_holds_what_one_transaction_rewrites() -> None:
    def taken(rows: list[Extent]) -> tuple[int, bool]:
        found, more = window(iter(rows), DEFAULTS)
        return len(found), more

    assert taken([]) == (0, False)
    assert taken(placed((8 * MIB, 1), (1, 2))) == (1, True)
    assert taken(placed(*[(MIB, number) for number in range(9)])) == (4, True)
    assert taken(placed(*PIECES)) == (128, False)
    assert taken(placed(*PIECES, *PIECES)) == (128, True)
    assert taken(placed(*[(4 * KIB, 1)] * 500)) == (256, True)
    assert taken(placed(*[(1, 1)] * 5000)) == (1024, True)


# --- files ------------------------------------------------------------------------------------


async def test_a_tree_is_defragmented_and_nothing_else_changes(config: StoreConfig) -> None:
    chance = random.Random(1)
    async with opened(config) as one:
        tree, contents = one.files.tree, one.files.contents
        top, _ = tree.make(ROOT, b"top", stat.S_IFDIR | 0o755, 0, 0)
        model: dict[str, bytearray] = {}
        for name, size in {"whole": 5 * MIB, "random": 6 * MIB + 777, "odd": 3 * MIB}.items():
            model[name] = bytearray(chance.randbytes(size))
            await one.put(name, bytes(model[name]))
        for name in ("small", "smaller"):
            model[name] = bytearray(chance.randbytes(5000))
            await one.put(name, bytes(model[name]))
        inos = {name: tree.lookup(ROOT, name.encode()) or 0 for name in model}
        await one.store.committer.commit()
        await overwrite(one, inos["random"], model["random"], 8 * KIB)
        await overwrite(one, inos["odd"], model["odd"], 5003)
        model["grown"] = bytearray()
        inos["grown"] = await one.put("grown", b"")
        for number in range(40):  # two files that grow at a time
            for name in ("small", "grown"):
                data = chance.randbytes(4 * KIB)
                await contents.write(inos[name], len(model[name]), data)
                model[name] += data
            if number % 9 == 0:
                await one.store.committer.commit()
        sparse = await one.put("sparse", b"end", offset=1 << 40)
        for number in reversed(range(20)):
            await contents.write(sparse, number * 10 * MIB, b"%5d" % number)
        await one.checkpoint()
        for name in model:
            tree.rename(ROOT, name.encode(), top, name.encode())
        alone = {name: extents(one, inos[name]) for name in ("whole", "smaller")}
        before = {ino: tree.inode(ino) for ino in [*inos.values(), sparse]}
        result = await defragment(one, ROOT)
        assert (result["state"], result["files"], result["unreadable"]) == ("done", 7, 0)
        changed = [before[ino] for name, ino in inos.items() if name not in alone]
        size = sum(inode.allocated for inode in [*changed, before[sparse]])
        assert result["recoded"] == size - 777  # this is one piece
        for name, ino in inos.items():
            assert await content(one, ino) == model[name]
            assert len(extents(one, ino)) <= 3 + len(model[name]) // MIB * 3
        for name, rows in alone.items():
            assert extents(one, inos[name]) == rows
        for ino, inode in before.items():
            assert tree.inode(ino) == inode
            assert codes(one, ino) == {"2+1"}
        assert bytes(await contents.read(sparse, 19 * 10 * MIB, 6)) == b"   19\0"
        one.check_counters()
        again = await defragment(one, ROOT)
        assert (again["state"], again["recoded"]) == ("done", 0)
    assert (await check(config))["findings"] == []
    shutil.rmtree(config.nodes[1].path)
    async with opened(config) as one:
        for name, ino in inos.items():
            assert await content(one, ino) == model[name]


async def test_the_code_may_change_as_well(config: StoreConfig) -> None:
    async with opened(config) as one:
        data = bytearray(3 * MIB)
        ino = await one.put("f", bytes(data))
        one.files.attributes.set(ROOT, CODE, b"1+2")
        await overwrite(one, ino, data, 8 * KIB)
        await one.store.committer.commit()
        await defragment(one, ino)  # the code of the file, not that of its directory
        assert (codes(one, ino), len(extents(one, ino))) == ({"2+1"}, 3)
        await overwrite(one, ino, data, 300 * KIB)
        result = await defragment(one, ROOT, C42)
        assert (codes(one, ino), result["recoded"]) == ({"4+2"}, len(data))
        await overwrite(one, ino, data, 64 * KIB)
        await defragment(one, ROOT, C42)
        assert len(extents(one, ino)) <= 4
        assert await content(one, ino) == data
        one.check_counters()


async def test_no_code_leaves_what_is_fragmented_again(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store", code=Code(6, 3))  # 1 MiB is no multiple of 6
    async with opened(config) as one:
        data = bytearray(9 * MIB + 5)
        ino = await one.put("f", bytes(data))
        small = [await one.put(f"small{number}", b"#" * 300 * KIB) for number in range(9)]
        await overwrite(one, ino, data, 8 * KIB)
        for number in small:
            await overwrite(one, number, bytearray(300 * KIB), 30 * KIB)
        await one.checkpoint()
        assert (await defragment(one, ROOT))["recoded"] > 11 * MIB
        await one.checkpoint()
        assert (await defragment(one, ROOT))["recoded"] == 0
        assert await content(one, ino) == data


async def test_small_files_share_stripes_however_often_others_commit(config: StoreConfig) -> None:
    async with opened(config) as one:
        model = {await one.put(f"f{number}", b""): bytearray() for number in range(400)}
        for number in range(3):
            for ino, data in model.items():
                new = b"%4d" % number * KIB
                await one.files.contents.write(ino, len(data), new)
                data += new
        await one.checkpoint()
        await one.files.recoder.start(ROOT, None, None, defragment=True)
        while one.files.recoder.job.state == "running":
            await one.store.committer.commit()
            await trio.lowlevel.checkpoint()
        assert one.files.recoder.job.recoded == 400 * 12 * KIB
        for ino, data in model.items():
            assert await content(one, ino) == data
            assert len(extents(one, ino)) <= 2
        assert len({extent.stripe for ino in model for extent in extents(one, ino)}) <= 8


@pytest.mark.parametrize("cleans", [False, True], ids=["alone", "with cleaning"])
async def test_files_change_while_they_are_defragmented(config: StoreConfig, cleans: bool) -> None:
    chance = random.Random(5)
    limits = limited(config, waste_bytes_min=MIB, waste_percent_max=1, clean_look_seconds=0.01)
    async with opened(limits if cleans else config) as one:
        tree, contents = one.files.tree, one.files.contents
        model: dict[int, bytearray] = {}
        for number in range(6):
            data = bytearray(chance.randrange(4 * MIB))
            ino = await one.put(f"f{number}", bytes(data))
            model[ino] = data
            await overwrite(one, ino, data, chance.choice((4, 8, 31)) * KIB, seed=number)
        if cleans:
            one.files.go_on()
        await one.files.recoder.start(ROOT, None, None, defragment=True)
        steps = 0
        while one.files.recoder.job.state == "running":
            steps += 1
            ino = chance.choice(list(model))
            data = model[ino]
            match chance.randrange(4):
                case 0 | 1:
                    at = chance.randrange(len(data) + 10)
                    new = chance.randbytes(chance.randrange(1, 20_000))
                    await contents.write(ino, at, new)
                    data.extend(bytes(max(0, at + len(new) - len(data))))
                    data[at : at + len(new)] = new
                case 2:
                    size = chance.randrange(len(data) // 2, len(data) + 100_000)
                    await contents.truncate(ino, size)
                    data.extend(bytes(max(0, size - len(data))))
                    del data[size:]
                case 3:
                    start = chance.randrange(len(data) + 1)
                    found = await contents.read(ino, start, 50_000)
                    assert bytes(found) == data[start : start + 50_000]
            if steps == 20:
                gone = tree.lookup(ROOT, b"f3") or 0
                tree.unlink(ROOT, b"f3")
                one.files.removal.remove(gone)
                del model[gone]
            await trio.lowlevel.checkpoint()
        assert steps > 20
        assert not one.files.emptier.doubted
        for ino, data in model.items():
            assert await content(one, ino) == data
        one.check_counters()
    assert (await check(config))["findings"] == []
    async with opened(config) as one:
        for ino, data in model.items():
            assert await content(one, ino) == data


async def test_it_ends_although_a_file_is_overwritten_all_the_time(config: StoreConfig) -> None:
    chance = random.Random(6)
    async with opened(config) as one:
        data = bytearray(4 * MIB)
        ino = await one.put("hot", bytes(data))
        await overwrite(one, ino, data, 8 * KIB)
        await one.files.recoder.start(ino, None, None, defragment=True)
        with trio.fail_after(60):
            while one.files.recoder.job.state == "running":
                for _ in range(20):
                    at, new = chance.randrange(len(data) // 4096) * 4096, chance.randbytes(4096)
                    await one.files.contents.write(ino, at, new)
                    data[at : at + 4096] = new
                await trio.lowlevel.checkpoint()
        assert one.files.recoder.job.recoded <= len(data)
        assert await content(one, ino) == data
        one.check_counters()


async def test_it_is_stopped_and_begun_again(config: StoreConfig) -> None:
    async with opened(config) as one:
        data = bytearray(6 * MIB)
        ino = await one.put("f", bytes(data))
        await overwrite(one, ino, data, 8 * KIB)
        await one.checkpoint()
        recoder = one.files.recoder
        await recoder.start(ROOT, None, None, defragment=True)
        while recoder.job.recoded < 2 * MIB:
            await trio.lowlevel.checkpoint()
        recoder.stop()
        assert 100 < len(extents(one, ino)) < 700
        result = await defragment(one, ROOT)
        assert result["state"] == "done"
        assert 0 < result["recoded"] <= 4 * MIB
        assert len(extents(one, ino)) <= 8
        assert await content(one, ino) == data


async def test_a_crash_keeps_every_byte_and_the_rest_goes_on(config: StoreConfig) -> None:
    async with opened(config) as one:
        model: dict[int, bytearray] = {}
        for number in range(3):
            data = bytearray(3 * MIB)
            ino = await one.put(f"f{number}", bytes(data))
            await overwrite(one, ino, data, 8 * KIB, seed=number)
            model[ino] = data
        await one.checkpoint()
        await one.files.recoder.start(ROOT, None, None, defragment=True)
        await one.store.committer.commit()
        copies = []
        while one.files.recoder.job.state == "running":
            if one.files.recoder.job.recoded > MIB * (2 * len(copies) + 1) and len(copies) < 3:
                if len(copies) == 1:
                    await one.checkpoint()
                copies.append(crashed(config, config.store.parent / f"crash{len(copies)}"))
            await trio.lowlevel.checkpoint()
    assert len(copies) >= 2
    for copy in copies:
        shutil.rmtree(copy.nodes[0].path)
        async with opened(copy) as one:
            one.files.go_on()
            for ino, data in model.items():
                assert await content(one, ino) == data
            result = await one.files.recoder.wait(lambda progress: None)
            assert (result["state"], result["defragment"]) == ("done", True)
            for ino, data in model.items():
                assert await content(one, ino) == data
                assert len(extents(one, ino)) <= 6
        assert (await check(copy))["findings"] == []
