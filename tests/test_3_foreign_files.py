"""Foreign files on a node: what fsck, repair and the removal of the node do about them."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from fusestore.config.mkfs import make_store
from fusestore.config.node_identity import read_identity
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import NodeError, NodeIdentityError, StoreBusyError
from fusestore.format.records import SegmentKind
from fusestore.format.segment_numbers import GAP_MAX, MOUNT_MAX, SEGMENT_MAX, following, reachable
from fusestore.log import journal_scan
from fusestore.log.journal_scan import BARREN_BYTES_MAX, SEARCHED_BYTES_MAX, read_journals
from fusestore.members.opening import open_node
from fusestore.nodes import segment_files
from fusestore.nodes.directory import DirectoryNode
from fusestore.rescue.fsck import fsck
from fusestore.store.opening import open_store
from fusestore.system.beneath import Directory
from support.disks import Disks
from support.foreign_files import FILES, KINDS, PLACES, VICTIM, Outside, last, plant, quick
from support.foreign_files import following as next_of
from support.logs import (
    FOREIGN_FILES,
    IDENTITY_STAYS,
    JOURNAL_DAMAGED,
    NOT_DELETED,
    NOT_WHERE_ITS_ROW_SAYS,
    OUT_OF_USE,
    RECOGNIZED,
    UNREAD_FILE,
)
from support.opened_store import Opened, healthy, opened, repair
from support.processes import in_child

pytestmark = pytest.mark.expects_log(
    FOREIGN_FILES,
    UNREAD_FILE,
    OUT_OF_USE,
    JOURNAL_DAMAGED,
    NOT_DELETED,
    NOT_WHERE_ITS_ROW_SAYS,
    RECOGNIZED,
    IDENTITY_STAYS,
)

SECONDS_MAX = 20


USER = 12345


@pytest.fixture
def owned_by_a_user() -> Iterator[StoreConfig]:
    """A store of an ordinary user, who can reach it."""
    if os.geteuid() != 0:
        pytest.skip("changes owners")
    base = Path(tempfile.mkdtemp(dir="/dev/shm"))
    config = make_store(base / "store")
    trio.run(filled, config)
    for path in [base, *base.rglob("*")]:
        os.chown(path, USER, USER)
    yield config
    shutil.rmtree(base)


async def filled(config: StoreConfig) -> None:
    async with opened(config) as one:
        await fill(one)


@pytest.mark.parametrize("mode", [0o000, 0o444])
@pytest.mark.parametrize("what", ["journal", "shards", "journal/*", "shards/*", "node.toml", "."])
@pytest.mark.expects_log(r"cannot", r"Too few nodes")
def test_what_belongs_to_another_user_costs_its_node_only(
    owned_by_a_user: StoreConfig, what: str, mode: int
) -> None:
    """Files of root in the first node of a user's store; the mode may let others read them."""
    config = owned_by_a_user
    top = config.nodes[0].path
    for path in [top] if what == "." else list(top.glob(what)):
        os.chown(path, 0, 0)
        path.chmod(mode | (0o111 if path.is_dir() and mode else 0))

    async def used() -> tuple[bool, list[str]]:
        async with opened(config) as one:
            right = [await one.get(name) == data for name, data in FILES.items()]
            await one.put("new", b"new" * 50_000)
            await one.store.committer.commit()
            right.append(await one.get("new") == b"new" * 50_000)
            return all(right), [str(member.state) for member in one.store.log.members.all]

    def as_the_user() -> tuple[bool, list[str]]:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        return trio.run(used)

    right, states = in_child(as_the_user)
    assert right
    assert states[1:] == ["up", "up"]


async def fill(one: Opened) -> None:
    for name, data in FILES.items():
        await one.put(name, data)
        await one.store.committer.commit()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was used and unmounted."""
    place = tmp_path_factory.mktemp("template") / "store"

    async def use() -> None:
        async with opened(quick(make_store(place))) as one:
            await fill(one)

    trio.run(use)
    return place


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a fourth node, in the region of the first, which is drained."""
    place = tmp_path_factory.mktemp("drained") / "store"

    async def use() -> None:
        async with opened(quick(make_store(place))) as one:
            await fill(one)
            topology = one.store.topology
            await topology.add("extra", "us-east-1", place / "extra", 1.0, lambda message: None)
            with trio.fail_after(60):
                await topology.drain(
                    "us-east-1", cancel=False, wait=True, progress=lambda message: None
                )

    trio.run(use)
    shards = place / "us-east-1/shards"
    if not any(shards.iterdir()):
        (shards / "00000001.seg").touch()
    return place


def copied(template: Path, tmp_path: Path) -> StoreConfig:
    shutil.copytree(template, tmp_path / "store")
    return quick(load(tmp_path / "store"))


