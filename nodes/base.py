"""The contract of every kind of node: a place that keeps segments.

A node keeps two kinds of segments, journal and shards.  The log chooses their numbers,
1 <= n < 2**32, and all offsets.  Offsets, lengths and sizes are in bytes.  A segment is
rolled at the size that `Limits` sets; its last record may extend past that size.

**Writing.** A segment is written forward, with two exceptions.  Records of a journal
overwrite zeros that were written behind its end.  Repair rewrites existing places with
the bytes that belong there.  A node that cannot do this (an object store) rewrites the
whole segment.  Bytes are readable when `write` has returned.  A later `flush` makes them
durable, and the segment itself.  The order in which unflushed bytes become durable is not
defined.

**Errors.** Methods raise only NodeError.  NodeFullError: there is no room.
NodeLacksError: the node lacks the segment, or some of the bytes, but is otherwise sound.
NodeIdentityError, only from `check`: the node is gone, or another has taken its place.
NodeFencedError, from `claim`, `check`, and all methods that make, change or remove a
segment as a whole: another mount has claimed the node.
A failed `write` may have written some of its bytes.  After NodeFullError, which only `write`
and `replace` raise, nothing is lost: the same write may be tried again.  A failed `flush` may
have made some bytes durable, and lost others.

**Owner.** A mount that writes calls `claim` on all nodes before it reads a journal.  What
was flushed counts only if `is_owned` or `check` says afterwards that the node is still
this mount's.  A segment that appears after `claim` without being made by this object is
another mount's, and is not written.

**Threads.** The methods `read_now`, `opened`, `found_owner`, `refuse_owner`, `is_owned` and
`close` are called on the event loop.  They return at once, even while another thread hangs
in the node.  All others may block for any time, and are called in threads, several at a
time.  Concurrent writes go to different ranges.  A call that takes too long is abandoned,
not ended: it may still run, and write, after the node is closed and another object for the
same place is in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import Buffer

from ..config.owner_record import OwnerRecord
from ..format.records import SegmentKind


@dataclass(frozen=True, slots=True)
class Space:
    """Room on the device of a node, in bytes."""

    device: int
    """The number of the device; nodes with the same number share the room."""
    total: int
    free: int
    inodes: int | None = None
    """Free inodes; None if the file system has no limit of its own."""


@dataclass(frozen=True, slots=True)
class Strays:
    """Files among the segments of a node that are not of its store."""

    count: int
    names: tuple[str, ...]
    """Some of them, with their folder; as `ascii` writes them."""


class Segment(Protocol):
    """A segment that is open as a file, as long as this object is referenced."""

    fd: int
    """Open for reading, and for writing unless the node is read-only."""


class Node(Protocol):
    """A place that keeps segments; the docstring of the module applies to all methods."""

    has_holes: bool
    """Whether `punch` gives room back, as seen when a shard segment was last made."""

    def check(self) -> None:
        """Raise NodeError unless the node is present and unchanged, and has all files in use.

        NodeIdentityError if it is gone, or another node has taken its place.
        NodeFencedError if another mount has claimed it.
        """

    @property
    def found_owner(self) -> OwnerRecord | None:
        """The owner record as it was when the node was opened; None: it had none.

        UNREAD if it could not be read, and not `is_intact` if it is damaged.
        """

    def refuse_owner(self) -> None:
        """Raise NodeBusyError if another mount owns the node; UnreadOwnerError if it may."""

    def claim(self) -> None:
        """Become the owner, durably; who owned the node before is fenced."""

    def is_owned(self) -> bool:
        """Return whether no other mount has claimed the node, if this is known at once.

        False says nothing: `check` does.  Never raises.
        """

    def give_back(self) -> None:
        """Restore the owner record as it was before `claim`: the node is not used."""

    def disown(self) -> None:
        """Record that this mount will write nothing more."""

    def segments(self, kind: SegmentKind) -> list[int]:
        """Return the numbers of the segments of one kind, in ascending order."""

    def strays(self) -> Strays:
        """Return the files that are no segments, by their name or their kind."""

    def write(
        self, kind: SegmentKind, segment: int, offset: int, buffers: Sequence[Buffer]
    ) -> None:
        """Write all buffers, one after the other, from `offset` on.

        Makes the segment if it does not exist.  Does not keep the buffers.  NodeFullError.
        """

    def read(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes; zeros for unwritten ranges before the segment's end.

        NodeLacksError if the segment is too short, or is missing.
        """

    def read_back(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes:
        """Flush the segment, then read from the medium as far as caches can be bypassed.

        Reads exactly `length` bytes; NodeLacksError as in `read`.
        """

    def read_now(self, kind: SegmentKind, segment: int, offset: int, length: int) -> bytes | None:
        """Read exactly `length` bytes if this does not block, else None; never raises."""

    def opened(self, kind: SegmentKind, segment: int) -> Segment | None:
        """Return the segment if it is an open file that may be used directly; never raises."""

    def size(self, kind: SegmentKind, segment: int) -> int:
        """Return the size of a segment, without room allocated ahead; NodeLacksError."""

    def is_shared(self, kind: SegmentKind, segment: int) -> bool:
        """Return whether a segment has other names (hard links): it is only read and deleted.

        NodeLacksError.
        """

    def flush(self, kind: SegmentKind, segments: Sequence[int]) -> None:
        """Make written bytes of these segments durable; NodeLacksError if one is missing."""

    def truncate(self, kind: SegmentKind, segment: int, size: int) -> None:
        """End a finished segment at `size`, and release all room behind it, as far as it can.

        NodeLacksError.
        """

    def punch(self, segment: int, offset: int, length: int) -> None:
        """Release the room of a freed payload in a shard segment, as far as the node can.

        Afterwards each of its bytes reads as before or as zero; no other byte changes.  A
        missing segment is not an error.
        """

    def replace(self, kind: SegmentKind, segment: int, content: Buffer) -> None:
        """Put `content` in the place of a finished segment, or make the segment; it is durable.

        After an error or a crash the segment is as it was before, or as it should be.
        What was opened before still reads what it read.  NodeFullError.
        """

    def delete(self, kind: SegmentKind, segment: int) -> None:
        """Remove a segment; running reads still succeed.

        A missing segment is not an error.  Durable when it returns: no crash brings the
        segment back.
        """

    def set_aside(self, kind: SegmentKind, segment: int) -> None:
        """Take a segment away, and keep its bytes where no other method finds them."""

    def drop_aside(self) -> None:
        """Remove all that was set aside; all deletions, also earlier ones, are durable then."""

    def space(self) -> Space:
        """Return the room on the device."""

    def keep_reserve(self, length: int) -> None:
        """Keep room for `length` more bytes of journal, which a full device cannot refuse.

        Does what it can: nothing on a device that is full, or cannot reserve room.
        """

    def bytes_used(self) -> int:
        """Return the bytes of the device that the segments take, with room allocated ahead.

        This examines each segment.
        """

    def held(self) -> dict[int, int]:
        """Return the bytes that each shard segment takes, and that its deletion gives back.

        With room allocated ahead.  This examines each segment.
        """

    def remove(self) -> None:
        """Remove the node from its place; it must have no segments.  NodeError."""

    def close(self) -> None:
        """Close descriptors; this flushes nothing."""
