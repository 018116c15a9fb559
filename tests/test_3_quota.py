"""Quotas: what lies below a directory is counted exactly, and limited.

No mount: a store is opened in the process.  The model is the tree itself: what
`usage` counts anew by walking from names must be what the rows say.
"""

from __future__ import annotations

import random
import shutil
import stat
from pathlib import Path

import pytest
import trio

from fusestore.config.mkfs import make_store
from fusestore.config.store_config import StoreConfig
from fusestore.errors import CrossesQuotaError, FileSystemError, QuotaError, UsageError
from fusestore.format import file_rows
from fusestore.format.file_rows import NO_LIMIT, ROOT, Quota, QuotaState
from fusestore.limits import STRIPE_BYTES
from fusestore.rescue.fsck import fsck
from fusestore.rescue.recover import recover
from support.logs import MENDED
from support.metadata_rows import check, edit
from support.opened_store import Opened, crashed, opened

KIB = 1 << 10


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make_store(tmp_path / "store")


def folder(one: Opened, name: str, parent: int = ROOT) -> int:
    return one.files.tree.make(parent, name.encode(), stat.S_IFDIR | 0o755, 0, 0)[0]


def new_file(one: Opened, parent: int, name: str) -> int:
    return one.files.tree.make(parent, name.encode(), stat.S_IFREG | 0o644, 0, 0)[0]


async def put(one: Opened, parent: int, name: str, size: int) -> int:
    ino = new_file(one, parent, name)
    for start in range(0, size, STRIPE_BYTES):
        await one.files.contents.write(ino, start, bytes(min(STRIPE_BYTES, size - start)))
    return ino


async def set_quota(
    one: Opened, ino: int, size: int | None = None, files: int | None = None
) -> None:
    one.files.quotas.set(ino, size, files)
    await one.files.quotas.wait(ino)


async def clear(one: Opened, ino: int) -> None:
    await one.files.quotas.clear(ino)
    await one.files.quotas.wait(ino)


def row(one: Opened, ino: int) -> Quota | None:
    value = one.store.log.engine.get(file_rows.quota_key(ino))
    return Quota.decode(value) if value is not None else None


def used(one: Opened, ino: int) -> tuple[int, int]:
    found = row(one, ino)
    assert found is not None
    return found.bytes_used, found.files_used


def usage(one: Opened, top: int) -> tuple[int, int]:
    """(bytes, inodes) below a directory, by its names, each inode once."""
    seen: dict[int, int] = {}

    def walk(ino: int) -> None:
        for _, child, _ in list(one.files.tree.entries(ino, 0)):
            inode = one.files.tree.inode(child)
            seen[child] = inode.allocated
            if stat.S_ISDIR(inode.mode):
                walk(child)

    walk(top)
    return sum(seen.values()), len(seen)


async def clean(config: StoreConfig) -> None:
    assert (await check(config))["findings"] == []


# --- limits ------------------------------------------------------------------


async def test_a_write_ends_at_the_last_block_that_fits(config: StoreConfig) -> None:
    async with opened(config) as one:
        top = folder(one, "top")
        await set_quota(one, top, size=10 * 4 * KIB)
        ino = new_file(one, top, "a")
        assert await one.files.contents.write(ino, 0, bytes(30 * KIB)) == 30 * KIB
        assert await one.files.contents.write(ino, 30 * KIB, bytes(30 * KIB)) == 10 * KIB
        with pytest.raises(QuotaError):
            await one.files.contents.write(ino, 40 * KIB, b"x")
        assert used(one, top) == (40 * KIB, 1) == usage(one, top)
        # What is there may be overwritten, and where it ends a write is cut short.
        assert await one.files.contents.write(ino, 36 * KIB, b"y" * 8 * KIB) == 4 * KIB
        assert bytes(await one.files.contents.read(ino, 36 * KIB, 9000)) == b"y" * 4 * KIB
    await clean(config)


async def test_a_whole_write_is_refused_rather_than_cut_short(config: StoreConfig) -> None:
    async with opened(config) as one:
        top = folder(one, "top")
        await set_quota(one, top, size=100 * KIB)
        ino = new_file(one, top, "a")
        with pytest.raises(QuotaError):
            await one.files.contents.write(ino, 0, bytes(101 * KIB), whole=True)
        assert used(one, top) == (0, 1)
        assert await one.files.contents.write(ino, 0, bytes(100 * KIB), whole=True) == 100 * KIB


