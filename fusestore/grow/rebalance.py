"""Shards move between nodes: away from nodes that are drained, and to even the load.

A shard is written to its new node, flushed, read back and verified (repair/rebuild.py).
One step then puts the new place into the stripe's row, and the old place into
`reclaim`; its room is freed after the checkpoint that holds both.  A kill at any moment
therefore leaves each shard at one place or the other, and the work continues from the
rows.

1. Draining comes first, as long as the configuration has a node to drain.  A shard
   stays in its region while a node there may take it.
2. A running rebalance moves shards within a region, from nodes above their share to
   nodes below it.  At first it moves only shards that placement would now put
   elsewhere, which spreads the moves over all stripes; then any, until no move is an
   improvement.  Two shards of a stripe on one node are separated when another node may
   take one.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import trio

from ..commit.committer import Committer
from ..errors import FusestoreError, LostError, NodeError, NodeFullError
from ..format import store_rows
from ..format.stripe_rows import Stripe
from ..log.background_job import BackgroundJob, JobRow, Progress
from ..log.log import Log
from ..log.pace import Pace
from ..members.member import Member
from ..members.standing import State
from ..repair.repairer import Repairer
from ..text import counted
from .balance import BALANCED, Balance, Census, Draining, Moves, take_census

logger = logging.getLogger(__name__)

_Shard = tuple[int, Stripe, int]
"""A stripe's number, its row, and the index of a shard."""


REFUSALS = {
    "begin": "A rebalance is running already: wait for it, or stop it.",
    "stop": "No rebalance is running.",
}


@dataclass(slots=True)
class Rebalance(JobRow):
    """The state of a rebalance, or the result of the last one."""

    shards: int = 0
    size: int = 0
    """Shards moved, and their bytes."""
    total: int = 0
    """About how many bytes are to be moved."""
    error: str = ""
    """Why shards that are to be moved cannot be moved now, for people."""


