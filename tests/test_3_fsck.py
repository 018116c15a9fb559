"""fsck finds what does not fit together, mends it, and drops nothing.

The fault model: rows of the metadata that are gone, that have the value of another
row of their table, or garbage in place of their value or key.  Not modelled: rows
that are wrong and fit all others.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import shutil
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import trio

from fusestore.commit.row_check import Examined, WrongRow
from fusestore.commit.row_keeper import RowKeeper
from fusestore.config.mkfs import make_store
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import LostError, UsageError
from fusestore.files.filesystem import FileSystem
from fusestore.format import file_rows, stripe_rows
from fusestore.format.file_rows import ROOT, Extent, Inode
from fusestore.format.records import HEADER_BYTES, SegmentKind
from fusestore.format.segment_numbers import segment_path
from fusestore.format.stripe_rows import Stripe
from fusestore.limits import STRIPE_BYTES
from fusestore.repair.rebuild import Rebuilder
from fusestore.repair.risk import Safety
from fusestore.rescue import fsck_mend
from fusestore.rescue.fsck import fsck
from fusestore.rescue.fsck_findings import Fix
from fusestore.rescue.fsck_mend import Mender
from fusestore.serve.commands import Context, do
from fusestore.serve.messages.safety import FsckRequest
from fusestore.store.opening import open_store
from support.logs import (
    CLAIMED,
    DISAGREE,
    GONE,
    LOST_STRIPE,
    NO_STRIPE,
    NOT_IN_TABLES,
    UNREAD_FILE,
    WRONG_ROW,
)
from support.metadata_rows import Rows, check, edit
from support.opened_store import Opened, opened


@pytest.fixture(autouse=True)
def _journals_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here rows are wrong in the database alone, and stand for rows that are wrong everywhere."""
    real = RowKeeper.compare

    async def compare(
        keeper: RowKeeper, *, thorough: bool = False
    ) -> tuple[Examined, list[WrongRow]]:
        return await real(keeper)

    monkeypatch.setattr(RowKeeper, "compare", compare)


async def make_tree(one: Opened) -> None:
    """A tree with everything in it that has rows."""
    tree, contents = one.files.tree, one.files.contents
    chance = random.Random(1)
    folder, _ = tree.make(ROOT, b"folder", stat.S_IFDIR | 0o755, 1, 2)
    inner, _ = tree.make(folder, b"inner", stat.S_IFDIR | 0o700, 1, 2)
    for place in (int(ROOT), folder, inner):
        for number in range(4):
            ino, _ = tree.make(place, b"file%d" % number, stat.S_IFREG | 0o644, 0, 0)
            await contents.write(ino, 0, chance.randbytes(chance.randrange(1, 100_000)))
        await contents.write(ino, 1 << 20, chance.randbytes(STRIPE_BYTES))
        await contents.write(ino, 50, b"overwritten")
        tree.make(place, b"empty", stat.S_IFREG | 0o600, 0, 0)
        tree.make(place, b"pipe", stat.S_IFIFO | 0o600, 0, 0)
        one.files.attributes.set(ino, b"user.a", b"value")
        tree.link(ino, place, b"linked")
        tree.make(place, b"link", stat.S_IFLNK | 0o777, 0, 0, target=b"somewhere")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a tree, unmounted; to be copied."""
    path: Path = tmp_path_factory.mktemp("fsck") / "store"
    config = make_store(path)

    async def make() -> None:
        async with opened(config) as one:
            await make_tree(one)

    trio.run(make)
    return path


@pytest.fixture
def config(whole: Path, tmp_path: Path) -> StoreConfig:
    shutil.copytree(whole, tmp_path / "store")
    return load(tmp_path / "store")


async def read_all(one: Opened) -> dict[str, bytes | str | None]:
    """By path: a file's bytes, None where they are lost, or what else an inode is."""
    tree = one.files.tree
    found: dict[str, bytes | str | None] = {}

    async def walk(ino: int, path: str) -> None:
        for _, child, name in list(tree.entries(ino, 0)):
            assert tree.lookup(ino, name) == child
            inode = tree.inode(child)
            below = f"{path}/{os.fsdecode(name)}"
            if stat.S_ISDIR(inode.mode):
                found[below] = "directory"
                await walk(child, below)
            elif stat.S_ISLNK(inode.mode):
                found[below] = os.fsdecode(tree.target(child))
            elif stat.S_ISREG(inode.mode):
                try:
                    found[below] = bytes(await one.files.contents.read(child, 0, 1 << 23))
                except LostError:
                    found[below] = None
            else:
                found[below] = "special"

    await walk(ROOT, "")
    return found


