"""Scrub finds and mends all rot, and risk and drill tell the truth about what may be lost.

The fault model: in one region, at random: flipped bits, zeroed pages, truncated,
deleted and swapped segments, records that are valid elsewhere, or are another
node's, shards and journals alike.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from fusestore.cli.main import cli
from fusestore.config.mkfs import make_store
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import NodeError, UsageError
from fusestore.format import stripe_rows
from fusestore.format.erasure import Code
from fusestore.format.records import HEADER_BYTES, SegmentKind
from fusestore.format.segment_numbers import segment_path
from fusestore.format.stripe_rows import ShardPlace, Stripe
from fusestore.limits import STRIPE_BYTES
from fusestore.rescue.recover import recover
from fusestore.serve.commands import Context, handlers
from fusestore.serve.messages.safety import ScrubRequest
from fusestore.serve.offline import offline
from fusestore.store.opening import open_store
from fusestore.write.shard_record import NOT_WRITTEN
from support.logs import CORRUPT, GONE, LOST_STRIPE, NOT_WHERE_ITS_ROW_SAYS, OUT_OF_USE, SCRUBBED
from support.opened_store import (
    REGIONS,
    Opened,
    crashed,
    healthy,
    limited,
    loses_a_region,
    opened,
)


@pytest.fixture(params=["2+1", "4+2", "1+2"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> StoreConfig:
    return make_store(tmp_path / "store", code=Code.parse(request.param))


def content(name: str, stripes: int = 6) -> bytes:
    return random.Random(name).randbytes(stripes * STRIPE_BYTES + 4321)


async def do(one: Opened, command: str, **arguments: Any) -> dict[str, Any]:
    """A command as the daemon of a mounted store does it."""
    handler = handlers(Context(one.store, one.files))[command]
    return await handler(arguments, lambda message: None)


async def filled(config: StoreConfig) -> None:
    async with opened(config) as one:
        await fill(one)


async def fill(one: Opened, names: str = "abc") -> dict[str, bytes]:
    files = {name: content(name) for name in names}
    for name, data in files.items():
        await one.put(name, data)
    await one.put("small", b"small")
    await one.store.committer.commit()
    return {**files, "small": b"small"}


async def is_right(one: Opened, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        assert await one.get(name) == data


def spoil(path: Path, chance: random.Random, others: list[Path], *, cut: bool = True) -> None:
    """Hurt one segment file."""
    size = path.stat().st_size
    if size == 0:
        return
    kind = chance.choice(["flip"] * 12 + ["page"] * 5 + ["copy"] * 2 + ["cut"] * cut)
    with path.open("r+b") as file:
        at = chance.randrange(size)
        if kind == "flip":
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
        elif kind == "copy":  # a shard that is right, but elsewhere, or on another node
            source = chance.choice(others).read_bytes()
            start = chance.randrange(len(source) // 64 + 1) * 64
            file.seek(at // 64 * 64)
            file.write(source[start : start + 4096])
        elif kind == "page":
            at = at // 4096 * 4096
            file.seek(at)
            file.write(bytes(min(4096, size - at)))
        else:
            file.truncate(at)


def storm(node: Path, other: Path, chance: random.Random, hits: int) -> None:
    """Spoil a node's segments, delete one and swap two."""
    segments = sorted([*(node / "shards").iterdir(), *(node / "journal").iterdir()])
    foreign = sorted((other / "shards").iterdir())
    for _ in range(hits):
        spoil(chance.choice(segments), chance, [*segments, *foreign])
    shards = sorted((node / "shards").iterdir())
    if len(shards) > 2:
        one, two, gone = chance.sample(shards, 3)
        one.rename(node / "swap")
        two.rename(one)
        (node / "swap").rename(two)
        gone.unlink()


