"""Reads and durable writes without a thread: io_uring, on trio's event loop.

A call in a thread costs 60 to 100 µs, most of it for passing the interpreter lock;
the kernel's ring costs about 15.  Operations are written to a queue that the kernel
shares, and one system call submits them.  A task of the event loop waits on an eventfd
that reports completed operations.

This is an optimisation.  If the kernel does not offer io_uring (containers often
forbid it), `Ring.open` returns None, and the caller uses a thread.

Layouts and numbers are those of `linux/io_uring.h`.  Only one thread may use a ring.
Bytes that an operation reads or writes must not move or change until it is done.
Therefore a batch keeps them, even after the caller was cancelled.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import trio
from cffi import FFI
from typing_extensions import Buffer

_ffi = FFI()
_ffi.cdef(
    """
    struct sq_offsets { uint32_t head, tail, mask, entries, flags, dropped, array, reserved;
                        uint64_t address; };
    struct cq_offsets { uint32_t head, tail, mask, entries, overflow, cqes, flags, reserved;
                        uint64_t address; };
    struct params { uint32_t sq_entries, cq_entries, flags, thread_cpu, thread_idle, features,
                             wq_fd, reserved[3];
                    struct sq_offsets sq; struct cq_offsets cq; };
    struct sqe { uint8_t opcode, flags; uint16_t priority; int32_t fd;
                 uint64_t offset, address; uint32_t length, how; uint64_t user_data, rest[3]; };
    struct cqe { uint64_t user_data; int32_t result; uint32_t flags; };
    long syscall(long number, ...);
    int eventfd(unsigned int value, int flags);
    """
)
_libc = _ffi.dlopen(None)

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_REGISTER_EVENTFD = 4
_SINGLE_MMAP = 1
_SQES_OFFSET = 0x10000000
_READ, _WRITE = 22, 23
_DSYNC = 2
"""RWF_DSYNC: the write includes an fdatasync."""
_ENTRIES = 256
_U32 = 0xFFFFFFFF


class Operation(NamedTuple):
    """An operation for the kernel."""

    opcode: int
    descriptor: int
    offset: int
    address: int
    length: int
    how: int = 0


class Batch:
    """Submitted operations and their results: -errno after a failure, None until done."""

    __slots__ = ("keep", "left", "results", "task")

    def __init__(self, count: int, keep: object) -> None:
        self.results: list[int | None] = [None] * count
        self.left = count
        self.keep = keep
        self.task: trio.lowlevel.Task | None = None


def read_operation(descriptor: int, offset: int, buffer: Buffer) -> tuple[Operation, object]:
    """Fill a buffer from a file; return the operation, and an object to keep until it is done."""
    kept = _ffi.from_buffer(buffer, require_writable=True)
    return Operation(_READ, descriptor, offset, _address(kept), len(kept)), kept


def write_operation(descriptor: int, offset: int, data: Buffer) -> tuple[Operation, object]:
    """Write bytes to a file, durable when the operation is done; see `read_operation`."""
    kept = _ffi.from_buffer(data)
    return Operation(_WRITE, descriptor, offset, _address(kept), len(kept), _DSYNC), kept


def _address(pointer: Any) -> int:
    return int(_ffi.cast("uintptr_t", pointer))


class Ring:
    """One io_uring of a process."""

    @classmethod
    def open(cls) -> Self | None:
        """Return a ring, or None if the kernel does not offer one."""
        try:
            return cls()
        except OSError:
            return None

    def __init__(self) -> None:
        params = _ffi.new("struct params *")
        self._fd = _syscall(_SETUP, _ENTRIES, params)
        self._event = -1
        try:
            self._map(params)
            self._event = _libc.eventfd(0, os.O_NONBLOCK | os.O_CLOEXEC)
            if self._event < 0:
                raise OSError(_ffi.errno, os.strerror(_ffi.errno))
            _syscall(_REGISTER, self._fd, _REGISTER_EVENTFD, _ffi.new("int *", self._event), 1)
        except OSError:
            self._close()
            raise
        self._number = _ffi.cast("long", self._fd)
        self._zero = _ffi.cast("long", 0)
        self._under_way: dict[int, tuple[Batch, int]] = {}
        self._next = 0

    def _map(self, params: Any) -> None:
        if not params.features & _SINGLE_MMAP:
            raise OSError(errno.ENOSYS, "this kernel's io_uring is too old")
        size = max(
            params.sq.array + 4 * params.sq_entries,
            params.cq.cqes + _ffi.sizeof("struct cqe") * params.cq_entries,
        )
        self._rings = mmap.mmap(self._fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        entry_bytes = _ffi.sizeof("struct sqe") * params.sq_entries
        self._entries = mmap.mmap(
            self._fd, entry_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_SQES_OFFSET
        )
        base = _ffi.cast("char *", _ffi.from_buffer(self._rings))
        self._sq_tail = _ffi.cast("uint32_t *", base + params.sq.tail)
        self._sq_mask = params.sq_entries - 1
        order = _ffi.cast("uint32_t *", base + params.sq.array)
        for i in range(params.sq_entries):
            order[i] = i
        self._cq_head = _ffi.cast("uint32_t *", base + params.cq.head)
        self._cq_tail = _ffi.cast("uint32_t *", base + params.cq.tail)
        self._cq_mask = params.cq_entries - 1
        self._cqes = _ffi.cast("struct cqe *", base + params.cq.cqes)
        self._sqes = _ffi.cast("struct sqe *", _ffi.from_buffer(self._entries))

    def _close(self) -> None:
        for descriptor in (self._fd, self._event):
            if descriptor >= 0:
                os.close(descriptor)

    async def run(self) -> None:
        """Wake the tasks whose operations are done, until cancelled; then close the ring."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._event)
                os.eventfd_read(self._event)
                self._reap()
        finally:
            if self._under_way:  # on disks that hang: the kernel may still use these buffers
                _ABANDONED.append(self)
            else:
                self._close()

    def start(self, operations: Sequence[Operation], keep: object) -> Batch | None:
        """Submit operations to the kernel; None if the ring is full.

        Operations that do not wait are done when this returns.
        """
        if len(self._under_way) + len(operations) > _ENTRIES:
            return None
        batch = Batch(len(operations), keep)
        tail = self._sq_tail[0]
        for index, operation in enumerate(operations):
            entry = self._sqes[(tail + index) & self._sq_mask]
            self._next += 1
            self._under_way[self._next] = batch, index
            entry.opcode, entry.fd = operation.opcode, operation.descriptor
            entry.flags = entry.priority = 0
            entry.offset, entry.address = operation.offset, operation.address
            entry.length, entry.how = operation.length, operation.how
            entry.user_data = self._next
            entry.rest = (0, 0, 0)
        self._sq_tail[0] = (tail + len(operations)) & _U32
        count = _ffi.cast("long", len(operations))
        done = _libc.syscall(
            _ENTER, self._number, count, self._zero, self._zero, _ffi.NULL, self._zero
        )
        if done != len(operations):
            # The kernel is short of memory: withdraw the operations that it did not accept.
            done = max(done, 0)
            self._sq_tail[0] = (tail + done) & _U32
            for index in range(done, len(operations)):
                del self._under_way[self._next - len(operations) + 1 + index]
                batch.results[index] = -errno.EAGAIN
                batch.left -= 1
        self._reap()
        return batch

    async def wait(self, batch: Batch) -> None:
        """Return when a batch is done; after a cancellation its operations still run."""
        if batch.left:
            batch.task = trio.lowlevel.current_task()

            def give_up(_: Any) -> trio.lowlevel.Abort:
                batch.task = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(give_up)

    async def wait_shielded(self, batch: Batch) -> None:
        """Return when a batch is done, or `wake` is called, whatever is cancelled meanwhile."""
        if batch.left:
            batch.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

    @staticmethod
    def wake(batch: Batch) -> None:
        """Let the task that waits for a batch look for itself."""
        if batch.task is not None:
            trio.lowlevel.reschedule(batch.task)
            batch.task = None

    def _reap(self) -> None:
        head, tail = self._cq_head[0], self._cq_tail[0]
        while head != tail:
            entry = self._cqes[head & self._cq_mask]
            batch, index = self._under_way.pop(entry.user_data)
            batch.results[index] = entry.result
            batch.left -= 1
            head = (head + 1) & _U32
            if not batch.left:
                batch.keep = None
                self.wake(batch)
            self._cq_head[0] = head


_ABANDONED: list[Ring] = []


def _syscall(number: int, *arguments: Any) -> int:
    converted = [
        _ffi.cast("long", value) if isinstance(value, int) else value for value in arguments
    ]
    result = int(_libc.syscall(number, *converted))
    if result < 0:
        raise OSError(_ffi.errno, os.strerror(_ffi.errno))
    return result
