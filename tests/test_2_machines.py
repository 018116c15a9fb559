"""One owner, where locks do not reach: machines that share the directories of the nodes.

Both are this process: each has an identity of its own, and no lock of one is seen by the
other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from xxhash import xxh3_64_hexdigest

from fusestore.config.mkfs import make_store
from fusestore.config.owner_record import OWNER_BYTES, OWNER_NAME, Mount, read_owner
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import (
    FusestoreError,
    NodeError,
    NotDurableError,
    ReadOnlyError,
    StoreBusyError,
    UnreadOwnerError,
)
from fusestore.format.erasure import Code
from fusestore.format.records import SegmentKind
from fusestore.nodes.directory import DirectoryNode
from fusestore.nodes.ownership import Ownership
from fusestore.rescue.recover import recover
from fusestore.store.claims import Claims
from fusestore.store.opening import open_store
from fusestore.system import linux, locks
from fusestore.system.beneath import Directory
from fusestore.system.machine import Process
from support.faults import BadSectors
from support.opened_store import Opened, crashed, healthy, opened, repair

BY_ANOTHER = "is in use on another machine, by process .* of two, since .*-o take_over"
TAKEN_OVER = "was taken over by process .* of two, since"
fenced = pytest.mark.expects_log(f"ERROR fusestore.members.member: .*{TAKEN_OVER}")


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    """A store whose regions lie beside it."""
    regions = [(name, tmp_path / "regions" / name) for name in ("a", "b", "c")]
    (tmp_path / "regions").mkdir()
    return make_store(tmp_path / "store", regions, Code(2, 1))


class Machines:
    """Which machine this process is now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = Process.current()
        self.process = self._real
        monkeypatch.setattr(Process, "current", lambda: self.process)
        nobody = locks.Lock(None)
        monkeypatch.setattr(DirectoryNode, "_locked", lambda *args, **kinds: nobody)
        self.be("one")

    def be(self, name: str, boot: str = "") -> None:
        """Be the machine of this name from now on."""
        self.process = replace(self._real, machine=name, host=name, boot=boot or f"boot {name}")


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Two machines whose locks do not reach each other."""
    return Machines(monkeypatch)


def copy_of(config: StoreConfig, name: str = "copy") -> StoreConfig:
    """A copy of the store's directory, which names the same regions."""
    place = config.store.with_name(name)
    shutil.copytree(config.store, place, ignore=shutil.ignore_patterns("*.sock"))
    return load(place)


async def begun(config: StoreConfig) -> None:
    """The store was used once, and has ended."""
    async with opened(config) as one:
        await one.put("base", b"base" * 10_000)


async def refused(config: StoreConfig, *, read_only: bool = False) -> None:
    with pytest.raises(StoreBusyError, match=BY_ANOTHER.replace("two", "one")):
        async with open_store(config, read_only=read_only):
            pass


async def test_another_machine_is_refused_and_writes_nothing(
    config: StoreConfig, machines: Machines
) -> None:
    await begun(config)
    copy = copy_of(config)
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
        await one.store.committer.commit()
        before = [(node.path / OWNER_NAME).read_bytes() for node in config.nodes]
        machines.be("two")
        await refused(copy)
        assert before == [(node.path / OWNER_NAME).read_bytes() for node in config.nodes]
        await one.put("g", b"two" * 10_000)
        await one.store.committer.commit()
    async with opened(copy) as two:
        assert await two.get("f") == b"one" * 10_000
        assert await two.get("g") == b"two" * 10_000


@pytest.mark.expects_log(
    "WARNING fusestore.store.claims: .*of one, since .* This mount only reads",
    "WARNING fusestore.rescue.recover_nodes: .*of one, since .* is not recovered",
)
async def test_who_writes_to_no_node_is_warned(config: StoreConfig, machines: Machines) -> None:
    await begun(config)
    copy = copy_of(config)
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
        await one.store.committer.commit()
        machines.be("two")
        async with open_store(copy, read_only=True):
            pass
        shutil.rmtree(copy.metadata)
        recover(copy.store, (), None, accept_loss=False, progress=lambda message: None)
        await refused(copy)
        await one.put("g", b"two" * 10_000)
        await one.store.committer.commit()


async def small(one: Opened) -> None:
    """A commit that goes the short way, if there is one."""
    await one.put("f", b"small")
    await one.store.committer.commit()


