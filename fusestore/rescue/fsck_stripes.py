"""fsck: each shard of a stripe has its own place, and segments count their shards."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..format import stripe_rows
from ..format.records import HEADER_BYTES, record_length
from ..format.stripe_rows import Freed, SegmentState, ShardPlace, Stripe
from ..limits import RECORD_ALIGN_BYTES, SHARD_SEGMENT_BYTES
from ..text import counted
from .fsck_extents import ExtentCheck
from .fsck_findings import Finding, Phase, finding, stale
from .fsck_view import StoreView

HEADERS_SAMPLED = 64
_Segment = tuple[int, int]
"""A node and one of its shard segments."""


class _ShardRecord(NamedTuple):
    """A record in a segment, header included: start <= i < end; its stripe, and its index."""

    start: int
    end: int
    stripe: int
    shard: int


class _FreedRecord(NamedTuple):
    """A record whose room is freed after the next checkpoint: start <= i < end; its row."""

    start: int
    end: int
    key: bytes


@dataclass(slots=True)
class StripeCheck:
    """Checks stripes, and collects the records of each segment."""

    _store: StoreView
    _extents: ExtentCheck
    count: int = 0
    """Stripes that have a row."""
    _records: dict[_Segment, list[_ShardRecord]] = field(default_factory=lambda: defaultdict(list))

    def missing(self) -> Iterator[Finding]:
        """Each shard to be rebuilt on a node has its place there."""
        for key, _ in self._store.table(b"M"):
            node, number, index = stripe_rows.decode_missing_key(key)
            stripe = self._store.stripe(number)
            if stripe is None or index >= stripe.code.n or stripe.shards[index].node != node:
                yield stale(key, f"stripe {number:#x} has no shard {index} on node {node}")

    def tails(self) -> Iterator[Finding]:
        """Committed tails belong to stripes that are not sealed yet."""
        for key, _ in self._store.table(b"T"):
            number, _ = stripe_rows.decode_tail_key(key)
            if number not in self._store.unsealed:
                yield stale(key, f"stripe {number:#x} is not open")

    def stripes(self) -> Iterator[Finding]:
        """Each stripe is used, and its shards have possible places or are to be rebuilt."""
        for key, value in self._store.table(b"S"):
            number, stripe = stripe_rows.decode_stripe_key(key), Stripe.decode(value)
            self.count += 1
            if number not in self._extents.uses:
                text = f"no file has bytes in stripe {number:#x}"
                yield finding(Phase.DERIVED, "stripes", text, "free", number)
            for index, place in enumerate(stripe.shards):
                yield from self._shard(number, index, place, stripe.shard_length)

    def _shard(self, number: int, index: int, place: ShardPlace, length: int) -> Iterator[Finding]:
        start = place.offset - HEADER_BYTES
        possible = range(0, SHARD_SEGMENT_BYTES, RECORD_ALIGN_BYTES)
        if (place.written and start not in possible) or place.node not in self._store.nodes:
            text = f"shard {index} of stripe {number:#x} has an impossible place"
            yield finding(Phase.EXTENTS, "stripes", text, "unwrite", number, index)
        elif place.written:
            record = _ShardRecord(start, start + record_length(length), number, index)
            self._records[place.node, place.segment].append(record)
        elif not self._store.has(stripe_rows.missing_key(place.node, number, index)):
            text = (
                f"shard {index} of stripe {number:#x} was never written, but not noted as missing"
            )
            yield finding(Phase.DERIVED, "missing", text, "owe", place.node, number, index)

    def segments(self) -> Iterator[Finding]:
        """Each segment counts its shards, which do not overlap, and its freed room."""
        known, nodes = self._store.segments, self._store.nodes
        freed = self._freed()
        for key, _ in [*self._store.table(b"G"), *self._store.table(b"R")]:
            node, _ = stripe_rows.decode_segment_key(key)
            if node not in nodes:
                yield stale(key, f"there is no node {node}")
        for segment in sorted(self._records.keys() | known.keys() | freed.keys()):
            if segment[0] not in nodes:
                continue
            records = sorted(self._records[segment])
            yield from self._overlaps(segment, records)
            yield from _freed_alive(records, freed[segment])
            yield from self._cut_off(segment, records)
            yield from self._counts(segment, records, freed[segment])

    def _freed(self) -> dict[_Segment, list[_FreedRecord]]:
        """Return the rows of `reclaim`, by segment."""
        freed: dict[_Segment, list[_FreedRecord]] = defaultdict(list)
        for key, value in self._store.table(b"R"):
            node, segment, offset = stripe_rows.decode_reclaim_key(key)
            start = offset - HEADER_BYTES
            end = start + record_length(Freed.decode(value).length)
            freed[node, segment].append(_FreedRecord(start, end, key))
        return freed

    def _overlaps(self, segment: _Segment, records: list[_ShardRecord]) -> Iterator[Finding]:
        """Shards that overlap others; the header on the node decides which is wrong."""

        def is_right(record: _ShardRecord) -> bool:
            found = self._store.shard_at(*segment, record.start + HEADER_BYTES)
            return found == (record.stripe, record.shard)

        last: _ShardRecord | None = None
        for record in records:
            wrong = None
            if last is not None and record.start < last.end:
                wrong = last if is_right(record) and not is_right(last) else record
                text = f"shard {wrong.shard} of stripe {wrong.stripe:#x} overlaps another shard"
                yield finding(Phase.EXTENTS, "stripes", text, "unwrite", wrong.stripe, wrong.shard)
            if wrong is not record:
                last = record

    def _cut_off(self, segment: _Segment, records: list[_ShardRecord]) -> Iterator[Finding]:
        """Shards past the end of their segment's file, or with other shards in their place.

        In a mounted store, only a sample of the headers in each segment is checked.  A
        rebuild examines all shards of its node by itself.
        """
        node, number = segment
        lengths = self._store.segment_bytes.get(node)
        if lengths is None or node in self._store.rebuilding:
            return
        due = [
            record
            for record in records
            if not self._store.has(stripe_rows.missing_key(node, record.stripe, record.shard))
        ]
        cut = {record for record in due if lengths.get(number, 0) < record.end}
        gone = [(record.stripe, record.shard) for record in cut]
        there = [(record.start, record.stripe, record.shard) for record in due if record not in cut]
        step = 1 if self._store.at_rest else len(there) // HEADERS_SAMPLED + 1
        starts = {(stripe, shard): start for start, stripe, shard in there}
        for stripe, shard in self._store.not_theirs(node, number, there[::step]):
            at = starts[stripe, shard] + HEADER_BYTES
            if self._store.shard_at(node, number, at) is None:
                gone.append((stripe, shard))
                continue
            text = f"shard {shard} of stripe {stripe:#x} lies where another does"
            yield finding(Phase.EXTENTS, "stripes", text, "unwrite", stripe, shard)
        if gone:
            name = self._store.nodes[node]
            text = f"segment {number} of node {name} has lost {counted(len(gone), 'shard')}"
            yield finding(Phase.DERIVED, "segments", text, "owe_all", node, gone)

    def _counts(
        self, segment: _Segment, records: list[_ShardRecord], freed: list[_FreedRecord]
    ) -> Iterator[Finding]:
        state = self._store.segments.get(segment, SegmentState())
        end = max((record.end for record in records), default=0)
        live = sum(record.end - record.start for record in records)
        live += sum(record.end - record.start for record in freed)
        if state.size < end or (self._store.at_rest and state.live != live):
            node, number = segment
            text = (
                f"segment {number} of node {self._store.nodes[node]} counts {state.live} live "
                f"bytes of {state.size}, but has {live} of {max(end, state.size)}"
            )
            yield finding(Phase.DERIVED, "segments", text, "set_segment", segment, live, end)


def _freed_alive(records: list[_ShardRecord], freed: list[_FreedRecord]) -> Iterator[Finding]:
    """Room that is to be freed but is in use."""
    for start, end, key in freed:
        before = bisect_left(records, (end,)) - 1
        if before >= 0 and records[before].end > start:
            text = f"a shard of stripe {records[before].stripe:#x} lies in room that is to be freed"
            yield finding(Phase.EXTENTS, "reclaim", text, "drop", key)
