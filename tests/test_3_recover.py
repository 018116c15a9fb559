"""Recovery: the metadata made anew from the nodes, to the last commit that counts.

The campaign makes random trees in random histories (mounts, crashes, metadata dumps, nodes
that were away), takes the metadata away, hurts at most one region more, and recovers.
What is found must be what was committed last: every name, attribute, hole and byte.
`--model-seed N` and the number of the history in its name repeat one.

The tests after it ask what recovery refuses, what it does when losses are accepted, and
that it touches nothing but the metadata's own empty directory.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from fusestore.commit.metadata_dump import MetadataDumper
from fusestore.config.node_identity import IDENTITY_NAME
from fusestore.config.store_config import StoreConfig, load
from fusestore.errors import (
    FileSystemError,
    FusestoreError,
    MetadataError,
    NodeError,
    ReplayError,
    UsageError,
)
from fusestore.files.filesystem import FileSystem
from fusestore.files.tree import Change
from fusestore.format import acl
from fusestore.format.erasure import Code
from fusestore.format.records import Header, Kind, SegmentKind
from fusestore.limits import STRIPE_BYTES, Limits
from fusestore.metadata.engine import Engine
from fusestore.nodes.directory import DirectoryNode
from fusestore.rescue.recover import recover
from fusestore.serve.control_server import lock_store
from fusestore.serve.messages.safety import FsckRequest
from fusestore.serve.offline import offline
from fusestore.store.opening import open_store
from support.logs import (
    CORRUPT,
    DROPPED,
    FOREIGN_FILES,
    GONE,
    LOST_STRIPE,
    RECOGNIZED,
    UNREAD_FILE,
)
from support.opened_store import (
    HEALTHY_SECONDS_MAX,
    REGIONS,
    Opened,
    healthy,
    limited,
    make,
    opened,
    repair,
)
from support.recovery import (
    command,
    copy_tree,
    dump_metadata,
    fingerprint,
    forget,
    has_metadata,
    instead,
    journal_records,
    recovered,
)
from support.whole_tree import (
    Files,
    State,
    look,
    made,
    one_of,
    put,
    read,
    read_files,
    tree_of,
    walk,
    write,
)

FILE_BYTES_MAX = 3 * STRIPE_BYTES
SHORT, LONG = 25, 300


# --- a random history -------------------------------------------------------------

NAMES = [b"n%d" % i for i in range(10)] + [b"\xff\x80not utf-8", b"long" * 63 + b"xyz"]
CODES = ("2+1", "4+2", "1+2")
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, perm, who)
    for tag, perm, who in (
        (1, 7, 0xFFFFFFFF),
        (2, 5, 1234),
        (4, 5, 0xFFFFFFFF),
        (16, 5, 0xFFFFFFFF),
        (32, 0, 0xFFFFFFFF),
    )
)


class World:
    """Random changes of a tree, and the states that may be found after a crash."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.contents: dict[int, bytes] = {}
        """By inode: what its bytes should be."""
        self.possible: list[State] = []
        """States since the last acknowledged commit, with that one's."""
        self.log: list[str] = []

    def note(self, one: Opened) -> None:
        """This is a state that a commit may hold."""
        names = tree_of(one)
        files = {ino for ino, inode, *_ in names.values() if stat.S_ISREG(inode.mode)}
        self.possible.append(State(names, {ino: self.contents[ino] for ino in files}))

    async def acknowledged(self, one: Opened) -> None:
        """Commit; nothing older may be found from now on."""
        await one.store.committer.commit()
        self.note(one)
        del self.possible[:-1]

    async def adopt(self, one: Opened) -> None:
        """Go on from what a mount found."""
        state = one_of(await look(one), self.possible)
        self.contents = {ino: data for ino, data in state.contents.items() if data is not None}
        self.possible = [state]

    async def begin(self, one: Opened) -> None:
        """Some files, so that there is something to change."""
        for name in NAMES[:6]:
            self.make(one, stat.S_IFREG, name)
            await self.write(one)
        await self.acknowledged(one)

    async def step(self, one: Opened) -> None:
        """Something happens to the tree."""
        kinds: list[Callable[[Opened], Any]] = [self.make, self.link, self.rename, self.remove]
        kinds += [self.change, self.attribute, self.set_code, self.truncate]
        kinds += [self.make, self.write, self.write, self.write]
        kind = self.chance.choice(kinds)
        try:
            waiting = kind(one)
            if waiting is not None:
                await waiting
        except FileSystemError as error:
            self.log.append(f"{kind.__name__}: {error}")
        else:
            self.log.append(kind.__name__)
        self.note(one)

    # --- the changes

    def folder(self, one: Opened) -> int:
        found = [i for i in walk(one).values() if stat.S_ISDIR(one.files.tree.inode(i).mode)]
        return self.chance.choice(found)

    def entry(self, one: Opened) -> tuple[int, bytes, int]:
        """(directory, name, inode) of anything but the root."""
        path, ino = self.chance.choice(list(walk(one).items())[1:])
        above, _, name = path.rpartition(b"/")
        return walk(one)[above], name, ino

    def file(self, one: Opened) -> int:
        """Some regular file; FileSystemError when there is none."""
        tree = one.files.tree
        files = [ino for ino in walk(one).values() if stat.S_ISREG(tree.inode(ino).mode)]
        if not files:
            raise FileSystemError("There is no file.")
        return self.chance.choice(files)

    def make(self, one: Opened, kind: int = 0, name: bytes = b"") -> None:
        kinds = [stat.S_IFREG] * 5 + [stat.S_IFDIR] * 2 + [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR]
        kind = kind or self.chance.choice(kinds)
        target = None
        if kind == stat.S_IFLNK:
            target = self.chance.randbytes(self.chance.choice((1, 40, 4095))).replace(b"\0", b"x")
        ino, _ = one.files.tree.make(
            self.folder(one),
            name or self.chance.choice(NAMES),
            kind | self.chance.randrange(0o1000),
            self.chance.randrange(1 << 32),
            self.chance.randrange(1 << 32),
            rdev=0x1234 if kind == stat.S_IFCHR else 0,
            target=target,
        )
        if kind == stat.S_IFREG:
            self.contents[ino] = b""

    def link(self, one: Opened) -> None:
        one.files.tree.link(self.file(one), self.folder(one), self.chance.choice(NAMES))

    def rename(self, one: Opened) -> None:
        if len(walk(one)) < 2:
            return
        parent, name, _ = self.entry(one)
        if self.chance.random() < 0.2:
            other, taken, _ = self.entry(one)
            one.files.tree.exchange(parent, name, other, taken)
            return
        new = self.chance.choice(NAMES)
        lost = one.files.tree.rename(parent, name, self.folder(one), new)
        if lost is not None and lost[1].nlink == 0:
            one.files.removal.remove(lost[0])

    def remove(self, one: Opened) -> None:
        if len(walk(one)) < 2:
            return
        parent, name, ino = self.entry(one)
        directory = stat.S_ISDIR(one.files.tree.inode(ino).mode)
        drop = one.files.tree.rmdir if directory else one.files.tree.unlink
        _, inode = drop(parent, name)
        if inode.nlink == 0 and self.chance.random() < 0.8:  # else somebody still has it open
            one.files.removal.remove(ino)

    def change(self, one: Opened) -> None:
        number = self.chance.randrange
        ino = self.chance.choice(list(walk(one).values()))
        change = Change(
            mode=number(0o10000),
            uid=number(1 << 32),
            atime=number(-(1 << 62), 1 << 62),
            mtime=number(-(1 << 62), 1 << 62),
        )
        one.files.tree.change(ino, change)

    def attribute(self, one: Opened) -> None:
        ino = self.chance.choice(list(walk(one).values()))
        attributes = one.files.attributes
        known = attributes.names(ino)
        if known and self.chance.random() < 0.4:
            attributes.remove(ino, self.chance.choice(known))
        elif self.chance.random() < 0.2:
            if not stat.S_ISLNK(one.files.tree.inode(ino).mode):
                attributes.set(ino, self.chance.choice((acl.ACCESS, acl.DEFAULT)), ACL)
        else:
            name = self.chance.choice((b"user.a", b"user.b", b"trusted.\xff"))
            size = self.chance.choice((0, 10, 3000, 60_000))
            attributes.set(ino, name, self.chance.randbytes(size))

    def set_code(self, one: Opened) -> None:
        if self.chance.random() < 0.3:
            code = self.chance.choice((*CODES, None))
            one.files.tree.codes.set(self.folder(one), Code.parse(code) if code else None)

    async def write(self, one: Opened) -> None:
        ino = self.file(one)
        sizes = (1, 100, 5000, 40_000, 40_000, 300_000, STRIPE_BYTES, 2 * STRIPE_BYTES + 5)
        size = self.chance.choice(sizes)
        size = size if size == STRIPE_BYTES else self.chance.randint(1, size)
        places = (0, len(self.contents[ino]), self.chance.randrange(FILE_BYTES_MAX))
        offset = min(self.chance.choice(places), FILE_BYTES_MAX - size)
        data = self.chance.randbytes(size)
        for start in range(0, size, STRIPE_BYTES):
            part = data[start : start + STRIPE_BYTES]
            await one.files.contents.write(ino, offset + start, part)
            self._put(ino, offset + start, part)
            self.note(one)

    def _put(self, ino: int, offset: int, data: bytes) -> None:
        before = self.contents[ino]
        gap = bytes(max(0, offset - len(before)))
        self.contents[ino] = before[:offset] + gap + data + before[offset + len(data) :]

    async def truncate(self, one: Opened) -> None:
        ino = self.file(one)
        before = self.contents[ino]
        sizes = (0, len(before), self.chance.randint(0, len(before)), FILE_BYTES_MAX)
        size = self.chance.choice(sizes)
        await one.files.contents.truncate(ino, size)
        self.contents[ino] = before[:size] + bytes(max(0, size - len(before)))