async def large(one: Opened) -> None:
    await one.put("large", os.urandom(3 << 20))
    await one.store.committer.commit()


async def checkpoint(one: Opened) -> None:
    await one.put("f", b"checkpoint")
    await one.checkpoint()


async def idle(one: Opened) -> None:
    """Nothing is asked of it: it looks after its nodes."""
    one.store.comeback.wake()
    with trio.fail_after(30):
        while not one.store.log.broken:  # noqa: ASYNC110
            await trio.sleep(0.01)
    await one.store.committer.commit()


@fenced
@pytest.mark.parametrize("act", [small, large, checkpoint, idle])
@pytest.mark.parametrize("where", ["local", "network"])
@pytest.mark.parametrize("nodes", [("a", "b", "c"), ("b",)], ids=["all", "one node"])
async def test_who_was_taken_over_acknowledges_nothing(
    config: StoreConfig,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Opened], object],
    where: str,
    nodes: tuple[str, ...],
) -> None:
    if where == "network":
        monkeypatch.setattr(linux, "is_local", lambda descriptor: False)
    await begun(config)
    copy = copy_of(config)
    if len(nodes) == 1:  # the other machine sees the others' copies only
        places = tuple(
            node if node.name in nodes else replace(node, path=copy.store / f"c-{node.name}")
            for node in copy.nodes
        )
        for node, place in zip(copy.nodes, places, strict=True):
            if node != place:
                shutil.copytree(node.path, place.path)
        copy = replace(copy, nodes=places)
    with pytest.raises(ExceptionGroup):
        async with opened(config) as one:
            await one.put("f", b"one" * 10_000)
            await one.store.committer.commit()
            await small(one)
            await small(one)
            machines.be("two")
            async with opened(copy, take_over=True) as two:
                if len(nodes) > 1:
                    assert (await two.get("f")).startswith(b"small")
                await two.put("two", b"2" * 100_000)
                await two.store.committer.commit()
                with pytest.raises((NotDurableError, ReadOnlyError), match=TAKEN_OVER):
                    await act(one)
                with pytest.raises(NotDurableError, match=TAKEN_OVER):
                    await one.store.committer.commit()
                assert not (await one.store.status())["healthy"]
                await two.put("more", b"3" * 100_000)
                await two.store.committer.commit()
    async with opened(copy) as two:
        assert await two.get("two") == b"2" * 100_000
        assert await two.get("more") == b"3" * 100_000
        await healthy(two)


@fenced
async def test_no_segment_is_made_changed_or_removed_by_who_was_taken_over(
    config: StoreConfig, machines: Machines
) -> None:
    await begun(config)
    with pytest.raises(ExceptionGroup):
        async with opened(config) as one:
            await large(one)
            machines.be("two")
            async with opened(copy_of(config), take_over=True):
                node = one.store.log.members.all[0].node
                shards = SegmentKind.SHARDS
                (last, *_) = reversed(node.segments(shards))
                for act in (
                    lambda: node.write(shards, last + 7, 0, [b"late"]),
                    lambda: node.replace(shards, last, b"late"),
                    lambda: node.replace(shards, last + 7, b"late"),
                    lambda: node.delete(shards, last),
                    lambda: node.set_aside(shards, last),
                    lambda: node.punch(last, 0, 1 << 20),
                    lambda: node.truncate(shards, last, 0),
                ):
                    with pytest.raises(NodeError, match=TAKEN_OVER):
                        act()
                await small_fails(one)


async def small_fails(one: Opened) -> None:
    with pytest.raises((NotDurableError, ReadOnlyError), match=TAKEN_OVER):
        await small(one)


@pytest.mark.expects_log("ERROR fusestore.members.member: .*another program has made it")
async def test_a_segment_that_another_made_is_not_written(
    config: StoreConfig, machines: Machines
) -> None:
    """Whoever made it: the node goes on in another segment."""
    await begun(config)
    async with opened(config) as one:
        member = one.store.log.members.all[0]
        place = config.nodes[0].path / "shards" / f"{member.shards.current:08d}.seg"
        place.write_bytes(b"not ours" * 1000)
        await one.put("f", b"f" * 3_000_000)
        await one.store.committer.commit()
        assert place.read_bytes() == b"not ours" * 1000
        await healthy(one)
        assert await one.get("f") == b"f" * 3_000_000


