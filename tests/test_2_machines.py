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

from fusestore.config.mkfs import make_store
from fusestore.config.owner_record import OWNER_BYTES, OWNER_NAME, Mount, read_owner
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import NodeError, NotDurableError, ReadOnlyError, StoreBusyError
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
        place.write_bytes(b"format = 2\n")


@pytest.mark.expects_log("owner", "out of use", "take_over")
@pytest.mark.parametrize("kind", ["garbage", "empty", "huge", "link", "fifo", "keys", "newer"])
async def test_a_damaged_record_costs_its_node_until_somebody_decides(
    config: StoreConfig, machines: Machines, kind: str
) -> None:
    await begun(config)
    planted(kind, config.nodes[1].path / OWNER_NAME)
    async with opened(config) as one:
        assert await one.get("base") == b"base" * 10_000
        assert [m.out_of_use for m in one.store.log.members.all] == [False, True, False]
        await one.put("f", b"one" * 10_000)
        await one.store.committer.commit()
    async with opened(config, take_over=True) as one:
        await healthy(one)
        assert await one.get("f") == b"one" * 10_000
    async with opened(config) as one:
        assert [m.out_of_use for m in one.store.log.members.all] == [False, False, False]


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
