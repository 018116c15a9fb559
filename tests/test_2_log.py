"""The log of an open store: what is written is read, what was committed survives.

No mount: a store is opened in the process.  A crash is a copy of the store's
directory, taken while it is open and opened on its own.
"""

from __future__ import annotations

import errno
import random
import shutil
import stat
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from fusestore.commit.checkpoint import Checkpointer
from fusestore.commit.journal_writer import JournalWriter
from fusestore.config.store_config import StoreConfig
from fusestore.errors import (
    FusestoreError,
    LostError,
    MetadataError,
    NodeError,
    NoSpaceError,
    NotDurableError,
    ShortageError,
)
from fusestore.format import store_rows, stripe_rows
from fusestore.format.erasure import Code
from fusestore.format.file_rows import ROOT
from fusestore.format.records import (
    Kind,
    Place,
    SegmentKind,
    decode_changes,
    decode_commit,
    records,
)
from fusestore.format.segment_numbers import segment_path
from fusestore.format.stripe_rows import Stripe
from fusestore.limits import DEFAULTS, STRIPE_BYTES
from fusestore.members.opening import open_node
from fusestore.members.standing import State
from fusestore.metadata.engine import Engine
from fusestore.serve.messages.safety import FsckRequest
from fusestore.serve.offline import offline
from fusestore.system.io_uring import Batch, Operation, Ring
from support.faults import FaultyNode, SlowNode
from support.logs import (
    AS_TOLD,
    CHECKPOINT_FAILED,
    CORRUPT,
    GONE,
    LOST_STRIPE,
    OUT_OF_USE,
    TOO_FEW_NODES,
)
from support.opened_store import (
    REGIONS,
    Opened,
    crashed,
    limited,
    loses_a_region,
    make,
    opened,
)


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make(tmp_path / "store")


# --- writing and reading -------------------------------------------------------


@pytest.mark.parametrize("code", ["2+1", "4+2", "6+3", "1+2"])
async def test_all_sizes_read_back_before_and_after_a_remount(tmp_path: Path, code: str) -> None:
    config = make(tmp_path / "store", code)
    chance = random.Random(1)
    sizes = (0, 1, 63, 4096, 16384, 100_001, STRIPE_BYTES, 3 * STRIPE_BYTES + 17)
    contents = {f"f{size}": chance.randbytes(size) for size in sizes}
    async with opened(config) as one:
        for name, data in contents.items():
            await one.put(name, data)
        for name, data in contents.items():
            assert await one.get(name) == data
        await one.store.committer.commit()
        for name, data in contents.items():
            assert await one.get(name) == data
    async with opened(config) as one:
        for name, data in contents.items():
            assert await one.get(name) == data
        one.check_counters()


