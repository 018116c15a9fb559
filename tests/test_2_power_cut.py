"""Wherever the power is cut, the store mounts by itself and is what it was at one instant.

Random work is done on a store in this process; `power_cut` keeps the tape of all that happened
and makes the disks that a cut may leave.  Each such store is mounted: its tree must be, byte
for byte, one that there was, and none older than what had been acknowledged.  Then it is
mounted again, cut again in its first commits, or loses a region.

The work and the cuts come from `--model-seed`; a failure says which work and which cut it was,
and comes again with the same seed and the same test.
"""

from __future__ import annotations

import random
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import xxhash
from test_2_log import Opened, make, opened

from fusestore.config.store_config import StoreConfig
from fusestore.errors import FusestoreError, ReplayError
from fusestore.files.filesystem import FileSystem
from fusestore.files.tree import Change
from fusestore.format.erasure import Code
from fusestore.format.file_rows import ROOT
from fusestore.limits import Limits
from fusestore.store.opening import open_store
from support.power_cut import Health, Machine, Possible, Promised, Tape, told, write_disks

KIB, MIB = 1 << 10, 1 << 20
CODES = ("2+1", "2+1", "4+2", "1+2")
STEPS = 70
CUTS = 20
NAMES = "abcde"
FILES_MAX = 14
HEALTHY_ROUNDS_MAX = 40
PROBE_SECONDS = 11.0

Entry = tuple[int, int, int, bytes, tuple[tuple[bytes, bytes], ...], str, int, int]
"""mode, links, size, digest of bytes, attributes and digests, first path of it, mtime, ctime."""
State = dict[str, Entry]
"""A whole tree, by path; the root is the empty path."""


# --- states ----------------------------------------------------------------------


def digest(data: bytes) -> bytes:
    """What stands for a file's bytes."""
    return xxhash.xxh3_128_digest(data)


async def observe(one: Opened) -> State:
    """The tree that a mounted store shows, all of it read, once removals have ended."""
    while one.rows(b"D"):
        await trio.lowlevel.checkpoint()
    tree, first = one.files.tree, dict[int, str]()
    state: State = {}

    async def walk(ino: int, path: str) -> None:
        inode = tree.inode(ino)
        size, data = inode.size, b""
        if stat.S_ISREG(inode.mode):
            data = bytes(await one.files.contents.read(ino, 0, 1 << 40))
            assert len(data) == size, path
        elif stat.S_ISLNK(inode.mode):
            data = tree.target(ino)
        values = one.files.attributes
        attributes = tuple(sorted((n, digest(values.get(ino, n))) for n in values.names(ino)))
        times = (inode.mtime, inode.ctime) if path else (0, 0)
        seen = first.setdefault(ino, path)
        state[path] = (inode.mode, inode.nlink, size, digest(data), attributes, seen, *times)
        if stat.S_ISDIR(inode.mode):
            listed = list(tree.entries(ino, 0))
            assert len({name for _, _, name in listed}) == len(listed), path
            for _, child, name in sorted(listed, key=lambda entry: entry[2]):
                assert tree.lookup(ino, name) == child
                await walk(child, f"{path}/{name.decode()}")

    await walk(int(ROOT), "")
    one.check_counters()
    return state


def differences(found: State, wanted: State) -> str:
    """How two trees differ, for people."""
    lines = []
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            lines.append(f"  {path or '/'}: {found.get(path)} is not {wanted.get(path)}")
    return "\n".join(lines)


def match(found: State, states: list[State], oldest: int, newest: int) -> int:
    """Which of the states that may be seen was found; AssertionError when it is none of them."""
    for number in range(newest, oldest - 1, -1):
        if found == states[number]:
            return number
    others = [number for number, state in enumerate(states) if state == found]
    closest = min(
        range(oldest, newest + 1),
        key=lambda number: sum(
            found.get(path) != states[number].get(path) for path in found.keys() | states[number]
        ),
    )
    raise AssertionError(
        f"not one of the states {oldest} to {newest}, but {others or 'none that there ever was'}; "
        f"against {closest}:\n{differences(found, states[closest])}"
    )