async def test_holes_are_free_and_filling_them_is_not(config: StoreConfig) -> None:
    async with opened(config) as one:
        top = folder(one, "top")
        await set_quota(one, top, size=16 * KIB)
        ino = new_file(one, top, "a")
        await one.files.contents.truncate(ino, 1 << 40)
        await one.files.contents.write(ino, 8 * KIB, bytes(8 * KIB))
        # Two blocks of hole, two that are there, two past them: the last two do not fit.
        assert await one.files.contents.write(ino, 0, bytes(24 * KIB)) == 16 * KIB
        assert used(one, top) == (16 * KIB, 1) == usage(one, top)
        await one.files.contents.truncate(ino, 5000)
        assert used(one, top) == (5000, 1)
    await clean(config)


async def test_inodes_of_any_kind_count_as_files(config: StoreConfig) -> None:
    async with opened(config) as one:
        top, tree = folder(one, "top"), one.files.tree
        await set_quota(one, top, files=4)
        inner = folder(one, "inner", top)
        new_file(one, inner, "file")
        tree.make(inner, b"pipe", stat.S_IFIFO | 0o600, 0, 0)
        tree.make(inner, b"link", stat.S_IFLNK | 0o777, 0, 0, target=b"x")
        with pytest.raises(QuotaError):
            folder(one, "more", inner)
        assert tree.lookup(inner, b"more") is None
        ino, _ = tree.unlink(inner, b"pipe")
        with pytest.raises(QuotaError):
            folder(one, "more", inner)  # it is still there, as if it were open
        one.files.removal.remove(ino)
        await one.files.removal.removed()
        folder(one, "more", inner)
        assert used(one, top) == (0, 4) == usage(one, top)
    await clean(config)


async def test_a_quota_below_what_is_there_refuses_only_more(config: StoreConfig) -> None:
    async with opened(config) as one:
        top = folder(one, "top")
        ino = await put(one, top, "a", 100 * KIB)
        await set_quota(one, top, size=50 * KIB, files=0)
        with pytest.raises(QuotaError):
            await one.files.contents.write(ino, 100 * KIB, b"x")
        assert await one.files.contents.write(ino, 0, b"x" * 1000) == 1000
        await one.files.contents.truncate(ino, 10 * KIB)
        assert await one.files.contents.write(ino, 10 * KIB, b"x") == 1
        with pytest.raises(QuotaError):
            new_file(one, top, "b")
        await set_quota(one, top, files=NO_LIMIT)
        new_file(one, top, "b")
    await clean(config)


async def test_removing_a_file_of_many_extents_gives_all_of_it_back(config: StoreConfig) -> None:
    async with opened(config) as one:
        top = folder(one, "top")
        await set_quota(one, top, size=1 << 30)
        for name in ("a", "b"):
            ino = new_file(one, top, name)
            for number in range(700):
                await one.files.contents.write(ino, 10_000 * number, b"0123456789")
        await one.files.contents.truncate(ino, 10)
        assert used(one, top) == (7010, 2) == usage(one, top)
        for name in (b"a", b"b"):
            ino, _ = one.files.tree.unlink(top, name)
            one.files.removal.remove(ino)
            await one.files.removal.removed()
        assert used(one, top) == (0, 0)
        await trio.testing.wait_all_tasks_blocked(0.01)
    await clean(config)


# --- moving ------------------------------------------------------------------


async def test_a_file_takes_what_it_has_along(config: StoreConfig) -> None:
    async with opened(config) as one:
        tree = one.files.tree
        top, other = folder(one, "top"), folder(one, "other")
        inner = folder(one, "inner", top)
        await set_quota(one, top, size=100 * KIB)
        await set_quota(one, inner, size=50 * KIB)
        await set_quota(one, other, size=30 * KIB)
        await put(one, inner, "a", 40 * KIB)
        assert used(one, top) == (40 * KIB, 2)
        tree.rename(inner, b"a", top, b"a")  # within the outer one
        assert (used(one, top), used(one, inner)) == ((40 * KIB, 2), (0, 0))
        with pytest.raises(QuotaError):
            tree.rename(top, b"a", other, b"a")
        assert used(one, top) == (40 * KIB, 2)
        tree.rename(top, b"a", ROOT, b"a")
        assert used(one, top) == (0, 1)
        await put(one, other, "b", 30 * KIB)
        tree.rename(ROOT, b"a", top, b"a")
        await one.files.contents.truncate(tree.lookup(top, b"a") or 0, 30 * KIB)
        tree.exchange(other, b"b", top, b"a")  # though neither would fit besides the other
        assert (used(one, top), used(one, other)) == ((30 * KIB, 2), (30 * KIB, 1))
        for ino in (top, inner, other):
            assert used(one, ino) == usage(one, ino)
    await clean(config)


