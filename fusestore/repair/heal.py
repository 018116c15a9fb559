"""Healing: nodes get the shards that `missing` says they lack.

Only one node at a time is healed, rebuilt or brought back; the task that does it holds `busy`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import trio

from ..commit.committer import Committer
from ..errors import FusestoreError, MetadataError, NodeError, NodeFullError
from ..format import keys, stripe_rows
from ..log.log import Log
from ..log.pace import Pace
from ..members.member import Member
from ..members.standing import State
from ..read.reader import Reader
from .rebuild import Rebuilder

Progress = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Running:
    """A repair under way."""

    node: int
    by_itself: bool
    """It is automatic: a node came back, or lacks some shards."""
    phase: str = "begin"
    """begin, journal, shards or healing."""
    since: float = 0.0
    """When the phase began, by the monotonic clock."""
    done: int = 0
    total: int = 0
    """Bytes of the phase.  For healing: shards, and a total of 0; `missing` has the rest."""

    def enter(self, phase: str, done: int, total: int) -> None:
        """Record the progress."""
        if phase != self.phase:
            self.phase, self.since = phase, time.monotonic()
        self.done, self.total = done, total


class Healer:
    """Rebuilds shards that nodes are known to lack."""

    def __init__(self, log: Log, reader: Reader, committer: Committer) -> None:
        self._log = log
        self._committer = committer
        self.rebuilder = Rebuilder(log, reader)
        self.busy = trio.Lock()
        """Held while a node is brought back or shards are healed or moved."""
        self.running: Running | None = None
        """The repair or healing under way."""

    @contextmanager
    def following(self, member: Member, progress: Progress | None = None) -> Iterator[Progress]:
        """Keep `running` up to date during a repair, and pass progress on to the caller."""
        outer = self.running
        running = self.running = outer or Running(member.id, by_itself=progress is None)

        def tell(message: dict[str, Any]) -> None:
            running.enter(message["phase"], message["done"], message["total"])
            if progress is not None:
                progress(message)

        try:
            yield tell
        finally:
            self.running = outer

    def lacks(self, member: Member) -> Iterator[int]:
        """The stripes of which a node is known to lack a shard."""
        prefix = stripe_rows.missing_prefix(member.id)
        for key, _ in self._log.engine.scan(prefix, keys.after(prefix)):
            yield stripe_rows.decode_missing_key(key)[1]

    async def heal_all(self) -> None:
        """Rebuild the shards that nodes which are up lack."""
        async with self.busy:
            for member in self._log.members.all:
                if member.state is State.UP:
                    try:
                        await self.heal(member, Pace(self._log))
                    except MetadataError:
                        raise  # no node is to blame for it
                    except NodeFullError as error:
                        member.note_full(error)
                    except FusestoreError as error:
                        self.give_up(member, error)

    def give_up(self, member: Member, error: Exception) -> None:
        """Take a failed node out of use, and ask for a commit that records this."""
        member.fail(error)
        self._committer.ask()

    async def look_at(self, member: Member) -> None:
        """Check now whether a node still answers."""
        if not member.out_of_use:
            try:
                await member.call(member.sample)
            except NodeError as error:
                self.give_up(member, error)

    async def heal(self, member: Member, pace: Pace | None = None) -> tuple[int, int]:
        """Rebuild a node's shards in `missing`; (shards, bytes) rebuilt; NodeError."""
        if next(self.lacks(member), None) is None:
            return 0, 0
        with self.following(member):
            healed = await self._heal(member, pace)
        self._committer.ask()  # until then, a crash makes them missing again
        return healed

    async def _heal(self, member: Member, pace: Pace | None) -> tuple[int, int]:
        shards = size = 0
        start = prefix = stripe_rows.missing_prefix(member.id)
        batch = self._log.limits.repair_batch
        while True:
            if self.running is not None:
                self.running.enter("healing", shards, 0)
            rows = list(islice(self._log.engine.scan(start, keys.after(prefix)), batch))
            if not rows:
                return shards, size
            start = rows[-1][0] + b"\0"
            wanted: dict[int, list[int]] = {}
            for key, _ in rows:
                _, number, index = stripe_rows.decode_missing_key(key)
                row = self._log.stripe(number)
                here = [place.node for place in row.shards] if row is not None else []
                if here[index : index + 1] == [member.id]:
                    wanted.setdefault(number, []).append(index)
                else:  # it moved meanwhile
                    self._log.apply({key: None})
            if pace is not None:
                await pace.spend(sum(self.rebuilder.cost(number) for number in wanted))
            more = await self.rebuilder.rebuild(member, wanted)
            shards, size = shards + more[0], size + more[1]