# --- the model ---------------------------------------------------------------------


class Model:
    """What the tree is to be; inode numbers are the store's own."""

    def __init__(self) -> None:
        self.paths: dict[str, int] = {"": int(ROOT)}
        self.modes: dict[int, int] = {int(ROOT): stat.S_IFDIR | 0o755}
        self.data: dict[int, bytes] = {}
        self.attributes: dict[int, dict[bytes, bytes]] = {}

    def freeze(self, one: Opened) -> State:
        """The state now; the times are the store's own."""
        links: dict[int, int] = {}
        first: dict[int, str] = {}
        for path, ino in self._walk(""):
            first.setdefault(ino, path)
            links[ino] = links.get(ino, 0) + (2 if self.is_directory(ino) else 1)
            if self.is_directory(ino) and path:
                links[self.paths[path.rpartition("/")[0]]] += 1
        state: State = {}
        for path, ino in self.paths.items():
            data = self.data.get(ino, b"")
            inode = one.files.tree.inode(ino)
            state[path] = (
                self.modes[ino],
                links[ino],
                len(data),
                digest(data),
                tuple(sorted((n, digest(v)) for n, v in self.attributes.get(ino, {}).items())),
                first[ino],
                inode.mtime if path else 0,
                inode.ctime if path else 0,
            )
        return state

    def _walk(self, path: str) -> Iterator[tuple[str, int]]:
        """All below a path, in the order of a listing."""
        yield path, self.paths[path]
        children = [
            other for other in self.paths if other and other.rpartition("/")[0] == path != other
        ]
        for child in sorted(children):
            yield from self._walk(child)

    def is_directory(self, ino: int) -> bool:
        """Whether an inode is a directory."""
        return stat.S_ISDIR(self.modes[ino])

    def directories(self) -> list[str]:
        """Paths of directories."""
        return [path for path, ino in self.paths.items() if self.is_directory(ino)]

    def others(self) -> list[str]:
        """Paths of what is no directory."""
        return [path for path, ino in self.paths.items() if not self.is_directory(ino)]

    def files(self) -> list[str]:
        """Paths of files."""
        return [path for path in self.others() if stat.S_ISREG(self.modes[self.paths[path]])]

    def is_empty(self, path: str) -> bool:
        """Whether nothing lies in a directory."""
        return not any(other.startswith(path + "/") for other in self.paths)

    def move(self, old: str, new: str) -> None:
        """Rename, over what is there."""
        self.paths.pop(new, None)
        for path in [path for path in self.paths if path == old or path.startswith(old + "/")]:
            self.paths[new + path[len(old) :]] = self.paths.pop(path)


# --- the work ------------------------------------------------------------------------


@dataclass(frozen=True)
class Illness:
    """What befalls a node in the middle of the work."""

    node: int
    kind: str
    """away, wiped, write, flush"""
    begins: int
    ends: int
    times: int
    asked: bool
    """Whether it is repaired by command, or comes back by itself."""