class Rebalancer:
    """Moves shards in the background."""

    def __init__(self, log: Log, committer: Committer, repairer: Repairer) -> None:
        self._log = log
        self._limits = log.limits
        self._committer = committer
        self._repairer = repairer
        self.job = BackgroundJob(log, store_rows.REBALANCE_KEY, Rebalance, REFUSALS)
        self.drained: set[int] = set()
        """Nodes to drain that were found empty."""
        self.stuck: dict[int, str] = {}
        """By node: why draining it does not continue."""
        self._notes: dict[int, str] = {}
        """By node: why some of its shards were not moved in this pass."""
        self.moved: Counter[int] = Counter()
        """By node: bytes moved away since the store was opened."""

    @property
    def row(self) -> Rebalance:
        """The state of the current or last rebalance."""
        return self.job.row

    # --- commands ------------------------------------------------------------

    async def command(
        self, action: str, rate: float | None, *, wait: bool, progress: Progress
    ) -> dict[str, Any]:
        """Start or stop a rebalance, or report its state; with `wait`, after it ended.

        With `wait`, NodeError if it cannot continue now; it is retried automatically.
        """
        if action != "status":
            self._log.transaction()  # raises if the store cannot be changed
        if action == "start":
            if not (wait and self.job.is_running):
                self.job.begin(Rebalance(rate=rate))
            self.row.error = ""
            self.job.note()
        elif action == "stop":
            self.job.stop()
        if action != "status":
            self.job.wake()
            await self._committer.commit()
        if wait:
            await self.job.wait(self._progress, progress)
        return asdict(self.row)

    def _progress(self) -> dict[str, Any]:
        if self.row.error:
            raise NodeError(f"Shards cannot be moved now, and are retried: {self.row.error}")
        return {
            "phase": "rebalance",
            "done": self.row.size,
            "total": max(self.row.total, self.row.size),
        }

    def wake(self) -> None:
        """Check now: there may be shards to move."""
        self.job.wake()

    # --- the work ------------------------------------------------------------

    async def run(self) -> None:
        """Drain and rebalance, until cancelled."""
        while True:
            moved = 0
            try:
                if not self._log.broken and self._to_drain():
                    moved += await self._drain()
                if not self._log.broken and self.job.is_running:
                    moved += await self._rebalance()
            except FusestoreError as error:
                logger.error("Shards could not be moved; this will be tried again: %s", error)
            if not moved:
                await self.job.changed(self._limits.probe_seconds)

    def _to_drain(self) -> list[Member]:
        draining = [member for member in self._log.members.all if member.config.draining]
        self.drained.intersection_update(member.id for member in draining)
        return [member for member in draining if member.id not in self.drained]

    async def _drain(self) -> int:
        """Make one pass over all stripes; the number of moved shards."""
        draining = {member.id: member.config for member in self._to_drain()}
        # Shards that were being written there when the draining began have rows after this.
        await self._committer.commit()
        self._notes = {}
        choose = Draining(self._log.members, self._notes).choose
        told = Rebalance()
        await self._pass(choose, Pace(self._log), lambda: bool(self._to_drain()), told)
        if not told.shards:
            left = (await take_census(self._log)).shards
            for node, config in draining.items():
                if self._log.members.by_id[node].config is not config:
                    continue  # the draining was cancelled meanwhile
                if left[node]:
                    self._notes.setdefault(
                        node, f"{counted(left[node], 'shard')} cannot be moved now."
                    )
                else:
                    self.drained.add(node)
        self.stuck = {} if told.shards else self._notes
        return told.shards

    async def _rebalance(self) -> int:
        """Move shards until no move is an improvement; the number of moved shards."""
        row, strict = self.row, True
        first = row.shards
        while self._rebalancing(row):
            self._notes = {}
            census = await take_census(self._log)
            held = {node: float(census.held[node]) for node in census.share}
            away = sum(max(0.0, held[node] - part) for node, part in census.share.items())
            row.total = row.size + int(away)
            if not strict and census.off_balance < BALANCED and self.job.is_current(row):
                row.error = ""
                self.job.end()
                break
            choose = Balance(self._log.members, held, census.share, strict).choose
            before, pace = row.shards, Pace(self._log, row.rate)
            whole = await self._pass(choose, pace, lambda: self._rebalancing(row), row)
            count = row.shards - before
            if not count and not strict and self._rebalancing(row):
                row.error = self._hindrance(census)
                if whole and not row.error:
                    self.job.end()
                self.job.note()
                break
            row.error = "" if count else row.error
            strict = strict and count > 0
            self.job.note()
        return row.shards - first

    def _hindrance(self, census: Census) -> str:
        """Why shards cannot be moved now though nodes are off their shares; empty: no reason."""
        for member in self._log.members.all:
            if member.state is not State.UP and census.off(member.id) > BALANCED:
                return f"Node {member.name} is {member.state}."
        return next(iter(self._notes.values()), "")

    def _rebalancing(self, row: Rebalance) -> bool:
        """Return whether to continue: not after a stop, or while there is a node to drain."""
        to_drain = any(member.id not in self.stuck for member in self._to_drain())
        return self.job.is_current(row) and not to_drain

    async def _pass(
        self,
        choose: Callable[[int, Stripe], Moves],
        pace: Pace,
        going: Callable[[], bool],
        told: Rebalance,
    ) -> bool:
        """Move the chosen shards of each stripe, and count them; whether all were moved."""
        whole = True
        for batch in self._log.batches():
            wanted: dict[int, list[_Shard]] = defaultdict(list)
            for number, row in batch:
                for index, target in choose(number, row):
                    wanted[target.id].append((number, row, index))
            for node, shards in wanted.items():
                for first in range(0, len(shards), self._limits.repair_batch):
                    part = shards[first : first + self._limits.repair_batch]
                    await pace.spend(2 * sum(row.shard_length for _, row, _ in part))
                    if not going():
                        return False
                    before = self.moved.total()
                    count = await self._move(self._log.members.by_id[node], part)
                    told.shards += count
                    told.size += self.moved.total() - before
                    whole = whole and count == len(part)
            await trio.lowlevel.checkpoint()
        return whole

    async def _move(self, target: Member, shards: Sequence[_Shard]) -> int:
        """Move some shards to a node, except those whose place has changed."""
        async with self._repairer.healer.busy:
            there = [shard for shard in shards if self._is_there(*shard)]
            if not target.takes or target.state is not State.UP or not there:
                return 0
            try:
                await target.call(target.sample)
                size = sum(row.shard_length for _, row, _ in there)
                if self._log.room.left_on(target) < size:
                    full = f"Node {target.name} has no room left: add a node to its region."
                    self._notes.update((row.shards[i].node, full) for _, row, i in there)
                    return 0
                return await self._move_those(target, there)
            except NodeFullError as error:
                self._notes.update((row.shards[i].node, str(error)) for _, row, i in there)
                return 0
            except NodeError as error:
                target.fail(error)
                self._committer.ask()
                return 0

    async def _move_those(self, target: Member, shards: Sequence[_Shard]) -> int:
        """Like `_move`; notes shards that cannot be read.  NodeError."""
        try:
            await self._repairer.healer.rebuilder.move(target, shards)
        except LostError as error:
            if len(shards) > 1:
                return sum([await self._move_those(target, [shard]) for shard in shards])
            if not self._is_there(*shards[0]):
                return 0  # it was freed meanwhile
            logger.error("A shard cannot be moved: %s", error)
            self._notes[shards[0][1].shards[shards[0][2]].node] = str(error)
            return 0
        for _, row, index in shards:
            self.moved[row.shards[index].node] += row.shard_length
        return len(shards)

    def _is_there(self, number: int, row: Stripe, index: int) -> bool:
        """Return whether a shard may be moved: its place is the same, and a commit holds it."""
        now = self._log.stripe(number)
        return (
            now is not None
            and now.shards[index] == row.shards[index]
            and number not in self._committer.writer.sealer.fresh
        )