async def test_directories_and_files_with_more_names_do_not_cross(config: StoreConfig) -> None:
    async with opened(config) as one:
        tree = one.files.tree
        top = folder(one, "top")
        await set_quota(one, top)  # no limit, and yet a quota
        inside, outside = folder(one, "d", top), folder(one, "d")
        file = await put(one, top, "f", 100)
        tree.link(file, inside, b"f2")
        with pytest.raises(CrossesQuotaError):
            tree.link(file, outside, b"f")
        for source, name, target in ((top, b"d", ROOT), (ROOT, b"d", top), (top, b"f", ROOT)):
            with pytest.raises(CrossesQuotaError):
                tree.rename(source, name, target, b"x")
        with pytest.raises(CrossesQuotaError):
            tree.exchange(ROOT, b"d", top, b"f")
        tree.rename(ROOT, b"top", outside, b"top")  # the quota's directory itself may
        assert used(one, top) == (100, 2) == usage(one, top)
        await set_quota(one, inside)
        with pytest.raises(CrossesQuotaError):
            tree.rename(top, b"d", outside, b"d")
        tree.rename(top, b"d", top, b"e")
        assert used(one, inside) == (100, 1)
        tree.unlink(inside, b"f2")  # what had names on both sides stays where it was counted
        assert used(one, inside) == (100, 1)
        tree.unlink(top, b"f")
        one.files.removal.remove(file)
        await one.files.removal.removed()
        assert used(one, inside) == (0, 0)
    await clean(config)


async def test_a_directory_that_goes_takes_its_quota_along(config: StoreConfig) -> None:
    async with opened(config) as one:
        tree = one.files.tree
        outer = folder(one, "outer")
        top = folder(one, "top", outer)
        await set_quota(one, outer)
        await set_quota(one, top, size=1000)
        await put(one, top, "open", 500)
        file, _ = tree.unlink(top, b"open")
        gone, _ = tree.rmdir(outer, b"top")
        one.files.removal.remove(gone)
        await one.files.removal.removed()
        assert used(one, outer) == (500, 1)
        assert await one.files.quotas.all() == [
            {**(await one.files.quotas.all())[0], "path": "/outer", "bytes_used": 500}
        ]
        one.files.removal.remove(file)
        await one.files.removal.removed()
        assert used(one, outer) == (0, 0)
        assert row(one, top) is None
    await clean(config)


# --- setting and clearing ----------------------------------------------------


async def make_tree(one: Opened, top: int, depth: int = 3) -> None:
    for number in range(5):
        ino = await put(one, top, f"f{number}", 1000 * number)
        one.files.tree.link(ino, top, b"linked%d" % number)
    for number in range(3 if depth else 0):
        await make_tree(one, folder(one, f"d{number}", top), depth - 1)


async def test_what_is_there_is_counted_and_given_back(config: StoreConfig) -> None:
    async with opened(config) as one:
        outer = folder(one, "outer")
        top = folder(one, "top", outer)
        await make_tree(one, top)
        inner = one.files.tree.lookup(top, b"d1") or 0
        await set_quota(one, inner, files=10**6)
        await set_quota(one, top, size=10**9)
        await set_quota(one, outer)
        for ino in (inner, top, outer):
            assert used(one, ino) == usage(one, ino)
        assert [found["path"] for found in await one.files.quotas.above(inner)] == [
            "/outer/top/d1",
            "/outer/top",
            "/outer",
        ]
        await clear(one, top)
        assert row(one, top) is None
        assert used(one, outer) == usage(one, outer)
        with pytest.raises(UsageError):
            await one.files.quotas.clear(top)
        await clear(one, outer)
        await clear(one, inner)
        assert one.rows(b"B") == []
        inodes = [file_rows.Inode.decode(value) for _, value in one.rows(b"I")]
        assert not any(inode.quota_root for inode in inodes)
    await clean(config)


async def test_a_quota_is_not_enforced_while_it_is_counted(config: StoreConfig) -> None:
    async with opened(config) as one:
        top = folder(one, "top")
        await make_tree(one, top)
        one.files.quotas.set(top, 0, 0)
        assert (await one.files.quotas.above(top))[0]["state"] == "counting"
        new_file(one, top, "new")
        await one.files.quotas.wait(top)
        assert (await one.files.quotas.above(top))[0]["state"] == "active"
        with pytest.raises(QuotaError):
            new_file(one, top, "newer")
        assert used(one, top) == usage(one, top)