class Player:
    """Does random work on an open store, and keeps the states that there were."""

    def __init__(
        self,
        machine: Machine,
        one: Opened,
        background: trio.Nursery,
        chance: random.Random,
        states: list[State],
        model: Model,
    ) -> None:
        self.machine = machine
        self.one = one
        self.background = background
        self.chance = chance
        self.states = states
        self.model = model
        self.unused: list[int] = []
        """Inodes without a name that somebody has open."""
        self._dumps = trio.Lock()

    # --- steps

    async def step(self) -> None:
        """One random operation."""
        kinds: dict[Callable[[], Any], int] = {
            self.write: 30,
            self.make_file: 10,
            self.make_directory: 5,
            self.make_link: 4,
            self.make_symlink: 2,
            self.rename: 8,
            self.unlink: 6,
            self.remove_directory: 3,
            self.truncate: 7,
            self.change_mode: 3,
            self.set_attribute: 4,
            self.remove_attribute: 2,
            self.commit: 6,
            self.commit_later: 9,
            self.checkpoint: 2,
            self.checkpoint_later: 3,
            self.dump: 3,
            self.recode: 4,
            self.read: 4,
            self.wait: 3,
            self.close_unused: 3,
        }
        await self.chance.choices(list(kinds), list(kinds.values()))[0]()
        for _ in range(self.chance.choice((0, 0, 1, 3, 10))):
            await trio.lowlevel.checkpoint()

    def begin(self) -> None:
        """An operation begins: the next state may be seen from now on."""
        self.machine.tape.events.append(Possible(len(self.states)))

    def end(self) -> None:
        """It has ended: this is the state."""
        self.states.append(self.model.freeze(self.one))

    def promised(self, state: int) -> None:
        """It was acknowledged."""
        self.machine.tape.events.append(Promised(state))

    # --- names

    def new_path(self) -> tuple[int, bytes, str]:
        """(parent, name, path) that may be taken."""
        folder = self.chance.choice(self.model.directories())
        name = self.chance.choice(NAMES)
        return self.model.paths[folder], name.encode(), f"{folder}/{name}"

    def old_path(self, path: str) -> tuple[int, bytes]:
        """(parent, name) of a path."""
        folder, _, name = path.rpartition("/")
        return self.model.paths[folder], name.encode()

    def _make(self, mode: int, target: bytes | None = None) -> None:
        parent, name, path = self.new_path()
        if path in self.model.paths or len(self.model.paths) >= FILES_MAX:
            return
        self.begin()
        ino, _ = self.one.files.tree.make(parent, name, mode, 0, 0, target=target)
        self.model.paths[path] = ino
        self.model.modes[ino] = mode
        if target is not None:
            self.model.data[ino] = target
        self.end()

    async def make_file(self) -> None:
        self._make(stat.S_IFREG | self.chance.choice((0o644, 0o600)))

    async def make_directory(self) -> None:
        self._make(stat.S_IFDIR | 0o755)

    async def make_symlink(self) -> None:
        self._make(stat.S_IFLNK | 0o777, self.chance.randbytes(self.chance.choice((1, 90, 3000))))

    async def make_link(self) -> None:
        parent, name, path = self.new_path()
        if path in self.model.paths or not self.model.others():
            return
        ino = self.model.paths[self.chance.choice(self.model.others())]
        self.begin()
        self.one.files.tree.link(ino, parent, name)
        self.model.paths[path] = ino
        self.end()

    async def rename(self) -> None:
        """Move a name, often over another."""
        old = self.chance.choice([path for path in self.model.paths if path] or [""])
        parent, name, new = self.new_path()
        moves = self.model.is_directory(self.model.paths[old])
        if not old or new == old or (new + "/").startswith(old + "/"):
            return
        there = self.model.paths.get(new)
        if there is not None:
            over = self.model.is_directory(there)
            if over != moves or (over and not self.model.is_empty(new)):
                return
            if there == self.model.paths[old]:
                return
        self.begin()
        lost = self.one.files.tree.rename(*self.old_path(old), parent, name)
        self.model.move(old, new)
        self.end()
        if lost is not None and lost[1].nlink == 0:
            self._let_go(lost[0])

    async def unlink(self) -> None:
        if not self.model.others():
            return
        path = self.chance.choice(self.model.others())
        self.begin()
        ino, inode = self.one.files.tree.unlink(*self.old_path(path))
        del self.model.paths[path]
        self.end()
        if inode.nlink == 0:
            self._let_go(ino)

    async def remove_directory(self) -> None:
        empty = [path for path in self.model.directories() if path and self.model.is_empty(path)]
        if not empty:
            return
        path = self.chance.choice(empty)
        self.begin()
        ino, _ = self.one.files.tree.rmdir(*self.old_path(path))
        del self.model.paths[path]
        self.end()
        self._let_go(ino)

    def _let_go(self, ino: int) -> None:
        """An inode lost its last name: remove it, unless somebody has it open."""
        if self.chance.random() < 0.3:
            self.unused.append(ino)
        else:
            self.one.files.removal.remove(ino)

    async def close_unused(self) -> None:
        """Nobody has what lost its name open any more."""
        while self.unused:
            self.one.files.removal.remove(self.unused.pop())

    # --- contents

    def _size(self) -> int:
        low, high = self.chance.choices(
            ((1, 200), (1, 40 * KIB), (1, 300 * KIB), (MIB, MIB), (1, 3 * MIB)),
            (35, 40, 20, 4, 3),
        )[0]
        return self.chance.randint(low, high)

    async def write(self) -> None:
        """Write somewhere in a file, or behind its end, in requests as the kernel sends them."""
        if not self.model.files():
            return await self.make_file()
        ino = self.model.paths[self.chance.choice(self.model.files())]
        before = len(self.model.data.get(ino, b""))
        offset = self.chance.choice((0, before, self.chance.randint(0, before + 50_000)))
        data = self.chance.randbytes(self._size())
        longest = self.one.store.log.limits.stripe_bytes
        for start in range(0, len(data), longest):
            part = data[start : start + longest]
            await self._write(ino, offset + start, part)
        return None

    async def _write(self, ino: int, offset: int, part: bytes) -> None:
        self.begin()
        assert await self.one.files.contents.write(ino, offset, part) == len(part)
        old = self.model.data.get(ino, b"")
        hole = bytes(max(0, offset - len(old)))
        self.model.data[ino] = old[:offset] + hole + part + old[offset + len(part) :]
        self.end()

    async def truncate(self) -> None:
        if not self.model.files():
            return
        ino = self.model.paths[self.chance.choice(self.model.files())]
        old = self.model.data.get(ino, b"")
        size = self.chance.choice((0, self.chance.randint(0, len(old)), len(old) + 10_000))
        self.begin()
        await self.one.files.contents.truncate(ino, size)
        self.model.data[ino] = old[:size] + bytes(max(0, size - len(old)))
        self.end()

    async def read(self) -> None:
        """What a file has is what the model has."""
        if self.model.files():
            ino = self.model.paths[self.chance.choice(self.model.files())]
            found = bytes(await self.one.files.contents.read(ino, 0, 1 << 40))
            assert found == self.model.data.get(ino, b"")

    # --- attributes

    async def change_mode(self) -> None:
        path = self.chance.choice([path for path in self.model.paths if path] or [""])
        if not path or stat.S_ISLNK(self.model.modes[self.model.paths[path]]):
            return
        ino, mode = self.model.paths[path], self.chance.choice((0o700, 0o640, 0o4755, 0o000))
        self.begin()
        self.one.files.tree.change(ino, Change(mode=mode))
        self.model.modes[ino] = stat.S_IFMT(self.model.modes[ino]) | mode
        self.end()

    async def set_attribute(self) -> None:
        ino = self.chance.choice(list(self.model.paths.values()))
        name = b"user." + self.chance.choice(NAMES).encode()
        value = self.chance.randbytes(self.chance.choice((0, 10, 5000)))
        self.begin()
        self.one.files.attributes.set(ino, name, value)
        self.model.attributes.setdefault(ino, {})[name] = value
        self.end()

    async def remove_attribute(self) -> None:
        known = [ino for ino in self.model.paths.values() if self.model.attributes.get(ino)]
        if not known:
            return
        ino = self.chance.choice(known)
        name = self.chance.choice(sorted(self.model.attributes[ino]))
        self.begin()
        self.one.files.attributes.remove(ino, name)
        del self.model.attributes[ino][name]
        self.end()

    # --- the log

    async def commit(self) -> None:
        """An fsync."""
        last = len(self.states) - 1
        await self.one.store.committer.commit()
        self.promised(last)

    async def commit_later(self) -> None:
        """An fsync of somebody else's, while the work goes on."""
        self.background.start_soon(self.commit)

    async def checkpoint(self) -> None:
        """A commit with a checkpoint."""
        last = len(self.states) - 1
        async with self.one.store.committer.lock:
            await self.one.store.committer.commit_now(checkpoint=True)
        self.promised(last)

    async def checkpoint_later(self) -> None:
        """The same, while the work goes on."""
        self.background.start_soon(self.checkpoint)

    async def dump(self) -> None:
        """A metadata dump, while the work goes on."""
        if not self._dumps.locked():
            self.background.start_soon(self._dump)
            await trio.lowlevel.checkpoint()

    async def _dump(self) -> None:
        async with self._dumps:
            await self.one.store.dumper.take()

    async def recode(self) -> None:
        """Give files another code, while the work goes on: nothing else may change."""
        recoder = self.one.files.recoder
        if recoder.job.state != "running" and self.model.files():
            code = Code.parse(self.chance.choice(CODES))
            recoder.start(
                self.model.paths[self.chance.choice(["", *self.model.files()])], code, None
            )

    async def wait(self) -> None:
        """Let time pass: timers go off."""
        await trio.sleep(self.chance.choice((0.1, 6.0, 12.0)))

    # --- nodes

    async def befall(self, illness: Illness, step: int) -> None:
        """Let a node fall ill, or get well, if it is time."""
        config = self.machine.config.nodes[illness.node]
        hidden = config.path.with_name("hidden-" + config.name)
        if step == illness.begins:
            if illness.kind == "wiped":
                # What nobody had flushed may need this node: a disk is changed in quiet times.
                await self.checkpoint()
            self.machine.tape.events.append(Health(config.name, False))
            if illness.kind == "wiped":
                self.machine.wipe(config.name)
            elif illness.kind == "away":
                config.path.rename(hidden)
            else:
                self.machine.sicken(config.name, illness.kind, illness.times)
        elif step == illness.ends:
            self.machine.cure(config.name)
            if hidden.exists():
                hidden.rename(config.path)
            if illness.asked or illness.kind == "wiped":
                self.background.start_soon(self.repair, config.name)
        elif (
            step > illness.ends
            and self.machine.tape.ill(len(self.machine.tape.events) - 1)
            and (await self.one.store.status())["healthy"]
        ):
            self.machine.tape.events.append(Health(config.name, True))

    async def repair(self, name: str) -> None:
        """What `fusestore repair` does."""
        path = self.one.files.tree.path
        done = await self.one.store.repairer.repair(name, lambda message: None, path)
        assert done["unrepairable"] == []


