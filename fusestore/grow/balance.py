"""The load of each node compared with its share, and the choice of shards to move.

`Draining` and `Balance` choose the moves of one stripe at a time; rebalance.py makes
them.  A shard stays in its region while the region has a node that is not drained.  No
region gets more shards of a stripe than the stripe may lose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from ..format.erasure import Code
from ..format.placement import draw, shares
from ..format.stripe_rows import Stripe
from ..log.log import Log
from ..members.member import Member
from ..members.members import Members
from ..members.standing import State

BALANCED = 0.02
"""A rebalance ends when every node is this close to its share, or no move brings it closer."""
BALANCE_SLACK = 0.01
"""A rebalance ignores a node that is this close to its share."""

Moves = Iterator[tuple[int, Member]]
"""For one stripe: the index of each shard that moves, and its target."""


def staying(members: Members, region: str) -> list[Member]:
    """The nodes of a region that are not being drained, up or not."""
    return [m for m in members.all if m.config.region == region and not m.config.draining]


def targets(members: Members, region: str) -> list[Member]:
    """The nodes of a region that shards can be moved to."""
    return [member for member in staying(members, region) if member.state is State.UP]


# --- the load of nodes -----------------------------------------------------------


@dataclass(slots=True)
class Census:
    """The load of the nodes, from the rows of all stripes."""

    shards: Counter[int] = field(default_factory=Counter)
    held: Counter[int] = field(default_factory=Counter)
    """By node: shards and their bytes."""
    share: dict[int, float] = field(default_factory=dict)
    """By node: its share of the bytes in its region."""
    codes: set[Code] = field(default_factory=set)

    def off(self, node: int) -> float:
        """The relative distance of a node from its share."""
        return abs(self.held[node] / self.share[node] - 1) if self.share[node] else 0.0

    @property
    def off_balance(self) -> float:
        """The largest relative distance of a node from its share."""
        return max(map(self.off, self.share), default=0.0)


async def take_census(log: Log) -> Census:
    """Count the shards of each node."""
    members, found = log.members, Census()
    stay = Counter(member.config.region for member in members.all if not member.config.draining)
    most: Counter[str] = Counter()  # for one node, with no avoidable second shard of a stripe
    for batch in log.batches():
        for _, row in batch:
            found.codes.add(row.code)
            regions: Counter[str] = Counter()
            for place in row.shards:
                found.shards[place.node] += 1
                found.held[place.node] += row.shard_length
                regions[members.by_id[place.node].config.region] += 1
            for region, count in regions.items():
                if stay[region]:
                    most[region] += -(-count // stay[region]) * row.shard_length
        await trio.lowlevel.checkpoint()
    found.share = {member.id: 0.0 for member in members.all}
    for region in set(members.regions):
        total = sum(found.held[m.id] for m in members.all if m.config.region == region)
        nodes = staying(members, region)
        weights = [member.config.weight for member in nodes]
        parts = shares(weights, total, max(most[region], total / max(len(nodes), 1)))
        found.share.update((m.id, part) for m, part in zip(nodes, parts, strict=True))
    return found


# --- moves --------------------------------------------------------------


@dataclass(slots=True)
class Draining:
    """Chooses new places for the shards of nodes that are being drained."""

    members: Members
    notes: dict[int, str]
    """By node: why its shards cannot be moved now."""

    def choose(self, number: int, row: Stripe) -> Moves:
        """The moves of one stripe."""
        here = Counter(place.node for place in row.shards)
        for index, place in enumerate(row.shards):
            source = self.members.by_id[place.node].config
            if not source.draining:
                continue
            stays = staying(self.members, source.region)
            region = source.region if stays else self._other_region(row.code, here)
            candidates = targets(self.members, region)
            if not candidates:
                self.notes[place.node] = (
                    f"No node that is up may take its shards: add a node to region "
                    f"{source.region}, or repair its nodes."
                )
                continue
            target = min(
                candidates, key=lambda m: (here[m.id], draw(m.name, m.config.weight, number))
            )
            here[place.node] -= 1
            here[target.id] += 1
            yield index, target

    def _other_region(self, code: Code, here: Counter[int]) -> str:
        """The region with the fewest shards of a stripe that may get one more; empty: none."""
        members = self.members
        held: Counter[str] = Counter()
        for node, count in here.items():
            held[members.by_id[node].config.region] += count
        most = code.n if members.config.allow_unsafe else code.m
        regions = {m.config.region for m in members.all if m.takes and m.state is State.UP}
        allowed = sorted(region for region in regions if held[region] < most)
        return min(allowed, key=held.__getitem__, default="")


@dataclass(slots=True)
class Balance:
    """Chooses shards to move within a region, which brings nodes closer to their shares."""

    members: Members
    held: dict[int, float]
    share: dict[int, float]
    strict: bool
    """Move shards only to nodes that placement would choose."""

    def choose(self, number: int, row: Stripe) -> Moves:
        """The moves of one stripe."""
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
                if fewer > 1:  # two shards of a stripe on one node, and none on the other
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
        """The fraction of its share that the target lacks; 0 if the move is no improvement."""
        above = self.held[source] - self.share[source]
        below = self.share[target] - self.held[target]
        if min(above, below) * 2 < length * 1.001:
            return 0.0  # it would overshoot its share by as much, and the shard would move back
        near = (BALANCE_SLACK * self.share[source], BALANCE_SLACK * self.share[target])
        return below / self.share[target] if above > near[0] or below > near[1] else 0.0
