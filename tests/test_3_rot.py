"""Rot in the metadata database: no wrong byte, no wrong mode, nothing whole is thrown away.

The fault model: bits of the database's file flip while it is not open; rows are gone, are old
versions of themselves, or lie under another key.  The nodes are whole.  A failure prints its
seed; the same seed flips the same bits of the same store only where that has the same bytes,
so the damaged file is kept, too.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
import trio

from fusestore.commit import row_check, row_keeper
from fusestore.commit.row_check import examine
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import BadRowError, DamagedMetadataError, FusestoreError, ReplayError
from fusestore.files.filesystem import FileSystem
from fusestore.format import store_rows, stripe_rows
from fusestore.format.file_rows import ROOT
from fusestore.format.row_sums import seal, unseal
from fusestore.format.stripe_rows import Stripe
from fusestore.metadata.environment import DATABASE, ROWS
from fusestore.rescue.fsck import fsck
from fusestore.rescue.recover import recover
from fusestore.store.opening import open_store
from fusestore.watch.health import status_of
from support.filled_store import shard_bytes
from support.logs import GONE as NODE_GONE
from support.logs import MENDED, NO_STRIPE, NOT_IN_TABLES, NOT_MENDED, SEGMENT_KEPT
from support.opened_store import Opened, limited, make, opened, repair, scrub
from support.processes import in_child

Rows = dict[bytes, bytes]
FILES = {f"f{i}": random.Random(i).randbytes(100_000 + i) for i in range(12)}
MODE = stat.S_IFREG | 0o644


async def fill(config: StoreConfig) -> None:
    """Files, an older version of each of their rows, attributes, a link and a directory."""
    async with opened(config) as one:
        for name, data in FILES.items():
            await one.put(name, b"old" + data[:5000])
            await one.checkpoint()
            ino = await one.put(name, data)
            one.files.attributes.set(ino, b"user.note", b"note of " + name.encode())
        tree = one.files.tree
        tree.make(ROOT, b"dir", stat.S_IFDIR | 0o755, 1, 2)
        tree.make(ROOT, b"link", stat.S_IFLNK | 0o777, 0, 0, target=b"f1")
        await one.checkpoint()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, unmounted; to be copied."""
    config = make(tmp_path_factory.mktemp("rot") / "store")
    trio.run(fill, config)
    return config.store


@pytest.fixture
def config(whole: Path, tmp_path: Path) -> StoreConfig:
    shutil.copytree(whole, tmp_path / "store")
    return load(tmp_path / "store")


def change_stored(config: StoreConfig, change: Callable[[Rows], None]) -> None:
    """Change what the database has of its rows, checksums included; their sums stay."""
    env = lmdb.open(os.fspath(config.metadata), max_dbs=1, map_size=1 << 30)
    rows = env.open_db(ROWS, create=False)
    with env.begin(write=True, db=rows) as txn:
        before: Rows = dict(txn.cursor())
        after = dict(before)
        change(after)
        for key in before.keys() - after.keys():
            txn.delete(key)
        for key, value in after.items():
            if before.get(key) != value:
                txn.put(key, value)
    env.close()


def is_right(one: Opened, name: str) -> bool:
    """Whether what a file's rows say of it is right."""
    ino = one.files.tree.lookup(ROOT, name.encode())
    assert ino is not None
    inode = one.files.tree.inode(ino)
    note = one.files.attributes.get(ino, b"user.note")
    return (inode.mode, inode.size, inode.uid, note) == (
        MODE,
        len(FILES[name]),
        0,
        b"note of " + name.encode(),
    )


async def all_right(one: Opened) -> None:
    for name, data in FILES.items():
        assert is_right(one, name), name
        assert await one.get(name) == data, name
    link = one.files.tree.lookup(ROOT, b"link")
    assert link is not None
    assert one.files.tree.target(link) == b"f1"
    assert len(list(one.files.tree.entries(ROOT, 0))) == len(FILES) + 2


# --- what is wrong ---------------------------------------------------------------


def keys_of(rows: Rows, letter: bytes) -> list[bytes]:
    return sorted(key for key in rows if key.startswith(letter))


