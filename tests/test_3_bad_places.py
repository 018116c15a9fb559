"""A bad place on a disk costs the bytes that lie there, not the node.

Sectors of shards and journals cannot be read, with disks that give other sectors in their
place when they are written, and with disks that do not; and `node.toml` rots.  The node
stays in use, what was lost is rebuilt elsewhere, and nobody else is blamed.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio

from fusestore.commit.metadata_dump import MetadataDumper
from fusestore.config.mkfs import make_store
from fusestore.config.node_identity import (
    IDENTITY_NAME,
    IDENTITY_VERSION,
    NodeIdentity,
    read_identity,
    write_identity,
)
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import (
    DamagedIdentityError,
    DamagedMetadataError,
    MetadataError,
    NodeError,
    NodeFullError,
    NodeIdentityError,
    ReplayError,
    UsageError,
)
from fusestore.format.erasure import Code
from fusestore.format.records import HEADER_BYTES, SegmentKind
from fusestore.format.segment_numbers import segment_path
from fusestore.format.stripe_rows import Stripe
from fusestore.log.journal_copy import copy_journals
from fusestore.members.opening import open_node
from fusestore.members.standing import State
from fusestore.nodes.directory import DirectoryNode
from fusestore.rescue.recover import recover
from fusestore.store.opening import open_store
from support.faults import BadSectors
from support.logs import (
    FOREIGN_FILES,
    NOT_WHERE_ITS_ROW_SAYS,
    RECOGNIZED,
    SCRUBBED,
    UNREAD_FILE,
)
from support.opened_store import (
    REGIONS,
    Opened,
    healthy,
    limited,
    loses_a_region,
    make,
    opened,
    repair,
    scrub,
)
from support.recovery import copy_tree, dump_metadata, forget, journal_records, recovered
from support.whole_tree import made, put, read, read_files, write

pytestmark = pytest.mark.expects_log(UNREAD_FILE, SCRUBBED)

FILES = made("bad places", *(f"f{i}" for i in range(6)), size=200_000)
SECTOR = 512


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make(tmp_path / "store")


@pytest.fixture(params=[False, True], ids=["stays bad", "remaps"])
def bad(request: pytest.FixtureRequest) -> Iterator[BadSectors]:
    with BadSectors(remaps=request.param) as sectors:
        yield sectors


async def a_shard(config: StoreConfig, node: int) -> tuple[Path, int, int]:
    """The file of a data shard on a node, where its payload begins, and where it ends."""
    async with open_store(config, read_only=True) as store:
        rows = [Stripe.decode(value) for _, value in store.log.engine.scan(b"S", b"T")]
    row = next(row for row in rows if node + 1 in [p.node for p in row.shards[: row.code.k]])
    (place,) = [place for place in row.shards if place.node == node + 1]
    path = config.nodes[node].path / segment_path(SegmentKind.SHARDS, place.segment)
    return path, place.offset, place.offset + row.shard_length


async def all_in_use(one: Opened) -> None:
    """No node was blamed, however long ago."""
    await one.store.status()
    for member in one.store.log.members.all:
        assert member.state is State.UP, member.standing.error


# --- shards


def first_sector(start: int, end: int) -> list[tuple[int, int]]:
    return [(start // SECTOR * SECTOR + SECTOR, start // SECTOR * SECTOR + 2 * SECTOR)]


def header(start: int, end: int) -> list[tuple[int, int]]:
    return [(start - HEADER_BYTES, start)]


def header_and_payload(start: int, end: int) -> list[tuple[int, int]]:
    return [(start - HEADER_BYTES, end)]


def several(start: int, end: int) -> list[tuple[int, int]]:
    return [(at, at + SECTOR) for at in range(start, end - SECTOR, 20_000)]


@pytest.mark.parametrize("where", [first_sector, header, header_and_payload, several])
@pytest.mark.parametrize("seen_by", ["read", "scrub", "repair"])
async def test_a_bad_sector_in_a_shard_costs_that_shard(
    config: StoreConfig,
    bad: BadSectors,
    where: Callable[[int, int], list[tuple[int, int]]],
    seen_by: str,
) -> None:
    await write(config, FILES)
    path, start, end = await a_shard(config, 1)
    for place in where(start, end):
        bad.add(path, *place)
    async with opened(config) as one:
        assert await read_files(one) == FILES
        if seen_by == "scrub":
            await scrub(one)
        if seen_by == "repair":
            await repair(one, REGIONS[1])
        await healthy(one)
        await all_in_use(one)
        if where is not header:  # which nothing reads while all is well
            found = await scrub(one)
            assert (found["found"], found["left"]) == (0, 0), "it lies elsewhere"
        assert one.store.log.rows_in_doubt == 0
        await one.checkpoint()
        await all_in_use(one)
    await loses_a_region(config, 0, FILES)


async def test_two_nodes_with_a_bad_sector_each(config: StoreConfig, bad: BadSectors) -> None:
    await write(config, FILES)
    for node, sector in ((0, 3), (2, 90)):
        path, start, _ = await a_shard(config, node)
        first = start // SECTOR + sector
        bad.add(path, first * SECTOR, (first + 1) * SECTOR)
    async with opened(config) as one:
        assert (await scrub(one))["state"] == "done"
        await healthy(one)
        await all_in_use(one)
        await put(one, made("more", "more"))
    assert await read(config) == FILES | made("more", "more")
    await loses_a_region(config, 1, FILES)


# --- dead shards


@pytest.mark.parametrize("names", [["f0"], list(FILES)], ids=["one of a segment", "all"])
async def test_a_dead_shard_that_cannot_be_read_is_kept(
    config: StoreConfig, bad: BadSectors, names: list[str]
) -> None:
    await write(config, FILES)
    path, start, _ = await a_shard(config, 1)
    size = path.stat().st_blocks
    bad.add(path, start - HEADER_BYTES, start)
    async with opened(config) as one:
        for name in names:
            one.delete(name)
        for _ in range(3):
            await one.checkpoint()
            await trio.sleep(0.1)
        await all_in_use(one)
        assert path.exists()
        assert path.stat().st_blocks <= size
        left = {name: data for name, data in FILES.items() if name not in names}
        assert await read_files(one) == left
    bad.clear()
    async with opened(config) as one:
        with trio.fail_after(10):
            while one.rows(b"R"):
                await one.checkpoint()
        assert await read_files(one) == left


@pytest.mark.parametrize("place", [0, 4096])
async def test_a_stray_segment_that_cannot_be_read_is_kept(
    config: StoreConfig, bad: BadSectors, place: int
) -> None:
    await write(config, FILES)
    source, _, _ = await a_shard(config, 1)
    stray = source.with_name("00000009.seg")
    stray.write_bytes(bytes(100_000))
    bad.add(stray, place, place + SECTOR)
    async with opened(config) as one:
        await one.checkpoint()
        await trio.sleep(0.2)
        await all_in_use(one)
        assert stray.exists()


MOVES = r"members\.member: Node \S+ moves to "


@pytest.mark.parametrize("node", [1, 2])
@pytest.mark.expects_log(MOVES)
async def test_a_node_that_moves_takes_along_what_others_lack(
    config: StoreConfig, bad: BadSectors, tmp_path: Path, node: int
) -> None:
    """No shard of another node can be read, and a few of its own cannot."""
    await write(config, FILES)
    path, start, _ = await a_shard(config, 0)
    bad.add(path, start, start + SECTOR)
    async with opened(config) as one:
        await scrub(one)
        for other in (config.nodes[node].path / "shards").iterdir():
            bad.add(other, 0, other.stat().st_size)
        done = await one.store.repairer.repair(
            REGIONS[0], lambda message: None, to=tmp_path / "new"
        )
        assert (done["stripes_lost"], done["unrepairable"]) == (0, [])
        assert done["shards_copied"] >= len(FILES)
        shutil.rmtree(config.nodes[0].path)
        assert await read_files(one) == FILES
        await scrub(one)
        await healthy(one)
    await loses_a_region(load(config.store), node, FILES)


@pytest.mark.parametrize("how", ["gone", "hangs"])
@pytest.mark.expects_log(MOVES, UNREAD_FILE, r"What was not copied yet is rebuilt from other nodes")
async def test_a_node_whose_old_place_fails_while_it_moves_is_rebuilt(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    await write(config, FILES)
    config = limited(config, node_seconds_max=1.0, repair_batch=2)
    reads = 0
    read_segment = DirectoryNode.read

    def read_some(node: DirectoryNode, *arguments: Any) -> bytes:
        nonlocal reads
        if node.path == config.nodes[0].path and threading.current_thread() is not main:
            reads += 1
            if reads > 4 and how == "gone":
                raise NodeIdentityError(f"Node {REGIONS[0]} is gone from {node.path}: as told.")
            if reads > 4:
                time.sleep(3)
        return read_segment(node, *arguments)

    main = threading.current_thread()
    async with opened(config) as one:
        monkeypatch.setattr(DirectoryNode, "read", read_some)
        done = await one.store.repairer.repair(
            REGIONS[0], lambda message: None, to=tmp_path / "new"
        )
        assert (done["stripes_lost"], done["unrepairable"]) == (0, [])
        assert done["shards_rebuilt"] > 0
        assert await read_files(one) == FILES
        assert (await one.store.status())["healthy"]
    await loses_a_region(load(config.store), 1, FILES)


async def test_a_node_does_not_move_while_the_store_needs_it(
    config: StoreConfig, tmp_path: Path
) -> None:
    await write(config, FILES)
    config.nodes[2].path.rename(tmp_path / "away")
    async with opened(config) as one:
        with pytest.raises(UsageError, match=f"cannot move now, as {REGIONS[2]} is not up"):
            await one.store.repairer.repair(REGIONS[0], lambda message: None, to=tmp_path / "new")
        assert not (tmp_path / "new").exists()
        await one.put("more", b"more")
        await one.store.committer.commit()


@pytest.mark.expects_log(MOVES)
async def test_a_node_stays_where_it_is_if_the_new_place_fails(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(config, FILES)
    write_segment = DirectoryNode.write

    def write_some(node: DirectoryNode, *arguments: Any) -> None:
        if node.path == tmp_path / "new":
            raise NodeFullError("There is no room on the new disk.")
        write_segment(node, *arguments)

    async with opened(config) as one:
        with monkeypatch.context() as patch:
            patch.setattr(DirectoryNode, "write", write_some)
            with pytest.raises(NodeError, match="stays where it is: There is no room"):
                await one.store.repairer.repair(
                    REGIONS[0], lambda message: None, to=tmp_path / "new"
                )
        await healthy(one)
        await all_in_use(one)
        await one.store.repairer.repair(REGIONS[0], lambda message: None, to=tmp_path / "new")
        assert await read_files(one) == FILES
    await loses_a_region(load(config.store), 1, FILES)


# --- journals


def stays_bad(monkeypatch: pytest.MonkeyPatch, bad: BadSectors) -> None:
    """Journals that are written anew cannot be read either."""
    replace = DirectoryNode.replace

    def replaced(self: DirectoryNode, kind: SegmentKind, segment: int, content: Any) -> None:
        replace(self, kind, segment, content)
        if self.path.name != REGIONS[0]:
            bad.add(self.path / segment_path(kind, segment), 0, SECTOR)

    monkeypatch.setattr(DirectoryNode, "replace", replaced)


def spoil_journal(config: StoreConfig, bad: BadSectors, node: int, sector: int) -> None:
    folder = config.nodes[node].path / "journal"
    path = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    bad.add(path, sector * 4096, (sector + 1) * 4096)


async def lived(config: StoreConfig) -> dict[str, bytes]:
    files = {f"f{i}": bytes([i + 1]) * 2000 for i in range(8)}
    await write(config, files)
    return files


@pytest.mark.expects_log(r"repair\.scrub: Scrub: a part of the journals cannot be read")
async def test_a_journal_that_stays_unreadable_costs_no_node(
    config: StoreConfig, bad: BadSectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes have one each; a scrub says so, and the third can be lost and repaired.

    What no node can read is written anew before a repair ends, however long that takes.
    """
    piece = MetadataDumper._piece

    async def slowly(dumper: MetadataDumper, start: bytes) -> Any:
        await trio.sleep(0.3)
        return await piece(dumper, start)

    monkeypatch.setattr(MetadataDumper, "_piece", slowly)
    files = await lived(config)
    stays_bad(monkeypatch, bad)
    spoil_journal(config, bad, 1, 1)
    spoil_journal(config, bad, 2, 0)
    async with opened(config) as one:
        found = await scrub(one)
        assert (found["state"], found["unread"]) == ("done", 2)
        await all_in_use(one)
        assert await read_files(one) == files
    shutil.rmtree(config.nodes[0].path)
    async with opened(config) as one:
        await repair(one, REGIONS[0])
        assert (await one.store.status())["healthy"]
    forget(config)
    recovered(config)
    assert await read(config) == files


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("how", ["mounted", "recovered", "dumped and recovered"])
@pytest.mark.expects_log(r"journal_scan: Node \S+: the record in \S+ at \d+ is damaged\.")
async def test_a_record_that_is_damaged_on_every_node(tmp_path: Path, nodes: int, how: str) -> None:
    """Each copy has flipped bits, at other places: together they have all of it."""
    regions = [(name, None) for name in REGIONS[:nodes]]
    code = Code.parse("2+1" if nodes == 3 else "1+1")
    config = make_store(tmp_path / "store", regions, code, None, False)
    files = {f"f{i}": bytes([i + 1]) * 2000 for i in range(12)}
    async with opened(config) as one:
        for name, data in files.items():
            await one.put(name, data)
        await one.store.committer.commit()
        copy_tree(config.store, tmp_path / "crash")
    store = config if how == "dumped and recovered" else load(tmp_path / "crash")
    if how == "dumped and recovered":
        await dump_metadata(store)
    for node in range(nodes):
        path, offset, found = max(journal_records(store, node), key=lambda r: r[2].record_length)
        assert found.record_length > 3900
        for place in range(2):
            flip(path, offset + 100 + 600 * node + 1900 * place)
    if how != "mounted":
        forget(store)
        recovered(store)
    assert await read(store) == files
    forget(store)
    recovered(store)
    async with opened(store) as one:
        result = await scrub(one)
        assert (result["state"], result["unread"]) == ("done", 0)
        assert await read_files(one) == files
    if nodes == 3:
        shutil.rmtree(store.nodes[2].path)
        assert await read(store) == files


