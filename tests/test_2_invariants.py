"""Slips of the program itself: they end in a sentence, before anything is destroyed."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import trio.testing

from fusestore.commit.journal_writer import JournalWriter
from fusestore.commit.reclaim import Headers, Reclaimer
from fusestore.config.store_config import StoreConfig
from fusestore.errors import InvariantError, NotDurableError
from fusestore.format.records import Header
from fusestore.format.stripe_rows import LOST_STRIPE, Live
from fusestore.limits import STRIPE_BYTES
from fusestore.members.member import Member
from fusestore.rescue.fsck import fsck
from support.opened_store import make, opened


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make(tmp_path / "store")


@pytest.mark.parametrize("count", [0, 1, 5_000])
@pytest.mark.expects_log(r"log\.log: Stripe \S+ counts \d+ too few live bytes")
async def test_a_count_of_live_bytes_that_is_too_low_frees_nothing(
    config: StoreConfig, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """Two files share a stripe, whose count is too low: one of them goes, the other stays."""
    async with opened(config) as one:
        await one.put("gone", b"g" * 10_000)
        await one.put("stays", b"s" * 10_000)
        await one.store.committer.commit()
        ((key, value),) = one.rows(b"V")
        wrong = Live.decode(value)._replace(live=count)
        one.store.log.apply({key: wrong.encode()})
        with caplog.at_level(logging.ERROR):
            one.delete("gone")
            await one.files.removal.removed()
        assert "too few live bytes" in caplog.text
        await one.checkpoint()
        assert await one.get("stays") == b"s" * 10_000
    async with opened(config) as one:
        assert await one.get("stays") == b"s" * 10_000
        found = await fsck(one.store, repair=True, at_rest=False)
        assert found["left"] == []
        await one.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.02)
    async with opened(config) as one:
        assert await one.get("stays") == b"s" * 10_000
        assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == []


async def test_bytes_that_are_lost_are_not_counted(
    config: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(config) as one:
        with caplog.at_level(logging.ERROR), one.store.log.transaction() as txn:
            txn.let_go(LOST_STRIPE, 10_000)
        assert caplog.text == ""
        assert one.rows(b"V") == []


async def test_a_stripe_is_sealed_once(config: StoreConfig) -> None:
    with pytest.raises(ExceptionGroup) as ended:
        async with opened(config) as one:
            await one.put("first", b"1" * STRIPE_BYTES)
            await one.store.committer.commit()
            one.store.log._next_stripe -= 1
            await one.put("second", b"2" * STRIPE_BYTES)
            await one.store.committer.commit()
    assert ended.group_contains(InvariantError, match="already sealed")
    async with opened(config) as one:
        assert await one.get("first") == b"1" * STRIPE_BYTES


async def test_a_commit_that_a_node_in_sync_lacks_is_not_acknowledged(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = JournalWriter.append

    async def forgets(self: JournalWriter, header: Header, payload: bytes) -> None:
        member = self._log.members.all[1]
        before = member.standing.holds
        await real(self, header, payload)
        member.standing.flushed(before)

    with pytest.raises(ExceptionGroup):
        async with opened(config) as one:
            await one.put("kept", b"kept")
            await one.store.committer.commit()
            await one.put("new", b"new")
            with monkeypatch.context() as patch:
                patch.setattr(JournalWriter, "append", forgets)
                with pytest.raises(InvariantError, match="us-west-1 has not flushed"):
                    await one.store.committer.commit()
            with pytest.raises(NotDurableError):
                await one.store.committer.commit()
    async with opened(config) as one:
        assert await one.get("kept") == b"kept"


async def test_a_segment_that_is_being_freed_gets_no_shards(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its headers are read, a stripe is sealed: it goes to other segments."""
    looking, go_on = threading.Event(), threading.Event()
    real = Reclaimer._all_headers

    def slow(self: Reclaimer, member: Member, segment: int) -> Headers | None:
        looking.set()
        assert go_on.wait(20)
        return real(self, member, segment)

    monkeypatch.setattr(Reclaimer, "_all_headers", slow)
    async with opened(config) as one:
        await one.put("gone", b"g" * 3 * STRIPE_BYTES)
        await one.store.committer.commit()
        one.delete("gone")
        await one.files.removal.removed()
        await one.checkpoint()
        with trio.fail_after(20):
            assert await trio.to_thread.run_sync(looking.wait, 20)
            await one.put("stays", b"s" * 3 * STRIPE_BYTES)
            await one.store.committer.commit()
            go_on.set()
            while one.rows(b"R"):  # noqa: ASYNC110
                await trio.sleep(0.01)
        await one.checkpoint()
        assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == []
    async with opened(config) as one:
        assert await one.get("stays") == b"s" * 3 * STRIPE_BYTES
        assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == []
