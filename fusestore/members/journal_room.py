"""Room in a journal for small commits: zeros written ahead behind its last record.

Overwriting zeros needs no other change in the file system.  If the write bypasses the
page cache (O_DIRECT), it does not even need a kernel thread.  Such a write begins and
ends at a block boundary.  Therefore the begun block of the last record is kept, and
written again unchanged.  A device that writes each sector completely or not at all cannot
damage that record.
"""

from __future__ import annotations

import contextlib
import mmap
import os

from ..limits import Limits
from ..nodes.base import Segment
from ..system.io_uring import Operation, write_operation

_BLOCK_BYTES = 4096


class JournalRoom:
    """The zeros in a segment up to `end`; `begin` sets the place of the next record."""

    def __init__(self, target: Segment, segment: int, end: int, limits: Limits) -> None:
        """Determine how the open segment can be written; runs in a thread."""
        self._target = target  # keeps the segment open
        self._record_bytes_max = limits.direct_record_bytes_max
        self._segment, self._offset = segment, -1
        self._end = end // _BLOCK_BYTES * _BLOCK_BYTES
        self._buffer = memoryview(mmap.mmap(-1, limits.direct_record_bytes_max + 2 * _BLOCK_BYTES))
        self._block, self._direct = 1, -1
        with contextlib.suppress(OSError):  # otherwise writes go through the page cache
            path, flags = f"/proc/self/fd/{target.fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
            self._direct = os.open(path, flags)
            last = self._end - _BLOCK_BYTES
            if os.pwrite(self._direct, self._buffer[:_BLOCK_BYTES], last) == _BLOCK_BYTES:
                self._block = _BLOCK_BYTES

    def __del__(self) -> None:
        if self._direct >= 0:
            os.close(self._direct)

    @property
    def fd(self) -> int:
        """The descriptor for writes."""
        return self._target.fd if self._block == 1 else self._direct

    def covers(self, segment: int, end: int) -> bool:
        """Return whether zeros were written ahead up to `end` of a segment."""
        return segment == self._segment and end <= self._end

    def lead(self, offset: int) -> int:
        """Return how many bytes before `offset` a write at `offset` must include."""
        return offset % self._block

    def begin(self, offset: int, lead: bytes) -> None:
        """Set the place of the next record: `offset`, behind the bytes `lead` of its block."""
        self._offset = offset
        self._buffer[: len(lead)] = lead

    def write(self, segment: int, offset: int, record: bytes) -> tuple[Operation, object] | None:
        """Return the write of a record, and an object to keep until it is done.

        None if the record does not fit here.
        """
        end = offset + len(record)
        if (
            offset != self._offset
            or not self.covers(segment, end)
            or len(record) > self._record_bytes_max
        ):
            return None
        lead = self.lead(offset)
        stop = lead + len(record)
        whole = -(-stop // self._block) * self._block
        self._buffer[lead:stop] = record
        self._buffer[stop:whole] = bytes(whole - stop)
        return write_operation(self.fd, offset - lead, self._buffer[:whole])

    def written(self, length: int) -> None:
        """Record that the last record, of `length` bytes, is written."""
        stop = self.lead(self._offset) + length
        start = stop - self.lead(stop)
        self._offset += length
        self._buffer[: stop - start] = self._buffer[start:stop]