async def test_a_scrub_with_one_node_in_sync_ends(tmp_path: Path) -> None:
    """There is nobody to compare its journal with."""
    config = make(tmp_path / "store", "1+2")
    await write(config, FILES)
    for node in config.nodes[1:]:
        node.path.rename(tmp_path / node.name)
    async with opened(config) as one:
        found = await scrub(one)
        assert (found["state"], found["found"], found["unread"]) == ("done", 0, 0)
        assert await read_files(one) == FILES


def test_sources_that_cannot_be_read_are_not_the_target_s_fault(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio.run(write, config, FILES)
    target, *sources = [open_node(config, node) for node in config.nodes]

    def refused(kind: SegmentKind) -> list[int]:
        raise NodeError("Node x cannot list its segments: EIO.")

    for source in sources:
        monkeypatch.setattr(source, "segments", refused)
    named = [(f"source{number}", source) for number, source in enumerate(sources)]
    with pytest.raises(ReplayError, match="The journals of the other nodes cannot be read"):
        copy_journals(config.uuid, named, (REGIONS[0], target), 0, 100)
    copied = copy_journals(config.uuid, [], (REGIONS[0], target), 0, 100)
    assert (copied.records, copied.mended, copied.unknown) == (0, 0, [])


# --- node.toml

NEW_IDENTITY = r"repair\.claim: (\S+ is damaged, but the records|.*node\.toml)"
recognized = pytest.mark.expects_log(RECOGNIZED)


def garbage(path: Path) -> None:
    path.write_bytes(b"\x13\xfe" * 90)


def another_store(path: Path) -> None:
    """A bit of the store's number flips."""
    text = path.read_text()
    at = text.index('store = "') + 9
    path.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])


