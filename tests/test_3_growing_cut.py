"""Wherever the power is cut while shards move between nodes, nothing is lost.

The random work of test_2_power_cut, on six nodes in three regions.  At first three of them
are drained; then they take part, and a rebalance begins; then one of the others is drained.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from fusestore.config.node_identity import IDENTITY_VERSION, NodeIdentity, write_identity
from fusestore.config.store_config import NodeConfig, StoreConfig
from fusestore.config.store_config_write import write_store_config
from fusestore.limits import Limits
from fusestore.store.store import Store
from support.cuts import Cut
from support.logs import DROPPED
from support.machine import Machine, told
from support.opened_store import make, opened
from support.random_work import CODES, STEPS, History, Player, small_limits
from support.tree_model import Model, State

pytestmark = pytest.mark.expects_log(DROPPED)

CUTS = 12


def six_nodes(place: Path, code: str, chance: random.Random, limits: Limits) -> StoreConfig:
    """A new store with two nodes a region, of which the second ones are drained."""
    config = make(place / "store", code, limits)
    more = []
    for node in config.nodes:
        name = node.name.replace("1", "2")
        weight = chance.choice((0.5, 1.0, 2.0))
        other = NodeConfig(name, node.region, config.store / name, weight, draining=True)
        other.path.mkdir()
        identity = NodeIdentity(config.uuid, name, node.region, config.uuid, IDENTITY_VERSION)
        write_identity(other.path, identity)
        more.append(other)
    config = replace(config, nodes=(*config.nodes, *more))
    write_store_config(config)
    return config


async def change(store: Store, name: str, *, draining: bool) -> None:
    """Drain a node, or let it have shards again."""
    await store.topology.drain(name, cancel=not draining, wait=False, progress=lambda m: None)


def work(config: StoreConfig, chance: random.Random) -> tuple[History, int]:
    """Random work while nodes come and go; how many bytes were moved meanwhile."""
    states: list[State] = []
    moved = 0

    async def main() -> None:
        nonlocal moved
        async with opened(config) as one, trio.open_nursery() as background:
            player = Player(machine, one, background, chance, states, Model())
            player.end()
            store = one.store
            for step in range(STEPS):
                await player.step()
                if step == STEPS // 3:
                    while store.log.counters.stripes < 12:
                        await player.write()
                        await player.commit()
                    for node in config.nodes[3:]:
                        await change(store, node.name, draining=False)
                    await store.rebalancer.command(
                        "start", None, wait=False, progress=lambda m: None
                    )
                if step == STEPS * 2 // 3:
                    name = chance.choice(config.nodes[:3]).name
                    await change(store, name, draining=True)
            await player.close_unused()
            for _ in range(10):
                await player.write()
            await trio.sleep(15)
            moved = store.rebalancer.moved.total()

    with Machine(config, chance) as machine, told("at work"):
        machine.run(main)
    return History(machine.tape, states, config), moved


def campaign(seed: int, number: int, cuts: int, place: Path) -> None:
    """Some work, and many cuts of it."""
    chance = random.Random(f"growing {seed} {number}")
    with told(f"--model-seed {seed}, work {number}"):
        limits = replace(
            small_limits(chance),
            repair_batch=chance.choice((1, 2, 16)),
            stripe_bytes=chance.choice((64 << 10, 256 << 10)),
        )
        config = six_nodes(place, chance.choice(CODES), chance, limits)
        history, moved = work(config, chance)
        assert moved > 0
        for cut in range(cuts):
            chance = random.Random(f"growing {seed} {number} {cut}")
            at = history.tape.choose(chance)
            Cut(history, at, chance, place / f"cut{cut}").check()


@pytest.mark.parametrize("number", range(2))
def test_the_power_is_cut_while_shards_move(
    number: int, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    campaign(pytestconfig.getoption("--model-seed"), number, CUTS, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", range(100, 130))
def test_the_power_is_cut_often_while_shards_move(
    number: int, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    campaign(pytestconfig.getoption("--model-seed"), number, 2 * CUTS, tmp_path)