async def healthy(one: Opened) -> None:
    """Wait until every node has all that it should."""
    for _ in range(HEALTHY_ROUNDS_MAX):
        status = await one.store.status()
        if status["healthy"]:
            return
        for node in status["nodes"]:
            member = one.store.log.members.named(node["name"])
            assert member is not None
            if not (member.config.path / "node.toml").exists():
                path = one.files.tree.path
                await one.store.repairer.repair(member.name, lambda message: None, path)
        one.store.comeback.wake()
        await trio.sleep(PROBE_SECONDS)
    raise AssertionError(f"it does not get well: {await one.store.status()}")


# --- a history, and its cuts -----------------------------------------------------------


@dataclass
class History:
    """Work that was done, and all that happened on the disks meanwhile."""

    tape: Tape
    states: list[State]
    config: StoreConfig


def illness_of(chance: random.Random) -> Illness | None:
    """What befalls a node, if anything."""
    if chance.random() < 0.25:
        return None
    begins = chance.randrange(5, STEPS - 10)
    return Illness(
        chance.randrange(3),
        chance.choice(("away", "wiped", "write", "flush", "flush")),
        begins,
        chance.randint(begins + 2, STEPS - 2),
        chance.choice((1, 1, 3, 1000)),
        chance.random() < 0.5,
    )