@pytest.fixture
def config(template: Path, tmp_path: Path) -> StoreConfig:
    return copied(template, tmp_path)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    found = Outside(tmp_path / "outside")
    yield found
    assert found.is_untouched()


async def reads(one: Opened) -> None:
    for name, data in FILES.items():
        assert await one.get(name) == data


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
async def test_fsck_mends_no_more_than_the_tables(
    config: StoreConfig, outside: Outside, kind: str, place: str
) -> None:
    plant(kind, PLACES[place](config.nodes[0].path), outside)
    with trio.fail_after(SECONDS_MAX):
        async with opened(config) as one:
            done = await fsck(one.store, repair=True, at_rest=True)
            assert not done["left"]
            assert not done["unreadable"]
            await reads(one)
    assert outside.is_untouched()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
async def test_the_removal_of_a_node_takes_nothing_of_others(
    drained: Path, tmp_path: Path, outside: Outside, kind: str, place: str
) -> None:
    config = copied(drained, tmp_path)
    node = config.nodes[0].path
    plant(kind, PLACES[place](node), outside)
    far = node / "shards" / f"{SEGMENT_MAX}.seg"
    if (node / "shards").is_dir() and not (node / "shards").is_symlink():
        far.write_bytes(VICTIM)
    planted = far.exists()
    with trio.fail_after(SECONDS_MAX):
        async with opened(config) as one:
            done = await one.store.topology.remove(config.nodes[0].name)
            assert not (done["emptied"] and planted)
            await reads(one)
    assert far.exists() == planted
    assert outside.is_untouched()


async def test_a_node_without_foreign_files_is_removed_whole(drained: Path, tmp_path: Path) -> None:
    config = copied(drained, tmp_path)
    async with opened(config) as one:
        done = await one.store.topology.remove(config.nodes[0].name)
    assert done["emptied"]
    assert os.listdir(config.nodes[0].path) == []


# --- numbers and counts ----------------------------------------------------------


async def test_strays_do_not_lead_on_to_the_last_number(config: StoreConfig) -> None:
    """Each of these files is near the one before."""
    node = config.nodes[0].path
    for number in range(GAP_MAX, SEGMENT_MAX, GAP_MAX):
        (node / "journal" / f"{number:08d}.log").touch()
        (node / "shards" / f"{number:08d}.seg").touch()
    for mounts in (1, 2):
        with trio.fail_after(SECONDS_MAX):
            async with opened(config) as one:
                await one.put(f"new {mounts}", VICTIM)
                await one.store.committer.commit()
                await reads(one)
                journal, first = one.store.committer.journal, one.store.log.members.all[0]
                assert max(journal.segment, first.shards.current) < (mounts + 1) * GAP_MAX


def test_the_numbers_of_segments_cannot_overflow() -> None:
    """What counts is bounded, and a mount begins only if enough numbers are left for it."""
    most = SEGMENT_MAX - MOUNT_MAX
    assert following([0]) == 1
    assert following([*reachable([SEGMENT_MAX], [5]), 5]) == 6
    assert following([most - 1]) == most
    with pytest.raises(NodeError, match="are used up"):
        following([most])
    assert most + MOUNT_MAX < 2**32 - 1


async def test_fsck_names_and_counts_foreign_files(config: StoreConfig) -> None:
    node = config.nodes[0].path
    (node / "journal" / "notes.txt").touch()
    (node / "shards" / f"{SEGMENT_MAX}.seg").touch()
    for number in range(20):
        (node / "shards" / f"stray{number}").touch()
    (node / "shards" / "00000001.seg.kept1").touch()  # a segment that was set aside
    (node / "journal" / "00000001.log.new").touch()  # a draft that a crash has left
    async with opened(config) as one:
        done = await fsck(one.store, repair=True, at_rest=True)
    assert done["clean"]
    (text,) = done["strays"]
    assert f"node {config.nodes[0].name}: 22 files in {node}" in text
    assert str(SEGMENT_MAX) in text
    assert "kept" not in text
    assert ".new" not in text


async def test_a_regular_file_that_begins_otherwise_is_not_deleted(config: StoreConfig) -> None:
    """What a crash leaves begins with a record, or with zeros."""
    shards = config.nodes[0].path / "shards"
    number = int(last(shards).stem)
    foreign, torn, empty = (shards / f"{number + i:08d}.seg" for i in (1, 2, 3))
    foreign.write_bytes(VICTIM)
    torn.write_bytes(bytes(8192) + VICTIM)
    empty.touch()
    async with opened(config) as one:
        with trio.fail_after(SECONDS_MAX):
            while torn.exists() or empty.exists():  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert all(member.in_sync for member in one.store.log.members.all)
    assert foreign.read_bytes() == VICTIM