def flip(letter: bytes, which: int, at: int, bit: int) -> Callable[[Rows], None]:
    """A bit of a row's value flips."""

    def change(rows: Rows) -> None:
        key = keys_of(rows, letter)[which]
        value = bytearray(rows[key])
        value[at] ^= 1 << bit
        rows[key] = bytes(value)

    change.__name__ = f"flip-{letter.decode()}-{which}-{at}-{bit}"
    return change


def lose(letter: bytes, which: int = 0, every: int = 1 << 30) -> Callable[[Rows], None]:
    """Rows are gone."""

    def change(rows: Rows) -> None:
        for key in keys_of(rows, letter)[which::every]:
            del rows[key]

    change.__name__ = f"lose-{letter.decode()}-{which}"
    return change


def misplace(letter: bytes, which: int = 0) -> Callable[[Rows], None]:
    """A bit of a row's key flips."""

    def change(rows: Rows) -> None:
        key = bytearray(keys_of(rows, letter)[which])
        value = rows.pop(bytes(key))
        key[-1] ^= 0x40
        rows[bytes(key)] = value

    change.__name__ = f"misplace-{letter.decode()}-{which}"
    return change


def old(letter: bytes, at: int) -> Callable[[Rows], None]:
    """Rows are older versions of themselves, with a right checksum."""

    def change(rows: Rows) -> None:
        for key in keys_of(rows, letter)[1::2]:
            value = unseal(key, rows[key])
            assert value is not None
            earlier = value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
            rows[key] = seal(key, earlier)

    change.__name__ = f"old-{letter.decode()}"
    return change


def swap(letter: bytes) -> Callable[[Rows], None]:
    """Two rows have each other's place."""

    def change(rows: Rows) -> None:
        one, two = keys_of(rows, letter)[1:3]
        rows[one], rows[two] = rows[two], rows[one]

    change.__name__ = f"swap-{letter.decode()}"
    return change


def bad_checksum(rows: Rows) -> None:
    """The checksum itself rots."""
    key = keys_of(rows, b"I")[3]
    rows[key] = rows[key][:-1] + bytes([rows[key][-1] ^ 1])


def short(rows: Rows) -> None:
    """Hardly anything is left of a row."""
    rows[keys_of(rows, b"E")[1]] = b"abc"


ROTTEN: list[Callable[[Rows], None]] = [
    flip(b"E", 1, 12, 6),  # a stripe offset
    flip(b"E", 2, 0, 4),  # a length
    flip(b"I", 3, 1, 3),  # set-user-id
    flip(b"I", 4, 17, 4),  # a size
    flip(b"I", 5, 4, 0),  # an owner
    flip(b"N", 6, 7, 0),  # an inode number
    flip(b"L", 6, 7, 0),
    flip(b"X", 2, 0, 0),
    flip(b"Q", 0, 0, 0),
    flip(b"S", 0, 60, 0),  # a block's checksum
    flip(b"S", 0, 13, 0),  # a place
    flip(b"V", 0, 5, 0),
    flip(b"G", 0, 9, 0),
    flip(b"Zcounters", 0, 0, 0),
    flip(b"Zformat", 0, 12, 1),
    flip(b"Znodes", 0, 30, 1),
    misplace(b"E"),
    misplace(b"I", 3),
    misplace(b"N", 4),
    swap(b"I"),
    swap(b"E"),
    bad_checksum,
    short,
]
GONE: list[Callable[[Rows], None]] = [
    lose(b"E", 2),
    lose(b"E", 0, 2),
    lose(b"S"),
    lose(b"N", 3),
    lose(b"I", 4),
    lose(b"X", 1),
    lose(b"V"),
    lose(b"O"),
    lose(b"G"),
    old(b"E", 12),
    old(b"I", 1),
    old(b"N", 7),
    old(b"V", 7),
]


def named(change: Callable[[Rows], None]) -> str:
    return change.__name__