# --- what happens to a store ----------------------------------------------------------


async def check_counters(one: Opened) -> None:
    """The counters are right, once what was begun before a crash is ended."""
    with trio.fail_after(HEALTHY_SECONDS_MAX):
        while one.rows(b"D"):  # noqa: ASYNC110
            await trio.sleep(0.01)
    one.check_counters()


async def checkpoint(one: Opened) -> None:
    async with one.store.committer.lock:
        await one.store.committer.commit_now(checkpoint=True)


async def at_rest(config: StoreConfig) -> None:
    """Wait for threads that a mount left to themselves when it ended: they delete segments."""
    before: list[Path] = []
    while before != (now := [path for node in config.nodes for path in node.path.rglob("*")]):
        before = now
        await trio.sleep(0.005)


def refuses_what_is_there(config: StoreConfig) -> None:
    """Metadata that is there is not touched."""
    before = fingerprint(config.metadata)
    with pytest.raises(UsageError, match="is not empty"):
        recovered(config)
    assert fingerprint(config.metadata) == before


def small_limits(chance: random.Random, *, forced: bool) -> Limits:
    """Let segments roll, and metadata dumps be made in small pieces; `forced`: only when asked."""
    return Limits(
        journal_segment_bytes=chance.choice((8 << 10, 64 << 10, 1 << 20)),
        checkpoint_changes_max=chance.choice((1, 50, 10_000)),
        dump_journal_bytes_min=1 << 40 if forced else 10_000,
        dump_piece_bytes=chance.choice((500, 4 << 10, 256 << 10)),
        dump_step_keys=chance.choice((1, 7, 200)),
        shard_segment_bytes=chance.choice((100_000, 1 << 20, 64 << 20)),
        trim_batch=chance.choice((1, 256)),
    )


