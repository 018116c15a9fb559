"""The n-th operation fails, whichever it is: an error that is told, or a success that lasts.

A store that a power cut left is mounted, worked on and unmounted in this process (see
`power_cut`), again and again: each time another operation of a node, or another transaction of
the metadata, is the one that fails, once or for good.  `test_2_log` has the first form of this,
for the writes and flushes of plain commits; here it is every operation of a mount, of work, of
reclaiming, metadata dumps, repair and unmount.

The fault model: an operation raises an error (EIO, ENOSPC), a write may have left any first
part of its bytes, a flush that failed has flushed nothing for certain, and a transaction of the
metadata that failed has happened or not.  Then the power is cut, too.  With `--long` every n
has its turn, else a few.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import pytest
import trio

from fusestore.config.store_config import StoreConfig
from fusestore.errors import FusestoreError, LostError, MetadataError, NodeError, NodeFullError
from fusestore.format.file_rows import ROOT
from fusestore.limits import Limits
from support.cuts import Cut
from support.logs import (
    AS_TOLD,
    CHECKPOINT_FAILED,
    CORRUPT,
    DROPPED,
    LOST_STRIPE,
    NOT_WHERE_ITS_ROW_SAYS,
    OUT_OF_USE,
    TOO_FEW_NODES,
    UNREAD_FILE,
)
from support.machine import Machine, told
from support.opened_store import Opened, make, opened
from support.power_cut import Health, Possible, Promised, Tape, read_disks, write_disks
from support.random_work import History, Player, small_limits, work
from support.tree_model import Model, State, match, observe

pytestmark = pytest.mark.expects_log(
    AS_TOLD,
    LOST_STRIPE,
    UNREAD_FILE,
    NOT_WHERE_ITS_ROW_SAYS,
    DROPPED,
    CHECKPOINT_FAILED,
    r"commit\.metadata_dump: No metadata dump",
    OUT_OF_USE,
    TOO_FEW_NODES,
    CORRUPT,
    r"Segment \d+ of node \S+ is not of this store",  # its header is torn
)

SHORT = 7
"""How many n have their turn in the short form of each test."""
PARTS = 8
"""Into so many tests the long form of each is divided."""
STEPS = 12


# --- faults ------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What fails."""

    nth: int
    """The number of the operation, of all nodes or of the metadata, from 1 on."""
    for_good: bool = False
    """Whether all that the same node is asked from then on fails, too."""
    full: bool = False
    """Whether it is room that is missing."""
    second: int = 0
    """So many operations later another node fails for good; 0: none does."""


class FaultyMachine(Machine):
    """A machine of which an operation of a node fails."""

    def __init__(self, config: StoreConfig, chance: random.Random, fault: Fault) -> None:
        super().__init__(config, chance)
        self.fault = fault
        self.operations = 0
        self.failed: dict[str, str] = {}
        """By node that failed: what it was doing."""

    def operate(self, name: str, kind: str) -> NodeError | None:
        """See Machine."""
        self.operations += 1
        first, second = self.fault.nth, self.fault.nth + self.fault.second
        another = bool(self.fault.second) and self.operations >= second and len(self.failed) == 1
        if self.operations == first or (another and name not in self.failed):
            self.failed[name] = kind
            self.tape.events.append(Health(name, False))
        elif not (self.fault.for_good and name in self.failed):
            return None
        if self.fault.full and kind in ("write", "flush"):
            return NodeFullError(f"no room for the {kind}, as told")
        return NodeError(f"the {kind} failed, as told")


class FaultyMetadata(Machine):
    """A machine of which a transaction of the metadata fails."""

    CAUSES = (
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        lmdb.MapFullError("MDB_MAP_FULL, as told"),
    )

    def __init__(
        self, config: StoreConfig, chance: random.Random, nth: int, times: int, written: bool
    ) -> None:
        super().__init__(config, chance)
        self.nth = nth
        self.times = times
        self.written = written
        """Whether what fails is the very last step, when all is written already."""
        self.transactions = 0

    def before_checkpoint(self) -> None:
        """See Machine."""
        self.transactions += 1
        if not self.written:
            self._fail()

    def after_checkpoint(self) -> None:
        """See Machine."""
        if self.written:
            self._fail()

    def _fail(self) -> None:
        if self.nth <= self.transactions < self.nth + self.times:
            cause = self.CAUSES[self.transactions % len(self.CAUSES)]
            raise MetadataError(f"The metadata: {cause}.") from cause


# --- what is done ------------------------------------------------------------------


@dataclass
class Start:
    """Disks that a power cut left, and the trees that may be on them."""

    disks: Tape
    origin: StoreConfig
    states: list[State]


