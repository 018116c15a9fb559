"""`fusestore compact`, and what status and metrics report of cleaning."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from fusestore.cli.compact import compact_line
from fusestore.cli.main import cli
from fusestore.cli.status import StoreView, status_lines
from fusestore.config.store_config import StoreConfig
from fusestore.errors import NotMountedError, ReadOnlyError
from fusestore.format import stripe_rows
from fusestore.format.stripe_rows import Live
from fusestore.limits import MIB
from fusestore.serve.commands import Context, do
from fusestore.serve.messages.mount import CompactRequest, CompactResult, StatusRequest
from fusestore.watch.fields import Cleaning, Status
from fusestore.watch.health import cleaning_text, is_cleaning_of_interest
from support.logs import GONE
from support.opened_store import Opened, healthy, limited, make, opened, repair, scrub

KEPT = 30
"""Fewer than are cleaned without a request."""
DOUBTED = r"files\.emptier: Stripe \S+ counts \d+ live bytes, but files have \d+: it is not cleaned"


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return limited(make(tmp_path / "store"), waste_bytes_min=32 * MIB)


async def littered(one: Opened, prefix: str = "") -> dict[str, bytes]:
    """Fill the store with stripes that are mostly garbage; the files that are left."""
    chance = random.Random(1)
    kept = {f"{prefix}kept{number}": chance.randbytes(4096) for number in range(KEPT)}
    for number, (name, data) in enumerate(kept.items()):
        await one.put(f"{prefix}gone{number}", chance.randbytes(1_000_000))
        await one.put(name, data)
    await one.store.committer.commit()
    for number in range(KEPT):
        one.delete(f"{prefix}gone{number}")
    await one.files.removal.removed()
    await one.checkpoint()
    return kept


async def check(one: Opened, kept: dict[str, bytes]) -> None:
    for name, data in kept.items():
        assert await one.get(name) == data
    one.check_counters()


async def compact(one: Opened, *, wait: bool = True, **context: Any) -> CompactResult:
    with trio.fail_after(60):
        return await do(Context(one.store, one.files, **context), CompactRequest(wait))


async def status(one: Opened) -> Status:
    return await do(Context(one.store, one.files), StatusRequest())


async def cleaning(one: Opened) -> Cleaning:
    found = (await status(one)).cleaning
    assert found is not None
    return found


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.02)


async def used(one: Opened) -> int:
    """The bytes of the shard segments."""
    files = [path for node in one.store.config.nodes for path in (node.path / "shards").iterdir()]
    return sum(path.stat().st_blocks * 512 for path in files)


# --- the command ---------------------------------------------------------------


async def test_all_that_can_be_had_is_given_back(config: StoreConfig) -> None:
    async with opened(config) as one:
        one.files.go_on()
        kept = await littered(one)
        before = await used(one)
        seen: list[dict[str, Any]] = []
        result = await compact(one, progress=seen.append)
        assert (result.state, result.problem) == ("done", "")
        assert result.waste is not None
        assert result.waste < MIB
        assert result.freed > 20 * MIB
        assert KEPT * 4096 <= result.moved < 2 * MIB
        assert await used(one) < before - 30 * MIB
        assert seen
        assert {message["phase"] for message in seen} == {"cleaning"}
        assert all(0 <= message["done"] <= message["total"] for message in seen)
        found = await cleaning(one)
        assert (found.freed, found.moved, found.state) == (result.freed, result.moved, "idle")
        await check(one, kept)
        again = await compact(one)
        assert (again.state, again.freed, again.moved) == ("done", 0, 0)
    async with opened(config) as one:
        await check(one, kept)


async def test_it_returns_at_once_and_goes_on(config: StoreConfig) -> None:
    config = limited(config, clean_rate=200_000, clean_bytes=16_384)
    async with opened(config) as one:
        one.files.go_on()
        kept = await littered(one)
        result = await compact(one, wait=False)
        assert (result.state, result.freed) == ("running", 0)
        assert (await cleaning(one)).state == "running"
        assert (await compact(one)).state == "done"  # it waits for the one that runs
        await until(lambda: one.files.emptier.freed > 20 * MIB)
        await check(one, kept)


async def test_who_hangs_up_does_not_end_it(config: StoreConfig) -> None:
    config = limited(config, clean_rate=100_000, clean_bytes=16_384)
    async with opened(config) as one:
        one.files.go_on()
        await littered(one)
        with trio.move_on_after(0.3):
            await compact(one)
        assert (await cleaning(one)).state == "running"


async def test_a_read_only_store_is_not_cleaned(config: StoreConfig) -> None:
    async with opened(config) as one:
        await littered(one)
    async with opened(config, read_only=True) as one:
        one.files.go_on()
        with pytest.raises(ReadOnlyError, match="mounted read-only"):
            await compact(one)
        found = await cleaning(one)
        assert (found.state, found.waste) == ("idle", None)


async def test_a_mount_that_became_read_only_is_not_cleaned(config: StoreConfig) -> None:
    async with opened(config) as one:
        one.files.go_on()
        await littered(one)
        one.store.log.broken = "Too few nodes."
        with pytest.raises(ReadOnlyError, match=r"Too few nodes\."):
            await compact(one)
        one.store.log.broken = ""


async def test_a_store_that_nothing_cleans_is_refused(config: StoreConfig) -> None:
    async with opened(config) as one:
        with pytest.raises(NotMountedError, match="is not mounted"):
            await compact(one, alone=True)


@pytest.mark.parametrize("options", [(), ("--wait",), ("--json",)])
def test_an_unmounted_store_is_one_sentence(config: StoreConfig, options: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, ["compact", str(config.store), *options])
    assert result.exit_code == 2
    sentence = f"The store {config.store} is not mounted: only a mounted store is cleaned."
    assert result.stderr == f"fusestore: {sentence}\n"
    if options == ("--json",):
        assert json.loads(result.stdout) == {"error": sentence}


async def test_a_failure_ends_it_with_a_reason(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(config) as one:
        one.files.go_on()
        kept = await littered(one)
        monkeypatch.setattr(one.files.emptier, "waits_for", "")

        async def refuse(*_: object, **__: object) -> None:
            one.files.emptier.waits_for = "There is no room."

        monkeypatch.setattr(one.files.emptier, "empty", refuse)
        result = await compact(one)
        assert (result.state, result.problem, result.freed) == ("done", "There is no room.", 0)
        monkeypatch.undo()
        assert (await compact(one)).problem == ""
        await check(one, kept)


# --- what is left alone --------------------------------------------------------


@pytest.mark.expects_log(DOUBTED)
@pytest.mark.parametrize("difference", [-1, 1])
async def test_wrong_counts_are_said_until_the_next_mount(
    config: StoreConfig, difference: int
) -> None:
    async with opened(config) as one:
        kept = await littered(one)
        key, value = one.rows(b"V")[3]
        count = Live.decode(value)
        wrong = count._replace(live=count.live + difference)
        one.store.log.apply({key: wrong.encode()})
        one.files.go_on()
        assert (await compact(one)).freed > 0
        result = await compact(one)  # the first time, a removal might explain it
        assert result.doubtful_stripes == 1
        assert one.store.log.stripe(stripe_rows.decode_stripe_key(key)) is not None
        await scrub(one)
        found = await status(one)
        assert not found.healthy
        assert "fsck --repair" in found.summary
        text = "\n".join(status_lines(StoreView(found, None, None)))
        assert "1 stripe with wrong counts left alone: run 'fusestore fsck --repair'" in text
        for name, data in kept.items():
            assert await one.get(name) == data
        one.store.log.apply({key: value})


@pytest.mark.expects_log(GONE)
async def test_stripes_of_a_node_that_is_away_wait_for_it(config: StoreConfig) -> None:
    node = config.nodes[0].path
    async with opened(limited(config, probe_seconds=0.1, waste_bytes_min=MIB)) as one:
        kept = await littered(one)
        shutil.move(node, node.with_name("away"))
        assert not (await one.store.status())["healthy"]  # it looks for the node
        one.files.go_on()
        result = await compact(one)
        assert result.state == "done"
        assert result.absent_stripes >= KEPT - 2
        assert result.freed < 2 * MIB
        await until(lambda: one.files.cleaning_report.status()["state"] == "waiting")
        found = await cleaning(one)
        assert "with shards on nodes that are not up must wait for these" in found.waits_for
        shutil.move(node.with_name("away"), node)
        await healthy(one)
        await until(lambda: one.files.emptier.freed > 20 * MIB)  # by itself
        await until(lambda: one.files.cleaning_report.status()["state"] == "idle")
        assert (await cleaning(one)).absent_stripes == 0
        await check(one, kept)


@pytest.mark.expects_log(GONE)
async def test_new_garbage_is_cleaned_while_a_node_is_away(config: StoreConfig) -> None:
    """Stripes that wait for the node do not hide those that need not."""
    async with opened(limited(config, victims_max=8)) as one:
        kept = await littered(one)
        shutil.rmtree(config.nodes[0].path)
        assert not (await one.store.status())["healthy"]
        one.files.go_on()
        kept |= await littered(one, "new ")
        result = await compact(one)
        assert one.files.emptier.freed > 20 * MIB  # some of it maybe before the request
        assert result.absent_stripes >= KEPT - 2
        for name, data in kept.items():
            assert await one.get(name) == data
        await repair(one, config.nodes[0].name)
        assert (await compact(one)).absent_stripes == 0


# --- how it reads --------------------------------------------------------------

RESULT = CompactResult("done", "", 5 * MIB, 100 * MIB, 3 * MIB, 0, 0, 0)
CLEANING = Cleaning("idle", "", MIB, 33 * MIB, None, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "100.0 MiB given back, 3.0 MiB of files moved; 5.0 MiB of garbage left."),
        ({"waste": 0, "freed": 0, "moved": 0}, "0 B given back, 0 B of files moved."),
        ({"doubtful_stripes": 1}, "left alone: 1 stripe with counts in doubt: run 'fusestore fsck"),
        (
            {"unreadable_stripes": 2, "absent_stripes": 3},
            "left alone: 2 stripes that cannot be read, 3 stripes with shards on nodes that are",
        ),
        ({"problem": "There is no room."}, "; it ended early: There is no room."),
        (
            {"state": "running"},
            "Cleaning of 5.0 MiB of garbage has begun; ",
        ),
        ({"state": "running", "waste": None}, "Cleaning has begun; 'fusestore status' shows"),
    ],
)
def test_the_result_in_a_line(change: dict[str, Any], text: str) -> None:
    assert text in compact_line(replace(RESULT, **change))


@pytest.mark.parametrize(
    ("change", "shown", "text"),
    [
        ({}, False, "1.0 MiB of garbage, cleaned above 33.0 MiB"),
        ({"waste": None}, False, "garbage is not counted"),
        ({"freed": MIB}, False, "cleaned above 33.0 MiB; 1.0 MiB given back since the mount"),
        ({"waste": 34 * MIB}, True, "34.0 MiB of garbage"),
        ({"state": "running"}, True, "; running"),
        ({"state": "urgent", "held_writers": 2}, True, "; running, 2 writes held up"),
        ({"state": "waiting", "waits_for": "No room."}, True, "; it waits: No room"),
        ({"doubtful_stripes": 1}, True, "1 stripe with wrong counts left alone: run 'fusestore"),
        ({"unreadable_stripes": 2}, True, "2 stripes cannot be read"),
    ],
)
def test_cleaning_in_a_line_of_status(change: dict[str, Any], shown: bool, text: str) -> None:
    found = replace(CLEANING, **change)
    assert text in cleaning_text(found)
    assert is_cleaning_of_interest(found) is shown


async def test_garbage_of_a_stripe_that_is_not_full_is_given_back(config: StoreConfig) -> None:
    """Each commit has few new bytes of it, so it stays open until more are written."""
    async with opened(config) as one:
        one.files.go_on()
        for number in range(40):
            await one.put(f"f{number}", bytes([number]) * 20_000)
            await one.store.committer.commit()
        for number in range(1, 40):
            one.delete(f"f{number}")
        await one.files.removal.removed()
        assert len(one.store.log.unsealed) == 1
        result = await compact(one)
        assert result.problem == ""
        assert result.freed > 700_000
        await check(one, {"f0": bytes(20_000)})
