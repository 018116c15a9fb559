"""Shards move between nodes: off those that are drained, and until each has its share.

A shard is written to its new node, flushed, read back and verified (repair.py); in
one step the stripe's row then names that place, and the old one becomes debt to be
reclaimed, after the checkpoint that holds both.  So a kill at any moment leaves each
shard at one place or the other, and what was begun goes on with what the rows say.

1. Draining comes first, for as long as a node of the configuration is to be drained.
   A shard stays in its region while a node there may take it.
2. A rebalance, while its row says that it is running, moves shards within a region
   from nodes above their share to nodes below: at first those that placement would
   put elsewhere now, so that all stripes give alike, then any, until nothing gets
   better.  Two shards of a stripe on one node part when another node may take one.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import trio

from . import schema
from .commit import Committer
from .erasure import Code
from .errors import FusestoreError, LostError, NodeError, UsageError
from .limits import (
    BALANCE_SLACK,
    BALANCED,
    BETWEEN_COMMITS_BYTES,
    PROBE_SECONDS,
    REPAIR_BATCH,
    REPAIR_SCAN_ROWS,
    RESERVE_BYTES,
)
from .log import Log
from .members import Member, Members, State
from .pace import Pace
from .placement import draw, shares
from .repair import Repairer
from .schema import Stripe

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
Progress = Callable[[dict[str, Any]], None]
_Shard = tuple[int, Stripe, int]
"""A stripe's number, its row, and the index of a shard."""
_Choice = Iterator[tuple[int, Member]]
"""Of one stripe: indices of shards that move, and where to."""


@dataclass(slots=True)
class Rebalance:
    """Where a rebalance stands, or how the last one ended; JSON in its row."""

    state: str = "never"
    """never, running, stopped or done."""
    rate: float | None = None
    """Bytes of I/O a second, None for as fast as users' own allows."""
    started: float = 0.0
    finished: float = 0.0
    """Seconds since 1970."""
    shards: int = 0
    size: int = 0
    """Shards moved, and their bytes."""
    total: int = 0
    """About how many bytes there are to move."""
    error: str = ""
    """Why it does not go on, for people."""

    def encode(self) -> bytes:
        """The row's value."""
        return json.dumps(asdict(self)).encode()


@dataclass(slots=True)
class Census:
    """What the nodes hold, by the rows of all stripes."""

    shards: Counter[int] = field(default_factory=Counter)
    held: Counter[int] = field(default_factory=Counter)
    """By node: shards and their bytes."""
    most: Counter[str] = field(default_factory=Counter)
    """By region: what one of its nodes can have, without two shards of a stripe for nothing."""
    codes: set[Code] = field(default_factory=set)