def work(
    config: StoreConfig, chance: random.Random, steps: int, illness: Illness | None
) -> History:
    """Random work on a new store, with all of its disks' history."""
    states: list[State] = []

    async def main() -> None:
        async with opened(config) as one, trio.open_nursery() as background:
            player = Player(machine, one, background, chance, states, Model())
            player.end()
            for step in range(steps):
                await player.step()
                if illness is not None:
                    await player.befall(illness, step)
            await player.close_unused()

    with Machine(config, chance) as machine, told(f"at work; {illness}"):
        machine.run(main)
    return History(machine.tape, states, config)


@asynccontextmanager
async def mounted(config: StoreConfig, accept_loss: bool) -> AsyncIterator[Opened]:
    """Like `opened`; `accept_loss` is what a mount is told when a disk is gone for good."""
    if not accept_loss:
        async with opened(config) as one:
            yield one
        return
    async with open_store(config, accept_loss=True) as store, trio.open_nursery() as nursery:
        files = FileSystem(store, nursery)
        await files.begin()
        yield Opened(store, files)
        nursery.cancel_scope.cancel()


class Cut:
    """One cut of a history, and what is done with what it left."""

    def __init__(self, history: History, at: int, chance: random.Random, place: Path) -> None:
        self.history = history
        self.at = at
        self.chance = chance
        self.place = place
        self.oldest, newest = history.tape.bounds(at)
        self.newest = min(newest, len(history.states) - 1)  # the last operation may have failed

    def mount(
        self,
        config: StoreConfig,
        disks: Tape | None = None,
        *,
        wait: bool = False,
        then: Callable[[Opened], Any] | None = None,
        kept: Tape | None = None,
    ) -> tuple[State, Tape]:
        """The tree that a mount shows, and the tape of the mount.

        `disks`, those of a store as a cut left it: when one of them had just been wiped, the
        mount may refuse, and must then do what it is asked for with accept_loss.
        `kept`, the same disks when the page cache was kept: a cut of the tape takes that away.
        """
        found: list[State] = []

        async def main(accept_loss: bool = False) -> None:
            async with mounted(config, accept_loss) as one:
                one.files.go_on()
                found.append(await observe(one))
                machine.tape.events.append(Promised(0))
                if wait:
                    await healthy(one)
                    assert await observe(one) == found[0]
                if then is not None:
                    await then(one)

        with Machine(config, self.chance, kept) as machine:
            try:
                machine.run(main)
            except ReplayError as error:
                if disks is None or all(disk.identity for disk in disks.disks.values()):
                    raise
                self._legitimate(error, disks)
                machine.run(partial(main, accept_loss=True))
        return found[0], machine.tape

    def check(self) -> None:
        """Everything that a cut must not hurt."""
        disks = self.history.tape.cut(self.at, self.chance)
        kinds = ["again", "again", "nested", "nested", "region", "killed", "killed"]
        if any(isinstance(event, Health) for event in self.history.tape.events[: self.at]):
            kinds += ["region"] * 3  # what a node lacked must be there again
        if len(self.history.tape.ill(self.at)) < 2:  # else it is more than the code bears
            kinds.append("away")
        kind = self.chance.choice(kinds)
        with told(f"cut under event {self.at}, then {kind}:\n{self.history.tape.around(self.at)}"):
            getattr(self, f"_{kind}")(disks)
        shutil.rmtree(self.place)

    def check_killed(self) -> None:
        """A kill, a mount, and then a cut."""
        self._killed(self.history.tape)

    def _match(self, found: State) -> int:
        return match(found, self.history.states, self.oldest, self.newest)

    def _again(self, disks: Tape) -> None:
        """Mount, and mount again."""
        config = write_disks(disks, self.history.config, self.place / "cut")
        found, _ = self.mount(config, disks)
        number = self._match(found)
        again, _ = self.mount(config, wait=True)
        match(again, self.history.states, number, number)

    def _region(self, disks: Tape) -> None:
        """Mount until it is well; then it bears the loss of any region."""
        config = write_disks(disks, self.history.config, self.place / "cut")
        found, _ = self.mount(config, disks, wait=True)
        number = self._match(found)
        for node in self.chance.sample(config.nodes, 2):
            node.path.rename(node.path.with_name("lost"))
            with told(f"without {node.name}"):
                found, _ = self.mount(config)
                match(found, self.history.states, number, number)
            node.path.with_name("lost").rename(node.path)
            found, _ = self.mount(config, wait=True)
            match(found, self.history.states, number, number)

    def _nested(self, disks: Tape) -> None:
        """Cut the mount after the cut, too, in its first commits."""
        config = write_disks(disks, self.history.config, self.place / "cut")
        wait = self.chance.random() < 0.3
        found, tape = self.mount(config, disks, wait=wait, then=self._a_little_work)
        number = self._match(found)
        for nest in range(2):
            at = tape.choose(self.chance)
            oldest, newest = self.oldest, self.newest
            if any(isinstance(event, Promised) for event in tape.events[:at]):
                oldest = newest = number
            with told(f"mounted as state {number}, cut again under {at}:\n{tape.around(at)}"):
                disks = tape.cut(at, self.chance)
                inner = write_disks(disks, config, self.place / f"nested{nest}")
                found, _ = self.mount(inner, disks)
                match(self._without_work(found), self.history.states, oldest, newest)
                found, _ = self.mount(inner, wait=True)
                match(self._without_work(found), self.history.states, oldest, newest)

    def _killed(self, disks: Tape) -> None:
        """In place of the cut the process is killed; the mount after that is cut."""
        disks = self.history.tape.kill(self.at, self.chance)
        config = write_disks(disks, self.history.config, self.place / "killed")
        found, tape = self.mount(config, disks, then=self._a_little_work, kept=disks)
        number = self._match(found)
        for nest in range(3):
            at = tape.choose(self.chance)
            oldest, newest = self.oldest, self.newest
            if any(isinstance(event, Promised) for event in tape.events[:at]):
                oldest = newest = number
            with told(f"killed, mounted as state {number}, cut under {at}:\n{tape.around(at)}"):
                disks = tape.cut(at, self.chance)
                inner = write_disks(disks, config, self.place / f"cut{nest}")
                found, _ = self.mount(inner, disks)
                match(self._without_work(found), self.history.states, oldest, newest)

    async def _a_little_work(self, one: Opened) -> None:
        """Work that leaves the tree as it is, but for one file."""
        for _ in range(self.chance.randrange(4)):
            await one.put("later", self.chance.randbytes(self.chance.choice((50, 90_000))))
            await one.store.committer.commit()

    @staticmethod
    def _without_work(state: State) -> State:
        return {path: entry for path, entry in state.items() if path != "/later"}

    def _away(self, disks: Tape) -> None:
        """One node is not there when the power comes back; then it is."""
        ill = self.history.tape.ill(self.at)
        config = write_disks(disks, self.history.config, self.place / "cut")
        (node,) = self.chance.sample([n for n in config.nodes if not ill or n.name in ill], 1)
        hidden = node.path.with_name("hidden")
        node.path.rename(hidden)
        oldest, newest = self.oldest, self.newest
        with told(f"{node.name} is away"):
            try:
                found, _ = self.mount(config)
                oldest = newest = self._match(found)
            except FusestoreError as error:
                self._legitimate(error, disks)
        hidden.rename(node.path)
        with told(f"{node.name} was away, mounted as {oldest} to {newest}"):
            found, _ = self.mount(config, disks, wait=True)
            match(found, self.history.states, oldest, newest)

    @staticmethod
    def _legitimate(error: Exception, disks: Tape) -> None:
        """Only what depends on the node that is away may be refused, and a first mount."""
        allowed = ["depends on nodes that are away", "no node that is there holds it"]
        if not disks.metadata:
            allowed.append("A new store needs all of its nodes")
        if not any(reason in str(error) for reason in allowed):
            raise error