# --- tests -------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("change", ROTTEN + GONE, ids=named)
@pytest.mark.expects_log(MENDED)
async def test_a_mount_puts_it_right(
    config: StoreConfig,
    change: Callable[[Rows], None],
    read_only: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change_stored(config, change)
    async with (
        open_store(config, read_only=read_only, background=False) as store,
        trio.open_nursery() as nursery,
    ):
        one = Opened(store, FileSystem(store, nursery))
        assert store.log.mended
        assert store.log.rows_mended == len(store.log.mended)
        await all_right(one)
    assert "It is mended" in caplog.text
    async with opened(config) as one:
        assert bool(one.store.log.mended) is read_only
        await all_right(one)
        assert (await scrub(one))["found"] == 0
        assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == list(
            one.store.log.mended
        )


@pytest.mark.parametrize("change", ROTTEN[:13] + ROTTEN[19:], ids=named)
@pytest.mark.expects_log(
    MENDED, r"store\.store: Row \w+ of \w+ in the metadata does not match its checksum"
)
async def test_a_large_store_reads_nothing_wrong_and_mends_itself(
    config: StoreConfig, change: Callable[[Rows], None]
) -> None:
    """The mount has too many rows to examine: who meets a bad one gets an error, once."""
    config = limited(config, rows_examined_at_mount_max=0, probe_seconds=0.05)
    change_stored(config, change)
    async with opened(config) as one:
        errors = 0
        for _ in range(3):
            for name, data in FILES.items():
                try:
                    ino = one.files.tree.lookup(ROOT, name.encode())
                    assert ino is not None
                    assert await one.get(name) == data
                    assert is_right(one, name)
                except BadRowError:
                    errors += 1
                    one.store.log.on_damage()
            await trio.sleep(0.5)
        found = (await scrub(one))["found"]
        assert errors + found + len(one.store.log.mended) > 0
        await all_right(one)
        assert one.store.log.rows_mended > 0
        assert (await scrub(one))["found"] == 0
    async with opened(load(config.store)) as one:
        assert one.store.log.mended == ()
        await all_right(one)


def rot_in_use(config: StoreConfig, key: bytes) -> None:
    """Flip a bit of the value of a row, in the file of a database that is open."""
    file = config.metadata / DATABASE
    data = file.read_bytes()
    with file.open("r+b") as opened:
        at = data.find(key)
        while at >= 0:
            opened.seek(at + len(key))
            opened.write(bytes([data[at + len(key)] ^ 4]))
            at = data.find(key, at + 1)


@pytest.mark.parametrize(
    "key", [store_rows.CODES_KEY, store_rows.FORMAT_KEY, store_rows.REPAIRS_KEY, b"M"]
)
@pytest.mark.expects_log(MENDED, NODE_GONE)
async def test_status_answers_over_any_row(config: StoreConfig, key: bytes) -> None:
    if key in (store_rows.REPAIRS_KEY, b"M"):
        shutil.rmtree(config.nodes[0].path)
        async with opened(config) as one:
            if key == b"M":
                await one.put("f0", FILES["f0"])
                await one.checkpoint()
                key = one.rows(b"M")[0][0]
            else:
                await repair(one, config.nodes[0].name)
    config = limited(config, probe_seconds=0.5)
    async with opened(config) as one:
        await one.checkpoint()
        rot_in_use(config, key)
        status = status_of(await one.store.status())
        assert not status.healthy
        assert "does not match its checksum" in status.summary
        with trio.fail_after(20):
            while "checksum" in status.summary:
                await trio.sleep(0.05)
                status = status_of(await one.store.status())
        assert one.store.log.rows_mended > 0
        assert status.healthy is not key.startswith(b"M")
        await all_right(one)


@pytest.mark.parametrize("change", GONE, ids=named)
@pytest.mark.expects_log(MENDED)
async def test_a_scrub_finds_rows_that_are_gone_or_old(
    config: StoreConfig, change: Callable[[Rows], None]
) -> None:
    config = limited(config, rows_examined_at_mount_max=0)
    change_stored(config, change)
    async with open_store(config, background=False) as store, trio.open_nursery() as nursery:
        one = Opened(store, FileSystem(store, nursery))
        assert await store.rows.mend() or store.log.mended
        await all_right(one)
        assert await store.rows.mend() == []
    async with opened(load(config.store)) as one:
        assert one.store.log.mended == ()
        await all_right(one)
        assert (await fsck(one.store, repair=False, at_rest=False))["findings"] == []


@pytest.mark.parametrize("change", [*ROTTEN[:3], *GONE[:3]], ids=named)
@pytest.mark.expects_log(MENDED)
async def test_fsck_has_it_as_a_finding(
    config: StoreConfig, change: Callable[[Rows], None]
) -> None:
    config = limited(config, rows_examined_at_mount_max=0)
    change_stored(config, change)
    async with open_store(config, background=False) as store:
        found = await fsck(store, repair=False, at_rest=True)
        assert any("the journals have the right version" in text for text in found["findings"])
        assert found["left"] or store.log.mended
        mended = await fsck(store, repair=True, at_rest=True)
        assert mended["left"] == []
    async with opened(config) as one:
        await all_right(one)


@pytest.mark.parametrize("change", [*ROTTEN[:8], *GONE], ids=named)
@pytest.mark.expects_log(
    MENDED, NOT_MENDED, r"The metadata cannot be mended", NOT_IN_TABLES, SEGMENT_KEPT
)
async def test_without_journals_nothing_is_guessed(
    config: StoreConfig, change: Callable[[Rows], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be told is an error, is in no dump, and is left as it is."""
    config = limited(config, rows_examined_at_mount_max=0)

    def unknown(*_: object) -> None:
        raise ReplayError("The available journals do not lead to commit 7.")

    change_stored(config, change)
    monkeypatch.setattr(row_keeper, "wrong_rows", unknown)
    monkeypatch.setattr(row_check, "wrong_rows", unknown)
    async with opened(config) as one:
        segment = one.store.dumper.first_segment
        journals = journal_files(config)
        with pytest.raises(DamagedMetadataError):
            await one.store.dumper.take()
        assert one.store.dumper.first_segment == segment
        assert journal_files(config).items() >= journals.items()
        await one.checkpoint()
        found = await fsck(one.store, repair=False, at_rest=False)
        assert any("bring all nodes back" in text for text in found["left"])
        assert (await scrub(one))["unread"] == 1
        assert one.store.log.rows_in_doubt > 0
    async with open_store(config, background=False) as store:
        mended = await fsck(store, repair=True, at_rest=True)
        assert any("bring all nodes back" in text for text in mended["left"])
    monkeypatch.undo()
    async with opened(load(config.store)) as one:
        assert one.store.log.mended
        await all_right(one)


@pytest.mark.parametrize("change", [*ROTTEN[:3], *GONE[:3]], ids=named)
@pytest.mark.expects_log(MENDED, NOT_MENDED, r"The metadata cannot be mended", NOT_IN_TABLES)
async def test_without_room_to_compare_nothing_is_called_safe_or_lost(
    config: StoreConfig, change: Callable[[Rows], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is a sound store called damaged; with room again, all is mended."""
    monkeypatch.setattr(row_check, "_free", lambda directory: 1 << 20)
    async with open_store(config, background=False) as store:
        found = await fsck(store, repair=False, at_rest=True)
        (left,) = found["left"]
        assert "for want of room" in left
        assert "recover" not in left
        assert "opened" not in left
    change_stored(config, change)
    async with opened(config) as one:
        done = await scrub(one)
        assert (done["found"], done["unread"]) == (0, 1)
        status = status_of(await one.store.status())
        assert not status.healthy
        assert "rows of the metadata are damaged" in status.summary
        monkeypatch.undo()
        done = await scrub(one)
        assert (done["found"] > 0, done["unread"]) == (True, 0)
        await all_right(one)
        assert "rows of the metadata" not in status_of(await one.store.status()).summary


@pytest.mark.parametrize("change", GONE, ids=named)
@pytest.mark.expects_log(MENDED)
async def test_a_large_store_notices_at_the_mount_that_rows_are_gone(
    config: StoreConfig, change: Callable[[Rows], None]
) -> None:
    before: list[int] = []
    change_stored(config, lambda rows: before.append(len(rows)))
    change_stored(config, change)
    after: list[int] = []
    change_stored(config, lambda rows: after.append(len(rows)))
    config = limited(config, rows_examined_at_mount_max=0)
    async with opened(config) as one:
        assert bool(one.store.log.mended) is (after != before)
        if after != before:
            await all_right(one)


@pytest.mark.parametrize("letters", [b"G", b"SG", b"SVOG", b"SVOGE"])
@pytest.mark.parametrize("most", [0, 250_000])
@pytest.mark.expects_log(
    MENDED, NOT_MENDED, NOT_IN_TABLES, r"The metadata cannot be mended", NO_STRIPE
)
async def test_nothing_is_freed_while_rows_are_gone_that_no_journal_has(
    config: StoreConfig, letters: bytes, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash left nothing; the segments look as if it had, but for the counts of rows."""

    def unknown(*_: object) -> None:
        raise ReplayError("The available journals do not lead to commit 7.")

    def lose(rows: Rows) -> None:
        for key in [key for key in rows if key[0] in letters or key == store_rows.SWEPT_KEY]:
            del rows[key]

    before = shard_bytes(config)
    config = limited(config, rows_examined_at_mount_max=most)
    change_stored(config, lose)
    monkeypatch.setattr(row_check, "wrong_rows", unknown)
    for _ in range(2):
        async with opened(config) as one:
            await one.checkpoint()
            assert one.store.log.rows_in_doubt > 0
            assert one.store.log.doubt
    assert shard_bytes(config).items() >= before.items()
    monkeypatch.undo()
    async with opened(config) as one:
        await all_right(one)


def journal_files(config: StoreConfig) -> dict[str, int]:
    """The journal segments that there are."""
    return {
        f"{node.name}/{path.name}": path.stat().st_ino
        for node in config.nodes
        for path in (node.path / "journal").iterdir()
    }


async def test_the_sums_are_those_of_the_rows(config: StoreConfig) -> None:
    chance = random.Random(3)
    async with opened(config) as one:
        for step in range(60):
            name = f"n{chance.randrange(10)}"
            if chance.random() < 0.3 and one.files.tree.lookup(ROOT, name.encode()):
                one.delete(name)
            else:
                await one.put(name, chance.randbytes(chance.randrange(30_000)))
            if step % 7 == 0:
                await one.checkpoint()
                with one.store.log.engine.view() as view:
                    assert examine(view).is_right
    async with opened(config) as one:
        assert one.store.log.mended == ()


async def test_a_database_of_an_early_version_is_converted(config: StoreConfig) -> None:
    """That had its rows in the unnamed database, without checksums."""
    env = lmdb.open(os.fspath(config.metadata), max_dbs=1, map_size=1 << 30)
    with env.begin(db=env.open_db(ROWS)) as txn:
        rows = {key: unseal(key, stored) for key, stored in txn.cursor()}
    env.close()
    shutil.rmtree(config.metadata)
    config.metadata.mkdir()
    env = lmdb.open(os.fspath(config.metadata), map_size=1 << 30)
    with env.begin(write=True) as txn:
        for key, value in rows.items():
            assert value is not None
            txn.put(key, value)
    env.close()
    with pytest.raises(FusestoreError, match="mount it read-write once"):
        async with open_store(config, read_only=True):
            pass
    for _ in range(2):
        async with opened(config) as one:
            assert one.store.log.mended == ()
            await all_right(one)


# --- random flips -------------------------------------------------------------------


async def _look(config: StoreConfig, read_only: bool) -> str:
    """Read all there is, scrub and check it; what was wrong without an error raises."""
    try:
        async with (
            open_store(config, read_only=read_only, background=False) as store,
            trio.open_nursery() as nursery,
        ):
            one = Opened(store, FileSystem(store, nursery))
            for name, data in FILES.items():
                try:
                    ino = one.files.tree.lookup(ROOT, name.encode())
                    assert ino is not None, f"{name} is gone"
                    assert await one.get(name) == data, f"{name} has wrong bytes"
                    assert is_right(one, name), f"{name} has wrong attributes"
                except FusestoreError:
                    pass  # not at all is fine, too
            if not read_only:
                await store.rows.mend()
                await fsck(store, repair=True, at_rest=True)
                await all_right(one)
    except FusestoreError as error:
        return f"refused: {error}"
    except BaseExceptionGroup as group:
        refused, rest = group.split(FusestoreError)
        if rest is not None:
            raise
        return f"refused: {refused!r}"
    return "right"


@pytest.mark.parametrize("first", range(0, 48, 12))
def test_bits_flip(
    whole: Path, tmp_path: Path, first: int, request: pytest.FixtureRequest, long: bool
) -> None:
    """Whatever flips, a mount reads right or not at all, and recover gives everything back."""
    base = request.config.getoption("--model-seed") * 1000 + first
    logging.disable(logging.CRITICAL)
    try:
        for seed in range(base, base + (120 if long else 12)):
            place = tmp_path / f"s{seed}"
            shutil.copytree(whole, place)
            config = load(place)
            damage(config.metadata / "data.mdb", random.Random(seed))
            shards = shard_files(config)
            for read_only in (True, False):
                how = in_child(lambda config=config, ro=read_only: trio.run(_look, config, ro))
                print(f"seed {seed}, read_only={read_only}: {how}")
            after = shard_files(config)
            assert {n: after.get(n) for n in shards} == shards, f"seed {seed}: shards are gone"
            shutil.rmtree(config.metadata)
            recover(config.store, [], None, accept_loss=False, progress=lambda message: None)
            assert in_child(lambda config=config: trio.run(_look, config, False)) == "right", seed
            shutil.rmtree(place)
    finally:
        logging.disable(logging.NOTSET)


def damage(path: Path, chance: random.Random) -> None:
    """Flip from one bit to many, or write over a sector, or cut the file off."""
    data = bytearray(path.read_bytes())
    kind = chance.randrange(10)
    if kind < 6:
        for _ in range(chance.choice([1, 1, 1, 5, 50])):
            bit = chance.randrange(len(data) * 8)
            data[bit // 8] ^= 1 << bit % 8
    elif kind < 9:
        at = chance.randrange(len(data) // 512) * 512
        data[at : at + 512] = chance.choice([bytes(512), chance.randbytes(512)])
    else:
        del data[chance.randrange(len(data) // 4096) * 4096 :]
    path.write_bytes(data)


def shard_files(config: StoreConfig) -> dict[str, int]:
    """The shard segments that there are, and their sizes."""
    return {
        f"{node.name}/{path.name}": path.stat().st_size
        for node in config.nodes
        for path in (node.path / "shards").iterdir()
    }


@pytest.mark.expects_log(MENDED)
async def test_what_recover_wrote_with_losses_is_not_undone(config: StoreConfig) -> None:
    """It is in the database alone until a mount logs it: what nodes lack, and their state."""
    async with opened(config) as one:
        ((key, value), *_) = one.rows(b"S")
        place = Stripe.decode(value).shards[0]
        number = stripe_rows.decode_stripe_key(key)
        nodes = one.store.log.engine.get(store_rows.NODES_KEY)
    owed = stripe_rows.missing_key(place.node, number, 0)
    assert nodes is not None
    rows = store_rows.decode_nodes(nodes)
    lacking = [replace(row, holds=store_rows.NEVER_WHOLE) for row in rows]

    def settle(rows: Rows) -> None:
        """As recover does, and rot besides."""
        for key, value in ((owed, b""), (store_rows.NODES_KEY, store_rows.encode_nodes(lacking))):
            rows[key] = seal(key, value)
        flip(b"I", 3, 1, 3)(rows)

    change_stored(config, settle)
    async with (
        open_store(config, read_only=True, background=False) as store,
        trio.open_nursery() as nursery,
    ):
        assert len(store.log.mended) == 1
        assert store.log.engine.get(owed) == b""
        found = store.log.engine.get(store_rows.NODES_KEY)
        assert found == store_rows.encode_nodes(lacking)
        await all_right(Opened(store, FileSystem(store, nursery)))
