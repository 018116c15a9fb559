"""Damage to the files of a store, and a model of what can still be read.

The fault model: sectors of a file cannot be read, bits of it flip, parts of it are zeros or
garbage, it is cut off, or it is gone with its node; in one file, or in two files in different
places (two nodes, or a node and STORE).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusestore.config.node_identity import read_identity
from fusestore.config.store_config import CONFIG_NAME, StoreConfig
from fusestore.errors import FusestoreError
from fusestore.format import file_rows
from fusestore.format.file_rows import Extent
from fusestore.format.records import SegmentKind
from fusestore.format.segment_numbers import segment_path
from fusestore.format.stripe_rows import Stripe
from fusestore.limits import BLOCK_BYTES
from support.faults import BadSectors
from support.opened_store import Opened
from support.whole_tree import State

SECTOR_BYTES = 512
Range = tuple[int, int]


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file."""

    node: str
    """The node, or "" for what lies in STORE."""
    file: str
    """Relative to STORE."""
    kind: str
    ranges: tuple[Range, ...]

    def __str__(self) -> str:
        return f"{self.file} {self.kind} {list(self.ranges[:4])}"


@dataclass
class World:
    """A store whose tree is known, and where its bytes lie."""

    config: StoreConfig
    state: State
    stripes: dict[int, Stripe]
    extents: dict[int, list[Extent]]
    """By inode."""
    nodes: dict[int, str]
    """Names, by id."""
    sources: dict[str, Path] = field(default_factory=dict)
    """The store at rest, and as a crash left it."""


def map_of(one: Opened, config: StoreConfig, state: State) -> World:
    """Where the bytes of an open store lie."""
    stripes = {
        int.from_bytes(key[1:9], "big"): Stripe.decode(value) for key, value in one.rows(b"S")
    }
    extents: dict[int, list[Extent]] = {ino: [] for ino in state.contents}
    for ino, found in extents.items():
        first, end = file_rows.extent_key(ino, 0), file_rows.extent_key(ino + 1, 0)
        found += [Extent.decode(*row) for row in one.store.log.engine.scan(first, end)]
    nodes = {member.id: member.name for member in one.store.log.members.all}
    return World(config, state, stripes, extents, nodes)


def files_of(config: StoreConfig, place: str) -> list[Path]:
    """The files that a node has, or STORE besides its nodes."""
    if place:
        roots = [config.node(place).path]
    else:
        roots = [config.store / CONFIG_NAME, config.metadata, config.store / "fusestore.lock"]
    found = []
    for root in roots:
        found += [root] if root.is_file() else [p for p in sorted(root.rglob("*")) if p.is_file()]
    return found


def choose(config: StoreConfig, chance: random.Random) -> list[Damage]:
    """Some damage: in one place, or in two different ones."""
    names = [node.name for node in config.nodes]
    places = [*names, *names, ""]
    first = chance.choice(places)
    found = [_damage(config, first, chance)]
    if chance.random() < 0.7:
        second = chance.choice([place for place in places if place != first])
        found.append(_damage(config, second, chance))
    return found


def _damage(config: StoreConfig, place: str, chance: random.Random) -> Damage:
    if place and chance.random() < 0.08:
        return Damage(place, str(config.node(place).path.relative_to(config.store)), "gone", ())
    files = [path for path in files_of(config, place) if path.stat().st_size]
    # The small files are as important as the large ones.
    file = chance.choice([f for f in files if f.name != "lock.mdb"])
    size = len(file.read_bytes().rstrip(b"\0")) or file.stat().st_size
    kind = chance.choice(["unreadable"] * 4 + ["flip"] * 4 + ["zeros", "garbage", "cut"])
    ranges: list[Range] = []
    for _ in range(chance.choice([1, 1, 1, 1, 2, 3, 8])):
        at = chance.randrange(size)
        if kind == "flip":
            ranges.append((at, at + 1))
            continue
        start = at // SECTOR_BYTES * SECTOR_BYTES
        sectors = chance.choice([1, 8, 8, 64, 1 << 20])
        ranges.append((start, min(start + sectors * SECTOR_BYTES, file.stat().st_size)))
    if kind == "cut":
        ranges = [(ranges[0][0], file.stat().st_size)]
    relative = str(file.relative_to(config.store))
    return Damage(place, relative, kind, tuple(sorted(ranges)))


