"""Unreadable is not absent: a bad sector costs a block, and nothing is concluded from it.

Records that one node cannot read are read from another; what no node can read is refused
with a sentence that never advises to give it up.  Nothing that no table names is deleted
while the history is in doubt.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from fusestore.commit.load_tables import save
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import MetadataError, NodeError, ReplayError
from fusestore.format import store_rows
from fusestore.format.records import Kind, SegmentKind
from fusestore.format.segment_numbers import segment_path
from fusestore.format.store_rows import LogPosition
from fusestore.log import journal_scan
from fusestore.log.journal_scan import BLOCKS_TRIED_MAX, read_journals
from fusestore.members.opening import open_node
from fusestore.metadata.engine import Engine
from fusestore.nodes.directory import DirectoryNode
from fusestore.repair.risk import Safety
from fusestore.rescue.fsck import fsck
from fusestore.store.opening import open_store
from support.faults import BadSectors
from support.logs import FOREIGN_FILES, UNREAD_FILE
from support.opened_store import REGIONS, Opened, healthy, limited, make, opened, repair
from support.recovery import (
    command,
    copy_tree,
    dump_metadata,
    forget,
    has_metadata,
    journal_records,
    recovered,
)
from support.whole_tree import made, put, read, read_files, write

pytestmark = pytest.mark.expects_log(UNREAD_FILE)

SECTOR = 4096


@pytest.fixture
def bad() -> Iterator[BadSectors]:
    with BadSectors() as sectors:
        yield sectors


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make(tmp_path / "store")


async def lived(config: StoreConfig, count: int = 8) -> dict[str, bytes]:
    """Files, each with a commit of some 2 KiB; the journal is several sectors long."""
    files = {f"f{i}": bytes([i + 1]) * 2000 for i in range(count)}
    await write(config, files)
    return files


def largest(config: StoreConfig, node: int) -> Path:
    """The longest journal segment of a node."""
    folder = config.nodes[node].path / "journal"
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def spoil_sector(config: StoreConfig, bad: BadSectors, node: int, sector: int) -> None:
    path = largest(config, node)
    assert path.stat().st_size > SECTOR * (sector + 1)
    bad.add(path, sector * SECTOR, (sector + 1) * SECTOR)


def spoil_everywhere(config: StoreConfig, bad: BadSectors, number: int) -> None:
    """No node can read a commit of this number."""
    for node in range(3):
        for path, offset, header in journal_records(config, node):
            if header.kind is Kind.COMMIT and header.number == number:
                bad.add(path, offset, offset + header.record_length)


async def scrubbed(one: Opened) -> dict[str, Any]:
    with trio.fail_after(60):
        return await one.store.scrubber.command(
            "start", None, wait=True, alone=False, progress=lambda message: None
        )


def gives_no_bad_advice(error: BaseException) -> None:
    text = str(error)
    assert "readable" in text, text
    assert "accept" not in text, text


# --- segments that become shorter while they are read


@pytest.mark.parametrize("ahead", [1, 4095, 4096, (1 << 20) - 1, 1 << 20, 4 << 20])
async def test_a_segment_that_is_cut_while_it_is_read_lacks_nothing(
    config: StoreConfig, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit cuts what was allocated ahead: its reader found the old size before."""
    await lived(config, 40)
    nodes = [(at.name, open_node(config, at, read_only=True)) for at in config.nodes]
    right = read_journals(config.uuid, nodes)
    cut: set[tuple[object, int]] = set()
    true_size = DirectoryNode.size

    def size(node: DirectoryNode, kind: SegmentKind, segment: int) -> int:
        found = true_size(node, kind, segment)
        if (node, segment) in cut:
            return found
        cut.add((node, segment))
        return found + ahead

    monkeypatch.setattr(DirectoryNode, "size", size)
    found = read_journals(config.uuid, nodes)
    assert found.unreadable == []
    assert [entry.holders for entry in found.entries()] == [e.holders for e in right.entries()]
    assert len(list(found.entries())) > 40
    for _, node in nodes:
        node.close()


