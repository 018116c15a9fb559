"""A store with files that are known, and its shards as they lie on the disks."""

from __future__ import annotations

import random

from fusestore.config.store_config import StoreConfig
from fusestore.format.records import SegmentKind
from fusestore.format.segment_numbers import segment_path
from fusestore.limits import STRIPE_BYTES
from support.opened_store import Opened, opened

FILES = {f"f{i}": random.Random(i).randbytes(900_000) for i in range(6)}
FILES["zeros"] = bytes(2 * STRIPE_BYTES)


async def fill(config: StoreConfig) -> None:
    """Write FILES, with a checkpoint after each."""
    async with opened(config) as one:
        for name, data in FILES.items():
            await one.put(name, data)
            await one.checkpoint()


async def all_right(one: Opened) -> None:
    """All of FILES read as they were written."""
    for name, data in FILES.items():
        assert await one.get(name) == data, name


def shard_bytes(config: StoreConfig) -> dict[str, bytes]:
    """All shard segments of a store."""
    return {
        f"{node.name}/{path.name}": path.read_bytes()
        for node in config.nodes
        for path in sorted((node.path / "shards").iterdir())
    }


def damage(config: StoreConfig, node: int, segment: int, offset: int) -> None:
    """Change a byte of a shard segment."""
    path = config.nodes[node - 1].path / segment_path(SegmentKind.SHARDS, segment)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x21]))
