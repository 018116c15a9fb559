"""Random work on an open store, with a node that falls ill, and the states that there were."""

from __future__ import annotations

import random
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio

from fusestore.config.store_config import StoreConfig
from fusestore.errors import FusestoreError, NodeError
from fusestore.files.tree import Change
from fusestore.format.erasure import Code
from fusestore.limits import Limits
from support.machine import Machine, told
from support.opened_store import Opened, opened
from support.power_cut import Health, Possible, Promised, Tape
from support.tree_model import Model, State

KIB, MIB = 1 << 10, 1 << 20
CODES = ("2+1", "2+1", "4+2", "1+2")
STEPS = 70
NAMES = "abcde"
FILES_MAX = 14
HEALTHY_ROUNDS_MAX = 40
FAILURES_MAX = 5
PROBE_SECONDS = 11.0


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
        self.cleaned = 0
        """How often cleaning gave something back."""
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
            self.scatter: 3,
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
            self.clean: 6,
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

    async def scatter(self) -> None:
        """Overwrite a part of a file in small pieces, in random order, and defragment the file."""
        if not self.model.files():
            return
        ino = self.model.paths[self.chance.choice(self.model.files())]
        offsets = [number * 3000 for number in range(self.chance.randint(4, 12))]
        self.chance.shuffle(offsets)
        for offset in offsets:
            await self._write(ino, offset, self.chance.randbytes(3000))
        recoder = self.one.files.recoder
        if recoder.job.state != "running":
            await recoder.start(ino, None, None, defragment=True)

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
        """Give files another code, defragment them, or both, while the work goes on."""
        recoder = self.one.files.recoder
        if recoder.job.state != "running" and self.model.files():
            code = Code.parse(self.chance.choice(CODES))
            defragment = self.chance.random() < 0.5
            await recoder.start(
                self.model.paths[self.chance.choice(["", *self.model.files()])],
                None if defragment and self.chance.random() < 0.5 else code,
                None,
                defragment=defragment,
            )

    async def clean(self) -> None:
        """Empty stripes, while the work goes on: nothing else may change."""

        async def clean() -> None:
            with suppress(FusestoreError):  # the log may be broken meanwhile
                self.cleaned += await self.one.files.cleaner.make_room()

        self.background.start_soon(clean)

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
        """What `fusestore repair` does; repeated while the node still fails, a few times."""
        for _ in range(FAILURES_MAX):
            with suppress(NodeError):
                done = await self.one.store.repairer.repair(name, lambda message: None)
                assert done["unrepairable"] == []
                return
        raise AssertionError(f"{name} cannot be repaired")


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
                await one.store.repairer.repair(member.name, lambda message: None)
        one.store.comeback.wake()
        await trio.sleep(PROBE_SECONDS)
    raise AssertionError(f"it does not get well: {await one.store.status()}")


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