async def scrubbed(one: Opened, files: dict[str, bytes]) -> int:
    """All reads right; a scrub mends all, and another finds nothing; what the first found."""
    await is_right(one, files)
    first = await do(one, "scrub", action="start", wait=True)
    assert first["left"] == 0
    second = await do(one, "scrub", action="start", wait=True)
    assert (second["found"], second["skipped"], second["left"]) == (0, 0, 0)
    assert second["shards"] == sum(len(Stripe.decode(row).shards) for _, row in one.rows(b"S"))
    await is_right(one, files)
    assert (await do(one, "fsck"))["findings"] == []
    return int(first["found"])


@pytest.mark.expects_log(NOT_WHERE_ITS_ROW_SAYS)
async def test_a_storm_while_it_is_unmounted_is_mended(
    config: StoreConfig, pytestconfig: pytest.Config
) -> None:
    """What is gone is noticed by the mount, and mended without being asked."""
    config = limited(config, shard_segment_bytes=1 << 20)
    seed = pytestconfig.getoption("--model-seed")
    print("seed", seed)
    chance = random.Random(seed)
    async with opened(config) as one:
        files = await fill(one)
    for node, other in (config.nodes[:2], config.nodes[1:]):
        storm(node.path, other.path, chance, hits(pytestconfig))
        async with opened(config) as one:
            await scrubbed(one, files)
    await loses_a_region(config, 0, files)


@pytest.mark.expects_log(SCRUBBED)
@pytest.mark.parametrize("how", ["scrub", "repair"])
async def test_a_damaged_header_of_a_shard_is_written_anew(config: StoreConfig, how: str) -> None:
    """Its payload is right, and is read; but nobody could find it without the metadata."""
    async with opened(config) as one:
        files = await fill(one)
        node = config.nodes[0]
        rows = [Stripe.decode(row) for _, row in one.rows(b"S")]
        places = [p for row in rows for p in row.shards if p.written and p.node == 1]
        for place in places:
            path = node.path / segment_path(SegmentKind.SHARDS, place.segment)
            with path.open("r+b") as file:
                file.seek(place.offset - HEADER_BYTES + 20)
                byte = file.read(1)[0]
                file.seek(place.offset - HEADER_BYTES + 20)
                file.write(bytes([byte ^ 4]))
        assert places
        if how == "scrub":
            done = await do(one, "scrub", action="start", wait=True)
            assert (done["found"], done["left"]) == (len(places), 0)
        else:
            done = await do(one, "repair", node=node.name)
            assert done["unrepairable"] == []
        await is_right(one, files)
        assert (await do(one, "fsck"))["findings"] == []
    await loses_a_region(config, 1, files)


@pytest.mark.expects_log(SCRUBBED)
async def test_a_storm_under_a_mount_is_scrubbed_away(
    config: StoreConfig, pytestconfig: pytest.Config
) -> None:
    seed = pytestconfig.getoption("--model-seed")
    print("seed", seed)
    chance = random.Random(seed)
    async with opened(config) as one:
        files = await fill(one)
        for node, other in (config.nodes[:2], config.nodes[1:]):
            shards = list((node.path / "shards").iterdir())
            foreign = list((other.path / "shards").iterdir())
            for _ in range(hits(pytestconfig)):
                spoil(chance.choice(shards), chance, [*shards, *foreign], cut=False)
            found = await do(one, "scrub", action="start", wait=True)
            print(hits(pytestconfig), "hits in", node.name, "bad shards found", found["found"])
            assert found["found"] > 0
            await scrubbed(one, files)
    await loses_a_region(config, 0, files)


def hits(config: pytest.Config) -> int:
    return 1000 if config.getoption("--long") else 100