async def test_after_a_crash_the_same_machine_needs_no_option(
    config: StoreConfig, machines: Machines, tmp_path: Path
) -> None:
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
        await one.store.committer.commit()
        records = [(node.path / OWNER_NAME).read_bytes() for node in config.nodes]
    for boot in ("", "the next one"):
        for node, record in zip(config.nodes, records, strict=True):
            (node.path / OWNER_NAME).write_bytes(record)
        machines.be("one", boot)
        async with opened(config) as one:
            assert await one.get("f") == b"one" * 10_000
    # A machine that has no id, and another name now, but runs on.
    machines.process = replace(machines.process, machine="other", host="other")
    for node, record in zip(config.nodes, records, strict=True):
        (node.path / OWNER_NAME).write_bytes(record.replace(b"boot one", b"the next"))
    machines.process = replace(machines.process, boot="the next")
    async with opened(config) as one:
        assert await one.get("f") == b"one" * 10_000


async def test_a_copy_of_a_store_in_use_says_what_to_do(
    config: StoreConfig, machines: Machines, tmp_path: Path
) -> None:
    """A backup, or a snapshot of the disks, which another machine restores."""
    store = make_store(tmp_path / "s", [(name, None) for name in ("a", "b", "c")], Code(2, 1))
    async with opened(store) as one:
        await one.put("f", b"one" * 10_000)
        await one.store.committer.commit()
        copy = crashed(store, tmp_path / "backup")
        machines.be("two")
        await refused(copy)
        async with opened(copy, take_over=True) as two:
            assert await two.get("f") == b"one" * 10_000
        async with opened(copy) as two:
            assert await two.get("f") == b"one" * 10_000
        await one.store.committer.commit()


async def test_a_node_that_was_out_of_use_at_the_end_moves_with_the_others(
    config: StoreConfig, machines: Machines
) -> None:
    """Its own record says that the mount goes on; those of the others, that it has ended."""
    await begun(config)
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
        await one.store.committer.commit()
        record = (config.nodes[2].path / OWNER_NAME).read_bytes()
    (config.nodes[2].path / OWNER_NAME).write_bytes(record)
    machines.be("two")
    async with opened(config) as two:
        assert await two.get("f") == b"one" * 10_000


async def test_a_node_that_another_machine_owns_does_not_come_back(
    config: StoreConfig, machines: Machines, tmp_path: Path
) -> None:
    await begun(config)
    copy, away = copy_of(config), tmp_path / "away"
    nodes = []
    for node in copy.nodes[:2]:
        shutil.copytree(node.path, tmp_path / "copied" / node.name)
        nodes.append(replace(node, path=tmp_path / "copied" / node.name))
    copy = replace(copy, nodes=(*nodes, copy.nodes[2]))
    config.nodes[2].path.rename(away)
    async with opened(config) as one:
        away.rename(config.nodes[2].path)
        machines.be("two")
        async with opened(copy) as two:
            machines.be("one")
            member = one.store.log.members.all[2]
            for _ in range(3):
                member.standing._retry_at = 0.0
                await one.store.comeback.catch_up(None)
            assert member.out_of_use
            assert "another machine" in member.standing.error
            with pytest.raises(NodeError, match="another machine"):
                await repair(one, "c")
            await two.put("g", b"two" * 10_000)
            await two.store.committer.commit()
        await one.put("f", b"one" * 10_000)
        await one.store.committer.commit()


def planted(kind: str, place: Path) -> None:
    """Put something else in the place of an owner record."""
    place.unlink()
    if kind == "garbage":
        place.write_bytes(os.urandom(OWNER_BYTES))
    elif kind == "empty":
        place.write_bytes(b"")
    elif kind == "huge":
        with place.open("wb") as file:
            file.truncate(10 << 40)
    elif kind == "link":
        place.symlink_to("/etc/hostname")
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "keys":
        place.write_bytes(b"format = 1\nmount = 7\n")
    else:
        assert kind == "newer"
        body = b"format = 2\n"
        place.write_bytes(body + b"# checksum " + xxh3_64_hexdigest(body).encode() + b"\n")