@dataclass
class History:
    """A store, what was done to it, and what it should be."""

    base: Path
    chance: random.Random
    code: str
    config: StoreConfig
    world: World
    kind: str
    """What becomes of the victim at the end."""
    victim: str
    forced: bool
    """The metadata is dumped by order, not by itself."""
    away: str = ""
    """A node that is not there, or there and not healed."""
    kept: bool = False
    """Whether there is an older copy of the victim."""
    moved: list[Path] = field(default_factory=list)

    @property
    def older(self) -> Path:
        return self.base / "older"

    @property
    def outside(self) -> Path:
        return self.base / "outside"

    def place(self, name: str) -> Path:
        return self.config.node(name).path

    def leave(self, name: str) -> None:
        """A node goes away."""
        self.world.log.append(f"{name} leaves")
        self.place(name).rename(self.outside)
        self.away = name

    def come_back(self) -> None:
        """The node that went away is there again, not yet healed."""
        if self.outside.exists():
            self.world.log.append(f"{self.away} is there again")
            self.outside.rename(self.place(self.away))

    def keep(self) -> None:
        """Remember the victim as it is now."""
        if self.kind == "older" and not self.kept and self.place(self.victim).exists():
            self.world.log.append("the victim is copied")
            copy_tree(self.place(self.victim), self.older)
            self.kept = True


async def live(history: History, *, steps: int, crash: bool = False, steady: bool = False) -> None:
    """One mount, perhaps up to a crash; unless it is `steady`, a node may leave."""
    chance, world = history.chance, history.world
    copy = history.base / "crash"
    world.log.append("mount")
    async with opened(history.config) as one:
        if world.possible:
            await world.adopt(one)
        else:
            await world.begin(one)
        if history.away and not history.outside.exists():
            await healthy(one)
            history.away = ""
        leaves_at = -1 if history.away or steady else chance.randrange(3 * steps)
        for number in range(steps):
            await world.step(one)
            if number == leaves_at:
                history.leave(chance.choice((history.victim, *REGIONS)))
            await now_and_then(history, one)
        if crash:
            async with trio.open_nursery() as nursery:
                if history.forced and chance.random() < 0.4:
                    nursery.start_soon(one.store.dumper.take)
                    for _ in range(chance.randrange(12)):
                        await world.step(one)
                        await trio.lowlevel.checkpoint()
                async with one.store.committer.checkpointer._lock:  # the database is at rest
                    copy_tree(history.config.store, copy)
                nursery.cancel_scope.cancel()
        else:
            await world.acknowledged(one)
    await at_rest(history.config)
    if crash:
        world.log.append("crash")
        instead(copy, history.config.store)


async def now_and_then(history: History, one: Opened) -> None:
    """What happens between changes of the tree."""
    draw = history.chance.random()
    if draw < 0.2:
        await history.world.acknowledged(one)
    elif draw < 0.25:
        await checkpoint(one)
    elif draw < 0.3 and history.forced:
        history.world.log.append("metadata dump")
        await one.store.dumper.take()
    elif draw < 0.35:
        history.keep()
    elif draw < 0.4:
        await trio.lowlevel.checkpoint()


async def lived(history: History) -> None:
    """Several mounts; at the end no node but the victim lacks anything."""
    chance = history.chance
    mounts = chance.randint(2, 5)
    for number in range(mounts):
        if not history.away and number and chance.random() < 0.3:
            history.leave(chance.choice((history.victim, *REGIONS)))
        elif chance.random() < 0.6:
            history.come_back()
        crash = chance.random() < 0.35
        await live(history, steps=chance.randint(3, 30), crash=crash)
        if chance.random() < 0.3:
            history.keep()
    history.come_back()
    if history.away and (history.away != history.victim or chance.random() < 0.3):
        await live(history, steps=3, crash=chance.random() < 0.3, steady=True)


# --- what is hurt before the recovery -----------------------------------------------------


def flip_bits(path: Path, chance: random.Random, count: int) -> None:
    """Change some bits of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(count if data else 0):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def rot(node: Path, chance: random.Random) -> None:
    for path in sorted([*(node / "journal").iterdir(), *(node / "shards").iterdir()]):
        if chance.random() < 0.7:
            flip_bits(path, chance, chance.choice((1, 1, 5, 100)))


def cut(node: Path, chance: random.Random) -> None:
    """A journal segment is shorter than it was, or gone."""
    segments = sorted((node / "journal").iterdir())
    if not segments:
        return
    segment = chance.choice(segments)
    if chance.random() < 0.5:
        segment.unlink()
    else:
        os.truncate(segment, chance.randint(0, segment.stat().st_size))


def hurt(history: History) -> None:
    """What becomes of the victim."""
    node = history.place(history.victim)
    if history.kind == "older" and not history.kept:
        history.kind = "whole"
    if history.kind == "deleted":
        shutil.rmtree(node)
    elif history.kind == "wiped":
        shutil.rmtree(node)
        node.mkdir()
    elif history.kind == "anonymous":
        (node / IDENTITY_NAME).unlink()
    elif history.kind == "rotten":
        rot(node, history.chance)
    elif history.kind == "cut":
        cut(node, history.chance)
    elif history.kind == "moved":
        history.moved = [history.base / "elsewhere"]
        node.rename(history.moved[0])
    elif history.kind == "older":
        instead(history.older, node)


KINDS = ("whole", "deleted", "wiped", "anonymous", "rotten", "cut", "moved", "older")
NEVER_REFUSED = ("whole", "moved")


def get_back(history: History, *extra: Path, refusable: bool) -> None:
    """Recover; what may be refused is recovered with losses accepted, and none are expected."""
    try:
        result = recovered(history.config, *extra)
    except ReplayError as error:
        assert not has_metadata(history.config)
        if history.kind == "older" and "--history" in str(error):
            right = next(name for name in REGIONS if name != history.victim)
            result = recovered(history.config, *extra, history=right)
        elif refusable and "--accept-loss" in str(error):
            result = recovered(history.config, *extra, accept_loss=True)
        else:
            raise
    assert result["lost"] == [], result
    assert result["metadata"] == str(history.config.metadata)
    history.config = replace(load(history.config.store), limits=history.config.limits)
    refuses_what_is_there(history.config)


async def second_disaster(history: History, expected: State) -> None:
    """Another region is lost; the victim's has to do for it."""
    other = history.chance.choice([name for name in REGIONS if name != history.victim])
    history.world.log.append(f"{other} is lost")
    shutil.rmtree(history.place(other))
    if history.chance.random() < 0.5:
        forget(history.config)
        get_back(history, refusable=history.code == "1+2")
    async with opened(history.config) as one:
        one_of(await look(one), [expected])
        await check_counters(one)


