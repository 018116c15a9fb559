"""Policies and recoding: which code new files get, and how files that exist get another.

No mount: a store is opened in the process.
"""

from __future__ import annotations

import json
import random
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from fusestore.config.mkfs import make_store
from fusestore.config.store_config import StoreConfig
from fusestore.errors import NoSpaceError, UsageError
from fusestore.files.attributes import CODE
from fusestore.format import stripe_rows
from fusestore.format.erasure import Code
from fusestore.format.file_rows import ROOT
from fusestore.format.stripe_rows import Stripe
from fusestore.limits import DEFAULTS, STRIPE_BYTES
from fusestore.store.opening import open_store
from support.logs import CORRUPT, LOST_STRIPE
from support.metadata_rows import check
from support.opened_store import Opened, crashed, limited, opened

C42, C21, C12 = Code(4, 2), Code(2, 1), Code(1, 2)
MIB = 1 << 20


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make_store(tmp_path / "store")


def folder(one: Opened, name: str, parent: int = ROOT) -> int:
    return one.files.tree.make(parent, name.encode(), stat.S_IFDIR | 0o755, 0, 0)[0]


def codes(one: Opened, ino: int) -> set[str]:
    """The codes of the stripes that a file has bytes in."""
    found = set()
    for extent in one.store.reader.extents(ino, 0, 1 << 60):
        unsealed = one.store.log.unsealed.get(extent.stripe)
        row = one.store.log.engine.get(stripe_rows.stripe_key(extent.stripe))
        if unsealed is not None:
            found.add(str(unsealed.code))
        else:
            assert row is not None
            found.add(str(Stripe.decode(row).code))
    return found


async def content(one: Opened, ino: int) -> bytes:
    return bytes(await one.files.contents.read(ino, 0, 1 << 50))


async def recode(one: Opened, ino: int, to: Code | None, **more: Any) -> dict[str, Any]:
    await one.files.recoder.start(ino, to, None, **more)
    return await one.files.recoder.wait(lambda progress: None)


# --- policies ----------------------------------------------------------------


async def test_a_policy_says_where_it_comes_from_and_what_it_survives(config: StoreConfig) -> None:
    async with opened(config) as one:
        attributes = one.files.attributes
        top = folder(one, "top")
        inner = folder(one, "inner", top)
        file, _ = one.files.tree.make(inner, b"f", stat.S_IFREG | 0o600, 0, 0)

        async def policy(ino: int) -> dict[str, Any]:
            found = json.loads(await attributes.policy(ino))
            assert isinstance(found, dict)
            return found

        default = {
            "code": "2+1",
            "set_on": None,
            "inherited": True,
            "shards_borne": 1,
            "regions_borne": 1,
            "regions": 3,
        }
        assert await policy(inner) == default
        attributes.set(top, CODE, b"4+2")
        changed = {**default, "code": "4+2", "set_on": "/top", "shards_borne": 2}
        assert await policy(inner) == changed
        assert await policy(top) == {**changed, "inherited": False}
        assert await policy(file) == {
            **default,
            "set_on": "/top/inner/f",
            "inherited": False,
        }
        attributes.remove(top, CODE)
        assert await policy(inner) == default


# --- recoding ----------------------------------------------------------------