def flipped(place: Path, bit: int) -> None:
    """Flip a bit of an owner record in place."""
    data = bytearray(place.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    with place.open("r+b", buffering=0) as file:
        file.write(data)


DAMAGED = ["garbage", "empty", "huge", "link", "fifo", "keys"]
IS_WRITTEN = r"WARNING fusestore.nodes.ownership: .*/owner\b.* It is written anew\."
is_written = pytest.mark.expects_log(IS_WRITTEN)


def all_open(one: Opened) -> bool:
    return not any(m.out_of_use for m in one.store.log.members.all)


@is_written
@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("end", ["ended", "crashed"])
async def test_a_damaged_record_says_nothing_if_others_can_be_read(
    config: StoreConfig, tmp_path: Path, machines: Machines, kind: str, end: str
) -> None:
    await begun(config)
    if end == "crashed":
        async with opened(config) as one:
            await one.put("f", b"one" * 10_000)
            await one.store.committer.commit()
            kept = {node.name: (node.path / OWNER_NAME).read_bytes() for node in config.nodes}
        for node in config.nodes:
            (node.path / OWNER_NAME).write_bytes(kept[node.name])
    planted(kind, config.nodes[1].path / OWNER_NAME)
    async with open_store(config, read_only=True):
        pass
    async with opened(config) as one:
        assert all_open(one)
        assert await one.get("base") == b"base" * 10_000
        await healthy(one)
    async with opened(config) as one:
        assert all_open(one)


@is_written
async def test_two_damaged_records_and_a_third_that_has_ended(
    config: StoreConfig, machines: Machines
) -> None:
    await begun(config)
    planted("garbage", config.nodes[0].path / OWNER_NAME)
    planted("empty", config.nodes[2].path / OWNER_NAME)
    async with opened(config) as one:
        assert all_open(one)
        await healthy(one)


@pytest.mark.expects_log("not valid TOML: .* out of use")
async def test_a_damaged_record_lets_nobody_in_while_another_machine_has_the_others(
    config: StoreConfig, machines: Machines
) -> None:
    await begun(config)
    copy = copy_of(config)
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
        await one.store.committer.commit()
        kept = (config.nodes[1].path / OWNER_NAME).read_bytes()
        (config.nodes[1].path / OWNER_NAME).write_bytes(b"garbage")
        machines.be("two")
        await refused(copy)
        assert (config.nodes[1].path / OWNER_NAME).read_bytes() == b"garbage"
        (config.nodes[1].path / OWNER_NAME).write_bytes(kept)


@pytest.mark.expects_log("owner", "out of use", "take_over", "cannot be mounted")
@pytest.mark.parametrize("kind", [*DAMAGED, "newer"])
async def test_only_damaged_records_need_somebody_to_decide(
    config: StoreConfig, machines: Machines, kind: str
) -> None:
    await begun(config)
    for node in config.nodes:
        planted(kind, node.path / OWNER_NAME)
    with pytest.raises(FusestoreError, match="mount once with -o take_over"):
        async with opened(config):
            pass
    async with opened(config, take_over=True) as one:
        await healthy(one)
        assert await one.get("base") == b"base" * 10_000
    async with opened(config) as one:
        assert all_open(one)


@pytest.mark.expects_log("owner", "out of use", "take_over")
async def test_a_record_of_another_version_costs_its_node_until_somebody_decides(
    config: StoreConfig, machines: Machines
) -> None:
    await begun(config)
    planted("newer", config.nodes[1].path / OWNER_NAME)
    async with opened(config) as one:
        assert [m.out_of_use for m in one.store.log.members.all] == [False, True, False]
    async with opened(config, take_over=True) as one:
        await healthy(one)
    async with opened(config) as one:
        assert all_open(one)


@is_written
@pytest.mark.parametrize("kind", [*DAMAGED, "a bit", "unreadable"])
@pytest.mark.parametrize("nodes", [1, 3])
async def test_a_mount_writes_its_own_record_anew(
    config: StoreConfig, kind: str, nodes: int
) -> None:
    """Its lock keeps out everybody else."""
    await begun(config)
    with BadSectors() as bad:
        await rewrites(config, kind, nodes, bad)
    for node in config.nodes:
        record = read_owner(Directory.at(node.path), node.path)
        assert record is not None
        assert record.ended


async def rewrites(config: StoreConfig, kind: str, nodes: int, bad: BadSectors) -> None:
    """The records of some nodes are damaged while the store is open, and written anew."""
    async with opened(config) as one:
        await small(one)
        for node in config.nodes[:nodes]:
            place = node.path / OWNER_NAME
            if kind == "a bit":
                flipped(place, 8 * place.read_bytes().index(b"mount") + 80)
            elif kind == "unreadable":
                bad.add(place, 0, OWNER_BYTES)
            else:
                planted(kind, place)
        for act in (large, checkpoint, small):
            await act(one)
        assert all_open(one)
        assert all(m.standing.in_sync for m in one.store.log.members.all)
        for member in one.store.log.members.all:
            await one.store.log.members.all[0].call(member.node.check)


@pytest.mark.expects_log("out of use", IS_WRITTEN)
async def test_on_a_network_file_system_the_node_is_brought_back(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine may be writing the record at this moment."""
    monkeypatch.setattr(linux, "is_local", lambda descriptor: False)
    await begun(config)
    async with opened(config) as one:
        await small(one)
        planted("garbage", config.nodes[1].path / OWNER_NAME)
        await large(one)
        assert [m.out_of_use for m in one.store.log.members.all] == [False, True, False]
        await healthy(one)


@is_written
async def test_a_repair_replaces_a_damaged_record(config: StoreConfig) -> None:
    await begun(config)
    away = config.nodes[1].path.rename(config.store / "away")
    async with opened(config) as one:
        await one.put("f", b"one" * 10_000)
        await one.store.committer.commit()
        planted("garbage", away / OWNER_NAME)
        away.rename(config.nodes[1].path)
        await repair(one, "b")
        await healthy(one)


def test_no_flipped_bit_makes_another_record_of_one(tmp_path: Path) -> None:
    process = Process("1" * 32, "host", "b" * 36, 4_026_531_836, 812, 12_345)
    record = Mount("0" * 32, process, "2026-01-01 00:00:00 UTC", False).record(7)
    place, directory = tmp_path / OWNER_NAME, Directory.at(tmp_path)
    place.write_bytes(record.encode())
    for bit in range(8 * OWNER_BYTES):
        flipped(place, bit)
        try:
            found = read_owner(directory, tmp_path)
            assert found == record or not found.is_intact, bit
        except UnreadOwnerError:
            pass
        flipped(place, bit)
    early = b"\n".join(line for line in place.read_bytes().splitlines() if b"checksum" not in line)
    place.write_bytes(early.ljust(OWNER_BYTES, b"\n"))
    found = read_owner(directory, tmp_path)
    assert found == record
    assert found.is_intact


@is_written
async def test_a_flipped_bit_of_a_record_that_has_not_ended(
    config: StoreConfig, machines: Machines
) -> None:
    """After a crash and a boot, a record whose machine is damaged looks like another machine's."""
    await begun(config)
    async with opened(config) as one:
        await small(one)
        kept = {node: (node.path / OWNER_NAME).read_bytes() for node in config.nodes}
    machines.be("one", "the next boot")
    for number, (node, record) in enumerate(kept.items()):
        place = node.path / OWNER_NAME
        place.write_bytes(record)
        if number == 1:
            flipped(place, 8 * record.index(b"machine") + 8 * 11)
    async with opened(config) as one:
        assert all_open(one)
    for node, record in kept.items():
        place = node.path / OWNER_NAME
        place.write_bytes(record)
        flipped(place, 8 * record.index(b"machine") + 8 * 11)
    with pytest.raises(StoreBusyError, match="is in use on another machine"):
        async with opened(config):
            pass


async def test_a_record_that_somebody_removed_is_written_again(
    config: StoreConfig, machines: Machines
) -> None:
    await begun(config)
    async with opened(config) as one:
        for how in (small, large):
            (config.nodes[0].path / OWNER_NAME).unlink()
            await how(one)
            (config.nodes[1].path / OWNER_NAME).rename(config.nodes[1].path / "elsewhere")
            shutil.copy(config.nodes[1].path / "elsewhere", config.nodes[1].path / OWNER_NAME)
            await how(one)
        machines.be("two")
        await refused(copy_of(config))


@fenced
async def test_removing_the_record_lets_nobody_in_unseen(
    config: StoreConfig, machines: Machines
) -> None:
    """The other machine finds no record; the first finds another's, or none, before it says ok."""
    await begun(config)
    copy = copy_of(config)
    with pytest.raises(ExceptionGroup):
        async with opened(config) as one:
            await small(one)
            await small(one)
            for node in config.nodes:
                (node.path / OWNER_NAME).unlink()
            machines.be("two")
            async with opened(copy) as two:
                await small_fails(one)
                await small(two)


@pytest.mark.parametrize("when", ["in use", "ended"])
async def test_of_two_that_begin_at_once_one_is_refused(
    config: StoreConfig, machines: Machines, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """One has read all records; before it writes its own, the other begins, or even ends."""
    await begun(config)
    copy, real, used = copy_of(config), Claims.after_replay, contextlib.AsyncExitStack()

    async def after_replay(claims: Claims) -> None:
        monkeypatch.setattr(Claims, "after_replay", real)
        machines.be("two")
        two = await used.enter_async_context(opened(copy))
        await two.put("f", b"two" * 10_000)
        await two.store.committer.commit()
        if when == "ended":
            await used.aclose()
        machines.be("one")
        await real(claims)

    monkeypatch.setattr(Claims, "after_replay", after_replay)
    with pytest.raises(StoreBusyError, match="at the same time: try again"):
        async with opened(config):
            pass
    if when == "in use":
        await used.aclose()  # it commits
    async with opened(config) as one:
        assert await one.get("f") == b"two" * 10_000


async def test_a_mount_that_came_and_went_between_two_looks_is_noticed(
    config: StoreConfig, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record was not there at either look: its journal is."""
    await begun(config)
    copy, real, used = copy_of(config), Ownership.claim, [False]

    def claim(owner: Ownership) -> None:
        if not used[0]:
            used[0] = True
            path = config.nodes[0].path / "journal"
            last = max(path.iterdir())
            shutil.copy(last, path / f"{int(last.stem) + 1:08d}.log")
        real(owner)

    with monkeypatch.context() as patch:
        patch.setattr(Ownership, "claim", claim)
        with pytest.raises(StoreBusyError, match="at the same time: try again"):
            async with opened(copy):
                pass
    async with opened(config) as one:
        assert await one.get("base") == b"base" * 10_000


@fenced
async def test_two_that_write_their_records_at_once(
    config: StoreConfig, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has written some: the one that finds another's acknowledges nothing."""
    await begun(config)
    machines.be("two")
    other = Mount.begin(take_over=True)
    machines.be("one")
    real = DirectoryNode.claim

    def claim(node: DirectoryNode) -> None:
        real(node)
        if node.path.name == "b":
            (node.path / OWNER_NAME).write_bytes(other.record(1).encode())

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryNode, "claim", claim)
        patch.setattr(linux, "is_local", lambda descriptor: False)
        with pytest.raises((NotDurableError, ExceptionGroup)):
            async with opened(config):
                pass
    async with opened(config, take_over=True) as one:
        assert await one.get("base") == b"base" * 10_000


def test_a_record_is_one_sector_whatever_the_names(tmp_path: Path) -> None:
    process = Process("f" * 32, "h" * 64, "b" * 64, 2**63 - 1, 2**31, 2**63 - 1)
    record = Mount("0" * 32, process, "2026-01-01 00:00:00 UTC", False).record(2**64 - 1)
    for written in (record, replace(record, ended=True)):
        assert len(written.encode()) == OWNER_BYTES
        (tmp_path / OWNER_NAME).write_bytes(written.encode())
        for past_cache in (False, True):
            directory = Directory.at(tmp_path)
            assert read_owner(directory, tmp_path, past_cache=past_cache) == written


def test_a_process_is_known_to_run_while_it_does() -> None:
    mine = Process.current()
    assert mine.shares_machine(Process.current())
    assert not mine.sees_running(mine)
    pid = os.fork()
    if pid == 0:
        os.read(os.pipe()[0], 1)
        os._exit(0)
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    child = replace(mine, number=pid, started=int(stat[19]))
    assert mine.sees_running(child)
    assert not mine.sees_running(replace(child, started=child.started + 1))
    assert not mine.sees_running(replace(child, boot="another"))
    assert not mine.sees_running(replace(child, namespace=1))
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert not mine.sees_running(child)