# --- sizes ---------------------------------------------------------------------


async def test_a_long_shard_segment_in_no_table_is_read_no_further_than_one_can_reach(
    config: StoreConfig,
) -> None:
    path = next_of(config.nodes[0].path / "shards")
    path.touch()
    os.truncate(path, 10 << 40)
    with trio.fail_after(SECONDS_MAX):
        async with opened(config) as one:
            while path.exists():  # noqa: ASYNC110
                await trio.sleep(0.02)
            assert all(member.in_sync for member in one.store.log.members.all)


def long_segments(config: StoreConfig, count: int) -> None:
    journal = config.nodes[0].path / "journal"
    number = int(last(journal).stem)
    for i in range(1, count + 1):
        path = journal / f"{number + i:08d}.log"
        path.touch()
        os.truncate(path, 10 << 40)


async def test_many_long_journal_segments_are_not_all_read(config: StoreConfig) -> None:
    long_segments(config, 200)
    name = config.nodes[0].name
    node = open_node(config, config.nodes[0])
    found = read_journals(config.uuid, [(name, node)])
    node.close()
    assert found.size <= BARREN_BYTES_MAX + 3 * SEARCHED_BYTES_MAX
    assert {lost.segment for lost in found.unreadable} == {
        int(path.stem) for path in next_of(config.nodes[0].path / "journal").parent.iterdir()
    } - {entry.segment for entry in found.entries()}
    assert any("not read to the end" in lost.error for lost in found.unreadable)
    with trio.fail_after(SECONDS_MAX):
        async with opened(config) as one:
            await reads(one)


def test_zeros_that_crashes_left_do_not_count(config: StoreConfig) -> None:
    """A store that crashed often has a mebibyte of zeros in many segments of every node."""
    journal = config.nodes[0].path / "journal"
    number = int(last(journal).stem)
    for i in range(1, 2 * (BARREN_BYTES_MAX >> 20)):
        path = journal / f"{number + i:08d}.log"
        path.touch()
        os.truncate(path, 1 << 20)
    node = open_node(config, config.nodes[0])
    found = read_journals(config.uuid, [(config.nodes[0].name, node)])
    node.close()
    assert not found.unreadable
    assert not found.failed


def test_far_more_journal_segments_than_others_have_are_not_read(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_scan, "SEGMENTS_MAX", 10)
    nodes = [(at.name, open_node(config, at)) for at in config.nodes]
    first, journal = config.nodes[0].name, config.nodes[0].path / "journal"
    for number in range(100, 120):
        (journal / f"{number:08d}.log").touch()
    found = read_journals(config.uuid, nodes)
    assert found.failed.keys() == {first}
    assert "far more than other nodes" in str(found.failed[first])
    assert not read_journals(config.uuid, nodes[:1]).failed  # nothing tells which is right
    for other in config.nodes[1:]:
        for number in range(100, 115):
            (other.path / "journal" / f"{number:08d}.log").touch()
    assert not read_journals(config.uuid, nodes).failed
    for _, node in nodes:
        node.close()


def test_a_listing_has_an_end(config: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_files, "LISTED_MAX", 10)
    node = open_node(config, config.nodes[0])
    for number in range(100, 111):
        (config.nodes[0].path / "shards" / f"{number:08d}.seg").touch()
    with pytest.raises(NodeError, match="it has more than 10"):
        node.segments(SegmentKind.SHARDS)
    node.close()


# --- the place of a node ---------------------------------------------------------


def test_the_path_of_a_node_may_be_a_link(config: StoreConfig) -> None:
    path = config.nodes[0].path
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    node = open_node(config, config.nodes[0])
    assert node.segments(SegmentKind.SHARDS)
    node.check()
    node.close()


def test_a_directory_that_takes_the_place_of_another_is_not_used(config: StoreConfig) -> None:
    """Between a look at its identity and its opening."""
    first, second = config.nodes[0].path, config.nodes[1].path
    identity = read_identity(first)
    first.rename(first.with_name("moved"))
    first.symlink_to(second)
    with pytest.raises(NodeIdentityError, match="has taken the place"):
        DirectoryNode(first, identity)


@pytest.mark.parametrize("folder", ["journal", "shards"])
@pytest.mark.parametrize("of", [0, 2])
async def test_a_folder_that_is_another_nodes_is_refused(
    config: StoreConfig, disks: Disks, folder: str, of: int
) -> None:
    """By a bind mount; nobody can tell which of the two nodes is right."""
    place = config.nodes[1].path / folder
    disks.bind(config.nodes[of].path / folder, place)
    for read_only in (False, True):
        with pytest.raises(StoreBusyError, match=rf"^Nodes .* have the same folder {folder}: "):
            async with open_store(config, read_only=read_only):
                pass
    disks.unmount(place)
    async with opened(config) as one:
        await reads(one)
        await healthy(one)


