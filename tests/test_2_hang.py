"""A node whose disk hangs stalls nobody for longer than its deadline, and comes back by itself."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from fusestore.config.mkfs import make_store
from fusestore.config.store_config import StoreConfig
from fusestore.errors import NodeError, NotDurableError
from fusestore.format.records import Place, SegmentKind, records
from fusestore.limits import STRIPE_BYTES
from fusestore.log.journal_copy import Copied, copy_journals
from fusestore.members import opening
from fusestore.nodes.base import Node
from fusestore.repair import comeback, rejoin
from fusestore.rescue.fsck import fsck
from support.faults import HangingNode
from support.logs import HUNG, METADATA_STALL, OUT_OF_USE, SLOW, WAITED_FOR
from support.opened_store import Opened, limited, opened

pytestmark = pytest.mark.expects_log(HUNG, METADATA_STALL, SLOW, WAITED_FOR)

DEADLINE = 0.6


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return limited(
        make_store(tmp_path / "store"),
        node_seconds_max=DEADLINE,
        read_seconds_max=DEADLINE,
        retry_seconds_min=0.1,
    )


@asynccontextmanager
async def hanging(config: StoreConfig, which: int = 0) -> AsyncIterator[tuple[Opened, HangingNode]]:
    """An open store with a file on it, and a node that can hang; it is awake at the end."""
    async with opened(config) as one:
        await one.put("before", data("before"))
        await one.store.committer.commit()
        member = one.store.log.members.all[which]
        node = HangingNode(member.node)
        member.node = node
        try:
            yield one, node
        finally:
            node.awake.set()


def data(name: str) -> bytes:
    return random.Random(name).randbytes(3 * STRIPE_BYTES + 12345)


async def healthy(one: Opened) -> None:
    """Wait until everything is healed."""
    with trio.fail_after(20):
        while not (await one.store.status())["healthy"]:
            one.store.comeback.wake()
            await trio.sleep(0.05)


@pytest.mark.parametrize("which", range(3))
async def test_reads_go_to_others(config: StoreConfig, which: int) -> None:
    async with hanging(config, which) as (one, node):
        node.hang()
        with trio.fail_after(10 * DEADLINE + 5):
            assert await one.get("before") == data("before")
        node.awake.set()


@pytest.mark.parametrize("which", range(3))
async def test_writes_and_syncs_go_on_without_it(config: StoreConfig, which: int) -> None:
    async with hanging(config, which) as (one, node):
        node.hang()
        with trio.fail_after(20 * DEADLINE + 5):
            await one.put("meanwhile", data("meanwhile"))
            await one.store.committer.commit()
            assert await one.get("meanwhile") == data("meanwhile")
            await one.put("small", b"small")
            await one.store.committer.commit()
        assert one.store.log.members.all[which].out_of_use
        node.awake.set()
        await one.put("after", data("after"))
        await healthy(one)
    shutil.rmtree(config.nodes[(which + 1) % 3].path)
    async with opened(config) as one:
        for name in ("before", "meanwhile", "after"):
            assert await one.get(name) == data(name)


async def test_a_sync_under_way_when_it_hangs_is_kept(config: StoreConfig) -> None:
    async with hanging(config, 1) as (one, node):
        await one.put("a", data("a"))
        node.hang()
        with trio.fail_after(20 * DEADLINE + 5):
            await one.store.committer.commit()
    shutil.rmtree(config.nodes[1].path)
    async with opened(config) as one:
        assert await one.get("a") == data("a")


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe, and how its writing end hangs until the other one is read."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.expects_log(OUT_OF_USE)
async def test_a_small_commit_does_not_wait_for_the_kernel_for_long(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    """The write of one journal hangs in the kernel, not in a thread."""
    with full_pipe() as (_, writing):
        async with opened(config) as one:
            member = one.store.log.members.all[1]
            if member.ring is None:
                pytest.skip("this kernel offers no io_uring")
            for number in range(2):
                await one.put("small", b"before %d" % number)
                await one.store.committer.commit()
            assert member.journal_room is not None
            monkeypatch.setattr(one.store.committer.journal, "_is_watched", watched)
            os.dup2(writing, member.journal_room.fd)
            await one.put("small", b"after 99")
            with trio.fail_after(20 * DEADLINE):
                await one.store.committer.commit()
            assert [m.in_sync for m in one.store.log.members.all] == [True, False, True]
            await healthy(one)
    shutil.rmtree(config.nodes[0].path)
    async with opened(config) as one:
        assert await one.get("small") == b"after 99"


@pytest.mark.expects_log(OUT_OF_USE)
async def test_a_slow_node_is_read_when_no_other_will_do(config: StoreConfig) -> None:
    async with hanging(config, 0) as (one, node):
        slow = one.store.log.members.all[0]
        slow.standing.answered_late(trio.current_time() + 1000)
        one.store.log.members.all[1].fail(OSError("It is gone."))
        assert await one.get("before") == data("before")
        assert node.awake.is_set()


async def test_the_room_is_told_while_a_disk_hangs(config: StoreConfig) -> None:
    async with hanging(config, 2) as (one, node):
        node.hang()
        total, free = one.files.space()
        assert 0 < free <= total
        with trio.fail_after(10 * DEADLINE + 5):
            await one.store.status()


@pytest.mark.expects_log("WARNING fusestore.log.journal: .* did not answer within 1 seconds")
@pytest.mark.parametrize("calls", [0, 1, 3, 8, 10])
async def test_a_mount_does_not_wait_for_a_node_that_hangs_half_way(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    async with opened(config) as one:
        await one.put("before", data("before"))
    crashed = config.metadata.with_name("crashed")
    async with opened(config) as one:
        await one.put("late", data("late"))
        await one.store.committer.commit()
        shutil.copytree(config.metadata, crashed)  # of the checkpoint before: replay has work
    shutil.rmtree(config.metadata)
    crashed.rename(config.metadata)
    made: list[HangingNode] = []

    def open_node(*arguments: Any, **options: Any) -> Any:
        node = opening.open_node(*arguments, **options)
        if config.nodes[0] in arguments:
            node = HangingNode(node, after=calls)
            made.append(node)
        return node

    monkeypatch.setattr("fusestore.store.opening.open_node", open_node)
    try:
        with trio.fail_after(20 * DEADLINE + 5):
            async with opened(config) as one:
                assert await one.get("late") == data("late")
                await one.put("meanwhile", data("meanwhile"))
    finally:
        for node in made:
            node.awake.set()
    monkeypatch.undo()
    async with opened(config) as one:
        await healthy(one)
        for name in ("before", "late", "meanwhile"):
            assert await one.get(name) == data(name)


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.expects_log(OUT_OF_USE)
async def test_syncs_go_on_while_a_node_hangs_that_gets_its_journal_again(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Which copy: that of what there is, or that of the rest, for which commits wait."""
    copies = 0

    def copy(*arguments: Any) -> int:
        nonlocal copies
        copies += 1
        if copies == which:
            node.hang()
        return copy_journals(*arguments)

    def again(*arguments: Any) -> HangingNode:
        nonlocal node
        node = HangingNode(opening.open_node(*arguments))
        return node

    async with hanging(config) as (one, node):
        monkeypatch.setattr(rejoin, "copy_journals", copy)
        monkeypatch.setattr(comeback, "open_node", again)
        one.store.log.members.all[0].fail(NodeError("It went away."))
        await one.put("meanwhile", data("meanwhile"))
        await one.store.committer.commit()
        with trio.fail_after(20 * DEADLINE + 5):
            while copies < which:
                one.store.comeback.wake()
                await trio.sleep(0.05)
            await one.put("after", data("after"))
            await one.store.committer.commit()
        node.awake.set()
        await healthy(one)


