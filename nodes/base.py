"""What the log needs of a place that keeps data: the contract of every kind of node.

A node keeps two runs of segments, journal and shards.  The log chooses their
numbers, 1 <= n < 2**32, and all offsets; offsets, lengths and sizes are in bytes.
A segment is rolled at the size that `Limits` names, and its last record may reach
past that.

**Writing.** A segment is written forward, with two exceptions.  Records of a journal
overwrite zeros that were written behind its end.  Repair writes at places that were
written before, with the bytes that belong there; a node that cannot do so (an
object store) writes the segment anew.  Bytes are readable once `write` has
returned.  They, and the segment itself, are durable once a `flush` has returned
that was called after that.  The order in which unflushed bytes become durable is
not defined.

**Errors.** Methods raise NodeError and nothing else.  NodeFullError: there is no
room.  NodeLacksError: the node does not have the segment, or not all of the bytes;
it is sound otherwise.  NodeIdentityError, of `check` alone: this is not the node any
more.  A `write` that fails may have left some of its bytes; a `flush` that fails may
have made some durable.

**Threads.** All methods but `read_now`, `opened` and `close` may block for any time,
and are called in threads, several at a time.  Concurrent writes go to different
ranges.  `read_now`, `opened` and `close` are called on the event loop.  They return
at once, even while another thread hangs in the node.  A call that takes too long is
abandoned, not ended: it may still go on, and write, when the node is closed and
another object for the same place is in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import Buffer

from ..format.records import Run


@dataclass(frozen=True, slots=True)
class Space:
    """Room on the device that a node lies on, in bytes."""

    device: int
    """Nodes with the same number share the room."""
    total: int
    free: int


class Segment(Protocol):
    """A segment that is open as a file; stays so as long as it is referred to."""

    fd: int
    """Open for reading, and for writing unless the node is read-only."""


class Node(Protocol):
    """A place that keeps segments; the module says what holds for all methods."""

    def check(self) -> None:
        """Raise NodeError unless the node is still there, still itself, and lost nothing in use.

        NodeIdentityError when it is gone, or another has taken its place.
        """

    def segments(self, run: Run) -> list[int]:
        """Numbers of the segments of a run, in ascending order."""

    def write(self, run: Run, segment: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, one after the other, from `offset` on.

        Makes the segment if there is none.  The buffers are not kept.  NodeFullError.
        """

    def read(self, run: Run, segment: int, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; zeros where nothing was written before the segment's end.

        NodeLacksError when the segment ends before that, or is not there.
        """

    def read_back(self, run: Run, segment: int, offset: int, length: int) -> bytes:
        """Flush the segment, then read from the medium as far as caches can be passed by.

        Exactly `length` bytes; NodeLacksError as of `read`.
        """

    def read_now(self, run: Run, segment: int, offset: int, length: int) -> bytes | None:
        """Exactly `length` bytes if that takes no waiting, else None; never raises."""

    def opened(self, run: Run, segment: int) -> Segment | None:
        """The segment, if it is an open file that may be used directly; never raises."""

    def size(self, run: Run, segment: int) -> int:
        """Bytes up to a segment's end, without what is allocated ahead; NodeLacksError."""

    def flush(self, run: Run, segments: Sequence[int]) -> None:
        """Make durable what was written to these segments; NodeLacksError when one is not there."""

    def truncate(self, run: Run, segment: int, size: int) -> None:
        """End a finished segment at `size`, and give back what lies or is allocated behind that.

        NodeLacksError.
        """

    def punch(self, segment: int, offset: int, length: int) -> None:
        """Give back the room of a freed payload in a shard segment, as far as the node can.

        Each of its bytes reads as before or as zero from then on; no other byte changes.  A
        segment that is not there is no error.
        """

    def replace(self, run: Run, segment: int, content: Buffer) -> None:
        """Put `content` in the place of a finished segment, or make the segment; it is durable.

        After an error or a crash the segment is as it was before, or as it should be.
        What was opened before still reads what it read.  NodeFullError.
        """

    def delete(self, run: Run, segment: int) -> None:
        """Remove a segment; a read under way still ends well.

        One that is not there is no error.  After a crash it may be there again.
        """

    def set_aside(self, run: Run, segment: int) -> None:
        """Take a segment away, and keep its bytes where no other method finds them."""

    def drop_aside(self) -> None:
        """Remove all that was set aside."""

    def space(self) -> Space:
        """Room on the device."""

    def bytes_used(self) -> int:
        """Bytes of the device that the segments take, with what is allocated ahead.

        Looks at each segment.
        """

    def close(self) -> None:
        """Give up descriptors; nothing is flushed."""
