"""A node's shard segments: where the next shard goes, what lives in each, what is not flushed.

All of it is on the event loop, without an await.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..format.records import HEADER_BYTES, record_length
from ..format.segment_numbers import reachable
from ..format.stripe_rows import SegmentState, ShardPlace
from ..limits import Limits


@dataclass(slots=True, eq=False)
class ShardSegments:
    """The shard segments of one node."""

    limits: Limits
    current: int = 0
    """The segment being filled."""
    offset: int = 0
    """Where it goes on."""
    states: dict[int, SegmentState] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    """Segments with live shards that are gone from the node."""
    changed: set[int] = field(default_factory=set)
    """Segments whose state differs from the last commit's."""
    set_apart: Counter[int] = field(default_factory=Counter)
    """By segment: bytes reserved for shards that no row has yet; no commit counts them."""
    dirty: set[int] = field(default_factory=set)
    """Segments with bytes that are not flushed."""
    unflushed: list[tuple[int, int]] = field(default_factory=list)
    """(stripe, index) of the shards written since the last flush."""

    def reserve(self, node: int, payload_length: int) -> ShardPlace:
        """Take the next place for a shard; the caller then writes it."""
        if self.offset >= self.limits.shard_segment_bytes:
            self.roll()
        length = record_length(payload_length)
        reserved = ShardPlace(node, self.current, self.offset + HEADER_BYTES)
        self.offset += length
        state = self.states.setdefault(self.current, SegmentState())
        state.size = self.offset
        state.live += length
        self.changed.add(self.current)
        return reserved

    def hold_back(self, place: ShardPlace, payload_length: int) -> None:
        """No row has the shard of a reserved place yet: no commit is to count it."""
        self.set_apart[place.segment] += record_length(payload_length)
        self.changed.add(place.segment)

    def count(self, place: ShardPlace, payload_length: int) -> None:
        """A row has the shard that was held back, or its place is not needed."""
        self.set_apart[place.segment] -= record_length(payload_length)
        self.changed.add(place.segment)

    def committed(self, segment: int) -> SegmentState | None:
        """A segment's state for a commit."""
        state = self.states.get(segment)
        if state is None:
            return None
        return SegmentState(state.size, max(0, state.live - self.set_apart[segment]))

    def release(self, segment: int, payload_length: int) -> None:
        """A shard is no more: its record counts as dead."""
        state = self.states.get(segment)
        if state is not None:
            state.live -= record_length(payload_length)
            self.changed.add(segment)

    def forget(self, segment: int) -> None:
        """A segment is no more."""
        self.states.pop(segment, None)
        self.changed.add(segment)

    def note_present(self, on_disk: Iterable[int]) -> None:
        """Given the segments that the node has: note those that it lost."""
        living = {segment for segment, state in self.states.items() if state.live > 0}
        self.lost = living.difference(on_disk)

    def begin_after(self, on_disk: Iterable[int]) -> None:
        """Go on in a segment that neither the node nor any row has.

        Numbers that the store cannot have come to do not count.
        """
        known = [0, self.current, *self.states]
        self.current = max(known + reachable(on_disk, known)) + 1
        self.offset = 0

    def roll(self) -> None:
        """Go on in a new segment."""
        self.begin_after(())

    def is_full(self, segment: int) -> bool:
        """Whether nothing more is going to be written to a segment."""
        return segment != self.current

    def nothing_unflushed(self) -> None:
        """What was not flushed is noted elsewhere, or the node begins anew."""
        self.dirty, self.unflushed = set(), []