async def test_a_rotten_journal_is_mended(config: StoreConfig) -> None:
    async with opened(config) as one:
        files = await fill(one)
        for number in range(50):
            await one.put(f"n{number}", b"%d" % number)
            await one.store.committer.commit()
        node = config.nodes[1].path
        before = {path.name: path.read_bytes() for path in (node / "journal").iterdir()}
        (path,) = [path for path in (node / "journal").iterdir() if path.stat().st_size > 10_000]
        with path.open("r+b") as file:
            for at in range(0, 8192, 1000):
                file.seek(at)
                file.write(b"rot")
        assert (await do(one, "scrub", action="start", wait=True))["found"] > 0
        assert path.read_bytes().startswith(before[path.name].rstrip(b"\0"))
        assert (await do(one, "scrub", action="start", wait=True))["found"] == 0
    shutil.rmtree(config.metadata)
    if config.code.k > 1:  # else the node that is gone might have gone on alone
        shutil.rmtree(config.nodes[0].path)

    recover(config.store, [], None, accept_loss=False, progress=lambda message: None)
    async with opened(config) as one:
        await is_right(one, files)
        assert await one.get("n49") == b"49"


async def reaches(one: Opened, stripes: int) -> None:
    """Wait until a scrub has come so far."""
    with trio.fail_after(20):
        while one.store.scrubber.scrub.stripes < stripes:
            await one.store.committer.commit()


async def test_a_scrub_keeps_its_place(config: StoreConfig) -> None:
    config = limited(config, repair_batch=2)
    async with opened(config) as one:
        await fill(one)
        await do(one, "scrub", action="start", rate=30e6)
        busy = r"^A scrub is running already: pause, resume or wait for it\.$"
        with pytest.raises(UsageError, match=busy):
            await do(one, "scrub", action="start")
        with pytest.raises(UsageError, match=r"^No scrub is paused\.$"):
            await do(one, "scrub", action="resume")
        await reaches(one, 4)
        await do(one, "scrub", action="pause")
        with pytest.raises(UsageError, match=r"^No scrub is running\.$"):
            await do(one, "scrub", action="pause")
        paused = await do(one, "scrub", action="status")
    async with opened(config) as one:
        again = await do(one, "scrub", action="status")
        assert (again["state"], again["position"]) == ("paused", paused["position"])
        await do(one, "scrub", action="resume")
        done = await do(one, "scrub", action="start", wait=True)  # waits for the one that runs
        assert done["state"] == "done"
        assert done["stripes"] == len(one.rows(b"S"))
    done = await offline(load(config.store), ScrubRequest("start"), lambda message: None)
    assert (done.state, done.found) == ("done", 0)