async def read_model(one: Opened) -> Model:
    """The model of a tree that is there."""
    model, tree = Model(), one.files.tree

    async def walk(ino: int, path: str) -> None:
        inode = tree.inode(ino)
        model.paths[path], model.modes[ino] = ino, inode.mode
        if stat.S_ISREG(inode.mode):
            model.data[ino] = bytes(await one.files.contents.read(ino, 0, 1 << 40))
        elif stat.S_ISLNK(inode.mode):
            model.data[ino] = tree.target(ino)
        attributes = one.files.attributes
        model.attributes[ino] = {name: attributes.get(ino, name) for name in attributes.names(ino)}
        for _, child, name in list(tree.entries(ino, 0)):
            await walk(child, f"{path}/{name.decode()}")

    await walk(int(ROOT), "")
    return model


def start(
    place: Path, seed: str, limits: Limits, hurt: Callable[[Tape], None] | None = None
) -> Start:
    """Disks as a power cut late in some work leaves them."""
    chance = random.Random(seed)
    history = work(make(place / "origin", limits=limits), chance, steps=40, illness=None)
    at = len(history.tape.events) * 3 // 4
    disks = history.tape.cut(at, chance)
    oldest, newest = history.tape.bounds(at)
    states = history.states[oldest : newest + 1]
    if hurt is not None:  # after an unmount: what was not acknowledged may need every node
        config = write_disks(disks, history.config, place / "look")
        state, _ = Cut(history, at, chance, place).mount(config)
        disks, states = read_disks(config), [state]
        hurt(disks)
    return Start(disks, history.config, states)


class Stubborn(Player):
    """Goes on when an operation fails, and keeps the errors."""

    errors: list[Exception]

    @contextmanager
    def bearing(self) -> Iterator[None]:
        """Keep what is raised, if it is an error of the store."""
        try:
            yield
        except FusestoreError as error:
            self.errors.append(error)

    async def step(self) -> None:
        with self.bearing():
            await super().step()

    async def commit(self) -> None:
        with self.bearing():
            await super().commit()

    async def checkpoint(self) -> None:
        with self.bearing():
            await super().checkpoint()

    async def _dump(self) -> None:
        with self.bearing():
            await super()._dump()

    async def repair(self, name: str) -> None:
        with self.bearing():
            done = await self.one.store.repairer.repair(name, lambda message: None)
            if done["unrepairable"]:
                self.errors.append(LostError(f"unrepairable: {done['unrepairable']}"))

    async def look(self) -> None:
        """Note when the nodes have healed from what the power cut did."""
        tape = self.machine.tape
        if tape.ill(len(tape.events)) and (await self.one.store.status())["healthy"]:
            failed = getattr(self.machine, "failed", {})
            names = [node.name for node in self.machine.config.nodes if node.name not in failed]
            tape.events += [Health(name, True) for name in names]

    async def everything(self, repaired: str | None) -> None:
        """A bit of all that a mount does, and what was written is what is read."""
        if repaired is not None:
            self.background.start_soon(self.repair, repaired)
        for number in range(STEPS):
            await self.step()
            await self.look()
            if number % 4 == 3:
                await self.commit()
        await self.checkpoint()
        await self._dump()
        with self.bearing():
            for _ in range(3):
                await self.unlink()
            await self.close_unused()
        await self.checkpoint()
        await trio.sleep(30)
        with self.bearing():
            assert await observe(self.one) == self.states[-1]


@dataclass
class Run:
    """What came of a run with a fault."""

    machine: Machine
    states: list[State]
    errors: list[Exception]
    """Those that were told; none when all went well."""


def run(begin: Start, machine: Machine, chance: random.Random, repaired: str | None = None) -> Run:
    """Mount, work, unmount; every error must be one of the store's own."""
    errors: list[Exception] = []
    states = list(begin.states)

    async def main() -> None:
        async with opened(machine.config) as one, trio.open_nursery() as background:
            found = await observe(one)
            match(found, states, 0, len(states) - 1)
            player = Stubborn(machine, one, background, chance, states, await read_model(one))
            player.errors = errors
            player.begin()
            player.end()
            player.promised(len(states) - 1)
            await player.everything(repaired)
        machine.tape.events.append(Promised(len(states) - 1))

    machine.tape.events.append(Possible(len(states) - 1))
    # Until they have healed from the power cut, the loss of a node may be one too many.
    machine.tape.events += [Health(node.name, False) for node in machine.config.nodes]
    with machine:
        try:
            machine.run(main)
        except* FusestoreError as group:
            errors.append(group)
    return Run(machine, states, errors)


