"""Placement of shards on nodes: evenly over the regions, by weight within a region.

The region rule: no region may hold more than m shards of a stripe, so that any one
region can be lost.  Shards go round-robin to the regions; the first region rotates with
the stripe.  Within a region, weighted rendezvous hashing orders the nodes (Thaler and
Ravishankar 1998; weights as in Schindelhauer and Schomaker 2005).  Each node gets a
number h from the hash of the stripe and its name, and the greatest -w / ln(h) is first.
Therefore a new node takes its share from all others, and no shard moves between those.

The rows of stripes record the places of their shards.  Placement is only used for new
shards, and to find the preferred place of a shard.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log

from xxhash import xxh3_64_intdigest

from ..text import counted
from .erasure import Code

_STEP = 0.15
"""The step of the quadrature in `_inclusion`, in the logarithm of time: gives five digits."""
_ROUNDS = 50
_CLOSE = 1e-3
"""The relative error that `_rates` accepts."""


@dataclass(frozen=True, slots=True)
class Site:
    """The properties of a node that placement uses."""

    name: str
    region: str
    weight: float = 1.0


def check_region_rule(code: Code, regions: Sequence[str]) -> str | None:
    """Return a sentence if `code` would not survive the loss of a region, or None.

    `regions` has one entry per node: the region of the node.
    """
    count = len(set(regions))
    most = -(-code.n // count)
    if most <= code.m:
        return None
    return (
        f"Code {code} puts {most} of its {code.n} shards into one of {counted(count, 'region')}, "
        f"and survives the loss of only {code.m}: the loss of a region would lose data."
    )


def regions_borne(code: Code, regions: int) -> int:
    """Return how many of `regions` regions can be lost at once, if shards are spread evenly."""
    return code.m // -(-code.n // regions)


class Placement:
    """The placement of new shards on one set of nodes."""

    def __init__(self, sites: Sequence[Site]) -> None:
        """`sites` are the nodes; regions are numbered in the order of their first node."""
        self.names = tuple(dict.fromkeys(site.region for site in sites))
        """The regions."""
        self._regions = [
            _Region(sites, [i for i, site in enumerate(sites) if site.region == name])
            for name in self.names
        ]
        self._size = len(sites)
        self._simple = self._size == len(self.names)
        self._known: dict[tuple[int, int], tuple[int, ...]] = {}
        """Cached results if each region has one node, by shards and turn."""
        self._expected: dict[int, list[float]] = {}
        self._least: dict[tuple[int, frozenset[str]], int] = {}

    def place(self, code: Code, stripe: int) -> tuple[int, ...]:
        """Return the position of the node for each of the n shards of a stripe.

        Shard i goes to region i + stripe (modulo the regions), so that data, parity and
        reads are spread evenly over time.  A node gets a second shard of a stripe only if
        all nodes of its region have one.
        """
        turn = stripe % len(self._regions)
        if self._simple:
            known = self._known.get((code.n, turn))
            if known is not None:
                return known
        chosen = [0] * code.n
        for number, region in enumerate(self._regions):
            mine = self._mine(code, turn, number)
            order = region.order(len(mine), stripe)
            for lap, index in enumerate(mine):
                chosen[index] = order[lap % len(order)]
        result = tuple(chosen)
        if self._simple:
            self._known[code.n, turn] = result
        return result

    def _mine(self, code: Code, turn: int, region: int) -> range:
        """Return the shards of a stripe with this turn that go to a region."""
        count = len(self._regions)
        return range((region - turn) % count, code.n, count)

    def least(self, code: Code, regions: Collection[str]) -> int:
        """Return the least number of shards of a stripe in these regions."""
        key = code.n, frozenset(regions)
        if key not in self._least:
            there = [number for number, name in enumerate(self.names) if name in regions]
            self._least[key] = min(
                sum(len(self._mine(code, turn, number)) for number in there)
                for turn in range(len(self._regions))
            )
        return self._least[key]

    def expected(self, code: Code) -> list[float]:
        """Return the average number of shards of a stripe on each node."""
        if code.n in self._expected:
            return self._expected[code.n]
        result = self._expected[code.n] = [0.0] * self._size
        for turn in range(len(self._regions)):
            for number, region in enumerate(self._regions):
                full, extra = divmod(len(self._mine(code, turn, number)), len(region.nodes))
                for node, part in zip(region.nodes, shares(region.weights, extra, 1), strict=True):
                    result[node] += (full + part) / len(self._regions)
        return result

    def most(self, code: Code) -> list[int]:
        """Return the greatest number of shards of one stripe on each node."""
        result = [0] * self._size
        for region in self._regions:
            for node in region.nodes:
                result[node] = -(-self.most_in_region(code) // len(region.nodes))
        return result

    def most_in_region(self, code: Code) -> int:
        """Return the greatest number of shards of one stripe in a region."""
        return -(-code.n // len(self._regions))


def shares(weights: Sequence[float], total: float, most: float) -> list[float]:
    """Divide `total` in proportion to weights, with no part above `most`.

    The excess of one part goes to the others.  `total` must be at most `most` per weight.
    """
    result = [most] * len(weights)
    rest, left = set(range(len(weights))), total
    while rest:
        unit = left / sum(weights[i] for i in rest)
        full = {i for i in rest if weights[i] * unit > most}
        if not full:
            for i in rest:
                result[i] = weights[i] * unit
            break
        rest -= full
        left -= most * len(full)
    return result


def losses(good: Counter[str], k: int) -> int:
    """Return how many regions, no matter which, can be lost while k shards are left.

    `good` counts the shards of each region.  -1: there are already fewer than k.
    """
    left = sum(good.values())
    if left < k:
        return -1
    for lost, count in enumerate(sorted(good.values(), reverse=True)):
        left -= count
        if left < k:
            return lost
    return len(good)


@lru_cache(maxsize=256)
def losses_borne(code: Code, regions: tuple[str, ...], lacking: frozenset[str]) -> int:
    """Return how many more regions, no matter which, can be lost if `lacking` have no shards.

    -1: some stripes may already have fewer shards than they need.
    """
    placement = Placement([Site(region, region) for region in regions])
    turns = (placement.place(code, turn) for turn in range(len(regions)))
    held = (Counter(regions[i] for i in turn if regions[i] not in lacking) for turn in turns)
    return min(losses(good, code.k) for good in held)


# --- the rendezvous ----------------------------------------------------------


def draw(name: str, weight: float, stripe: int) -> float:
    """Return the rendezvous number of a node for a stripe; the least number is first."""
    return _arrival(xxh3_64_intdigest(name.encode()), weight, stripe.to_bytes(8, "little"))


def _arrival(seed: int, rate: float, key: bytes) -> float:
    """Return -ln(h) / w, which is less where -w / ln(h) is greater."""
    return -log(((xxh3_64_intdigest(key, seed) >> 11) + 0.5) * 2.0**-53) / rate


class _Region:
    """The nodes of one region."""

    def __init__(self, sites: Sequence[Site], nodes: list[int]) -> None:
        self.nodes = nodes
        """The positions of its nodes among all nodes."""
        self.weights = tuple(sites[node].weight for node in nodes)
        self._seeds = [xxh3_64_intdigest(sites[node].name.encode()) for node in nodes]

    def order(self, count: int, stripe: int) -> list[int]:
        """Return the nodes in the order in which they get `count` shards of a stripe."""
        if len(self.nodes) == 1:
            return self.nodes
        key = stripe.to_bytes(8, "little")
        rates = _rates(self.weights, count % len(self.nodes))
        drawn = sorted(
            (_arrival(seed, rate, key), node)
            for node, seed, rate in zip(self.nodes, self._seeds, rates, strict=True)
        )
        return [node for _, node in drawn]


@lru_cache(maxsize=256)
def _rates(weights: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return rates with which the first `count` of a rendezvous hold shares like `weights`.

    For the first node alone, the rates are the weights.  For more, the rates must differ
    from the weights: otherwise a node with twice the weight would be second too rarely.
    Begins with the exponential order sampling of Rosén (1997).
    """
    if count <= 1 or len(set(weights)) == 1:
        return weights
    wanted = shares(weights, count, 1.0)
    rest = [i for i, part in enumerate(wanted) if part < 1.0 - 1e-9]
    rates = [math.inf] * len(weights)  # for nodes with a shard of every stripe
    left = count - (len(weights) - len(rest))
    if left == 1:
        found = [weights[i] for i in rest]
    else:
        parts = [wanted[i] for i in rest]
        found = [-math.log1p(-part) for part in parts]
        for _ in range(_ROUNDS):
            reached = _inclusion(found, left)
            if all(abs(r - p) < _CLOSE * p for r, p in zip(reached, parts, strict=True)):
                break
            found = [
                rate * math.log1p(-p) / math.log1p(-r)
                for rate, p, r in zip(found, parts, reached, strict=True)
            ]
    for i, rate in zip(rest, found, strict=True):
        rates[i] = rate
    return tuple(rates)


def _inclusion(rates: Sequence[float], count: int) -> list[float]:
    """Return the probability of each to be among the first `count`, with exponential arrivals."""
    result = [0.0] * len(rates)
    first, last = log(1e-4 / sum(rates)), log(40 / min(rates))
    for point in range(math.ceil((last - first) / _STEP)):
        time = math.exp(first + point * _STEP)
        late = [math.exp(-rate * time) for rate in rates]
        for i, rate in enumerate(rates):
            arrived = [1.0] + [0.0] * (count - 1)  # by number of others, below `count`
            for j, other in enumerate(late):
                if j != i:
                    for n in range(count - 1, 0, -1):
                        arrived[n] += (arrived[n - 1] - arrived[n]) * (1.0 - other)
                    arrived[0] *= other
            result[i] += rate * time * late[i] * sum(arrived) * _STEP
    return [min(max(part, 1e-12), 1.0 - 1e-12) for part in result]