async def leaks(config: StoreConfig) -> set[str]:
    """What fsck finds of segments; nothing else may be found of a store that is whole.

    A crash may leave a segment's row with more live bytes than it has.
    """
    found = await offline(config, FsckRequest(), lambda message: None)
    segments = [line for line in found.findings if line.startswith("segments: ")]
    assert segments == list(found.findings)
    return {line.partition(" counts ")[0] for line in segments}


async def comes_back(history: History) -> None:
    """Recover the store, and see that it is what it was, and goes on."""
    chance, config = history.chance, history.config
    leaked = await leaks(config)
    hurt(history)
    forget(config)
    if chance.random() < 0.3:
        history.world.log.append("no fusestore.toml")
        (config.store / "fusestore.toml").unlink()
    stale, history.away = history.away == history.victim, ""
    refusable = history.code == "1+2" and (stale or history.kind not in NEVER_REFUSED)
    get_back(history, *history.moved, refusable=refusable)
    at = {node.name: node.path for node in config.nodes}
    for path in history.moved:
        at[history.victim] = path
    nodes = tuple(replace(node, path=at[node.name]) for node in config.nodes)
    assert history.config == replace(config, nodes=nodes)
    for _ in range(2):
        async with opened(history.config) as one:
            await history.world.adopt(one)
            await check_counters(one)
    await live(history, steps=4, steady=True)
    async with opened(history.config) as one:
        done = await repair(one, history.victim, discard_history=history.kind == "older")
        assert done["unrepairable"] == []
        await healthy(one)
    assert await leaks(history.config) <= leaked
    await second_disaster(history, history.world.possible[-1])


def random_history(base: Path, chance: random.Random, number: int) -> History:
    code = chance.choice(("2+1", "2+1", "4+2", "1+2"))
    forced = chance.random() < 0.5
    return History(
        base,
        chance,
        code,
        limited(make(base / "store", code), small_limits(chance, forced=forced)),
        World(chance),
        KINDS[number % len(KINDS)],
        chance.choice(REGIONS),
        forced,
    )


def numbers() -> list[Any]:
    few = [pytest.param(number) for number in range(SHORT)]
    return few + [pytest.param(n, marks=pytest.mark.long) for n in range(SHORT, LONG)]