# --- the campaign -------------------------------------------------------------------------


def small_limits(chance: random.Random) -> Limits:
    """Let segments roll, metadata dumps be made and batches end soon."""
    return Limits(
        shard_segment_bytes=chance.choice((256 * KIB, MIB, 64 * MIB)),
        journal_segment_bytes=chance.choice((16 * KIB, 64 * KIB, 8 * MIB)),
        checkpoint_changes_max=chance.choice((40, 200, 10_000)),
        dump_journal_bytes_min=chance.choice((64 * KIB, 1 << 40)),
        dump_piece_bytes=chance.choice((2 * KIB, 256 * KIB)),
        dump_step_keys=chance.choice((7, 200)),
        trim_batch=chance.choice((2, 256)),
        recode_extents=chance.choice((2, 128)),
        recode_bytes=chance.choice((64 * KIB, 4 * MIB)),
        reclaim_batch=chance.choice((2, 256)),
        repair_batch=chance.choice((2, 16)),
        repair_scan_rows=chance.choice((5, 256)),
        catch_up_shards_max=chance.choice((0, 4, 64)),
        tail_bytes_max=chance.choice((2 * KIB, 32 * KIB)),
        stripe_bytes=chance.choice((64 * KIB, 256 * KIB, MIB)),
        stripe_owners_max=chance.choice((5, 8192)),
        seals_max=chance.choice((2, 8)),
        open_segments_max=chance.choice((3, 128)),
    )


