"""Nodes are added, drained and removed, shards move between them, and nothing is ever lost.

The fault models: a kill at any moment (the store as it is then is copied, and opened
as after a crash); nodes that are gone; the metadata gone, and only the nodes left.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from fusestore.config import node_identity, store_config_write
from fusestore.config.mkfs import make_store
from fusestore.config.store_config import CONFIG_NAME, NodeConfig, StoreConfig, load
from fusestore.config.store_config_write import write_store_config
from fusestore.errors import ConfigError, FusestoreError, NodeError, UsageError
from fusestore.format import store_rows
from fusestore.format.erasure import Code
from fusestore.format.records import SegmentKind
from fusestore.format.stripe_rows import Stripe
from fusestore.grow import topology
from fusestore.limits import DEFAULTS, MIB, STRIPE_BYTES
from fusestore.members.member import Member
from fusestore.members.members import Members
from fusestore.metadata.engine import Engine
from fusestore.nodes.base import Space
from fusestore.nodes.directory import DirectoryNode
from fusestore.rescue.recover import recover
from fusestore.serve.commands import Context, handlers
from fusestore.serve.messages.nodes import (
    NodeAddRequest,
    NodeDrainRequest,
    NodeRemoveRequest,
    NodesRequest,
    RebalanceRequest,
)
from fusestore.serve.messages.request import Request
from fusestore.serve.offline import offline
from support.faults import HangingNode
from support.logs import CLOSED, GONE, HUNG, NOT_DELETED, OUT_OF_USE, SLOW
from support.opened_store import REGIONS, Opened, crashed, limited, opened

R = TypeVar("R")


async def do(one: Opened, command: str, **arguments: Any) -> dict[str, Any]:
    """A command as the daemon of a mounted store does it."""
    with trio.fail_after(120):
        handler = handlers(Context(one.store, one.files))[command]
        return await handler(arguments, lambda message: None)


async def add(one: Opened, path: Path, name: str, region: str, weight: float = 1.0) -> None:
    await do(one, "node_add", node=name, region=region, path=str(path / name), weight=weight)


def content(name: str, stripes: int) -> bytes:
    return random.Random(name).randbytes(stripes * STRIPE_BYTES + 4321)


async def fill(one: Opened, names: str = "abc", stripes: int = 6) -> dict[str, bytes]:
    files = {name: content(name, stripes) for name in names}
    for name, data in files.items():
        await one.put(name, data)
    await one.put("small", b"small")
    await one.store.committer.commit()
    return {**files, "small": b"small"}


async def is_right(one: Opened, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        assert await one.get(name) == data
    assert (await do(one, "fsck"))["findings"] == []


def rows(one: Opened) -> Iterator[Stripe]:
    for _, value in one.rows(b"S"):
        yield Stripe.decode(value)


def held(one: Opened) -> Counter[str]:
    """Bytes of shards by node."""
    found: Counter[str] = Counter()
    for row in rows(one):
        for place in row.shards:
            found[one.store.log.members.by_id[place.node].name] += row.shard_length
    return found


def keeps_the_rule(one: Opened) -> None:
    """No region has more than m shards of a stripe, no node two for nothing."""
    members = one.store.log.members
    nodes = Counter(member.config.region for member in members.all if not member.config.draining)
    for row in rows(one):
        by_region = Counter(members.by_id[place.node].config.region for place in row.shards)
        assert max(by_region.values()) <= row.code.m
        by_node = Counter(place.node for place in row.shards)
        for node, count in by_node.items():
            region = members.by_id[node].config.region
            assert count <= -(-by_region[region] // nodes[region])


async def survives_any_region(config: StoreConfig, to: Path, files: dict[str, bytes]) -> None:
    """Without any one region, all files read right; the store itself stays as it is."""
    for region in dict.fromkeys(node.region for node in config.nodes):
        copy = crashed(config, to / region)
        for node in copy.nodes:
            if node.region == region:
                shutil.rmtree(node.path)
        async with opened(copy) as one:
            for name, data in files.items():
                assert await one.get(name) == data
        shutil.rmtree(copy.store)


async def grow(one: Opened, store: Path) -> None:
    """A store of three nodes gets three more, of weights 1, 1 and 2."""
    await add(one, store, "us-east-2", "us-east-1")
    await add(one, store, "us-west-2", "us-west-1")
    await add(one, store, "eu-west-2", "eu-west-1", 2.0)


@pytest.fixture(params=["2+1", "4+2", "1+2"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> StoreConfig:
    return make_store(tmp_path / "store", code=Code.parse(request.param))


# --- growing and shrinking ----------------------------------------------------------


async def test_a_store_grows_evens_out_and_shrinks(config: StoreConfig, tmp_path: Path) -> None:
    async with opened(config) as one:
        files = await fill(one, "abc", 20)
        await grow(one, config.store)
        assert {name for name, size in held(one).items() if size} == set(REGIONS)
        assert (await one.store.status())["healthy"] is True
        done = await do(one, "rebalance", action="start", wait=True)
        assert done["state"] == "done"
        assert done["shards"] > 0
        found = await do(one, "nodes")
        for node in found["nodes"]:
            assert node["bytes"] == held(one)[node["name"]]
            assert node["bytes"] == pytest.approx(node["share_bytes"], rel=0.05)
        keeps_the_rule(one)
        await is_right(one, files)
        assert (await do(one, "rebalance", action="start", wait=True))["shards"] == 0
        scrub = await do(one, "scrub", action="start", wait=True)
        assert (scrub["found"], scrub["skipped"], scrub["left"]) == (0, 0, 0)
        for region in REGIONS:
            risk = await do(one, "risk", if_lost=[region])
            assert (risk["lost_stripes"], risk["metadata_regions"]) == (0, 2)
            drill = await do(one, "drill", region=region)
            assert (drill["stripes"], drill["failed_stripes"]) == (risk["stripes"], 0)
        # What is written from now on keeps to the shares, too.
        files["d"] = content("d", 20)
        await one.put("d", files["d"])
        await one.store.committer.commit()
        keeps_the_rule(one)
        await is_right(one, files)
    config = load(config.store)
    assert [node.weight for node in config.nodes] == [1, 1, 1, 1, 1, 2]
    await survives_any_region(config, tmp_path, files)
    async with opened(config) as one:
        drained = await do(one, "node_drain", node="us-east-1")
        assert drained["drained"] is True
        assert held(one)["us-east-1"] == 0
        keeps_the_rule(one)
        await do(one, "node_remove", node="us-east-1")
        assert not list(config.node("us-east-1").path.iterdir())
        assert (await one.store.status())["healthy"] is True
        await is_right(one, files)
    config = load(config.store)
    assert "us-east-1" not in [node.name for node in config.nodes]
    await survives_any_region(config, tmp_path, files)
    async with opened(config) as one:
        assert (await one.store.status())["healthy"] is True
        assert {row.id for row in one.store.committer.rows} == {2, 3, 4, 5, 6}
        await add(one, config.store, "us-east-1", "us-east-1")
        await is_right(one, files)


async def test_every_command_works_on_a_store_that_is_not_mounted(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one)

    async def do_offline(request: Request[R]) -> R:
        return await offline(load(config.store), request, lambda message: None)

    path = str(tmp_path / "elsewhere")
    await do_offline(NodeAddRequest("us-east-2", "us-east-1", path))
    assert (await do_offline(RebalanceRequest("status"))).state == "never"
    assert (await do_offline(RebalanceRequest("start"))).state == "done"
    held = {node.name: node.bytes for node in (await do_offline(NodesRequest())).nodes}
    assert held["us-east-2"] == pytest.approx(held["us-east-1"], rel=0.2)
    assert (await do_offline(NodeDrainRequest("us-east-1"))).drained is True
    await do_offline(NodeRemoveRequest("us-east-1"))
    async with opened(load(config.store)) as one:
        await is_right(one, files)


@pytest.mark.expects_log(GONE, NOT_DELETED)
async def test_a_node_that_is_gone_is_drained_from_the_others(
    config: StoreConfig, tmp_path: Path
) -> None:
    async with opened(config) as one:
        files = await fill(one)
        await add(one, config.store, "us-east-2", "us-east-1")
        shutil.rmtree(config.nodes[0].path)
        assert (await do(one, "node_drain", node=REGIONS[0]))["drained"] is True
        await do(one, "node_remove", node=REGIONS[0])
        assert (await one.store.status())["healthy"] is True
        await is_right(one, files)
        assert one.rows(b"M") == []
    await survives_any_region(load(config.store), tmp_path, files)


@pytest.mark.expects_log(OUT_OF_USE, NOT_DELETED)
async def test_what_lies_where_a_removed_node_was_is_not_deleted(tmp_path: Path) -> None:
    """Its disk failed, and another store's is mounted there now."""
    config, other = make_store(tmp_path / "store"), make_store(tmp_path / "other")
    async with opened(other) as one:
        kept = await fill(one, "z")
    place = config.nodes[0].path
    async with opened(config) as one:
        files = await fill(one, "a")
        await add(one, config.store, "us-east-2", "us-east-1")
        place.rename(tmp_path / "failed")
        other.nodes[0].path.rename(place)
        assert (await do(one, "node_drain", node=REGIONS[0]))["drained"] is True
        assert (await do(one, "node_remove", node=REGIONS[0]))["emptied"] is False
        await is_right(one, files)
    place.rename(other.nodes[0].path)
    shutil.rmtree(other.nodes[1].path)
    async with opened(other) as one:
        await is_right(one, kept)


