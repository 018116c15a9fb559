"""Room in a journal: zeros that lie ready behind its last record, for small commits.

To overwrite them costs a file system nothing but the write, and when that goes
past the page cache (O_DIRECT) not even a thread of the kernel.  Such a write
begins and ends with a block.  So what there is of the block that the last
record ends in is kept, and written again as it is; a medium that writes whole
sectors, or leaves them, takes nothing from that record.
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
    """The zeros in a segment up to `end`; where records go on is said by `begin`."""

    def __init__(self, target: Segment, segment: int, end: int, limits: Limits) -> None:
        """In a thread: find out how the open segment can be written."""
        self._target = target  # it stays open
        self._record_bytes_max = limits.direct_record_bytes_max
        self._segment, self._offset = segment, -1
        self._end = end // _BLOCK_BYTES * _BLOCK_BYTES
        self._buffer = memoryview(mmap.mmap(-1, limits.direct_record_bytes_max + 2 * _BLOCK_BYTES))
        self._block, self._direct = 1, -1
        with contextlib.suppress(OSError):  # then it is written through the page cache
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
        """What is written to."""
        return self._target.fd if self._block == 1 else self._direct

    def covers(self, segment: int, end: int) -> bool:
        """Whether zeros lie ready up to `end` of a segment, or were there."""
        return segment == self._segment and end <= self._end

    def lead(self, offset: int) -> int:
        """Bytes before `offset` that a write of what follows has to begin with."""
        return offset % self._block

    def begin(self, offset: int, lead: bytes) -> None:
        """The next record begins at `offset`, behind these bytes of its block."""
        self._offset = offset
        self._buffer[: len(lead)] = lead

    def write(self, segment: int, offset: int, record: bytes) -> tuple[Operation, object] | None:
        """The write of a record, and what must be kept until it is done; None: not from here."""
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
        """The record of `length` bytes that was to be written last is in the file."""
        stop = self.lead(self._offset) + length
        start = stop - self.lead(stop)
        self._offset += length
        self._buffer[: stop - start] = self._buffer[start:stop]