@pytest.mark.parametrize("seed", range(6))
async def test_counting_is_exact_while_the_tree_changes(config: StoreConfig, seed: int) -> None:
    chance = random.Random(seed)
    async with opened(config) as one:
        tree, quotas = one.files.tree, one.files.quotas
        outer = folder(one, "outer")
        folders = [ROOT, outer]
        for number in range(30):
            folders.append(folder(one, f"d{number}", chance.choice(folders[1:])))
        for number in range(300):
            await put(one, chance.choice(folders), f"f{number}", chance.randrange(3000))
        given = chance.sample(folders[1:], 4)

        def entry() -> tuple[int, bytes]:
            while True:
                found = chance.choice(folders)
                names = [name for _, _, name in tree.entries(found, 0)]
                if names:
                    return found, chance.choice(names)

        async def change(number: int) -> None:
            place = chance.choice(folders)
            match chance.randrange(7):
                case 0:
                    await put(one, place, f"n{number}", chance.randrange(3000))
                case 1:
                    folders.append(folder(one, f"nd{number}", place))
                case 2:
                    lost = tree.rename(*entry(), place, b"m%d" % number)
                    assert lost is None
                case 3:
                    tree.exchange(*entry(), *entry())
                case 4:
                    ino, inode = tree.unlink(*entry())
                    if inode.nlink == 0:
                        one.files.removal.remove(ino)
                case 5:
                    removed.append(tree.rmdir(*entry())[0])
                    if chance.random() < 0.5:
                        one.files.removal.remove(removed.pop())
                case 6:
                    source, name = entry()
                    await one.files.contents.write(tree.lookup(source, name) or 0, 100, bytes(2000))

        removed = []
        for number in range(1500):
            if number % 150 == 0:
                ino = chance.choice(given)
                try:
                    if chance.random() < 0.4:
                        await quotas.clear(ino)
                    else:
                        quotas.set(ino, None, None)
                except (UsageError, FileSystemError):
                    pass
            try:
                await change(number)
            except FileSystemError:
                pass
            if chance.random() < 0.3:
                await trio.lowlevel.checkpoint()
        for ino in given:
            await quotas.wait(ino)
        for ino in removed:
            one.files.removal.remove(ino)
            await one.files.removal.removed()
        await one.store.committer.commit()
        copy = crashed(config, config.store.parent / "crash")
    await clean(config)
    await clean(copy)


async def test_counting_goes_on_after_a_crash(config: StoreConfig) -> None:
    async with opened(config) as one:
        top = folder(one, "top")
        await make_tree(one, top)
        one.files.quotas.set(top, None, 10**6)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        await one.store.committer.commit()
        counted = used(one, top)
        copy = crashed(config, config.store.parent / "crash")
        expected = usage(one, top)
    await clean(copy)
    async with opened(copy) as one:
        one.files.go_on()
        await one.files.quotas.wait(top)
        assert 0 < counted[1] <= expected[1]
        assert used(one, top) == expected
        found = row(one, top)
        assert found is not None
        assert found.state is QuotaState.ACTIVE
    await clean(copy)


async def test_quotas_come_back_from_the_journals_alone(config: StoreConfig) -> None:
    async with opened(config) as one:
        outer = folder(one, "outer")
        top = folder(one, "top", outer)
        await make_tree(one, top)
        await set_quota(one, outer)
        await set_quota(one, top, size=10**9)
        await one.store.dumper.take()
        await put(one, top, "later", 12345)
        expected = await one.files.quotas.all()
    shutil.rmtree(config.metadata)
    recover(config.store, (), None, accept_loss=False, progress=lambda message: None)
    async with opened(config) as one:
        assert await one.files.quotas.all() == expected
        assert used(one, top) == usage(one, top)
    await clean(config)


async def test_a_removed_directory_that_is_open_is_no_finding(config: StoreConfig) -> None:
    async with opened(config) as one:
        top = folder(one, "top")
        await set_quota(one, top, size=1000)
        one.files.tree.rmdir(ROOT, b"top")
        assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == []
    await clean(config)
    async with opened(config) as one:
        assert one.rows(b"B") == []


# --- fsck --------------------------------------------------------------------


@pytest.mark.parametrize("what", ["count", "row", "inodes", "outer"])
@pytest.mark.expects_log(MENDED)
async def test_fsck_counts_anew(config: StoreConfig, what: str) -> None:
    async with opened(config) as one:
        outer = folder(one, "outer")
        top = folder(one, "top", outer)
        await make_tree(one, top)
        await set_quota(one, outer)
        await set_quota(one, top, size=10**9)
        expected = usage(one, outer)

    def hurt(rows: dict[bytes, bytes]) -> None:
        key = file_rows.quota_key(top)
        found = Quota.decode(rows[key])
        if what == "count":
            found.bytes_used += 1
            rows[key] = found.encode()
        elif what == "outer":
            found.outer = 77
            rows[key] = found.encode()
        elif what == "row":
            del rows[key]
        else:
            for key in [key for key in rows if key[:1] == b"I"][5::7]:
                inode = file_rows.Inode.decode(rows[key])
                inode.quota_root = 0
                rows[key] = inode.encode()

    edit(config, hurt)
    done = await check(config, repair=True)
    assert done["findings"]
    assert done["left"] == []
    await clean(config)
    async with opened(config) as one:
        assert used(one, outer) == expected
        if what != "row":
            assert used(one, top) == usage(one, top)