@pytest.mark.expects_log(GONE, OUT_OF_USE)
async def test_risk_says_what_would_be_lost(config: StoreConfig) -> None:
    m = config.code.m
    async with opened(config) as one:
        await fill(one)
        risk = await do(one, "risk")
        assert set(risk["by_shards"]) == {str(m)}
        assert risk["lost"] == []
        assert risk["metadata_regions"] == 3
        per_region = config.code.n // 3
        assert set(risk["by_regions"]) == {str(m // per_region)}
        one_gone = await do(one, "risk", if_lost=["us-east-1"])
        assert one_gone["lost"] == []
        two_gone = await do(one, "risk", if_lost=["us-east-1", "eu-west-1"])
        alive = m // per_region >= 2
        assert bool(two_gone["lost"]) is not alive
        assert alive or {"/a", "/b", "/c"} <= set(two_gone["lost"])
        with pytest.raises(UsageError):
            await do(one, "risk", if_lost=["mars"])
        shutil.rmtree(config.nodes[0].path)
        await one.put("d", content("d", 1))
        await one.store.committer.commit()
        now = await do(one, "risk")
        assert set(now["by_regions"]) == {str(m // per_region - 1)}
        assert (now["next_region_loses"] == []) is (m // per_region >= 2)


@pytest.mark.expects_log(CORRUPT, SCRUBBED, LOST_STRIPE)
def test_a_scrub_is_no_success_while_shards_are_missing(tmp_path: Path) -> None:
    """The second scrub finds nothing new, and what it read it does not call verified."""
    config = make_store(tmp_path / "store")
    trio.run(filled, config)
    for node in config.nodes[:2]:
        for path in (node.path / "shards").iterdir():
            path.write_bytes(bytes(path.stat().st_size))
    told = []
    for _ in range(3):
        done = CliRunner().invoke(cli, ["scrub", str(config.store), "start", "--wait", "--json"])
        assert done.exit_code == 1, done.output
        told.append(json.loads(done.stdout))
    assert told[0]["found"] > 0
    assert [one["found"] for one in told[1:]] == [0, 0]
    assert all(one["left"] == told[0]["found"] for one in told)
    assert told[1]["shards"] == told[0]["shards"] - told[0]["found"]


@pytest.mark.expects_log(GONE, OUT_OF_USE)
async def test_a_scrub_without_a_region_is_repeated_the_next_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of the region are unverified."""
    now, later = time.time, 0.0
    monkeypatch.setattr("fusestore.repair.scrub.LOOK_SECONDS", 0.05)
    monkeypatch.setattr(time, "time", lambda: now() + later)
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        await fill(one)
        config.nodes[0].path.rename(tmp_path / "away")
        await one.put("d", b"d")
        await one.store.committer.commit()
        done = await do(one, "scrub", action="start", wait=True)
        assert (done["state"], done["skipped"] > 0) == ("done", True)
        (tmp_path / "away").rename(config.nodes[0].path)
        await healthy(one)
        later = 20 * 3600.0
        await trio.sleep(0.5)
        assert (await do(one, "scrub", action="status"))["skipped"] > 0
        later = 25 * 3600.0
        with trio.fail_after(20):
            while (await do(one, "scrub", action="status"))["skipped"]:  # noqa: ASYNC110
                await trio.sleep(0.05)
        await do(one, "scrub", action="start", wait=True)  # waits for the one that runs
        later += 25 * 3600.0
        ended = (await do(one, "scrub", action="status"))["finished"]
        await trio.sleep(0.5)
        assert (await do(one, "scrub", action="status"))["finished"] == ended


@pytest.mark.expects_log(OUT_OF_USE, r"Too few nodes")
async def test_the_codes_of_old_files_count(tmp_path: Path) -> None:
    """fusestore.toml says the code of new files only."""
    config = make_store(tmp_path / "store", code=Code(2, 1))
    await filled(config)
    for code in (Code(1, 2), Code(4, 2)):
        changed = replace(config, code=code)
        async with open_store(changed, read_only=True, background=False) as store:
            assert (await store.status())["regions_borne"] == 1
        async with opened(changed) as one:
            assert (await one.store.status())["regions_borne"] == 1
        config = changed
    async with opened(replace(config, code=Code(1, 2))) as one:
        shutil.rmtree(config.nodes[0].path)
        status = await one.store.status()
        assert (status["regions_borne"], status["readable"]) == (0, True)
        shutil.rmtree(config.nodes[1].path)
        assert not (await one.store.status())["readable"]


@pytest.mark.parametrize("region", REGIONS)
async def test_a_drill_reads_without_a_region(config: StoreConfig, region: str) -> None:
    async with opened(config) as one:
        await fill(one)
        done = await do(one, "drill", region=region, sample=1.0)
        assert (done["failed_stripes"], done["stripes"]) == (0, len(one.rows(b"S")))
        assert done["bytes"] >= 18 * STRIPE_BYTES
        some = await do(one, "drill", region=region, sample=0.3)
        assert some["failed_stripes"] == 0


@pytest.mark.expects_log(CORRUPT)
async def test_a_drill_finds_what_could_not_be_lost(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        await fill(one)
        number, row = next(
            (stripe_rows.decode_stripe_key(key), Stripe.decode(value))
            for key, value in one.rows(b"S")
        )
        place = next(
            p for p in row.shards if one.store.log.members.by_id[p.node].name == REGIONS[0]
        )
        (path,) = (config.nodes[0].path / "shards").iterdir()
        fd = os.open(path, os.O_RDWR)
        os.pwrite(fd, bytes(100), place.offset)
        os.close(fd)
        done = await do(one, "drill", region=REGIONS[1], sample=1.0)
        assert done["failed_stripes"] == 1
        owners = await one.files.tree.paths(one.store.reader.owners(number))
        assert done["lost"] == sorted(owners.values())


@pytest.mark.expects_log(GONE)
async def test_a_plan_says_what_a_repair_will_do(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one)
        whole = (await do(one, "repair", node=REGIONS[0], dry_run=True))["plan"]
        assert (whole["shards_to_rebuild"], whole["bytes_to_rebuild"]) == (0, 0)
        assert whole["stripes"] == len(one.rows(b"S"))
        shutil.rmtree(config.nodes[0].path)
        await one.put("meanwhile", content("meanwhile"))
        await one.store.committer.commit()
        files["meanwhile"] = content("meanwhile")
        plan = (await do(one, "repair", node=REGIONS[0], dry_run=True))["plan"]
        assert not config.nodes[0].path.exists()
        done = await do(one, "repair", node=REGIONS[0])
        assert done["shards_rebuilt"] == plan["shards_to_rebuild"] == plan["stripes"]
        assert done["bytes"] == plan["bytes_to_rebuild"]
        assert set(plan["reads"]) == set(REGIONS[1:])
        assert (done["unrepairable"], plan["hopeless_shards"]) == ([], 0)
    await loses_a_region(config, 1, files)


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.expects_log(OUT_OF_USE)
async def test_a_node_moves_to_another_place(
    config: StoreConfig, tmp_path: Path, gone: bool
) -> None:
    place = tmp_path / "elsewhere" / "us-west-1"
    async with opened(config) as one:
        files = await fill(one)
        if gone:
            shutil.rmtree(config.nodes[1].path)
        done = await do(one, "repair", node=REGIONS[1], to=str(place))
        assert done["unrepairable"] == []
        assert (await one.store.status())["healthy"] is True
    moved = load(config.store)
    assert moved.nodes[1].path == place
    assert not gone or not config.nodes[1].path.exists()
    async with opened(moved) as one:
        assert (await one.store.status())["healthy"] is True
        with pytest.raises(UsageError):
            await do(one, "repair", node=REGIONS[1], to=str(config.metadata / "inside"))
    await loses_a_region(moved, 2, files)


@pytest.mark.expects_log(OUT_OF_USE)
async def test_the_configuration_moves_a_node_when_it_is_complete(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, before = tmp_path / "elsewhere", config.nodes[1].path
    async with opened(config) as one:
        files = await fill(one)

        async def fails(*arguments: object) -> tuple[int, int]:
            assert load(config.store).nodes[1].path == before
            raise NodeError("It failed.")

        with monkeypatch.context() as patch:
            patch.setattr(one.store.rejoin, "rebuild_all", fails)
            with pytest.raises(NodeError, match=r"stopped: It failed\."):
                await do(one, "repair", node=REGIONS[1], to=str(place))
        assert load(config.store).nodes[1].path == before
        await one.checkpoint()
    async with opened(load(config.store)) as one:  # where it was it is made whole again
        await healthy(one)
        for name, data in files.items():
            assert await one.get(name) == data
        await do(one, "repair", node=REGIONS[1], to=str(place))
        assert load(config.store).nodes[1].path == place
        assert (await one.store.status())["healthy"] is True
    await loses_a_region(load(config.store), 2, files)


@pytest.mark.expects_log(GONE)
async def test_the_weakest_stripes_come_first(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store", code=Code(4, 2))
    async with opened(config) as one:
        files = await fill(one)
        weak = {stripe_rows.decode_stripe_key(key) for key, _ in one.rows(b"S")[::4]}
        other = one.store.log.members.all[1]
        for number in weak:
            row = one.store.reader.stripe(number)
            assert row is not None
            index = next(i for i, place in enumerate(row.shards) if place.node == other.id)
            one.store.log.apply({stripe_rows.missing_key(other.id, number, index): b""})
        order: list[int] = []
        rebuild = one.store.healer.rebuilder.rebuild

        async def note(member: Any, wanted: dict[int, list[int]]) -> tuple[int, int]:
            order.extend(wanted)
            return await rebuild(member, wanted)

        one.store.healer.rebuilder.rebuild = note  # type: ignore[method-assign]
        shutil.rmtree(config.nodes[0].path)
        await do(one, "repair", node=REGIONS[0])
        assert set(order[: len(weak)]) == weak
    await loses_a_region(config, 2, files)


@pytest.mark.expects_log(GONE)
async def test_the_model_counts_regions_too(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        await fill(one)
        shutil.rmtree(config.nodes[0].path)
        await do(one, "repair", node=REGIONS[0])
        rates = {"disk_failures": 0.02, "region_losses": 0.01, "replace_hours": 876.6}
        model = (await do(one, "risk", model=rates))["model"]
        assert model["measured"] is True
        # 3 regions, 2+1 bears one: 3 * rate * 2 * rate * a tenth of a year
        found = model["codes"]["2+1"]
        assert found["regions_borne"] == 1
        assert found["disks_only"] == pytest.approx(3 * 0.02 * 2 * 0.02 * 0.1, rel=0.01)
        assert found["with_regions"] == pytest.approx(3 * 0.03 * 2 * 0.03 * 0.1, rel=0.01)


# --- the clock -----------------------------------------------------------------------


@pytest.mark.parametrize("years", [20, -20, 0.01])
async def test_a_wrong_clock_postpones_no_scrub_for_long(config: StoreConfig, years: float) -> None:
    """The last scrub ended while the clock was `years` ahead."""
    async with opened(config) as one:
        scrubber = one.store.scrubber
        scrubber.scrub.state = "done"
        scrubber.scrub.finished = time.time() + years * 365 * 86_400
        due = scrubber._until_due()
        assert due == (0 if years < 0 else pytest.approx(config.scrub_days * 86_400, abs=60))
        assert scrubber.scrub.finished <= time.time()


async def test_risk_counts_what_was_just_written(config: StoreConfig) -> None:
    async with opened(config) as one:
        await one.put("a", content("a", 2))
        assert (await do(one, "risk", if_lost=[]))["stripes"] >= 2


async def test_healthy_means_that_a_crash_makes_nothing_missing(tmp_path: Path) -> None:
    """What was rebuilt is in a commit before status counts it."""
    config = limited(make_store(tmp_path / "store"), commit_seconds_max=1e6)
    files = {"a": random.Random(1).randbytes(3 * STRIPE_BYTES)}
    async with opened(config) as one:
        await one.put("a", files["a"])
        await one.store.committer.commit()
        for number, row in next(one.store.log.batches()):
            node = row.shards[0].node
            lacks = row.moved(0, ShardPlace(node, NOT_WRITTEN, 0))
            one.store.log.apply(
                {
                    stripe_rows.stripe_key(number): lacks.encode(),
                    stripe_rows.missing_key(node, number, 0): b"",
                }
            )
            one.store.reader.forget(number)
        await one.store.committer.commit()
        assert not (await one.store.status())["healthy"]
        await one.store.healer.heal_all()
        assert one.rows(b"M") == []
        assert (await one.store.status())["healthy"]
        crash = crashed(config, tmp_path / "crash")
    for region in range(3):
        await loses_a_region(crashed(crash, tmp_path / f"without{region}"), region, files)


async def test_deleting_makes_nothing_missing(tmp_path: Path) -> None:
    config = limited(make_store(tmp_path / "store"), commit_seconds_max=1e6)
    async with opened(config) as one:
        await one.put("a", bytes(3 * STRIPE_BYTES))
        await one.store.committer.commit()
        commit = one.store.log.position.commit
        one.delete("a")
        await one.files.removal.removed()
        found = await one.store.status()
        assert found["healthy"]
        assert [node["missing_shards"] for node in found["nodes"]] == [0, 0, 0]
        assert one.store.log.position.commit == commit  # status needed none
