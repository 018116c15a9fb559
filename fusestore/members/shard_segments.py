"""The shard segments of a node: the next place, live bytes, and unflushed shards.

All methods run on the event loop, without an await.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..format.records import HEADER_BYTES, record_length
from ..format.segment_numbers import following, reachable
from ..format.stripe_rows import SegmentState, ShardPlace
from ..limits import Limits


@dataclass(slots=True, eq=False)
class ShardSegments:
    """The shard segments of one node."""

    limits: Limits
    current: int = 0
    """The segment being filled."""
    offset: int = 0
    """The offset of the next shard."""
    states: dict[int, SegmentState] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    """Segments with live shards that the node has lost."""
    changed: set[int] = field(default_factory=set)
    """Segments whose state differs from the last commit's."""
    swept: int = 0
    """The first segment that no sweep has seen: those before it are in the tables, or are kept."""
    set_apart: Counter[int] = field(default_factory=Counter)
    """Bytes by segment reserved for shards that no row has yet; commits do not count them."""
    rolled: set[int] = field(default_factory=set)
    """Segments that are full, with room that was allocated ahead."""
    dirty: set[int] = field(default_factory=set)
    """Segments with bytes that are not flushed."""
    unflushed: list[tuple[int, int]] = field(default_factory=list)
    """(stripe, index) of the shards written since the last flush."""

    def reserve(self, node: int, payload_length: int, *, has_holes: bool = True) -> ShardPlace:
        """Reserve the next place for a shard; the caller then writes the shard.

        Where no holes give room back, segments are short: a full store has room to empty one.
        """
        longest = self.limits.shard_segment_bytes
        if not has_holes:
            longest = min(longest, self.limits.solid_segment_bytes)
        if self.offset >= longest:
            self.rolled.add(self.current)
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
        """Exclude a reserved place from commits, because no row has its shard yet."""
        self.set_apart[place.segment] += record_length(payload_length)
        self.changed.add(place.segment)

    def count(self, place: ShardPlace, payload_length: int) -> None:
        """Include a place again: a row has its shard, or the place is not needed."""
        self.set_apart[place.segment] -= record_length(payload_length)
        self.changed.add(place.segment)

    def committed(self, segment: int) -> SegmentState | None:
        """Return the state of a segment for a commit."""
        state = self.states.get(segment)
        if state is None:
            return None
        return SegmentState(state.size, max(0, state.live - self.set_apart[segment]))

    def release(self, segment: int, payload_length: int) -> None:
        """Count the record of a removed shard as dead."""
        state = self.states.get(segment)
        if state is not None:
            state.live -= record_length(payload_length)
            self.changed.add(segment)

    def forget(self, segment: int) -> None:
        """Forget a removed segment."""
        self.states.pop(segment, None)
        self.changed.add(segment)

    def note_present(self, on_disk: Iterable[int]) -> None:
        """Record lost segments, given those that the node has."""
        living = {segment for segment, state in self.states.items() if state.live > 0}
        self.lost = living.difference(on_disk)

    def begin_after(self, on_disk: Iterable[int]) -> None:
        """Continue in a segment that neither the node nor any row has; NodeError.

        Numbers that the store cannot have reached do not count.
        """
        known = self.known
        self.current = following(known + reachable(on_disk, known))
        self.offset = 0

    @property
    def known(self) -> list[int]:
        """Numbers of segments that were certainly used, or 0; unordered."""
        return [0, self.current, *self.states, max(self.swept - 1, 0)]

    @property
    def unused(self) -> int:
        """The first number in which nothing was written."""
        return self.current + (self.offset > 0)

    def roll(self) -> None:
        """Continue in a new segment."""
        self.current = max([self.current, *self.states]) + 1
        self.offset = 0

    def is_full(self, segment: int) -> bool:
        """Return whether nothing more will be written to a segment."""
        return segment != self.current

    def nothing_unflushed(self) -> None:
        """Forget unflushed shards: they are recorded elsewhere, or the node starts empty."""
        self.rolled, self.dirty, self.unflushed = set(), set(), []
