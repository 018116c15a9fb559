"""A campaign of rot: damage to one file of a store or two, and then ordinary life.

Whatever the damage (support/rot says which) and whatever is done then (mounts, reads, scrubs,
repairs, recoveries, fsck): nothing wrong is read, all that can be read is read, nothing whole
is thrown away, no node is blamed that is sound, and what is said is true.  A failure prints its
seed; the same seed does the same.  Each case runs in a process of its own.
"""

from __future__ import annotations

import itertools
import logging
import random
import shutil
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from fusestore.config.node_identity import IDENTITY_NAME
from fusestore.config.owner_record import OWNER_NAME
from fusestore.config.store_config import CONFIG_NAME, StoreConfig, load
from fusestore.errors import ConfigError, FusestoreError, NotDurableError
from fusestore.files.filesystem import FileSystem
from fusestore.members.standing import State as NodeState
from fusestore.serve.offline import unwrapped
from fusestore.store.opening import open_store
from support.faults import BadSectors
from support.metadata_rows import check
from support.opened_store import (
    Opened,
    healthy,
    limited,
    make,
    make_with_two_nodes_a_region,
    opened,
    repair,
    scrub,
)
from support.processes import in_child
from support.recovery import copy_tree, recovered
from support.rot import World, choose, lost_files, map_of, spoil, usable_nodes
from support.whole_tree import State, difference, look, made, put

SMALL_FILES = (f"/{IDENTITY_NAME}", f"/{OWNER_NAME}", CONFIG_NAME)
"""Files that people can put right."""
SECONDS_MAX = 90
LONG_SECONDS = 1800
SHORT_SECONDS = 40


# --- the store ---------------------------------------------------------------------------


async def live(config: StoreConfig, crash: Path) -> tuple[World, World]:
    """A life of several mounts; the store as the last one left it, and before, as a crash did."""
    async with opened(config) as one:
        await put(one, made("first", "a", "b", "c", size=90_000))
        await put(one, made("first", "big", size=1_400_000))
        await put(one, {"tiny": b"tiny" * 30, "empty": b""})
        await one.checkpoint()
        one.delete("b")
        await one.store.dumper.take()
    async with opened(config) as one:
        await put(one, made("second", "c", "d", "wide", size=250_000))
        ino = one.files.tree.lookup(1, b"d")
        assert ino is not None
        one.files.attributes.set(ino, b"user.note", b"note" * 100)
        await one.store.committer.commit()
        await one.checkpoint()
    async with opened(config) as one:
        await put(one, made("third", "e", size=120_000))
        await one.checkpoint()
        for number in range(5):
            await put(one, made(f"third{number}", f"late{number}", size=3000 + 30_000 * number))
        await one.put("a", b"changed" * 100, 40_000)
        await one.store.committer.commit()
        crashed = map_of(one, config, await look(one))
        copy_tree(config.store, crash)
    async with opened(config) as one:
        await one.checkpoint()
        return map_of(one, config, await look(one)), crashed


@pytest.fixture(scope="module", params=["2+1", "1+2", "4+2"])
def worlds(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Path, World]]:
    base = tmp_path_factory.mktemp("rot")
    make_one = make_with_two_nodes_a_region if request.param == "4+2" else make
    config = make_one(base / "store", request.param)
    rest, crash = trio.run(live, config, base / "crash")
    return [(config.store, rest), (base / "crash", crash)]


# --- a case ------------------------------------------------------------------------------