def another_name(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace(f'"{read_identity(path.parent).node}"', '"us-wesd-1"'))


def unknown_key(path: Path) -> None:
    path.write_text(path.read_text().replace("incarnation", "inkarnation"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = [garbage, another_store, another_name, unknown_key, empty]


def up(one: Opened) -> list[bool]:
    return [member.state is State.UP for member in one.store.log.members.all]


@recognized
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("nodes", [(1,), (0, 2), (0, 1, 2)], ids=["one", "two", "all"])
async def test_a_damaged_identity_costs_nothing(
    config: StoreConfig, damage: Callable[[Path], None], nodes: tuple[int, ...]
) -> None:
    """The records say whose the directory is; a mount that writes replaces the file."""
    await write(config, FILES)
    before = [read_identity(node.path) for node in config.nodes]
    for number in nodes:
        damage(config.nodes[number].path / IDENTITY_NAME)
    damaged = [(node.path / IDENTITY_NAME).read_bytes() for node in config.nodes]
    async with open_store(config, read_only=True) as store:
        assert all(member.is_open for member in store.log.members.all)
    assert damaged == [(node.path / IDENTITY_NAME).read_bytes() for node in config.nodes]
    async with opened(config) as one:
        assert up(one) == [True] * 3
        for member in one.store.log.members.all:
            await member.call(member.node.check)
        assert await read_files(one) == FILES
        await healthy(one)
        for old, node in zip(before, config.nodes, strict=True):
            new = read_identity(node.path)
            assert replace(new, incarnation=old.incarnation) == old
    await loses_a_region(config, 0, FILES)


@recognized
@pytest.mark.parametrize("damage", DAMAGES)
async def test_recover_recognizes_nodes_by_their_records(
    config: StoreConfig, damage: Callable[[Path], None]
) -> None:
    await write(config, FILES)
    for node in config.nodes:
        damage(node.path / IDENTITY_NAME)
    config.metadata.rename(config.store / "gone")
    for extra in ((), [node.path for node in config.nodes]):
        result = recover(
            config.store, extra, config.store / f"m{len(extra)}", accept_loss=False, progress=print
        )
        assert [node["found"] for node in result["nodes"]] == [True] * 3
    (config.store / "m3").rename(config.metadata)
    async with opened(config) as one:
        assert up(one) == [True] * 3
        assert await read_files(one) == FILES


async def test_recover_says_what_is_wrong_with_every_node(config: StoreConfig) -> None:
    """No record says whose they are."""
    await write(config, FILES)
    config.metadata.rename(config.store / "gone")
    for node in config.nodes:
        garbage(node.path / IDENTITY_NAME)
        shutil.rmtree(node.path / "journal")
        shutil.rmtree(node.path / "shards")
    with pytest.raises(UsageError, match=r"No node of \S+ is available: .*not valid TOML") as found:
        recover(config.store, (), None, accept_loss=False, progress=print)
    assert str(found.value).count(IDENTITY_NAME) == 3


@recognized
async def test_an_identity_that_cannot_be_read_costs_nothing(config: StoreConfig) -> None:
    await write(config, FILES)
    with BadSectors() as bad:
        for node in config.nodes:
            bad.add(node.path / IDENTITY_NAME, 0, 100)
        async with opened(config) as one:
            assert up(one) == [True] * 3
            await healthy(one)
    await loses_a_region(config, 0, FILES)


@recognized
async def test_a_damaged_identity_of_a_node_that_comes_back(config: StoreConfig) -> None:
    await write(config, FILES)
    away = config.nodes[1].path.rename(config.store / "away")
    async with opened(config) as one:
        assert up(one) == [True, False, True]
        garbage(away / IDENTITY_NAME)
        away.rename(config.nodes[1].path)
        await healthy(one)
        assert up(one) == [True] * 3


def intact_of_another_store(path: Path) -> None:
    write_identity(path.parent, replace(read_identity(path.parent), store=uuid4()))


def intact_of_another_node(path: Path) -> None:
    write_identity(path.parent, replace(read_identity(path.parent), node=REGIONS[0]))


def of_a_newer_version(path: Path) -> None:
    path.write_text(path.read_text().replace("format = 1", "format = 2"))


@pytest.mark.expects_log(NEW_IDENTITY)
@pytest.mark.parametrize(
    "change", [intact_of_another_store, intact_of_another_node, of_a_newer_version]
)
async def test_an_intact_identity_of_another_node_costs_the_node_until_it_is_repaired(
    config: StoreConfig, change: Callable[[Path], None]
) -> None:
    """The data of another node are lost, too: the shards here are needed."""
    await write(config, FILES)
    change(config.nodes[1].path / IDENTITY_NAME)
    async with opened(config) as one:
        member = one.store.log.members.named(REGIONS[1])
        assert member is not None
        assert member.state is State.DOWN
        assert IDENTITY_NAME in member.standing.error or "belongs to" in member.standing.error
        done = await repair(one, REGIONS[1])
        assert done["shards_rebuilt"] == 0
        await healthy(one)
    assert read_identity(config.nodes[1].path).node == REGIONS[1]
    await loses_a_region(config, 0, FILES)


@pytest.mark.parametrize("unseal", [False, True], ids=["flipped", "of an early version"])
def test_no_flipped_bit_makes_another_identity(tmp_path: Path, unseal: bool) -> None:
    identity = NodeIdentity(uuid4(), "us-east-1", "us-east-1", uuid4(), IDENTITY_VERSION)
    write_identity(tmp_path, identity)
    place = tmp_path / IDENTITY_NAME
    written = place.read_bytes()
    if unseal:
        early = [line for line in written.splitlines() if not line.startswith(b"# checksum")]
        place.write_bytes(b"\n".join(early))
        assert read_identity(tmp_path) == identity
        return
    newer = 0
    for bit in range(8 * len(written)):
        data = bytearray(written)
        data[bit // 8] ^= 1 << bit % 8
        place.write_bytes(data)
        try:
            assert read_identity(tmp_path) == identity, bit
        except DamagedIdentityError:
            pass
        except NodeIdentityError:
            newer += 1
    assert newer == 3  # format 3, 5 or 9


@pytest.mark.expects_log(NEW_IDENTITY, FOREIGN_FILES, NOT_WHERE_ITS_ROW_SAYS)
@pytest.mark.parametrize("whose", ["another node's", "another store's", "nobody's"])
async def test_a_directory_without_records_of_the_node_is_not_claimed(
    config: StoreConfig, tmp_path: Path, whose: str
) -> None:
    await write(config, FILES)
    other = make(tmp_path / "other")
    await write(other, FILES)
    place = config.nodes[1].path
    shutil.rmtree(place)
    if whose == "another node's":
        shutil.copytree(config.nodes[2].path, place)
    elif whose == "another store's":
        shutil.copytree(other.nodes[1].path, place)
    else:
        (place / "journal").mkdir(parents=True)
        (place / "journal" / "00000001.log").write_bytes(b"fusestore" * 100)
    garbage(place / IDENTITY_NAME)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    async with opened(config) as one:
        with pytest.raises(NodeError, match=IDENTITY_NAME):
            await repair(one, REGIONS[1])
        assert await read_files(one) == FILES
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    shutil.rmtree(place)
    async with opened(config) as one:
        await repair(one, REGIONS[1])
        await healthy(one)


async def test_the_identity_of_another_node_with_its_data_is_left(config: StoreConfig) -> None:
    """A copy of another node is in the place: nothing is damaged."""
    await write(config, FILES)
    place = config.nodes[1].path
    shutil.rmtree(place)
    shutil.copytree(config.nodes[2].path, place)
    before = read_identity(place)
    async with opened(config) as one:
        with pytest.raises(NodeError, match="belongs to node"):
            await repair(one, REGIONS[1])
        assert await read_files(one) == FILES
    assert read_identity(place) == before


# --- the database


async def test_a_database_that_cannot_be_read_is_an_error_with_a_remedy(
    config: StoreConfig,
) -> None:
    await write(config, FILES)
    size = (config.metadata / "data.mdb").stat().st_size
    refused = 0
    for start in range(0, size, 4096):
        with BadSectors() as bad:
            bad.add(config.metadata / "data.mdb", start, start + 4096)
            for read_only in (True, False):
                try:
                    async with open_store(config, read_only=read_only, background=False):
                        continue
                except (DamagedMetadataError, MetadataError) as error:
                    said = str(error)
                refused += 1
                assert "recover" in said
    assert refused
    with BadSectors() as bad:
        bad.add(config.metadata / "data.mdb", 0, size)
        with pytest.raises(MetadataError, match="run 'fusestore recover'"):
            await read(config)
        forget(config)
        recovered(config)
        assert await read(config) == FILES
