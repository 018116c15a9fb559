"""Garbage that no hole gives back: segments that hold more than their shards in use.

A freed payload becomes a hole in its segment.  File systems without holes keep its bytes, and
all keep what is smaller than their blocks.  These bytes come back when the segment has no
shard in use any more, and is deleted.  How much that is, is measured on the nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import NodeError
from ..format.stripe_rows import ShardPlace
from ..log.log import Log
from ..members.member import Member
from ..write.shard_record import headers
from .victims import WRITTEN_FOR_FREED_MAX


@dataclass(frozen=True, slots=True)
class Pinned:
    """A shard segment that holds more bytes than its shards in use."""

    member: Member
    segment: int
    live: int
    """Bytes of its shards in use."""
    waste: int
    """Bytes that it holds besides."""


async def measure(log: Log) -> list[Pinned]:
    """Return such segments of all nodes in use, except those that are being filled."""
    found = list[Pinned]()
    for member in log.members.writable:
        try:
            held = await member.call(member.node.held)
        except NodeError as error:
            member.fail(error)
            continue
        for segment, state in member.shards.states.items():
            waste = held.get(segment, 0) - state.live
            if waste > 0 and state.live > 0 and member.shards.is_full(segment):
                found.append(Pinned(member, segment, state.live, waste))
    return found


def emptiest(pinned: Iterable[Pinned], enough: int) -> Iterator[Pinned]:
    """Yield the segments that give back most for what must be written, for `enough` bytes."""
    for one in sorted(pinned, key=lambda one: one.live / one.waste):
        if enough <= 0 or one.live > one.waste * WRITTEN_FOR_FREED_MAX:
            return
        yield one
        enough -= one.waste


async def stripes_in(log: Log, one: Pinned) -> list[int]:
    """Return the stripes with a shard in use in a segment."""
    member = one.member
    try:
        found = await member.call(lambda: list(headers(log, member, one.segment)))
    except NodeError as error:
        if member.out_of_use:
            member.fail(error)
        return []
    stripes = list[int]()
    for offset, header in found:
        row = log.stripe(header.number)
        if row is not None and ShardPlace(member.id, one.segment, offset) in row.shards:
            stripes.append(header.number)
    return stripes
