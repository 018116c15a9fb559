"""Writing records to the journals of all nodes; each is durable when `append` returns.

A record goes to the same segment and offset on every node in sync.  If no node has
anything else to flush, the short way writes all journals with one call of the kernel's
ring, over prepared zeros.  Otherwise each node has a thread, which also flushes the
shards that were written there.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress

import trio

from ..errors import (
    NodeError,
    NodeFullError,
    NodeLacksError,
    NodeReadOnlyError,
    NodeTimeoutError,
)
from ..format.records import HEADER_BYTES, Header, Kind, SegmentKind, record_length
from ..log.log import Log
from ..members.journal_room import JournalRoom
from ..members.member import Member
from ..system.io_uring import Batch, Operation, Ring

_NOT_TRIED = (-errno.EAGAIN, -errno.EINVAL, -errno.ECANCELED, -errno.EFBIG)
"""Results of the ring for a write that the file system did not begin.  For ECANCELED the kernel
could start no thread; for EFBIG the process may not write that far."""


class JournalWriter:
    """Has the end of the journals, and appends to them with `Committer.lock` held."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._limits = log.limits
        self.segment = 1
        self.offset = 0
        self._rolled: list[tuple[int, int]] = []
        """Finished segments, and their sizes, until they are trimmed."""
        self._waits_for: Batch | None = None
        """What an append waits for."""
        self._begun = trio.Event()
        self._is_watched = False
        self.commit_bytes = 0
        """Bytes of commits in each journal since the last metadata dump began."""

    async def append(self, header: Header, payload: bytes) -> None:
        """Append a record to the journals of all nodes in sync, and flush all nodes.

        A node that cannot do this fails; the caller checks whether enough nodes are left.
        """
        if self.offset >= self._limits.journal_segment_bytes:
            self.roll()
        offset = self.offset
        self.offset += record_length(len(payload))
        if header.kind is Kind.COMMIT:
            self.commit_bytes += record_length(len(payload))
        if await self._append_directly(offset, header, payload):
            if header.kind is Kind.COMMIT:
                self._log.room.appended()
            return
        await self._append_in_threads(offset, header, payload)
        self._rolled.clear()
        self._log.room.refresh()

    async def _append_in_threads(self, offset: int, header: Header, payload: bytes) -> None:
        """The long way.  While too many nodes have no room, the record waits for it."""
        room, todo = self._log.room, self._log.members.writable
        while True:
            places = [member.device.place(header.record_length) for member in todo]
            if header.kind is Kind.COMMIT:
                room.appended()  # it is counted as placed from here on
            full: dict[Member, NodeFullError] = {}
            async with trio.open_nursery() as nursery:
                nursery.cancel_scope.shield = True
                for member in todo:
                    nursery.start_soon(self._flush_node, member, offset, header, payload, full)
            for device in places:
                device.land(header.record_length)
            if not full:
                break
            if self._log.can_do_without(full) or not await self._log.wait_for_room(full):
                for member, error in full.items():
                    member.fail(error)
                break
            todo = [member for member in full if member.writable]
        self._log.waited()

    async def _append_directly(self, offset: int, header: Header, payload: bytes) -> bool:
        """Append a record the short way, without threads, if no node has other data to flush.

        False if this was not possible, or a write was short: the long way then finds the error.
        """
        members, now = self._log.members.writable, trio.current_time()
        ring = members[0].ring if members else None
        if ring is None or self._rolled:
            return False
        rest = payload + bytes(header.record_length - len(payload) - HEADER_BYTES)
        writes: list[tuple[Member, JournalRoom, Operation, object]] = []
        for member in members:
            room = member.journal_room
            fresh = now - member.sampled_at <= self._limits.sample_seconds
            if room is None or member.shards.dirty or not member.in_sync or not fresh:
                return False
            seed = self._log.journal(member.name, self.segment).seed(offset)
            write = room.write(self.segment, offset, header.encode(seed) + rest)
            if write is None:
                return False
            writes.append((member, room, *write))
        batch = ring.start([operation for _, _, operation, _ in writes], writes)
        if batch is None:
            return False
        if batch.left:
            await self._written(ring, batch, members, now)
        whole = True
        for (member, room, operation, _), result in zip(writes, batch.results, strict=True):
            if result is None:
                member.fail(member.late(self._limits.node_seconds_max))
                member.journal_room, member.late_segment = None, self.segment
            elif result in _NOT_TRIED or 0 <= result < operation.length:
                whole = False
            elif result < 0:  # never retried: a second flush may wrongly succeed
                reason = os.strerror(-result)
                kind = NodeReadOnlyError if result == -errno.EROFS else NodeError
                member.fail(kind(f"Node {member.name} cannot write its journal: {reason}."))
            elif os.fstat(room.fd).st_nlink and member.node.is_owned():
                room.written(header.record_length)
                self._holds(member, header)
            else:
                whole = False
        return whole

    async def _written(self, ring: Ring, batch: Batch, members: list[Member], begun: float) -> None:
        """Wait until the kernel has written a record, or those that are late may be given up."""
        if self._is_watched:  # a deadline for each append would take longer than many disks
            self._waits_for = batch
            self._begun.set()
            await ring.wait_shielded(batch)
            self._waits_for = None
        if not batch.left:
            return
        limits = self._limits
        calls = {
            member: member.calls.begin(None, is_patient=True, begun=begun) for member in members
        }
        try:
            while batch.left:
                with trio.move_on_after(self._pause, shield=True):
                    await ring.wait(batch)
                for member, result in zip(members, batch.results, strict=True):
                    if result is not None and member in calls:
                        member.calls.end(calls.pop(member))
                if trio.current_time() >= begun + limits.node_seconds_max:
                    given_up = [member.may_give_up(call) for member, call in calls.items()]
                    if all(given_up):
                        return
        finally:
            for member, call in calls.items():
                member.calls.end(call)

    @property
    def _pause(self) -> float:
        """Seconds until an append that the kernel has not completed looks for itself."""
        return min(self._limits.stall_seconds, self._limits.node_seconds_max / 4)

    async def watch(self) -> None:
        """Wake appends that take long, until cancelled."""
        self._is_watched = True
        try:
            while True:
                await self._begun.wait()
                batch = self._waits_for
                if batch is None:
                    self._begun = trio.Event()
                    continue
                await trio.sleep(self._pause)
                if batch is self._waits_for:
                    Ring.wake(batch)
        finally:
            self._is_watched = False
            if self._waits_for is not None:
                Ring.wake(self._waits_for)

    @staticmethod
    def _holds(member: Member, header: Header) -> None:
        if header.kind is Kind.COMMIT:
            member.standing.flushed(header.number, header.payload_checksum)

    async def _flush_node(
        self,
        member: Member,
        offset: int,
        header: Header,
        payload: bytes,
        full: dict[Member, NodeFullError],
    ) -> None:
        dirty, member.shards.dirty = member.shards.dirty, set()
        rolled, member.shards.rolled = member.shards.rolled, set()
        shards = len(member.shards.unflushed)
        began = time.perf_counter_ns()
        try:
            await member.call(
                self._write_node, member, offset, header, payload, sorted(dirty), rolled
            )
        except NodeFullError as error:
            member.shards.dirty |= dirty
            member.shards.rolled |= rolled
            full[member] = error
            return
        except NodeError as error:
            if isinstance(error, NodeTimeoutError):
                member.late_segment = self.segment
            member.fail(error)
            return
        finally:
            member.flushes.add(time.perf_counter_ns() - began)
        del member.shards.unflushed[:shards]
        member.sampled_at = trio.current_time()
        self._holds(member, header)

    def _write_node(
        self,
        member: Member,
        offset: int,
        header: Header,
        payload: bytes,
        dirty: list[int],
        rolled: set[int],
    ) -> None:
        """In a thread: append the record and flush all data written to the node."""
        node = member.node
        if member.in_sync:
            seed = self._log.journal(member.name, self.segment).seed(offset)
            padding = bytes(header.record_length - len(payload) - HEADER_BYTES)
            buffers = [header.encode(seed), payload, padding]
            length = header.record_length
            member.append(self.segment, offset, buffers, length, ahead=not dirty)
            node.flush(SegmentKind.JOURNAL, [self.segment])
            for segment, size in self._rolled:
                node.truncate(SegmentKind.JOURNAL, segment, size)
        node.flush(SegmentKind.SHARDS, dirty)
        for segment in rolled:
            state = member.shards.states.get(segment)
            if state is not None:
                with suppress(NodeLacksError):  # it was deleted meanwhile
                    node.truncate(SegmentKind.SHARDS, segment, state.size)
        member.sample()

    def begin(self, segment: int) -> None:
        """Continue in a segment that no node has; earlier segments stay as they are."""
        self.segment, self.offset = segment, 0
        self._rolled.clear()

    def roll(self) -> None:
        """Continue in a new journal segment."""
        if self.offset:
            self._rolled.append((self.segment, self.offset))
        self.segment += 1
        self.offset = 0