@pytest.mark.parametrize("number", numbers())
@pytest.mark.expects_log(GONE, CORRUPT, DROPPED, FOREIGN_FILES)
async def test_what_was_committed_is_recovered(
    number: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seed = f"{request.config.getoption('--model-seed')}/{number}"
    chance = random.Random(seed)
    history = random_history(tmp_path, chance, number)
    try:
        await lived(history)
        await comes_back(history)
    except BaseException as error:
        about = f"{history.code}, {history.victim} is {history.kind}, away: {history.away!r}"
        error.add_note(f"seed {seed}: {about}; {'; '.join(history.world.log[-60:])}")
        raise


# --- what is asked in particular ------------------------------------------------------------


async def read_only(config: StoreConfig) -> Files:
    """What a read-only mount shows; it needs no node to write to."""
    async with open_store(config, read_only=True) as store, trio.open_nursery() as nursery:
        return await read_files(Opened(store, FileSystem(store, nursery)))


def spoil(path: Path, offset: int) -> None:
    """Change a byte of the payload of a record."""
    with path.open("r+b") as file:
        file.seek(offset + 64)
        byte = file.read(1)[0]
        file.seek(offset + 64)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    return make(tmp_path / "store")


async def refused_mount(config: StoreConfig) -> None:
    """A mount does not start an empty store on top of a full one."""
    with pytest.raises(MetadataError, match="fusestore recover"):
        async with opened(config):
            pytest.fail("mounted")


@pytest.mark.parametrize("code", ["1+2", "2+1"])
async def test_the_store_s_own_row_is_recovered(tmp_path: Path, code: str) -> None:
    config = make(tmp_path / "store", code)
    files = made("own row", "a", "b")
    await write(config, files)
    await write(config, files)
    forget(config)
    (config.store / "fusestore.toml").unlink()
    if code == "1+2":
        shutil.rmtree(config.nodes[1].path)
    recovered(config, accept_loss=code == "1+2")
    assert load(config.store) == config
    assert await read(config) == files


async def test_a_mount_that_is_refused_does_not_stand_in_the_way(config: StoreConfig) -> None:
    files = made("mount first", "a")
    await write(config, files)
    forget(config)
    for _ in range(2):
        await refused_mount(config)
    recovered(config)
    assert await read(config) == files


# --- losses that are accepted, or not


@dataclass
class Loss:
    """What is not there any more, and who could have gone on without the rest."""

    code: str
    gone: tuple[int, ...]
    stale: int | None = None
    """A node that was away in the last mount, and has not been healed."""
    older: int | None = None
    """A node in whose place there is an older copy of it."""
    lost: tuple[str, ...] = ()
    """Files that cannot be read from what is there."""

    @property
    def named(self) -> set[str]:
        indices = {*self.gone, self.stale, self.older} - {None}
        return {REGIONS[index] for index in indices if index is not None}


LOSSES = [
    Loss("1+2", (0,)),
    Loss("1+2", (1, 2)),
    Loss("1+2", (), older=2),
    Loss("2+1", (0, 1), lost=("/new", "/old")),
    Loss("4+2", (1, 2), lost=("/new", "/old")),
    Loss("2+1", (0,), stale=2, lost=("/new",)),
    Loss("2+1", (0,), older=2, lost=("/new",)),
    Loss("4+2", (2,), older=1, lost=("/new",)),
]


async def suffer(config: StoreConfig, loss: Loss, base: Path) -> dict[str, bytes]:
    """Write two files, and let nodes be lost, stale or old; the metadata goes, too."""
    files = {**made("loss", "old"), **made("loss", "new")}
    await write(config, {"old": files["old"]})
    if loss.older is not None:
        copy_tree(config.nodes[loss.older].path, base / "older")
    if loss.stale is not None:
        config.nodes[loss.stale].path.rename(base / "stale")
    await write(config, {"new": files["new"]})
    await write(config, {})
    if loss.stale is not None:
        (base / "stale").rename(config.nodes[loss.stale].path)
    if loss.older is not None:
        instead(base / "older", config.nodes[loss.older].path)
    for index in loss.gone:
        shutil.rmtree(config.nodes[index].path)
    forget(config)
    return files


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.expects_log(UNREAD_FILE, LOST_STRIPE, FOREIGN_FILES)
async def test_what_may_be_lost_is_refused_until_it_is_accepted(tmp_path: Path, loss: Loss) -> None:
    config = make(tmp_path / "store", loss.code)
    files = await suffer(config, loss, tmp_path)
    before = fingerprint(config.store)
    for _ in range(2):
        with pytest.raises(ReplayError, match="--accept-loss") as refused:
            recovered(config)
        assert {name for name in REGIONS if name in str(refused.value)} == loss.named
        assert not has_metadata(config)
    after = fingerprint(config.store)
    changed = {path for path in after if before.get(path) != after[path]}
    own = {config.store, config.metadata, config.store / "fusestore.lock"}
    assert changed <= {str(path) for path in own}

    result = recovered(config, accept_loss=True)
    assert result["lost"] == sorted(loss.lost)
    assert result["files"] == 3
    assert {node["name"] for node in result["nodes"] if not node["found"]} == {
        REGIONS[index] for index in loss.gone
    }
    expected = {name: None if f"/{name}" in loss.lost else data for name, data in files.items()}
    assert await read_only(config) == expected
    if len(loss.gone) < 2 or loss.code == "1+2":
        for _ in range(3):
            assert await read(config) == expected
            expected |= made("later", "later")
            await write(config, made("later", "later"))


async def test_only_an_old_copy_of_one_node_is_there(tmp_path: Path) -> None:
    config = make(tmp_path / "store", "1+2")
    await write(config, made("then", "a", "b"))
    copy_tree(config.nodes[1].path, tmp_path / "old")
    async with opened(config) as one:
        await put(one, made("now", "b", "c"))
        one.delete("a")
    for node in config.nodes:
        shutil.rmtree(node.path)
    forget(config)
    (tmp_path / "old").rename(config.nodes[1].path)
    with pytest.raises(ReplayError):
        recovered(config)
    recovered(config, accept_loss=True)
    assert await read(config) == made("then", "a", "b")


# --- two histories


@dataclass
class Fork:
    """A store that went on twice from one point, and each time knew nothing of the other."""

    config: StoreConfig
    """What goes on after a recovery with accepted losses."""
    files: dict[str, bytes]
    """What it should hold."""
    other: StoreConfig
    """Where the nodes went on that were given up."""
    gone: tuple[int, ...]

    def come_back(self) -> None:
        """The nodes that were given up are there again, with their own newer history."""
        for index in self.gone:
            copy_tree(self.other.nodes[index].path, self.config.nodes[index].path)

    def check(self, found: Files) -> None:
        """No byte and no name of the other history; what is lost may be lost."""
        assert found.keys() == self.files.keys()
        assert {
            name for name, data in found.items() if data not in (None, self.files[name])
        } == set()


async def fork(base: Path, code: str, mounts: int) -> Fork:
    """All is well; then 2+1: one node goes away, and its two others part; 1+2: all part."""
    config = make(base / "store", code)
    files = made("base", "a", "b", "kept")
    await write(config, files)
    await dump_metadata(config)
    if code == "2+1":  # the third node is stale
        config.nodes[2].path.rename(base / "stale")
        files |= made("second", "second")
        await write(config, made("second", "second"))
    copy_tree(config.store, base / "other")
    other = load(base / "other")
    if code == "2+1":
        (base / "stale").rename(config.nodes[2].path)
        copy_tree(config.nodes[2].path, other.nodes[2].path)
    gone = (0,) if code == "2+1" else (0, 2)
    shutil.rmtree(other.nodes[1].path)
    for number in range(mounts):
        await write(other, made(f"other {number}", "a", "b", f"other{number}", "same"))
        if number == mounts - 2:
            await dump_metadata(other)
    async with opened(other) as one:
        one.delete("b")
    for index in gone:
        shutil.rmtree(config.nodes[index].path)
    forget(config)
    with pytest.raises(ReplayError, match="--accept-loss"):
        recovered(config)
    recovered(config, accept_loss=True)
    return Fork(config, files, other, gone)


async def go_on(found: Fork) -> None:
    """Some mounts of the recovered store."""
    for number in range(3):
        more = made(f"ours {number}", "a", f"ours{number}", "same")
        found.files |= more
        await write(found.config, more)
        if number == 1:
            await dump_metadata(found.config)
    found.check(await read(found.config))


@pytest.mark.parametrize("mounts", [1, 5])
@pytest.mark.parametrize("code", ["1+2", "2+1"])
@pytest.mark.expects_log(CORRUPT, LOST_STRIPE, FOREIGN_FILES)
async def test_a_history_that_was_given_up_never_comes_back(
    tmp_path: Path, code: str, mounts: int
) -> None:
    found = await fork(tmp_path, code, mounts)
    await go_on(found)
    found.come_back()
    async with opened(found.config) as one:
        for _ in range(5):
            found.check(await read_files(one))
            await put(one, made("ours", "a"))
            found.files |= made("ours", "a")
        await healthy(one)
    async with opened(found.config) as one:
        assert (await one.store.status())["healthy"] is True
        assert await read_files(one) == found.files
        for name in REGIONS:
            assert (await repair(one, name))["shards_rebuilt"] == 0
    fsck = await offline(found.config, FsckRequest(), lambda message: None)
    assert fsck.findings == ()
    for index in (1, *([2] if code == "1+2" else [])):  # who carried it all until now
        shutil.rmtree(found.config.nodes[index].path)
    assert await read(found.config) == found.files
    forget(found.config)
    recovered(found.config, accept_loss=code == "1+2")
    assert await read(found.config) == found.files


@pytest.mark.parametrize("mounts", [1, 8])
@pytest.mark.parametrize("code", ["1+2", "2+1"])
@pytest.mark.expects_log(CORRUPT, LOST_STRIPE, FOREIGN_FILES)
async def test_the_metadata_goes_while_both_histories_are_there(
    tmp_path: Path, code: str, mounts: int
) -> None:
    """Recovery finds the one that went on after the other was given up."""
    found = await fork(tmp_path, code, mounts)
    await go_on(found)
    found.come_back()
    forget(found.config)
    recovered(found.config)
    async with opened(found.config) as one:
        found.check(await read_files(one))
        await healthy(one)
        assert await read_files(one) == found.files


# --- commits that never counted


async def doubtful(config: StoreConfig, crash: Path) -> StoreConfig:
    """A store that crashed when it had just written its last commit, of the file `late`."""
    async with opened(config) as one:
        await put(one, {"early": b"travels in the commit"})
        await checkpoint(one)
        late = made("late", "late")["late"]
        await one.put("late", late)
        await one.store.committer.commit()
        copy_tree(config.store, crash)
    return load(crash)


def lose_shards(config: StoreConfig, *nodes: int) -> None:
    for index in nodes:
        for path in (config.nodes[index].path / "shards").iterdir():
            path.unlink()


@pytest.mark.expects_log(DROPPED)
async def test_a_commit_that_never_counted_is_dropped_and_listed(
    config: StoreConfig, tmp_path: Path
) -> None:
    crash = await doubtful(config, tmp_path / "crash")
    forget(crash)
    lose_shards(crash, 0, 2)
    result = recovered(crash)
    assert [dropped["names"] for dropped in result["dropped"]] == [["/late"]]
    assert result["dropped"][0]["commit"] == result["commit"] + 1
    assert result["lost"] == []
    assert await read(crash) == {"early": b"travels in the commit"}


async def test_a_commit_that_counts_is_kept_without_a_region(
    config: StoreConfig, tmp_path: Path
) -> None:
    crash = await doubtful(config, tmp_path / "crash")
    forget(crash)
    shutil.rmtree(crash.nodes[1].path)
    assert recovered(crash)["dropped"] == []
    assert await read(crash) == {"early": b"travels in the commit", **made("late", "late")}


@pytest.mark.expects_log(DROPPED, FOREIGN_FILES)
async def test_a_commit_that_depends_on_a_node_that_is_away_is_not_judged(
    config: StoreConfig, tmp_path: Path
) -> None:
    crash = await doubtful(config, tmp_path / "crash")
    forget(crash)
    lose_shards(crash, 0)
    crash.nodes[1].path.rename(tmp_path / "away")
    with pytest.raises(ReplayError, match="depends on nodes that are away") as refused:
        recovered(crash)
    assert "--accept-loss" in str(refused.value)
    assert not has_metadata(crash)
    result = recovered(crash, accept_loss=True)
    assert [dropped["names"] for dropped in result["dropped"]] == [["/late"]]
    (tmp_path / "away").rename(crash.nodes[1].path)
    async with opened(crash) as one:
        await put(one, made("after", "after"))
        await healthy(one)
        assert await read_files(one) == {
            "early": b"travels in the commit",
            **made("after", "after"),
        }


# --- metadata dumps


def pieces(config: StoreConfig, node: int) -> list[tuple[Path, int, Header]]:
    """The METADATA_DUMP records of a node."""
    return [found for found in journal_records(config, node) if found[2].kind is Kind.METADATA_DUMP]


async def with_dumps(config: StoreConfig, count: int = 1) -> Files:
    """A store whose metadata was dumped in several pieces, and that went on."""
    config = limited(config, dump_piece_bytes=1000, dump_step_keys=3)
    for number in range(count):
        async with opened(config) as one:
            await put(one, made(f"{number}", *(f"f{i}" for i in range(10)), size=900))
            await put(one, made(f"{number}", "large"))
            await one.store.dumper.take()
            await put(one, made("after", f"after{number}"))
    files = await read(config)
    forget(config)
    return files


@pytest.mark.parametrize("torn", [False, True])
async def test_a_rotten_piece_is_read_from_another_node(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    files = await with_dumps(config)
    assert len(pieces(config, 0)) > 3
    for node in range(3):
        path, offset, header = pieces(config, node)[node]
        if torn and node == 2:
            os.truncate(path, offset + 64 + header.payload_length // 2)
        else:
            spoil(path, offset)
    recovered(config)
    assert await read(config) == files


async def test_a_piece_that_is_rotten_everywhere_is_told(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await with_dumps(config)
    for node in range(3):
        path, offset, _ = pieces(config, node)[1]
        spoil(path, offset)
    for accept_loss in (False, True):
        with pytest.raises(ReplayError, match="no complete metadata dump"):
            recovered(config, accept_loss=accept_loss)
        assert not has_metadata(config)


@pytest.mark.parametrize("rotten", [1, 2])
async def test_an_older_metadata_dump_or_the_whole_journal_will_do(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, rotten: int
) -> None:
    async def nothing(self: MetadataDumper, segment: int) -> None:
        """Nothing was deleted yet when the machine stopped."""

    monkeypatch.setattr(MetadataDumper, "_delete_before", nothing)
    files = await with_dumps(config, count=2)
    begun = sorted({header.number for _, _, header in pieces(config, 0)}, reverse=True)
    assert len(begun) == 2
    for node in range(3):
        for number in begun[:rotten]:
            path, offset, _ = next(p for p in pieces(config, node) if p[2].number == number)
            spoil(path, offset)
    recovered(config)
    assert await read(config) == files


# --- what makes no sense


async def test_no_node_is_there(config: StoreConfig, tmp_path: Path) -> None:
    files = made("no node", "a")
    await write(config, files)
    forget(config)
    for node in config.nodes:
        node.path.rename(tmp_path / node.name)
    with pytest.raises(UsageError, match="--from"):
        recovered(config)
    (config.store / "fusestore.toml").rename(tmp_path / "fusestore.toml")
    with pytest.raises(UsageError, match="--from"):
        recovered(config)
    assert not has_metadata(config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FusestoreError, match="is not a node"):
        recovered(config, tmp_path / "empty")
    places = [tmp_path / name for name in REGIONS]
    recovered(config, *places)
    assert [node.path for node in load(config.store).nodes] == places
    assert await read(load(config.store)) == files


async def test_nodes_of_two_stores(config: StoreConfig, tmp_path: Path) -> None:
    await write(config, made("ours", "a"))
    forget(config)
    other = make(tmp_path / "other")
    await write(other, made("theirs", "a"))
    with pytest.raises(UsageError, match="another store"):
        recovered(config, other.nodes[0].path)
    (config.store / "fusestore.toml").unlink()
    instead(other.nodes[1].path, config.nodes[1].path)
    with pytest.raises(UsageError, match="another store"):
        recovered(config)
    assert not has_metadata(config)


async def test_two_directories_that_are_one_node(config: StoreConfig, tmp_path: Path) -> None:
    await write(config, made("twins", "a"))
    forget(config)
    copy_tree(config.nodes[0].path, tmp_path / "twin")
    with pytest.raises(UsageError, match=f"are both node {REGIONS[0]}"):
        recovered(config, tmp_path / "twin")
    (config.store / "fusestore.toml").unlink()
    copy_tree(config.nodes[0].path, config.store / "twin")
    with pytest.raises(UsageError, match=f"are both node {REGIONS[0]}"):
        recovered(config)
    assert not has_metadata(config)
    shutil.rmtree(config.store / "twin")
    recovered(config, config.nodes[0].path)  # the same place, named once more
    assert await read(config) == made("twins", "a")


@pytest.mark.expects_log(RECOGNIZED)
@pytest.mark.parametrize("text", ["", "format = 7\n", "\x00\x00\x00"])
@pytest.mark.parametrize("named", [True, False])
async def test_a_node_whose_identity_is_spoilt_is_recognized(
    config: StoreConfig, text: str, named: bool
) -> None:
    files = made("spoilt", "a")
    await write(config, files)
    await dump_metadata(config)
    forget(config)
    (config.nodes[2].path / IDENTITY_NAME).write_text(text)
    if not named:
        (config.store / "fusestore.toml").unlink()
    result = recovered(config)
    is_found = not text.startswith("format")
    assert [node["found"] for node in result["nodes"]] == [True, True, is_found]
    assert load(config.store) == config
    assert await read(config) == files


async def test_metadata_that_is_there_is_not_touched(config: StoreConfig, tmp_path: Path) -> None:
    files = made("there", "a")
    await write(config, files)
    refuses_what_is_there(config)
    with pytest.raises(UsageError, match="is not empty"):
        recovered(config, accept_loss=True)
    spare = tmp_path / "spare"
    spare.mkdir()
    (spare / "somebody's").write_text("own")
    with pytest.raises(UsageError, match="is not empty"):
        recovered(config, metadata=spare)
    assert os.listdir(spare) == ["somebody's"]
    (spare / "somebody's").unlink()
    (spare / "lost+found").mkdir()
    before = fingerprint(config.metadata)
    recovered(config, metadata=spare)
    assert fingerprint(config.metadata) == before
    assert load(config.store) == replace(config, metadata=spare)
    old = (config.store / "fusestore.toml.old").read_text()
    (config.store / "fusestore.toml").write_text(old)
    assert load(config.store) == config
    assert await read(replace(config, metadata=spare)) == files


# --- recovery that is interrupted


class Stopped(BaseException):
    """Somebody pressed Ctrl-C, or the like."""


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, nth: int) -> None:
    """Let the nth call of a function end in an exception."""
    function = getattr(owner, name)
    calls = iter(range(1, 1000))

    def stops(*arguments: Any, **named: Any) -> Any:
        if next(calls) == nth:
            raise Stopped
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, stops)


INTERRUPTIONS: list[tuple[object, str, int]] = [(Engine, "write", nth) for nth in (1, 2, 9)]
INTERRUPTIONS += [(Engine, "apply", nth) for nth in (1, 5)]
INTERRUPTIONS += [(os, "replace", 1), (Engine, "close", 1)]


@pytest.mark.parametrize(("owner", "name", "nth"), INTERRUPTIONS)
async def test_recovery_that_is_interrupted_leaves_nothing(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, nth: int
) -> None:
    config = limited(config, checkpoint_changes_max=1)
    files: dict[str, bytes] = {}
    for number in range(4):
        files |= made(f"{number}", "a", f"b{number}")
        await write(config, files)
    forget(config)
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, nth)
        with pytest.raises(Stopped):
            recovered(config)
    assert not has_metadata(config)
    recovered(config)
    assert await read(config) == files


async def test_recovery_that_was_killed_is_begun_again(config: StoreConfig) -> None:
    files = made("killed", "a", "b")
    await write(config, files)
    forget(config)
    (config.metadata / "recovering").mkdir(parents=True)
    (config.metadata / "recovering" / "data.mdb").write_bytes(b"half of a database")
    (config.metadata / "recovering" / "lock.mdb").write_bytes(b"")
    recovered(config)
    assert not (config.metadata / "recovering").exists()
    assert await read(config) == files


# --- the gap before the first commit of an epoch


async def with_gap(config: StoreConfig, crash: Path) -> tuple[StoreConfig, int]:
    """A store with a commit that the first node never had, and its number."""
    async with opened(config) as one:
        for name in ("a", "b", "c"):
            await put(one, {name: name.encode() * 500})
        copy_tree(config.store, crash)
    copy = load(crash)
    path, offset, header = journal_records(copy, 0)[-1]
    os.truncate(path, offset)
    await write(copy, {"d": b"d" * 500})
    assert header.number not in {h.number for _, _, h in journal_records(copy, 0)}
    assert header.number in {h.number for _, _, h in journal_records(copy, 1)}
    return copy, header.number


@pytest.mark.parametrize("alone", [True, False])
async def test_a_commit_that_an_epoch_s_first_repeats_may_be_missing(
    tmp_path: Path, alone: bool
) -> None:
    config = make(tmp_path / "store", "1+2" if alone else "2+1")
    store, number = await with_gap(config, tmp_path / "crash")
    forget(store)
    shutil.rmtree(store.nodes[2].path)
    if alone:
        shutil.rmtree(store.nodes[1].path)
    for path, offset, header in [] if alone else journal_records(store, 1):
        if header.number == number:
            spoil(path, offset)
    result = recovered(store, accept_loss=alone)
    assert (result["dropped"], result["lost"]) == ([], [])
    assert await read(store) == {name: name.encode() * 500 for name in "abcd"}


@pytest.mark.parametrize("accept_loss", [False, True])
@pytest.mark.expects_log(DROPPED)
async def test_a_commit_that_is_rotten_everywhere_is_told(
    config: StoreConfig, accept_loss: bool
) -> None:
    async with opened(config) as one:
        for name in ("a", "b", "c", "d"):
            await put(one, {name: name.encode() * 500})
    forget(config)
    commits = [h.number for _, _, h in journal_records(config, 0)]
    for node in range(3):
        for path, offset, header in journal_records(config, node):
            if header.number == commits[2]:
                spoil(path, offset)
    if accept_loss:
        result = recovered(config, accept_loss=True)
        assert [dropped["commit"] for dropped in result["dropped"]] == commits[3:]
        for name, data in (await read(config)).items():
            assert data == name.encode() * 500
    else:
        with pytest.raises(ReplayError, match=f"Commit {commits[2]} was acknowledged"):
            recovered(config)
        assert not has_metadata(config)


# --- the command


async def test_the_command_says_what_it_found(config: StoreConfig, tmp_path: Path) -> None:
    files = made("command", "a", "b")
    await write(config, files)
    forget(config)
    config.nodes[0].path.rename(tmp_path / "elsewhere")
    shutil.rmtree(config.nodes[2].path)
    done = command(config)
    assert (done.returncode, has_metadata(config)) == (3, False)
    assert "--accept-loss" in done.stderr
    assert "Traceback" not in done.stderr
    done = command(config, "--from", tmp_path / "elsewhere")
    assert done.returncode == 0, done
    assert "2 of 3 nodes" in done.stdout
    assert REGIONS[2] in done.stdout
    assert await read(load(config.store)) == files
    done = command(config)
    assert done.returncode == 2
    assert "is not empty" in done.stderr


async def test_the_command_names_what_cannot_be_read(config: StoreConfig, tmp_path: Path) -> None:
    await write(config, made("command", "a", "b"))
    for index in (0, 2):
        shutil.rmtree(config.nodes[index].path)
    forget(config)
    done = command(config, "--json")
    assert done.returncode == 3
    assert "--accept-loss" in json.loads(done.stdout)["error"]
    done = command(config, "--json", "--accept-loss")
    assert done.returncode == 1, done
    found = json.loads(done.stdout)
    assert found["lost"] == ["/a", "/b"]
    assert [node["found"] for node in found["nodes"]] == [False, True, False]


async def test_the_command_lists_what_is_dropped(config: StoreConfig, tmp_path: Path) -> None:
    crash = await doubtful(config, tmp_path / "crash")
    forget(crash)
    lose_shards(crash, 0, 2)
    done = command(crash)
    assert done.returncode == 0, done
    assert "dropped: commit" in done.stdout
    assert "/late" in done.stdout


async def test_the_command_does_not_disturb_who_has_the_store(config: StoreConfig) -> None:
    files = made("busy", "a")
    await write(config, files)
    forget(config)
    with lock_store(config.store):
        done = command(config)
    assert (done.returncode, has_metadata(config)) == (3, False)
    assert "Traceback" not in done.stderr
    recovered(config)
    assert await read(config) == files


async def test_recover_closes_every_node_that_it_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it refuses: it does not wait for the garbage collector."""
    config = make(tmp_path / "store")
    async with opened(config) as one:
        await one.put("file", b"data")
    made: list[DirectoryNode] = []
    begin = DirectoryNode.__init__

    def init(node: DirectoryNode, *arguments: Any, **options: Any) -> None:
        begin(node, *arguments, **options)
        made.append(node)

    monkeypatch.setattr(DirectoryNode, "__init__", init)
    with pytest.raises(UsageError, match="is not empty"):
        recover(config.store, [], None, accept_loss=False, progress=lambda message: None)
    shutil.rmtree(config.metadata)
    recover(config.store, [], None, accept_loss=False, progress=lambda message: None)
    assert len(made) >= 3 * len(config.nodes)
    for node in made:
        with pytest.raises(NodeError, match="it is closed"):
            node.segments(SegmentKind.JOURNAL)