def spoil(
    config: StoreConfig, damages: Iterable[Damage], bad: BadSectors, chance: random.Random
) -> None:
    """Do the damage."""
    for damage in damages:
        path = config.store / damage.file
        if damage.kind == "gone":
            shutil.rmtree(path)
            continue
        if damage.kind == "cut":
            with path.open("r+b") as file:
                file.truncate(damage.ranges[0][0])
            continue
        for start, end in damage.ranges:
            if damage.kind == "unreadable":
                bad.add(path, start, end)
                continue
            with path.open("r+b") as file:
                file.seek(start)
                before = file.read(end - start)
                file.seek(start)
                if damage.kind == "flip":
                    file.write(bytes([before[0] ^ 1 << chance.randrange(8)]))
                else:
                    blank = damage.kind == "zeros"
                    file.write(bytes(len(before)) if blank else chance.randbytes(len(before)))


def usable_nodes(config: StoreConfig, original: Path) -> set[str]:
    """Names of the nodes whose identity can be read, and is theirs."""
    found = set()
    for node in config.nodes:
        try:
            identity = read_identity(node.path)
        except FusestoreError:
            continue
        same = read_identity(original / node.name)
        if (identity.store, identity.node, identity.version) == (
            same.store,
            same.node,
            same.version,
        ):
            found.add(node.name)
    return found


def lost_files(world: World, damages: Sequence[Damage], usable: set[str]) -> set[int]:
    """Inodes of the files that have bytes which no k shards give any more."""
    usable = usable - {damage.node for damage in damages if damage.kind == "gone"}
    broken: dict[tuple[str, str], list[Range]] = {}
    for damage in damages:
        for start, end in damage.ranges:
            broken.setdefault((damage.node, damage.file), []).append((start, end))
    there = {number: _blocks(world, row, broken, usable) for number, row in world.stripes.items()}
    return {
        ino
        for ino, extents in world.extents.items()
        if not all(_readable(world, there, extent) for extent in extents)
    }


def _blocks(
    world: World,
    row: Stripe,
    broken: dict[tuple[str, str], list[Range]],
    usable: set[str],
) -> list[set[int]]:
    """By block: the indices of the shards in which it is whole."""
    count = -(-row.shard_length // BLOCK_BYTES)
    whole: list[set[int]] = [set() for _ in range(count)]
    for index, place in enumerate(row.shards):
        name = world.nodes[place.node]
        if not place.written or name not in usable:
            continue
        relative = str(
            (
                world.config.node(name).path / segment_path(SegmentKind.SHARDS, place.segment)
            ).relative_to(world.config.store)
        )
        ranges = broken.get((name, relative), [])
        for block in range(count):
            start = place.offset + block * BLOCK_BYTES
            end = place.offset + min((block + 1) * BLOCK_BYTES, row.shard_length)
            if not any(a < end and start < b for a, b in ranges):
                whole[block].add(index)
    return whole


def _readable(world: World, there: dict[int, list[set[int]]], extent: Extent) -> bool:
    row = world.stripes.get(extent.stripe)
    if row is None:
        return True  # its bytes are in the journals
    at, end = extent.stripe_offset, extent.stripe_offset + extent.length
    while at < end:
        index, inside = divmod(at, row.shard_length)
        block = inside // BLOCK_BYTES
        whole = there[extent.stripe][block]
        if index not in whole and len(whole) < row.code.k:
            return False
        at = index * row.shard_length + min((block + 1) * BLOCK_BYTES, row.shard_length)
    return True