def campaign(seed: int, number: int, cuts: int, place: Path) -> None:
    """Some work, and many cuts of it."""
    chance = random.Random(f"{seed} {number}")
    with told(f"--model-seed {seed}, work {number}"):
        limits = small_limits(chance)
        config = make(place / "store", chance.choice(CODES), limits)
        history = work(config, chance, STEPS, illness_of(chance))
        for cut in range(cuts):
            chance = random.Random(f"{seed} {number} {cut}")
            at = history.tape.choose(chance)
            Cut(history, at, chance, place / f"cut{cut}").check()


def killed_campaign(seed: int, number: int, kills: int, place: Path) -> None:
    """Some work, kills of it, and cuts of the mounts after them."""
    chance = random.Random(f"killed {seed} {number}")
    with told(f"--model-seed {seed}, killed work {number}"):
        limits = small_limits(chance)
        config = make(place / "store", chance.choice(CODES), limits)
        history = work(config, chance, STEPS // 2, None)
        for kill in range(kills):
            chance = random.Random(f"killed {seed} {number} {kill}")
            at = history.tape.choose(chance)
            cut = Cut(history, at, chance, place / f"kill{kill}")
            with told(f"killed under event {at}:\n{history.tape.around(at)}"):
                cut.check_killed()
            shutil.rmtree(cut.place)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--model-seed"))


@pytest.mark.parametrize("number", range(3))
def test_the_power_is_cut(number: int, seed: int, tmp_path: Path) -> None:
    campaign(seed, number, CUTS, tmp_path)


@pytest.mark.parametrize("number", range(4))
def test_the_process_is_killed_and_then_the_power_is_cut(
    number: int, seed: int, tmp_path: Path
) -> None:
    killed_campaign(seed, number, CUTS, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", range(100, 130))
def test_kills_and_cuts_go_on(number: int, seed: int, tmp_path: Path) -> None:
    killed_campaign(seed, number, 2 * CUTS, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", range(100, 160))
def test_the_power_is_cut_often(number: int, seed: int, tmp_path: Path) -> None:
    campaign(seed, number, 2 * CUTS, tmp_path)


def test_what_a_mount_counts_after_a_kill_is_on_the_disks(seed: int, tmp_path: Path) -> None:
    """One file that replaces another, killed under every event; the mount is cut at its end."""
    chance = random.Random(f"every kill {seed}")
    config = make(tmp_path / "store")
    old, new = chance.randbytes(MIB), chance.randbytes(MIB)
    states: list[State] = []

    async def main() -> None:
        async with opened(config) as one:
            for number, data in enumerate((old, new)):
                await one.put("file", data)
                states.append(await observe(one))
                machine.tape.events.append(Possible(number))
                await one.store.committer.commit()
                machine.tape.events.append(Promised(number))

    with Machine(config, chance) as machine:
        machine.run(main)
    first = next(i for i, event in enumerate(machine.tape.events) if event == Promised(0))
    history = History(machine.tape, states, config)
    for at in range(first, len(machine.tape.events)):
        cut = Cut(history, at, chance, tmp_path / f"kill{at}")
        with told(f"killed under event {at}:\n{machine.tape.around(at)}"):
            disks = machine.tape.kill(at, chance)
            killed = write_disks(disks, config, cut.place / "killed")
            found, tape = cut.mount(killed, kept=disks)
            number = match(found, states, cut.oldest, cut.newest)
            after = write_disks(tape.cut(len(tape.events) - 1, chance), killed, cut.place / "cut")
            found, _ = cut.mount(after)
            match(found, states, number, number)
        shutil.rmtree(cut.place)