async def test_a_record_that_is_appended_while_journals_are_read_is_not_damaged(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bytes at the end of a segment make its reader look at it once more."""
    await lived(config, 10)
    nodes = [(at.name, open_node(config, at, read_only=True)) for at in config.nodes]
    whole = {path: path.read_bytes() for at in range(3) for path in [largest(config, at)]}
    for path, data in whole.items():
        path.write_bytes(data[:5000] + b"half of a record")

    def appended(*arguments: Any) -> None:
        for path, data in whole.items():
            path.write_bytes(data)
        mixes(*arguments)

    mixes = journal_scan._mix
    monkeypatch.setattr(journal_scan, "_mix", appended)
    found = read_journals(config.uuid, nodes)
    assert found.unreadable == []
    for _, node in nodes:
        node.close()


@pytest.mark.parametrize("seed", range(3))
async def test_scrubs_of_a_store_in_use_find_nothing(config: StoreConfig, seed: int) -> None:
    """Journals are rolled, cut and deleted while they are compared."""
    config = limited(config, journal_segment_bytes=64 << 10, dump_journal_bytes_min=64 << 10)
    random = Random(seed)
    async with opened(config) as one, trio.open_nursery() as nursery:

        async def write_on() -> None:
            for number in itertools.count():
                await one.put(f"f{number % 50}", random.randbytes(random.randrange(1, 9000)))
                await one.store.committer.commit()

        nursery.start_soon(write_on)
        for _ in range(12):
            done = await scrubbed(one)
            assert (done["found"], done["unread"]) == (0, 0)
        nursery.cancel_scope.cancel()


async def test_journals_that_cannot_be_read_are_no_copies(
    config: StoreConfig, bad: BadSectors
) -> None:
    """While nothing is mounted, nothing rewrites them: status and risk say it."""
    await lived(config)
    for node in (0, 1):
        for path in (config.nodes[node].path / "journal").iterdir():
            bad.add(path, 0, path.stat().st_size)
    async with open_store(config, read_only=True, background=False) as store:
        status = await store.status()
        assert not status["healthy"]
        assert REGIONS[0] in status["metadata_error"]
        assert REGIONS[1] in status["metadata_error"]
        assert (await Safety(store.log, store.reader).risk([]))["metadata_regions"] == 1


# --- one bad sector in each of some nodes


@pytest.mark.parametrize("sectors", [{1: 0}, {0: 1, 2: 2}, {0: 0, 1: 1, 2: 2}], ids=str)
async def test_bad_sectors_at_different_places_keep_nobody_out(
    config: StoreConfig, tmp_path: Path, bad: BadSectors, sectors: dict[int, int]
) -> None:
    async with opened(config) as one:
        files = {f"f{i}": bytes([i + 1]) * 2000 for i in range(8)}
        await put(one, files)
        copy_tree(config.store, tmp_path / "crash")
    crash = load(tmp_path / "crash")
    for node, sector in sectors.items():
        spoil_sector(crash, bad, node, sector)
    async with opened(crash) as one:
        assert await read_files(one) == files
        await healthy(one)
        await put(one, made("more", "more"))
        files |= made("more", "more")
    bad.clear()
    assert await read(crash) == files


@pytest.mark.parametrize("sectors", [{1: 0}, {0: 1, 2: 2}, {0: 0, 1: 1, 2: 2}], ids=str)
async def test_bad_sectors_at_different_places_are_no_hindrance_to_recover(
    config: StoreConfig, bad: BadSectors, sectors: dict[int, int]
) -> None:
    files = await lived(config)
    forget(config)
    for node, sector in sectors.items():
        spoil_sector(config, bad, node, sector)
    result = recovered(config)
    assert (result["files"], result["lost"], result["dropped"]) == (len(files) + 1, [], [])
    assert await read(config) == files


@pytest.mark.parametrize("lost", [False, True])
async def test_a_record_that_no_node_can_read_as_a_whole_is_put_together(
    config: StoreConfig, tmp_path: Path, bad: BadSectors, lost: bool
) -> None:
    """One long record, and a bad sector in it on each node, at different places."""
    async with opened(config) as one:
        files = {f"f{i}": bytes([i + 1]) * 2000 for i in range(12)}
        for name, data in files.items():
            await one.put(name, data)
        await one.store.committer.commit()
        copy_tree(config.store, tmp_path / "crash")
    crash = load(tmp_path / "crash")
    for node in range(3):
        path, offset, header = max(journal_records(crash, node), key=lambda r: r[2].record_length)
        assert header.record_length > 5 * SECTOR
        first = offset // SECTOR + 1 + node
        bad.add(path, first * SECTOR, (first + 1) * SECTOR)
    if lost:
        forget(crash)
        recovered(crash)
    async with opened(crash) as one:
        assert await read_files(one) == files
        await healthy(one)
        await one.store.rejoin.mend_journal(one.store.log.members.all[0])
        await one.store.rejoin.mend_journal(one.store.log.members.all[1])
        found = await scrubbed(one)
        assert found["unread"] == 0
    shutil.rmtree(crash.nodes[2].path)
    forget(crash)
    recovered(crash)
    assert await read(crash) == files


async def test_a_damaged_segment_is_mended_after_the_mount(
    config: StoreConfig, bad: BadSectors
) -> None:
    files = await lived(config)
    spoil_sector(config, bad, 1, 1)
    path = largest(config, 1)
    before = path.read_bytes()
    inode = path.stat().st_ino
    async with opened(config) as one:
        one.store.log.unread_journals = {REGIONS[1]}  # as if the checkpoint had been older
        await one.store.rejoin.mend_journal(one.store.log.members.all[1])
        assert path.stat().st_ino != inode
        one.store.log.members.all[1].node.check()
        assert await read_files(one) == files
        assert (await one.store.status())["healthy"]
    after = path.read_bytes()
    assert after == before[: len(after)]
    assert not any(before[len(after) :])


@pytest.mark.parametrize("name", [REGIONS[0], REGIONS[1]])
async def test_nodes_with_a_bad_sector_each_rebuild_each_other(
    config: StoreConfig, bad: BadSectors, name: str
) -> None:
    """Another node is lost, and both that are left have damage; or the damaged one is repaired."""
    files = await lived(config)
    spoil_sector(config, bad, 1, 0)
    spoil_sector(config, bad, 2, 2)
    if name == REGIONS[0]:
        shutil.rmtree(config.nodes[0].path)
    async with opened(config) as one:
        await repair(one, name)
        await healthy(one)
        assert await read_files(one) == files
    bad.clear()
    numbers = [
        [(header.number, header.kind) for _, _, header in journal_records(config, node)]
        for node in range(3)
    ]
    if name == REGIONS[0]:
        assert numbers[0] == numbers[1] == numbers[2], numbers
    forget(config)
    recovered(config)
    assert await read(config) == files


async def test_a_scrub_goes_on_and_mends(config: StoreConfig, bad: BadSectors) -> None:
    files = await lived(config)
    async with opened(config) as one:
        spoil_sector(config, bad, 0, 0)
        spoil_sector(config, bad, 2, 1)
        found = await scrubbed(one)
        assert (found["state"], found["unread"]) == ("done", 0)
        assert found["found"] > 0
        found = await scrubbed(one)
        assert (found["state"], found["found"], found["unread"]) == ("done", 0, 0)
        assert await read_files(one) == files


async def test_a_scrub_reports_what_no_node_can_read_and_a_dump_takes_its_place(
    config: StoreConfig, bad: BadSectors
) -> None:
    files = await lived(config)
    commits = [header.number for _, _, header in journal_records(config, 0)]
    spoil_everywhere(config, bad, commits[3])
    async with opened(config) as one:
        found = await scrubbed(one)
        assert (found["state"], found["unread"]) == ("done", 3)
        with trio.fail_after(30):
            while one.store.dumper.first_segment == 0:
                await one.store.committer.commit()
                await trio.sleep(0.02)
        async with one.store.committer.lock:
            pass  # the old journal is deleted
        found = await scrubbed(one)
        assert (found["found"], found["unread"]) == (0, 0)
        assert await read_files(one) == files
    forget(config)
    recovered(config)
    assert await read(config) == files


async def test_a_dead_disk_is_not_tried_block_by_block(
    config: StoreConfig, bad: BadSectors
) -> None:
    files = await lived(config)
    path = largest(config, 1)
    with path.open("r+b") as file:
        file.truncate(8 << 20)
    bad.add(path, 0, 8 << 20)
    tried = 0
    check = bad._check

    def count(descriptor: int, offset: int, length: int) -> None:
        nonlocal tried
        try:
            check(descriptor, offset, length)
        except OSError:
            tried += 1
            raise

    bad._check = count  # type: ignore[method-assign]
    forget(config)
    recovered(config)
    assert BLOCKS_TRIED_MAX <= tried < 6 * BLOCKS_TRIED_MAX
    assert await read(config) == files


# --- what no node can read


async def test_recover_refuses_what_it_cannot_read_and_can_be_run_again(
    config: StoreConfig, bad: BadSectors
) -> None:
    files = await lived(config)
    forget(config)
    for node in range(3):
        spoil_sector(config, bad, node, 0)
    with pytest.raises(ReplayError) as refused:
        recovered(config)
    gives_no_bad_advice(refused.value)
    assert not has_metadata(config)
    bad.clear()
    assert recovered(config)["files"] == len(files) + 1
    assert await read(config) == files


async def test_recover_refuses_when_no_journal_can_be_read(
    config: StoreConfig, bad: BadSectors
) -> None:
    await lived(config)
    forget(config)
    for node in config.nodes:
        for path in (node.path / "journal").iterdir():
            bad.add(path, 0, 1 << 30)
    for accept_loss in (False, True):
        with pytest.raises(ReplayError) as refused:
            recovered(config, accept_loss=accept_loss)
        gives_no_bad_advice(refused.value)
        assert not has_metadata(config)


async def test_recover_that_finds_shards_and_no_commits_is_a_failure(config: StoreConfig) -> None:
    await write(config, made("shards", "a"))
    forget(config)
    for node in config.nodes:
        shutil.rmtree(node.path / "journal")
    with pytest.raises(ReplayError, match="holds shards"):
        recovered(config)
    assert not has_metadata(config)


UNREADABLE = """
import sys
from pathlib import Path
from support.faults import BadSectors
from fusestore.__main__ import main
with BadSectors() as bad:
    for path in Path(sys.argv[2]).glob("*/journal/*.log"):
        bad.add(path, 0, 1 << 30)
    main()
"""


async def test_the_command_fails_with_a_sentence(config: StoreConfig) -> None:
    await lived(config)
    forget(config)
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE, "recover", config.store],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, has_metadata(config)) == (3, False), done
    assert "Make the unreadable data readable" in done.stderr
    assert "accept" not in done.stderr
    assert command(config).returncode == 0


async def late_commit(config: StoreConfig, crash: Path) -> tuple[StoreConfig, int]:
    """A store that crashed right after a commit that no checkpoint holds, and its number."""
    async with opened(config) as one:
        await put(one, {"early": b"early" * 400})
        await one.checkpoint()
        await put(one, {"pad": b"pad" * 3000})
        await put(one, {"late": b"late" * 400})
        copy_tree(config.store, crash)
        number = one.store.log.position.commit
    return load(crash), number


async def test_a_mount_refuses_when_the_last_commit_cannot_be_read(
    config: StoreConfig, tmp_path: Path, bad: BadSectors
) -> None:
    crash, number = await late_commit(config, tmp_path / "crash")
    spoil_everywhere(crash, bad, number)
    with pytest.raises(ReplayError, match="It is unknown whether a commit followed") as refused:
        await read(crash)
    gives_no_bad_advice(refused.value)
    bad.clear()
    assert (await read(crash)).keys() == {"early", "pad", "late"}


async def test_a_node_that_can_be_read_says_whether_a_commit_came_after(
    config: StoreConfig, tmp_path: Path, bad: BadSectors
) -> None:
    crash, number = await late_commit(config, tmp_path / "crash")
    for path, offset, header in journal_records(crash, 0):
        if header.number == number:
            bad.add(path, offset, offset + SECTOR)
    assert (await read(crash)).keys() == {"early", "pad", "late"}


async def test_a_gap_below_what_was_acknowledged_is_refused_and_named(
    config: StoreConfig, tmp_path: Path, bad: BadSectors
) -> None:
    async with opened(config) as one:
        await one.checkpoint()
        first = one.store.log.position.commit + 1
        await put(one, {f"f{i}": bytes([i]) * 2000 for i in range(12)})
        copy_tree(config.store, tmp_path / "crash")
    crash = load(tmp_path / "crash")
    spoil_everywhere(crash, bad, first + 4)
    with pytest.raises(ReplayError, match=r"Commit \d+ was acknowledged") as refused:
        await read(crash)
    gives_no_bad_advice(refused.value)


async def test_a_later_epoch_s_first_commit_covers_what_cannot_be_read(
    config: StoreConfig, bad: BadSectors, tmp_path: Path
) -> None:
    """The mount after a crash logs again what it replayed."""
    crash, number = await late_commit(config, tmp_path / "crash")
    assert (await read(crash)).keys() == {"early", "pad", "late"}
    spoil_everywhere(crash, bad, number)
    forget(crash)
    recovered(crash)
    assert (await read(crash)).keys() == {"early", "pad", "late"}


# --- nothing begins anew over data


@pytest.mark.parametrize("kept", ["journal", "shards"])
async def test_a_mount_never_starts_an_empty_store_over_data(
    config: StoreConfig, kept: str
) -> None:
    await write(config, made("kept", "a"))
    forget(config)
    for node in config.nodes:
        for folder in {"journal", "shards"} - {kept}:
            shutil.rmtree(node.path / folder)
    with pytest.raises(MetadataError, match="mounting would start an empty store"):
        await read(config)


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_disk_of_the_metadata_that_is_not_mounted_is_mentioned(
    config: StoreConfig, tmp_path: Path, elsewhere: bool
) -> None:
    await write(config, made("kept", "a"))
    metadata = tmp_path / "disk" / "metadata"
    if elsewhere:
        metadata.parent.mkdir()
        config.metadata.rename(metadata)
        config = replace(config, metadata=metadata)
        assert await read(config) == made("kept", "a")
    config.metadata.rename(tmp_path / "unmounted")
    with pytest.raises(MetadataError, match="the metadata is gone") as refused:
        await read(config)
    assert (
        f"if the disk of {metadata} is not mounted, mount it" in str(refused.value)
    ) is elsewhere
    assert f"run 'fusestore recover {config.store}'" in str(refused.value)
    config.metadata.rmdir()
    (tmp_path / "unmounted").rename(config.metadata)
    assert await read(config) == made("kept", "a")


async def test_an_empty_database_never_becomes_a_store_that_holds_data(
    config: StoreConfig,
) -> None:
    """As a version that did not look left it behind: a database at commit 0."""
    async with opened(config) as one:
        await put(one, made("data", "a"))
    forget(config)
    config.metadata.mkdir()
    engine = Engine(config.metadata)
    row = b'{"format": 1, "store": "%s", "code": "2+1"}' % str(config.uuid).encode()
    save(engine, {store_rows.FORMAT_KEY: row, store_rows.LOG_KEY: LogPosition().encode()})
    engine.close()
    for node in config.nodes:
        for path in (node.path / "journal").iterdir():
            path.write_bytes(bytes(path.stat().st_size))
    for accept_loss in (False, True):
        with pytest.raises(ReplayError, match="mounting would start an empty store"):
            async with open_store(config, accept_loss=accept_loss):
                pytest.fail("mounted")


# --- quarantine


async def in_doubt(config: StoreConfig) -> tuple[dict[str, bytes], Path]:
    """A store whose metadata was recovered, and a segment on a node that no table names."""
    files = made("doubt", "a", "b")
    await write(config, files)
    forget(config)
    stray = config.nodes[0].path / segment_path(SegmentKind.SHARDS, 77)
    stray.write_bytes(bytes(1 << 20))  # a crash came before its first record was on the disk
    recovered(config)
    return files, stray


async def test_what_no_table_names_is_kept_until_fsck_is_clean(config: StoreConfig) -> None:
    files, stray = await in_doubt(config)
    size = stray.stat().st_size
    for _ in range(2):
        async with opened(config) as one:
            await one.checkpoint()
            assert stray.exists()
            kept = (await one.store.status())["quarantine"]
            assert kept == {"why": "the metadata was recovered", "segments": 1, "bytes": size}
    async with opened(config) as one:
        assert (await fsck(one.store, repair=False, at_rest=False))["clean"]
        with trio.fail_after(10):
            while stray.exists():  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert (await one.store.status())["quarantine"] is None
    async with opened(config) as one:
        assert (await one.store.status())["quarantine"] is None
        assert await read_files(one) == files


async def test_the_journal_is_kept_while_the_history_is_in_doubt(config: StoreConfig) -> None:
    files, _ = await in_doubt(config)
    before = set(os.listdir(config.nodes[1].path / "journal"))
    await dump_metadata(config)
    assert before <= set(os.listdir(config.nodes[1].path / "journal"))
    async with opened(config) as one:
        assert (await fsck(one.store, repair=False, at_rest=False))["clean"]
    await dump_metadata(config)
    assert not before & set(os.listdir(config.nodes[1].path / "journal"))
    assert await read(config) == files


async def test_fsck_without_a_node_ends_no_doubt(config: StoreConfig, tmp_path: Path) -> None:
    _, stray = await in_doubt(config)
    config.nodes[2].path.rename(tmp_path / "away")
    async with opened(config) as one:
        await fsck(one.store, repair=False, at_rest=False)
        await one.checkpoint()
        assert stray.exists()
        assert (await one.store.status())["quarantine"] is not None


async def test_accepted_losses_keep_what_was_given_up(
    config: StoreConfig, tmp_path: Path, bad: BadSectors
) -> None:
    crash, number = await late_commit(config, tmp_path / "crash")
    spoil_everywhere(crash, bad, number)
    async with open_store(crash, accept_loss=True) as store:
        kept = (await store.status())["quarantine"]
        assert kept is not None
        assert kept["why"] == "losses were accepted"


@pytest.mark.parametrize("again", [False, True])
async def test_a_mount_accepts_what_recover_gave_up(
    config: StoreConfig, tmp_path: Path, bad: BadSectors, again: bool
) -> None:
    """recover advises to mount: the loss that it was told to accept is not refused again."""
    crash, number = await late_commit(config, tmp_path / "crash")
    spoil_everywhere(crash, bad, number)
    forget(crash)
    with pytest.raises(ReplayError, match="cannot"):
        recovered(crash)
    recovered(crash, accept_loss=True)
    if again:
        forget(crash)
        with pytest.raises(ReplayError, match="cannot"):
            recovered(crash)
        recovered(crash, accept_loss=True)
    async with opened(crash) as one:
        kept = (await one.store.status())["quarantine"]
        assert kept is not None
        assert kept["why"] == "losses were accepted"
        await put(one, made("more", "more"))
    files = await read(crash)
    assert files.items() >= made("more", "more").items()


@pytest.mark.expects_log(FOREIGN_FILES)
async def test_the_journal_of_a_history_that_was_given_up_is_set_aside(tmp_path: Path) -> None:
    """It comes back while the history is in doubt; it goes when fsck has found nothing."""
    config = make(tmp_path / "store", "1+2")
    await write(config, made("base", "a"))
    copy_tree(config.store, tmp_path / "other")
    other = load(tmp_path / "other")
    await write(other, made("theirs", "theirs"))
    shutil.rmtree(config.nodes[2].path)
    forget(config)
    recovered(config, accept_loss=True)
    await write(config, made("ours", "ours"))
    copy_tree(other.nodes[2].path, config.nodes[2].path)
    folder = config.nodes[2].path / "journal"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    async with opened(config) as one:
        await healthy(one)
        for name, data in before.items():
            assert (folder / f"{name}.kept1").read_bytes() == data
        assert (await fsck(one.store, repair=False, at_rest=False))["clean"]
        with trio.fail_after(10):
            while any(".kept" in path.name for path in folder.iterdir()):  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert await read_files(one) == made("base", "a") | made("ours", "ours")


# --- segments that are put in the place of others


async def test_a_segment_is_replaced_as_a_whole(config: StoreConfig) -> None:
    node = open_node(config, config.nodes[0])
    node.write(SegmentKind.JOURNAL, 1, 0, [b"old" * 100])
    old = node.opened(SegmentKind.JOURNAL, 1)
    node.replace(SegmentKind.JOURNAL, 1, b"new")
    node.check()
    assert (node.size(SegmentKind.JOURNAL, 1), node.read(SegmentKind.JOURNAL, 1, 0, 3)) == (
        3,
        b"new",
    )
    assert old is not None
    assert os.pread(old.fd, 3, 0) == b"old"
    node.replace(SegmentKind.JOURNAL, 2, b"made")
    assert node.segments(SegmentKind.JOURNAL) == [1, 2]


@pytest.mark.expects_log(FOREIGN_FILES)
async def test_a_replacement_that_fails_leaves_the_segment(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = open_node(config, config.nodes[0])
    node.write(SegmentKind.JOURNAL, 1, 0, [b"old"])

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(NodeError):
        patch.setattr(os, "fsync", fsync)
        node.replace(SegmentKind.JOURNAL, 1, b"new")
    assert (node.segments(SegmentKind.JOURNAL), node.read(SegmentKind.JOURNAL, 1, 0, 3)) == (
        [1],
        b"old",
    )
    node.replace(SegmentKind.JOURNAL, 1, b"new")
    assert node.read(SegmentKind.JOURNAL, 1, 0, 3) == b"new"
