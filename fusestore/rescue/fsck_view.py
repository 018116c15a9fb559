"""The store that fsck checks, as of one instant: its rows, and other state of the log.

A mounted store stays in use meanwhile; later changes are not visible here.  Stripes
that are still in memory have no rows to check.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import trio

from ..errors import FormatError, NodeError
from ..format import file_rows, keys, stripe_rows, tables
from ..format.file_rows import Inode
from ..format.records import HEADER_BYTES, Header, SegmentKind
from ..format.store_rows import Counters
from ..format.stripe_rows import SegmentState, Stripe
from ..log.log import Log
from ..members.member import Member
from ..members.opening import shard_sizes
from ..members.standing import State
from ..metadata.view import View

ShardAt = tuple[int, int, int]
"""The offset of a shard's record in its segment, its stripe, and its index."""
_HEADERS_A_CALL = 256
SegmentBytes = dict[int, dict[int, int]]
"""By node, and shard segment: the length of its file in bytes."""


@dataclass(frozen=True, slots=True)
class StoreView:
    """The input of the checks; it does not change while they run."""

    rows: View
    counters: Counters
    segments: dict[tuple[int, int], SegmentState]
    """By node and segment."""
    unsealed: frozenset[int]
    """Stripes that are in memory."""
    nodes: dict[int, str]
    """Names of the nodes, by id."""
    segment_bytes: SegmentBytes
    """The segments of the nodes that are present and answer."""
    rebuilding: frozenset[int]
    """The nodes that are getting back what they lack."""
    shard_at: Callable[[int, int, int], tuple[int, int] | None]
    """The stripe and the index in the header of the record whose payload lies at (node, segment,
    offset); None where that cannot be read.  Blocks."""
    not_theirs: Callable[[int, int, Sequence[ShardAt]], list[tuple[int, int]]]
    """Of some shards in (node, segment), those (stripe, index) that the header at their place
    does not name; shards with unreadable headers are unknown, and left out.  Blocks."""
    at_rest: bool
    """Nothing else uses the store: counts must be exact."""

    def table(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield the readable rows of a table, or of a part of it."""
        for key, value in self.rows.scan(prefix, keys.after(prefix)):
            if tables.readable(key, value):
                yield key, value

    def row(self, key: bytes) -> bytes | None:
        """Return the value of a row, if it exists and can be read."""
        value = self.rows.get(key)
        return value if value is not None and tables.readable(key, value) else None

    def has(self, key: bytes) -> bool:
        """Return whether a row exists, without examining its value."""
        return self.rows.get(key) is not None

    def inode(self, ino: int) -> Inode | None:
        """Return the row of an inode, if it exists and can be read."""
        value = self.row(file_rows.inode_key(ino))
        return Inode.decode(value) if value is not None else None

    def stripe(self, number: int) -> Stripe | None:
        """Return the row of a sealed stripe, if it exists and can be read."""
        value = self.row(stripe_rows.stripe_key(number))
        return Stripe.decode(value) if value is not None else None


@asynccontextmanager
async def view_store(log: Log, *, at_rest: bool) -> AsyncIterator[StoreView]:
    """Yield the current store, for any thread, but only one."""
    before = await _segment_bytes(log)
    rows = log.engine.view()
    rows.passes_over = set()  # rows that the journals do not restore count as missing
    view = StoreView(  # no await since the rows: everything is of the same instant
        rows,
        counters=log.counters.copy(),
        segments={
            (member.id, segment): SegmentState(found.size, found.live)
            for member in log.members.all
            for segment, found in member.shards.states.items()
        },
        unsealed=frozenset(log.unsealed),
        nodes={member.id: member.name for member in log.members.all},
        segment_bytes={},
        rebuilding=frozenset(m.id for m in log.members.all if m.state is State.REBUILDING),
        shard_at=partial(_shard_at, log),
        not_theirs=partial(_not_theirs, log),
        at_rest=at_rest,
    )
    with rows:
        # A segment that is reclaimed or begun meanwhile is in one of the two lists.
        yield replace(view, segment_bytes=_larger(before, await _segment_bytes(log)))


async def _segment_bytes(log: Log) -> SegmentBytes:
    """Return the bytes in each shard segment of the nodes that are present and answer."""
    found: SegmentBytes = {}
    for member in log.members.all:
        if not member.out_of_use:
            with suppress(NodeError):
                found[member.id] = await member.call(shard_sizes, member.node)
    return found


def _larger(one: SegmentBytes, two: SegmentBytes) -> SegmentBytes:
    return {
        node: {n: max(one[node].get(n, 0), two[node].get(n, 0)) for n in {**one[node], **two[node]}}
        for node in one.keys() & two.keys()
    }


def _shard_at(log: Log, node: int, segment: int, offset: int) -> tuple[int, int] | None:
    """In a trio thread: see StoreView."""
    member, start = log.members.by_id[node], offset - HEADER_BYTES
    if member.out_of_use:
        return None
    try:
        data = member.watched[1].read(SegmentKind.SHARDS, segment, start, HEADER_BYTES)
        header = Header.decode(data, log.shards(member.name, segment).seed(start))
    except (NodeError, FormatError):
        return None
    return header.number, header.index


def _not_theirs(
    log: Log, node: int, segment: int, shards: Sequence[ShardAt]
) -> list[tuple[int, int]]:
    """In a trio thread: see StoreView."""
    member = log.members.by_id[node]
    found: list[tuple[int, int]] = []
    for start in range(0, len(shards), _HEADERS_A_CALL):
        if member.out_of_use:
            break
        some = shards[start : start + _HEADERS_A_CALL]
        with suppress(NodeError):
            found += trio.from_thread.run(member.call, _wrong_headers, log, member, segment, some)
    return found


def _wrong_headers(
    log: Log, member: Member, segment: int, shards: Sequence[ShardAt]
) -> list[tuple[int, int]]:
    place, wrong = log.shards(member.name, segment), []
    for start, number, index in shards:
        try:
            data = member.node.read(SegmentKind.SHARDS, segment, start, HEADER_BYTES)
            header = Header.decode(data, place.seed(start))
        except FormatError:
            wrong.append((number, index))
        except NodeError:
            continue
        else:
            if (header.number, header.index) != (number, index):
                wrong.append((number, index))
    return wrong