@pytest.mark.parametrize("folder", ["journal", "shards"])
@pytest.mark.expects_log("another folder has taken the place of")
async def test_a_folder_that_becomes_another_nodes_costs_its_node(
    config: StoreConfig, disks: Disks, folder: str
) -> None:
    place = config.nodes[1].path / folder
    async with opened(config) as one:
        member = one.store.log.members.all[1]
        disks.bind(config.nodes[2].path / folder, place)
        await one.put("new", b"new" * 500_000)
        await one.store.committer.commit()
        assert member.out_of_use
        member.standing._retry_at = 0.0
        await one.store.comeback.catch_up(None)
        assert "have the same folder" in member.standing.error
        await reads(one)
        disks.unmount(place)
        await healthy(one)
        assert await one.get("new") == b"new" * 500_000


async def test_repair_claims_no_directory_that_holds_other_files(
    config: StoreConfig, outside: Outside
) -> None:
    first = config.nodes[0]
    shutil.rmtree(first.path)
    first.path.symlink_to(outside.folder)
    (outside.folder / "node.toml").unlink()
    outside.before = outside.seen()
    async with opened(config) as one:
        with pytest.raises(NodeError, match="contains files that are not a node"):
            await one.store.repairer.repair(first.name, lambda message: None)
        await reads(one)


@pytest.mark.parametrize(
    "make",
    [
        lambda path, outside: path.symlink_to(outside.folder),
        lambda path, outside: os.mkfifo(path),
        lambda path, outside: path.write_bytes(VICTIM),
    ],
)
async def test_repair_refuses_a_wiped_node_whose_folders_are_none(
    config: StoreConfig, outside: Outside, make: Callable[[Path, Outside], object]
) -> None:
    first = config.nodes[0]
    shutil.rmtree(first.path)
    first.path.mkdir()
    make(first.path / "journal", outside)
    async with opened(config) as one:
        began = time.monotonic()
        with pytest.raises(NodeError, match="not a directory"):
            await one.store.repairer.repair(first.name, lambda message: None)
        assert time.monotonic() - began < SECONDS_MAX
        await reads(one)


async def test_repair_leaves_no_draft_where_a_segment_cannot_be_replaced(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    node = open_node(config, config.nodes[0])
    journal = config.nodes[0].path / "journal"
    monkeypatch.setattr(Directory, "replace", fail)
    with pytest.raises(NodeError, match=r"cannot replace journal/00000077\.log"):
        node.replace(SegmentKind.JOURNAL, 77, random.Random(7).randbytes(100))
    assert not any(path.name.endswith(".new") for path in journal.iterdir())
    node.close()


@pytest.mark.parametrize("which", [min, max])
@pytest.mark.parametrize("inside", [True, False])
async def test_repair_keeps_a_directory_in_place_of_a_journal_segment(
    tmp_path: Path, which: Callable[[list[Path]], Path], inside: bool
) -> None:
    """It is somebody's: the segment is written anew, and it has another name from then on."""
    config = quick(make_store(tmp_path / "store"))
    for _ in range(2):
        await filled(config)
    segment = which(list((config.nodes[0].path / "journal").iterdir()))
    segment.unlink()
    segment.mkdir()
    if inside:
        (segment / "theirs").write_bytes(VICTIM)
    async with opened(config) as one:
        await repair(one, config.nodes[0].name)
        await healthy(one)
        for name, data in FILES.items():
            assert await one.get(name) == data
    kept = segment.with_name(f"{segment.name}.kept1")
    assert kept.is_dir()
    assert not inside or (kept / "theirs").read_bytes() == VICTIM
    assert not segment.is_dir()


@pytest.mark.parametrize("change", ["replace", "delete"])
def test_a_directory_is_neither_replaced_nor_deleted(tmp_path: Path, change: str) -> None:
    config = make_store(tmp_path / "store")
    trio.run(filled, config)
    folder = config.nodes[0].path / "journal"
    name = last(folder).name
    (folder / name).rename(tmp_path / name)
    (folder / name / "theirs").mkdir(parents=True)
    node = open_node(config, config.nodes[0])
    number = int(name.partition(".")[0])
    if change == "replace":
        node.replace(SegmentKind.JOURNAL, number, b"ours")
        assert (folder / name).read_bytes() == b"ours"
    else:
        node.delete(SegmentKind.JOURNAL, number)
        assert not (folder / name).exists()
    node.close()
    assert (folder / f"{name}.kept1" / "theirs").is_dir()
