"""One node of an open store: calls with deadlines, and the known state of the node.

If a call takes longer than `node_seconds_max`, it is given up, and the node is taken out of
use.  If the store cannot do without the node, as when all disks hang at once, it waits up to
`patience_seconds`.  All methods run on the event loop unless documented otherwise.  Only
`call` and `read` await.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, TypeVar, cast

import trio
from typing_extensions import Buffer

from ..config.store_config import NodeConfig
from ..errors import (
    InterruptedNodeError,
    NodeFencedError,
    NodeFullError,
    NodeOfflineError,
    NodeReadOnlyError,
    NodeTimeoutError,
)
from ..format.records import SegmentKind
from ..format.store_rows import NodeRow
from ..format.stripe_rows import ShardPlace
from ..limits import Limits
from ..nodes.absent import AbsentNode
from ..nodes.base import Node, Segment, Space
from ..system.io_uring import Ring, read_operation
from ..tally import Histogram
from .devices import Device, Devices
from .journal_room import JournalRoom
from .node_calls import NodeCall, NodeCalls
from .shard_segments import ShardSegments
from .standing import Standing, State

logger = logging.getLogger(__name__)

T = TypeVar("T")


@cache
def _zeros(length: int) -> bytes:
    return bytes(length)


class Member:
    """A node of the store."""

    def __init__(self, node_id: int, config: NodeConfig, limits: Limits, holds: int = 0) -> None:
        self.id = node_id
        self.config = config
        self.limits = limits
        self.node: Node = AbsentNode(config.name)
        self.standing = Standing(config.name, limits, holds)
        self.shards = ShardSegments(limits)
        self.space: Space | None = None
        """Room on its device at the last flush or probe."""
        self.devices = Devices()
        """Those of all nodes of the store."""
        self._unknown = Device()
        self.is_full = False
        """Its device has no room for more shards; others of its region may have."""
        self.lacks_room = ""
        """Why shards that it lacks cannot be rebuilt: a sentence, or empty."""
        self.sampled_at = 0.0
        """The time of `space`, by trio's clock."""
        self.journal_room: JournalRoom | None = None
        """The place for small commits."""
        self.late_segment = 0
        """A journal segment that an abandoned write may still change."""
        self.ring: Ring | None = None
        """Reads and durable writes without a thread, if the kernel supports this."""
        self.used = 0
        """Bytes that the node takes on its device, as last measured."""
        self.corrupt = 0
        """Reads that returned other bytes than were written."""
        self.flushes = Histogram()
        """Durations of the node's part of commits."""
        self.on_fenced: Callable[[str], None] = lambda reason: None
        """Called when another mount has claimed the node; the log breaks."""
        self.calls = NodeCalls(limits.node_threads_max)
        """Ended at once when the node fails."""
        self.was_late = False
        """Whether it failed because it did not answer in time."""
        self.can_be_spared: Callable[[], bool] = lambda: True
        """Whether the store can do without it; `Members` knows."""

    # --- state ---------------------------------------------------------------

    @property
    def name(self) -> str:
        """The node's name in the configuration."""
        return self.config.name

    @property
    def state(self) -> State:
        """See `standing`."""
        return self.standing.state

    @property
    def in_sync(self) -> bool:
        """See `standing`."""
        return self.standing.in_sync

    @property
    def writable(self) -> bool:
        """See `standing`."""
        return self.standing.writable

    @property
    def out_of_use(self) -> bool:
        """See `standing`."""
        return self.standing.out_of_use

    @property
    def takes(self) -> bool:
        """Whether the node gets shards of new stripes."""
        return self.writable and not self.config.draining

    @property
    def is_open(self) -> bool:
        """Whether the node was opened; it may still be out of use."""
        return not isinstance(self.node, AbsentNode)

    def open(self, node: Node, space: Space) -> None:
        """Record that the node is open; its missing data is not known yet."""
        self.node, self.space = node, space
        self.devices.end_sample(self.devices.begin_sample(), space)
        self.standing.opened()

    @property
    def device(self) -> Device:
        """The device of the node; until that is known, one of its own."""
        return self.devices.at(self.space.device) if self.space is not None else self._unknown

    def enter(self, node: Node, on_disk: Sequence[int]) -> None:
        """Give new shards to a reopened node; `on_disk` are its shard segments."""
        self.reopen(node)
        self.shards.begin_after(on_disk)
        self.shards.nothing_unflushed()
        self.standing.entered()

    def reopen(self, node: Node) -> None:
        """Use a node that was opened anew; its state does not change.

        NodeOfflineError if the node was taken offline meanwhile; it is closed then.
        """
        if self.config.offline:
            node.close()
            raise NodeOfflineError(self.standing.error)
        if node is not self.node:
            self.let_go()
            self.node = node

    def resume(self, on_disk: Sequence[int]) -> None:
        """Use a reopened node as if it had not failed, if no shard of it is unflushed."""
        self.shards.begin_after(on_disk)
        self.standing.resumed()

    def let_go(self) -> None:
        """Close the node, so that its disk can be unmounted."""
        was_open = self.is_open
        self.node.close()
        self.node, self.journal_room = AbsentNode(self.name), None
        if was_open:
            gc.collect()  # the frames of its errors, which refer to each other, keep files open

    def only_read(self, node: Node | None, error: NodeReadOnlyError) -> None:
        """Read from the node, reopened if one is given, and write nothing to it."""
        if node is not None:
            self.reopen(node)
        if self.standing.error != str(error):
            logger.error("%s The node is read, but gets no data; see 'fusestore status'.", error)
        self.standing.only_read(error)

    def fail(self, error: Exception) -> None:
        """Take the node out of use; its unflushed shards now count as missing.

        A node whose file system has become read-only is still read.
        """
        if isinstance(error, NodeFencedError):
            self.on_fenced(str(error))
        if isinstance(error, NodeReadOnlyError) and not self.out_of_use:
            self.only_read(None, error)
            return
        if not self.standing.failed(error):
            return
        if isinstance(error, (NodeOfflineError, InterruptedNodeError)):
            logger.info("%s", error)
        else:
            logger.error("%s The node is now out of use; see 'fusestore status'.", error)
        self.was_late = isinstance(error, NodeTimeoutError)
        self.calls.end_all()

    def note_full(self, error: NodeFullError) -> None:
        """Log once that the node has no room for shards that it lacks; it stays in use."""
        if self.lacks_room != str(error):
            logger.warning("%s", error)
        self.lacks_room = str(error)

    def row(self) -> NodeRow:
        """The row of the node for the log."""
        at = self.config
        place = (self.id, at.name, at.region, str(at.path))
        holds = 0 if self.in_sync else self.standing.holds
        checksum = 0 if self.in_sync else self.standing.checksum
        return NodeRow(*place, self.in_sync, holds, at.weight, at.draining, checksum)

    # --- calls ---------------------------------------------------------------

    async def call(
        self, function: Callable[..., T], *arguments: Any, seconds: float | None = None
    ) -> T:
        """Call a function with the node in a thread; NodeTimeoutError if it takes too long.

        With `seconds`, that is not a reason to take the node out of use.
        """
        limit = self.limits.node_seconds_max if seconds is None else seconds
        judge = self.may_give_up if seconds is None else None
        found = await self.calls.run(partial(function, *arguments), limit, judge)
        if found is None:
            raise self.late(limit)
        try:
            return cast("T", found.unwrap())
        finally:
            del found  # an error refers to this frame, and would keep itself and files open

    def may_give_up(self, call: NodeCall) -> bool:
        """Return whether to fail the node for a call that is late, or to wait on."""
        now = trio.current_time()
        if now - call.begun >= self.limits.patience_seconds:
            return True
        if self.can_be_spared():
            since = call.begun if call.spared_at is None else call.spared_at
            return now - since >= self.limits.node_seconds_max
        if not self.calls.are_spared:
            logger.warning(
                "Node %s has not answered for %.0f seconds. The store cannot do without it, and "
                "waits.",
                self.name,
                now - call.begun,
            )
        call.spared_at = now
        return False

    @property
    def watched(self) -> tuple[str, Node]:
        """Return the name and the node for use in a trio thread; each call has a deadline."""
        return self.name, cast("Node", _Watched(self))

    async def read(
        self, kind: SegmentKind, segment: int, offset: int, length: int, seconds: float
    ) -> bytes | bytearray:
        """Read exactly `length` bytes of a segment; NodeError, NodeTimeoutError."""
        node = self.node
        if self.ring is None or length <= self.limits.read_now_bytes_max:
            data = node.read_now(kind, segment, offset, length)
            if data is not None:
                return data
        opened = node.opened(kind, segment) if self.ring is not None else None
        if opened is not None:
            buffer = bytearray(length)
            if await self._fill(opened, offset, buffer, seconds):
                return buffer
        return await self.call(node.read, kind, segment, offset, length, seconds=seconds)

    async def _fill(self, opened: Segment, offset: int, buffer: bytearray, seconds: float) -> bool:
        assert self.ring is not None
        operation, kept = read_operation(opened.fd, offset, buffer)
        batch = self.ring.start([operation], (kept, opened))
        if batch is None:
            return False
        if batch.left:
            with trio.move_on_after(seconds, shield=True) as scope:
                call = self.calls.begin(scope, is_patient=False)
                try:
                    await self.ring.wait(batch)
                finally:
                    self.calls.end(call)
            if batch.left:
                raise self.late(seconds)
        return batch.results[0] == len(buffer)

    def append(
        self, segment: int, offset: int, buffers: Sequence[Buffer], length: int, *, ahead: bool
    ) -> None:
        """Write a record of `length` bytes to the journal, and zeros behind it; in a thread."""
        node = self.node
        end, room = offset + length, self.journal_room
        if room is None or not room.covers(segment, end):
            self.journal_room = room = None
        node.write(SegmentKind.JOURNAL, segment, offset, buffers)
        usable = self.node is node and self.in_sync  # not abandoned
        ahead = ahead and self.device.room >= self.limits.scarce_bytes
        if ahead and room is None and usable and node.is_owned():  # which small commits ask
            with suppress(NodeFullError):
                zeros = _zeros(self.limits.journal_ahead_bytes)
                node.write(SegmentKind.JOURNAL, segment, end, [zeros])
                opened = node.opened(SegmentKind.JOURNAL, segment)
                if opened is not None:
                    room = JournalRoom(opened, segment, end + len(zeros), self.limits)
        if room is not None:
            lead = room.lead(end)
            room.begin(end, node.read(SegmentKind.JOURNAL, segment, end - lead, lead))
            self.journal_room = room

    def late(self, seconds: float) -> NodeTimeoutError:
        """Return the error for a node that did not answer in time."""
        return NodeTimeoutError(f"Node {self.name} did not answer within {seconds:.0f} seconds.")

    def sample(self, node: Node | None = None) -> None:
        """Check the identity of the node, and measure its room; runs in a thread.

        `node` is about to take its place, perhaps on another disk.
        """
        node = node or self.node
        node.check()
        begun = self.devices.begin_sample()
        self.space = node.space()
        self.devices.end_sample(begun, self.space)
        if self.space.free < self.limits.journal_reserve_below_bytes:
            node.keep_reserve(self.limits.journal_reserve_bytes)

    def reserve(self, payload_length: int) -> ShardPlace:
        """Reserve the next place for a shard; the caller then writes the shard."""
        return self.shards.reserve(self.id, payload_length, has_holes=self.node.has_holes)


class _Watched:
    """A node for use in a trio thread; each call has a deadline."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._node = member.node

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._node, name)
        return lambda *arguments: trio.from_thread.run(partial(self._ask, method, *arguments))

    async def _ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await self._member.call(method, *arguments)
        except NodeTimeoutError as error:
            self._member.fail(error)
            raise