async def test_draining_can_be_called_off(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        await fill(one)
        await grow(one, config.store)
        await do(one, "node_drain", node="us-east-1", wait=False)
        assert load(config.store).node("us-east-1").draining is True
        await do(one, "node_drain", node="us-east-1", cancel=True)
        assert load(config.store).node("us-east-1").draining is False
        await one.put("later", content("later", 30))
        await one.store.committer.commit()
        assert held(one)["us-east-1"] > 0
        assert (await do(one, "node_drain", node="us-east-1"))["drained"] is True
        assert held(one)["us-east-1"] == 0


async def test_room_comes_back_where_shards_moved_away(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one)
        await grow(one, config.store)
        await do(one, "node_drain", node="us-east-1")
        await one.checkpoint()
        await one.checkpoint()
        assert [key for key, _ in one.rows(b"R")] == []
        node = one.store.log.members.all[0].node
        assert node is not None
        assert node.bytes_used() < 6 * MIB
        await is_right(one, files)


async def test_a_fourth_region_takes_shards_and_can_go_again(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one, "a")
        await add(one, config.store, "ap-east-1", "ap-east-1")
        files |= await fill(one, "bc")
        assert held(one)["ap-east-1"] > 0
        keeps_the_rule(one)
        assert (await do(one, "node_drain", node="us-west-1"))["drained"] is True
        keeps_the_rule(one)
        await do(one, "node_remove", node="us-west-1")
        await is_right(one, files)
    await survives_any_region(load(config.store), tmp_path, files)


async def test_no_region_gets_more_shards_than_may_be_lost(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store", code=Code.parse("4+2"))
    async with opened(config) as one:
        await add(one, config.store, "ap-east-1", "ap-east-1")
        files = await fill(one)
        await do(one, "node_drain", node="us-west-1")
        keeps_the_rule(one)
        await do(one, "node_remove", node="us-west-1")
    await survives_any_region(load(config.store), tmp_path, files)


async def test_new_data_is_safe_while_one_of_two_nodes_is_away(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        await grow(one, config.store)
    for name in ("us-east-1", "us-west-2"):
        (config.store / name).rename(tmp_path / name)
    async with opened(load(config.store)) as one:
        files = await fill(one)
        keeps_the_rule(one)
        assert one.rows(b"M") == []
        for name in ("us-east-1", "us-west-2"):
            (tmp_path / name).rename(config.store / name)
    async with opened(load(config.store)) as one:
        await one.store.comeback.catch_up(None)
        assert (await one.store.status())["healthy"] is True
        await is_right(one, files)


async def test_a_shard_that_fits_nowhere_is_not_moved_to_and_fro(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        await grow(one, config.store)
        await one.put("only", random.Random(1).randbytes(STRIPE_BYTES))
        await one.store.committer.commit()
        done = await do(one, "rebalance", action="start", wait=True)
        assert done["state"] == "done"
        assert done["shards"] <= 1


@pytest.mark.expects_log(GONE)
async def test_a_rebalance_goes_on_when_the_node_that_lacks_shards_is_back(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one)
        await add(one, config.store, "us-east-2", "us-east-1")
        node = one.store.log.members.all[3]
        node.config.path.rename(tmp_path / "away")
        await one.store.healer.look_at(node)
        for _ in range(2):
            with pytest.raises(NodeError, match=r"us-east-2 is down\."):
                await do(one, "rebalance", action="start", wait=True)
        assert (await do(one, "rebalance", action="status"))["state"] == "running"
        busy = r"^A rebalance is running already: wait for it, or stop it\.$"
        with pytest.raises(UsageError, match=busy):
            await do(one, "rebalance", action="start")
        (tmp_path / "away").rename(node.config.path)
        await one.store.comeback.catch_up(DEFAULTS.catch_up_shards_max)
        done = await do(one, "rebalance", action="start", wait=True)
        assert (done["state"], done["error"]) == ("done", "")
        with pytest.raises(UsageError, match=r"^No rebalance is running\.$"):
            await do(one, "rebalance", action="stop")
        assert held(one)["us-east-2"] > 0
        await is_right(one, files)


async def test_nothing_is_moved_to_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one)
        await add(one, config.store, "us-east-2", "us-east-1")
        real = DirectoryNode.space

        def space(node: DirectoryNode) -> Space:
            found = real(node)
            return replace(found, free=31 * MIB) if node.path.name == "us-east-2" else found

        with monkeypatch.context() as patch:
            patch.setattr(DirectoryNode, "space", space)
            for _ in range(2):
                with pytest.raises(NodeError, match="us-east-2 has no room left"):
                    await do(one, "rebalance", action="start", wait=True)
            with pytest.raises(UsageError, match="have room for 0 MiB, and us-east-1 holds"):
                await do(one, "node_drain", node="us-east-1")
            assert held(one)["us-east-2"] == 0
            await is_right(one, files)
        assert (await do(one, "node_drain", node="us-east-1"))["drained"] is True
        assert (await do(one, "rebalance", action="start", wait=True))["state"] == "done"
        await is_right(one, files)


async def test_a_node_can_be_removed_while_its_room_is_reclaimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        await add(one, config.store, "us-east-2", "us-east-1")
        member, real = one.store.log.members.all[0], DirectoryNode.delete
        begun, may_end = threading.Event(), threading.Event()

        def delete(self: DirectoryNode, kind: SegmentKind, segment: int) -> None:
            if self is member.node and not begun.is_set():
                begun.set()
                may_end.wait(20)
            real(self, kind, segment)

        monkeypatch.setattr(DirectoryNode, "delete", delete)
        files = await fill(one, "ab")
        # It has two segments, and the second is reclaimed after it was removed.
        member.shards.roll()
        files |= await fill(one, "cd")
        await do(one, "node_drain", node="us-east-1")
        await one.checkpoint()
        assert begun.is_set()
        await do(one, "node_remove", node="us-east-1")
        may_end.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        await is_right(one, files)


async def test_who_waits_for_a_drain_sees_that_the_node_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "LOOK_SECONDS", 0.5)
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        await fill(one, "a")
        await add(one, config.store, "us-east-2", "us-east-1")
        found = {}

        async def drain() -> None:
            found.update(await do(one, "node_drain", node="us-east-1"))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drain)
                while not one.store.rebalancer.drained:
                    await trio.testing.wait_all_tasks_blocked(0.01)
                await do(one, "node_remove", node="us-east-1")
                one.store.rebalancer._to_drain()
        assert found["drained"] is True


# --- what is refused ------------------------------------------------------------------


async def test_a_node_that_is_needed_stays(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one)
        for wrong, why in (
            (("node_remove", "us-east-1"), "drain it first"),
            (("node_drain", "us-east-1"), "last node of region us-east-1: code 2\\+1 puts 2 of"),
            (("node_drain", "nowhere"), "There is no node 'nowhere'"),
            (("node_remove", "nowhere"), "There is no node 'nowhere'"),
        ):
            with pytest.raises(UsageError, match=why):
                await do(one, wrong[0], node=wrong[1])
        await grow(one, config.store)
        await do(one, "node_drain", node="us-east-1", wait=False)
        one.store.log.members.reconfigured(
            one.store.log.members.all[0],
            replace(one.store.log.members.all[0].config, draining=True),
        )
        with pytest.raises(UsageError, match="last node of region us-east-1"):
            await do(one, "node_drain", node="us-east-2")
        await is_right(one, files)


async def test_of_two_nodes_that_are_drained_at_once_one_stays(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        await add(one, config.store, "us-east-2", "us-east-1")
        refused = []

        async def drain(name: str) -> None:
            try:
                await do(one, "node_drain", node=name, wait=False)
            except UsageError as error:
                refused.append(str(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, "us-east-1")
            nursery.start_soon(drain, "us-east-2")
        assert ["last node of region us-east-1" in why for why in refused] == [True]
    load(config.store)


async def test_a_node_with_shards_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one)
        await grow(one, config.store)

        async def nothing(*_: Any) -> int:
            return 0

        monkeypatch.setattr(one.store.rebalancer, "_move", nothing)
        with pytest.raises(NodeError, match="retried automatically"):
            await do(one, "node_drain", node="us-east-1")
        with pytest.raises(UsageError, match="still has"):
            await do(one, "node_remove", node="us-east-1")
        await is_right(one, files)


async def test_nodes_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    other = make_store(tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    async with opened(config) as one:
        for name, region, path in (
            ("us-east-1", "us-east-1", tmp_path / "new"),
            ("bad name", "us-east-1", tmp_path / "new"),
            ("metadata", "us-east-1", tmp_path / "new"),
            ("new", "bad/region", tmp_path / "new"),
            ("new", "us-east-1", config.store),
            ("new", "us-east-1", config.store / "us-west-1" / "new"),
            ("new", "us-east-1", tmp_path / "full"),
            ("new", "us-east-1", other.nodes[0].path),
            ("new", "us-east-1", other.store / "new"),
        ):
            with pytest.raises(FusestoreError):
                await do(one, "node_add", node=name, region=region, path=str(path))
        for weight in (0.0, -1.0, float("nan"), 1e9):
            with pytest.raises(UsageError):
                await add(one, tmp_path, "new", "us-east-1", weight)
    assert load(config.store) == config
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("step", ["claim", "configure"])
async def test_a_node_whose_directory_cannot_be_claimed_enters_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    config = make_store(tmp_path / "store")
    kind, error = {
        "claim": (DirectoryNode, NodeError("It cannot be claimed.")),
        "configure": (Members, ConfigError("It cannot be written.")),
    }[step]

    def refuse(*_: object) -> None:
        raise error

    async with opened(config) as one:
        before = (config.store / CONFIG_NAME).read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(kind, step, refuse)
            with pytest.raises(type(error)):
                await add(one, config.store, "us-east-2", "us-east-1")
        assert (config.store / CONFIG_NAME).read_bytes() == before
        assert len(one.store.log.members.all) == 3
        await add(one, config.store, "us-east-2", "us-east-1")
        assert (await one.store.status())["healthy"] is True
    assert len(load(config.store).nodes) == 4


async def test_nodes_are_not_changed_over_edits_that_were_not_mounted(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        edited = (config.nodes[0], replace(config.nodes[1], weight=3.0), config.nodes[2])
        write_store_config(replace(config, nodes=edited))
        with pytest.raises(ConfigError, match="edited"):
            await add(one, tmp_path, "new", "us-east-1")
    assert load(config.store).nodes == edited
    config = make_store(tmp_path / "other")
    async with opened(config) as one:
        await add(one, tmp_path, "new", "us-east-1")
        await do(one, "node_drain", node="new")
        drained = load(config.store)
        write_store_config(replace(drained, nodes=(edited[0], *drained.nodes[1:])))
        with pytest.raises(ConfigError, match="edited"):
            await do(one, "node_remove", node="new")
        write_store_config(drained)
        await do(one, "node_remove", node="new")


async def test_a_store_is_not_mounted_without_a_node_that_it_has(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        await grow(one, config.store)
        await fill(one)
    grown = load(config.store)
    write_store_config(config)
    with pytest.raises(ConfigError, match="lacks node us-east-2"):
        async with opened(config):
            pass
    write_store_config(grown)
    async with opened(grown) as one:
        assert (await one.store.status())["healthy"] is True


# --- the configuration -----------------------------------------------------------------


async def test_comments_in_the_configuration_stay(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    file = config.store / CONFIG_NAME
    text = file.read_text()
    text = text.replace('code = "2+1"', '# ours\ncode = "2+1"').replace(
        'path = "us-west-1"', 'path = "us-west-1" # the old disk\n# and its comment'
    )
    file.write_text(text)
    async with opened(load(config.store)) as one:
        await add(one, tmp_path, "us-west-2", "us-west-1", 1.5)
        await do(one, "node_drain", node="us-west-1", wait=False)
    for part in ("# ours\n", '"us-west-1" # the old disk\n# and its comment', "of new files"):
        assert part in file.read_text()
    assert "draining = true" in file.read_text()
    assert load(config.store).node("us-west-2") == NodeConfig(
        "us-west-2", "us-west-1", tmp_path / "us-west-2", 1.5
    )


async def test_a_store_without_weights_reads_as_before(tmp_path: Path) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one)
        value = one.store.log.engine.get(store_rows.NODES_KEY)
        assert value is not None
        assert all(row.keys() <= OLD_FIELDS for row in json.loads(value))
    assert "weight" not in (config.store / CONFIG_NAME).read_text()
    async with opened(config) as one:
        await is_right(one, files)


OLD_FIELDS = {"id", "name", "region", "path", "in_sync", "holds"}


# --- from the nodes alone --------------------------------------------------------------


@pytest.mark.parametrize("configured", [True, False])
async def test_a_grown_store_is_recovered_from_its_nodes(tmp_path: Path, configured: bool) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one)
        await grow(one, config.store)
        await do(one, "rebalance", action="start", wait=True)
        await do(one, "node_drain", node="us-west-1")
        await do(one, "node_remove", node="us-west-1")
        await do(one, "node_drain", node="us-east-2", wait=False)
        files |= await fill(one, "d")
    grown = load(config.store)
    shutil.rmtree(config.metadata)
    shutil.rmtree(config.store / "us-east-1")
    if not configured:
        (config.store / CONFIG_NAME).unlink()
    recover(config.store, [], None, accept_loss=False, progress=lambda message: None)
    found = load(config.store)
    assert set(found.nodes) == set(grown.nodes)
    async with opened(found) as one:
        await is_right(one, files)
        await do(one, "repair", node="us-east-1")
        assert (await one.store.status())["healthy"] is True
    await survives_any_region(found, tmp_path, files)


# --- kills ------------------------------------------------------------------------------


@contextmanager
def killed_now_and_then(
    config: StoreConfig,
    to: Path,
    monkeypatch: pytest.MonkeyPatch,
    chance: random.Random,
    often: int,
) -> Iterator[list[StoreConfig]]:
    """Meanwhile, before one in so many changes of a file, a copy as a kill would leave it.

    Nothing else is written while a copy is made.
    """
    copies: list[StoreConfig] = []
    alone = threading.RLock()

    def watch(owner: Any, name: str, often: int) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            with alone:
                if chance.randrange(often) == 0:
                    target = to / f"killed-{len(copies)}"
                    shutil.copytree(config.store, target, ignore=shutil.ignore_patterns("*.sock"))
                    copies.append(load(target))
                return real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    with monkeypatch.context():
        for name in ("write", "flush", "truncate", "delete", "punch"):
            watch(DirectoryNode, name, often)
        watch(Engine, "write", 8)
        watch(node_identity, "write_whole_in", 2)
        watch(store_config_write, "write_whole", 2)
        watch(topology, "_clear", 1)
        watch(DirectoryNode, "remove", 1)
        yield copies
    monkeypatch.undo()


async def test_a_kill_at_any_moment_keeps_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool, pytestconfig: pytest.Config
) -> None:
    """While nodes are added, shards rebalanced, a node drained and removed."""
    seed = pytestconfig.getoption("--model-seed")
    print("seed", seed)
    chance = random.Random(seed)
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one, "ab", 8)
        often = 4 if long else 30
        with killed_now_and_then(config, tmp_path, monkeypatch, chance, often) as copies:
            await grow(one, config.store)
            await do(one, "rebalance", action="start", wait=True)
            await do(one, "node_drain", node="eu-west-1")
            await do(one, "node_remove", node="eu-west-1")
        await is_right(one, files)
    assert len(copies) > 5
    print(len(copies), "kills")
    for copy in copies:
        async with opened(copy) as one:
            await is_right(one, files)
            with trio.fail_after(60):
                while not all(member.in_sync for member in one.store.log.members.all):
                    await one.store.comeback.catch_up(None)
            if one.store.rebalancer.row.state == "running":
                await do(one, "rebalance", action="start", wait=True)
            for member in list(one.store.log.members.all):
                if member.config.draining:
                    await do(one, "node_drain", node=member.name)
                    await do(one, "node_remove", node=member.name)
            keeps_the_rule(one)
            await is_right(one, files)
            assert (await one.store.status())["healthy"] is True
        shutil.rmtree(copy.store)


async def test_nodes_keep_their_ids_through_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the file has a node that never joined, and the checkpoint does not know the new."""
    config = make_store(tmp_path / "store")
    copies: list[StoreConfig] = []
    real = Engine.write

    def killed(engine: Engine) -> None:
        copies.append(crashed(config, tmp_path / f"killed-{len(copies)}"))
        real(engine)

    async with opened(config) as one:
        files = await fill(one, "ab")
        with monkeypatch.context() as patch:
            patch.setattr(one.store.repairer, "join", None)
            with pytest.raises(TypeError):
                await add(one, config.store, "us-east-2", "us-east-1")
        monkeypatch.setattr(Engine, "write", killed)
        await add(one, config.store, "us-west-2", "us-west-1")
        monkeypatch.undo()
        ids = {member.name: member.id for member in one.store.log.members.all}
        assert ids["us-west-2"] == 5
    assert len(copies) > 1
    for copy in copies:
        async with opened(copy) as one:
            found = {member.name: member.id for member in one.store.log.members.all}
            assert found == {**ids, "us-east-2": 4}
            await is_right(one, files)


@pytest.mark.expects_log(OUT_OF_USE)
async def test_a_node_that_fails_while_it_is_given_shards_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_store(tmp_path / "store")
    async with opened(config) as one:
        files = await fill(one)
        await grow(one, config.store)
        target = one.store.log.members.named("us-east-2")
        assert target is not None
        real = one.store.healer.rebuilder._prove
        proved = 0

        async def fails_once(member: Member, written: Any) -> tuple[int, int]:
            nonlocal proved
            proved += member is target
            if member is target and proved == 1:
                raise NodeError("It failed.")
            return await real(member, written)

        monkeypatch.setattr(one.store.healer.rebuilder, "_prove", fails_once)
        await do(one, "rebalance", action="start", wait=False)
        with trio.fail_after(30):
            while not target.out_of_use:
                await trio.testing.wait_all_tasks_blocked(0.01)
        await is_right(one, files)
    async with opened(load(config.store)) as one:
        await do(one, "rebalance", action="start", wait=True)
        await is_right(one, files)
        assert (await one.store.status())["healthy"] is True


@pytest.mark.parametrize("which", ["us-east-1", "us-east-2"])
@pytest.mark.expects_log(HUNG, SLOW, CLOSED)
async def test_a_node_that_hangs_while_shards_move_stops_nobody(tmp_path: Path, which: str) -> None:
    config = limited(
        make_store(tmp_path / "store"),
        node_seconds_max=1.0,
        read_seconds_max=1.0,
        retry_seconds_min=0.1,
    )
    async with opened(config) as one:
        files = await fill(one)
        await add(one, config.store, "us-east-2", "us-east-1")
        member = one.store.log.members.named(which)
        assert member is not None
        node = HangingNode(member.node, after=10)
        member.node = node
        try:
            if which == "us-east-2":  # there is no other for the shards to go to
                with pytest.raises(NodeError, match="retried automatically"):
                    await do(one, "node_drain", node="us-east-1")
                assert member.out_of_use
            else:
                assert (await do(one, "node_drain", node="us-east-1"))["drained"] is True
                assert member.out_of_use
            others = [other for other in one.store.log.members.all if other is not member]
            assert not any(other.out_of_use for other in others)
            files |= await fill(one, "d")
            await is_right(one, files)
        finally:
            node.left = None
            node.awake.set()
        with trio.fail_after(20):
            while not all(member.in_sync for member in one.store.log.members.all):
                await one.store.comeback.catch_up(None)
                await trio.sleep(0.05)
        assert (await do(one, "node_drain", node="us-east-1"))["drained"] is True
        await do(one, "node_remove", node="us-east-1")
        await is_right(one, files)
        assert (await one.store.status())["healthy"] is True
