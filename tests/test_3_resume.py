"""A mount that became read-only goes on by itself when its nodes are back; nothing is for good."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from fusestore.config.store_config import StoreConfig
from fusestore.errors import (
    FencedError,
    FileSystemError,
    NodeError,
    NodeReadOnlyError,
    NotDurableError,
    ReadOnlyError,
)
from fusestore.members.standing import State
from fusestore.nodes.directory import DirectoryNode
from fusestore.repair.rejoin import Rejoin
from support.faults import FaultyNode
from support.logs import AS_TOLD, GONE, LOST_STRIPE, ONLY_READ, OUT_OF_USE, TOO_FEW_NODES
from support.opened_store import (
    Opened,
    crashed,
    healthy,
    limited,
    loses_a_region,
    make,
    opened,
)

pytestmark = pytest.mark.expects_log(AS_TOLD, GONE, OUT_OF_USE, TOO_FEW_NODES, LOST_STRIPE)

MIB = 1 << 20
RETRY_SECONDS = 0.05


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return limited(make(tmp_path / "store"), retry_seconds_min=RETRY_SECONDS, probe_seconds=0.2)


async def writable(one: Opened) -> None:
    """Wait until the mount is writable."""
    with trio.fail_after(30):
        log = one.store.log
        while log.broken or not log.members.can_store(log.code):  # noqa: ASYNC110
            await trio.sleep(0.01)


async def breaks(one: Opened) -> None:
    """Wait until the mount is read-only."""
    with trio.fail_after(30):
        while not one.store.log.broken:  # noqa: ASYNC110
            await trio.sleep(0.01)


class Away:
    """While it holds, nodes cannot be opened."""

    def __init__(self, patch: pytest.MonkeyPatch, names: set[str]) -> None:
        self.names = names
        for module in ("writing_again", "rejoin", "comeback"):
            where = f"fusestore.repair.{module}.open_node"
            patch.setattr(where, self._opener(where))

    def _opener(self, where: str) -> Callable[..., Any]:
        from fusestore.members.opening import open_node

        def opener(config: StoreConfig, node: Any, **named: Any) -> DirectoryNode:
            if node.name in self.names:
                raise NodeError(f"Node {node.name} is away.")
            return open_node(config, node, **named)

        return opener


# --- a scrub -------------------------------------------------------------------------


@pytest.mark.expects_log(r"The scrub is paused: ")
async def test_a_scrub_that_trouble_paused_continues_by_itself(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that a person paused does not."""
    config = limited(config, repair_batch=1, retry_seconds_max=2.0)
    async with opened(config) as one:
        for number in range(6):
            await one.put(f"f{number}", os.urandom(2 * MIB))
        await one.store.committer.commit()
        scrubber = one.store.scrubber
        away = Away(monkeypatch, {config.nodes[1].name, config.nodes[2].name})
        await scrubber.command("start", 20e6, wait=False, alone=False, progress=lambda m: None)
        for member in one.store.log.members.all[1:]:
            member.fail(NodeError("gone, as told"))
        await one.put("more", b"more")
        with suppress(NotDurableError):
            await one.store.committer.commit()
        await breaks(one)
        with trio.fail_after(30):
            while scrubber.scrub.state != "paused":  # noqa: ASYNC110
                await trio.sleep(0.01)
        await trio.sleep(0.5)
        assert scrubber.scrub.state == "paused"
        assert scrubber.scrub.problem
        away.names.clear()
        await writable(one)
        with trio.fail_after(30):
            while scrubber.scrub.state != "done":  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert scrubber.scrub.found == 0
        await scrubber.command("start", 20e6, wait=False, alone=False, progress=lambda m: None)
        await scrubber.command("pause", None, wait=False, alone=False, progress=lambda m: None)
        await trio.sleep(0.5)
        assert (scrubber.scrub.state, scrubber.scrub.problem) == ("paused", "")


# --- what is in memory ---------------------------------------------------------------


