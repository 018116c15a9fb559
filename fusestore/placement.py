"""Which node gets which shard: spread evenly over the regions, turning with the stripe.

The region rule: no region may hold more than m shards of a stripe, so that any
one region can be lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from .erasure import Code


def check_region_rule(code: Code, regions: Sequence[str]) -> str | None:
    """Say in a sentence why `code` would not survive the loss of a region, or None.

    `regions` has one entry a node: the region that it lies in.
    """
    count = len(set(regions))
    most = -(-code.n // count)
    if most <= code.m:
        return None
    return (
        f"Code {code} puts {most} of its {code.n} shards into one of {count} regions, "
        f"and survives the loss of only {code.m}: losing a region would lose data."
    )


def regions_borne(code: Code, regions: int) -> int:
    """How many of so many regions may go at once, with shards spread evenly over them."""
    return code.m // -(-code.n // regions)


@lru_cache(maxsize=4096)
def _spread(n: int, regions: tuple[str, ...], turn: int) -> tuple[int, ...]:
    inside = _by_region(regions)
    chosen = []
    for index in range(n):
        lap, region = divmod(index + turn, len(inside))
        chosen.append(inside[region][lap % len(inside[region])])
    return tuple(chosen)


@lru_cache(maxsize=16)
def _by_region(regions: tuple[str, ...]) -> list[list[int]]:
    """The positions of each region's nodes."""
    return [
        [i for i, region in enumerate(regions) if region == name] for name in dict.fromkeys(regions)
    ]


def turns(regions: tuple[str, ...]) -> int:
    """After how many stripes the placement repeats."""
    inside = _by_region(regions)
    return len(inside) * math.lcm(*(len(nodes) for nodes in inside))


def place(code: Code, regions: tuple[str, ...], stripe: int) -> tuple[int, ...]:
    """The position of the node for each of the stripe's n shards.

    Shard i goes to region i + stripe (modulo the regions), so that data and
    parity, and with them reads, are spread evenly over time.
    """
    return _spread(code.n, regions, stripe % turns(regions))


def losses(good: Counter[str], k: int) -> int:
    """How many regions may go, whichever, while k of the shards that each has are left.

    -1: there are fewer than k already.
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
def losses_borne(code: Code, regions: tuple[str, ...], lacking: frozenset[int]) -> int:
    """How many more regions may go, whichever, if the nodes at some positions have nothing.

    -1: stripes may have fewer shards than they need already.
    """
    return min(
        losses(Counter(regions[i] for i in place(code, regions, turn) if i not in lacking), code.k)
        for turn in range(turns(regions))
    )