WRITES = st.lists(
    st.tuples(
        st.sampled_from(["write", "truncate", "commit"]),
        st.integers(0, 300_000),
        st.integers(1, 150_000),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=25, deadline=None)
@given(steps=WRITES, seed=st.integers(0, 1000))
def test_overwrites_and_truncates_are_a_bytearrays(
    steps: list[tuple[str, int, int]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async def run() -> None:
        config = make(tmp_path_factory.mktemp("model") / "store")
        chance = random.Random(seed)
        model = bytearray()
        async with opened(config) as one:
            ino = await one.put("f", b"")
            for kind, offset, length in steps:
                if kind == "write":
                    data = chance.randbytes(length)
                    await one.put("f", data, offset)
                    model.extend(bytes(max(0, offset + length - len(model))))
                    model[offset : offset + length] = data
                elif kind == "truncate":
                    await one.files.contents.truncate(ino, offset)
                    model.extend(bytes(max(0, offset - len(model))))
                    del model[offset:]
                else:
                    await one.store.committer.commit()
                assert await one.get("f") == model
            one.check_counters()
        async with opened(config) as one:
            assert await one.get("f") == model
            one.check_counters()

    trio.run(run)


async def test_deleting_everything_leaves_nothing(config: StoreConfig) -> None:
    async with opened(config) as one:
        for i in range(40):
            await one.put(f"f{i}", random.Random(i).randbytes(200_000))
        await one.store.committer.commit()
        for i in range(40):
            one.delete(f"f{i}")
        for _ in range(3):
            await one.checkpoint()
        for table in b"EVSOTRMUD":
            assert one.rows(bytes([table])) == []
        one.check_counters()
        for node in config.nodes:
            assert sum(f.stat().st_blocks for f in (node.path / "shards").iterdir()) == 0


async def test_many_extents_are_trimmed_in_batches(config: StoreConfig) -> None:
    async with opened(config) as one:
        ino = await one.put("f", b"")
        for i in range(1000):
            await one.files.contents.write(ino, i * 8192, b"x" * 100)
        await one.files.contents.truncate(ino, 8192 * 500 + 50)
        assert len(one.rows(b"E")) == 501
        await one.files.contents.truncate(ino, 8192 * 1000)
        expected = bytearray(8192 * 1000)
        for i in range(501):
            expected[i * 8192 : i * 8192 + (100 if i < 500 else 50)] = b"x" * (
                100 if i < 500 else 50
            )
        assert await one.get("f") == expected
        one.check_counters()
        one.delete("f")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert one.rows(b"E") == []
        one.check_counters()


async def test_a_small_fsync_makes_no_stripe(config: StoreConfig, tmp_path: Path) -> None:
    async with opened(config) as one:
        for i in range(20):
            await one.put("f", b"%03d" % i * 100, i * 300)
            await one.store.committer.commit()
        assert one.rows(b"S") == []
        assert len(one.rows(b"T")) == 20
        crash = crashed(config, tmp_path / "crash")
        expected = await one.get("f")
        await one.put("f", b"x" * (DEFAULTS.tail_bytes_max + 1), 6000)
        await one.store.committer.commit()
        assert len(one.rows(b"S")) == 1
        assert one.rows(b"T") == []
    async with opened(crash) as one:
        assert await one.get("f") == expected
        await one.store.committer.commit()
        assert one.rows(b"T") == []


# --- crashes -------------------------------------------------------------------


@pytest.mark.parametrize("torn", [(), (0,), (1, 2), (0, 1, 2)])
async def test_what_was_committed_survives_a_crash(
    config: StoreConfig, tmp_path: Path, torn: tuple[int, ...]
) -> None:
    async with opened(config) as one:
        await one.put("a", b"a" * 50_000)
        await one.put("b", random.Random(2).randbytes(3 << 20))
        await one.store.committer.commit()
        held = {name: await one.get(name) for name in ("a", "b")}
        await one.put("a", b"later" * 1000)
        one.files.tree.make(ROOT, b"late", stat.S_IFDIR | 0o755, 0, 0)
        await one.store.committer.commit()
        crash = crashed(config, tmp_path / "crash")
    for index in torn:
        # Nobody had flushed the last commit yet: its record is cut.
        journal = sorted((crash.nodes[index].path / "journal").iterdir())[-1]
        journal.write_bytes(journal.read_bytes().rstrip(b"\0")[:-70])
    async with opened(crash) as one:
        counted = len(torn) < 3
        assert await one.get("a") == (b"later" * 1000 + held["a"][5000:] if counted else held["a"])
        assert await one.get("b") == held["b"]
        assert (one.files.tree.lookup(ROOT, b"late") is not None) is counted
        assert (await one.store.status())["healthy"] is True
        one.check_counters()


@pytest.mark.expects_log(GONE)
async def test_a_crash_while_a_node_was_away(config: StoreConfig, tmp_path: Path) -> None:
    away = config.nodes[1].path
    async with opened(config) as one:
        await one.put("a", b"1" * 100_000)
        await one.store.committer.commit()
        away.rename(tmp_path / "away")
        await one.put("b", random.Random(3).randbytes(2 << 20))
        await one.store.committer.commit()
        held = {name: await one.get(name) for name in ("a", "b")}
        assert (await one.store.status())["nodes"][1]["state"] in ("suspect", "down")
        crash = crashed(config, tmp_path / "crash")
        (tmp_path / "away").rename(away)
    async with opened(crash) as one:
        assert {name: await one.get(name) for name in held} == held
    shutil.copytree(away, crash.nodes[1].path)
    async with opened(crash) as one:
        assert (await one.store.status())["healthy"] is True
    shutil.rmtree(crash.nodes[0].path)
    async with opened(crash) as one:
        assert {name: await one.get(name) for name in held} == held


async def test_every_crash_point_of_a_history_is_one_instant(
    config: StoreConfig, tmp_path: Path
) -> None:
    chance = random.Random(4)
    async with opened(config) as one:
        for step in range(12):
            await one.put(
                f"f{chance.randrange(4)}", chance.randbytes(90_000), chance.randrange(50_000)
            )
            if chance.random() < 0.3 and one.files.tree.lookup(ROOT, b"f0") is not None:
                one.delete("f0")
            if chance.random() < 0.4:
                await one.checkpoint()
            else:
                await one.store.committer.commit()
            names = [name.decode() for _, _, name in one.files.tree.entries(ROOT, 0)]
            held = {name: await one.get(name) for name in names}
            crash = crashed(config, tmp_path / f"crash{step}")
            async with opened(crash) as again:
                found = [name.decode() for _, _, name in again.files.tree.entries(ROOT, 0)]
                assert found == names
                assert {name: await again.get(name) for name in names} == held
                again.check_counters()


# --- nodes that fail -------------------------------------------------------------


@pytest.mark.parametrize("lost", range(3))
@pytest.mark.expects_log(AS_TOLD)
async def test_a_node_lost_under_writes_costs_nothing(config: StoreConfig, lost: int) -> None:
    async with opened(config, faults=True) as one:
        await one.put("a", random.Random(5).randbytes(2 << 20))
        await one.store.committer.commit()
        faulty = one.store.log.members.all[lost].node
        assert isinstance(faulty, FaultyNode)
        faulty.fail_at = faulty.operations + 2
        await one.put("b", random.Random(6).randbytes(5 << 20))
        await one.store.committer.commit()
        assert await one.get("a") == random.Random(5).randbytes(2 << 20)
        assert await one.get("b") == random.Random(6).randbytes(5 << 20)
        assert (await one.store.status())["nodes"][lost]["state"] in ("suspect", "down")
        done = await one.store.repairer.repair(REGIONS[lost], lambda m: None)
        assert done["unrepairable"] == []
        assert (await one.store.status())["healthy"] is True
    shutil.rmtree(config.nodes[(lost + 1) % 3].path)
    async with opened(config) as one:
        assert await one.get("a") == random.Random(5).randbytes(2 << 20)
        assert await one.get("b") == random.Random(6).randbytes(5 << 20)


@pytest.mark.parametrize("for_good", [True, False])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.expects_log(AS_TOLD)
async def test_the_nth_operation_of_a_node_fails(
    tmp_path: Path, full: bool, for_good: bool
) -> None:
    data = random.Random(7).randbytes(1_500_000)
    for n in range(1, 40):
        config = make(tmp_path / f"{n}")
        acknowledged: list[str] = []
        with trio.fail_after(30):
            try:
                async with opened(config, faults=True) as one:
                    faulty = one.store.log.members.all[n % 3].node
                    assert isinstance(faulty, FaultyNode)
                    faulty.fail_at, faulty.full, faulty.for_good = n, full, for_good
                    for i in range(4):
                        await one.put(f"f{i}", data[: 400_000 * i + 10])
                        await one.store.committer.commit()
                        acknowledged.append(f"f{i}")
                        assert await one.get(f"f{i}") == data[: 400_000 * i + 10]
            except* FusestoreError:
                pass
        async with opened(config) as one:
            for i, name in enumerate(acknowledged):
                assert await one.get(name) == data[: 400_000 * i + 10], n
        assert len(acknowledged) == 4


@pytest.mark.expects_log(AS_TOLD, TOO_FEW_NODES)
async def test_without_enough_nodes_nothing_is_acknowledged(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: object, **named: object) -> None:
        raise NodeError("It is away.")

    monkeypatch.setattr("fusestore.repair.writing_again.open_node", away)
    with pytest.raises(ExceptionGroup) as failed:
        async with opened(config, faults=True) as one:
            await one.put("a", b"kept")
            await one.put("sealed", b"s" * STRIPE_BYTES)
            await one.store.committer.commit()
            for member in one.store.log.members.all[:2]:
                assert isinstance(member.node, FaultyNode)
                member.node.fail_at = 0
            await one.put("b", b"x" * (2 << 20))
            for _ in range(2):
                with pytest.raises(NotDurableError):
                    await one.store.committer.commit()
            assert await one.get("a") == b"kept"
    assert failed.value.subgroup(NotDurableError) is not None
    async with opened(config) as one:
        assert await one.get("a") == b"kept"
        assert await one.get("sealed") == b"s" * STRIPE_BYTES


# --- shards that rot ---------------------------------------------------------------


def flip(config: StoreConfig, one: Opened, number: int, row: Stripe, index: int, at: int) -> None:
    """Change one bit of a shard on its node."""
    place = row.shards[index]
    member = one.store.log.members.by_id[place.node]
    path = member.config.path / segment_path(SegmentKind.SHARDS, place.segment)
    with path.open("r+b") as file:
        file.seek(place.offset + at)
        byte = file.read(1)[0]
        file.seek(place.offset + at)
        file.write(bytes([byte ^ 4]))


@pytest.mark.expects_log(CORRUPT)
async def test_rotten_shards_never_show_and_are_healed(config: StoreConfig) -> None:
    chance = random.Random(8)
    data = chance.randbytes(4 << 20)
    async with opened(config) as one:
        await one.put("f", data)
    async with opened(config) as one:
        stripes = [(stripe_rows.decode_stripe_key(k), Stripe.decode(v)) for k, v in one.rows(b"S")]
        for number, row in stripes:
            flip(config, one, number, row, chance.randrange(2), chance.randrange(row.shard_length))
        assert await one.get("f") == data
        assert one.rows(b"M") != []
        one.store.comeback.wake()
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert one.rows(b"M") == []
        for node in (config.nodes[0], config.nodes[1], config.nodes[2]):
            done = await one.store.repairer.repair(node.name, lambda m: None)
            assert done["shards_rebuilt"] == 0
        assert await one.get("f") == data


@pytest.mark.expects_log(CORRUPT)
async def test_different_blocks_of_all_shards_may_rot(config: StoreConfig) -> None:
    data = random.Random(9).randbytes(1 << 20)
    async with opened(config) as one:
        await one.put("f", data)
    async with opened(config) as one:
        ((key, value),) = one.rows(b"S")
        number, row = stripe_rows.decode_stripe_key(key), Stripe.decode(value)
        for index in range(3):
            flip(config, one, number, row, index, index * 100_000)
        assert await one.get("f") == data


@pytest.mark.expects_log(CORRUPT, LOST_STRIPE)
async def test_more_rot_than_the_code_allows_is_an_error_and_no_byte(config: StoreConfig) -> None:
    async with opened(config) as one:
        await one.put("f", random.Random(10).randbytes(1 << 20))
    async with opened(config) as one:
        ((key, value),) = one.rows(b"S")
        number, row = stripe_rows.decode_stripe_key(key), Stripe.decode(value)
        for index in range(2):
            flip(config, one, number, row, index, 5)
        with pytest.raises(LostError):
            await one.get("f")


# --- metadata dumps ------------------------------------------------------------------


@pytest.mark.parametrize("node", range(3))
async def test_a_metadata_dump_and_the_commits_after_it_are_the_state(
    config: StoreConfig, node: int
) -> None:
    async with opened(config) as one:
        for i in range(400):
            await one.put(f"f{i}", b"%d" % i)
        await one.store.committer.commit()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.store.dumper.take)
            for i in range(200):
                if i % 3 == 0:
                    one.delete(f"f{i}")
                else:
                    await one.put(f"f{i}", b"changed %d" % i)
                await trio.lowlevel.checkpoint()
        await one.files.removal.removed()  # else it goes on after the commit
        await one.put("last", b"last")
        await one.store.committer.commit()
        state = {
            key: value
            for key, value in one.store.log.engine.scan(b"A", b"[")
            if key != store_rows.LOG_KEY
        }
        path = config.nodes[node].path
        place = Place(config.uuid, config.nodes[node].name, SegmentKind.JOURNAL, 0)
        loaded: dict[bytes, bytes | None] = {}
        commits: list[tuple[int, dict[bytes, bytes | None]]] = []
        begin = None
        for file in sorted((path / "journal").iterdir()):
            segment = int(file.name.split(".")[0])
            for _, header, payload in records(replace(place, segment=segment), file.read_bytes()):
                if header.kind is Kind.METADATA_DUMP:
                    begin = header.number
                    loaded.update(decode_changes(payload))
                else:
                    commits.append((header.number, dict(decode_commit(header, payload).changes)))
        assert begin is not None
        for number, changes in sorted(commits):
            if number > begin:
                loaded.update(changes)
        found = {k: v for k, v in loaded.items() if v is not None and k != store_rows.LOG_KEY}
        assert found == state


async def test_a_metadata_dump_is_no_reason_for_the_next(config: StoreConfig) -> None:
    config = limited(config, dump_journal_bytes_min=100_000)
    async with opened(config) as one:
        dumper = one.store.dumper
        for i in range(3000):
            await one.put(f"f{i}", b"%d" % i)
        await one.store.committer.commit()
        with trio.fail_after(20):
            while dumper.last_bytes < 100_000:
                await trio.testing.wait_all_tasks_blocked(0.05)
        await trio.testing.wait_all_tasks_blocked(0.05)
        taken = dumper.first_segment
        for i in range(20):
            await one.put("small", b"%d" % i)
            await one.store.committer.commit()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert dumper.first_segment == taken
    async with opened(config) as one:  # nor is it after a mount
        await one.put("small", b"last")
        await one.store.committer.commit()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert one.store.dumper.first_segment == taken
        for i in range(6000):
            await one.put(f"g{i}", b"%d" % i)
        await one.store.committer.commit()
        with trio.fail_after(20):
            while one.store.dumper.first_segment == taken:
                await trio.testing.wait_all_tasks_blocked(0.05)


@pytest.mark.expects_log(OUT_OF_USE)
async def test_an_interrupted_repair_is_no_repair(config: StoreConfig) -> None:
    data = random.Random(11).randbytes(20 << 20)
    async with opened(config) as one:
        await one.put("f", data)
        await one.store.committer.commit()
        shutil.rmtree(config.nodes[0].path)
        with trio.CancelScope() as scope:

            def first(message: dict[str, object]) -> None:
                if message["phase"] == "shards" and message["done"]:
                    scope.cancel()

            await one.store.repairer.repair(REGIONS[0], first)
        assert scope.cancelled_caught
        assert (await one.store.status())["nodes"][0]["state"] in ("suspect", "down")
        assert (await one.store.status())["healthy"] is False
    for _ in range(2):
        async with opened(config) as one:
            assert (await one.store.status())["healthy"] is False or one.rows(b"M") == []
            with trio.fail_after(20):
                while not (await one.store.status())["healthy"]:
                    one.store.comeback.wake()
                    await trio.sleep(0.05)
    shutil.rmtree(config.nodes[1].path)
    async with opened(config) as one:
        assert await one.get("f") == data


async def test_a_commit_is_not_cancelled_half_way(config: StoreConfig, tmp_path: Path) -> None:
    async with opened(config) as one:
        for i in range(30):
            await one.put(f"f{i}", b"%d" % i * 1000)
            async with trio.open_nursery() as nursery:

                async def commit() -> None:
                    async with one.store.committer.lock:
                        await one.store.committer.commit_now()

                nursery.start_soon(commit)
                for _ in range(i % 5):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        await one.store.committer.commit()
        crash = crashed(config, tmp_path / "crash")
    async with opened(crash) as one:
        for i in range(30):
            assert await one.get(f"f{i}") == b"%d" % i * 1000
        one.check_counters()


async def test_a_file_a_thousand_directories_deep(config: StoreConfig) -> None:
    async with opened(config) as one:
        tree, place = one.files.tree, int(ROOT)
        for _ in range(3000):
            place, _ = tree.make(place, b"d", stat.S_IFDIR | 0o755, 0, 0)
        ino, inode = tree.make(place, b"f", stat.S_IFREG | 0o644, 0, 0)
        assert (inode.k, inode.m) == (2, 1)
        tree.codes.set(int(ROOT), Code(1, 2))
        _, inode = tree.make(place, b"g", stat.S_IFREG | 0o644, 0, 0)
        assert (inode.k, inode.m) == (1, 2)
        assert tree.codes.of(ino) == Code(2, 1)


async def test_what_a_node_that_is_away_had_not_flushed_is_rebuilt(
    config: StoreConfig, tmp_path: Path
) -> None:
    data = random.Random(12).randbytes(3 << 20)
    async with opened(config) as one:
        await one.put("a", b"a")
        await one.store.committer.commit()
        await one.put("f", data)
        await one.store.committer.commit()
        crash = crashed(config, tmp_path / "crash")
    # The crash came before the second node flushed anything of the last commit,
    # and then the node is away for a while.
    node = crash.nodes[1].path
    journal = sorted((node / "journal").iterdir())[-1]
    journal.write_bytes(journal.read_bytes().rstrip(b"\0")[:-64])
    for segment in (node / "shards").iterdir():
        segment.unlink()
    node.rename(tmp_path / "away")
    async with opened(crash) as one:
        assert await one.get("f") == data
    (tmp_path / "away").rename(node)
    async with opened(crash) as one:
        with trio.fail_after(20):
            while not (await one.store.status())["healthy"]:
                one.store.comeback.wake()
                await trio.sleep(0.05)
    await loses_a_region(crash, 0, {"f": data})


# --- nodes that fail twice, and crashes at the very beginning ---------------------------


@pytest.mark.expects_log(AS_TOLD, OUT_OF_USE)
async def test_a_node_that_fails_while_it_comes_back_is_owed_all_again(
    config: StoreConfig,
) -> None:
    files = {name: random.Random(name).randbytes(2 << 20) for name in ("a", "b", "c")}
    async with opened(config, faults=True) as one:
        member = one.store.log.members.all[0]
        await one.put("a", files["a"])
        await one.store.committer.commit()
        member.fail(NodeError("It failed."))
        await one.put("b", files["b"])
        await one.store.committer.commit()
        # It comes back, is given shards, and fails again before they are flushed.
        faulty = FaultyNode(open_node(config, config.nodes[0]))
        async with one.store.healer.busy:
            await one.store.rejoin.enter(member, faulty)
            await one.put("c", files["c"])
            await trio.testing.wait_all_tasks_blocked(0.1)
            faulty.fail_at = 0
            await one.store.committer.commit()
            assert member.out_of_use
            assert len(one.rows(b"M")) == 4
        for segment in member.shards.dirty | {member.shards.current}:
            (config.nodes[0].path / segment_path(SegmentKind.SHARDS, segment)).unlink(
                missing_ok=True
            )
    async with opened(config) as one:
        with trio.fail_after(20):
            while not (await one.store.status())["healthy"]:
                one.store.comeback.wake()
                await trio.sleep(0.05)
    await loses_a_region(config, 1, files)


@pytest.mark.expects_log(OUT_OF_USE)
async def test_repair_sees_segments_that_were_deleted_under_it(config: StoreConfig) -> None:
    data = random.Random(20).randbytes(5 << 20)
    async with opened(config) as one:
        await one.put("f", data)
        await one.store.committer.commit()
        for segment in (config.nodes[0].path / "shards").iterdir():
            segment.unlink()
        done = await one.store.repairer.repair(REGIONS[0], lambda m: None)
        assert done["shards_rebuilt"] == 5
    await loses_a_region(config, 1, {"f": data})


@pytest.mark.parametrize("mounted", [False, True])
@pytest.mark.expects_log(OUT_OF_USE)
async def test_lost_segments_are_rebuilt_without_being_asked(
    config: StoreConfig, mounted: bool
) -> None:
    data = random.Random(21).randbytes(5 << 20)
    async with opened(config) as one:
        await one.put("f", data)
        await one.store.committer.commit()
        if mounted:
            for segment in (config.nodes[0].path / "shards").iterdir():
                segment.unlink()
            await one.put("g", data)
            await one.store.committer.commit()
    if not mounted:
        for segment in (config.nodes[0].path / "shards").iterdir():
            segment.unlink()
    async with opened(config) as one:
        with trio.fail_after(20):
            while (
                not (await one.store.status())["healthy"]
                or one.store.log.members.all[0].shards.lost
            ):
                one.store.comeback.wake()
                await trio.sleep(0.05)
    await loses_a_region(config, 1, {"f": data})


@pytest.mark.expects_log(AS_TOLD, r"write\.sealer: .* What is written has fewer shards until")
@pytest.mark.parametrize("healed", [False, True])
async def test_a_shortage_that_is_healed_is_no_error_any_more(
    config: StoreConfig, healed: bool
) -> None:
    """A disk was full for a moment; the next fsync says so only if shards are still missing."""
    async with opened(config, faults=True) as one:
        member = one.store.log.members.all[0]
        faulty = member.node
        assert isinstance(faulty, FaultyNode)
        faulty.fail_at, faulty.full, faulty.for_good = faulty.operations + 1, True, False
        await one.put("f", random.Random(7).randbytes(3 << 20))
        await one.store.writer.sealer.idle()
        faulty.fail_at = None
        if healed:
            await one.store.committer.commit()
            await one.store.healer.heal(member)
            await one.files.commit()
        else:
            with pytest.raises(ShortageError):
                await one.files.commit()
        await one.files.commit()


@pytest.mark.expects_log(OUT_OF_USE)
async def test_a_rebuild_that_fails_keeps_no_room(config: StoreConfig) -> None:
    path = config.nodes[0].path
    async with opened(config, faults=True) as one:
        member = one.store.log.members.all[0]
        member.fail(NodeError("It failed."))
        await one.put("f", random.Random(22).randbytes(5 << 20))
        await one.store.committer.commit()
        faulty = FaultyNode(open_node(config, config.nodes[0]))
        async with one.store.healer.busy:
            await one.store.rejoin.enter(member, faulty)
            faulty.fail_at, faulty.for_good = faulty.operations + 3, False
            with pytest.raises(NodeError):
                await one.store.healer.heal(member)
            faulty.fail_at = None
            await one.store.healer.heal(member)
            await one.store.rejoin.join(member, lambda m: None)
        assert (await one.store.status())["healthy"] is True
        one.delete("f")
        with trio.fail_after(20):
            while list((path / "shards").iterdir()):
                async with one.store.committer.lock:
                    await one.store.committer.commit_now(checkpoint=True)
                await trio.sleep(0.05)


@pytest.mark.expects_log(OUT_OF_USE)
async def test_a_node_that_fails_while_it_joins_does_not_join(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of its journal is copied, and a shard that is written meanwhile fails."""
    async with opened(config) as one:
        member = one.store.log.members.all[0]
        data = random.Random(23).randbytes(3 << 20)
        await one.put("f", data)
        await one.store.committer.commit()
        member.fail(NodeError("It failed."))
        await one.store.committer.commit()
        copies = one.store.rejoin._copied

        async def fails(*arguments: Any) -> Any:
            copied = await copies(*arguments)
            if member.standing.state is State.REBUILDING and one.store.committer.lock.locked():
                member.fail(NodeError("It failed again."))
            return copied

        monkeypatch.setattr(one.store.rejoin, "_copied", fails)
        with pytest.raises(NodeError, match="It failed again"):
            await one.store.repairer.repair(REGIONS[0], lambda progress: None)
        assert member.out_of_use
        monkeypatch.setattr(one.store.rejoin, "_copied", copies)
        await one.store.repairer.repair(REGIONS[0], lambda progress: None)
        assert (await one.store.status())["healthy"] is True
    await loses_a_region(config, 1, {"f": data})


async def test_a_crash_during_the_first_mount_is_a_crash(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[StoreConfig] = []
    checkpoint = Checkpointer.write

    async def copy_first(self: Checkpointer) -> None:
        copies.append(crashed(config, tmp_path / f"copy{len(copies)}"))
        await checkpoint(self)
        copies.append(crashed(config, tmp_path / f"copy{len(copies)}"))

    monkeypatch.setattr(Checkpointer, "write", copy_first)
    async with opened(config):
        pass
    monkeypatch.setattr(Checkpointer, "write", checkpoint)
    assert any((copy.nodes[0].path / "journal").iterdir() for copy in copies)
    for copy in copies:
        async with opened(copy) as one:
            await one.put("f", b"bytes")
        async with opened(copy) as one:
            assert await one.get("f") == b"bytes"


async def test_a_shard_on_its_way_is_not_cut_off(config: StoreConfig) -> None:
    """A rebuild ends in a full segment that a seal still writes its last shard to."""
    files = {name: random.Random(name).randbytes(1 << 20) for name in ("a", "b")}
    async with opened(config) as one:
        await one.put("a", files["a"])
        await one.store.committer.commit()
        member = one.store.log.members.all[0]
        ((key, value),) = one.rows(b"S")
        number, row = stripe_rows.decode_stripe_key(key), Stripe.decode(value)
        index = next(i for i, place in enumerate(row.shards) if place.node == member.id)
        gate = threading.Event()
        slow = SlowNode(member.node, gate, row.shards[index].offset)
        member.node = slow
        one.store.log.apply({stripe_rows.missing_key(member.id, number, index): b""})
        await one.put("b", files["b"])
        member.shards.roll()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.store.healer.heal, member)
            await trio.testing.wait_all_tasks_blocked(0.2)
            gate.set()
        await one.store.committer.commit()
        assert one.rows(b"M") == []
    await loses_a_region(config, 1, files)


@pytest.mark.expects_log(OUT_OF_USE, CHECKPOINT_FAILED)
async def test_a_full_metadata_disk_hangs_no_sync(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Engine.write

    def full(self: Engine) -> None:
        raise MetadataError("The metadata's disk is full.")

    async with opened(config) as one:
        await one.put("a", b"a")
        await one.store.committer.commit()
        monkeypatch.setattr(Engine, "write", full)
        with trio.fail_after(20):
            one.store.log.members.all[0].fail(NodeError("It failed."))
            await one.put("b", b"b")
            for _ in range(2):  # the loss of the node cannot be noted: no success
                with pytest.raises(NotDurableError):
                    await one.store.committer.commit()
            with pytest.raises(NoSpaceError):
                await one.put("c", b"c")
            one.delete("a")
            monkeypatch.setattr(Engine, "write", write)
            await one.store.committer.commit()
            await one.put("c", b"c")
            await one.store.committer.commit()
    async with opened(config) as one:
        assert await one.get("b") == b"b"
        assert await one.get("c") == b"c"
        assert one.files.tree.lookup(ROOT, b"a") is None


@pytest.mark.expects_log(CHECKPOINT_FAILED)
@pytest.mark.parametrize("reason", ["No space left on device", "Input/output error"])
async def test_a_metadata_disk_that_fails_stops_nothing_until_much_waits_in_memory(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str
) -> None:
    write, files = Engine.write, {}

    def fail(self: Engine) -> None:
        raise MetadataError(f"The metadata cannot be written: {reason}.")

    async with opened(limited(config, unwritten_bytes_max=3 << 20)) as one:
        log = one.store.log
        monkeypatch.setattr(Engine, "write", fail)
        with pytest.raises(NotDurableError):
            await one.checkpoint()
        refused = None
        for number in range(100):
            data = random.Random(number).randbytes(1 << 20)
            assert log.usable()[1] > 0
            try:
                await one.put(f"f{number}", data)
            except NoSpaceError as error:
                refused = error
                break
            await one.store.committer.commit()
            files[f"f{number}"] = data
        assert len(files) > 10  # it went on
        assert refused is not None
        assert reason in str(refused)
        assert log.usable()[1] == 0
        assert log.room.growth_unwritten < 4 << 20
        one.delete("f0")  # this never grows
        crash = crashed(config, tmp_path / "crash")
        monkeypatch.setattr(Engine, "write", write)
        await one.checkpoint()
        assert log.usable()[1] > 0
        await one.put("after", b"after")
        await one.store.committer.commit()
    async with opened(crash) as one:  # all is in the journals
        for name, data in files.items():
            assert await one.get(name) == data
    async with opened(config) as one:
        assert await one.get("after") == b"after"


@pytest.mark.expects_log(AS_TOLD)
async def test_a_place_that_a_failed_node_did_not_take_is_not_counted(
    config: StoreConfig, tmp_path: Path
) -> None:
    async with opened(config, faults=True) as one:
        await one.put("a", b"a")
        await one.store.committer.commit()
        node = one.store.log.members.all[0].node
        assert isinstance(node, FaultyNode)
        node.fail_at = node.operations + 1
        await one.put("f", random.Random(30).randbytes(3 << 20))
        await one.store.committer.commit()
        crash = crashed(config, tmp_path / "crash")
    for _ in range(2):
        done = await offline(crash, FsckRequest(), lambda message: None)
        assert done.findings == ()
        async with opened(crash) as one:
            assert one.store.log.members.all[0].shards.lost == set()


# --- the short way of small commits ------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "survives"),
    [
        (100, True),  # a short write: written again
        (-errno.EAGAIN, True),
        (-errno.EINVAL, True),
        (-errno.EIO, False),  # never asked again
        (-errno.ENOSPC, False),
    ],
)
@pytest.mark.expects_log(OUT_OF_USE)
async def test_a_small_commit_that_fails_on_the_short_way(
    config: StoreConfig,
    monkeypatch: pytest.MonkeyPatch,
    fault: int,
    survives: bool,
) -> None:
    real, taken = Ring.start, 0

    def start(self: Ring, operations: Sequence[Operation], keep: object) -> Batch | None:
        nonlocal taken
        batch = real(self, operations, keep)
        if batch is not None and len(operations) == 3:
            taken += 1
            wait = self.wait_shielded

            async def waited(waited_for: Batch) -> None:
                await wait(waited_for)
                if waited_for is batch:
                    waited_for.results[1] = fault

            if batch.left:
                monkeypatch.setattr(self, "wait_shielded", waited)
            else:
                batch.results[1] = fault
        return batch

    async with opened(config) as one:
        if one.store.log.members.all[0].ring is None:
            pytest.skip("this kernel offers no io_uring")
        await one.put("a", b"before")
        await one.store.committer.commit()
        monkeypatch.setattr(Ring, "start", start)
        for turn in range(20):
            await one.put("a", b"turn %d" % turn)
            await one.store.committer.commit()
            if taken:
                break
        assert taken == 1
        assert one.store.log.members.all[1].in_sync is survives
        monkeypatch.undo()
        crash = crashed(config, config.store.with_name("crash"))
    shutil.rmtree(crash.nodes[0].path if survives else crash.nodes[1].path)
    async with opened(crash) as one:
        assert await one.get("a") == b"turn %d" % turn


@pytest.mark.expects_log(OUT_OF_USE)
async def test_a_small_commit_on_a_node_whose_journal_was_deleted(config: StoreConfig) -> None:
    async with opened(config) as one:
        await one.put("a", b"before")
        await one.store.committer.commit()
        await one.put("a", b"small")
        await one.store.committer.commit()
        for file in (config.nodes[0].path / "journal").iterdir():
            file.unlink()
        await one.put("a", b"after")
        await one.store.committer.commit()
        assert not one.store.log.members.all[0].in_sync


async def test_those_who_ask_during_a_commit_share_the_next(config: StoreConfig) -> None:
    async with opened(config) as one:
        committer = one.store.committer
        before = committer.commits.count
        async with trio.open_nursery() as nursery:
            for i in range(20):
                await one.put(f"f{i}", b"x" * i)
                nursery.start_soon(committer.commit)
        assert committer.commits.count - before <= 3
        crash = crashed(config, config.store.with_name("crash"))
    async with opened(crash) as one:
        for i in range(20):
            assert await one.get(f"f{i}") == b"x" * i


async def test_nothing_is_acknowledged_after_a_commit_that_met_a_bug(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: JournalWriter, *args: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as ended:
        async with opened(config) as one:
            await one.put("kept", b"kept")
            await one.store.committer.commit()
            await one.put("lost", b"lost")
            with monkeypatch.context() as patch:
                patch.setattr(JournalWriter, "append", fail)
                with pytest.raises(ZeroDivisionError):
                    await one.store.committer.commit()
            with pytest.raises(NotDurableError, match="mount the store again"):
                await one.store.committer.commit()
    assert ended.group_contains(NotDurableError)  # nor was it when the store was closed
    async with opened(config) as one:
        assert await one.get("kept") == b"kept"
        assert one.files.tree.lookup(ROOT, b"lost") is None