class Tracebacks(logging.Handler):
    """What was logged; a traceback is a fault."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.bugs: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")
        if record.exc_info:
            self.bugs.append(self.format(record))


class Case:
    """A damaged store, and what is done with it."""

    def __init__(self, seed: int, worlds: list[tuple[Path, World]], place: Path) -> None:
        self.chance = random.Random(seed)
        self.original, self.world = self.chance.choice(worlds)
        self.recorded = self.world.config.store
        self.place = place
        copy_tree(self.original, place / "store")
        self.config = self._limited(load(place / "store"))
        self.world = replace(self.world, config=self.config)
        self.damages = choose(self.config, self.chance)
        self.steps: list[str] = []
        self.log = Tracebacks()
        self.expected = self.world.state
        self.taken = 0

    @staticmethod
    def _limited(config: StoreConfig) -> StoreConfig:
        return limited(config, retry_seconds_min=0.01, retry_seconds_max=0.1, probe_seconds=0.1)

    def run(self) -> str:
        logger = logging.getLogger("fusestore")
        logger.handlers[:] = [self.log]
        logger.propagate = False
        remaps = self.chance.random() < 0.5
        self.steps.append(", ".join(map(str, self.damages)) + (" (remaps)" if remaps else ""))
        try:
            with BadSectors(remaps=remaps) as self.bad:
                live = not self.hit("data.mdb") and self.chance.random() < 0.4
                trio.run(self._live, live)
        except BaseException as error:
            told = "\n  ".join([*self.steps, *self.log.lines[-25:]])
            error.add_note(f"{self.original.name}:\n  {told}")
            raise
        return "; ".join(self.steps)

    async def _live(self, under_a_mount: bool) -> None:
        """Damage, a few steps of life, and the end."""
        if under_a_mount:
            with trio.fail_after(SECONDS_MAX):
                await self.damaged_meanwhile()
        else:
            self.spoil()
        steps: list[Callable[[], Awaitable[None]]] = [
            self.mount,
            self.mount_read_only,
            self.scrub,
            self.repair,
            self.recover,
            self.fsck,
            self.fsck_repair,
            self.write,
        ]
        for _ in range(self.chance.choice([1, 1, 2, 3])):
            step = self.chance.choice(steps)
            self.steps.append(step.__name__)
            with trio.fail_after(SECONDS_MAX):
                await step()
        await self.end()
        assert not self.log.bugs, self.log.bugs

    def spoil(self) -> None:
        """Do the damage."""
        spoil(self.config, self.damages, self.bad, self.chance)

    async def damaged_meanwhile(self) -> None:
        """The damage comes while the store is open."""
        self.steps.append("damaged while it was mounted")
        with self.may_break():
            await self._damaged_meanwhile()

    @contextmanager
    def may_break(self) -> Iterator[None]:
        """A mount that too few nodes are left for may fail to commit, and no other."""
        try:
            yield
        except (NotDurableError, BaseExceptionGroup) as raised:
            error = unwrapped(raised) if isinstance(raised, BaseExceptionGroup) else raised
            if not isinstance(error, NotDurableError) or not self.may_refuse():
                raise
            self.steps.append(f"broke: {error}")

    async def _damaged_meanwhile(self) -> None:
        async with opened(self.config) as one:
            if self.chance.random() < 0.5:
                self.judge(await look(one), intact=True)
            self.spoil()
            self.judge(await look(one))
            if self.chance.random() < 0.5:
                await self.written(one)
            if self.chance.random() < 0.5:
                await self.scrubbed(one)
            self.judge(await look(one))
            self.blames(one)

    # --- what may be ---------------------------------------------------------------------

    def spoiled(self, name: str) -> bool:
        return any(damage.node == name for damage in self.damages)

    def hit(self, part: str) -> bool:
        return any(part in damage.file for damage in self.damages)

    def judge(self, found: State, *, intact: bool = False) -> None:
        """Nothing wrong was read, and all that can be read."""
        usable = usable_nodes(self.config, self.original)
        lost = set() if intact else lost_files(self.world, self.damages, usable)
        for ino, data in found.contents.items():
            expected = self.expected.contents.get(ino)
            if data is None:
                new = ino not in self.world.extents
                may_be = len({damage.node for damage in self.damages}) > 1 if new else ino in lost
                assert may_be, f"inode {ino} could have been read"
            else:
                assert data == expected, f"inode {ino}: WRONG BYTES"
        told = difference(State(found.names, {}), State(self.expected.names, {}))
        assert found.names == self.expected.names, told

    def blames(self, one: Opened) -> None:
        """Sound nodes are in use."""
        for member in one.store.log.members.all:
            if not self.spoiled(member.name):
                assert member.state is NodeState.UP, f"{member.name}: {member.standing.error}"

    def may_refuse(self) -> bool:
        """Whether a mount or a command may be refused."""
        if self.hit(CONFIG_NAME):
            return True
        usable = usable_nodes(self.config, self.original)
        usable -= {damage.node for damage in self.damages if damage.kind == "gone"}
        regions = {node.region for node in self.config.nodes if node.name in usable}
        return len(regions) < 2

    # --- what is done --------------------------------------------------------------------

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Opened | None]:
        """The store; None when it may be refused, and is.  Advice to recover is followed."""
        for _ in range(2):
            entered = False
            try:
                config = self._limited(load(self.config.store))
                async with opened(config) as one:
                    entered = True
                    yield one
                return
            except (FusestoreError, BaseExceptionGroup) as raised:
                error = unwrapped(raised) if isinstance(raised, BaseExceptionGroup) else raised
                if entered or not isinstance(error, FusestoreError):
                    raise
                self.steps.append(f"refused: {error}")
                if self.may_refuse():
                    break
                advised = self.hit("data.mdb") and "fusestore recover" in str(error)
                assert advised, f"refused: {error}"
                if not await self._recovered():
                    break
        yield None

    async def mount(self) -> None:
        async with self.opened() as one:
            if one is not None:
                self.judge(await look(one))
                await trio.sleep(self.chance.choice([0, 0.1, 0.4]))
                self.judge(await look(one))
                self.blames(one)

    async def mount_read_only(self) -> None:
        try:
            config = self._limited(load(self.config.store))
            async with (
                open_store(config, read_only=True) as store,
                trio.open_nursery() as nursery,
            ):
                self.judge(await look(Opened(store, FileSystem(store, nursery))))
                self.blames(Opened(store, FileSystem(store, nursery)))
        except (FusestoreError, BaseExceptionGroup) as raised:
            error = unwrapped(raised) if isinstance(raised, BaseExceptionGroup) else raised
            if not isinstance(error, FusestoreError):
                raise
            self.steps.append(f"refused: {error}")
            advised = self.hit("data.mdb") and "fusestore recover" in str(error)
            assert self.may_refuse() or advised

    async def write(self) -> None:
        async with self.opened() as one:
            if one is None:
                return
            self.judge(await look(one))
            await self.written(one)

    async def written(self, one: Opened) -> None:
        """A new file, durable."""
        self.taken += 1
        name = f"new{self.taken}"
        data = self.chance.randbytes(self.chance.choice([100, 40_000, 300_000]))
        await put(one, {name: data})
        now = await look(one)
        ino = one.files.tree.lookup(1, name.encode())
        assert ino is not None
        self.expected = State(now.names, {**self.expected.contents, ino: data})
        self.judge(now)

    async def scrub(self) -> None:
        async with self.opened() as one:
            if one is None:
                return
            await self.scrubbed(one)
            self.judge(await look(one))
            self.blames(one)

    async def scrubbed(self, one: Opened) -> None:
        found = await scrub(one)
        self.steps.append(f"scrub: {found['found']} found, {found['left']} left")
        assert found["state"] == "done", found

    async def repair(self) -> None:
        async with self.opened() as one:
            if one is None:
                return
            name = self.chance.choice([node.name for node in self.config.nodes])
            self.steps.append(name)
            refused = ""
            try:
                await repair(one, name)
            except FusestoreError as error:
                refused = str(error)
            self.steps.append(refused or "repaired")
            assert not refused or self.spoiled(name), refused
            self.judge(await look(one))
            self.blames(one)

    async def recover(self) -> None:
        await self._recovered()

    async def _recovered(self) -> bool:
        """The metadata is gone, and comes from the nodes."""
        kept = self.place / f"metadata{len(self.steps)}"
        self.config.metadata.rename(kept)
        try:
            load(self.config.store)
        except ConfigError as error:
            self.steps.append(f"moved away: {error}")
            (self.config.store / CONFIG_NAME).rename(self.place / f"toml{len(self.steps)}")
        for accept_loss in (False, True):
            try:
                report = recovered(self.config, accept_loss=accept_loss)
            except FusestoreError as error:
                self.steps.append(f"recover refused: {error}")
                refused = error
            else:
                self.steps.append(f"recovered to {report['commit']}")
                self._move_places()
                return True
            assert self.hit(CONFIG_NAME) or self.unsure(), refused
            if "--accept-loss" not in str(refused):
                break
        shutil.rmtree(self.config.metadata, ignore_errors=True)
        kept.rename(self.config.metadata)
        return False

    def _move_places(self) -> None:
        """Nodes that are away are recorded where they were; the store has moved since."""
        file = self.config.store / CONFIG_NAME
        text = file.read_text().replace(f"{self.recorded}/", f"{self.config.store}/")
        file.write_text(text)

    def unsure(self) -> bool:
        """Whether nodes that are away, or whose journal is damaged, may have gone on alone."""
        usable = usable_nodes(self.config, self.original)
        away = {node.name for node in self.config.nodes if node.name not in usable}
        damaged = {d.node for d in self.damages if "journal" in d.file or d.kind == "gone"}
        return len(away | damaged) >= self.config.code.k

    async def fsck(self) -> None:
        await self._fsck(repair=False)

    async def fsck_repair(self) -> None:
        await self._fsck(repair=True)

    async def _fsck(self, *, repair: bool) -> None:
        refused = None
        try:
            result = await check(self._limited(load(self.config.store)), repair=repair)
        except FusestoreError as error:
            refused = error
        if refused is not None:
            self.steps.append(f"refused: {refused}")
            advised = self.hit("data.mdb") and "fusestore recover" in str(refused)
            assert self.may_refuse() or advised
            return
        self.steps.append(f"found {result['findings'][:3]}, left {result['left'][:3]}")

    # --- the end -------------------------------------------------------------------------

    async def end(self) -> None:
        """What people can put right is put right; then all is as before, but what was lost."""
        self.steps.append("end")
        if self.chance.random() < 0.5:
            self.bad.clear()
            self.steps.append("readable again")
            self.damages = [d for d in self.damages if d.kind != "unreadable"]
        for damage in self.damages:
            if damage.file.endswith(SMALL_FILES):
                (self.config.store / damage.file).unlink(missing_ok=True)
                shutil.copy(self.original / damage.file, self.config.store / damage.file)
        self.damages = [d for d in self.damages if not d.file.endswith(SMALL_FILES)]
        if self.hit("data.mdb"):  # LMDB may write to the bad page, and disks remap it then
            self.bad.clear(self.config.metadata / "data.mdb")
        lost = lost_files(self.world, self.damages, usable_nodes(self.config, self.original))
        with trio.fail_after(SECONDS_MAX):
            async with self.opened() as one:
                if one is None:
                    return
                self.judge(await look(one))
                for member in one.store.log.members.all:
                    if member.state is not NodeState.UP and self.spoiled(member.name):
                        await repair(one, member.name)
                assert (await scrub(one))["state"] == "done"
                if not lost:
                    with trio.fail_after(15):
                        await healthy(one)
                    found = await scrub(one)
                    assert (found["found"], found["left"], found["unread"]) == (0, 0, 0), found
                self.judge(await look(one))
                told = (await one.store.status())["nodes"]
                assert all(node["state"] == "up" for node in told), told
            if not lost:
                await self._bears()

    async def _bears(self) -> None:
        """What is healthy bears the loss of any region."""
        for region in dict.fromkeys(node.region for node in self.config.nodes):
            gone = [node.path for node in self.config.nodes if node.region == region]
            for path in gone:
                path.rename(path.with_name(path.name + ".away"))
            async with (
                open_store(self.config, read_only=True) as store,
                trio.open_nursery() as nursery,
            ):
                found = await look(Opened(store, FileSystem(store, nursery)))
            assert found.contents == self.expected.contents, f"without {region}"
            for path in gone:
                path.with_name(path.name + ".away").rename(path)


@pytest.mark.timeout(LONG_SECONDS)
def test_rot(
    worlds: list[tuple[Path, World]], tmp_path: Path, request: pytest.FixtureRequest, long: bool
) -> None:
    seconds = (LONG_SECONDS if long else SHORT_SECONDS) / 3
    base = request.config.getoption("--model-seed") * 1_000_000
    until = time.monotonic() + seconds
    failures: list[str] = []
    for seed in itertools.count(base):
        if time.monotonic() > until:
            break
        place = tmp_path / f"s{seed}"
        place.mkdir()
        try:
            print(f"seed {seed}:", in_child(lambda s=seed, p=place: Case(s, worlds, p).run()))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"seed {seed}: {''.join(traceback.format_exception(error))[-6000:]}")
            print(failures[-1], flush=True)
        shutil.rmtree(place, ignore_errors=True)
    assert not failures, f"{len(failures)} of {seed - base} failed:\n" + "\n".join(failures[:5])