@pytest.mark.parametrize("failing", [2, 3])
@pytest.mark.parametrize("nth", range(1, 12))
async def test_what_was_written_before_the_failure_is_committed_after_it(
    config: StoreConfig, tmp_path: Path, nth: int, failing: int
) -> None:
    """Whichever operation of each node fails first, with whatever half-written commits."""
    chance = random.Random(f"{nth} {failing}")
    files: dict[str, bytes] = {}
    async with opened(config, faults=True) as one:
        for number in range(3):
            files[f"old{number}"] = chance.randbytes(chance.choice((100, 50_000, MIB)))
            await one.put(f"old{number}", files[f"old{number}"])
        await one.store.committer.commit()
        for member in one.store.log.members.all[:failing]:
            assert isinstance(member.node, FaultyNode)
            member.node.fail_at = member.node.operations + chance.randrange(1, nth + 1)
        for number in range(12):
            name, data = f"f{number % 5}", chance.randbytes(chance.choice((10, 40_000, 2 * MIB)))
            before = files.pop(name, b"")  # unknown if the mount is read-only for a moment
            with suppress(FileSystemError):
                await one.put(name, data)
                files[name] = data + before[len(data) :]
            with suppress(NotDurableError):
                await one.store.committer.commit()
        await writable(one)
        await one.store.committer.commit()
        for name, data in files.items():
            assert await one.get(name) == data
        crash = crashed(config, tmp_path / "crash")
        await healthy(one)
        one.check_counters()
        well = crashed(config, tmp_path / "well")
    for region in range(3):
        await loses_a_region(crashed(well, tmp_path / f"without{region}"), region, files)
    async with opened(crash) as one:
        for name, data in files.items():
            assert await one.get(name) == data