def check(done: Run, chance: random.Random, place: Path) -> None:
    """What was acknowledged is there: when it is mounted again, and after a power cut."""
    tape = done.machine.tape
    history = History(tape, done.states, done.machine.config)
    last = len(tape.events) - 1
    oldest = tape.bounds(len(tape.events))[0]
    with told(f"errors: {done.errors}\n{tape.around(last)}"):
        cut = Cut(history, last, chance, place / "cut")
        with told("mounted again as it is"):
            found, _ = cut.mount(history.config, wait=True)
            match(found, done.states, oldest, len(done.states) - 1)
        Cut(history, chance.randrange(last // 2, last), chance, place / "cut").check()
        Cut(history, last, chance, place / "cut").check()


def sample(count: int, part: int | None, chance: random.Random) -> list[int]:
    """The n that have their turn: a part of all, or a few."""
    if part is not None:
        return list(range(1 + part, count + 1, PARTS))
    return sorted(chance.sample(range(1, count + 1), min(SHORT, count)))


@dataclass
class Campaign:
    """The same work again and again, with another fault each time."""

    place: Path
    seed: int
    name: str
    hurt: Callable[[Tape], None] | None = None
    repaired: str | None = None

    def begin(self) -> Start:
        """Where each run starts."""
        limits = small_limits(random.Random(f"{self.seed} limits {self.name}"))
        return start(self.place / "start", f"{self.seed} start {self.name}", limits, self.hurt)

    def attempt(
        self, begin: Start, machine: Callable[[StoreConfig, random.Random], Machine], label: str
    ) -> Run:
        """One run, in a directory of its own."""
        chance = random.Random(f"{self.seed} {self.name}")
        config = write_disks(begin.disks, begin.origin, self.place / label)
        return run(begin, machine(config, chance), chance, self.repaired)

    def nodes(self, part: int | None, variants: list[dict[str, Any]], safe: bool) -> None:
        """Let each operation of the nodes fail; `safe`: it must never be noticed."""
        begin = self.begin()
        whole = self.attempt(begin, partial(FaultyMachine, fault=Fault(0)), "whole")
        assert whole.errors == []
        assert isinstance(whole.machine, FaultyMachine)
        chance = random.Random(f"{self.seed} {self.name} {part}")
        for nth in sample(whole.machine.operations, part, chance):
            fault = Fault(nth, **variants[nth % len(variants)])
            with told(f"--model-seed {self.seed}, {self.name}, {fault}"):
                machine = partial(FaultyMachine, fault=fault)
                done = self.attempt(begin, machine, f"run{nth}")
                assert isinstance(done.machine, FaultyMachine)
                with told(f"failed: {done.machine.failed}"):
                    assert not (safe and done.errors)
                    check(done, chance, self.place / f"run{nth}-after")


ONE_NODE: list[dict[str, Any]] = [
    {},
    {"for_good": True},
    {"full": True},
    {"for_good": True, "full": True},
    {},
]
TWO_NODES: list[dict[str, Any]] = [
    {"for_good": True, "second": later} for later in (1, 7, 60, 200, 500)
]


def wipe_one(tape: Tape) -> None:
    """A node's disk is new."""
    tape.disks["us-west-1"].identity = None
    tape.disks["us-west-1"].files.clear()


def parts(test: Callable[..., None]) -> Any:
    """Short: a few n in one test; long: all of them, in several."""
    long = [pytest.param(part, marks=pytest.mark.long) for part in range(PARTS)]
    return pytest.mark.parametrize("part", [None, *long])(test)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--model-seed"))


@parts
def test_whatever_a_node_fails_at_is_never_noticed(
    part: int | None, seed: int, tmp_path: Path
) -> None:
    Campaign(tmp_path, seed, "one").nodes(part, ONE_NODE, safe=True)


@parts
def test_more_failures_than_the_code_bears_are_told(
    part: int | None, seed: int, tmp_path: Path
) -> None:
    Campaign(tmp_path, seed, "two").nodes(part, TWO_NODES, safe=False)


@parts
def test_whatever_fails_in_a_repair_is_told(part: int | None, seed: int, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, seed, "repair", wipe_one, "us-west-1")
    campaign.nodes(part, ONE_NODE, safe=False)


@parts
def test_whatever_the_metadata_fails_at_is_told(
    part: int | None, seed: int, tmp_path: Path
) -> None:
    campaign = Campaign(tmp_path, seed, "metadata")
    chance = random.Random(f"{seed} metadata {part}")
    begin = campaign.begin()
    whole = campaign.attempt(begin, partial(FaultyMetadata, nth=0, times=0, written=False), "whole")
    assert whole.errors == []
    assert isinstance(whole.machine, FaultyMetadata)
    count = whole.machine.transactions
    cases = [
        (nth, times, written)
        for nth in range(1, count + 1)
        for times in (1, 2, 3, 1000)
        for written in (False, True)
    ]
    for number in sample(len(cases), part, chance):
        nth, times, written = cases[number - 1]
        label = f"transaction {nth} fails {times} times, {'after' if written else 'before'} all"
        with told(f"--model-seed {seed}, {label}"):
            machine = partial(FaultyMetadata, nth=nth, times=times, written=written)
            done = campaign.attempt(begin, machine, f"run{number}")
            check(done, chance, tmp_path / f"run{number}-after")
