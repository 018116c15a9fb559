"""What the log needs of a place that keeps data: the contract of every kind of node.

A node keeps two runs of segments, journal and shards.  A segment is written
forward, never over what it holds; the log chooses numbers and offsets.
`write` may be called from several threads at a time for different ranges;
bytes are durable once `flush` has returned.  All errors are NodeError:
NodeFullError where there is no room, NodeLacksError where a segment or bytes of
it are not there; a read never returns less than it was asked for.

Repair writes at places that were written before, with the bytes that belong
there; a node that cannot do so (an object store) writes the segment anew.
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


class Node(Protocol):
    """A place that keeps segments; all methods but `read_now` and `opened` may block."""

    def check(self) -> None:
        """Raise NodeError unless the node is still there, still itself, and lost nothing in use."""

    def segments(self, run: Run) -> list[int]:
        """Numbers of the segments there are, in order."""

    def write(self, run: Run, segment: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, one after the other; makes the segment if there is none."""

    def read(self, run: Run, segment: int, offset: int, length: int) -> bytes:
        """Exactly `length` bytes."""

    def read_back(self, run: Run, segment: int, offset: int, length: int) -> bytes:
        """Flush the segment, then read from the medium as far as caches can be passed by."""

    def read_now(self, run: Run, segment: int, offset: int, length: int) -> bytes | None:
        """Exactly `length` bytes if that takes no waiting, else None; never raises."""

    def opened(self, run: Run, segment: int) -> Segment | None:
        """The segment, if it is an open file that may be used directly."""

    def size(self, run: Run, segment: int) -> int:
        """Bytes in a segment."""

    def flush(self, run: Run, segments: Sequence[int]) -> None:
        """Make what was written to these segments durable."""

    def truncate(self, run: Run, segment: int, size: int) -> None:
        """Give back what was allocated past the end of a finished segment."""

    def punch(self, segment: int, offset: int, length: int) -> None:
        """Give back the room of a shard's payload, as far as the node can."""

    def delete(self, run: Run, segment: int) -> None:
        """Remove a segment; a read under way still ends well."""

    def space(self) -> Space:
        """Room on the device."""

    def bytes_used(self) -> int:
        """Room that the segments take."""

    def close(self) -> None:
        """Give up descriptors; nothing is flushed."""