@asynccontextmanager
async def mended(config: StoreConfig) -> AsyncIterator[Opened]:
    """The store, mended, and found to be clean afterwards, open."""
    done = await check(config, repair=True)
    assert done["findings"]
    assert done["left"] == []
    again = await check(config)
    assert again["findings"] == []
    async with opened(config) as one:
        yield one
    assert (await check(config))["findings"] == []


def test_every_finding_names_a_fix_that_the_mender_has() -> None:
    used = set()
    for path in Path(fsck_mend.__file__).parent.glob("fsck*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "finding":
                fix = ast.literal_eval(call.args[3])
                fields = {str(keyword.arg): keyword for keyword in call.keywords}
                inspect.signature(getattr(Mender, fix)).bind("self", *call.args[4:], **fields)
                used.add(fix)
    assert used == {*get_args(Fix)}
    methods = {name for name, _ in inspect.getmembers(Mender, inspect.isfunction)}
    assert used == {name for name in methods if not name.startswith("_")} - {"mend"}


async def test_a_whole_store_is_clean(config: StoreConfig) -> None:
    for repair in (False, True):
        done = await check(config, repair=repair)
        assert (done["clean"], done["findings"], done["lost_bytes"]) == (True, [], 0)
        assert done["files"] == 24


async def test_an_open_store_is_checked_while_it_is_written_to(config: StoreConfig) -> None:
    async with opened(config) as one, trio.open_nursery() as nursery:
        busy = True

        async def load() -> None:
            for number in range(2000):
                if not busy:
                    return
                await one.put(f"n{number}", random.Random(number).randbytes(number * 50))
                if number % 3 == 0:
                    one.delete(f"n{number // 2}")
                await trio.lowlevel.checkpoint()

        nursery.start_soon(load)
        for _ in range(10):
            assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == []
            await one.store.committer.commit()
        busy = False


async def test_a_crashed_store_is_clean(config: StoreConfig, tmp_path: Path) -> None:
    async with opened(config) as one:
        await one.put("a", b"a" * 3_000_000)
        one.delete("file1")
        await one.store.committer.commit()
        shutil.copytree(config.store, tmp_path / "crash")
    crash = load(tmp_path / "crash")
    assert (await check(crash))["findings"] == []
    assert (await check(crash, repair=True))["findings"] == []


@pytest.mark.parametrize("letter", [b"N", b"L", b"V", b"O", b"G", b"Zcounters"])
async def test_rows_that_can_be_made_anew_are(config: StoreConfig, letter: bytes) -> None:
    async with opened(config) as one:
        before = await read_all(one)

    def drop(rows: Rows) -> None:
        victims = [key for key in rows if key.startswith(letter)]
        for key in random.Random(3).sample(victims, -(-len(victims) // 2)):
            del rows[key]

    edit(config, drop)
    async with mended(config) as one:
        after = await read_all(one)
    if letter == b"N":
        assert sorted(map(repr, after.values())) == sorted(map(repr, before.values()))
    else:
        assert after == before


async def test_lost_inodes_come_back_with_all_their_bytes(config: StoreConfig) -> None:
    async with opened(config) as one:
        before = await read_all(one)

    def drop(rows: Rows) -> None:
        for key in [key for key in rows if key[:1] == b"I"]:
            del rows[key]

    edit(config, drop)
    async with mended(config) as one:
        after = await read_all(one)
    contents = [value for value in before.values() if isinstance(value, bytes)]
    assert set(contents) <= set(after.values())
    assert after["/folder/link"] == "somewhere"
    assert after["/folder/inner"] == "directory"


async def test_lost_extents_are_found_by_their_owners(config: StoreConfig) -> None:
    async with opened(config) as one:
        before = await read_all(one)

    def drop(rows: Rows) -> None:
        for key in [key for key in rows if key[:1] == b"E"]:
            del rows[key]

    edit(config, drop)
    async with mended(config) as one:
        assert await read_all(one) == before


@pytest.mark.expects_log(NO_STRIPE)
async def test_bytes_that_are_nowhere_are_an_error_and_no_zeros(config: StoreConfig) -> None:
    async with opened(config) as one:
        before = await read_all(one)

    def drop(rows: Rows) -> Stripe:
        return Stripe.decode(rows.pop(max(key for key in rows if key[:1] == b"S")))

    for place in edit(config, drop).shards:  # its shards say nothing, too
        path = config.nodes[place.node - 1].path / segment_path(SegmentKind.SHARDS, place.segment)
        with path.open("r+b") as file:
            file.seek(place.offset - HEADER_BYTES)
            file.write(bytes(HEADER_BYTES))
    async with mended(config) as one:
        after = await read_all(one)
    lost = [path for path in before if after[path] is None]
    assert lost
    assert {path: after[path] for path in before if path not in lost} == {
        path: before[path] for path in before if path not in lost
    }
    assert (await check(config))["lost_bytes"] > 0


async def test_what_has_no_place_goes_to_lost_and_found(config: StoreConfig) -> None:
    def drop(rows: Rows) -> int:
        key = file_rows.name_key(ROOT, b"folder")
        ino, cookie = file_rows.decode_name(rows.pop(key))
        del rows[file_rows.listing_key(ROOT, cookie)]
        return ino

    async with opened(config) as one:
        before = await read_all(one)
    ino = edit(config, drop)
    async with mended(config) as one:
        after = await read_all(one)
    assert after[f"/lost+found/#{ino}/inner/file2"] == before["/folder/inner/file2"]


@pytest.mark.parametrize("kind", ["file", "link", "file that the listing has, too"])
async def test_a_stray_name_does_not_make_a_directory_of_a_file(
    config: StoreConfig, kind: str
) -> None:
    async with opened(config) as one:
        tree = one.files.tree
        if kind == "link":
            good, _ = tree.make(ROOT, b"good", stat.S_IFLNK | 0o777, 0, 0, target=b"target")
        else:
            good = await one.put("good", b"good bytes" * 20_000)
        other = await one.put("other", b"other")
        await one.checkpoint()

    def move(rows: Rows) -> None:
        row = rows.pop(file_rows.name_key(ROOT, b"other"))
        rows[file_rows.name_key(good, b"other")] = row
        if kind.startswith("file that"):
            _, cookie = file_rows.decode_name(row)
            listed = rows.pop(file_rows.listing_key(ROOT, cookie))
            rows[file_rows.listing_key(good, cookie)] = listed

    edit(config, move)
    async with mended(config) as one:
        tree = one.files.tree
        assert tree.lookup(ROOT, b"good") == good
        if kind == "link":
            assert tree.target(good) == b"target"
        else:
            assert await one.get("good") == b"good bytes" * 20_000
        assert bytes(await one.files.contents.read(other, 0, 10)) == b"other"


async def test_one_lost_extent_of_a_file_with_holes_is_put_back(config: StoreConfig) -> None:
    async with opened(config) as one:
        for offset in (0, 100_000, 200_000):
            ino = await one.put("db", b"x" * 5000, offset)
        await one.checkpoint()
        before = await one.get("db")

    def drop(rows: Rows) -> None:
        del rows[file_rows.extent_key(ino, 0)]

    edit(config, drop)
    async with mended(config) as one:
        assert (await one.get("db"))[100_000:105_000] == before[100_000:105_000]
        assert await one.get("db") == before


async def test_directories_inside_themselves_are_taken_out(config: StoreConfig) -> None:
    def loop(rows: Rows) -> None:
        folder, cookie = file_rows.decode_name(rows.pop(file_rows.name_key(ROOT, b"folder")))
        del rows[file_rows.listing_key(ROOT, cookie)]
        inner, _ = file_rows.decode_name(rows[file_rows.name_key(folder, b"inner")])
        rows[file_rows.name_key(inner, b"folder")] = file_rows.name_value(folder, cookie)
        rows[file_rows.listing_key(inner, cookie)] = file_rows.listing_value(folder, b"folder")

    edit(config, loop)
    async with mended(config) as one:
        after = await read_all(one)
    assert sum(path.endswith("/file1") for path in after) == 3


async def test_extents_that_overlap_or_lie_past_the_end_become_files(config: StoreConfig) -> None:
    def overlap(rows: Rows) -> None:
        key, value = next(
            (k, v) for k, v in rows.items() if k[:1] == b"E" and Extent.decode(k, v).length > 5000
        )
        extent = Extent.decode(key, value)
        ino = file_rows.decode_ino_key(key)
        inside = Extent(extent.offset + 100, 50, extent.stripe, extent.stripe_offset)
        rows[file_rows.extent_key(ino, inside.offset)] = inside.encode()
        inode = Inode.decode(rows[file_rows.inode_key(ino)])
        past = Extent(inode.size + 10, 60, extent.stripe, extent.stripe_offset)
        rows[file_rows.extent_key(ino, past.offset)] = past.encode()

    edit(config, overlap)
    async with opened(config) as one:
        before = await read_all(one)
    async with mended(config) as one:
        after = await read_all(one)
    found = {path: after[path] for path in after if path.startswith("/lost+found/")}
    assert sorted(len(value or b"") for value in found.values()) == [50, 60]
    assert {path: after[path] for path in before}.keys() == before.keys()


async def test_shards_that_lie_on_each_other_are_rebuilt(config: StoreConfig) -> None:
    async with opened(config) as one:
        before = await read_all(one)

    def move(rows: Rows) -> None:
        one, two, *_ = [key for key in rows if key[:1] == b"S"]
        first, second = Stripe.decode(rows[one]), Stripe.decode(rows[two])
        place = first.shards[0]
        index = next(i for i, p in enumerate(second.shards) if p.node == place.node)
        rows[two] = second.moved(index, place).encode()

    edit(config, move)
    async with mended(config) as one:
        assert await read_all(one) == before
        with trio.fail_after(20):
            while one.rows(b"M"):
                one.store.comeback.wake()
                await trio.sleep(0.05)


async def test_a_mounted_store_is_not_mended(config: StoreConfig) -> None:
    async with opened(config) as one:
        with pytest.raises(UsageError):
            await do(Context(one.store, one.files), FsckRequest(repair=True))


@pytest.mark.parametrize("counts", [None, bytes(16)])
@pytest.mark.expects_log(NOT_IN_TABLES)
async def test_wrong_counts_of_segments_cost_no_shards(
    config: StoreConfig, counts: bytes | None
) -> None:
    """What is freed beside living shards is freed alone, whatever is said to live there."""
    async with open_store(config, background=False) as store, trio.open_nursery() as nursery:
        one = Opened(store, FileSystem(store, nursery))
        for name in ("freed", "kept"):
            await one.put(name, name.encode() * 500_000)
        await store.committer.commit()
        one.delete("freed")
        await one.files.removal.removed()

    def lose(rows: Rows) -> None:
        assert any(key[:1] == b"R" for key in rows)
        for key in [key for key in rows if key[:1] == b"G"]:
            if counts is None:
                del rows[key]
            else:
                rows[key] = counts

    edit(config, lose)
    async with opened(config) as one:
        while one.rows(b"R"):  # noqa: ASYNC110
            await trio.sleep(0.02)
        one.store.reader.forget(0)
        assert await one.get("kept") == b"kept" * 500_000
        assert one.store.reader.degraded == 0
    async with mended(config) as one:
        assert await one.get("kept") == b"kept" * 500_000


@pytest.mark.expects_log(
    r"files\.removal: A trim of inode \d+ does not match its size",
    r"files\.removal: Inode \d+ is not removed, because it has a name",
)
async def test_a_mount_believes_no_trim_and_no_orphan_that_the_inode_contradicts(
    config: StoreConfig,
) -> None:
    async with opened(config) as one:
        before = await read_all(one)

    def wrong(rows: Rows) -> None:
        for name, key, value in (
            (b"file1", file_rows.trim_key, bytes(8)),
            (b"file2", file_rows.orphan_key, b""),
            (b"folder", file_rows.orphan_key, b""),
        ):
            rows[key(file_rows.decode_name(rows[file_rows.name_key(ROOT, name)])[0])] = value

    edit(config, wrong)
    async with opened(config) as one:
        assert await read_all(one) == before
    async with mended(config) as one:
        assert await read_all(one) == before


async def test_what_came_back_can_be_written_to(config: StoreConfig) -> None:
    def drop(rows: Rows) -> None:
        for key in [key for key in rows if key[:1] == b"I"]:
            del rows[key]

    edit(config, drop)
    async with mended(config) as one:
        ino = await one.put("file1", b"new")
        assert (await one.files.contents.read(ino, 0, 3)) == b"new"


async def test_a_stray_row_of_a_listing_makes_no_file_a_directory(config: StoreConfig) -> None:
    async with opened(config) as one:
        before = await read_all(one)

    def stray(rows: Rows) -> None:
        file, _ = file_rows.decode_name(rows[file_rows.name_key(ROOT, b"file1")])
        rows[file_rows.listing_key(file, 20)] = file_rows.listing_value(file, b"name")

    edit(config, stray)
    async with mended(config) as one:
        assert await read_all(one) == before


async def test_shards_that_are_cut_in_half_are_named(config: StoreConfig) -> None:
    async with opened(config) as one:
        before = await read_all(one)
        rows = [Stripe.decode(value) for _, value in one.rows(b"S")]
        last = max((p for row in rows for p in row.shards if p.node == 1), key=lambda p: p.offset)
        path = one.store.log.members.by_id[1].config.path / segment_path(
            SegmentKind.SHARDS, last.segment
        )
    os.truncate(path, last.offset + 1)
    async with mended(config) as one:
        assert await read_all(one) == before


@pytest.mark.expects_log(LOST_STRIPE)
async def test_a_stripe_keeps_the_shards_that_another_claims(config: StoreConfig) -> None:
    """Whose shards they are is written on the nodes."""
    async with opened(config) as one:
        first, *_, last = (stripe_rows.decode_stripe_key(key) for key, _ in one.rows(b"S"))
        row = one.store.reader.stripe(last)
        assert row is not None
        before = bytes(await one.store.reader.read_stripe(last, 0, row.length))
        files = await read_all(one)

    def claim(rows: Rows) -> None:
        rows[stripe_rows.stripe_key(first)] = rows[stripe_rows.stripe_key(last)]

    edit(config, claim)
    async with mended(config) as one:
        assert bytes(await one.store.reader.read_stripe(last, 0, row.length)) == before
        assert await read_all(one) == files


async def test_an_extent_that_is_too_long_moves_no_other(config: StoreConfig) -> None:
    """The stripe's owners say how long it was."""
    async with opened(config) as one:
        ino = one.files.tree.lookup(ROOT, b"file3")
        before = await read_all(one)
    assert ino is not None

    def lengthen(rows: Rows) -> None:
        key = min(key for key in rows if key[:9] == file_rows.extent_key(ino, 0)[:9])
        extent = Extent.decode(key, rows[key])
        wrong = replace(extent, length=extent.length | 1 << 30)
        rows[key] = wrong.encode()

    edit(config, lengthen)
    async with mended(config) as one:
        assert await read_all(one) == before


@pytest.mark.expects_log(NO_STRIPE)
async def test_an_extent_that_is_too_long_takes_nothing_with_it(config: StoreConfig) -> None:
    """Its stripe has no owners any more: its bytes are lost, and no others."""
    async with opened(config) as one:
        ino = one.files.tree.lookup(ROOT, b"file3")
        before = await read_all(one)
        data = before["/file3"]
    assert ino is not None
    assert isinstance(data, bytes)

    def lengthen(rows: Rows) -> None:
        key = min(key for key in rows if key[:9] == file_rows.extent_key(ino, 0)[:9])
        extent = Extent.decode(key, rows[key])
        wrong = replace(extent, length=extent.length | 1 << 30)
        rows[key] = wrong.encode()
        for key in [key for key in rows if key[:1] == b"O"]:
            del rows[key]

    edit(config, lengthen)
    async with mended(config) as one:
        after = await read_all(one)
        assert {name for name in after if after[name] != before[name]} == {"/file3", "/linked"}
        assert (await one.files.contents.read(ino, 1 << 20, 1 << 22)) == data[1 << 20 :]


def damage(rows: Rows, chance: random.Random) -> None:
    """Remove some rows, or give them other values or keys."""
    tables = sorted({key[:1] for key in rows} - {b"Z"})
    for _ in range(chance.randrange(1, 12)):
        table = chance.choice(tables)
        keys = [key for key in rows if key[:1] == table]
        if not keys:
            continue
        key = chance.choice(keys)
        value = rows[key]
        match chance.randrange(8):
            case 0 | 1 | 2:
                del rows[key]
            case 3 | 4:
                rows[key] = rows[chance.choice(keys)]
            case 5:
                rows[key] = chance.randbytes(chance.choice([len(value), chance.randrange(100)]))
            case 6:
                rows[flipped(key, chance, 1)] = rows.pop(key)
            case 7:
                rows[key] = flipped(value, chance, 0) if value else b"?"


def flipped(data: bytes, chance: random.Random, first: int) -> bytes:
    """With one bit changed, from byte `first` on."""
    changed = bytearray(data)
    changed[chance.randrange(first, len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


@pytest.mark.expects_log(NO_STRIPE)
async def test_any_damage_is_mended(
    config: StoreConfig, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    for number in range(300 if pytestconfig.getoption("--long") else 25):
        seed = pytestconfig.getoption("--model-seed") + number
        print("seed", seed)
        chance = random.Random(seed)
        target = tmp_path / str(number)
        shutil.copytree(config.store, target)
        hurt = load(target)
        edit(hurt, lambda rows, chance=chance: damage(rows, chance))
        done = await check(hurt, repair=True)
        assert done["left"] == [], seed
        assert (await check(hurt))["findings"] == [], seed
        async with opened(hurt) as one:
            await read_all(one)
            await one.put("new", b"n" * 2_000_000)
        assert (await check(hurt))["findings"] == [], seed
        shutil.rmtree(target)


MUCH = [246, 258, 278, 311, 312, 313, 329, 417, 528]
"""Seeds of which the damage had sizes that no file has, or counts that no row holds."""


@pytest.mark.expects_log(NO_STRIPE, DISAGREE, WRONG_ROW)
async def test_any_amount_of_damage_is_mended(
    config: StoreConfig, tmp_path: Path, long: bool
) -> None:
    """Rows with sizes, numbers and counts that are not possible; quotas, too."""
    async with opened(config) as one:
        folder = one.files.tree.lookup(ROOT, b"folder")
        assert folder is not None
        inner = one.files.tree.lookup(folder, b"inner")
        for ino in (folder, inner):
            assert ino is not None
            one.files.quotas.set(ino, 1 << 30, 1000)
            await one.files.quotas.wait(ino)
    for seed in [*MUCH, *(range(600) if long else ())]:
        for rounds in (2, 21):
            print("seed", seed, "rounds", rounds)
            chance = random.Random(seed)
            target = tmp_path / f"{seed}-{rounds}"
            shutil.copytree(config.store, target)
            hurt = load(target)

            def hurt_much(rows: Rows, chance: random.Random = chance, rounds: int = rounds) -> None:
                for _ in range(rounds):
                    damage(rows, chance)

            edit(hurt, hurt_much)
            assert (await check(hurt, repair=True))["left"] == [], (seed, rounds)
            assert (await check(hurt))["findings"] == [], (seed, rounds)
            async with opened(hurt) as one:
                await read_all(one)
            assert (await check(hurt))["findings"] == [], (seed, rounds)
            shutil.rmtree(target)


# --- what agrees and cannot be read ---------------------------------------------------------


@pytest.mark.parametrize("how", ["segments", "owed", "cut", "away"])
@pytest.mark.expects_log(UNREAD_FILE, LOST_STRIPE)
async def test_files_that_cannot_be_read_are_not_clean(config: StoreConfig, how: str) -> None:
    """All tables agree, and too few shards are on the nodes: whatever became of them."""
    assert (await check(config))["clean"] is True
    for node in config.nodes[:2]:
        if how == "away":
            node.path.rename(node.path.with_name(f"away-{node.name}"))
            continue
        for segment in (node.path / "shards").iterdir():
            if how == "cut":
                os.truncate(segment, 64)
            else:
                segment.unlink()
    if how == "owed":  # a mount notes what is gone, and has nothing to rebuild it from
        async with opened(config) as one:
            for _ in range(3):
                one.store.comeback.wake()
                await trio.testing.wait_all_tasks_blocked(0.02)
    async with open_store(config, read_only=True) as store, trio.open_nursery() as nursery:
        done = await fsck(store, repair=False, at_rest=True)
        assert done["clean"] is False
        assert "too few shards to be read" in done["unreadable"][0]
        FileSystem(store, nursery)
        safety = Safety(store.log, store.reader)
        assert how == "cut" or (await safety.risk([]))["lost"] != []


@pytest.mark.parametrize("how", ["wiped", "segments"])
@pytest.mark.expects_log(GONE, CLAIMED, UNREAD_FILE)
async def test_what_a_rebuild_has_not_reached_is_no_finding(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A check before, during and after each step of a repair advises nothing else."""
    node = config.nodes[1]
    if how == "wiped":
        shutil.rmtree(node.path)
    else:
        node.path.rename(node.path.with_name("away"))
        async with opened(config) as one:
            await one.put("meanwhile", bytes(100_000))
        for segment in (node.path.with_name("away") / "shards").iterdir():
            segment.unlink()
        node.path.with_name("away").rename(node.path)
    rebuild, checked = Rebuilder.rebuild, list[Any]()
    async with opened(config) as one:

        async def watched(*arguments: Any) -> tuple[int, int]:
            found = await rebuild(*arguments)
            checked.append(await fsck(one.store, repair=False, at_rest=False))
            return found

        monkeypatch.setattr(Rebuilder, "rebuild", watched)
        await one.store.repairer.repair(node.name, lambda message: None)
        checked.append(await fsck(one.store, repair=False, at_rest=False))
    assert len(checked) > 1
    assert [done["findings"] for done in checked] == [[]] * len(checked)
    assert all(done["clean"] for done in checked)