async def test_a_scrub_of_journals_and_fsck_do_not_wait_for_a_node_that_hangs(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hanging(config) as (one, node):

        def copy(*arguments: Any) -> Copied:
            node.hang()
            return copy_journals(*arguments)

        monkeypatch.setattr(rejoin, "copy_journals", copy)
        with trio.fail_after(20 * DEADLINE + 5):
            await one.store.scrubber.command(
                "start", None, wait=True, alone=False, progress=lambda message: None
            )
            assert (await fsck(one.store, repair=False, at_rest=False))["clean"]
        node.awake.set()
        await healthy(one)


async def test_fsck_does_not_wait_for_a_node_that_hangs(config: StoreConfig) -> None:
    async with hanging(config) as (one, node):
        node.hang()
        with trio.fail_after(20 * DEADLINE + 5):
            assert (await fsck(one.store, repair=False, at_rest=False))["clean"]
        node.awake.set()
        await healthy(one)


async def test_a_write_that_ends_late_hurts_no_journal(config: StoreConfig) -> None:
    def commits(region: int) -> set[int]:
        node = config.nodes[region]
        found = set()
        for file in (node.path / "journal").iterdir():
            place = Place(config.uuid, node.name, SegmentKind.JOURNAL, int(file.name.split(".")[0]))
            found |= {header.number for _, header, _ in records(place, file.read_bytes())}
        return found

    class HangingWrite(HangingNode):
        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "write" else getattr(self.node, name)

    async with hanging(config) as (one, awake):
        member = one.store.log.members.all[0]
        node = member.node = HangingWrite(awake.node)
        member.journal_room = None  # so that it is asked
        node.hang()
        await one.put("late", b"given up by one node")
        await one.store.committer.commit()
        assert not member.in_sync
        for i in range(3):
            await one.put(f"then {i}", b"in the same segment")
            await one.store.committer.commit()
        await healthy(one)
        async with one.store.committer.lock:  # no commit is under way
            assert commits(0) >= commits(1)
            node.awake.set()
            await trio.sleep(0.5)
            assert commits(0) >= commits(1)


class HangingWrites(HangingNode):
    """A node whose writes and flushes hang, while it reads."""

    def __getattr__(self, name: str) -> Any:
        hangs = name in ("write", "flush")
        return super().__getattr__(name) if hangs else getattr(self.node, name)


@asynccontextmanager
async def all_hanging(one: Opened, which: Sequence[int], kind: type) -> AsyncIterator[None]:
    """Some nodes hang."""
    nodes = []
    for index in which:
        member = one.store.log.members.all[index]
        node = member.node = kind(member.node)
        member.journal_room = None
        node.hang()
        nodes.append(node)
    try:
        yield
    finally:
        for node in nodes:
            node.awake.set()


@pytest.mark.parametrize(
    ("which", "kind", "size"),
    [
        ((0, 1, 2), HangingNode, 100),
        ((0, 1, 2), HangingWrites, 20 * STRIPE_BYTES),
        ((0, 2), HangingNode, 20 * STRIPE_BYTES),
        ((1, 2), HangingWrites, 100),
    ],
)
@pytest.mark.expects_log(WAITED_FOR)
async def test_disks_that_hang_together_are_waited_for(
    config: StoreConfig, which: tuple[int, ...], kind: type, size: int
) -> None:
    config = limited(config, config.limits, node_seconds_max=3.0, stall_seconds=0.2)
    written = random.Random(size).randbytes(size)
    async with opened(config) as one:
        await one.put("before", data("before"))
        await one.store.committer.commit()
        async with trio.open_nursery() as nursery, all_hanging(one, which, kind):

            async def write() -> None:
                await one.put("meanwhile", written)
                await one.store.committer.commit()

            nursery.start_soon(write)
            status: dict[str, Any] = {"error": ""}
            with trio.fail_after(30):
                while not status["error"]:
                    await trio.sleep(0.5)
                    with trio.fail_after(DEADLINE + 5):
                        status = await one.store.status()
            assert "waits for" in status["error"]
            assert not status["healthy"]
            assert not status["read_only"]
            await trio.sleep(config.limits.node_seconds_max / 2)
        await healthy(one)
        await one.put("after", data("after"))
        await one.store.committer.commit()
        assert await one.get("meanwhile") == written
    async with opened(config) as one:
        assert await one.get("meanwhile") == written
        assert await one.get("after") == data("after")


@pytest.mark.expects_log(WAITED_FOR, r"Too few|Fewer than")
async def test_disks_that_hang_for_good_are_given_up(config: StoreConfig) -> None:
    config = limited(config, config.limits, patience_seconds=3 * DEADLINE)
    with pytest.raises((NotDurableError, BaseExceptionGroup)):
        async with opened(config) as one, all_hanging(one, (0, 1, 2), HangingNode):
            with trio.fail_after(10 * DEADLINE + 5):
                await one.put("meanwhile", data("meanwhile"))
                await one.store.committer.commit()


@pytest.mark.expects_log(WAITED_FOR)
async def test_a_node_whose_writes_hang_holds_up_no_thread_of_others(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*arguments: Any) -> Node:
        node = opening.open_node(*arguments)
        if awake.is_set():
            return node
        hanging = HangingWrites(node)
        hanging.awake = awake
        return hanging

    config = limited(config, config.limits, node_seconds_max=2.0, stall_seconds=0.3)
    async with opened(config) as one:
        hung = one.store.log.members.all[0]
        monkeypatch.setattr(comeback, "open_node", again)
        async with all_hanging(one, (0,), HangingWrites):
            awake = hung.node.awake
            until = trio.current_time() + 15
            number, left = 0, []
            while trio.current_time() < until:
                with trio.fail_after(20):
                    await one.put(f"file {number}", data(f"file {number}"))
                    await one.store.committer.commit()
                number += 1
                await trio.sleep(0.05)
                one.store.comeback.wake()
                left.append(hung.calls.left_behind)
            assert number > 10
            assert hung.out_of_use
            assert all(member.in_sync for member in one.store.log.members.all[1:])
            assert left[-1] == left[len(left) // 2] <= config.limits.seals_max + 2
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
            with trio.fail_after(DEADLINE + 5):
                await one.store.status()
        await healthy(one)
        assert hung.calls.left_behind == 0
        for i in range(number):
            assert await one.get(f"file {i}") == data(f"file {i}")