async def test_nothing_is_acknowledged_until_the_nodes_are_back(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Away(monkeypatch, set())
    async with opened(config, faults=True) as one:
        await one.put("old", b"o" * MIB)
        await one.store.committer.commit()
        for member in one.store.log.members.all[:2]:
            away.names.add(member.name)
            assert isinstance(member.node, FaultyNode)
            member.node.fail_at = 0
        await one.put("new", b"n" * MIB + b"n")
        with pytest.raises(NotDurableError):
            await one.store.committer.commit()
        for _ in range(3):
            await trio.sleep(2 * RETRY_SECONDS)
            with pytest.raises(NotDurableError):
                await one.store.committer.commit()
            with pytest.raises(ReadOnlyError):
                await one.put("more", b"")
        epoch = one.store.log.position.epoch
        away.names.clear()
        await writable(one)
        await one.store.committer.commit()
        assert one.store.log.position.epoch == epoch + 1
        assert await one.get("new") == b"n" * MIB + b"n"
        await healthy(one)
    await loses_a_region(config, 2, {"old": b"o" * MIB, "new": b"n" * MIB + b"n"})


async def test_regions_that_go_and_return_again_and_again(
    config: StoreConfig, tmp_path: Path
) -> None:
    files: dict[str, bytes] = {}
    async with opened(config) as one:
        for number in range(4):
            await one.put(f"{number}", b"%d" % number * MIB)
            files[f"{number}"] = b"%d" % number * MIB
            gone = config.nodes[number % 3], config.nodes[(number + 1) % 3]
            for node in gone:
                node.path.rename(tmp_path / node.name)
            await breaks(one)
            for node in gone:
                (tmp_path / node.name).rename(node.path)
            await writable(one)
        await one.store.committer.commit()
        await healthy(one)
        for name, data in files.items():
            assert await one.get(name) == data
    await loses_a_region(config, 0, files)


async def test_one_of_the_lost_nodes_is_enough(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a node that lacks commits: it gets them."""
    away = Away(monkeypatch, set())
    first, second = (node.name for node in config.nodes[:2])
    async with opened(config, faults=True) as one:
        member = one.store.log.members.named
        for lost in (first, second):
            away.names.add(lost)
            failed = member(lost)
            assert failed is not None
            assert isinstance(failed.node, FaultyNode)
            failed.node.fail_at = 0
            await one.put(f"without {lost}", b"x" * MIB)
            with suppress(NotDurableError):
                await one.store.committer.commit()
        assert one.store.log.broken
        away.names = {second}  # the first has missed a commit
        await writable(one)
        await one.store.committer.commit()
        away.names.clear()
        await healthy(one)
    files = {f"without {lost}": b"x" * MIB for lost in (first, second)}
    await loses_a_region(config, 2, files)


# --- one history ---------------------------------------------------------------------


async def test_another_daemon_that_took_the_nodes_meanwhile_is_noticed(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the store was mounted with these nodes: the mount does not go on with them."""
    away = Away(monkeypatch, set())
    copy = tmp_path / "copy"
    with suppress(ExceptionGroup):
        async with opened(config, faults=True) as one:
            await one.put("a", b"a")
            await one.checkpoint()
            for member in one.store.log.members.all:
                away.names.add(member.name)
                assert isinstance(member.node, FaultyNode)
                member.node.fail_at = 0
            await one.put("lost", b"l")
            with suppress(NotDurableError):
                await one.store.committer.commit()
            for member in one.store.log.members.all:
                member.let_go()
            other = crashed(config, copy)
            async with opened(other) as two:
                await two.put("b", b"b")
            for node in config.nodes:  # what the other daemon wrote there
                shutil.rmtree(node.path)
                shutil.copytree(copy / node.name, node.path)
            away.names.clear()
            await trio.sleep(10 * RETRY_SECONDS)
            assert one.store.log.broken
            with pytest.raises(NotDurableError):
                await one.store.committer.commit()


async def test_a_fenced_mount_does_not_go_on(config: StoreConfig) -> None:
    with pytest.raises(ExceptionGroup):
        async with opened(config) as one:
            one.store.log.break_(str(FencedError("Another daemon has it.")), for_good=True)
            await trio.sleep(10 * RETRY_SECONDS)
            with pytest.raises(NotDurableError, match="Another daemon"):
                await one.store.committer.commit()


# --- nodes that can only be read -----------------------------------------------------


@pytest.mark.expects_log(ONLY_READ)
@pytest.mark.parametrize("count", [1, 2, 3])
async def test_nodes_that_became_read_only_are_read_and_come_back(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    really, read_only = DirectoryNode.write, {node.name for node in config.nodes[:count]}
    opens = DirectoryNode.__init__

    def write(self: DirectoryNode, *arguments: Any) -> None:
        if self._name in read_only:
            raise NodeReadOnlyError(f"Node {self._name} cannot write: Read-only file system.")
        really(self, *arguments)

    def init(self: DirectoryNode, path: Path, identity: Any, **named: Any) -> None:
        if identity.node in read_only and not named.get("read_only"):
            raise NodeReadOnlyError(f"Node {identity.node} is read-only.")
        opens(self, path, identity, **named)

    async with opened(config) as one:
        await one.put("old", b"o" * MIB)
        await one.store.committer.commit()
        monkeypatch.setattr(DirectoryNode, "write", write)
        monkeypatch.setattr(DirectoryNode, "__init__", init)
        await one.put("new", b"n" * MIB)
        with suppress(NotDurableError):
            await one.store.committer.commit()
        assert bool(one.store.log.broken) == (count > 1)
        await trio.sleep(5 * RETRY_SECONDS)
        states = {member.name: member.state for member in one.store.log.members.all}
        assert {states[name] for name in read_only} == {State.BEHIND}
        third = config.nodes[2].path
        third.rename(third.with_name("hidden"))  # the others are enough
        assert await one.get("old") == b"o" * MIB
        third.with_name("hidden").rename(third)
        read_only.clear()
        await writable(one)
        await healthy(one)
        assert await one.get("new") == b"n" * MIB
    await loses_a_region(config, 1, {"old": b"o" * MIB, "new": b"n" * MIB})


# --- nodes that are taken offline meanwhile --------------------------------------------


@pytest.mark.parametrize("step", ["lineage", "enter", "copy_journal", "join"])
async def test_a_node_that_is_taken_offline_while_it_comes_back_stays_offline(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    name, path = config.nodes[1].name, config.nodes[1].path
    really, begun = getattr(Rejoin, step), trio.Event()

    async def slowly(*arguments: Any) -> Any:
        begun.set()
        await trio.sleep(0.3)
        return await really(*arguments)

    async with opened(config) as one:
        path.rename(path.with_name("away"))
        await one.put("new", b"n" * MIB)
        await one.store.committer.commit()
        member = one.store.log.members.all[1]
        assert member.out_of_use
        monkeypatch.setattr(Rejoin, step, slowly)
        path.with_name("away").rename(path)
        with trio.fail_after(30):
            await begun.wait()
        await one.store.topology.offline(name, force=False)
        for _ in range(20):
            assert member.out_of_use
            assert "is offline" in member.standing.error
            assert not member.is_open
            await trio.sleep(RETRY_SECONDS)
        monkeypatch.setattr(Rejoin, step, really)
        await one.store.topology.online(name)
        await healthy(one)
        assert await one.get("new") == b"n" * MIB
