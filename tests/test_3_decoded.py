"""What is decoded is verified: a parity that was computed wrong never becomes wrong bytes.

The fault model: while a stripe is sealed, some bytes of its parity come out wrong (memory,
processor), before they get their checksum.  So each shard matches its own checksum.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusestore.config.store_config import StoreConfig
from fusestore.errors import LostError
from fusestore.format import erasure, stripe_rows
from fusestore.format.stripe_rows import Stripe
from fusestore.members.standing import State
from support.filled_store import damage
from support.logs import CORRUPT, LOST_STRIPE, UNREAD_FILE
from support.opened_store import Opened, make, opened

DATA = random.Random(1).randbytes(3 << 20)


@contextmanager
def wrong_parity(*which: int, at: int = 1000) -> Iterator[None]:
    """Stripes that are sealed meanwhile get these parities with a byte that is wrong."""
    real: Callable[..., None] = erasure.encode

    def flaky(code: Any, length: int, data: Any, parity: Any) -> None:
        real(code, length, data, parity)
        for index in which:
            parity[index][at] ^= 0x10

    erasure.encode = flaky
    try:
        yield
    finally:
        erasure.encode = real


async def seal(config: StoreConfig, *which: int, at: int = 1000) -> None:
    """A store with a file of which these parities are wrong, and one that is right."""
    async with opened(config) as one:
        with wrong_parity(*which, at=at):
            await one.put("f", DATA)
            await one.checkpoint()
        await one.put("g", DATA)


async def either(one: Opened, name: str) -> str:
    """Whether a file reads right, or not at all."""
    try:
        assert await one.get(name) == DATA
    except LostError:
        return "lost"
    return "right"


@pytest.mark.parametrize("at", [0, 1000, 349_000])
@pytest.mark.expects_log(LOST_STRIPE)
async def test_a_region_is_lost_and_the_only_parity_is_wrong(tmp_path: Path, at: int) -> None:
    config = make(tmp_path / "store")
    await seal(config, 0, at=at)
    seen = set()
    for node in config.nodes:
        away = node.path.with_suffix(".away")
        node.path.rename(away)
        async with opened(config) as one:
            assert await either(one, "g") == "right"
            seen.add(await either(one, "f"))
            assert one.store.reader.errors or "lost" not in seen
        away.rename(node.path)
    assert "lost" in seen


@pytest.mark.parametrize(("code", "which"), [("4+2", 0), ("4+2", 1), ("1+2", 1), ("6+3", 1)])
@pytest.mark.expects_log(CORRUPT)
async def test_other_shards_are_taken_where_there_are_more(
    tmp_path: Path, code: str, which: int
) -> None:
    """A data shard of each stripe is rotten, a parity is wrong: others give the bytes."""
    config = make(tmp_path / "store", code)
    await seal(config, which)
    async with opened(config) as one:
        places = [Stripe.decode(value).shards[0] for _, value in one.rows(b"S")]
    for place in places:
        damage(config, place.node, place.segment, place.offset + 1000)
    async with opened(config) as one:
        assert await either(one, "f") == "right"
        assert await either(one, "g") == "right"
        await one.store.repairer.healer.heal_all()
        assert one.rows(b"M") == []
    async with opened(config) as one:
        degraded = one.store.reader.degraded
        assert await either(one, "f") == "right"
        assert one.store.reader.degraded == degraded


@pytest.mark.expects_log(UNREAD_FILE, LOST_STRIPE)
async def test_repair_counts_no_shard_that_is_not_right(tmp_path: Path) -> None:
    """A node is wiped: what cannot be verified is named, the node is not blamed, and joins."""
    config = make(tmp_path / "store")
    await seal(config, 0)
    node = config.nodes[0]
    shutil.rmtree(node.path)
    async with opened(config) as one:
        done = await one.store.repairer.repair(node.name, lambda message: None)
        assert done["unrepairable"] == ["/f"]
        assert all(member.state is State.UP for member in one.store.log.members.all)
        assert await either(one, "g") == "right"
        assert await either(one, "f") == "lost"
    for other in config.nodes[1:]:
        away = other.path.with_suffix(".away")
        other.path.rename(away)
        async with opened(config) as one:
            assert await either(one, "g") == "right"
            assert await either(one, "f") == "lost"
        away.rename(other.path)


@pytest.mark.expects_log(CORRUPT, LOST_STRIPE)
async def test_a_node_is_not_drained_of_shards_that_cannot_be_verified(tmp_path: Path) -> None:
    """A data shard is rotten and the parity is wrong: nothing wrong is moved."""
    config = make(tmp_path / "store")
    await seal(config, 0)
    async with opened(config) as one:
        rows = [(stripe_rows.decode_stripe_key(k), Stripe.decode(v)) for k, v in one.rows(b"S")]
    place = rows[0][1].shards[0]
    damage(config, place.node, place.segment, place.offset + 1000)
    async with opened(config) as one:
        target = one.store.log.members.by_id[place.node % 3 + 1]
        with pytest.raises(LostError):
            async with one.store.repairer.healer.busy:
                await one.store.repairer.healer.rebuilder.move(target, [(*rows[0], 0)])
        assert one.store.log.stripe(rows[0][0]) == rows[0][1]
        assert await either(one, "g") == "right"
        assert await either(one, "f") == "lost"