class Rebalancer:
    """Moves shards in the background."""

    def __init__(self, state: Log, committer: Committer, repairer: Repairer) -> None:
        self._log = state
        self._committer = committer
        self._repairer = repairer
        value = state.engine.get(schema.REBALANCE_KEY)
        self.row = Rebalance(**json.loads(value)) if value else Rebalance()
        self.drained: set[int] = set()
        """Nodes to be drained that were found empty."""
        self.stuck: dict[int, str] = {}
        """By node: why draining it does not go on."""
        self._notes: dict[int, str] = {}
        """By node: why shards of it were not moved, in this pass."""
        self.moved: Counter[int] = Counter()
        """By node: bytes that were moved off it since the store was opened."""
        self._wake = trio.Event()

    # --- commands ------------------------------------------------------------

    async def command(
        self, action: str, rate: float | None, *, wait: bool, progress: Progress
    ) -> dict[str, Any]:
        """Start or stop a rebalance, or say where it stands; with `wait`, when it ended."""
        if action != "status":
            self._log.transaction()  # raises when nothing can be changed
        if action == "start":
            if self.row.state == "running" and not wait:
                raise UsageError("A rebalance is running already: wait for it, or stop it.")
            if self.row.state != "running":
                self.row = Rebalance("running", rate, started=time.time())
            self._note()
        elif action == "stop":
            if self.row.state != "running":
                raise UsageError("No rebalance is running.")
            self.row.state = "stopped"
            self._note()
        if action != "status":
            self.wake()
            await self._committer.commit()
        while wait and self.row.state == "running":
            done = {"done": self.row.size, "total": max(self.row.total, self.row.size)}
            progress({"phase": "rebalance", **done})
            await trio.sleep(LOOK_SECONDS)
        return asdict(self.row)

    def _note(self) -> None:
        self._log.apply({schema.REBALANCE_KEY: self.row.encode()})

    def wake(self) -> None:
        """There may be something to move."""
        self._wake.set()

    # --- what there is -------------------------------------------------------

    async def census(self) -> Census:
        """Count what each node holds."""
        found = Census()
        members = self._log.members
        staying = Counter(m.config.region for m in members.all if not m.config.draining)
        start: bytes | None = schema.STRIPES_START
        while start is not None:
            batch, start = self._some(start)
            for _, row in batch:
                found.codes.add(row.code)
                regions: Counter[str] = Counter()
                for place in row.shards:
                    found.shards[place.node] += 1
                    found.held[place.node] += row.shard_length
                    regions[members.by_id[place.node].config.region] += 1
                for region, count in regions.items():
                    if staying[region]:
                        found.most[region] += -(-count // staying[region]) * row.shard_length
            await trio.lowlevel.checkpoint()
        return found

    def shares(self, census: Census) -> dict[int, float]:
        """By node: the bytes that are its share of what its region holds."""
        found = {member.id: 0.0 for member in self._log.members.all}
        for region in set(self._log.members.regions):
            inside = [m for m in self._log.members.all if m.config.region == region]
            total = sum(census.held[member.id] for member in inside)
            staying = [member for member in inside if not member.config.draining]
            weights = [member.config.weight for member in staying]
            parts = shares(weights, total, max(census.most[region], total / max(len(staying), 1)))
            found.update((m.id, part) for m, part in zip(staying, parts, strict=True))
        return found

    def _some(self, start: bytes) -> tuple[list[tuple[int, Stripe]], bytes | None]:
        """Some sealed stripes from a key on, and the key to go on from, None at the end."""
        rows = list(islice(self._log.engine.scan(start, schema.STRIPES_END), REPAIR_SCAN_ROWS))
        after = rows[-1][0] + b"\0" if len(rows) == REPAIR_SCAN_ROWS else None
        return [(schema.decode_stripe_key(key), Stripe.decode(value)) for key, value in rows], after

    # --- the work ------------------------------------------------------------

    async def run(self) -> None:
        """Drain and rebalance, until cancelled."""
        while True:
            self._wake = trio.Event()
            moved = 0
            try:
                if not self._log.broken and self._to_drain():
                    moved += await self._drain()
                if not self._log.broken and self.row.state == "running":
                    moved += await self._rebalance()
            except FusestoreError as error:
                log.error("Moving shards is tried again later: %s", error)
            if not moved:
                with trio.move_on_after(PROBE_SECONDS):
                    await self._wake.wait()

    def _to_drain(self) -> list[Member]:
        draining = [member for member in self._log.members.all if member.config.draining]
        self.drained.intersection_update(member.id for member in draining)
        return [member for member in draining if member.id not in self.drained]

    async def _drain(self) -> int:
        """One pass over all stripes; how many shards were moved."""
        # What was on its way there when the draining began has a row from here on.
        draining = {member.id for member in self._to_drain()}
        await self._committer.commit()
        self._notes = {}
        moved, _ = await self._pass(
            self._off_draining, Pace(self._log), lambda: bool(self._to_drain())
        )
        if not moved:
            left = (await self.census()).shards
            self.drained |= {node for node in draining if not left[node]}
            for node in draining - self.drained:
                self._notes.setdefault(node, f"{left[node]:,} shards cannot be moved now.")
        self.stuck = {} if moved else self._notes
        return moved

    def _off_draining(self, number: int, row: Stripe) -> _Choice:
        members = self._log.members
        here = Counter(place.node for place in row.shards)
        for index, place in enumerate(row.shards):
            member = members.by_id[place.node]
            if member.config.draining:
                candidates = targets(members, member.config.region)
                if not candidates and not self._staying(member.config.region):
                    candidates = self._elsewhere(row)
                if not candidates:
                    self._notes[place.node] = (
                        f"No node that is up may take its shards: add one to region "
                        f"{member.config.region}, or repair those that are there."
                    )
                    continue
                target = min(
                    candidates,
                    key=lambda m: (here[m.id], draw(m.name, m.config.weight, number)),
                )
                here[place.node] -= 1
                here[target.id] += 1
                yield index, target

    def _staying(self, region: str) -> bool:
        return any(
            member.config.region == region and not member.config.draining
            for member in self._log.members.all
        )

    def _elsewhere(self, row: Stripe) -> list[Member]:
        """The nodes of the region that has the fewest shards of a stripe, and may have more."""
        members = self._log.members
        held = Counter(members.by_id[place.node].config.region for place in row.shards)
        most = row.code.n if members.config.allow_unsafe else row.code.m
        regions = {m.config.region for m in members.all if m.takes and m.state is State.UP}
        allowed = sorted(region for region in regions if held[region] < most)
        return targets(self._log.members, min(allowed, key=lambda r: held[r])) if allowed else []

    async def _rebalance(self) -> int:
        """Move shards until nothing gets better; how many were moved."""
        moved, strict, self._notes = 0, True, {}
        while self._rebalancing():
            census = await self.census()
            share = self.shares(census)
            away = sum(max(0.0, census.held[node] - part) for node, part in share.items())
            self.row.total = self.row.size + int(away)
            if not strict and off_balance(census, share) < BALANCED:
                self._end("")
                break
            held = {node: float(census.held[node]) for node in share}
            balance = _Balance(self._log.members, held, share, strict)
            pace = Pace(self._log, self.row.rate)
            count, whole = await self._pass(balance.choose, pace, self._rebalancing, self.row)
            moved += count
            if self._rebalancing() and not count and not strict:
                self._end("" if whole else next(iter(self._notes.values()), "Shards are in use."))
                break
            strict = strict and count > 0
            self._note()
        return moved

    def _rebalancing(self) -> bool:
        """Whether to go on: not when there is a node to drain."""
        to_drain = any(member.id not in self.stuck for member in self._to_drain())
        return self.row.state == "running" and not to_drain

    def _end(self, error: str) -> None:
        """A rebalance has ended, or is to go on later."""
        self.row.error = error
        if not error:
            self.row.state, self.row.finished = "done", time.time()
        self._note()

    async def _pass(
        self,
        choose: Callable[[int, Stripe], _Choice],
        pace: Pace,
        going: Callable[[], bool],
        told: Rebalance | None = None,
    ) -> tuple[int, bool]:
        """Move what is chosen of each stripe; how much was moved, and whether all of it was."""
        moved, whole = 0, True
        start: bytes | None = schema.STRIPES_START
        while start is not None:
            batch, start = self._some(start)
            wanted: dict[int, list[_Shard]] = defaultdict(list)
            for number, row in batch:
                for index, target in choose(number, row):
                    wanted[target.id].append((number, row, index))
            for node, shards in wanted.items():
                for first in range(0, len(shards), REPAIR_BATCH):
                    part = shards[first : first + REPAIR_BATCH]
                    await pace.spend(2 * sum(row.shard_length for _, row, _ in part))
                    if not going():
                        return moved, False
                    before = self.moved.total()
                    count = await self._move(self._log.members.by_id[node], part)
                    moved += count
                    if told is not None:
                        told.shards += count
                        told.size += self.moved.total() - before
                    whole = whole and count == len(part)
            await trio.lowlevel.checkpoint()
        return moved, whole

    async def _move(self, target: Member, shards: Sequence[_Shard]) -> int:
        """Move some shards to a node, as far as they are still where they were."""
        async with self._repairer.busy:
            there = [shard for shard in shards if self._is_there(*shard)]
            if not target.takes or target.state is not State.UP or not there:
                return 0
            try:
                await target.call(target.sample)
                size = sum(row.shard_length for _, row, _ in there)
                if target.space is None or target.space.free < size + _KEPT_FREE:
                    full = f"Node {target.name} has no room left: add a node to its region."
                    self._notes.update((row.shards[i].node, full) for _, row, i in there)
                    return 0
                return await self._move_those(target, there)
            except NodeError as error:
                target.fail(error)
                self._committer.ask()
                return 0

    async def _move_those(self, target: Member, shards: Sequence[_Shard]) -> int:
        try:
            await self._repairer.move(target, shards)
        except LostError as error:
            if len(shards) > 1:
                return sum([await self._move_those(target, [shard]) for shard in shards])
            log.error("A shard cannot be moved: %s", error)
            self._notes[shards[0][1].shards[shards[0][2]].node] = str(error)
            return 0
        for _, row, index in shards:
            self.moved[row.shards[index].node] += row.shard_length
        return len(shards)

    def _is_there(self, number: int, row: Stripe, index: int) -> bool:
        """Whether a shard may be moved: nothing has happened to it, and a commit holds it."""
        value = self._log.engine.get(schema.stripe_key(number))
        return (
            value is not None
            and Stripe.decode(value).shards[index] == row.shards[index]
            and number not in self._committer.writer.fresh
        )


_KEPT_FREE = RESERVE_BYTES + BETWEEN_COMMITS_BYTES
"""What moving leaves on a device: writes that were accepted find their place."""


def targets(members: Members, region: str) -> list[Member]:
    """The nodes of a region that shards can be moved to."""
    return [
        member
        for member in members.all
        if member.config.region == region and member.takes and member.state is State.UP
    ]


def off_balance(census: Census, share: dict[int, float]) -> float:
    """How far the node that is farthest from its share is from it, relatively."""
    return max((abs(census.held[n] / part - 1) for n, part in share.items() if part), default=0.0)


@dataclass(slots=True)
class _Balance:
    """Chooses shards to move, so that nodes come nearer to their shares."""

    members: Members
    held: dict[int, float]
    share: dict[int, float]
    strict: bool
    """Only to where placement would put them."""

    def choose(self, number: int, row: Stripe) -> _Choice:
        """Of one stripe."""
        here = Counter(place.node for place in row.shards)
        wanted = Counter(member.id for member in self.members.place(row.code, number))
        for index, place in enumerate(row.shards):
            source = self.members.by_id[place.node]
            if source.config.draining or source.state is not State.UP:
                continue
            best, gain = None, 0.0
            for target in targets(self.members, source.config.region):
                fewer = here[source.id] - here[target.id]
                if fewer <= 0:
                    continue
                better = self._gain(source.id, target.id, row.shard_length)
                if fewer > 1:  # two of a stripe on one node, and none on the other
                    better += 1.0
                elif self.strict and not (
                    here[source.id] > wanted[source.id] and here[target.id] < wanted[target.id]
                ):
                    continue
                if better > gain:
                    best, gain = target, better
            if best is not None:
                self.held[source.id] -= row.shard_length
                self.held[best.id] += row.shard_length
                here[source.id] -= 1
                here[best.id] += 1
                yield index, best

    def _gain(self, source: int, target: int, length: int) -> float:
        """How much of its share a node lacks to which a shard moves, 0 if that is no better."""
        above = self.held[source] - self.share[source]
        below = self.share[target] - self.held[target]
        if min(above, below) * 2 < length * 1.001:
            return 0.0  # it would be as far from its share on the other side, and come back
        near = (BALANCE_SLACK * self.share[source], BALANCE_SLACK * self.share[target])
        return below / self.share[target] if above > near[0] or below > near[1] else 0.0