async def test_a_tree_gets_another_code_and_nothing_else_changes(config: StoreConfig) -> None:
    chance = random.Random(1)
    async with opened(config) as one:
        tree, contents = one.files.tree, one.files.contents
        top = folder(one, "top")
        inner = folder(one, "inner", top)
        other = await one.put("other", chance.randbytes(5000))
        small = await one.put("small", chance.randbytes(1000))
        large = await one.put("large", chance.randbytes(3 * DEFAULTS.recode_bytes + 12345))
        sparse = await one.put("sparse", b"end", offset=1 << 40)
        await contents.write(sparse, 10 * MIB, chance.randbytes(MIB))
        empty = await one.put("empty", b"")
        pieces = await one.put("pieces", b"")
        for number in range(400):
            await contents.write(pieces, number * 5000, b"%5d" % number)
        for name in (b"small", b"large", b"sparse", b"empty", b"pieces"):
            tree.rename(ROOT, name, inner, name)
        tree.link(small, ROOT, b"small, too")
        tree.make(inner, b"link", stat.S_IFLNK | 0o777, 0, 0, target=b"x")
        files = [small, large, empty, pieces]
        before = {ino: (tree.inode(ino), await content(one, ino)) for ino in files}
        holes = one.store.log.engine
        sparse_before = tree.inode(sparse)
        result = await recode(one, top, C42)
        assert (result["state"], result["files"], result["unreadable"]) == ("done", 6, 0)
        assert result["recoded"] == sum(tree.inode(ino).allocated for ino in [*files, sparse])
        for ino, (inode, data) in before.items():
            inode.k, inode.m = 4, 2
            assert tree.inode(ino) == inode
            assert await content(one, ino) == data
            assert codes(one, ino) == ({"4+2"} if data else set())
        sparse_before.k, sparse_before.m = 4, 2
        assert tree.inode(sparse) == sparse_before
        assert bytes(await contents.read(sparse, 1 << 40, 10)) == b"end"
        extents = list(one.store.reader.extents(sparse, 0, 1 << 60))
        assert sum(extent.length for extent in extents) == MIB + 3
        assert codes(one, other) == {"2+1"}
        assert tree.codes.of(inner) == C21
        assert holes is one.store.log.engine
        one.check_counters()
        again = await recode(one, top, C42)
        assert (again["state"], again["recoded"]) == ("done", 0)
    assert (await check(config))["findings"] == []
    shutil.rmtree(config.nodes[1].path)
    async with opened(config) as one:
        for ino, (_, data) in before.items():
            assert await content(one, ino) == data


async def test_the_target_is_the_policy_of_each_directory(config: StoreConfig) -> None:
    async with opened(config) as one:
        a = await one.put("a", b"a" * 100_000)
        b = await one.put("b", b"b" * 100_000)
        top = folder(one, "top")
        one.files.tree.rename(ROOT, b"b", top, b"b")
        one.files.attributes.set(top, CODE, b"1+2")
        assert (await recode(one, ROOT, None))["recoded"] == 100_000
        assert (codes(one, a), codes(one, b)) == ({"2+1"}, {"1+2"})
        assert (await recode(one, a, C42))["recoded"] == 100_000
        assert (await recode(one, a, None))["recoded"] == 100_000
        assert codes(one, a) == {"2+1"}


async def test_files_are_written_cut_and_removed_while_they_are_recoded(
    config: StoreConfig,
) -> None:
    chance = random.Random(5)
    async with opened(config) as one:
        tree, contents = one.files.tree, one.files.contents
        model: dict[int, bytearray] = {}
        for number in range(12):
            data = chance.randbytes(chance.randrange(6 * MIB))
            model[await one.put(f"f{number}", data)] = bytearray(data)
        await one.files.recoder.start(ROOT, C42, None)
        steps = 0
        while one.files.recoder.job.state == "running":
            steps += 1
            ino = chance.choice(list(model))
            data = model[ino]
            match chance.randrange(5):
                case 0 | 1:
                    at = chance.randrange(len(data) + 10)
                    new = chance.randbytes(chance.randrange(1, 100_000))
                    await contents.write(ino, at, new)
                    data.extend(bytes(max(0, at + len(new) - len(data))))
                    data[at : at + len(new)] = new
                case 2:
                    # Bytes that no commit holds yet are overwritten where they lie in memory.
                    at = max(0, len(data) - 1000)
                    await contents.write(ino, at, b"#" * (len(data) - at))
                    data[at:] = b"#" * (len(data) - at)
                case 3:
                    size = chance.randrange(len(data) + 100_000)
                    await contents.truncate(ino, size)
                    data.extend(bytes(max(0, size - len(data))))
                    del data[size:]
                case 4:
                    start = chance.randrange(len(data) + 1)
                    found = await contents.read(ino, start, 50_000)
                    assert bytes(found) == data[start : start + 50_000]
            if steps == 20:
                gone = tree.lookup(ROOT, b"f3") or 0
                tree.unlink(ROOT, b"f3")
                one.files.removal.remove(gone)
                del model[gone]
            await trio.lowlevel.checkpoint()
        for ino, data in model.items():
            assert await content(one, ino) == data
            assert codes(one, ino) <= {"4+2"}
        one.check_counters()
    assert (await check(config))["findings"] == []
    async with opened(config) as one:
        for ino, data in model.items():
            assert await content(one, ino) == data


