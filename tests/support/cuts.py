"""One cut of a history: the disks that it leaves are mounted, cut again, and lose a region."""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from fusestore.config.store_config import StoreConfig
from fusestore.errors import FusestoreError, ReplayError
from fusestore.files.filesystem import FileSystem
from fusestore.store.opening import open_store
from support.machine import Machine, told
from support.opened_store import Opened, opened
from support.power_cut import Health, Promised, Tape, write_disks
from support.random_work import History, healthy
from support.tree_model import State, match, observe


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
        allowed = ["depends on nodes that are away", "no available node holds it"]
        if not disks.metadata:
            allowed.append("A new store needs all of its nodes")
        if not any(reason in str(error) for reason in allowed):
            raise error