async def test_a_crash_keeps_every_byte_and_the_rest_goes_on(config: StoreConfig) -> None:
    chance = random.Random(2)
    model: dict[int, bytes] = {}
    async with opened(config) as one:
        for number in range(200):
            data = chance.randbytes(chance.randrange(200_000))
            model[await one.put(f"f{number}", data)] = data
        await one.checkpoint()
        await one.files.recoder.start(ROOT, C42, None)
        await one.store.committer.commit()
        copies = []
        while one.files.recoder.job.state == "running":
            if one.files.recoder.job.files > 12 * (len(copies) + 1) and len(copies) < 3:
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
            assert result["state"] == "done"
            for ino, data in model.items():
                assert await content(one, ino) == data
                assert codes(one, ino) <= {"4+2"}
        assert (await check(copy))["findings"] == []


async def test_a_full_store_is_waited_for(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(limited(config, recode_retry_seconds=0.05)) as one:
        data = random.Random(3).randbytes(9 * MIB)
        ino = await one.put("f", data)
        takes = one.store.log.take_room
        refused = 0

        def take_room(length: int, code: Code, *, in_reserve: bool = False) -> None:
            assert not in_reserve
            nonlocal refused
            if 4 <= (refused := refused + 1) - 1 < 8 or refused == 2:
                raise NoSpaceError("The store is full.")
            takes(length, code)

        monkeypatch.setattr(one.store.log, "take_room", take_room)
        await one.files.recoder.start(ino, C42, None)
        while not one.files.recoder.status()["waits_for"]:
            await trio.lowlevel.checkpoint()
        assert await content(one, ino) == data
        result = await one.files.recoder.wait(lambda progress: None)
        assert (result["state"], result["waits_for"]) == ("done", "")
        assert codes(one, ino) == {"4+2"}
        assert await content(one, ino) == data
        one.check_counters()


async def test_it_can_be_stopped_and_begun_again(config: StoreConfig) -> None:
    async with opened(config) as one:
        recoder = one.files.recoder
        for number in range(40):
            await one.put(f"f{number}", bytes([number]) * 100_000)
        await recoder.start(ROOT, C42, None)
        busy = r"^/ is being recoded: wait for it, or stop it with --stop\.$"
        with pytest.raises(UsageError, match=busy):
            await recoder.start(ROOT, C12, None)
        while recoder.job.files < 5:
            await trio.lowlevel.checkpoint()
        recoder.stop()
        with pytest.raises(UsageError, match=r"^Nothing is being recoded\.$"):
            recoder.stop()
        left = [ino for ino in range(2, 42) if codes(one, ino) == {"2+1"}]
        assert left
        result = await recode(one, ROOT, C12)
        assert (result["state"], result["files"]) == ("done", 40)
        for number in range(40):
            assert await one.get(f"f{number}") == bytes([number]) * 100_000
            assert codes(one, number + 2) == {"1+2"}


@pytest.mark.expects_log(CORRUPT, LOST_STRIPE)
async def test_what_cannot_be_read_is_named_and_left(config: StoreConfig) -> None:
    async with opened(config) as one:
        lost = await one.put("lost", random.Random(1).randbytes(3 * STRIPE_BYTES))
        good = await one.put("good", random.Random(2).randbytes(1000))
    for node in config.nodes[:2]:
        for segment in (node.path / "shards").iterdir():
            segment.write_bytes(bytes(segment.stat().st_size))
    async with open_store(config, background=False) as store, trio.open_nursery() as nursery:
        from fusestore.files.filesystem import FileSystem

        one = Opened(store, FileSystem(store, nursery))
        result = await recode(one, ROOT, C42)
        assert sorted(result["unreadable_files"]) == ["/good", "/lost"]
        assert codes(one, lost) == {"2+1"}
        assert codes(one, good) == {"2+1"}
        nursery.cancel_scope.cancel()
